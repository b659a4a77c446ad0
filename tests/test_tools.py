"""A user's own tools: schemas in ten formats, with one rule broken each, and Python functions. Tools that the ToolMaker repairs.

The schemas are the 30 real ones of MTR_REAL. If it is not set, they are six similar ones.
"""
import asyncio
import copy
import datetime
import json
import os
import sys
import urllib.request
from pathlib import Path

import jsonschema
import numpy as np
import pytest
from test_agents import a_tool, maker_text, nobody, scripted

import agents
import sft
from agents import Call, Rejected, Tool, Toolbox, ToolMaker, Trace, Turn, check_tools, run_calls
from data import InputError
from data.evidence import computed_by, evidence_of
from data.schema import first_error, object_schema
from data.tools import guarded, read_tools, real
from data.training import to_records
from data.words import tokens
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
    ("no name", at("name", to=...)), ("no name", at("name", to=None)), ("bad description", at("description", to=["d"])),
    ("unknown part arguments", at("arguments", to={})), ("unknown part", at("a\nb", to={})),
    ("inputSchema beside another name of the same part", at("inputSchema", to=OPEN)), ("type 'web_search'", at("type", to="web_search")),
    ("not of type object", at("parameters", to={"properties": {}})), ("not of type object", at("parameters", to=[])),
    ("not of type object", at("parameters", "type", to="array")), ("not of type object", at("parameters", "type", to=...)),
    (r"parameters: bad schema at properties: \['a'\] is not of type 'object'", at("parameters", "properties", to=["a"])),
    ("parameters: required names no property: nobody", at("parameters", "required", to=["nobody"])),
    ("bad schema at required: 'nobody' is not of type 'array'", at("parameters", "required", to="nobody")),
    ("bad schema at properties/x/type: 'text' is not", at("parameters", "properties", "x", to={"type": "text"})),
    ("returns: schema not of type object", at("returns", to={"type": "string"})),
    ("returns: bad schema at properties/result: 7 is not", at("return", to=7)),
    ("parameters: .*draft 3; expected draft 4", at("parameters", "$schema", to="http://json-schema.org/draft-03/schema#")),
    (r"parameters: \$schema is no text", at("parameters", "$schema", to=3)),
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
    ("tool name taken", lambda text: f"[{text}, {text}]"), ("tool 1: expected a JSON object, found 7", lambda text: f"[7, {text}]"), ("repeated key", lambda text: f'[{text[:-1]}, "type": "function"}}]'),
    ("NaN is not JSON", lambda text: f'[{text[:-1]}, "x": NaN}}]'), ("not JSON", lambda text: f"[{text}"),
    ("no tools", lambda text: "[]"), ("not JSON", lambda text: "[" * 90_000)])
def test_a_file_that_breaks_a_rule_is_refused(message, change, tmp_path):
    for schema in SCHEMAS:
        with pytest.raises(InputError, match=message):
            load(None, tmp_path, change(json.dumps(schema)))


@pytest.mark.parametrize("tool, message", [
    ({"name": "a.b"}, "bad tool name; expected 1 to 64 letters, digits, _ or -"), ({"name": "x", "function": {"name": "y"}}, "name beside function and in it"),
    ({"tools": [{"name": "x"}], "functions": []}, "functions and tools; expected one")])
def test_a_message_says_what_was_expected(tool, message, tmp_path):
    with pytest.raises(InputError, match=message):
        load(tool, tmp_path)


@pytest.mark.parametrize("part", ["parameters", "inputSchema", "input_schema"])
def test_an_empty_schema_has_no_parameters(part, tmp_path):
    tool, = load({"name": "x", part: {}}, tmp_path)
    assert tool.parameters == {"type": "object", "properties": {}, "required": []}


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


# ------------------------------------------------------------------------------------------ the formats


def hoisted(schema, table):
    """The schema as pydantic writes it: each object and each enum inside it stands in a table of its own."""
    defs = {}

    def moved(part):
        if isinstance(part, list):
            return [moved(item) for item in part]
        if not isinstance(part, dict):
            return part
        part = {key: {name: moved(child) for name, child in value.items()} if key == "properties" else value if key == "enum" else moved(value)
                for key, value in part.items()}
        if part.get("type") != "object" and "enum" not in part and "pattern" not in part:
            return part
        defs[f"pattern{len(defs)}"] = part  # a name, not a keyword
        return {"$ref": f"#/{table}/pattern{len(defs) - 1}"}

    properties = {name: moved(part) for name, part in schema["properties"].items()}
    return {**schema, "properties": properties, table: defs}


def mcp(f):
    return {"name": f["name"], "title": "T", "description": f["description"], "inputSchema": f["parameters"], "outputSchema": ADDRESS,
            "annotations": {"readOnlyHint": True}, "_meta": None, "execution": {"taskSupport": "forbidden"}, "icons": None}


KEYWORDS = {"$ref": "#/nowhere", "pattern": "(", "properties": 3, "type": "text"}  # values that look like keywords


def with_values(schema):
    """The schema with a property whose default, examples, enum and const hold keys with the names of keywords."""
    parts = {"default": KEYWORDS, "examples": [KEYWORDS], "enum": [KEYWORDS, None], "const": None}
    return {**schema, "properties": {**schema["properties"], "anything": parts}}


FORMATS = {  # a function -> what the file of a user holds
    "chat": lambda f: [{"type": "function", "function": f}],
    "bare": lambda f: f,
    "responses": lambda f: [{"type": "function", **f, "strict": None}],
    "mcp": lambda f: {"jsonrpc": "2.0", "id": 1, "result": {"tools": [mcp(f)], "nextCursor": None}},
    "anthropic": lambda f: {"tools": [{"name": f["name"], "description": f["description"], "input_schema": f["parameters"]}]},
    "transformers": lambda f: [{"type": "function", "function": {**f, "return": {"type": "string", "description": "A text."}}}],
    "pydantic": lambda f: [{**f, "parameters": hoisted(f["parameters"], "$defs") | {"title": "Arguments"}}],
    "draft 7": lambda f: [{**f, "parameters": {"$schema": "http://json-schema.org/draft-07/schema#", **hoisted(f["parameters"], "definitions")}}],
    "legacy": lambda f: {"functions": [{**f, "description": "A long text. " * 200}]},
    "values": lambda f: [{**f, "description": None, "parameters": with_values(f["parameters"])}]}
RETURNS = {"mcp": ADDRESS, "transformers": object_schema(result={"type": "string", "description": "A text."})}


def closed(f):
    """The function with one more property, which has a pattern, and without room for others."""
    f = copy.deepcopy(f)
    f["parameters"]["properties"]["code"] = {"type": "string", "pattern": "^[A-Z]{3}$"}
    f["parameters"]["additionalProperties"] = False
    f["parameters"].setdefault("required", []).append("code")
    return f


def fitting(schema):
    """A value that fits a schema."""
    if "enum" in schema:
        return schema["enum"][0]
    kind = schema["type"]
    if kind == "object":
        return {name: fitting(part) for name, part in schema.get("properties", {}).items()}
    if kind == "array":
        return [fitting(schema["items"])]
    return {"string": "ABC", "number": 1.5, "integer": 2, "boolean": True}[kind]


def unfitting(schema):
    """Values that break one rule of a schema each, with the words of jsonschema and the name of the rule."""
    kind, good = schema["type"], fitting(schema)
    yield {"object": [], "array": {}, "string": 5}.get(kind, "x"), "is not of type", "type"
    if "enum" in schema:
        yield "zz", "is not one of", "enum"
    if "pattern" in schema:
        yield "abc", f"does not match '{schema['pattern']}'", "pattern"
        yield "é" * 200, f"breaks pattern '{schema['pattern']}'", "pattern"
    if kind == "array":
        yield from (([bad], *rest) for bad, *rest in unfitting(schema["items"]))
    if kind == "object":
        for name in schema.get("required", []):
            yield {key: value for key, value in good.items() if key != name}, f"'{name}' is a required property", "required"
        if schema.get("additionalProperties") is False:
            yield {**good, "zz": 1}, "Additional properties are not allowed ('zz' was unexpected)", "additionalProperties"
        for name, part in schema.get("properties", {}).items():
            yield from (({**good, name: bad}, *rest) for bad, *rest in unfitting(part))


@pytest.mark.parametrize("form", FORMATS)
def test_real_schemas_in_each_format_refuse_each_broken_rule_by_its_name(form, tmp_path):
    """Ten formats of 30 schemas: 300, or 60 without MTR_REAL. The message names the rule, or else the place and the rule."""
    assert len(FORMATS) == 10
    for schema in SCHEMAS:
        f = closed(schema["function"])
        written = json.dumps(FORMATS[form](f))
        tool, = load(None, tmp_path, "\ufeff" + written if form == "legacy" else written)
        assert (tool.name, tool.returns) == (f["name"], RETURNS.get(form, {"type": "object"}))
        extra = {"anything": None} if form == "values" else {}
        assert first_error(tool.parameters, fitting(f["parameters"]) | extra) is None
        cases = [case for case in unfitting(f["parameters"]) if isinstance(case[0], dict)]
        assert {"required", "type", "pattern", "additionalProperties"} <= {rule for *_, rule in cases}
        for arguments, words, rule in cases:
            message = first_error(tool.parameters, arguments | extra)
            assert words in message or f": breaks {rule} " in message, (message, words)
            assert len(message) <= 100 and "\n" not in message


def test_hoisting_moves_most_objects_and_enums():
    """So that the test above has rules behind a $ref: its own check."""
    moved = [json.dumps(hoisted(closed(schema["function"])["parameters"], "$defs")).count("$ref") for schema in SCHEMAS]
    assert min(moved) >= 1 and max(moved) >= 2


@pytest.mark.parametrize("tool, parts", [
    ({"name": "f"}, {}), ({"name": "f", "parameters": None, "description": None, "strict": None, "returns": None}, {}),
    ({"name": "f", "parameters": {"type": "object"}}, {"parameters": {"type": "object"}}), ({"name": "f", "description": ""}, {}),
    ({"name": "f", "description": "x" * 5000}, {"description": "x" * 5000}), ({"name": "count"}, {"name": "count"}),
    ({"type": "custom", "name": "calculator", "cache_control": {"type": "ephemeral"}}, {"name": "calculator"}),
    ({"type": "function", "function": {"name": "f"}, "returns": ADDRESS}, {"returns": ADDRESS}),
    ({"name": "f", "return": ADDRESS}, {"returns": ADDRESS}), ({"name": "f", "return": {"type": "array"}}, {"returns": object_schema(result={"type": "array"})}),
    ({"name": "f", "strict": True, "parameters": {"type": "object", "properties": {}, "additionalProperties": False}},
     {"parameters": {"type": "object", "properties": {}, "additionalProperties": False}})])
def test_a_part_may_be_missing_null_or_under_another_name(tool, parts, tmp_path):
    (tmp_path / "tools.json").write_text(json.dumps({"functions": [tool]}))
    missing = {"name": "f", "description": "", "parameters": object_schema(), "returns": {"type": "object"}, "run": None}
    assert read_tools(tmp_path / "tools.json") == [missing | parts]


def test_a_strict_schema_is_searched_behind_its_refs(tmp_path):
    """The keys of $defs are names: one may be called properties. A default is no schema."""
    shut = {"type": "object", "properties": {"a": {"type": "string", "default": {"properties": {}}}}, "required": ["a"], "additionalProperties": False}
    for table in ("$defs", "definitions"):
        for inner, message in [(shut, None), (OPEN, "an object is open"), ({**shut, "required": []}, "a property is not required")]:
            parameters = {**object_schema(x={"$ref": f"#/{table}/properties"}), "additionalProperties": False, table: {"properties": inner}}
            text = json.dumps({"name": "f", "strict": True, "parameters": parameters})
            if message is None:
                assert load(None, tmp_path, text)
            else:
                with pytest.raises(InputError, match=message):
                    load(None, tmp_path, text)


# ------------------------------------------------------------------------------------------ trusted schemas

NAMES = {"patternProperties": {"(?P<a>x)": {}, "(?P<a>y)": {}}}  # fine, but not as one pattern


@pytest.mark.parametrize("x, message", [
    ({"$ref": "https://example.com/x.json"}, r"\$ref 'https://example.com/x.json' leads to no schema"),
    ({"$ref": "file:///etc/hostname"}, "leads to no schema"), ({"$ref": "tools.json"}, "leads to no schema"),
    ({"$ref": "https://json-schema.org/draft/2020-12/schema"}, "leads to no schema"), ({"$ref": "#/$defs/nowhere"}, "'#/.defs/nowhere' leads to no schema"),
    ({"$ref": "#nowhere"}, "leads to no schema"), ({"$ref": "#/properties/x/title/0", "title": "text"}, "leads to no schema"),
    ({"$ref": "http://["}, "leads to no schema"), ({"$ref": 3}, "properties/x/.ref: 3 is not of type 'string'"), ({"$dynamicRef": "#x"}, "leads to no schema"),
    ({"$ref": "#/properties/x"}, "leads to itself"), ({"$ref": "#/examples/0", "examples": [1]}, "leads to no schema"),
    ({"items": {"pattern": "("}}, r"bad pattern '\(' \(missing \)"), ({"pattern": r"\p{L}"}, "bad pattern"), ({"pattern": "a{99999999999999999999}"}, "bad pattern"),
    ({"patternProperties": {"[": {}}}, "bad pattern"), (NAMES, "redefinition of group"), ({"$ref": "#/examples/0/not", "examples": [{"not": {"pattern": "("}}]}, "pattern"),
    ({"$schema": "http://json-schema.org/draft-07/schema#"}, "another draft"), ({"$id": "http://a", "not": {"$id": "http://["}}, "Invalid IPv6"),
    ({"minimum": "1"}, "bad schema at properties/x/minimum: '1' is not of type 'number'")], ids=str)
def test_a_schema_that_a_call_could_crash_on_is_refused_and_nothing_is_fetched(x, message, tmp_path, monkeypatch):
    monkeypatch.setattr(urllib.request, "urlopen", lambda *_, **__: pytest.fail("fetched"))
    for part in ("parameters", "outputSchema"):
        schema = {"type": "object", "properties": {"x": x}, "examples": x.get("examples", [])}
        with pytest.raises(InputError, match=f"tool 1 \\('f'\\): {part.replace('outputSchema', 'returns')}: .*{message}") as error:
            load({"name": "f", part: schema}, tmp_path)
        assert "\n" not in str(error.value)


def loaded(schema, tmp_path):
    tool, = load({"name": "f", "parameters": schema}, tmp_path)
    return tool.parameters


@pytest.mark.parametrize("draft, x, good, bad", [  # what another draft reads differently
    ("http://json-schema.org/draft-07/schema#", {"items": [{"type": "string"}]}, ["a", 1], [1]),
    ("http://json-schema.org/draft-06/schema#", {"dependencies": {"a": ["b"]}}, {"a": 1, "b": 2}, {"a": 1}),
    ("http://json-schema.org/draft-04/schema#", {"minimum": 1, "exclusiveMinimum": True}, 2, 1),
    ("https://json-schema.org/draft/2019-09/schema", {"items": [{"type": "string"}], "additionalItems": False}, ["a"], ["a", "b"]),
    ("https://json-schema.org/draft/2020-12/schema", {"prefixItems": [{"type": "string"}]}, ["a", 1], [1]),
    (None, {"prefixItems": [{"type": "string"}]}, ["a", 1], [1])])
def test_a_schema_follows_the_draft_that_it_names(draft, x, good, bad, tmp_path):
    schema = {"type": "object", "properties": {"x": x}} | ({"$schema": draft} if draft else {})
    parameters = loaded(schema, tmp_path)
    assert first_error(parameters, {"x": good}) is None and first_error(parameters, {"x": bad})


def test_a_recursive_schema_is_safe(tmp_path):
    """A tree is checked to any depth that a call can have. A schema that never comes to an end refuses the call."""
    tree = object_schema(name={"type": "string"}) | {"additionalProperties": False}
    tree["properties"]["children"] = {"type": "array", "items": {"$ref": "#/$defs/tree"}}
    parameters = loaded({**object_schema(root={"$ref": "#/$defs/tree"}), "$defs": {"tree": tree}}, tmp_path)
    for leaf, message in [({"name": "b"}, None), ({"name": "b", "x": 1}, "Additional properties are not allowed ('x' was unexpected)")]:
        value = leaf
        for depth in range(1, 5000):
            value = {"name": "a", "children": [value]}
            if depth in (1, 20):
                assert first_error(parameters, {"root": value}) == message
        assert first_error(parameters, {"root": value}) == "arguments out of range"
    endless = loaded({"type": "object", "properties": {"x": {"allOf": [{"$ref": "#/properties/x"}]}}}, tmp_path)
    assert first_error(endless, {"x": 1}) == "arguments out of range" and first_error(endless, {}) is None


@pytest.mark.parametrize("error, escapes", [(RecursionError, False), (OverflowError, False), (BaseException, False), (KeyboardInterrupt, True)])
def test_an_error_of_the_library_is_no_crash(error, escapes):
    """Under jsonschema lies a library in Rust. Its panic, near the limit of recursion, is a BaseException."""
    class Failing(dict):
        def __contains__(self, key):
            raise error
    if escapes:
        with pytest.raises(error):
            first_error(object_schema(a={}), Failing())
    else:
        assert first_error(object_schema(a={}), Failing()) == "arguments out of range"


PLACES = {"type": "object", "properties": {"items": {"type": "array", "items": {"$ref": "#/$defs/item"}}, "n": {"type": "array", "minItems": 99},
                                           "v": {"anyOf": [{"type": "string", "maxLength": 3}, {"type": "null"}]}},
          "$defs": {"item": {"type": "object", "properties": {"zip": {"type": "string", "pattern": "^[0-9]{5}$"}, "of": {"enum": ["a", "b"]}}}}}
LONG = "x" * 99


@pytest.mark.parametrize("arguments, message", [
    ({"items": [{"zip": LONG}]}, "items/0/zip: breaks pattern '^[0-9]{5}$'"), ({"items": [{"of": LONG}]}, "items/0/of: breaks enum ['a', 'b']"),
    ({"items": [{"zip": [LONG]}]}, "items/0/zip: breaks type 'string'"), ({"v": LONG}, "v: breaks maxLength 3"), ({"n": [LONG]}, "n: breaks minItems 99"),
    ({"items": [{"zip": "12"}]}, "'12' does not match '^[0-9]{5}$'"), ({"v": 7}, "7 is not valid under any of the given schemas"),
    ({"items": [{"of": "é\n"}]}, "'é\\n' is not one of ['a', 'b']")])
def test_a_long_value_leaves_place_and_rule_in_the_message(arguments, message, tmp_path):
    """A short message is the one of jsonschema, letter for letter."""
    parameters = loaded(PLACES, tmp_path)
    assert first_error(parameters, arguments) == message
    theirs = next(jsonschema.Draft202012Validator(PLACES).iter_errors(arguments)).message
    assert message == theirs if len(theirs) <= 80 else len(message) <= 100


def test_the_name_of_a_long_place_is_cut_and_printable():
    schema = {"type": "object", "additionalProperties": {"maxLength": 3}}
    assert first_error(schema, {"a" * 99: LONG}) == "a" * 30 + ": breaks maxLength 3"
    assert first_error(schema, {"a\n": LONG}) == "a\\n: breaks maxLength 3"
    assert first_error({"minProperties": 9}, {"a": LONG}) == "breaks minProperties 9"
    assert first_error({"additionalProperties": False}, {LONG: 1}) == "Additional properties are not allowed ('" + "x" * 40


@pytest.mark.parametrize("part", [{"$schema": "http://json-schema.org/draft-03/schema#", "extends": 3}, {"$schema": "http://["},
                                  {"$id": "http://a b", "properties": {"b": {"$id": "http://["}}}], ids=str)
def test_no_schema_of_the_toolmaker_crashes_a_call(part):
    """A model may write a $schema or $id inside a schema, which the check of its tools lets pass."""
    tool, = check_tools([a_tool(parameters=object_schema(a=part))])
    assert first_error(tool.parameters, {"a": {"b": 1}}) == "arguments out of range"


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


WAIT = """
import asyncio, datetime, sys
async def wait(a):
    await asyncio.sleep(0)
    return {"x": a}
class Wait:
    async def wait(self, a):
        return await wait(a)
"""


@pytest.mark.parametrize("body, observation", [
    ("lambda a: {'x': a}", {"x": 3}), ("lambda a: [a]", {"result": [3]}), ("lambda a: None", {"result": None}),
    ("lambda a: 1 / 0", {"error": "ZeroDivisionError: division by zero"}), ("lambda b: b", None), ("lambda a: {1, 2}", None),
    ("lambda a: sys.exit(a)", {"error": "SystemExit: 3"}), ("wait", {"x": 3}), ("lambda a: wait(a)", {"x": 3}),
    ("Wait().wait", {"x": 3}), ("lambda a: datetime.date(1999, 12, 31)", {"result": "1999-12-31"}), ("lambda a: (i for i in [a])", None),
    ("lambda a: float('nan')", None)])
def test_a_python_function_answers_and_its_failure_is_an_observation(body, observation, tmp_path):
    tool, = load_tools(python_file(tmp_path, f"{WAIT}TOOLS = [(SCHEMA, {body})]"))
    trace = Trace(tools=[tool], turns=[Turn(calls=[Call("f", {"a": 3})])])
    run_calls([trace], real(nobody))
    found = trace.calls[0].observation
    assert found == observation if observation else list(found) == ["error"]


@pytest.mark.parametrize("body, message", [
    ("", "no TOOLS; expected a list of pairs"), ("TOOLS = 3", "no TOOLS; expected"), ("TOOLS = [SCHEMA]", "tool 1: expected a pair"),
    ("TOOLS = [{'type': 'function', 'function': SCHEMA}]", "tool 1: expected a pair"), ("TOOLS = []", "no tools"),
    ("TOOLS = [(SCHEMA, len), (SCHEMA, 3)]", "tool 2: expected a function, found 3"), ("TOOLS = [('f', len)]", "tool 1: expected a JSON object, found 'f'"),
    ("TOOLS = [(SCHEMA | {'default': {1}}, len)]", "tool 1: TypeError: Object of type set is not JSON"),
    ("1 / 0", "ZeroDivisionError: division by zero"), ("def", "SyntaxError"), ("import sys; sys.exit('bye')", "SystemExit: bye"),
    ("open('nowhere.json')", "FileNotFoundError.*nowhere.json"), ("raise ValueError('a\\nb')", "ValueError: a b")])
def test_a_python_file_without_tools_is_refused_in_one_line(body, message, tmp_path):
    with pytest.raises(InputError, match=f"mine.py: {message}") as error:
        load_tools(python_file(tmp_path, body))
    assert "\n" not in str(error.value)


def test_a_python_file_may_import_a_neighbour_and_hold_a_dataclass(tmp_path, monkeypatch):
    """A dataclass with postponed annotations looks up its module. A neighbour may be imported as late as in a call."""
    monkeypatch.setattr(sys, "path", [*sys.path])
    (tmp_path / "my_neighbour.py").write_text("def twice(a):\n    return 2 * a\n")
    (tmp_path / "my_late_neighbour.py").write_text("from my_neighbour import twice\n")
    (tmp_path / "mine.py").write_text(
        "from __future__ import annotations\nfrom dataclasses import KW_ONLY, asdict, dataclass\nfrom my_neighbour import twice\n"
        "@dataclass\nclass City:\n    name: str\n    _: KW_ONLY\n    size: int = 3\n"
        "def f(a):\n    import my_late_neighbour\n    return asdict(City(my_late_neighbour.twice(a)))\n"
        "MCP = {'name': 'f', 'inputSchema': {'type': 'object', 'properties': {'a': {'type': 'string'}}}}\nTOOLS = [(MCP, f)]\n")
    before = list(sys.path)
    for _ in range(2):
        tool, = load_tools(tmp_path / "mine.py")
    assert tool.run(a="x") == {"name": "xx", "size": 3} and tool.parameters == {"type": "object", "properties": {"a": {"type": "string"}}}
    assert sys.path == [*before, str(tmp_path)]


def raising(error):
    def f():
        raise error
    return f


class Nameless(Exception):
    def __str__(self):
        raise ValueError


async def cancelled():
    raise asyncio.CancelledError


async def left():
    sys.exit(2)


@pytest.mark.parametrize("code, observation", [
    (raising(ValueError("x")), {"error": "ValueError: x"}), (raising(Nameless()), {"error": "Nameless"}), (raising(SystemExit(1)), {"error": "SystemExit: 1"}),
    (raising(GeneratorExit()), {"error": "GeneratorExit: "}), (raising(OSError("\udcff")), {"error": "OSError: ?"}),
    (cancelled, {"error": "CancelledError: "}), (left, {"error": "SystemExit: 2"}), (lambda: float("nan"), {"error": "Rejected: NaN is not JSON"}),
    (lambda: {"a": object}, {"error": "TypeError: Object of type type is not JSON serializable"}),
    (lambda: {"at": [datetime.datetime(2000, 1, 2, 3, 4)]}, {"at": ["2000-01-02T03:04:00"]}),
    (lambda: {"n": np.int64(3), "x": np.float32(0.5), "a": np.eye(2)}, {"n": 3, "x": 0.5, "a": [[1, 0], [0, 1]]}),
    (lambda: {"error": "not found"}, {"error": "not found"})])
def test_whatever_a_tool_does_the_agent_gets_an_observation(code, observation):
    for _ in range(2):  # the loop of the coroutines goes on after a failure
        assert guarded(code)() == observation
        assert guarded(asyncio.sleep)(0, result=[1]) == {"result": [1]}


def test_ctrl_c_gets_out_of_a_tool():
    with pytest.raises(KeyboardInterrupt):
        guarded(raising(KeyboardInterrupt()))()


def test_all_coroutines_run_in_one_loop():
    """A client that a tool keeps between calls belongs to the loop of its first call."""
    loops = set()

    async def f():
        loops.add(asyncio.get_running_loop())
    assert [guarded(f)() for _ in range(3)] == [{"result": None}] * 3 and len(loops) == 1


def test_a_tool_cannot_change_the_call_in_its_trace():
    def f(items, **more):
        items.append(datetime.date(1999, 12, 31))
        more["filter"]["a"] = object()
    tool = Tool("f", "d", {"type": "object"}, {"type": "object"}, guarded(f))
    trace = Trace(tools=[tool], turns=[Turn(calls=[Call("f", {"items": [1], "filter": {}})])])
    run_calls([trace], real(nobody))
    assert trace.calls[0].arguments == {"items": [1], "filter": {}} and json.dumps(trace.record())


# ----------------------------------------------------------------------- a user's tool with the name of a utility

LOOKUP = Tool("calculator", "", object_schema(film={"type": "string"}), {"type": "object"})


def test_a_users_tool_with_the_name_of_a_utility_is_a_lookup():
    """A utility tool is known by its code. Its result counts only if it was computed from what was told."""
    question, evidence = "Who directed Jaws?", []
    for tool in (LOOKUP, Tool("calculator", "", LOOKUP.parameters, {}, guarded(lambda film: 1)), agents.UTILITIES["calculator"]):
        call = Call("calculator", {"film": "Jaws"}, observation={"director": "Ada Bo"})
        evidence.append(evidence_of(call, tool, 0, question, [set(tokens(question))]))
    assert [e.utility for e in evidence] == ["", "", "calculator"]
    assert [e.result_words for e in evidence] == [["ada", "bo"], ["ada", "bo"], []]
    assert [computed_by(["ada", "bo"], question, [e], False) for e in evidence] == [None, None, []]


def test_a_users_tool_with_the_name_of_a_utility_is_recorded():
    """Without a description, too: all parts of a recorded tool are read again."""
    tools = [LOOKUP, *agents.Toolbox("arithmetic", [], 0).tools[1:]]
    call = Call("calculator", {"film": "Jaws"}, observation={"director": "Ada Bo"})
    trace = Trace("Who directed Jaws?", tools, turns=[Turn("t", [call]), Turn("t", answer="Ada Bo")], status="answered")
    agent, actor = to_records(trace, Toolbox("composition", [], 0), {})
    parts = {"name": "calculator", "description": "", "parameters": LOOKUP.parameters, "returns": {"type": "object"}}
    assert agent["tools"] == [parts] == [actor["tool"]] and actor["exchanges"] == [[call.arguments, call.observation]]
    assert all(sft.split_conversation(record)[1] for record in (agent, actor))


def test_the_example_in_docs_works():
    mayor, letters = load_tools(Path(__file__).resolve().parents[1] / "docs" / "real_tools.py")
    assert letters.run(text="Bo 3") == {"result": 2} and mayor.run(city="nowhere") == {"error": "no mayor found"}
