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
import shlex
import shutil
import signal
import sys
import time
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, fields, replace
from itertools import count, islice
from pathlib import Path
from typing import Callable, Iterator, get_args

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

import agents
from agents import AutoAgent, Tool, ToolActor, ToolMaker, Trace
from data.world import make_world, teach
from model import (InputError, ModelConfig, Tokenizer, Transformer, fingerprint, load_model, read_json, save_model,
                   token_logprobs, train_tokenizer)


def option(default, meaning: str, **more):
    """A config field: its default and what it means, which is also its --help."""
    return field(default=default, metadata={"help": meaning, **more})


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


def positive(config, *names: str) -> None:
    """InputError for the first named field that isn't above zero and finite."""
    for name in names:
        if not 0 < getattr(config, name) < math.inf:
            raise InputError(f"{name}: expected a number above 0, found {getattr(config, name)!r}")


def at_least(config, **bounds: float) -> None:
    """InputError for the first named field below its bound, or infinite."""
    for name, bound in bounds.items():
        if not bound <= getattr(config, name) < math.inf:
            raise InputError(f"{name}: expected at least {bound}, found {getattr(config, name)!r}")


def add_options(parser: argparse.ArgumentParser, config_class: type) -> None:
    """One --flag a field of the dataclass, with its default and its meaning; the only place that makes flags."""
    for f in fields(config_class):
        of = (get_args(f.type) or (f.type,))[0]  # float of float | None
        kind = {"action": argparse.BooleanOptionalAction} if of is bool else {"type": of}
        kind |= {"type": str, "nargs": "+", "metavar": "FILE"} if f.default == () else {}
        default = f.metadata.get("unset", "the loss's own") if f.default is None else "none" if f.default in ("", ()) else f.default
        text = f"{f.metadata['help']} (default: {default})".replace("%", "%%")  # argparse formats it
        parser.add_argument("--" + f.name.replace("_", "-"), default=f.default, help=text,
                            choices=f.metadata.get("choices"), **kind)


def command_line(config_class: type, description: str):
    """Config from sys.argv; unknown flags and bad values end the program with one line and exit code 2."""
    parser = Parser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser, config_class)
    return config_class(**vars(parser.parse_args()))


def read_config(config_class: type, path: Path):
    """The config.json of a stage's run; InputError names the key that is unknown or has a value of another type."""
    raw = {name: tuple(value) if isinstance(value, list) else value for name, value in read_json(path).items()}
    types = {f.name: get_args(f.type) or (f.type,) for f in fields(config_class)}
    for name, value in raw.items():
        fits = type(value) in types.get(name, ()) or type(value) is int and float in types.get(name, ())
        if not fits or type(value) is int and abs(value) >= 2 ** 63:
            raise InputError(f"{path}: {name} can't be {value!r}" if name in types else f"{path}: unknown key {name!r}")
    return config_class(**raw)


class Parser(argparse.ArgumentParser):
    """argparse, but a mistake is one line, without the usage, and an unknown flag is named before all else."""

    def flags(self) -> set[str]:
        """All that this parser and its commands know."""
        commands = [p for action in self._subparsers._group_actions for p in action.choices.values()] \
            if self._subparsers else []
        return set(self._option_string_actions).union(*(command.flags() for command in commands))

    def parse_args(self) -> argparse.Namespace:
        for word in sys.argv[1:]:
            if word != word.encode("utf-8", "replace").decode():
                self.error(f"not UTF-8: {ascii(word)}")
            if word.startswith("--") and word.split("=")[0] not in self.flags():
                self.error(f"unknown flag {word}")
        return super().parse_args()

    def error(self, message: str):
        raise InputError(f"{message} (see --help)")


def run_main(main) -> None:
    """Run a program's main; a user's mistake, or what the disk refuses, ends it with one line on stderr and exit code 2."""
    def terminate(number: int, frame: object) -> None:
        raise KeyboardInterrupt(number, "terminated")

    signal.signal(signal.SIGTERM, terminate)
    try:
        main()
    except (InputError, OSError, SafetensorError) as error:
        print(f"{Path(sys.argv[0]).name}: {error}", file=sys.stderr)
        sys.exit(2)
    except torch.OutOfMemoryError as error:
        print(f"{Path(sys.argv[0]).name}: the device's memory is full; turn down --rows, --group, --trace-tokens, --micro-tokens or "
              f"--agent-tokens, whichever it has ({str(error).splitlines()[0]})", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt as stop:
        number, words = stop.args or (signal.SIGINT, "interrupted")
        print(words, file=sys.stderr)
        sys.exit(128 + number)


def pick_device() -> str:
    """cuda, mps or cpu: the first there is."""
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def checkpoint_dtype() -> torch.dtype:
    """In what a real checkpoint is served: bfloat16 on a GPU, else float32."""
    return torch.bfloat16 if pick_device() == "cuda" else torch.float32


def set_up(config) -> None:
    """Threads and torch's own random state."""
    if abs(config.seed) >= 2 ** 63:
        raise InputError(f"seed: expected a number of less than 64 bits, found {config.seed}")
    if config.threads > 4096:
        raise InputError(f"threads: expected at most 4096, found {config.threads}")
    if config.threads:
        torch.set_num_threads(config.threads)
    torch.manual_seed(config.seed)


def half_precision(device: str):
    """Autocast to bfloat16 on a GPU, and on a CPU that computes in it (on two cores twice as fast), else float32. Sums
    over the vocabulary, norms and angles stay in float32."""
    device = torch.device(device).type
    fast = device == "cuda" or device == "cpu" and torch.cpu._is_avx512_bf16_supported()
    return torch.autocast(device, torch.bfloat16) if fast else nullcontext()


@contextmanager
def interrupts() -> Iterator[list[int]]:
    """A list that Ctrl-C and SIGTERM put their number into, so that a step can be finished; a second one ends at once."""
    asked: list[int] = []

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def note(number: int, frame: object) -> None:
        asked.append(number)
        restore()
        os.write(2, b"\nfinishing this step; once more ends at once\n")  # print may be what was interrupted

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked
    finally:
        restore()


def sync(path: Path) -> None:
    """Wait until a file, or a folder's list of files, is on the disk."""
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def write_whole(target: Path, write: Callable[[Path], None]) -> None:
    """A folder that is there whole or not at all: written under another name, synced, renamed."""
    part = target.with_name("part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    write(part)
    for path in (*part.iterdir(), part):
        sync(path)
    shutil.rmtree(target, ignore_errors=True)
    os.replace(part, target)
    sync(target.parent)


class Run:
    """One stage's folder: config.json, metrics.csv (a row a step), traces.jsonl, checkpoints/, model/.

    A checkpoint is a model folder with the optimizer's moments and a state.json beside it. All that is random follows
    from the seed and the step, so the step is all that there is to store of it. The last two are kept, and the best."""
    LOGS = ("metrics.csv", "traces.jsonl", "dropped.jsonl")

    def __init__(self, folder: Path, config, columns: list[str], source: Path | None = None, files: tuple[str, ...] = ()):
        """source: the model folder that the stage starts from; files: what it learns from, if that isn't the world."""
        if folder.exists() and any(folder.iterdir()) and not (folder / "config.json").exists():
            raise InputError(f"{folder}: holds something that is not a run; nothing was touched")
        self.folder, self.save_every = folder, config.save_every
        self.source = {"name": str(source or ""), "sha256": fingerprint(*([source] if source else []), *files)}
        self.finished = config.resume and (folder / "model" / "config.json").exists()
        self.score: float | None = None  # of the last step, where the held-out questions were asked
        self.state = {"step": 0, "dropped": 0, "scores": {}, "logs": {}}
        self.checkpoint = self._newest()
        if not config.resume and (self.checkpoint or (folder / "model" / "config.json").exists()):
            raise InputError(f"{folder}: holds a run; --resume goes on with it, or leaves it if it is finished; else remove it")
        try:
            if config.resume and (self.checkpoint or self.finished):
                self._take_up(config)
            else:
                self._begin(config)
            self.file = open(folder / "metrics.csv", "a", newline="", encoding="utf-8")
        except OSError as error:
            raise InputError(f"{folder}: can't write a run there ({error.strerror})") from None
        self.writer = csv.DictWriter(self.file, columns)
        if not self.file.tell():
            self.writer.writeheader()

    def _begin(self, config) -> None:
        old = self.folder.with_name(self.folder.name + ".part")
        shutil.rmtree(old, ignore_errors=True)
        if self.folder.exists():  # renamed first: half a folder would be nobody's
            os.replace(self.folder, old)
            shutil.rmtree(old)
        self.checkpoint = None
        self.folder.mkdir(parents=True)
        (self.folder / "config.json").write_text(json.dumps(asdict(config), indent=2) + "\n", encoding="utf-8")
        if config.resume:
            print(f"{self.folder}: no checkpoint to go on from; starting at the beginning", file=sys.stderr)

    def _take_up(self, config) -> None:
        begun = read_json(self.folder / "config.json")
        for name, value in json.loads(json.dumps(asdict(config))).items():
            if name not in ("out", "resume") and value != begun.get(name):
                raise InputError(f"{name}: the run in {self.folder} was begun with {begun.get(name)!r}, not {value!r}; "
                                 "--resume goes on as it began")
        if self.checkpoint:
            self.state = read_json(self.checkpoint / "state.json")
            if self.source["sha256"] != self.state["source"]["sha256"]:
                raise InputError(f"{self.folder}: begun with another model, or other questions or traces, than lie there now")
        if self.finished:
            return
        for name in self.LOGS:  # what was written after the checkpoint will be written again
            if (self.folder / name).exists():
                os.truncate(self.folder / name, self.state["logs"].get(name, 0))

    def _newest(self) -> Path | None:
        """The newest checkpoint whose files are whole; one that isn't was damaged after it had been written."""
        for folder in sorted((self.folder / "checkpoints").glob("[0-9]*"), reverse=True):
            try:
                read_json(folder / "state.json")
                for name in ("model", "optimizer"):
                    with safe_open(folder / f"{name}.safetensors", framework="pt"):  # compares the sizes
                        pass
                return folder
            except (InputError, SafetensorError, OSError) as error:
                print(f"{folder}: damaged, going back to the one before ({error})", file=sys.stderr)
        return None

    def log(self, row: dict) -> None:
        """One row of metrics.csv; numbers with six digits. Three steps in a row that had to be dropped are the end."""
        self.writer.writerow({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()})
        self.file.flush()
        self.score = row["heldout_greedy"] if isinstance(row.get("heldout_greedy"), float) else None
        self.state["dropped"] = self.state["dropped"] + 1 if row["dropped"] else 0
        if self.state["dropped"] == 3:
            raise SystemExit(f"step {row['step']}: loss, gradient or log-ratio not finite, three steps in a row; "
                             f"{self.folder / 'dropped.jsonl'} has the traces")

    def save_traces(self, step: int, traces: list[Trace], file: str = "traces.jsonl") -> None:
        """Whole traces to traces.jsonl; to dropped.jsonl those of a step that could not be made."""
        with open(self.folder / file, "a", encoding="utf-8", errors="backslashreplace") as lines:  # a lone surrogate
            for trace in traces:
                lines.write(json.dumps({"step": step, **trace.record()}, ensure_ascii=False) + "\n")

    def steps(self, total: int, model: Transformer, tokenizer: Tokenizer, optimizer: torch.optim.Optimizer,
              more: Callable[[], dict] = dict) -> Iterator[int]:
        """The steps that are left to make. Between two of them, and at the end, a checkpoint is written where one is
        due, with `more` that the stage has to remember, and Ctrl-C and SIGTERM are heard."""
        more_to_come = max(1, 4 - len(list((self.folder / "checkpoints").glob("[0-9]*"))))  # three are kept, one is written
        need = more_to_come * 3 * sum(p.numel() * p.element_size() for p in model.parameters())  # weights and two moments
        if (free := shutil.disk_usage(self.folder).free) < need:
            raise InputError(f"{self.folder}: {need / 1e9:.2f} GB needed for checkpoints, {free / 1e9:.2f} GB free")
        if self.checkpoint:
            self._restore(model, optimizer)
        with interrupts() as asked:
            for step in range(self.state["step"], total):
                yield step
                if asked or self.score is not None or (step + 1) % self.save_every == 0 or step + 1 == total:
                    self._save_checkpoint(step + 1, model, tokenizer, optimizer, more())
                if asked:
                    raise KeyboardInterrupt(asked[0], f"stopped after step {step}; go on with: {go_on()}")

    def _save_checkpoint(self, step: int, model: Transformer, tokenizer: Tokenizer, optimizer: torch.optim.Optimizer,
                         more: dict) -> None:
        name, kept = f"{step:07d}", self.folder / "checkpoints"
        self.state["scores"] |= {} if self.score is None else {name: self.score}
        logs = {log: (self.folder / log).stat().st_size for log in self.LOGS if (self.folder / log).exists()}
        self.state |= {"step": step, "logs": logs, "source": self.source, **more}

        def write(part: Path) -> None:
            save_model(model, tokenizer, part)
            save_file({f"{weight}.{moment}": tensor for weight, p in model.named_parameters()
                       for moment, tensor in optimizer.state.get(p, {}).items()}, part / "optimizer.safetensors")
            (part / "state.json").write_text(json.dumps(self.state), encoding="utf-8")

        for log in logs:
            sync(self.folder / log)
        write_whole(kept / name, write)
        scores = {f: self.state["scores"].get(f.name, -1.0) for f in sorted(kept.glob("[0-9]*"), reverse=True)}
        for folder in [*scores][2:]:
            if folder != max(scores, key=scores.get) or scores[folder] < 0:
                os.replace(folder, kept / "part")  # never half of one under its own name
                shutil.rmtree(kept / "part")

    def _restore(self, model: Transformer, optimizer: torch.optim.Optimizer) -> None:
        weights = dict(model.named_parameters())
        with safe_open(self.checkpoint / "model.safetensors", framework="pt") as tensors:
            for name, weight in weights.items():
                weight.data.copy_(tensors.get_tensor(name))
        with safe_open(self.checkpoint / "optimizer.safetensors", framework="pt") as tensors:
            for key in tensors.keys():
                name, moment = key.rsplit(".", 1)
                optimizer.state[weights[name]][moment] = tensors.get_tensor(key).clone().to(weights[name].device)

    def save(self, model: Transformer, tokenizer: Tokenizer) -> None:
        """The model as a Hugging Face folder, whole or not at all."""
        write_whole(self.folder / "model", lambda part: save_model(model, tokenizer, part))


def go_on() -> str:
    """The command that takes up what this one leaves."""
    return shlex.join(["python", *sys.argv, *([] if "--resume" in sys.argv else ["--resume"])])


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


def to_records(trace: Trace, box: agents.Toolbox) -> list[dict]:
    """A trace that a model led -> the conversations of all three roles in it, as a teacher's."""
    def parts(tool: Tool) -> dict:
        return {k: v for k, v in vars(tool).items() if k in ("name", "description", "parameters", "returns", "source") and v}

    tools = {tool.name: tool for tool in trace.tools if tool.name not in agents.UTILITIES}
    turns = [{"thought": t.thought, "answer": t.answer} if t.answer is not None else
             {"thought": t.thought, "calls": [{"name": c.name, "arguments": c.arguments} for c in t.calls],
              "observations": [c.observation for c in t.calls]} for t in trace.turns]
    records = [{"role": "agent", "question": trace.question, "kind": box.kind, "tools": list(map(parts, tools.values())),
                "turns": turns}]
    if box.tries:  # the fallback isn't ToolMaker's own
        records.append({"role": "maker", "question": trace.question, "thought": box.thought, "kind": box.kind,
                        "tools": list(map(parts, box.made)), "rejected": box.rejected})
    return records + [{"role": "actor", "tool": parts(tools[c.name]), "exchanges": [[c.arguments, c.observation]]}
                      for c in trace.calls if c.name in tools and not tools[c.name].run and c.observation != ToolActor.NO_RESULT]


def read_traces(path: str) -> tuple[dict[str, list[dict]], dict[str, list[dict]]]:
    """What stage 0 kept, by role: for training, and, of every twentieth question, for the held-out loss. A
    conversation that several traces have in common counts once."""
    records: dict[str, dict[str, dict]] = {role: {} for role in ROLES}
    try:
        for number, line in enumerate(Path(path).read_text(encoding="utf-8").strip().split("\n"), 1):
            for record in json.loads(line)["conversations"]:  # none, if the trace wasn't kept
                prompt, turns = pieces(record)
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
    texts = ["".join(part) for role in ROLES for record in records[role][:1500] for prompt, turns in [pieces(record)]
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
    start = load_model(source, pick_device()) if source else None  # what is broken is refused before anything is written
    print("reading the conversations" if config.traces else "making the world and its teacher's conversations", flush=True)
    records, valid, texts = prepare(config)
    run = Run(Path(config.out) / "sft", config, COLUMNS, source, (config.traces,) if config.traces else ())
    if run.finished:
        return
    if source:  # it knows how to copy: no need to begin with pieces
        model, tokenizer, config = start, Tokenizer(source), replace(config, piece=1_000_000)
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
    model, tokenizer = load_model(folder, pick_device()), Tokenizer(folder)
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
