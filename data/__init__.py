"""Questions and how they are scored: the fictional world, its teacher, question files, metrics. No model in here."""


class InputError(ValueError):
    """A user's mistake: one line that names the culprit and what was expected; programs exit with 2."""
