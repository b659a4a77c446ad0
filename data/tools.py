"""Everything that answers calls without a model: a user's own tools and backends.

A backend is a function. It takes a list of (tool, arguments) and returns an observation for each.
"""
import importlib.util
import json
import sys
import zlib
from collections.abc import Callable
from pathlib import Path

from data import InputError, read_file
from data.guard import failure, guarded
from data.schema import Rejected, check_name, object_schema, strict_json
from data.user_schema import check_strict, check_user_schema
from data.utilities import TEXT, UTILITIES

# agents.py takes the utility tools from here.
__all__ = ["TEXT", "UTILITIES", "blanked", "guarded", "read_tools", "real", "shuffled"]

# ------------------------------------------------------------------------------- a user's own tools

# What the formats call the parts of a tool: OpenAI, MCP (inputSchema, outputSchema), Anthropic
# (input_schema), transformers (return). `returns` is this program's own.
PARTS = {"name": "name", "description": "description", "strict": "strict",
         "parameters": "parameters", "inputSchema": "parameters", "input_schema": "parameters",
         "returns": "returns", "outputSchema": "returns", "return": "returns"}
# These parts say nothing about a call or its result.
IGNORED = ("type", "title", "annotations", "_meta", "execution", "icons", "cache_control")
ANY_OBJECT = {"type": "object"}
HOLDERS = ("result", "tools", "functions")  # the keys under which an object holds a list of tools


def read_tools(path: Path) -> list[dict]:
    """Read a user's tools. InputError names the tool and the rule that it breaks.

    A JSON file holds tools in any format that PARTS names; the ToolActor simulates them. A Python
    file is executed; its TOOLS are pairs of such a tool and the function that a call runs.
    """
    path = Path(path)
    content = read_file(path)
    made: list[dict] = []
    taken: set[str] = set()
    place = ""
    try:
        pairs = _run_file(path) if path.suffix == ".py" else _read_list(content)
        for number, (tool, run) in enumerate(pairs, 1):
            place = f"tool {number}: "
            tool = _unwrapped(tool)
            place = f"tool {number} ({tool.get('name')!r:.70}): "
            made.append(_user_tool(tool, run, taken))
            taken.add(tool["name"])
        if not made:
            raise Rejected("no tools; at least one is needed")
    except (Exception, SystemExit) as error:  # a user's file may raise anything
        reason = str(error) if isinstance(error, Rejected) else failure(error)
        raise InputError(f"{path}: {place}{' '.join(reason.split())}") from None
    return made


def tool_files(path: Path) -> list[Path]:
    """The files that the tools of `path` depend on, after they were read: also its neighbours."""
    folder = path.resolve().parent
    files = [Path(getattr(module, "__file__", None) or "") for module in [*sys.modules.values()]]
    return [path, *sorted(file for file in files if file.parent == folder and path.suffix == ".py")]


def _read_list(content: bytes) -> list[tuple]:
    """The tools of a JSON file, each with None in place of code."""
    found = strict_json(content.decode("utf-8-sig"), most=100_000)
    for key in HOLDERS:
        if isinstance(found, dict) and key in found:
            if len(found.keys() & set(HOLDERS)) > 1:
                raise Rejected(f"{' and '.join(sorted(found.keys() & set(HOLDERS)))}; expected one")
            found = found[key]
    tools = found if isinstance(found, list) else [found]
    return [(tool, None) for tool in tools]


def _run_file(path: Path) -> list[tuple]:
    """Execute a Python file -> its TOOLS."""
    folder = str(path.resolve().parent)
    if folder not in sys.path:
        sys.path.append(folder)  # the file and its functions may import their neighbours
    spec = importlib.util.spec_from_file_location(f"real_tools_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where a dataclass looks its module up
    spec.loader.exec_module(module)
    pairs = getattr(module, "TOOLS", None)
    if not isinstance(pairs, list | tuple):
        raise Rejected("no TOOLS; expected a list of pairs (tool, function)")
    for number, pair in enumerate(pairs, 1):
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise Rejected(f"tool {number}: expected a pair (tool, function)")
        if pair[1] is not None and not callable(pair[1]):
            raise Rejected(f"tool {number}: expected a function, found {pair[1]!r:.70}")
    return pairs


def _unwrapped(tool: object) -> dict:
    """A copy of a tool, in which the parts that OpenAI keeps under `function` stand beside it."""
    tool = strict_json(json.dumps(tool), most=100_000)
    if not isinstance(tool, dict):
        raise Rejected(f"expected a JSON object, found {tool!r:.70}")
    inner = tool.pop("function", {})
    if not isinstance(inner, dict):
        raise Rejected(f"function: expected a JSON object, found {inner!r:.70}")
    for key in tool.keys() & inner.keys() - {"type"}:
        raise Rejected(f"{key} beside function and in it")
    return tool | inner


def _renamed(tool: dict) -> dict:
    """The parts of a tool under the names of PARTS. Null and {} count as missing."""
    if tool.get("type") not in (None, "function", "custom"):
        raise Rejected(f"type {tool['type']!r:.70}; expected a function")
    given: dict = {}
    for key, value in tool.items():
        if key not in PARTS and key not in IGNORED:
            raise Rejected(f"unknown part {key}")
        if PARTS.get(key) in given:
            raise Rejected(f"{key} beside another name of the same part")
        if key in PARTS and value not in (None, {}):
            given[PARTS[key]] = value
    return given


def _user_tool(tool: dict, run: Callable | None, taken: set[str]) -> dict:
    """Check one tool of a user -> the parts of its Tool."""
    parts = {"description": "", "parameters": object_schema(), "returns": ANY_OBJECT}
    parts |= _renamed(tool)
    if "name" not in parts:
        raise Rejected("no name")
    try:
        check_name(parts["name"], taken)
    except Rejected as error:
        reason = "expected 1 to 64 letters, digits, _ or -, which no other tool of the file has"
        raise Rejected(f"{error}; {reason}") from None
    if not isinstance(parts["description"], str):
        raise Rejected("bad description")
    is_object = isinstance(parts["returns"], dict) and parts["returns"].get("type") == "object"
    if "return" in tool and not is_object:
        parts["returns"] = object_schema(result=parts["returns"])  # as `guarded` returns it
    for part in ("parameters", "returns"):
        parts[part] = check_user_schema(parts[part], part)
    if parts.pop("strict", False):
        check_strict(parts["parameters"])
    return {**parts, "run": guarded(run) if run else None}


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
