"""Results for people: tables, traces before and after GRPO, curves. You may skip this file."""
import csv
from pathlib import Path

from agents import Trace
from data import InputError, read_json
from data.score import exact_match
from data.world import HELD_OUT, Question


def say(line: str) -> None:
    """Print a headline between progress bars."""
    print(f"\n{line}", flush=True)


def print_table(rows: list[dict], columns: list[str]) -> None:
    """Print rows of text and numbers. Each column is as wide as its longest cell."""
    lines = [columns] + [[cell(row.get(name)) for name in columns] for row in rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(columns))]
    for line in lines:
        cells = [text.rjust(width) for text, width in zip(line[1:], widths[1:], strict=True)]
        print("  ".join([line[0].ljust(widths[0]), *cells]))


def cell(value: object) -> str:
    """A table cell: three digits of a float, - for no value."""
    if value is None:
        return "-"
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def show_run(folder: str) -> None:
    """Print the table and the story of a finished run."""
    out = Path(folder)
    if not (out / "results.json").exists():
        raise InputError(f"--out: no finished run in {out} (results.json is missing); "
                         "python mtr.py makes one")
    results = read_json(out / "results.json")
    columns = ["row", "em_greedy", "em_sampled", "f1", "grammar", "valid_calls", "support", "calls"]
    print()
    print_table([row | row["by_set"] for row in results["rows"]], [*columns, *HELD_OUT])
    maker = ", ".join(f"{name} {value:.3f}" for name, value in results["maker"].items())
    print(f"n = {results['rows'][0]['n']} held-out questions; the last columns are sampled EM by "
          f"set\nToolActor: recall {results['actor_recall']:.3f}, fidelity "
          f"{results['actor_fidelity']:.3f}   ToolMaker: {maker}\nseconds: {results['seconds']}")
    say((out / "story.txt").read_text(encoding="utf-8"))
    print(f"more in {out}/: metrics.csv of each stage, grpo/traces.jsonl, curves.png, the models\n"
          f'ask it: python mtr.py ask --out {out} "a question as above"')


def show_evaluation(rows: list[dict]) -> None:
    """Print the rows of an evaluation and who answered."""
    print_table(rows, ["set", "rule", "n", "em", "em_low", "em_high", "f1", "f1_low", "f1_high",
                       "grammar", "valid_calls", "support", "calls", "length", "seconds", "bad"])
    row = rows[0]
    print(f"agent: {row['model']}; calls answered by: {row['backend']}; {row['samples']} traces "
          f"per question at temperature {row['temperature']}\nem_low to em_high is a 95 % "
          "interval. Benchmarks are scored by their own rules, common and bamboogle by SQuAD's.")


def before_and_after(questions: list[Question], before: list[Trace], after: list[Trace]) -> str:
    """The sampled traces of the first question that only GRPO's model answers correctly."""
    for q, old, new in zip(questions, before, after, strict=True):
        if not exact_match(old.answer or "", q.golds) and exact_match(new.answer or "", q.golds):
            return (f"{q.text}   (right: {q.golds[0]})\nbefore GRPO\n{old.story()}\n"
                    f"after GRPO\n{new.story()}")
    return "No held-out question went from wrong to right."


PANELS = (("sft", "loss_agent", "loss_maker", "loss_actor", "heldout_agent", "heldout_maker"),
          ("grpo", "reward", "answer", "consistency", "heldout_sampled"),
          ("grpo", "length"), ("grpo", "grad_norm"))


def draw_curves(out: Path) -> None:
    """Write curves.png: the loss of stage 1; reward, length and gradient norm of stage 2."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    figure, axes = plt.subplots(2, 2, figsize=(11, 7), layout="constrained")
    for axis, (stage, *names) in zip(axes.flat, PANELS, strict=True):
        with open(out / stage / "metrics.csv", encoding="utf-8") as file:
            table = list(csv.DictReader(file))
        for name in names:
            steps = [int(row["step"]) for row in table if row[name]]
            values = [float(row[name]) for row in table if row[name]]
            axis.plot(steps, values, label=name, marker="o" if name.startswith("heldout") else "")
        axis.set(xlabel=f"{stage} step", yscale="log" if stage == "sft" else "linear")
        axis.legend()
    figure.savefig(out / "curves.png", dpi=110)
    plt.close(figure)
