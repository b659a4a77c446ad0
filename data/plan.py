"""How much GPU memory training takes, part by part, counted from a checkpoint's config.json.

Only large tensors are counted. Arguments: c is config.json, config a grpo.GRPOConfig.
"""
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

from data import InputError
from data.checkpoint import read_config
from data.folders import stage1_folder
from data.tables import print_table

STAGE1 = "OUT/sft/model"  # --plan without a folder
GB = 1e9
CARDS = (24, 80, 141)  # GB of memory: for example RTX 4090, H100, H200
OTHER = 1.5 * GB       # a guess: CUDA itself, and gaps between tensors
PREFILL = 16_384       # tokens of one pass of Sampler._prefill
CHUNK = 512            # scored tokens whose logits exist at once in token_logprobs
# The options of each row in the last table.
VARIANTS = ({}, {"offload": True}, {"questions": 4, "sim_rows": 16},
            {"offload": True, "questions": 4, "sim_rows": 16}, {"lora": 16},
            {"lora": 16, "questions": 4, "sim_rows": 16})

KEYS = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
        "num_attention_heads", "num_key_value_heads", "max_position_embeddings")


def names_folder(plan: str) -> bool:
    """Whether the option --plan has a folder."""
    return plan not in ("", STAGE1)


def read_shape(folder: Path) -> SimpleNamespace:
    """The numbers of config.json that count, and the width of the keys."""
    types = dict.fromkeys(KEYS, int) | {"tie_word_embeddings": bool}
    c = SimpleNamespace(**read_config(folder, types))
    c.kv = c.hidden_size // c.num_attention_heads * c.num_key_value_heads
    return c


def count_weights(c, lora: int) -> tuple[int, int]:
    """The number of weights, and how many numbers are trained: all weights, or adapters."""
    D = c.hidden_size
    width = c.intermediate_size
    # (in, out) of q, k, v, o, gate, up and down.
    matrices = [(D, D), (D, c.kv), (D, c.kv), (D, D), (D, width), (D, width), (width, D)]
    block = sum(a * b for a, b in matrices) + (D + 2 * c.kv) + 2 * D  # biases, norms
    embeddings = 1 if c.tie_word_embeddings else 2
    weights = c.num_hidden_layers * block + embeddings * c.vocab_size * D + D
    adapters = c.num_hidden_layers * lora * sum(a + b for a, b in matrices)
    return weights, adapters or weights


def count_slots(c, config) -> tuple[int, int]:
    """Slots of AutoAgent's KV cache and of the simulator's, over all rows."""
    longest = config.trace_tokens
    simulator = min(c.max_position_embeddings, longest + max(480, config.turn_tokens))
    agent_rows = config.questions * config.group
    # A GPU has multiples of 64.
    return agent_rows * (longest + -longest % 64), config.sim_rows * (simulator + -simulator % 64)


def sampling_peak(c, config, size: int) -> float:
    """Bytes of activations at the peak of sampling. size: bytes of a weight."""
    rows = config.questions * config.group
    tokens = min(PREFILL, rows * config.trace_tokens // 2)
    wide = 3 * c.intermediate_size + 3 * c.hidden_size  # numbers per token inside an MLP
    groups = c.num_attention_heads // c.num_key_value_heads
    prefill = tokens * (wide + groups * config.trace_tokens) * size  # with the attention mask
    decode = 4 * rows * c.vocab_size * 4  # four copies of the logits in float32
    return max(prefill, decode)


def training_peak(c, config, size: int) -> float:
    """Bytes of activations at the peak of a training pass, without the gradients of weights.

    Of each block only the input is kept. The rest is computed again (Transformer.save_memory).
    """
    D = c.hidden_size
    tokens = max(config.micro_tokens, config.trace_tokens)
    kept = c.num_hidden_layers * tokens * D * size
    # Tensors of a block that its backward pass needs, and their gradients: in the width of the
    # stream and in that of the MLP.
    block = tokens * (13 * D + 7 * c.intermediate_size) * size
    scores = CHUNK * c.vocab_size * 4  # float32
    head = 4 * scores  # logits, log-probabilities, their exp and a product
    if not config.lora:  # backward: three of scores, and two gradients of the head's matrix
        head = 3 * scores + 2 * c.vocab_size * D * size
    return kept + max(block, head)


def count_bytes(c, config) -> dict[str, float]:
    """Bytes of each part of stage 2 at its peak, and the sums "stage 2" and "stage 1"."""
    size = 4 if config.precision == "float32" else 2
    weights, trained = count_weights(c, config.lora)
    number = 4 if config.lora else size  # adapters are float32
    optimizer = trained * 8  # two moments
    if number == 2:
        optimizer = 0 if config.offload else trained * 12  # and masters
    training = trained * number + training_peak(c, config, size)  # with gradients
    slot = 2 * c.num_hidden_layers * c.kv * size  # keys and values
    agent, simulator = count_slots(c, config)
    found = {"policy": weights * size + (trained * 4 if config.lora else 0),
             "simulator": 0 if config.lora else weights * size, "optimizer": optimizer,
             "agent_cache": agent * slot, "simulator_cache": simulator * slot,
             "peak": max(training, sampling_peak(c, config, size)), "other": OTHER}
    stage1 = found["policy"] + optimizer + training + OTHER  # no simulator and no cache
    return found | {"stage 2": sum(found.values()), "stage 1": stage1}


# By the names of count_bytes: what it is, and the options that lower it.
PARTS = {"policy": ("weights of the policy", ""),
         "simulator": ("weights of the simulator", "none with --lora"),
         "optimizer": ("AdamW's masters and moments", "none with --offload, little with --lora"),
         "agent_cache": ("AutoAgent's KV cache", "--questions, --group, --trace-tokens"),
         "simulator_cache": ("the simulator's KV cache", "--sim-rows, --trace-tokens"),
         "peak": ("gradients and activations", "--lora, --micro-tokens"),
         "other": ("CUDA itself, a guess", ""),
         "stage 2": ("grpo.py in all", ""), "stage 1": ("sft.py in all", "")}


def show_plan(config, card: float = 0.0) -> None:
    """Print the parts of this run, and what would fit. card: the GPU's bytes; 0: there is none."""
    stage1 = stage1_folder(config.out, config.sft)
    if not config.is_real():
        raise InputError(f"plan: {stage1} holds no trained checkpoint; name one, --plan FOLDER")
    c = read_shape(Path(config.plan) if names_folder(config.plan) else stage1 / "model")
    weights, trained = count_weights(c, config.lora)
    kind = "float32" if config.precision == "float32" else "bfloat16"
    print(f"{weights / 1e6:,.0f} million weights in {kind}, {trained / 1e6:,.0f} million parameters"
          " trained\nGPU memory in GB (10^9 bytes), counted from config.json:\n")
    found = count_bytes(c, config)
    for name, (text, lower) in PARTS.items():
        print(f"{text:30}{found[name] / GB:7.1f}  {lower}".rstrip())
    cards = [card / GB] if card else CARDS
    titles = {"options": "options", "stage 2": "grpo.py", "stage 1": "sft.py"}
    rows = []
    totals: list[float] = []
    for variant in VARIANTS:
        changed = count_bytes(c, replace(config, **variant))
        if changed["stage 2"] > found["stage 2"] or changed["stage 2"] in totals:
            continue  # it saves nothing, or no more than an earlier row
        totals.append(changed["stage 2"])
        row = {"options": f"and {flags_of(variant)}" if variant else "as given"}
        row |= {stage: f"{changed[stage] / GB:.1f}" for stage in ("stage 2", "stage 1")}
        for size in cards:
            titles[str(size)] = f"{size:.0f} GB"
            row[str(size)] = "fits" if changed["stage 2"] < size * GB else "no"
        rows.append(row)
    print()
    print_table(rows, titles)
    if not config.lora and config.precision != "float32":
        print(f"\n--offload takes {weights * 12 / GB:.1f} GB of the computer's memory")


def flags_of(options: dict) -> str:
    """Options as they are typed."""
    words = [f"--{name.replace('_', '-')}" + ("" if value is True else f" {value}")
             for name, value in options.items()]
    return " ".join(words)
