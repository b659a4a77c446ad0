"""Sampler, stage 1's step and stage 2's update on fake CUDA tensors: they have shapes, types and devices, but no numbers.

  python tests/fake_cuda.py GUARD SHAPE WHAT

GUARD is guard.cpp, compiled; SHAPE is 0.5b, 1.5b, 3b or 7b. WHAT is one of
  check      all parts, with four layers; the last line is a JSON object, which test_cuda.py checks. A device mismatch raises
  stop, pad  the same, but the sampler's stop ids, or the ids of traces, are put on the wrong device
  memory     bytes of training and sampling, as a JSON object
  graph      the decode step of graph.py: what the host reads and sends, and bytes, as a JSON object
This is a program of its own, because a process can't go back to having no CUDA.
"""
# ruff: noqa: E402
import ctypes
import json
import sys
import time
import weakref
from collections import Counter
from contextlib import ExitStack, nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

GUARD, SHAPE, WHAT = sys.argv[1:]
ctypes.CDLL(GUARD)  # before torch looks for CUDA
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import graph
import grpo
import model as engine
import run
import sft
from agents import Trace
from bench.rollout import SHAPES
from model import Sampler, Transformer, adapted, make_optimizer, pad

run.chosen["device"] = "cuda"
run.half_supported = lambda kind: True
torch.autograd.set_multithreading_enabled(False)  # dispatch modes belong to a thread
aten = torch.ops.aten
CONFIG = SHAPES[SHAPE]
if WHAT not in ("memory", "graph"):
    CONFIG = replace(CONFIG, num_hidden_layers=4)  # where things lie does not depend on it; all layers take minutes


class Watch(TorchDispatchMode):
    """Invents the numbers that the host reads. Counts what makes the host wait for the device."""

    def __init__(self):
        super().__init__()
        self.reads = 0            # of the device's numbers by the host
        self.uploads = 0          # copies of pageable memory to the device, which wait too
        self.largest = Counter()  # bytes of the largest copy, by direction
        self.share = 0.4          # of a mask that is 1
        self.answers = []         # what tolist() returns next for a vector

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if torch.is_inference_mode_enabled() and func.namespace == "aten":  # a function of functions arrives whole
            with self:
                out = func.decompose(*args, **(kwargs or {}))
            if out is not NotImplemented:
                return out
        if func is aten._local_scalar_dense.default:
            self.reads += args[0].fake_device.type == "cuda"
            return {torch.bool: True, torch.long: 1}.get(args[0].dtype, 1.0)
        if func is aten.nonzero.default:
            self.reads += args[0].fake_device.type == "cuda"
            return args[0].new_empty(round(args[0].numel() * self.share), args[0].dim(), dtype=torch.long)
        out = func(*args, **(kwargs or {}))
        if isinstance(out, FakeTensor):
            for arg in args:
                for x in arg if isinstance(arg, list) else [arg]:
                    if isinstance(x, FakeTensor) and x.fake_device.type != out.fake_device.type:
                        self.copied(func, x, out)
        return out

    def copied(self, func, x, out):
        # A number in the memory of the CPU is an argument of most kernels. These functions copy it.
        if x.dim() or func in (aten.index_put_.default, aten._to_copy.default, aten.copy_.default):
            way = f"{x.fake_device.type} to {out.fake_device.type}"
            self.largest[way] = max(self.largest[way], x.nbytes)
            self.uploads += way == "cpu to cuda"
            self.reads += way == "cuda to cpu"

    def tolist(self, x):
        self.reads += x.fake_device.type == "cuda"
        if x.dim() == 1 and self.answers:
            return self.answers.pop(0)
        return np.full(x.shape, -0.1 if x.is_floating_point() else 1).tolist()


class Memory(TorchDispatchMode):
    """Bytes of the live CUDA storages: now, and at the peak."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self.known = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, FakeTensor) and x.fake_device.type == "cuda":
                storage = x.untyped_storage()
                if storage._cdata not in self.known:
                    self.known.add(storage._cdata)
                    self.add(storage.nbytes())
                    weakref.finalize(storage, self.remove, storage._cdata, storage.nbytes())
        return out

    def add(self, size):
        self.now += size
        self.peak = max(self.peak, self.now)

    def remove(self, key, size):
        self.known.remove(key)
        self.now -= size


def attention(q, k, v, attn_mask=None, **_):
    """The kernels that CUDA selects. PyTorch for CPUs would select the plain formula."""
    if attn_mask is None:
        return aten._scaled_dot_product_flash_attention(q, k, v, 0.0, True)[0]
    mask = attn_mask.expand(*q.shape[:2], -1, -1)
    return aten._scaled_dot_product_efficient_attention(q, k, v, mask, False)[0]


watch = Watch()
memory = Memory()
F.scaled_dot_product_attention = attention
FakeTensor.tolist = lambda x: watch.tolist(x)


def new_model(reference=False, lora=0):
    """As load() and the stages make it."""
    with torch.device("meta"):
        model = Transformer(CONFIG, known_ids=151665).eval()
    for name, weight in list(model.named_parameters()):
        module, _, parameter = name.rpartition(".")
        weight = torch.empty(weight.shape, dtype=run.weights_type(), device="cuda")
        setattr(model.get_submodule(module), parameter, torch.nn.Parameter(weight, requires_grad=not reference))
    model = adapted(model, lora, 0) if lora else model
    model.save_memory = True
    return model


def new_sampler(rows, slots):
    return Sampler(new_model(reference=True), SimpleNamespace(stop_ids={151643, 151645}), rows, slots)


def trace(prompt, said, advantage=0.0):
    made = Trace("q", advantage=advantage)
    made.hear([1] * prompt)
    made.say([2] * said, [-0.1] * said)
    return made


def lies(tensors):
    """Where tensors lie, and their types."""
    return sorted({f"{x.device} {x.dtype}".replace("torch.", "") for x in tensors})


def check_sampler():
    """Two ragged turns over copies of two prompts. Rows finish at different steps. Counts are from one draw to the next."""
    sampler = new_sampler(6, 200)
    if WHAT == "stop":
        sampler.stop = sampler.stop.cpu()
    keys, swaps, draws, steps = [], [], [], []
    make_pass, move, draw = engine.CachePass.__init__, sampler.cache.move, engine.draw
    engine.CachePass.__init__ = lambda self, *args: (make_pass(self, *args), keys.append(self.mask.shape[-1]))[0]
    sampler.cache.move = lambda *rows: (swaps.append(len(rows[0])), move(*rows))
    engine.draw = lambda *args: (draws.append((watch.reads, watch.uploads, len(swaps))), draw(*args))[1]

    def turn(conversations, done, counts):
        """done: of the active rows at each step, which are done. counts: new tokens of each conversation."""
        watch.answers = [[row in rows.split() for row in active] for active, rows in done] + [counts]
        draws.clear()
        sampler.sample(conversations, [len(done)] * len(counts), np.zeros((len(counts), len(done)), np.float32))
        steps.extend(np.diff(draws, axis=0).tolist())

    a, b, c, d = sampler.open([[1] * 50, [2] * 61], 2)
    turn([a, b, c, d], [("abcd", ""), ("abcd", "b"), ("adc", "a"), ("cd", "c d")], [3, 2, 4, 4])
    sampler.append(a, [3] * 20)
    sampler.append(d, [4] * 7)
    turn([d, a], [("ad", ""), ("ad", "a"), ("d", "d")], [3, 2])
    cache = sampler.cache
    places = lies([cache.k, cache.v, cache.length])
    return {"steps": steps, "keys": sorted(set(keys)), "slots": cache.k.shape[3], "cache": places}


def check_training(model, train, offload=False):
    """Run a function of the optimizer -> where everything lies afterwards."""
    places = {name: p.untyped_storage()._cdata for name, p in model.named_parameters()}
    optimizer = make_optimizer(model, 1e-5, 0.01, offload=offload)
    trained = [p for p in model.parameters() if p.requires_grad]
    gradients = []
    sft.optimizer_step = grpo.optimizer_step = lambda *args: (
        gradients.append(lies([p.grad for p in trained])), engine.optimizer_step(*args))[1]
    watch.largest.clear()
    train(optimizer)
    state = [x for values in optimizer.state.values() for x in values.values() if x.dim()]
    return {"trained": len(trained), "weights": lies(model.parameters()), "gradients": gradients, "state": lies(state),
            "masters": lies(getattr(optimizer, "masters", {}).values()), "states": len(state), "copies": dict(watch.largest),
            "left": sum(p.grad is not None for p in model.parameters()),
            "stayed": places == {name: p.untyped_storage()._cdata for name, p in model.named_parameters()}}


def check_sft(lora=0, offload=False):
    model = new_model(lora=lora)

    def train(optimizer):
        sft.train_step(model, [[trace(40, 20), trace(30, 9)], [trace(20, 10)]], 128)
        sft.optimizer_step(model, optimizer, 1e-5, 1.0)

    return check_training(model, train, offload)


def check_grpo(loss):
    config = grpo.GRPOConfig(epochs=2, minibatches=2, beta=0.1, loss=loss)
    model, reference = new_model(), new_model(reference=True)
    traces = [trace(40, 20, 1.0), trace(30, 9, -1.0)]
    facts = check_training(model, lambda optimizer: grpo.update(model, reference, optimizer, traces, config, 1e-6))
    return facts | {"old": [len(t.old) for t in traces], "reference": [len(t.reference) for t in traces]}


def check():
    parts = {"sampler": check_sampler, "full": check_sft, "offload": lambda: check_sft(offload=True),
             "lora": lambda: check_sft(lora=16), **{loss: lambda loss=loss: check_grpo(loss) for loss in grpo.LOSSES}}
    if WHAT == "pad":
        sft.pad = lambda rows, device, dtype=None: pad(rows, "cpu", dtype)
    wanted = {"stop": ["sampler"], "pad": ["full"]}.get(WHAT, parts)
    facts = {}
    for name in wanted:
        start = time.perf_counter()
        facts[name] = parts[name]()
        print(name, f"{time.perf_counter() - start:.1f} s", file=sys.stderr)
    return facts


def train_memory(lora, share, tokens=4096):
    """Bytes of sft.train_step in two passes of one trace each, above what is there before the pass. `kept` is after the
    forward pass. The first pass makes the gradients. share: of the tokens that are scored."""
    model = new_model(lora=lora)
    weights = memory.now
    watch.share = share
    marks = []  # before each forward pass and after it: bytes, and the peak since the mark before
    masked_loss = sft.masked_loss

    def mark():
        marks.append((memory.now, memory.peak))
        memory.peak = memory.now

    sft.masked_loss = lambda *args: (mark(), masked_loss(*args), mark())[1]
    sft.train_step(model, [[trace(tokens - 99, 99)] * 2], tokens)
    mark()
    sft.masked_loss = masked_loss
    (start, _), (kept, forward), (second, first), _, (_, again) = marks
    return {"weights": weights, "gradients": second - weights, "kept": kept - start, "forward": forward - start,
            "first": first - start, "second": again - second}


def sample_memory(rows, filled, pending, slots=4096):
    """Bytes above weights and cache: a prefill of `pending` ids beside `filled` in each row, or one decode step."""
    sampler = new_sampler(rows, slots)
    for row in sampler.rows:
        row.filled, row.pending = filled, [1] * pending
    before = memory.peak = memory.now
    if pending > 1:
        torch.inference_mode()(sampler._prefill)(sampler.rows)
    else:
        watch.answers = [[False] * rows, [True] * rows, [2] * rows]
        sampler.sample(sampler.rows, [2] * rows, np.zeros((rows, 2), np.float32))
    return {"weights and cache": before, "peak": memory.peak - before}


def measure_memory():
    facts = {f"train lora={lora} scored={share}": train_memory(lora, share) for lora in (0, 16) for share in (0.4, 1.0)}
    return facts | {"prefill 32 x 512": sample_memory(32, 3584, 512), "decode 128": sample_memory(128, 4094, 1)}


class Recording:
    """Stands in for torch.cuda.CUDAGraph. Fake tensors hold no numbers, so a replay has nothing to do."""
    replays = 0

    def replay(self):
        Recording.replays += 1

    def pool(self):
        return "pool"


def check_graph(rows=96, slots=4096):
    """Two turns of all rows. In the first, rows finish at different steps and some replays follow. The second is greedy."""
    pools, steps = [], []
    torch.cuda.CUDAGraph = Recording
    torch.cuda.graph = lambda recording, pool: (pools.append(pool), nullcontext())[1]
    model = new_model(reference=True)
    before = memory.now
    sampler = graph.GraphSampler(model, SimpleNamespace(stop_ids={151643, 151645}), rows, slots)
    cache = sampler.cache
    tables = memory.now - before - cache.k.nbytes - cache.v.nbytes
    step = sampler._step

    def counted(*key):
        start = memory.peak = memory.now
        reads, uploads = watch.reads, watch.uploads
        step(*key)
        steps.append({"key": key, "reads": watch.reads - reads, "uploads": watch.uploads - uploads,
                      "left": memory.now - start, "peak": memory.peak - start})

    sampler._step = counted

    def turn(filled, done, temperature):
        """done: of the rows that the host looks at in each step, how many have finished."""
        for row in sampler.rows:
            row.filled, row.pending = filled, [1]
        watch.answers = [[i < finished for i in range(seen)] for seen, finished in done] + [[len(done)] * rows]
        reads = watch.reads
        sampler.sample(sampler.rows, [len(done)] * rows, np.zeros((rows, len(done)), np.float32), temperature)
        assert watch.reads - reads == len(done) + 3, "once per step, and the results"

    turn(slots - 90, [(rows, 0), (rows, 5), (rows, rows - 40), (40, 0), (40, 40)], 1.0)
    turn(250, [(rows, 0), (rows, rows)], 0.0)
    places = {name: lies([x]) for name, x in vars(sampler).items() if isinstance(x, torch.Tensor)}
    return {"steps": steps, "pools": pools, "replays": Recording.replays, "tables": tables, "places": places}


programs = {"memory": measure_memory, "graph": check_graph}
with ExitStack() as modes:
    for mode in (FakeTensorMode(), memory, watch) if WHAT in programs else (FakeTensorMode(), watch):
        modes.enter_context(mode)
    print(json.dumps(programs.get(WHAT, check)()))
