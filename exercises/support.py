"""Chapter 7: a support function that can be cheated.

The traces of this exercise have one call per turn. Names are single words. test_support.py plays
the calls with these tools:

    birthplace(person)   {"birthplace": a city}, or {"error": ...}
    mayor(city)          {"mayor": a person}, or {"error": ...}
    spouse(person)       {"spouse": a person}, or {"error": ...}
    note(text)           {"noted": text}
"""
from agents import Trace
from data.words import leaves, tokens


def words(value: object) -> set[str]:
    """The words in a text, or in the values of arguments or of an observation."""
    return set(tokens(" ".join(map(str, leaves([value])))))


def broken_support(trace: Trace) -> float:
    """1 if an observation or the arguments of a call hold all words of the answer, else 0."""
    for call in trace.calls:
        for value in (call.observation, call.arguments):
            if words(trace.answer) <= words(value):
                return 1.0
    return 0.0


def cheat(guess: str) -> list[tuple[str, dict]]:
    """Calls, each (name, arguments), after which broken_support pays for any guess.

    The test plays these calls, one per turn, and then answers with the guess. No tool tells the
    guess on its own: it is the name of nothing that can be looked up.
    """
    raise NotImplementedError


def support(trace: Trace) -> float:
    """1 if a call looked the answer up, else 0.

    A call did so if (1) it succeeded (call.succeeded), (2) each word of its arguments was told
    before, by the question or by the observation of an earlier call that fulfils (1) and (2)
    itself, and (3) its observation holds all words of the answer. The test never asks about an
    answer that the question names. trace.question, trace.calls (in order, one per turn) and
    trace.answer are all that the function needs.
    """
    raise NotImplementedError
