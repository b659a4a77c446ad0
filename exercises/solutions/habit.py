"""Chapter 5: predict the score of a model that has copied a habit."""


def predicted_em(stopped: float, em_without_habit: float) -> float:
    """A trace that stops short is wrong; the others are right as often as without the habit."""
    return (1 - stopped) * em_without_habit
