"""The form of the source files: length, direction of the imports, width of lines and functions.

The checks read the files as text and as syntax trees. Nothing is imported. Each check is also run
on a bad snippet that it must report.
"""
import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LINES = {"mtr.py": 200, "report.py": 180, "evaluate.py": 360, "grpo.py": 540, "sft.py": 400,
         "run.py": 210, "ranks.py": 115, "graph.py": 135, "agents.py": 600, "model.py": 760,
         "data/tools.py": 200,
         "data/utilities.py": 130, "data/guard.py": 60, "data/schema.py": 150,
         "data/user_schema.py": 100, "data/read.py": 170, "data/formats.py": 160,
         "data/write.py": 50, "data/rows.py": 70, "data/score.py": 80, "data/results.py": 85,
         "data/words.py": 150, "data/evidence.py": 240, "data/support.py": 80,
         "data/world.py": 465, "data/options.py": 145, "data/plan.py": 170, "data/checkpoint.py": 85,
         "data/tokenizer.py": 115, "data/turns.py": 165, "data/chat.py": 75,
         "data/prompts.py": 100, "data/training.py": 265, "data/conversations.py": 90,
         "data/messages.py": 140, "data/own.py": 130, "data/tables.py": 80, "data/page.py": 90,
         "data/show.py": 140, "data/compare.py": 110, "data/folders.py": 125,
         "data/__init__.py": 60}
GROUPS = {  # files: bytes and lines together
    ("model", "agents", "sft", "grpo", "mtr"): (118_000, 2500),
    ("run", "evaluate", "report"): (38_000, 740)}
WIDTH = 100
COMPLEXITY = 15
# A file may import the files below it. model.py and agents.py stand side by side, as do graph.py
# and run.py.
LEVEL = {"data": 0, "agents": 1, "model": 1, "ranks": 1, "graph": 2, "run": 2, "sft": 3, "grpo": 4,
         "evaluate": 5, "report": 6, "mtr": 7}
SOURCES = [path.relative_to(ROOT).as_posix()
           for path in sorted([*ROOT.glob("*.py"), *ROOT.glob("data/*.py")])]


def read(name):
    return (ROOT / name).read_text(encoding="utf-8")


def imported(text):
    """(line, first part of the module's name) of each import, also inside functions."""
    found = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name.split(".")[0]) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found.append((node.lineno, "data" if node.level else node.module.split(".")[0]))
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(
                ("import_module", "__import__")):
            found.append((node.lineno, "by name"))
    return sorted(found)


def upward(name, text):
    """(line, module) of each import that does not run downwards."""
    package = "data" if name.startswith("data/") else name.removesuffix(".py")
    forbidden = {"by name"}
    for module, level in LEVEL.items():
        if level >= LEVEL[package] and module != package:
            forbidden.add(module)
    if package != "data":
        forbidden.add(package)
    if package in ("agents", "data"):
        forbidden.add("torch")
    return [(line, module) for line, module in imported(text) if module in forbidden]


def wide(text):
    """The numbers of the lines that are too wide."""
    return [i for i, line in enumerate(text.split("\n"), 1) if len(line) > WIDTH]


COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)


def crowded(text):
    """The lines of the comprehensions with more than one `for` or more than one `if`."""
    found = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, COMPREHENSIONS):
            conditions = [test for part in node.generators for test in part.ifs]
            if len(node.generators) > 1 or len(conditions) > 1:
                found.append(node.lineno)
    return sorted(found)


def unexplained(text):
    """The lines with a noqa that gives no reason after its codes."""
    found = []
    for number, line in enumerate(text.split("\n"), 1):
        for match in re.finditer(r"# noqa\b(:\s*[A-Z]+\d+(\s*,\s*[A-Z]+\d+)*)?(.*)", line, re.I):
            if not re.search(r"\w", match[3]):
                found.append(number)
    return found


BRANCHES = (ast.If, ast.For, ast.AsyncFor, ast.While, ast.ExceptHandler, ast.IfExp,
            ast.match_case)
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


def complexity(text):
    """The cyclomatic complexity of each function, by name and line.

    It is 1, plus 1 for each branch, each further operand of and/or, and each `if` of a
    comprehension. A nested function counts by itself; a lambda belongs to its function.
    """
    found = {}

    def count(node):
        total = 0
        for child in ast.iter_child_nodes(node):
            if isinstance(child, (*FUNCTIONS, ast.ClassDef)):
                visit(child)
                continue
            total += isinstance(child, BRANCHES)
            if isinstance(child, ast.BoolOp):
                total += len(child.values) - 1
            if isinstance(child, ast.comprehension):
                total += len(child.ifs)
            total += count(child)
        return total

    def visit(node):
        total = 1 + count(node)
        if isinstance(node, FUNCTIONS):
            found[node.name, node.lineno] = total

    count(ast.parse(text))
    return found


# ---------------------------------------------------------------------------------------- the files


def test_every_source_file_has_a_ceiling():
    assert sorted(LINES) == SOURCES and len(SOURCES) == 42


@pytest.mark.parametrize("name", LINES)
def test_a_file_is_not_longer_than_its_ceiling(name):
    assert read(name).count("\n") <= LINES[name]


@pytest.mark.parametrize("names", GROUPS, ids=" ".join)
def test_a_group_of_files_is_not_larger_than_its_ceiling(names):
    """Bytes count, too, because a file could get shorter by wider lines."""
    most_bytes, most_lines = GROUPS[names]
    texts = [read(f"{name}.py") for name in names]
    assert sum(len(text.encode()) for text in texts) <= most_bytes
    assert sum(text.count("\n") for text in texts) <= most_lines


@pytest.mark.parametrize("name", SOURCES)
def test_no_line_is_too_wide(name):
    assert not wide(read(name))


@pytest.mark.parametrize("name", SOURCES)
def test_imports_run_downwards(name):
    assert not upward(name, read(name))


@pytest.mark.parametrize("name", SOURCES)
def test_a_comprehension_has_one_for_and_at_most_one_if(name):
    assert not crowded(read(name))


@pytest.mark.parametrize("name", SOURCES)
def test_no_function_has_too_many_branches(name):
    found = complexity(read(name))
    assert {function: n for function, n in found.items() if n > COMPLEXITY} == {}


def test_every_noqa_has_a_reason():
    files = sorted([*ROOT.glob("*.py"), *ROOT.glob("*/*.py")])
    assert ROOT / "model.py" in files and Path(__file__) in files
    found = {path.relative_to(ROOT).as_posix(): unexplained(path.read_text(encoding="utf-8"))
             for path in files}
    assert {name: lines for name, lines in found.items() if lines} == {}


# -------------------------------------------------------------------------- the checks can fail


@pytest.mark.parametrize("name, text, want", [
    ("agents.py", "import json\nfrom data.schema import Rejected\nimport data.tools", []),
    ("agents.py", "import torch", ["torch"]),
    ("agents.py", "def f():\n    from torch import nn", ["torch"]),
    ("agents.py", "if True:\n    import torch.nn.functional as F", ["torch"]),
    ("agents.py", "import model", ["model"]), ("model.py", "import agents", ["agents"]),
    ("agents.py", "import agents", ["agents"]), ("model.py", "import torch", []),
    ("model.py", "from run import option\nfrom sft import pad", ["run", "sft"]),
    ("data/world.py", "from data.tools import compare\nfrom . import tools", []),
    ("data/world.py", "import torch\nfrom model import load\nimport agents",
     ["torch", "model", "agents"]),
    ("data/__init__.py", "import mtr", ["mtr"]), ("run.py", "from agents import Trace", []),
    ("graph.py", "import run\nfrom model import Sampler", ["run"]),
    ("run.py", "def f():\n    import sft", ["sft"]), ("sft.py", "import run\nimport grpo", ["grpo"]),
    ("grpo.py", "import evaluate", ["evaluate"]), ("evaluate.py", "import grpo, report", ["report"]),
    ("report.py", "from evaluate import x\nimport mtr as m", ["mtr"]),
    ("mtr.py", "import report, evaluate, grpo, sft, run, model, agents, data", []),
    ("sft.py", "import importlib\nimportlib.import_module('grpo')", ["by name"]),
    ("sft.py", "__import__('grpo')", ["by name"])])
def test_an_upward_import_is_found(name, text, want):
    assert [module for _, module in upward(name, text)] == want


def test_the_levels_name_every_flat_file():
    flat = {name.removesuffix(".py") for name in SOURCES if "/" not in name}
    assert flat | {"data"} == set(LEVEL)


@pytest.mark.parametrize("text, want", [
    ("x" * 100 + "\n" + "é" * 100, []), ("\n" + "x" * 101 + "\n", [2]), ("é" * 101, [1])])
def test_a_wide_line_is_found(text, want):
    assert wide(text) == want


@pytest.mark.parametrize("text, want", [
    ("[x for x in y if x and z]", []), ("[[x for x in z] for z in y]", []),
    ("\n[x for y in z for x in y]", [2]), ("{x for y in z for x in y}", [1]),
    ("{x: y for y in z for x in y}", [1]), ("f(x for y in z for x in y)", [1]),
    ("[x for x in y if x if z]", [1]), ("def f():\n    return [a for a in b if a if c]", [2]),
    ("[[x for z in y for x in z] for y in w]", [1]), ("f'{[x for y in z for x in y]}'", [1])])
def test_a_crowded_comprehension_is_found(text, want):
    assert crowded(text) == want


@pytest.mark.parametrize("comment, want", [
    ("E402", [1]), ("E402, F401", [1]), ("E402 ", [1]), ("E402  -- ", [1]),
    ("E402  after sys.path", []), ("E402: the path is set above", []), ("E402, F401 (a reason)", [])])
def test_a_noqa_without_a_reason_is_found(comment, want):
    mark = "# no" + "qa"
    assert unexplained(f"import x  {mark}: {comment}") == want
    assert unexplained(f"import x  {mark}") == unexplained(f"import x  {mark.upper()}") == [1]
    assert unexplained("import x  # a comment") == []


@pytest.mark.parametrize("body, want", [
    ("pass", 1), ("if a:\n  pass\n elif b:\n  pass\n else:\n  pass", 3),
    ("for a in b:\n  pass\n else:\n  pass", 2), ("while a:\n  pass", 2),
    ("try:\n  pass\n except A:\n  pass\n except B:\n  pass\n finally:\n  pass", 3),
    ("return a and b and c or d", 4), ("return a if b else c", 2), ("assert a", 1),
    ("return [a for a in b if c]", 2), ("return any(a for a in b)", 1),
    ("match a:\n  case 1:\n   pass\n  case _:\n   pass", 3), ("with a:\n  pass", 1),
    ("return lambda: a or b", 2), ("def g():\n  return a or b\n return g", 1),
    ("class C:\n  def g(self):\n   return a or b", 1)])
def test_branches_are_counted(body, want):
    found = complexity(f"def f():\n {body}\n")
    assert found["f", 1] == want
    assert {n for (name, _), n in found.items() if name == "g"} <= {2}


def test_a_function_with_too_many_branches_is_found():
    text = "class A:\n def f(self):\n" + "  if a:\n   pass\n" * 15
    assert complexity(text) == {("f", 2): COMPLEXITY + 1}
