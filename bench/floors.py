"""Where the seconds go, and the floor of each part by what has to be computed and read.

  python bench/floors.py run --toy        the run of mtr.py, each part's seconds; without --toy it takes the whole time
  python bench/floors.py step --shape 7b --rows 64 256    prompts read and decode steps of the rollout engine alone

Floors are measured in the same process: products of 2048 x 2048 matrices give the FLOP/s, a copy the bytes a second
(read and written). FLOPs count matrix products and attention, padding included, a backward pass twice its forward
one; bytes are weights once a pass, and the keys and values that a pass over a cache reads."""
import argparse
import json
import sys
import time
from collections import defaultdict
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))
from rollout import SHAPES, make_model  # noqa: E402

import grpo  # noqa: E402
import mtr  # noqa: E402
import run as run_file  # noqa: E402
import sft  # noqa: E402
from agents import AutoAgent, ToolActor, ToolMaker  # noqa: E402
from model import Sampler, Tokenizer, Transformer  # noqa: E402
from run import pick_device  # noqa: E402


def best_of(work, device: str, times: int = 7) -> float:
    """Seconds of the quickest of some tries; the first isn't counted."""
    taken = []
    for _ in range(times + 1):
        start = time.perf_counter()
        work()
        if device == "cuda":
            torch.cuda.synchronize()
        taken.append(time.perf_counter() - start)
    return min(taken[1:])


def machine(device: str, dtypes: list[torch.dtype]) -> tuple[dict[torch.dtype, float], float]:
    """FLOP/s of each dtype, and bytes a second of a copy."""
    flops = {}
    for dtype in dtypes:
        a = torch.randn(2048, 2048, device=device).to(dtype)
        flops[dtype] = 2 * 2048 ** 3 / best_of(partial(torch.matmul, a, a), device)
    x = torch.ones(2 ** 30 if device == "cuda" else 2 ** 27, dtype=torch.uint8, device=device)
    y = torch.empty_like(x)
    copy = 2 * x.numel() / best_of(lambda: y.copy_(x), device)
    print(f"{device}, {torch.get_num_threads()} threads: " + ", ".join(f"{f / 1e9:.0f} GFLOP/s {d}" for d, f in flops.items())
          + f", copy {copy / 1e9:.1f} GB/s")
    return flops, copy


def cost(model: Transformer, rows: int, width: int, keys: int) -> tuple[int, int]:
    """FLOPs and bytes of one pass of the blocks: rows x width new tokens, each seeing `keys` of them."""
    c = model.config
    matrices = sum(p.numel() for n, p in model.named_parameters() if p.dim() == 2 and "layers" in n)
    attention = 4 * c.num_hidden_layers * c.num_attention_heads * c.head_dim * keys
    cache = 2 * rows * keys * c.num_hidden_layers * c.num_key_value_heads * c.head_dim
    return rows * width * (2 * matrices + attention), (matrices + cache) * model.dtype.itemsize


def head_cost(model: Transformer, states: int) -> tuple[int, int]:
    """FLOPs and bytes of logits for some states."""
    size = model.known_ids * model.config.hidden_size
    return 2 * states * size, size * model.dtype.itemsize


# ---------------------------------------------------------------------------------------- the whole run


class Clock:
    """Seconds spent in each labelled function and in none below it, by the path of labels that led there."""

    def __init__(self, flops: dict[torch.dtype, float], copy: float):
        self.flops, self.copy = flops, copy
        self.rows = defaultdict(lambda: [0.0, 0, 0.0, 0.0])  # seconds, calls, floor by FLOPs, floor by bytes
        self.path, self.inner, self.backward = [], [], 0.0

    def watch(self, owner, name: str, label: str) -> None:
        """Put the clock around a function."""
        call = getattr(owner, name)

        def timed(*args, **more):
            self.path.append(label)
            self.inner.append(0.0)
            start = time.perf_counter()
            try:
                return call(*args, **more)
            finally:
                taken = time.perf_counter() - start
                row = self.rows[tuple(self.path)]
                row[0] += taken - self.inner.pop()
                row[1] += 1
                if label == "backward":
                    row[2], self.backward = row[2] + self.backward, 0.0
                self.path.pop()
                if self.inner:
                    self.inner[-1] += taken
        setattr(owner, name, timed)

    def count(self, model: Transformer, flops: int, read: int) -> None:
        """Add a pass's floor to where we are, and its backward pass's to where that will be."""
        half = torch.is_autocast_enabled(model.device.type)
        seconds = flops / self.flops[torch.bfloat16 if half else model.dtype]
        self.rows[tuple(self.path)][2] += seconds
        self.rows[tuple(self.path)][3] += read / self.copy
        self.backward += 2 * seconds * torch.is_grad_enabled()

    def weigh(self) -> None:
        """Count every pass of a model."""
        forward, head = Transformer.forward, Transformer.head

        def weighed(model, ids, past=None):
            rows, width = ids.shape
            keys = past.mask.shape[-1] if past else width / 2  # causal: half of them on average
            flops, read = cost(model, rows, width, keys)
            self.count(model, flops, read if past else 0)
            return forward(model, ids, past)

        def weighed_head(model, states):
            self.count(model, *head_cost(model, states.numel() // states.shape[-1]))
            return head(model, states)
        Transformer.forward, Transformer.head = weighed, weighed_head

    def table(self) -> None:
        """One line a path, the slowest stages first; parts below a hundredth of the whole are summed up."""
        total, small = sum(row[0] for row in self.rows.values()), [0.0, 0, 0.0, 0.0]
        stages = {path[0]: sum(r[0] for p, r in self.rows.items() if p[0] == path[0]) for path in self.rows}
        print(f"\n{'part':<52}{'seconds':>9}{'share':>8}{'calls':>9}{'FLOPs s':>10}{'bytes s':>10}{'x floor':>9}")
        lines = sorted(self.rows.items(), key=lambda item: (-stages[item[0][0]], -item[1][0]))
        for path, row in [*lines, (("smaller parts",), small)]:
            if row[0] < total / 100 and row is not small:
                small[:] = [a + b for a, b in zip(small, row, strict=True)]
                continue
            floor = max(row[2:])
            print(f"{' / '.join(path):<52}{row[0]:>9.2f}{row[0] / total:>8.1%}{row[1]:>9}{row[2]:>10.2f}{row[3]:>10.2f}"
                  f"{format(row[0] / floor, '.1f') if floor else '-':>9}")
        print(f"{'all':<52}{total:>9.2f}")


def profile_run(config: mtr.RunConfig) -> None:
    """mtr.run with clocks: stage / role / operation."""
    if config.threads:
        torch.set_num_threads(config.threads)
    device = pick_device()
    clock = Clock(*machine(device, [torch.float32, torch.bfloat16]))
    clock.weigh()
    for owner, name, label in (
            (sft, "train", "SFT"), (grpo, "train", "GRPO"), (sft, "train_on", "SFT continued"), (mtr, "all_rows", "evaluation"),
            (ToolMaker, "make", "ToolMaker"), (ToolActor, "answer", "ToolActor"), (AutoAgent, "start", "AutoAgent"),
            (AutoAgent, "act", "AutoAgent"), (AutoAgent, "observe", "AutoAgent"), (Sampler, "open", "open"),
            (Sampler, "_prefill", "read"), (Sampler, "sample", "decode"), (Tokenizer, "encode", "encode"),
            (Transformer, "forward", "forward"), (Transformer, "head", "head"), (sft, "teach", "teacher"), (torch.Tensor, "backward", "backward"),
            (torch.optim.AdamW, "step", "optimizer"), (torch.nn.utils, "clip_grad_norm_", "optimizer")):
        clock.watch(owner, name, label)
    mtr.run_all(config)
    clock.table()


# ------------------------------------------------------------------------------------------- the engine


def profile_step(shape: str, rows: list[int], prompt: int, tokens: int) -> None:
    """Prompts read, then decode steps with all rows speaking, in the shape's dtype."""
    device, dtype = pick_device(), torch.float32 if shape in ("tiny", "miniature") else torch.bfloat16
    peaks, copy = machine(device, [dtype])
    model, results = make_model(shape, device, dtype), []
    for B in rows:
        group = 1 if B % 8 else 8
        seconds = time_engine(model, B, group, prompt, tokens)
        step = zip(cost(model, B, 1, prompt + 2 * tokens), head_cost(model, B), strict=True)
        work = {"read": cost(model, B // group, prompt, prompt / 2), "step": [sum(pair) for pair in step]}
        for part, (f, read_bytes) in work.items():
            floors = f / peaks[dtype], read_bytes / copy
            results.append({"shape": shape, "device": device, "rows": B, "part": part, "ms": round(1e3 * seconds[part], 3),
                            "flops_ms": round(1e3 * floors[0], 3), "bytes_ms": round(1e3 * floors[1], 3),
                            "share_of_bandwidth": round(floors[1] / seconds[part], 3)})
            print(f"{shape}, {B} rows, {part}: {1e3 * seconds[part]:.2f} ms; floor {1e3 * floors[0]:.2f} ms by FLOPs, "
                  f"{1e3 * floors[1]:.2f} by bytes", flush=True)
    print(json.dumps(results))


def time_engine(model: Transformer, rows: int, group: int, prompt: int, tokens: int) -> dict[str, float]:
    """Seconds in which all prompts are read, and seconds of one decode step. The cache is freed at the end."""
    rng = np.random.default_rng(0)
    sampler = Sampler(model, SimpleNamespace(stop_ids=set()), rows, prompt + 3 * tokens + 8)
    prompts = [rng.integers(0, model.config.vocab_size, prompt).tolist() for _ in range(rows // group)]

    def read():
        sampler.reset()
        return sampler.open(prompts, group)

    noise = rng.random((rows, tokens), dtype=np.float32)
    seconds = {"read": best_of(read, model.device.type, 2)}
    conversations = read()
    decode = best_of(lambda: sampler.sample(conversations, [tokens] * rows, noise), model.device.type, 2)
    seconds["step"] = decode / tokens
    return seconds


def main() -> None:
    """python bench/floors.py run | step"""
    parser = run_file.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True, parser_class=run_file.Parser)
    run_file.add_options(commands.add_parser("run", help="the run of mtr.py"), mtr.RunConfig)
    step = commands.add_parser("step", help="the rollout engine alone")
    step.add_argument("--shape", choices=SHAPES, default="miniature")
    step.add_argument("--rows", type=int, nargs="+", default=[64], help="conversations at once (default: 64)")
    step.add_argument("--prompt", type=int, default=265, help="tokens of a prompt (default: 265)")
    step.add_argument("--tokens", type=int, default=40, help="new tokens a turn (default: 40)")
    step.add_argument("--threads", type=int, default=0, help="CPU threads; 0 leaves the choice to torch")
    options = vars(parser.parse_args())
    if options.pop("command") == "run":
        profile_run(mtr.RunConfig(**options))
    else:
        torch.set_num_threads(options.pop("threads") or torch.get_num_threads())
        profile_step(**options)


if __name__ == "__main__":
    run_file.run_main(main)
