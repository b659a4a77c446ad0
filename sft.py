"""Stage 1: loss-masked supervised fine-tuning on ReAct traces, for all three roles at once.

    loss = - mean of log p(token | all tokens before it), over the tokens that the role generates

The mean is taken per role, then over the roles. All other tokens have mask 0: the system
turn, tools, question, observations and headers.
"""
import math
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import chain, count, islice
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

import agents
import ranks
from agents import AutoAgent, Tool, ToolActor, ToolMaker, Trace
from data import InputError, chat
from data.options import StageConfig, command_line, option, run_main
from data.prompts import SHORT, Prompts
from data.tokenizer import Tokenizer, train_tokenizer
from data.training import ROLES, micro_batches, read_traces, schedule, spans_of_ones, texts_of
from data.world import make_world, teach
from model import (
    ModelConfig,
    Transformer,
    adapted,
    load,
    make_optimizer,
    optimizer_step,
    pad,
    token_logprobs,
)
from run import Run, half_precision, pick_device, set_up, weights_type

# Shapes of a model that starts from random weights.
MINIATURE = {"hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 3,
             "num_attention_heads": 3, "num_key_value_heads": 1}
TOY = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
       "num_attention_heads": 2, "num_key_value_heads": 1}
VOCABULARY = 1280  # maximum number of ids in the tokenizer of such a model


@dataclass
class SFTConfig(StageConfig):
    """The options of stage 1."""
    out: str = option("run", "run folder; this stage writes OUT/sft")
    model: str = option("", "checkpoint folder to start from, in place of random weights")
    shape: str = option("miniature", "size of the random model", choices=("miniature", "toy"))
    traces: str = option("", "file of traces or OpenAI messages", unset="the scripted teacher's")
    worlds: int = option(20, "worlds with the same names but other facts, so that no agent learns "
                         "facts by heart; each gives AutoAgent and ToolMaker 300 conversations")
    steps: int = option(1300, "optimizer steps", real=300)
    agent_tokens: int = option(1600, "AutoAgent's tokens per step, with padding", real=16384)
    maker_tokens: int = option(900, "ToolMaker's tokens per step, with padding", real=8192)
    actor_tokens: int = option(900, "ToolActor's tokens per step, with padding", real=8192)
    piece: int = option(24, "at first, conversations are cut into pieces of this many tokens, "
                        "AutoAgent's into pieces of four times as many", least=2)
    piece_steps: int = option(150, "after each so many steps, pieces get four times as long, until "
                              "they are whole conversations")
    lr: float = option(1.5e-3, "peak learning rate", real=1e-5, lora=1e-4)
    warmup: int = option(100, "steps of warm-up; then a cosine falls to 5 %", least=0, real=20)
    weight_decay: float = option(0.01, "AdamW's weight decay, for matrices only", least=0)
    continued_steps: int = option(1500, "steps of mtr.py's control: more SFT, for GRPO's time")
    eval_every: int = option(300, "steps between two evaluations of the held-out loss", real=50)
    save_every: int = option(150, "steps between two checkpoints", real=50)

    def __post_init__(self):
        super().__post_init__()
        if self.lora and not self.model:
            raise InputError("lora: adapters need a checkpoint, --model FOLDER")


# ------------------------------------------------------------------------- shared by both stages


def rehearse(model: Transformer, optimizer: torch.optim.Optimizer, longest: int, tokens: int
             ) -> None:
    """Train on full batches at a learning rate of 0: memory runs out now or never.

    longest: tokens of the longest trace; tokens: of a micro-batch.
    """
    rows = math.ceil(tokens / longest)
    length = max(tokens, longest) // rows
    traces = [Trace(ids=[0] * length, mask=[0] + [1] * (length - 1))] * rows
    for passes in (1, 2):  # the third pass finds moments and gradients in place
        for _ in range(passes):
            logprobs, _, _ = trace_logprobs(model, traces)
            (0 * logprobs.sum()).backward()
        optimizer_step(model, optimizer, lr=0.0, clip_norm=1.0)
    for moment in chain(*[moments.values() for moments in optimizer.state.values()]):
        moment.zero_()


# ------------------------------------------------------------------------ conversations to traces

# A recorded conversation is a dict with a "role" and, by role, these keys (see data/world.py):
#   agent   question, kind, tools, turns: each with thought, and calls and observations, or answer
#   maker   question, rejected, thought, kind, tools
#   actor   tool, exchanges: pairs of arguments and result. Many calls share one tool definition,
#           to save tokens. In a rollout, a ToolActor conversation has one call.
Turns = list[tuple[list[str], list[str]]]  # per turn: what the role generates, what it receives


def split_conversation(record: dict, prompts: Prompts = SHORT) -> tuple[list[str], Turns]:
    """A recorded conversation -> its prompt and its turns."""
    if "system" in record:  # from OpenAI messages (data/messages.py)
        return _chat_conversation(record)
    if record["role"] == "agent":
        return _agent_conversation(record, prompts)
    if record["role"] == "maker":
        tools = [Tool(**tool) for tool in record["tools"]]
        reply = ToolMaker.reply(record["thought"], record["kind"], tools)
        prompt = ToolMaker.prompt(prompts, record["question"], record["rejected"])
        return prompt, [([reply], [])]
    all_arguments, results = zip(*record["exchanges"], strict=True)
    received = []
    for arguments in all_arguments[1:]:
        call = chat.chat_turn("user", chat.dumps(arguments))
        received.append(["\n", *call, *chat.GENERATE])
    generated = [[chat.result_text(result)] for result in results]
    prompt = ToolActor.prompt(prompts, Tool(**record["tool"]).definition, all_arguments[0])
    return prompt, list(zip(generated, [*received, []], strict=True))


def _agent_conversation(record: dict, prompts: Prompts) -> tuple[list[str], Turns]:
    """split_conversation for AutoAgent."""
    tools = {tool["name"]: Tool(**tool) for tool in record["tools"]}
    for name in agents.KINDS[record["kind"]]:
        tools.setdefault(name, agents.UTILITIES[name])  # a user's tool may have its name
    turns = []
    for turn in record["turns"]:
        thought = prompts.thought.format(turn["thought"]).removeprefix(prompts.begin)
        if "answer" in turn:
            turns.append(([thought, "\n", prompts.answer.format(turn["answer"])], []))
        else:
            results = [chat.result_text(observation) for observation in turn["observations"]]
            header = [*chat.GENERATE, prompts.begin]
            received = ["\n", *chat.results_turn(results), *header]
            turns.append((chat.assistant_content(thought, turn["calls"]), received))
    return AutoAgent.prompt(prompts, record["question"], list(tools.values())), turns


def _chat_conversation(record: dict) -> tuple[list[str], Turns]:
    """split_conversation for OpenAI messages, as Qwen2.5's chat template prints them."""
    generated = []
    received = [chat.system_turn(record["system"], record["tools"])]  # before each reply
    for turn in record["turns"]:
        for message in turn["heard"]:
            if message["role"] == "tool":
                received[-1] += chat.results_turn(message["results"])
            else:
                content = chat.assistant_content(message["content"], message["calls"])
                received[-1] += chat.chat_turn(message["role"], *content)
        received[-1] += chat.GENERATE
        generated.append(chat.assistant_content(turn["content"], turn["calls"]))
        received.append(["\n"])
    return received[0], list(zip(generated, [*received[1:-1], []], strict=True))


def to_trace(record: dict, tokenizer: Tokenizer) -> Trace:
    """A recorded conversation -> the Trace that a rollout of this text gives: same ids and mask."""
    prompt, turns = split_conversation(record, tokenizer.prompts)
    trace = Trace(record.get("question", ""))
    trace.hear(tokenizer.encode(prompt))
    for generated, received in turns:
        trace.say(tokenizer.encode([*generated, chat.IM_END]))
        trace.hear(tokenizer.encode(received))
    return trace


def to_traces(records: dict, tokenizer: Tokenizer, most: int) -> dict[str, list[Trace]]:
    """Recorded conversations by role -> traces. most: tokens that the model is made for."""
    made = {role: [to_trace(r, tokenizer) for r in part] for role, part in records.items()}
    for trace in chain(*made.values()):
        if len(trace.ids) > most:
            raise InputError(f"traces: the conversation about {trace.question!r:.60} has "
                             f"{len(trace.ids)} tokens, but the model is made for {most}")
    return made


# --------------------------------------------------------------------------- batches and curriculum


def cut(traces: list[Trace], tokens: int, enough: int) -> list[Trace]:
    """Cut traces into pieces of at most `tokens` tokens, until the pieces hold `enough` tokens.

    A piece ends with a generated token. A model with random weights must first learn to copy names.
    It learns this fast on a few dozen tokens, slowly on hundreds (sequence-length warm-up, Li et
    al. 2021).
    """
    made = []
    total = 0
    for trace in traces:
        for begin, end in spans_of_ones(trace.mask):
            # From the end of the turn backwards. Pieces of a long turn overlap by half.
            for stop in range(end, begin, -(tokens // 2)):
                start = max(0, stop - tokens)
                mask = [0] + trace.mask[start + 1:stop]  # the first token has no context
                made.append(Trace(ids=trace.ids[start:stop], mask=mask))
                total += stop - start
        if total >= enough:
            break
    return made


def batches(traces: list[Trace], tokens: int, rng: random.Random) -> Iterator[list[Trace]]:
    """Endless batches of at most `tokens` tokens with padding, in shuffled epochs."""
    while True:
        order = rng.sample(traces, len(traces))
        made = []
        for i in range(0, len(order), 64):  # only 64 are sorted by length, so batches stay random
            made += micro_batches(order[i:i + 64], tokens)
        yield from rng.sample(made, len(made))


def curriculum(data: dict[str, list[Trace]], config: SFTConfig) -> Iterator[list[list[Trace]]]:
    """For each step, one batch per role: at first of short pieces, in the end of whole traces."""
    rng = random.Random(f"batches {config.seed}")
    length = config.piece
    while True:
        streams = []
        whole = True
        for role in ROLES:
            traces = data[role]
            if not traces:
                continue
            tokens = getattr(config, f"{role}_tokens")
            piece = 4 * length if role == "agent" else length  # AutoAgent copies from further back
            if piece < max(len(trace.ids) for trace in traces):
                order = rng.sample(traces, len(traces))
                traces = cut(order, piece, tokens * config.piece_steps)
                whole = False
            streams.append(batches(traces, tokens, rng))
        steps = count() if whole else range(config.piece_steps)  # count() never ends
        for _ in steps:
            yield [next(stream) for stream in streams]
        length *= 4


# -------------------------------------------------------------------------------------------- loss


def trace_logprobs(model: Transformer, traces: list[Trace], temperature: float = 1.0
                   ) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities, entropies and loss mask of a micro-batch, all (B, T)."""
    device = str(model.device)
    ids = pad([trace.ids for trace in traces], device)
    mask = pad([trace.mask for trace in traces], device, torch.bool)
    with half_precision(device):
        logprobs, entropy = token_logprobs(model, ids, mask, temperature)
    return logprobs, entropy, mask


def masked_loss(model: Transformer, traces: list[Trace]) -> tuple[Tensor, int]:
    """Sum of -log p over the tokens with mask 1, and their number."""
    logprobs, _, mask = trace_logprobs(model, traces)
    return -logprobs.sum(), int(mask.sum())


def train_step(model: Transformer, parts: list[list[Trace]], most: int) -> tuple[list[float], int]:
    """Add the gradient of one batch per role -> the loss of each role, the number of loss tokens.

    A role's loss is the mean over its tokens. Each role has the same weight in the step. A pass has
    at most `most` tokens.
    """
    losses = []
    tokens = 0
    for part in parts:
        number = sum(sum(trace.mask) for trace in part)
        loss = 0.0
        for micro in micro_batches(ranks.share(part), most):
            total, _ = masked_loss(model, micro)
            (total / number / len(parts)).backward()
            loss += float(total.detach()) / number
        losses.append(sum(ranks.all_gather(loss)))
        tokens += number
    ranks.sum_gradients(model)
    return losses, tokens


@torch.no_grad()
def held_out_loss(model: Transformer, traces: list[Trace], tokens: int) -> float:
    """Mean -log p per loss token of held-out traces, in passes of at most `tokens` tokens."""
    sums = [masked_loss(model, part) for part in micro_batches(traces, tokens)]
    return sum(float(total) for total, _ in sums) / sum(number for _, number in sums)


# -------------------------------------------------------------------------------------------- loop

SFT_COLUMNS = ["step", "loss_agent", "loss_maker", "loss_actor", "heldout_agent", "heldout_maker",
               "lr", "grad_norm", "tokens", "time_step"]


def fit(model: Transformer, tokenizer: Tokenizer, data: dict[str, list[Trace]],
        valid: dict[str, list[Trace]], config: SFTConfig, run: Run) -> None:
    """The loop of stage 1: batch, loss, step, log."""
    steps = config.steps
    optimizer = make_optimizer(model, config.lr, config.weight_decay, offload=config.offload)
    roles = [role for role in ROLES if data[role]]
    if config.is_real():
        longest = max(len(trace.ids) for trace in chain(*data.values()))
        rehearse(model, optimizer, longest, config.micro_tokens)
    first = run.state["step"]  # above 0 if the run is resumed: its batches are skipped below
    bar = tqdm(run.steps(steps, model, tokenizer, optimizer), desc="sft", unit="step",
               mininterval=1, total=steps, initial=first)
    for step, parts in zip(bar, islice(curriculum(data, config), first, None), strict=False):
        start = time.perf_counter()
        lr = config.lr * schedule(step, steps, config.warmup)
        losses, tokens = train_step(model, parts, config.micro_tokens)
        norm = optimizer_step(model, optimizer, lr, config.clip_norm)

        row = {"step": step, "lr": lr, "grad_norm": norm, "tokens": tokens,
               "time_step": time.perf_counter() - start}
        for role, loss in zip(roles, losses, strict=True):
            row[f"loss_{role}"] = loss
        if step % config.eval_every == 0 or step == steps - 1:
            for role, traces in valid.items():
                if traces:
                    # Without a gradient, twice as many tokens fit.
                    loss = held_out_loss(model, traces, 2 * config.micro_tokens)
                    row[f"heldout_{role}"] = loss
        run.log(row)
        shown = {role: f"{loss:.3f}" for role, loss in zip(roles, losses, strict=True)}
        bar.set_postfix(shown, refresh=False)


def new_miniature(config: SFTConfig, records: dict[str, list[dict]], run: Run
                  ) -> tuple[Transformer, Tokenizer]:
    """A small model with random weights, and a tokenizer that is trained on the conversations."""
    if run.checkpoint:  # resumed: the tokenizer exists, and Run.steps loads the weights
        tokenizer = Tokenizer(run.checkpoint)
    else:
        texts = texts_of(records, split_conversation)
        names = list(chain(*make_world(config.seed).names.values()))
        texts += names * 20  # so each name becomes one token
        train_tokenizer(texts, VOCABULARY, run.folder / "model")
        tokenizer = Tokenizer(run.folder / "model")
    shape = MINIATURE if config.shape == "miniature" else TOY
    model = Transformer(ModelConfig(
        tokenizer.size, **shape, max_position_embeddings=2048, rms_norm_eps=1e-6, rope_theta=1e6,
        tie_word_embeddings=True)).init_weights(config.seed)
    return model.to(pick_device(), weights_type()), tokenizer


def train_sft(config: SFTConfig, continued: bool = False) -> None:
    """Run stage 1 -> OUT/sft/model. `continued` runs the control: more SFT from OUT/sft/model."""
    set_up(config, checkpoint=bool(config.model))
    folder = Path(config.out) / "sft"
    source = Path(config.model) if config.model else None
    if source and source.resolve().is_relative_to(folder.resolve()):
        raise InputError(f"model: {source} lies where this run would be written; choose another "
                         "--out")
    seed = config.seed
    if continued:  # the same conversations in other batches, with half the learning rate
        source = folder / "model"
        folder = folder.with_name("sft_continued")
        seed += 1000
        config = replace(config, steps=config.continued_steps, lr=config.lr / 2)
    if source:  # a broken folder is refused before anything is written
        model, tokenizer = load(source, pick_device(), weights_type())
        if config.lora:
            model = adapted(model, config.lora, config.seed)
        model.save_memory = config.is_real()
    if config.traces:
        records, valid = read_traces(config.traces, split_conversation)
    sources = [path for path in (source, config.traces) if path]
    run = Run(folder, config, SFT_COLUMNS, sources)
    if run.finished:
        return
    if not config.traces:
        print("making the world and its teacher's conversations", flush=True)
        records, valid = teach(config.seed, config.worlds)
    if source:  # a trained model can copy already: pieces longer than any trace are whole traces
        config = replace(config, piece=1_000_000)
    else:
        model, tokenizer = new_miniature(config, records, run)
    config = replace(config, seed=seed)  # from here on, the seed of the batches
    most = model.config.max_position_embeddings
    train, held_out = [to_traces(part, tokenizer, most) for part in (records, valid)]
    fit(model, tokenizer, train, held_out, config, run)
    run.save(model, tokenizer)


def main() -> None:
    """python sft.py"""
    config = command_line(SFTConfig, __doc__)
    train_sft(config)
    more = " --data FILE" if config.model else ""
    more += f" --lora {config.lora}" if config.lora else ""
    print(f"stage 1 is done; next: python grpo.py --out {config.out}{more}")


if __name__ == "__main__":
    run_main(main)
