"""The machine: a Qwen2.5-style transformer, its KV cache, its sampler, its checkpoints. No agents in here.

Shapes: B batch, T tokens, S cache slots (keys), D width, H heads, K kv-heads, Dh head width, V vocabulary.
Parameters bear the names of a Qwen2.5 checkpoint, so loading one is a few strict lines.
"""
import hashlib
import json
import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields
from functools import lru_cache
from pathlib import Path

import numpy as np
import tokenizers
import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from data import InputError, read_file, read_json

# The one thing that is done at import. The MKL in torch picks a function's code at its first call; if several threads make that
# call at once, one thread's part may be off by 1e-4 (pytorch/pytorch#188792), and a seed gives another run. Of one element a
# single thread makes it.
for first_call in (torch.cos, torch.sin, torch.exp):
    first_call(torch.ones(1))

# --------------------------------------------------------------------------------------------- config


@dataclass(frozen=True)
class ModelConfig:
    """The hyperparameters of config.json that this file reads, under their Hugging Face names."""
    vocab_size: int              # V: rows of the embedding, at least the tokenizer's ids
    hidden_size: int             # D
    intermediate_size: int       # width inside the SwiGLU
    num_hidden_layers: int
    num_attention_heads: int     # H
    num_key_value_heads: int     # K; H / K query heads share one key and value head
    max_position_embeddings: int
    rms_norm_eps: float
    rope_theta: float            # base of the rotary wavelengths
    tie_word_embeddings: bool    # the head is the embedding, transposed

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @staticmethod
    def read(folder: Path) -> "ModelConfig":
        """config.json of a Qwen2.5 folder; InputError names a missing key or a feature that isn't built here."""
        raw = read_json(folder / "config.json")
        raw = {**(raw.get("rope_parameters") or {}), **raw}  # where newer writers of the format put rope_theta
        for key, want in (("model_type", "qwen2"), ("hidden_act", "silu"), ("use_sliding_window", False),
                          ("rope_scaling", None), ("rope_type", "default")):
            if raw.get(key, want) != want:
                raise InputError(f"{folder / 'config.json'}: {key} is {raw[key]!r}, only {want!r} is supported")
        want = {bool: "true or false", int: "a whole number above 0", float: "a number above 0"}
        for f in fields(ModelConfig):
            value = raw.get(f.name)
            fits = type(value) in ((int, float) if f.type is float else (f.type,))
            if not fits or f.type is not bool and not 0 < value < 1e12:
                raise InputError(f"{folder / 'config.json'}: {f.name} should be {want[f.type]}, found {value!r}")
        config = ModelConfig(**{f.name: raw[f.name] for f in fields(ModelConfig)})
        D, H, K = config.hidden_size, config.num_attention_heads, config.num_key_value_heads
        if D % (2 * H) or H % K or config.num_hidden_layers > 1000:
            raise InputError(f"{folder / 'config.json'}: {config.num_hidden_layers} layers, hidden_size {D}, num_attention_heads {H} "
                             f"and num_key_value_heads {K} make no model")
        return config


# --------------------------------------------------------------------------------------- transformer


def upcast(x: Tensor) -> Tensor:
    """At least float32: where a sum over many small terms would lose in bfloat16."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class Linear(nn.Linear):
    """nn.Linear that draws no weights when it is made: init_weights() or a checkpoint brings them."""

    def reset_parameters(self) -> None:
        pass


class RMSNorm(nn.Module):
    """x / sqrt(mean(x²) + eps) · weight, the mean in float32 (Zhang & Sennrich 2019)."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        x32 = upcast(x)
        x32 = x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * x32.to(x.dtype)


def rotary_angles(positions: Tensor, head_dim: int, theta: float) -> Tensor:
    """positions (B, T) -> angles (B, T, Dh/2) in float32: position / theta^(2i/Dh) (Su et al. 2021, eq. 15)."""
    i = torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float32)
    # In this order, as transformers rounds it: far out another order turns by other angles (2e-3 at 30,000).
    return positions[..., None].float() * (1 / theta ** (i / head_dim))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair (x[i], x[i + Dh/2]) by its angle; x (B, H, T, Dh), cos and sin (B, 1, T, Dh/2)."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


class Attention(nn.Module):
    """Causal attention with grouped kv-heads and biases on q, k, v (Ainslie et al. 2023; Qwen2.5)."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        self.layer = layer
        self.q_proj = Linear(config.hidden_size, self.heads * self.head_dim)
        self.k_proj = Linear(config.hidden_size, self.kv_heads * self.head_dim)
        self.v_proj = Linear(config.hidden_size, self.kv_heads * self.head_dim)
        self.o_proj = Linear(self.heads * self.head_dim, config.hidden_size, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, window: "Window | None") -> Tensor:
        B, T, _ = x.shape
        q = self.q_proj(x).view(B, T, self.heads, self.head_dim).transpose(1, 2)      # (B, H, T, Dh)
        k = self.k_proj(x).view(B, T, self.kv_heads, self.head_dim).transpose(1, 2)   # (B, K, T, Dh)
        v = self.v_proj(x).view(B, T, self.kv_heads, self.head_dim).transpose(1, 2)   # (B, K, T, Dh)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        if window is None:  # whole rows from position 0: padding on the right is never seen by a real token
            out = self.attend(q, k, v)                                                # (B, H, T, Dh)
        else:  # is_causal would be top-left aligned, wrong behind a cache, so the window brings a mask
            k, v = window.write(self.layer, k, v)                                     # (B, K, S, Dh)
            # The H/K query heads of a kv-head stand side by side in time: no key is copied, no slow grouped path.
            q = q.reshape(B, self.kv_heads, -1, self.head_dim)                        # (B, K, H/K·T, Dh)
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=window.mask)
            out = out.reshape(B, self.heads, T, self.head_dim)
        return self.o_proj(out.transpose(1, 2).reshape(B, T, -1))                     # (B, T, D)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """softmax(q kᵀ / sqrt(Dh)) v, each token seeing itself and those before it; q (B, H, T, Dh), k and v (B, K, T, Dh)."""
        B, H, T, Dh = q.shape
        if not torch.is_autocast_enabled("cpu") or B * H * T * T > 2 ** 24:
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=self.heads != self.kv_heads)
        # In bfloat16 on a CPU the fused kernel is much slower than the formula, which only needs more memory.
        future = torch.full((T, T), -math.inf).triu(1).repeat(H // self.kv_heads, 1)  # (H/K·T, T)
        scores = (q * Dh ** -0.5).reshape(B, self.kv_heads, -1, Dh) @ k.mT + future   # (B, K, H/K·T, T), the sum in float32
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
    """Attention, then MLP, each on the normed stream and added to it."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, window: "Window | None") -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, window)
        return x + self.mlp(self.post_attention_layernorm(x))


class Transformer(nn.Module):
    """Qwen2.5: embedding, blocks, norm, head. forward() ends before the head, which few positions need."""

    def __init__(self, config: ModelConfig, known_ids: int | None = None):
        super().__init__()
        self.config = config
        self.known_ids = known_ids or config.vocab_size  # rows above the tokenizer's last id are never scored
        rows = torch.empty(config.vocab_size, config.hidden_size)  # as in Linear: nothing is drawn here
        self.model = nn.ModuleDict({
            "embed_tokens": nn.Embedding.from_pretrained(rows, freeze=False),
            "layers": nn.ModuleList(Block(config, i) for i in range(config.num_hidden_layers)),
            "norm": RMSNorm(config.hidden_size, config.rms_norm_eps),
        })
        if not config.tie_word_embeddings:
            self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)

    @property
    def device(self) -> torch.device:
        return self.model["norm"].weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.model["norm"].weight.dtype

    def forward(self, ids: Tensor, window: "Window | None" = None) -> Tensor:
        """ids (B, T) -> final states (B, T, D). Without a window each row starts at position 0 and may be
        padded on the right with any id; with one, the ids continue the rows of a KV cache."""
        positions = torch.arange(ids.shape[1], device=ids.device)[None] if window is None else window.positions
        angles = rotary_angles(positions, self.config.head_dim, self.config.rope_theta)[:, None]  # (B, 1, T, Dh/2)
        cos, sin = angles.cos().to(self.dtype), angles.sin().to(self.dtype)
        x = self.model["embed_tokens"](ids)                                           # (B, T, D)
        for block in self.model["layers"]:
            x = block(x, cos, sin, window)
        return self.model["norm"](x)

    def head(self, states: Tensor) -> Tensor:
        """states (…, D) -> logits (…, known ids), at least float32."""
        weight = self.model["embed_tokens"].weight if self.config.tie_word_embeddings else self.lm_head.weight
        return upcast(F.linear(states, weight[:self.known_ids]))

    def init_weights(self, seed: int) -> "Transformer":
        """Random weights for a small model trained from nothing; the same for the same seed."""
        generator = torch.Generator().manual_seed(seed)
        depth = math.sqrt(2 * self.config.num_hidden_layers)  # the stream sums this many outputs (GPT-2)
        for name, weight in self.named_parameters():
            if name.endswith("bias"):
                weight.data.zero_()
            elif weight.dim() == 2:
                std = 0.08 if "embed" in name else 0.6 / math.sqrt(weight.shape[1])
                std /= depth if name.endswith("down_proj.weight") else 1
                weight.data.copy_(torch.randn(weight.shape, generator=generator) * std)
        for block in self.model["layers"]:  # each head starts as one that copies what it attends to (o = v transposed;
            a = block.self_attn             # Trockman & Kolter 2023), or a rare kind of value may never be copied
            v = a.v_proj.weight.data.view(a.kv_heads, a.head_dim, -1).repeat_interleave(a.heads // a.kv_heads, 0)
            a.o_proj.weight.data.copy_(v.reshape(-1, v.shape[-1]).T / depth)
        return self


def token_logprobs(model: Transformer, ids: Tensor, mask: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """ids (B, T), mask (B, T) bool -> log-probability of each masked id given those before it, and the entropy
    it was drawn from (no gradient), both (B, T), zero where the mask is. Softmax in float32, at the temperature."""
    rows, cols = mask.nonzero(as_tuple=True)                                          # (N,) scored tokens only
    assert bool((cols > 0).all()), "the first token of a row has nothing before it and can't be scored"
    states = model(ids)[rows, cols - 1]                                               # (N, D)
    states = F.pad(states, (0, 0, 0, -len(rows) % 128))  # few different shapes: each costs oneDNN a new kernel
    logits = model.head(states)[:len(rows)] / temperature                             # (N, V)
    logprobs = logits.log_softmax(-1)
    picked = logprobs.gather(1, ids[rows, cols][:, None])[:, 0]                       # (N,)
    with torch.no_grad():
        entropy = -(logprobs.exp() * logprobs).sum(-1)
    zeros = torch.zeros(ids.shape, dtype=picked.dtype, device=ids.device)
    return zeros.index_put((rows, cols), picked), zeros.index_put((rows, cols), entropy)


# ------------------------------------------------------------------------------------------ KV cache


def free_memory(device: torch.device) -> float:
    """Bytes that can still be had on the device; infinite where nothing tells."""
    if device.type == "cuda":  # what torch holds without using it can be had too
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    meminfo = Path("/proc/meminfo")
    lines = meminfo.read_text().splitlines() if device.type == "cpu" and meminfo.exists() else []
    return next((1024.0 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable")), math.inf)


class KVCache:
    """Keys and values of many conversations. A row's tokens lie from 0 to length[row], no hole, no left padding;
    length is the one position counter. Zeros, not torch.empty: NaN beyond a row's length would survive 0 · NaN."""

    def __init__(self, model: Transformer, rows: int, slots: int):
        c = model.config
        shape = (c.num_hidden_layers, rows, c.num_key_value_heads, slots, c.head_dim)
        size, free = 2 * math.prod(shape) * model.dtype.itemsize / 1e9, free_memory(model.device) / 1e9
        if size > free:
            raise InputError(f"KV cache of {rows} conversations x {slots} tokens: {size:.1f} GB, but {free:.1f} GB are free on "
                             f"{model.device.type}; turn down --trace-tokens, or --rows (eval, traces), or --questions or --group (grpo)")
        self.k = torch.zeros(shape, device=model.device, dtype=model.dtype)
        self.v = torch.zeros(shape, device=model.device, dtype=model.dtype)
        self.length = torch.zeros(rows, dtype=torch.long, device=model.device)
        self.groups = c.num_attention_heads // c.num_key_value_heads  # query heads a kv-head
        self.longest = 0  # no row is longer; known without asking the device

    def move(self, source: Tensor, target: Tensor) -> None:
        """Row target[i] becomes what row source[i] was; a swap names both rows in both lists."""
        for part in (self.k, self.v):
            part[:, target, :, :self.longest] = part[:, source, :, :self.longest]
        self.length[target] = self.length[source]


class Window:
    """One forward pass over the first B rows of a cache: where its tokens go and what each of them may see."""

    def __init__(self, cache: KVCache, new: Tensor, width: int):
        """new (B,): how many of the pass's `width` columns are real tokens of each row; the rest is padding."""
        B, device = len(new), new.device
        self.cache, self.new = cache, new
        self.positions = cache.length[:B, None] + torch.arange(width, device=device)  # (B, T)
        cache.longest = min(cache.longest + width, cache.k.shape[3])  # the longest row may not be the one that grows most
        keys = torch.arange(cache.longest, device=device)
        future = keys > self.positions[:, None, :, None]                              # (B, 1, T, S)
        # Added to the scores; from a bool mask attention would make this same tensor again in every layer.
        self.mask = torch.zeros(future.shape, dtype=cache.k.dtype, device=device).masked_fill_(future, -math.inf)
        self.mask = self.mask.repeat(1, 1, cache.groups, 1)                           # (B, 1, H/K·T, S)
        self.real = (torch.arange(width, device=device) < new[:, None]).nonzero(as_tuple=True) if width > 1 \
            else (torch.arange(B, device=device), torch.zeros(B, dtype=torch.long, device=device))
        self.place = self.positions[self.real]  # of the real tokens, in the cache

    def write(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """k, v (B, K, T, Dh) into the cache, padding left out -> all keys and values so far (B, K, S, Dh)."""
        (rows, cols), B, S = self.real, len(self.positions), self.mask.shape[-1]
        self.cache.k[layer, rows, :, self.place] = k[rows, :, cols]
        self.cache.v[layer, rows, :, self.place] = v[rows, :, cols]
        return self.cache.k[layer, :B, :, :S], self.cache.v[layer, :B, :, :S]

    def close(self) -> None:
        """All layers have written: the rows grow."""
        self.cache.length[:len(self.new)] += self.new


# ------------------------------------------------------------------------------------------- sampler


def narrow(logprobs: Tensor, top_p: float, top_k: int) -> Tensor:
    """Log-probabilities (B, V) -> the same, -inf for all but the top_k largest (0: all of them), and of those but the
    fewest that hold a share of at least top_p (nucleus, Holtzman et al. 2020)."""
    p, order = logprobs.exp().sort(dim=-1, descending=True, stable=True)              # (B, V)
    p[:, top_k or p.shape[1]:] = 0
    out = (p.cumsum(-1) - p >= top_p * p.sum(-1, keepdim=True)) | (p == 0)
    return logprobs.masked_fill(torch.zeros_like(out).scatter(1, order, out), -math.inf)


def draw(logits: Tensor, uniform: Tensor, temperature: float, top_p: float = 1.0, top_k: int = 0) -> tuple[Tensor, Tensor]:
    """logits (B, V), uniform (B,) in [0, 1) -> ids (B,) by inverse transform, their log-probabilities (B,).

    At temperature 0 the largest logit is taken and scored at temperature 1. The numbers come from outside, so
    what a conversation draws doesn't depend on who shares its batch. A draw from a part of the ids is scored as one
    from all of them: the log-probability is the policy's at that temperature, the one a trainer would find."""
    logprobs = (logits / (temperature or 1.0)).log_softmax(-1)
    if temperature == 0:
        ids = logits.argmax(-1)
    else:
        cdf = (narrow(logprobs, top_p, top_k) if top_p < 1 or top_k else logprobs).exp().cumsum(-1)
        below = uniform.to(cdf.dtype) * cdf[:, -1]  # the sum is 1 only up to rounding
        ids = torch.searchsorted(cdf, below[:, None], right=True)[:, 0].clamp(max=cdf.shape[1] - 1)
    return ids, logprobs.gather(1, ids[:, None])[:, 0]


class Sampler:
    """Conversations kept open over one KV cache: open, append, sample, and again, nothing prefilled twice.

    Each pass runs on the first rows of the cache. Conversations swap places so that those that are still
    speaking stand there, and one that has ended its turn costs the others nothing."""
    top_p, top_k = 1.0, 0  # what is sampled to be looked at may be narrowed; what is learned from has no flag for it

    def __init__(self, model: Transformer, tokenizer: "Tokenizer", rows: int, slots: int):
        self.model, self.tokenizer = model, tokenizer
        self.cache = KVCache(model, rows, slots)
        self.stop = torch.tensor(sorted(tokenizer.stop_ids), device=model.device)
        self.capacity, self.slots = rows, slots
        self.reset()

    def reset(self) -> None:
        """Close all conversations."""
        self.place = list(range(len(self.cache.length)))   # conversation -> cache row
        self.holder = list(range(len(self.cache.length)))  # cache row -> conversation
        self.pending: list[list[int]] = [[] for _ in self.place]  # ids that the cache hasn't read yet
        self.filled = [0] * len(self.place)  # tokens in the cache, by conversation
        self.used = 0
        self.cache.length.zero_()

    @torch.inference_mode()
    def open(self, prompts: list[list[int]], copies: int = 1) -> list[int]:
        """Read each prompt once and copy it: `copies` conversations a prompt, side by side; their numbers."""
        first = self.used
        self.used += len(prompts) * copies
        assert self.used <= len(self.place), f"{self.used} conversations, room for {len(self.place)}"
        heads = range(first, self.used, copies)
        for head, prompt in zip(heads, prompts):
            self.pending[head] = prompt[:-1]
        order = sorted((c for c in heads if self.pending[c]), key=lambda c: len(self.pending[c]))
        for i in range(0, len(order), 32):  # neighbours in length: little padding
            self._read(order[i:i + 32])
        for head, prompt in zip(heads, prompts):
            for c in range(head, head + copies):  # the last id is read by sample(), which needs what follows it
                self.pending[c], self.filled[c] = prompt[-1:], len(prompt) - 1
        if copies > 1 and prompts:
            self.cache.longest = max(self.filled[first:self.used])
            target = [c for head in heads for c in range(head + 1, head + copies)]
            source = [head for head in heads for _ in range(copies - 1)]
            self.cache.move(self._rows(source), self._rows(target))
        return list(range(first, self.used))

    def append(self, conversation: int, ids: list[int]) -> None:
        """Add what somebody else says; it is read with the next sample()."""
        self.pending[conversation] += ids

    @torch.inference_mode()
    def sample(self, conversations: list[int], limits: list[int], uniforms: np.ndarray, temperature: float = 1.0
               ) -> list[tuple[list[int], list[float]]]:
        """Let each conversation speak until a stop id or its limit -> (ids, log-probabilities) of each.

        uniforms (B, most new ids) are the random numbers that it draws with; temperature 0 needs none of them."""
        device, B, most, slots = self.model.device, len(conversations), max(limits), self.slots
        for c, limit in zip(conversations, limits):
            need = self.filled[c] + len(self.pending[c]) + limit - 1
            assert limit > 0 and need <= slots, f"limit {limit}: KV cache of {slots} slots, {need} needed"
        number = torch.full((len(self.place),), -1, device=device)  # conversation -> its line in the tables below
        number[torch.tensor(conversations, device=device)] = torch.arange(B, device=device)
        limit = torch.tensor(limits, device=device)
        table = torch.as_tensor(uniforms, device=device)
        ids = torch.zeros(B, most, dtype=torch.long, device=device)
        logprobs = torch.zeros(B, most, dtype=torch.promote_types(self.model.dtype, torch.float32), device=device)
        count = torch.zeros(B, dtype=torch.long, device=device)
        states = self._read(conversations)                                            # (B, D)
        line = number[torch.tensor(self.holder[:B], device=device)]
        for step in range(most):
            new, logprob = draw(self.model.head(states), table[line, step], temperature, self.top_p, self.top_k)
            ids[line, step], logprobs[line, step], count[line] = new, logprob, step + 1
            done = torch.isin(new, self.stop) | (limit[line] <= step + 1)
            if done.any():  # the one look at the device in a step
                new, line = self._leave(done, new, line)
                if not len(line):
                    break
            window = Window(self.cache, torch.ones_like(line), 1)
            states = self.model(new[:, None], window)[:, 0]
            window.close()
        ids, logprobs, count = ids.tolist(), logprobs.tolist(), count.tolist()
        for i, c in enumerate(conversations):
            self.pending[c] = ids[i][count[i] - 1:count[i]]  # the last id was never fed back
            self.filled[c] += count[i] - 1
        return [(ids[i][:n], logprobs[i][:n]) for i, n in enumerate(count)]

    def _read(self, conversations: list[int]) -> Tensor:
        """Feed pending ids of the conversations, a ragged batch -> states (B, D) after the last id of each,
        in the order of the cache's rows, which the conversations now head."""
        B, device = len(conversations), self.model.device
        wanted = set(conversations)
        out = [r for r in range(B) if self.holder[r] not in wanted]
        into = [self.place[c] for c in conversations if self.place[c] >= B]
        self._swap(out, into)
        lengths = [len(self.pending[c]) for c in self.holder[:B]]
        ids = torch.zeros(B, max(lengths), dtype=torch.long)
        for row, c in enumerate(self.holder[:B]):
            ids[row, :lengths[row]] = torch.tensor(self.pending[c])
            self.filled[c] += lengths[row]
            self.pending[c] = []
        self.cache.longest = max(self.filled[c] - n for c, n in zip(self.holder[:B], lengths))
        last = torch.tensor(lengths, device=device)
        window = Window(self.cache, last, ids.shape[1])
        states = self.model(ids.to(device), window)                                   # (B, T, D)
        window.close()
        self.cache.longest = max(self.filled[c] for c in self.holder[:B])
        return states[torch.arange(B, device=device), (last - 1).clamp(min=0)]

    def _leave(self, done: Tensor, new: Tensor, line: Tensor) -> tuple[Tensor, Tensor]:
        """Rows that are done change places with the last ones that aren't."""
        flags = done.tolist()
        stay = flags.count(False)
        holes = [r for r in range(stay) if flags[r]]
        movers = [r for r in range(stay, len(flags)) if not flags[r]]
        self._swap(holes, movers)
        if holes:
            h, m = torch.tensor(holes, device=line.device), torch.tensor(movers, device=line.device)
            new[h], line[h] = new[m], line[m]
        return new[:stay], line[:stay]

    def _swap(self, a: list[int], b: list[int]) -> None:
        """Cache rows a[i] and b[i] change places, and with them who holds them."""
        if not a:
            return
        self.cache.longest = max(self.cache.longest, max(self.filled[self.holder[r]] for r in a + b))
        device = self.model.device
        self.cache.move(torch.tensor(a + b, device=device), torch.tensor(b + a, device=device))
        for x, y in zip(a, b):
            self.holder[x], self.holder[y] = self.holder[y], self.holder[x]
            self.place[self.holder[x]], self.place[self.holder[y]] = x, y

    def _rows(self, conversations: list[int]) -> Tensor:
        return torch.tensor([self.place[c] for c in conversations], device=self.model.device)


# --------------------------------------------------------------------------------------- checkpoints


def fingerprint(*paths: Path) -> str:
    """SHA-256 over what stands in files; of a model folder over its weights."""
    digest = hashlib.sha256()
    for path in paths:
        for part in sorted(Path(path).glob("*.safetensors")) if Path(path).is_dir() else [path]:
            with open(part, "rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def load_model(folder: Path, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Transformer:
    """A Qwen2.5 folder in Hugging Face's format -> model on the device; each tensor goes there by itself, a few at a time.
    InputError names what is missing, superfluous, misshapen or not a number."""
    folder = Path(folder)
    config = ModelConfig.read(folder)
    known = Tokenizer(folder).size
    if known > config.vocab_size:
        raise InputError(f"{folder / 'config.json'}: vocab_size is {config.vocab_size}, the tokenizer has {known} ids")
    with torch.device("meta"):  # shapes only, no memory
        model = Transformer(config, known_ids=known)
    want = {name: weight.shape for name, weight in model.named_parameters()}
    for file, names in _shards(folder, want).items():
        try:
            with safe_open(file, framework="pt", device=str(device)) as tensors:
                names, todo = names if names is not None else list(tensors.keys()), []
                for name in names:
                    if name == "lm_head.weight" and config.tie_word_embeddings:
                        continue  # some writers store the tied head once more
                    if name not in want:
                        raise InputError(f"{file}: {name} is not a tensor of this model, or stands twice")
                    shape, asked = tuple(tensors.get_slice(name).get_shape()), tuple(want.pop(name))
                    if shape != asked:
                        raise InputError(f"{file}: {name} has shape {shape}, config.json asks for {asked}")
                    todo.append(name)

                def read(name: str) -> None:
                    stored = tensors.get_tensor(name)
                    weight = stored.to(dtype)
                    if not stored.is_floating_point() or not bool(weight.sum().isfinite()):
                        raise InputError(f"{file}: {name} ({stored.dtype}) holds something that is not a finite number")
                    module, _, own = name.rpartition(".")
                    setattr(model.get_submodule(module), own, nn.Parameter(weight))
                with ThreadPoolExecutor(4) as pool:  # fresh memory costs a processor more than the copying
                    list(pool.map(read, todo))
        except (SafetensorError, OSError) as error:
            raise InputError(f"{file}: not a whole safetensors file ({error})") from None
    if want:
        raise InputError(f"{folder}: no tensor {next(iter(want))} ({len(want)} missing)")
    return model.eval()


def _shards(folder: Path, want: dict) -> dict[Path, list[str] | None]:
    """File -> names to read from it: the index says which; a stray file beside the shards is never opened."""
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        return {folder / "model.safetensors": None}
    where = read_json(index).get("weight_map")
    if not isinstance(where, dict) or not all(isinstance(file, str) for file in where.values()):
        raise InputError(f"{index}: no 'weight_map' from tensors to files")
    if missing := [name for name in want if name not in where]:
        raise InputError(f"{index}: no entry for {missing[0]} ({len(missing)} missing)")
    return {folder / file: [n for n in where if where[n] == file] for file in sorted(set(where.values()))}


def save_model(model: Transformer, tokenizer: "Tokenizer", folder: Path) -> None:
    """Write a folder that this file and transformers load as it stands: weights, config, tokenizer, stop ids."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: weight.detach().contiguous().cpu() for name, weight in model.named_parameters()}
    (folder / "model.safetensors.index.json").unlink(missing_ok=True)  # of an earlier model, in shards
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    pad = min(tokenizer.stop_ids)
    config = {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_act": "silu",
              "torch_dtype": str(model.dtype).removeprefix("torch."), "use_sliding_window": False,
              "attention_dropout": 0.0, "eos_token_id": tokenizer.end, "pad_token_id": pad, **asdict(model.config)}
    stops = {"eos_token_id": sorted(tokenizer.stop_ids), "pad_token_id": pad}
    for name, content in (("config.json", config), ("generation_config.json", stops)):
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    for name, content in tokenizer.files.items():
        (folder / name).write_bytes(content)


class Tokenizer:
    """A Hugging Face tokenizer.json. What the program writes is a list of pieces: a plain str is text, any
    subclass of str is the control token of that name. Text can't spell a control token, whoever wrote it."""

    def __init__(self, folder: Path):
        folder = Path(folder)
        content = read_file(folder / "tokenizer.json")
        try:
            content, self.full, self.plain, self.control = _parse_tokenizer(content)
            self.end = self.control["<|im_end|>"]
        except Exception as error:  # the library raises bare Exception
            raise InputError(f"{folder / 'tokenizer.json'}: not a tokenizer with Qwen2.5's control tokens ({error})") from None
        self.size = self.full.get_vocab_size()
        self.spans = lru_cache(2000)(lambda text: self.plain.encode(text).ids)  # the same ones come again and again
        self.files = {"tokenizer.json": content} | {  # to be saved again, byte for byte
            name: read_file(folder / name) for name in ("tokenizer_config.json", "chat_template.jinja")
            if (folder / name).exists()}
        generation = folder / "generation_config.json"
        stops = read_json(generation).get("eos_token_id", []) if generation.exists() else []
        # A base checkpoint's own list lacks <|im_end|>, the end of every turn.
        stops = stops if isinstance(stops, list) else [stops]
        if bad := [stop for stop in stops if type(stop) is not int]:
            raise InputError(f"{generation}: eos_token_id should hold ids, found {bad[0]!r}")
        self.stop_ids = {self.end, *stops}

    def encode(self, pieces: list[str]) -> list[int]:
        """Pieces -> ids. Neighbouring texts are joined first: ids don't add up at text borders."""
        ids, text = [], ""
        for piece in [*pieces, None]:
            if type(piece) is str:
                text += piece
                continue
            # A lone surrogate, which JSON can smuggle in, is no character: the encoder would refuse the whole text.
            ids += self.spans(text.encode("utf-8", "replace").decode()) if text else []
            text = ""
            if piece is not None:
                ids.append(self.control[piece])
        return ids

    def decode(self, ids: list[int]) -> str:
        """Ids -> text, control tokens spelled out."""
        return self.full.decode(ids, skip_special_tokens=False)


@lru_cache(maxsize=1)  # Qwen2.5's takes a while, and a folder is opened for its model and for its tokenizer
def _parse_tokenizer(content: bytes) -> tuple[bytes, tokenizers.Tokenizer, tokenizers.Tokenizer, dict[str, int]]:
    """tokenizer.json -> itself, the whole tokenizer, the same without its added tokens, their ids."""
    full = tokenizers.Tokenizer.from_buffer(content)
    plain = tokenizers.Tokenizer(full.model)  # shares the vocabulary
    plain.normalizer, plain.pre_tokenizer = full.normalizer, full.pre_tokenizer
    return content, full, plain, {token.content: i for i, token in full.get_added_tokens_decoder().items()}


CONTROL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<tool_call>", "</tool_call>")


def train_tokenizer(texts: list[str], size: int, folder: Path, chat_template: str) -> Tokenizer:
    """A byte-level BPE with Qwen2.5's pre-split and control tokens, learned from texts, written to folder.

    One departure: a space before a capital stands alone, so that a name is the same token in prose and in JSON and to
    copy it is to repeat one token. Qwen2.5 can afford to learn more."""
    from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, trainers
    bpe = tokenizers.Tokenizer(models.BPE())
    bpe.normalizer = normalizers.NFC()
    words = Regex(r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|(?!\s\p{Lu})[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
                  r"\s*[\r\n]+|\s+(?!\S)|\s+")
    bpe.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(words, "isolated"),
                                                 pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    bpe.decoder = decoders.ByteLevel()
    bpe.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=size - len(CONTROL_TOKENS), show_progress=False, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    for token in CONTROL_TOKENS:  # as in Qwen2.5, the tags of a call are added tokens, but not special ones
        bpe.add_tokens([AddedToken(token, special=token.startswith("<|"), normalized=False)])
    folder.mkdir(parents=True, exist_ok=True)
    bpe.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": chat_template, "eos_token": "<|im_end|>",
              "pad_token": "<|endoftext|>", "add_prefix_space": False, "model_max_length": 4096}
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [
        bpe.token_to_id("<|im_end|>"), bpe.token_to_id("<|endoftext|>")]}), encoding="utf-8")
    return Tokenizer(folder)
