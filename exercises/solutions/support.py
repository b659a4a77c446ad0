"""Chapter 7, solved."""
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
    """The guess is an argument, and the tool writes it out, too."""
    return [("note", {"text": guess})]


def support(trace: Trace) -> float:
    """1 if a call whose arguments were told tells the answer."""
    told = words(trace.question)
    for call in trace.calls:
        if call.succeeded and words(call.arguments) <= told:
            told |= words(call.observation)
            if words(trace.answer) <= words(call.observation):
                return 1.0
    return 0.0
