"""Two runs side by side: python mtr.py compare A B."""
import csv
from dataclasses import dataclass
from pathlib import Path

from data import InputError, printable, read_file, read_json
from data.folders import read_results
from data.options import option
from data.tables import SCORES, cell, print_table


@dataclass
class CompareConfig:
    """The options of mtr.py compare."""
    a: str = option("", "run folder", positional=True)
    b: str = option("", "another run folder", positional=True)


COMPARED = ("em_sampled", "em_greedy", "clean_turns", "calls")  # of results.json
WIDEST = 22  # of a value, so that a row has at most 80 columns


def compare(config: CompareConfig) -> None:
    """Print the options in which two runs differ, and the scores of both."""
    a = Path(config.a)
    b = Path(config.b)
    for folder in (a, b):
        for stage in ("sft", "grpo"):
            if not (folder / stage / "config.json").exists():
                raise InputError(f"no run in {folder} ({stage}/config.json is missing)")
    options = differing_options(a, b)
    print(f"A: {printable(config.a)}\nB: {printable(config.b)}\n")
    if options:
        print_table(options, {name: name for name in ("option", "A", "B")})
    else:
        print("no option differs")
    print()
    results = [read_results(folder) for folder in (a, b)]
    if all(results):
        rows = result_rows(*results)
    else:
        first = last_scores(a)
        second = last_scores(b)
        rows = [difference(name, first[name], second[name]) for name in first]
    print_table(rows, {name: name for name in rows[0]})
    print("\neach is one run: another seed can change a score as much")


def differing_options(a: Path, b: Path) -> list[dict[str, str]]:
    """A row for each option of stage 1 and stage 2 that differs, except for the folder."""
    rows = []
    for stage in ("sft", "grpo"):
        first = read_json(a / stage / "config.json")
        second = read_json(b / stage / "config.json")
        for name in first | second:
            values = first.get(name, ""), second.get(name, "")
            if name not in ("out", "resume") and values[0] != values[1]:
                texts = [short(value) for value in values]
                rows.append({"option": f"{stage} {name}", "A": texts[0], "B": texts[1]})
    return rows


def short(value: object) -> str:
    """The value of an option, cut in its middle. No value is -."""
    text = "-" if value in (None, "") else printable(str(value))
    if len(text) <= WIDEST:
        return text
    return f"{text[:8]}...{text[11 - WIDEST:]}"


def difference(name: str, first: float | None, second: float | None) -> dict[str, str]:
    """A row of the table: a score in both runs, and the second minus the first."""
    known = first is not None and second is not None
    return {"score": name, "A": cell(first), "B": cell(second),
            "B - A": f"{second - first:+.3f}" if known else "-"}


def result_rows(a: dict, b: dict) -> list[dict[str, str]]:
    """The scores of each row that both results.json have."""
    first = {row["row"]: row for row in a["rows"]}
    second = {row["row"]: row for row in b["rows"]}
    rows = []
    for row in first:
        if row in second:
            for name in COMPARED:
                label = row if name == COMPARED[0] else ""
                scores = difference(SCORES[name][0], first[row].get(name), second[row].get(name))
                rows.append({"row": label} | scores)
    return rows


def last_scores(run: Path) -> dict[str, float | None]:
    """Of a run without results.json: its last held-out EM, means of the last ten steps. Rewards
    with other weights can't be compared, but their parts can."""
    columns = {"heldout_sampled": [], "heldout_greedy": [], "em": [], "consistency": []}
    text = read_file(run / "grpo" / "metrics.csv").decode("utf-8", "replace")
    for row in csv.DictReader(text.splitlines()):
        for name, values in columns.items():
            if row.get(name):
                values.append(float(row[name]))
    scores = {"EM of a held-out quarter, sampled": columns["heldout_sampled"][-1:],
              "EM of a held-out quarter, greedy": columns["heldout_greedy"][-1:],
              "training EM, last ten steps": columns["em"][-10:],
              "consistency, last ten steps": columns["consistency"][-10:]}
    return {name: sum(part) / len(part) if part else None for name, part in scores.items()}
