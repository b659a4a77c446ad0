"""model.py against plain references: slow loops in float64, and numbers worked out by hand.

If MTR_QWEN names a folder with Qwen2.5's tokenizer.json, the tokenizer tests run on that file too.
"""
import itertools
import json
import math
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tokenizers
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

import model as model_file
from data import InputError
from data.chat import Control
from model import (
    MLP,
    CachePass,
    KVCache,
    ModelConfig,
    RMSNorm,
    Sampler,
    Tokenizer,
    draw,
    load,
    rotary_angles,
    rotate,
    save_model,
    token_logprobs,
)

REAL = os.environ.get("MTR_QWEN")
STOPS = (1, 2)  # stop ids of the samplers below, 2 of 40 ids: most turns end before their limit

# ------------------------------------------------------------------------------- slow, plain references


def distance(got, want) -> float:
    """Norm of the difference over the norm."""
    got, want = (torch.as_tensor(x).detach().double() for x in (got, want))
    assert got.shape == want.shape
    return float((got - want).norm() / want.norm())


def slow_norm(x, weight, eps):
    return np.stack([row / math.sqrt(sum(v * v for v in row) / len(row) + eps) * weight for row in x])


def slow_turn(x, position, theta):
    """RoPE as complex numbers: pair i is x[i] + j·x[i + Dh/2], turned by position · theta^(-2i/Dh)."""
    half = len(x) // 2
    turned = [complex(x[i], x[i + half]) * np.exp(1j * position * theta ** (-i / half)) for i in range(half)]
    return np.array([z.real for z in turned] + [z.imag for z in turned])


def slow_attention(c, w, x):
    """One query head and one position at a time; query head h reads kv-head h // (H/K)."""
    project = {p: x @ w[f"{p}_proj.weight"].T + w[f"{p}_proj.bias"] for p in "qkv"}
    Dh, out = c.head_dim, np.zeros((len(x), c.num_attention_heads * c.head_dim))
    for h in range(c.num_attention_heads):
        kv = h // (c.num_attention_heads // c.num_key_value_heads)
        keys = [slow_turn(k[kv * Dh:(kv + 1) * Dh], s, c.rope_theta) for s, k in enumerate(project["k"])]
        for t in range(len(x)):
            query = slow_turn(project["q"][t, h * Dh:(h + 1) * Dh], t, c.rope_theta)
            scores = [math.exp(query @ keys[s] / math.sqrt(Dh)) for s in range(t + 1)]
            for s, score in enumerate(scores):
                out[t, h * Dh:(h + 1) * Dh] += score / sum(scores) * project["v"][s, kv * Dh:(kv + 1) * Dh]
    return out @ w["o_proj.weight"].T


def slow_forward(model, ids):
    """The whole of Qwen2.5 in float64 numpy -> logits (T, known ids)."""
    c, w = model.config, {name: p.detach().double().numpy() for name, p in model.named_parameters()}
    x = w["model.embed_tokens.weight"][ids]
    for i in range(c.num_hidden_layers):
        prefix = f"model.layers.{i}."
        block = {n.removeprefix(prefix): p for n, p in w.items() if n.startswith(prefix)}
        attention = {n.removeprefix("self_attn."): p for n, p in block.items()}
        x = x + slow_attention(c, attention, slow_norm(x, block["input_layernorm.weight"], c.rms_norm_eps))
        y = slow_norm(x, block["post_attention_layernorm.weight"], c.rms_norm_eps)
        gate, up = y @ block["mlp.gate_proj.weight"].T, y @ block["mlp.up_proj.weight"].T
        x = x + (gate / (1 + np.exp(-gate)) * up) @ block["mlp.down_proj.weight"].T
    head = w["model.embed_tokens.weight" if c.tie_word_embeddings else "lm_head.weight"]
    return slow_norm(x, w["model.norm.weight"], c.rms_norm_eps) @ head[:model.known_ids].T


@torch.no_grad()
def slow_sample(model, ids, uniforms, limit, temperature=1.0, stops=STOPS):
    """One conversation alone: one full forward pass per token, and a draw that adds up probabilities."""
    new, logprobs = [], []
    while len(new) < limit and not (new and new[-1] in stops):
        logits = model.head(model(torch.tensor([ids + new]))[0, -1]).tolist()
        weights = [math.exp((x - max(logits)) / (temperature or 1)) for x in logits]
        pick, left = 0, uniforms[len(new)] * sum(weights)
        while left >= weights[pick]:
            left -= weights[pick]
            pick += 1
        pick = pick if temperature else logits.index(max(logits))
        new.append(pick)
        logprobs.append(math.log(weights[pick] / sum(weights)))
    return new, logprobs


def random_ids(rng, n, vocab=40):
    return rng.integers(0, vocab, n).tolist()


def pad(rows, filler=0):
    return torch.tensor([row + [filler] * (max(map(len, rows)) - len(row)) for row in rows])


# ------------------------------------------------------------------------------------------- the parts


@pytest.mark.parametrize("heads, kv_heads", [(2, 2), (4, 2), (14, 2)])  # 1, 2 and 7 query heads per kv-head
@pytest.mark.parametrize("tied", [True, False])
def test_the_whole_model_is_the_slow_one(tiny, heads, kv_heads, tied):
    """Biases, half-split RoPE, order of the grouped heads, SwiGLU, norms, head. The angles are float32."""
    model, ids = tiny(heads=heads, kv_heads=kv_heads, tied=tied), random_ids(np.random.default_rng(0), 9)
    assert distance(model.head(model(torch.tensor([ids])))[0], slow_forward(model, ids)) < 1e-6


@pytest.mark.parametrize("name", ["q_proj.bias", "k_proj.bias", "v_proj.bias", "up_proj.weight"])
def test_the_slow_one_sees_each_part(tiny, name):
    """The comparison above notices a part that is missing."""
    model, ids = tiny(), random_ids(np.random.default_rng(0), 9)
    before = slow_forward(model, ids)
    next(p for n, p in model.named_parameters() if n.endswith(name)).data.zero_()
    assert distance(slow_forward(model, ids), before) > 1e-3


def test_rotation_by_hand():
    """A quarter turn takes (a, b) to (-b, a). The pairs are (1, 3) and (2, 4), not neighbours."""
    turned = rotate(torch.tensor([1.0, 2, 3, 4]), torch.zeros(2), torch.ones(2))
    assert turned.tolist() == [-3, -4, 1, 2]


@pytest.mark.parametrize("head_dim", [64, 128])
def test_angles_are_right_far_out(head_dim):
    """At position 30000. A position in bfloat16 is off by up to 64."""
    got = rotary_angles(torch.tensor([[29999, 30000]]), head_dim, 1e6)[0]
    want = np.array([[p * 1e6 ** (-2 * i / head_dim) for i in range(head_dim // 2)] for p in (29999, 30000)])
    assert got.dtype == torch.float32 and np.abs(got.double().numpy() - want).max() < 4e-3


def test_angles_are_right_inside_a_bfloat16_model(tiny, monkeypatch):
    """Angles, cosine and sine are computed in float32. Only the results are rounded to bfloat16."""
    seen = []
    monkeypatch.setattr(model_file, "rotate", lambda x, cos, sin: seen.append(torch.stack((cos, sin))) or x)
    past = SimpleNamespace(positions=torch.tensor([[30000]]), write=lambda layer, k, v: (k, v), mask=None)
    tiny(dtype=torch.bfloat16)(torch.tensor([[3]]), past)
    angles = np.array([30000 * 100.0 ** (-i / 4) for i in range(4)])
    want = [np.cos(angles), np.sin(angles)]
    assert np.abs(seen[0].double().numpy().squeeze() - want).max() < 4e-3 + 2 ** -9


def test_rms_norm_by_hand():
    """sqrt((9 + 16) / 2 + 3.5) = 4."""
    norm = RMSNorm(2, eps=3.5)
    norm.weight.data = torch.tensor([2.0, 0.5])
    assert norm(torch.tensor([3.0, 4.0])).tolist() == pytest.approx([1.5, 0.5])


def test_rms_norm_in_bfloat16_takes_its_mean_in_float32():
    x = torch.randn(200, 96, generator=torch.Generator().manual_seed(0)).bfloat16()
    want = (x.double() / (x.double().pow(2).mean(-1, keepdim=True) + 1e-6).sqrt()).bfloat16()
    got = RMSNorm(96, 1e-6).bfloat16()(x)
    assert got.dtype == torch.bfloat16 and (got == want).double().mean() > 0.999


def test_swiglu_by_hand():
    """silu(2) · 3 · 5: silu applies to gate_proj, not to up_proj."""
    mlp = MLP(ModelConfig(1, 1, 1, 1, 1, 1, 1, 1e-6, 1e6, True))
    for part, value in ((mlp.gate_proj, 2.0), (mlp.up_proj, 3.0), (mlp.down_proj, 5.0)):
        part.weight.data.fill_(value)
    assert mlp(torch.ones(1)).item() == pytest.approx(2 / (1 + math.exp(-2)) * 15)


def test_bfloat16_stays_near_and_its_logits_are_float32(tiny):
    model, ids = tiny(dtype=torch.bfloat16), random_ids(np.random.default_rng(1), 12)
    logits = model.head(model(torch.tensor([ids])))[0]
    assert logits.dtype == torch.float32 and distance(logits, slow_forward(model, ids)) < 0.03


@pytest.mark.parametrize("heads, kv_heads", [(2, 2), (4, 2), (14, 2)])
def test_training_in_half_precision_on_a_cpu_stays_near(tiny, heads, kv_heads):
    """There a plain formula replaces the fused attention kernel. States and gradients agree to a few per cent."""
    ids, gradients = random_ids(np.random.default_rng(3), 40), []
    for half in (True, False):
        model = tiny(heads=heads, kv_heads=kv_heads, dtype=torch.float32)
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            states = model(torch.tensor([ids]))
        model.head(states).log_softmax(-1)[0, range(39), ids[1:]].sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
        assert distance(model.head(states)[0], slow_forward(model, ids)) < (0.03 if half else 1e-5)
    assert distance(*gradients) < 0.05


def test_the_fused_kernel_takes_over_where_the_scores_are_many(tiny, monkeypatch):
    """Four heads and 1,733 tokens have more than 12 million scores, 1,732 tokens have fewer."""
    attention, fused, calls = tiny(heads=4, kv_heads=2).model["layers"][0].self_attn, F.scaled_dot_product_attention, []
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *args, **more: calls.append(1) or fused(*args, **more))
    numbers = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, n, 1733, 8, generator=numbers).bfloat16() for n in (4, 2, 2))
    with torch.autocast("cpu", torch.bfloat16):
        plain = attention.attend(*[x[:, :, :1732] for x in (q, k, v)])
        assert not calls
        whole = attention.attend(q, k, v)
    assert len(calls) == 1 and distance(whole[:, :, :1732].float(), plain.float()) < 0.02


def test_init_weights_follow_the_seed_alone(tiny):
    first, again, other = (tiny(seed=i).init_weights(s).state_dict() for i, s in enumerate((5, 5, 6)))
    assert all(torch.equal(first[n], again[n]) for n in first if "norm" not in n)
    assert not torch.equal(first["model.embed_tokens.weight"], other["model.embed_tokens.weight"])


# ------------------------------------------------------------------------------------------- the cache


@torch.no_grad()
def feed(model, cache, parts, filler=0):
    """One pass that feeds ids parts[i] to row i -> states and positions of each row."""
    new = torch.tensor([len(part) for part in parts])
    past = CachePass(cache, new, int(new.max()))
    states = model(pad(parts, filler), past)
    past.close()
    return [(states[i, :n], past.positions[i, :n].tolist()) for i, n in enumerate(new.tolist())]


def feed_in_passes(model, rows, lengths, filler=0):
    """Feed row i in parts of lengths[0][i], lengths[1][i], … ids -> states and positions of each row."""
    cache, start, seen = KVCache(model, len(rows), 64), [0] * len(rows), [[] for _ in rows]
    for part in lengths:
        parts = [row[s:s + n] for row, s, n in zip(rows, start, part, strict=True)]
        start = [s + n for s, n in zip(start, part, strict=True)]
        for row, piece in zip(seen, feed(model, cache, parts, filler), strict=True):
            row.append(piece)
    assert start == [len(row) for row in rows] == cache.length.tolist()
    return [(torch.cat([s for s, _ in row]), [p for _, ps in row for p in ps]) for row in seen]


SPLITS = {
    "prefill 5, append 3, append 1": [[5], [3], [1]],
    "decode after a prefill": [[6], *[[1]] * 4],
    "one at a time": [[1]] * 9,
    "three ragged turns": [[5, 2, 7], [3, 6, 1], [1, 4, 2]],
    "decode between ragged turns": [[4, 9, 1], [1, 1, 1], [1, 1, 1], [2, 7, 12], [1, 1, 1]],
    "rows sit out an append": [[5, 2, 3], [0, 6, 0], [4, 0, 1], [0, 0, 5]],
    "rows sit out a decode": [[5, 2, 3], [1, 0, 1], [0, 1, 1], [1, 0, 0], [2, 3, 4]],
    "an early end, then a long observation": [[4, 6], *[[0, 1]] * 20, [7, 1], *[[1, 1]] * 3],
}


@pytest.mark.parametrize("lengths", SPLITS.values(), ids=SPLITS)
@pytest.mark.parametrize("filler", [0, 39])
def test_many_passes_give_the_states_of_one_pass(tiny, lengths, filler):
    """However the rows are split and padded, each row has the states of one pass over it alone, without a cache."""
    model, rng = tiny(), np.random.default_rng(len(lengths))
    rows = [random_ids(rng, sum(part)) for part in zip(*lengths, strict=True)]
    fed = feed_in_passes(model, rows, lengths, filler)
    for row, (states, positions) in zip(rows, fed, strict=True):
        assert positions == list(range(len(row)))
        assert distance(states, model(torch.tensor([row]))[0]) < 1e-12


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-4), (torch.bfloat16, 0.05)])
def test_three_turns_in_every_split(tiny, dtype, tolerance):
    """A turn is one pass over 1 to 3 ids, then 0 to 2 passes over one id each. All 729 combinations of three turns
    are rows of one ragged batch. All rows get the same ids, so each must see the beginning of one whole pass."""
    splits = list(itertools.product((1, 2, 3), (0, 1, 2), repeat=3))
    passes = []
    for turn in range(3):
        prefilled, decoded = zip(*(split[2 * turn:2 * turn + 2] for split in splits), strict=True)
        passes += [prefilled, *([int(n > step) for n in decoded] for step in range(2))]
    model, ids = tiny(dtype=dtype), random_ids(np.random.default_rng(3), 15)
    whole = model(torch.tensor([ids]))[0]
    fed = feed_in_passes(model, [ids[:sum(split)] for split in splits], passes)
    for split, (states, _) in zip(splits, fed, strict=True):
        assert distance(states, whole[:sum(split)]) < tolerance


@pytest.mark.parametrize("heads, kv_heads", [(2, 2), (14, 2)])
def test_grouped_heads_with_a_cache(tiny, heads, kv_heads):
    model, ids = tiny(heads=heads, kv_heads=kv_heads), random_ids(np.random.default_rng(0), 9)
    states, _ = feed_in_passes(model, [ids], [[5], [3], [1]])[0]
    assert distance(model.head(states), slow_forward(model, ids)) < 1e-6


def test_a_new_cache_is_zeros(tiny, monkeypatch):
    """0 · NaN is NaN, so the memory beyond a row's length must be finite. torch.empty gives NaN in this test."""
    model = tiny()
    monkeypatch.setattr(torch, "empty", lambda size, **more: torch.full(size, math.nan, **more))
    cache = KVCache(model, 3, 16)
    assert cache.k.shape == cache.v.shape == (2, 3, 2, 16, 8)
    assert not cache.k.any() and not cache.v.any() and not cache.length.any()


def test_attention_ignores_memory_beyond_a_rows_length(tiny):
    model, cache, rows = tiny(), KVCache(tiny(), 2, 32), [[3, 4, 5, 6, 7, 8, 9], [10, 11, 12, 13]]
    feed(model, cache, [rows[0][:5], rows[1][:2]])
    for row, length in enumerate(cache.length.tolist()):
        cache.k[:, row, :, length:] = cache.v[:, row, :, length:] = 1e3
    for row, (states, _) in zip(rows, feed(model, cache, [rows[0][5:], rows[1][2:]]), strict=True):
        assert distance(states, model(torch.tensor([row]))[0, -2:]) < 1e-12


def test_moving_rows_swaps_them(tiny):
    model, cache, rows = tiny(), KVCache(tiny(), 3, 32), [[3, 4, 5, 6, 7], [10, 11], [20, 21, 22]]
    feed(model, cache, rows)
    cache.move(torch.tensor([0, 2]), torch.tensor([2, 0]))
    assert cache.length.tolist() == [3, 2, 5]
    rows, new = rows[::-1], [[8], [9], [10]]
    for row, last, (states, _) in zip(rows, new, feed(model, cache, new), strict=True):
        assert distance(states, model(torch.tensor([row + last]))[0, -1:]) < 1e-12


# ------------------------------------------------------------------------------------------------ draw

BY_HAND = [(0.0, 0), (0.124, 0), (0.126, 1), (0.374, 1), (0.376, 2), (0.874, 2), (0.876, 3), (1 - 1e-6, 3)]


@pytest.mark.parametrize("uniform, want", BY_HAND)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_draw_inverts_the_cumulative_sum(uniform, want, dtype):
    """Probabilities 1/8, 1/4, 1/2, 1/8: borders at 0.125, 0.375, 0.875. A shift of all logits changes nothing."""
    probs = torch.tensor([1, 2, 4, 1], dtype=dtype) / 8
    ids, logprobs = draw(probs.log()[None] + 7, torch.tensor([uniform]), 1.0)
    assert ids.tolist() == [want] and logprobs.item() == pytest.approx(math.log(probs[want]), abs=1e-6)


def test_draw_at_a_border_takes_the_next_id():
    """[0, 1/2) gives the first id, [1/2, 1) the second."""
    ids, _ = draw(torch.zeros(2, 2, dtype=torch.float64), torch.tensor([0.5, np.nextafter(0.5, 0)]), 1.0)
    assert ids.tolist() == [1, 0]


def test_draw_divides_by_the_temperature():
    """At 0.5 the probabilities 1, 2, 4, 1 become 1, 4, 16, 1 of 22."""
    logits = torch.tensor([1.0, 2, 4, 1]).double().log().expand(4, 4)
    ids, logprobs = draw(logits, torch.tensor([0.9, 4.9, 5.1, 21.1]) / 22, 0.5)
    assert ids.tolist() == [0, 1, 2, 3]
    assert logprobs.exp().tolist() == pytest.approx([1 / 22, 4 / 22, 16 / 22, 1 / 22])


def test_draw_reproduces_a_distribution():
    """An even grid of 1000 numbers gives each id its share, up to one number."""
    logits = 2 * torch.randn(1, 7, generator=torch.Generator().manual_seed(0)).double()
    ids, _ = draw(logits.expand(1000, 7), (torch.arange(1000) + 0.5) / 1000, 1.0)
    share = ids.bincount(minlength=7) / 1000
    assert (share - logits.exp()[0] / logits.exp().sum()).abs().max() < 1.01e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_draw_never_takes_an_id_of_probability_zero(dtype):
    """Such ids lie at both ends. The uniform numbers are 0 and the largest number below 1."""
    logits = torch.randn(64, 300, generator=torch.Generator().manual_seed(0)).to(dtype)
    logits[:, :3] = logits[:, -3:] = -math.inf
    for uniform in (0.0, float(np.nextafter(np.float32(1), np.float32(0)))):
        ids, logprobs = draw(logits, torch.full((64,), uniform), 1.0)
        assert ids.min() >= 3 and ids.max() < 297 and logprobs.isfinite().all()


def test_draw_at_temperature_zero_takes_the_largest():
    """It scores the id at temperature 1."""
    ids, logprobs = draw(torch.tensor([[1.0, 5, 2]]).log(), torch.tensor([0.99]), 0)
    assert ids.tolist() == [1] and logprobs.item() == pytest.approx(math.log(5 / 8))


# --------------------------------------------------------------------------------------------- sampler


def make_sampler(model, rows, slots=160, stops=STOPS):
    return Sampler(model, SimpleNamespace(stop_ids=set(stops)), rows, slots)


def open_all(sampler, prompts, copies=1):
    """Open conversations -> all ids of each so far, by conversation, in the order of the prompts."""
    contexts = [list(prompt) for prompt in prompts for _ in range(copies)]
    return dict(zip(sampler.open(prompts, copies), contexts, strict=True))


def append(sampler, contexts, conversation, ids):
    """Append an observation to a conversation, and to its context."""
    sampler.append(conversation, ids)
    contexts[conversation] += ids


def check_turn(model, sampler, contexts, conversations, limits, uniforms, temperature=1.0, stops=STOPS):
    """Sample one turn. Each conversation must get the ids that it gets alone. Contexts grow by the new ids."""
    turns = sampler.sample(conversations, limits, uniforms, temperature)
    for c, limit, line, (ids, logprobs) in zip(conversations, limits, uniforms, turns, strict=True):
        want, scores = slow_sample(model, contexts[c], line, limit, temperature, stops)
        assert ids == want
        assert logprobs == pytest.approx(scores, abs=1e-9)
        contexts[c] += ids
        assert c.pending == ids[-1:]
        assert c.filled == sampler.cache.length[c.row] == len(contexts[c]) - 1
    return turns


@pytest.mark.parametrize("temperature", [1.0, 0.6, 0])
def test_a_batch_gives_each_row_what_it_gets_alone(tiny, temperature):
    """Three ragged turns with ragged observations between them. Temperature 0 is the argmax of a forward pass."""
    model, rng = tiny(), np.random.default_rng(4)
    sampler = make_sampler(model, 4)
    contexts = open_all(sampler, [random_ids(rng, n) for n in (9, 2, 5, 14)])
    assert list(contexts) == sampler.rows
    for lengths in ((0, 0, 0, 0), (1, 9, 3, 0), (12, 1, 2, 6)):
        for c, n in zip(contexts, lengths, strict=True):
            append(sampler, contexts, c, random_ids(rng, n))
        check_turn(model, sampler, contexts, list(contexts), [12, 9, 12, 3], rng.random((4, 12)), temperature)


@pytest.mark.parametrize("seed", range(5))
def test_conversations_may_be_sampled_in_any_order(tiny, seed):
    """Any of them, in any order, with or without an observation. New ones are opened in between."""
    model, rng = tiny(seed=seed), np.random.default_rng(seed)
    sampler = make_sampler(model, 8)
    everybody = list(sampler.rows)
    contexts = open_all(sampler, [random_ids(rng, n) for n in rng.integers(2, 12, 5)])
    for turn in range(5):
        if turn == 2:
            contexts |= open_all(sampler, [random_ids(rng, n) for n in rng.integers(2, 12, 2)])
            assert list(contexts) == everybody[:7] and sampler.unused == everybody[7:]
        chosen = rng.permutation(len(contexts))[:rng.integers(1, len(contexts) + 1)]
        chosen = [everybody[i] for i in chosen]
        for c in chosen:
            append(sampler, contexts, c, random_ids(rng, rng.integers(0, 9)))
        limits = rng.integers(1, 8, len(chosen)).tolist()
        check_turn(model, sampler, contexts, chosen, limits, rng.random((len(chosen), max(limits))))
        assert set(sampler.rows) == set(everybody) and [c.row for c in sampler.rows] == list(range(8))


def test_an_early_end_then_a_long_observation(tiny):
    """Row 0 samples 1 token and row 1 samples 20. Then row 0 gets 15 ids, and both go on."""
    model, rng = tiny(), np.random.default_rng(0)
    sampler = make_sampler(model, 2, stops=())
    contexts = open_all(sampler, [random_ids(rng, 6), random_ids(rng, 4)])
    both = list(contexts)
    check_turn(model, sampler, contexts, both, [1, 20], rng.random((2, 20)), stops=())
    append(sampler, contexts, both[0], random_ids(rng, 15))
    check_turn(model, sampler, contexts, both, [5, 5], rng.random((2, 5)), stops=())


def test_copies_equal_rows_opened_one_by_one(tiny):
    """Copies of two prompts are independent of each other. Another conversation was opened before."""
    model, rng = tiny(), np.random.default_rng(7)
    first, prompts = random_ids(rng, 11), [random_ids(rng, 8), random_ids(rng, 3)]
    sampler = make_sampler(model, 7)
    everybody = list(sampler.rows)
    contexts = open_all(sampler, [first]) | open_all(sampler, prompts, copies=3)
    assert list(contexts) == everybody
    for numbers in ([6, 1, 3, 2, 0], [4, 5, 6, 1], [0, 1, 2, 3, 4, 5, 6]):
        chosen = [everybody[i] for i in numbers]
        check_turn(model, sampler, contexts, chosen, [6] * len(chosen), rng.random((len(chosen), 6)))
    assert len({tuple(context) for context in contexts.values()}) == 7


def test_more_prompts_than_one_prefill_takes(tiny):
    model, rng = tiny(), np.random.default_rng(3)
    sampler = make_sampler(model, 40)
    contexts = open_all(sampler, [random_ids(rng, n) for n in rng.integers(2, 20, 40)])
    check_turn(model, sampler, contexts, list(contexts), [2] * 40, rng.random((40, 2)))


def test_a_sampler_after_reset_is_as_new(tiny):
    model, rng = tiny(), np.random.default_rng(5)
    sampler = make_sampler(model, 3, slots=40)
    old = sampler.open([random_ids(rng, 30) for _ in range(3)])
    sampler.sample([old[2], old[0]], [5, 9], rng.random((2, 9)))
    sampler.reset()
    contexts = open_all(sampler, [random_ids(rng, n) for n in (4, 7, 2)])
    assert list(contexts) == sampler.rows and not set(old) & set(contexts)
    check_turn(model, sampler, contexts, list(contexts), [8, 8, 8], rng.random((3, 8)))


@pytest.mark.parametrize("lengths", [(1, 4), (1, 1)])
def test_a_prompt_may_be_one_token(tiny, lengths):
    model, rng = tiny(), np.random.default_rng(2)
    sampler = make_sampler(model, 2)
    contexts = open_all(sampler, [random_ids(rng, n) for n in lengths])
    check_turn(model, sampler, contexts, list(contexts), [5, 5], rng.random((2, 5)))


@pytest.mark.parametrize("new, limits", [(0, [2, 10]), (8, [2, 2])], ids=["sampling", "prefill"])
def test_a_long_row_takes_no_slots_from_a_short_one(tiny, new, limits):
    """Slots are counted per row. No row needs more than 16 here. But the longest row plus the most new ids, which
    belong to another row, is more than 16."""
    model, rng = tiny(), np.random.default_rng(6)
    sampler = make_sampler(model, 2, slots=16, stops=())
    contexts = open_all(sampler, [random_ids(rng, 12), random_ids(rng, 3)])
    long, short = contexts
    append(sampler, contexts, short, random_ids(rng, new))
    check_turn(model, sampler, contexts, [long, short], limits, rng.random((2, 10)), stops=())


def test_a_row_may_fill_the_cache_to_its_last_slot(tiny):
    """Prompt 4, sampled 3, observation 5, sampled 2. Only the very last id is never fed to the model."""
    model, rng = tiny(), np.random.default_rng(9)
    sampler = make_sampler(model, 1, slots=13, stops=())
    contexts = open_all(sampler, [random_ids(rng, 4)])
    check_turn(model, sampler, contexts, sampler.rows, [3], rng.random((1, 3)), stops=())
    append(sampler, contexts, sampler.rows[0], random_ids(rng, 5))
    check_turn(model, sampler, contexts, sampler.rows, [2], rng.random((1, 2)), stops=())
    assert sampler.rows[0].filled == 13


def test_a_row_that_outgrows_the_cache_is_refused(tiny):
    sampler = make_sampler(tiny(), 1, slots=8, stops=())
    opened = sampler.open([[3, 4, 5, 6]])
    with pytest.raises(AssertionError, match="limit 9: KV cache of 8 slots, 12 needed"):
        sampler.sample(opened, [9], np.full((1, 9), 0.5))


def test_limits_are_kept_and_stop_ids_end_a_turn(tiny):
    """A stop id may only be the last id of a turn. A turn below its limit ends with a stop id. The temperature is
    high, so all cases occur."""
    model, rng = tiny(), np.random.default_rng(8)
    sampler, limits = make_sampler(model, 60), rng.integers(1, 40, 60).tolist()
    opened = sampler.open([random_ids(rng, 5)], copies=60)
    turns = [ids for ids, _ in sampler.sample(opened, limits, rng.random((60, 40)), 4.0)]
    pairs = list(zip(turns, limits, strict=True))
    assert all(1 <= len(ids) <= limit for ids, limit in pairs)
    assert not {i for ids in turns for i in ids[:-1]} & set(STOPS)
    assert {ids[-1] for ids, limit in pairs if len(ids) < limit} == set(STOPS)
    assert any(len(ids) == limit and ids[-1] not in STOPS for ids, limit in pairs)


@pytest.mark.parametrize("name, length", [("<|im_end|>", 1), ("<|endoftext|>", 1), ("<|im_start|>", 6)])
def test_both_ends_of_qwen_stop_a_row(tiny, tokenizer, monkeypatch, name, length):
    """A huge logit forces the id. A stop id ends the turn and is kept. Another control token does not end it."""
    model, forced = tiny(vocab=tokenizer.size), tokenizer.control[name]
    boost = 99.0 * (torch.arange(tokenizer.size) == forced)
    monkeypatch.setattr(model, "head", lambda states, head=model.head: head(states) + boost)
    sampler = Sampler(model, tokenizer, 2, 32)
    opened = sampler.open([[3, 4, 5], [6, 7]])
    turns = sampler.sample(opened, [6, 6], np.full((2, 6), 0.3))
    assert [ids for ids, _ in turns] == [[forced] * length] * 2


def test_no_prompt_opens_no_conversation(tiny):
    assert make_sampler(tiny(), 4).open([], copies=2) == []


def test_more_conversations_than_rows_are_refused(tiny):
    """Also when some rows are taken already."""
    sampler = make_sampler(tiny(), 5)
    with pytest.raises(AssertionError, match="6 conversations, but only 5 rows are free"):
        sampler.open([[3, 4], [5, 6]], copies=3)
    sampler.open([[3, 4]], copies=3)
    with pytest.raises(AssertionError, match="3 conversations, but only 2 rows are free"):
        sampler.open([[3, 4]], copies=3)


@pytest.mark.parametrize("temperature", [0, 1.0])
@pytest.mark.parametrize("tied", [True, False])
def test_an_id_without_a_token_is_neither_sampled_nor_scored(tiny, tied, temperature):
    """The embedding has rows above the tokenizer's ids. They are made the likeliest by far here."""
    model, rng = tiny(tied=tied, known_ids=30), np.random.default_rng(0)
    weight = model.model["embed_tokens"].weight if tied else model.lm_head.weight
    weight.data[30:] *= 100
    ids = torch.tensor([random_ids(rng, 8, 30)])
    states = model(ids)
    assert ((states @ weight.T).argmax(-1) >= 30).double().mean() > 0.9
    got, _ = token_logprobs(model, ids, torch.arange(8)[None] > 0)
    want = (states @ weight[:30].T).log_softmax(-1)[0, torch.arange(7), ids[0, 1:]]
    assert distance(got[0, 1:], want) < 1e-12
    sampler = make_sampler(model, 1, stops=())
    new, _ = sampler.sample(sampler.open(ids.tolist()), [40], rng.random((1, 40)), temperature)[0]
    assert len(new) == 40 and max(new) < 30


# ----------------------------------------------------------------------------- scoring what was sampled


def sampled_batch(model, temperature):
    """A ragged batch of three-turn conversations -> ids, mask and the sampler's log-probabilities."""
    rng = np.random.default_rng(11)
    ids = [random_ids(rng, n) for n in (3, 10, 6, 4)]
    mask, scores = ([[0.0] * len(row) for row in ids] for _ in range(2))
    sampler = make_sampler(model, 4)
    opened = sampler.open(ids)
    for chosen in ([0, 1, 2, 3], [3, 1], [2, 3, 0]):
        uniforms = rng.random((len(chosen), 12), dtype=np.float32)
        turns = sampler.sample([opened[i] for i in chosen], [12] * len(chosen), uniforms, temperature)
        for i, (new, logprobs) in zip(chosen, turns, strict=True):
            observation = random_ids(rng, rng.integers(1, 9))
            sampler.append(opened[i], observation)
            ids[i] = ids[i] + new + observation
            mask[i] += [1.0] * len(new) + [0.0] * len(observation)
            scores[i] += logprobs + [0.0] * len(observation)
    return pad(ids), pad(mask).bool(), pad(scores)


@pytest.mark.parametrize("temperature", [0.6, 1.0])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-4), (torch.float64, 1e-6)])
def test_token_logprobs_agree_with_the_sampler(tiny, temperature, dtype, tolerance):
    model = tiny(dtype=dtype, tied=False)
    ids, mask, sampled = sampled_batch(model, temperature)
    scored, _ = token_logprobs(model, ids, mask, temperature)
    assert mask.sum() > 40 and scored.dtype == dtype
    assert (scored - sampled).abs().max() < tolerance and not scored[~mask].any()


def test_a_forgotten_temperature_would_show(tiny):
    ids, mask, sampled = sampled_batch(model := tiny(), 0.6)
    assert (token_logprobs(model, ids, mask, 1.0)[0] - sampled).abs().max() > 0.1


@pytest.mark.parametrize("temperature", [0.6, 1.0, 2.0])
def test_log_probabilities_and_entropy_by_the_definition(tiny, temperature):
    model, ids = tiny(), random_ids(np.random.default_rng(1), 7)
    mask = torch.tensor([[0, 0, 1, 1, 0, 1, 0]]).bool()
    logprobs, entropy = token_logprobs(model, torch.tensor([ids]), mask, temperature)
    for t, line in enumerate(slow_forward(model, ids)[:-1], start=1):
        p = np.exp(line / temperature) / np.exp(line / temperature).sum()
        want = (math.log(p[ids[t]]), -sum(p * np.log(p))) if mask[0, t] else (0, 0)
        assert (logprobs[0, t].item(), entropy[0, t].item()) == pytest.approx(want, abs=1e-5)
    assert logprobs[0, 0] == entropy[0, 0] == 0 and not entropy.requires_grad


def test_entropy_of_an_even_model_is_the_log_of_its_ids(tiny):
    model = tiny(tied=False, known_ids=32)
    model.lm_head.weight.data.zero_()
    logprobs, entropy = token_logprobs(model, torch.tensor([[3, 4]]), torch.tensor([[False, True]]))
    assert entropy[0, 1].item() == -logprobs[0, 1].item() == pytest.approx(5 * math.log(2))


def state_gradients(model, ids, mask):
    """Gradient of the summed log-probabilities with respect to the final states (B, T, D)."""
    caught = []

    def catch(module, args, states):
        states.retain_grad()
        caught.append(states)

    hook = model.register_forward_hook(catch)
    token_logprobs(model, ids, mask)[0].sum().backward()
    hook.remove()
    return caught[0].grad


def test_a_completion_of_one_token_trains_one_position(tiny):
    """Only the position before a scored token gets a gradient. Row 0 has one such token, row 1 none, row 2 two."""
    ids = torch.tensor([random_ids(np.random.default_rng(i), 8) for i in range(3)])
    mask = torch.zeros(3, 8, dtype=torch.bool)
    mask[0, 5] = mask[2, 3] = mask[2, 7] = True
    gradient = state_gradients(tiny(), ids, mask)
    assert gradient.abs().sum(-1).nonzero().tolist() == [[0, 4], [2, 2], [2, 6]]


def test_scoring_leaves_its_inputs_alone(tiny):
    ids, mask = torch.tensor([[3, 4, 5, 6]]), torch.tensor([[False, True, False, True]])
    before = ids.clone(), mask.clone()
    token_logprobs(tiny(), ids, mask)
    assert torch.equal(ids, before[0]) and torch.equal(mask, before[1])


def padded_scores(model, filler):
    rng = np.random.default_rng(2)
    ids = pad([random_ids(rng, n) for n in (9, 4, 6)], filler)
    mask = pad([[0] * 3 + [1] * (n - 3) for n in (9, 4, 6)]).bool()
    logprobs, entropy = token_logprobs(model, ids, mask)
    return [logprobs, entropy, *torch.autograd.grad(logprobs.sum(), list(model.parameters()))]


@pytest.mark.parametrize("filler", [1, 2, 17, 39])
def test_the_padding_id_does_not_matter(tiny, filler):
    """Scores and gradients are the same for every padding id. 1 and 2 are stop ids."""
    for got, want in zip(padded_scores(tiny(), filler), padded_scores(tiny(), 0), strict=True):
        assert (got - want).abs().max() < 1e-12


def test_the_loss_mask_is_no_attention_mask(tiny):
    model, ids, mask = tiny(), torch.tensor([[3, 4, 5, 6, 7]]), torch.tensor([[0, 1, 1, 1, 1]]).bool()
    fewer = mask & (torch.arange(5) != 2)
    whole, part = (token_logprobs(model, ids, m)[0] for m in (mask, fewer))
    assert (whole - part)[fewer].abs().max() < 1e-12 and part[0, 2] == 0 > whole[0, 2]


def test_the_first_token_cannot_be_scored(tiny):
    with pytest.raises(AssertionError, match="first token"):
        token_logprobs(tiny(), torch.tensor([[3, 4]]), torch.tensor([[True, True]]))


# ----------------------------------------------------------------------------------------- checkpoints


def same_weights(a, b):
    a, b = dict(a.named_parameters()), dict(b.named_parameters())
    return a.keys() == b.keys() and all(a[n].dtype == b[n].dtype and torch.equal(a[n], b[n]) for n in a)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_saved_model_loads_as_it_was(tiny, tokenizer, tmp_path, tied, dtype):
    model = tiny(tokenizer.size + 9, tied=tied, dtype=dtype)
    save_model(model, tokenizer, tmp_path)
    loaded, read = load(tmp_path, dtype=dtype)
    assert same_weights(model, loaded) and loaded.config == model.config
    assert (read.size, read.stop_ids, read.files) == (tokenizer.size, tokenizer.stop_ids, tokenizer.files)
    assert loaded.head(loaded(torch.tensor([[3]]))).shape[-1] == loaded.known_ids == tokenizer.size
    assert ("lm_head.weight" in load_file(tmp_path / "model.safetensors")) is not tied
    assert all(p.requires_grad and p.device.type == "cpu" for p in loaded.parameters())


def test_loading_converts_to_the_dtype_asked_for(tiny, tokenizer, tmp_path):
    model = tiny(tokenizer.size, dtype=torch.bfloat16)
    save_model(model, tokenizer, tmp_path)
    assert same_weights(load(tmp_path)[0], model.float())


def test_a_saved_folder_is_whole(folder, tokenizer):
    """Model type, shape and dtype, stop ids in generation_config.json, the tokenizer's files with chat template."""
    want = {"model_type": "qwen2", "torch_dtype": "float32", "rms_norm_eps": 1e-2, "rope_theta": 100}
    assert want.items() <= json.loads((folder / "config.json").read_text()).items()
    stops = json.loads((folder / "generation_config.json").read_text())["eos_token_id"]
    assert stops == sorted(tokenizer.control[name] for name in ("<|im_end|>", "<|endoftext|>"))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (folder / name).read_bytes() == tokenizer.files[name]
    assert Tokenizer(folder).stop_ids == tokenizer.stop_ids


def test_a_chat_template_in_a_file_of_its_own_is_kept(folder, tmp_path):
    """Newer folders have it there."""
    (folder / "chat_template.jinja").write_bytes("{{ 'é' }}\r\n".encode())
    save_model(*load(folder), tmp_path / "saved")
    assert (tmp_path / "saved" / "chat_template.jinja").read_bytes() == "{{ 'é' }}\r\n".encode()


def shard(folder):
    """Split the weights into two shards with an index. Beside them lie two files that the index does not name: one
    with other numbers and one that is no safetensors file."""
    weights = load_file(folder / "model.safetensors")
    files = {name: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, name in enumerate(weights)}
    for file in set(files.values()):
        save_file({n: w for n, w in weights.items() if files[n] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    save_file({n: w + 1 for n, w in weights.items()}, folder / "model.safetensors")
    (folder / "model-00003-of-00002.safetensors").write_bytes(b"stray")


def test_the_files_that_the_index_names_are_read_and_no_other(folder):
    whole = load(folder)[0]
    shard(folder)
    assert same_weights(load(folder)[0], whole)


def test_the_index_only_names_files(folder):
    """Which tensor lies in which file is read from the files. A missing or a wrong entry changes nothing."""
    whole = load(folder)[0]
    edit_index(folder, lambda i: (i["weight_map"].pop(BIAS), i["weight_map"].update(x=i["weight_map"][UP])))
    assert same_weights(load(folder)[0], whole)


def test_a_tied_head_may_be_stored_too(folder):
    """Also in another shard than the embedding. It stays tied."""
    whole = load(folder)[0]
    edit_weights(folder, lambda w: w.update({HEAD: w[EMBED].clone()}))
    for _ in range(2):
        model = load(folder)[0]
        assert same_weights(model, whole) and model.config == whole.config and model.config.tie_word_embeddings
        shard(folder)


@pytest.mark.parametrize("shards", [False, True])
def test_a_stored_head_that_differs_from_the_embedding_counts(folder, tokenizer, tmp_path, shards):
    """config.json ties them, but a merged LoRA changed the head. The saved folder says that they are not tied."""
    before = load(folder)[0]
    head = 2 * load_file(folder / "model.safetensors")[EMBED].flip(0)
    edit_weights(folder, lambda w: w.update({HEAD: head.clone()}))
    if shards:
        shard(folder)
    model = load(folder)[0]
    ids = torch.tensor([[1, 2, 3]])
    assert torch.equal(model(ids), before(ids))
    assert torch.equal(model.head(model(ids)), (model(ids) @ head.T)[..., :tokenizer.size])
    save_model(model, tokenizer, tmp_path / "saved")
    assert not json.loads((tmp_path / "saved" / "config.json").read_text())["tie_word_embeddings"]
    assert same_weights(load(tmp_path / "saved")[0], model)


@pytest.mark.parametrize("keys, theta", [  # where transformers 5.23 takes the base from
    ({"rope_theta": 70.0}, 70), ({"rope_theta": None, "rope_parameters": {"rope_theta": 50.0, "rope_type": "default"}}, 50),
    ({"rope_theta": 70.0, "rope_parameters": {"rope_theta": 50.0, "rope_type": "default"}}, 50),
    ({"rope_theta": 70.0, "rope_parameters": {"rope_type": "default"}}, 70),
    ({"rope_theta": 70.0, "rope_scaling": {"type": "default"}}, 70), ({"rope_theta": 70.0, "rope_parameters": {}}, 70),
    ({"rope_theta": 70.0, "rope_scaling": {"rope_type": "default", "rope_theta": 30.0}, "rope_parameters": {"rope_theta": 50.0}}, 30)])
def test_the_base_of_the_rotary_angles(folder, keys, theta):
    edit_json(folder / "config.json", **keys)
    assert ModelConfig.read(folder).rope_theta == theta


@pytest.mark.parametrize("generation, config_eos, stops", [  # besides <|im_end|>
    ({"eos_token_id": None}, None, []), (None, None, []), (None, 5, [5]), (None, [5, 6], [5, 6]), ({}, 5, [5]),
    ({"eos_token_id": None}, 5, [5]), ({"eos_token_id": 7}, 5, [7]), ({"eos_token_id": [7, 8]}, None, [7, 8])])
def test_the_stop_ids_of_a_folder(folder, generation, config_eos, stops):
    """config.json counts if generation_config.json is missing or names none, as in transformers."""
    (folder / "generation_config.json").unlink()
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    raw = json.loads((folder / "config.json").read_text()) | {"eos_token_id": config_eos}
    (folder / "config.json").write_text(json.dumps(raw))
    tokenizer = Tokenizer(folder)
    assert tokenizer.stop_ids == {tokenizer.end, *stops}


def edit_json(path, **changes):
    """Change keys of a JSON file; None takes a key out."""
    data = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({k: v for k, v in data.items() if v is not None}))


def edit_weights(folder, change, name="model.safetensors"):
    weights = load_file(folder / name)
    change(weights)
    save_file(weights, folder / name)


def edit_index(folder, change):
    shard(folder)
    data = json.loads((folder / "model.safetensors.index.json").read_text())
    change(data)
    (folder / "model.safetensors.index.json").write_text(json.dumps(data))


def config(**changes):
    return lambda folder: edit_json(folder / "config.json", **changes)


def weights(change):
    return lambda folder: edit_weights(folder, change)


def index(change):
    return lambda folder: edit_index(folder, change)


def text(name, content):
    return lambda folder: (folder / name).write_text(content)


def without(name):
    return lambda folder: (folder / name).unlink()


def truncate(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-8])


def lose_shard(folder):
    shard(folder)
    (folder / SHARD).unlink()


def other_shard(folder, name):
    """The name of the shard that does not hold this tensor."""
    weight_map = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    return next(file for file in weight_map.values() if file != weight_map[name])


def store_twice(folder):
    """The same tensor in both shards."""
    weight = load_file(folder / "model.safetensors")[UP]
    shard(folder)
    edit_weights(folder, lambda w: w.update({UP: weight}), other_shard(folder, UP))


def store_head_twice(folder):
    """An untied head in both shards."""
    edit_json(folder / "config.json", tie_word_embeddings=False)
    edit_weights(folder, lambda w: w.update({HEAD: w[EMBED] + 1}))
    shard(folder)
    edit_weights(folder, lambda w: w.update({HEAD: torch.zeros(3)}), other_shard(folder, HEAD))


def add_to_shard(folder):
    shard(folder)
    edit_weights(folder, lambda w: w.update({EXTRA: torch.ones(3)}), SHARD)


def forget_shard(folder):
    """The index names one shard only. The other shard lies there unnamed."""
    edit_index(folder, lambda i: i.update(weight_map=dict.fromkeys(i["weight_map"], SHARD)))


def forget_control(token):
    def change(folder):
        added = json.loads((folder / "tokenizer.json").read_text())["added_tokens"]
        edit_json(folder / "tokenizer.json", added_tokens=[t for t in added if t["content"] != token])
    return change


def shrink(folder):
    edit_json(folder / "config.json", vocab_size=40)
    edit_weights(folder, lambda w: w.update({EMBED: w[EMBED][:40].clone()}))


EMBED, NORM, HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"
EXTRA = "model.layers.2.mlp.up_proj.weight"  # there are two layers only, 0 and 1
SHARD = "model-00002-of-00002.safetensors"
BIAS, UP = "model.layers.1.self_attn.k_proj.bias", "model.layers.0.mlp.up_proj.weight"
BROKEN = {  # the change to a good folder, and the word that the message must contain
    "no such folder": (shutil.rmtree, "config.json"),
    "no config": (without("config.json"), "config.json"),
    "config is no JSON": (text("config.json", '{"model_type": "qwen2",'), "config.json"),
    "config is a list": (text("config.json", "[]"), "config.json"),
    "config lacks a width": (config(hidden_size=None), "hidden_size"),
    "config lacks rope_theta": (config(rope_theta=None), "rope_theta"),
    "another model type": (config(model_type="llama"), "model_type"),
    "another activation": (config(hidden_act="gelu"), "hidden_act"),
    "scaled rotary": (config(rope_scaling={"type": "yarn", "factor": 4.0}), "rope_scaling"),
    "sliding window": (config(use_sliding_window=True), "use_sliding_window"),
    "a width in quotes": (config(hidden_size="32"), "hidden_size"),
    "another number of kv-heads": (config(num_key_value_heads=1), "k_proj"),
    "no heads": (config(num_attention_heads=0), "num_attention_heads"),
    "a width below 0": (config(hidden_size=-32), "hidden_size"),
    "theta is not a number": (config(rope_theta=math.nan), "rope_theta"),
    "heads that kv-heads don't divide": (config(num_key_value_heads=3), "num_key_value_heads 3"),
    "a layer that slides": (config(layer_types=["full_attention", "sliding_attention"]), "layer_types"),
    "layer types in no list": (config(layer_types=7), "layer_types"),
    "rotary parameters of another kind": (config(rope_parameters={"rope_type": "yarn", "rope_theta": 1e6}), "rope_type"),
    "rotary parameters in a list": (config(rope_parameters=["default"]), "rope_parameters"),
    "fewer rows than ids": (shrink, "vocab_size"),
    "no weights": (without("model.safetensors"), "model.safetensors"),
    "weights cut short": (truncate, "model.safetensors"),
    "weights are text": (text("model.safetensors", "version https://git-lfs"), "model.safetensors"),
    "a tensor missing": (weights(lambda w: w.pop(NORM)), NORM),
    "a tensor too many": (weights(lambda w: w.update({EXTRA: w[UP].clone()})), EXTRA),
    "a shape turned round": (weights(lambda w: w.update({UP: w[UP].T.contiguous()})), UP),
    "a shape that would broadcast": (weights(lambda w: w.update({BIAS: w[BIAS][:1].clone()})), BIAS),
    "integers": (weights(lambda w: w.update({BIAS: w[BIAS].to(torch.int8)})), f"{BIAS} (torch.int8)"),
    "a NaN": (weights(lambda w: w[UP][3].fill_(math.nan)), UP),
    "an infinity": (weights(lambda w: w[NORM][:1].fill_(-math.inf)), NORM),
    "untied without a head": (config(tie_word_embeddings=False), HEAD),
    "a shard missing": (lose_shard, SHARD),
    "a shard that the index does not name": (forget_shard, "no tensor model."),
    "a tensor in two shards": (store_twice, f"{UP} is not a tensor of this model, or it is stored twice"),
    "an untied head in two shards": (store_head_twice, f"{HEAD} is not a tensor of this model, or it is stored twice"),
    "a tensor too many in a shard": (add_to_shard, EXTRA),
    "an index of names that are no strings": (index(lambda i: i["weight_map"].update({UP: 1})), "weight_map"),
    "an index without a map": (index(lambda i: i.pop("weight_map")), "weight_map"),
    "no tokenizer": (without("tokenizer.json"), "tokenizer.json"),
    "a tokenizer that isn't one": (text("tokenizer.json", '{"added_tokens": []}'), "tokenizer.json"),
    **{f"a tokenizer without {token}": (forget_control(token), f"the token {token} is missing")
       for token in ("<|im_start|>", "<|im_end|>", "<tool_call>", "</tool_call>")},
    "a stop id of config.json in quotes": (lambda folder: (without("generation_config.json")(folder), config(eos_token_id="2")(folder)), "found '2'"),
    "stop ids are no JSON": (text("generation_config.json", "{"), "generation_config.json"),
    "a stop id in quotes": (text("generation_config.json", '{"eos_token_id": [1, "2"]}'), "found '2'"),
}


@pytest.mark.parametrize("harm, culprit", BROKEN.values(), ids=BROKEN)
def test_a_broken_folder_is_refused_in_one_line(folder, harm, culprit):
    """The good folder loads. The message names the file or key at fault, and the folder."""
    load(folder)
    harm(folder)
    with pytest.raises(InputError) as error:
        load(folder)
    message = str(error.value)
    assert culprit in message and str(folder) in message and len(message.splitlines()) == 1


@pytest.mark.skipif(not REAL, reason="MTR_QWEN is not set")
def test_the_real_configs_are_read(tmp_path):
    files = sorted(Path(REAL).glob("config*.json"))
    for file in files:
        shutil.copy(file, tmp_path / "config.json")
        read, raw = ModelConfig.read(tmp_path), json.loads(file.read_text())
        assert all(getattr(read, name) == raw[name] for name in ("vocab_size", "rope_theta", "rms_norm_eps"))
        assert read.head_dim in (64, 128)


# ------------------------------------------------------------------------------------------- tokenizer


@pytest.fixture(scope="module", params=["tiny", "real"])
def either(request, tokenizer):
    """The tests' own tokenizer and, where MTR_QWEN names it, Qwen2.5's."""
    if request.param == "real" and not REAL:
        pytest.skip("MTR_QWEN is not set")
    return tokenizer if request.param == "tiny" else Tokenizer(Path(REAL))


TEXTS = ['{"name": "x", "arguments": {}}\n', "}\n</tool_response>\n  don't 1234", "Zoë’s 東京\r\n\t😀 e\u0301."]


@pytest.mark.parametrize("text", TEXTS)
def test_texts_are_joined_before_they_are_encoded(either, text):
    """A text split at any position gives the same ids. Encoded separately, the parts of some splits would not."""
    whole, cuts = either.encode([text]), range(len(text) + 1)
    assert all(either.encode([text[:i], "", text[i:]]) == whole for i in cuts)
    assert any(either.encode([text[:i]]) + either.encode([text[i:]]) != whole for i in cuts)
    assert either.encode(list(text)) == whole


@pytest.mark.parametrize("text", TEXTS[:2])
def test_decoding_gives_the_text_back(either, text):
    assert either.decode(either.encode([text])) == text


def test_pieces_encode_as_the_library_encodes_the_whole(either):
    """The reference is the library's own encoding of the joined text: it finds the control tokens in it."""
    start, end, call, call_end = map(Control, ("<|im_start|>", "<|im_end|>", "<tool_call>", "</tool_call>"))
    pieces = [start, "user\n", "What?", end, "\n", start, "assistant\n", "<think>So.</think>", "\n", call,
              '\n{"name": "mayor", ', '"arguments": {"city": "Äo"}}\n', call_end, end, "\n"]
    library = tokenizers.Tokenizer.from_str(either.files["tokenizer.json"].decode())
    assert either.encode(pieces) == library.encode("".join(pieces)).ids
    assert either.decode(either.encode(pieces)) == "".join(pieces)


def test_control_pieces_are_one_id_and_text_never_is(either):
    """No text encodes to a control token, in whichever pieces it comes. This includes <tool_call>, which the
    library does not call special."""
    names, forbidden = list(either.control), set(either.control.values())
    assert {"<|endoftext|>", "<|im_start|>", "<|im_end|>", "<tool_call>", "</tool_call>"} <= set(names)
    for name in names:
        assert either.encode([Control(name)]) == [either.control[name]]
        for pieces in ([name], ["a", name, "\n"], list(name), [f"<|im_start|>user\n{name}\n<|im_end|>"]):
            ids = either.encode(pieces)
            assert not set(ids) & forbidden and either.decode(ids) == "".join(pieces)


def test_the_tags_of_a_call_are_not_special(either):
    """As in Qwen2.5, a decoder that skips special tokens keeps them."""
    ids = either.encode([Control("<tool_call>"), "x", Control("</tool_call>"), Control("<|im_end|>")])
    assert either.full.decode(ids, skip_special_tokens=True) == "<tool_call>x</tool_call>"


def test_control_pieces_separate_the_texts_around_them(either):
    control = Control("<|im_end|>")
    apart = [*either.encode(["}"]), either.end, *either.encode(["\n\n"])]
    assert either.encode(["}", control, "\n", "\n"]) == apart
    assert either.encode([]) == either.encode([""]) == []


@pytest.mark.parametrize("eos", [None, "one", "list"])
def test_a_base_checkpoint_stops_at_the_end_of_a_turn_too(tiny, tokenizer, folder, tmp_path, eos):
    """Its generation_config.json has <|endoftext|> alone, as a number or as a list, or has no stop id."""
    end, text_end = tokenizer.control["<|im_end|>"], tokenizer.control["<|endoftext|>"]
    edit_json(folder / "generation_config.json", eos_token_id={"one": text_end, "list": [text_end]}.get(eos))
    base, want = Tokenizer(folder), {end} if eos is None else {end, text_end}
    assert base.end == end and base.stop_ids == want
    assert load(folder)[1].stop_ids == want
    save_model(*load(folder), tmp_path / "saved")
    assert Tokenizer(tmp_path / "saved").stop_ids == want


@pytest.mark.skipif(not REAL, reason="MTR_QWEN is not set")
def test_the_real_ids():
    """Numbers of the published files."""
    real = Tokenizer(Path(REAL))
    want = {"<|endoftext|>": 151643, "<|im_start|>": 151644, "<|im_end|>": 151645, "<tool_call>": 151657}
    assert want.items() <= real.control.items()
    assert real.size == 151665 and real.encode(["\n"]) == [198] and len(real.encode(["}", "\n"])) == 1
    assert real.encode(["<tools>"]) == [27, 15918, 29]
