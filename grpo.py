"""Stage 2: GRPO with a composite reward. For each question a group of G traces is sampled; what was better than
its group's mean becomes likelier.

    A_i  = R_i - mean(R)                 over the group; divided by its population std + 1e-4, or not (--scale-std)
    r_it = pi(o_it | before) / pi_old(o_it | before)                            for each sampled token o_it
    J    = sum_it w_it · [ min(r_it A_i, clip(r_it, 1 - eps_low, 1 + eps_high) A_i) - beta · k3_it ]
    k3   = pi_ref / pi - log(pi_ref / pi) - 1                                   (Schulman, "Approximating KL")

GRPO: Shao et al. 2024 (DeepSeekMath), eq. 3 and 4; the clip: Schulman et al. 2017 (PPO), eq. 7; two clip bounds and
the token mean: DAPO (Yu et al. 2025); no std and a constant length: Dr. GRPO (Liu et al. 2025); one ratio a
sequence: GSPO (Zheng et al. 2025). Where we depart from them:
  1. Observations, and all else that the policy didn't sample, have no part in any sum.
  2. pi_old is the trainer's own first pass, not the sampler's number: with one update a rollout every ratio is
     exactly 1, with more the first ones up to rounding. The gap between sampler and trainer is logged.
  3. Flat groups, whose rewards are all equal, have advantage exactly 0; without a KL term they are left out of the pass.
  4. Dr. GRPO's constant is the most tokens that a trace may have, prompt and observations included.

Shapes: B traces, T tokens, G group. R = w_answer · answer + w_consistency · consistency, all in [0, 1].
"""
import json
import random
import re
import time
from collections import defaultdict
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from agents import UTILITIES, AutoAgent, Call, Tool, ToolActor, Toolbox, ToolMaker, Trace, run_episodes
from data import InputError
from data.read import read_questions
from data.score import exact_match, f1, normalize
from data.world import HELD_OUT, Question, make_questions, make_world, mixed
from model import Sampler, Transformer, load, token_logprobs
from run import Run, at_least, command_line, half_precision, option, pick_device, positive, read_config, run_main, set_up
from sft import SFTConfig, make_optimizer, micro_batches, optimizer_step, pad

# What each paper does, beside its sum over tokens (token_weights) and its ratio (policy_loss).
LOSSES = {"grpo": {"scale_std": True, "clip_low": 0.2, "clip_high": 0.2, "mask_overlong": False},
          "dapo": {"scale_std": True, "clip_low": 0.2, "clip_high": 0.28, "mask_overlong": True},
          "dr_grpo": {"scale_std": False, "clip_low": 0.2, "clip_high": 0.2, "mask_overlong": False},
          "gspo": {"scale_std": True, "clip_low": 3e-4, "clip_high": 4e-4, "mask_overlong": False}}


@dataclass
class GRPOConfig:
    """What stage 2 can be told."""
    out: str = option("run", "run folder: starts from OUT/sft, writes OUT/grpo")
    seed: int = option(0, "which questions, and all random numbers of the traces")
    threads: int = option(0, "CPU threads; 0 leaves the choice to torch")
    data: tuple = option((), "question files in place of the world's questions; every twentieth question is held out")
    skip_bad: bool = option(False, "leave broken records of these files out")
    steps: int = option(20, "rollouts")
    questions: int = option(12, "questions a rollout")
    group: int = option(8, "G: traces a question")
    epochs: int = option(1, "passes over a rollout")
    minibatches: int = option(1, "optimizer steps a pass")
    lr: float = option(5e-4, "learning rate, about 1e-6 for a real checkpoint; falls linearly to 0")
    clip_norm: float = option(1.0, "largest norm of the gradient")
    loss: str = option("dapo", "which sum over tokens and which ratio; sets the next four", choices=tuple(LOSSES))
    scale_std: bool | None = option(None, "divide advantages by the group's std")
    clip_low: float | None = option(None, "the ratio is clipped below at 1 - this")
    clip_high: float | None = option(None, "and above at 1 + this")
    mask_overlong: bool | None = option(None, "leave truncated traces out of the loss and its count")
    beta: float = option(0.0, "weight of the KL to the model that stage 1 left; 0: no reference pass")
    w_answer: float = option(0.7, "weight of a right answer")
    w_consistency: float = option(0.3, "weight of internal consistency")
    partial: float = option(0.0, "credit for token F1 where the answer isn't exact")
    temperature: float = option(1.0, "the policy is sampled, and scored, at this temperature")
    max_turns: int = option(8, "turns until a trace is cut off")
    turn_tokens: int = option(112, "new tokens a turn")
    trace_tokens: int = option(896, "tokens a trace, prompt included")
    micro_tokens: int = option(4096, "padded tokens a pass of the trainer; turn down if memory runs out")
    eval_every: int = option(13, "steps between two looks at the held-out questions")
    save_every: int = option(5, "steps between two checkpoints; one is also written at each held-out look")
    resume: bool = option(False, "go on from the newest checkpoint in OUT, if there is one")

    def __post_init__(self):
        if self.loss not in LOSSES:
            raise InputError(f"loss: expected one of {', '.join(LOSSES)}, found {self.loss!r}")
        for name, value in LOSSES[self.loss].items():
            setattr(self, name, value if getattr(self, name) is None else getattr(self, name))
        positive(self, "steps", "questions", "epochs", "minibatches", "lr", "clip_norm", "clip_low", "clip_high",
                 "temperature", "max_turns", "turn_tokens", "trace_tokens", "eval_every", "save_every", "w_consistency")
        at_least(self, group=2, beta=0, threads=0, partial=0)  # a group of one has no baseline
        if not float("inf") > self.w_answer * (1 - self.partial) > self.w_consistency * (1 - 1 / len(PARTS)):
            raise InputError(f"w_answer: {self.w_answer} is too small beside w_consistency {self.w_consistency}: a wrong "
                             "answer could outrank a right one; w_answer · (1 - partial) > w_consistency · "
                             f"(1 - 1/{len(PARTS)}) is needed")


# -------------------------------------------------------------------------------------------- reward
# Parts of consistency, each a function of a trace that keeps the grammar -> [0, 1], or None where it doesn't apply.


def leaves(value: object) -> list:
    """The strings and numbers inside a JSON value; true, false and null are no evidence of anything."""
    if isinstance(value, (dict, list)):
        return [leaf for child in (value.values() if isinstance(value, dict) else value) for leaf in leaves(child)]
    return [] if value is None or isinstance(value, bool) else [value]


def holds(text: object, part: object) -> bool:
    """Whether part stands in text as whole tokens, both after the scorer's normaliser."""
    want = normalize(str(part))
    return bool(want) and f" {want} " in f" {normalize(str(text))} "


def told(calls: list[Call]) -> list:
    """All values in the successful observations of some calls."""
    return [leaf for call in calls if call.succeeded for leaf in leaves(call.observation)]


def words(*values: object) -> set[str]:
    """The normalised words of some values."""
    return set(normalize(" ".join(map(str, values))).split())


def own_words(call: Call) -> set[str]:
    """All that a call itself brought along, names of arguments included."""
    return words(*leaves(call.arguments), *re.findall(r'"([^"]*)":', json.dumps(call.arguments, ensure_ascii=False)))


def groundings(trace: Trace) -> list[tuple[Call, list[bool]]]:
    """Each call, and for each of its arguments whether it stands in the question or in an observation of an earlier
    turn; enums exempt, an expression is grounded if its numbers are."""
    out, earlier = [], []
    parameters = {tool.name: tool.parameters["properties"] for tool in trace.tools}
    for turn in trace.turns:
        sources = [trace.question, *told(earlier)]

        def stands(leaf: object) -> bool:
            numerals = re.findall(r"\d+(?:\.\d+)?", str(leaf)) if not re.search(r"[^\W\d_]", str(leaf)) else []
            return any(holds(s, leaf) for s in sources) or bool(numerals) and all(
                any(holds(s, n) for s in sources) for n in numerals)

        for call in turn.calls:
            free = {k: v for k, v in call.arguments.items() if "enum" not in parameters.get(call.name, {}).get(k, {})}
            out.append((call, [stands(leaf) for leaf in leaves(free)]))
        earlier += turn.calls
    return out


def reward_grammar(trace: Trace) -> float:
    """1: a trace that breaks the grammar never gets here."""
    return 1.0


def reward_valid(trace: Trace) -> float | None:
    """1 / (1 + number of calls that were not JSON, named no tool or whose arguments don't fit)."""
    return 1 / (1 + sum(call.error is not None for call in trace.calls)) if trace.calls else None


def reward_arguments(trace: Trace) -> float | None:
    """Share of the arguments that are grounded; a repeated call doesn't count again."""
    distinct = {json.dumps([call.name, call.arguments], sort_keys=True): oks for call, oks in reversed(groundings(trace))}
    grounded = [ok for oks in distinct.values() for ok in oks]
    return sum(grounded) / len(grounded) if grounded else None


def reward_support(trace: Trace) -> float:
    """1 if a successful observation holds the answer and its call didn't bring all words of it along, or if the
    answer is what a utility tool computed from grounded arguments."""
    want = normalize(trace.answer)
    for call, grounded in groundings(trace):
        if call.name in UTILITIES:
            if all(grounded) and any(normalize(str(result)) == want != "" for result in told([call])):
                return 1.0
        elif any(holds(result, want) for result in told([call])) and not words(want) <= own_words(call):
            return 1.0
    return 0.0


def reward_economy(trace: Trace) -> float | None:
    """Share of the calls that were of use: a value that they brought, and weren't given, stands in the arguments of
    a later call or is the answer. A call made twice is of no use the second time, nor does it make others so."""
    first, seen = [], []
    for turn in trace.turns:
        first.append([])
        for call in turn.calls:
            if (call.name, call.arguments) not in seen:
                first[-1].append(call)
                seen.append((call.name, call.arguments))
    computed = {id(call) for call, oks in groundings(trace) if call.name in UTILITIES and all(oks)}
    useful = 0
    for i, calls in enumerate(first):
        later = [leaf for part in first[i + 1:] for call in part for leaf in leaves(call.arguments)]
        for call in calls:
            new = [v for v in told([call]) if id(call) in computed or not words(v) <= own_words(call)]
            useful += any(normalize(str(value)) == normalize(trace.answer) != "" or any(holds(text, value) for text in later)
                          for value in new)
    return useful / len(trace.calls) if trace.calls else None


PARTS = {"grammar": reward_grammar, "valid": reward_valid, "arguments": reward_arguments,
         "support": reward_support, "economy": reward_economy}


def reward(trace: Trace, golds: list[str], config: GRPOConfig) -> dict[str, float | None]:
    """The composite reward and all that it is made of; a trace that breaks the grammar has 0 in both halves."""
    if trace.status != "answered":
        return {"reward": 0.0, "em": 0.0, "answer": 0.0, "consistency": 0.0, **dict.fromkeys(PARTS), "grammar": 0.0}
    parts = {name: part(trace) for name, part in PARTS.items()}
    applies = [value for value in parts.values() if value is not None]
    consistency = sum(applies) / len(applies)
    said = normalize(trace.answer) != ""  # the official rule lets "" equal the gold answer "A"; the reward doesn't
    em = said * exact_match(trace.answer, golds)
    answer = em or said * config.partial * f1(trace.answer, golds)
    total = config.w_answer * answer + config.w_consistency * consistency
    return {"reward": total, "em": em, "answer": answer, "consistency": consistency, **parts}


# ---------------------------------------------------------------------------------- advantages and loss


def advantages(rewards: Tensor, groups: Tensor, scale_std: bool) -> Tensor:
    """rewards (B,), groups (B,) naming each trace's group -> advantages (B,) in float64. A group without spread
    gives exactly 0, and so does a reward that is NaN, which has no part in its group's mean either."""
    out = torch.zeros(len(rewards), dtype=torch.float64)
    for group in groups.unique():
        rows = (groups == group) & ~rewards.isnan()
        r = rewards[rows].double()
        if len(r) > 1 and r.max() > r.min():
            out[rows] = (r - r.mean()) / (r.std(correction=0) + 1e-4 if scale_std else 1)
    return out


def token_weights(mask: Tensor, loss: str, most_tokens: int) -> Tensor:
    """mask (B, T) of a whole step's loss tokens -> the weight w_it (B, T) of each in the sum. Made before the step
    is cut into micro-batches, so that the cut changes nothing."""
    if loss == "dapo":  # mean over all tokens
        return mask / mask.sum().clamp(min=1)
    if loss == "dr_grpo":  # sum over a constant
        return mask / (max(1, len(mask)) * most_tokens)
    return mask / (max(1, len(mask)) * mask.sum(1, keepdim=True).clamp(min=1))  # mean over traces of mean over tokens


def policy_loss(logprobs: Tensor, old: Tensor, reference: Tensor | None, advantage: Tensor, mask: Tensor,
                weights: Tensor, config: GRPOConfig) -> tuple[Tensor, dict[str, Tensor]]:
    """-J over some traces of a step; logprobs, old, reference, mask and weights (B, T), advantage (B,).
    Also what to log: the sums over tokens of KL and of ratios beyond a bound that mattered."""
    log_ratio = (logprobs - old) * mask                                               # log r_it
    if config.loss == "gspo":  # one ratio a trace: the geometric mean of its tokens'
        log_ratio = (log_ratio.sum(1) / mask.sum(1).clamp(min=1))[:, None].expand_as(log_ratio)
    ratio = log_ratio.exp()                                                           # r_it
    A = advantage[:, None].to(ratio.dtype)                                            # A_i
    clipped = ratio.clamp(1 - config.clip_low, 1 + config.clip_high)
    objective = torch.minimum(ratio * A, clipped * A)                                 # min(r A, clip(r) A)
    kl = torch.zeros_like(ratio)
    if reference is not None:
        gap = (reference - logprobs) * mask
        kl = gap.exp() - gap - 1                                                      # k3_it
        objective = objective - config.beta * kl
    stats = {"kl": (kl * mask).sum(), "clip_low": (mask & (ratio < 1 - config.clip_low) & (A < 0)).sum(),
             "clip_high": (mask & (ratio > 1 + config.clip_high) & (A > 0)).sum()}
    return -(weights * objective).sum(), {name: value.detach() for name, value in stats.items()}


# ------------------------------------------------------------------------------------------ rollouts


class Simulator:
    """What a rollout needs besides the policy: the frozen model that makes and plays the tools, the questions."""

    def __init__(self, folder: Path, config, rows: int = 64, room: int | None = None, dtype: torch.dtype = torch.float32):
        """room: the most tokens that a question or a call with its tools may take; None: the miniature's measures."""
        self.device, self.config = pick_device(), config
        self.frozen, self.tokenizer = load(folder, self.device, dtype)
        self.frozen.requires_grad_(False)
        most = self.frozen.config.max_position_embeddings
        reply = {"reply_tokens": max(480, config.turn_tokens)} if room else {}
        slots = min(most, room + reply["reply_tokens"]) if room else 640
        self.actor = ToolActor(Sampler(self.frozen, self.tokenizer, rows, slots), **reply)
        self.maker = ToolMaker(self.actor.sampler, **reply)
        self.boxes: dict[str, Toolbox] = {}

    def state(self) -> dict:
        """What a checkpoint has to remember: the tools that were made, the ToolActor's memory. The rest is frozen."""
        boxes = {q: [box.kind, [[t.name, t.description, t.parameters, t.returns] for t in box.made], box.tries]
                 for q, box in self.boxes.items()}
        return {"boxes": boxes, "memo": list(self.actor.memo.items())}

    def restore(self, state: dict) -> None:
        """Take up what state() told."""
        self.boxes = {q: Toolbox(kind, [Tool(*tool) for tool in made], tries)
                      for q, (kind, made, tries) in state.get("boxes", {}).items()}
        self.actor.memo.update(state.get("memo", []))

    def make_tools(self, questions: list[Question]) -> None:
        """The ToolMaker writes each question's tools, once."""
        todo = list({q.id: q for q in questions if q.id not in self.boxes}.values())
        for i in tqdm(range(0, len(todo), 64), desc="tools", unit="batch", mininterval=1):
            part = todo[i:i + 64]
            self.boxes |= zip([q.id for q in part], self.maker.make([q.text for q in part], (self.config.seed,)))

    def agent(self, model: Transformer, rows: int, temperature: float) -> AutoAgent:
        """AutoAgent over the given policy."""
        c = self.config
        sampler = Sampler(model, self.tokenizer, rows, c.trace_tokens + 8)
        return AutoAgent(sampler, c.max_turns, c.turn_tokens, c.trace_tokens, temperature)

    def traces(self, questions: list[Question], group: int, *key) -> list[Trace]:
        """`group` fresh traces a question, with the tools that were made for it."""
        return [Trace(q.text, self.boxes[q.id].tools, (self.config.seed, *key, q.id, sample))
                for q in questions for sample in range(group)]


def score_heldout(stage: Simulator, agent: AutoAgent, questions: list[Question], backend=None, closed_book: bool = False
             ) -> tuple[dict, list[Trace]]:
    """One row of the results: held-out questions answered greedily, then at temperature 1. All but em_greedy is of
    the sampled traces, which are returned too. The agent's own temperature is put back."""
    row, rows = {"n": len(questions)}, agent.sampler.capacity
    before = agent.temperature
    for name, temperature in (("em_greedy", 0.0), ("em_sampled", 1.0)):
        agent.temperature, traces = temperature, stage.traces(questions, 1, "eval")
        for i in range(0, len(traces), rows):
            run_episodes(agent, backend or stage.actor, traces[i:i + rows], closed_book=closed_book)
        seen = [measure(t, q.golds) for t, q in zip(traces, questions)]
        row[name] = float(np.mean([m["em"] for m in seen]))
    agent.temperature = before
    by_set = {s: [m["em"] for m, q in zip(seen, questions) if q.set == s] for s in HELD_OUT}
    return row | means(seen) | {"by_set": {s: float(np.mean(v)) for s, v in by_set.items() if v}}, traces


def measure(trace: Trace, golds: list[str], rule: str = "hotpotqa") -> dict[str, float]:
    """What one trace brings to a row of results; no answer in the grammar is scored as an empty one."""
    answered = trace.status == "answered"
    said = trace.answer if answered else ""
    return {"em": exact_match(said, golds), "f1": f1(said, golds, rule), "grammar": float(answered),
            "support": reward_support(trace) if answered else 0.0, "calls": len(trace.calls),
            "valid_calls": sum(call.error is None for call in trace.calls), "length": sum(trace.mask)}


def means(seen: list[dict]) -> dict[str, float | None]:
    """The columns of a row, from its traces' measures."""
    row = {name: float(np.mean([m[name] for m in seen])) for name in ("f1", "grammar", "support", "calls", "length")}
    calls = sum(m["calls"] for m in seen)
    return row | {"valid_calls": sum(m["valid_calls"] for m in seen) / calls if calls else None}


# -------------------------------------------------------------------------------------------- update


def trace_logprobs(model: Transformer, traces: list[Trace], config: GRPOConfig) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities, entropies (B, T) and loss mask (B, T) of a micro-batch under the model."""
    ids, mask = pad(traces, str(model.device))
    with half_precision(str(model.device)):
        return *token_logprobs(model, ids, mask, config.temperature), mask


def score_all(model: Transformer, traces: list[Trace], rows: list[int], width: int, config: GRPOConfig) -> Tensor:
    """Log-probabilities (B, width) under a model that isn't trained now, for the given rows; elsewhere zero."""
    out = torch.zeros(len(traces), width)
    with torch.no_grad():
        for part in micro_batches([traces[i] for i in rows], config.micro_tokens):
            part = [rows[i] for i in part]
            logprobs, _, _ = trace_logprobs(model, [traces[i] for i in part], config)
            out[part, :logprobs.shape[1]] = logprobs.float().cpu()
    return out


def update(model: Transformer, reference: Transformer, optimizer: torch.optim.Optimizer, traces: list[Trace],
           advantage: Tensor, config: GRPOConfig, lr: float) -> dict[str, float]:
    """The optimizer steps of one rollout -> what to log: means over the loss tokens that were passed over."""
    live = [i for i, t in enumerate(traces) if not (config.mask_overlong and t.status == "truncated")]
    learn = {i for i in live if advantage[i] != 0 or config.beta > 0}
    full = pad(traces)[1]                                                             # (B, T)
    width = full.shape[1]
    old = score_all(model, traces, sorted(learn), width, config) if config.epochs * config.minibatches > 1 else None
    ref = score_all(reference, traces, sorted(learn), width, config) if config.beta > 0 else None
    sums, gaps, trained, norms = defaultdict(float), [], 0, []  # norm NaN: a step that was dropped
    shuffle = random.Random(f"{config.seed} {lr}")
    for _ in range(config.epochs):
        order = shuffle.sample(live, len(live)) if config.minibatches > 1 else live
        for rows in np.array_split(np.array(order, dtype=int), config.minibatches):
            weights = token_weights(full[rows], config.loss, config.trace_tokens)     # over all, flat groups too
            finite = True
            rows = [(n, int(i)) for n, i in enumerate(rows) if i in learn]
            for part in micro_batches([traces[i] for _, i in rows], config.micro_tokens):
                lines, part = map(list, zip(*(rows[j] for j in part)))
                logprobs, entropy, mask = trace_logprobs(model, [traces[i] for i in part], config)
                T, device = logprobs.shape[1], logprobs.device
                before = logprobs.detach() if old is None else old[part, :T].to(device)
                loss, stats = policy_loss(logprobs, before, None if ref is None else ref[part, :T].to(device),
                                          advantage[part].to(device, logprobs.dtype), mask, weights[lines, :T].to(device), config)
                loss.backward()
                finite = finite and bool(loss.isfinite() and (logprobs - before).isfinite().all())
                trained += sum(len(traces[i].ids) for i in part)
                stats |= {"loss": loss.detach(), "entropy": entropy.sum(), "tokens": mask.sum()}
                if len(gaps) < len(learn):  # each trace's first pass: sampler against pi_old
                    gaps += [g.cpu() for g in sampler_gap([traces[i] for i in part], before, mask)]
                for name, value in stats.items():
                    sums[name] += float(value)
            if rows:  # else there is nothing to learn: no step, not even of momentum
                norms.append(optimizer_step(model, optimizer, lr, config.clip_norm, finite))
    tokens, loss = max(1.0, sums.pop("tokens", 0.0)), sums.pop("loss", 0.0)
    gap = torch.cat(gaps) if gaps else torch.full((1,), torch.nan)  # nothing was looked at
    made = [norm for norm in norms if np.isfinite(norm)]
    return {**{name: value / tokens for name, value in sums.items()}, "gap_mean": float(gap.mean()),
            "gap_max": float(gap.max()), "trained": trained, "updates": len(made), "dropped": len(norms) - len(made),
            "grad_norm": float(np.mean(made)) if made else 0.0, "loss": loss / max(1, len(norms))}


def sampler_gap(traces: list[Trace], logprobs: Tensor, mask: Tensor) -> list[Tensor]:
    """For each trace |log-probability of the sampler - of the trainer| (tokens,) of the tokens that it sampled."""
    return [(torch.tensor(t.logprobs, device=own.device) - own[:len(t.ids)]).abs()[m[:len(t.ids)]]
            for t, own, m in zip(traces, logprobs, mask)]


# ---------------------------------------------------------------------------------------------- loop

COLUMNS = ["step", "reward", "em", "answer", "consistency", *PARTS, "finished", "truncated", "flat_groups", "calls",
           "length", "entropy", "kl", "clip_low", "clip_high", "gap_mean", "gap_max", "grad_norm", "updates", "dropped", "lr",
           "memo_hits", "heldout_greedy", "heldout_sampled", "time_sample", "time_train", "time_sample_rate", "time_train_rate",
           "loss"]


def roll_out(stage: Simulator, agent: AutoAgent, questions: list[Question], config: GRPOConfig, step: int
             ) -> tuple[list[Trace], list[dict], Tensor]:
    """One group of traces a question, their rewards with all parts, their advantages (B,)."""
    traces = stage.traces(questions, config.group, step)
    run_episodes(agent, stage.actor, traces, config.group)
    asked = [q for q in questions for _ in range(config.group)]
    rewards = [reward(trace, q.golds, config) for trace, q in zip(traces, asked)]
    groups = torch.arange(len(questions)).repeat_interleave(config.group)
    return traces, rewards, advantages(torch.tensor([r["reward"] for r in rewards]), groups, config.scale_std)


def summary(traces: list[Trace], rewards: list[dict], advantage: Tensor, config: GRPOConfig) -> dict[str, float]:
    """Means over the traces of one rollout; a part of the reward over the traces it applies to."""
    def mean(values):
        values = [float(v) for v in values if v is not None]
        return sum(values) / len(values) if values else 0.0
    return {**{name: mean(r[name] for r in rewards) for name in rewards[0]},
            "finished": mean(t.status == "answered" for t in traces),
            "truncated": mean(t.status == "truncated" for t in traces),
            "flat_groups": mean((advantage.view(-1, config.group) == 0).all(1)),
            "calls": mean(len(t.calls) for t in traces), "length": mean(sum(t.mask) for t in traces)}


def train(config: GRPOConfig) -> None:
    """Stage 2 from OUT/sft/model to OUT/grpo/model."""
    set_up(config)
    before = Path(config.out) / "sft"
    if not (before / "model" / "config.json").exists():
        raise InputError(f"out: no trained model in {before / 'model'}; run sft.py first")
    world = make_world(read_config(SFTConfig, before / "config.json").seed)
    rng = random.Random(f"grpo {config.seed}")
    if config.data:
        items = [replace(item, id=f"{n} {item.id}") for n, file in enumerate(config.data)
                 for item in read_questions(file, config.skip_bad)[0]]
        if len(items) < 20:
            raise InputError(f"data: {len(items)} questions; at least 20 are needed, every twentieth is held out")
        pool, held_out = [q for i, q in enumerate(items) if i % 20 < 19], items[19::20][:100]
        rng.shuffle(pool)
    else:
        questions = make_questions(world)
        pool = mixed([q for q in questions if q.set == "train"], config.steps * config.questions, rng)
        held_out = [q for q in questions if q.set in HELD_OUT][::4]
    with world.sealed():
        stage = Simulator(before / "model", config, room=config.trace_tokens if config.data else None)
        run = Run(Path(config.out) / "grpo", config, COLUMNS, before / "model", config.data)
        if run.finished:
            return
        stage.restore(run.state)
        plan = [[pool[(step * config.questions + i) % len(pool)] for i in range(config.questions)]
                for step in range(config.steps)]
        stage.make_tools([*held_out, *(q for step in plan for q in step)])
        model = load(before / "model", stage.device)[0]
        loop(stage, model, plan, held_out, run)
        run.save(model, stage.tokenizer)


def loop(stage: Simulator, model: Transformer, plan: list[list[Question]], held_out: list[Question], run: Run) -> None:
    """The loop of stage 2: roll out, reward, advantage, update, log."""
    config = stage.config
    agent = stage.agent(model, config.questions * config.group, config.temperature)
    optimizer = make_optimizer(model, config.lr, weight_decay=0.0)
    left, first = run.steps(len(plan), model, stage.tokenizer, optimizer, stage.state), run.state["step"]
    bar = tqdm(left, desc="grpo", unit="step", mininterval=1, total=len(plan), initial=first)
    for step in bar:
        questions = plan[step]
        start, asked, hits = time.perf_counter(), stage.actor.asked, stage.actor.remembered
        traces, rewards, advantage = roll_out(stage, agent, questions, config, step)
        middle = time.perf_counter()
        lr = config.lr * (1 - step / config.steps)
        row = {"step": step, "lr": lr, **summary(traces, rewards, advantage, config),
               **update(model, stage.frozen, optimizer, traces, advantage, config, lr),
               "memo_hits": (stage.actor.remembered - hits) / max(1, stage.actor.asked - asked)}
        end = time.perf_counter()
        row |= {"time_sample": middle - start, "time_sample_rate": sum(sum(t.mask) for t in traces) / (middle - start),
                "time_train": end - middle, "time_train_rate": row.pop("trained") / (end - middle)}
        if row["dropped"]:
            run.save_traces(step, traces, "dropped.jsonl")
            bar.write(f"step {step}: loss, gradient or log-ratio not finite; dropped, its traces are in dropped.jsonl")
        elif not row["updates"]:
            bar.write(f"step {step}: no group has a better and a worse trace to learn from; no optimizer step")
        if (step + 1) % config.eval_every == 0 or step + 1 == config.steps:
            result, seen = score_heldout(stage, agent, held_out)
            row |= {"heldout_greedy": result["em_greedy"], "heldout_sampled": result["em_sampled"]}
            run.save_traces(step, seen)
        run.log({name: row.get(name, "") for name in COLUMNS})
        if row.get("gap_mean", 0) > 0.05:
            bar.write(f"step {step}: sampler and trainer disagree by {row['gap_mean']:.3f} in the log-probability")
        bar.set_postfix(reward=f"{row['reward']:.3f}", em=f"{row['em']:.3f}", refresh=False)




def main() -> None:
    """python grpo.py"""
    config = command_line(GRPOConfig, __doc__)
    train(config)
    data = " --data FILE, one that it wasn't trained on" if config.data else ""
    print(f"stage 2 is done: {Path(config.out) / 'grpo'}; look at it with: python mtr.py eval --out {config.out}{data}")


if __name__ == "__main__":
    run_main(main)
