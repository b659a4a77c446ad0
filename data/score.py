"""Exact match and token F1 by the rules of the benchmarks' official scripts."""
import re
import string
from collections import Counter

ARTICLES = re.compile(r"\b(a|an|the)\b")
PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalize(text: str) -> str:
    """Lower case; ASCII punctuation deleted, not spaced; articles to spaces; spaces squeezed (SQuAD, HotpotQA).

    >>> normalize("The  co-op, U.S.")
    'coop us'
    """
    return " ".join(ARTICLES.sub(" ", text.lower().translate(PUNCTUATION)).split())


def exact_match(prediction: str, golds: list[str]) -> float:
    """1.0 if the prediction equals any gold after normalising, else 0.0."""
    return float(any(normalize(prediction) == normalize(gold) for gold in golds))


def f1(prediction: str, golds: list[str]) -> float:
    """Best token-bag F1 over the golds, in [0, 1]; 0 where one side is yes, no or noanswer and they differ
    (hotpot_evaluate_v1.py).

    >>> round(f1("the city of Velka", ["Velka"]), 2), f1("yes it is", ["yes"])
    (0.5, 0.0)
    """
    return max(_f1(normalize(prediction), normalize(gold)) for gold in golds)


def _f1(prediction: str, gold: str) -> float:
    if prediction != gold and {prediction, gold} & {"yes", "no", "noanswer"}:
        return 0.0
    said, want = prediction.split(), gold.split()
    shared = sum((Counter(said) & Counter(want)).values())
    return 2 * shared / (len(said) + len(want)) if shared else 0.0
