"""Chapter 6, solved."""
from math import exp, isnan
from statistics import fmean, pstdev

CLIPS = {"grpo": (0.2, 0.2), "dapo": (0.2, 0.28), "dr_grpo": (0.2, 0.2), "gspo": (3e-4, 4e-4)}


def advantages(rewards: list[float], groups: list[int], scale_std: bool) -> list[float]:
    """Rewards minus the mean of their group, perhaps over its standard deviation."""
    out = []
    for reward, group in zip(rewards, groups, strict=True):
        pairs = zip(rewards, groups, strict=True)
        peers = [r for r, g in pairs if g == group and not isnan(r)]
        if isnan(reward) or max(peers) == min(peers):
            out.append(0.0)
        else:
            scale = pstdev(peers) + 1e-4 if scale_std else 1.0
            out.append((reward - fmean(peers)) / scale)
    return out


def token_weights(lengths: list[int], loss: str, most_tokens: int) -> list[float]:
    """The weight w_i of each token of trace i."""
    n = len(lengths)
    if loss == "dapo":
        return [1 / max(1, sum(lengths))] * n
    if loss == "dr_grpo":
        return [1 / (n * most_tokens)] * n
    return [1 / (n * max(1, length)) for length in lengths]


def clipped_loss(logprobs: list[list[float]], old: list[list[float]], advantage: list[float],
                 mask: list[list[int]], weight: list[float], loss: str) -> float:
    """Minus the weighted sum of the clipped terms over the tokens with mask 1."""
    low, high = CLIPS[loss]
    total = 0.0
    for new_row, old_row, A, mask_row, w in zip(logprobs, old, advantage, mask, weight,
                                                strict=True):
        rows = zip(new_row, old_row, mask_row, strict=True)
        logs = [new - before for new, before, own in rows if own]
        if loss == "gspo":
            logs = [fmean(logs)] * len(logs) if logs else []
        for ratio in map(exp, logs):
            total += w * min(ratio * A, min(max(ratio, 1 - low), 1 + high) * A)
    return -total
