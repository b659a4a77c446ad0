"""Make notebooks of three chapters: docs/course/notebooks/NAME.ipynb of docs/course/NAME.md.

  python docs/course/notebooks.py            make the notebooks of the chapters that exist
  python docs/course/notebooks.py --check    make nothing; exit with 1 if a notebook is out of date

It needs the packages of tests/requirements-dev.txt. Edit the chapters, not the notebooks. A python
block becomes a code cell. The text block after it is dropped, because the cell shows it when run.
"""
import argparse
import posixpath
import re
import sys
from pathlib import Path

import jupytext
import nbformat
from blocks import BLOCK

COURSE = Path(__file__).resolve().parent
CHAPTERS = (1, 5, 6)
FIRST = """\
# Made of docs/course/{name} by docs/course/notebooks.py: edit the chapter, not the notebook.
# It needs the whole repository and the packages of requirements.txt. It was not tried on Colab.
# ruff: noqa -- a chapter may break rules of style, for example to put a function into one line
import os
import sys
from pathlib import Path

here = Path.cwd()
root = next(folder for folder in (here, *here.parents) if (folder / "mtr.py").is_file())
os.chdir(root)
if str(root) not in sys.path:
    sys.path.insert(0, str(root))
# Show a value as repr() does, without IPython's own line breaks.
get_ipython().display_formatter.formatters["text/plain"].pprint = False"""
KERNEL = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
          "language_info": {"name": "python"}}


def chapters(course: Path) -> list[Path]:
    """The chapters that exist, of those that get a notebook."""
    return [p for p in sorted(course.glob("[0-9]-*.md")) if int(p.name[0]) in CHAPTERS]


def move_links(text: str) -> str:
    """Markdown of a chapter -> the same for a page that lies one folder deeper.

    A <picture> becomes its <img>: a notebook's viewer may not resolve the links of a <source>. Code
    stays as it is.
    """
    def deeper(match: re.Match) -> str:
        if re.match(r"[a-z]+:|#|/", match[2]):  # an address, a place on the page
            return match[0]
        return match[1] + posixpath.normpath(f"../{match[2]}") + match[3]

    parts = re.split(r"(^```.*?^```$|`[^`\n]*`)", text, flags=re.DOTALL | re.MULTILINE)
    for i in range(0, len(parts), 2):  # code stands in the odd places
        part = re.sub(r" *</?picture>\n?| *<source\b[^>]*>\n?| +(?=<img)", "", parts[i])
        part = re.sub(r"(\]\()([^()\s]+)(\))", deeper, part)
        parts[i] = re.sub(r'(\bsrc=")([^"]+)(")', deeper, part)
    return "".join(parts)


def make_notebook(name: str, text: str) -> str:
    """The file name and the text of a chapter -> the text of its notebook."""
    text = BLOCK.sub(lambda match: f"```python\n{match[1]}```\n", text)
    read = jupytext.reads(text, fmt="md")
    cells = read.cells
    # jupytext would also make cells of blocks in bash and the other languages that Jupyter runs.
    others = [cell for cell in cells if cell.source.startswith("%%")]
    if others or read.metadata["jupytext"]["main_language"] != "python":
        sys.exit(f"{name}: a block in a language that Jupyter runs, but blocks.py does not")
    cells.insert(0, nbformat.v4.new_code_cell(FIRST.format(name=name)))
    for i, cell in enumerate(cells):
        cell.id = f"cell-{i}"
        if cell.cell_type == "markdown":
            cell.source = move_links(cell.source)
    notebook = nbformat.v4.new_notebook(cells=cells, metadata=KERNEL)
    nbformat.validate(notebook)
    return nbformat.writes(notebook) + "\n"


def make(course: Path) -> dict[str, str]:
    """All notebooks: file name -> text."""
    return {f"{path.stem}.ipynb": make_notebook(path.name, path.read_text(encoding="utf-8"))
            for path in chapters(course)}


def outdated(files: dict[str, str], folder: Path) -> list[str]:
    """The names of the notebooks that are missing, differ, or have no chapter any more."""
    found = {path.name: path.read_bytes() for path in folder.glob("*.ipynb")}
    made = {name: text.encode() for name, text in files.items()}
    return sorted(name for name in found | made if found.get(name) != made.get(name))


def main() -> None:
    """Parse the command line; make or check."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="exit with 1 if one is out of date")
    options = parser.parse_args()
    files = make(COURSE)
    folder = COURSE / "notebooks"
    names = outdated(files, folder)
    if options.check:
        sys.exit(f"python docs/course/notebooks.py would change {', '.join(names)}" if names else 0)
    for name in names:
        if name in files:
            folder.mkdir(exist_ok=True)
            (folder / name).write_text(files[name], encoding="utf-8", newline="\n")
        else:
            (folder / name).unlink()


if __name__ == "__main__":
    main()
