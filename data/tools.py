"""What answers calls without a model: utility tools, which are run; the real backend; two controls."""
import ast
import json
import math
import operator
import re
import zlib
from datetime import date
from typing import Callable

OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
             ast.Mod: operator.mod, ast.FloorDiv: operator.floordiv, ast.USub: operator.neg, ast.UAdd: operator.pos}


def calculator(expression: str) -> dict:
    """Numbers, + - * / // % and parentheses, walked as a syntax tree: nothing that a model writes is evaluated.

    >>> calculator("2 * (3 + 4)"), calculator("2 ** 9")
    ({'result': 14}, {'error': 'only numbers and + - * / // % ( ) are known'})
    """
    def value(node: ast.AST) -> int | float:
        if isinstance(node, ast.Constant) and type(node.value) in (int, float) and abs(node.value) < 1e15:
            return node.value
        if isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
            return OPERATORS[type(node.op)](value(node.left), value(node.right))
        if isinstance(node, ast.UnaryOp) and type(node.op) in OPERATORS:
            return OPERATORS[type(node.op)](value(node.operand))
        raise ValueError

    try:
        if len(expression) > 200:
            return {"error": "expression too long"}
        if not re.fullmatch(r"[0-9.eE+*/%() -]*", expression):  # nothing else gets to see Python's parser
            raise ValueError
        result = value(ast.parse(expression.strip(), mode="eval").body)
        return {"result": result} if math.isfinite(result) else {"error": "no finite result"}
    except (ZeroDivisionError, OverflowError):
        return {"error": "no finite result"}
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        return {"error": "only numbers and + - * / // % ( ) are known"}


def compare(names: list[str], values: list, pick: str) -> dict:
    """The name whose value, a number (also as text) or an ISO date, is smallest or largest.

    >>> compare(["Ada", "Bo"], [1815, 1790], "smallest")
    {'result': 'Bo'}
    """
    if len(names) != len(values) or not names:
        return {"error": "as many values as names are needed"}
    try:
        keys = [v if isinstance(v, (int, float)) else float(v) if re.fullmatch(r"-?\d{1,15}(\.\d{1,15})?", v)
                else date.fromisoformat(v) for v in values]
        best = (min if pick == "smallest" else max)(keys)
    except (TypeError, ValueError):
        return {"error": "values must be all numbers or all dates like 1999-12-31"}
    return {"result": names[keys.index(best)]} if keys.count(best) == 1 else {"error": "the values are equal"}


def date_difference(start: str, end: str) -> dict:
    """Days from one ISO date to another.

    >>> date_difference("2000-02-28", "2000-03-01")
    {'days': 2}
    """
    try:
        return {"days": (date.fromisoformat(end) - date.fromisoformat(start)).days}
    except ValueError:
        return {"error": "dates must look like 1999-12-31"}


def count(items: list) -> dict:
    """How many different items a list holds."""
    return {"result": len({json.dumps(item, sort_keys=True) for item in items})}


def _utility(run: Callable, description: str, returns: dict, **properties: dict) -> dict:
    def object_of(parts: dict) -> dict:
        return {"type": "object", "properties": parts, "required": list(parts)}
    return {"name": run.__name__, "description": description, "parameters": object_of(properties),
            "returns": object_of(returns), "run": run}


STRINGS = {"type": "array", "items": {"type": "string"}}
UTILITIES = (
    _utility(compare, "Pick the name with the smallest or largest value.", {"result": {"type": "string"}}, names=STRINGS,
             values={"type": "array", "items": {"type": ["number", "string"]}}, pick={"enum": ["smallest", "largest"]}),
    _utility(calculator, "Compute an expression.", {"result": {"type": "number"}}, expression={"type": "string"}),
    _utility(date_difference, "Days from start to end.", {"days": {"type": "integer"}},
             start={"type": "string"}, end={"type": "string"}),
    _utility(count, "Count the different items.", {"result": {"type": "integer"}}, items={"type": "array"}))


# Backends take requests, pairs of a tool (with a .name) and the arguments of a call, and answer each.

class Real:
    """Calls are answered by a function of the tool's name and arguments: real tools in the place of simulated."""

    def __init__(self, function: Callable[[str, dict], dict]):
        self.function = function

    def answer(self, requests: list[tuple]) -> list[dict]:
        return [self.function(tool.name, arguments) for tool, arguments in requests]


class Blanked:
    """A control: every observation is an empty object."""

    def answer(self, requests: list[tuple]) -> list[dict]:
        return [{} for _ in requests]


class Shuffled:
    """A control: the observation is what the same tool told another question."""

    def __init__(self, backend):
        self.backend = backend
        self.told: dict[str, list[dict]] = {}

    def answer(self, requests: list[tuple]) -> list[dict]:
        answers = self.backend.answer(requests)
        for (tool, _), answer in zip(requests, answers):
            told = self.told.setdefault(tool.name, [])
            told += [answer] if answer not in told else []
        shuffled = []
        for (tool, arguments), answer in zip(requests, answers):
            others = [o for o in self.told[tool.name] if o != answer]
            shuffled.append(others[zlib.crc32(json.dumps(arguments).encode()) % len(others)] if others else {})
        return shuffled
