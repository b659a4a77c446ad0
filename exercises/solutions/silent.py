"""Chapter 8: which bug does each run in exercises/silent/ have?"""

FOUND = {"a": ("gradient", "grad_norm"), "b": ("mask", "entropy"), "c": ("ratio", "gap_mean"),
         "d": ("reward", "em"), "e": ("groups", "flat_groups")}
