"""Where the time goes, and the least time that each part needs for its arithmetic and its memory.

  python bench/floors.py run --toy    time the parts of mtr.py's run; without --toy the whole run
  python bench/floors.py step --shape 7b --rows 64 256    time prefill and decode steps alone

The speed of the machine is measured in the same process. Products of 2048 x 2048 matrices give the
FLOP/s. A copy gives the bytes per second, read and written. FLOPs are those of matrix products and
attention, with padding; a backward pass has twice the FLOPs of its forward pass. Bytes are the
weights once per pass, and the keys and values that a pass over a cache reads.
"""
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
from rollout import SHAPES, make_model

import mtr
import sft
from agents import AutoAgent, ToolActor, ToolMaker
from data.options import Config, Parser, add_options, run_main
from data.tokenizer import Tokenizer
from model import Sampler, Transformer
from run import pick_device, set_up


def best_of(work, device: str, times: int = 7) -> float:
    """Seconds of the fastest of `times` calls, after one call to warm up."""
    taken = []
    for _ in range(times + 1):
        start = time.perf_counter()
        work()
        if device == "cuda":
            torch.cuda.synchronize()
        taken.append(time.perf_counter() - start)
    return min(taken[1:])


def machine(device: str, dtypes: list[torch.dtype]) -> tuple[dict[torch.dtype, float], float]:
    """FLOP/s of each dtype, and bytes per second of a copy."""
    flops = {}
    for dtype in dtypes:
        a = torch.randn(2048, 2048, device=device).to(dtype)
        flops[dtype] = 2 * 2048 ** 3 / best_of(partial(torch.matmul, a, a), device)
    x = torch.ones(2 ** 30 if device == "cuda" else 2 ** 27, dtype=torch.uint8, device=device)
    y = torch.empty_like(x)
    copy = 2 * x.numel() / best_of(lambda: y.copy_(x), device)
    speeds = ", ".join(f"{f / 1e9:.0f} GFLOP/s {dtype}" for dtype, f in flops.items())
    print(f"{device}, {torch.get_num_threads()} threads: {speeds}, copy {copy / 1e9:.1f} GB/s")
    return flops, copy


def cost(model: Transformer, rows: int, width: int, keys: int) -> tuple[int, int]:
    """FLOPs and bytes of one pass of the blocks: rows x width tokens, each attends to `keys`."""
    c = model.config
    matrices = sum(p.numel() for n, p in model.named_parameters() if p.dim() == 2 and "layers" in n)
    attention = 4 * c.num_hidden_layers * c.num_attention_heads * c.head_dim * keys
    cache = 2 * rows * keys * c.num_hidden_layers * c.num_key_value_heads * c.head_dim
    return rows * width * (2 * matrices + attention), (matrices + cache) * model.dtype.itemsize


def head_cost(model: Transformer, states: int) -> tuple[int, int]:
    """FLOPs and bytes of the logits of `states` positions."""
    size = model.known_ids * model.config.hidden_size
    return 2 * states * size, size * model.dtype.itemsize


# ----------------------------------------------------------------------------------- the whole run


class Clock:
    """Seconds in each labelled function, without the labelled functions that it calls.

    The key of a row is the path of labels from the outermost function to this one.
    """

    def __init__(self, flops: dict[torch.dtype, float], copy: float):
        self.flops, self.copy = flops, copy
        # path -> seconds, calls, floor by FLOPs, floor by bytes
        self.rows = defaultdict(lambda: [0.0, 0, 0.0, 0.0])
        self.path, self.inner, self.backward = [], [], 0.0

    def watch(self, owner, name: str, label: str, second: str = "") -> None:
        """Time each call of a function. A call with a second argument has the label `second`."""
        call = getattr(owner, name)

        def timed(*args, **more):
            self.path.append(second if second and len(args) + len(more) > 1 else label)
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
        """Add the floor of a pass to the current row. Keep its backward pass's for `backward`."""
        half = torch.is_autocast_enabled(model.device.type)
        seconds = flops / self.flops[torch.bfloat16 if half else model.dtype]
        self.rows[tuple(self.path)][2] += seconds
        self.rows[tuple(self.path)][3] += read / self.copy
        self.backward += 2 * seconds * torch.is_grad_enabled()

    def weigh(self) -> None:
        """Count the FLOPs and bytes of every pass of a model."""
        forward, head = Transformer.forward, Transformer.head

        def weighed(model, ids, past=None):
            rows, width = ids.shape
            # A causal row attends to half of its tokens on average.
            keys = past.mask.shape[-1] if past else width / 2
            flops, read = cost(model, rows, width, keys)
            self.count(model, flops, read if past else 0)
            return forward(model, ids, past)

        def weighed_head(model, states):
            self.count(model, *head_cost(model, states.numel() // states.shape[-1]))
            return head(model, states)
        Transformer.forward, Transformer.head = weighed, weighed_head

    def table(self) -> None:
        """Print one line per path, the slowest stage first. Parts below 1 % are added up."""
        total, small = sum(row[0] for row in self.rows.values()), [0.0, 0, 0.0, 0.0]
        stages = defaultdict(float)
        for path, row in self.rows.items():
            stages[path[0]] += row[0]
        print(f"\n{'part':<52}{'seconds':>9}{'share':>8}{'calls':>9}{'FLOPs s':>10}{'bytes s':>10}"
              f"{'x floor':>9}")
        lines = sorted(self.rows.items(), key=lambda item: (-stages[item[0][0]], -item[1][0]))
        for path, row in [*lines, (("smaller parts",), small)]:
            if row[0] < total / 100 and row is not small:
                small[:] = [a + b for a, b in zip(small, row, strict=True)]
                continue
            floor = max(row[2:])
            times = format(row[0] / floor, ".1f") if floor else "-"
            print(f"{' / '.join(path):<52}{row[0]:>9.2f}{row[0] / total:>8.1%}{row[1]:>9}"
                  f"{row[2]:>10.2f}{row[3]:>10.2f}{times:>9}")
        print(f"{'all':<52}{total:>9.2f}")


def profile_run(config: mtr.RunConfig) -> None:
    """Run mtr.run_all and print its table. A path is stage / role / operation."""
    set_up(config)
    device = pick_device()
    clock = Clock(*machine(device, [torch.float32, torch.bfloat16]))
    clock.weigh()
    clock.watch(mtr, "train_sft", "SFT", second="SFT continued")
    for owner, name, label in (
            (mtr, "train_grpo", "GRPO"), (mtr, "all_rows", "evaluation"),
            (ToolMaker, "make", "ToolMaker"), (ToolActor, "answer", "ToolActor"),
            (AutoAgent, "start", "AutoAgent"), (AutoAgent, "act", "AutoAgent"),
            (AutoAgent, "observe", "AutoAgent"), (Sampler, "open", "open"),
            (Sampler, "_prefill", "read"), (Sampler, "sample", "decode"),
            (Tokenizer, "encode", "encode"), (Transformer, "forward", "forward"),
            (Transformer, "head", "head"), (sft, "teach", "teacher"),
            (torch.Tensor, "backward", "backward"), (torch.optim.AdamW, "step", "optimizer"),
            (torch.nn.utils, "clip_grad_norm_", "optimizer")):
        clock.watch(owner, name, label)
    mtr.run_all(config)
    clock.table()


# -------------------------------------------------------------------------------------- the engine


def profile_step(shape: str, rows: list[int], prompt: int, tokens: int) -> None:
    """Time the prefill of all prompts and a decode step of all rows, in the dtype of the shape."""
    device = pick_device()
    dtype = torch.float32 if shape in ("tiny", "miniature") else torch.bfloat16
    peaks, copy = machine(device, [dtype])
    model, results = make_model(shape, device, dtype), []
    for B in rows:
        group = 1 if B % 8 else 8
        seconds = time_engine(model, B, group, prompt, tokens)
        step = zip(cost(model, B, 1, prompt + 2 * tokens), head_cost(model, B), strict=True)
        work = {"read": cost(model, B // group, prompt, prompt / 2),
                "step": [sum(pair) for pair in step]}
        for part, (f, read_bytes) in work.items():
            floors = f / peaks[dtype], read_bytes / copy
            ms, flops_ms, bytes_ms = (1e3 * s for s in (seconds[part], *floors))
            results.append({"shape": shape, "device": device, "rows": B, "part": part,
                            "ms": round(ms, 3), "flops_ms": round(flops_ms, 3),
                            "bytes_ms": round(bytes_ms, 3),
                            "share_of_bandwidth": round(bytes_ms / ms, 3)})
            print(f"{shape}, {B} rows, {part}: {ms:.2f} ms; floor {flops_ms:.2f} ms by FLOPs, "
                  f"{bytes_ms:.2f} by bytes", flush=True)
    print(json.dumps(results))


def time_engine(model: Transformer, rows: int, group: int, prompt: int, tokens: int
                ) -> dict[str, float]:
    """Seconds of the prefill of all prompts, and of one decode step. The cache is freed."""
    rng = np.random.default_rng(0)
    sampler = Sampler(model, SimpleNamespace(stop_ids=set()), rows, prompt + 3 * tokens + 8)
    size = model.config.vocab_size
    prompts = [rng.integers(0, size, prompt).tolist() for _ in range(rows // group)]

    def read():
        sampler.reset()
        return sampler.open(prompts, group)

    noise = rng.random((rows, tokens), dtype=np.float32)
    seconds = {"read": best_of(read, model.device.type, 2)}
    conversations = read()
    limits = [tokens] * rows
    decode = best_of(lambda: sampler.sample(conversations, limits, noise), model.device.type, 2)
    seconds["step"] = decode / tokens
    return seconds


def main() -> None:
    """python bench/floors.py run | step"""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True, parser_class=Parser)
    add_options(commands.add_parser("run", help="the run of mtr.py"), mtr.RunConfig)
    step = commands.add_parser("step", help="the rollout engine alone")
    step.add_argument("--shape", choices=SHAPES, default="miniature")
    step.add_argument("--rows", type=int, nargs="+", default=[64],
                      help="conversations at once (default: 64)")
    step.add_argument("--prompt", type=int, default=265, help="tokens per prompt (default: 265)")
    step.add_argument("--tokens", type=int, default=40, help="new tokens per turn (default: 40)")
    step.add_argument("--threads", type=int, default=0, help="CPU threads; 0: torch's choice")
    options = vars(parser.parse_args())
    if options.pop("command") == "run":
        profile_run(mtr.RunConfig(**options))
    else:
        set_up(Config(threads=options.pop("threads")), checkpoint=True)
        profile_step(**options)


if __name__ == "__main__":
    run_main(main)
