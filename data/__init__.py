"""The fictional world, question files, tools without a model, scoring. No model in this folder."""
import hashlib
import json
from pathlib import Path


class InputError(ValueError):
    """A user's mistake. One line names the culprit and what was expected; programs exit with 2."""


piped: dict[str, bytes] = {}  # a pipe, such as <(zcat a.gz), can be read only once


def read_file(path: Path) -> bytes:
    """The content of a file. InputError if it is missing or not readable."""
    if str(path) in piped:
        return piped[str(path)]
    try:
        content = Path(path).read_bytes()
        if Path(path).is_fifo():
            piped[str(path)] = content
        return content
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except OSError as error:
        raise InputError(f"{path}: not readable ({error.strerror})") from None


def read_json(path: Path, kind: type = dict) -> dict | list:
    """A JSON object, or a list, from a file. InputError if it is missing or broken."""
    content = read_file(path)
    try:
        value = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not JSON ({error})") from None
    if not isinstance(value, kind):
        wanted = "object" if kind is dict else "list"
        found = type(value).__name__
        raise InputError(f"{path}: expected a JSON {wanted}, found {found}")
    return value


def fingerprint(*paths: Path) -> str:
    """SHA-256 of the contents of files. A folder counts by its weights, config and tokenizer."""
    digest = hashlib.sha256()
    for path in map(Path, paths):
        if not path.is_dir():
            digest.update(hashlib.sha256(read_file(path)).digest())
            continue
        parts = [*path.glob("*.safetensors"), *path.glob("*config.json"), *path.glob("token*.json")]
        for part in sorted(set(parts)):
            with open(part, "rb") as file:  # weights may be larger than the memory
                digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def printable(line: str) -> str:
    """Escape newlines and all characters that could move the cursor of a terminal."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in line)
