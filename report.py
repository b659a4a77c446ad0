"""What people look at: a run's table, its story before and after GRPO, its curves, the table of an evaluation."""
import csv
from pathlib import Path

from agents import Trace
from data import InputError, read_json
from data.score import exact_match
from data.world import HELD_OUT, Question


def say(line: str) -> None:
    """A headline between the progress bars."""
    print(f"\n{line}", flush=True)


def show(config) -> None:
    """Print a run's table and story."""
    out = config.out
    if not (Path(out) / "results.json").exists():
        raise InputError(f"--out: no finished run in {out} (results.json is missing); python mtr.py makes one")
    results = read_json(Path(out) / "results.json")
    columns = ("em_greedy", "em_sampled", "f1", "grammar", "valid_calls", "support", "calls")
    say(f"{'row':<14}" + "".join(f"{name:>12}" for name in columns) + "".join(f"{s:>11}" for s in HELD_OUT))
    for row in results["rows"]:
        cells = [row[name] for name in columns] + [row["by_set"].get(s) for s in HELD_OUT]
        widths = [12] * len(columns) + [11] * len(HELD_OUT)
        print(f"{row['row']:<14}" + "".join(f"{'-' if v is None else format(v, '.3f'):>{w}}" for v, w in zip(cells, widths)))
    maker = ", ".join(f"{name} {value:.3f}" for name, value in results["maker"].items())
    print(f"n = {results['rows'][0]['n']} held-out questions; the last columns are sampled EM by set\n"
          f"ToolActor: recall {results['actor_recall']:.3f}, fidelity {results['actor_fidelity']:.3f}   ToolMaker: {maker}\n"
          f"seconds: {results['seconds']}")
    say((Path(out) / "story.txt").read_text(encoding="utf-8"))
    print(f"everything else is in {out}/: metrics.csv of each stage, grpo/traces.jsonl, curves.png, the models\n"
          f'ask it: python mtr.py ask --out {out} "a question as above"')


def before_and_after(questions: list[Question], before: list[Trace], after: list[Trace]) -> str:
    """The first held-out question that SFT alone got wrong and GRPO got right, both traces as sampled."""
    for q, old, new in zip(questions, before, after):
        if not exact_match(old.answer or "", q.golds) and exact_match(new.answer or "", q.golds):
            return f"{q.text}   (right: {q.golds[0]})\nbefore GRPO\n{old.story()}\nafter GRPO\n{new.story()}"
    return "No held-out question went from wrong to right."


def draw_curves(out: Path) -> None:
    """curves.png: loss of stage 1; reward, length, held-out EM and gradient norm of stage 2."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    tables = {stage: list(csv.DictReader(open(out / stage / "metrics.csv", encoding="utf-8"))) for stage in ("sft", "grpo")}
    panels = [("sft", ("loss_agent", "loss_maker", "loss_actor", "heldout_agent", "heldout_maker")),
              ("grpo", ("reward", "answer", "consistency", "heldout_sampled")), ("grpo", ("length",)), ("grpo", ("grad_norm",))]
    figure, axes = plt.subplots(2, 2, figsize=(11, 7), layout="constrained")
    for axis, (stage, names) in zip(axes.flat, panels):
        for name in names:
            points = [(int(r["step"]), float(r[name])) for r in tables[stage] if r[name]]
            axis.plot(*zip(*points), label=name, marker="o" if name.startswith("heldout") else "")
        axis.set(xlabel=f"{stage} step", yscale="log" if stage == "sft" else "linear")
        axis.legend()
    figure.savefig(out / "curves.png", dpi=110)
    plt.close(figure)


def show_rows(rows: list[dict]) -> None:
    """Print the rows of an evaluation."""
    print(f"{'set':<24}{'rule':<11}{'n':>6}{'EM':>7}{'95 %':>15}{'F1':>7}{'95 %':>15}{'grammar':>9}{'valid':>7}{'support':>9}"
          f"{'calls':>7}{'length':>8}{'seconds':>9}{'bad':>5}")
    for r in rows:
        valid = "-" if r["valid_calls"] is None else f"{r['valid_calls']:.3f}"
        print(f"{r['set']:<24.23}{r['rule']:<11}{r['n']:>6}" + "".join(
            f"{r[m]:>7.3f}{r[m + '_low']:>8.3f}-{r[m + '_high']:.3f} " for m in ("em", "f1")) +
            f"{r['grammar']:>8.3f}{valid:>7}{r['support']:>9.3f}{r['calls']:>7.2f}{r['length']:>8.1f}{r['seconds']:>9.1f}{r['bad']:>5}")
    print(f"agent {rows[0]['model']}; calls answered by {rows[0]['backend']}; samples {rows[0]['samples']} at temperature "
          f"{rows[0]['temperature']}. Rules: the benchmarks' own; common and bamboogle have none, F1 there is SQuAD 2.0's.")
