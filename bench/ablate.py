"""What each part of the method is worth: runs of the miniature with one thing changed.

    python bench/ablate.py                     all rows; hours on two cores
    python bench/ablate.py --rows sft grpo     some rows, with the stage 1 that they start from
    python bench/ablate.py --seeds 0           of each row, some of its seeds
    python bench/ablate.py --list              the rows, and what each one changes
    python bench/ablate.py --report            only draw tables and figures again

Each run is a process of its own. It adds a line to docs/ablation/results.csv, and runs of GRPO add their curve to
curves.csv. A run that has its line is skipped, so a stopped command can be started again. A run that collapses stays
in. The tables go to docs/ablation.md and README.md, the figures to docs/ablation/. On a processor that multiplies in
float32, a seed has another stage 1 than on one that multiplies in bfloat16; its runs get rows of their own.

What exists only to be compared is written in this file: it replaces values and functions of the project's modules
for the time of a training run. Evaluation always uses the project as it is.
"""
import argparse
import csv
import json
import random
import shutil
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from datetime import date
from functools import partial
from itertools import chain
from pathlib import Path
from statistics import fmean
from unittest import mock

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import ablation_report

import data.world
import grpo
import sft
from agents import ToolActor, Trace, run_episodes
from data import InputError, read_json
from data.folders import is_finished
from data.options import run_main
from data.results import maker_shares
from data.support import collect_evidence
from data.tools import blanked, real, shuffled
from data.training import choose_questions, schedule, spans_of_ones
from data.world import HELD_OUT, make_questions, make_world
from grpo import GRPOConfig, Simulator
from model import Transformer, load, make_optimizer, optimizer_step, save_model
from mtr import TOY_OPTIONS
from run import half_supported, set_up

ROOT = Path(__file__).resolve().parents[1]
COLUMNS = ["row", "seed", "em_greedy", "em_sampled", "f1", "grammar", "valid_calls", "support", "economy", "calls",
           "length", "em_real", "em_blanked", "em_shuffled", "unseen", "maker_accepted", "maker_exact", "rollouts_to_80",
           "em_half", "steps", "seconds", "eval_seconds", "note", "commit", "date", "arithmetic"]
CURVE = ["row", "seed", "step", "heldout_sampled", "heldout_greedy", "calls", "reward", "arithmetic"]

REJECTION_LR = sft.SFTConfig.lr / 2  # as SFT continued has it

# ------------------------------------------------------------------------------------------------ ways to train


def train_sft(row: "Row", run: Path, seed: int, toy: bool) -> Path:
    """Stage 1."""
    options = TOY_OPTIONS["sft"] if toy else row.options
    sft.train_sft(sft.SFTConfig(out=str(run), seed=seed, **options))
    return run / "sft" / "model"


def train_continued(row: "Row", run: Path, seed: int, toy: bool) -> Path:
    """More SFT, for about the seconds that GRPO takes."""
    config = sft.SFTConfig(out=str(run), seed=seed, **TOY_OPTIONS["sft"] if toy else row.options)
    shutil.copytree(stage1_of(row, run, seed), run / "sft", ignore=shutil.ignore_patterns("checkpoints"))
    sft.train_sft(config, continued=True)
    return run / "sft_continued" / "model"


def train_grpo(row: "Row", run: Path, seed: int, toy: bool) -> Path:
    """Stage 2."""
    config = stage2_config(row, run, seed, toy)
    grpo.train_grpo(config)
    return run / "grpo" / "model"


def train_rejection(row: "Row", run: Path, seed: int, toy: bool) -> Path:
    """Rejection sampling: in each of four rounds, SFT for one epoch on the right ones of the newest model's traces.

    It samples as many traces as GRPO, of the same questions.
    """
    config = stage2_config(row, run, seed, toy)
    set_up(config)
    world = make_world(seed)
    plan, held_out = choose_questions(config, world)
    start = stage1_of(row, run, seed) / "model"
    simulator = Simulator(start, config)
    model, tokenizer = load(start)
    optimizer = make_optimizer(model, REJECTION_LR, 0.01)
    agent = simulator.agent(model, config.questions * config.group, 1.0)
    rng = random.Random(f"rejection {seed}")
    with world.sealed():
        simulator.make_tools([*held_out, *chain(*plan)])
        for part in np.array_split(np.arange(config.steps), min(4, config.steps)):
            right = []
            for step in part:
                traces = simulator.traces(plan[step], config.group, int(step))
                run_episodes(agent, simulator.actor.answer, traces, config.group)
                for i, trace in enumerate(traces):
                    if grpo.reward(trace, plan[step][i // config.group].golds, config)["em"] == 1:
                        right.append(trace)
            stream = sft.batches(right, sft.SFTConfig.agent_tokens, rng)  # it never ends
            epoch = []
            while sum(map(len, epoch)) < len(right):
                epoch.append(next(stream))
            for i, batch in enumerate(epoch):
                sft.train_step(model, [batch], config.micro_tokens)
                optimizer_step(model, optimizer, REJECTION_LR * schedule(i, len(epoch), 0), config.clip_norm)
            scores, _ = grpo.score_heldout(simulator, agent, held_out)
            print(f"after {part[-1] + 1} rollouts: {len(right)} right traces, {len(epoch)} steps; held-out EM "
                  f"{scores['em_sampled']:.2f} sampled, {scores['em_greedy']:.2f} greedy", flush=True)
    save_model(model, tokenizer, run / "model")
    return run / "model"


def stage2_config(row: "Row", run: Path, seed: int, toy: bool) -> GRPOConfig:
    """The options of stage 2. They are set after the check, because a row may break its rules."""
    options = TOY_OPTIONS["grpo"] if toy else {}
    config = GRPOConfig(out=str(run), sft=str(stage1_of(row, run, seed)), seed=seed, **options)
    for name, value in row.options.items():
        setattr(config, name, value)
    return config


def stage1_of(row: "Row", run: Path, seed: int) -> Path:
    """The sft folder that a run starts from, beside its own folder."""
    return run.parents[1] / row.start / str(seed) / "sft"


# -------------------------------------------------------------------------------------------- what rows replace


def without(part: str) -> dict:
    """A reward whose part says nothing: it is 1 for each trace with an answer. The others stay as they are."""
    def reward(trace: Trace, golds: list[str], config: GRPOConfig) -> dict[str, float]:
        scores = original_reward(trace, golds, config)
        if trace.status == "answered":
            gain = (1 - scores[part]) / len(grpo.PARTS)
            scores[part] = 1.0
            scores["consistency"] += gain
            scores["reward"] += config.w_consistency * gain
        return scores

    return {(grpo, "reward"): reward}


def unmasked(model: Transformer, traces: list[Trace], temperature: float = 1.0) -> tuple:
    """grpo.trace_logprobs, but everything after the prompt has mask 1, observations too."""
    seen = []
    for trace in traces:
        prompt = trace.mask.index(1)
        seen.append(Trace(ids=trace.ids, mask=[0] * prompt + [1] * (len(trace.ids) - prompt)))
    return sft.trace_logprobs(model, seen, temperature)


def wrong_groups(traces: list[Trace], rewards: list[dict], config: GRPOConfig) -> None:
    """grpo.set_advantages, but the traces of a group are of different questions."""
    values = torch.tensor([r["reward"] for r in rewards])
    groups = torch.arange(len(traces)) % (len(traces) // config.group)
    for trace, advantage in zip(traces, grpo.advantages(values, groups, False).tolist(), strict=True):
        trace.advantage = advantage


def no_baseline(traces: list[Trace], rewards: list[dict], config: GRPOConfig) -> None:
    """grpo.set_advantages, but the advantage is the reward."""
    for trace, scores in zip(traces, rewards, strict=True):
        trace.advantage = scores["reward"]


def at_temperature_1(model: Transformer, traces: list[Trace], temperature: float = 1.0) -> tuple:
    """grpo.trace_logprobs, but the trainer doesn't know the temperature of the sampler."""
    return sft.trace_logprobs(model, traces)


def step_that_keeps_gradients(model: Transformer, optimizer: torch.optim.Optimizer, lr: float, clip_norm: float
                              ) -> float:
    """optimizer_step, but the gradient is not cleared: it holds those of all steps before."""
    gradients = [(weight, weight.grad.clone()) for weight in model.parameters()]
    norm = optimizer_step(model, optimizer, lr, clip_norm)
    for weight, gradient in gradients:
        weight.grad = gradient
    return norm


def score_with_whole_tools(simulator: Simulator, agent, questions: list) -> tuple:
    """grpo.score_heldout, but a broken ToolActor answers as a whole one."""
    return original_score(simulator, agent, questions, partial(ToolActor.answer, simulator.actor))


def broken(actor: type) -> dict:
    """A broken ToolActor answers in rollouts. Held-out questions are answered by the whole one."""
    return {(grpo, "ToolActor"): actor, (grpo, "score_heldout"): score_with_whole_tools}


class BlankActor(ToolActor):
    """Every observation is an empty object."""

    def answer(self, requests: list) -> list[dict]:
        return blanked(requests)


class ShuffledActor(ToolActor):
    """The observation is one that the same tool gave for another call."""

    def __init__(self, *args):
        super().__init__(*args)
        self.shuffled = shuffled(super().answer)

    def answer(self, requests: list) -> list[dict]:
        return self.shuffled(requests)


class WrongActor(ShuffledActor):
    """One observation in five is that of another call, drawn anew each time."""

    def __init__(self, *args):
        super().__init__(*args)
        self.rng = random.Random("wrong")

    def answer(self, requests: list) -> list[dict]:
        true = ToolActor.answer(self, requests)
        wrong = super().answer(requests)
        return [w if self.rng.random() < 0.2 else t for t, w in zip(true, wrong, strict=True)]


# Credit by turn, after GiGPO (Feng et al. 2025, arXiv 2505.10978, eq. 6 to 8). Traces of a group whose observations
# were equal so far stand at the same state. What a turn there led to is compared with what the other turns led to.
# The advantage of a turn is that of its trace plus its own. No division by std, as in the default loss. Because
# of the discount, a shorter one of two right traces gains.
DISCOUNT = 0.95  # gamma: per turn between this one and the end, as in the paper


def set_turn_advantages(traces: list[Trace], rewards: list[dict], config: GRPOConfig) -> None:
    """Set trace.advantage, and trace.by_turn: the advantage of each turn."""
    original_advantages(traces, rewards, config)
    returns = defaultdict(list)  # by state
    for i, trace in enumerate(traces):
        for state, turns_left in states(trace, i // config.group):
            returns[state].append(rewards[i]["reward"] * DISCOUNT ** turns_left)
    for i, trace in enumerate(traces):
        trace.by_turn = []
        for state, turns_left in states(trace, i // config.group):
            own = rewards[i]["reward"] * DISCOUNT ** turns_left - fmean(returns[state])
            trace.by_turn.append(trace.advantage + own)


def states(trace: Trace, group: int) -> list[tuple[str, int]]:
    """For each turn its state and the number of turns after it."""
    found = []
    seen = [group]
    for number, turn in enumerate(trace.turns):
        found.append((json.dumps(seen), len(trace.turns) - 1 - number))
        seen.append([call.observation for call in turn.calls])
    return found


def update_by_turn(model: Transformer, reference: Transformer, optimizer: torch.optim.Optimizer, traces: list[Trace],
                   config: GRPOConfig, lr: float) -> dict:
    """grpo.update on pieces of the traces. A piece ends with a turn, and only this turn has mask 1."""
    pieces = []
    for trace in traces:
        for (begin, end), advantage in zip(spans_of_ones(trace.mask), trace.by_turn, strict=True):
            mask = [0] * begin + [1] * (end - begin)
            pieces.append(Trace(ids=trace.ids[:end], mask=mask, logprobs=trace.logprobs[:end], status=trace.status,
                                advantage=advantage))
    for piece in pieces:  # each piece has the weight of a trace, 1 / (N L_max), and there are more of them
        piece.advantage *= len(pieces) / len(traces)
    return original_update(model, reference, optimizer, pieces, config, lr)


original_advantages = grpo.set_advantages
original_reward = grpo.reward
original_score = grpo.score_heldout
original_update = grpo.update
BY_TURN = {(grpo, "set_advantages"): set_turn_advantages, (grpo, "update"): update_by_turn}

# -------------------------------------------------------------------------------------------------- the rows


@dataclass(frozen=True)
class Row:
    """What is trained for one row of a table."""
    table: str
    text: str                                     # what the row is, or changes
    seeds: int = 3                                # it is run with seeds 0 to seeds - 1
    train: Callable | None = train_grpo           # None: random weights
    start: str = "sft"                            # the row whose stage 1 it starts from and plays the tools
    options: dict = field(default_factory=dict)   # of GRPOConfig or SFTConfig
    changes: dict = field(default_factory=dict)   # (module, name): value
    against: str = "grpo"                         # the row that it is compared with


STD = replace(grpo.LOSSES["dr_grpo"], scale_std=True)
ROWS = {
    "untrained": Row("main", "random weights", train=None),
    "sft": Row("main", "stage 1", 5, train_sft),
    "sft_continued": Row("main", "1,500 more steps of SFT, about GRPO's seconds", 3, train_continued),
    "rejection": Row("main", "four rounds: SFT on the right ones of as many traces as GRPO samples", 5,
                     train_rejection),
    "grpo_answer": Row("main", "GRPO, reward = right answer", options={"w_answer": 1.0, "w_consistency": 0.0}),
    "grpo": Row("main", "GRPO, the default", 5)}
for part in grpo.PARTS:
    ROWS[f"no_{part}"] = Row("parts", f"reward without {part}", changes=without(part))
ROWS |= {
    "std": Row("parts", "advantage divided by the group's std", changes={(grpo, "LOSSES"): {"dr_grpo": STD}}),
    "unmasked": Row("parts", "everything after the prompt has mask 1", changes={(grpo, "trace_logprobs"): unmasked})}
for loss in grpo.LOSSES:
    ROWS[f"{loss}_4"] = Row("losses", f"`--loss {loss} --minibatches 4`", options={"loss": loss, "minibatches": 4},
                            against="grpo" if loss == "dr_grpo" else "dr_grpo_4")
ROWS |= {
    "sft_tenth": Row("tenth", "a tenth of stage 1's steps", 3, train_sft, against="sft",
                     options={"steps": 130, "piece_steps": 15, "warmup": 10}),
    "grpo_tenth": Row("tenth", "GRPO from it", start="sft_tenth"),
    "tool_shuffled": Row("tools", "observations shuffled in training", changes=broken(ShuffledActor)),
    "tool_blank": Row("tools", "observations blank in training", changes=broken(BlankActor)),
    "tool_wrong": Row("tools", "one observation in five wrong in training", changes=broken(WrongActor)),
    "by_turn": Row("turns", "credit by turn", changes=BY_TURN)}
for share in (0.0, 0.3, 0.6, 0.9):
    name = f"{10 * share:.0f}"
    ROWS[f"sft_stops_{name}"] = Row("flaw", f"SFT, the teacher stops short in {share:.0%} of the chains", 1,
                                    train_sft, changes={(data.world, "STOPS_SHORT"): share}, against="sft")
    ROWS[f"grpo_stops_{name}"] = Row("flaw", "GRPO from it", 1, start=f"sft_stops_{name}")


# Short runs for the course: a healthy one, and faults to know by their metrics.csv.
SHORT = {"steps": 24}
Sick = partial(Row, "sick", seeds=1, against="healthy")
CONSISTENCY = {"w_answer": 0.0, "w_consistency": 1.0}
ROWS |= {
    "healthy": Sick("no fault, 24 rollouts", options=SHORT),
    "sick_unmasked": Sick("everything after the prompt has mask 1", options=SHORT, changes=ROWS["unmasked"].changes),
    "sick_lr": Sick("`--lr 3e-3`", options=SHORT | {"lr": 3e-3}),
    "sick_flat": Sick("`--temperature 0.1`", options=SHORT | {"temperature": 0.1}),
    # Held-out questions, too: its metrics.csv shows what a user with broken tools would see.
    "sick_tool": Sick("observations shuffled", options=SHORT, changes={(grpo, "ToolActor"): ShuffledActor}),
    "sick_reward": Sick("reward = consistency alone", options=SHORT | CONSISTENCY),
    "sick_groups": Sick("groups of traces of different questions", options=SHORT,
                        changes={(grpo, "set_advantages"): wrong_groups}),
    "sick_baseline": Sick("no baseline: the advantage is the reward", options=SHORT,
                          changes={(grpo, "set_advantages"): no_baseline}),
    "sick_ratio": Sick("sampler at temperature 1.5, trainer at 1", options=SHORT | {"temperature": 1.5},
                       changes={(grpo, "trace_logprobs"): at_temperature_1}),
    "sick_gradient": Sick("gradients are not cleared", options=SHORT,
                          changes={(grpo, "optimizer_step"): step_that_keeps_gradients})}

# ------------------------------------------------------------------------------------------------- one run


def run_row(name: str, seed: int, out: Path, toy: bool) -> dict:
    """Train one row with one seed and evaluate it -> its line of results.csv."""
    row = ROWS[name]
    begin = time.perf_counter()
    run = out / name / str(seed)
    shutil.rmtree(run, ignore_errors=True)  # what a stopped run left
    run.mkdir(parents=True)
    note = ""
    model = None
    if row.train:
        with ExitStack() as stack:
            for (module, attribute), value in row.changes.items():
                stack.enter_context(mock.patch.object(module, attribute, value))
            try:
                model = row.train(row, run, seed, toy)
            except SystemExit as stopped:  # a loss that is not finite: the last checkpoint is evaluated
                note = str(stopped)
                start = stage1_of(row, run, seed) / "model"
                model = max(run.glob("*/checkpoints/[0-9]*"), default=start)
    seconds = time.perf_counter() - begin
    stage1 = run / "sft" if row.train is train_sft else stage1_of(row, run, seed)
    line = {"row": name, "seed": seed, **evaluate(model, stage1 / "model", run, seed, toy), **speed(run)}
    line |= {"seconds": round(seconds), "eval_seconds": round(time.perf_counter() - begin - seconds), "note": note,
             "commit": commit(), "date": date.today().isoformat(), "arithmetic": arithmetic()}
    for folder in run.glob("*/checkpoints"):
        shutil.rmtree(folder)
    return line


def evaluate(policy: Path | None, stage1: Path, run: Path, seed: int, toy: bool) -> dict:
    """Held-out scores of a model, its tools made and simulated by a stage 1. No policy: random weights."""
    config = GRPOConfig(out=str(run), seed=seed, **TOY_OPTIONS["grpo"] if toy else {})
    set_up(config)
    world = make_world(seed)
    held_out = [q for q in make_questions(world) if q.set in HELD_OUT]
    if toy:
        held_out = held_out[::24]
    simulator = Simulator(stage1, config)
    simulator.make_tools(held_out)
    model = load(policy)[0] if policy else Transformer(simulator.model.config).init_weights(seed)
    agent = simulator.agent(model, len(held_out), 1.0)
    simulated = simulator.actor.answer
    with world.sealed():
        scores, traces = grpo.score_heldout(simulator, agent, held_out)
        columns = {"em_blanked": sampled_em(simulator, agent, held_out, blanked),
                   "em_shuffled": sampled_em(simulator, agent, held_out, shuffled(simulated))}
    columns["em_real"] = sampled_em(simulator, agent, held_out, real(world.real))
    economy = [grpo.reward_economy(t, collect_evidence(t)) for t in traces["sampled"] if t.status == "answered"]
    maker = maker_shares(simulator.boxes, held_out)
    columns |= {"economy": sum(economy) / len(held_out), "unseen": scores["by_set"].get("bamboogle"),
                "maker_accepted": maker["accepted"], "maker_exact": maker["exact"]}
    found = scores | columns
    return {name: found[name] for name in COLUMNS if name in found}


def sampled_em(simulator: Simulator, agent, questions: list, backend: Callable) -> float:
    """EM at temperature 1, with the draws of score_heldout."""
    traces = simulator.traces(questions, 1, "eval")
    run_episodes(agent, backend, traces)
    return fmean([grpo.measure(t, q.golds)["em"] for t, q in zip(traces, questions, strict=True)])


def speed(run: Path) -> dict:
    """How fast GRPO learned, on the fifty held-out questions that it evaluates every four steps."""
    found = {}
    points = [(int(row["step"]), float(row["heldout_sampled"])) for row in metrics(run) if row["heldout_sampled"]]
    if points:
        steps = read_json(run / "grpo" / "config.json")["steps"]
        good = [step for step, em in points if em >= 0.8]
        found = {"steps": steps, "rollouts_to_80": good[0] if good else None,
                 "em_half": dict(points).get(steps // 2)}
    return found


def metrics(run: Path) -> list[dict]:
    """metrics.csv of GRPO, if there is one."""
    path = run / "grpo" / "metrics.csv"
    if not path.exists():
        return []
    with open(path, encoding="utf-8") as file:
        return list(csv.DictReader(file))


def curve(run: Path) -> list[dict]:
    """A point per held-out evaluation; calls and reward are the means until the next one."""
    points = []
    for row in metrics(run):
        if row["heldout_sampled"]:
            points.append({name: row[name] for name in ("step", "heldout_sampled", "heldout_greedy")} | {"since": []})
        if row["calls"]:
            points[-1]["since"].append((float(row["calls"]), float(row["reward"])))
    for point in points:
        since = point.pop("since")
        if since:
            point["calls"], point["reward"] = [round(value, 4) for value in np.mean(since, axis=0)]
    return points


def keep_metrics(run: Path, path: Path) -> None:
    """Copy metrics.csv without its seconds, for the course."""
    path.parent.mkdir(exist_ok=True)
    rows = metrics(run)
    columns = [name for name in rows[0] if not name.startswith("time_")]
    path.unlink(missing_ok=True)
    append(path, columns, [{name: row[name] for name in columns} for row in rows])


def commit() -> str:
    """The commit of the code that runs, and whether files were changed since."""
    command = ["git", "describe", "--always", "--dirty", "--exclude", "*"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    return done.stdout.strip()


def arithmetic() -> str:
    """The numbers in which this processor multiplies in training."""
    return "bfloat16" if half_supported("cpu") else "float32"


def append(path: Path, columns: list[str], lines: list[dict]) -> None:
    with open(path, "a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        if not file.tell():
            writer.writeheader()
        for line in lines:
            writer.writerow({k: round(v, 4) if isinstance(v, float) else v for k, v in line.items()})


# ---------------------------------------------------------------------------------------------- all runs


def wanted(names: list[str], seeds: list[int], done: set, out: Path) -> list[tuple[str, int]]:
    """The runs to make, each after the stage 1 that it starts from."""
    runs = []
    for name in names:
        row = ROWS[name]
        for seed in [seed for seed in range(row.seeds) if not seeds or seed in seeds]:
            if (name, seed) in done:
                continue
            if row.train is not train_sft and not is_finished(out / row.start / str(seed) / "sft"):
                runs.append((row.start, seed))
            runs.append((name, seed))
    return list(dict.fromkeys(runs))


def main() -> None:
    """Parse the command line; list, run one, run all, report."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", choices=ROWS, metavar="ROW", default=list(ROWS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[], help="default: all seeds of a row")
    parser.add_argument("--out", type=Path, help="folder of the runs (default: runs/ablation_ARITHMETIC; of toy runs: RESULTS/runs)")
    parser.add_argument("--results", type=Path, default=ROOT / "docs" / "ablation",
                        help="folder of results.csv, curves.csv and the figures")
    parser.add_argument("--toy", action="store_true", help="tiny runs, only to check that they work")
    parser.add_argument("--list", action="store_true", help="list the rows")
    parser.add_argument("--report", action="store_true", help="only draw tables and figures again")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)  # one run, in this process
    options = parser.parse_args()
    if options.list:
        for name, row in ROWS.items():
            print(f"{name:16} {row.table:7} {row.seeds} seeds  {row.text}")
        return
    here = arithmetic()
    out = options.out or (options.results / "runs" if options.toy else ROOT / "runs" / f"ablation_{here}")
    results = options.results / "results.csv"
    if options.toy and options.results.resolve() == (ROOT / "docs" / "ablation"):
        raise InputError("toy: choose a folder with --results, so that docs/ablation keeps its results")
    options.results.mkdir(parents=True, exist_ok=True)
    done = {(line["row"], int(line["seed"])) for line in ablation_report.read(results) if line["arithmetic"] == here}
    if options.here:
        name, seed = options.rows[0], options.seeds[0]
        line = run_row(name, seed, out, options.toy)
        if (name, seed) in done:  # a stage 1 whose folder was gone
            return
        points = curve(out / name / str(seed))
        of_run = {"row": name, "seed": seed, "arithmetic": here}
        append(options.results / "curves.csv", CURVE, [of_run | point for point in points])
        if ROWS[name].table == "sick":
            keep_metrics(out / name / str(seed), options.results / "sick" / f"{ablation_report.row_of(line)}.csv")
        append(results, COLUMNS, [line])
        return
    if not options.report:
        runs = wanted(options.rows, options.seeds, done, out)
        if not runs:
            print(f"nothing to run: {results} has these rows and seeds")
        for number, (name, seed) in enumerate(runs, 1):
            print(f"{number}/{len(runs)}  {name}, seed {seed}: {ROWS[name].text}", flush=True)
            command = [sys.executable, __file__, "--here", "--rows", name, "--seeds", str(seed),
                       "--out", out, "--results", options.results, *["--toy"] * options.toy]
            if subprocess.run(command).returncode:
                raise InputError(f"{name}, seed {seed}: the run failed; its messages stand above")
    ablation_report.write(options.results, ROWS)


if __name__ == "__main__":
    run_main(main)
