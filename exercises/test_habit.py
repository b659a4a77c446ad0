"""Chapter 5: the prediction against stored runs (docs/course/stops.csv)."""
import csv
from pathlib import Path

import pytest

TABLE = Path(__file__).resolve().parents[1] / "docs" / "course" / "stops.csv"
with open(TABLE, encoding="utf-8") as file:
    ROWS = list(csv.DictReader(file))
BEST = {row["hops"]: float(row["sampled"]) for row in ROWS if float(row["stops_short"]) == 0}


@pytest.mark.parametrize("row", [row for row in ROWS if float(row["stops_short"]) > 0],
                         ids=lambda row: f"{row['stops_short']}-{row['hops']}")
def test_the_prediction_is_near_the_run(exercise, row):
    """.06: both numbers are of 300 questions, so each has a standard error of up to .03."""
    predicted = exercise.predicted_em(float(row["stopped"]), BEST[row["hops"]])
    assert abs(predicted - float(row["sampled"])) <= 0.06
