"""Questions and how they are scored: the fictional world, its teacher, the answer metrics. No model in here."""
