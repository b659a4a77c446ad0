"""Chapter 8: the name of each bug. The names are kept as hashes, so that they are not read here."""
import csv
import hashlib
from pathlib import Path

import pytest

RUNS = Path(__file__).resolve().parent / "silent"
BUGS = ("mask", "reward", "groups", "ratio", "gradient")
HASHES = {"a": "50d0f286", "b": "962f8d6a", "c": "0dc3f5b5",
          "d": "d91d7013", "e": "44708b15"}


@pytest.mark.parametrize("run", "abcde")
def test_the_bug_of_a_run(exercise, run):
    bug, column = exercise.FOUND[run]
    assert bug in BUGS, "one of " + ", ".join(BUGS)
    with open(RUNS / f"{run}.csv", encoding="utf-8") as file:
        assert column in next(csv.reader(file)), "a column of metrics.csv"
    assert hashlib.sha256(f"{run} {bug}".encode()).hexdigest()[:8] == HASHES[run]
