"""Stage 1: loss-masked supervised learning of trace grammar, for all three roles at once.

    loss = - sum over the tokens that the role itself said of log p(token | all before it) / their number

Nothing else is learned from: not the system turn, the tools, the question, an observation or a role header.
Here too is what both stages share: batches and schedule.
"""
import json
import math
import random
import time
from dataclasses import dataclass, replace
from itertools import count, islice
from pathlib import Path
from typing import Iterator

import torch
from torch import Tensor
from tqdm import tqdm

import agents
from agents import AutoAgent, Tool, ToolActor, ToolMaker, Trace
from data import InputError
from data.world import make_world, teach
from model import ModelConfig, Tokenizer, Transformer, load, token_logprobs, train_tokenizer
from run import Run, at_least, command_line, half_precision, option, pick_device, positive, run_main, set_up


@dataclass
class SFTConfig:
    """What stage 1 can be told. The shape is the miniature's, of a model that starts from random weights."""
    out: str = option("run", "run folder; this stage writes its part to OUT/sft")
    seed: int = option(0, "world, teacher, weights and batches all follow from it")
    threads: int = option(0, "CPU threads; 0 leaves the choice to torch")
    model: str = option("", "checkpoint folder to start from, in place of random weights")
    traces: str = option("", "file that mtr.py traces wrote, in place of the fictional teacher's conversations")
    worlds: int = option(20, "imagined worlds with 300 of the fictional teacher's conversations each for AutoAgent and for ToolMaker")
    steps: int = option(1300, "optimizer steps")
    agent_tokens: int = option(1200, "tokens a step of AutoAgent's conversations, padding included")
    maker_tokens: int = option(900, "of ToolMaker's")
    actor_tokens: int = option(600, "of ToolActor's")
    piece: int = option(24, "tokens of the pieces that the conversations are cut into at first; AutoAgent's are four times as long")
    piece_steps: int = option(150, "steps after which the pieces are four times as long, until nothing is cut")
    lr: float = option(1.5e-3, "peak learning rate, 1e-5 for a real checkpoint; linear warm-up, then a cosine down to 5 %")
    warmup: int = option(100, "steps of warm-up")
    weight_decay: float = option(0.01, "AdamW's weight decay, on matrices")
    clip_norm: float = option(1.0, "largest norm of the gradient")
    continued_steps: int = option(560, "steps of mtr.py's control, which goes on with SFT about as long as GRPO takes")
    eval_every: int = option(300, "steps between two looks at the held-out loss")
    save_every: int = option(150, "steps between two checkpoints")
    resume: bool = option(False, "go on from the newest checkpoint in OUT, if there is one")
    width: int = option(192, "D of the miniature")
    layers: int = option(3, "its blocks")
    heads: int = option(3, "its query heads")
    kv_heads: int = option(1, "its key and value heads")
    mlp: int = option(512, "its width inside the SwiGLU")
    vocab: int = option(1280, "most ids of its tokenizer")

    def __post_init__(self):
        positive(self, "worlds", "steps", "agent_tokens", "maker_tokens", "actor_tokens", "piece_steps", "lr", "clip_norm",
                 "eval_every", "save_every", "width", "layers", "heads", "kv_heads", "mlp")
        at_least(self, threads=0, weight_decay=0, warmup=0, piece=2, continued_steps=1, vocab=300)
        if self.width % self.heads or self.heads % self.kv_heads or self.width // self.heads % 2:
            raise InputError(f"heads: width {self.width}, {self.heads} heads and {self.kv_heads} kv-heads don't divide evenly")


# ---------------------------------------------------------------------------------- shared by the stages


def schedule(step: int, steps: int, warmup: int, floor: float = 0.05) -> float:
    """What share of its peak the learning rate has: linear warm-up, then a cosine down to the floor."""
    if step < warmup:
        return (step + 1) / warmup
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def make_optimizer(model: Transformer, lr: float, weight_decay: float) -> torch.optim.AdamW:
    """AdamW with decay on matrices alone: norms and biases have no scale to be pulled to."""
    groups = [{"params": [p for p in model.parameters() if p.dim() == 2], "weight_decay": weight_decay},
              {"params": [p for p in model.parameters() if p.dim() != 2], "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), fused=True)


def optimizer_step(model: Transformer, optimizer: torch.optim.Optimizer, lr: float, clip_norm: float,
                   finite: bool = True) -> float:
    """Clip, step, forget the gradient -> the gradient's norm before clipping. NaN, and no step, where that norm or
    what led to it isn't finite."""
    norm = float(torch.nn.utils.clip_grad_norm_(model.parameters(), clip_norm))
    finite = finite and math.isfinite(norm)
    for group in optimizer.param_groups:
        group["lr"] = lr
    if finite:
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm if finite else math.nan


def pad(traces: list[Trace], device: str = "cpu") -> tuple[Tensor, Tensor]:
    """Traces -> ids (B, T) and loss mask (B, T) bool, padded on the right. The pad id is of no consequence:
    nothing is ever inferred from it. T is a multiple of 32: for each new shape oneDNN makes and keeps new kernels."""
    T = -(-max(len(trace.ids) for trace in traces) // 32) * 32
    ids = torch.tensor([trace.ids + [0] * (T - len(trace.ids)) for trace in traces], device=device)
    mask = torch.tensor([trace.mask + [0] * (T - len(trace.mask)) for trace in traces], device=device)
    return ids, mask.bool()


# -------------------------------------------------------------------------------- conversations to traces


def agent_pieces(record: dict) -> tuple[list[str], list[tuple[list[str], list[str]]]]:
    """A teacher's AutoAgent conversation -> prompt, then for each turn what it says and what it hears back."""
    tools = [*(Tool(**tool) for tool in record["tools"]), *(agents.UTILITIES[u] for u in agents.KINDS[record["kind"]])]
    spoken = []
    for said in record["turns"]:
        text = f"<think>{said['thought']}</think>"
        if "answer" in said:
            spoken.append(([f"{text}\n<answer> {said['answer']}</answer>"], []))
        else:
            results = [agents.result_text(o) for o in said["observations"]]
            spoken.append((agents.assistant_content(text, said["calls"]),
                           ["\n", *agents.results_turn(results), *agents.GENERATE]))
    return AutoAgent.prompt(record["question"], tools), spoken


def split_conversation(record: dict) -> tuple[list[str], list[tuple[list[str], list[str]]]]:
    """Any role's conversation -> prompt, then (said, heard) for each turn."""
    if record["role"] == "agent":
        return agent_pieces(record)
    if record["role"] == "maker":
        reply = ToolMaker.reply(record["thought"], record["kind"], [Tool(**tool) for tool in record["tools"]])
        return ToolMaker.prompt(record["question"], record["rejected"]), [([reply], [])]
    exchanges = record["exchanges"]
    heard = [["\n", *agents.turn("user", agents.dumps(arguments)), *agents.GENERATE] for arguments, _ in exchanges[1:]]
    said = [[agents.result_text(result)] for _, result in exchanges]
    return ToolActor.prompt(Tool(**record["tool"]).definition, exchanges[0][0]), list(zip(said, [*heard, []]))


def to_trace(record: dict, tokenizer: Tokenizer) -> Trace:
    """A teacher's conversation as the trace that a rollout of the same words would be: same ids, same mask."""
    prompt, turns = split_conversation(record)
    trace = Trace(record.get("question", ""))
    trace.hear(tokenizer.encode(prompt))
    for said, heard in turns:
        trace.say(tokenizer.encode([*said, agents.IM_END]))
        trace.hear(tokenizer.encode(heard))
    return trace


def read_traces(path: str) -> tuple[dict[str, list[dict]], dict[str, list[dict]]]:
    """What stage 0 kept, by role: for training, and, of every twentieth question, for the held-out loss. A
    conversation that several traces have in common counts once."""
    records: dict[str, dict[str, dict]] = {role: {} for role in ROLES}
    try:
        for number, line in enumerate(Path(path).read_text(encoding="utf-8").strip().split("\n"), 1):
            for record in json.loads(line)["conversations"]:  # none, if the trace wasn't kept
                prompt, turns = split_conversation(record)
                said = [record.get("question", ""), *prompt, *(p for turn in turns for part in turn for p in part)]
                if not turns or not "".join(said):  # texts, all of them
                    raise ValueError("a conversation without turns")
                records[record["role"]].setdefault(json.dumps(record, sort_keys=True), record)
    except OSError as error:
        raise InputError(f"{path}: can't be read ({error.strerror})") from None
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise InputError(f"{path}: line {number} is not what mtr.py traces writes ({type(error).__name__}: {error})") from None
    if not records["agent"]:
        raise InputError(f"{path}: none of its {number} traces was kept, there is nothing to learn")
    held = set(list(dict.fromkeys(record["question"] for record in records["agent"].values()))[19::20])
    valid = {role: [r for r in records[role].values() if r["question"] in held] for role in ("agent", "maker")}
    return {role: [r for r in part.values() if r.get("question") not in held] for role, part in records.items()}, valid


def cut(traces: list[Trace], tokens: int, enough: int) -> list[Trace]:
    """The end of each turn of the traces' own role, with what comes before it, at most `tokens` tokens; of a longer
    turn several overlapping pieces; until there are `enough` tokens.

    From random weights, attention has first to find out that names are copied and where a fact's subject stands.
    Over hundreds of tokens that takes very long, over a few dozen it doesn't (sequence-length warm-up, Li et al. 2021)."""
    made, total = [], 0
    for trace in traces:
        borders = [i for i in range(1, len(trace.mask) + 1) if (trace.mask + [0])[i] != trace.mask[i - 1]]
        for begin, end in zip(borders[::2], borders[1::2]):
            for stop in range(end, begin, -(tokens // 2)):
                start = max(0, stop - tokens)
                made.append(Trace(ids=trace.ids[start:stop], mask=[0] + trace.mask[start + 1:stop]))
                total += stop - start
        if total >= enough:
            break
    return made


def micro_batches(traces: list[Trace], tokens: int) -> list[list[int]]:
    """Row numbers of the traces, neighbours in length together, at most `tokens` padded tokens a batch."""
    made: list[list[int]] = [[]] if traces else []
    for i in sorted(range(len(traces)), key=lambda i: len(traces[i].ids)):
        if made[-1] and len(traces[i].ids) * (len(made[-1]) + 1) > tokens:
            made.append([])
        made[-1].append(i)
    return made


def batches(traces: list[Trace], tokens: int, rng: random.Random):
    """Endless batches of at most `tokens` padded tokens: shuffled epochs, neighbours in length together."""
    while True:
        order, made = rng.sample(traces, len(traces)), []
        for part in (order[i:i + 64] for i in range(0, len(order), 64)):
            made += [[part[i] for i in rows] for rows in micro_batches(part, tokens)]
        yield from rng.sample(made, len(made))


# ------------------------------------------------------------------------------------------------ loss


def masked_loss(model: Transformer, traces: list[Trace], device: str) -> tuple[Tensor, int]:
    """Sum of -log p over the tokens that the traces' own role said, and the number of those tokens."""
    ids, mask = pad(traces, device)
    with half_precision(device):
        logprobs, _ = token_logprobs(model, ids, mask)                                # (B, T)
    return -logprobs.sum(), int(mask.sum())


def train_step(model: Transformer, parts: list[list[Trace]], device: str) -> tuple[list[float], int]:
    """Add the gradient of one step, a micro-batch a role; a role's loss is the mean over its tokens, and each role
    counts the same, however little it says -> each role's loss, the step's loss tokens."""
    losses, tokens = [], 0
    for part in parts:
        total, number = masked_loss(model, part, device)
        (total / number / len(parts)).backward()
        losses.append(float(total.detach()) / number)
        tokens += number
    return losses, tokens


@torch.no_grad()
def held_out_loss(model: Transformer, traces: list[Trace], device: str, tokens: int) -> float:
    """Mean -log p over the loss tokens of traces that training never sees, `tokens` padded tokens a pass."""
    sums = [masked_loss(model, [traces[i] for i in rows], device) for rows in micro_batches(traces, tokens)]
    return sum(float(total) for total, _ in sums) / sum(number for _, number in sums)


ROLES = ("agent", "maker", "actor")
COLUMNS = ["step", *(f"loss_{role}" for role in ROLES), "heldout_agent", "heldout_maker", "lr", "grad_norm", "tokens",
           "dropped", "time_step"]


def new_miniature(config: SFTConfig, texts: list[str], run: Run) -> tuple[Transformer, Tokenizer]:
    """A tokenizer learned from the texts, or the one of the run's checkpoint, and a model of random weights with its ids."""
    tokenizer = Tokenizer(run.checkpoint) if run.checkpoint else train_tokenizer(
        texts, config.vocab, run.folder / "model", agents.CHAT_TEMPLATE)
    shape = ModelConfig(tokenizer.size, config.width, config.mlp, config.layers, config.heads, config.kv_heads,
                        2048, 1e-6, 1e6, True)
    return Transformer(shape).init_weights(config.seed), tokenizer


def lessons(data: dict, config: SFTConfig) -> Iterator[list[list[Trace]]]:
    """Each step's batches, one a role: of pieces at first, in the end of whole conversations, epoch after epoch. To go on
    from step n, skip the first n."""
    rng, length = random.Random(f"batches {config.seed}"), config.piece
    while True:
        streams, whole = [], True
        for role in [role for role in ROLES if data[role]]:
            part, tokens = data[role], getattr(config, f"{role}_tokens")
            room = 4 * length if role == "agent" else length  # what it copies stands further back
            if room < max(len(trace.ids) for trace in part):
                part, whole = cut(rng.sample(part, len(part)), room, tokens * config.piece_steps), False
            streams.append(batches(part, tokens, rng))
        for _ in count() if whole else range(config.piece_steps):
            yield [next(stream) for stream in streams]
        length *= 4


def fit(model: Transformer, tokenizer: Tokenizer, data: dict, valid: dict, config: SFTConfig, run: Run) -> None:
    """The loop of stage 1: batch, loss, step, log."""
    steps, device, optimizer = config.steps, str(model.device), make_optimizer(model, config.lr, config.weight_decay)
    left, first = run.steps(steps, model, tokenizer, optimizer), run.state["step"]
    roles = [role for role in ROLES if data[role]]
    bar = tqdm(left, desc="sft", unit="step", mininterval=1, total=steps, initial=first)
    for step, parts in zip(bar, islice(lessons(data, config), first, None)):
        start = time.perf_counter()
        lr = config.lr * schedule(step, steps, config.warmup)
        losses, tokens = train_step(model, parts, device)
        norm = optimizer_step(model, optimizer, lr, config.clip_norm, all(map(math.isfinite, losses)))
        row = {"step": step, **{f"loss_{role}": loss for role, loss in zip(roles, losses)}, "lr": lr, "grad_norm": norm,
               "tokens": tokens, "dropped": int(math.isnan(norm)), "time_step": time.perf_counter() - start}
        if step % config.eval_every == 0 or step == steps - 1:
            room = 2 * config.agent_tokens  # a pass without a gradient keeps less
            row |= {f"heldout_{role}": held_out_loss(model, traces, device, room) for role, traces in valid.items() if traces}
        if row["dropped"]:
            run.save_traces(step, [trace for part in parts for trace in part], "dropped.jsonl")
        run.log(row)
        bar.set_postfix({role: f"{loss:.3f}" for role, loss in zip(roles, losses)}, refresh=False)


def prepare(config: SFTConfig) -> tuple[dict[str, list[dict]], dict[str, list[dict]], list[str]]:
    """Conversations for training and for the held-out loss, and the texts that a tokenizer is learned from."""
    records, valid = read_traces(config.traces) if config.traces else teach(config.seed, config.worlds)
    texts = ["".join(part) for role in ROLES for record in records[role][:1500] for prompt, turns in [split_conversation(record)]
             for part in (prompt, *(p for turn in turns for p in turn))]
    texts += [name for names in make_world(config.seed).names.values() for name in names] * 20  # each one token
    return records, valid, texts


def encode(records: dict[str, list[dict]], tokenizer: Tokenizer) -> dict[str, list[Trace]]:
    """Conversations -> traces, by role."""
    return {role: [to_trace(record, tokenizer) for record in part] for role, part in records.items()}


def train(config: SFTConfig) -> None:
    """Stage 1 from nothing, or from config.model, to OUT/sft/model."""
    set_up(config)
    if config.model and Path(config.model).resolve().is_relative_to((Path(config.out) / "sft").resolve()):
        raise InputError(f"model: {config.model} lies where this run would be written; give another --out")
    source = Path(config.model) if config.model else None
    start = load(source, pick_device()) if source else None  # what is broken is refused before anything is written
    print("reading the conversations" if config.traces else "making the world and its teacher's conversations", flush=True)
    records, valid, texts = prepare(config)
    run = Run(Path(config.out) / "sft", config, COLUMNS, source, (config.traces,) if config.traces else ())
    if run.finished:
        return
    if source:  # it knows how to copy: no need to begin with pieces
        (model, tokenizer), config = start, replace(config, piece=1_000_000)
    else:
        model, tokenizer = new_miniature(config, texts, run)
        model.to(pick_device())
    fit(model, tokenizer, encode(records, tokenizer), encode(valid, tokenizer), config, run)
    run.save(model, tokenizer)


def train_on(config: SFTConfig) -> None:
    """The control: more of the same from OUT/sft/model to OUT/sft_continued/model, warmed up again to half the rate."""
    set_up(config)
    folder = Path(config.out) / "sft" / "model"
    config = replace(config, steps=config.continued_steps, piece=1_000_000, lr=config.lr / 2)
    run = Run(Path(config.out) / "sft_continued", config, COLUMNS, folder)
    if run.finished:
        return
    print("making the same conversations, for other batches", flush=True)
    model, tokenizer = load(folder, pick_device())
    data, valid = (encode(part, tokenizer) for part in teach(config.seed, config.worlds))
    fit(model, tokenizer, data, valid, replace(config, seed=config.seed + 1000), run)  # other batches
    run.save(model, tokenizer)


def main() -> None:
    """python sft.py"""
    config = command_line(SFTConfig, __doc__)
    train(config)
    print(f"stage 1 is done: {Path(config.out) / 'sft'}; go on with: python grpo.py --out {config.out}")


if __name__ == "__main__":
    run_main(main)
