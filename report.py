"""Results for people: tables, traces before and after GRPO, curves. You may skip this file."""
import csv
import json
import math
import os
import shlex
from collections import Counter
from pathlib import Path

import numpy as np

from data import InputError, tables
from data.folders import read_results
from data.own import story
from data.page import page_json
from data.score import exact_match
from data.show import ShowConfig, show_traces
from data.tables import print_meanings, print_scores, print_table
from data.world import Question


def say(line: str) -> None:
    """Print a headline between progress bars."""
    print(f"\n{line}", flush=True)


def show(config: ShowConfig) -> None:
    """Print the tables of a finished run and a story; with --step or --trace, its traces."""
    if config.step is None and config.trace is None:
        return show_run(config.out)
    show_traces(config)


def show_run(folder: str) -> None:
    """Write report.html. Print the tables and the story of a finished run."""
    out = Path(folder)
    if (out / "grpo" / "config.json").exists():
        write_page(out)
    results = read_results(out)
    if not results:
        missing = "results.json is missing, or older than the models"
        if (out / "report.html").exists():
            return say(f"curves and traces: {out}/report.html; no table: {missing}")
        raise InputError(f"--out: no finished run in {out} ({missing}); python mtr.py makes one")
    rows = []
    for row in results["rows"]:
        bar = "#" * round(8 * row["em_sampled"])
        rows.append(row | row["by_set"] | {"bar": bar.ljust(8)})
    say(f"Each row answers the same {rows[0]['n']} held-out questions.")
    print_scores(rows, tables.SCORES)
    print_meanings((row["row"], tables.ROWS[row["row"]]) for row in rows)
    print_scores(rows, tables.BY_SET)
    print()
    shares = {f"ToolMaker {name}": value for name, value in results["maker"].items()}
    shares |= {f"ToolActor {name}": results[f"actor_{name}"] for name in ("recall", "fidelity")}
    for name, value in shares.items():
        print(f"{name:<21}  {value:.3f}  {tables.SIMULATOR[name]}")
    print("seconds: " + ", ".join(f"{name} {s}" for name, s in results["seconds"].items()))
    say((out / "story.txt").read_text(encoding="utf-8"))
    print(f"{out}/ also holds report.html, curves.png, grpo/traces.jsonl, the models\n"
          f'your own question: {ask_command(folder, results["seed"])} "..."')


def show_evaluation(rows: list[dict]) -> None:
    """Print the rows of an evaluation and who answered. Each table fits 80 columns."""
    for names in (("n", "em", "em_low", "em_high", "f1", "f1_low", "f1_high"),
                  ("grammar", "clean_turns", "valid_calls", "failed_calls"),
                  ("rule", "support", "calls", "length", "seconds", "bad")):
        print_table(rows, {name: name for name in ("set", *names)})
        print()
    row = rows[0]
    print(f"agent: {row['model']}; calls answered by: {row['backend']}\n"
          f"{row['samples']} traces per question at temperature {row['temperature']}\n"
          "em_low to em_high is a 95 % interval. Benchmarks are scored by their own rules,\n"
          "common and bamboogle by SQuAD's.")


def show_kept(reasons: Counter) -> None:
    """Print how many traces stage 0 kept, and why not the others (see evaluate.make_traces)."""
    total = reasons.total()
    print(f"kept {reasons.pop('', 0)} of {total} traces")
    for reason, number in reasons.most_common():
        print(f"  {number:>6}  {reason}")


# ------------------------------------------------------------------------------- story and curves


def write_results(out: str, results: dict, questions: list[Question], traces: dict) -> None:
    """Write story.txt, then results.json, which marks a run as finished. See evaluate.all_rows."""
    story = before_and_after(questions, traces, ask_command(out, results["seed"]))
    (Path(out) / "story.txt").write_text(story + "\n", encoding="utf-8")
    part = Path(out) / "results.part"
    part.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    part.replace(Path(out) / "results.json")


def ask_command(out: str, seed: int) -> str:
    """The command that asks a run's models, without the question."""
    folder = "" if out == "run" else f" --out {shlex.quote(out)}"  # its default
    return f"python mtr.py ask{folder}" + (f" --seed {seed}" if seed else "")


def before_and_after(questions: list[Question], traces: dict, ask: str) -> str:
    """The first question that only GRPO gets right: greedy traces, commands that print them."""
    before = traces["sft"]["greedy"]
    after = traces["grpo"]["greedy"]
    for q, old, new in zip(questions, before, after, strict=True):
        if not exact_match(old.answer or "", q.golds) and exact_match(new.answer or "", q.golds):
            return (f"{q.text}   (right: {q.golds[0]})\nbefore GRPO\n{story(old)}\n"
                    f"after GRPO\n{story(new)}\nThese commands print the same traces:\n"
                    f'  {ask} --stage sft "{q.text}"\n  {ask} --stage grpo "{q.text}"')
    return "No held-out question went from wrong to right."


PANELS = (  # stage, title, columns of its metrics.csv
    ("grpo", "Held-out EM during GRPO; dashed: before GRPO", "heldout_sampled", "heldout_greedy"),
    ("grpo", "Calls per trace in the rollouts of GRPO", "calls"),
    ("grpo", "Reward of the rollouts and its two parts", "reward", "answer", "consistency"),
    ("sft", "Loss of SFT, median of the last 20 steps", "loss_agent", "loss_maker", "loss_actor"))


def curve(path: Path, name: str) -> tuple[list[int], list[float]]:
    """Steps and values of a column of metrics.csv, at most about 300. Of SFT: medians of 20."""
    steps = []
    values = []
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    for row in csv.DictReader(lines):
        value = float(row.get(name) or "nan")
        if math.isfinite(value):
            steps.append(int(row["step"]))
            values.append(value)
    if name.startswith("loss_"):
        values = [float(np.median(values[max(0, i - 19):i + 1])) for i in range(len(values))]
    every = 1 + len(steps) // 300
    return steps[::every], values[::every]


def draw_curves(out: Path) -> None:
    """Write curves.png: held-out EM, calls and reward of stage 2, and the loss of stage 1."""
    os.environ["MPLBACKEND"] = "agg"  # a notebook's backend may not be installed here
    from matplotlib.figure import Figure
    figure = Figure(figsize=(11, 7), layout="constrained")
    axes = figure.subplots(2, 2)
    for axis, (stage, title, *names) in zip(axes.flat, PANELS, strict=True):
        for name in names:
            steps, values = curve(out / stage / "metrics.csv", name)
            axis.plot(steps, values, label=name, marker="o" if name.startswith("heldout") else "")
            if name == "heldout_sampled" and steps[:1] == [0]:
                axis.axhline(values[0], color="gray", linestyle="--", label="SFT, sampled")
        bounds = {"yscale": "log"} if stage == "sft" else {"ylim": (0, None)}
        axis.set(title=title, xlabel=f"step of {stage}", **bounds)
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.legend()
    figure.savefig(out / "curves.png", dpi=110)


def write_page(out: Path) -> None:
    """Write curves.png, and report.html: table, curves and traces in one file. Both are kept if all
    that they show is older.
    """
    template = Path(__file__).parent / "docs" / "report_template.html"
    files = [*out.glob("*/metrics.csv"), *out.glob("grpo/traces.jsonl"), *out.glob("results.json"),
             *out.glob("report.html"), template, Path(__file__)]
    if max(files, key=lambda path: path.stat().st_mtime).name == "report.html":
        return
    try:
        draw_curves(out)
    except Exception as error:  # a picture must not end a run
        print(f"curves.png is missing: {type(error).__name__}: {error}")
    results = read_results(out)
    facts = {"run": str(out), "columns": tables.SCORES | tables.BY_SET, "meanings": tables.ROWS,
             "results": [results] if results else [], "panels": []}
    for stage, title, *names in PANELS:
        lines = [[name, *curve(out / stage / "metrics.csv", name)] for name in names]
        facts["panels"].append([stage, title, lines])
    page = template.read_text("utf-8")
    data = page_json(out, facts, 1_990_000 - len(page))
    (out / "report.html").write_text(page.replace("REPORT_DATA", data), encoding="utf-8")
