"""docs/claims.md and docs/course/symbols.md name functions, tests, equations and variables that exist.

The checks read pages and code as text and as syntax trees. Nothing is imported. Each check is also run on a bad snippet
that it must report.
"""
import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
CLAIMS = ROOT / "docs" / "claims.md"
SYMBOLS = ROOT / "docs" / "course" / "symbols.md"
CLAIM_HEADS = (["claim", "in the code", "held by"], ["equation", "in the code", "held by"])
SYMBOL_HEAD = ["symbol", "meaning", "variable", "place", "paper"]
DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
# Words of the equations that are no symbols.
WORDS = {"before", "with", "log", "min", "max", "mean", "std", "clip", "sum_i", "sum_j", "sum_t"}


# ----------------------------------------------------------------------------------------- pages and code


def tables(text):
    """The tables of a page: (header, rows), each row a list of cells. An escaped | does not end a cell."""
    found = []
    for block in re.findall(r"(?:^\|.*\n)+", text + "\n", re.M):
        lines = [[cell.strip().replace(r"\|", "|") for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
                 for line in block.splitlines()]
        found.append((lines[0], lines[2:]))
    return found


def spans(cell):
    """The code spans of a cell."""
    return re.findall(r"`([^`]+)`", cell)


def rest(cell):
    """A cell without code spans and the commas between them."""
    return re.sub(r"`[^`]+`", "", cell).replace(",", "").strip()


def one_line(text):
    """Text without line breaks, runs of spaces, and the marks of comments."""
    return " ".join(re.sub(r"^\s*#", "", text, flags=re.M).split())


@cache
def source(name):
    """The text of a file; "" if there is none."""
    path = ROOT / name
    return path.read_text(encoding="utf-8") if path.is_file() else ""


@cache
def definitions(text):
    """{dotted name: node} of functions, classes, methods, and the assigned names of a file."""
    found = {}

    def visit(body, prefix):
        for node in body:
            if isinstance(node, DEFINITIONS):
                found[prefix + node.name] = node
                visit(node.body, f"{prefix}{node.name}.")
            elif isinstance(node, ast.Assign | ast.AnnAssign):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                found.update({prefix + t.id: node for t in targets if isinstance(t, ast.Name)})

    visit(ast.parse(text).body, "")
    return found


def file_of(place):
    """A dotted name -> its file, and its name in the file: data.score.f1 -> data/score.py, f1."""
    parts = place.split(".")
    n = 2 if parts[0] == "data" else 1
    return "/".join(parts[:n]) + ".py", ".".join(parts[n:])


def lookup(place):
    """The node of a dotted name; None if there is none."""
    file, name = file_of(place)
    return definitions(source(file)).get(name)


def is_test(span):
    """Whether tests/FILE.py::NAME names a test."""
    file, _, name = span.partition("::")
    return file.startswith("tests/") and name.startswith("test_") and name in definitions(source(file))


@cache
def occurring(node):
    """All that stands in a definition as an expression, a parameter or a field."""
    found = {child.arg for child in ast.walk(node) if isinstance(child, ast.arg)}
    return found | {ast.unparse(child) for child in ast.walk(node) if isinstance(child, ast.expr)}


def equations(name):
    """The equations in the docstring of a file: in its indented lines, the parts with an equals sign."""
    lines = [line for line in ast.get_docstring(ast.parse(source(name))).splitlines() if line.startswith("    ")]
    parts = [part for line in lines for part in re.split(r" {2,}", line.strip())]
    return [part for part in parts if " = " in part]


def shape_letters(name):
    """The letters that the sentence "Shapes: ..." in the docstring of a file defines."""
    doc = one_line(ast.get_docstring(ast.parse(source(name))))
    return set(re.findall(r"\b([A-Z]h?) (?=[a-z])", doc.split("Shapes: ")[1].split(". ")[0]))


# ------------------------------------------------------------------------------------------ the checkers


def wrong_claims(text):
    """What is wrong with a page of claims, a line for each mistake."""
    prose = "\n".join(line for line in text.splitlines() if not line.startswith("|"))
    found = [f"no test {span}" for span in spans(prose) if "::" in span and not is_test(span)]
    for head, rows in tables(text):
        if head not in CLAIM_HEADS:
            continue
        for claim, code, tests in rows:
            files = [source(file_of(place)[0]) for place in spans(code)]
            found += [f"no function {place}" for place in spans(code) if lookup(place) is None]
            found += [f"no test {test}" for test in spans(tests) if not is_test(test)]
            if rest(code) or rest(tests) or not spans(code) or not spans(tests):
                found.append(f"not a list of names: {claim}")
            if head[0] == "equation":
                found += [f"not in the code: {span}" for span in spans(claim)
                          if not any(one_line(span) in one_line(file) for file in files)]
                found += [] if spans(claim) else [f"no equation: {claim}"]
    return found


def wrong_symbols(text):
    """What is wrong with a page of symbols, a line for each mistake."""
    found = []
    for head, rows in tables(text):
        if head != SYMBOL_HEAD:
            continue
        for symbol, _, variables, places, _ in rows:
            if rest(variables) or rest(places) or not spans(symbol) or not spans(variables) or not spans(places):
                found.append(f"not a list of names: {symbol}")
            for place in spans(places):
                node = lookup(place)
                if node is None:
                    found.append(f"no function {place}")
                    continue
                inside = occurring(node)
                found += [f"no {variable} in {place}" for variable in spans(variables) if variable not in inside]
    return found


def rows_of(text, *heads):
    return [row for head, rows in tables(text) if head in heads for row in rows]


# --------------------------------------------------------------------------------------------- the pages


def test_functions_tests_and_equations_of_the_claims_exist():
    assert wrong_claims(CLAIMS.read_text(encoding="utf-8")) == []


def test_variables_of_the_symbols_exist():
    assert wrong_symbols(SYMBOLS.read_text(encoding="utf-8")) == []


def test_every_table_is_checked_but_the_one_of_what_cannot_be_tested():
    claims = tables(CLAIMS.read_text(encoding="utf-8"))
    assert [head for head, _ in claims if head not in CLAIM_HEADS] == [["claim of the paper", "why not"]]
    assert {tuple(head) for head, _ in tables(SYMBOLS.read_text(encoding="utf-8"))} == {tuple(SYMBOL_HEAD)}
    assert len(rows_of(CLAIMS.read_text(encoding="utf-8"), *CLAIM_HEADS)) > 40
    assert len(rows_of(SYMBOLS.read_text(encoding="utf-8"), SYMBOL_HEAD)) > 60


@pytest.mark.parametrize("name, number", [("sft.py", 1), ("grpo.py", 7)])
def test_every_equation_of_a_docstring_is_claimed(name, number):
    page = one_line(" ".join(row[0] for row in rows_of(CLAIMS.read_text(encoding="utf-8"), *CLAIM_HEADS)))
    found = equations(name)
    assert len(found) == number and [part for part in found if part not in page] == []


def test_every_symbol_of_an_equation_has_a_row():
    listed = " ".join(row[0] for row in rows_of(SYMBOLS.read_text(encoding="utf-8"), SYMBOL_HEAD))
    known = set(re.findall(r"\b[A-Za-z]\w*", listed))
    used = set(re.findall(r"\b[A-Za-z]\w*", " ".join(equations("grpo.py")))) - WORDS
    assert {"A_i", "r_it", "k3_it", "w_i", "J", "L_max", "N", "pi_old", "eps_low"} <= used
    letters = shape_letters("grpo.py") | shape_letters("model.py")
    assert {"B", "T", "S", "Dh", "V"} <= letters
    assert (used | letters) - known == set()


@pytest.mark.parametrize("page", [CLAIMS, SYMBOLS], ids=lambda page: page.name)
def test_each_link_of_a_page_resolves(page):
    for link in re.findall(r"\]\(([^)#]+)", page.read_text(encoding="utf-8")):
        assert link.startswith("https://") or (page.parent / link).exists(), link


# ----------------------------------------------------------------------------------- the checks can fail

GOOD_CLAIM = "| `r_it = pi(o_it \\| before)` | `grpo.policy_loss` | `tests/test_grpo.py::test_clip` |"


@pytest.mark.parametrize("old, new, want", [
    ("", "", []),
    ("grpo.policy_loss", "grpo.policy_los", ["no function grpo.policy_los"]),
    ("grpo.policy_loss", "grpo.Simulator.agent`, `grpo.Simulator.agents", ["no function grpo.Simulator.agents"]),
    ("`grpo.policy_loss`", "`grpo.policy_loss`, `data.score.f2`", ["no function data.score.f2"]),
    ("`grpo.policy_loss`", "`grpo.policy_loss`, `nothing.f`", ["no function nothing.f"]),
    ("`grpo.policy_loss`", "`grpo.policy_loss` and more", ["not a list of names"]),
    ("test_clip", "test_clips", ["no test tests/test_grpo.py::test_clips"]),
    ("test_grpo.py", "test_gone.py", ["no test tests/test_gone.py::test_clip"]),
    ("tests/test_grpo.py::test_clip", "grpo.py::reward", ["no test grpo.py::reward"]),
    ("tests/test_grpo.py::test_clip", "tests/test_grpo.py::tensor", ["no test tests/test_grpo.py::tensor"]),
    ("`tests/test_grpo.py::test_clip`", "none yet", ["not a list of names"]),
    ("pi(o_it", "pie(o_it", ["not in the code: r_it = pie(o_it | before)"])])
def test_a_wrong_claim_is_reported(old, new, want):
    row = GOOD_CLAIM.replace(old, new, 1) if old else GOOD_CLAIM
    found = wrong_claims(f"text\n\n| equation | in the code | held by |\n|---|---|---|\n{row}\n\nmore\n")
    assert len(found) == len(want) and all(line.startswith(start) for line, start in zip(found, want, strict=True)), found


def test_a_wrong_test_in_the_prose_is_reported():
    assert wrong_claims("By `tests/test_grpo.py::test_clip`.\n\nBy `tests/test_grpo.py::test_clips`.\n") == [
        "no test tests/test_grpo.py::test_clips"]


GOOD_SYMBOL = "| `eps_low` | bound | `settings.clip_low` | `grpo.policy_loss` | PPO |"


@pytest.mark.parametrize("old, new, want", [
    ("", "", []),
    ("settings.clip_low", "A`, `advantage`, `1 - settings.clip_low", []),
    ("settings.clip_low", "settings.clip", ["no settings.clip in grpo.policy_loss"]),
    ("settings.clip_low", "the gradient", ["no the gradient in grpo.policy_loss"]),
    ("`settings.clip_low`", "settings.clip_low", ["not a list of names: `eps_low`"]),
    ("grpo.policy_loss", "grpo.Loss", ["no settings.clip_low in grpo.Loss"]),
    ("grpo.policy_loss", "grpo.policy_los", ["no function grpo.policy_los"]),
    ("`grpo.policy_loss`", "`grpo.policy_loss`, `agents.Trace.hear`", ["no settings.clip_low in agents.Trace.hear"])])
def test_a_wrong_symbol_is_reported(old, new, want):
    row = GOOD_SYMBOL.replace(old, new, 1) if old else GOOD_SYMBOL
    page = f"| {' | '.join(SYMBOL_HEAD)} |\n|---|---|---|---|---|\n{row}\n"
    assert wrong_symbols(page) == want


def test_what_a_docstring_says_is_no_variable():
    node = definitions('def f(a):\n    """Uses beta."""\n    b: int = a.c\n    return g(b)[0]\n')["f"]
    assert {"a", "b", "a.c", "g(b)", "g(b)[0]"} <= occurring(node) and "beta" not in occurring(node)
