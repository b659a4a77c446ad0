"""What saves memory changes no result: recomputed activations, scores in chunks, prefill in blocks, adapters, masters.

Each part is compared with the plain way, in float64 or bit for bit."""
import json
import random

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import model as model_file
from data.options import command_line
from grpo import GRPOConfig
from model import (
    Linear,
    Masters,
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
from sft import SFTConfig


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
    assert "peak learning rate; with --lora use ten times as much (default: 0.0015; of a checkpoint 1e-05)" in text
