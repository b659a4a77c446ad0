"""Exact match and token F1 by the rules of the benchmarks' official scripts, and how sure a mean of them is."""
import re
import string
from collections import Counter

import numpy as np

ARTICLES = re.compile(r"\b(a|an|the)\b")
PUNCTUATION = str.maketrans("", "", string.punctuation)
# Whose F1 knows yes, no and noanswer. The others' is SQuAD 2.0's; Bamboogle and plain files have no rule of their own.
YES_NO = ("hotpotqa", "2wiki", "2wiki_v1.1")


def normalize(text: str) -> str:
    """Lower case; ASCII punctuation deleted, not spaced; articles to spaces; spaces squeezed (SQuAD, HotpotQA).

    >>> normalize("The  co-op, U.S.")
    'coop us'
    """
    return " ".join(ARTICLES.sub(" ", text.lower().translate(PUNCTUATION)).split())


def exact_match(prediction: str, golds: list[str]) -> float:
    """1.0 if the prediction equals any gold after normalising, else 0.0: all benchmarks' rule."""
    return float(any(normalize(prediction) == normalize(gold) for gold in golds))


def f1(prediction: str, golds: list[str], rule: str = "hotpotqa") -> float:
    """Best token-bag F1 over the golds, in [0, 1]. HotpotQA and 2Wiki: 0 where one side is yes, no or noanswer and they
    differ, and 0 where both are empty (hotpot_evaluate_v1.py); MuSiQue and SQuAD 2.0: two empty sides are equal.

    >>> round(f1("the city of Velka", ["Velka"]), 2), f1("yes it is", ["yes"]), f1("yes it is", ["yes"], "musique")
    (0.5, 0.0, 0.5)
    """
    return max(_f1(normalize(prediction), normalize(gold), rule in YES_NO) for gold in golds)


def _f1(prediction: str, gold: str, yes_no: bool) -> float:
    if yes_no and prediction != gold and {prediction, gold} & {"yes", "no", "noanswer"}:
        return 0.0
    if not yes_no and not (prediction and gold):
        return float(prediction == gold)
    said, want = prediction.split(), gold.split()
    shared = sum((Counter(said) & Counter(want)).values())
    return 2 * shared / (len(said) + len(want)) if shared else 0.0


def interval(values: list[float], resamples: int = 2000) -> tuple[float, float]:
    """95 % bootstrap interval of a mean over questions (percentiles; Efron 1979). The same values, the same interval."""
    rng, values = np.random.default_rng(0), np.asarray(values, dtype=float)
    means = [values[rng.integers(len(values), size=len(values))].mean() for _ in range(resamples)]
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)
