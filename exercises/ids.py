"""Chapter 4: ids that change when they are read again, and a mask that counts too much."""
from torch import Tensor

from agents import Trace
from data.tokenizer import Tokenizer
from model import Transformer


def first_difference(tokenizer: Tokenizer, ids: list[int]) -> int | None:
    """The first position at which ids and the ids of their text differ. None if they are equal.

    tokenizer.decode(ids) is the text, and tokenizer.full.encode(text).ids are its ids; `full` also
    reads control tokens. If one list is the beginning of the other, they differ at its end.
    """
    raise NotImplementedError


def unmask_observations(trace: Trace) -> list[int]:
    """The mask with everything after the prompt counted: own tokens, and what the agent receives.

    The prompt is everything before the first own token (trace.mask is 1). The trace isn't changed.
    If it has no own token, the mask stays as it is.
    """
    raise NotImplementedError


def gradient_per_token(model: Transformer, ids: list[int], mask: list[int]) -> Tensor:
    """For each token t, the norm of d loss / d state[t - 1], (T,). The first is 0.

    loss = - sum of log p(ids[t] | ids[:t]) over all t with mask[t] = 1 (no padding, no mean).
    model(ids) gives the states: ids (B, T) -> (B, T, D). The state at t - 1 predicts the token at
    t, and model.head(state) gives its logits. Make the states a leaf of the graph (detach them and
    require a gradient), so that no weight of the model is needed.
    """
    raise NotImplementedError
