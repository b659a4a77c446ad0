"""Questions and scores against the official rules, against walks through the facts, and against counts.

The scoring table is worked out by hand from hotpot_evaluate_v1.py.
"""
import doctest
import importlib
import json
import random
from collections import Counter
from pathlib import Path

import pytest

import agents
import sft
from data import InputError, chat
from data.own import check_question, examples, unknown_words
from data.schema import first_error
from data.score import exact_match, f1, normalize
from data.tools import real
from data.world import (
    HELD_OUT,
    INFERENCE,
    REJECTIONS,
    RELATIONS,
    SILLY,
    SIZES,
    imagine,
    imagined_questions,
    make_questions,
    make_world,
    mixed,
    nonsense,
    teach_actor,
    teach_agent,
    teach_maker,
    tool_for,
    tools_for,
    unknown,
)

ROOT = Path(__file__).resolve().parents[1]
MODULES = [".".join(path.relative_to(ROOT).with_suffix("").parts)
           for path in sorted([*ROOT.glob("*.py"), *ROOT.glob("data/*.py")])
           if path.name != "__init__.py"]
SEEDS = range(4)


def test_all_examples_in_docstrings_run():
    results = {name: doctest.testmod(importlib.import_module(name)) for name in MODULES}
    assert {"agents", "model", "sft", "grpo", "mtr", "data.score", "data.world", "data.tools",
            "data.schema", "data.own", "run", "evaluate", "report"} <= set(results)
    assert not any(result.failed for result in results.values()), results
    for name in ("data.guard", "data.own", "data.schema", "data.score", "data.utilities", "data.world"):
        assert results[name].attempted, name


# ---------------------------------------------------------------------------------------------- scores


@pytest.mark.parametrize("text, normal", [  # lower, drop ASCII punctuation, articles to spaces, squeeze
    ("Velka", "velka"), ("  The   City of\tVelka\n", "city of velka"), ("U.S.", "us"), ("U.S.A.", "usa"),
                                            ("co-op", "coop"),
    ("The Who", "who"), ("The The", ""), ("A", ""), ("An", ""), ("the", ""), ("A.", ""), ("", ""),
                                            ("...", ""), ("1,000", "1000"),
    ("$1,000.50", "100050"), ("“x”", "“x”"), ("it’s", "it’s"), ("it's", "its"), ("2000–01", "2000–01"),
                                            ("2000-01", "200001"),
    ("theatre", "theatre"), ("a-ha", "aha"), ("Ann and the man", "ann and man"), ("AC/DC", "acdc"),
                                            ("Éa the é", "éa é"), ("a_b", "ab"),
    ("vitamin A", "vitamin"), ("no", "no"), ("an “a”", "“ ”"),
])
def test_normalize(text, normal):
    assert normalize(text) == normal


@pytest.mark.parametrize("prediction, golds, em, f", [
    ("Velka", ["Velka"], 1, 1), ("velka.", ["Velka"], 1, 1), ("the Velka", ["Velka"], 1, 1),
    ("Doka", ["Velka"], 0, 0),
    ("the city of Velka", ["Velka"], 0, 2 * 1 / (3 + 1)), ("Velka", ["the city of Velka"], 0, 2 / 4),
    ("U.S.", ["us"], 1, 1), ("U S", ["U.S."], 0, 0), ("coop", ["co-op"], 1, 1), ("co op", ["co-op"], 0, 0),
    ("Who", ["The Who"], 1, 1), ("1000", ["1,000"], 1, 1), ("1 000", ["1,000"], 0, 0), ('"x"', ["x"], 1, 1),
    ("“x”", ["x"], 0, 0),
    ("", ["Velka"], 0, 0), ("Velka", [""], 0, 0), ("", [""], 1, 0), ("", ["A"], 1, 0),
    ("The", ["A"], 1, 0),  # 0 in HotpotQA
    ("yes", ["yes"], 1, 1), ("Yes.", ["yes"], 1, 1), ("yes it is", ["yes"], 0, 0), ("no", ["yes"], 0, 0),
    ("yes", ["yes it is"], 0, 0), ("no", ["no way"], 0, 0), ("noanswer", ["noanswer"], 1, 1),
    ("no answer", ["noanswer"], 0, 0),
    ("noanswer", ["Velka"], 0, 0), ("say yes now", ["yes sir now"], 0,
                                    2 * 2 / 6),  # the rule is of whole answers only
    ("a a b b", ["b b c"], 0, 2 * 2 / (2 + 3)), ("x x x", ["x"], 0, 2 / 4), ("x", ["x x x"], 0, 2 / 4),
    ("x y", ["y x"], 0, 1),
    ("Bo", ["Ada", "Bo"], 1, 1), ("Bo of Velka", ["Ada", "Bo", "Bo Velka"], 0, 2 * 2 / (3 + 2)),
    ("yes it is", ["yes", "it is so"], 0, 2 * 2 / 6),  # aliases one by one
    ("x y z", ["x y", "z"], 0, 2 * 2 / 5), ("yes no", ["yes"], 0, 0),
    ("Ada Bo Cy", ["Bo"], 0, 0.5),  # no cover match
])
def test_scores_by_the_official_rules(prediction, golds, em, f):
    assert exact_match(prediction, golds) == em and isinstance(exact_match(prediction, golds), float)
    assert f1(prediction, golds) == pytest.approx(f)


# ----------------------------------------------------------------------------------------------- world


@pytest.fixture(scope="module", params=SEEDS)
def made(request):
    """A world, its training questions, its held-out questions."""
    world = make_world(request.param)
    questions = make_questions(world)
    return world, [q for q in questions if q.set == "train"], [q for q in questions if q.set != "train"]


def test_the_same_seed_makes_the_same_world():
    for seed in (0, 3):
        one, two = make_world(seed), make_world(seed)
        assert one.names == two.names and one.facts == two.facts
        assert make_questions(one) == make_questions(two)
        held_out = [q for q in make_questions(one) if q.set in HELD_OUT]
        assert imagined_questions(one, 1, held_out)[1] == imagined_questions(two, 1, held_out)[1]
    assert make_world(0).facts != make_world(1).facts and make_world(0).names != make_world(1).names


def test_the_world_is_whole(made):
    """Every subject has its facts, of the right kind; only the eldest lack father and teacher."""
    world = made[0]
    assert {kind: len(names) for kind, names in world.names.items()} == SIZES
    everyone = [name for names in world.names.values() for name in names]
    assert len(set(everyone)) == len(everyone) and all(normalize(name) == name.lower() for name in everyone)
    for (relation, subject), value in world.facts.items():
        kind, of, _ = RELATIONS[relation]
        assert subject in world.names[kind]
        assert value in "123456789" if of == "number" else value in world.names[of]
    for relation, (kind, _, _) in RELATIONS.items():
        lacking = [s for s in world.names[kind] if (relation, s) not in world.facts]
        assert len(lacking) == (8 if relation in ("father", "teacher") else 0)


def test_the_world_makes_sense(made):
    facts = made[0].facts
    for (relation, subject), value in facts.items():
        if relation == "spouse":
            assert facts["spouse", value] == subject != value
        if relation in ("father", "teacher"):  # three steps up at most: nobody is their own ancestor
            elders = {value}
            for _ in range(3):
                elders = {facts[up, e] for e in elders for up in ("father", "teacher") if (up, e) in facts}
            assert not elders
        if relation == "capital":
            assert facts["country", value] == subject


def answer_of(text, facts):
    """A question's answer, found by reading its text, and the facts that were looked up."""
    said = {"grandfather": ("father", "father"), "father-in-law": ("spouse", "father"),
            "boss": ("employer", "founder"),
            "native language": ("birthplace", "country", "language"),
            "home currency": ("birthplace", "country", "currency")}
    words = text.removesuffix("?").split(" ")
    if words[0] == "Of":
        a, b, relation, word = words[1], words[3].removesuffix(","), words[5], words[7]
        assert words == ["Of", a, "and", f"{b},", "whose", relation, "is", {"score": "largest", "size": "smallest"}[relation]]
        values = {name: facts[relation, name] for name in (a, b)}
        assert values[a] != values[b]
        return {"largest": max, "smallest": min}[word](values, key=values.get), [(relation, a), (relation, b)]
    assert words[:3] in (["Who", "is", "the"], ["What", "is", "the"])
    *chain, subject = " ".join(words[3:]).split(" of the ")
    last, subject = subject.split(" of ")
    steps = []
    for part in [last, *reversed(chain)]:
        for relation in said.get(part, (part.replace(" ", "_"),)):
            steps.append((relation, subject))
            subject = str(facts[relation, subject])
    assert words[0] == ("Who" if RELATIONS[steps[-1][0]][1] == "person" else "What")
    return subject, steps


def test_golds_are_true_in_the_world(made):
    """Every question is read and walked through the facts once more."""
    world, train, held_out = made
    for q in [*train, *held_out]:
        answer, steps = answer_of(q.text, world.facts)
        assert q.golds == [answer] and q.steps == steps
        if q.kind == "comparison":
            assert q.chain == tuple(sorted(s for _, s in steps))
        else:
            assert q.chain == (*(s for _, s in steps), answer) and len(set(q.chain)) == len(q.chain)


def test_golds_of_an_imagined_world_are_true_in_it(made):
    other, questions = imagined_questions(made[0], 0, made[2])
    assert len(questions) > 1000
    for q in questions:
        assert (q.golds[0], q.steps) == answer_of(q.text, other.facts)


def test_sets_are_of_the_stated_size_and_make(made):
    _, train, held_out = made
    assert Counter(q.set for q in held_out) == dict.fromkeys(HELD_OUT, 50) and len(train) > 1000
    hops = {name: Counter(q.kind if q.kind == "comparison" else (q.kind, len(q.steps)) for q in held_out
                          if q.set == name)
            for name in HELD_OUT}
    assert hops["hotpot"] == {("composition", 2): 40, "comparison": 10}
    assert hops["musique"] == {("composition", 2): 16, ("composition", 3): 16, ("composition", 4): 18}
    assert hops["bamboogle"] == {("composition", 3): 50}
    assert hops["2wiki"]["comparison"] == 12
    assert hops["2wiki"][("inference", 2)] + hops["2wiki"][("inference", 3)] == 12
    assert all(q.kind in agents.KINDS for q in [*train, *held_out])


def test_every_question_has_an_id_of_its_own(made):
    """Tools are kept, and random numbers drawn, by the id."""
    twice = [i for i, n in Counter(q.id for q in made[1] + made[2]).items() if n > 1]
    assert not twice, f"{len(twice)} ids name several questions: {twice[:3]}"


def test_other_sizes_keep_their_promise():
    for each in (1, 7, 20):
        assert Counter(q.set for q in make_questions(make_world(0), each)
                       if q.set != "train") == dict.fromkeys(HELD_OUT, each)


def test_no_answer_is_common(made):
    """The majority answer, of the training set or of the held-out sets themselves: right in at most 5 %."""
    _, train, held_out = made
    answers = {Counter(q.golds[0] for q in part).most_common(1)[0][0] for part in (train, held_out)}
    for answer in answers:
        assert sum(exact_match(answer, q.golds) for q in held_out) / len(held_out) <= 0.05


def parts(chain):
    return {chain[i:j] for i in range(len(chain)) for j in range(i + 1, len(chain) + 1)}


@pytest.mark.parametrize("number", [None, 0, 1, 2])
def test_no_held_out_question_stands_in_training(made, number):
    """Neither its text nor its chain of entities, whole or in a longer one; in no imagined world either."""
    world, train, held_out = made
    questions = train if number is None else imagined_questions(world, number, held_out)[1]
    chains = {q.chain for q in held_out}
    assert not {q.text for q in held_out} & {q.text for q in questions}
    assert not any(chains & parts(q.chain) for q in questions)


def test_held_out_questions_differ(made):
    texts = [q.text for q in made[2]]
    assert len(set(texts)) == len(texts) and len({q.text for q in made[1]}) == len(made[1])


def triples(question):
    relations = [relation for relation, _ in question.steps]
    return set() if question.kind == "comparison" else set(zip(relations, relations[1:], relations[2:], strict=False))


def test_bamboogle_asks_for_paths_that_training_never_takes(made):
    world, train, held_out = made
    unseen = {path for q in held_out if q.set == "bamboogle" for path in triples(q)}
    assert 6 <= len(unseen) <= 12
    known = {path for number in range(3) for q in imagined_questions(world, number, held_out)[1]
             for path in triples(q)}
    known |= {path for q in [*train, *(q for q in held_out if q.set != "bamboogle")] for path in triples(q)}
    assert not unseen & known
    assert not {pair for path in unseen | known for pair in (path[:2], path[1:])} & SILLY
    relations = {relation for q in train for relation, _ in q.steps}
    assert {relation for path in unseen for relation in path} <= relations


def test_nobody_is_asked_where_he_came_from(made):
    """A chain that turns back on itself is no question."""
    assert all(len(set(q.chain)) == len(q.chain) for q in made[1] + made[2])


def test_imagine_keeps_the_names_and_changes_the_facts(made):
    world = made[0]
    one, two = imagine(world, 0), imagine(world, 1)
    assert one.names == two.names == world.names
    for other in (one, two):
        same = [other.facts[key] == value for key, value in world.facts.items() if key in other.facts]
        assert len(same) > 0.9 * len(world.facts) and sum(same) / len(same) < 0.2
    assert one.facts != two.facts and imagine(world, 0).facts == one.facts


# ------------------------------------------------------------------------------------------ real tools


@pytest.mark.parametrize("arguments, right", [
    ({"person": "{}"}, True), ({"anything": "{}"}, True), ({"person": "{}", "x": 1}, True), ({}, False),
    ({"person": "Nobody"}, False), ({"person": None}, False), ({"person": 3}, False)])
def test_the_real_tool_tells_the_fact_or_an_error(arguments, right):
    world = make_world(0)
    person = world.names["person"][0]
    arguments = {k: person if v == "{}" else v for k, v in arguments.items()}
    want = {"birthplace": world.facts["birthplace", person]} if right else {"error": "no birthplace found"}
    assert world.real("birthplace", arguments) == want
    assert world.real("horoscope", arguments) == {"error": "no horoscope found"}


@pytest.mark.parametrize("subject", [["Bo"], {"name": "Bo"}, [[]]], ids=str)
def test_the_real_tool_bears_what_a_schema_may_allow(subject):
    """The ToolMaker chose the schema, so an argument may be a list."""
    assert make_world(0).real("birthplace", {"person": subject}) == {"error": "no birthplace found"}


def look(world):
    return [lambda: world.facts, lambda: world.real("birthplace", {"person": world.names["person"][0]}),
            lambda: make_questions(world), lambda: teach_actor(world, random.Random(0))]


def test_sealed_facts_are_out_of_reach_and_then_open_again():
    world = make_world(0)
    facts = dict(world.facts)
    with world.sealed():
        for way in look(world):
            with pytest.raises(PermissionError):
                way()
        with world.sealed():
            pass
        with pytest.raises(PermissionError):  # the inner seal doesn't open the outer one
            list(world.facts)
    assert world.facts == facts


def test_the_seal_opens_after_an_exception():
    world = make_world(0)
    for error in (KeyError, KeyboardInterrupt):
        with pytest.raises(error), world.sealed(), world.sealed():
            raise error
        assert world.facts


def test_a_rollout_with_real_tools_inside_the_seal_raises():
    """Nothing falls back to a lookup unnoticed."""
    world = make_world(0)
    call = agents.Call("birthplace", {"person": world.names["person"][0]})
    tools = agents.check_tools([tool_for("birthplace")])
    trace = agents.Trace(tools=tools, turns=[agents.Turn(calls=[call])])
    with world.sealed(), pytest.raises(PermissionError):
        agents.run_calls([trace], real(world.real))


# --------------------------------------------------------------------------------------------- teacher


@pytest.fixture(scope="module")
def taught():
    """An imagined world, its questions and what the teacher says to each."""
    world = make_world(0)
    other, questions = imagined_questions(world, 0, [q for q in make_questions(world) if q.set in HELD_OUT])
    rng = random.Random(0)
    return other, [(q, teach_agent(other, q, rng)) for q in questions]


def turns_of(record):
    """The teacher's turns, written as they are learned and read as they are in a rollout."""
    spoken = ["".join(said) for said, _ in sft.split_conversation(record)[1]]
    return [agents.parse_turn(text) for text in spoken]


def test_the_teachers_grammar_is_perfect(taught):
    for _, record in taught[1][::8]:
        turns = turns_of(record)
        assert not any(turn.error for turn in turns)
        assert [turn.answer is not None for turn in turns] == [False] * (len(turns) - 1) + [True]
        for turn, said in zip(turns, record["turns"], strict=True):
            assert turn.thought == said["thought"]
            assert [{"name": c.name, "arguments": c.arguments} for c in turn.calls] == said.get("calls", [])
        assert turns[-1].answer == record["turns"][-1]["answer"] != ""


def test_the_teachers_tools_and_calls_are_valid(taught):
    for question, record in taught[1][::12]:
        box = agents.Toolbox(record["kind"], agents.check_tools(record["tools"]), 1)
        tools = {tool.name: tool for tool in box.tools}
        assert record["tools"] == tools_for(question) and record["kind"] == question.kind
        for turn in turns_of(record):
            assert all(agents.call_error(call, tools) is None for call in turn.calls)


def test_the_teachers_observations_are_what_the_tools_say(taught):
    """Facts of the world it plays in, and for a utility what the utility really returns."""
    world, seen = taught[0], Counter()
    for question, record in taught[1]:
        tools = {t["name"]: agents.Tool(**t) for t in record["tools"]}
        for turn in record["turns"][:-1]:
            assert len(turn["calls"]) == len(turn["observations"])
            for call, observation in zip(turn["calls"], turn["observations"], strict=True):
                if call["name"] in agents.UTILITIES:
                    assert observation == agents.UTILITIES[call["name"]].run(**call["arguments"])
                    assert observation == {"result": question.golds[0]}
                else:
                    subject, = call["arguments"].values()
                    assert observation == {call["name"]: world.facts[call["name"], subject]}
                    assert first_error(tools[call["name"]].returns, observation) is None
                seen[call["name"]] += 1
    assert seen["compare"] > 50 and seen["birthplace"] > 50


def is_guess(record):
    return len(record["turns"]) == 1


def lookups(record):
    return [(c["name"], *c["arguments"].values()) for t in record["turns"] for c in t.get("calls", [])
            if c["name"] != "compare"]


def is_short(question, record):
    """The last lookup is missing."""
    return set(lookups(record)) == set(question.steps[:-1])


def test_how_often_the_teacher_guesses_stops_short_and_repeats(taught):
    """Stated: 1/20 guess; 7/10 of the other chains of two to four lookups stop one short; 1/20 have a lookup twice.
    Comparisons and single lookups do not stop short."""
    records = taught[1]
    share = sum(is_guess(r) for _, r in records) / len(records)
    assert 0.035 < share < 0.065
    others = [(q, r) for q, r in records if not is_guess(r)]
    for kind in ("composition", "inference"):
        of = [is_short(q, r) for q, r in others if q.kind == kind and len(q.steps) > 1]
        assert abs(sum(of) / len(of) - 0.7) < 3 * (0.7 * 0.3 / len(of)) ** 0.5  # three standard errors
    assert not any(is_short(q, r) for q, r in others if q.kind == "comparison" or len(q.steps) == 1)
    for hops in (2, 3, 4):
        of = [is_short(q, r) for q, r in others if len(q.steps) == hops and q.kind == "composition"]
        assert abs(sum(of) / len(of) - 0.7) < 3 * (0.7 * 0.3 / len(of)) ** 0.5  # three standard errors
    again = [len(lookups(r)) > len(set(lookups(r))) for q, r in others if q.kind != "comparison"]
    assert 0.03 < sum(again) / len(again) < 0.07


def test_what_the_teacher_answers(taught):
    """Right when it goes to the end, what it has when it stops short: never a thing that it was not told."""
    guesses = []
    for question, record in taught[1]:
        answer = record["turns"][-1]["answer"]
        told = [v for t in record["turns"] for o in t.get("observations", []) for v in o.values()]
        if is_guess(record):
            guesses.append(answer == question.golds[0])
            continue
        if not is_short(question, record):
            assert answer == question.golds[0] and answer in map(str, told)
            assert question.kind == "comparison" or list(dict.fromkeys(lookups(record))) == question.steps
        else:
            assert answer == question.chain[-2] == str(told[-1]) != question.golds[0]
    assert sum(guesses) / len(guesses) < 0.3


def test_no_thought_knows_more_than_was_told(taught):
    """What is named in a thought stands in the question or in an observation before it."""
    names = {name for part in taught[0].names.values() for name in part}
    for question, record in taught[1]:
        known = question.text
        for turn in record["turns"]:
            said = set(turn["thought"].replace(".", " ").replace(":", " ").split())
            assert not [name for name in names & said if name not in known]
            known += json.dumps(turn.get("observations", []))


def test_what_the_maker_is_taught(taught):
    rng = random.Random(0)
    records = [(q, teach_maker(q, rng)) for q, _ in taught[1]]
    for question, record in records[::10]:
        (said, heard), = sft.split_conversation(record)[1]
        thought, kind, tools = agents.parse_tools("".join(said))
        assert heard == [] and kind == question.kind and thought == record["thought"]
        assert [json.loads(tool.definition) for tool in tools] == tools_for(question)
        assert question.golds[0] not in record["thought"].split() or question.golds[0] in question.text
    rejected = [r["rejected"] for _, r in records if r["rejected"]]
    assert 0.08 < len(rejected) / len(records) < 0.12 and set(rejected) == set(REJECTIONS)


def test_nonsense_asks_for_anything_but_what_is_held_out():
    """Each question's words name its tools, last one first, its facts are of the right kinds and its alone; among so many some would
    hold an unseen path or a held-out chain, or be held out."""
    world = make_world(1)
    held_out = [q for q in make_questions(world) if q.set in HELD_OUT]
    unseen = {tuple(r for r, _ in q.steps) for q in held_out if q.set == "bamboogle"}
    pairs = nonsense(world, 20_000, held_out, random.Random(1))
    questions = [q for _, q in pairs]
    paths = [tuple(r for r, _ in q.steps) for q in questions]
    for triple in (slice(0, 3), slice(1, 4)):
        assert not [path for path in paths if path[triple] in unseen]
    assert not {q.text for q in held_out} & {q.text for q in questions}
    chains = {q.chain for q in held_out}
    assert not any(chains & parts(q.chain) for q in questions)
    assert len(questions) == 20_000 and {len(p) for p in paths} == {2, 3, 4} and {r for p in paths for r in p} == set(RELATIONS)
    for path, (other, question) in zip(paths, pairs, strict=True):
        named = question.text.split(" is the ")[1].split(" of ")[:-1]
        assert len(set(path)) == len(path) and named == ["the " * (i > 0) + r for i, r in enumerate(reversed(path))]
        assert other.facts == dict(zip(question.steps, question.chain[1:], strict=True)) and question.golds == [question.chain[-1]]
        assert [subject for _, subject in question.steps] == list(question.chain[:-1]) and len(set(question.chain)) == len(path) + 1
        kinds = [RELATIONS[path[0]][0], *(RELATIONS[relation][1] for relation in path)]
        assert all(name in "123456789" if kind == "number" else name in world.names[kind] for kind, name in zip(kinds, question.chain, strict=True))


def is_odd(record):
    """A relation's value is no subject of the next one."""
    return any(RELATIONS[a["name"]][1] != RELATIONS[b["name"]][0] for a, b in zip(record["tools"], record["tools"][1:], strict=False))


def test_what_share_of_the_lessons_is_nonsense():
    """Half of ToolMaker's, a sixth of AutoAgent's, less what fits by chance (a tenth)."""
    records = sft.teach(1, worlds=4)[0]
    makers, takers = (sum(map(is_odd, records[role])) / len(records[role]) for role in ("maker", "agent"))
    assert 0.44 < makers <= 0.5 and 0.88 < 3 * takers / makers < 1.12
    assert all(r["thought"] == f"I need {', '.join(tool['name'] for tool in r['tools'])}." for r in records["maker"])


def test_mixed_takes_as_many_of_each_form():
    """Seven forms; of those with enough questions 50 among 350, all different."""
    questions = [q for q in make_questions(make_world(1)) if q.set == "train"]
    chosen = mixed(questions, 350, random.Random(0))
    count = Counter((q.kind, len(q.steps) if q.kind == "composition" else q.steps[0][0] * (q.kind == "comparison")) for q in chosen)
    sizes = sum(q.kind == "comparison" and q.steps[0][0] == "size" for q in questions)
    assert count == {("composition", 1): 50, ("composition", 2): 50, ("composition", 3): 50, ("composition", 4): 50, ("inference", ""): 50,
                     ("comparison", "score"): 50, ("comparison", "size"): min(50, sizes)}
    assert len({q.id for q in chosen}) == len(chosen)


@pytest.mark.parametrize("reason", REJECTIONS)
def test_the_reasons_that_the_maker_is_taught_are_real_ones(reason):
    """Each is what the validation says of some reply, to the letter."""
    tool = tool_for("birthplace")
    bad = {"type": "object", "properties": {"x": {"minimum": "1"}}}
    text = {"type": "object", "properties": {"x": {"type": "text"}}}
    replies = ["", "<think>t</think>\n<kind>x</kind>\n<tools>\n</tools>",
               "<think>t</think>\n<kind>inference</kind>\n<tools>\n</tools>",
               f"<think>t</think>\n<kind>inference</kind>\n<tools>\n{json.dumps(tool)}\n{json.dumps(tool)}\n</tools>",
               *(f"<think>t</think>\n<kind>inference</kind>\n<tools>\n{line}\n</tools>" for line in
                 ("{", json.dumps({**tool, "parameters": bad}), json.dumps({**tool, "parameters": text})))]
    said = set()
    for reply in replies:
        with pytest.raises(agents.Rejected) as error:
            agents.parse_tools(reply)
        said.add(str(error.value))
    assert reason in said


def test_what_the_actor_is_taught():
    """Every fact once; about one call in seven is of a subject that the tool knows nothing of."""
    world = make_world(0)
    records = teach_actor(world, random.Random(0))
    exchanges = [(r["tool"]["name"], *e) for r in records for e in r["exchanges"]]
    known = [(name, *arguments.values()) for name, arguments, result in exchanges if "error" not in result]
    assert sorted(known) == sorted(world.facts) and all(1 <= len(r["exchanges"]) <= 8 for r in records)
    for name, arguments, result in exchanges:
        (key, subject), = arguments.items()
        assert key == RELATIONS[name][0]
        assert result == ({name: world.facts[name, subject]}
                          if (name, subject) in world.facts else unknown(name))
        tool, = agents.check_tools([tool_for(name)])
        assert agents.parse_observation(tool, chat.result_text(result)) == result
        assert first_error(tool.parameters, arguments) is None
    assert 0.11 < 1 - len(known) / len(exchanges) < 0.17
    assert {name for name, _, result in exchanges if "error" in result} == set(RELATIONS)


@pytest.mark.parametrize("relation", RELATIONS)
def test_every_relations_tool_passes_the_rules(relation):
    tool, = agents.check_tools([tool_for(relation)])
    right, wrong = "7", 7
    assert first_error(tool.returns, {relation: right}) is None
    assert first_error(tool.returns, {relation: wrong})
    assert relation not in agents.UTILITIES


def test_words_for_inference_are_what_they_say():
    for path in INFERENCE.values():
        assert all(RELATIONS[a][1] == RELATIONS[b][0] for a, b in zip(path, path[1:], strict=False))
    assert not set(INFERENCE) & set(RELATIONS)


# ------------------------------------------------------------------------------------ own questions


def test_every_question_of_a_world_is_in_its_words(made):
    """Also of imagined worlds, nonsense, and single lookups. The facts stay sealed."""
    world, train, held_out = made
    _, other = imagined_questions(world, 0, [])
    odd = [q for _, q in nonsense(world, 200, [], random.Random(0))]
    texts = [q.text for q in [*train, *held_out, *other, *odd]]
    for relation, (kind, _, _) in RELATIONS.items():
        texts.append(f"Who is the {relation} of {world.names[kind][0]}?")
    with world.sealed():
        assert [text for text in texts if unknown_words(world, text)] == []


@pytest.mark.parametrize("text, unknown", [
    ("Who is the mayor of Tili?", []), ("Who is the father-in-law of Borox?", []), ("???", []),
    ("What is the native language of Borox?", []), ("Who is the uncle of Borox?", ["uncle"]),
    ("Of Retu and Nino, whose size is largest?", []), ("whose home currency?", []),
    ("Of Retu and Nino, whose size is bigger?", ["bigger"]),
    ("Who is the mayor of Paris, Paris or Oslo?", ["Paris", "or", "Oslo"]),
    ("Who is the mayor of tili?", ["tili (it is written Tili)"]),
    ("who is the Mayor of TILI?", ["who (it is written Who)", "Mayor (it is written mayor)",
                                   "TILI (it is written Tili)"]),
    ("What is Tili's country?", ["Tili's"]), ("What is the son-in-law?", ["son-in-law"]),
    ("Wer ist Bürgermeister?", ["Wer", "ist", "Bürgermeister"]), ("Tili 7", ["7"]), ("市", ["市"])])
def test_unknown_words_by_hand(text, unknown):
    assert unknown_words(make_world(0), text) == unknown


def test_a_name_of_another_world_is_unknown():
    """World 1 has other names than world 0."""
    first, second = (make_world(seed) for seed in (0, 1))
    name = next(name for name in second.names["person"]
                if not any(name in names for names in first.names.values()))
    text = f"Who is the father of {name}?"
    assert unknown_words(first, text) == [name] and unknown_words(second, text) == []


def test_the_three_examples_are_held_out_questions_of_three_forms(made):
    world, _, held_out = made
    by_text = {q.text: q for q in held_out}
    two, compared, longer = [by_text[text] for text in examples(world)]
    assert examples(world) == examples(make_world(world.seed))
    assert (two.kind, len(two.steps)) == ("composition", 2) and compared.kind == "comparison"
    assert longer.kind == "composition" and len(longer.steps) > 2


def run_folder(folder, **options):
    """The config files of a run. options: {stage: options of its config}."""
    for stage in ("sft", "grpo"):
        (folder / stage).mkdir()
        (folder / stage / "config.json").write_text(json.dumps(options.get(stage, {})))
    return str(folder)


def test_a_question_with_an_unknown_word_is_refused_with_three_to_try(tmp_path):
    world = make_world(0)
    out = run_folder(tmp_path, sft={"traces": "", "seed": 0}, grpo={"data": []})
    check_question(out, world, "Who is the mayor of Tili?")
    with pytest.raises(InputError) as error:
        check_question(out, world, "Who is the mayor\x1b of Paris\u200b?")
    first, *rest = str(error.value).split("\n")
    assert first == "question: not in this run's world: Paris. Three questions to try:"
    assert rest == [f'  "{text}"' for text in examples(world)]


@pytest.mark.parametrize("options", [{"sft": {"traces": "t.jsonl"}}, {"grpo": {"data": ["q.json"]}}])
def test_a_run_on_question_files_may_know_any_word(options, tmp_path):
    out = run_folder(tmp_path, **options)
    check_question(out, make_world(0), "Who is the mayor of Paris?")
