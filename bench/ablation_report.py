"""Tables and figures of the ablations, from docs/ablation/results.csv and curves.csv. ablate.py calls it."""
import csv
import re
import sys
from collections import defaultdict
from dataclasses import replace
from math import sqrt
from pathlib import Path
from statistics import fmean, stdev

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "docs"))

from picture import COLORS, LEFT, WIDTH, Picture, key, panel

ROOT = Path(__file__).resolve().parents[1]
FLOAT32 = " float32"
# Student's t for a 95 % interval, by the number of seeds less one.
T = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776}
SCORES = {"em_sampled": "sampled EM", "em_greedy": "greedy EM", "unseen": "unseen paths", "em_real": "real tools",
          "em_blanked": "blanked", "em_shuffled": "shuffled"}
MAIN = {"untrained": "random weights", "sft": "SFT", "sft_continued": "SFT, continued as long as GRPO takes",
        "rejection": "SFT and rejection sampling", "grpo_answer": "SFT and GRPO, reward = right answer",
        "grpo": "SFT and GRPO, the default"}
BEHAVIOUR = {"f1": "F1", "grammar": "grammar", "valid_calls": "valid calls", "support": "support",
             "economy": "economy", "calls": "calls", "length": "length", "maker_accepted": "tools accepted",
             "maker_exact": "tools exact"}


def read(path: Path) -> list[dict]:
    """The lines of results.csv or curves.csv, [] if there is no such file."""
    if not path.exists():
        return []
    with open(path, encoding="utf-8") as file:
        return list(csv.DictReader(file))


def row_of(line: dict) -> str:
    """The row that a line of results.csv or curves.csv belongs to: runs in float32 have rows of their own."""
    return line["row"] + FLOAT32 * (line["arithmetic"] == "float32")


def with_float32(rows: dict) -> dict:
    """The rows of ablate.py, each followed by a row for its runs in float32. These are compared among themselves."""
    both = {}
    for name, row in rows.items():
        both[name] = row
        both[name + FLOAT32] = replace(row, against=row.against + FLOAT32)
    return both


def more_runs(found: dict, names: list[str]) -> str:
    """The arithmetic in which more of these rows were run: "" for bfloat16, or FLOAT32. Row names end with it."""
    return max(("", FLOAT32), key=lambda suffix: sum(name + suffix in found for name in names))


def by_row(lines: list[dict]) -> dict[str, dict[int, dict]]:
    """{row: {seed: line}}"""
    found = defaultdict(dict)
    for line in lines:
        found[row_of(line)][int(line["seed"])] = line
    return found


# --------------------------------------------------------------------------------------------------- tables


def number(value: float, column: str, digits: int = 3) -> str:
    return f"{value:.0f}" if column in ("length", "seconds") else f"{value:.{digits}f}"


def cell(of_row: dict[int, dict], column: str, digits: int = 3) -> str:
    """mean ± standard deviation over the seeds that have a value."""
    values = [float(line[column]) for line in of_row.values() if line[column]]
    if not values:
        return ""
    spread = f" ± {number(stdev(values), column, digits)}" if len(values) > 1 else ""
    return number(fmean(values), column, digits) + spread


def difference(of_row: dict[int, dict], other: dict[int, dict], column: str = "em_sampled") -> str:
    """Mean difference to another row over the seeds that both have, with its 95 % interval."""
    seeds = [seed for seed in sorted(of_row.keys() & other.keys()) if of_row[seed][column] and other[seed][column]]
    deltas = [float(of_row[seed][column]) - float(other[seed][column]) for seed in seeds]
    if len(deltas) < 2:
        return f"{deltas[0]:+.3f}, one seed" if deltas else ""
    mean = fmean(deltas)
    half = T[len(deltas) - 1] * stdev(deltas) / sqrt(len(deltas))
    shown = f"{mean:+.3f} ± {half:.3f}"
    return f"no difference found ({shown})" if abs(mean) <= half else shown


def compared(found: dict, name: str, row, column: str) -> str:
    """A row's difference to the row that it is compared with, and the name of that row. "" if there is none."""
    if name == row.against:
        return ""
    shown = difference(found[name], found.get(row.against, {}), column)
    return f"`{row.against}`: {shown}" if shown else ""


def table(head: list[str], body: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *body]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def score_table(found: dict, rows: dict, group: str) -> str:
    """The rows of one table with their EMs."""
    head = ["row", "what is trained", "seeds", *SCORES.values(), "difference in sampled EM to", "in greedy EM to"]
    body = []
    for name, row in rows.items():
        if row.table == group and name in found:
            values = [cell(found[name], column) for column in SCORES]
            differences = [compared(found, name, row, column) for column in ("em_sampled", "em_greedy")]
            body.append([f"`{name}`", row.text, str(len(found[name])), *values, *differences])
    return table(head, body)


def behaviour_table(found: dict, rows: dict) -> str:
    """All rows with the other columns."""
    body = []
    for name in rows:
        if name in found:
            body.append([f"`{name}`", *[cell(found[name], column) for column in BEHAVIOUR]])
    return table(["row", *BEHAVIOUR.values()], body)


def speed_table(found: dict, rows: dict) -> str:
    """How many rollouts GRPO needs: by row and seed."""
    body = []
    for name, row in rows.items():
        lines = [line for _, line in sorted(found.get(name, {}).items())]
        if any(line["em_half"] for line in lines):
            reached = ", ".join(line["rollouts_to_80"] or ("never" if line["em_half"] or line["note"] else "–")
                                for line in lines)
            body.append([f"`{name}`", reached, cell(found[name], "em_half"), compared(found, name, row, "em_half")])
    return table(["row", "rollouts to .80, by seed", "EM after half of the rollouts",
                  "difference of the latter to"], body)


def spent(minutes: list[float]) -> list[str]:
    """Number, mean, longest and sum of runs."""
    return [str(len(minutes)), f"{fmean(minutes):.1f}", f"{max(minutes):.1f}", f"{sum(minutes):.1f}"]


def time_table(found: dict, rows: dict) -> str:
    """Minutes of training and evaluation."""
    body = []
    totals = {"bfloat16": [], "float32": []}
    for name in rows:
        if name in found:
            minutes = [(float(line["seconds"]) + float(line["eval_seconds"])) / 60 for line in found[name].values()]
            totals["float32" if name.endswith(FLOAT32) else "bfloat16"] += minutes
            commits = ", ".join(sorted({line["commit"] for line in found[name].values()}))
            notes = " ".join(f"seed {seed}: {line['note']}" for seed, line in found[name].items() if line["note"])
            body.append([f"`{name}`", *spent(minutes), commits, notes])
    for kind, minutes in totals.items():
        if minutes:
            body.append([f"all in {kind}", *spent(minutes), "", ""])
    return table(["row", "runs", "minutes per run", "longest", "minutes in all", "commit", "stopped early"], body)


def readme_table(found: dict, rows: dict) -> str:
    """The main rows in short."""
    body = []
    for name, title in MAIN.items():
        if name in found:
            against = "" if name == "grpo" else difference(found[name], found.get("grpo", {}))
            body.append([title, str(len(found[name])), cell(found[name], "em_sampled", 2),
                         cell(found[name], "em_greedy", 2), cell(found[name], "calls", 1), against])
    return table(["trained by", "seeds", "sampled EM", "greedy EM", "calls", "sampled EM against GRPO"], body)


def tables(found: dict, rows: dict) -> dict[str, str]:
    """{name: table}. A page has <!-- table: NAME --> before the place of a table, and <!-- end --> after it."""
    made = {group: score_table(found, rows, group) for group in dict.fromkeys(row.table for row in rows.values())}
    return made | {"behaviour": behaviour_table(found, rows), "speed": speed_table(found, rows),
                   "time": time_table(found, rows), "readme": readme_table(found, rows)}


def fill(text: str, made: dict[str, str]) -> str:
    """The text of a page with new tables."""
    return re.sub(r"(<!-- table: (\w+) -->\n).*?(<!-- end -->)",
                  lambda match: f"{match[1]}\n{made[match[2]]}\n{match[3]}", text, flags=re.DOTALL)


# -------------------------------------------------------------------------------------------------- figures


def heading(picture: Picture, title: str, suffix: str = "") -> None:
    """The title of a panel, and its arithmetic if that is not bfloat16: more_runs gives the suffix."""
    picture.text(LEFT, picture.y + 14, title + suffix.replace(" ", ", "), font_weight="bold", font_size=22)
    picture.y += 46


def draw_rows(picture: Picture, found: dict, rows: dict) -> str:
    """A dot per run and a line at the mean: sampled EM of each row."""
    heading(picture, "Held-out questions answered right (sampled EM)")
    zero = 225
    scale = WIDTH - LEFT - 16 - zero
    top = picture.y
    table_before = None
    for name, row in rows.items():
        if name not in found:
            continue
        if table_before not in (None, row.table):
            picture.y += 12
        table_before = row.table
        picture.y += 26
        picture.text(zero - 14, picture.y + 6, name, "text", text_anchor="end", font_size=17)
        values = [float(line["em_sampled"]) for line in found[name].values()]
        x = zero + scale * fmean(values)
        picture.add("line", x1=x, x2=x, y1=picture.y - 9, y2=picture.y + 9, stroke="two", stroke_width=4)
        for value in values:
            picture.add("circle", cx=zero + scale * value, cy=float(picture.y), r=5, fill="one", fill_opacity=0.6)
    for tick in range(6):
        x = zero + scale * tick / 5
        picture.parts.insert(1, f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{top + 6}" y2="{picture.y + 14}" '
                                f'stroke="{picture.colors["grid"]}"/>')
        picture.text(x, picture.y + 36, f"{tick / 5:.1f}", "given", text_anchor="middle")
    picture.y += 62
    picture.add("circle", cx=zero + 5.0, cy=picture.y - 6.0, r=5, fill="one", fill_opacity=0.6)
    picture.text(zero + 20, picture.y, "one run")
    picture.add("line", x1=zero + 130, x2=zero + 130, y1=picture.y - 15, y2=picture.y + 3, stroke="two",
                stroke_width=4)
    picture.text(zero + 142, picture.y, "mean of a row")
    picture.y += 14
    return "Sampled EM of every run"


def means_over_seeds(curves: dict, name: str, column: str, seeds: set) -> list[tuple[int, float]]:
    """(step, mean over the seeds) of a row."""
    values = defaultdict(list)
    for line in curves.get(name, []):
        if line[column] and line["seed"] in seeds:
            values[int(line["step"])].append(float(line[column]))
    return [(step, fmean(of_step)) for step, of_step in sorted(values.items())]


def draw_curves(picture: Picture, title: str, column: str, curves: dict, shown: dict[str, str], ticks: list,
                height: int = 210) -> None:
    """A panel with a curve for each row: `shown` has {row: name in the legend}. Worlds differ by seed, so the means
    are over the seeds that all rows have.
    """
    suffix = more_runs(curves, shown)
    shown = {name + suffix: text for name, text in shown.items()}
    of_rows = [{line["seed"] for line in curves[name]} for name in shown if curves.get(name)]
    seeds = set.intersection(*of_rows) if of_rows else set()
    heading(picture, title, suffix)
    x = LEFT
    series = []
    for (name, text), color in zip(shown.items(), ("one", "two", "right", "wrong"), strict=False):
        points = means_over_seeds(curves, name, column, seeds)
        if points:
            key(picture, x, color, text)
            x += 70 + 10.5 * len(text)
            series.append((points, color))
    steps = max([1, *[step for points, _ in series for step, _ in points]])
    panel(picture, height, steps, ticks, series)
    picture.text(WIDTH / 2, picture.y + 20, "rollouts of GRPO", text_anchor="middle")
    picture.y += 62


def draw_experiments(picture: Picture, found: dict, curves: dict) -> str:
    """Broken tools, credit by turn, the teacher's flaw."""
    draw_curves(picture, "Broken tools in training: calls per trace", "calls", curves,
                {"grpo": "intact", "tool_wrong": "1 in 5 wrong", "tool_shuffled": "shuffled", "tool_blank": "blank"},
                list(range(9)))
    draw_curves(picture, "Credit by turn: held-out EM, sampled", "heldout_sampled", curves,
                {"grpo": "one advantage per trace", "by_turn": "one per turn"}, [i / 5 for i in range(6)])
    suffix = more_runs(found, [f"{stage}_stops_{tenths}" for stage in ("sft", "grpo") for tenths in (0, 3, 6, 9)])
    heading(picture, "The teacher's flaw: held-out EM, sampled", suffix)
    key(picture, LEFT, "two", "after SFT")
    key(picture, LEFT + 160, "one", "after GRPO")
    series = []
    for stage, color in (("sft", "two"), ("grpo", "one")):
        points = []
        for share in (0, 30, 60, 90):
            line = found.get(f"{stage}_stops_{share // 10}{suffix}", {}).get(0)
            if line:
                points.append((share, float(line["em_sampled"])))
        default = found.get(stage + suffix, {}).get(0)
        if default:
            points.append((70, float(default["em_sampled"])))
        series.append((sorted(points), color))
    panel(picture, 210, 100, [i / 5 for i in range(6)], series)
    picture.text(WIDTH / 2, picture.y + 20, "% of the chains in which the teacher stops short",
                 text_anchor="middle")
    picture.y += 32
    return "Broken tools, credit by turn, and the teacher's flaw"


def figures(found: dict, curves: dict, rows: dict) -> dict[str, str]:
    """{file name: SVG}, light and dark."""
    files = {}
    for theme in COLORS:
        picture = Picture(theme)
        files[f"rows-{theme}.svg"] = picture.svg(draw_rows(picture, found, rows))
        picture = Picture(theme)
        files[f"experiments-{theme}.svg"] = picture.svg(draw_experiments(picture, found, curves))
    return files


def write(folder: Path, rows: dict) -> None:
    """Tables and figures of the results in a folder. Those of docs/ablation also go to the pages."""
    rows = with_float32(rows)
    found = by_row(read(folder / "results.csv"))
    curves = defaultdict(list)
    for line in read(folder / "curves.csv"):
        curves[row_of(line)].append(line)
    made = tables(found, rows)
    for name, text in figures(found, curves, rows).items():
        (folder / name).write_text(text, encoding="utf-8", newline="\n")
    pages = [ROOT / "README.md", ROOT / "docs" / "ablation.md"]
    if folder.resolve() == ROOT / "docs" / "ablation":
        for page in pages:
            page.write_text(fill(page.read_text(encoding="utf-8"), made), encoding="utf-8", newline="\n")
    print(made["time"])
