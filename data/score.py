"""Exact match and token F1 by the official rules, a confidence interval, means of scores."""
import re
import string
from collections import Counter, defaultdict

import numpy as np

ARTICLES = re.compile(r"\b(a|an|the)\b")
PUNCTUATION = str.maketrans("", "", string.punctuation)
# Under these rules, F1 treats yes, no and noanswer as special answers. All other rules use the F1
# of SQuAD 2.0. Bamboogle and plain files define no rule of their own.
YES_NO = ("hotpotqa", "2wiki", "2wiki_v1.1")


def normalize(text: str) -> str:
    """Lowercase, delete ASCII punctuation and articles, collapse spaces (SQuAD, HotpotQA).

    >>> normalize("The  co-op, U.S.")
    'coop us'
    """
    return " ".join(ARTICLES.sub(" ", text.lower().translate(PUNCTUATION)).split())


def exact_match(prediction: str, golds: list[str]) -> float:
    """Return 1.0 if the normalized prediction equals any normalized gold, else 0.0.
    All benchmarks use this rule."""
    return float(any(normalize(prediction) == normalize(gold) for gold in golds))


def f1(prediction: str, golds: list[str], rule: str = "hotpotqa") -> float:
    """Return the best token F1 over the golds, in [0, 1]. In HotpotQA and 2Wiki
    (hotpot_evaluate_v1.py), F1 is 0 if one side is yes, no or noanswer and the other differs. It is
    also 0 if both sides are empty. In MuSiQue and SQuAD 2.0, F1 is 1 if both sides are empty.

    >>> round(f1("the city of Velka", ["Velka"]), 2)
    0.5
    >>> f1("yes it is", ["yes"]), f1("yes it is", ["yes"], "musique")
    (0.0, 0.5)
    """
    yes_no = rule in YES_NO
    return max(_f1(normalize(prediction), normalize(gold), yes_no) for gold in golds)


def _f1(prediction: str, gold: str, yes_no: bool) -> float:
    if yes_no and prediction != gold and {prediction, gold} & {"yes", "no", "noanswer"}:
        return 0.0
    if not yes_no and not (prediction and gold):
        return float(prediction == gold)
    predicted_words = prediction.split()
    gold_words = gold.split()
    shared = sum((Counter(predicted_words) & Counter(gold_words)).values())
    # 2PR / (P + R) with precision P = shared / predicted words, recall R = shared / gold words.
    return 2 * shared / (len(predicted_words) + len(gold_words)) if shared else 0.0


def interval(values: list[float], resamples: int = 2000) -> tuple[float, float]:
    """Return (low, high), the 95 % bootstrap percentile interval of the mean (Efron 1979).
    `values` holds one score per question. The seed is fixed: equal values give equal intervals."""
    rng = np.random.default_rng(0)
    scores = np.asarray(values, dtype=float)
    n = len(scores)
    resampled = [scores[rng.integers(n, size=n)].mean() for _ in range(resamples)]
    low, high = np.percentile(resampled, [2.5, 97.5])
    return float(low), float(high)


def holds(text: object, part: object) -> bool:
    """Whether `part` occurs in `text` as whole words, both after the scorer's normaliser."""
    want = normalize(str(part))
    return bool(want) and f" {want} " in f" {normalize(str(text))} "


def by_set(scores: list[float], questions: list) -> dict[str, float]:
    """The mean score of each question set."""
    scores_of = defaultdict(list)
    for score, q in zip(scores, questions, strict=True):
        scores_of[q.set].append(score)
    return {name: float(np.mean(values)) for name, values in scores_of.items()}


def means(measures: list[dict]) -> dict[str, float | None]:
    """The means of the scores. valid_calls and clean_turns are shares of all calls and turns, None
    without any."""
    names = ("f1", "grammar", "support", "calls", "length")
    row = {name: float(np.mean([m[name] for m in measures])) for name in names}
    for part, whole in (("valid_calls", "calls"), ("clean_turns", "turns")):
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
            "valid_calls": None, "clean_turns": None, "support": None, "calls": 0.0,
            "length": None, "by_set": by_set(scores, held_out)}
