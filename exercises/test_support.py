"""cheat gains from broken_support and not from the project's; support agrees with the project."""
import random

import grpo
from agents import Call, Trace, Turn, check_tools, run_calls
from data.schema import object_schema
from data.support import collect_evidence

TEXT = {"type": "string"}
PEOPLE = ["Nisan", "Gevul", "Rigas", "Boltem", "Quarro", "Dyxen"]
CITIES = ["Kamer", "Lorpi", "Zuhat"]
MARRIED = [1, 0, 3, 2, 5, 4]  # PEOPLE[i] is married to PEOPLE[MARRIED[i]]
FACTS = {("mayor", city): PEOPLE[2 * i + 1] for i, city in enumerate(CITIES)}
for i, person in enumerate(PEOPLE):
    FACTS["birthplace", person] = CITIES[i % 3]
    FACTS["spouse", person] = PEOPLE[MARRIED[i]]
SPECS = [("birthplace", "person", "birthplace"), ("mayor", "city", "mayor"),
         ("spouse", "person", "spouse"), ("note", "text", "noted")]
TOOLS = check_tools([{"name": name, "description": f"The {name}.",
                      "parameters": object_schema(**{argument: TEXT}),
                      "returns": object_schema(**{result: TEXT})}
                     for name, argument, result in SPECS])
QUESTION = "Who is the mayor of the birthplace of {}?"


def play(question, calls, answer):
    """The trace of an agent that makes these calls, one per turn, and then answers."""
    def backend(requests):
        told = []
        for tool, arguments in requests:
            value, = arguments.values()
            if tool.name == "note":
                told.append({"noted": value})
            elif (tool.name, value) in FACTS:
                told.append({tool.name: FACTS[tool.name, value]})
            else:
                told.append({"error": "nothing found, ask Wemmick"})
        return told

    trace = Trace(question, TOOLS)
    for name, arguments in calls:
        trace.turns.append(Turn("Let me see.", [Call(name, arguments)]))
        run_calls([trace], backend)
    trace.turns.append(Turn("Done.", answer=answer))
    trace.status = "answered"
    return trace


def project(trace):
    return grpo.reward_support(trace, collect_evidence(trace))


def test_the_cheat_is_paid_by_the_broken_function_alone(exercise):
    for guess in ("Lorn", "Pata", "Wemmick"):
        trace = play(QUESTION.format("Nisan"), exercise.cheat(guess), guess)
        assert exercise.broken_support(trace) == 1
        assert project(trace) == 0


def random_trace(rng):
    """Up to four calls. Most are about the newest name, some about any name, told or not."""
    start = rng.choice(PEOPLE)
    known = [start]
    calls = []
    for _ in range(rng.randint(0, 4)):
        value = known[-1] if rng.random() < 0.7 else rng.choice([*PEOPLE, *CITIES, "Wemmick"])
        name, argument, _ = rng.choice(SPECS)
        if rng.random() < 0.7:  # a tool that knows the value
            name, argument, _ = SPECS[1] if value in CITIES else rng.choice([SPECS[0], SPECS[2]])
        calls.append((name, {argument: value}))
        known.append(FACTS.get((name, value), value))
    answer = rng.choice([*known, known[-1], known[-1], *CITIES, "Wemmick"])
    # An answer that the question names is a choice, and has another rule (docs/reward.md).
    return play(QUESTION.format(start), calls, "Lorn" if answer == start else answer)


def test_the_mended_function_agrees_with_the_project(exercise):
    """500 traces. A lookup from a made-up city, an echo and an error must not count."""
    rng = random.Random("support")
    traces = [random_trace(rng) for _ in range(500)]
    want = [project(trace) for trace in traces]
    assert 50 < sum(want) < 450
    for trace, wanted in zip(traces, want, strict=True):
        calls = [(call.name, call.arguments, call.observation) for call in trace.calls]
        assert exercise.support(trace) == wanted, (trace.question, calls, trace.answer)
