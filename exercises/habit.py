"""Chapter 5: predict the score of a model that has copied a habit."""


def predicted_em(stopped: float, right_at_end: float) -> float:
    """Predict sampled EM.

    stopped: share of the traces with fewer calls than lookups (measured)
    right_at_end: share of right answers among the traces of a model whose teacher never stops
    """
    raise NotImplementedError
