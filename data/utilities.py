"""The utility tools: predefined tools with code, which compute with what was looked up."""
import ast
import json
import math
import operator
import re
from collections.abc import Callable
from datetime import date
from functools import update_wrapper

from data.guard import guarded
from data.schema import object_schema

OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul,
             ast.Div: operator.truediv, ast.Mod: operator.mod, ast.FloorDiv: operator.floordiv,
             ast.USub: operator.neg, ast.UAdd: operator.pos}


def with_name(function: Callable[..., object]) -> Callable[..., dict]:
    """guarded(function) under the name of the function. So pickle sends the name alone, and the
    other process finds the same object: the reward knows a utility tool by its code.
    """
    return update_wrapper(guarded(function), function)


@with_name
def calculator(expression: str) -> dict:
    """Compute numbers, + - * / // % and parentheses. It walks the syntax tree; nothing is eval'ed.

    >>> calculator("2 * (3 + 4)"), calculator("2 ** 9")
    ({'result': 14}, {'error': 'only numbers and + - * / // % ( ) are known'})
    """
    def value(node: ast.AST) -> int | float:
        if isinstance(node, ast.Constant) and type(node.value) in (int, float):
            if abs(node.value) < 1e15:
                return node.value
        elif isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
            return OPERATORS[type(node.op)](value(node.left), value(node.right))
        elif isinstance(node, ast.UnaryOp) and type(node.op) in OPERATORS:
            return OPERATORS[type(node.op)](value(node.operand))
        raise ValueError

    if len(expression) > 200:
        return {"error": "expression too long"}
    try:
        if not re.fullmatch(r"[0-9.eE+*/%() -]*", expression):  # before Python's parser sees it
            raise ValueError
        result = value(ast.parse(expression.strip(), mode="eval").body)
        return {"result": result} if math.isfinite(result) else {"error": "no finite result"}
    except (ZeroDivisionError, OverflowError):
        return {"error": "no finite result"}
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        return {"error": "only numbers and + - * / // % ( ) are known"}


@with_name
def compare(names: list[str], values: list, pick: str) -> dict:
    """The name whose value is smallest or largest. Values: numbers, also as text, or ISO dates.

    >>> compare(["Ada", "Bo"], [1815, 1790], "smallest")
    {'result': 'Bo'}
    """
    def key(value: object) -> float | date:
        if isinstance(value, (int, float)):
            return value
        if re.fullmatch(r"-?\d{1,15}(\.\d{1,15})?", value):
            return float(value)
        return date.fromisoformat(value)

    if len(names) != len(values) or not names:
        return {"error": "as many values as names are needed"}
    try:
        keys = [key(value) for value in values]
        best = min(keys) if pick == "smallest" else max(keys)
    except (TypeError, ValueError):
        return {"error": "values must be all numbers or all dates like 1999-12-31"}
    if keys.count(best) > 1:
        return {"error": "the values are equal"}
    return {"result": names[keys.index(best)]}


@with_name
def date_difference(start: str, end: str) -> dict:
    """Days from one ISO date to another.

    >>> date_difference("2000-02-28", "2000-03-01")
    {'days': 2}
    """
    try:
        return {"days": (date.fromisoformat(end) - date.fromisoformat(start)).days}
    except ValueError:
        return {"error": "dates must look like 1999-12-31"}


@with_name
def count(items: list) -> dict:
    """The number of different items in a list."""
    return {"result": len({json.dumps(item, sort_keys=True) for item in items})}


def utility(run: Callable, description: str, returns: dict, **properties: dict) -> dict:
    """The four parts of a utility tool and its code."""
    parameters = object_schema(**properties)
    return {"name": run.__name__, "description": description, "parameters": parameters,
            "returns": object_schema(**returns), "run": run}


TEXT = {"type": "string"}
INTEGER = {"type": "integer"}
UTILITIES = (
    utility(compare, "Pick the name with the smallest or largest value.", {"result": TEXT},
            names={"type": "array", "items": TEXT},
            values={"type": "array", "items": {"type": ["number", "string"]}},
            pick={"enum": ["smallest", "largest"]}),
    utility(calculator, "Compute an expression.", {"result": {"type": "number"}}, expression=TEXT),
    utility(date_difference, "Days from start to end.", {"days": INTEGER}, start=TEXT, end=TEXT),
    utility(count, "Count the different items.", {"result": INTEGER}, items={"type": "array"}))
