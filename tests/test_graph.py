"""The decode step of graph.py: it gives the results of the plain loop, it can be recorded, and --graph selects it.

No GPU is needed: Tape stands in for a CUDA graph. Where there is a GPU, the same tests also capture real graphs.
"""
import json
import subprocess
import sys
from collections import Counter, defaultdict
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import evaluate
import graph
import grpo
import mtr
from agents import AutoAgent, Trace, run_episodes
from data.options import command_line
from graph import GraphSampler
from model import Linear, Sampler, adapted, make_optimizer, optimizer_step, token_logprobs

TESTS = Path(__file__).resolve().parent
STOPS = (5, 6, 7)


class Tape(TorchDispatchMode):
    """Stands in for torch.cuda.CUDAGraph on a CPU. It records each operation with its tensors and numbers, and replay()
    repeats them: the same operations on the same memory with the same numbers."""

    def __init__(self):
        super().__init__()
        self.calls = []
        self.replays = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        with self:  # in inference mode, a function of functions arrives whole
            out = func.decompose(*args, **(kwargs or {}))
        if out is NotImplemented:
            out = func(*args, **(kwargs or {}))
            self.calls.append((func, args, kwargs or {}, out))
        return out

    def replay(self):
        self.replays += 1
        for func, args, kwargs, out in self.calls:
            again = func(*args, **kwargs)
            for old, new in zip(tree_leaves(out), tree_leaves(again), strict=True):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():  # else a view or in place
                    old.copy_(new)

    def pool(self):
        return "pool"

    def form(self, fixed):
        """What a CUDA graph would fix: operations, numbers, shapes and addresses. fixed: name by address, of all memory
        from before the step. Memory that the step takes is numbered. Any other address is an error."""
        made, lines = {}, []
        for func, args, kwargs, out in self.calls:
            words = [str(func)]
            for x in tree_leaves((args, kwargs)):
                if isinstance(x, torch.Tensor):
                    address = x.untyped_storage().data_ptr()
                    place = made[address] if address in made else fixed[address]
                    words.append(f"{place}+{x.storage_offset()} {tuple(x.shape)} {x.stride()} {x.dtype}")
                else:
                    words.append(repr(x))
            for x in tree_leaves(out):
                if isinstance(x, torch.Tensor) and x.untyped_storage().data_ptr() not in fixed:
                    made.setdefault(x.untyped_storage().data_ptr(), len(made))
            lines.append(" ".join(words))
        return "\n".join(lines)


def fixed_tensors(sampler):
    """By name: all tensors of a sampler, its cache and its model."""
    found = {**vars(sampler), **{f"cache.{name}": x for name, x in vars(sampler.cache).items()}}
    return {name: x for name, x in found.items() if isinstance(x, torch.Tensor)} | dict(sampler.model.named_parameters())


@pytest.fixture
def make(monkeypatch):
    """A function that makes a sampler. how: plain; called (a graph's step without a graph), taped or captured."""
    monkeypatch.setattr(graph, "KEYS", 32)

    def make(how, model, rows, slots, stops=STOPS, tokenizer=None):
        tokenizer = tokenizer or SimpleNamespace(stop_ids=set(stops))
        if how == "plain":
            return Sampler(model, tokenizer, rows, slots)
        sampler = GraphSampler(model, tokenizer, rows, slots)
        sampler.keys = []  # of its steps
        run = sampler._run
        sampler._run = lambda *key: (sampler.keys.append(key), run(*key))[1]
        pools = []

        @contextmanager
        def record(tape, pool):
            """A capture computes nothing: afterwards all numbers are as before."""
            pools.append(pool)
            assert pools == [None] + ["pool"] * (len(pools) - 1)
            tensors = fixed_tensors(sampler).values()
            before = [x.clone() for x in tensors]
            with tape:
                yield
            for x, old in zip(tensors, before, strict=True):
                x.data.copy_(old)

        if how == "taped":
            sampler.captures = True
            monkeypatch.setattr(torch.cuda, "CUDAGraph", Tape)
            monkeypatch.setattr(torch.cuda, "graph", record)
        return sampler
    return make


HOWS = ["called", "taped"] + ["captured"] * torch.cuda.is_available()


def on(how, model):
    """The model on the device of the test, before the samplers are made."""
    return model.to("cuda" if how == "captured" else "cpu")


def random_ids(rng, n):
    return rng.integers(8, 40, n).tolist()


def play(sampler, seed, temperature, turns=5):
    """Ragged turns -> the (ids, log-probabilities) of all. Prompts are shared by groups of 3 and of 2. Of 24 rows, some
    are in no group, and each turn samples a part of the others in any order."""
    rng = np.random.default_rng(seed)
    opened = sampler.open([random_ids(rng, n) for n in rng.integers(2, 20, 5)], copies=3)
    said = []
    for turn in range(turns):
        if turn == 2:
            opened += sampler.open([random_ids(rng, n) for n in rng.integers(2, 40, 3)], copies=2)
        chosen = rng.permutation(len(opened))[:rng.integers(len(opened) // 2, len(opened) + 1)]
        chosen = [opened[i] for i in chosen]
        for c in chosen:
            sampler.append(c, random_ids(rng, rng.integers(0, 9)))
        limits = rng.integers(1, 25, len(chosen)).tolist()
        said += sampler.sample(chosen, limits, rng.random((len(chosen), 24)), temperature)
        assert [c.filled for c in chosen] == sampler.cache.length[[c.row for c in chosen]].tolist()
        assert [c.pending for c in chosen] == [ids[-1:] for ids, _ in said[-len(chosen):]]
    return said


def check_equal(got, want):
    """The same ids, and log-probabilities that differ by rounding in float64."""
    assert [ids for ids, _ in got] == [ids for ids, _ in want]
    difference = max(np.abs(np.subtract(a, b)).max() for (_, a), (_, b) in zip(got, want, strict=True))
    assert difference < 1e-12


# ---------------------------------------------------------------------------------------------- results


@pytest.mark.parametrize("temperature", [0, 1.0, 0.6])
@pytest.mark.parametrize("how", HOWS)
def test_a_step_gives_the_results_of_the_plain_loop(how, temperature, tiny, make):
    """Three runs of ragged turns in one sampler, so the later ones mostly replay."""
    model = on(how, tiny())
    plain, sampler = make("plain", model, 24, 200), make(how, model, 24, 200)
    for seed in range(3):
        plain.reset()
        sampler.reset()
        want = play(plain, seed, temperature)
        check_equal(play(sampler, seed, temperature), want)
        assert len({len(ids) for ids, _ in want}) > 5
    rows, keys = ({key[i] for key in sampler.keys} for i in (0, 1))
    assert rows == {1, 2, 4, 8, 16, 24} and len(keys) > 2 and keys <= {*range(32, 200, 32), sampler.cache.k.shape[3]}
    recorded = set() if how == "called" else set(sampler.keys)
    assert set(sampler.graphs) == recorded
    if how == "taped":
        assert sum(tape.replays for tape in sampler.graphs.values()) == len(sampler.keys) - len(recorded) > 200


@pytest.mark.parametrize("how", HOWS)
def test_a_row_that_is_full_stays_in_the_batch(how, tiny, make):
    """The first row ends its turn in the last slot of the cache, which is as long as it. The others go on in its bucket."""
    model, said = on(how, tiny()), []
    slots = 64 if how == "captured" else 13  # a multiple of 64 on a GPU
    for sampler in (make("plain", model, 4, slots, ()), make(how, model, 4, slots, ())):
        rng = np.random.default_rng(0)
        opened = sampler.open([random_ids(rng, n) for n in (slots - 3, 2, 3, 4)])
        said.append(sampler.sample(opened, [4, 10, 11, 10], rng.random((4, 11))))
        assert opened[0].filled == slots == sampler.cache.k.shape[3]
    assert [key[0] for key in sampler.keys] == [4] * 10 + [1]
    check_equal(said[1], said[0])
    with pytest.raises(AssertionError, match=f"limit 1: KV cache of {slots} slots, {slots + 1} needed"):
        sampler.sample(opened[:1], [1], np.zeros((1, 1)))


@pytest.mark.parametrize("lora", [0, 4])
@pytest.mark.parametrize("how", HOWS)
def test_a_replay_sees_the_weights_of_the_last_step(how, lora, tiny, make):
    model = on(how, tiny())
    if lora:
        model = adapted(model, lora, 0)
        for layer in model.modules():
            if isinstance(layer, Linear) and layer.A is not None:
                layer.B.data.normal_(generator=torch.Generator().manual_seed(1))
    sampler = make(how, model, 15, 64)
    before = play(sampler, 0, 1.0, turns=1)
    ids = torch.arange(8, 24, device=model.device)[None]
    scores, _ = token_logprobs(model, ids, ids > 8)
    scores.sum().backward()
    optimizer_step(model, make_optimizer(model, 0.03, 0.0), 0.03, 1.0)
    sampler.reset()
    after = play(sampler, 0, 1.0, turns=1)
    assert [ids for ids, _ in before] != [ids for ids, _ in after]
    check_equal(after, play(make("plain", model, 15, 64), 0, 1.0, turns=1))


@pytest.mark.parametrize("how", HOWS)
def test_whole_episodes_are_equal(how, tiny, tokenizer, make):
    """AutoAgent after its rehearsal, which fills all rows, over a plain sampler and over this one."""
    model, found = on(how, tiny(tokenizer.size)), []
    for kind in ("plain", how):
        agent = AutoAgent(make(kind, model, 6, 200, tokenizer=tokenizer), 3, 20, 200, 1.0)
        agent.rehearse()
        traces = [Trace("Who is it?", [], (0, i)) for i in range(6)]
        run_episodes(agent, lambda requests: [{}] * len(requests), traces, 3)
        found.append([(trace.ids, trace.status) for trace in traces])
    assert found[0] == found[1] and len({tuple(ids) for ids, _ in found[0]}) > 2


# -------------------------------------------------------------------------------------------- recording


def test_the_form_of_a_step_depends_on_its_bucket_alone(tiny, make):
    """Shapes, numbers and addresses are the same in all steps of a bucket, whatever was drawn before. No operation looks
    at a number, and all memory is the sampler's, the model's or the step's own."""
    sampler = make("called", tiny(), 24, 200)
    fixed = {x.untyped_storage().data_ptr(): name for name, x in fixed_tensors(sampler).items()}
    forms, calls, step = defaultdict(set), Counter(), sampler._step

    def taped(*key):
        with Tape() as tape:
            step(*key)
        assert not {"aten._local_scalar_dense.default", "aten.nonzero.default"} & {str(func) for func, *_ in tape.calls}
        forms[key].add(tape.form(fixed))
        calls[key] += 1

    sampler._step = taped
    for seed in range(4):
        sampler.reset()
        play(sampler, seed, (1.0, 0)[seed % 2])
    assert {key: len(found) for key, found in forms.items()} == dict.fromkeys(forms, 1)
    assert len(forms) > 15 and sum(n > 5 for n in calls.values()) > 8
    assert len({form for found in forms.values() for form in found}) == len(forms)  # so a form tells buckets apart


def test_the_step_at_the_size_of_qwen(guard):
    """On fake CUDA tensors at 96 rows of 4,096 slots: the step reads nothing, sends nothing and keeps nothing. A tensor on
    the wrong device would end the program. The bytes are those of the docstring."""
    command = [sys.executable, TESTS / "fake_cuda.py", guard, "0.5b", "graph"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=TESTS.parent)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    buckets = [[96, 4096, 1.0], [48, 4096, 1.0], [96, 256, 0.0]]
    assert [step["key"] for step in found["steps"]] == [key for key in buckets for _ in "12"]  # called, then recorded
    assert [(step["reads"], step["uploads"], step["left"]) for step in found["steps"]] == [(0, 0, 0)] * 6
    assert found["replays"] == 4 and found["pools"] == [None, "pool", "pool"]
    assert {place for places in found["places"].values() for place in places} == {
        "cuda:0 bfloat16", "cuda:0 float32", "cuda:0 int64", "cuda:0 bool"}
    peak = max(step["peak"] for step in found["steps"])
    assert peak == found["steps"][0]["peak"]
    assert f"{found['tables'] / 1e6:.0f} MB of tables" in graph.__doc__
    assert f"{peak / 1e9:.1f} GB" in graph.__doc__


# --------------------------------------------------------------------------------------------- --graph


def from_words(config, monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["program", *map(str, words)])
    return command_line(config, "")


@pytest.mark.parametrize("words, kind", [((), Sampler), (("--graph",), GraphSampler), (("--no-graph",), Sampler)])
def test_the_option_selects_the_sampler_of_all_agents(words, kind, folder, monkeypatch):
    limits = ("--trace-tokens", 256, "--turn-tokens", 40)
    model = ("--model", folder)
    data = ("--data", "few.jsonl")
    simulators = [grpo.Simulator(folder, from_words(grpo.GRPOConfig, monkeypatch, *limits, *words), rows=2)]
    for config, more in ((mtr.AskConfig, ["Who?"]), (evaluate.EvalConfig, data), (evaluate.TracesConfig, data)):
        built = from_words(config, monkeypatch, *limits, *model, *words, *more)
        simulators.append(evaluate.open_models(built, 2)[0])
    for simulator in simulators:
        agent = simulator.agent(simulator.model, 3, 1.0)
        assert {type(who.sampler) for who in (agent, simulator.maker, simulator.actor)} == {kind}
