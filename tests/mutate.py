"""Break the code, one line at a time, and check that the named test fails: python tests/mutate.py

mutations.txt holds one break per block: the file, the text to replace (it must occur there once), the replacement, and
the test that has to fail. The breaks are made in a copy. The working tree stays as it is. This process imports the
libraries once, and never a module of the project; each test runs in a fork, which imports the project from the copy."""
import gc
import os
import shutil
import sys
import tempfile
from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def read(path: Path) -> list[dict[str, str]]:
    """Blocks of a `file:`, an `old:`, a `new:` and a `test:` line, separated by blank lines."""
    blocks = [[line.split(": ", 1) if ": " in line else (line.rstrip(":"), "") for line in block.strip().splitlines()]
              for block in path.read_text(encoding="utf-8").split("\n\n") if block.strip()]
    for block in blocks:
        if [name for name, _ in block] != ["file", "old", "new", "test"]:
            sys.exit(f"{path}: no break of file, old, new and test: {block}")
    return [dict(block) for block in blocks]


def passes(copy: Path, log: Path, *tests: str) -> bool:
    """Whether the tests are green in the copy. A fork runs them and writes what pytest prints to the log."""
    code = 3
    child = os.fork()
    if child == 0:
        try:
            os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 1)
            os.dup2(1, 2)
            os.chdir(copy)
            sys.path[0] = str(copy)  # it was the folder of this file
            code = pytest.main(["-q", "-p", "no:cacheprovider", "--disable-plugin-autoload", "--assert=plain",
                                f"--basetemp={log.with_name('tmp')}", *tests])
            sys.stdout.flush()
        finally:
            os._exit(code)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if code not in (0, 1):
        sys.exit(f"{' '.join(tests)}: pytest ended with {code}\n{log.read_text(errors='replace')[-1500:]}")
    return code == 0


def main() -> None:
    """Apply each break to a copy, run its test, count."""
    sys.dont_write_bytecode = True
    os.environ |= {"PYTHONDONTWRITEBYTECODE": "1", "OPENBLAS_NUM_THREADS": "1"}  # a fork would lack numpy's threads
    for library in ("numpy", "torch._dynamo", "safetensors.torch", "tokenizers", "jsonschema", "tqdm"):
        import_module(library)
    gc.freeze()  # no fork searches the libraries for garbage
    breaks = read(ROOT / "tests" / "mutations.txt")
    killed = 0
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "copy"
        log = Path(folder) / "log"
        shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(
            ".git", ".venv", ".pytest_cache", "__pycache__", "run", "runs"))
        if not passes(copy, log, *sorted({b["test"] for b in breaks})):
            sys.exit(f"A test is red before anything is broken:\n{log.read_text(errors='replace')[-1500:]}")
        for b in breaks:
            path = copy / b["file"]
            text = path.read_text(encoding="utf-8")
            if text.count(b["old"]) != 1:
                sys.exit(f"{b['file']}: {b['old']!r} stands there {text.count(b['old'])} times, once was expected")
            path.write_text(text.replace(b["old"], b["new"]), encoding="utf-8")
            survived = passes(copy, log, "-x", b["test"])
            path.write_text(text, encoding="utf-8")
            killed += not survived
            print(f"{'SURVIVED' if survived else 'killed  '}  {b['file']}: {b['old']} -> {b['new']}", flush=True)
    print(f"{killed} of {len(breaks)} killed")
    sys.exit(killed != len(breaks))


if __name__ == "__main__":
    main()
