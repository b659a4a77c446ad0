"""Chapter 6: GRPO in plain floats and lists, without torch.

A batch has B traces of T tokens. A list of lists [B][T] holds one value per token.
"""

CLIPS = {"grpo": (0.2, 0.2), "dapo": (0.2, 0.28), "dr_grpo": (0.2, 0.2), "gspo": (3e-4, 4e-4)}


def advantages(rewards: list[float], groups: list[int], scale_std: bool) -> list[float]:
    """The advantage of each trace: its reward minus the mean of its group.

    rewards: [B], groups: [B], the number of each trace's group -> [B]
    scale_std: divide by the group's standard deviation + 1e-4. The squares are divided by the
    number of traces, not by one less.
    A reward that is NaN is left out of mean and standard deviation, and its advantage is 0. In a
    group whose rewards, NaN apart, are all equal, each advantage is exactly 0.
    """
    raise NotImplementedError


def token_weights(lengths: list[int], loss: str, most_tokens: int) -> list[float]:
    """The weight w_i of each token of trace i: the table at the head of grpo.py.

    lengths: [B], the number of sampled tokens of each trace; most_tokens: L_max -> [B]
    A divisor of 0 is replaced by 1: in "grpo" and "gspo" the length, in "dapo" the sum.
    """
    raise NotImplementedError


def clipped_loss(logprobs: list[list[float]], old: list[list[float]], advantage: list[float],
                 mask: list[list[int]], weight: list[float], loss: str) -> float:
    """The loss of diff 5: minus the weighted sum of the clipped terms over the tokens with mask 1.

    logprobs, old and mask: [B][T], advantage and weight: [B] -> a float
    CLIPS[loss] is (eps_low, eps_high). "gspo" has one ratio per trace: exp of the mean log-ratio
    over its tokens with mask 1.
    """
    raise NotImplementedError
