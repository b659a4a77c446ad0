"""Chapter 5: predict the score of a model that has copied a habit."""


def predicted_em(stopped: float, right_at_end: float) -> float:
    """A trace that stops short is wrong; the others are right as often as without the habit."""
    return (1 - stopped) * right_at_end
