"""Stage 2: GRPO with a composite reward. For each question, a group of G traces is sampled. Traces
that score above their group's mean become more likely, the others less likely.

    advantage    A_i = (R_i - mean(R)) / (std(R) + 1e-4)     mean and std over the group of trace i
    ratio        r_it = pi(o_it | before) / pi_old(o_it | before)
    KL estimate  k3_it = q - log(q) - 1, with q = pi_ref(o_it | before) / pi(o_it | before)
    objective    J = sum_i w_i sum_t [ min(r_it A_i, clip(r_it, 1 - eps_low, 1 + eps_high) A_i)
                                       - beta k3_it ]

    R_i is the reward of trace i, o_it its t-th sampled token, and `before` all tokens before it.
    pi is the model in training, pi_old the same model before the update, pi_ref stage 1's model.

    token weight, for N traces with |o_i| sampled tokens each:
      grpo       w_i = 1 / (N |o_i|)      DeepSeekMath (Shao et al. 2024, eq. 3)
      dapo       w_i = 1 / sum_j |o_j|    DAPO (Yu et al. 2025); without resampling of groups, and
                                          a truncated trace counts, so runaway traces are unlearned
      dr_grpo    w_i = 1 / (N L_max)      Dr. GRPO (Liu et al. 2025); A_i without the division
      gspo       w_i as grpo              GSPO (Zheng et al. 2025); one ratio per trace

The clip is PPO's (Schulman et al. 2017, eq. 7), k3 is from Schulman's "Approximating KL". Where we
depart from the papers:
  1. Only sampled tokens are summed. Everything else, such as observations, is masked.
  2. pi_old is computed by the trainer, not taken from the sampler. So before the first optimizer
     step of a rollout, every ratio is 1.
  3. A group whose rewards are all equal is called flat. Its advantages are 0. Without KL, it is
     left out of the passes, but not of N.
  4. Dr. GRPO's L_max is --trace-tokens, which includes prompt and observations.

Shapes: B traces, T tokens.
"""
import random
import time
from collections import defaultdict
from dataclasses import dataclass
from itertools import chain, product
from pathlib import Path
from statistics import fmean

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

import ranks
from agents import AutoAgent, ToolActor, Toolbox, ToolMaker, Trace, run_episodes
from data import InputError
from data.evidence import Evidence, is_used
from data.folders import stage1_folder, stage1_model
from data.options import GRAPH, StageConfig, command_line, option, run_main
from data.plan import STAGE1, names_folder, show_plan
from data.prompts import LONG
from data.read import question_files
from data.results import by_set, counts, means
from data.score import exact_match, f1, normalize
from data.support import collect_evidence, supporting
from data.training import choose_questions, is_checkpoint, micro_batches, world_seed
from data.world import Question, make_world
from graph import make_sampler
from model import Transformer, adapted, load, make_optimizer, optimizer_step, pad
from run import Run, pick_device, set_up, weights_type
from sft import rehearse, trace_logprobs


@dataclass(frozen=True)
class Loss:
    """Settings that differ between the papers, besides token_weights and the ratio in policy_loss.
    """
    scale_std: bool   # divide advantages by the group's standard deviation
    clip_low: float   # eps_low
    clip_high: float  # eps_high


LOSSES = {"grpo": Loss(scale_std=True, clip_low=0.2, clip_high=0.2),
          "dapo": Loss(scale_std=True, clip_low=0.2, clip_high=0.28),
          "dr_grpo": Loss(scale_std=False, clip_low=0.2, clip_high=0.2),
          "gspo": Loss(scale_std=True, clip_low=3e-4, clip_high=4e-4)}


@dataclass
class GRPOConfig(StageConfig):
    """The options of stage 2."""
    out: str = option("run", "run folder; this stage starts from OUT/sft and writes OUT/grpo")
    sft: str = option("", "the sft folder of another run; it is copied to OUT/sft first",
                      unset="OUT/sft is there")
    data: tuple = option((), "question files to train on; one question in twenty is held out",
                         unset="the fictional world's")
    skip_bad: bool = option(False, "skip broken records of these files")
    steps: int = option(56, "steps; each trains on a rollout of questions x group traces", real=200)
    questions: int = option(12, "questions per rollout", real=16)
    group: int = option(8, "G: traces per question", least=2)
    epochs: int = option(1, "how often each rollout is trained on")
    minibatches: int = option(1, "optimizer steps per epoch")
    lr: float = option(3e-4, "learning rate, falls linearly to 0", real=1e-6, lora=1e-5)
    loss: str = option("dr_grpo", "whose loss, see above", choices=tuple(LOSSES))
    beta: float = option(0.0, "weight of the KL to stage 1's model; 0: not computed", least=0)
    w_answer: float = option(0.7, "weight of a correct answer in the reward")
    w_consistency: float = option(0.3, "weight of internal consistency in the reward")
    partial: float = option(0.0, "credit for token F1 if the answer is not exact", least=0)
    temperature: float = option(1.0, "temperature of sampling and of the trainer's softmax")
    max_turns: int = option(8, "turns per trace")
    turn_tokens: int = option(112, "new tokens per turn", real=512)
    trace_tokens: int = option(896, "tokens per trace, with prompt and observations", real=4096)
    sim_rows: int = option(64, "conversations of ToolMaker and ToolActor at once", real=32)
    eval_every: int = option(4, "steps between two held-out evaluations", real=10)
    save_every: int = option(5, "steps between two checkpoints", real=1)
    graph: bool = option(False, GRAPH)
    plan: str = option("", "print the GPU memory that training this folder takes", bare=STAGE1)

    def is_real(self) -> bool:
        """Whether a checkpoint is trained."""
        return names_folder(self.plan) or is_checkpoint(stage1_folder(self.out, self.sft))

    def __post_init__(self):
        super().__post_init__()
        # Every right answer must outrank every wrong one. With c the consistency of the right one,
        # this is w_answer + w_consistency c > w_answer partial + w_consistency. c is above 0, since
        # reward_grammar is, but it can be small.
        if not self.w_answer * (1 - self.partial) >= self.w_consistency - 1e-9:
            raise InputError(f"w_answer: {self.w_answer} lets a wrong answer outrank a right one; "
                             "w_answer · (1 - partial) must be at least w_consistency")


# ------------------------------------------------------------------------------------------ reward
# R = w_answer · answer + w_consistency · consistency. Consistency is the mean of five parts, which
# docs/reward.md explains by examples. data/evidence.py and data/support.py compare the texts.


def reward_grammar(trace: Trace, evidence: list[Evidence]) -> float:
    """(1 + turns in the strict grammar) / (1 + turns)."""
    strict = [turn for turn in trace.turns if not turn.departures]
    return (1 + len(strict)) / (1 + len(trace.turns))


def reward_valid(trace: Trace, evidence: list[Evidence]) -> float:
    """1 / (1 + refused calls)."""
    return 1 / (1 + sum(e.call.error is not None for e in evidence))


def reward_arguments(trace: Trace, evidence: list[Evidence]) -> float:
    """Share of the arguments that are grounded. Repeated calls don't count."""
    grounded = list(chain(*[e.grounded for e in evidence if not e.repeated]))
    return sum(grounded) / len(grounded) if grounded else reward_valid(trace, evidence)


def reward_support(trace: Trace, evidence: list[Evidence]) -> float:
    """1 if calls support the answer, else 0."""
    return 1.0 if supporting(trace, evidence) else 0.0


def reward_economy(trace: Trace, evidence: list[Evidence]) -> float:
    """Share of the calls that are of use.

    A call is of use if it supports the answer, or if a name or number in its result is an argument
    of a later call. If the answer is supported, one call about each thing in the question is, too.
    """
    supported = supporting(trace, evidence)
    useful = [e for e in evidence if e in supported or is_used(e, evidence)]
    for e in evidence:
        uncovered = e.entity and e.entity not in [other.entity for other in useful]
        if supported and e.new_words and uncovered:
            useful.append(e)
    return len(useful) / len(evidence) if evidence else 0.0


PARTS = {"grammar": reward_grammar, "valid": reward_valid, "arguments": reward_arguments,
         "support": reward_support, "economy": reward_economy}


def reward(trace: Trace, golds: list[str], config: GRPOConfig) -> dict[str, float]:
    """The reward and its parts. Without a useful call, a trace earns only its grammar."""
    if trace.status != "answered":
        return dict.fromkeys(("reward", "em", "answer", "consistency", *PARTS), 0.0)
    evidence = collect_evidence(trace)
    parts = {name: part(trace, evidence) for name, part in PARTS.items()}
    if parts["economy"] == 0:  # useless turns earn nothing
        parts["grammar"] = 1 / (1 + len([turn for turn in trace.turns if turn.departures]))
        parts["valid"] = parts["arguments"] = 0.0
    consistency = sum(parts.values()) / len(parts)
    em = 0.0
    answer = 0.0
    if normalize(trace.answer):  # else an empty answer would equal the gold answer "A", an article
        em = exact_match(trace.answer, golds)
        answer = em or config.partial * f1(trace.answer, golds)
    total = config.w_answer * answer + config.w_consistency * consistency
    return {"reward": total, "em": em, "answer": answer, "consistency": consistency, **parts}


# ------------------------------------------------------------------------------ advantage and loss


def advantages(rewards: Tensor, groups: Tensor, scale_std: bool) -> Tensor:
    """rewards (B,), group numbers (B,) -> advantages (B,) in float64.

    0 in a flat group. NaN rewards are ignored.
    """
    out = torch.zeros(len(rewards), dtype=torch.float64)
    for group in groups.unique():
        rows = (groups == group) & ~rewards.isnan()
        r = rewards[rows].double()
        if len(r) > 1 and r.max() > r.min():
            out[rows] = r - r.mean()
            if scale_std:
                out[rows] /= r.std(correction=0) + 1e-4
    return out


def set_advantages(traces: list[Trace], rewards: list[dict], config: GRPOConfig) -> None:
    """Set trace.advantage. Each config.group consecutive traces are one group."""
    values = torch.tensor([r["reward"] for r in rewards])
    groups = torch.arange(len(traces)) // config.group
    out = advantages(values, groups, LOSSES[config.loss].scale_std)
    for trace, advantage in zip(traces, out.tolist(), strict=True):
        trace.advantage = advantage


def token_weights(lengths: Tensor, loss: str, most_tokens: int) -> Tensor:
    """Number of sampled tokens of each trace (N,) -> w_i (N,). most_tokens: L_max."""
    N = len(lengths)
    if loss == "dapo":
        return torch.ones(N) / lengths.sum().clamp(min=1)
    if loss == "dr_grpo":
        return torch.ones(N) / (N * most_tokens)
    return 1 / (N * lengths.clamp(min=1))


def set_weights(traces: list[Trace], config: GRPOConfig) -> None:
    """Set trace.weight, over all traces of one optimizer step."""
    lengths = torch.tensor([sum(trace.mask) for trace in traces])
    weights = token_weights(lengths, config.loss, config.trace_tokens)
    for trace, weight in zip(traces, weights.tolist(), strict=True):
        trace.weight = weight


def policy_loss(logprobs: Tensor, old: Tensor, reference: Tensor | None, advantage: Tensor,
                mask: Tensor, weight: Tensor, config: GRPOConfig
                ) -> tuple[Tensor, dict[str, Tensor]]:
    """-J over some traces of a step, and what is logged: sums of KL and clipped ratios over tokens.

    logprobs, old, reference and mask are (B, T); advantage and weight are (B,).
    """
    settings = LOSSES[config.loss]
    log_ratio = (logprobs - old) * mask
    if config.loss == "gspo":  # one ratio per trace: the geometric mean over its tokens
        log_ratio = log_ratio.sum(1) / mask.sum(1).clamp(min=1)  # (B,)
        log_ratio = log_ratio[:, None].expand_as(logprobs)  # (B, T)
    ratio = log_ratio.exp()  # r_it
    A = advantage[:, None].to(ratio.dtype)  # A_i
    clipped = ratio.clamp(1 - settings.clip_low, 1 + settings.clip_high)
    objective = torch.minimum(ratio * A, clipped * A)
    kl = torch.zeros_like(ratio)
    if reference is not None:
        log_q = (reference - logprobs) * mask
        kl = log_q.exp() - log_q - 1  # k3_it
        objective = objective - config.beta * kl
    stats = {"kl": (kl * mask).sum(),
             "clip_low": (mask & (ratio < 1 - settings.clip_low) & (A < 0)).sum(),
             "clip_high": (mask & (ratio > 1 + settings.clip_high) & (A > 0)).sum()}
    loss = -(weight[:, None] * mask * objective).sum()  # -J
    return loss, {name: value.detach() for name, value in stats.items()}


# ----------------------------------------------------------------------------------------- rollout


class Simulator:
    """The frozen model of stage 1 as ToolMaker, ToolActor and pi_ref, and the tools it made."""

    def __init__(self, folder: Path, config, long_prompts: bool = False, rows: int = 64,
                 dtype: torch.dtype = torch.float32):
        """long_prompts: for questions from files, whose prompts are longer than the miniature's."""
        self.config = config
        self.model, self.tokenizer = load(folder, pick_device(), dtype)
        self.model.requires_grad_(False)
        most = self.model.config.max_position_embeddings
        if config.trace_tokens > most:
            raise InputError(f"trace_tokens: {config.trace_tokens}, but the model in {folder} is "
                             f"made for {most}")
        maker_tokens = 480  # the longest replies of the miniature
        actor_tokens = 64
        slots = 160 + maker_tokens  # 160: its longest prompt
        if long_prompts or self.tokenizer.prompts is LONG:
            maker_tokens = actor_tokens = max(480, config.turn_tokens)
            slots = min(most, config.trace_tokens + maker_tokens)
        sampler = make_sampler(config, self.model, self.tokenizer, rows, slots)
        self.maker = ToolMaker(sampler, maker_tokens)
        self.actor = ToolActor(sampler, actor_tokens)
        self.boxes: dict[str, Toolbox] = {}  # by question id

    def make_tools(self, questions: list[Question]) -> None:
        """Let the ToolMaker write the tools of each new question, once."""
        todo = list({q.id: q for q in questions if q.id not in self.boxes}.values())
        for i in tqdm(range(0, len(todo), 64), desc="tools", disable=len(todo) <= 64):
            part = todo[i:i + 64]
            boxes = self.maker.make([q.text for q in part], (self.config.seed,))
            self.boxes.update(zip([q.id for q in part], boxes, strict=True))

    def agent(self, model: Transformer, rows: int, temperature: float) -> AutoAgent:
        """AutoAgent over the policy itself, so it samples with the newest weights."""
        c = self.config
        sampler = make_sampler(c, model, self.tokenizer, rows, c.trace_tokens)
        return AutoAgent(sampler, c.max_turns, c.turn_tokens, c.trace_tokens, temperature)

    def traces(self, questions: list[Question], group: int, *key) -> list[Trace]:
        """`group` new traces for each question. `key`, such as the step, seeds their sampling."""
        traces = []
        for q, sample in product(questions, range(group)):
            own_key = (self.config.seed, *key, q.id, sample)
            traces.append(Trace(q.text, self.boxes[q.id].tools, own_key))
        return traces


def score_heldout(simulator: Simulator, agent: AutoAgent, questions: list[Question], backend=None,
                  closed_book: bool = False) -> tuple[dict, dict[str, list[Trace]]]:
    """Answer held-out questions -> a row of results, and the greedy and the sampled traces.

    em_greedy is at temperature 0. All other columns are at temperature 1.
    """
    row = {"n": len(questions)}
    traces = {}
    rows = agent.sampler.capacity
    before = agent.temperature
    for name, temperature in (("greedy", 0.0), ("sampled", 1.0)):
        agent.temperature = temperature
        traces[name] = simulator.traces(questions, 1, "eval")
        for i in range(0, len(questions), rows):
            run_episodes(agent, backend or simulator.actor.answer, traces[name][i:i + rows],
                         closed_book=closed_book)
        measures = [measure(t, q.golds) for t, q in zip(traces[name], questions, strict=True)]
        row[f"em_{name}"] = float(np.mean([m["em"] for m in measures]))
    agent.temperature = before
    # The second pass, the sampled one, has left its measures.
    row["by_set"] = by_set([m["em"] for m in measures], questions)
    return row | means(measures), traces


def measure(trace: Trace, golds: list[str], rule: str = "hotpotqa") -> dict[str, float]:
    """The scores of one trace by the official rules (rule: see data.score.f1). A trace without an
    answer is scored as if its answer were empty.
    """
    answered = trace.status == "answered"
    answer = trace.answer if answered else ""
    support = reward_support(trace, collect_evidence(trace)) if answered else 0.0
    return {"em": exact_match(answer, golds), "f1": f1(answer, golds, rule),
            "grammar": reward_grammar(trace, []) if answered else 0.0, "support": support,
            **counts(trace)}


# ------------------------------------------------------------------------------------------ update


@torch.no_grad()
def store_logprobs(model: Transformer, traces: list[Trace], name: str, config: GRPOConfig) -> None:
    """Set trace.old or trace.reference to the log-probabilities under the model."""
    for part in micro_batches(traces, config.micro_tokens):
        logprobs, _, _ = trace_logprobs(model, part, config.temperature)
        for trace, row in zip(part, logprobs.tolist(), strict=True):
            setattr(trace, name, row[:len(trace.ids)])


def update(model: Transformer, reference: Transformer, optimizer: torch.optim.Optimizer,
           traces: list[Trace], config: GRPOConfig, lr: float) -> dict[str, float]:
    """The optimizer steps of one rollout -> what to log; most are means per sampled token."""
    learned = [t for t in traces if t.advantage != 0 or config.beta > 0]
    own = ranks.share(learned)
    if config.epochs * config.minibatches > 1:
        store_logprobs(model, own, "old", config)
    if config.beta > 0:
        store_logprobs(reference, own, "reference", config)

    sums: dict[str, float] = defaultdict(float)
    norms = []
    shuffle = random.Random(f"{config.seed} {lr}")  # each step has its own lr
    for _ in range(config.epochs):
        order = shuffle.sample(traces, len(traces)) if config.minibatches > 1 else traces
        for indices in np.array_split(np.arange(len(order)), config.minibatches):
            minibatch = [order[i] for i in indices]
            set_weights(minibatch, config)
            batch = [t for t in minibatch if t in own]
            for part in micro_batches(batch, config.micro_tokens):
                add_gradient(model, part, config, sums)
            if any(t in learned for t in minibatch):  # all ranks step together
                ranks.sum_gradients(model)
                norms.append(optimizer_step(model, optimizer, lr, config.clip_norm))

    sums = ranks.add_up(sums)
    tokens = max(1.0, sums["tokens"])
    log = {name: sums[name] / tokens for name in ("kl", "clip_low", "clip_high", "entropy")}
    log |= {"loss": sums["loss"] / max(1, len(norms)), "updates": len(norms),
            "grad_norm": float(np.mean(norms)) if norms else 0.0}
    if learned:  # how much the log-probabilities of sampler and trainer differ
        ranks.exchange(learned, "old")
        gaps = [np.subtract(t.logprobs, t.old)[np.array(t.mask) == 1] for t in learned]
        gap = np.abs(np.concatenate(gaps))
        log |= {"gap_mean": float(gap.mean()), "gap_max": float(gap.max())}
    return log


def add_gradient(model: Transformer, part: list[Trace], config: GRPOConfig,
                 sums: dict[str, float]) -> None:
    """Add the gradient of -J over one micro-batch, and what to log to `sums`."""
    logprobs, entropy, mask = trace_logprobs(model, part, config.temperature)  # (B, T)
    if config.epochs * config.minibatches == 1:  # before the only step, pi is pi_old
        for trace, row in zip(part, logprobs.tolist(), strict=True):
            trace.old = row[:len(trace.ids)]
    like = {"device": logprobs.device, "dtype": logprobs.dtype}
    old = pad([t.old for t in part], **like)  # (B, T)
    reference = pad([t.reference for t in part], **like) if config.beta > 0 else None
    advantage = torch.tensor([t.advantage for t in part], **like)  # (B,)
    weight = torch.tensor([t.weight for t in part], **like)  # (B,)
    loss, stats = policy_loss(logprobs, old, reference, advantage, mask, weight, config)
    loss.backward()
    stats |= {"loss": loss.detach(), "entropy": entropy.sum(), "tokens": mask.sum()}
    for name, value in stats.items():
        sums[name] += float(value)


# -------------------------------------------------------------------------------------------- loop

GRPO_COLUMNS = ["step", "reward", "em", "answer", "consistency", *PARTS, "finished", "truncated",
                "flat_groups", "calls", "length", "entropy", "kl", "clip_low", "clip_high",
                "gap_mean", "gap_max", "grad_norm", "updates", "lr", "memo_hits", "heldout_greedy",
                "heldout_sampled", "time_sample", "time_train", "loss"]
KEPT = 3  # groups of each step whose traces go to traces.jsonl


def summary(traces: list[Trace], rewards: list[dict], config: GRPOConfig) -> dict[str, float]:
    """Means over the traces of a rollout."""
    row = {name: fmean([r[name] for r in rewards]) for name in rewards[0]}
    groups = [traces[i:i + config.group] for i in range(0, len(traces), config.group)]
    return row | {"finished": fmean([t.status == "answered" for t in traces]),
                  "truncated": fmean([t.status == "truncated" for t in traces]),
                  "flat_groups": fmean([not any(t.advantage for t in group) for group in groups]),
                  "calls": fmean([len(t.calls) for t in traces]),
                  "length": fmean([sum(t.mask) for t in traces])}


def loop(simulator: Simulator, model: Transformer, plan: list[list[Question]],
         held_out: list[Question], run: Run) -> None:
    """The loop of stage 2: roll out, reward, advantage, update, log, evaluate."""
    config = simulator.config
    actor = simulator.actor
    rows = -(-config.questions // ranks.world_size()) * config.group
    agent = simulator.agent(model, rows, config.temperature)
    # With beta1 0.9, old gradients dominate, and the policy overshoots.
    optimizer = make_optimizer(model, config.lr, 0.0, momentum=0.5, offload=config.offload)
    if config.is_real():
        rehearse(model, optimizer, config.trace_tokens, config.micro_tokens)
        agent.rehearse()
    simulator.make_tools([*held_out, *chain(*plan)])
    steps = run.steps(len(plan), model, simulator.tokenizer, optimizer,
                      more=lambda: {"memo": list(actor.memo.items())})  # kept in checkpoints
    bar = tqdm(steps, desc="grpo", unit="step", mininterval=1, total=len(plan),
               initial=run.state["step"])
    for step in bar:
        row = {"step": step, "lr": config.lr * (1 - step / config.steps)}
        if step % config.eval_every == 0:
            row |= evaluate_heldout(simulator, agent, held_out, run, step)
        # Roll out, reward, advantage.
        start = time.perf_counter()
        asked = actor.asked
        remembered = actor.remembered
        traces = simulator.traces(ranks.share(plan[step]), config.group, step)
        run_episodes(agent, actor.answer, traces, config.group)
        traces = ranks.gather(traces, config.group)
        golds = [plan[step][i // config.group].golds for i in range(len(traces))]
        rewards = [reward(t, gold, config) for t, gold in zip(traces, golds, strict=True)]
        set_advantages(traces, rewards, config)
        # Update.
        middle = time.perf_counter()
        log = update(model, simulator.model, optimizer, traces, config, row["lr"])
        end = time.perf_counter()

        # Log.
        row |= summary(traces, rewards, config) | log
        row["memo_hits"] = (actor.remembered - remembered) / max(1, actor.asked - asked)
        row |= {"time_sample": middle - start, "time_train": end - middle}
        run.log(row)
        shown = KEPT * config.group
        run.save_traces(step, traces[:shown], golds[:shown], rewards[:shown])
        if log.get("gap_mean", 0) > 0.05:  # more than rounding
            bar.write(f"step {step}: log-probabilities of sampler and trainer differ by "
                      f"{log['gap_mean']:.3f} in the mean")
        bar.set_postfix(reward=f"{row['reward']:.3f}", train_em=f"{row['em']:.3f}", refresh=False)
    last = evaluate_heldout(simulator, agent, held_out, run, config.steps)
    run.log({"step": config.steps, **last})


def evaluate_heldout(simulator: Simulator, agent: AutoAgent, held_out: list[Question], run: Run,
                     step: int) -> dict[str, float]:
    """Held-out EM before step `step`. Twelve sampled traces go to traces.jsonl."""
    row, traces = score_heldout(simulator, agent, held_out)
    picked = np.linspace(0, len(held_out) - 1, min(12, len(held_out))).astype(int)
    shown = [traces["sampled"][i] for i in picked]
    golds = [held_out[i].golds for i in picked]
    rewards = [reward(t, g, simulator.config) for t, g in zip(shown, golds, strict=True)]
    run.save_traces(step, shown, golds, rewards)
    return {"heldout_greedy": row["em_greedy"], "heldout_sampled": row["em_sampled"]}


def train_grpo(config: GRPOConfig) -> None:
    """Run stage 2: OUT/sft/model -> OUT/grpo/model."""
    set_up(config, checkpoint=config.is_real())
    # Broken question files are refused before anything is written.
    chosen = choose_questions(config, None) if config.data else None
    with ranks.rank0_first():
        start = stage1_model(config.out, config.sft, config.resume or ranks.rank() > 0)
    world = make_world(world_seed(config.out))
    plan, held_out = chosen or choose_questions(config, world)
    simulator = Simulator(start, config, bool(config.data), config.sim_rows, weights_type())
    run = Run(Path(config.out) / "grpo", config, GRPO_COLUMNS,
              (start, *question_files(config.data)))
    if run.finished:
        return
    simulator.actor.memo.update(run.state.get("memo", []))
    if config.lora:  # one copy of the weights for policy, simulator and reference
        model = adapted(simulator.model, config.lora, config.seed)
    else:
        model, _ = load(start, pick_device(), weights_type())
    model.save_memory = simulator.model.save_memory = config.is_real()
    with world.sealed():  # any look-up of a fact raises
        loop(simulator, model, plan, held_out, run)
    run.save(model, simulator.tokenizer)


def main() -> None:
    """python grpo.py"""
    config = command_line(GRPOConfig, __doc__)
    if config.plan:
        card = torch.cuda.mem_get_info()[1] if torch.cuda.is_available() else 0
        return show_plan(config, card)
    train_grpo(config)
    data = " --data FILE" if config.data else ""
    print(f"stage 2 is done: {Path(config.out) / 'grpo'}\n"
          f"curves and traces (report.html): python mtr.py show --out {config.out}\n"
          f"evaluation: python mtr.py eval --out {config.out}{data}")


if __name__ == "__main__":
    run_main(main)
