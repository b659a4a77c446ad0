"""Which calls of a trace (an agents.Trace) support its answer, for the reward in grpo.py."""
import json
import re

from data.evidence import Evidence, computed_by, evidence_of, is_difference, with_answer
from data.score import normalize
from data.words import content, names, tokens


def collect_evidence(trace) -> list[Evidence]:
    """The evidence of each call. Sources are the question and the results of earlier turns."""
    tools = {tool.name: tool for tool in trace.tools}
    sources = [set(tokens(trace.question))]
    evidence: list[Evidence] = []
    seen: set[str] = set()
    for number, turn in enumerate(trace.turns):
        first = len(evidence)
        for call in turn.calls:
            e = evidence_of(call, tools.get(call.name), number, trace.question, sources)
            signature = json.dumps([call.name, call.arguments], sort_keys=True)
            e.repeated = signature in seen
            if call.succeeded:  # to try a failed call again is no repetition
                seen.add(signature)
            evidence.append(e)
        sources = sources + [set(e.result_words) for e in evidence[first:]]
    return evidence


def supporting(trace, evidence: list[Evidence]) -> list[Evidence]:
    """The calls that support the answer. A utility computed it, or the result of a lookup holds it,
    or, in a comparison, at least two of the things compared were looked up."""
    answer = content(trace.answer)
    if not normalize(trace.answer) and answer not in names(trace.question):
        return []  # "the" is no answer; "A" may be a name
    choice = is_choice(trace)
    results = computed_by(answer, trace.question, evidence, choice)
    if results is not None:
        return results
    lookups = [e for e in evidence if e.new_words and not e.repeated]
    if choice:  # its result may only repeat a word of the question
        lookups = [e for e in evidence if set(e.result_words) - e.argument_words and not e.repeated]
        return compared(trace, lookups)
    question = set(content(trace.question))
    # A long result for the whole question holds many possible answers.
    whole = 0.8 * len(question)
    lookups = [e for e in lookups if e.is_short or len(question & e.argument_words) < whole]
    found = with_answer(trace.answer, lookups)
    return compared(trace, lookups) if not found and is_difference(answer, lookups) else found


def is_choice(trace) -> bool:
    """Whether the answer is yes, no, both, neither, or something that the question names."""
    question = set(tokens(trace.question))
    answer = set(content(trace.answer))
    is_part = answer <= question and 2 * len(answer) <= len(question)  # not the whole question
    return is_part or normalize(trace.answer) in ("yes", "no", "both", "neither")


def compared(trace, lookups: list[Evidence]) -> list[Evidence]:
    """The lookups, if they are about two of the things that the question names. For yes or no, one
    is enough, as in "Is Ada from Rome?"."""
    entities = {e.entity for e in lookups if all(e.grounded) and e.entity}
    one = names(trace.question) and not re.search(r"\b(and|or|both|same)\b", trace.question)
    enough = 1 if one and normalize(trace.answer) in ("yes", "no") else 2
    return lookups if len(entities) >= enough else []
