"""A user's own tools: OpenAI schemas with one rule broken each, and Python functions. Tools that the ToolMaker repairs.

The schemas are the 30 real ones of MTR_REAL. If it is not set, they are six similar ones.
"""
import copy
import json
import os
from pathlib import Path

import pytest
from test_agents import a_tool, maker_text, nobody, scripted

import agents
from agents import Call, Rejected, ToolMaker, Trace, Turn, check_tools, run_calls
from data import InputError
from data.tools import read_tools, real
from evaluate import load_tools

ADDRESS = {"type": "object", "properties": {"street": {"type": "string"}, "zip": {"type": "string"}}, "required": ["street", "zip"]}
OPEN = {"type": "object", "properties": {}}


def function(name, description="Does it.", required=None, **properties):
    parameters = {"type": "object", "properties": properties, "required": list(properties) if required is None else required}
    return {"type": "function", "function": {"name": name, "description": description, "parameters": parameters}}


OWN = [function("find_user", email={"type": "string", "description": "such as 'a@b.c'"}), function("list_all"),
       function("ship", to=ADDRESS, fast={"type": "boolean"}), function("order", items={"type": "array", "items": ADDRESS}),
       function("cabin", of={"type": "string", "enum": ["economy", "business"]}), function("pay", [], amount={"type": "number"})]
OWN[-1]["function"] |= {"description": "Pays.", "parameters": {"type": "object", "properties": {"amount": {"type": "number"}}}}
REAL = Path(os.environ.get("MTR_REAL", "/nowhere")) / "tools"
FILES = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(REAL.glob("*.json"))] or [OWN]
SCHEMAS = [schema for file in FILES for schema in file]


def load(schemas, tmp_path, text=None):
    path = tmp_path / "tools.json"
    path.write_text(text or json.dumps(schemas), encoding="utf-8")
    return load_tools(path)


def test_openai_schemas_are_accepted_as_they_are(tmp_path):
    assert len(SCHEMAS) == (30 if REAL.exists() else 6)
    for file in FILES:
        for schema, tool in zip(file, load(file, tmp_path), strict=True):
            assert tool.schema == schema and tool.returns == {"type": "object"} and tool.run is None
            assert agents.parse_observation(tool, '{"x": [1]}') == {"x": [1]} and agents.parse_observation(tool, "[1]") is None
    bare = [schema["function"] | {"returns": ADDRESS} for schema in OWN]
    assert [tool.returns for tool in load(bare, tmp_path)] == [ADDRESS] * 6


def test_read_tools_gives_the_parts_of_each_tool(tmp_path):
    """Without `returns`, any object is a result. `strict` is checked and not kept."""
    mine = {"name": "f", "description": "d", "parameters": OPEN}
    path = tmp_path / "tools.json"
    path.write_text(json.dumps([mine, {"type": "function", "function": {**mine, "name": "g", "returns": ADDRESS, "strict": False}}]))
    assert read_tools(path) == [{**mine, "returns": {"type": "object"}, "run": None},
                                {**mine, "name": "g", "returns": ADDRESS, "run": None}]


def at(*path, to):
    """A break that sets the value at a path of keys. A `to` of ... removes the value."""
    def harm(f):
        for key in path[:-1]:
            f = f[key]
        f[path[-1]] = to
        if to is ...:
            del f[path[-1]]
    return harm


def strict(closed=True, extra=None):
    """A break that marks the function as strict. closed: its objects follow the rules. extra: more properties, which
    are not required."""
    def harm(f):
        def close(schema):
            if isinstance(schema, dict):
                if "properties" in schema:
                    schema |= {"additionalProperties": False, "required": list(schema["properties"])}
                for child in [*schema.values(), *schema.get("properties", {}).values()]:
                    close(child)
        if closed:
            close(f["parameters"])
        f["parameters"]["properties"] |= extra or {}
        f["strict"] = True
    return harm


RULES = [  # what the message must contain, the break
    ("bad tool name", at("name", to="a b")), ("bad tool name", at("name", to="x" * 65)), ("bad tool name", at("name", to="")),
    ("tool name taken", at("name", to="calculator")), ("bad description", at("description", to=" ")),
    ("no description", at("description", to=...)), ("no parameters", at("parameters", to=...)),
    ("unknown part arguments", at("arguments", to={})), ("not of type object", at("parameters", to={})),
    ("not of type object", at("parameters", "type", to="array")), ("not of type object", at("parameters", "type", to=...)),
    ("without properties", at("parameters", "properties", to=["a"])), ("without properties", at("parameters", "properties", to=...)),
    ("required names no property", at("parameters", "required", to=["nobody"])),
    ("required names no property", at("parameters", "required", to="nobody")),
    (r"schema with \$ref", at("parameters", "properties", "x", to={"$ref": "https://example.com/x.json"})),
    ("schema with pattern", at("parameters", "properties", "x", to={"type": "string", "pattern": "(a+)+$"})),
    ("unknown type", at("parameters", "properties", "x", to={"type": "text"})),
    ("strict, but an object is open", strict(closed=False)),
    ("strict, but a property is not required", strict(extra={"x": {"type": "string"}})),
    ("strict, but an object is open", lambda f: (strict()(f), f["parameters"]["properties"].update(x=OPEN),
                                                 f["parameters"]["required"].append("x"))),
    ("strict, but an object is open", lambda f: (strict()(f), f["parameters"]["required"].append("x"), f["parameters"]["properties"].update(
        x={"anyOf": [{"type": "null"}, {"type": "array", "items": {"type": ["object", "null"]}}]}))),
    ("strict, but an object is open", lambda f: (strict()(f), f["parameters"]["required"].append("properties"),
                                                 f["parameters"]["properties"].update(properties=OPEN))),
]


@pytest.mark.parametrize("message, harm", RULES, ids=range(len(RULES)))
def test_each_schema_with_one_rule_broken_is_refused_by_its_name(message, harm, tmp_path):
    assert len(RULES) * len(SCHEMAS) >= 60
    for schema in SCHEMAS:
        broken = copy.deepcopy(schema)
        harm(broken["function"])
        with pytest.raises(InputError, match=message) as error:
            load([broken], tmp_path)
        assert "\n" not in str(error.value) and "tool 1" in str(error.value)


@pytest.mark.parametrize("message, change", [
    ("tool name taken", lambda text: f"[{text}, {text}]"), ("repeated key", lambda text: f'[{text[:-1]}, "type": "function"}}]'),
    ("NaN is not JSON", lambda text: f'[{text[:-1]}, "x": NaN}}]'), ("not JSON", lambda text: f"[{text}"),
    ("no tools", lambda text: "[]"), ("not JSON", lambda text: "[" * 90_000)])
def test_a_file_that_breaks_a_rule_is_refused(message, change, tmp_path):
    for schema in SCHEMAS:
        with pytest.raises(InputError, match=message):
            load(None, tmp_path, change(json.dumps(schema)))


def test_strict_schemas_that_keep_their_promise_are_accepted(tmp_path):
    """A property may have the name of a keyword."""
    for schema in SCHEMAS:
        fine = copy.deepcopy(schema)
        strict()(fine["function"])
        for name in ("x", "properties"):
            fine["function"]["parameters"]["properties"][name] = {"type": ["string", "null"]}
            fine["function"]["parameters"]["required"].append(name)
        assert load([fine], tmp_path)


@pytest.mark.parametrize("content", ["7", '"x"', "[7]", '[{"name": []}]', '[{"function": 3}]', "{}"])
def test_a_file_without_a_list_of_functions_is_refused_in_one_line(content, tmp_path):
    with pytest.raises(InputError, match="tools.json") as error:
        load(None, tmp_path, content)
    assert "\n" not in str(error.value)


# ------------------------------------------------------------------------------------------ regeneration

BROKEN = {"bad tool name": {"name": "a b"}, "tool name taken": {"name": "count"}, "bad description": {"description": ""},
          "schema not of type object": {"parameters": {}}, "schema without properties": {"returns": {"type": "object"}},
          "required names no property": {"parameters": {"type": "object", "properties": {}, "required": ["a"]}},
          "a tool has name, description, parameters, returns": {"strict": True}}


@pytest.mark.parametrize("reason", BROKEN)
def test_rejected_tools_are_repaired_when_the_prompt_holds_the_reason(reason, tokenizer):
    """The ToolMaker repairs its tools as soon as the prompt holds the reason, and not earlier. If it never repairs them,
    the question gets the fallback after three tries."""
    with pytest.raises(Rejected, match=reason):
        check_tools([a_tool(**BROKEN[reason])])

    def script(context):
        told = f"\nRejected: {reason}" in context and "stubborn" not in context
        return maker_text(json.dumps(a_tool() if told else a_tool(**BROKEN[reason])))

    mended, stubborn = ToolMaker(scripted(tokenizer, script)).make(["Who?", "stubborn?"])
    assert ([tool.name for tool in mended.made], mended.tries, mended.thought, mended.rejected) == (["f"], 2, "t", reason)
    assert (stubborn.made, stubborn.tries) == ([agents.FALLBACK], 0)


# -------------------------------------------------------------------------------------------- real tools


def python_file(tmp_path, body):
    head = 'SCHEMA = {"name": "f", "description": "d", "parameters": {"type": "object", "properties": {"a": {}}}}\n'
    (tmp_path / "mine.py").write_text(head + body, encoding="utf-8")
    return tmp_path / "mine.py"


@pytest.mark.parametrize("body, observation", [
    ("lambda a: {'x': a}", {"x": 3}), ("lambda a: [a]", {"result": [3]}), ("lambda a: None", {"result": None}),
    ("lambda a: 1 / 0", {"error": "ZeroDivisionError: division by zero"}), ("lambda b: b", None), ("lambda a: {1, 2}", None),
    ("lambda a: float('nan')", None)])
def test_a_python_function_answers_and_its_failure_is_an_observation(body, observation, tmp_path):
    tool, = load_tools(python_file(tmp_path, f"TOOLS = [(SCHEMA, {body})]"))
    trace = Trace(tools=[tool], turns=[Turn(calls=[Call("f", {"a": 3})])])
    run_calls([trace], real(nobody))
    found = trace.calls[0].observation
    assert found == observation if observation else list(found) == ["error"]


@pytest.mark.parametrize("body", ["", "TOOLS = 3", "TOOLS = [SCHEMA]", "TOOLS = []", "1 / 0", "def", "TOOLS = [(SCHEMA | {'name': 'count'}, len)]"])
def test_a_python_file_without_tools_is_refused_in_one_line(body, tmp_path):
    with pytest.raises(InputError, match="mine.py") as error:
        load_tools(python_file(tmp_path, body))
    assert "\n" not in str(error.value)


def test_the_example_in_docs_works():
    mayor, letters = load_tools(Path(__file__).resolve().parents[1] / "docs" / "real_tools.py")
    assert letters.run(text="Bo 3") == {"result": 2} and mayor.run(city="nowhere") == {"error": "no mayor found"}
