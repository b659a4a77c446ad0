"""data/turns.py and agents.parse_turn on turns that depart from the strict form. No model runs here.

tests/cases/turns.jsonl holds turns as released models write them, each with how it is to be read."""
import json
import random
import re
from pathlib import Path
from time import process_time

import pytest

from agents import Call, Tool, Turn, parse_observation, parse_tools, parse_turn
from data.chat import assistant_content
from data.schema import Rejected, object_schema
from data.turns import find_objects, read_object

CASES = [json.loads(line) for line in
         (Path(__file__).parent / "cases" / "turns.jsonl").read_text(encoding="utf-8").splitlines()]


def calls_of(turn):
    return [{"name": call.name, "arguments": call.arguments} for call in turn.calls]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["case"])
def test_turns_of_released_models_are_read_as_a_person_would(case):
    plain = case.get("tools_used_before", False)
    turn, want = parse_turn(case["text"], plain), case["read_as"]
    assert bool(turn.departures) == case["departs"]
    assert (turn.error is not None) == (want == "malformed")
    if isinstance(want, dict):
        assert calls_of(turn) == want.get("calls", []) and turn.answer == want.get("answer")
        assert not any(call.error for call in turn.calls)
    elif want.startswith("answer: the whole text"):
        assert turn.answer == case["text"] and not turn.calls
        assert parse_turn(case["text"]).error
    elif want.startswith("a call with an error"):
        call, = turn.calls
        assert call.error and (call.name, call.arguments) == ("", {}) and turn.answer is None
    elif want != "malformed":
        call, = turn.calls
        assert call.error is None and turn.answer is None
        assert call.name == ("run_code" if "run_code" in want else "search")


def test_there_are_33_cases():
    assert len(CASES) == 33 and sum(case["departs"] for case in CASES) == 25


F = '<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>'
G = F.replace("f", "g", 1)
T = "<think>t</think>"
CALL = ("f", {"a": 1})
NO_THOUGHT, PLACE, BESIDE = "no thought", "thought out of place", "text beside the tags"
BOTH, SEVERAL, UNREADABLE = "answer beside the calls", "several answers", "unreadable call"
LOOSE, OTHER, FORM = "JSON that is not strict", "other keys in a call", "arguments in another form"
PROSE, MANY = "text beside the JSON", "several objects in a tag"

TURNS = {  # text: thought, calls, answer, departures
    "<answer>x</answer>": ("", [], "x", [NO_THOUGHT]),
    f"Sure.\n{F}": ("", [CALL], None, [NO_THOUGHT, BESIDE]),
    f"{T}{F} and {F}": ("t", [CALL, CALL], None, [BESIDE]),
    f"{T}\n```json\n{F}\n```": ("t", [CALL], None, [BESIDE]),
    f"{T}\n```\n<answer>x</answer>\n```": ("t", [], "x", [BESIDE]),
    f"{T}{F}</tool_call>": ("t", [CALL], None, [BESIDE]),
    f"{T}<answer>x</answer></answer>": ("t", [], "x", [BESIDE]),
    f"{T}</think><answer>x</answer>": ("t", [], "x", [BESIDE]),
    f"{T}<answer>x</answer><|im_start|>user": ("t", [], "x", [BESIDE]),
    # An observation that the agent writes itself is text, whatever follows it.
    f'{T}{F}\n<tool_response>\n{{"a": "x"}}\n</tool_response>': ("t", [CALL], None, [BESIDE]),
    f"{T}{F}\n<tool_response>\n{{}}\n</tool_response>\n<think>u</think>\n<answer>x</answer>":
        ("t\nu", [CALL], None, [PLACE, BESIDE, BOTH]),
    f"{T}<tool_response>{{}}</tool_response><answer>x</answer>": ("t", [], "x", [BESIDE]),
    # thoughts
    f"x {T}<answer>x</answer>": ("t", [], "x", [PLACE, BESIDE]),
    f"\ufeff{T}<answer>x</answer>": ("t", [], "x", [PLACE, BESIDE]),
    f"<answer>x</answer>{T}": ("t", [], "x", [PLACE]),
    f"{F}{T}": ("t", [CALL], None, [PLACE]),
    f"{T}<think>u</think><answer>x</answer>": ("t\nu", [], "x", [PLACE]),
    "<think>t<think>u</think><answer>x</answer>": ("t u", [], "x", [PLACE]),
    "<think>t<think>u</think></think><answer>x</answer>": ("t u", [], "x", [PLACE, BESIDE]),
    "<think>a<thi<think>nk>b</think><answer>x</answer>": ("a<thi nk>b", [], "x", [PLACE]),
    "t</think><answer>x</answer>": ("", [], "x", [NO_THOUGHT, BESIDE]),
    f"<think>t{F}": ("t", [CALL], None, ["<think> not closed"]),
    f"<think>t <answer>y</answer> <think>{F}</think><answer>x</answer>":
        ("t <answer>y</answer>  " + F, [], "x", [PLACE]),
    # closing tags
    f"{T}<answer>x": ("t", [], "x", ["<answer> not closed"]),
    f"{T}<answer>x</ answer>": ("t", [], "x</ answer>", ["<answer> not closed"]),
    f"{T}<answer>x<answer>": ("t", [], "x", ["<answer> not closed", BESIDE]),
    f"{T}<answer>x{F}": ("t", [CALL], None, ["<answer> not closed", BOTH]),
    f"{T}{F}<tool_call>": ("t", [CALL], None, ["<tool_call> not closed", BESIDE]),
    f"{T}{F[:-12]}<tool_call>{G[11:-12]}": ("t", [CALL, ("g", {"a": 1})], None, ["<tool_call> not closed"]),
    f"{T}{F[:-12]}{G}": ("t", [CALL, ("g", {"a": 1})], None, [PROSE, MANY]),
    f"{T}{F[:-12]}<answer>x</answer>": ("t", [CALL], None, ["<tool_call> not closed", BOTH]),
    # answers
    f"{T}{F}<answer>x</answer>": ("t", [CALL], None, [BOTH]),
    f"{T}<answer>x</answer>{F}": ("t", [CALL], None, [BOTH]),
    f"{T}<answer>x</answer><answer>y</answer>{F}": ("t", [CALL], None, [BOTH, SEVERAL]),
    f"{T}<answer>x</answer> or <answer> x</answer>": ("t", [], "x", [BESIDE, SEVERAL]),
    f"{T}<answer>a < b, <i>c</i>, </b>, <tool></answer>": ("t", [], "a < b, <i>c</i>, </b>, <tool>", []),
    f"{T}<answer></answer>": ("t", [], "", []),
}


@pytest.mark.parametrize("text", TURNS)
def test_a_loose_turn_is_read_and_its_departures_are_named(text):
    thought, calls, answer, departures = TURNS[text]
    assert parse_turn(text) == Turn(thought, [Call(*call) for call in calls], answer, None, departures)
    assert parse_turn(text, plain_answer=True) == parse_turn(text)


BODIES = {  # body of a <tool_call>: calls, departures
    '{"name": "f", "arguments": {"q": "</think> <answer>x</answer> <tool_call> {\'[,}]"}}':
        ([("f", {"q": "</think> <answer>x</answer> <tool_call> {'[,}]"})], []),
    '{"name": "f", "arguments": {"a": {"id": 1, "type": "function", "function": {}}}}':
        ([("f", {"a": {"id": 1, "type": "function", "function": {}}})], []),
    # Nous' parser takes Python literals.
    "{'arguments': {'a': True, 'b': None, 'c': False}, 'name': 'f'}":
        ([("f", {"a": True, "b": None, "c": False})], [LOOSE]),
    """{'name': 'f', 'arguments': {'q': "King's", 'r': 'a "b" \\' \\\\ \\u0041\\n'}}""":
        ([("f", {"q": "King's", "r": "a \"b\" ' \\ A\n"})], [LOOSE]),
    '{"name": "f", "arguments": {"a": [1, 2,\n], },}': ([("f", {"a": [1, 2]})], [LOOSE]),
    '{"name": "f", "arguments": {"q": "True, ]\tNone\r\n"}}': ([("f", {"q": "True, ]\tNone\r\n"})], [LOOSE]),
    # OpenAI's forms
    '{"id": "c1", "type": "function", "function": {"name": "f", "arguments": "{\\"a\\": 1}"}}':
        ([CALL], [OTHER, FORM]),
    '{"function": {"name": "f", "parameters": {"a": 1}}}': ([CALL], [OTHER, FORM]),
    '{"name": "f", "arguments": "{\'a\': 1,}"}': ([CALL], [FORM, LOOSE]),
    '{"name": "f", "arguments": null}': ([("f", {})], [FORM]),
    '{"name": "f", "parameters": ""}': ([("f", {})], [FORM]),
    # text beside the object, several objects
    '```json\n{"name": "f", "arguments": {"a": 1}}\n```': ([CALL], [PROSE]),
    '{"name": "f", "arguments": {"a": 1}}}': ([CALL], [PROSE]),
    'I\'ll call it: {"name": "f", "arguments": {"a": 1}} now': ([CALL], [PROSE]),
    '[{"name": "f", "arguments": {"a": 1}}, {"name": "g", "arguments": {}}]': ([CALL, ("g", {})], [PROSE, MANY]),
    '{"name": "f", "arguments": {"a": 1}}\n{}': ([CALL, None], [MANY, FORM, UNREADABLE]),
    # not a call
    "": ([None], [UNREADABLE]), "null": ([None], [PROSE, UNREADABLE]), "f(1)": ([None], [PROSE, UNREADABLE]),
    '{"name": "f", "arguments": {"a": 1}': ([None], [UNREADABLE]),
    '{"name": "f", "arguments": {"a": 1e400}}': ([None], [UNREADABLE]),
    '{"name": "f", "arguments": {"a": "\\udfff"}}': ([None], [UNREADABLE]),
    '{"name": "f", "arguments": {"a": NaN}}': ([None], [UNREADABLE]),
    '{"name": "f", "arguments": {"a": 1, "a": 2}}': ([None], [UNREADABLE]),
    "{'name': 'f', 'arguments': {'a': 1, 'a': 2}}": ([None], [LOOSE, UNREADABLE]),
    "{'name': 'f', 'arguments': {'a': (1, 2)}}": ([None], [LOOSE, UNREADABLE]),
    "{'name': 'f', 'arguments': {'q': 'King's'}}": ([None], [LOOSE, UNREADABLE]),
    '{"name": "f", "arguments": "Elbe"}': ([None], [FORM, PROSE, UNREADABLE]),
    '{"name": "f", "arguments": "{} {}"}': ([None], [FORM, MANY, UNREADABLE]),
    '{"name": "f", "arguments": [1]}': ([None], [FORM, UNREADABLE]),
    '{"name": "f", "arguments": {}, "parameters": {}}': ([None], [UNREADABLE]),
    '{"name": "f", "arguments": {}, "observation": {"a": 1}}': ([None], [UNREADABLE]),
    '{"name": "f", "arguments": {}, "type": "tool"}': ([None], [UNREADABLE]),
    '{"function": "f", "arguments": {}}': ([None], [UNREADABLE]),
    '{"name": null, "arguments": {}}': ([None], [UNREADABLE]), '{"arguments": {}}': ([None], [UNREADABLE]),
    "{" * 300 + "}" * 300: ([None], [UNREADABLE]),
}


@pytest.mark.parametrize("body", BODIES, ids=lambda body: body[:60])
def test_a_loose_call_is_read_and_a_bad_one_has_an_error(body):
    """None stands for a call with an error. The trace goes on after it, so the turn itself has no error."""
    calls, departures = BODIES[body]
    turn = parse_turn(f"{T}\n<tool_call>\n{body}\n</tool_call>")
    assert turn.departures == departures and turn.error is None and turn.answer is None
    assert [None if call.error else (call.name, call.arguments) for call in turn.calls] == calls


@pytest.mark.parametrize("text, error", [
    ("", "neither"), (T, "neither"), (f"<think>t{F}</think>", "neither"), ("<think>t", "neither"),
    ("<think>t<answer>x</answer></think>", "neither"), (f"{T}<answer>", "neither"), (f"{T}<tool_call>", "neither"),
    (f"{T}<tool_response>x</tool_response>", "neither"), (f"{T}x</answer>", "neither"),
    (f"{T}<answer>x</answer><answer>y</answer>", "different"), (f"{T}<answer>x<answer>y</answer>", "tag"),
    (f"{T}<answer>x<answer>y", "different"), (f"{T}<answer>x</answer><answer></answer>", "different"),
    ("<think>x<answer>a</answer>y<answer>b</answer>", "different"),
    *((f"{T}<answer>{tag}x</answer>", "tag") for tag in (
        "<answer>", "<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", F))])
def test_a_turn_without_call_and_answer_is_malformed(text, error):
    for plain in (False, True):
        turn = parse_turn(text, plain)
        assert error in turn.error and turn.error in turn.departures and not turn.calls and turn.answer is None


@pytest.mark.parametrize("text, answer", [
    ("The Elbe.\n", "The Elbe."), (f"{T}\nThe Elbe, < 5 %.", "The Elbe, < 5 %."), ("<b>Elbe</b>", "<b>Elbe</b>"),
    (f"{T}", None), ("  ", None), ("<think>The Elbe.", None), ("The Elbe. </answer>", None), (f"The Elbe. {T}", None),
    ("The Elbe. <tool_response>", None), ("The Elbe. <answer>", None), (f"{T}x{T}y", None),
    ("a<think>t</think>", None), (f"{T}<ans{T}wer>x", None)])
def test_text_without_a_tag_is_an_answer_where_the_caller_says_so(text, answer):
    turn = parse_turn(text, plain_answer=True)
    assert turn.answer == answer and (turn.error is None) == (answer is not None)
    assert ("answer without a tag" in turn.departures) == (answer is not None)
    assert parse_turn(text).error == "neither call nor answer"


@pytest.mark.parametrize("text", [
    '{"name": "search", "arguments": {"query": "Elbe"}}', '```json\n{"name": "search", "arguments": {"query": "Elbe"}}\n```',
    "<think>t</think>\nI search: {'name': 'search', 'parameters': {'query': 'Elbe'}}"])
@pytest.mark.parametrize("plain_answer", [True, False])
def test_a_call_without_a_tag_is_read(text, plain_answer):
    """Small models leave the tag out. A sentence about names and arguments is no call."""
    turn = parse_turn(text, plain_answer)
    assert [(call.name, call.arguments, call.error) for call in turn.calls] == [("search", {"query": "Elbe"}, None)]
    assert turn.answer is None and turn.error is None and "call without a tag" in turn.departures
    assert parse_turn('The "name": and "arguments": of it', True).calls == []


def hermes(text):
    """The calls that vLLM's hermes parser reads. None where it gives up."""
    found = re.findall(r"<tool_call>(.*?)</tool_call>|<tool_call>(.*)", text, re.DOTALL)
    try:
        bodies = [json.loads(closed or rest) for closed, rest in found]
        return [{"name": body["name"], "arguments": body["arguments"]} for body in bodies]
    except (ValueError, LookupError, TypeError):
        return None


PIECES = ["<think>", "</think>", "<answer>", "</answer>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>",
          '{"name": "f", "arguments": {"a": "<b>"}}', "{'name': 'g', 'arguments': {}}", "x", "Elbe.", " ", "\n", "```json\n",
          "{", "}", '"', "'", ",", "[", "]", "\\", "None", T, F, G, "<answer>Oder</answer>"]


def test_a_turn_that_vllm_reads_is_read_the_same():
    rng, read = random.Random(0), 0
    pieces = ["I look.", "\n", F, G, F[:-12], '<tool_call>{"arguments": {"q": "é {x}"}, "name": "h"}</tool_call>', "{", "</tool_call>"]
    for _ in range(3000):
        text = rng.choice(["", T]) + "".join(rng.choice(pieces) for _ in range(rng.randrange(6)))
        want = hermes(text)
        if want:
            read += 1
            assert calls_of(parse_turn(text)) == want
    assert read > 1000


@pytest.mark.parametrize("seed", range(20))
def test_what_is_read_can_be_written_in_the_strict_form(seed):
    """Stage 0 writes kept turns anew. They read back with the same content and without a departure."""
    rng, kinds = random.Random(seed), set()
    for _ in range(500):
        text = "".join(rng.choice(PIECES) for _ in range(rng.randrange(1, 9)))
        turn = parse_turn(text, rng.random() < 0.5)
        assert (turn.error is not None) + (turn.answer is not None) + bool(turn.calls) == 1
        assert len(set(turn.departures)) == len(turn.departures)
        if turn.error or any(call.error for call in turn.calls):
            assert turn.departures
            continue
        written = f"<think>{turn.thought}</think>"
        if turn.answer is not None:
            written += f"\n<answer>{turn.answer}</answer>"
        again = parse_turn("".join(assistant_content(written, calls_of(turn))))
        assert again == Turn(turn.thought, turn.calls, turn.answer)
        kinds.add((turn.answer is None, bool(turn.departures)))
    assert kinds >= {(True, True), (False, True)}


@pytest.mark.parametrize("piece", [*PIECES, '{"a":', "{'a':", '"\\', "'\\", '\\"', ", ", ",\n", "<", "</", "<think></think>",
                                   "<tool_call>{", "<answer><think>", "</answer><tool_call>", '{"', "{'\"", "{}", "True ",
                                   "x<think></think>", "\ud800", "```"])
@pytest.mark.parametrize("before", ["", "<tool_call>", "<tool_call>{", T + "<tool_call>{\"a\": '", "<answer>", "<think>"])
def test_any_text_is_read_in_linear_time(before, piece):
    """Up to 100,000 characters, also with a closing tag behind them. It takes half a second, on a slow machine two."""
    many = before + piece * min(20_000, 100_000 // len(piece))
    begin = process_time()
    for text in (many, many + "</tool_call>", many + "</answer>", many + "</think>"):
        parse_turn(text, plain_answer=True)
    assert process_time() - begin < 6


# ------------------------------------------------------------------------------------------- JSON


def test_strict_json_stays_as_it_is():
    rng = random.Random(1)

    def value(depth):
        if depth == 0 or rng.random() < 0.2:
            return rng.choice([1, -2.5e3, None, True, "", "a'b\"c\\", "é\n\t", "{[,]}", "True"])
        if rng.random() < 0.5:
            return [value(depth - 1) for _ in range(rng.randrange(3))]
        return {rng.choice(["a", "'", '"', "]"]): value(depth - 1) for _ in range(2)}
    for indent in (None, 1):
        for _ in range(300):
            written, notes = json.dumps({"v": value(3)}, indent=indent, ensure_ascii=rng.random() < 0.5), []
            assert find_objects(written, notes) == [written] and notes == []
            assert read_object(written, []) == json.loads(written)


LOOKUP = Tool("lookup", "d", object_schema(q={}), object_schema(r={"type": "string"}))


@pytest.mark.parametrize("text, want", [
    ('```json\n{"r": "x"}\n```', {"r": "x"}), ('The result: {"r": "x"}.', {"r": "x"}), ("{'r': 'x',}", {"r": "x"}),
    ('Sorry. {"error": "no such name"}', {"error": "no such name"}), ('{"r": "x"}\n{"r": "y"}', None), ('{"r": 1}', None),
    ("{'error': None}", None), ("x", None), ("", None), ("{", None), ('"{"', None)])
def test_an_observation_may_have_text_beside_one_object(text, want):
    assert parse_observation(LOOKUP, text) == want


DEFINITION = json.loads(LOOKUP.definition)
ANOTHER = {**DEFINITION, "name": "another", "description": "{</tools>}"}
FUNCTION = {k: v for k, v in DEFINITION.items() if k != "returns"}
HEAD = "<think>t</think>\n<kind>inference</kind>\n<tools>\n"


@pytest.mark.parametrize("text", [
    f"{HEAD}{json.dumps(DEFINITION)}\n{json.dumps(ANOTHER)}\n</tools>",
    f"{HEAD}{json.dumps(DEFINITION, indent=2)}\n\n{json.dumps(ANOTHER, indent=2)}\n</tools>",
    f"{HEAD}{json.dumps([DEFINITION, ANOTHER], indent=1)}</tools>",
    f"{HEAD}```json\n{json.dumps(DEFINITION)}\n{json.dumps(ANOTHER)}\n```\n</tools>",
    f"Sure:\n```\n{HEAD}1. {json.dumps(DEFINITION)}\n2. {json.dumps(ANOTHER)}\n</tools>\n```\nI hope that helps.",
    HEAD.replace("\n", " So: ") + f"{json.dumps(DEFINITION)}, {json.dumps(ANOTHER)}</tools>",
    f"{HEAD}{DEFINITION}\n{ANOTHER}</tools>",
    HEAD + json.dumps({"type": "function", "function": DEFINITION}) + json.dumps(
        {"type": "function", "function": {**FUNCTION, "name": "another", "description": "{</tools>}"},
         "returns": ANOTHER["returns"]}) + "</tools>"], ids=range(8))
def test_loose_definitions_of_tools_are_read(text):
    thought, kind, tools = parse_tools(text)
    assert (thought, kind) == ("t", "inference")
    assert [json.loads(tool.definition) for tool in tools] == [DEFINITION, ANOTHER]


@pytest.mark.parametrize("text, message", [
    (HEAD + json.dumps(FUNCTION) + "</tools>", "returns"), (HEAD + json.dumps({"tools": [DEFINITION]}) + "</tools>", "returns"),
    (HEAD + json.dumps({"type": "function", "function": FUNCTION}) + "</tools>", "returns"),
    (HEAD + json.dumps({**DEFINITION, "strict": True}) + "</tools>", "returns"), (HEAD + "{</tools>", "not JSON"),
    (HEAD + json.dumps(DEFINITION), "no think"), (HEAD.replace("</think>", "") + "{}</tools>", "no think"),
    (f"<tools>{json.dumps(DEFINITION)}</tools>{HEAD}", "no think"), (HEAD + "none</tools>", "no tools")], ids=range(9))
def test_loose_definitions_still_have_to_pass_the_rules(text, message):
    with pytest.raises(Rejected, match=message):
        parse_tools(text)


@pytest.mark.parametrize("piece", ["<think>", "<think></think>", "<kind>", "<think></think><kind></kind>", "<tools>", "</tools>",
                                   "<tools></tools>", "<", "{", '{"a":', '"', "'", ",", "{}"])
def test_any_reply_is_read_in_linear_time(piece):
    many = piece * min(20_000, 100_000 // len(piece))
    begin = process_time()
    for text in (many, HEAD + many, HEAD + many + "</tools>"):
        with pytest.raises(Rejected):
            parse_tools(text)
        parse_observation(LOOKUP, text)
    assert process_time() - begin < 2
