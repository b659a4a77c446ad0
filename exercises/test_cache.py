"""Chapter 3: step by step, a cache gives what a pass over the whole text gives."""
import math
import random
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from model import Attention, ModelConfig, load, rotary_angles, rotate

MODEL = Path(__file__).resolve().parents[1] / "data" / "miniature" / "sft" / "model"


def pieces(total: int, rng: random.Random) -> list[tuple[int, int]]:
    """Cut `total` tokens into passes of 1 to 5 tokens -> (start, end) of each."""
    ends = [0]
    while ends[-1] < total:
        ends.append(min(total, ends[-1] + rng.randint(1, 5)))
    return list(zip(ends, ends[1:], strict=False))


def softmax_attention(q, k, v):
    """One output after the other, in plain loops over heads and tokens."""
    out = torch.zeros_like(q)
    for head in range(q.shape[0]):
        for t in range(q.shape[1]):
            scores = k[head, :t + 1] @ q[head, t] / math.sqrt(q.shape[2])
            out[head, t] = scores.softmax(0) @ v[head, :t + 1]
    return out


@pytest.mark.parametrize("seed", range(8))
def test_every_split_gives_the_full_pass(exercise, seed):
    generator = torch.Generator().manual_seed(seed)
    shape = (1 + seed % 3, 5 + 3 * seed, 4 + 2 * (seed % 4))
    q, k, v = [torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(3)]
    expected = softmax_attention(q, k, v)
    total = shape[1]
    splits = [[(0, total)], [(t, t + 1) for t in range(total)], pieces(total, random.Random(seed))]
    for split in splits:
        cache = exercise.LayerCache()
        found = []
        for start, end in split:
            cache.append(k[:, start:end], v[:, start:end])
            found.append(cache.attend(q[:, start:end]))
        torch.testing.assert_close(torch.cat(found, dim=1), expected)
        torch.testing.assert_close(cache.k, k)
        torch.testing.assert_close(cache.v, v)


def test_two_caches_do_not_share_their_tokens(exercise):
    k, v = torch.randn(2, 1, 3, 4, dtype=torch.float64)
    first, second = exercise.LayerCache(), exercise.LayerCache()
    first.append(k, v)
    second.append(v, k)
    assert torch.equal(first.k, k) and torch.equal(second.k, v)


def cached(layer: Attention, cache, x, cos, sin):
    """Attention.forward for one row, with the cache of the exercise."""
    T = x.shape[1]
    q, k, v = [project(x)[0].view(T, -1, layer.head_dim).transpose(0, 1)  # (heads, T, Dh)
               for project in (layer.q_proj, layer.k_proj, layer.v_proj)]
    q, k = [rotate(part[None], cos, sin)[0] for part in (q, k)]
    copies = layer.heads // layer.kv_heads  # query heads per kv-head
    cache.append(k.repeat_interleave(copies, 0), v.repeat_interleave(copies, 0))
    return layer.o_proj(cache.attend(q).transpose(0, 1).reshape(1, T, -1))


def test_it_is_the_attention_of_the_project(exercise):
    torch.manual_seed(0)
    config = ModelConfig(16, 24, 32, 1, 3, 1, 64, 1e-6, 1e4, True)
    layer = Attention(config, 0).double().requires_grad_(False)
    for weight in layer.parameters():
        weight.normal_(std=0.3)
    x = torch.randn(1, 20, 24, dtype=torch.float64)
    angles = rotary_angles(torch.arange(20)[None], layer.head_dim, 1e4)[:, None].double()
    cos, sin = angles.cos(), angles.sin()
    expected = layer(x, cos, sin, None)
    cache = exercise.LayerCache()
    found = [cached(layer, cache, x[:, a:b], cos[:, :, a:b], sin[:, :, a:b])
             for a, b in pieces(20, random.Random(1))]
    torch.testing.assert_close(torch.cat(found, dim=1), expected)


@torch.no_grad()
def test_the_trained_model_gives_the_same_logits(exercise, monkeypatch):
    """The cache replaces the attention of every layer, and the text comes in pieces."""
    model, tokenizer = load(MODEL)
    ids = torch.tensor([tokenizer.encode(["Who is the mayor of the birthplace of Borox?"] * 2)])
    expected = model.head(model(ids))
    for block in model.model["layers"]:
        layer, cache = block.self_attn, exercise.LayerCache()

        def forward(x, cos, sin, past, layer=layer, cache=cache):
            return cached(layer, cache, x, cos, sin)

        monkeypatch.setattr(layer, "forward", forward)
    found = []
    for start, end in pieces(ids.shape[1], random.Random(2)):
        past = SimpleNamespace(positions=torch.arange(start, end)[None])
        found.append(model.head(model(ids[:, start:end], past)))
    torch.testing.assert_close(torch.cat(found, dim=1), expected, atol=1e-3, rtol=1e-3)
