"""Where the time goes, and the least time that each part needs for its arithmetic and its memory.

  python bench/floors.py run --toy                        the parts of mtr.py's run
  python bench/floors.py step --shape 7b --rows 64 256    prefill and decode steps alone
  python bench/floors.py train --shape 3b                 a training pass and an optimizer step
  python bench/floors.py grpo --shape 1.5b                a whole GRPO step, part by part
  python bench/floors.py why                              which kernels take the time, on a CPU
  python bench/floors.py check --shape 0.5b               is the engine right on this device?
  python bench/floors.py tables DIR                       tables from the files of bench/gpu.sh

The speed of the machine is measured in the same process. Large products of square matrices give
the FLOP/s. A copy gives the bytes per second, read and written. FLOPs are those of matrix products
and attention, with padding. A backward pass has twice the FLOPs of its forward pass, or as many if
the weights are frozen (LoRA). What is computed again to save memory is not counted. Bytes are the
weights once per pass, and the keys and values that a pass over a cache reads.

Weights are random. In `step`, `grpo` and `check`, the lengths of all turns are planned. All
commands but `run` and `tables` print one JSON object as their last line.
"""
import argparse
import json
import subprocess
import sys
import time
from collections import defaultdict
from datetime import date
from functools import partial
from pathlib import Path
from statistics import fmean
from types import SimpleNamespace

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))
import rollout
from rollout import SHAPES, Plan, make_model, make_plan

import grpo
import mtr
import sft
from agents import AutoAgent, ToolActor, ToolMaker, Trace
from data.options import Config, Parser, add_options, run_main
from data.tokenizer import Tokenizer
from graph import GraphSampler
from model import (
    Sampler,
    Transformer,
    adapted,
    make_optimizer,
    token_logprobs,
)
from run import half_precision, pick_device, set_up

ROOT = Path(__file__).resolve().parents[1]
NO_STOP = SimpleNamespace(stop_ids=set())  # in place of a tokenizer: a turn ends at its limit


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
    n = 8192 if device == "cuda" else 2048  # a GPU needs larger products to reach its rate
    for dtype in dict.fromkeys(dtypes):
        a = torch.randn(n, n, device=device).to(dtype)
        flops[dtype] = 2 * n ** 3 / best_of(partial(torch.matmul, a, a), device)
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


def dtype_of(shape: str) -> torch.dtype:
    """The type of the weights: float32 for the small shapes, bfloat16 for Qwen2.5's."""
    return torch.float32 if shape in ("tiny", "miniature") else torch.bfloat16


def training_dtype(model: Transformer) -> torch.dtype:
    """The type of the products in a training pass."""
    kind = model.device.type
    with half_precision(kind):
        return torch.bfloat16 if torch.is_autocast_enabled(kind) else model.dtype


def about() -> dict:
    """What a figure depends on: device, versions, date and commit."""
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True,
                            text=True, cwd=ROOT).stdout.strip()
    return {"on": name, "torch": torch.__version__, "date": str(date.today()), "commit": commit}


# ----------------------------------------------------------------------------------- the whole run


class Clock:
    """Seconds in each labelled function, without the labelled functions that it calls.

    The key of a row is the path of labels from the outermost function to this one.
    """

    def __init__(self, flops: dict[torch.dtype, float], copy: float, wait: bool = False,
                 frozen: bool = False):
        """wait: let a GPU finish before a time is taken. frozen: the weights have no gradient."""
        self.flops, self.copy, self.wait = flops, copy, wait
        self.back = 1 if frozen else 2  # FLOPs of a backward pass, in forward passes
        # path -> seconds, calls, floor by FLOPs, floor by bytes
        self.rows = defaultdict(lambda: [0.0, 0, 0.0, 0.0])
        self.path, self.inner, self.backward = [], [], 0.0
        self.originals = []  # owner, name and function, to be put back

    def restore(self) -> None:
        """Put all functions back."""
        for owner, name, call in reversed(self.originals):
            setattr(owner, name, call)

    def watch(self, owner, name: str, label: str, second: str = "") -> None:
        """Time each call of a function. A call with a second argument has the label `second`."""
        call = getattr(owner, name)
        self.originals.append((owner, name, call))

        def timed(*args, **more):
            self.path.append(second if second and len(args) + len(more) > 1 else label)
            self.inner.append(0.0)
            start = self.now()
            try:
                return call(*args, **more)
            finally:
                taken = self.now() - start
                row = self.rows[tuple(self.path)]
                row[0] += taken - self.inner.pop()
                row[1] += 1
                if label == "backward":
                    row[2], self.backward = row[2] + self.backward, 0.0
                self.path.pop()
                if self.inner:
                    self.inner[-1] += taken
        setattr(owner, name, timed)

    def now(self) -> float:
        if self.wait:
            torch.cuda.synchronize()
        return time.perf_counter()

    def count(self, model: Transformer, flops: int, read: int) -> None:
        """Add the floor of a pass to the current row. Keep its backward pass's for `backward`."""
        half = torch.is_autocast_enabled(model.device.type)
        seconds = flops / self.flops[torch.bfloat16 if half else model.dtype]
        self.rows[tuple(self.path)][2] += seconds
        self.rows[tuple(self.path)][3] += read / self.copy
        if torch.is_grad_enabled():
            self.backward += self.back * seconds

    def weigh(self) -> None:
        """Count the FLOPs and bytes of every pass of a model."""
        forward, head = Transformer.forward, Transformer.head
        self.originals += [(Transformer, "forward", forward), (Transformer, "head", head)]

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


SAMPLERS = {"plain": Sampler, "graph": GraphSampler}  # graph.py: with CUDA graphs


def profile_step(shape: str, rows: list[int], prompt: int, tokens: int) -> None:
    """Time the prefill of all prompts and a decode step of all rows, in the dtype of the shape."""
    device = pick_device()
    dtype = dtype_of(shape)
    peaks, copy = machine(device, [dtype])
    model, results = make_model(shape, device, dtype), []
    for name, kind in SAMPLERS.items():
        for B in rows:
            group = 1 if B % 8 else 8
            step = zip(cost(model, B, 1, prompt + 2 * tokens), head_cost(model, B), strict=True)
            work = {"read": cost(model, B // group, prompt, prompt / 2),
                    "step": [sum(pair) for pair in step]}
            row = {"rows": B, "sampler": name}
            try:
                seconds = time_engine(kind, model, B, group, prompt, tokens)
            except Exception as error:  # the other rows are still worth their time
                results.append(row | {"failed": f"{type(error).__name__}: {error}"[:300]})
                print(results[-1], flush=True)
                continue
            for part, (f, read_bytes) in work.items():
                floors = f / peaks[dtype], read_bytes / copy
                ms, flops_ms, bytes_ms = (1e3 * s for s in (seconds[part], *floors))
                results.append(row | {"part": part, "ms": round(ms, 3),
                                      "flops_ms": round(flops_ms, 3),
                                      "bytes_ms": round(bytes_ms, 3),
                                      "share_of_bandwidth": round(bytes_ms / ms, 3)})
                print(f"{shape}, {B} rows, {name}, {part}: {ms:.2f} ms; floor {flops_ms:.2f} ms "
                      f"by FLOPs, {bytes_ms:.2f} by bytes", flush=True)
    print(json.dumps({"shape": shape, "copy": round(copy), "steps": results, **about()}))


def time_engine(kind: type, model: Transformer, rows: int, group: int, prompt: int, tokens: int
                ) -> dict[str, float]:
    """Seconds of the prefill of all prompts, and of one decode step. The cache is freed."""
    rng = np.random.default_rng(0)
    sampler = kind(model, NO_STOP, rows, prompt + 3 * tokens + 8)
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


# ----------------------------------------------------------------------------------------- training


def trainable(shape: str, lora: int | None) -> tuple[Transformer, int]:
    """A random model to train as stage 2 does, and its rank. lora None: adapters of rank 16 if the
    weights, gradients, masters and moments would not fit the GPU.
    """
    device = pick_device()
    base = make_model(shape, device, dtype_of(shape))
    if lora is None:
        need = 16 * sum(p.numel() for p in base.parameters())
        small = device == "cuda" and need > 0.8 * torch.cuda.mem_get_info()[1]
        lora = 16 if small else 0
    model = adapted(base, lora, seed=0) if lora else base.requires_grad_(True)
    model.save_memory = shape not in ("tiny", "miniature")  # as in grpo.py
    return model, lora


def random_trace(length: int, size: int, rng: np.random.Generator) -> Trace:
    """A conversation: a prompt of 240 tokens, then 40 generated and 22 from outside in turn. If it
    is shorter than 480 tokens, its prompt takes half of it.
    """
    trace = Trace()
    ids = rng.integers(0, size, length).tolist()
    prompt = min(240, length // 2)
    trace.hear(ids[:prompt])
    for start in range(prompt, length, 62):
        trace.say(ids[start:start + 40])
        trace.hear(ids[start + 40:start + 62])
    return trace


def training_flops(model: Transformer, traces: list[Trace], frozen: bool = False) -> int:
    """FLOPs of the forward and backward passes of one micro-batch. What is recomputed, masked keys
    and padding beyond the longest trace are not counted.
    """
    width = max(len(trace.ids) for trace in traces)
    scored = sum(sum(trace.mask) for trace in traces)
    flops, _ = cost(model, len(traces), width, width / 2)
    head, _ = head_cost(model, scored)
    return (flops + head) * (2 if frozen else 3)


def profile_train(shape: str, tokens: int, length: int, lora: int | None) -> None:
    """Time a training pass and an optimizer step, beside the rate of the machine."""
    model, lora = trainable(shape, lora)
    device, dtype = model.device.type, training_dtype(model)
    peaks, _ = machine(device, [dtype])
    rng = np.random.default_rng(0)
    size = model.config.vocab_size
    traces = [random_trace(length, size, rng) for _ in range(max(1, tokens // length))]
    optimizer = make_optimizer(model, 1e-6, 0.0)

    def run_pass():
        logprobs, _, _ = sft.trace_logprobs(model, traces)
        (-logprobs.mean()).backward()

    def run_step():  # clipping and update; the gradient stays for the next call
        for group in optimizer.param_groups:
            group["lr"] = 0.0
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    seconds = best_of(run_pass, device, 3)
    step = best_of(run_step, device, 1)
    flops = training_flops(model, traces, frozen=bool(lora))
    share = flops / seconds / peaks[dtype]
    print(f"{shape}, lora {lora}: {len(traces)} x {length} tokens in {seconds:.3f} s, "
          f"{share:.0%} of {peaks[dtype] / 1e12:.2f} TFLOP/s; optimizer step {step:.3f} s")
    print(json.dumps({"shape": shape, "lora": lora, "tokens": len(traces) * length,
                      "seconds": round(seconds, 4), "optimizer_seconds": round(step, 4),
                      "tflops": round(flops / seconds / 1e12, 3),
                      "rate_tflops": round(peaks[dtype] / 1e12, 3), "share": round(share, 3),
                      "recomputed": model.save_memory, **about()}))


KINDS = {
    "matrix products": "mm addmm bmm",
    "fused attention": "_scaled_dot_product_flash_attention_for_cpu "
                       "_scaled_dot_product_flash_attention_for_cpu_backward",
    "softmax": "_softmax _softmax_backward_data _log_softmax _log_softmax_backward_data",
    "element by element": "mul add add_ sub div div_ neg exp pow sum mean rsqrt cumsum sin cos "
                          "silu silu_backward _fused_adamw_ fill_ where masked_fill masked_fill_ "
                          "lt le ge gt eq isin searchsorted triu",
    "copies and lookups": "copy_ cat index _index_put_impl_ index_select gather scatter_add_ "
                          "embedding_dense_backward arange repeat"}
KIND_OF = {f"aten::{name}": kind for kind, names in KINDS.items() for name in names.split()}


def kernel_times(work) -> dict[str, np.ndarray]:
    """Milliseconds and number of calls of each kind of kernel. The last row has what is left of the
    time without the profiler: Python, views, autograd and the dispatch of kernels.
    """
    seconds = best_of(work, "cpu", 5)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        work()
    found = {kind: np.zeros(2) for kind in KINDS}
    for event in profile.key_averages():
        if event.key in KIND_OF:
            found[KIND_OF[event.key]] += (event.self_cpu_time_total / 1e3, event.count)
    left = 1e3 * seconds - sum(row[0] for row in found.values())
    found["Python and dispatch"] = np.array([left, 0.0])
    return found


def profile_why(shape: str) -> None:
    """Split a training pass of 24 x 192 tokens and a decode step of 64 rows by kinds of kernels."""
    model, _ = trainable(shape, 0)
    size = model.config.vocab_size
    half = training_dtype(model)
    peaks, copy = machine("cpu", [half, model.dtype])
    rng = np.random.default_rng(0)
    traces = [random_trace(192, size, rng) for _ in range(24)]
    plan = Plan(rng.integers(0, size, (8, 265)).tolist(), 8, [[40]] * 64, [[[]]] * 64)
    sampler = Sampler(model, NO_STOP, 64, plan.slots)

    def train():
        logprobs, _, _ = sft.trace_logprobs(model, traces)
        (-logprobs.mean()).backward()

    def decode(steps: int):
        sampler.reset()
        rows = sampler.open(plan.prompts, 8)
        noise = rng.random((64, steps + 1), dtype=np.float32)  # the prefill gives the first id
        sampler.sample(rows, [steps + 1] * 64, noise)

    training = kernel_times(train)
    prompts = kernel_times(partial(decode, 0))
    both = kernel_times(partial(decode, 40))
    step = {kind: (both[kind] - prompts[kind]) / 40 for kind in both}
    flops, weights = cost(model, 64, 1, 0)
    cache = cost(model, 64, 1, 285)[1] - weights
    floors = {"training pass": {"matrix products": training_flops(model, traces) / peaks[half]},
              "decode step": {"matrix products":
                              (flops + head_cost(model, 64)[0]) / peaks[model.dtype],
                              "fused attention": cache / copy}}
    found = {}
    for name, times in {"training pass": training, "decode step": step}.items():
        total = sum(ms for ms, _ in times.values())
        found[name] = {"all": round(total, 3)}
        print(f"{name}: {total:.2f} ms")
        for kind, (ms, calls) in times.items():
            floor = floors[name].get(kind)
            beside = f"  floor {1e3 * floor:.2f} ms" if floor else ""
            print(f"  {kind:<19}{ms:8.2f} ms  {ms / total:4.0%}  {calls:5.0f} calls{beside}")
            found[name][kind] = round(ms, 3)
    print(json.dumps({"shape": shape, "parts": found, "copy": round(copy), **about()}))


def forced_rollout(sampler: Sampler, plan: Plan, seed: int, temperature: float = 1.0
                   ) -> list[Trace]:
    """Sample the planned lengths, with the planned observations -> traces with log-probabilities.
    """
    rng = np.random.default_rng(seed)
    sampler.reset()
    opened = sampler.open(plan.prompts, plan.group)
    traces = [Trace() for _ in opened]
    for i, trace in enumerate(traces):
        trace.hear(plan.prompts[i // plan.group])
    for turn in range(max(map(len, plan.said))):
        rows = [i for i, said in enumerate(plan.said) if turn < len(said)]
        limits = [plan.said[i][turn] for i in rows]
        uniforms = np.minimum(rng.random((len(rows), max(limits)), np.float32), 1 - 1e-6)
        new = sampler.sample([opened[i] for i in rows], limits, uniforms, temperature)
        for i, (ids, logprobs) in zip(rows, new, strict=True):
            traces[i].say(ids, logprobs)
            if turn < len(plan.heard[i]):
                traces[i].hear(plan.heard[i][turn])
                sampler.append(opened[i], plan.heard[i][turn])
    return traces


def pseudo_reward(ids: list[int]) -> float:
    """A number from 0 to 1 that depends on the ids alone. Random weights earn no real reward."""
    return sum(ids) % 97 / 96


def grpo_step(sampler: Sampler, optimizer: torch.optim.Optimizer, plan: Plan,
              config: grpo.GRPOConfig, seed: int) -> dict[str, float]:
    """A step of stage 2 with planned lengths -> its log, with time_sample and time_train."""
    start = time.perf_counter()
    traces = forced_rollout(sampler, plan, seed)
    middle = time.perf_counter()
    rewards = [{"reward": pseudo_reward(trace.ids[-8:])} for trace in traces]
    grpo.set_advantages(traces, rewards, config)
    log = grpo.update(sampler.model, None, optimizer, traces, config, config.lr)
    return log | {"time_sample": middle - start, "time_train": time.perf_counter() - middle}


def profile_grpo(shape: str, questions: int, group: int, lora: int | None, micro_tokens: int
                 ) -> None:
    """Time the parts of a GRPO step. Turns have planned lengths; a ToolActor does not take part."""
    model, lora = trainable(shape, lora)
    device = model.device.type
    dtypes = [model.dtype, training_dtype(model)]
    clock = Clock(*machine(device, dtypes), wait=device == "cuda", frozen=bool(lora))
    plan = make_plan(shape, questions, group)
    config = grpo.GRPOConfig(questions=questions, group=group, lr=1e-6, micro_tokens=micro_tokens,
                             trace_tokens=plan.slots)
    optimizer = make_optimizer(model, config.lr, 0.0, momentum=0.5)
    sampler = Sampler(model, NO_STOP, len(plan.said), plan.slots)
    for seed in (0, 1):  # the first step warms up
        log = grpo_step(sampler, optimizer, plan, config, seed)
    sampling = {"plain": round(log["time_sample"], 4)}
    clock.weigh()
    here = sys.modules[__name__]
    for owner, name, label in (
            (here, "grpo_step", "step"), (Sampler, "open", "prompts"),
            (Sampler, "sample", "decode"), (Sampler, "_prefill", "read"),
            (grpo, "trace_logprobs", "forward"), (torch.Tensor, "backward", "backward"),
            (grpo, "optimizer_step", "optimizer")):
        clock.watch(owner, name, label)
    log = here.grpo_step(sampler, optimizer, plan, config, seed=2)
    clock.restore()
    clock.table()
    parts = {}
    for path, (seconds, _, flops, read) in clock.rows.items():
        name = {("step",): "the rest", ("step", "prompts"): "prompts",
                ("step", "prompts", "read"): "prompts", ("step", "decode"): "decode",
                ("step", "decode", "read"): "observations"}.get(path, path[-1])
        part = parts.setdefault(name, {"seconds": 0.0, "floor": 0.0})
        part["seconds"] += seconds
        part["floor"] += max(flops, read)
    for part in parts.values():
        part.update({key: round(value, 4) for key, value in part.items()})
    del sampler  # its cache
    try:
        sampler = GraphSampler(model, NO_STOP, len(plan.said), plan.slots)
        for seed in (0, 1):
            start = time.perf_counter()
            forced_rollout(sampler, plan, seed)
            sampling["graph"] = round(time.perf_counter() - start, 4)
    except Exception as error:  # the parts are still worth their time
        sampling["graph_failed"] = f"{type(error).__name__}: {error}"[:300]
    print(json.dumps({"shape": shape, "lora": lora, "rows": len(plan.said),
                      "parts": parts, "sampling_seconds": sampling,
                      "gap_mean": log["gap_mean"], "gap_max": log["gap_max"], **about()}))


# ------------------------------------------------------------------------------------ is it right?


@torch.no_grad()
def difference(model: Transformer, ours: list[list[int]], theirs: list[list[int]]
               ) -> tuple[float, float]:
    """Share of the conversations that are equal, and how much more likely the model finds the
    better one of two tokens where a pair first differs: the largest of these gaps.

    Greedy ids may differ where two tokens are almost equally likely, since kernels round
    differently. Then the gap is small.
    """
    gaps = []
    for a, b in zip(ours, theirs, strict=True):
        if a != b:
            first = [x == y for x, y in zip(a, b, strict=True)].index(False)
            states = model(torch.tensor([a[:first]], device=model.device))[0, -1]
            logits = model.head(states)
            gaps.append(abs(float(logits[a[first]] - logits[b[first]])))
    return 1 - len(gaps) / len(ours), max(gaps, default=0.0)


@torch.no_grad()
def check(shape: str) -> None:
    """Compare the engine on this device with transformers and with itself. The last line is JSON.
    """
    device = pick_device()
    dtype = dtype_of(shape)
    tie = 0.05 if dtype == torch.bfloat16 else 1e-3  # logits that rounding can't tell apart
    model = make_model(shape, device, dtype)
    plan = make_plan(shape, 2, 4)
    found = {}

    def note(name: str, work) -> None:
        try:
            found[name] = work()
        except Exception as error:  # the other checks go on
            found[name] = {"ok": False, "failed": f"{type(error).__name__}: {error}"[:300]}
        print(name, found[name], flush=True)

    def greedy() -> dict:
        ours = rollout.roll_out(rollout.Ours(model, plan), plan, 0.0)
        peer = rollout.Reprefill(rollout.hugging_face(model), plan)
        share, gap = difference(model, ours, rollout.roll_out(peer, plan, 0.0))
        return {"ok": gap <= tie, "equal": share, "gap": gap}

    def graph() -> dict:
        found = {}
        for name, kind in SAMPLERS.items():
            sampler = kind(model, NO_STOP, len(plan.said), plan.slots)
            traces = forced_rollout(sampler, plan, seed=0, temperature=0.0)
            traces += forced_rollout(sampler, plan, seed=0)
            found[name] = traces
        half = len(plan.said)
        pairs = [[trace.ids for trace in traces[:half]] for traces in found.values()]
        share, gap = difference(model, *pairs)
        sampled = [a.ids == b.ids for a, b in zip(*[t[half:] for t in found.values()], strict=True)]
        return {"ok": gap <= tie, "equal": share, "gap": gap, "sampled_equal": fmean(sampled)}

    def lora() -> dict:
        rng = np.random.default_rng(0)
        ids = torch.tensor(rng.integers(0, SHAPES[shape].vocab_size, (2, 64)), device=device)
        mask = torch.ones_like(ids, dtype=torch.bool)
        mask[:, 0] = False
        base, _ = token_logprobs(model, ids, mask)
        start, _ = token_logprobs(adapted(model, 16, seed=0), ids, mask)
        largest = float((base - start).abs().max())
        return {"ok": largest == 0, "largest": largest}

    def gap() -> dict:
        found = {}
        for name, kind in SAMPLERS.items():
            sampler = kind(model, NO_STOP, len(plan.said), plan.slots)
            traces = forced_rollout(sampler, plan, seed=0)
            logprobs, _, _ = sft.trace_logprobs(model, traces)
            gaps = []
            for trace, row in zip(traces, logprobs.tolist(), strict=True):
                pairs = zip(trace.logprobs, row, trace.mask, strict=False)
                gaps += [abs(a - b) for a, b, sampled in pairs if sampled]
            found |= {f"{name} mean": fmean(gaps), f"{name} largest": max(gaps)}
        return {"ok": max(found["plain mean"], found["graph mean"]) <= 0.02} | found

    for name, work in (("greedy", greedy), ("lora", lora), ("gap", gap), ("graph", graph)):
        note(name, work)
    print(json.dumps({"shape": shape, "dtype": str(dtype).removeprefix("torch."),
                      "ok": all(result["ok"] for result in found.values()), **found, **about()}))


# ------------------------------------------------------------------------------------------ tables


def table(titles: list[str], rows: list[list]) -> str:
    """A Markdown table. None is an empty cell."""
    made = ""
    for row in [titles, ["---"] * len(titles), *rows]:
        cells = ["" if cell is None else f" {cell}" for cell in row]
        made += "|" + "".join(f"{cell} |" for cell in cells) + "\n"
    return made


def number(value: float | None, form: str) -> str | None:
    return None if value is None else format(value, form)


def tables(folder: Path) -> str:
    """The GPU tables of bench/README.md from the JSON files of bench/gpu.sh. A part that failed or
    was not run has empty cells.
    """
    def read(name: str) -> dict:
        file = folder / f"{name}.json"
        return json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}

    names = {"0.5b": "0.5B", "1.5b": "1.5B", "3b": "3B", "7b": "7B"}
    checks = read("check")
    texts = {"greedy": "greedy ids are transformers', but for ties in rounding",
             "graph": "`--graph` gives the ids of the plain loop, but for ties in rounding",
             "lora": "LoRA at the start gives the base's log-probabilities",
             "gap": "sampler and trainer agree"}
    rows = []
    for name, text in texts.items():
        result = dict(checks.get(name, {}))
        ok = {None: None, True: "yes", False: "no"}[result.pop("ok", None)]
        shown = [f"{key} {value:.2g}" if isinstance(value, float) else f"{key}: {value}"
                 for key, value in result.items()]
        rows.append([text, ok, ", ".join(shown) or None])
    made = [table(["check, 0.5B in bfloat16", "passed", "figures"], rows)]

    rows = []
    for shape in ("0.5b", "1.5b", "7b"):
        steps = read(f"step-{shape}").get("steps", [])
        for B in (1, 64, 256):
            cells = []
            for sampler in ("plain", "graph"):
                of = [s for s in steps if (s["rows"], s["sampler"]) == (B, sampler)]
                step = next((s for s in of if s.get("part") == "step"), {})
                cells += [number(step.get("ms"), ".2f"),
                          number(step.get("share_of_bandwidth"), ".0%")]
            rows.append([names[shape], B, *cells])
    made.append(table(["shape", "rows", "step, ms", "share", "with `--graph`, ms", "share"], rows))

    rows = []
    for shape in ("3b", "7b"):
        found = read(f"train-{shape}")
        what = f"LoRA {found['lora']}" if found.get("lora") else "all weights"
        rows.append([names[shape], what if "lora" in found else None, found.get("tokens"),
                     number(found.get("seconds"), ".3f"), number(found.get("tflops"), ".0f"),
                     number(found.get("rate_tflops"), ".0f"), number(found.get("share"), ".0%"),
                     number(found.get("optimizer_seconds"), ".3f")])
    made.append(table(["shape", "trained", "tokens", "pass, s", "TFLOP/s", "measured rate",
                       "share", "optimizer step, s"], rows))

    runs = [read(f"grpo-{shape}") for shape in ("1.5b", "7b")]
    both = [run.get("parts", {}) for run in runs]
    rows = []
    for part in ("prompts", "decode", "observations", "forward", "backward", "optimizer",
                 "the rest"):
        cells = []
        for parts in both:
            found = parts.get(part, {})
            cells += [number(found.get("seconds"), ".2f"), number(found.get("floor"), ".2f")]
        rows.append([part, *cells])
    sums = [sum(part["seconds"] for part in parts.values()) or None for parts in both]
    rows.append(["all", number(sums[0], ".2f"), None, number(sums[1], ".2f"), None])
    for name, text in (("plain", "sampling alone"), ("graph", "sampling alone, `--graph`")):
        times = [number(run.get("sampling_seconds", {}).get(name), ".2f") for run in runs]
        rows.append([text, times[0], None, times[1], None])
    made.append(table(["part of a GRPO step", "1.5B, s", "floor, s", "7B, s", "floor, s"], rows))

    rows = []
    for shape, options in (("0.5b", "none"), ("7b", "`--lora 16`")):
        found = read(f"memory-{shape}")
        cells = []
        for stage in ("sft", "grpo"):
            of = found.get(stage, {})
            cells += [number(of.get("plan"), ".1f"), number(of.get("peak"), ".1f")]
        rows.append([names[shape], options, *cells])
    made.append(table(["shape", "options", "sft.py: plan, GB", "peak", "grpo.py: plan, GB",
                       "peak"], rows))

    found = read("rollout-0.5b")
    times = found.get("times_ours", {})
    row = ["0.5B", found.get("rows"), number(found.get("seconds", {}).get("ours"), ".2f"),
           number(times.get("reprefill"), ".1f"), number(times.get("kept_shared"), ".1f")]
    made.append(table(["shape", "rows", "ours, s", "`reprefill` x", "`kept_shared` x"], [row]))
    return "\n".join(made)


def main() -> None:
    """python bench/floors.py run | step | train | grpo | why | check | tables"""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True, parser_class=Parser)
    add_options(commands.add_parser("run", help="the run of mtr.py"), mtr.RunConfig)
    step = commands.add_parser("step", help="the rollout engine alone")
    step.add_argument("--rows", type=int, nargs="+", default=[64],
                      help="conversations at once (default: 64)")
    step.add_argument("--prompt", type=int, default=265, help="tokens per prompt (default: 265)")
    step.add_argument("--tokens", type=int, default=40, help="new tokens per turn (default: 40)")
    train = commands.add_parser("train", help="a training pass and an optimizer step")
    train.add_argument("--tokens", type=int, default=8192, help="tokens per pass (default: 8192)")
    train.add_argument("--length", type=int, default=1024,
                       help="tokens per conversation (default: 1024)")
    whole = commands.add_parser("grpo", help="a GRPO step, part by part")
    whole.add_argument("--questions", type=int, default=8, help="questions (default: 8)")
    whole.add_argument("--group", type=int, default=8, help="traces per question (default: 8)")
    whole.add_argument("--micro-tokens", type=int, default=8192,
                       help="tokens per training pass (default: 8192)")
    for command in (train, whole):
        command.add_argument("--lora", type=int, help="rank of adapters; 0: all weights (default: "
                             "16 if all weights don't fit the GPU, else 0)")
    why = commands.add_parser("why", help="which kernels take the time, on a CPU")
    right = commands.add_parser("check", help="is the engine right on this device?")
    for command in (step, train, whole, why, right):
        command.add_argument("--shape", choices=SHAPES, default="miniature")
        command.add_argument("--threads", type=int, default=0, help="CPU threads; 0: torch's choice")
    made = commands.add_parser("tables", help="the GPU tables of README.md, as far as they are known")
    made.add_argument("folder", type=Path, help="where gpu.sh has written its files")
    options = vars(parser.parse_args())
    command = options.pop("command")
    if command == "run":
        return profile_run(mtr.RunConfig(**options))
    if command == "tables":
        return print(tables(options["folder"]))
    device = "cpu" if command == "why" else "auto"
    set_up(Config(threads=options.pop("threads"), device=device), checkpoint=True)
    {"step": profile_step, "train": profile_train, "grpo": profile_grpo, "why": profile_why,
     "check": check}[command](**options)


if __name__ == "__main__":
    run_main(main)
