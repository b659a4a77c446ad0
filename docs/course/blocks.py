"""Run the Python blocks of a chapter of the course, in their order, in one process.

    python docs/course/blocks.py docs/course/1-trace.md           compare what they print with
                                                                  the page
    python docs/course/blocks.py docs/course/1-trace.md --write   write it into the page

The ```text block right after a ```python block shows what it prints. A block that prints nothing
has none. The blocks run in the folder of mtr.py, so they can import the project's files.
"""
import argparse
import ast
import contextlib
import difflib
import io
import os
import re
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
BLOCK = re.compile(r"```python\n(.*?)```\n(?:\n```text\n(.*?)```\n)?", re.DOTALL)


def run(code: str, names: dict) -> str:
    """Run one block -> what it prints, and as in a notebook the value of a last expression."""
    tree = ast.parse(code)
    last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(io.StringIO()):
        exec(compile(tree, "block", "exec"), names)
        if last is not None:
            value = eval(compile(ast.Expression(last.value), "block", "eval"), names)
            if value is not None:
                print(repr(value))
    return out.getvalue()


def run_chapter(text: str) -> tuple[str, list[float]]:
    """The chapter with what its blocks print now, and the seconds of each block."""
    names = {"__name__": "chapter"}
    seconds = []

    def with_output(match: re.Match) -> str:
        start = time.perf_counter()
        printed = run(match[1], names)
        seconds.append(time.perf_counter() - start)
        shown = f"\n```text\n{printed.rstrip()}\n```\n" if printed.strip() else ""
        return f"```python\n{match[1]}```\n{shown}"

    return BLOCK.sub(with_output, text), seconds


def main() -> None:
    """Parse the command line; run, and compare or write."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("chapter", type=Path)
    parser.add_argument("--write", action="store_true", help="write the outputs into the page")
    options = parser.parse_args()
    path = options.chapter.resolve()
    before = path.read_text(encoding="utf-8")
    os.chdir(ROOT)
    sys.path.insert(0, str(ROOT))
    after, seconds = run_chapter(before)
    print("seconds of each block:", ", ".join(f"{value:.1f}" for value in seconds))
    if options.write:
        path.write_text(after, encoding="utf-8", newline="\n")
    elif after != before:
        changes = difflib.unified_diff(before.splitlines(), after.splitlines(), "page", "now",
                                       lineterm="", n=2)
        sys.exit("\n".join(changes))


if __name__ == "__main__":
    main()
