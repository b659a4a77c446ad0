"""Questions and how they are scored: the fictional world, its teacher, question files, metrics. No model in here."""
import hashlib
import json
from pathlib import Path


class InputError(ValueError):
    """A user's mistake: one line that names the culprit and what was expected; programs exit with 2."""


def read_file(path: Path) -> bytes:
    """What a file holds; InputError names one that is missing or can't be read."""
    try:
        return Path(path).read_bytes()
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except OSError as error:
        raise InputError(f"{path}: not readable ({error.strerror})") from None


def read_json(path: Path, kind: type = dict) -> dict | list:
    """A JSON object, or a list, from a file; InputError names the file that is missing or broken."""
    content = read_file(path)
    try:
        data = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not JSON ({error})") from None
    if not isinstance(data, kind):
        raise InputError(f"{path}: expected a JSON {'object' if kind is dict else 'list'}, found {type(data).__name__}")
    return data


def fingerprint(*paths: Path) -> str:
    """SHA-256 of the contents of files. A folder counts by its weights."""
    digest = hashlib.sha256()
    for path in paths:
        parts = sorted(Path(path).glob("*.safetensors")) if Path(path).is_dir() else [path]
        for part in parts:
            with open(part, "rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()
