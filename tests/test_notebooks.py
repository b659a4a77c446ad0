"""The notebooks of the course are up to date, run from top to bottom, and print what their chapters show. Needs
tests/requirements-dev.txt."""
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "docs" / "course"))
import blocks
import notebooks

COURSE = notebooks.COURSE
PAGE = """\
# 1. A page

See [`f`](../reward.md), [a section](2-b.md#c), [grpo.py](../../grpo.py), [here](#x), [there](https://x.y/z) and `a[0](b)`.

<picture>
  <source media="(prefers-color-scheme: dark)" srcset="../figures/mask-dark.svg">
  <img alt="The mask." src="../figures/mask-light.svg">
</picture>

```python
import helper

x = list(range(30))
print(helper.NAME, "é")
x
```

```text
of the root é
[0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 29]
```

```text
This block [stays](as.it.is).
```

```python
y = x[1]
```

    indented

```python
y
```

```text
1
```
"""


def run_program(*arguments, course=COURSE):
    return subprocess.run([sys.executable, course / "notebooks.py", *arguments], capture_output=True, text=True)


def shown(text):
    """What the page of a chapter says that each block prints."""
    return [(match[2] or "").rstrip() for match in blocks.BLOCK.finditer(text)]


def printed(path):
    """What each code cell of a notebook but the first prints, when it is run in its own folder as a reader would."""
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(path.parent)}}).execute()
    first, *cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert not first.outputs
    return ["".join(text_of(output) for output in cell.outputs).rstrip() for cell in cells]


def text_of(output):
    """As in blocks.py: the standard output, and the value of a last expression."""
    if output.output_type == "stream":
        return output.text if output.name == "stdout" else ""
    return output.data["text/plain"] + "\n"


@pytest.fixture
def course(tmp_path):
    """A repository with one chapter."""
    folder = tmp_path / "docs" / "course"
    folder.mkdir(parents=True)
    for name in ("blocks.py", "notebooks.py"):
        shutil.copy(COURSE / name, folder)
    (folder / "1-page.md").write_text(PAGE, encoding="utf-8")
    (folder / "2-b.md").write_text("# 2. Not a notebook\n")
    (tmp_path / "mtr.py").write_text("")
    (tmp_path / "helper.py").write_text('NAME = "of the root"\n')
    return folder


# ------------------------------------------------------------------------------ the committed notebooks


def test_the_committed_notebooks_are_what_the_program_makes():
    result = run_program("--check")
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


@pytest.mark.parametrize("number", notebooks.CHAPTERS)
def test_a_notebook_prints_what_its_chapter_shows(number):
    """A chapter that does not exist yet has no notebook."""
    for chapter in COURSE.glob(f"{number}-*.md"):
        path = COURSE / "notebooks" / f"{chapter.stem}.ipynb"
        assert printed(path) == shown(chapter.read_text(encoding="utf-8"))


@pytest.mark.parametrize("number", notebooks.CHAPTERS)
def test_the_links_of_a_notebook_resolve(number):
    for path in (COURSE / "notebooks").glob(f"{number}-*.ipynb"):
        for cell in nbformat.read(path, as_version=4).cells:
            if cell.cell_type == "markdown":
                found = re.findall(r"\]\(([^()\s#]+)", re.sub(r"`[^`]*`", "", cell.source)) + re.findall(r'src="([^"]+)"', cell.source)
                for link in found:
                    assert link.startswith("https://") or (path.parent / link).exists(), link


# ------------------------------------------------------------------------------------ a chapter by hand


def test_the_cells_of_a_chapter_by_hand():
    notebook = nbformat.reads(notebooks.make_notebook("1-page.md", PAGE), as_version=4)
    assert [cell.cell_type for cell in notebook.cells] == ["code", "markdown", "code", "markdown", "code", "markdown", "code"]
    first, head, one, stays, two, indented, three = [cell.source for cell in notebook.cells]
    assert "docs/course/1-page.md" in first and "not tried on Colab" in first
    assert head.splitlines()[2] == ("See [`f`](../../reward.md), [a section](../2-b.md#c), [grpo.py](../../../grpo.py), [here](#x), "
                                    "[there](https://x.y/z) and `a[0](b)`.")
    assert head.splitlines()[4:] == ['<img alt="The mask." src="../../figures/mask-light.svg">']
    assert one.startswith("import helper") and one.endswith("\nx") and (two, three) == ("y = x[1]", "y")
    assert stays == "```text\nThis block [stays](as.it.is).\n```" and indented.strip() == "indented"
    assert [cell.id for cell in notebook.cells] == [f"cell-{i}" for i in range(7)]
    assert not any(cell.get("outputs") for cell in notebook.cells)


@pytest.mark.parametrize("before, cells", [("", ["markdown"]), ("```python\n1\n```\n\n", ["markdown", "code", "markdown"])])
def test_a_block_in_another_language_is_refused(before, cells):
    """jupytext would make it a cell that runs. A block in a language that Jupyter does not run stays text."""
    page = f"# 1. X\n\n{before}```bash\nls\n```\n"
    with pytest.raises(SystemExit, match="1-x.md: a block in a language"):
        notebooks.make_notebook("1-x.md", page)
    made = nbformat.reads(notebooks.make_notebook("1-x.md", page.replace("bash", "diff")), as_version=4)
    assert [cell.cell_type for cell in made.cells[1:]] == cells


def test_a_notebook_prints_what_a_page_shows_and_a_difference_is_noticed(course):
    assert run_program(course=course).returncode == 0
    path = course / "notebooks" / "1-page.ipynb"
    got = printed(path)
    assert got == shown(PAGE) and got[0].startswith("of the root é\n[0, 1, 2") and got[1:] == ["", "1"]
    assert got != shown(PAGE.replace("text\n1\n", "text\n2\n"))
    path.write_text(path.read_text(encoding="utf-8").replace("y = x[1]", "y = x[99]"), encoding="utf-8")
    with pytest.raises(CellExecutionError, match="IndexError"):
        printed(path)


def test_check_finds_what_is_out_of_date(course):
    def check():
        result = run_program("--check", course=course)
        return result.returncode, result.stderr

    folder = course / "notebooks"
    assert check() == (1, "python docs/course/notebooks.py would change 1-page.ipynb\n")
    assert not folder.exists()
    assert run_program(course=course).returncode == 0
    assert check() == (0, "") and [path.name for path in folder.iterdir()] == ["1-page.ipynb"]
    before = (folder / "1-page.ipynb").read_bytes()
    (folder / "1-page.ipynb").unlink()
    run_program(course=course)
    assert (folder / "1-page.ipynb").read_bytes() == before and json.loads(before)["nbformat"] == 4
    (folder / ".ipynb_checkpoints").mkdir()  # Jupyter leaves it when a reader saves
    assert check() == (0, "")
    (course / "1-page.md").write_text(PAGE.replace("x[1]", "x[2]"), encoding="utf-8")
    (folder / "5-gone.ipynb").write_text("{}")
    assert check() == (1, "python docs/course/notebooks.py would change 1-page.ipynb, 5-gone.ipynb\n")
    run_program(course=course)
    assert check() == (0, "") and not (folder / "5-gone.ipynb").exists()
