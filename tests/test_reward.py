"""The composite reward: its order, each of its parts by hand, and what must gain nothing.

Every trace is built from the texts that a policy would say, read by the parser; calls are validated and
answered by a scripted backend."""
import itertools
import json
import random
from types import SimpleNamespace

import pytest

from agents import UTILITIES, Rejected, Trace, check_tools, parse_turn, run_calls
from grpo import GRPOConfig, reward, reward_arguments, reward_economy, reward_support, reward_valid

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


class Script:
    """Answers each call with the next of its observations; `echo` repeats what it is told."""

    def __init__(self, observations):
        self.observations = list(observations)

    def answer(self, requests):
        return [{"said": " ".join(str(v) for v in arguments.values())} if tool.name == "echo" else
                self.observations.pop(0) for tool, arguments in requests]


def play(texts, observations=(), question=QUESTION, tools=TOOLS):
    """The trace of a policy that says these texts, turn after turn, until it answers or is malformed."""
    trace, backend = Trace(question, tools), Script(observations)
    for text in texts:
        turn = parse_turn(text)
        trace.turns.append(turn)
        trace.status = "malformed" if turn.error else "open" if turn.answer is None else "answered"
        if trace.status != "open":
            return trace
        run_calls([trace], backend)
    trace.status = "truncated"
    return trace


def calls(*pairs):
    """A turn of calls, (name, arguments) each."""
    said = [json.dumps({"name": name, "arguments": arguments}) for name, arguments in pairs]
    return "<think>Let me see.</think>\n" + "\n".join(f"<tool_call>\n{body}\n</tool_call>" for body in said)


def call(name, **arguments):
    return calls((name, arguments))


def answer(text):
    return f"<think>Done.</think>\n<answer> {text}</answer>"


ADA, VELKA = call("birthplace", person="Ada Bo"), call("country", city="Velka")
TOLD = [{"city": "Velka"}, {"country": "Dumo"}]
HONEST = [ADA, VELKA, answer("Dumo")]


def score(texts, observations=(), golds=("Dumo",), config=GRPOConfig()):
    return reward(play(texts, observations), list(golds), config)


# -------------------------------------------------------------------------------------- parts by hand

# what is said, what is observed -> valid calls, arguments, support, economy
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
    "the answer was in the arguments": ([ADA, answer("Bo")], [{"city": "x", "of": "Ada Bo"}], (1, 1, 0, 0)),
}


@pytest.mark.parametrize("name", BY_HAND)
def test_parts_by_hand(name):
    texts, observations, expected = BY_HAND[name]
    trace = play(texts, observations)
    assert trace.status == "answered"
    got = reward_valid(trace), reward_arguments(trace), reward_support(trace), reward_economy(trace)
    assert got == pytest.approx(expected)
    applies = [1.0, *(value for value in expected if value is not None)]
    whole = reward(trace, ["no such answer"], GRPOConfig())
    assert [whole[part] for part in PARTS] == pytest.approx([1, *expected])
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


def test_what_a_calculator_makes_of_what_was_told():
    texts = [call("census"), call("calculator", expression="1815 - 12"), answer("1803")]
    trace = play(texts, [{"people": 12}])
    assert (reward_valid(trace), reward_support(trace), reward_economy(trace)) == (1, 1, 1)


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
def test_what_breaks_the_grammar_has_nothing(name):
    trace = play(MALFORMED[name], TOLD)
    assert trace.status == "malformed"
    got = reward(trace, ["Dumo"], GRPOConfig())
    assert (got["reward"], got["answer"], got["consistency"], got["grammar"]) == (0, 0, 0, 0)
    assert all(got[part] is None for part in PARTS[1:])


@pytest.mark.parametrize("texts", [[ADA], [ADA, VELKA]])
def test_a_trace_that_was_cut_off_has_nothing(texts):
    trace = play(texts, TOLD)
    assert trace.status == "truncated" and reward(trace, ["Dumo"], GRPOConfig())["reward"] == 0


# ----------------------------------------------------------------------------------------------- order


def worst_right(n, said="Dumo"):
    """All but the answer as bad as it gets: n calls that don't fit, their arguments from nowhere, a guess."""
    return play([calls(*[("birthplace", {"city": f"Lorn {i}"}) for i in range(n)]), answer(said)])


def best_wrong():
    """Wrong, though every part is 1."""
    return play(HONEST, TOLD[:1] + [{"country": "Dumo"}])


@pytest.mark.parametrize("n", [1, 2, 7, 50])
def test_the_ends_in_closed_form(n):
    """With floor = (1 + 1 / (1 + n)) / 5: worst right w_a + w_c floor, worst wrong w_c floor, best wrong
    w_a p F1 + w_c."""
    config = GRPOConfig(w_answer=0.8, w_consistency=0.4, partial=0.25)
    floor = (1 + 1 / (1 + n)) / 5
    assert reward(worst_right(n), ["Dumo"], config)["reward"] == pytest.approx(0.8 + 0.4 * floor)
    assert reward(worst_right(n), ["Lorn"], config)["reward"] == pytest.approx(0.4 * floor)
    assert reward(best_wrong(), ["Dumo East"], config)["reward"] == pytest.approx(0.8 * 0.25 * 2 / 3 + 0.4)
    assert reward(best_wrong(), ["Lorn"], config)["reward"] == pytest.approx(0.4)


def swapped():
    """Wrong with token F1 1 and every part 1: the right words in the wrong order."""
    return play([ADA, VELKA, answer("East Dumo")], [TOLD[0], {"country": "East Dumo"}])


@pytest.mark.parametrize("w_answer, w_consistency, partial",
                         [*itertools.product([0.05, 0.25, 0.7, 1.0], [0.05, 0.3, 0.9], [0.0, 0.1, 0.5, 0.9])])
def test_the_config_accepts_just_what_keeps_the_order(w_answer, w_consistency, partial):
    """Accepted: the worst right trace beats the best wrong one, whatever the number of bad calls. Refused:
    some number of bad calls turns them round."""
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
        self.range, self.seen = {}, set()

    def add(self, kind, got):
        low, high = self.range.get(kind, (9, -9))
        self.range[kind] = min(low, got["reward"]), max(high, got["reward"])
        self.seen |= {(kind, part, got[part]) for part in PARTS} | {(kind, "consistency", got["consistency"])}


NAMES = ["Velka", "Dumo", "Lorn", "Bo", "Pata", "East Dumo", "Dumo East", "1815"]


def random_turn(rng):
    """One to three calls, good and bad, or now and then what isn't a call at all."""
    made = []
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        name = rng.choice(["birthplace", "country", "census", "echo", "oracle"])
        key = {"birthplace": "person", "country": "city", "census": "city"}.get(name, "first")
        arguments = {key: rng.choice(["Ada Bo", "Ada", "Velka", "Lorn"])} if rng.random() < 0.8 else {}
        made.append((name, arguments | ({"unit": "land"} if rng.random() < 0.1 else {})))
    return calls(*made) + rng.choice(["<tool_call>{</tool_call>", "<tool_call>[]</tool_call>", *[""] * 8])


def random_trace(rng):
    """Honest, careless, guessing or broken, with observations that fit, don't, or are errors."""
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
    """3,000 traces. Every part takes its corner values among the right and among the wrong ones."""
    config, ranks, rng = GRPOConfig(**weights), Ranks(), random.Random("traces")
    for n in range(3000):
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
        for part, corners in CORNERS.items():
            assert {(kind, part, value) for value in corners} <= ranks.seen, (kind, part)
    assert ("malformed", "grammar", 0) in ranks.seen


# --------------------------------------------------------------------------------- what gains nothing

# Each: what is said and observed, and the same without the trick. The gold answer is Dumo.
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
    assert reward_support(play(*HACKS[name][0])) == 0


@pytest.mark.parametrize("said", ["", " ", "a", "The", "...", "!"])
@pytest.mark.parametrize("gold", ["A", "The", "Dumo"])
def test_an_empty_answer_is_never_right(said, gold):
    """The official rule calls "" right where the gold answer is "A"; the reward doesn't."""
    assert score([ADA, answer(said)], [{"city": "a"}], [gold])["answer"] == 0
    assert reward_support(play([ADA, answer(said)], [{"city": "a"}])) == 0
    computed = call("compare", names=["The"], values=[1], pick="largest")
    assert reward_support(play([computed, answer(said)])) == 0


def test_calling_pays_but_less_than_being_right():
    """The wanted order: supported and right, guessed and right, supported and wrong, guessed and wrong."""
    order = (HONEST, TOLD), ([GUESS], [], ["Lorn"]), (HONEST, TOLD, ["Lorn"]), ([GUESS],)
    rewards = [score(*args)["reward"] for args in order]
    assert rewards == sorted(set(rewards), reverse=True)


# --------------------------------------------------------------------- what a model may write must not raise


@pytest.mark.parametrize("schema", [True, {}, {"enum": ["x"]}, {"type": ["string", "null"]}], ids=str)
def test_any_schema_that_is_let_in_can_be_scored(schema):
    """JSON Schema allows true where a property's schema stands: refuse it, or score what comes of it."""
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
