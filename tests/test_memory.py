"""What saves memory changes no result: recomputed activations, scores in chunks, prefill in blocks, adapters, masters.

Each part is compared with the plain way, in float64 or bit for bit. And the plan, which counts the memory beforehand."""
import json
import random
import re
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import grpo
import model as model_file
import sft
from agents import AutoAgent, Trace, run_episodes
from bench import rollout
from data import options, plan
from data.options import command_line
from grpo import GRPOConfig
from model import (
    KVCache,
    Linear,
    Masters,
    ModelConfig,
    Sampler,
    Transformer,
    adapted,
    load,
    make_optimizer,
    optimizer_step,
    save_model,
    token_logprobs,
)
from run import Run
from sft import SFTConfig, rehearse


def loss_of(model, ids, mask, temperature=0.7):
    logprobs, entropy = token_logprobs(model, ids, mask, temperature)
    return -(logprobs * torch.arange(1, ids.shape[1] + 1)).sum(), logprobs.detach(), entropy


def a_batch(model, rows=3, columns=200, seed=0):
    """Ids, and a mask of about half of them; no first token is scored."""
    rng = torch.Generator().manual_seed(seed)
    mask = torch.rand(rows, columns, generator=rng) < 0.9
    mask[:, 0] = False
    return torch.randint(model.known_ids, (rows, columns), generator=rng), mask


def gradient(model):
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("columns", [2, 200])
def test_recomputed_activations_and_chunks_change_nothing(tiny, tied, columns, monkeypatch):
    """540 scored tokens are more than a chunk of 512. Log-probabilities, entropies and gradients, in float64."""
    found, calls = [], []
    real = model_file.checkpoint
    monkeypatch.setattr(model_file, "checkpoint", lambda function, *args, **more: calls.append(function) or real(function, *args, **more))
    for save_memory in (False, True):
        model = tiny(tied=tied)
        model.save_memory = save_memory
        ids, mask = a_batch(model, columns=columns)
        loss, logprobs, entropy = loss_of(model, ids, mask)
        loss.backward()
        found.append((logprobs, entropy, gradient(model)))
        assert len(calls) == (save_memory and (4 if columns == 200 else 3))  # two blocks, and one or two chunks
    for plain, saving in zip(*found, strict=True):
        assert torch.allclose(plain, saving, rtol=1e-12, atol=1e-12) and plain.abs().max() > 0


def test_nothing_scored_and_no_gradient(tiny):
    model = tiny()
    model.save_memory = True
    ids, mask = a_batch(model, columns=9)
    with torch.no_grad():
        plain = token_logprobs(model, ids, mask)[0]
    assert torch.allclose(plain, token_logprobs(model, ids, mask)[0]) and not plain.requires_grad
    assert not token_logprobs(model, ids, torch.zeros_like(mask))[0].any()


class Tokens:
    stop_ids = {1, 2}


def played(model, prefill, multiple, monkeypatch):
    """Ids and log-probabilities of ragged conversations over four turns, with observations of 1 to 30 tokens."""
    monkeypatch.setattr(Sampler, "PREFILL", prefill)
    rng = random.Random(0)
    sampler = Sampler(model, Tokens, 7, 192)
    sampler.cache.multiple = multiple
    prompts = [[rng.randrange(3, 40) for _ in range(rng.choice((1, 2, 9, 33, 40)))] for _ in range(7)]
    live, found = sampler.open(prompts), []
    for turn in range(4):
        limits = [rng.randint(1, 12) for _ in live]
        uniforms = np.random.default_rng(turn).random((len(live), max(limits)), dtype=np.float32)
        found.append(sampler.sample(live, limits, uniforms))
        live = [c for c in live if rng.random() < 0.8] or live[:1]
        for conversation in live:
            sampler.append(conversation, [rng.randrange(3, 40) for _ in range(rng.randint(1, 30))])
    return found


@pytest.mark.parametrize("prefill", [1, 16, 50, 100])
@pytest.mark.parametrize("multiple", [1, 64])
def test_prefill_in_blocks_and_longer_keys_change_nothing(tiny, prefill, multiple, monkeypatch):
    """At most 2, 2, 7 or 14 columns of the seven conversations at once."""
    model = tiny()
    passes = []
    real = Transformer.forward
    monkeypatch.setattr(Transformer, "forward", lambda self, ids, past=None: passes.append(ids.shape) or real(self, ids, past))
    plain = played(model, 16_384, 1, monkeypatch)
    longest = max(columns for _, columns in passes)
    passes.clear()
    blocks = played(model, prefill, multiple, monkeypatch)
    assert longest >= 39 and max(rows * columns for rows, columns in passes) <= max(prefill, 14)
    for turn, other in zip(plain, blocks, strict=True):
        assert [ids for ids, _ in turn] == [ids for ids, _ in other]
        for (_, a), (_, b) in zip(turn, other, strict=True):
            assert a == pytest.approx(b, abs=1e-10)


def test_a_full_row_beside_a_block_of_one_column(tiny, monkeypatch):
    """Three pending ids in blocks of two columns. The other row has filled all of its 16 slots in the first block, so there
    is no place for padding."""
    found = []
    for prefill in (16_384, 1):
        monkeypatch.setattr(Sampler, "PREFILL", prefill)
        sampler = Sampler(tiny(), Tokens, 2, 16)
        full, short = sampler.open([list(range(3, 19)), [5, 6]])
        sampler.append(short, [7, 8])
        found.append(sampler.sample([full, short], [1, 1], np.full((2, 1), 0.5, np.float32)))
    assert [ids for ids, _ in found[0]] == [ids for ids, _ in found[1]]
    assert found[0][1][1] == pytest.approx(found[1][1][1])


# ------------------------------------------------------------------------------------------- adapters


def trained(model, steps=3, lr=1e-2, weight_decay=0.0):
    """Train on one batch -> the optimizer."""
    optimizer = make_optimizer(model, lr, weight_decay)
    for step in range(steps):
        loss_of(model, *a_batch(model, columns=20, seed=step))[0].backward()
        optimizer_step(model, optimizer, lr, 1.0)
    return optimizer


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adapters_start_as_the_base_and_leave_it_alone(tiny, dtype):
    """One copy of the weights. After training, the base is bit for bit what it was."""
    base = tiny(dtype=dtype)
    before = {name: weight.clone() for name, weight in base.named_parameters()}
    model = adapted(base, 4, seed=0)
    ids, _ = a_batch(base)
    with torch.no_grad():
        assert torch.equal(model.head(model(ids)), base.head(base(ids)))
    pointers = {weight.data_ptr() for weight in base.parameters()}
    assert {p.data_ptr() for p in model.parameters() if not p.requires_grad} == pointers
    matrices = [layer for layer in base.model["layers"].modules() if isinstance(layer, Linear)]
    added = [p for p in model.parameters() if p.requires_grad]
    assert sum(p.numel() for p in added) == sum(4 * (m.in_features + m.out_features) for m in matrices) and len(matrices) == 14
    assert {p.dtype for p in added} == {torch.float32}
    trained(model)
    assert all(torch.equal(weight, before[name]) for name, weight in base.named_parameters())
    with torch.no_grad():
        assert (model.head(model(ids)) - base.head(base(ids))).abs().max() > 1e-2


def test_a_merged_adapter_gives_the_same_logits(tiny, tokenizer, tmp_path):
    """The saved folder is an ordinary one. A checkpoint holds the adapters alone."""
    base = tiny(tokenizer.size, dtype=torch.float32)
    model = adapted(base, 4, seed=0)
    trained(model)
    save_model(model, tokenizer, tmp_path / "model")
    save_model(model, tokenizer, tmp_path / "checkpoint", merge=False)
    merged = load(tmp_path / "model")[0]
    ids, _ = a_batch(base)
    with torch.no_grad():
        gap = (merged.head(merged(ids)) - model.head(model(ids))).abs().max()
        change = (base.head(base(ids)) - model.head(model(ids))).abs().max()
    assert gap < 1e-4 * change and change > 1e-2
    assert set(load_file(tmp_path / "model" / "model.safetensors")) == {name for name, _ in base.named_parameters()}
    names = set(load_file(tmp_path / "checkpoint" / "model.safetensors"))
    assert len(names) == 28 and all(name.endswith((".A", ".B")) for name in names)


def test_an_adapter_by_hand():
    """W + 32/r · B A."""
    layer = Linear(3, 2, bias=False)
    layer.weight.data = torch.tensor([[1.0, 0, 0], [0, 1, 0]])
    layer.adapt(2, torch.Generator().manual_seed(0))
    layer.A.data = torch.tensor([[1.0, 2, 3], [0, 1, 0]])
    layer.B.data = torch.tensor([[1.0, 0], [0, 2]])
    want = torch.tensor([[17.0, 32, 48], [0, 33, 0]])
    assert torch.equal(layer.merged(), want)
    x = torch.tensor([[1.0, -1, 2]])
    assert torch.equal(layer(x), x @ want.T)


# -------------------------------------------------------------------------------------------- masters


def test_masters_of_a_float32_model_are_adamw_bit_for_bit(tiny):
    first, second = tiny(dtype=torch.float32), tiny(dtype=torch.float32)
    trained(first, steps=5, weight_decay=0.1)
    plain = make_optimizer(second, 1e-2, 0.1)
    by_weight = {id(p): group["weight_decay"] for group in plain.param_groups for p in group["params"]}
    groups = [{"params": [p for p in second.parameters() if by_weight[id(p)] == decay], "weight_decay": decay} for decay in (0.1, 0.0)]
    masters = Masters(groups, "cpu", lr=1e-2, betas=(0.9, 0.95), fused=True)
    for step in range(5):
        loss_of(second, *a_batch(second, columns=20, seed=step))[0].backward()
        optimizer_step(second, masters, 1e-2, 1.0)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def test_small_steps_are_not_lost(tiny):
    """At a learning rate of 1e-6 more than half of the masters move, and hardly any bfloat16 weight."""
    model = tiny(dtype=torch.bfloat16)
    before = [p.clone() for p in model.parameters()]
    optimizer = make_optimizer(model, 1e-6, 0.0)
    assert isinstance(optimizer, Masters)
    loss_of(model, *a_batch(model))[0].backward()
    optimizer_step(model, optimizer, 1e-6, 1.0)
    masters = [optimizer.masters[p] for p in model.parameters()]
    moved = [(master != old.float()).float().mean() for master, old in zip(masters, before, strict=True)]
    weights = [(p != old).float().mean() for p, old in zip(model.parameters(), before, strict=True)]
    assert np.mean(moved) > 0.5 and np.mean(weights) < 0.05
    assert all(p.grad is None for p in model.parameters()) and all(m.grad is None for m in optimizer.masters.values())


@pytest.mark.parametrize("kind", ["full", "masters", "adapters"])
def test_a_resumed_run_ends_with_the_same_weights(kind, tiny, tokenizer, tmp_path):
    """Stopped after each step. Masters are a part of the checkpoint: rounded weights would not do."""
    def run(out, stops):
        for stop in stops:
            model = tiny(tokenizer.size, dtype=torch.bfloat16 if kind == "masters" else torch.float32)
            model = adapted(model, 4, seed=0) if kind == "adapters" else model
            config = SFTConfig(out=str(out), save_every=1, resume=(out / "sft").exists())
            part = Run(out / "sft", config, ["step"])
            optimizer = make_optimizer(model, 1e-3, 0.1)
            for step in part.steps(stop, model, tokenizer, optimizer):
                loss_of(model, *a_batch(model, columns=20, seed=step))[0].backward()
                optimizer_step(model, optimizer, 1e-3, 1.0)
        return model
    whole, resumed = run(tmp_path / "a", [4]), run(tmp_path / "b", [1, 2, 4])
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))


@pytest.mark.parametrize("kind", ["full", "adapters"])
def test_a_checkpoint_that_lacks_a_trained_tensor_is_not_resumed(kind, tiny, tokenizer, tmp_path):
    """The model in memory would keep its own numbers there, without a word."""
    model = tiny(tokenizer.size, dtype=torch.float32)
    model = adapted(model, 4, seed=0) if kind == "adapters" else model
    optimizer = make_optimizer(model, 1e-3, 0.1)
    run = Run(tmp_path / "sft", SFTConfig(out=str(tmp_path), save_every=1), ["step"])
    list(run.steps(1, model, tokenizer, optimizer))
    path = tmp_path / "sft" / "checkpoints" / "0000001" / "model.safetensors"
    weights = load_file(path)
    save_file(dict(list(weights.items())[1:]), path)
    again = Run(tmp_path / "sft", SFTConfig(out=str(tmp_path), save_every=1, resume=True), ["step"])
    with pytest.raises(RuntimeError, match=f'Missing key.*{next(iter(weights))}'):
        list(again.steps(2, model, tokenizer, optimizer))


# -------------------------------------------------------------------------- defaults of a checkpoint


def from_words(config_class, monkeypatch, *words):
    monkeypatch.setattr("sys.argv", ["x.py", *map(str, words)])
    return command_line(config_class, "")


def test_a_checkpoint_has_other_defaults_than_the_miniature(tmp_path, monkeypatch):
    """What is given on the command line counts in both cases. In stage 2, stage 1's config.json decides."""
    plain, real = from_words(SFTConfig, monkeypatch), from_words(SFTConfig, monkeypatch, "--model", "x")
    assert plain == SFTConfig() and (plain.lr, plain.steps, plain.agent_tokens) == (1.5e-3, 1300, 1600)
    assert (real.lr, real.steps, real.agent_tokens) == (1e-5, 300, 16384)
    assert from_words(SFTConfig, monkeypatch, "--model", "x", "--lr", "0.5", "--steps", 1300).steps == 1300
    adapters = from_words(SFTConfig, monkeypatch, "--model", "x", "--lora", 16)
    assert (adapters.lr, adapters.steps) == (1e-4, 300) and from_words(SFTConfig, monkeypatch, "--model", "x", "--lora", 16, "--lr", 2).lr == 2
    (tmp_path / "sft").mkdir()
    for model, lr, tokens, every in (("", 3e-4, 896, 5), ("qwen", 1e-6, 4096, 1)):
        (tmp_path / "sft" / "config.json").write_text(json.dumps({"model": model}))
        for words in (["--out", tmp_path], ["--sft", tmp_path / "sft", "--out", "elsewhere"]):
            config = from_words(GRPOConfig, monkeypatch, *words)
            assert (config.lr, config.trace_tokens, config.save_every) == (lr, tokens, every)
    assert from_words(GRPOConfig, monkeypatch, "--out", tmp_path, "--trace-tokens", 896).trace_tokens == 896
    # A resumed run has its own OUT/sft. The folder that it was copied from may be gone.
    assert from_words(GRPOConfig, monkeypatch, "--sft", tmp_path / "gone", "--out", tmp_path, "--resume").lr == 1e-6


def test_the_help_prints_both_defaults(monkeypatch, capsys):
    with pytest.raises(SystemExit):
        from_words(SFTConfig, monkeypatch, "--help")
    text = " ".join(capsys.readouterr().out.split())
    assert "peak learning rate (default: 0.0015; of a checkpoint 1e-05, with --lora 0.0001)" in text


# ------------------------------------------------------------------------------------------ rehearsal


def watched_rehearsal(model, optimizer):
    """Rehearse 220 tokens of traces of at most 30, so 8 x 27 -> the number of scored tokens of each pass, and at each step whether all gradients are there."""
    passes, steps = [], []
    step = optimizer.step
    model.head = lambda states: passes.append(len(states)) or Transformer.head(model, states)
    optimizer.step = lambda: steps.append(all(p.grad is not None for p in model.parameters() if p.requires_grad)) or step()
    rehearse(model, optimizer, 30, 220)
    del model.head, optimizer.step
    return passes, steps


@pytest.mark.parametrize("kind", ["full", "masters", "adapters"])
def test_a_rehearsal_changes_nothing(kind, tiny):
    """A run that is rehearsed first ends with the same weights. All tokens of its batch but the first of each trace are
    scored, once before the first step and twice before the second."""
    ends = []
    for rehearsed in (False, True):
        model = tiny(dtype=torch.bfloat16 if kind == "masters" else torch.float32)
        model = adapted(model, 4, seed=0) if kind == "adapters" else model
        optimizer = make_optimizer(model, 1e-2, 0.1)
        if rehearsed:
            before = [p.clone() for p in model.parameters()]
            assert watched_rehearsal(model, optimizer) == ([8 * 26 + -8 * 26 % 128] * 3, [True, True])
            assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before, strict=True))
            assert all(p.grad is None for p in model.parameters())
            assert not any(moment.any() for moments in optimizer.state.values() for moment in moments.values())
        for number in range(2):
            loss_of(model, *a_batch(model, columns=20, seed=number))[0].backward()
            optimizer_step(model, optimizer, 1e-2, 1.0)
        ends.append([p.clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


def test_a_rehearsal_takes_no_gradient(tiny):
    """AdamW would not show it, because its step is 0. The norm is that before clipping."""
    model = tiny(dtype=torch.float32)
    norms = []
    real = model_file.optimizer_step
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sft, "optimizer_step", lambda *args, **more: norms.append(real(*args, **more)))
        rehearse(model, make_optimizer(model, 1e-2, 0.1), 30, 220)
    assert norms == [0.0, 0.0]


def test_a_trace_that_is_longer_than_a_batch_is_rehearsed_too(tiny):
    model = tiny(dtype=torch.float32)
    shapes = []
    real = Transformer.forward
    model.forward = lambda ids: shapes.append(tuple(ids.shape)) or real(model, ids)
    rehearse(model, make_optimizer(model, 1e-2, 0.1), 96, 64)
    rehearse(model, make_optimizer(model, 1e-2, 0.1), 96, 100)  # two traces of 50 tokens, padded
    assert shapes == [(1, 96)] * 3 + [(2, 64)] * 3


class Reached(Exception):
    """Where a test has seen enough."""


def steps_or_rehearsal(*asked):
    raise Reached(*asked)


@pytest.mark.parametrize("model, want", [("qwen", (50, 4096)), ("", ("steps",))])
def test_stage_1_is_rehearsed_for_a_checkpoint_alone(model, want, tiny, monkeypatch):
    """With the longest conversation, before a checkpoint of the run is restored."""
    monkeypatch.setattr(sft, "rehearse", lambda model, optimizer, *lengths: steps_or_rehearsal(*lengths))
    run = SimpleNamespace(state={"step": 0}, steps=lambda *_: steps_or_rehearsal("steps"))
    data = {"agent": [Trace(ids=[0] * 50)], "maker": [Trace(ids=[0] * 20)], "actor": []}
    with pytest.raises(Reached) as reached:
        sft.fit(tiny(), None, data, {}, SFTConfig(model=model), run)
    assert reached.value.args == want


@pytest.mark.parametrize("kind, want", [("qwen", [(4096, 4096), "agent", "tools", "steps"]), ("", ["tools", "steps"])])
def test_stage_2_is_rehearsed_for_a_checkpoint_alone(kind, want, tiny, tmp_path, monkeypatch):
    (tmp_path / "sft").mkdir()
    (tmp_path / "sft" / "config.json").write_text(json.dumps({"model": kind}))
    done = []
    monkeypatch.setattr(grpo, "rehearse", lambda model, optimizer, *lengths: done.append(lengths))
    agent = SimpleNamespace(rehearse=lambda: done.append("agent"))
    config = from_words(GRPOConfig, monkeypatch, "--out", tmp_path, "--trace-tokens", 4096)
    simulator = SimpleNamespace(config=config, actor=None, agent=lambda *_: agent, tokenizer=None, make_tools=lambda _: done.append("tools"))
    run = SimpleNamespace(steps=lambda *_, **__: done.append("steps") or steps_or_rehearsal())
    with pytest.raises(Reached):
        grpo.loop(simulator, tiny(), [], [], run)
    assert done == want


@pytest.mark.parametrize("prefill", [16_384, 40])
def test_an_agents_rehearsal_fills_the_caches_and_is_forgotten(prefill, tiny, tokenizer, monkeypatch):
    monkeypatch.setattr(Sampler, "PREFILL", prefill)
    found, passes = [], []
    real = Transformer.forward
    monkeypatch.setattr(Transformer, "forward", lambda self, ids, past=None: passes.append((*ids.shape, past.mask.shape[-1])) or real(self, ids, past))
    for rehearsed in (False, True):
        sampler = Sampler(tiny(tokenizer.size), tokenizer, 4, 200)
        agent = AutoAgent(sampler, 2, 20, 200, 1.0)
        passes.clear()
        if rehearsed:
            agent.rehearse()
            assert all(c.filled == 200 for c in sampler.rows) and bool((sampler.cache.length == 200).all())
            assert max(rows * columns for rows, columns, slots in passes if slots == 200) >= min(prefill, 4 * 100)
        traces = [Trace("Who is it?", [], (0, i)) for i in range(4)]
        run_episodes(agent, lambda requests: [{}] * len(requests), traces, 2)
        found.append([trace.ids for trace in traces])
    assert found[0] == found[1]


# ----------------------------------------------------------------------------------------------- plan

SHAPES = {size: rollout.SHAPES[size] for size in ("0.5b", "1.5b", "3b", "7b")}


def shape_folder(folder, size):
    """A folder with the config.json of this size of Qwen2.5, and nothing else."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(asdict(SHAPES[size])))
    return folder


@pytest.mark.parametrize("size", SHAPES)
@pytest.mark.parametrize("lora", [0, 16])
def test_the_plan_counts_the_weights_of_the_model(size, lora, tmp_path):
    with torch.device("meta"):
        model = Transformer(SHAPES[size])
        weights = sum(p.numel() for p in model.parameters())
        model = adapted(model, lora, 0) if lora else model
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert plan.count_weights(plan.read_shape(shape_folder(tmp_path, size)), lora) == (weights, trained)


@pytest.mark.parametrize("flags", [{}, {"trace_tokens": 1000, "questions": 3, "sim_rows": 5}, {"turn_tokens": 700}])
def test_the_plan_counts_the_slots_of_the_caches(flags, tiny, tokenizer, tmp_path, monkeypatch):
    """Beside the caches that stage 2 makes, with the multiple of 64 that a GPU has."""
    shape = ModelConfig(tokenizer.size + 4, 32, 24, 2, 4, 2, 4500, 1e-2, 100.0, True)
    save_model(Transformer(shape).init_weights(0), tokenizer, tmp_path / "model")
    made = []
    real = KVCache.__init__

    def on_a_gpu(self, model, rows, slots):
        real(self, model, rows, slots + -slots % 64)
        made.append(self.k.numel() + self.v.numel())
    monkeypatch.setattr(KVCache, "__init__", on_a_gpu)
    config = GRPOConfig(plan=str(tmp_path / "model"), **({"trace_tokens": 4096, "turn_tokens": 512} | flags))
    simulator = grpo.Simulator(tmp_path / "model", config, True, config.sim_rows)
    simulator.agent(simulator.model, config.questions * config.group, 1.0)
    c = plan.read_shape(tmp_path / "model")
    agent, other = plan.count_slots(c, config)
    assert made == [other * 2 * 2 * c.kv, agent * 2 * 2 * c.kv]
    found = plan.count_bytes(c, config)
    assert (found["simulator_cache"], found["agent_cache"]) == (2 * made[0], 2 * made[1])


def test_the_parts_of_a_plan_by_hand(tmp_path):
    """Full training in bfloat16: 2 + 2 + 12 bytes per weight and 2 of gradients. Each option lowers the parts that it should."""
    folder = shape_folder(tmp_path, "3b")
    c = plan.read_shape(folder)
    config = GRPOConfig(plan=str(folder), trace_tokens=4096, turn_tokens=512, questions=16, sim_rows=32)
    weights = plan.count_weights(c, 0)[0]
    full = plan.count_bytes(c, config)
    assert full["policy"] == full["simulator"] == 2 * weights and full["optimizer"] == 12 * weights
    assert full["agent_cache"] == 128 * 4096 * 36 * 2 * 256 * 2 and full["simulator_cache"] == 32 * 4608 * 36 * 2 * 256 * 2
    assert full["peak"] == 2 * weights + plan.training_peak(c, config, 2)
    assert full["stage 2"] == sum(value for name, value in full.items() if not name.startswith("stage"))
    assert full["stage 1"] == 16 * weights + plan.training_peak(c, config, 2) + plan.OTHER
    offload = plan.count_bytes(c, replace(config, offload=True))
    assert offload["optimizer"] == 0 and full["stage 2"] - offload["stage 2"] == 12 * weights
    lora = plan.count_bytes(c, replace(config, lora=16))
    adapters = plan.count_weights(c, 16)[1]
    assert lora["simulator"] == 0 and lora["policy"] == 2 * weights + 4 * adapters and lora["optimizer"] == 8 * adapters
    assert lora == plan.count_bytes(c, replace(config, lora=16, offload=True))  # adapters are float32 already
    assert lora["stage 1"] == 2 * weights + 16 * adapters + plan.training_peak(c, replace(config, lora=16), 2) + plan.OTHER
    assert lora["peak"] == max(4 * adapters + plan.training_peak(c, replace(config, lora=16), 2), plan.sampling_peak(c, config, 2))
    plain = plan.count_bytes(c, replace(config, precision="float32"))
    assert plain["policy"] == 4 * weights and plain["optimizer"] == 8 * weights
    long = replace(config, lora=16, micro_tokens=20_000)
    assert plan.training_peak(c, long, 2) == 20_000 * 2 * (36 * 2048 + 13 * 2048 + 7 * 11008)
    assert plan.sampling_peak(c, replace(config, questions=2000), 2) == 2000 * 8 * 151936 * 16


def test_the_table_of_the_documentation_is_that_of_the_plan(tmp_path, monkeypatch):
    """GB of stage 2, and of stage 1 in brackets; and which of them fit a card, in the table below it."""
    text = (Path(__file__).resolve().parents[1] / "docs" / "gpu.md").read_text(encoding="utf-8")
    for variant in plan.VARIANTS:
        flags = plan.flags_of(variant)
        row = f"| `{flags}` |" if flags else "| no option |"
        for size in SHAPES:
            folder = shape_folder(tmp_path / size, size)
            found = plan.count_bytes(plan.read_shape(folder), from_words(GRPOConfig, monkeypatch, "--plan", folder, *flags.split()))
            row += f" {found['stage 2'] / 1e9:.1f} ({found['stage 1'] / 1e9:.1f}) |"
        assert row + "\n" in text
    for line, most in (("| 24 GB | 0.5B; 1.5B with `--offload --questions 4 --sim-rows 16` | 3B with `--questions 4 --sim-rows 16` |", 24),
                       ("| 80 GB | 1.5B; 3B with `--offload`; 7B with `--offload --questions 4 --sim-rows 16` | 7B |", 80),
                       ("| 141 GB | 3B; 7B with `--offload` | 7B |", 141)):
        assert line + "\n" in text
        cells = line.split("|")[2:4]
        for cell, lora in zip(cells, ([], ["--lora", 16]), strict=True):
            for entry in cell.split(";"):
                size, *flags = entry.replace("`", "").replace(" with ", " ").lower().split()
                config = from_words(GRPOConfig, monkeypatch, "--plan", tmp_path / size, *flags, *lora)
                assert plan.count_bytes(plan.read_shape(tmp_path / size), config)["stage 2"] < most * 1e9
    smallest = re.search(r"7B fits 24 GB with `(.*?)` \((.*?)\)", text)
    config = from_words(GRPOConfig, monkeypatch, "--plan", tmp_path / "7b", *smallest[1].split())
    assert f"{plan.count_bytes(plan.read_shape(tmp_path / '7b'), config)['stage 2'] / 1e9:.1f}" == smallest[2]


def test_the_constants_of_the_plan_are_those_of_the_model():
    assert plan.PREFILL == Sampler.PREFILL
    assert f"states.split({plan.CHUNK})" in Path(model_file.__file__).read_text(encoding="utf-8")


def planned(monkeypatch, capsys, *words):
    monkeypatch.setattr("sys.argv", ["grpo.py", *map(str, words)])
    grpo.main()
    return capsys.readouterr().out


def test_a_plan_is_printed_and_nothing_is_written(tmp_path, monkeypatch, capsys):
    """With a folder, or for the stage 1 of a run. The defaults are those of a checkpoint."""
    folder = shape_folder(tmp_path / "qwen", "7b")
    said = planned(monkeypatch, capsys, "--plan", folder, "--out", tmp_path / "run")
    assert said.startswith("7,616 million weights in bfloat16, 7,616 million parameters trained") and not (tmp_path / "run").exists()
    assert "weights of the policy            15.2\n" in said and "AutoAgent's KV cache             30.1  --questions" in said
    lines = [line.split() for line in said.splitlines()]
    assert ["and", "--lora", "16", "58.9", "19.7", "no", "fits", "fits"] in lines and "--offload takes 91.4 GB" in said
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (0, 60e9))
    said = planned(monkeypatch, capsys, "--plan", folder, "--lora", 8)
    lines = [line.split() for line in said.splitlines()]
    assert ["options", "grpo.py", "sft.py", "60", "GB"] in lines and [line[-1] for line in lines if line[:2] == ["as", "given"]] == ["fits"]
    assert "--offload" not in said.partition("options ")[2]  # adapters have no masters, so it saves nothing
    shutil.move(folder, tmp_path / "run" / "sft" / "model")
    (tmp_path / "run" / "sft" / "config.json").write_text(json.dumps({"model": "qwen"}))
    assert planned(monkeypatch, capsys, "--plan", "--out", tmp_path / "run", "--lora", 8) == said


def test_a_plan_needs_a_checkpoint(tmp_path, monkeypatch):
    with pytest.raises(grpo.InputError, match="plan: .*holds no trained checkpoint; name one, --plan FOLDER"):
        GRPOConfig(out=str(tmp_path), plan=plan.STAGE1) and plan.show_plan(GRPOConfig(out=str(tmp_path), plan=plan.STAGE1))
    with pytest.raises((grpo.InputError, OSError), match="config.json"):
        plan.show_plan(GRPOConfig(plan=str(tmp_path)))


@pytest.mark.parametrize("program, flags", [("sft.py", "--micro-tokens"), ("grpo.py", "--questions, --sim-rows"), ("mtr.py", "--rows"), ("x.py", "--rows")])
def test_full_memory_names_the_options_of_the_program(program, flags, monkeypatch, capsys):
    def main():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 8 GiB")
    monkeypatch.setattr("sys.argv", [program])
    with pytest.raises(SystemExit) as end:
        options.run_main(main)
    assert end.value.code == 2 and f"{program}: out of memory; lower {flags}" in capsys.readouterr().err
