"""Exact match and token F1 by the official rules, and a confidence interval."""
import re
import string
from collections import Counter

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
