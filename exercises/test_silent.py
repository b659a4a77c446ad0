"""Chapter 8: the name of each bug. The names are kept as hashes, so that they are not read here."""
import hashlib

import pytest

# The columns in which each bug can be seen.
SHOWS = {"mask": ("entropy", "grad_norm"), "groups": ("flat_groups",),
         "ratio": ("gap_mean", "gap_max"),
         "reward": ("reward", "em", "answer", "consistency", "heldout_sampled", "heldout_greedy"),
         "gradient": ("grad_norm",)}
HASHES = {"a": "50d0f286", "b": "962f8d6a", "c": "0dc3f5b5",
          "d": "d91d7013", "e": "44708b15"}


@pytest.mark.parametrize("run", "abcde")
def test_the_bug_of_a_run(exercise, run):
    bug, column = exercise.FOUND[run]
    assert bug in SHOWS, "one of " + ", ".join(SHOWS)
    assert column in SHOWS[bug], f"the bug {bug} can't be seen in this column"
    assert hashlib.sha256(f"{run} {bug}".encode()).hexdigest()[:8] == HASHES[run]
