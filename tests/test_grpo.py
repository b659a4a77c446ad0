"""Stage 2's arithmetic: advantages, weights, clip, KL, and one whole update of a tiny model.

Numbers are worked out by hand or by a slow reference in plain Python floats. All of it is in float64, except
where a test says float32."""
import copy
import math
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import grpo
from agents import Call, Trace, Turn
from data import InputError
from grpo import GRPOConfig, advantages, policy_loss, token_weights, update
from model import ModelConfig, Sampler, Transformer
from run import command_line
from sft import SFTConfig, make_optimizer, pad

LOSSES = ("grpo", "dapo", "dr_grpo", "gspo")
VOCAB = 40


@pytest.fixture(autouse=True)
def double_precision():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture
def single_precision(double_precision, monkeypatch):
    """float32 throughout: the trainer must not go to bfloat16 on a processor that has it."""
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    torch.set_default_dtype(torch.float32)


def config(loss="grpo", **more):
    own = {"clip_low": 0.2, "clip_high": 0.28, "scale_std": True, "mask_overlong": False}  # the same for all losses
    return GRPOConfig(loss=loss, **{"clip_norm": 1e9, "trace_tokens": 10, **own, **more})


def tensor(rows):
    return torch.tensor(rows, dtype=torch.float64)


def loss_and_gradient(logprobs, old, reference, advantage, mask, weights, cfg):
    logprobs = logprobs.detach().clone().requires_grad_()
    loss, stats = policy_loss(logprobs, old, reference, advantage, mask, weights, cfg)
    loss.backward()
    return loss.item(), logprobs.grad, {name: float(value) for name, value in stats.items()}


# ------------------------------------------------------------------------------------------ advantages


def test_advantages_by_hand():
    """Mean 0.5; deviations 0.5, -0.5, 0.25, -0.25; population variance (0.25 + 0.0625) / 2 = 0.15625."""
    rewards, groups = tensor([1.0, 0.0, 0.75, 0.25]), torch.zeros(4, dtype=torch.long)
    plain = [0.5, -0.5, 0.25, -0.25]
    assert advantages(rewards, groups, False).tolist() == plain
    scaled = advantages(rewards, groups, True)
    assert scaled.tolist() == pytest.approx([a / (0.3952847075210474 + 1e-4) for a in plain], rel=1e-12)
    assert scaled.dtype == torch.float64


@pytest.mark.parametrize("scale_std", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("n", [6, 7, 12])
@pytest.mark.parametrize("value", [0.3, 0.35, 0.1])
def test_flat_group_is_exactly_zero(value, n, dtype, scale_std):
    rewards = torch.full((n,), value, dtype=dtype)
    assert advantages(rewards, torch.zeros(n, dtype=torch.long), scale_std).tolist() == [0.0] * n


@pytest.mark.parametrize("scale_std", [True, False])
def test_a_group_of_one_is_zero(scale_std):
    assert advantages(tensor([0.9, 1.0, 0.0]), torch.tensor([4, 2, 2]), scale_std)[0] == 0


@pytest.mark.parametrize("rewards, expected", [
    ([1.0, math.nan, 0.0], [0.5, 0.0, -0.5]),
    ([1.0, math.nan, math.nan], [0.0, 0.0, 0.0]),
    ([math.nan] * 3, [0.0, 0.0, 0.0]),
])
def test_a_nan_reward_has_no_part(rewards, expected):
    groups = torch.zeros(3, dtype=torch.long)
    assert advantages(tensor(rewards), groups, False).tolist() == expected
    std = 0.5 + 1e-4
    scaled = advantages(tensor(rewards), groups, True).tolist()
    assert scaled == pytest.approx([a / std for a in expected], rel=1e-12)


def test_groups_may_be_interleaved():
    rewards, groups = tensor([1.0, 0.2, 0.0, 0.4, 0.5, 0.9]), torch.tensor([7, 3, 7, 3, 7, 3])
    plain = advantages(rewards, groups, False)
    assert plain.tolist() == pytest.approx([0.5, -0.3, -0.5, -0.1, 0.0, 0.4])
    scaled = advantages(rewards, groups, True)
    assert all(float(scaled[groups == g].sum()) == pytest.approx(0, abs=1e-12) for g in (3, 7))
    assert not torch.equal(scaled, advantages(rewards, torch.zeros(6, dtype=torch.long), True))


def test_a_question_asked_twice_is_two_groups():
    """Equal questions, one group right half of the time, the other once: each has its own mean."""
    rewards = tensor([1.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0, 1.0])
    a = advantages(rewards, torch.arange(2).repeat_interleave(4), False)
    assert a.tolist() == [0.5, -0.5, 0.5, -0.5, -0.25, -0.25, -0.25, 0.75]


# --------------------------------------------------------------------------------- weights of two rows

# Two rows, 2 and 6 tokens that were sampled; the holes are observations. The ratios of the first row are 1.1
# and 0.9, of the second 1.5, 1.2, 1, 1, 0.9, 0.5; the advantages are 1 and -0.5. With bounds of 0.8 and 1.28,
# min(r A, clip(r) A) is
#   1.1, 0.9                                   sum  2.0
#   -0.75, -0.6, -0.5, -0.5, -0.45, -0.4       sum -3.2 (the ratio 0.5 is clipped)
MASK = torch.tensor([[0, 1, 1, 0, 0, 0, 0, 0, 0], [0, 1, 1, 0, 1, 1, 0, 1, 1]], dtype=torch.bool)
RATIOS = tensor([[9, 1.1, 0.9, 9, 9, 9, 9, 9, 9], [9, 1.5, 1.2, 9, 1, 1, 9, 0.9, 0.5]])
TWO = tensor([1.0, -0.5])
EXPECTED = {
    "grpo": -(2.0 / 2 - 3.2 / 6) / 2,                        # mean of the rows' means
    "dapo": -(2.0 - 3.2) / 8,                                # mean of all tokens
    "dr_grpo": -(2.0 - 3.2) / (2 * 10),                      # 10: the longest trace there may be
    "gspo": -(0.99 ** (1 / 2) - 0.5 * 0.81 ** (1 / 6)) / 2,  # 1.1 · 0.9; 1.5 · 1.2 · 0.9 · 0.5
}


@pytest.mark.parametrize("loss, first, second, total", [
    ("grpo", 1 / 4, 1 / 12, 1), ("gspo", 1 / 4, 1 / 12, 1), ("dapo", 1 / 8, 1 / 8, 1),
    ("dr_grpo", 1 / 20, 1 / 20, 0.4)])
def test_weights_of_two_rows(loss, first, second, total):
    weights = token_weights(MASK, loss, 10)
    assert weights[0][MASK[0]].tolist() == pytest.approx([first] * 2, rel=1e-12)
    assert weights[1][MASK[1]].tolist() == pytest.approx([second] * 6, rel=1e-12)
    assert weights[~MASK].tolist() == [0.0] * 10
    assert float(weights.sum()) == pytest.approx(total, rel=1e-12)


@pytest.mark.parametrize("loss", LOSSES)
def test_loss_of_two_rows(loss):
    old = torch.full((2, 9), -1.0)
    value, gradient, stats = loss_and_gradient(old + RATIOS.log(), old, None, TWO, MASK,
                                               token_weights(MASK, loss, 10), config(loss))
    assert value == pytest.approx(EXPECTED[loss], rel=1e-12)
    assert (gradient[~MASK] == 0).all()
    assert stats == {"kl": 0, "clip_low": 0 if loss == "gspo" else 1, "clip_high": 0}


def test_the_first_update_of_two_rows():
    """All ratios 1: rows of 2 and 6 tokens, advantages 1 and -0.5."""
    old = torch.full((2, 9), -1.0)
    mean = -(1 - 0.5) / 2
    expected = {"grpo": mean, "dapo": -(2 - 3) / 8, "dr_grpo": -(2 - 3) / 20, "gspo": mean}
    for loss in LOSSES:
        weights = token_weights(MASK, loss, 10)
        value, _, _ = loss_and_gradient(old, old, None, TWO, MASK, weights, config(loss))
        assert value == pytest.approx(expected[loss], rel=1e-12), loss


@pytest.mark.parametrize("loss", LOSSES)
def test_a_row_without_a_token_weighs_nothing(loss):
    weights = token_weights(torch.tensor([[False, False], [False, True]]), loss, 10)
    assert weights[0].tolist() == [0.0, 0.0] and bool(weights.isfinite().all()) and weights[1, 1] > 0


# ---------------------------------------------------------------------------------------------- clip

# ratio, advantage -> what the token adds to J, and the gradient of that with respect to its log-probability.
# Bounds 0.8 and 1.28: 0.75 and 1.25 lie on the two sides of symmetrical bounds of 0.2.
CLIP = [
    (0.7, 1, 0.7, 0.7), (0.79, 1, 0.79, 0.79), (0.81, 1, 0.81, 0.81), (1.0, 1, 1.0, 1.0),
    (1.25, 1, 1.25, 1.25), (1.27, 1, 1.27, 1.27), (1.29, 1, 1.28, 0.0), (1.4, 1, 1.28, 0.0),
    (0.7, -1, -0.8, 0.0), (0.79, -1, -0.8, 0.0), (0.81, -1, -0.81, -0.81), (1.0, -1, -1.0, -1.0),
    (1.25, -1, -1.25, -1.25), (1.27, -1, -1.27, -1.27), (1.29, -1, -1.29, -1.29), (1.4, -1, -1.4, -1.4),
]


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("ratio, sign, value, gradient", CLIP)
def test_clip(ratio, sign, value, gradient, loss):
    """Both signs of the advantage on both sides of both bounds; the advantage is 2, the weight 0.25."""
    old, mask = tensor([[-3.0]]), torch.tensor([[True]])
    got, slope, stats = loss_and_gradient(old + math.log(ratio), old, None, tensor([2.0 * sign]), mask,
                                          tensor([[0.25]]), config(loss))
    assert got == pytest.approx(-0.5 * value, rel=1e-12)
    assert slope.item() == pytest.approx(-0.5 * gradient, rel=1e-12)
    assert stats["clip_low"] == (ratio < 0.8 and sign < 0)
    assert stats["clip_high"] == (ratio > 1.28 and sign > 0)


@pytest.mark.parametrize("loss", LOSSES)
def test_each_bound_has_a_switch_of_its_own(loss):
    old, mask, one = tensor([[-3.0]]), torch.tensor([[True]]), tensor([[1.0]])
    for low, high, ratio, sign, alive in ((0.2, 0.28, 1.25, 1, True), (0.2, 0.2, 1.25, 1, False),
                                          (0.28, 0.2, 0.75, -1, True), (0.2, 0.2, 0.75, -1, False)):
        _, slope, _ = loss_and_gradient(old + math.log(ratio), old, None, tensor([float(sign)]), mask, one,
                                        config(loss, clip_low=low, clip_high=high))
        assert (slope.item() != 0) == alive


def test_gspo_clips_the_whole_row():
    """Geometric mean of 1.6 and 1.2 is 1.386: both tokens lose their gradient; 1.2 alone would keep it."""
    mask = torch.ones(1, 2, dtype=torch.bool)
    old, moved = torch.full((1, 2), -2.0), torch.full((1, 2), -2.0) + tensor([[1.6, 1.2]]).log()
    weights = token_weights(mask, "gspo", 10)
    _, sequence, stats = loss_and_gradient(moved, old, None, tensor([1.0]), mask, weights, config("gspo"))
    _, token, _ = loss_and_gradient(moved, old, None, tensor([1.0]), mask, weights, config("grpo"))
    assert sequence.tolist() == [[0.0, 0.0]] and stats["clip_high"] == 2
    assert token[0, 0] == 0 and token[0, 1].item() == pytest.approx(-0.5 * 1.2, rel=1e-12)


@pytest.mark.parametrize("loss", LOSSES)
def test_what_stands_where_the_mask_is_zero_has_no_part(loss):
    """Numbers at masked positions, even such as overflow, change neither loss nor gradient nor statistics."""
    g = torch.Generator().manual_seed(1)
    old, reference = -torch.rand(2, 9, generator=g), -torch.rand(2, 9, generator=g)
    logprobs, weights, cfg = old + RATIOS.log(), token_weights(MASK, loss, 10), config(loss, beta=0.1)
    clean = loss_and_gradient(logprobs * MASK, old * MASK, reference * MASK, TWO, MASK, weights, cfg)
    dirty = loss_and_gradient(torch.where(MASK, logprobs, 1e4), torch.where(MASK, old, -1e4),
                              torch.where(MASK, reference, 3e4), TWO, MASK, weights, cfg)
    assert clean[0] == dirty[0] and torch.equal(clean[1], dirty[1]) and clean[2] == dirty[2]


# -------------------------------------------------------------------------- the four switches, compared


def gradients(logprobs, old, advantage, mask, most=10):
    return {loss: loss_and_gradient(logprobs, old, None, advantage, mask, token_weights(mask, loss, most),
                                    config(loss))[1] for loss in LOSSES}


def ragged(seed, lengths=(2, 6, 3, 5)):
    """old (B, T), advantage (B,), mask (B, T) of rows of these lengths."""
    g = torch.Generator().manual_seed(seed)
    T = max(lengths)
    mask = torch.arange(T) < torch.tensor(lengths)[:, None]
    return -torch.rand(len(lengths), T, generator=g) - 0.1, torch.randn(len(lengths), generator=g), mask


def test_at_the_first_update_the_switches_differ_by_the_normaliser_alone():
    """Ratio 1 everywhere: each row's gradient is -A times a constant of the row. gspo's is grpo's; dapo's row
    i is grpo's times N |o_i| / sum |o|; dr_grpo's is dapo's times one number, sum |o| / (N L)."""
    old, advantage, mask = ragged(0)
    g, lengths = gradients(old, old, advantage, mask), mask.sum(1, keepdim=True)
    assert torch.allclose(g["grpo"], mask * -advantage[:, None] / (4 * lengths), rtol=1e-12)
    assert torch.allclose(g["gspo"], g["grpo"], rtol=1e-12)
    assert torch.allclose(g["dapo"], g["grpo"] * 4 * lengths / 16, rtol=1e-12)
    assert torch.allclose(g["dr_grpo"], g["dapo"] * 16 / (4 * 10), rtol=1e-12)
    assert not torch.allclose(g["dapo"], g["grpo"])


def test_with_rows_of_one_length_the_first_update_has_one_direction():
    old, advantage, mask = ragged(1, lengths=(5, 5, 5))
    g = gradients(old, old, advantage, mask)
    assert torch.allclose(g["dapo"], g["grpo"], rtol=1e-12)
    assert torch.allclose(g["gspo"], g["grpo"], rtol=1e-12)
    assert torch.allclose(g["dr_grpo"], g["grpo"] * 5 / 10, rtol=1e-12)


def test_once_the_policy_has_moved_gspo_is_of_another_kind():
    """grpo, dapo and dr_grpo still differ by a constant a row (ratio and clip are the same for all three);
    gspo gives all tokens of a row the same gradient, which theirs no longer have."""
    old, advantage, mask = ragged(2)
    moved = old + 0.1 * torch.randn(old.shape, generator=torch.Generator().manual_seed(3))
    g, lengths = gradients(moved, old, advantage, mask), mask.sum(1, keepdim=True)
    assert torch.allclose(g["dapo"], g["grpo"] * 4 * lengths / 16, rtol=1e-12)
    assert torch.allclose(g["dr_grpo"], g["dapo"] * 16 / (4 * 10), rtol=1e-12)
    for row in range(4):
        token, sequence = g["grpo"][row][mask[row]], g["gspo"][row][mask[row]]
        assert torch.allclose(sequence, sequence[:1].expand_as(sequence), rtol=1e-12)
        assert not torch.allclose(token, token[:1].expand_as(token), rtol=1e-3)


# ------------------------------------------------------------------------------------------------ KL


def test_k3_by_hand():
    """The reference finds the token twice as likely: k3 = 2 - log 2 - 1; its slope in log pi is 1 - 2."""
    mask, weights, cfg = torch.tensor([[True]]), tensor([[0.5]]), config(beta=0.1)
    old = tensor([[-2.0]])
    value, slope, stats = loss_and_gradient(old, old, old + math.log(2), tensor([0.0]), mask, weights, cfg)
    assert value == pytest.approx(0.5 * 0.1 * (1 - math.log(2)), rel=1e-12)
    assert slope.item() == pytest.approx(0.5 * 0.1 * (1 - 2), rel=1e-12)
    assert stats["kl"] == pytest.approx(1 - math.log(2), rel=1e-12)


def categorical():
    """Parameters of a policy over 5 tokens, a reference q, and what is made of them."""
    theta = tensor([0.3, -1.0, 0.8, 0.0, -0.4]).requires_grad_()
    log_q = tensor([-0.5, 0.4, 0.9, -1.2, 0.1]).log_softmax(-1)
    return theta, theta.log_softmax(-1), log_q


def expected_k3(log_p, log_q, sampled_from, beta=1.0):
    """E[k3] by enumeration, through the loss: one row a token, weighted by how often it is sampled."""
    mask = torch.ones(5, 1, dtype=torch.bool)
    loss, _ = policy_loss(log_p[:, None], log_p.detach()[:, None], log_q[:, None], torch.zeros(5), mask,
                          sampled_from[:, None], config(beta=beta))
    return loss


def test_expected_k1_and_k3_are_the_kl():
    log_p, log_q = (x.detach() for x in categorical()[1:])
    p = log_p.exp()
    kl = float((p * (log_p - log_q)).sum())
    k1 = sum(float(p[x]) * float(log_p[x] - log_q[x]) for x in range(5))
    assert kl > 0.1 and k1 == pytest.approx(kl, rel=1e-12)
    assert float(expected_k3(log_p, log_q, p)) == pytest.approx(kl, rel=1e-12)


def test_expected_gradient_of_k1_is_zero():
    theta, log_p, log_q = categorical()
    (log_p.detach().exp() * (log_p - log_q)).sum().backward()
    assert theta.grad.abs().max() < 1e-15


def test_the_gradient_of_expected_k3_is_that_of_the_other_kl():
    """Sampled from the policy itself, E[grad k3] = sum p (1 - q/p) grad log p = -sum q grad log p: the
    gradient of KL(reference, policy), p - q in a softmax's parameters, and not of KL(policy, reference)."""
    theta, log_p, log_q = categorical()
    p, q = log_p.detach().exp(), log_q.exp()
    ours, = torch.autograd.grad(expected_k3(log_p, log_q, p), theta, retain_graph=True)
    forward, = torch.autograd.grad((q * (log_q - log_p)).sum(), theta, retain_graph=True)
    reverse, = torch.autograd.grad((log_p.exp() * (log_p - log_q)).sum(), theta)
    assert torch.allclose(ours, p - q, atol=1e-14) and torch.allclose(ours, forward, atol=1e-14)
    assert not torch.allclose(ours, reverse, atol=1e-2)


def test_off_policy_the_gradient_of_k3_is_weighted_by_the_old_policy():
    """Sampled from an older policy o, E_o[grad k3] = sum o (1 - q/p) grad log p: no ratio corrects it."""
    theta, log_p, log_q = categorical()
    o = tensor([0.1, 0.2, 0.3, 0.25, 0.15])
    p, q = log_p.detach().exp(), log_q.exp()
    ours, = torch.autograd.grad(expected_k3(log_p, log_q, o), theta)
    slopes = o * (1 - q / p)                                    # d log p_x / d theta_j = [x = j] - p_j
    assert torch.allclose(ours, slopes - p * slopes.sum(), atol=1e-14)


def test_k3_is_at_least_zero_and_zero_at_equality():
    g = torch.Generator().manual_seed(0)
    logprobs, reference = -5 * torch.rand(300, 1, generator=g), -5 * torch.rand(300, 1, generator=g)
    rest = tensor([0.0]), torch.tensor([[True]]), tensor([[1.0]]), config(beta=1.0)
    for p, q in zip(logprobs[:, None], reference[:, None]):
        value, _, stats = loss_and_gradient(p, p, q, *rest)
        assert value > 0 and stats["kl"] > 0
        value, slope, stats = loss_and_gradient(p, p, p, *rest)
        assert (value, slope.item(), stats["kl"]) == (0, 0, 0)


@pytest.mark.parametrize("loss", LOSSES)
def test_the_kl_is_weighted_like_the_rest_and_not_clipped(loss):
    """Loss with beta minus loss without = beta times the weighted sum of k3, whatever the ratio."""
    old, weights = torch.full((2, 9), -1.0), token_weights(MASK, loss, 10)
    logprobs, reference = old + RATIOS.log(), torch.full((2, 9), -1.3)
    args = (logprobs, old, reference, TWO, MASK, weights)
    gap = reference - logprobs
    more = loss_and_gradient(*args, config(loss, beta=0.2))[0] - loss_and_gradient(*args, config(loss))[0]
    assert more == pytest.approx(0.2 * float((weights * (gap.exp() - gap - 1)).sum()), rel=1e-12)


# ------------------------------------------------------------------------------------ a slow reference


def slow_advantages(rewards, groups, scale_std):
    out = [0.0] * len(rewards)
    for group in set(groups):
        rows = [i for i in range(len(rewards)) if groups[i] == group and not math.isnan(rewards[i])]
        values = [rewards[i] for i in rows]
        if len(set(values)) < 2:
            continue
        mean = math.fsum(values) / len(values)
        std = math.sqrt(math.fsum((v - mean) ** 2 for v in values) / len(values))
        for i in rows:
            out[i] = (rewards[i] - mean) / (std + 1e-4) if scale_std else rewards[i] - mean
    return out


def slow_weight(mask, row, loss, most):
    """Of one token of a row."""
    if loss == "dapo":
        return 1 / max(1, sum(map(sum, mask)))
    if loss == "dr_grpo":
        return 1 / (len(mask) * most)
    return 1 / (len(mask) * max(1, sum(mask[row])))


def slow_loss(batch, loss, low, high, beta, most):
    """-J, its gradient by hand-derived formulas, and the clipped and KL sums, token after token."""
    new, old, reference, mask = batch["new"], batch["old"], batch["reference"], batch["mask"]
    A = slow_advantages(batch["rewards"], batch["groups"], batch["scale_std"])
    total, gradient = 0.0, [[0.0] * len(row) for row in mask]
    stats = {"kl": 0.0, "clip_low": 0, "clip_high": 0}
    for i, row in enumerate(mask):
        tokens = [t for t, m in enumerate(row) if m]
        w = slow_weight(mask, i, loss, most)
        mean = math.fsum(new[i][t] - old[i][t] for t in tokens) / max(1, len(tokens))
        for t in tokens:
            ratio = math.exp(mean if loss == "gspo" else new[i][t] - old[i][t])
            too_low, too_high = ratio < 1 - low and A[i] < 0, ratio > 1 + high and A[i] > 0
            bounded = 1 - low if too_low else 1 + high if too_high else ratio
            k3 = math.exp(reference[i][t] - new[i][t]) - (reference[i][t] - new[i][t]) - 1
            total -= w * (bounded * A[i] - beta * k3)
            # gspo: each of the row's |o| terms has 1 / |o| of its slope at this token: one slope in sum
            gradient[i][t] -= w * (0.0 if too_low or too_high else ratio * A[i])
            gradient[i][t] += w * beta * (1 - math.exp(reference[i][t] - new[i][t]))
            stats["kl"] += k3
            stats["clip_low"] += too_low
            stats["clip_high"] += too_high
    return total, gradient, stats


def random_batch(seed):
    """Ragged rows with holes, groups of any size, some of them flat or of one, some rewards missing."""
    rng = random.Random(f"batch {seed}")
    B, T = rng.randint(3, 8), rng.randint(2, 7)
    old = [[-3 * rng.random() for _ in range(T)] for _ in range(B)]
    spread = rng.choice([0.05, 0.4])
    return {"rewards": [math.nan if rng.random() < 0.06 else rng.choice([0.0, 0.3, 1.0, rng.random()])
                        for _ in range(B)],
            "groups": [rng.randrange(3) for _ in range(B)], "scale_std": rng.random() < 0.5, "old": old,
            "new": [[x + rng.gauss(0, spread) for x in row] for row in old],
            "reference": [[x + rng.gauss(0, 0.5) for x in row] for row in old],
            "mask": [[int(rng.random() < 0.65) for _ in range(T)] for _ in range(B)]}


def fast_loss(batch, loss, cfg):
    """The same by the code under test."""
    A = advantages(tensor(batch["rewards"]), torch.tensor(batch["groups"]), batch["scale_std"])
    mask = torch.tensor(batch["mask"]).bool()
    logprobs = (tensor(batch[name]) for name in ("new", "old", "reference"))
    return loss_and_gradient(*logprobs, A, mask, token_weights(mask, loss, cfg.trace_tokens), cfg)


@pytest.mark.parametrize("loss", LOSSES)
def test_against_the_slow_reference(loss):
    """250 random batches; both bounds are hit many times, and both settings of the std."""
    seen = {"kl": 0.0, "clip_low": 0, "clip_high": 0}
    for seed in range(250):
        batch, beta = random_batch(seed), (seed % 3) * 0.05
        value, gradient, stats = slow_loss(batch, loss, 0.2, 0.28, beta, 10)
        got = fast_loss(batch, loss, config(loss, beta=beta))
        assert got[0] == pytest.approx(value, rel=1e-10, abs=1e-13), seed
        assert torch.allclose(got[1], tensor(gradient), rtol=1e-10, atol=1e-13), seed
        assert got[2] == pytest.approx(stats, rel=1e-10, abs=1e-13), seed
        seen = {name: seen[name] + stats[name] for name in seen}
    assert seen["clip_low"] > 20 and seen["clip_high"] > 20


@pytest.mark.parametrize("loss", LOSSES)
def test_the_slow_gradient_is_the_slope_of_the_slow_loss(loss):
    """The formulas of the reference against central differences of its value."""
    for seed in range(6):
        batch, step = random_batch(seed), 1e-6
        gradient = slow_loss(batch, loss, 0.2, 0.28, 0.05, 10)[1]
        for i, row in enumerate(batch["new"]):
            for t, x in enumerate(row):
                row[t] = x + step
                above = slow_loss(batch, loss, 0.2, 0.28, 0.05, 10)[0]
                row[t] = x - step
                below = slow_loss(batch, loss, 0.2, 0.28, 0.05, 10)[0]
                row[t] = x
                assert (above - below) / (2 * step) == pytest.approx(gradient[i][t], abs=1e-8)


# --------------------------------------------------------------------------------- cuts, on tensors


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("cuts", [1, 2, 4])
def test_cutting_a_step_changes_nothing(cuts, loss):
    """Slices of unequal size, each as wide as its longest row, in any order of the rows."""
    for seed in range(10):
        lengths = [2, 9, 4, 7, 1, 3, 8, 5]
        old, advantage, mask = ragged(seed, lengths)
        g = torch.Generator().manual_seed(seed)
        new, reference = (old + 0.3 * torch.randn(old.shape, generator=g) for _ in range(2))
        weights, cfg = token_weights(mask, loss, 10), config(loss, beta=0.03)
        whole = loss_and_gradient(new, old, reference, advantage, mask, weights, cfg)
        order, total, gradient = torch.randperm(8, generator=g), 0.0, torch.zeros_like(old)
        edges = {1: [0, 8], 2: [0, 3, 8], 4: [0, 1, 3, 4, 8]}[cuts]
        for rows in (order[a:b] for a, b in zip(edges, edges[1:])):
            T = int(mask[rows].sum(1).max())
            value, part, _ = loss_and_gradient(*(x[rows, :T] for x in (new, old, reference)), advantage[rows],
                                               mask[rows, :T], weights[rows, :T], cfg)
            total += value
            gradient[rows, :T] = part
        assert total == pytest.approx(whole[0], rel=1e-12, abs=1e-15)
        assert torch.allclose(gradient, whole[1], rtol=1e-12)


# -------------------------------------------------------------------------------------- a tiny model


def tiny_model(seed=0, sharp=1.0):
    """Two layers, random weights, of the default dtype; `sharp` makes its predictions more certain."""
    model = Transformer(ModelConfig(VOCAB, 16, 32, 2, 4, 2, 256, 1e-6, 1e4, True)).init_weights(seed)
    model.model["embed_tokens"].weight.data *= sharp
    return model


def made_trace(rng, length, status="answered"):
    """A trace of `length` tokens by hand: a prompt, a turn, an observation, a turn."""
    prompt, heard = 2 + length % 3, 1 + length % 2
    said = length - prompt - heard
    first = max(1, said // 2)
    trace = Trace(status=status)
    for part, speaks in ((prompt, False), (first, True), (heard, False), (said - first, True)):
        ids = [rng.randrange(VOCAB) for _ in range(part)]
        trace.say(ids) if speaks else trace.hear(ids)
    assert len(trace.ids) == length and sum(trace.mask) == said
    return trace


LENGTHS = [20, 8, 14, 10, 18, 6, 12, 16]


def made_traces(seed=0, status="answered"):
    rng = random.Random(f"traces {seed}")
    return [made_trace(rng, length, status) for length in LENGTHS]


ADVANTAGE = [1.2, -0.7, 0.4, -1.1, 0.9, -0.3, 0.5, -0.9]


def flat(parameters):
    return torch.cat([p.detach().flatten().double() for p in parameters])


def descent(model):
    """Plain gradient descent; update() sets its rate."""
    return torch.optim.SGD(model.parameters())


def gradient_of_update(model, traces, advantage, cfg, reference=None, lr=1.0):
    """What update() takes from a copy of the model by gradient descent at rate 1: the gradient itself."""
    moved = copy.deepcopy(model)
    log = update(moved, reference, descent(moved), traces, tensor(advantage), cfg, lr)
    return flat(model.parameters()) - flat(moved.parameters()), log


def gradient_row_by_row(model, traces, advantage, loss, most, temperature=1.0):
    """The gradient of the first update, of -sum w A log pi, trace after trace: no batch, no padding."""
    total, N, tokens = 0.0, len(traces), sum(sum(t.mask) for t in traces)
    for trace, a in zip(traces, advantage):
        logprobs = (model.head(model(torch.tensor([trace.ids])))[0] / temperature).log_softmax(-1)
        w = {"dapo": 1 / tokens, "dr_grpo": 1 / (N * most)}.get(loss, 1 / (N * sum(trace.mask)))
        total -= w * a * sum(logprobs[i - 1, trace.ids[i]] for i in range(1, len(trace.ids)) if trace.mask[i])
    return flat(torch.autograd.grad(total, list(model.parameters())))


def spy(monkeypatch):
    """A list that fills with (log-probabilities, old ones, mask) of each call of the loss."""
    seen, real = [], grpo.policy_loss

    def watched(logprobs, old, reference, advantage, mask, *rest):
        seen.append((logprobs.detach().clone(), old.detach().clone(), mask.clone()))
        return real(logprobs, old, reference, advantage, mask, *rest)

    monkeypatch.setattr(grpo, "policy_loss", watched)
    return seen


@pytest.mark.parametrize("micro_tokens, parts", [(160, 1), (80, 2), (40, 4)])
@pytest.mark.parametrize("loss", LOSSES)
def test_update_is_the_same_however_it_is_cut(loss, micro_tokens, parts, monkeypatch):
    seen, model, traces = spy(monkeypatch), tiny_model(), made_traces()
    want = gradient_row_by_row(model, traces, ADVANTAGE, loss, 30)
    for order in (range(8), random.Random(1).sample(range(8), 8)):
        seen.clear()
        got, log = gradient_of_update(model, [traces[i] for i in order], [ADVANTAGE[i] for i in order],
                                      config(loss, micro_tokens=micro_tokens, trace_tokens=30))
        assert len(seen) == parts and log["updates"] == 1
        assert torch.allclose(got, want, rtol=1e-5, atol=1e-12)
        assert log["grad_norm"] == pytest.approx(float(want.norm()), rel=1e-9)


def test_update_scores_at_the_temperature():
    model, traces = tiny_model(), made_traces()
    got, _ = gradient_of_update(model, traces, ADVANTAGE, config(temperature=0.6))
    want = gradient_row_by_row(model, traces, ADVANTAGE, "grpo", 10, temperature=0.6)
    assert torch.allclose(got, want, rtol=1e-5, atol=1e-12)


def test_step_and_clip_of_the_gradient():
    """A quarter of the learning rate is a quarter of the step; a gradient over clip_norm is cut to it."""
    model, traces = tiny_model(), made_traces()
    whole, log = gradient_of_update(model, traces, ADVANTAGE, config())
    part, _ = gradient_of_update(model, traces, ADVANTAGE, config(), lr=0.25)
    short, log_short = gradient_of_update(model, traces, ADVANTAGE, config(clip_norm=0.01))
    assert torch.allclose(part, 0.25 * whole, rtol=1e-9, atol=1e-15)
    assert torch.allclose(short, whole * 0.01 / whole.norm(), rtol=1e-3, atol=1e-9)
    assert log_short["grad_norm"] == log["grad_norm"] > 0.01


@pytest.mark.parametrize("loss", LOSSES)
def test_flat_groups_count_in_the_normaliser(loss):
    """Traces of advantage 0 bring no gradient, but they are part of the step's N and of its tokens."""
    model, traces = tiny_model(), made_traces()
    advantage = [a if i < 5 else 0.0 for i, a in enumerate(ADVANTAGE)]
    got, log = gradient_of_update(model, traces, advantage, config(loss))
    assert torch.allclose(got, gradient_row_by_row(model, traces, advantage, loss, 10), rtol=1e-5, atol=1e-12)
    assert log["updates"] == 1


@pytest.mark.parametrize("loss", LOSSES)
def test_truncated_traces_leave_loss_and_normaliser(loss):
    """mask_overlong on: as if the truncated traces weren't there. Off: they count like all others."""
    model, traces = tiny_model(), made_traces()
    for i in (1, 4):
        traces[i].status = "truncated"
    rest = [i for i in range(8) if i not in (1, 4)]
    got, _ = gradient_of_update(model, traces, ADVANTAGE, config(loss, mask_overlong=True))
    want = gradient_row_by_row(model, [traces[i] for i in rest], [ADVANTAGE[i] for i in rest], loss, 10)
    assert torch.allclose(got, want, rtol=1e-5, atol=1e-12)
    got, _ = gradient_of_update(model, traces, ADVANTAGE, config(loss))
    assert torch.allclose(got, gradient_row_by_row(model, traces, ADVANTAGE, loss, 10), rtol=1e-5, atol=1e-12)


def state(model, optimizer):
    """All that a step could change."""
    entries = list(optimizer.state_dict()["state"].values())
    numbers = [value for entry in entries for value in entry.values()]
    return [flat(model.parameters()), *(torch.as_tensor(n).clone() for n in numbers)]


@pytest.mark.parametrize("more", [
    {}, {"epochs": 2}, {"minibatches": 2}, {"loss": "dapo"}, {"loss": "dr_grpo"}], ids=str)
@pytest.mark.parametrize("what", ["all truncated", "all truncated, beta", "all flat"])
def test_a_step_with_nothing_to_learn_is_no_step(what, more, single_precision):
    model, reference = tiny_model(), tiny_model(1)
    optimizer = make_optimizer(model, 1e-3, weight_decay=0.1)
    update(model, None, optimizer, made_traces(), tensor(ADVANTAGE), config(), 1e-3)  # now there is momentum
    before = state(model, optimizer)
    assert len(before) > 10
    status, advantage = ("answered", [0.0] * 8) if what == "all flat" else ("truncated", ADVANTAGE)
    cfg = config(mask_overlong=True, beta=0.1 if "beta" in what else 0.0, **more)
    log = update(model, reference, optimizer, made_traces(1, status), tensor(advantage), cfg, 1e-3)
    assert log["updates"] == 0 and log["grad_norm"] == 0
    assert all(torch.equal(a, b) for a, b in zip(before, state(model, optimizer), strict=True))


def test_more_minibatches_than_traces(single_precision):
    """A minibatch without a trace is no step, and no error."""
    model, traces, cfg = tiny_model(), made_traces()[:2], config(minibatches=3)
    log = update(model, None, descent(model), traces, tensor([1.0, -1.0]), cfg, 1.0)
    assert log["updates"] == 2


def test_flat_groups_still_feel_the_kl(single_precision):
    model, traces = tiny_model(), made_traces()
    got, log = gradient_of_update(model, traces, [0.0] * 8, config(beta=0.1), reference=tiny_model(1))
    assert log["updates"] == 1 and log["kl"] > 0 and got.norm() > 0


# ------------------------------------------------------------------------------ the first and the second pass


@pytest.mark.parametrize("epochs", [1, 2])
@pytest.mark.parametrize("loss", LOSSES)
def test_the_first_ratio_is_exactly_one(loss, epochs, single_precision, monkeypatch):
    seen, model, traces = spy(monkeypatch), tiny_model(), made_traces()
    cfg = config(loss, epochs=epochs, micro_tokens=80)
    moved, log = gradient_of_update(model, traces, ADVANTAGE, cfg)
    assert len(seen) == 2 * epochs and log["updates"] == epochs
    for new, old, mask in seen[:2]:
        assert ((new - old).exp() == 1).all() and (new[mask] != 0).all()
    assert float(moved.norm()) > 1e-3
    if epochs == 1:
        assert log["clip_low"] == log["clip_high"] == 0
        assert log["grad_norm"] == pytest.approx(float(moved.norm()), rel=1e-3)
    for (new, old, _), (_, first, _) in zip(seen[2:], seen):
        assert torch.equal(old, first), "the old policy stays that of the first pass"
        assert float((new - old).abs().max()) > 1e-3


def test_minibatches_share_the_traces(single_precision, monkeypatch):
    """Every trace once an epoch; the very first minibatch has ratio 1 up to rounding, the later ones not."""
    seen, model, traces = spy(monkeypatch), tiny_model(), made_traces()
    _, log = gradient_of_update(model, traces, ADVANTAGE, config(minibatches=2, epochs=2))
    assert log["updates"] == 4
    assert [len(new) for new, _, _ in seen] == [4, 4, 4, 4]
    tokens = sum(sum(t.mask) for t in traces)
    assert all(sum(int(mask.sum()) for _, _, mask in part) == tokens for part in (seen[:2], seen[2:]))
    assert float((seen[0][0] - seen[0][1]).abs().max()) < 1e-5
    assert all(float((new - old).abs().max()) > 1e-3 for new, old, _ in seen[1:])


def cosine(a, b):
    return float(a @ b / a.norm() / b.norm())


def test_two_updates_tell_all_four_switches_apart(single_precision):
    """One update: grpo and gspo are the same, dapo and dr_grpo of one direction. Two: no two agree."""
    model, traces = tiny_model(), made_traces()
    pairs = [(a, b) for i, a in enumerate(LOSSES) for b in LOSSES[:i]]
    for epochs in (1, 2):
        g = {loss: gradient_of_update(model, traces, ADVANTAGE, config(loss, epochs=epochs))[0]
             for loss in LOSSES}
        alike = {pair for pair in pairs if cosine(g[pair[0]], g[pair[1]]) > 1 - 1e-9}
        assert alike == ({("gspo", "grpo"), ("dr_grpo", "dapo")} if epochs == 1 else set())
        if epochs == 1:
            assert torch.allclose(g["gspo"], g["grpo"], rtol=1e-4, atol=1e-7)


def test_a_reference_that_is_the_policy_adds_nothing(single_precision):
    model, traces = tiny_model(), made_traces()
    without, _ = gradient_of_update(model, traces, ADVANTAGE, config())
    with_it, log = gradient_of_update(model, traces, ADVANTAGE, config(beta=0.5), reference=model)
    assert log["kl"] == 0 and torch.equal(without, with_it)


def test_the_reference_pulls(single_precision):
    model, traces = tiny_model(), made_traces()
    without, log = gradient_of_update(model, traces, ADVANTAGE, config())  # with none at all: none is needed
    pulled, log_kl = gradient_of_update(model, traces, ADVANTAGE, config(beta=0.5), reference=tiny_model(1))
    assert log["kl"] == 0 and log_kl["kl"] > 0 and not torch.allclose(without, pulled, rtol=1e-2)


def test_the_reference_is_not_trained(single_precision):
    reference, cfg = tiny_model(1), config(beta=0.5, epochs=2)
    before = flat(reference.parameters())
    gradient_of_update(tiny_model(), made_traces(), ADVANTAGE, cfg, reference)
    assert torch.equal(before, flat(reference.parameters()))
    assert all(p.grad is None for p in reference.parameters())


# ---------------------------------------------------------------------------- where gradients may stand


def state_gradients(model, traces, advantage, cfg):
    """(B, T) in order of length: which final states, and so whose logits, a gradient reaches in an update.
    Also how many logits were made at all."""
    states, logits, head = [], [], model.head

    def watched(x):
        logits.append(head(x))
        return logits[-1]

    model.head = watched
    handle = model.register_forward_hook(lambda module, args, out: out.retain_grad() or states.append(out))
    update(model, None, descent(model), traces, tensor(advantage), cfg, 0.0)
    handle.remove()
    del model.head
    assert len(states) == len(logits) == 1
    return states[0].grad.abs().sum(-1), logits[0].shape[:-1].numel()


def supervised(traces):
    """(B, T) in order of length: positions whose logits predict a token that the policy sampled."""
    mask = pad(sorted(traces, key=lambda t: len(t.ids)))[1]
    return torch.cat([mask[:, 1:], torch.zeros(len(mask), 1, dtype=torch.bool)], 1)


@pytest.mark.parametrize("loss", LOSSES)
def test_no_gradient_at_a_logit_that_predicts_what_was_not_sampled(loss):
    model, traces = tiny_model(), made_traces()
    gradient, made = state_gradients(model, traces, ADVANTAGE, config(loss))
    want = supervised(traces)
    assert (gradient[~want] == 0).all() and (gradient[want] > 0).all()
    assert made == -(-int(want.sum()) // 128) * 128  # those and padding


def test_other_observations_leave_the_supervised_positions_alone():
    model, traces = tiny_model(), made_traces()
    others = copy.deepcopy(traces)
    for trace in others:
        first = trace.mask.index(1)
        trace.ids = [i if m or n < first else (i + 7) % VOCAB
                     for n, (i, m) in enumerate(zip(trace.ids, trace.mask))]
    assert all(a.ids != b.ids and a.mask == b.mask for a, b in zip(traces, others))
    one, two = (state_gradients(model, t, ADVANTAGE, config())[0] for t in (traces, others))
    assert torch.equal(one > 0, two > 0) and torch.equal(one > 0, supervised(traces))
    assert not torch.allclose(one, two, rtol=1e-3), "observations are read, if not learned"


def test_a_completion_of_one_token_has_one_gradient():
    trace = Trace(status="answered")
    trace.hear([5, 6, 7, 8, 9])
    trace.say([3])
    gradient, _ = state_gradients(tiny_model(), [trace], [1.0], config())
    assert [i for i, g in enumerate(gradient[0]) if g > 0] == [4]


# ------------------------------------------------------------------------------ sampler and trainer


def roll_out(model, temperature, prompts, copies=1, turns=3, seed=0):
    """Traces of several turns of different lengths through the real sampler, observations between."""
    rng = random.Random(f"observations {seed}")
    sampler = Sampler(model, SimpleNamespace(stop_ids={0}), len(prompts) * copies, 128)
    traces = [Trace(key=(seed, i), status="answered") for i in range(len(prompts) * copies)]
    for i, trace in enumerate(traces):
        trace.hear(prompts[i // copies])
    rows = sampler.open(prompts, copies)
    for turn in range(turns):
        limits = [4 + (3 * i + turn) % 9 for i in range(len(traces))]
        noise = np.stack([trace.noise(max(limits)) for trace in traces])
        said = sampler.sample(rows, limits, noise, temperature)
        for trace, row, (ids, logprobs) in zip(traces, rows, said):
            trace.say(ids, logprobs)
            if turn + 1 < turns:
                heard = [rng.randrange(1, VOCAB) for _ in range(rng.randint(1, 6))]
                trace.hear(heard)
                sampler.append(row, heard)
    return traces


PROMPTS = [[3, 1, 4, 1, 5], [9, 2, 6, 5, 3, 5, 8, 9, 7], [2, 7], [31, 4, 15, 9, 26, 5]]


@pytest.mark.parametrize("temperature", [0.6, 1.0])
def test_sampler_and_trainer_agree(temperature, single_precision):
    """float32: the gap that update() logs is below 1e-4 on every token; at another temperature it isn't."""
    model = tiny_model(sharp=8.0)
    traces = roll_out(model, temperature, PROMPTS, copies=2)
    assert len({len(t.ids) for t in traces}) > 3
    _, log = gradient_of_update(model, traces, ADVANTAGE, config(temperature=temperature, micro_tokens=100))
    assert 0 < log["gap_max"] < 1e-4 and log["gap_mean"] <= log["gap_max"]
    _, log = gradient_of_update(model, traces, ADVANTAGE, config(temperature=0.8, micro_tokens=100))
    assert log["gap_max"] > 0.1 and log["gap_mean"] > 0.01


def test_the_sampler_sees_the_weights_of_the_last_step(single_precision):
    """Greedy output of a sampler that was made before the step = argmax of the trainer's forward after it."""
    model = tiny_model(sharp=4.0)
    sampler = Sampler(model, SimpleNamespace(stop_ids={0}), len(PROMPTS), 64)
    noise = np.zeros((len(PROMPTS), 12), np.float32)

    def greedy():
        sampler.reset()
        return [ids for ids, _ in sampler.sample(sampler.open(PROMPTS), [12] * len(PROMPTS), noise, 0.0)]

    before = greedy()
    update(model, None, descent(model), made_traces(), tensor(ADVANTAGE), config(), 3.0)
    after = greedy()
    assert before != after
    for prompt, said in zip(PROMPTS, after):
        with torch.no_grad():
            best = model.head(model(torch.tensor([prompt + said])))[0].argmax(-1).tolist()
        assert said == best[len(prompt) - 1:-1]


def test_the_traces_of_a_group_are_not_all_equal(single_precision):
    traces = roll_out(tiny_model(), 1.0, PROMPTS[:1], copies=6, turns=1)
    assert len({tuple(t.ids[len(PROMPTS[0]):][:4]) for t in traces}) > 1


# -------------------------------------------------------------------------------------------- config


@pytest.mark.parametrize("name, value", [
    ("steps", 0), ("questions", 0), ("epochs", 0), ("minibatches", 0), ("lr", 0.0), ("lr", math.nan),
    ("clip_norm", 0.0), ("clip_low", 0.0), ("clip_high", -0.1), ("temperature", 0.0), ("max_turns", 0),
    ("turn_tokens", 0), ("trace_tokens", -1), ("eval_every", 0), ("group", 1), ("group", 0),
    ("partial", -0.1), ("partial", 1.1), ("partial", math.nan), ("beta", -0.01), ("beta", math.nan),
    ("w_consistency", 0.0), ("w_consistency", -1.0), ("w_answer", math.nan), ("loss", "ppo"), ("threads", -1),
])
def test_wrong_values_are_refused_by_name(name, value):
    with pytest.raises(InputError, match=name):
        GRPOConfig(**{name: value})


@pytest.mark.parametrize("w_answer, w_consistency, partial, fine", [
    (0.7, 0.3, 0.0, True), (0.25, 0.3, 0.0, True), (0.24, 0.3, 0.0, False), (0.1, 0.9, 0.0, False),
    (0.7, 0.3, 0.65, True), (0.7, 0.3, 0.66, False), (0.7, 0.3, 1.0, False), (-1.0, 0.3, 0.0, False),
])
def test_weights_that_let_a_wrong_answer_win_are_refused(w_answer, w_consistency, partial, fine):
    """Wanted: w_answer (1 - partial) > w_consistency (1 - 1/5)."""
    values = {"w_answer": w_answer, "w_consistency": w_consistency, "partial": partial}
    if fine:
        assert GRPOConfig(**values).w_answer == w_answer
        return
    with pytest.raises(InputError, match="w_answer"):
        GRPOConfig(**values)


@pytest.mark.parametrize("loss, scale_std, low, high, overlong", [
    ("grpo", True, 0.2, 0.2, False), ("dapo", True, 0.2, 0.28, True), ("dr_grpo", False, 0.2, 0.2, False),
    ("gspo", True, 3e-4, 4e-4, False)])
def test_each_loss_brings_its_papers_settings_and_a_flag_wins(loss, scale_std, low, high, overlong):
    c = GRPOConfig(loss=loss)
    assert (c.scale_std, c.clip_low, c.clip_high, c.mask_overlong) == (scale_std, low, high, overlong)
    c = GRPOConfig(loss=loss, scale_std=not scale_std, clip_high=0.5)
    assert (c.scale_std, c.clip_low, c.clip_high) == (not scale_std, low, 0.5)


def test_the_summary_of_a_rollout_by_hand():
    """Two groups of three: the first flat, in the second one trace is at its group's mean; parts are averaged where
    they apply."""
    traces = [Trace(status=s, mask=[0, 1, 1], turns=[Turn(calls=[Call()] * n)])
              for s, n in (("answered", 2), ("answered", 0), ("answered", 1), ("truncated", 3), ("malformed", 0), ("answered", 0))]
    rewards = [{"reward": r, "economy": e} for r, e in zip((1.0, 1.0, 1.0, 0.0, 0.5, 1.0), (0.5, None, None, 1.0, None, None))]
    row = grpo.summary(traces, rewards, tensor([0, 0, 0, -1, 0, 1]), config(group=3))
    assert row == {"reward": 0.75, "economy": 0.75, "finished": 4 / 6, "truncated": 1 / 6, "flat_groups": 0.5,
                   "calls": 1.0, "length": 2.0}


@pytest.mark.parametrize("config_class", [GRPOConfig, SFTConfig])
@pytest.mark.parametrize("flag", ["--top-p", "--top-k", "--repetition-penalty"])
def test_training_samples_from_the_whole_policy(config_class, flag, monkeypatch):
    """No flag restricts sampling to some of the tokens."""
    monkeypatch.setattr("sys.argv", ["program", flag, "0.5"])
    with pytest.raises(InputError, match=f"unknown flag {flag}"):
        command_line(config_class, "")


def test_a_question_that_comes_twice_gets_its_tools_once():
    asked = []
    maker = SimpleNamespace(make=lambda texts, key: asked.extend(texts) or [text.upper() for text in texts])
    stage = SimpleNamespace(boxes={"b": "B"}, config=SimpleNamespace(seed=0), maker=maker)
    grpo.Simulator.make_tools(stage, [SimpleNamespace(id=name, text=name) for name in "abaca"])
    assert asked == ["a", "c"] and stage.boxes == {"a": "A", "b": "B", "c": "C"}
