"""The machine: a Qwen2.5-style transformer, its KV cache, its sampler and its checkpoints.

This file knows no agents. Parameters have the names of a Qwen2.5 checkpoint, so loading is a strict
copy by name.

Shapes: B batch, T tokens, N scored tokens, S cache slots (keys), D hidden size, H heads,
K kv-heads, Dh head size, V vocabulary.
"""
import json
import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from data import InputError
from data.checkpoint import read_config, weight_files
from data.tokenizer import Tokenizer

# ------------------------------------------------------------------------------------------ config

@dataclass(frozen=True)
class ModelConfig:
    """The hyperparameters in config.json that this file reads, under their Hugging Face names."""
    vocab_size: int              # V: rows of the embedding, at least the number of token ids
    hidden_size: int             # D
    intermediate_size: int       # width inside the SwiGLU
    num_hidden_layers: int
    num_attention_heads: int     # H
    num_key_value_heads: int     # K; H / K query heads share one key head and one value head
    max_position_embeddings: int
    rms_norm_eps: float
    rope_theta: float            # base of the rotary wavelengths
    tie_word_embeddings: bool    # the output head is the transposed embedding

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @staticmethod
    def read(folder: Path) -> "ModelConfig":
        """Read config.json. InputError names what is missing, bad or not supported."""
        return ModelConfig(**read_config(folder, {f.name: f.type for f in fields(ModelConfig)}))


# ------------------------------------------------------------------------------------- transformer


def upcast(x: Tensor) -> Tensor:
    """Convert to float32 or wider. A sum over many small terms loses precision in bfloat16."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class Linear(nn.Linear):
    """nn.Linear without initialisation: init_weights() or a checkpoint sets the weights.

    It may have a low-rank adapter: W + 32/r · B A, with A (r, in) and B (out, r) in float32 (LoRA,
    Hu et al. 2021). A is random and B is 0, so at first the adapter changes nothing.
    """

    def reset_parameters(self) -> None:
        self.A = None
        self.B = None

    def adapt(self, rank: int, generator: torch.Generator) -> None:
        """Add an adapter."""
        self.scale = 32 / rank
        # nn.Linear's own initialisation has the standard deviation 1 / sqrt(3 in).
        a = torch.randn(rank, self.in_features, generator=generator)
        a /= math.sqrt(3 * self.in_features)
        self.A = nn.Parameter(a.to(self.weight.device))
        self.B = nn.Parameter(torch.zeros(self.out_features, rank, device=self.weight.device))

    def forward(self, x: Tensor) -> Tensor:
        out = super().forward(x)
        if self.A is None:
            return out
        low = F.linear(x, self.A.to(x.dtype))  # (..., r)
        return out + F.linear(low, self.B.to(x.dtype)) * self.scale

    def merged(self) -> Tensor:
        """The weight with its adapter added, in the type of the weight."""
        if self.A is None:
            return self.weight
        return (self.weight + self.B @ self.A * self.scale).to(self.weight.dtype)


class RMSNorm(nn.Module):
    """x / sqrt(mean(x²) + eps) · weight, with the mean in float32 (Zhang & Sennrich 2019)."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        x32 = upcast(x)
        x32 = x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * x32.to(x.dtype)


def rotary_angles(positions: Tensor, head_dim: int, theta: float) -> Tensor:
    """positions (B, T) -> position / theta^(2i/Dh), (B, T, Dh/2) (Su et al. 2021, eq. 15)."""
    two_i = torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float32)
    # As in transformers, the power is inverted first, then multiplied by the position. In another
    # order, float32 rounding makes a difference of 2e-3 at position 30,000.
    return positions[..., None].float() * (1 / theta ** (two_i / head_dim))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs (x[i], x[i + Dh/2]); x (B, H, T, Dh), cos and sin (B, 1, T, Dh/2)."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


class Attention(nn.Module):
    """Causal grouped-query attention with biases on q, k and v (Ainslie et al. 2023; Qwen2.5).

    past: where the pass writes into a KV cache, and what it sees there (CachePass). None: no cache.
    """

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.layer = layer
        self.heads = config.num_attention_heads
        self.kv_heads = config.num_key_value_heads
        self.head_dim = config.head_dim
        self.q_proj = Linear(config.hidden_size, self.heads * self.head_dim)
        self.k_proj = Linear(config.hidden_size, self.kv_heads * self.head_dim)
        self.v_proj = Linear(config.hidden_size, self.kv_heads * self.head_dim)
        self.o_proj = Linear(self.heads * self.head_dim, config.hidden_size, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, past: "CachePass | None") -> Tensor:
        B, T, _ = x.shape
        q = self.q_proj(x).view(B, T, self.heads, self.head_dim).transpose(1, 2)  # (B, H, T, Dh)
        k = self.k_proj(x).view(B, T, self.kv_heads, self.head_dim).transpose(1, 2)  # (B, K, T, Dh)
        v = self.v_proj(x).view(B, T, self.kv_heads, self.head_dim).transpose(1, 2)  # (B, K, T, Dh)
        q = rotate(q, cos, sin)
        k = rotate(k, cos, sin)
        if past is None:
            # Rows start at position 0, so padding on the right is never seen by a real token.
            out = self.attend(q, k, v)  # (B, H, T, Dh)
        else:
            # SDPA's is_causal assumes that there is no cache, so `past` brings a mask.
            k, v = past.write(self.layer, k, v)  # (B, K, S, Dh)
            # The H/K query heads of a kv-head become one head with H/K·T queries. So no key is
            # copied, and SDPA's slow kernel for grouped heads is not needed.
            q = q.reshape(B, self.kv_heads, -1, self.head_dim)  # (B, K, H/K·T, Dh)
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=past.mask)
            out = out.reshape(B, self.heads, T, self.head_dim)
        return self.o_proj(out.transpose(1, 2).reshape(B, T, -1))  # (B, T, D)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Causal softmax(q kᵀ / sqrt(Dh)) v; q (B, H, T, Dh), k and v (B, K, T, Dh)."""
        B, H, T, Dh = q.shape
        # On a CPU in bfloat16, the plain formula is faster than the fused kernel, until its scores
        # fill 32 MB or more. The miniature has at most 11 million scores.
        plain = torch.is_autocast_enabled("cpu") and B * H * T * T < 12e6
        if not plain:
            grouped = self.heads != self.kv_heads
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)
        future = torch.full((T, T), -math.inf).triu(1)
        future = future.repeat(H // self.kv_heads, 1)  # (H/K·T, T)
        q = (q * Dh ** -0.5).reshape(B, self.kv_heads, -1, Dh)  # (B, K, H/K·T, Dh)
        scores = q @ k.mT + future  # (B, K, H/K·T, T), float32 because future is
        return (scores.softmax(-1) @ v).view(B, H, T, Dh)


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) · up(x)) (Shazeer 2020)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.gate_proj = Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    """Attention, then MLP. Each reads the normed residual stream and adds its output to it."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, past: "CachePass | None") -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, past)
        return x + self.mlp(self.post_attention_layernorm(x))


class Transformer(nn.Module):
    """Qwen2.5: embedding, blocks, norm. head() is separate, because few positions need logits."""

    def __init__(self, config: ModelConfig, known_ids: int | None = None):
        """known_ids: the tokenizer's number of ids. Embedding rows above it get no logit."""
        super().__init__()
        self.config = config
        self.known_ids = known_ids or config.vocab_size
        self.save_memory = False  # whether activations are computed again in the backward pass
        rows = torch.empty(config.vocab_size, config.hidden_size)  # no initialisation, see Linear
        self.model = nn.ModuleDict({
            "embed_tokens": nn.Embedding.from_pretrained(rows, freeze=False),
            "layers": nn.ModuleList(Block(config, i) for i in range(config.num_hidden_layers)),
            "norm": RMSNorm(config.hidden_size, config.rms_norm_eps),
        })
        if not config.tie_word_embeddings:
            self.untie()

    def untie(self) -> None:
        """Give the output head its own weights. A merged LoRA may store one beside tied embeddings.
        """
        self.config = replace(self.config, tie_word_embeddings=False)
        self.lm_head = Linear(self.config.hidden_size, self.config.vocab_size, bias=False)

    @property
    def device(self) -> torch.device:
        return self.model["norm"].weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.model["norm"].weight.dtype

    def forward(self, ids: Tensor, past: "CachePass | None" = None) -> Tensor:
        """ids (B, T) -> final states (B, T, D). Without a cache, each row starts at position 0 and
        may be padded on the right with any id. With one, the ids continue the rows of the cache.
        """
        if past is None:
            positions = torch.arange(ids.shape[1], device=ids.device)[None]  # (1, T)
        else:
            positions = past.positions  # (B, T)
        angles = rotary_angles(positions, self.config.head_dim, self.config.rope_theta)[:, None]
        cos = angles.cos().to(self.dtype)  # (B, 1, T, Dh/2)
        sin = angles.sin().to(self.dtype)
        x = self.model["embed_tokens"](ids)  # (B, T, D)
        for block in self.model["layers"]:
            if self.save_memory and torch.is_grad_enabled():
                x = checkpoint(block, x, cos, sin, past, use_reentrant=False)
            else:
                x = block(x, cos, sin, past)
        return self.model["norm"](x)

    def head(self, states: Tensor) -> Tensor:
        """states (..., D) -> logits (..., known ids), in float32 or wider."""
        tied = self.config.tie_word_embeddings
        weight = self.model["embed_tokens"].weight if tied else self.lm_head.weight
        return upcast(F.linear(states, weight[:self.known_ids]))

    def init_weights(self, seed: int) -> "Transformer":
        """Set random weights for a small model that is trained from scratch."""
        generator = torch.Generator().manual_seed(seed)
        # Outputs are scaled down, because the residual stream sums two per layer (GPT-2).
        depth = math.sqrt(2 * self.config.num_hidden_layers)
        for name, weight in self.named_parameters():
            if name.endswith("bias"):
                weight.data.zero_()
            elif weight.dim() == 2:
                # 0.08 and 0.6 were found by trial on the miniature.
                std = 0.08 if "embed" in name else 0.6 / math.sqrt(weight.shape[1])
                if name.endswith("down_proj.weight"):
                    std /= depth
                weight.data.copy_(torch.randn(weight.shape, generator=generator) * std)
        # Each head starts as a copying head: o_proj is v_proj transposed and scaled down (Trockman
        # & Kolter 2023). Without it, the model may never learn to copy names that are rare.
        for block in self.model["layers"]:
            a = block.self_attn
            v = a.v_proj.weight.data.view(a.kv_heads, a.head_dim, -1)  # (K, Dh, D)
            v = v.repeat_interleave(a.heads // a.kv_heads, 0)  # (H, Dh, D)
            a.o_proj.weight.data.copy_(v.reshape(-1, v.shape[-1]).T / depth)
        return self


def adapted(base: Transformer, rank: int, seed: int) -> Transformer:
    """A second model that shares the weights of `base`, with adapters on the matrices of its
    blocks. Only the adapters are trained, so `base` stays as it is (LoRA, Hu et al. 2021).
    """
    with torch.device("meta"):
        model = Transformer(base.config, base.known_ids)
    for name, weight in base.requires_grad_(False).named_parameters():
        module, _, parameter = name.rpartition(".")
        setattr(model.get_submodule(module), parameter, weight)
    generator = torch.Generator().manual_seed(seed)
    for layer in model.model["layers"].modules():
        if isinstance(layer, Linear):
            layer.adapt(rank, generator)
    return model.eval()


def pad(rows: list[list], device: str, dtype: torch.dtype | None = None) -> Tensor:
    """Lists -> (B, T), padded on the right with zeros.

    T is a multiple of 32, because oneDNN compiles and keeps kernels for each new shape.
    """
    T = math.ceil(max(map(len, rows)) / 32) * 32
    return torch.tensor([row + [0] * (T - len(row)) for row in rows], device=device, dtype=dtype)


def token_logprobs(model: Transformer, ids: Tensor, mask: Tensor, temperature: float = 1.0
                   ) -> tuple[Tensor, Tensor]:
    """Score tokens: ids (B, T), mask (B, T) bool -> log-probabilities and entropies, both (B, T).

    Where the mask is 1, the id is scored given all ids before it. Elsewhere both results are 0. The
    entropy is that of the distribution of the id; it has no gradient. The softmax is in float32.
    """
    rows, cols = mask.nonzero(as_tuple=True)  # (N,) scored tokens only
    assert bool((cols > 0).all()), "the first token of a row has no context and can't be scored"
    states = model(ids)[rows, cols - 1]  # (N, D)

    def score(states: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        # Pad N to a multiple of 128: on a CPU, oneDNN compiles a kernel for each new shape.
        padded = F.pad(states, (0, 0, 0, -len(states) % 128))
        logits = model.head(padded)[:len(states)] / temperature  # (N, V)
        logprobs = logits.log_softmax(-1)
        with torch.no_grad():
            entropy = -(logprobs.exp() * logprobs).sum(-1)  # (N,)
        return logprobs.gather(1, targets[:, None])[:, 0], entropy  # (N,)

    targets = ids[rows, cols]
    if model.save_memory and len(rows):  # in chunks, because V is large
        chunks = zip(states.split(512), targets.split(512), strict=True)
        parts = [checkpoint(score, *chunk, use_reentrant=False) for chunk in chunks]
        picked, entropy = map(torch.cat, zip(*parts, strict=True))
    else:
        picked, entropy = score(states, targets)
    zeros = torch.zeros(ids.shape, dtype=picked.dtype, device=ids.device)  # (B, T)
    return zeros.index_put((rows, cols), picked), zeros.index_put((rows, cols), entropy)


# ---------------------------------------------------------------------------------------- KV cache


class KVCache:
    """Keys and values of many conversations, one row each. A row holds its tokens in the slots 0 to
    length[row] - 1.

    All positions come from length. There are no holes and no left padding. The memory starts as
    zeros: torch.empty may hold NaN, and a masked NaN still spoils a sum, because 0 · NaN is NaN.
    """

    def __init__(self, model: Transformer, rows: int, slots: int):
        c = model.config
        # On a GPU, keys in multiples of 64 keep SDPA from copying the mask in each layer.
        self.multiple = 64 if model.device.type == "cuda" else 1
        slots += -slots % self.multiple
        shape = (c.num_hidden_layers, rows, c.num_key_value_heads, slots, c.head_dim)
        self.k = torch.zeros(shape, device=model.device, dtype=model.dtype)
        self.v = torch.zeros(shape, device=model.device, dtype=model.dtype)
        self.length = torch.zeros(rows, dtype=torch.long, device=model.device)
        self.groups = c.num_attention_heads // c.num_key_value_heads  # query heads per kv-head
        # longest: an upper bound of length over the rows of the current pass. It is a Python int,
        # because reading length would make the host wait for the device.
        self.longest = 0

    def move(self, source: Tensor, target: Tensor) -> None:
        """Copy row source[i] to row target[i]. move([a, b], [b, a]) swaps the rows a and b."""
        for layer in (*self.k, *self.v):  # one by one: a copy takes memory
            layer[target, :, :self.longest] = layer[source, :, :self.longest]
        self.length[target] = self.length[source]


class CachePass:
    """One forward pass of new tokens for the first B rows of a cache: the slots that the tokens are
    written to, and their attention mask.
    """

    def __init__(self, cache: KVCache, new: Tensor, T: int):
        """new (B,): the number of real tokens in each row. The other columns are padding."""
        B = len(new)
        device = new.device
        columns = torch.arange(T, device=device)
        self.cache = cache
        self.new = new
        self.positions = cache.length[:B, None] + columns  # (B, T)
        # An upper bound of the new lengths: the longest row may not be the row that grows most.
        cache.longest = min(cache.longest + T, cache.k.shape[3])
        keys = torch.arange(cache.longest + -cache.longest % cache.multiple, device=device)
        future = keys > self.positions[:, None, :, None]  # (B, 1, T, S)
        # SDPA would turn a bool mask into a float mask in every layer. The mask is tiled along the
        # queries, because Attention.forward folds H/K query heads into one.
        mask = torch.zeros(future.shape, dtype=cache.k.dtype, device=device)
        self.mask = mask.masked_fill_(future, -math.inf).repeat(1, 1, cache.groups, 1)
        if T > 1:  # (row, column) of each real token
            self.real = (columns < new[:, None]).nonzero(as_tuple=True)
        else:  # all tokens are real, and nonzero() would wait for the device
            self.real = torch.arange(B, device=device), torch.zeros_like(new)
        self.slots = self.positions[self.real]  # the cache slot of each real token

    def write(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Write k, v (B, K, T, Dh) without padding -> all keys and values so far (B, K, S, Dh)."""
        rows, cols = self.real
        B = len(self.positions)
        S = self.mask.shape[-1]
        # Both sides are (real tokens, K, Dh).
        self.cache.k[layer, rows, :, self.slots] = k[rows, :, cols]
        self.cache.v[layer, rows, :, self.slots] = v[rows, :, cols]
        return self.cache.k[layer, :B, :, :S], self.cache.v[layer, :B, :, :S]

    def close(self) -> None:
        """Advance the row lengths, after all layers have written."""
        self.cache.length[:len(self.new)] += self.new


# ----------------------------------------------------------------------------------------- sampler


def draw(logits: Tensor, uniform: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Sample ids (B,) and their log-probabilities (B,) from logits (B, V), uniform (B,) in [0, 1).

    The id is the inverse of the CDF at the uniform number. The number comes from outside, so the
    result does not depend on the rest of the batch. Temperature 0 takes the largest logit and
    scores it at temperature 1.
    """
    logprobs = (logits / (temperature or 1.0)).log_softmax(-1)
    if temperature == 0:
        ids = logits.argmax(-1)
    else:
        cdf = logprobs.exp().cumsum(-1)
        point = uniform.to(cdf.dtype) * cdf[:, -1]  # the last sum is 1 only up to rounding
        ids = torch.searchsorted(cdf, point[:, None], right=True)[:, 0]
        ids = ids.clamp(max=cdf.shape[1] - 1)
    return ids, logprobs.gather(1, ids[:, None])[:, 0]


@dataclass(eq=False)
class Conversation:
    """One open conversation of a sampler."""
    row: int                                          # its row in the KV cache
    filled: int = 0                                   # tokens in the cache
    pending: list[int] = field(default_factory=list)  # ids that are not in the cache yet


class Sampler:
    """Holds conversations that stay open between turns, in one KV cache. No token is fed twice.

    Each pass computes the first B rows of the cache. When a conversation ends its turn, it swaps
    rows with the last active conversation, so finished rows are not computed:

        cache row           0   1   2   3   4
        all five generate   a   b   c   d   e    B = 5
        b ends its turn     a   e   c   d | b    B = 4, e and b have swapped
        d ends its turn     a   e   c | d   b    B = 3
    """

    PREFILL = 16_384  # tokens of one prefill pass, with padding

    def __init__(self, model: Transformer, tokenizer: Tokenizer, rows: int, slots: int):
        """rows: conversations at once; slots: tokens per conversation."""
        self.model = model
        self.tokenizer = tokenizer
        self.cache = KVCache(model, rows, slots)
        self.stop = torch.tensor(sorted(tokenizer.stop_ids), device=model.device)
        self.capacity = rows
        self.slots = slots
        self.reset()

    def reset(self) -> None:
        """Close all conversations."""
        self.rows = [Conversation(row) for row in range(self.capacity)]  # by cache row
        self.unused = list(self.rows)
        self.cache.length.zero_()

    @torch.inference_mode()
    def open(self, prompts: list[list[int]], copies: int = 1) -> list[Conversation]:
        """Prefill each prompt once and copy it -> `copies` conversations per prompt, in order."""
        opened = self.unused[:len(prompts) * copies]
        assert len(opened) == len(prompts) * copies, (
            f"{len(prompts) * copies} conversations, but only {len(opened)} rows are free")
        self.unused = self.unused[len(opened):]
        # sample() starts with a pass over pending ids. So the last id of a prompt stays pending,
        # and that pass yields the state from which the first new token is drawn.
        firsts = opened[::copies]  # one conversation per prompt; the others are copies
        for first, prompt in zip(firsts, prompts, strict=True):
            first.pending = prompt[:-1]
        order = sorted((c for c in firsts if c.pending), key=lambda c: len(c.pending))
        for i in range(0, len(order), 32):  # batches of similar length need little padding
            self._prefill(order[i:i + 32])
        for i, conversation in enumerate(opened):
            prompt = prompts[i // copies]
            conversation.pending = prompt[-1:]
            conversation.filled = len(prompt) - 1
        if copies > 1 and opened:
            self.cache.longest = max(c.filled for c in opened)
            rows = torch.tensor([c.row for c in opened], device=self.model.device)
            # From the first row of each prompt to the rows of all its copies.
            self.cache.move(rows[::copies].repeat_interleave(copies), rows)
        return opened

    def append(self, conversation: Conversation, ids: list[int]) -> None:
        """Add ids from outside. The next sample() prefills them."""
        conversation.pending += ids

    @torch.inference_mode()
    def sample(self, conversations: list[Conversation], limits: list[int], uniforms: np.ndarray,
               temperature: float = 1.0) -> list[tuple[list[int], list[float]]]:
        """Generate until a stop id or the limit -> (ids, log-probabilities) of each conversation.

        uniforms (B, longest limit): the random numbers of each conversation, one per new token.
        """
        device = self.model.device
        B = len(conversations)
        longest = max(limits)
        for c, limit in zip(conversations, limits, strict=True):
            need = c.filled + len(c.pending) + limit - 1  # the last new id is not fed
            assert c.pending and limit > 0 and need <= self.slots, (
                f"limit {limit}: KV cache of {self.slots} slots, {need} needed")
        limit_of = torch.tensor(limits, device=device)
        uniform_of = torch.as_tensor(uniforms, device=device)
        ids = torch.zeros(B, longest, dtype=torch.long, device=device)
        float_type = torch.promote_types(self.model.dtype, torch.float32)
        logprobs = torch.zeros(B, longest, dtype=float_type, device=device)
        count = torch.zeros(B, dtype=torch.long, device=device)  # new tokens of each conversation

        states = self._prefill(conversations)  # (B, D)
        # index: cache row -> place in `conversations`, and so in all tensors above.
        order = {c: i for i, c in enumerate(conversations)}
        index = torch.tensor([order[c] for c in self.rows[:B]], device=device)
        for step in range(longest):
            new, logprob = draw(self.model.head(states), uniform_of[index, step], temperature)
            ids[index, step] = new
            logprobs[index, step] = logprob
            count[index] += 1  # = step + 1, but without an upload
            done = torch.isin(new, self.stop) | (limit_of[index] <= step + 1)
            done = done.tolist()  # here the host waits for the device, once per step
            if any(done):
                new, index = self._remove(done, new, index)
                if not len(index):
                    break
            past = CachePass(self.cache, torch.ones_like(index), 1)
            states = self.model(new[:, None], past)[:, 0]  # (B, D)
            past.close()

        results = []
        rows = zip(ids.tolist(), logprobs.tolist(), count.tolist(), strict=True)
        for c, (row, scores, n) in zip(conversations, rows, strict=True):
            c.pending = row[n - 1:n]  # the last id was never fed to the model
            c.filled += n - 1
            results.append((row[:n], scores[:n]))
        return results

    def _prefill(self, conversations: list[Conversation]) -> Tensor:
        """Feed the pending ids, a ragged batch -> the state of each one's last id (B, D).

        Afterwards the conversations hold the first B cache rows; the states are in that order.
        """
        B = len(conversations)
        device = self.model.device
        wanted = set(conversations)
        others = [row for row in range(B) if self.rows[row] not in wanted]
        outside = [c.row for c in conversations if c.row >= B]  # as many as there are others
        self._swap(others, outside)
        active = self.rows[:B]
        lengths = [len(c.pending) for c in active]
        self.cache.longest = max(c.filled for c in active)
        ids = torch.zeros(B, max(lengths), dtype=torch.long)
        for c in active:
            ids[c.row, :len(c.pending)] = torch.tensor(c.pending)
            c.filled += len(c.pending)
            c.pending = []
        width = max(2, self.PREFILL // B)  # a pass has blocks of columns, to bound its memory
        ids = F.pad(ids, (0, -ids.shape[1] % width if ids.shape[1] > width else 0)).to(device)
        last = torch.tensor(lengths, device=device) - 1  # (B,) column of each last id
        out = torch.zeros(B, self.model.config.hidden_size, dtype=self.model.dtype, device=device)
        for start in range(0, ids.shape[1], width):
            part = ids[:, start:start + width]
            new = (last + 1 - start).clamp(0, part.shape[1])
            past = CachePass(self.cache, new, part.shape[1])
            states = self.model(part, past)  # (B, T, D)
            past.close()
            column = (last - start).clamp(0, part.shape[1] - 1)
            found = states[torch.arange(B, device=device), column]  # (B, D)
            # Later blocks hold only padding of a row, which keeps the state of its last id.
            out = torch.where((last >= start)[:, None], found, out)
        self.cache.longest = max(c.filled for c in active)
        return out

    def _remove(self, done: list[bool], new: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
        """Swap finished rows behind the active ones -> `new` and `index` of the active rows."""
        active = done.count(False)
        finished = [row for row in range(active) if done[row]]
        movers = [row for row in range(active, len(done)) if not done[row]]
        self._swap(finished, movers)
        if finished:
            target = torch.tensor(finished, device=index.device)
            source = torch.tensor(movers, device=index.device)
            new[target] = new[source]
            index[target] = index[source]
        return new[:active], index[:active]

    def _swap(self, a: list[int], b: list[int]) -> None:
        """Swap the contents and the conversations of cache rows a[i] and b[i]."""
        if not a:
            return
        # move() copies `longest` slots, and rows outside of the pass may be longer.
        filled = max(self.rows[row].filled for row in a + b)
        self.cache.longest = max(self.cache.longest, filled)
        device = self.model.device
        self.cache.move(torch.tensor(a + b, device=device), torch.tensor(b + a, device=device))
        for x, y in zip(a, b, strict=True):
            self.rows[x], self.rows[y] = self.rows[y], self.rows[x]
            self.rows[x].row = x
            self.rows[y].row = y


# --------------------------------------------------------------------------------------- optimizer


class Masters(torch.optim.AdamW):
    """AdamW over float32 copies (masters) of bfloat16 weights. bfloat16 has 8 significant bits, so
    most steps of a small learning rate would round to no change.

    place: where masters and moments lie, 12 bytes per weight; "cpu" saves memory of the GPU.
    """

    def __init__(self, groups: list[dict], place: str | None, **options):
        self.masters: dict[Tensor, Tensor] = {}  # weight -> master
        for group in groups:
            for weight in group["params"]:
                master = weight.detach().to(place, torch.float32, copy=True)
                self.masters[weight] = nn.Parameter(master)
            group["params"] = [self.masters[weight] for weight in group["params"]]
        super().__init__(groups, **options)

    @torch.no_grad()
    def step(self) -> None:
        for weight, master in self.masters.items():
            # One after the other: AdamW skips all without a gradient.
            master.grad = weight.grad.to(master.device, torch.float32)
            super().step()
            master.grad = None
            weight.copy_(master.to(weight.dtype))

    def zero_grad(self, set_to_none: bool = True) -> None:
        for weight in self.masters:
            weight.grad = None


def make_optimizer(model: Transformer, lr: float, weight_decay: float, momentum: float = 0.9,
                   offload: bool = False) -> torch.optim.AdamW:
    """AdamW with weight decay on matrices only. momentum: its beta1. A model whose trained weights
    are not float32 gets Masters, with offload in the memory of the CPU.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [{"params": [p for p in trained if p.dim() == 2], "weight_decay": weight_decay},
              {"params": [p for p in trained if p.dim() != 2], "weight_decay": 0.0}]
    options = {"lr": lr, "betas": (momentum, 0.95), "fused": True}
    if all(p.dtype != torch.bfloat16 for p in trained):
        return torch.optim.AdamW(groups, **options)
    return Masters(groups, "cpu" if offload else None, **options)


def optimizer_step(model: Transformer, optimizer: torch.optim.Optimizer, lr: float,
                   clip_norm: float) -> float:
    """Clip the gradient, step and clear it -> the gradient's norm before clipping."""
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), clip_norm)
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return float(norm)


# ------------------------------------------------------------------------------------- checkpoints


def load(folder: Path, device: str = "cpu", dtype: torch.dtype = torch.float32
         ) -> tuple[Transformer, Tokenizer]:
    """Load a Qwen2.5 folder in Hugging Face's format.

    InputError names a tensor that is missing, unknown, misshapen or not finite.
    """
    folder = Path(folder)
    config = ModelConfig.read(folder)
    tokenizer = Tokenizer(folder)
    if tokenizer.size > config.vocab_size:
        raise InputError(f"{folder / 'config.json'}: vocab_size is {config.vocab_size}, "
                         f"the tokenizer has {tokenizer.size} ids")
    with torch.device("meta"):  # shapes only, no memory
        model = Transformer(config, known_ids=tokenizer.size)
    missing = {name: weight.shape for name, weight in model.named_parameters()}
    for file in weight_files(folder):
        _load_file(file, model, missing, device, dtype)
    if missing:
        raise InputError(f"{folder}: no tensor {next(iter(missing))} ({len(missing)} missing)")
    stored = config.tie_word_embeddings and not model.config.tie_word_embeddings
    if stored and torch.equal(model.lm_head.weight, model.model["embed_tokens"].weight):
        del model.lm_head  # it is tied, although it was stored
        model.config = config
    return model.eval(), tokenizer


def _load_file(file: Path, model: Transformer, missing: dict[str, torch.Size], device: str,
               dtype: torch.dtype) -> None:
    """Copy the tensors of one file into the model and remove their names from `missing`."""
    try:
        with safe_open(file, framework="pt", device=str(device)) as tensors:
            names = tensors.keys()
            if "lm_head.weight" in names and model.config.tie_word_embeddings:
                model.untie()
                missing["lm_head.weight"] = model.lm_head.weight.shape

            def read(name: str) -> None:
                stored = tensors.get_tensor(name)
                shape = missing.pop(name, None)
                if shape is None:
                    raise InputError(f"{file}: {name} is not a tensor of this model, or it is "
                                     "stored twice")
                if stored.shape != shape:
                    raise InputError(f"{file}: {name} has shape {tuple(stored.shape)}, "
                                     f"config.json asks for {tuple(shape)}")
                weight = stored.to(dtype)
                if not stored.is_floating_point() or not bool(weight.sum().isfinite()):
                    raise InputError(f"{file}: {name} ({stored.dtype}) should hold finite numbers")
                module, _, parameter = name.rpartition(".")
                setattr(model.get_submodule(module), parameter, nn.Parameter(weight))

            # Most of the time goes into page faults of fresh memory. Threads do them in parallel.
            with ThreadPoolExecutor(4) as pool:
                list(pool.map(read, names))  # list() raises the errors of the threads
    except (SafetensorError, OSError) as error:
        raise InputError(f"{file}: not a whole safetensors file ({error})") from None


@torch.no_grad()
def save_model(model: Transformer, tokenizer: Tokenizer, folder: Path, merge: bool = True) -> None:
    """Write a folder that transformers loads: weights, config, tokenizer and stop ids. Adapters are
    merged. merge=False is for a checkpoint: only what is trained, as it is.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model.safetensors.index.json").unlink(missing_ok=True)  # of an older model
    weights = {name: w for name, w in model.named_parameters() if w.requires_grad or merge}
    if merge:
        weights = {name: w for name, w in weights.items() if not name.endswith((".A", ".B"))}
        for name, layer in model.named_modules():
            if isinstance(layer, Linear):
                weights[f"{name}.weight"] = layer.merged().cpu()
    weights = {name: w.detach().contiguous().cpu() for name, w in weights.items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    pad = min(tokenizer.stop_ids)  # in Qwen2.5 <|endoftext|>
    config = {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_act": "silu",
              "torch_dtype": str(model.dtype).removeprefix("torch."), "use_sliding_window": False,
              "attention_dropout": 0.0, "eos_token_id": tokenizer.end, "pad_token_id": pad,
              **asdict(model.config)}
    stops = {"eos_token_id": sorted(tokenizer.stop_ids), "pad_token_id": pad}
    for name, content in (("config.json", config), ("generation_config.json", stops)):
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    for name, content in tokenizer.files.items():
        (folder / name).write_bytes(content)
