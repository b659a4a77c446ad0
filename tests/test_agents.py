"""agents.py, data/schema.py and data/tools.py against literal strings.

The sampler is a script, so these tests need no weights. One test uses the real sampler on random weights.
"""
import json
import os
import random
import zlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import agents
from agents import (
    AutoAgent,
    Call,
    Rejected,
    Tool,
    ToolActor,
    Toolbox,
    ToolMaker,
    Trace,
    Turn,
    chat_turn,
    check_tools,
    generate_replies,
    parse_call,
    parse_tools,
    parse_turn,
    result_text,
    run_calls,
    run_episodes,
    system_turn,
    uniforms,
)
from data import InputError, chat
from data.own import story
from data.prompts import SHORT
from data.schema import check_schema, first_error, object_schema, strict_json
from data.tokenizer import CHAT_TEMPLATE
from data.tools import blanked, guarded, real, shuffled
from model import Sampler, pad, token_logprobs

START, END = "<|im_start|>", "<|im_end|>"


def object_of(required=None, **properties):
    """The JSON schema of an object. All properties are required, unless `required` lists some of them."""
    required = list(properties) if required is None else required
    return {"type": "object", "properties": properties, "required": required}


TEXT = {"type": "string"}
# Qwen2.5's template puts this where a conversation has no system turn.
DEFAULT_SYSTEM = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."
BIRTHPLACE = Tool("birthplace", "Where a person was born.", object_of(person=TEXT),
                  object_of(birthplace=TEXT))
COUNTRY = Tool("country", "Where a city lies.", object_of(city=TEXT), object_of(country=TEXT))


def scripted(tokenizer, script, capacity=4):
    """A replacement of model.Sampler. script(text of the conversation) returns the next turn: a text, which is encoded
    and ended with <|im_end|>, or ids, which are taken as they are.

    heard: the ids of each conversation. opened: the number of prompts of each open(). before: the ids before each
    generated turn. temperatures: of each sample()."""
    s = SimpleNamespace(tokenizer=tokenizer, capacity=capacity, slots=100_000, heard=[], opened=[], before=[],
                        temperatures=[])

    def reset():
        s.heard = []

    def open_(prompts, copies=1):
        s.opened.append(len(prompts))
        first = len(s.heard)
        s.heard += [list(prompt) for prompt in prompts for _ in range(copies)]
        return list(range(first, len(s.heard)))

    def append(conversation, ids):
        s.heard[conversation] += ids

    def sample(conversations, limits, uniforms, temperature=1.0):
        assert min(limits) > 0, "a turn needs at least one token"
        assert uniforms.shape[0] == len(conversations) and uniforms.shape[1] >= max(limits)
        s.temperatures.append(temperature)
        said = []
        for c, limit in zip(conversations, limits, strict=True):
            s.before.append(list(s.heard[c]))
            reply = script(tokenizer.decode(s.heard[c]))
            ids = tokenizer.full.encode(reply + END).ids if isinstance(reply, str) else list(reply)
            said.append((ids[:limit], [-0.5 - i for i in range(len(ids[:limit]))]))
            s.heard[c] += ids[:limit]
        return said

    s.reset, s.open, s.append, s.sample = reset, open_, append, sample
    return s


def in_turn(*replies):
    """A script: the n-th turn of a conversation is the n-th reply."""
    return lambda context: replies[context.count(f"{START}assistant\n") - 1]


def call_text(name, arguments):
    written = json.dumps(arguments, ensure_ascii=False)
    return f'<tool_call>\n{{"name": "{name}", "arguments": {written}}}\n</tool_call>'


def act(*calls, thought="I look it up."):
    """The text of a turn with calls."""
    return "\n".join([f"<think>{thought}</think>", *(call_text(*c) for c in calls)])


def say(answer, thought="Done."):
    """The text of a turn with an answer."""
    return f"<think>{thought}</think>\n<answer>{answer}</answer>"


FACTS = {("birthplace", "Bo"): {"birthplace": "Velka"}, ("birthplace", "Ada"): {"birthplace": "Doka"},
         ("country", "Velka"): {"country": "Suna"}}


def world(name, arguments):
    return FACTS.get((name, str(next(iter(arguments.values()), None))), {"error": f"no {name} found"})


def play(sampler, question="Where was Bo born?", tools=(BIRTHPLACE, COUNTRY), backend=None, closed_book=False,
         watch=None, **limits):
    """The trace of one episode. watch(trace) is called after each half of the loop."""
    limits = {"max_turns": 8, "turn_tokens": 400, "trace_tokens": 4000} | limits
    trace = Trace(question, list(tools), ("key", question))
    run_episodes(AutoAgent(sampler, **limits), backend or real(world), [trace], closed_book=closed_book,
                 watch=watch and (lambda: watch(trace)))
    return trace


# ------------------------------------------------------------------------------------------ rendering

QWEN = "<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant."
HEAD = ("\n\n# Tools\n\nYou may call one or more functions to assist with the user query.\n\nYou are "
        "provided with function signatures within <tools></tools> XML tags:\n<tools>")
TAIL = ("\n</tools>\n\nFor each function call, return a json object with function name and arguments within "
        "<tool_call></tool_call> XML tags:\n<tool_call>\n{\"name\": <function-name>, \"arguments\": "
        "<args-json-object>}\n</tool_call><|im_end|>\n")
ZETA = {"type": "function", "function": {"name": "zeta", "description": "<b> & 'é'",
                                         "parameters": {"type": "object",
                                                        "properties": {"b": {}, "a": {"type": "number"}}}}}
ZETA_LINE = ('\n{"type": "function", "function": {"name": "zeta", "description": "<b> & \'é\'", '
             '"parameters": {"type": "object", "properties": {"b": {}, "a": {"type": "number"}}}}}')
TWO_CALLS = [{"name": "f", "arguments": {"b": 1, "a": ["é", None, True]}}, {"name": "g", "arguments": {}}]
TWO_CALLS_TEXT = ('<tool_call>\n{"name": "f", "arguments": {"b": 1, "a": ["é", null, true]}}\n</tool_call>\n'
                  '<tool_call>\n{"name": "g", "arguments": {}}\n</tool_call>')

GOLDEN = {
    "default system turn": (lambda: system_turn(DEFAULT_SYSTEM), QWEN + "<|im_end|>\n"),
    "system turn": (lambda: system_turn("Be brief."), "<|im_start|>system\nBe brief.<|im_end|>\n"),
    "one tool": (lambda: system_turn(DEFAULT_SYSTEM, schemas=[ZETA]), QWEN + HEAD + ZETA_LINE + TAIL),
    "two tools": (lambda: system_turn("S", [ZETA, ZETA]),
                  "<|im_start|>system\nS" + HEAD + ZETA_LINE * 2 + TAIL),
    "user turn": (lambda: chat_turn("user", "Hi\nthere"), "<|im_start|>user\nHi\nthere<|im_end|>\n"),
    "empty turn": (lambda: chat_turn("assistant", *chat.assistant_content("", [])),
                   "<|im_start|>assistant\n<|im_end|>\n"),
    "text alone": (lambda: chat.assistant_content("Hm.", []), "Hm."),
    "calls alone": (lambda: chat_turn("assistant", *chat.assistant_content("", TWO_CALLS)),
                    "<|im_start|>assistant\n" + TWO_CALLS_TEXT + "<|im_end|>\n"),
    "text and calls": (lambda: chat_turn("assistant", *chat.assistant_content("Hm.", TWO_CALLS)),
                       "<|im_start|>assistant\nHm.\n" + TWO_CALLS_TEXT + "<|im_end|>\n"),
    "one result": (lambda: chat.results_turn(["{}"]),
                   "<|im_start|>user\n<tool_response>\n{}\n</tool_response><|im_end|>\n"),
    "a run of results": (lambda: chat.results_turn(["1", "2"]),
                         "<|im_start|>user\n<tool_response>\n1\n</tool_response>\n"
                         "<tool_response>\n2\n</tool_response><|im_end|>\n"),
    "generation prompt": (lambda: chat.GENERATE, "<|im_start|>assistant\n"),
}


@pytest.mark.parametrize("name", GOLDEN)
def test_rendering_is_qwens_to_the_letter(name):
    pieces, text = GOLDEN[name]
    assert "".join(pieces()) == text


@pytest.mark.parametrize("name", GOLDEN)
def test_pieces_encode_to_the_ids_of_the_whole_text(name, tokenizer):
    """Only control tokens separate the pieces, so the pieces and the whole text give the same ids."""
    pieces, text = GOLDEN[name]
    assert tokenizer.encode(pieces()) == tokenizer.full.encode(text).ids


@pytest.mark.parametrize("text", ["<|im_end|>\n<|im_start|>assistant\n", "<tool_call>", "</tool_call>",
                                  "<|endoftext|>"])
def test_text_cannot_spell_a_control_token(text, tokenizer):
    """Neither in a question, nor in a result, nor in a tool."""
    schema = {"type": "function", "function": {"name": text, "description": text, "parameters": {}}}
    for pieces in (chat_turn("user", text), chat.results_turn([text])):
        ids = tokenizer.encode(pieces)
        found = [i for i in ids if i in tokenizer.control.values()]
        assert found == [tokenizer.control[START], tokenizer.control[END]]
        assert text in tokenizer.decode(ids)
    found = [i for i in tokenizer.encode(system_turn("S", [schema])) if i in tokenizer.control.values()]
    names = [START, "<tool_call>", "</tool_call>", "<tool_call>", "</tool_call>", END]  # these belong to the template
    assert found == [tokenizer.control[name] for name in names]


def template(source):
    """Render a chat template in the same environment as transformers does."""
    sandbox = pytest.importorskip("jinja2.sandbox")
    environment = sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.filters["tojson"] = lambda value, **_: json.dumps(value, ensure_ascii=False)
    return environment.from_string(source).render


def conversation(rng):
    """Random messages and tools in the form that apply_chat_template of transformers takes."""
    def text():
        return "".join(rng.choice(["a", "é", " ", "\n", "<", "&", "'", '"', "{{ x }}", "{% y %}"])
                       for _ in range(rng.randrange(6)))

    def call():
        value = rng.choice([1, None, [text()], {"z": 1.5, "a": text()}])
        made = {"name": rng.choice("fg"), "arguments": {text(): value}}
        return made if rng.random() < 0.5 else {"type": "function", "function": made}

    messages = [{"role": "system", "content": text()}] if rng.random() < 0.5 else []
    messages.append({"role": "user", "content": text()})
    for _ in range(rng.randrange(6)):
        role = rng.choice(["user", "assistant", "calls", "results", "system"])
        if role == "calls":
            messages.append({"role": "assistant", "content": text(),
                             "tool_calls": [call() for _ in range(rng.randint(1, 3))]})
        elif role == "results":
            messages += [{"role": "tool", "content": text()} for _ in range(rng.randint(1, 3))]
        else:
            messages.append({"role": role, "content": text()})
    return messages, [ZETA, {"type": "function", "function": {"name": text()}}][:rng.randrange(3)]


def as_pieces(messages, tools):
    """The pieces that agents.py makes of the same conversation."""
    head = messages[0]["content"] if messages[0]["role"] == "system" else DEFAULT_SYSTEM
    pieces = system_turn(head, tools)
    results = []
    for message, after in zip(messages, [*messages[1:], None], strict=True):
        if message["role"] == "tool":
            results.append(message["content"])
            if after is None or after["role"] != "tool":
                pieces += chat.results_turn(results)
                results = []
        elif message is not messages[0] or message["role"] != "system":
            calls = [call.get("function", call) for call in message.get("tool_calls", [])]
            pieces += chat_turn(message["role"], *chat.assistant_content(message["content"], calls))
    return pieces + chat.GENERATE


@pytest.mark.parametrize("seed", range(60))
def test_the_chat_template_renders_the_text_of_the_pieces(seed):
    messages, tools = conversation(random.Random(seed))
    rendered = template(CHAT_TEMPLATE.read_text(encoding="utf-8"))(messages=messages, tools=tools, add_generation_prompt=True)
    assert rendered == "".join(as_pieces(messages, tools))


def test_chat_template_against_a_literal_text():
    messages = [{"role": "user", "content": "Q"},
                {"role": "assistant", "content": "", "tool_calls": TWO_CALLS},
                {"role": "tool", "content": "1"}, {"role": "tool", "content": "2"},
                {"role": "assistant", "content": "A"}]
    want = (QWEN + HEAD + ZETA_LINE + TAIL + "<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\n" +
            TWO_CALLS_TEXT + "<|im_end|>\n<|im_start|>user\n<tool_response>\n1\n</tool_response>\n"
            "<tool_response>\n2\n</tool_response><|im_end|>\n<|im_start|>assistant\nA<|im_end|>\n")
    assert template(CHAT_TEMPLATE.read_text(encoding="utf-8"))(messages=messages, tools=[ZETA]) == want


def test_the_chat_template_of_a_folder_renders_the_text_of_the_pieces(folder):
    """The folder is a real Qwen2.5 folder if MTR_QWEN names one, else a folder that save_model wrote."""
    path = Path(os.environ.get("MTR_QWEN", folder)) / "tokenizer_config.json"
    render = template(json.loads(path.read_text(encoding="utf-8"))["chat_template"])
    for seed in range(100):
        messages, tools = conversation(random.Random(seed))
        rendered = render(messages=messages, tools=tools, add_generation_prompt=True)
        assert rendered == "".join(as_pieces(messages, tools))


# --------------------------------------------------------------------------------------------- parser

F = '<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>'

WELL_FORMED = [  # text, thought, calls as (name, arguments), answer
    ("<think>t</think>\n<answer>x</answer>", "t", [], "x"),
    ("<think>t</think><answer> x y </answer>", "t", [], "x y"),
    ("\n <think>\n t \n</think>\n\n<answer>x</answer>\n", "t", [], "x"),
    ("<think></think><answer>x</answer>", "", [], "x"),
    ("<think>t</think><answer></answer>", "t", [], ""),
    ("<think>a\nb</think>\n<answer>x\ny</answer>", "a\nb", [], "x\ny"),
    ("<think>é 1 < 2</think>\n<answer>“x”</answer>", "é 1 < 2", [], "“x”"),
    (f"<think>t</think>\n{F}", "t", [("f", {"a": 1})], None),
    (f"<think>t</think>{F}{F}", "t", [("f", {"a": 1})] * 2, None),
    (f"<think>t</think>\n{F}\n\n{F}\n", "t", [("f", {"a": 1})] * 2, None),
    ('<think>t</think><tool_call>{"arguments": {}, "name": "g"}</tool_call>', "t", [("g", {})], None),
    (f"<think>I could say {F} here</think>\n<answer>x</answer>", f"I could say {F} here", [], "x"),
    ("<think>not <answer>y</answer></think>\n<answer>x</answer>", "not <answer>y</answer>", [], "x"),
    (f"<think>no {F.replace('f', 'g')}</think>{F}", f"no {F.replace('f', 'g')}", [("f", {"a": 1})], None),
]


@pytest.mark.parametrize("text, thought, calls, answer", WELL_FORMED)
def test_parse_turn_reads_what_keeps_the_grammar(text, thought, calls, answer):
    made = parse_turn(text)
    assert made == Turn(thought, [Call(*call) for call in calls], answer)


MALFORMED = [  # neither a call nor an answer; test_turns.py has more, and the turns that depart from the strict form
    "", " ", "\n", "hello", "<", "<think>", "</think>", "<think>t", "t</think>", "<think>t</think>",
    "<think>t</think> hello", "{}", "<think>t</think>{}", "<think>t</think>x</answer>", "<think>t</think><answer>",
    "<think>t</think></answer>", "<think>t<answer>x</answer></think>", f"<think>t{F}</think>",
    "<think>t</think><answer>x</answer> and <answer>y</answer>",
    "<think>t</think><answer><answer>x</answer></answer>", "<think>t</think><answer>x<answer>y</answer>",
    f"<think>t</think><answer>{F}</answer>", "<think>t</think></tool_call>", "<think>t</think><tool_call>",
    "<think>t</think><tool_response>{}</tool_response>", "<THINK>t</THINK><ANSWER>x</ANSWER>",
    "&lt;think&gt;t&lt;/think&gt;",
]


@pytest.mark.parametrize("text", MALFORMED)
def test_parse_turn_names_what_breaks_the_grammar(text):
    made = parse_turn(text)
    assert made.error and made.answer is None and made.calls == [] and made.error in made.departures


UNREADABLE = [
    "", " ", "f", "f(1)", "{", "}", "null", "true", "3", "NaN", '"f"', "[]", '["f", {}]',
    '[{"name": "f", "arguments": {}}]', "{}", '{"arguments": {}}',
    '{"name": "f", "arguments": {}, "parameters": {}}', '{"name": "f", "arguments": {}, "x": 1}',
    '{"name": "f", "arguments": {}', '{"name": "f", "arguments": {},}',
    '{"name": "f", "arguments": {"a": 1,}}', "{'name': 'f', 'arguments': {}}", '{name: "f", arguments: {}}',
    '{"name": "f", "arguments": {}} {}', '{"name": "f", "arguments": {}}{"name": "f", "arguments": {}}',
    '{"name": "f", "arguments": {} // none\n}', '{"name": "f", "arguments": "{"}',
    '{"name": "f", "arguments": [1]}', '{"name": "f", "arguments": "null"}', '{"name": "f", "arguments": 3}',
    '{"name": 3, "arguments": {}}', '{"name": null, "arguments": {}}', '{"name": ["f"], "arguments": {}}',
    '{"Name": "f", "arguments": {}}', '{"name": "f", "arguments": {"a": NaN}}',
    '{"name": "f", "arguments": {"a": -Infinity}}', '{"name": "f", "name": "g", "arguments": {}}',
    '{"name": "f", "arguments": {"a": 1, "a": 1}}', '{"name": "f", "arguments": {"a": [{"b": 1, "b": 2}]}}',
    '{"name": "f", "arguments": {"a": "\n"}}', '{"name": "f", "arguments": {"a": "\\x"}}',
    '{"name": "f", "arguments": {"a": ' + "9" * 5000 + "}}", "[" * 100_000,
    '{"name": "f", "arguments": {"a": ' + "[" * 100_000 + "]" * 100_000 + "}}",
]


@pytest.mark.parametrize("text", UNREADABLE, ids=lambda text: text[:40])
def test_parse_call_gives_an_error_and_nothing_to_run(text):
    """The call has an error, no name and no arguments. parse_call gets the objects that find_objects made strict."""
    made = parse_call(text, [])
    assert made.error and made.name == "" and made.arguments == {} and not made.succeeded


@pytest.mark.parametrize("text, name, arguments", [
    ('{"name": "f", "arguments": {}}', "f", {}),
    (' \n{"arguments": {"b": [1, 2.5, null, {"c": "é"}]}, "name": "f g"}\n', "f g",
     {"b": [1, 2.5, None, {"c": "é"}]}),
    ('{"name": "", "arguments": {"a": "\\u003cb\\u003e"}}', "", {"a": "<b>"}),
])
def test_parse_call_reads_a_call(text, name, arguments):
    assert parse_call(text, []) == Call(name, arguments)


AWKWARD = ['"\\ud800"', '{"\\udfff": 1}', "1e999", "[-1e999]", "1" + "0" * 400, '"' + "x" * 9999 + '"',
           '"\\u0000"', '"\\u2028"', '"</tool_response>"', "[" * 150 + "]" * 150, "[" * 900 + "]" * 900]


@pytest.mark.parametrize("value", AWKWARD, ids=lambda value: value[:20])
def test_a_call_that_is_accepted_can_be_written_encoded_and_scored(value, tokenizer):
    """A call that parse_call accepts goes into prompts, logs and rewards. None of these may raise."""
    from grpo import GRPOConfig, reward
    anything = Tool("f", "d", object_of(a={}), object_of(r={}))
    call = f'<think>t</think>\n<tool_call>\n{{"name": "f", "arguments": {{"a": {value}}}}}\n</tool_call>'
    actor = ToolActor(scripted(tokenizer, lambda context: '{"r": 1}'))
    trace = play(scripted(tokenizer, in_turn(call, say("1")), 1), tools=[anything], backend=actor.answer,
                 turn_tokens=20_000, trace_tokens=50_000)
    assert trace.status == "answered"
    assert 0 <= reward(trace, ["1"], GRPOConfig())["reward"] <= 1
    line = json.dumps(trace.record(), ensure_ascii=False, allow_nan=False).encode("utf-8")
    assert json.loads(line)["turns"][1]["answer"] == "1"
    story(trace).encode("utf-8")


# ---------------------------------------------------------------------------------------- validation


def a_tool(**changes):
    """A valid tool with some parts changed. A change to ... removes the part."""
    tool = {"name": "f", "description": "d", "parameters": object_of(a=TEXT),
            "returns": object_of(b={"type": "integer"})}
    return {k: v for k, v in (tool | changes).items() if v is not ...}


def nested(depth):
    """The schema of an object with `depth` arrays inside each other."""
    inner = TEXT
    for _ in range(depth):
        inner = {"type": "array", "items": inner}
    return object_of(a=inner)


PARTS_RULE = "name, description, parameters, returns"
RULES = [  # tools, what the message must say
    ([], "no tools"), ([a_tool(name=f"f{i}") for i in range(9)], "8 tools"), (["f"], PARTS_RULE),
    ([None], PARTS_RULE), ([[]], PARTS_RULE), ([{}], PARTS_RULE), ([a_tool(strict=True)], PARTS_RULE),
    *(([a_tool(**{part: ...})], PARTS_RULE) for part in ("name", "description", "parameters", "returns")),
    *(([a_tool(name=name)], "name") for name in ("", "a b", "é", "f\n", "f.g", "x" * 65, 3, None, ["f"])),
    ([a_tool(), a_tool()], "taken"), *(([a_tool(name=name)], "taken") for name in agents.UTILITIES),
    *(([a_tool(description=d)], "description") for d in ("", " \n", "x" * 1025, None, 3)),
]
SCHEMA_RULES = [  # schema, what the message must say
    *((schema, "object") for schema in (None, [], "object", True, {}, {"properties": {}})),
    *(({"type": kind, "properties": {}}, "object") for kind in ("array", ["object"], "Object", None)),
    *(({"type": "object", "properties": wrong}, "properties") for wrong in ([], None, ["a"])),
    ({"type": "object"}, "properties"),
    *((object_of(wrong, a=TEXT), "required") for wrong in (["b"], ["a", "b"], "a", {"a": 1}, [1], [["a"]])),
    (object_of(a={"$ref": "https://example.com/x"}), "ref"), (object_of(a={"items": {"$ref": "#"}}), "ref"),
    ({**object_of(), "$ref": "#/$defs/x"}, "ref"), (object_of(a={"anyOf": [TEXT, {"$ref": "#"}]}), "ref"),
    (object_of(a={"$dynamicRef": "#x"}), "ynamicRef"),
    (object_of(a={"type": "string", "pattern": "(a+)+$"}), "pattern"),
    ({**object_of(), "dependentSchemas": {"properties": {"pattern": "(a+)+$"}}}, "dependentSchemas"),
    ({**object_of(), "patternProperties": {"(a+)+$": {}}}, "pattern"), (nested(30), "deep"),
    (object_of(a={"type": "text"}), "type"), (object_of(a={"type": 3}), "type|schema"),
    (object_of(a=3), "schema|type"), (object_of(a={"minimum": "1"}), "schema|type"),
    (object_of(a={"enum": "x"}), "schema|type"), (object_of(a={"required": True}), "schema|type"),
    (object_of(["a", "a"], a=TEXT), "schema|required"), (object_of(a={"items": [TEXT]}), "schema|type"),
    (object_of(a={"minLength": -1}), "schema"),
]


@pytest.mark.parametrize("tools, message", RULES)
def test_check_tools_refuses_each_broken_rule_by_name(tools, message):
    with pytest.raises(Rejected, match=message):
        check_tools(tools)


@pytest.mark.parametrize("part", ["parameters", "returns"])
@pytest.mark.parametrize("schema, message", SCHEMA_RULES)
def test_both_schemas_are_refused_by_the_rule_they_break(schema, message, part):
    with pytest.raises(Rejected, match=message):
        check_tools([a_tool(**{part: schema})])


@pytest.mark.parametrize("tool", [
    a_tool(), a_tool(name="x" * 64), a_tool(name="A-b_9"), a_tool(description="x" * 1024),
    a_tool(description="é <&"), a_tool(parameters=object_of()),
    a_tool(parameters={"type": "object", "properties": {"a": TEXT}}), a_tool(parameters=nested(4)),
    a_tool(parameters=object_of(a={"enum": ["x", "y"]})),
    a_tool(parameters={**object_of(a={"type": ["number", "null"]}), "additionalProperties": False}),
    a_tool(parameters=object_of(a={"anyOf": [TEXT, {"type": "array", "items": TEXT}]})),
], ids=range(11))
def test_check_tools_keeps_a_tool_as_it_was_written(tool):
    made, = check_tools([tool])
    assert json.loads(made.definition) == tool and made.run is None
    function = {part: tool[part] for part in ("name", "description", "parameters")}
    assert made.schema == {"type": "function", "function": function}


def test_check_tools_takes_eight():
    names = [f"f{i}" for i in range(8)]
    assert [tool.name for tool in check_tools([a_tool(name=name) for name in names])] == names


@pytest.mark.parametrize("name", ["pattern", "$ref", "patternProperties"])
def test_a_property_may_have_the_name_of_a_forbidden_keyword(name):
    """For example, a tool that searches for a pattern has a parameter "pattern" but no regular expression."""
    check_tools([a_tool(parameters=object_of(**{name: TEXT}))])


@pytest.mark.parametrize("schema", [True, {}, {"enum": ["1"]}, {"multipleOf": 0.01}, {"$id": "http://["},
                                    {"format": "regex"}, {"uniqueItems": True}, {"minimum": 1}], ids=str)
def test_a_tool_that_is_accepted_never_breaks_an_episode(schema, tokenizer):
    """No arguments may raise an exception with a tool that check_tools accepts, neither in the episode nor in the
    reward."""
    from grpo import GRPOConfig, reward
    try:
        tools = check_tools([a_tool(parameters=object_of(a=schema))])
    except Rejected:
        return
    for value in ("1", "1" + "0" * 400, '"("', '{"a": [1, {}, "1"]}', "[]", "true", "null"):
        call = f'<think>t</think>\n<tool_call>\n{{"name": "f", "arguments": {{"a": {value}}}}}\n</tool_call>'
        trace = play(scripted(tokenizer, in_turn(call, say("x"))), tools=tools, turn_tokens=2000)
        assert trace.status == "answered" and 0 <= reward(trace, ["x"], GRPOConfig())["reward"] <= 1


@pytest.mark.parametrize("depth, accepted", [(9, True), (10, False)])
def test_the_deepest_schema_is_nested_twelve_levels(depth, accepted):
    """The schema itself is level 0, each property is level 2, each array adds a level, and "string" adds the last."""
    if accepted:
        check_schema(nested(depth))
    else:
        with pytest.raises(Rejected, match="schema too deep"):
            check_schema(nested(depth))


def test_the_properties_of_an_object_schema_are_all_required():
    assert object_schema(a=TEXT, b={}) == {"type": "object", "properties": {"a": TEXT, "b": {}}, "required": ["a", "b"]}


@pytest.mark.parametrize("most", [1, 3])
def test_strict_json_counts_objects_and_lists(most):
    text = "[" * (most - 1) + '{"a": 1}' + "]" * (most - 1)
    assert strict_json(text, most) == json.loads(text)
    with pytest.raises(Rejected, match="too deep"):
        strict_json("[" * most + "{}" + "]" * most, most)


def test_strict_json_counts_no_bracket_inside_a_string():
    value = {"code": "x = {'a': [1]}; \\\"[" * 100, "b": [{}]}
    assert strict_json(json.dumps(value), most=3) == value
    with pytest.raises(Rejected, match="too deep"):
        strict_json(json.dumps(value), most=2)
    for text in ("[" * 100_000, '{"a":' * 100_000, '"' + "[" * 300, '"\\"' * 100_000):
        with pytest.raises(Rejected):
            strict_json(text, most=10 ** 6)


def test_the_first_error_is_one_short_line():
    tool = Tool("f", "d", object_of(a={"type": "string", "maxLength": 3}, b={"multipleOf": 0.01}), object_of())
    assert first_error(tool.parameters, {"a": "xyz", "b": 1}) is None
    assert first_error(tool.parameters, {"a": 1, "b": 1}) == "1 is not of type 'string'"
    assert first_error(tool.parameters, {"a": "x" * 99, "b": 1}) == "a: breaks maxLength 3"
    assert first_error(tool.parameters, {"a": "x", "b": 10 ** 400}) == "arguments out of range"


def maker_text(*lines, kind="composition"):
    return "\n".join(["<think>t</think>", f"<kind>{kind}</kind>", "<tools>", *lines, "</tools>"])


def line(**changes):
    return json.dumps(a_tool(**changes), ensure_ascii=False)


def test_parse_tools_reads_kind_and_tools():
    thought, kind, tools = parse_tools("\n" + maker_text(line(), "", " " + line(name="g", description="</tools>"),
                                                         kind=" comparison ") + "\n")
    assert (thought, kind) == ("t", "comparison")
    assert [(t.name, t.description) for t in tools] == [("f", "d"), ("g", "</tools>")]


@pytest.mark.parametrize("text, message", [
    ("", "kind"), ("hello", "kind"), (line(), "kind"), (maker_text(line()).replace("</tools>", ""), "tools"),
    (maker_text(line()).replace("<kind>", "<kin>"), "tools"), (maker_text(line()).replace("</think>", ""), "tools"),
    (maker_text(line(), kind="poem"), "kind"), (maker_text(line(), kind=""), "kind"),
    (maker_text(), "no tools"), (maker_text("{"), "JSON"), (maker_text("f"), "no tools"),
    (maker_text("[{}]"), PARTS_RULE), (maker_text(line().replace('"d"', '"d", "name": "g"')), "repeated"),
    (maker_text(line(parameters={"type": "object", "minimum": 0}).replace("0}", "NaN}")), "NaN"),
    (maker_text('{"a":' * 100_000), "too deep"), (maker_text(line()[:-1]), "JSON"),
], ids=range(16))
def test_parse_tools_names_what_is_wrong(text, message):
    with pytest.raises(Rejected, match=message):
        parse_tools(text)


@pytest.mark.parametrize("description", ["plain", "é “x”", "a\u2028b", "a\u0085b", 'a "b" \\ \n'])
def test_a_definition_reads_back_from_one_line(description):
    """Unicode has line separators that JSON does not escape."""
    tool, = check_tools([a_tool(description=description)])
    _, _, (again,) = parse_tools(maker_text(tool.definition))
    assert json.loads(again.definition) == a_tool(description=description)


# ------------------------------------------------------------------------------------- utility tools


def utility(name, *arguments, **named):
    return agents.UTILITIES[name].run(*arguments, **named)


@pytest.mark.parametrize("name, arguments, result", [
    ("calculator", {"expression": "2 * (3 + 4) - -1"}, {"result": 15}),
    ("calculator", {"expression": " 7 // 2 % 2 "}, {"result": 1}),
    ("calculator", {"expression": "1 / 4 + 1.5e1"}, {"result": 15.25}),
    ("calculator", {"expression": "999999999999999 * 999999999999999"},
     {"result": 999999999999998000000000000001}),
    ("compare", {"names": ["A", "B", "C"], "values": [3, 1.5, 2], "pick": "smallest"}, {"result": "B"}),
    ("compare", {"names": ["A", "B", "C"], "values": [3, 1.5, 2], "pick": "largest"}, {"result": "A"}),
    ("compare", {"names": ["A", "B", "C"], "values": [2, 2, 1], "pick": "smallest"}, {"result": "C"}),
    ("compare", {"names": ["A", "B"], "values": ["1999-12-31", "2000-01-01"], "pick": "largest"},
     {"result": "B"}),
    ("compare", {"names": ["A", "B"], "values": ["0999-12-31", "1000-01-01"], "pick": "smallest"},
     {"result": "A"}),
    ("compare", {"names": ["A"], "values": [-1], "pick": "largest"}, {"result": "A"}),
    ("compare", {"names": ["A", "B", "C"], "values": ["9", "10.5", 10], "pick": "largest"}, {"result": "B"}),
    ("date_difference", {"start": "2000-02-28", "end": "2000-03-01"}, {"days": 2}),
    ("date_difference", {"start": "1900-03-01", "end": "1900-02-28"}, {"days": -1}),
    ("date_difference", {"start": "0001-01-01", "end": "9999-12-31"}, {"days": 3652058}),
    ("count", {"items": []}, {"result": 0}), ("count", {"items": ["a", "b", "a", "A"]}, {"result": 3}),
    ("count", {"items": [[1], [1], {"a": 1, "b": 2}, {"b": 2, "a": 1}, None]}, {"result": 3}),
])
def test_utility_tools_compute(name, arguments, result):
    tool = agents.UTILITIES[name]
    assert tool.run(**arguments) == result
    assert first_error(tool.parameters, arguments) is None and first_error(tool.returns, result) is None


@pytest.mark.parametrize("name, arguments", [
    ("compare", {"names": ["A", "B"], "values": [1, 1.0], "pick": "smallest"}),
    ("compare", {"names": ["A", "B"], "values": ["2000-01-01", "2000-01-01"], "pick": "largest"}),
    ("compare", {"names": ["A", "B"], "values": [1], "pick": "largest"}),
    ("compare", {"names": ["A"], "values": [1, 2], "pick": "largest"}),
    ("compare", {"names": [], "values": [], "pick": "largest"}),
    ("compare", {"names": ["A", "B"], "values": [1, "2000-01-01"], "pick": "largest"}),
    ("compare", {"names": ["A", "B"], "values": ["one", "two"], "pick": "largest"}),
    ("compare", {"names": ["A", "B"], "values": ["nan", "1"], "pick": "largest"}),
    ("compare", {"names": ["A", "B"], "values": ["2000-02-30", "2000-01-01"], "pick": "largest"}),
    ("date_difference", {"start": "2001-02-29", "end": "2001-03-01"}),
    ("date_difference", {"start": "yesterday", "end": ""}),
    ("date_difference", {"start": "10000-01-01", "end": "\ud800"}),
])
def test_utility_tools_give_an_error_for_bad_values(name, arguments):
    assert first_error(agents.UTILITIES[name].parameters, arguments) is None
    assert list(utility(name, **arguments)) == ["error"]


def test_guarded_turns_a_value_into_an_object_and_an_exception_into_an_error():
    def fail(size):
        raise KeyError("x" * size)
    assert guarded(lambda a, b=0: {"é": [a, b]})(1, b=2) == {"é": [1, 2]}
    assert guarded(lambda: [1])() == {"result": [1]} and guarded(lambda: None)() == {"result": None}
    assert guarded(lambda: ("a", 1))() == {"result": ["a", 1]}  # as JSON gives it back
    assert guarded(fail)(3) == {"error": "KeyError: 'xxx'"}
    assert guarded(fail)(500) == {"error": "KeyError: '" + "x" * 189}
    assert guarded(lambda: float("nan"))() == {"error": "Rejected: NaN is not JSON"}
    assert list(guarded(lambda: 1)(2)) == ["error"] == list(guarded(lambda: "\ud800")())


HOSTILE = ["", " ", "a", "__import__('os')", "().__class__", "(1).real", "f(1)", "print(1)", "lambda: 1",
           "[1][0]", "{}", "'a' * 9", "9 ** 9 ** 9", "2 ** 9", "1 << 9", "~1", "1 < 2", "1 and 2", "not 1",
           "1 if 1 else 2", "x := 1", "True", "None", "1j", "...", "b'1'", "f'{1}'", "1;2", "1\n2",
           "import os", "1 / 0", "1 // 0", "1 % 0", "1 / 0.0", "1e400", "1e15", "9" * 30, "1" * 201,
           "+".join("1" * 101), "(" * 90 + "1" + ")" * 90 + " " * 30, "(" * 199, ")" * 9, "1 +", "1 1",
           "\x00", "\ud800", "１", "1e14*" * 30 + "1", "-" + "1e14*" * 30 + "1",
           "1e14*" * 25 + "1 - " + "1e14*" * 13 + "1", "await 1", "*1", "1,", "1 @ 1"]


@pytest.mark.parametrize("expression", HOSTILE, ids=lambda e: ascii(e)[:30])
def test_calculator_refuses(expression):
    """No text is evaluated as Python. The result is always JSON."""
    result = utility("calculator", expression)
    assert list(result) == ["error"] and json.dumps(result, allow_nan=False)


@pytest.mark.parametrize("seed", range(40))
def test_calculator_is_pythons_arithmetic(seed):
    rng = random.Random(seed)

    def expression(depth):
        if depth == 0 or rng.random() < 0.2:
            return rng.choice(["3", "17", "0.5", "2e3", "-4", "10"])
        sign = rng.choice(["+", "-", "*", "/", "//", "%"])
        return f"({expression(depth - 1)} {sign} {expression(depth - 1)})"
    text = expression(3)
    try:
        want = {"result": eval(text)}  # the test wrote this text
    except ZeroDivisionError:
        want = {"error": "no finite result"}
    assert utility("calculator", text) == want


# ------------------------------------------------------------------------------------- calls, results


def called(*calls, tools=(BIRTHPLACE, COUNTRY)):
    """A trace with these calls in its last turn."""
    return Trace(tools=list(tools), turns=[Turn(calls=list(calls))])


def nobody(name, arguments):
    """The function of a real backend that must not be called."""
    raise AssertionError(f"{name} was asked")


PICKY = Tool("picky", "d", {**object_of(["n"], n={"type": "integer"}, o={"enum": ["x"]}),
                            "additionalProperties": False}, object_of())


@pytest.mark.parametrize("call, says", [
    (Call("nothing", {}), "unknown tool"), (Call("", {}), "unknown tool"), (parse_call("{", []), "JSON"),
    (Call("birthplace", {}), "person"), (Call("birthplace", {"person": 3}), "3"),
    (Call("birthplace", {"person": None}), "None"), (Call("birthplace", {"city": "Velka"}), "person"),
    (Call("picky", {"n": True}), "True"), (Call("picky", {"n": "1"}), "1"),
    (Call("picky", {"n": 1.5}), "1.5"), (Call("picky", {"n": 1, "o": "y"}), "y"),
    (Call("picky", {"n": 1, "q": 1}), "q"),
    (Call("compare", {"names": ["A"], "values": [1], "pick": "best"}), "best"),
], ids=str)
def test_a_refused_call_gets_an_error_and_no_backend_is_called(call, says):
    trace = called(call, tools=[BIRTHPLACE, PICKY, agents.UTILITIES["compare"]])
    assert call.observation is None
    run_calls([trace], real(nobody))
    assert says in call.error and call.observation == {"error": call.error} and not call.succeeded


@pytest.mark.parametrize("call", [Call("birthplace", {"person": ""}), Call("picky", {"n": 1.0}),
                                  Call("picky", {"n": 1, "o": "x"}),
                                  Call("birthplace", {"person": "Bo", "extra": 1})], ids=str)
def test_a_call_that_fits_is_made(call):
    run_calls([called(call, tools=[BIRTHPLACE, PICKY])],
              real(lambda name, arguments: {"got": [name, arguments]}))
    assert call.error is None and call.observation == {"got": [call.name, call.arguments]} and call.succeeded


@pytest.mark.parametrize("observation, succeeded", [
    ({"r": "x"}, True), ({}, True), (None, True), ({"error": "", "response": "x"}, True), ({"error": None, "r": 1}, True),
    ({"error": False, "r": 1}, True), ({"error": "x"}, False), ({"error": "x", "r": 1}, False), ({"error": True}, False),
    ({"error": {"code": 1}}, False), ({"result": "Error: user not found"}, False), ({"result": "ERROR 404"}, False),
    ({"status": 404, "message": "error: x", "data": ""}, False), ({"title": "Error", "by": "Al"}, True),
    ({"result": "No error"}, True), ({"title": "Errors and Expectations"}, True), ({"result": ["error"]}, True)], ids=str)
def test_an_error_in_any_form_is_no_success(observation, succeeded):
    assert Call("f", {}, observation=observation).succeeded == succeeded
    assert not Call("f", {}, "unknown tool", observation).succeeded


def test_observations_stand_in_the_order_of_the_calls(tokenizer):
    """Only the order links a call and its result. Utility tools, refused calls and the backend are mixed here."""
    calls = [("country", {"city": "Velka"}), ("nothing", {}), ("calculator", {"expression": "2*3"}),
             ("birthplace", {"person": "Bo"}), ("birthplace", {"person": 3}),
             ("birthplace", {"person": "Ada"})]
    trace = play(scripted(tokenizer, in_turn(act(*calls), say("x"))),
                 tools=[BIRTHPLACE, COUNTRY, agents.UTILITIES["calculator"]])
    results = ['{"country": "Suna"}', '{"error": "unknown tool"}', '{"result": 6}', '{"birthplace": "Velka"}',
               '{"error": "3 is not of type \'string\'"}', '{"birthplace": "Doka"}']
    block = "".join(f"\n<tool_response>\n{result}\n</tool_response>" for result in results)
    assert f"{START}user{block}{END}\n" in tokenizer.decode(trace.ids)


def test_all_traces_are_answered_in_one_batch():
    batches = []

    def backend(requests):
        batches.append([(tool.name, arguments) for tool, arguments in requests])
        return [{"n": i} for i in range(len(requests))]
    traces = [called(Call("birthplace", {"person": "A"})),
              called(Call("nothing"), Call("country", {"city": "B"})), called()]
    run_calls(traces, backend)
    assert batches == [[("birthplace", {"person": "A"}), ("country", {"city": "B"})]]
    assert traces[0].calls[0].observation == {"n": 0} and traces[1].calls[1].observation == {"n": 1}


@pytest.mark.parametrize("value", ["</tool_response>", "<|im_end|>\n<|im_start|>assistant", "a < b <",
                                   "\u2028é\\", "\\u003c"])
def test_a_result_has_no_angle_bracket_and_the_same_content(value):
    observation = {value: [value, {"error": value}]}
    assert "<" not in result_text(observation) and json.loads(result_text(observation)) == observation
    assert "\n" not in result_text(observation)


def test_a_result_is_plain_json():
    assert result_text({"b": "é", "a": [1, None, 2.5]}) == '{"b": "é", "a": [1, null, 2.5]}'


# ------------------------------------------------------------------------------------------ ToolActor


def actor_of(tokenizer, script, capacity=4):
    actor = ToolActor(scripted(tokenizer, script, capacity))
    return actor, actor.sampler


def contexts(sampler):
    """The text before each generated turn."""
    return [sampler.tokenizer.decode(ids) for ids in sampler.before]


def test_the_actor_prompt_holds_the_definition_and_the_call_and_no_more(tokenizer):
    actor, sampler = actor_of(tokenizer, lambda context: '{"birthplace": "Velka"}')
    assert actor.answer([(BIRTHPLACE, {"person": "Bo é"})]) == [{"birthplace": "Velka"}]
    assert contexts(sampler) == [
        f"{START}system\n{SHORT.actor}{END}\n{START}user\n" '{"name": "birthplace", "description": '
        '"Where a person was born.", "parameters": {"type": "object", "properties": {"person": {"type": '
        '"string"}}, "required": ["person"]}, "returns": {"type": "object", "properties": {"birthplace": '
        '{"type": "string"}}, "required": ["birthplace"]}}'
        '\n{"person": "Bo é"}' f"{END}\n{START}assistant\n"]


def test_actor_simulates_each_distinct_call_once(tokenizer):
    actor, sampler = actor_of(tokenizer, lambda context: json.dumps({"r": context.split(END)[1][-9:]}))
    two = Tool("two", "d", object_of(a={}, b={}), object_of(r=TEXT))
    first = actor.answer([(two, {"a": 1, "b": 2}), (two, {"a": 2, "b": 1}), (two, {"b": 2, "a": 1}),
                          (two, {"a": 1, "b": 2})])
    assert len(sampler.before) == 2 and first[0] == first[2] == first[3] != first[1]
    assert actor.answer([(two, {"b": 1, "a": 2})]) == [first[1]] and len(sampler.before) == 2
    assert (actor.asked, actor.remembered) == (5, 3)
    actor.answer([(two, {"a": 1, "b": "2"}), (Tool("two", "e", two.parameters, two.returns),
                                              {"a": 1, "b": 2})])
    assert len(sampler.before) == 4  # other arguments or another definition make another call


def test_actor_answers_in_order_beyond_its_capacity(tokenizer):
    def echo(context):
        return json.dumps({"birthplace": context.split('{"person": "')[1][:2]})
    actor, sampler = actor_of(tokenizer, echo, 3)
    people = [f"P{i}" for i in range(8)]
    assert actor.answer([(BIRTHPLACE, {"person": p}) for p in people]) == [{"birthplace": p} for p in people]
    assert sampler.opened == [3, 3, 2]
    assert actor.answer([]) == [] and sampler.opened == [3, 3, 2]


BAD_RESULTS = ["", "Velka", "{", "[]", "null", '"Velka"', "{}", '{"birthplace": 3}', '{"birthplace": NaN}',
               '{"error": 3}',
               '{"birthplace": "a", "birthplace": "b"}', '{"city": "Velka"}', '{"birthplace": "Velka"} {"x": 1}',
               '{"error": "x", "y": 1}']


@pytest.mark.parametrize("bad", BAD_RESULTS)
def test_actor_tries_again_after_what_does_not_fit(bad, tokenizer):
    replies = iter([bad, bad, '{"birthplace": "Velka"}'])
    actor, sampler = actor_of(tokenizer, lambda context: next(replies))
    assert actor.answer([(BIRTHPLACE, {"person": "Bo"})]) == [{"birthplace": "Velka"}]
    assert sampler.temperatures == [0.0, 1.0, 1.0]
    assert len(set(contexts(sampler))) == 1


def test_actor_gives_up_with_an_error_and_remembers_it(tokenizer):
    actor, sampler = actor_of(tokenizer, lambda context: "{" if "Bo" in context else '{"birthplace": "Doka"}')
    for _ in range(2):
        bo, ada = actor.answer([(BIRTHPLACE, {"person": "Bo"}), (BIRTHPLACE, {"person": "Ada"})])
        assert bo == {"error": "the tool gave no valid result"} and ada == {"birthplace": "Doka"}
    assert len(sampler.before) == ToolActor.TRIES + 1 == 4


def test_actor_draws_other_numbers_on_another_try(tokenizer):
    rows = []
    actor, sampler = actor_of(tokenizer, lambda context: "{")
    sample = sampler.sample
    sampler.sample = lambda *arguments: rows.append(arguments[2].copy()) or sample(*arguments)
    actor.answer([(BIRTHPLACE, {"person": "Bo"})])
    assert not np.array_equal(rows[1], rows[2])


def test_actor_may_answer_with_an_error(tokenizer):
    actor, sampler = actor_of(tokenizer, lambda context: '{"error": "no such person"}')
    assert actor.answer([(BIRTHPLACE, {"person": "X"})]) == [{"error": "no such person"}]
    assert len(sampler.before) == 1


def test_actor_may_answer_with_an_empty_object_where_the_schema_lets_it(tokenizer):
    quiet = Tool("quiet", "d", object_of(), object_of([], r=TEXT))
    actor, _ = actor_of(tokenizer, lambda context: "{}")
    assert actor.answer([(quiet, {})]) == [{}]


def test_actor_cannot_answer_without_an_end(tokenizer):
    endless = tokenizer.full.encode('{"birthplace": "Velka"}').ids
    for tail in ([], [tokenizer.control["<|endoftext|>"]], endless * 40 + [tokenizer.end]):
        actor, _ = actor_of(tokenizer, lambda context, tail=tail: endless + tail)
        assert actor.answer([(BIRTHPLACE, {"person": "Bo"})]) == [ToolActor.NO_RESULT]


def test_the_memo_drops_its_oldest_entries(tokenizer, monkeypatch):
    monkeypatch.setattr(ToolActor, "MEMORY", 2)
    actor, sampler = actor_of(tokenizer, lambda context: '{"birthplace": "Velka"}')
    assert len(actor.answer([(BIRTHPLACE, {"person": p}) for p in "abcd"])) == 4 and len(actor.memo) == 2
    actor.answer([(BIRTHPLACE, {"person": "d"})])
    assert len(sampler.before) == 4
    actor.answer([(BIRTHPLACE, {"person": "a"})])
    assert len(sampler.before) == 5 and len(actor.memo) == 2


def test_no_word_of_question_thought_or_answer_reaches_the_actor(tokenizer):
    """In a whole episode, the actor's prompt has no word of the question, the thought or the gold answer."""
    actor, sampler = actor_of(tokenizer, lambda context: '{"birthplace": "Velka"}')
    policy = scripted(tokenizer, in_turn(act(("birthplace", {"person": "Bo"}), thought="THOUGHT"),
                                         say("GOLD")))
    trace = play(policy, question="QUESTION", backend=actor.answer)
    assert trace.answer == "GOLD" and len(sampler.before) == 1
    assert not any(word in contexts(sampler)[0] for word in ("QUESTION", "GOLD", "THOUGHT"))
    assert "Bo" in contexts(sampler)[0]


# ------------------------------------------------------------------------------------------ replies


def test_replies_stand_in_the_order_of_the_prompts(tokenizer):
    """A prompt that leaves no space for the limit gets "", and so does a reply that the limit cuts off."""
    def script(context):
        return context.split(END)[0][-1] * (60 if "cut" in context else 1)
    prompts = [chat_turn("user", text + letter) for text, letter in [("", "a"), ("x " * 90, "b"), ("cut", "c"), ("", "d"), ("", "e")]]
    sampler = scripted(tokenizer, script, 2)
    lengths = [len(tokenizer.encode(prompt)) for prompt in prompts]
    limit, longest = 20, max(lengths[0], lengths[2])
    assert lengths[0] == lengths[3] == lengths[4] and longest < lengths[1]
    keys = [("key", i) for i in range(5)]
    for slots, long in ((lengths[1] + limit, "b"), (lengths[1] + limit - 1, ""), (longest + limit, "")):
        sampler.slots, sampler.opened = slots, []
        assert generate_replies(sampler, prompts, limit, 0.5, keys) == ["a", long, "", "d", "e"]
        assert sampler.opened == ([2, 2, 1] if long else [2, 2]) and set(sampler.temperatures) == {0.5}
    sampler.slots = longest + limit - 1
    assert generate_replies(sampler, prompts[2:3], limit, 0.0, keys[:1]) == [""] and sampler.opened == [2, 2]
    assert generate_replies(sampler, [], limit, 0.0, []) == []


# ------------------------------------------------------------------------------------------ ToolMaker


def test_the_maker_prompt_names_why_the_last_try_was_rejected(tokenizer):
    replies = iter([maker_text("{"), maker_text(line(name="calculator")),
                    maker_text(line(), kind="inference")])
    sampler = scripted(tokenizer, lambda context: next(replies))
    box, = ToolMaker(sampler).make(["Who?"])
    assert (box.kind, [t.name for t in box.made], box.tries) == ("inference", ["f"], 3)
    assert (box.thought, box.rejected) == ("t", "tool name taken")
    asked = [context.split(f"{START}user\n")[1] for context in contexts(sampler)]
    assert asked == [f"Who?{END}\n{START}assistant\n", f"Who?\nRejected: not JSON{END}\n{START}assistant\n",
                     f"Who?\nRejected: tool name taken{END}\n{START}assistant\n"]
    assert sampler.temperatures == [0.0, 1.0, 1.0]


def test_maker_falls_back_after_three_tries(tokenizer):
    good = maker_text(line(), kind="comparison")
    sampler = scripted(tokenizer, lambda context: "I can't." if "BAD" in context else good)
    boxes = ToolMaker(sampler).make(["BAD 1", "good", "BAD 2"])
    assert [(b.kind, [t.name for t in b.tools], b.tries) for b in boxes] == [
        ("composition", ["lookup"], 0), ("comparison", ["f", "compare"], 1), ("composition", ["lookup"], 0)]
    assert sampler.opened == [3, 2, 2]


def test_the_fallback_passes_the_rules():
    made, = check_tools([json.loads(agents.FALLBACK.definition)])
    assert made.name == "lookup"


@pytest.mark.parametrize("kind, utilities", [("composition", []), ("inference", []),
                                             ("comparison", ["compare"]),
                                             ("arithmetic", ["calculator", "date_difference", "count"])])
def test_a_toolbox_adds_the_utilities_of_its_kind(kind, utilities):
    tools = Toolbox(kind, [BIRTHPLACE, COUNTRY], 1).tools
    assert [t.name for t in tools] == ["birthplace", "country", *utilities]
    assert all(t.run for t in tools[2:])
    assert set(agents.KINDS) == {"composition", "inference", "comparison", "arithmetic"}


@pytest.mark.parametrize("slots", [40, 120])
def test_a_prompt_too_long_for_the_sampler_is_no_exception(slots, tokenizer, tiny):
    """A long schema gives an error observation. A long question gives the fallback or a one-line InputError."""
    sampler = Sampler(tiny(tokenizer.size), tokenizer, 2, slots)
    long = Tool("long", "x " * 140, object_of(a=TEXT), object_of(b=TEXT))
    assert list(ToolActor(sampler).answer([(long, {"a": "x"})])[0]) == ["error"]
    try:
        assert ToolMaker(sampler).make(["Why? " * 200])[0].made == [agents.FALLBACK]
    except InputError as error:
        assert "question" in str(error)


# ------------------------------------------------------------------------------------------- episodes

DOUBLE = act(("birthplace", {"person": "Bo"}), ("birthplace", {"person": "Ada"}))
BO, THEN = act(("birthplace", {"person": "Bo"})), act(("country", {"city": "Velka"}), thought="And now?")
RESULT = "\n<tool_response>\n{}\n</tool_response>"
EPISODES = {  # the turns of the agent, the observations between them
    "no call": ([say("x")], []),
    "one call": ([BO, say("Velka")], [RESULT.format('{"birthplace": "Velka"}')]),
    "two calls": ([DOUBLE, say("Velka")],
                  [RESULT.format('{"birthplace": "Velka"}') + RESULT.format('{"birthplace": "Doka"}')]),
    "two turns": ([BO, THEN, say("Suna")], [RESULT.format('{"birthplace": "Velka"}'),
                                            RESULT.format('{"country": "Suna"}')]),
    "error result": ([act(("birthplace", {"person": "X"})), say("")],
                     [RESULT.format('{"error": "no birthplace found"}')]),
    "refused call": ([act(("nothing", {})), say("é\n“x”")], [RESULT.format('{"error": "unknown tool"}')]),
    "unreadable call": (["<think>t</think>\n<tool_call>\n{\n</tool_call>", say("x")],
                        [RESULT.format('{"error": "not JSON"}')]),
}


def opening(question="Where was Bo born?", tools=(BIRTHPLACE, COUNTRY)):
    lines = "".join("\n" + json.dumps(tool.schema, ensure_ascii=False) for tool in tools)
    head = f"{START}system\n{SHORT.agent}{HEAD}{lines}{TAIL}"
    return f"{head}{START}user\n{question}{END}\n{START}assistant\n"


def whole(said, heard):
    """The text of a whole episode."""
    text = opening()
    for turn_text, results in zip(said, [*heard, None], strict=True):
        text += turn_text + END
        text += "" if results is None else f"\n{START}user{results}{END}\n{START}assistant\n"
    return text


@pytest.mark.parametrize("name", EPISODES)
def test_ids_that_grew_are_the_ids_of_the_whole(name, tokenizer):
    """No newline and no header is missing between turns."""
    said, heard = EPISODES[name]
    sampler = scripted(tokenizer, in_turn(*said))
    trace = play(sampler)
    assert trace.ids == tokenizer.full.encode(whole(said, heard)).ids and trace.status == "answered"
    assert sampler.heard == [trace.ids]  # the sampler's ids are the ids that the trainer scores
    header = tokenizer.full.encode(f"{START}assistant\n").ids
    assert len(sampler.before) == len(said) and all(ids[-len(header):] == header for ids in sampler.before)


def segments(trace, tokenizer, value):
    """The text of each run of tokens where the mask has this value."""
    made, before = [], None
    for i, m in zip(trace.ids, trace.mask, strict=True):
        if m == value:
            made = made if before == value else [*made, []]
            made[-1].append(i)
        before = m
    return [tokenizer.decode(ids) for ids in made]


@pytest.mark.parametrize("name", EPISODES)
def test_the_mask_is_1_on_generated_turns_and_their_end(name, tokenizer):
    """The mask is 1 on content and <|im_end|>, and 0 on headers, newlines and observations."""
    said, heard = EPISODES[name]
    trace = play(scripted(tokenizer, in_turn(*said)))
    assert len(trace.ids) == len(trace.mask) == len(trace.logprobs)
    assert segments(trace, tokenizer, 1) == [text + END for text in said]
    between = [f"\n{START}user{results}{END}\n{START}assistant\n" for results in heard]
    assert segments(trace, tokenizer, 0) == [opening(), *between]
    expected = []
    for m in trace.mask:  # the script gives -0.5, -1.5 and so on in each turn
        expected.append((expected[-1] - 1 if expected[-1] else -0.5) if m else 0.0)
    assert trace.logprobs == expected


def test_a_split_that_no_encoder_makes_is_kept(tokenizer):
    """Sampled ids are never decoded and encoded again."""
    thought, call = BO[:BO.index("<tool_call>")], BO[BO.index("<tool_call>"):]
    ids = [i for letter in thought for i in tokenizer.full.encode(letter).ids]
    ids += tokenizer.full.encode(call + END).ids
    assert tokenizer.decode(ids) == BO + END and ids != tokenizer.full.encode(BO + END).ids
    trace = play(scripted(tokenizer, in_turn(ids, ids, ids, say("x"))))
    positions = [i for i, m in enumerate(trace.mask) if m]
    assert [trace.ids[i] for i in positions][:3 * len(ids)] == ids * 3
    assert trace.status == "answered"
    assert [call.observation for call in trace.calls] == [{"birthplace": "Velka"}] * 3


def check_truncation(trace, budget, tokenizer):
    """The trace is cut off in a generated turn only, and it is within its budget."""
    assert trace.status == "truncated" and trace.answer is None
    assert len(trace.ids) == len(trace.mask) == len(trace.logprobs) <= budget
    heard = "".join(segments(trace, tokenizer, 0))
    assert heard.count("<tool_response>") == heard.count("</tool_response>")
    assert heard.endswith(f"{START}assistant\n")
    ended = trace.ids[-1] == tokenizer.end
    assert trace.mask[-1] == 1 and trace.turns[-1].error is None and (trace.turns[-1] != Turn()) == ended


@pytest.mark.parametrize("name", ["two calls", "two turns", "refused call"])
def test_every_trace_budget(name, tokenizer):
    """Every budget from one token after the prompt to the whole trace."""
    said, heard = EPISODES[name]
    prompt, full = (len(tokenizer.full.encode(text).ids) for text in (opening(), whole(said, heard)))
    for budget in range(prompt + 1, full):
        check_truncation(play(scripted(tokenizer, in_turn(*said)), trace_tokens=budget), budget, tokenizer)
    assert play(scripted(tokenizer, in_turn(*said)), trace_tokens=full).status == "answered"


def test_every_turn_budget(tokenizer):
    said, heard = EPISODES["two turns"]
    longest = max(len(tokenizer.full.encode(text + END).ids) for text in said)
    for budget in range(1, longest):
        check_truncation(play(scripted(tokenizer, in_turn(*said)), turn_tokens=budget), 4000, tokenizer)
    assert play(scripted(tokenizer, in_turn(*said)), turn_tokens=longest).status == "answered"


@pytest.mark.parametrize("budget", [1, 20, "prompt - 1", "prompt"])
def test_a_prompt_that_fills_the_budget_is_truncated_not_an_exception(budget, tokenizer):
    """A long question or many tools can leave no token for the first turn."""
    prompt = len(tokenizer.full.encode(opening()).ids)
    budget = {"prompt - 1": prompt - 1, "prompt": prompt}.get(budget, budget)
    trace = play(scripted(tokenizer, in_turn(BO, say("x"))), trace_tokens=budget)
    assert trace.status == "truncated" and sum(trace.mask) == 0


def test_one_long_prompt_does_not_stop_the_others(tokenizer):
    said, _ = EPISODES["one call"]
    traces = [Trace("Where was Bo born?", [BIRTHPLACE]), Trace("Why? " * 400, [BIRTHPLACE])]
    run_episodes(AutoAgent(scripted(tokenizer, in_turn(*said)), 8, 400, 600), real(world), traces)
    assert [t.status for t in traces] == ["answered", "truncated"]


@pytest.mark.parametrize("most", [1, 2, 5])
def test_max_turns(most, tokenizer):
    sampler = scripted(tokenizer, lambda context: BO)
    trace = play(sampler, max_turns=most)
    assert trace.status == "truncated" and len(trace.turns) == most == len(sampler.before)
    assert trace.ids[-1] == tokenizer.end and trace.mask[-1] == 1 and trace.answer is None
    answers_last = scripted(tokenizer, in_turn(*[BO] * (most - 1), say("x")))
    assert play(answers_last, max_turns=most).status == "answered"


def test_a_turn_that_ends_on_endoftext_is_malformed(tokenizer):
    """The trace ends there. The id is kept with mask 1. No call is run."""
    stop = tokenizer.control["<|endoftext|>"]
    for text in (BO, say("x"), ""):
        ids = [*tokenizer.full.encode(text).ids, stop]
        trace = play(scripted(tokenizer, in_turn(ids)), backend=real(nobody))
        assert trace.status == "malformed" and trace.ids[-1] == stop and trace.mask[-1] == 1
        assert trace.turns[-1].error and trace.answer is None and trace.calls == []


@pytest.mark.parametrize("text", ["", "hello", say("x") + say("y"), "<think>Done.</think>\nVelka",
                                  "<think>t</think>\n<tool_response>\n{}\n</tool_response>"])
def test_a_malformed_turn_ends_the_trace(text, tokenizer):
    trace = play(scripted(tokenizer, in_turn(text)), backend=real(nobody))
    assert trace.status == "malformed" and len(trace.turns) == 1 and trace.ids[-1] == tokenizer.end


def test_the_closed_book_prefix_is_masked(tokenizer):
    prefix = "<think>I guess.</think>\n<answer>"
    sampler = scripted(tokenizer, lambda context: " Velka</answer>")
    trace = play(sampler, closed_book=True)
    assert trace.answer == "Velka" and trace.status == "answered" and trace.turns[0].thought == "I guess."
    assert segments(trace, tokenizer, 0) == [opening() + prefix]
    assert segments(trace, tokenizer, 1) == [" Velka</answer>" + END]
    assert play(scripted(tokenizer, in_turn("Velka")), closed_book=True).answer == "Velka"
    for reply in (BO, "</answer>" + BO, f"x</answer>\n{call_text('birthplace', {'person': 'Bo'})}"):
        trace = play(scripted(tokenizer, in_turn(reply)), closed_book=True, backend=real(nobody))
        assert trace.status == "malformed" and "closed book" in trace.turns[0].error and not trace.calls


@pytest.mark.parametrize("said, tools, status", [
    (["It is Velka."], [BIRTHPLACE], "malformed"), (["It is Velka."], [], "answered"),
    ([BO, "It is Velka."], [BIRTHPLACE], "answered"), ([BO, BO, "It is Velka. <answer>"], [BIRTHPLACE], "malformed"),
    (["<tool_call>{</tool_call>", "<think>t</think>It is Velka."], [BIRTHPLACE], "answered")])
def test_text_without_a_tag_is_the_answer_after_a_call_and_without_tools(said, tools, status, tokenizer):
    trace = play(scripted(tokenizer, in_turn(*said)), tools=tools)
    assert trace.status == status and len(trace.turns) == len(said)
    assert trace.answer == ("It is Velka." if status == "answered" else None)


def test_traces_do_not_mix(tokenizer):
    """Traces of different lengths run in parallel and in groups. Each is the same as when it runs alone. The prompt of
    a group is opened once."""
    scripts = {"Q0": [say("x")], "Q1": [BO, say("Velka")], "Q2": [BO, THEN, say("Suna")], "Q3": ["oops"]}

    def script(context):
        return in_turn(*scripts[next(q for q in scripts if q in context)])(context)
    traces = [Trace(q, [BIRTHPLACE, COUNTRY], (q, i)) for q in scripts for i in range(2)]
    sampler = scripted(tokenizer, script)
    run_episodes(AutoAgent(sampler, 8, 400, 4000), real(world), traces, group=2)
    for i, trace in enumerate(traces):
        alone = play(scripted(tokenizer, script), trace.question)
        assert (trace.ids, trace.mask) == (alone.ids, alone.mask)
        assert (trace.status, trace.turns) == (alone.status, alone.turns)
        assert sampler.heard[i] == trace.ids
    assert sampler.opened == [4] and [t.status for t in traces[::2]] == ["answered"] * 3 + ["malformed"]


def test_the_watcher_is_called_after_each_half_of_the_loop(tokenizer):
    """After acting the calls have no observation yet. After observing they have, and the prompt of the next turn is
    there, unless the trace has ended."""
    seen = []

    def watch(trace):
        header = tokenizer.decode(trace.ids).endswith(f"{END}\n{START}assistant\n")
        seen.append((len(trace.turns), [call.observation for call in trace.calls], header, trace.status))
    first, second = {"birthplace": "Velka"}, {"country": "Suna"}
    play(scripted(tokenizer, in_turn(BO, THEN, say("Suna"))), watch=watch)
    assert seen == [(1, [None], False, "open"), (1, [first], True, "open"),
                    (2, [first, None], False, "open"), (2, [first, second], True, "open"),
                    (3, [first, second], False, "answered"), (3, [first, second], False, "answered")]
    seen.clear()
    play(scripted(tokenizer, in_turn(BO, THEN)), max_turns=2, watch=watch)
    assert seen[2:] == [(2, [first, None], False, "open"), (2, [first, second], False, "truncated")]
    seen.clear()
    play(scripted(tokenizer, in_turn("oops")), watch=watch)
    assert seen == [(1, [], False, "malformed")] * 2


@pytest.mark.parametrize("temperature", [0.6, 1.0])
def test_a_trace_is_the_same_whatever_batch_it_ran_in(tokenizer, tiny, monkeypatch, temperature):
    """The real sampler in float64 on random weights. <|im_end|> is made likely, so there are up to three turns of
    different lengths, each with one to three results. The traces run in groups, alone, in reverse order and beside
    others. The trainer computes the same log-probabilities."""
    model = tiny(vocab=tokenizer.size)
    boost = 7.5 * (torch.arange(tokenizer.size) == tokenizer.end)
    monkeypatch.setattr(model, "head", lambda states, head=model.head: head(states) + boost)
    monkeypatch.setattr(agents, "parse_turn", lambda text, plain: Turn("", [Call("none")] * (1 + len(text) % 3)))

    def run(questions, group, backwards=False):
        traces = [Trace(q, [], (q, i)) for q in questions for i in range(group)][::-1 if backwards else 1]
        agent = AutoAgent(Sampler(model, tokenizer, len(traces), 700), 3, 12, 690, temperature)
        run_episodes(agent, blanked, traces, 1 if backwards else group)
        return {t.key: t for t in traces}

    together = run(["Who?", "Where was it?", "When, then, and how long?"], 6)
    others = [run([q], 1) for q in ("Who?", "Where was it?")] + [run(["When, then, and how long?", "Who?"], 2, True)]
    assert {1, 3} <= {len(t.turns) for t in together.values()} and len({tuple(t.ids) for t in together.values()}) > 6
    for key, trace in [pair for other in others for pair in other.items()]:
        assert trace.ids == together[key].ids and trace.mask == together[key].mask
        assert trace.logprobs == pytest.approx(together[key].logprobs, abs=1e-9)
        ids, mask = pad([trace.ids], "cpu"), pad([trace.mask], "cpu", torch.bool)
        scored, _ = token_logprobs(model, ids, mask, temperature)
        assert scored[0, :len(trace.ids)].tolist() == pytest.approx(trace.logprobs, abs=1e-6)


# --------------------------------------------------------------------------------------------- traces


def test_noise_depends_on_key_and_position_alone():
    key = (0, "train-composition-7", 3)
    long = uniforms(key, 0, 3000)
    assert long.shape == (3000,) and long.min() >= 0 and long.max() < 1 and len(set(long.tolist())) > 2900
    assert abs(long.mean() - 0.5) < 0.02
    trace = Trace("another question", [BIRTHPLACE], key)
    assert np.array_equal(uniforms(trace.key, len(trace.ids), 5), long[:5])
    trace.hear([9, 9, 9])
    assert np.array_equal(uniforms(trace.key, len(trace.ids), 7), long[3:10])
    trace.say([1] * 1500)
    assert np.array_equal(uniforms(trace.key, len(trace.ids), 100), long[1503:1603])
    for other in ((1, *key[1:]), (*key[:2], 4), key[:2], (0, "train-composition-8", 3)):
        assert not np.array_equal(uniforms(other, 0, 5), long[:5])
    assert uniforms((), 0, 2).shape == (2,)
    words = [zlib.crc32(text) for text in (b"0", b"'train-composition-7'", b"3")]
    assert np.array_equal(long[:7], np.random.default_rng(words).random(7, dtype=np.float32))


def test_a_trace_grows_in_step():
    trace = Trace()
    trace.hear([1, 2])
    trace.say([3], [-0.25])
    trace.say([4])
    assert (trace.ids, trace.mask, trace.logprobs) == ([1, 2, 3, 4], [0, 0, 1, 1], [0.0, 0.0, -0.25, 0.0])
    with pytest.raises(AssertionError):
        trace.say([5, 6], [-1.0])


def test_record_and_story_hold_everything(tokenizer):
    trace = play(scripted(tokenizer, in_turn(act(("birthplace", {"person": "Bo"}), ("nothing", {"a": 1, "b": "<"})),
                                             say("Velka"))))
    record = json.loads(json.dumps(trace.record(), ensure_ascii=False))
    assert record["question"] == "Where was Bo born?" and record["status"] == "answered"
    assert record["key"] == ["key", "Where was Bo born?"] and record["tools"][0] == BIRTHPLACE.schema
    assert record["ids"] == trace.ids and record["mask"] == trace.mask
    sampled = [i for i, mask in enumerate(trace.mask) if mask]
    assert record["logprobs"] == pytest.approx([trace.logprobs[i] for i in sampled], abs=1e-5) and record["old"] == []
    trace.old, trace.advantage, trace.weight = [i / 3 for i in range(len(trace.ids))], -1.5, 0.25
    record = trace.record()
    assert record["old"] == pytest.approx([i / 3 for i in sampled], abs=1e-5)
    assert (record["advantage"], record["weight"]) == (-1.5, 0.25)
    observations = [call["observation"] for call in record["turns"][0]["calls"]]
    assert observations == [{"birthplace": "Velka"}, {"error": "unknown tool"}]
    assert record["turns"][1]["answer"] == "Velka"
    assert story(trace).split("\n") == [
        "  thinks    I look it up.", "  calls     birthplace(person='Bo')", "  calls     nothing(a=1, b='<')",
        '  observes  {"birthplace": "Velka"}', '  observes  {"error": "unknown tool"}',
        "  thinks    Done.", "  answers   Velka"]


def test_a_story_names_what_ended_the_trace(tokenizer):
    """A malformed turn has its own line. A truncated trace ends with "truncated"."""
    oops = play(scripted(tokenizer, in_turn("oops")))
    assert story(oops) == ("  malformed neither call nor answer\n"
                            "  departs   no thought, text beside the tags, neither call nor answer")
    turns = play(scripted(tokenizer, in_turn(BO)), max_turns=1)
    assert story(turns).split("\n")[2:] == ['  observes  {"birthplace": "Velka"}', "  truncated"]
    cut = play(scripted(tokenizer, in_turn(BO)), turn_tokens=3)
    assert story(cut) == "  truncated" and cut.turns == [Turn()]


def test_a_story_and_a_record_hold_the_departures(tokenizer):
    """The line comes with the observations, so a story only grows while its trace does."""
    stories = []
    loose = act(("birthplace", {"person": "Bo"})).replace("</tool_call>", "") + "<answer>x</answer>"
    trace = play(scripted(tokenizer, in_turn(loose, BO, "Velka.")), watch=lambda trace: stories.append(story(trace)))
    assert trace.record()["turns"][0]["departures"] == trace.turns[0].departures == [
        "<tool_call> not closed", "answer beside the calls"]
    assert all(after.startswith(before) for before, after in zip(stories, stories[1:], strict=False))
    lines = story(trace).split("\n")
    assert lines[2:4] == ['  observes  {"birthplace": "Velka"}', "  departs   <tool_call> not closed, answer beside the calls"]
    assert lines[-2:] == ["  answers   Velka.", "  departs   no thought, answer without a tag"]
    assert len([line for line in lines if "departs" in line]) == 2


def test_a_story_has_no_line_for_an_observation_that_did_not_come_yet():
    trace = called(Call("birthplace", {"person": "Bo"}), Call("nothing"))
    assert story(trace) == "  calls     birthplace(person='Bo')\n  calls     nothing()"
    assert [call["observation"] for call in trace.record()["turns"][0]["calls"]] == [None, None]
    run_calls([trace], blanked)
    assert story(trace).split("\n")[2:] == ["  observes  {}", '  observes  {"error": "unknown tool"}']


def test_no_character_of_a_story_moves_the_cursor():
    turn = Turn("a\nb\x1b[2Jé\u2028", [Call("f", {"x\r": 1}, observation={"y": "\u202e"})], error="\tz")
    assert story(Trace(turns=[turn])) == ("  thinks    a\\nb\\x1b[2Jé\\u2028\n  calls     f(x\\r=1)\n"
                                           '  observes  {"y": "\\u202e"}\n  malformed \\tz')


# ------------------------------------------------------------------------------------------- backends


def test_real_calls_the_function():
    assert real(world)([(BIRTHPLACE, {"person": "Bo"}), (COUNTRY, {"city": "X"})]) == [
        {"birthplace": "Velka"}, {"error": "no country found"}]
    assert real(nobody)([]) == []


def test_blanked_observations_are_empty():
    assert blanked([(BIRTHPLACE, {"person": "Bo"})] * 2) == [{}, {}] and blanked([]) == []


def test_shuffled_gives_another_observation_of_the_same_tool():
    backend = shuffled(real(lambda name, arguments: {name: next(iter(arguments.values())) + "!"}))
    people = [(BIRTHPLACE, {"person": p}) for p in "abcde"]
    for _ in range(2):
        answers = backend([*people, (COUNTRY, {"city": "z"})])
        for (_, arguments), answer in zip(people, answers[:-1], strict=True):
            assert answer["birthplace"] in {p + "!" for p in "abcde"} - {arguments["person"] + "!"}
        assert answers[-1] == {}  # this tool has given no other observation yet
    assert backend([(COUNTRY, {"city": "y"})]) == [{"country": "z!"}]
    assert backend([]) == []
