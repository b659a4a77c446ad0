"""Everything that answers calls without a model: utility tools, a user's own tools, backends.

A backend is a function. It takes a list of (tool, arguments) and returns an observation for each.
"""
import ast
import importlib.util
import json
import math
import operator
import re
import zlib
from collections.abc import Callable
from datetime import date
from pathlib import Path

from data import InputError
from data.schema import Rejected, check_function, check_schema, object_schema, strict_json

# ----------------------------------------------------------------------------------- utility tools

OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul,
             ast.Div: operator.truediv, ast.Mod: operator.mod, ast.FloorDiv: operator.floordiv,
             ast.USub: operator.neg, ast.UAdd: operator.pos}


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
    """The number of different items in a list."""
    return {"result": len({json.dumps(item, sort_keys=True) for item in items})}


def guarded(function: Callable[..., object]) -> Callable[..., dict]:
    """Wrap a tool's code: an exception becomes an error observation, another value an object."""
    def run(*values: object, **arguments: object) -> dict:
        try:
            result = strict_json(json.dumps(function(*values, **arguments)), most=100_000)
        except Exception as error:
            return {"error": f"{type(error).__name__}: {error}"[:200]}
        return result if isinstance(result, dict) else {"result": result}
    return run


def utility(run: Callable, description: str, returns: dict, **properties: dict) -> dict:
    """The four parts of a utility tool and its code."""
    parameters = object_schema(**properties)
    return {"name": run.__name__, "description": description, "parameters": parameters,
            "returns": object_schema(**returns), "run": guarded(run)}


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


# ------------------------------------------------------------------------------- a user's own tools


def read_tools(path: Path) -> list[dict]:
    """Read a user's tools. InputError names the tool and the rule that it breaks.

    A JSON file holds a list of OpenAI functions, each with an optional schema `returns`; the
    ToolActor simulates them. A Python file is executed; its TOOLS are pairs of such a function and
    the Python function that a call runs.
    """
    path = Path(path)
    made: list[dict] = []
    taken = {tool["name"] for tool in UTILITIES}
    place = ""
    try:
        for number, (schema, run) in enumerate(_read_pairs(path), 1):
            place = f"tool {number}: "
            function = dict(schema.get("function", schema))
            place = f"tool {number} ({function.get('name')!r:.70}): "
            made.append(_user_tool(function, run, taken))
            taken.add(function["name"])
    except OSError as error:
        raise InputError(f"{path}: can't be read ({error.strerror})") from None
    except Rejected as error:
        raise InputError(f"{path}: {place}{error}") from None
    except Exception as error:  # a user's file may raise anything
        reason = f"{type(error).__name__}: {error}".replace("\n", " ")
        raise InputError(f"{path}: {place}{reason}") from None
    return made


def _read_pairs(path: Path) -> list[tuple[dict, Callable | None]]:
    """The functions of a file, each with its code or None."""
    if path.suffix == ".py":
        spec = importlib.util.spec_from_file_location(path.stem, path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        pairs = list(module.TOOLS)
    else:
        schemas = strict_json(path.read_text(encoding="utf-8"), most=100_000)
        if not isinstance(schemas, list):
            raise Rejected("expected a JSON list of tools")
        pairs = [(schema, None) for schema in schemas]
    if not pairs:
        raise Rejected("no tools; at least one is needed")
    return pairs


def _user_tool(function: dict, run: Callable | None, taken: set[str]) -> dict:
    """Check one function of a user -> the parts of its Tool. Without `returns`, any object fits."""
    strict = function.pop("strict", False)
    for part in ("name", "description", "parameters"):
        if part not in function:
            raise Rejected(f"no {part}")
    if unknown := set(function) - {"name", "description", "parameters", "returns"}:
        raise Rejected(f"unknown part {min(unknown)}")
    if "returns" in function:
        check_schema(function["returns"])
    check_function(function, taken)
    if strict:
        _check_strict(function["parameters"])
    return {"returns": {"type": "object"}, **function, "run": guarded(run) if run else None}


def _check_strict(schema: dict) -> None:
    """OpenAI's strict mode: every object is closed and all its properties are required."""
    todo: list[object] = [schema]
    while todo:
        node = todo.pop()
        if isinstance(node, list):
            todo += node
        elif isinstance(node, dict):
            kinds = node.get("type") or ""  # a string or a list
            if "properties" in node or "object" in kinds:
                if node.get("additionalProperties") is not False:
                    raise Rejected("strict, but an object is open")
                if set(node.get("required", [])) != set(node.get("properties", {})):
                    raise Rejected("strict, but a property is not required")
            for key, child in node.items():
                # The keys of `properties` are names of properties, not keywords.
                named = key == "properties" and isinstance(child, dict)
                todo += child.values() if named else [child]


# ---------------------------------------------------------------------------------------- backends


def real(function: Callable[[str, dict], dict]) -> Callable:
    """A backend of real tools: function(tool name, arguments) -> observation."""
    return lambda requests: [function(tool.name, arguments) for tool, arguments in requests]


def blanked(requests: list[tuple]) -> list[dict]:
    """A control: every observation is an empty object."""
    return [{} for _ in requests]


def shuffled(backend: Callable) -> Callable:
    """A control: the observation is one that the same tool gave for another call."""
    given: dict[str, list[dict]] = {}

    def answer(requests: list[tuple]) -> list[dict]:
        answers = backend(requests)
        for (tool, _), observation in zip(requests, answers, strict=True):
            known = given.setdefault(tool.name, [])
            if observation not in known:
                known.append(observation)
        out = []
        for (tool, arguments), observation in zip(requests, answers, strict=True):
            others = [other for other in given[tool.name] if other != observation]
            pick = zlib.crc32(json.dumps(arguments).encode()) % max(1, len(others))
            out.append(others[pick] if others else {})
        return out
    return answer
