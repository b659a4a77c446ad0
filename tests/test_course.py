"""The course: each block prints what its page shows, exercises are red unsolved and green solved."""
import re
import subprocess
import sys
from pathlib import Path

import blocks
import pytest

ROOT = Path(__file__).resolve().parents[1]
COURSE = ROOT / "docs" / "course"
EXERCISES = ROOT / "exercises"
CHAPTERS = sorted(COURSE.glob("[0-9]-*.md"))
NAMES = sorted(path.stem for path in EXERCISES.glob("*.py") if not path.stem.startswith(("test_", "conftest")))


@pytest.mark.parametrize("chapter", CHAPTERS, ids=lambda path: path.stem)
def test_the_blocks_of_a_chapter_print_what_the_page_shows(chapter):
    done = subprocess.run([sys.executable, COURSE / "blocks.py", chapter], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    seconds = re.findall(r"\d+\.\d", done.stdout.splitlines()[-1])
    assert seconds and max(map(float, seconds)) < 30  # 3 on a new machine, 10 on a slow and busy one


@pytest.mark.parametrize("chapter", CHAPTERS, ids=lambda path: path.stem)
def test_a_chapter_is_short_and_has_figure_and_exercise(chapter):
    text = chapter.read_text(encoding="utf-8")
    assert 120 <= len(text.splitlines()) <= 200
    assert "../figures/" in text and "pytest exercises/test_" in text and blocks.BLOCK.search(text)


def test_a_page_that_shows_another_output_is_noticed(tmp_path):
    page = tmp_path / "1-x.md"
    page.write_text("a\n\n```python\nx = 2\nx + 1\n```\n\n```text\n4\n```\n\n```python\nprint(x)\n```\n")
    command = [sys.executable, COURSE / "blocks.py", page]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1 and "-4\n+3\n" in done.stderr
    subprocess.run([*command, "--write"], check=True, capture_output=True)
    assert page.read_text() == "a\n\n```python\nx = 2\nx + 1\n```\n\n```text\n3\n```\n\n```python\nprint(x)\n```\n\n```text\n2\n```\n"
    assert subprocess.run(command, capture_output=True).returncode == 0


def outcomes(*flags):
    """{test: passed or failed} of the exercises."""
    done = subprocess.run([sys.executable, "-m", "pytest", "-q", "-rA", "-p", "no:cacheprovider", "exercises", *flags],
                          cwd=ROOT, capture_output=True, text=True)
    found = re.findall(r"^(PASSED|FAILED|ERROR) exercises/(\S+)", done.stdout, re.MULTILINE)
    return {test: outcome for outcome, test in found}


def test_exercises_are_red_unsolved_and_green_solved():
    solved = outcomes("--solutions")
    assert solved and set(solved.values()) == {"PASSED"}, solved
    unsolved = outcomes()
    assert unsolved.keys() == solved.keys()
    assert {name: outcome for name, outcome in unsolved.items() if outcome != "FAILED"} == {}


def test_each_exercise_has_a_test_and_a_solution_with_the_same_functions():
    assert NAMES
    for name in NAMES:
        assert (EXERCISES / f"test_{name}.py").exists()
        own = (EXERCISES / f"{name}.py").read_text()
        solution = (EXERCISES / "solutions" / f"{name}.py").read_text()
        heads = re.compile(r"^(?:def|class) .*$", re.MULTILINE)
        assert set(heads.findall(own)) <= set(heads.findall(solution)), name
