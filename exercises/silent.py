"""Chapter 8: which bug does each run in exercises/silent/ have?

The bugs are mask, reward, groups, ratio and gradient. Give for each run the bug, and the column of
metrics.csv that shows it best.
"""

FOUND = {"a": ("", ""), "b": ("", ""), "c": ("", ""), "d": ("", ""), "e": ("", "")}
