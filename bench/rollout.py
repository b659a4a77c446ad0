"""Our rollout engine beside Hugging Face's generate: same weights, prompts, lengths, observations.

  ours        one cache: a group's prompt is prefilled once, observations are appended, finished
              rows are not computed
  reprefill   generate; every turn prefills the whole conversation, as most small RL repositories do
  kept        generate with a cache that is kept across turns; rows are dropped between turns
  kept_shared the same, and a group's prompt is prefilled once: all that this cache can do
  no_sharing, no_cache, no_leaving    ours with one part switched off

A turn ends at a planned length and not at a stop id. Every side generates the planned number of
tokens for each row. In generate, a stopping criterion ends the rows. So greedy ids can be compared.
Ours also returns log-probabilities; generate does not. The sides take turns. On a CPU, each side
uses one or two threads, whichever is faster. The last line is a JSON object.
"""
import argparse
import json
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from data.options import Config
from model import ModelConfig, Sampler, Transformer
from run import pick_device, set_up

SHAPES = {  # of Qwen2.5's config.json, of the miniature, and a tiny one for rehearsals
    "tiny": ModelConfig(300, 32, 64, 2, 4, 2, 2048, 1e-6, 1e6, True),
    "miniature": ModelConfig(1100, 192, 512, 3, 3, 1, 2048, 1e-6, 1e6, True),
    "0.5b": ModelConfig(151936, 896, 4864, 24, 14, 2, 32768, 1e-6, 1e6, True),
    "1.5b": ModelConfig(151936, 1536, 8960, 28, 12, 2, 32768, 1e-6, 1e6, True),
    "3b": ModelConfig(151936, 2048, 11008, 36, 16, 2, 32768, 1e-6, 1e6, True),
    "7b": ModelConfig(152064, 3584, 18944, 28, 28, 4, 32768, 1e-6, 1e6, False)}


def make_model(shape: str, device: str, dtype: torch.dtype) -> Transformer:
    """Random weights, made on the device."""
    with torch.device("meta"):
        model = Transformer(SHAPES[shape]).to(dtype)
    model = model.to_empty(device=device).eval().requires_grad_(False)
    generator = torch.Generator(device).manual_seed(0)
    for name, weight in model.named_parameters():
        if "norm" in name:
            weight.fill_(1)
        else:
            weight.normal_(0, 0.6 * weight.shape[-1] ** -0.5, generator=generator)
    return model


# --------------------------------------------------------------------------------------------- plan


@dataclass
class Plan:
    """The lengths of all turns, and the ids that come from outside."""
    prompts: list[list[int]]
    group: int                    # traces per prompt
    said: list[list[int]]         # [row][turn]: the number of tokens to generate
    heard: list[list[list[int]]]  # [row][turn]: the ids of the observation after that turn

    @property
    def slots(self) -> int:
        """Cache slots for the longest conversation plus the longest turn.

        With no_leaving, every row generates as many tokens as the longest turn of the batch.
        """
        longest = max(len(self.prompts[i // self.group]) + sum(said) + sum(map(len, heard))
                      for i, (said, heard) in enumerate(zip(self.said, self.heard, strict=True)))
        return longest + max(max(said) for said in self.said)


# Lengths of 640 traces that the miniature sampled, half of them after stage 1 and half after stage
# 2. TURNS and SAID list values and how often each occurred. Observations have 22 tokens.
PROMPTS = (238, 240, 243, 291, 293, 296, 351, 353)
TURNS = ((1, 2, 3, 4, 5, 6), (23, 63, 192, 254, 104, 4))
SAID = ((14, 24, 28, 40, 65), (24, 115, 1116, 909, 126))


def make_plan(shape: str, questions: int, group: int, seed: int = 0) -> Plan:
    """The miniature's lengths. For larger shapes: prompts of 790 tokens, four turns of 40 new
    tokens, and observations of 40 tokens between them.
    """
    rng = np.random.default_rng(seed)

    def pick(values, counts, n=None):
        return rng.choice(values, n, p=np.array(counts) / sum(counts)).tolist()

    def ids(n):
        return rng.integers(0, SHAPES[shape].vocab_size, n).tolist()

    if shape in ("tiny", "miniature"):
        prompts = [ids(PROMPTS[i % len(PROMPTS)]) for i in range(questions)]
        said = [pick(*SAID, pick(*TURNS)) for _ in range(questions * group)]
        return Plan(prompts, group, said, [[ids(22) for _ in turns[1:]] for turns in said])
    said = [[40] * 4] * (questions * group)
    prompts = [ids(790) for _ in range(questions)]
    return Plan(prompts, group, said, [[ids(40) for _ in range(3)] for _ in said])


def roll_out(side, plan: Plan, temperature: float) -> list[list[int]]:
    """Run one side through the plan -> the ids of each conversation."""
    talk = [list(prompt) for prompt in plan.prompts for _ in range(plan.group)]
    side.start(plan, temperature)
    for turn in range(max(map(len, plan.said))):
        rows = [i for i, said in enumerate(plan.said) if turn < len(said)]
        limits = [plan.said[i][turn] for i in rows]
        generated = side.speak(rows, [talk[i] for i in rows], limits)
        for i, new in zip(rows, generated, strict=True):
            assert len(new) == plan.said[i][turn], f"row {i}, turn {turn}: {len(new)} tokens"
            talk[i] += new + (plan.heard[i][turn] if turn < len(plan.heard[i]) else [])
    return talk


# -------------------------------------------------------------------------------------------- sides


class Ours:
    """model.Sampler. Each part of its gain can be switched off.

    share: prefill a group's prompt once. keep: keep the cache across turns. leave: don't compute
    finished rows.
    """

    def __init__(self, model: Transformer, plan: Plan, share: bool = True, keep: bool = True,
                 leave: bool = True):
        self.sampler = Sampler(model, SimpleNamespace(stop_ids=set()), len(plan.said), plan.slots)
        self.share, self.keep, self.leave = share, keep, leave

    def start(self, plan: Plan, temperature: float) -> None:
        self.temperature, self.rng = temperature, np.random.default_rng(0)
        self.sampler.reset()
        group = plan.group if self.share else 1
        prompts = [prompt for prompt in plan.prompts for _ in range(plan.group // group)]
        self.opened = dict(enumerate(self.sampler.open(prompts, group)))  # plan row -> conversation
        self.seen = [len(prompt) for prompt in plan.prompts for _ in range(plan.group)]

    def speak(self, rows: list[int], talk: list[list[int]], limits: list[int]) -> list[list[int]]:
        s = self.sampler
        first = all(self.seen[i] == len(ids) for i, ids in zip(rows, talk, strict=True))
        if not self.keep and not first:
            s.reset()
            self.opened = dict(zip(rows, s.open(talk), strict=True))
        for i, ids in zip(rows, talk, strict=True):
            if self.keep:
                s.append(self.opened[i], ids[self.seen[i]:])
        most, mine = max(limits), [self.opened[i] for i in rows]
        uniforms = self.rng.random((len(rows), most), dtype=np.float32)
        asked = limits if self.leave else [most] * len(rows)
        new = [ids for ids, _ in s.sample(mine, asked, uniforms, self.temperature)]
        if not self.leave:  # remove the tokens beyond the plan
            for c, ids, limit in zip(mine, new, limits, strict=True):
                c.pending = ids[limit - 1:limit]
                c.filled -= most - limit
                s.cache.length[c.row] -= most - limit
            new = [ids[:limit] for ids, limit in zip(new, limits, strict=True)]
        for i, ids, said in zip(rows, talk, new, strict=True):
            self.seen[i] = len(ids) + len(said)
        return new


def hugging_face(model: Transformer):
    """transformers' Qwen2ForCausalLM over the same tensors."""
    from transformers import Qwen2Config, Qwen2ForCausalLM
    c = model.config
    config = Qwen2Config(
        **{name: value for name, value in vars(c).items() if name != "rope_theta"},
        rope_parameters={"rope_type": "default", "rope_theta": c.rope_theta},
        attn_implementation="sdpa")
    with torch.device("meta"):
        peer = Qwen2ForCausalLM(config)
    missing = peer.load_state_dict(model.state_dict(), strict=False, assign=True)
    assert not missing.unexpected_keys and missing.missing_keys in ([], ["lm_head.weight"]), missing
    peer.tie_weights()
    # Checkpoints don't hold this buffer, so it is still on the meta device.
    peer.model.rotary_emb = type(peer.model.rotary_emb)(config).to(model.device)
    return peer.eval()


class Reprefill:
    """generate() on whole conversations, padded on the left."""

    def __init__(self, peer, plan: Plan):
        self.peer = peer

    def start(self, plan: Plan, temperature: float) -> None:
        self.plan, self.temperature = plan, temperature

    def speak(self, rows: list[int], talk: list[list[int]], limits: list[int]) -> list[list[int]]:
        return self.generate(*pad_left(talk, self.peer.device), limits)

    def generate(self, ids: torch.Tensor, mask: torch.Tensor, limits: list[int], cache=None
                 ) -> list[list[int]]:
        from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList

        class Limits(StoppingCriteria):
            """End a row at its planned length. From then on it is fed padding."""
            eos_token_id = None  # generate() pads ended rows if a criterion has this attribute
            ends = ids.shape[1] + torch.tensor(limits, device=ids.device)

            def __call__(self, input_ids, scores, **_):
                return input_ids.shape[1] >= self.ends

        sampling = {}
        if self.temperature:
            sampling = dict(do_sample=True, temperature=self.temperature, top_k=0, top_p=1.0)
        config = GenerationConfig(max_new_tokens=max(limits), pad_token_id=0, **sampling)
        out = self.peer.generate(ids, attention_mask=mask, generation_config=config,
                                 past_key_values=cache,
                                 stopping_criteria=StoppingCriteriaList([Limits()]))
        return [line[:n] for line, n in zip(out[:, ids.shape[1]:].tolist(), limits, strict=True)]


class Kept(Reprefill):
    """generate() on one DynamicCache. Conversations have holes; the attention mask hides them."""

    def __init__(self, peer, plan: Plan, share: bool = False):
        super().__init__(peer, plan)
        self.share = share

    def start(self, plan: Plan, temperature: float) -> None:
        from transformers import DynamicCache
        super().start(plan, temperature)
        ids, mask = pad_left(plan.prompts, self.peer.device)
        self.cache = DynamicCache(config=self.peer.config)
        if self.share:
            with torch.no_grad():  # all but the last id, which generate() feeds
                positions = (mask.cumsum(1) - 1).clamp(min=0)
                self.peer(ids[:, :-1], attention_mask=mask[:, :-1], past_key_values=self.cache,
                          logits_to_keep=1, position_ids=positions[:, :-1])
            self.cache.batch_repeat_interleave(plan.group)
        self.ids, self.mask = (x.repeat_interleave(plan.group, 0) for x in (ids, mask))
        self.rows = list(range(len(self.ids)))
        self.seen = [len(p) for p in plan.prompts for _ in range(plan.group)]

    def speak(self, rows: list[int], talk: list[list[int]], limits: list[int]) -> list[list[int]]:
        if rows != self.rows:
            stay = torch.tensor([self.rows.index(i) for i in rows], device=self.ids.device)
            self.cache.batch_select_indices(stay)
            self.ids, self.mask, self.rows = self.ids[stay], self.mask[stay], rows
        heard = [ids[self.seen[i]:] for i, ids in zip(rows, talk, strict=True)]
        if any(heard):
            self.grow(*pad_left(heard, self.ids.device))
        new = self.generate(self.ids, self.mask, limits, self.cache)
        said, real = pad_left([ids[::-1] for ids in new], self.ids.device)
        self.grow(said.flip(1), real.flip(1))  # padded on the right
        for i, ids, said in zip(rows, talk, new, strict=True):
            self.seen[i] = len(ids) + len(said)
        return new

    def grow(self, ids: torch.Tensor, mask: torch.Tensor) -> None:
        """Append columns to all rows."""
        self.ids, self.mask = torch.cat((self.ids, ids), 1), torch.cat((self.mask, mask), 1)


def pad_left(rows: list[list[int]], device) -> tuple[torch.Tensor, torch.Tensor]:
    """Lists of ids -> ids (B, T) and attention mask (B, T), padded on the left."""
    T = max(map(len, rows))
    ids = torch.tensor([[0] * (T - len(row)) + row for row in rows], device=device)
    mask = torch.tensor([[0] * (T - len(row)) + [1] * len(row) for row in rows], device=device)
    return ids, mask


# ------------------------------------------------------------------------------------------- timing


def seconds(side, plan: Plan, threads: int) -> float:
    """Wall-clock time of one rollout at temperature 1."""
    torch.set_num_threads(threads)
    start = time.perf_counter()
    roll_out(side, plan, 1.0)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


SIDES = {
    "ours": lambda model, peer, plan: Ours(model, plan),
    "no_sharing": lambda model, peer, plan: Ours(model, plan, share=False),
    "no_cache": lambda model, peer, plan: Ours(model, plan, keep=False),
    "no_leaving": lambda model, peer, plan: Ours(model, plan, leave=False),
    "reprefill": lambda model, peer, plan: Reprefill(peer, plan),
    "kept": lambda model, peer, plan: Kept(peer, plan),
    "kept_shared": lambda model, peer, plan: Kept(peer, plan, share=True)}


def same_greedy_ids(shape: str, device: str, sides: list[str], questions: int, group: int
                    ) -> dict[str, float]:
    """Share of the conversations with the same greedy ids as ours, in float32, for each side."""
    model, plan = make_model(shape, device, torch.float32), make_plan(shape, questions, group)
    if shape not in ("tiny", "miniature"):  # shorter turns for the larger shapes
        plan.said, plan.heard = [[6, 4]] * len(plan.said), [heard[:1] for heard in plan.heard]
    peer, want = hugging_face(model), roll_out(Ours(model, plan), plan, 0.0)
    same = {}
    for name in sides:
        got = roll_out(SIDES[name](model, peer, plan), plan, 0.0)
        same[name] = sum(a == b for a, b in zip(want, got, strict=True)) / len(want)
    return same


def main() -> None:
    """python bench/rollout.py"""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="miniature")
    parser.add_argument("--questions", type=int, help="prompts (default: 8; 2 for larger shapes)")
    parser.add_argument("--group", type=int,
                        help="traces per prompt (default: 8; 4 for larger shapes)")
    parser.add_argument("--rounds", type=int, default=5,
                        help="the result is their median (default: 5)")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2],
                        help="numbers of threads to try on a CPU (default: 1 2)")
    parser.add_argument("--sides", choices=SIDES, nargs="+", default=list(SIDES), metavar="SIDE",
                        help="default: all")
    parser.add_argument("--no-greedy-check", action="store_true",
                        help="do not compare greedy ids in float32 first")
    args = parser.parse_args()
    set_up(Config(), checkpoint=True)
    small, device = args.shape in ("tiny", "miniature"), pick_device()
    questions, group = args.questions or (8 if small else 2), args.group or (8 if small else 4)
    few = 8 if small else 2
    same = {}
    if not args.no_greedy_check:
        same = same_greedy_ids(args.shape, device, args.sides, min(questions, few), min(group, few))
    print("greedy ids equal to ours:", same or "not checked", flush=True)
    model = make_model(args.shape, device, torch.float32 if small else torch.bfloat16)
    peer, plan = hugging_face(model), make_plan(args.shape, questions, group)
    sides = {name: SIDES[name](model, peer, plan) for name in dict.fromkeys(["ours", *args.sides])}
    threads = {}
    for name, side in sides.items():  # this also warms up
        counts = args.threads if device == "cpu" else args.threads[:1]
        tries = {n: seconds(side, plan, n) for n in counts}
        threads[name] = min(tries, key=tries.get)
        shown = ", ".join(f"{t:.2f} s on {n} threads" for n, t in tries.items())
        print(f"{name:<12} first {shown}", flush=True)
    times = {name: [] for name in sides}
    for _ in range(args.rounds):
        for name, side in sides.items():
            times[name].append(seconds(side, plan, threads[name]))
    medians = {name: statistics.median(values) for name, values in times.items()}
    tokens = sum(map(sum, plan.said))
    for name, median in medians.items():
        print(f"{name:<12}{median:8.2f} s  {tokens / median:8.0f} new tokens/s  "
              f"{median / medians['ours']:6.2f} times ours")
    print(json.dumps({"shape": args.shape, "device": device, "rows": len(plan.said),
                      "new_tokens": tokens, "rounds": args.rounds, "greedy_equal": same,
                      "threads": threads, "seconds": {n: round(m, 3) for n, m in medians.items()},
                      "times_ours": {n: round(m / medians["ours"], 2)
                                     for n, m in medians.items()}}))


if __name__ == "__main__":
    main()
