"""Stage 1: loss-masked supervised learning of trace grammar, for all three roles at once.

    loss = - sum over the tokens that the role itself said of log p(token | all before it) / their number

Nothing else is learned from: not the system turn, the tools, the question, an observation or a role header.
Here too is what both stages share: a command line from a dataclass, batches, schedule, metrics, run folder.
"""
import argparse
import csv
import json
import math
import os
import random
import shutil
import sys
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import get_args

import torch
from torch import Tensor
from tqdm import tqdm

import agents
from agents import AutoAgent, Tool, ToolActor, ToolMaker, Trace
from data.world import make_world, teach
from model import (InputError, ModelConfig, Tokenizer, Transformer, load_model, save_model, token_logprobs,
                   train_tokenizer)


def option(default, meaning: str, **more):
    """A config field: its default and what it means, which is also its --help."""
    return field(default=default, metadata={"help": meaning, **more})


@dataclass
class SFTConfig:
    """What stage 1 can be told. The model's shape is the miniature's."""
    out: str = option("run", "run folder; this stage writes its part to OUT/sft")
    seed: int = option(0, "world, teacher, weights and batches all follow from it")
    threads: int = option(0, "CPU threads; 0 leaves the choice to torch")
    steps: int = option(1400, "optimizer steps")
    agent_tokens: int = option(1300, "tokens a step of AutoAgent's conversations, padding included")
    maker_tokens: int = option(650, "of ToolMaker's")
    actor_tokens: int = option(550, "of ToolActor's")
    piece: int = option(24, "tokens of the pieces that the conversations are cut into at first")
    piece_steps: int = option(150, "steps after which the pieces are four times as long, until nothing is cut")
    lr: float = option(1.5e-3, "peak learning rate; linear warm-up, then a cosine down to 5 %")
    warmup: int = option(100, "steps of warm-up")
    weight_decay: float = option(0.01, "AdamW's weight decay, on matrices")
    clip_norm: float = option(1.0, "largest norm of the gradient")
    continued_steps: int = option(900, "steps of the control that goes on with SFT while GRPO runs (mtr.py)")
    eval_every: int = option(200, "steps between two looks at the held-out loss")
    width: int = option(192, "D of the miniature")
    layers: int = option(3, "its blocks")
    heads: int = option(3, "its query heads")
    kv_heads: int = option(1, "its key and value heads")
    mlp: int = option(512, "its width inside the SwiGLU")
    vocab: int = option(1280, "most ids of its tokenizer")

    def __post_init__(self):
        positive(self, "steps", "agent_tokens", "maker_tokens", "actor_tokens", "piece_steps", "lr", "clip_norm",
                 "eval_every", "width", "layers", "heads", "kv_heads", "mlp")
        at_least(self, threads=0, weight_decay=0, warmup=0, piece=2, continued_steps=1, vocab=300)
        if self.width % self.heads or self.heads % self.kv_heads or self.width // self.heads % 2:
            raise InputError(f"heads: width {self.width}, {self.heads} heads and {self.kv_heads} kv-heads don't divide evenly")


# ---------------------------------------------------------------------------------- shared by the stages


def positive(config, *names: str) -> None:
    """InputError for the first named field that isn't above zero."""
    for name in names:
        if not getattr(config, name) > 0:
            raise InputError(f"{name}: expected a number above 0, found {getattr(config, name)!r}")


def at_least(config, **bounds: float) -> None:
    """InputError for the first named field below its bound."""
    for name, bound in bounds.items():
        if not getattr(config, name) >= bound:
            raise InputError(f"{name}: expected at least {bound}, found {getattr(config, name)!r}")


def add_options(parser: argparse.ArgumentParser, config_class: type) -> None:
    """One --flag a field of the dataclass, with its default and its meaning; the only place that makes flags."""
    for f in fields(config_class):
        of = (get_args(f.type) or (f.type,))[0]  # float of float | None
        kind = {"action": argparse.BooleanOptionalAction} if of is bool else {"type": of}
        default = "the loss's own" if f.default is None else f.default
        text = f"{f.metadata['help']} (default: {default})".replace("%", "%%")  # argparse formats it
        parser.add_argument("--" + f.name.replace("_", "-"), default=f.default, help=text,
                            choices=f.metadata.get("choices"), **kind)


def command_line(config_class: type, description: str):
    """Config from sys.argv; unknown flags and bad values end the program with one line and exit code 2."""
    parser = Parser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser, config_class)
    return config_class(**vars(parser.parse_args()))


class Parser(argparse.ArgumentParser):
    """argparse, but a mistake is one line, without the usage, and an unknown flag is named before all else."""

    def flags(self) -> set[str]:
        """All that this parser and its commands know."""
        commands = [p for action in self._subparsers._group_actions for p in action.choices.values()] \
            if self._subparsers else []
        return set(self._option_string_actions).union(*(command.flags() for command in commands))

    def parse_args(self) -> argparse.Namespace:
        for word in sys.argv[1:]:
            if word.startswith("--") and word.split("=")[0] not in self.flags():
                self.error(f"unknown flag {word}")
        return super().parse_args()

    def error(self, message: str):
        raise InputError(f"{message} (see --help)")


def run_main(main) -> None:
    """Run a program's main; a user's mistake ends it with one line on stderr and exit code 2."""
    try:
        main()
    except InputError as error:
        print(f"{Path(sys.argv[0]).name}: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


def pick_device() -> str:
    """cuda, mps or cpu: the first there is."""
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def set_up(config) -> None:
    """Threads and torch's own random state."""
    if config.threads:
        torch.set_num_threads(config.threads)
    torch.manual_seed(config.seed)


def half_precision(device: str):
    """Autocast to bfloat16 where the hardware has it (on two cores twice as fast), else float32. Sums over the
    vocabulary, norms and angles stay in float32."""
    fast = device == "cuda" or device == "cpu" and torch.cpu._is_avx512_bf16_supported()
    return torch.autocast(device, torch.bfloat16) if fast else nullcontext()


class Run:
    """One stage's folder: config.json, metrics.csv (a row a step), traces.jsonl, model/."""

    def __init__(self, folder: Path, config, columns: list[str]):
        self.folder = folder
        if folder.exists() and any(folder.iterdir()) and not (folder / "config.json").exists():
            raise InputError(f"{folder}: holds something that is not a run; nothing was touched")
        try:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            (folder / "config.json").write_text(json.dumps(asdict(config), indent=2) + "\n", encoding="utf-8")
            self.file = open(folder / "metrics.csv", "w", newline="", encoding="utf-8")
        except OSError as error:
            raise InputError(f"{folder}: can't write a run there ({error.strerror})") from None
        self.writer = csv.DictWriter(self.file, columns)
        self.writer.writeheader()

    def log(self, row: dict) -> None:
        """One row of metrics.csv; numbers with six digits."""
        self.writer.writerow({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()})
        self.file.flush()

    def save_traces(self, step: int, traces: list[Trace]) -> None:
        """Whole traces to traces.jsonl."""
        with open(self.folder / "traces.jsonl", "a", encoding="utf-8") as file:
            for trace in traces:
                file.write(json.dumps({"step": step, **trace.record()}, ensure_ascii=False) + "\n")

    def save(self, model: Transformer, tokenizer: Tokenizer) -> None:
        """The model as a Hugging Face folder, whole or not at all."""
        part, target = self.folder / "model.part", self.folder / "model"
        shutil.rmtree(part, ignore_errors=True)
        save_model(model, tokenizer, part)
        shutil.rmtree(target, ignore_errors=True)
        os.replace(part, target)


def schedule(step: int, steps: int, warmup: int, floor: float = 0.05) -> float:
    """What share of its peak the learning rate has: linear warm-up, then a cosine down to the floor."""
    if step < warmup:
        return (step + 1) / warmup
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def make_optimizer(model: Transformer, lr: float, weight_decay: float) -> torch.optim.AdamW:
    """AdamW with decay on matrices alone: norms and biases have no scale to be pulled to."""
    groups = [{"params": [p for p in model.parameters() if p.dim() == 2], "weight_decay": weight_decay},
              {"params": [p for p in model.parameters() if p.dim() != 2], "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95))


def optimizer_step(model: Transformer, optimizer: torch.optim.Optimizer, lr: float, clip_norm: float) -> float:
    """Clip, step, forget the gradient -> the gradient's norm before clipping."""
    norm = float(torch.nn.utils.clip_grad_norm_(model.parameters(), clip_norm))
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm


def pad(traces: list[Trace], device: str = "cpu") -> tuple[Tensor, Tensor]:
    """Traces -> ids (B, T) and loss mask (B, T) bool, padded on the right. The pad id is of no consequence:
    nothing is ever inferred from it."""
    T = max(len(trace.ids) for trace in traces)
    ids = torch.tensor([trace.ids + [0] * (T - len(trace.ids)) for trace in traces], device=device)
    mask = torch.tensor([trace.mask + [0] * (T - len(trace.mask)) for trace in traces], device=device)
    return ids, mask.bool()


# -------------------------------------------------------------------------------- conversations to traces


def agent_pieces(record: dict) -> tuple[list[str], list[tuple[list[str], list[str]]]]:
    """A teacher's AutoAgent conversation -> prompt, then for each turn what it says and what it hears back."""
    tools = [*agents.check_tools(record["tools"]), *(agents.UTILITIES[u] for u in agents.KINDS[record["kind"]])]
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


def pieces(record: dict) -> tuple[list[str], list[tuple[list[str], list[str]]]]:
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
    prompt, turns = pieces(record)
    trace = Trace(record.get("question", ""))
    trace.hear(tokenizer.encode(prompt))
    for said, heard in turns:
        trace.say(tokenizer.encode([*said, agents.IM_END]))
        trace.hear(tokenizer.encode(heard))
    return trace


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


def batches(traces: list[Trace], tokens: int, rng: random.Random):
    """Endless batches of at most `tokens` padded tokens: shuffled epochs, neighbours in length together."""
    while True:
        order, made = rng.sample(traces, len(traces)), []
        for i in range(0, len(order), 64):
            made.append([])
            for trace in sorted(order[i:i + 64], key=lambda t: len(t.ids)):
                if made[-1] and len(trace.ids) * (len(made[-1]) + 1) > tokens:
                    made.append([])
                made[-1].append(trace)
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
def held_out_loss(model: Transformer, traces: list[Trace], device: str) -> float:
    """Mean -log p over the loss tokens of traces that training never sees."""
    sums = [masked_loss(model, traces[i:i + 10], device) for i in range(0, len(traces), 10)]
    return sum(float(total) for total, _ in sums) / sum(number for _, number in sums)


ROLES = ("agent", "maker", "actor")
COLUMNS = ["step", *(f"loss_{role}" for role in ROLES), "heldout_agent", "heldout_maker", "lr", "grad_norm", "tokens",
           "time_step"]


def new_miniature(config: SFTConfig, texts: list[str], folder: Path) -> tuple[Transformer, Tokenizer]:
    """A tokenizer learned from the texts and a model of random weights with its ids."""
    tokenizer = train_tokenizer(texts, config.vocab, folder, agents.CHAT_TEMPLATE)
    shape = ModelConfig(tokenizer.size, config.width, config.mlp, config.layers, config.heads, config.kv_heads,
                        2048, 1e-6, 1e6, True)
    return Transformer(shape).init_weights(config.seed), tokenizer


def fit(model: Transformer, data: dict, valid: dict, config: SFTConfig, run: Run, steps: int) -> None:
    """The loop of stage 1: batch, loss, step, log."""
    device, rng = str(model.device), random.Random(f"batches {config.seed}")
    longest = max(len(trace.ids) for role in ROLES for trace in data[role])
    optimizer = make_optimizer(model, config.lr, config.weight_decay)
    bar = tqdm(range(steps), desc="sft", unit="step", mininterval=1)
    for step in bar:
        start = time.perf_counter()
        lr = config.lr * schedule(step, steps, config.warmup)
        if step % config.piece_steps == 0:  # the next stage of the warm-up, in the end the whole conversations
            length = config.piece * 4 ** (step // config.piece_steps)
            streams = []
            for role in ROLES:
                part, tokens = data[role], getattr(config, f"{role}_tokens")
                if length < longest:
                    part = cut(rng.sample(part, len(part)), length, tokens * config.piece_steps)
                streams.append(batches(part, tokens, rng))
        losses, tokens = train_step(model, [next(stream) for stream in streams], device)
        norm = optimizer_step(model, optimizer, lr, config.clip_norm)
        row = {"step": step, **{f"loss_{role}": loss for role, loss in zip(ROLES, losses)}, "lr": lr,
               "grad_norm": norm, "tokens": tokens, "time_step": time.perf_counter() - start}
        if step % config.eval_every == 0 or step == steps - 1:
            row |= {f"heldout_{role}": held_out_loss(model, traces, device) for role, traces in valid.items()}
        run.log(row)
        bar.set_postfix({role: f"{loss:.3f}" for role, loss in zip(ROLES, losses)}, refresh=False)


def prepare(config: SFTConfig) -> tuple[dict[str, list[dict]], dict[str, list[dict]], list[str]]:
    """Conversations for training and for the held-out loss, and the texts that a tokenizer is learned from."""
    records, valid = teach(config.seed)
    texts = ["".join(part) for role in ROLES for record in records[role][:1500] for prompt, turns in [pieces(record)]
             for part in (prompt, *(p for turn in turns for p in turn))]
    texts += [name for names in make_world(config.seed).names.values() for name in names] * 20  # each one token
    return records, valid, texts


def encode(records: dict[str, list[dict]], tokenizer: Tokenizer) -> dict[str, list[Trace]]:
    """Conversations -> traces, by role."""
    return {role: [to_trace(record, tokenizer) for record in part] for role, part in records.items()}


def train(config: SFTConfig) -> None:
    """Stage 1 from nothing to OUT/sft/model."""
    set_up(config)
    run = Run(Path(config.out) / "sft", config, COLUMNS)
    records, valid, texts = prepare(config)
    model, tokenizer = new_miniature(config, texts, run.folder / "model")
    model.to(pick_device())
    fit(model, encode(records, tokenizer), encode(valid, tokenizer), config, run, config.steps)
    run.save(model, tokenizer)


def train_on(config: SFTConfig, steps: int) -> None:
    """The control: more of the same from OUT/sft/model to OUT/sft_continued/model, warmed up again to half the rate."""
    set_up(config)
    folder = Path(config.out) / "sft" / "model"
    run = Run(Path(config.out) / "sft_continued", config, COLUMNS)
    model, tokenizer = load_model(folder, pick_device()), Tokenizer(folder)
    data, valid = (encode(part, tokenizer) for part in teach(config.seed))
    fit(model, data, valid, replace(config, seed=config.seed + 1000, piece=1_000_000, lr=config.lr / 2), run, steps)
    run.save(model, tokenizer)


def main() -> None:
    """python sft.py"""
    config = command_line(SFTConfig, __doc__)
    train(config)
    print(f"stage 1 is done: {Path(config.out) / 'sft'}; go on with: python grpo.py --out {config.out}")


if __name__ == "__main__":
    run_main(main)
