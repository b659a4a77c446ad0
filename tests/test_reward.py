"""The composite reward: the order of its values, each of its parts by hand, and tricks that must gain nothing.

Every trace is built from the texts that a policy would generate. The parser reads them, calls are validated, and a
scripted backend answers."""
import itertools
import json
import random
from types import SimpleNamespace

import pytest

import grpo
from agents import UTILITIES, Trace, check_tools, parse_turn, run_calls
from data.schema import Rejected
from grpo import GRPOConfig, collect_evidence, reward

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


ADA, VELKA = call("birthplace", person="Ada Bo"), call("country", city="Velka")
TOLD = [{"city": "Velka"}, {"country": "Dumo"}]
HONEST = [ADA, VELKA, answer("Dumo")]


def score(texts, observations=(), golds=("Dumo",), config=None):
    return reward(play(texts, observations), list(golds), config or GRPOConfig())


# -------------------------------------------------------------------------------------- parts by hand

# texts of the turns, observations -> valid, arguments, support, economy
BY_HAND = {
    "all of use": (HONEST, TOLD, (1, 1, 1, 1)),
    "no call": ([answer("Dumo")], [], (None, None, 0, None)),
    "one unknown tool": ([call("oracle", person="Ada Bo"), *HONEST], TOLD, (1 / 2, 1, 1, 2 / 3)),
    "not JSON": (["<think>x</think><tool_call>{</tool_call>", *HONEST], TOLD, (1 / 2, 1, 1, 2 / 3)),
    "two that don't fit": ([calls(("birthplace", {}), ("birthplace", {"person": 3})), *HONEST], TOLD,
                           (1 / 3, 2 / 3, 1, 1 / 2)),
    "only one that isn't JSON": (
        ["<think>x</think><tool_call>[</tool_call>", answer("Dumo")], [], (1 / 2, None, 0, 0)),
    "an argument from nowhere": (
        [ADA, call("country", city="Lorn"), answer("Dumo")], TOLD, (1, 1 / 2, 1, 1 / 2)),
    "first tool not needed": ([ADA, call("country", city="1815"), answer("Dumo")], TOLD, (1, 1, 1, 1 / 2)),
    "used as an argument alone": ([ADA, VELKA, answer("Lorn")], TOLD, (1, 1, 0, 1 / 2)),
    "nothing used": ([ADA, answer("Lorn")], TOLD, (1, 1, 0, 0)),
    "an observation of the same turn is not earlier": (
        [calls(("birthplace", {"person": "Ada Bo"}), ("country", {"city": "Velka"})), answer("Dumo")], TOLD,
        (1, 1 / 2, 1, 1 / 2)),
    "an enum and a boolean need no ground": (
        [ADA, call("country", city="Velka", unit="land", sure=True), answer("Dumo")], TOLD, (1, 1, 1, 1)),
    "nothing to ground": ([call("census"), answer("12")], [{"people": 12}], (1, None, 1, 1)),
    "an enum alone": ([call("country", unit="land"), answer("12")], [], (1 / 2, None, 0, 0)),
    "a number of the question": ([call("census", year=1815), answer("12")], [{"people": 12}], (1, 1, 1, 1)),
    "a number from nowhere": ([call("census", year=1816), answer("12")], [{"people": 12}], (1, 0, 1, 1)),
    "a list, half of it grounded": (
        [call("census", places=["Ada", ["Lorn"]]), answer("12")], [{"people": 12}], (1, 1 / 2, 1, 1)),
    "only whole words are ground": ([call("census", city="Ad"), answer("2")], [{"people": 12}], (1, 0, 0, 0)),
    "the scorer's normaliser": (
        [call("birthplace", person="the ADA BO!"), call("country", city="velka."), answer("A Dumo")], TOLD,
        (1, 1, 1, 1)),
    "an argument of an article": ([call("census", city="The"), answer("12")], [{"people": 12}], (1, 0, 1, 1)),
    "part of what was told": (HONEST, [{"city": "old Velka"}, {"country": "south of Dumo"}], (1, 1, 1, 0)),
    "deep in the observation": (HONEST, [TOLD[0], {"a": [{"b": ["x", "Dumo"]}]}], (1, 1, 1, 1)),
    "true and null are no evidence": (
        [call("census"), answer("true")], [{"people": True, "x": None}], (1, None, 0, 0)),
    "an error is no evidence": (HONEST, [{"error": "Velka"}, TOLD[1]], (1, 1 / 2, 1, 1 / 2)),
    "compared": (
        [call("census"), call("compare", names=["Ada", "Bo"], values=[1815, 12], pick="largest"),
         answer("Ada")], [{"people": 12}], (1, 1, 1, 1)),
    "a utility that failed": ([call("calculator", expression="Ada"), answer("Ada")], [], (1, 1, 0, 0)),
    "made twice": ([ADA, ADA, VELKA, answer("Dumo")], [TOLD[0], *TOLD], (1, 1, 1, 2 / 3)),
    "made twice in one turn": (
        [calls(*[("birthplace", {"person": "Ada Bo"})] * 2), VELKA, answer("Dumo")], [TOLD[0], *TOLD],
        (1, 1, 1, 2 / 3)),
    "the only later use is a repeated call": (
        [VELKA, ADA, VELKA, answer("Lorn")], [TOLD[1], *TOLD], (1, 1 / 2, 0, 0)),
    "the answer was in the arguments": ([ADA, answer("Bo")], [{"city": "x", "of": "Ada Bo"}], (1, 1, 0, 0)),
}


@pytest.mark.parametrize("name", BY_HAND)
def test_parts_by_hand(name):
    texts, observations, expected = BY_HAND[name]
    trace = play(texts, observations)
    assert trace.status == "answered"
    assert list(grpo.PARTS) == list(PARTS)
    assert [part(name, trace) for name in PARTS] == pytest.approx([1, *expected])
    applies = [1.0, *(value for value in expected if value is not None)]
    whole = reward(trace, ["no such answer"], GRPOConfig())
    assert [whole[name] for name in PARTS] == pytest.approx([1, *expected])
    assert whole["consistency"] == pytest.approx(sum(applies) / len(applies))
    assert whole["answer"] == 0 and whole["reward"] == pytest.approx(0.3 * whole["consistency"])


@pytest.mark.parametrize("said, golds, partial, expected", [
    ("Dumo", ["Dumo"], 0.0, 1.0), ("the dumo.", ["Lorn", "Dumo"], 0.0, 1.0), ("Lorn", ["Dumo"], 0.0, 0.0),
    ("old Dumo", ["Dumo"], 0.0, 0.0), ("old Dumo", ["Dumo"], 0.3, 0.3 * 2 / 3),
    ("Dumo old", ["old Dumo"], 0.3, 0.3), ("Dumo", ["Dumo"], 0.3, 1.0), ("yes it is", ["yes"], 0.3, 0.0),
])
def test_answer_by_hand(said, golds, partial, expected):
    config = GRPOConfig(partial=partial)
    got = score([ADA, VELKA, answer(said)], TOLD, golds, config)
    assert got["answer"] == pytest.approx(expected)
    assert got["reward"] == pytest.approx(0.7 * expected + 0.3 * got["consistency"])


def test_evidence_by_hand():
    """Two turns of two calls. The second turn repeats a call of the first, with its arguments in another order."""
    trace = play([
        calls(("birthplace", {"person": "Ada Bo"}), ("country", {"city": "Velka", "unit": "land"})),
        calls(("country", {"unit": "land", "city": "Velka"}), ("calculator", {"expression": "1815 - 12"})),
        calls(("oracle", {}), ("country", {"unit": "land", "city": "Velka", "sure": True})), answer("x")],
        [{"city": "Velka", "of": "Ada"}, {"country": "Dumo", "people": 12}, {"country": "Dumo", "people": 12},
         {"error": "Pata"}])
    got = collect_evidence(trace)
    assert [e.call for e in got] == trace.calls and [e.turn for e in got] == [0, 0, 1, 1, 2, 2]
    assert [e.repeated for e in got] == [False, False, True, False, False, False]
    # Velka comes from an observation of turn 0, so it is grounded from turn 1 on. unit is an enum, sure a boolean.
    assert [e.grounded for e in got] == [[True], [False], [True], [True], [], [True]]
    assert [e.values for e in got] == [["Velka", "Ada"], ["Dumo", 12], ["Dumo", 12], [1803], [], []]
    assert [e.new for e in got] == [["Velka"], ["Dumo", 12], ["Dumo", 12], [1803], [], []]
    assert [e.own for e in got[:4]] == [{"ada", "bo", "person"}, {"velka", "land", "city", "unit"},
                                        {"velka", "land", "city", "unit"}, {"1815", "12", "expression"}]
    assert got[4].own == set() and got[5].own == {"velka", "land", "city", "unit", "sure"}


@pytest.mark.parametrize("expression, grounded, new", [("1815 * 1", [False], []), ("1815 * 1815 / 1815", [True], [1815.0])])
def test_a_result_of_grounded_arguments_is_new_even_if_it_equals_one(expression, grounded, new):
    evidence, = collect_evidence(play([call("calculator", expression=expression), answer("x")]))
    assert (evidence.grounded, evidence.new) == (grounded, new)


@pytest.mark.parametrize("value, sources, expected", [
    ("Velka", ["old Velka."], True), ("Vel", ["Velka"], False), ("the VELKA", ["velka"], True), ("", [""], False),
    ("...", ["..."], False), (12, ["12 people"], True), (1, ["12"], False), ("12", [12], True),
    ("1 + 2", ["1", 2], True), ("1 + 3", ["1", "2"], False), ("(1.5 - 2)", ["from 1.5", "to 2"], True),
    ("x1", ["1"], False), ("1 é", ["1"], False), ("+ -", ["1"], False), ("1", [], False)])
def test_in_sources_by_hand(value, sources, expected):
    assert grpo.in_sources(value, sources) is expected


def test_values_and_words_by_hand():
    assert grpo.leaves({"a": [1, True, None, {"b": "x"}], "c": 2.5, "d": [[], {}]}) == [1, "x", 2.5]
    assert grpo.words("The U.S.", 12, "us co-op") == {"us", "12", "coop"} and grpo.words() == set()
    assert grpo.same("The Bo.", "bo") and grpo.same(1, "1") and not grpo.same("bo", "bo b")
    assert not grpo.same("", "") and not grpo.same("a", "The")
    assert grpo.holds("in old Velka!", "the old velka") and grpo.holds(1815, "1815")
    assert not grpo.holds("Velkas", "Velka") and not grpo.holds("a b", "a") and not grpo.holds("x", "")


def test_a_calculators_result_from_an_observation_is_support():
    texts = [call("census"), call("calculator", expression="1815 - 12"), answer("1803")]
    trace = play(texts, [{"people": 12}])
    assert [part(name, trace) for name in ("valid", "support", "economy")] == [1, 1, 1]


MALFORMED = {
    "no thought": ["<answer>Dumo</answer>"],
    "nothing": [""],
    "thought alone": ["<think>Dumo</think>"],
    "two answers": ["<think>x</think><answer>Dumo</answer><answer>Dumo</answer>"],
    "a thought after the answer": ["<think>x</think><answer>Dumo</answer><think>y</think>"],
    "text after the answer": ["<think>x</think><answer>Dumo</answer> I am sure."],
    "a call and an answer": [f"{ADA}<answer>Dumo</answer>"],
    "an answer in an answer": ["<think>x</think><answer><answer>Dumo</answer></answer>"],
    "an answer that isn't closed": ["<think>x</think><answer>Dumo"],
    "a thought that isn't closed": ["<think>x<answer>Dumo</answer>"],
    "nested thoughts": ["<think>x<think>y</think></think><answer>Dumo</answer>"],
    "after an honest start": [ADA, VELKA, "Dumo"],
}


@pytest.mark.parametrize("name", MALFORMED)
def test_a_malformed_trace_has_no_reward(name):
    trace = play(MALFORMED[name], TOLD)
    assert trace.status == "malformed"
    got = reward(trace, ["Dumo"], GRPOConfig())
    assert (got["reward"], got["answer"], got["consistency"], got["grammar"]) == (0, 0, 0, 0)
    assert all(got[name] is None for name in PARTS[1:])


@pytest.mark.parametrize("texts", [[ADA], [ADA, VELKA]])
def test_a_truncated_trace_has_no_reward(texts):
    trace = play(texts, TOLD)
    assert trace.status == "truncated" and reward(trace, ["Dumo"], GRPOConfig())["reward"] == 0


# ----------------------------------------------------------------------------------------------- order


def worst_right(n, said="Dumo"):
    """A right answer with the lowest consistency: n refused calls, no argument grounded, a guess."""
    return play([calls(*[("birthplace", {"city": f"Lorn {i}"}) for i in range(n)]), answer(said)])


def best_wrong():
    """A wrong answer with every part 1."""
    return play(HONEST, TOLD[:1] + [{"country": "Dumo"}])


@pytest.mark.parametrize("n", [1, 2, 7, 50])
def test_the_ends_in_closed_form(n):
    """With floor = (1 + 1 / (1 + n)) / 5, the rewards are w_a + w_c floor for the worst right trace, w_c floor for
    the worst wrong one, and w_a p F1 + w_c for the best wrong one."""
    config = GRPOConfig(w_answer=0.8, w_consistency=0.4, partial=0.25)
    floor = (1 + 1 / (1 + n)) / 5
    assert reward(worst_right(n), ["Dumo"], config)["reward"] == pytest.approx(0.8 + 0.4 * floor)
    assert reward(worst_right(n), ["Lorn"], config)["reward"] == pytest.approx(0.4 * floor)
    assert reward(best_wrong(), ["Dumo East"], config)["reward"] == pytest.approx(0.8 * 0.25 * 2 / 3 + 0.4)
    assert reward(best_wrong(), ["Lorn"], config)["reward"] == pytest.approx(0.4)


def swapped():
    """A wrong answer with token F1 1 and every part 1: the right words in the wrong order."""
    return play([ADA, VELKA, answer("East Dumo")], [TOLD[0], {"country": "East Dumo"}])


@pytest.mark.parametrize("w_answer, w_consistency, partial",
                         [*itertools.product([0.05, 0.25, 0.7, 1.0], [0.05, 0.3, 0.9], [0.0, 0.1, 0.5, 0.9])])
def test_the_config_accepts_exactly_the_weights_that_keep_the_order(w_answer, w_consistency, partial):
    """If the weights are accepted, the worst right trace beats the best wrong one, for any number of bad calls. If
    they are refused, some number of bad calls reverses the order."""
    weights = {"w_answer": w_answer, "w_consistency": w_consistency, "partial": partial}
    bare = SimpleNamespace(**weights)
    right = reward(worst_right(400, "Dumo East"), ["Dumo East"], bare)["reward"]
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


NAMES = ["Velka", "Dumo", "Lorn", "Bo", "Pata", "East Dumo", "Dumo East", "1815"]


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
    """An honest, careless, guessing or broken trace. Its observations fit, don't fit, or are errors."""
    style = rng.random()
    gold = rng.choice(["Dumo", "East Dumo"])
    said = rng.choice([gold, gold, *NAMES, "", "The"])
    heard = [{"city": "Velka"}, {"country": gold}, {"country": said}, {"error": said}, {"people": 3}, {}]
    observations = [rng.choice(heard) for _ in range(6)]
    if style < 0.15:
        texts, observations = [ADA, VELKA, answer(said)], [{"city": "Velka"}, {"country": said or "x"}]
    elif style < 0.25:
        texts = [answer(said)]
    elif style < 0.3:
        texts = [calls(*[("oracle", {"x": f"Lorn {i}"}) for i in range(rng.randint(1, 9))]), answer(said)]
    else:
        texts = [random_turn(rng) for _ in range(rng.randint(1, 4))] + [answer(said)]
    if rng.random() < 0.15:
        texts = texts[:rng.randrange(len(texts))] + rng.choice([[], [""], *MALFORMED.values()])
    return play(texts, observations + [{}] * 20), gold


CORNERS = {"valid": (None, 1, 1 / 2, 1 / 10), "arguments": (None, 0, 1, 1 / 2), "support": (0, 1),
           "economy": (None, 0, 1, 1 / 2), "consistency": (1, (1 + 1 / 10) / 5)}


@pytest.mark.parametrize("weights", [
    {}, {"w_answer": 0.2401, "w_consistency": 0.3}, {"partial": 0.5},
    {"w_answer": 1.0, "w_consistency": 1.0, "partial": 0.19}], ids=str)
def test_right_before_wrong_before_malformed(weights):
    """3,000 traces. Each part takes its corner values both in right and in wrong traces."""
    config, ranks, rng = GRPOConfig(**weights), Ranks(), random.Random("traces")
    for _ in range(3000):
        trace, gold = random_trace(rng)
        got = reward(trace, [gold], config)
        kind = "malformed" if trace.status != "answered" else "right" if trace.answer == gold else "wrong"
        ranks.add(kind, got)
        assert (got["answer"] == 1) == (kind == "right")
        assert 0 <= got["reward"] <= config.w_answer + config.w_consistency
        assert (got["consistency"] > 0) == (kind != "malformed")
    (right, _), (wrong_low, wrong), (_, malformed) = (ranks.range[k] for k in ("right", "wrong", "malformed"))
    assert right > wrong and wrong_low > malformed == 0
    for kind in ("right", "wrong"):
        for name, corners in CORNERS.items():
            assert {(kind, name, value) for value in corners} <= ranks.seen, (kind, name)
    assert ("malformed", "grammar", 0) in ranks.seen


# -------------------------------------------------------------------------- tricks that gain nothing

# For each: texts and observations with the trick, and without it. The gold answer is Dumo.
LORN = "<answer>Lorn</answer>"
GUESS = f"<think>x</think>{LORN}"
QUOTED = ADA.replace("<think>Let me see.</think>", "")
TWENTY = ", ".join(["Velka", "Dumo", *(f"Lorn{i}" for i in range(18))])
HACKS = {
    "an empty answer": (([ADA, VELKA, answer("")], TOLD), ([ADA, VELKA, GUESS], TOLD)),
    "an answer of an article": (([ADA, VELKA, answer("the")], TOLD), ([ADA, VELKA, GUESS], TOLD)),
    "several answers": ((["<think>x</think><answer>Lorn</answer><answer>Dumo</answer>"], []), ([GUESS], [])),
    "several answers in one": (([answer("Lorn or Dumo")], []), ([GUESS], [])),
    "an answer inside the thought": (([f"<think><answer>Dumo</answer></think>{LORN}"], []), ([GUESS], [])),
    "an answer inside the thought alone": ((["<think><answer>Dumo</answer></think>"], []), ([GUESS], [])),
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
    assert got["reward"] < reward(worst_right(1000), ["Dumo"], GRPOConfig())["reward"]


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
    """JSON Schema allows true as the schema of a property. Such a tool is refused, or its calls can be scored."""
    try:
        tools = check_tools([spec("odd", {}, value=schema)])
    except Rejected:
        assert schema is True
        return
    trace = play([call("odd", value="x"), answer("y")], [{"z": "y"}], tools=tools)
    assert trace.calls[0].error is None
    assert reward(trace, ["y"], GRPOConfig())["support"] == 1


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
