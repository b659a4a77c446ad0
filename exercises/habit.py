"""Chapter 5: predict the score of a model that has copied a habit."""


def predicted_em(stopped: float, em_without_habit: float) -> float:
    """Predict sampled EM.

    stopped: share of the traces with fewer calls than lookups (measured)
    em_without_habit: share of right answers of a model whose teacher never stops short (measured)

    Take the second number as the chance that a chain which goes on to its end is right. This is an
    approximation: that model stops short in up to a tenth of its chains, too.
    """
    raise NotImplementedError
