"""advantages, token_weights and clipped_loss against grpo.py, on 200 random batches each."""
import math
import random

import pytest
import torch

import grpo
from grpo import GRPOConfig

KINDS = ["spread", "spread", "two values", "nearly flat", "flat", "nan", "all nan"]


def random_rewards(rng):
    """Rewards and group numbers of up to five groups. Some are flat, some rewards are NaN."""
    rewards, groups = [], []
    for number in range(rng.randint(1, 5)):
        kind = rng.choice(KINDS)
        size = rng.randint(1, 8)
        base = rng.random()
        own = {"spread": [rng.random() for _ in range(size)], "flat": [base] * size,
               "two values": [rng.choice([0.3, 1.0]) for _ in range(size)],
               "nearly flat": [base + 1e-5 * rng.random() for _ in range(size)],
               "nan": [rng.choice([math.nan, base, rng.random()]) for _ in range(size)],
               "all nan": [math.nan] * size}[kind]
        rewards += own
        groups += [number] * size
    order = rng.sample(range(len(rewards)), len(rewards))
    return [rewards[i] for i in order], [groups[i] for i in order]


@pytest.mark.parametrize("scale_std", [False, True])
def test_advantages(exercise, scale_std):
    rng = random.Random(f"advantages {scale_std}")
    for _ in range(200):
        rewards, groups = random_rewards(rng)
        tensor = torch.tensor(rewards, dtype=torch.float64)
        want = grpo.advantages(tensor, torch.tensor(groups), scale_std).tolist()
        got = exercise.advantages(rewards, groups, scale_std)
        assert got == pytest.approx(want, rel=1e-6, abs=1e-9)
        assert [a == 0 for a in got] == [a == 0 for a in want]  # flat: exactly 0


@pytest.mark.parametrize("loss", grpo.LOSSES)
def test_token_weights(exercise, loss):
    rng = random.Random(f"weights {loss}")
    for _ in range(200):
        lengths = [rng.choice([0, 1, rng.randint(2, 300)]) for _ in range(rng.randint(1, 9))]
        most = rng.randint(300, 900)
        want = grpo.token_weights(torch.tensor(lengths), loss, most).tolist()
        assert exercise.token_weights(lengths, loss, most) == pytest.approx(want, rel=1e-5)


def random_batch(rng, loss):
    """logprobs, old, advantage, mask, weight. About half of the ratios are outside of the clip."""
    B, T = rng.randint(1, 6), rng.randint(1, 12)
    spread = 1e-3 if loss == "gspo" else 0.4
    old = [[-3 * rng.random() for _ in range(T)] for _ in range(B)]
    logprobs = [[value + rng.uniform(-spread, spread) for value in row] for row in old]
    advantage = [rng.choice([0.0, rng.gauss(0, 1), rng.gauss(0, 1)]) for _ in range(B)]
    share = rng.choice([0.0, 0.5, 0.9])
    mask = [[int(rng.random() < share) for _ in range(T)] for _ in range(B)]
    return logprobs, old, advantage, mask, [rng.random() for _ in range(B)]


@pytest.mark.parametrize("loss", grpo.LOSSES)
def test_clipped_loss(exercise, loss):
    rng = random.Random(f"loss {loss}")
    for _ in range(200):
        batch = random_batch(rng, loss)
        logprobs, old, advantage, mask, weight = (torch.tensor(part, dtype=torch.float64)
                                                  for part in batch)
        want, _ = grpo.policy_loss(logprobs, old, None, advantage, mask.bool(), weight,
                                   GRPOConfig(loss=loss))
        got = exercise.clipped_loss(*batch, loss)
        assert got == pytest.approx(want.item(), rel=1e-9, abs=1e-12)
