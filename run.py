"""What every command shares, and what you need not read to learn the method: command line, device, run folder."""
import argparse
import csv
import hashlib
import json
import math
import os
import shlex
import shutil
import signal
import sys
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, field, fields
from pathlib import Path
from typing import Callable, Iterator, get_args

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from agents import Trace
from data import InputError, read_json
from model import Tokenizer, Transformer, save_model


def option(default, meaning: str, **more):
    """A config field: its default and what it means, which is also its --help."""
    return field(default=default, metadata={"help": meaning, **more})


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
    # MKL picks the code of a function at its first call. If several threads make that call at once, a part of the result
    # may be off by 1e-4 (pytorch/pytorch#188792), and the seed gives another run. One element takes one thread.
    for function in (torch.cos, torch.sin, torch.exp):
        function(torch.ones(1))


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


def fingerprint(*paths: Path) -> str:
    """SHA-256 of the contents of files. A folder counts by its weights."""
    digest = hashlib.sha256()
    for path in paths:
        parts = sorted(Path(path).glob("*.safetensors")) if Path(path).is_dir() else [path]
        for part in parts:
            with open(part, "rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


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
