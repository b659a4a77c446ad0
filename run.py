"""Shared by all programs: device, precision, run folder. You may skip this file."""
import csv
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import ranks
from agents import Trace
from data import InputError, fingerprint, prompts, read_json
from data.folders import UNFINISHED, gets_steps, is_finished, lock, whole_folder
from data.options import Config
from model import Tokenizer, Transformer, save_model

chosen = {"device": "cpu", "precision": "auto"}  # of this process; set_up sets them


def pick_device() -> str:
    """The device of this process: cpu, cuda or mps."""
    return chosen["device"]


def half_supported(kind: str) -> bool:
    """Whether this kind of device computes in bfloat16, without emulation."""
    if kind == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return kind == "cpu" and torch.cpu._is_avx512_bf16_supported()


def weights_type() -> torch.dtype:
    """bfloat16 on a GPU that computes in it and with --precision bfloat16, else float32."""
    half = chosen["device"].startswith("cuda") and half_supported("cuda")
    if chosen["precision"] != "auto":
        half = chosen["precision"] == "bfloat16"
    return torch.bfloat16 if half else torch.float32


def half_precision(device: str):
    """bfloat16 autocast for products with float32 weights, where the device computes in it."""
    kind = torch.device(device).type
    half = chosen["precision"] == "auto" and weights_type() == torch.float32
    return torch.autocast(kind, torch.bfloat16) if half and half_supported(kind) else nullcontext()


def set_up(config: Config, checkpoint: bool = False) -> None:
    """Set threads, device and precision of this process. checkpoint: "auto" selects the GPU."""
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(),
                 "cpu": True}
    if not available.get(config.device, True):
        raise InputError(f"device: {config.device} is not available here")
    best = next(device for device in available if available[device])
    auto = best if checkpoint else "cpu"
    chosen["device"] = auto if config.device == "auto" else config.device
    chosen["precision"] = config.precision
    chosen["device"] = ranks.join(chosen["device"], checkpoint)
    if config.threads:
        torch.set_num_threads(config.threads)
    torch.backends.cuda.enable_cudnn_sdp(False)  # it plans anew for each new length
    # MKL sets up a function at its first call. If several threads make that call, results may be
    # off by 1e-4 (pytorch/pytorch#188792). One element is computed by one thread.
    for function in (torch.cos, torch.sin, torch.exp):
        function(torch.ones(1))


# -------------------------------------------------------------------------------------- run folder

LOGS = ("metrics.csv", "traces.jsonl")


class Run:
    """The folder of one stage: config.json, metrics.csv, traces.jsonl, checkpoints/ and model/.

    A checkpoint is a model folder with AdamW's moments and state.json beside it. Random numbers are
    derived from seed and step, so no RNG state is saved.
    """

    def __init__(self, folder: Path, config, columns: list[str], sources: tuple = ()):
        """sources: the model folder and the files that the stage reads."""
        if ranks.rank() == 0:
            lock(folder.parent / "lock")
        self.folder = folder
        self.columns = columns
        self.save_every = config.save_every
        self.state = {"step": 0, "logs": {}}
        options = asdict(config) | {"sha256_of_model_and_data": fingerprint(*sources),
                                    "sha256_of_prompts": fingerprint(prompts.__file__)}
        with ranks.rank0_first():
            self.checkpoint = max((folder / "checkpoints").glob("[0-9]*"), default=None)
            self.finished = is_finished(folder)
            if ranks.rank() > 0:  # it reads where rank 0 goes on, and writes nothing
                if self.checkpoint and not self.finished:
                    self.state = read_json(self.checkpoint / "state.json")
                self.log = self.save_traces = self._save_checkpoint = self.save = lambda *_: None
            elif not (self.checkpoint or self.finished):
                self._begin(options)
            elif config.resume:
                self._resume(options)
            else:
                raise InputError(f"{folder}: holds a run; continue it with --resume, remove it, or "
                                 "choose another --out")

    def _begin(self, options: dict) -> None:
        """Write config.json and empty logs. A run that was killed before it saved starts again."""
        begun = (self.folder / "config.json").exists()
        if self.folder.exists() and any(self.folder.iterdir()) and not begun:
            raise InputError(f"{self.folder}: holds something that is not a run; nothing was done")
        self.folder.mkdir(parents=True, exist_ok=True)
        self._write_config(options)
        for name in LOGS:
            (self.folder / name).write_bytes(b"")

    def _write_config(self, options: dict) -> None:
        (self.folder / "config.json").write_text(json.dumps(options, indent=2) + "\n", "utf-8")

    def _resume(self, options: dict) -> None:
        """Go back to the last checkpoint. A finished run that gets more steps goes on."""
        if gets_steps(self.folder, options, self.finished):
            if not self.checkpoint:
                raise InputError(f"steps: {self.folder} has no checkpoint to continue from")
            (self.folder / UNFINISHED).touch()
            self.finished = False
            self._write_config(options)
        if self.checkpoint and not self.finished:
            self.state = read_json(self.checkpoint / "state.json")
            for name in LOGS:  # rows after the checkpoint will be written again
                os.truncate(self.folder / name, self.state["logs"][name])

    def log(self, row: dict) -> None:
        """Append one row to metrics.csv. A value that is not finite ends the run."""
        with open(self.folder / "metrics.csv", "a", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, self.columns)
            if not file.tell():
                writer.writeheader()
            writer.writerow({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()})
        for name, value in row.items():
            if isinstance(value, float) and not math.isfinite(value):
                raise SystemExit(f"step {row['step']}: {name} is {value}. The run ends here; "
                                 f"{self.folder / 'checkpoints'} keeps its last checkpoint")

    def save_traces(self, step: int, traces: list[Trace], golds: list, rewards: list) -> None:
        """Append whole traces to traces.jsonl, one per line, each with its golds and its reward."""
        with open(self.folder / "traces.jsonl", "a", encoding="utf-8") as file:
            for trace, gold, reward in zip(traces, golds, rewards, strict=True):
                line = {"step": step, **trace.record(), "golds": gold, "rewards": reward}
                file.write(json.dumps(line) + "\n")

    def steps(self, total: int, model: Transformer, tokenizer: Tokenizer,
              optimizer: torch.optim.Optimizer, more: Callable[[], dict] = dict) -> Iterator[int]:
        """Yield the remaining steps and save checkpoints. more(): what to add to state.json."""
        if self.checkpoint:
            # A checkpoint holds what is trained: adapters without the weights that they share.
            shared = {name: w for name, w in model.named_parameters() if not w.requires_grad}
            model.load_state_dict(shared | load_file(self.checkpoint / "model.safetensors"))
            restore_optimizer(model, optimizer, self.checkpoint / "optimizer.safetensors")
        for step in range(self.state["step"], total):
            yield step
            if (step + 1) % self.save_every == 0 or step + 1 == total:
                self.state |= {"step": step + 1, **more()}
                self._save_checkpoint(model, tokenizer, optimizer)

    def _save_checkpoint(self, model: Transformer, tokenizer: Tokenizer,
                         optimizer: torch.optim.Optimizer) -> None:
        """Write the model, AdamW's moments and state.json; keep this checkpoint and one older."""
        self.state["logs"] = {name: (self.folder / name).stat().st_size for name in LOGS}
        with whole_folder(self.folder / "checkpoints" / f"{self.state['step']:07d}") as part:
            save_model(model, tokenizer, part, merge=False)
            save_file(optimizer_tensors(model, optimizer), part / "optimizer.safetensors")
            (part / "state.json").write_text(json.dumps(self.state), encoding="utf-8")
        for old in sorted((self.folder / "checkpoints").glob("[0-9]*"))[:-2]:
            shutil.rmtree(old)

    def save(self, model: Transformer, tokenizer: Tokenizer) -> None:
        """Write the trained model as a Hugging Face folder."""
        with whole_folder(self.folder / "model") as part:
            save_model(model, tokenizer, part)
        (self.folder / UNFINISHED).unlink(missing_ok=True)


def optimizer_tensors(model: Transformer, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Moments, step numbers and masters by the names of the weights, for a checkpoint."""
    tensors = {}
    for name, weight in model.named_parameters():
        stepped = getattr(optimizer, "masters", {}).get(weight, weight)
        for moment, tensor in optimizer.state.get(stepped, {}).items():
            tensors[f"{name}.{moment}"] = tensor
        if stepped is not weight:
            tensors[f"{name}.master"] = stepped.detach()
    return tensors


def restore_optimizer(model: Transformer, optimizer: torch.optim.Optimizer, path: Path) -> None:
    """The inverse of optimizer_tensors, from a file."""
    weights = dict(model.named_parameters())
    for key, tensor in load_file(path).items():
        name, moment = key.rsplit(".", 1)
        stepped = getattr(optimizer, "masters", {}).get(weights[name], weights[name])
        if moment == "master":
            stepped.data.copy_(tensor)
        else:
            optimizer.state[stepped][moment] = tensor.to(stepped.device)
