"""Break the code, one line at a time, and check that the named test fails: python tests/mutate.py

mutations.txt holds one break per block: the file, the text to replace (it must occur there once), the replacement, and
the test that has to fail. The breaks are made in a copy. The working tree stays as it is."""
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def read(path: Path) -> list[dict[str, str]]:
    """Blocks of a `file:`, an `old:`, a `new:` and a `test:` line, separated by blank lines."""
    blocks = [[line.split(": ", 1) if ": " in line else (line.rstrip(":"), "") for line in block.strip().splitlines()]
              for block in path.read_text(encoding="utf-8").split("\n\n") if block.strip()]
    for block in blocks:
        if [name for name, _ in block] != ["file", "old", "new", "test"]:
            sys.exit(f"{path}: no break of file, old, new and test: {block}")
    return [dict(block) for block in blocks]


def passes(copy: Path, test: str) -> bool:
    """Whether the test is green in the copy."""
    run = subprocess.run([sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", test], cwd=copy,
                         env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}, capture_output=True, text=True)
    if run.returncode not in (0, 1):
        sys.exit(f"{test}: pytest ended with {run.returncode}\n{run.stdout[-500:]}")
    return run.returncode == 0


def main() -> None:
    """Apply each break to a copy, run its test, count."""
    breaks = read(ROOT / "tests" / "mutations.txt")
    killed = 0
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "copy"
        shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".git", "run", "__pycache__"))
        for test in sorted({b["test"] for b in breaks}):
            if not passes(copy, test):
                sys.exit(f"{test} is red before anything is broken")
        for b in breaks:
            path = copy / b["file"]
            text = path.read_text(encoding="utf-8")
            if text.count(b["old"]) != 1:
                sys.exit(f"{b['file']}: {b['old']!r} stands there {text.count(b['old'])} times, once was expected")
            path.write_text(text.replace(b["old"], b["new"]), encoding="utf-8")
            survived = passes(copy, b["test"])
            path.write_text(text, encoding="utf-8")
            killed += not survived
            print(f"{'SURVIVED' if survived else 'killed  '}  {b['file']}: {b['old'].strip()} -> {b['new'].strip()}", flush=True)
    print(f"{killed} of {len(breaks)} killed")
    sys.exit(killed != len(breaks))


if __name__ == "__main__":
    main()
