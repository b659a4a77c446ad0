"""Chapter 3: the KV cache of one row, for one attention layer."""
import math

import torch
from torch import Tensor


class LayerCache:
    """Keys and values of one conversation in one attention layer. At first it is empty.

    Shapes: H heads, T new tokens, S all tokens so far (with the new ones), Dh head size.
    """

    def __init__(self):
        self.k: Tensor | None = None  # (H, S, Dh); None: no token yet
        self.v: Tensor | None = None  # (H, S, Dh)

    def append(self, k: Tensor, v: Tensor) -> None:
        """Add the keys and the values (both (H, T, Dh)) of T new tokens after the old ones."""
        self.k = k if self.k is None else torch.cat([self.k, k], dim=1)
        self.v = v if self.v is None else torch.cat([self.v, v], dim=1)

    def attend(self, q: Tensor) -> Tensor:
        """Causal attention of the last T tokens: queries q (H, T, Dh) -> outputs (H, T, Dh).

        The keys and values of these T tokens are in the cache already. An output is the sum of the
        values with the weights softmax(q · k / sqrt(Dh)). A token sees itself and all before it. It
        doesn't see those after it, which may be among the T.
        """
        T, S = q.shape[1], self.k.shape[1]
        scores = q @ self.k.mT / math.sqrt(q.shape[2])  # (H, T, S)
        future = torch.ones(T, S, dtype=torch.bool).triu(S - T + 1)
        return scores.masked_fill(future, -math.inf).softmax(-1) @ self.v
