"""The fictional world, question files, tools without a model, scoring. No model in this folder."""
import hashlib
import json
from pathlib import Path


class InputError(ValueError):
    """A user's mistake. One line names the culprit and what was expected; programs exit with 2."""


def read_file(path: Path) -> bytes:
    """The content of a file. InputError if it is missing or not readable."""
    try:
        return Path(path).read_bytes()
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
    """SHA-256 of the contents of files. A folder counts by its weights."""
    digest = hashlib.sha256()
    for path in map(Path, paths):
        parts = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
        for part in parts:
            with open(part, "rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def printable(line: str) -> str:
    """Escape newlines and all characters that could move the cursor of a terminal."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in line)
