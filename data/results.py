"""Rows of results: means, shares and intervals of the scores of many traces."""
import json
from collections import Counter, defaultdict

import numpy as np

from data.score import exact_match, f1, interval
from data.world import Question, tools_for


def by_set(scores: list[float], questions: list) -> dict[str, float]:
    """The mean score of each question set."""
    scores_of = defaultdict(list)
    for score, q in zip(scores, questions, strict=True):
        scores_of[q.set].append(score)
    return {name: float(np.mean(values)) for name, values in scores_of.items()}


def counts(trace) -> dict[str, int]:
    """How many turns, calls and sampled tokens an agents.Trace has. A clean turn departs in nothing
    from the strict form. A failed call is valid, but its result is an error."""
    valid = [call for call in trace.calls if call.error is None]
    failed = [call for call in valid if not call.succeeded]
    whole = [turn for turn in trace.turns if turn.calls or turn.answer is not None]
    clean = [turn for turn in whole if not (turn.error or turn.departures)]
    return {"calls": len(trace.calls), "valid_calls": len(valid), "failed_calls": len(failed),
            "turns": len(trace.turns), "clean_turns": len(clean), "length": sum(trace.mask)}


def means(measures: list[dict]) -> dict[str, float | None]:
    """The means of the scores. valid_calls, failed_calls and clean_turns are shares of all calls or
    turns, None without any."""
    names = ("f1", "grammar", "support", "calls", "length")
    row = {name: float(np.mean([m[name] for m in measures])) for name in names}
    shares = (("valid_calls", "calls"), ("failed_calls", "calls"), ("clean_turns", "turns"))
    for part, whole in shares:
        total = sum(m[whole] for m in measures)
        row[part] = sum(m[part] for m in measures) / total if total else None
    return row


def majority(questions: list, held_out: list) -> dict:
    """The row of a program that always gives the most common training answer."""
    answers = Counter(q.golds[0] for q in questions if q.set == "train")
    answer = answers.most_common(1)[0][0]
    scores = [exact_match(answer, q.golds) for q in held_out]
    em = float(np.mean(scores))
    return {"row": "majority", "n": len(held_out), "em_greedy": em, "em_sampled": em,
            "f1": float(np.mean([f1(answer, q.golds) for q in held_out])), "grammar": None,
            "valid_calls": None, "failed_calls": None, "clean_turns": None, "support": None,
            "calls": 0.0, "length": None, "by_set": by_set(scores, held_out)}


def result_row(lines: list[dict], samples: int) -> dict:
    """EM and F1 with 95 % intervals over the questions, and the means of the other scores."""
    row = {"n": len(lines) // samples, "samples": samples}
    for name in ("em", "f1"):
        scores = np.array([line[name] for line in lines]).reshape(-1, samples).mean(1)
        low, high = interval(scores)
        row |= {name: float(scores.mean()), f"{name}_low": low, f"{name}_high": high}
    return row | means(lines)


def maker_shares(boxes: dict, questions: list[Question]) -> dict[str, float]:
    """Shares of the questions by the fate of their tools. boxes: agents.Toolboxes by question id.
    `exact`: the tools are the teacher's."""
    exact = 0
    for q in questions:
        box = boxes[q.id]
        made = [json.loads(tool.definition) for tool in box.made]
        if box.tries > 0 and box.kind == q.kind and made == tools_for(q):
            exact += 1
    tries = [boxes[q.id].tries for q in questions]  # 0: all were rejected
    numbers = {"valid": tries.count(1), "exact": exact, "accepted": len(tries) - tries.count(0),
               "regenerated": sum(n > 1 for n in tries), "fallback": tries.count(0)}
    return {name: number / len(questions) for name, number in numbers.items()}
