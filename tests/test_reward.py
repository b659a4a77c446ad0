"""The composite reward: the order of its values, each of its parts by hand, and tricks that must gain nothing.

Every trace is built from the texts that a policy would generate. The parser reads them, calls are validated, and a
scripted backend answers. test_words.py and test_evidence.py test the words and the evidence of single calls."""
import itertools
import json
import random
from functools import cache
from types import SimpleNamespace

import pytest

import grpo
from agents import UTILITIES, Trace, check_tools, parse_turn, run_calls
from data.schema import Rejected
from data.support import collect_evidence
from grpo import GRPOConfig, reward

QUESTION = "In which country was Ada Bo born, in 1815?"
PARTS = ("grammar", "valid", "arguments", "support", "economy")


def spec(name, returns, required=(), **properties):
    """A tool as the ToolMaker would write it."""
    return {"name": name, "description": f"The {name}.",
            "parameters": {"type": "object", "properties": properties, "required": list(required)},
            "returns": {"type": "object", "properties": returns}}


TEXT, WHOLE = {"type": "string"}, {"type": "integer"}
TOOLS = check_tools([
    spec("birthplace", {"city": TEXT}, ["person"], person=TEXT),
    spec("country", {"country": TEXT}, ["city"], city=TEXT, unit={"enum": ["state", "land"]},
         sure={"type": "boolean"}),
    spec("census", {"people": WHOLE}, city=TEXT, year=WHOLE, places={"type": "array"}),
    spec("echo", {"said": TEXT}, first=TEXT, second=TEXT, number={"type": "number"}),
]) + list(UTILITIES.values())


def script(observations):
    """A backend that gives each call the next of these observations. `echo` repeats its arguments."""
    left = list(observations)

    def answer(requests):
        return [{"said": " ".join(str(v) for v in arguments.values())} if tool.name == "echo" else
                left.pop(0) for tool, arguments in requests]
    return answer


def play(texts, observations=(), question=QUESTION, tools=TOOLS):
    """The trace of a policy that generates these texts, turn by turn, until it answers or is malformed."""
    trace, backend = Trace(question, tools), script(observations)
    for text in texts:
        turn = parse_turn(text)
        trace.turns.append(turn)
        trace.status = "malformed" if turn.error else "open" if turn.answer is None else "answered"
        if trace.status != "open":
            return trace
        run_calls([trace], backend)
    trace.status = "truncated"
    return trace


def part(name, trace):
    """One part of the reward of a trace."""
    return grpo.PARTS[name](trace, collect_evidence(trace))


def calls(*pairs):
    """The text of a turn with these calls, each (name, arguments)."""
    said = [json.dumps({"name": name, "arguments": arguments}) for name, arguments in pairs]
    return "<think>Let me see.</think>\n" + "\n".join(f"<tool_call>\n{body}\n</tool_call>" for body in said)


def call(name, **arguments):
    return calls((name, arguments))


def answer(text):
    return f"<think>Done.</think>\n<answer> {text}</answer>"


def depart(trace, turns):
    """Mark the first turns of a trace as departing from the strict grammar."""
    for number, turn in enumerate(trace.turns):
        turn.departures = ["text beside the calls"] if number < turns else []
    return trace


ADA, VELKA = call("birthplace", person="Ada Bo"), call("country", city="Velka")
TOLD = [{"city": "Velka"}, {"country": "Dumo"}]
HONEST = [ADA, VELKA, answer("Dumo")]


def score(texts, observations=(), golds=("Dumo",), config=None):
    return reward(play(texts, observations), list(golds), config or GRPOConfig())


# -------------------------------------------------------------------------------------- parts by hand

ONES, ZEROS = (1, 1, 1, 1), (0, 0, 0, 0)
BAD = "<think>x</think><tool_call>{</tool_call>"
LONG = "a long text that a search engine might well tell, in which you read at last of Dumo"
BOTH = "of Velka, whose streets run down to the sea past many an old and empty house, and of Lorn"

# texts of the turns, observations -> valid, arguments, support, economy
BY_HAND = {
    "all of use": (HONEST, TOLD, ONES),
    "no call": ([answer("Dumo")], [], ZEROS),
    "one unknown tool": ([call("oracle", person="Ada Bo"), *HONEST], TOLD, (1 / 2, 1, 1, 2 / 3)),
    "not JSON": ([BAD, *HONEST], TOLD, (1 / 2, 1, 1, 2 / 3)),
    "two that don't fit": ([calls(("birthplace", {}), ("birthplace", {"person": 3})), *HONEST], TOLD,
                           (1 / 3, 2 / 3, 1, 1 / 2)),
    "only one that isn't JSON": ([BAD, answer("Dumo")], [], ZEROS),
    "a call of no use": ([call("census"), *HONEST], [{"people": 3}, *TOLD], (1, 1, 1, 2 / 3)),
    "nothing of use": ([ADA, answer("Lorn")], TOLD, ZEROS),
    "used as an argument alone": ([ADA, VELKA, answer("Lorn")], TOLD, (1, 1, 0, 1 / 2)),
    "used by a call that told nothing": ([ADA, VELKA, answer("Lorn")], [TOLD[0], {"error": "no"}], ZEROS),
    "about a thing of the question": ([ADA, call("country", city="1815"), answer("Dumo")], TOLD, ONES),
    "the same without an answer in a result": ([ADA, call("country", city="1815"), answer("Lorn")], TOLD, ZEROS),
    "a short result of an argument from nowhere": ([ADA, call("country", city="Lorn"), answer("Dumo")], TOLD, ZEROS),
    "a long result of an argument from nowhere": ([call("country", city="Lorn"), answer("Dumo")], [{"text": LONG}],
                                                  (1, 0, 1, 1)),
    "a long result for the whole question": ([call("census", city=QUESTION), answer("Dumo")], [{"text": LONG}], ZEROS),
    "a short result for the whole question": ([call("census", city=QUESTION), answer("Dumo")], [{"text": "Dumo"}], ONES),
    "a long result for a part of it": ([call("census", city="Ada Bo born"), answer("Dumo")], [{"text": LONG}], ONES),
    "an observation of the same turn is not earlier": (
        [calls(("birthplace", {"person": "Ada Bo"}), ("country", {"city": "Velka"})), answer("Dumo")], TOLD, ZEROS),
    "an enum and a boolean need no ground": (
        [ADA, call("country", city="Velka", unit="land", sure=True), answer("Dumo")], TOLD, ONES),
    "nothing to ground": ([call("census"), answer("12")], [{"people": 12}], ONES),
    "nothing to ground, one refused": ([BAD, call("census"), answer("12")], [{"people": 12}], (1 / 2, 1 / 2, 1, 1 / 2)),
    "an enum alone": ([call("country", unit="land"), answer("12")], [], ZEROS),
    "a number of the question": ([call("census", year=1815), answer("12")], [{"people": 12}], ONES),
    "a number from nowhere": ([call("census", year=1816), answer("12")], [{"people": 12}], ZEROS),
    "a list, half of it grounded": (
        [call("census", places=["Ada", ["Lorn"]]), answer("Dumo")], [{"text": LONG}], (1, 1 / 2, 1, 1)),
    "a key of an object": ([call("census", places=[{"Lorn": True}]), answer("Lorn")], [{"text": LONG + " and Lorn"}],
                           ZEROS),
    "only whole words are ground": ([call("census", city="Ad"), answer("12")], [{"people": 12}], ZEROS),
    "case, articles and points": (
        [call("birthplace", person="the ADA BO!"), call("country", city="velka."), answer("A Dumo")], TOLD, ONES),
    "an argument of an article": ([call("census", city="The"), answer("12")], [{"people": 12}], (1, 0, 1, 1)),
    "part of what was told": (HONEST, [{"city": "old Velka"}, {"country": "south of Dumo"}], ONES),
    "deep in the observation": (HONEST, [TOLD[0], {"a": [{"b": ["x", "Dumo"]}]}], ONES),
    "true is evidence": ([call("census"), answer("true")], [{"people": True, "x": None}], ONES),
    "null is no evidence": ([call("census"), answer("null")], [{"people": None}], ZEROS),
    "an error is no evidence": (HONEST, [{"error": "Velka"}, TOLD[1]], ZEROS),
    "nothing found is no evidence": ([ADA, answer("No")], [{"city": "no city found"}], ZEROS),
    "computed": ([call("census"), call("calculator", expression="1815 - 12"), answer("1803")], [{"people": 12}], ONES),
    "computed from an invented number": (
        [call("census"), call("calculator", expression="1815 - 13"), answer("1802")], [{"people": 12}], ZEROS),
    "compared": (
        [calls(("census", {"city": "Ada"}), ("census", {"city": "Bo"})),
         call("compare", names=["Ada", "Bo"], values=[12, 15], pick="largest"), answer("Bo")],
        [{"people": 12}, {"people": 15}], ONES),
    "a utility that failed": ([call("calculator", expression="Ada"), answer("Ada")], [], ZEROS),
    "made twice": ([ADA, ADA, VELKA, answer("Dumo")], [TOLD[0], *TOLD], (1, 1, 1, 2 / 3)),
    "made twice in one turn": (
        [calls(*[("birthplace", {"person": "Ada Bo"})] * 2), VELKA, answer("Dumo")], [TOLD[0], *TOLD],
        (1, 1, 1, 2 / 3)),
    "made twice, arguments from nowhere": (
        [ADA, *[call("census", city="Lorn")] * 2, VELKA, answer("Dumo")], [TOLD[0], {}, {}, TOLD[1]], (1, 2 / 3, 1, 1 / 2)),
    "the only later use is a repeated call": ([VELKA, ADA, VELKA, answer("Lorn")], [TOLD[1], *TOLD], ZEROS),
    "the answer was in the arguments": ([ADA, answer("Bo")], [{"city": "x", "of": "Ada Bo"}], ZEROS),
    "a list, each item in a result": (
        [call("census", city="Ada"), call("census", city="Bo"), answer("Velka and Lorn")],
        [{"city": "Velka"}, {"city": "Lorn"}], ONES),
    "a list with a comma before and": (
        [call("census", city="Ada"), call("census", city="Bo"), answer("Velka, Pata, and Lorn")],
        [{"city": "Velka"}, {"cities": ["Pata", "Lorn"]}], ONES),
    "a list, both items in one result": ([call("census", city="Ada"), answer("Velka and Lorn")], [{"text": BOTH}], ONES),
    "a list, one item in no result": (
        [call("census", city="Ada"), call("census", city="Bo"), answer("Velka and Pata")],
        [{"city": "Velka"}, {"city": "Lorn"}], ZEROS),
}


def check_by_hand(trace, expected):
    """The four parts, each alone and in the reward. A part is 0 in the reward if no call was of use.

    Of the turns, only one whose call isn't JSON departs from the strict grammar."""
    assert trace.status == "answered" and list(grpo.PARTS) == list(PARTS)
    unread = sum(any(call.error == "not JSON" for call in turn.calls) for turn in trace.turns)
    grammar = (1 + len(trace.turns) - unread) / (1 + len(trace.turns))
    assert part("grammar", trace) == pytest.approx(grammar) and [part("support", trace), part("economy", trace)] == pytest.approx(expected[2:])
    whole = reward(trace, ["no such answer"], GRPOConfig())
    if expected[3] == 0:
        grammar = 1 / (1 + unread)
    assert [whole[name] for name in PARTS] == pytest.approx([grammar, *expected])
    assert whole["consistency"] == pytest.approx((grammar + sum(expected)) / 5)
    assert whole["answer"] == whole["em"] == 0 and whole["reward"] == pytest.approx(0.3 * whole["consistency"])


@pytest.mark.parametrize("name", BY_HAND)
def test_parts_by_hand(name):
    texts, observations, expected = BY_HAND[name]
    check_by_hand(play(texts, observations), expected)


CY = call("birthplace", person="Cy Dee")
OLDER, AGES = "Who is older, Ada Bo or Cy Dee?", [{"year": 1815}, {"year": 1820}]


def compare_both(*values):
    return call("compare", names=["Ada Bo", "Cy Dee"], values=[*values], pick="smallest")


# question, texts, observations -> valid, arguments, support, economy
COMPARED = {
    "both looked up": (OLDER, [ADA, CY, answer("Ada Bo")], AGES, ONES),
    "only one": (OLDER, [ADA, answer("Ada Bo")], AGES, ZEROS),
    "one of them twice": (OLDER, [ADA, call("birthplace", person="Ada"), answer("Ada Bo")], AGES, ZEROS),
    "one of them made twice": (OLDER, [ADA, CY, CY, answer("Ada Bo")], [*AGES, AGES[1]], (1, 1, 1, 2 / 3)),
    "the loser's page names the winner": (OLDER, [CY, answer("Ada Bo")], [{"met": "Ada Bo"}], ZEROS),
    "the second tells nothing": (OLDER, [ADA, CY, answer("Ada Bo")], [AGES[0], {"error": "no"}], ZEROS),
    "by compare": (OLDER, [ADA + CY.replace("<think>Let me see.</think>", ""), compare_both(1815, 1820), answer("Ada Bo")],
                   AGES, ONES),
    "an invented value": (OLDER, [ADA, CY, compare_both(1815, 1821), answer("Ada Bo")], AGES, ZEROS),
    "the question itself is no choice": (OLDER, [ADA, CY, answer(OLDER)], AGES, ZEROS),
    "the winner is not the answer": (OLDER, [ADA, CY, compare_both(1815, 1820), answer("Cy Dee")], AGES,
                                     (1, 1, 0, 2 / 3)),
    "a difference": ("How much older is Ada Bo than Cy Dee?", [ADA, CY, answer("5")], AGES, ONES),
    "another difference": ("How much older is Ada Bo than Cy Dee?", [ADA, CY, answer("6")], AGES, ZEROS),
    "yes or no about two": ("Are Ada Bo and Cy Dee old?", [ADA, CY, answer("no")], AGES, ONES),
    "yes or no about one of two": ("Are Ada Bo and Cy Dee old?", [ADA, answer("no")], AGES, ZEROS),
    "yes or no about one": ("Is Ada Bo old?", [ADA, answer("Yes.")], AGES, ONES),
    "the word by chance": ("Is Ada Bo old?", [call("census", city="old"), answer("no")], [{"text": "no town"}], ZEROS),
    "an article as a name": ("Who is older, A or B?", [call("birthplace", person="A"), call("birthplace", person="B"),
                                                     answer("A")], AGES, ONES),
}


@pytest.mark.parametrize("name", COMPARED)
def test_a_comparison_by_hand(name):
    """What the answer is does not matter, only what was looked up: nobody but exact match knows the right one."""
    question, texts, observations, expected = COMPARED[name]
    check_by_hand(play(texts, observations, question), expected)


@pytest.mark.parametrize("departing, expected", [(0, 1), (1, 3 / 4), (2, 1 / 2), (3, 1 / 4)])
def test_grammar_counts_the_strict_turns(departing, expected):
    trace = depart(play(HONEST, TOLD), departing)
    got = reward(trace, ["Dumo"], GRPOConfig())
    assert part("grammar", trace) == got["grammar"] == expected
    assert got["consistency"] == pytest.approx((expected + 4) / 5)


@pytest.mark.parametrize("texts", [[answer("Dumo")], [call("oracle"), answer("Dumo")], [call("census"), answer("Dumo")],
                                   [call("echo", first="Dumo"), answer("Dumo")]])
def test_calls_of_no_use_earn_no_more_than_no_call(texts):
    """Grammar is all that is left, for a right and for a wrong answer."""
    for gold, right in (("Dumo", 1), ("Lorn", 0)):
        got = score(texts, [{"people": 3}], [gold])
        assert [got[name] for name in PARTS] == [1, 0, 0, 0, 0]
        assert got["reward"] == pytest.approx(0.7 * right + 0.3 / 5)


def test_a_failed_call_may_be_tried_again():
    """The second, equal call is no repetition: it brings the first result."""
    trace = play([ADA, ADA, VELKA, answer("Dumo")], [{"error": "timeout"}, *TOLD])
    assert [part(name, trace) for name in ("support", "economy")] == pytest.approx([1, 2 / 3])
    assert [e.repeated for e in collect_evidence(trace)] == [False, False, False]
    trace = play([ADA, ADA, VELKA, answer("Dumo")], [TOLD[0], *TOLD])
    assert [e.repeated for e in collect_evidence(trace)] == [False, True, False]


@pytest.mark.parametrize("said, golds, partial, expected", [
    ("Dumo", ["Dumo"], 0.0, 1.0), ("the dumo.", ["Lorn", "Dumo"], 0.0, 1.0), ("Lorn", ["Dumo"], 0.0, 0.0),
    ("old Dumo", ["Dumo"], 0.0, 0.0), ("old Dumo", ["Dumo"], 0.3, 0.3 * 2 / 3),
    ("Dumo old", ["old Dumo"], 0.3, 0.3), ("Dumo", ["Dumo"], 0.3, 1.0), ("yes it is", ["yes"], 0.3, 0.0),
])
def test_answer_by_hand(said, golds, partial, expected):
    config = GRPOConfig(partial=partial)
    got = score([ADA, VELKA, answer(said)], TOLD, golds, config)
    assert got["answer"] == pytest.approx(expected) and got["em"] == (expected == 1)
    assert got["reward"] == pytest.approx(0.7 * expected + 0.3 * got["consistency"])


def test_evidence_by_hand():
    """Three turns. The second one repeats a call of the first, with its arguments in another order."""
    trace = play([
        calls(("birthplace", {"person": "Ada Bo"}), ("country", {"city": "Velka", "unit": "land"}), ("census", {"year": 1815})),
        calls(("country", {"unit": "land", "city": "Velka"}), ("calculator", {"expression": "1815 - 12"})),
        calls(("oracle", {}), ("country", {"unit": "land", "city": "Velka", "sure": True})), answer("x")],
        [{"city": "Velka", "of": "Ada"}, {"country": "Dumo"}, {"people": 12}, {"country": "Dumo"}, {"error": "Pata"}])
    got = collect_evidence(trace)
    assert [e.call for e in got] == trace.calls and [e.turn for e in got] == [0, 0, 0, 1, 1, 2, 2]
    assert [e.repeated for e in got] == [False, False, False, True, False, False, False]
    # Velka comes from an observation of turn 0, so it is grounded from turn 1 on. unit is an enum, sure a boolean.
    assert [e.grounded for e in got] == [[True], [False], [True], [True], [True], [], [True]]
    assert [e.result_words for e in got] == [["velka", "ada"], [], ["12"], ["dumo"], ["1803"], [], []]
    assert [e.new_words for e in got] == [{"velka"}, set(), {"12"}, {"dumo"}, {"1803"}, set(), set()]
    land = {"velka", "land"}
    assert [e.argument_words for e in got] == [{"ada", "bo"}, land, {"1815"}, land, {"1815", "12"}, set(), land]
    assert [e.entity for e in got] == [("ada", "bo"), (), (), (), (), (), ()]
    assert [{tuple(topic) for topic in e.topics} for e in got[:5]] == [
        {("ada", "bo")}, {("velka",)}, {("1815",)}, {("velka",)}, {("1815",), ("12",)}]
    assert got[1].result == {"dumo"} and got[6].result == {"pata"}


# What a reader of any kind finds neither a call nor an answer in.
MALFORMED = {
    "nothing": [""],
    "spaces": [" \n"],
    "thought alone": ["<think>Dumo</think>"],
    "an answer inside the thought alone": ["<think><answer>Dumo</answer></think>"],
    "nothing after an honest start": [ADA, VELKA, ""],
    "a thought after an honest start": [ADA, VELKA, "<think>Dumo</think>"],
}


@pytest.mark.parametrize("name", MALFORMED)
def test_a_malformed_trace_has_no_reward(name):
    trace = play(MALFORMED[name], TOLD)
    assert trace.status == "malformed"
    got = reward(trace, ["Dumo"], GRPOConfig())
    assert list(got) == ["reward", "em", "answer", "consistency", *PARTS] and not any(got.values())


@pytest.mark.parametrize("texts", [[ADA], [ADA, VELKA]])
def test_a_truncated_trace_has_no_reward(texts):
    trace = play(texts, TOLD)
    assert trace.status == "truncated" and not any(reward(trace, ["Dumo"], GRPOConfig()).values())


# ----------------------------------------------------------------------------------------------- order


def worst_right(refused=1, turns=2, said="Dumo"):
    """A right answer with the lowest consistency: refused calls in each turn but the last, and every turn departs."""
    texts = [calls(*[("birthplace", {"city": f"Lorn {i} {j}"}) for j in range(refused)]) for i in range(turns - 1)]
    return depart(play([*texts, answer(said)]), turns)


def best_wrong():
    """A wrong answer with every part 1."""
    return play(HONEST, TOLD[:1] + [{"country": "Dumo"}])


@pytest.mark.parametrize("refused, turns", [(0, 1), (1, 2), (7, 2), (50, 2), (1, 8), (3, 40)])
def test_the_ends_in_closed_form(refused, turns):
    """With floor = 1 / (1 + turns) / 5, the rewards are w_a + w_c floor for the worst right trace, w_c floor for the worst
    wrong one, and w_a p F1 + w_c for the best wrong one. Refused calls take nothing away from where nothing is."""
    config = GRPOConfig(w_answer=0.8, w_consistency=0.4, partial=0.25)
    floor = 1 / (1 + turns) / 5
    worst = worst_right(refused, turns)
    assert len(worst.calls) == refused * (turns - 1) and not any(call.succeeded for call in worst.calls)
    assert reward(worst, ["Dumo"], config)["reward"] == pytest.approx(0.8 + 0.4 * floor)
    assert reward(worst, ["Lorn"], config)["reward"] == pytest.approx(0.4 * floor)
    assert reward(best_wrong(), ["Dumo East"], config)["reward"] == pytest.approx(0.8 * 0.25 * 2 / 3 + 0.4)
    assert reward(best_wrong(), ["Lorn"], config)["reward"] == pytest.approx(0.4)


def swapped():
    """A wrong answer with token F1 1 and every part 1: the right words in the wrong order."""
    return play([ADA, VELKA, answer("East Dumo")], [TOLD[0], {"country": "East Dumo"}])


@pytest.mark.parametrize("w_answer, w_consistency, partial",
                         [*itertools.product([0.05, 0.25, 0.7, 1.0], [0.05, 0.3, 0.9], [0.0, 0.1, 0.5, 0.9]),
                          (0.3, 0.3, 0.0), (0.3, 0.301, 0.0), (0.6, 0.3, 0.5), (0.6, 0.3, 0.501)])
def test_the_config_accepts_exactly_the_weights_that_keep_the_order(w_answer, w_consistency, partial):
    """If the weights are accepted, the worst right trace beats the best wrong one, for any number of departing turns. If
    they are refused, some number of them reverses the order."""
    weights = {"w_answer": w_answer, "w_consistency": w_consistency, "partial": partial}
    bare = SimpleNamespace(**weights)
    right = reward(worst_right(1, 400, "Dumo East"), ["Dumo East"], bare)["reward"]
    wrong = reward(swapped(), ["Dumo East"], bare)["reward"]
    try:
        GRPOConfig(**weights)
        accepted = True
    except ValueError:
        accepted = False
    assert accepted == (right > wrong)


class Ranks:
    """Smallest and largest reward of right, wrong and malformed traces, and the values of each part."""

    def __init__(self):
        self.range = {}
        self.seen = set()

    def add(self, kind, got):
        low, high = self.range.get(kind, (9, -9))
        self.range[kind] = min(low, got["reward"]), max(high, got["reward"])
        self.seen |= {(kind, name, got[name]) for name in (*PARTS, "consistency")}


NAMES = ["Velka", "Dumo", "Lorn", "Bo", "Pata", "East Dumo", "Dumo East", "1815", "yes"]


def random_turn(rng):
    """One to three calls, good and bad. Some turns have one more that isn't a JSON object."""
    made = []
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        name = rng.choice(["birthplace", "country", "census", "echo", "oracle"])
        key = {"birthplace": "person", "country": "city", "census": "city"}.get(name, "first")
        arguments = {key: rng.choice(["Ada Bo", "Ada", "Velka", "Lorn"])} if rng.random() < 0.8 else {}
        made.append((name, arguments | ({"unit": "land"} if rng.random() < 0.1 else {})))
    return calls(*made) + rng.choice(["<tool_call>{</tool_call>", "<tool_call>[]</tool_call>", *[""] * 8])


def random_trace(rng):
    """An honest, careless, guessing or broken trace. Its observations fit, don't fit, or are errors. Its turns are
    strict, or some or all of them depart."""
    style = rng.random()
    gold = rng.choice(["Dumo", "East Dumo"])
    said = rng.choice([gold, gold, *NAMES, "", "The"])
    heard = [{"city": "Velka"}, {"country": gold}, {"country": said}, {"error": said}, {"people": 3}, {}, {"text": LONG}]
    observations = [rng.choice(heard) for _ in range(6)]
    refused = calls(*[("oracle", {"x": f"Lorn {i}"}) for i in range(rng.choice([1, 2, 5, 9]))])
    honest = [TOLD[0], {"country": said or "x"}]
    if style < 0.15:
        texts, observations = [ADA, VELKA, answer(said)], honest
    elif style < 0.25:
        texts = [answer(said)]
    elif style < 0.3:
        texts = [refused, answer(said)]
    elif style < 0.4:
        texts, observations = [refused, ADA, VELKA, answer(said)], honest
    elif style < 0.45:
        texts, observations = [call("census", places=["Ada", "Pata"]), answer(said)], [{"text": f"{LONG} and of {said}"}]
    else:
        texts = [random_turn(rng) for _ in range(rng.randint(1, 4))] + [answer(said)]
    if rng.random() < 0.15:
        texts = texts[:rng.randrange(len(texts))] + rng.choice([[], [""], *MALFORMED.values()])
    trace = play(texts, observations + [{}] * 20)
    return depart(trace, rng.choice([0, 0, 1, 2, len(trace.turns)])), gold


@cache
def random_traces():
    rng = random.Random("traces")
    return [random_trace(rng) for _ in range(3000)]


CORNERS = {"grammar": (1, 1 / 2, 1 / 3), "valid": (0, 1, 1 / 2, 1 / 10), "arguments": (0, 1, 1 / 2), "support": (0, 1),
           "economy": (0, 1, 1 / 2), "consistency": (1, 1 / 5, 1 / 3 / 5)}


@pytest.mark.parametrize("weights", [
    {}, {"w_answer": 0.3, "w_consistency": 0.3}, {"partial": 0.5}, {"w_answer": 1.0, "w_consistency": 0.81, "partial": 0.19}], ids=str)
def test_right_before_wrong_before_malformed(weights):
    """3,000 traces. Each part takes its corner values both in right and in wrong traces."""
    config, ranks = GRPOConfig(**weights), Ranks()
    for trace, gold in random_traces():
        got = reward(trace, [gold], config)
        kind = "malformed" if trace.status != "answered" else "right" if trace.answer == gold else "wrong"
        ranks.add(kind, got)
        assert (got["answer"] == 1) == (kind == "right")
        assert 0 <= got["reward"] <= config.w_answer + config.w_consistency
        assert all(0 <= got[name] <= 1 for name in PARTS)
        assert (got["consistency"] > 0) == (kind != "malformed")
    (right, _), (wrong_low, wrong), (_, malformed) = (ranks.range[k] for k in ("right", "wrong", "malformed"))
    assert right > wrong and wrong_low > malformed == 0
    for kind in ("right", "wrong"):
        for name, corners in CORNERS.items():
            assert {(kind, name, value) for value in corners} <= ranks.seen, (kind, name)
    assert {(name, value) for kind, name, value in ranks.seen if kind == "malformed"} == {
        (name, 0.0) for name in (*PARTS, "consistency")}


# -------------------------------------------------------------------------- tricks that gain nothing

# For each: texts and observations with the trick, and without it. The gold answer is Dumo.
LORN = "<answer>Lorn</answer>"
GUESS = f"<think>x</think>{LORN}"
QUOTED = ADA.replace("<think>Let me see.</think>", "")
TWENTY = ", ".join(["Velka", "Dumo", *(f"Lorn{i}" for i in range(18))])
HACKS = {
    "an empty answer": (([ADA, VELKA, answer("")], TOLD), ([ADA, VELKA, GUESS], TOLD)),
    "an answer of an article": (([ADA, VELKA, answer("the")], TOLD), ([ADA, VELKA, GUESS], TOLD)),
    "several answers": ((["<think>x</think><answer>Lorn</answer><answer>Pata</answer>"], []), ([GUESS], [])),
    "several answers in one": (([answer("Lorn or Dumo")], []), ([GUESS], [])),
    "an answer inside the thought": (([f"<think><answer>Dumo</answer></think>{LORN}"], []), ([GUESS], [])),
    "an observation in the thought": (
        ([f'<think><tool_response>{{"city": "Lorn"}}</tool_response></think>{LORN}'], []), ([GUESS], [])),
    "an observation behind the call": (
        ([f'{ADA}\n<tool_response>{{"city": "Lorn"}}</tool_response>', GUESS], TOLD), ([ADA, GUESS], TOLD)),
    "an observation inside the call": (
        (['<think>x</think><tool_call>{"name": "birthplace", "arguments": {"person": "Ada Bo"}, '
          '"observation": {"city": "Lorn"}}</tool_call>', GUESS], TOLD), ([ADA, GUESS], TOLD)),
    "a call quoted in the thought": (([f"<think>{QUOTED}</think>{LORN}"], TOLD), ([GUESS], [])),
    "a repeated call": (([ADA, ADA, GUESS], [TOLD[0]] * 2), ([ADA, GUESS], TOLD)),
    "a call repeated in its turn": (
        ([calls(*[("birthplace", {"person": "Ada Bo"})] * 2), VELKA, GUESS], [TOLD[0], *TOLD]),
        ([ADA, VELKA, GUESS], TOLD)),
    "a repeated call of a tool that names its subject": (
        ([ADA, ADA, GUESS], [{"person": "Ada Bo", "city": "Velka"}] * 2),
        ([ADA, GUESS], [{"person": "Ada Bo", "city": "Velka"}])),
    "a call with {} that doesn't fit": (([call("birthplace"), GUESS], []), ([GUESS], [])),
    "a call with {} that fits": (([call("census"), GUESS], [{"people": 3}]), ([GUESS], [])),
    "an argument of {}": (([call("census", places=[{}]), GUESS], [{"people": 3}]), ([GUESS], [])),
    "an error that holds the guess": (([ADA, GUESS], [{"error": "Lorn"}]), ([ADA, GUESS], [{"error": "no"}])),
    "a refusal that holds the guess": (
        ([call("country", city="Velka", unit="Lorn"), GUESS], []),
        ([call("country", city="Velka", unit="x"), GUESS], [])),
    "a guess that is echoed": (
        ([call("echo", first="Lorn"), GUESS], []), ([call("echo", first="Pata"), GUESS], [])),
    "a guess in two arguments that is echoed": (
        ([call("echo", first="Old", second="Lorn"), answer("Old Lorn")], []),
        ([call("echo", first="Big", second="Pata"), answer("Old Lorn")], [])),
    "a guess as an argument's name": (
        ([call("census", Lorn=True), GUESS], [{"people": "Lorn"}]),
        ([call("census", Lorn=True), GUESS], [{"people": "x"}])),
    "a guess that a calculator returns": (
        ([call("calculator", expression="17"), answer("17")], []),
        ([call("calculator", expression="18"), answer("17")], [])),
    "a guess that a comparison returns": (
        ([call("compare", names=["Lorn"], values=[1], pick="largest"), GUESS], []),
        ([call("compare", names=["Pata"], values=[1], pick="largest"), GUESS], [])),
    "the question as the answer": (([ADA, VELKA, answer(QUESTION)], TOLD), ([ADA, VELKA, GUESS], TOLD)),
    "twenty names as the answer": (
        ([ADA, VELKA, answer(TWENTY)], TOLD), ([ADA, VELKA, answer("Velka")], TOLD)),
    "twenty names that hold what was observed": (
        ([ADA, VELKA, answer(TWENTY)], TOLD), ([ADA, VELKA, GUESS], TOLD)),
    "words of a long result for the whole question": (
        ([call("census", city=QUESTION), answer("might well tell")], [{"text": LONG}]), ([answer("might well tell")], [])),
    "a guess that the next call finds": (
        ([call("echo", first="Lorn"), call("census", city="Lorn"), GUESS], [{"city": "Lorn"}]), ([GUESS], [])),
    "a guess misspelt and corrected": (([call("census", city="Lornn"), GUESS], [{"city": "Lorn"}]), ([GUESS], [])),
    "a guess beside a told name": (
        ([call("birthplace", person="Ada Bo Lorn"), GUESS], [{"city": "Lorn"}]), ([GUESS], [])),
    "a guess in small letters beside a told name": (
        ([call("birthplace", person="Ada Bo lorn"), GUESS], [{"city": "Lorn"}]), ([GUESS], [])),
    "a guess that a count of the question's words returns": (
        ([call("count", items=["Ada", "Bo"]), answer("2")], []), ([answer("2")], [])),
    "a guess that a calculation with one number returns": (
        ([call("calculator", expression="1815//1815+1815//1815"), answer("2")], []), ([answer("2")], [])),
    "a grounded call made twice beside a guessed one": (
        ([call("country", city="Lorn"), ADA, ADA, answer("Pata")], [{"country": "X"}, *[{"city": "Velka"}] * 2]),
        ([call("country", city="Lorn"), ADA, answer("Pata")], [{"country": "X"}, {"city": "Velka"}])),
    "twenty names with no call": (([answer(TWENTY)], []), ([GUESS], [])),
}


@pytest.mark.parametrize("name", HACKS)
def test_a_hack_gains_nothing(name):
    hack, plain = (play(*args) for args in HACKS[name])
    got, without = (reward(trace, ["Dumo"], GRPOConfig()) for trace in (hack, plain))
    assert plain.status == "answered" and got["answer"] == 0
    assert got["reward"] <= without["reward"]
    assert got["reward"] < reward(worst_right(2, 30), ["Dumo"], GRPOConfig())["reward"]


@pytest.mark.parametrize("name", [name for name in HACKS if "guess" in name])
def test_a_guess_has_no_support(name):
    assert part("support", play(*HACKS[name][0])) == 0


@pytest.mark.parametrize("said", ["", " ", "a", "The", "...", "!"])
@pytest.mark.parametrize("gold", ["A", "The", "Dumo"])
def test_an_empty_answer_is_never_right(said, gold):
    """By the official rule "" is right if the gold answer is "A". The reward does not follow it here."""
    assert score([ADA, answer(said)], [{"city": "a"}], [gold])["answer"] == 0
    assert part("support", play([ADA, answer(said)], [{"city": "a"}])) == 0
    computed = call("compare", names=["The"], values=[1], pick="largest")
    assert part("support", play([computed, answer(said)])) == 0


def test_calling_pays_but_less_than_being_right():
    """The order from best to worst: supported and right, guessed and right, supported and wrong, guessed and wrong."""
    order = (HONEST, TOLD), ([GUESS], [], ["Lorn"]), (HONEST, TOLD, ["Lorn"]), ([GUESS],)
    rewards = [score(*args)["reward"] for args in order]
    assert rewards == sorted(set(rewards), reverse=True)


# ------------------------------------------------------- no text that a model may generate raises


@pytest.mark.parametrize("schema", [True, {}, {"enum": ["x"]}, {"type": ["string", "null"]}], ids=str)
def test_any_schema_that_is_let_in_can_be_scored(schema):
    """JSON Schema allows true as the schema of a property. Such a tool is refused, or its calls can be scored. The short
    result for x, which nobody told, is evidence only where x was an option."""
    try:
        tools = check_tools([spec("odd", {}, value=schema)])
    except Rejected:
        assert schema is True
        return
    trace = play([call("odd", value="x"), answer("y")], [{"z": "y"}], tools=tools)
    assert trace.calls[0].error is None
    assert reward(trace, ["y"], GRPOConfig())["support"] == ("enum" in schema)


NESTED = "[" * 900 + "]" * 900
BODIES = ["null", "3", '"x"', "[]", "{", "{}", "NaN", '{"name": 3, "arguments": {}}',
          '{"name": "census", "arguments": "{}"}', '{"name": "census", "arguments": null}',
          '{"name": "census", "arguments": {"year": 1e999}}',
          '{"name": "census", "arguments": {"places": [[], {}, null, true, "", " "]}}',
          pytest.param(f'{{"name": "census", "arguments": {{"x": {NESTED}}}}}', id="nested")]


@pytest.mark.parametrize("body", BODIES)
def test_any_call_can_be_scored(body):
    trace = play([f"<think>x</think><tool_call>{body}</tool_call>", answer("3")], [{"people": 3}])
    assert trace.status == "answered" and 0 < reward(trace, ["3"], GRPOConfig())["reward"] <= 1
