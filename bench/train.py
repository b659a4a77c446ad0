"""Training beside TRL and transformers on a CPU: seconds and memory, each side at its best settings.

  python bench/train.py                                all parts
  python bench/train.py --parts sft --sft-rounds 1     one part, fewer rounds

  grpo      one GRPO step with one turn per trace, beside TRL's GRPOTrainer. The shape is the
            miniature's: 12 questions x 8 traces, prompts of 240 tokens, replies of a fixed length
  rollout   multi-turn rollouts, beside generate() that reads the conversation again each turn. This
            is bench/rollout.py with the side `reprefill`
  sft       one step of stage 1 in the shape of Qwen2.5-0.5B, beside transformers' model and AdamW

Each side of `grpo` and `sft` is a process of its own with the same random weights. The sides take
turns, and only one works at a time. Results are medians. Before a part is timed, both sides compute
the same thing in float32, and the results are compared. The last line is one JSON object.

TRL gets: generation of all traces in one batch with a KV cache, no gradient checkpointing, beta 0,
num_iterations 1, no logging, fused AdamW. Of its training batches (all traces at once, or in parts)
and of the numbers of threads, the fastest are chosen for each precision; "better" is the faster
precision. transformers gets no attention mask, since padding on the right is never seen: so its
attention takes the fast kernel. Both sides of `sft` have float32 weights, bfloat16 autocast where
the processor computes in bfloat16, and fused AdamW. `recomputing` is ours as sft.py trains a
checkpoint: activations are computed again in the backward pass, and logits exist in chunks.
"""
import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import floors
from load import memory_of
from rollout import SHAPES, Plan, hugging_face, make_model

import grpo
import run
import sft
from agents import Trace
from data.options import Config
from data.training import micro_batches
from model import Sampler, Transformer, make_optimizer, optimizer_step
from run import half_precision, set_up

ROOT = Path(__file__).resolve().parents[1]
GROUP = 8
LR = 3e-4  # does not matter for the time


class Worker:
    """A side in a process of its own: one JSON object per line to it, and one back."""

    def __init__(self, part: str, side: str, args: argparse.Namespace, exact: bool = False):
        """exact: freed memory goes back to the system at once, so peaks are those of live tensors.
        """
        given = {name: value for name, value in vars(args).items() if name != "parts"}
        environment = os.environ | {"TRANSFORMERS_VERBOSITY": "error"}
        if exact:
            environment["MALLOC_MMAP_THRESHOLD_"] = "100000"
        self.process = subprocess.Popen(
            [sys.executable, __file__, "--child", part, side, json.dumps(given)], cwd=ROOT,
            env=environment, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self.first = self.answer()

    def answer(self) -> dict:
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit("train.py: a side has ended early")
        return json.loads(line)

    def ask(self, **request) -> dict:
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return self.answer()

    def stop(self) -> None:
        self.process.stdin.close()
        self.process.wait()


@contextmanager
def workers():
    """A function that starts workers. All of them are stopped at the end."""
    started = []

    def start(*args, **more) -> Worker:
        started.append(Worker(*args, **more))
        return started[-1]
    try:
        yield start
    finally:
        for worker in started:
            if worker.process.poll() is None:
                worker.process.kill()


def child(part: str, side: str, args: argparse.Namespace) -> None:
    """Serve one side. Whatever libraries print goes to stderr."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def reply(**answer) -> None:
        out.write(json.dumps(answer) + "\n")
        out.flush()

    def request() -> dict:
        line = sys.stdin.readline()
        if not line:
            os._exit(0)  # the parent is done; a trainer would go on
        return json.loads(line)

    set_up(Config(device="cpu"))
    {"grpo": trl_side if side.startswith("trl") else our_grpo, "sft": sft_side
     }[part](side, args, request, reply)


def near(a, b) -> float:
    """Norm of the difference over the norm."""
    a, b = torch.as_tensor(a, dtype=torch.float64), torch.as_tensor(b, dtype=torch.float64)
    return float((a - b).norm() / b.norm())


# ---------------------------------------------------------------------------------------- GRPO step


def grpo_plan(args: argparse.Namespace) -> Plan:
    """Prompts of 240 ids, and one reply of a fixed length for each trace."""
    rng = np.random.default_rng(0)
    size = SHAPES[args.shape].vocab_size
    prompts = rng.integers(0, size, (args.questions, 240)).tolist()
    rows = args.questions * GROUP
    return Plan(prompts, GROUP, [[args.reply]] * rows, [[[]]] * rows)


def grpo_config(args: argparse.Namespace) -> grpo.GRPOConfig:
    return grpo.GRPOConfig(questions=args.questions, group=GROUP, lr=LR, loss="dapo")


def grpo_floor(args: argparse.Namespace) -> dict[str, float]:
    """Seconds that sampling and training take by their FLOPs, at the rates of this machine."""
    torch.set_num_threads(max(args.threads))
    with torch.device("meta"):
        model = Transformer(SHAPES[args.shape])
    half = floors.training_dtype(Transformer(SHAPES["tiny"]))
    rates, _ = floors.machine("cpu", [torch.float32, half])
    rows = args.questions * GROUP
    sampling = floors.cost(model, args.questions, 240, 120)[0]
    for step in range(args.reply):
        sampling += floors.cost(model, rows, 1, 240 + step)[0] + floors.head_cost(model, rows)[0]
    ids = [0] * (240 + args.reply)
    traces = [Trace(ids=ids, mask=[0] * 240 + [1] * args.reply)] * rows
    training = floors.training_flops(model, traces)
    return {"sampling": round(sampling / rates[torch.float32], 3),
            "training": round(training / rates[half], 3)}


def check_batch(args: argparse.Namespace) -> tuple[list[list[int]], list[float]]:
    """16 traces of random ids and their advantages."""
    rng = np.random.default_rng(1)
    ids = rng.integers(0, SHAPES[args.shape].vocab_size, (16, 240 + args.reply)).tolist()
    return ids, rng.normal(size=16).tolist()


def gradient_of(model) -> list[float]:
    """The gradient of all q_proj weights, by layer: the same order on both sides."""
    found = [p.grad.flatten() for n, p in model.named_parameters() if n.endswith("q_proj.weight")]
    return torch.cat(found).tolist()


def our_grpo(side: str, args: argparse.Namespace, request, reply) -> None:
    """Our sampler and update. Sides: ours, ours_float32."""
    model = make_model(args.shape, "cpu", torch.float32).requires_grad_(True)
    plan, config = grpo_plan(args), grpo_config(args)
    if side == "ours_float32":
        run.chosen["precision"] = "float32"
    ids, advantages = check_batch(args)
    traces = []
    for row, advantage in zip(ids, advantages, strict=True):
        traces.append(Trace(advantage=advantage))
        traces[-1].hear(row[:240])
        traces[-1].say(row[240:])
    grpo.set_weights(traces, config)
    logprobs, _, mask = sft.trace_logprobs(model, traces)
    sums = dict.fromkeys(("kl", "clip_low", "clip_high", "loss", "entropy", "tokens"), 0.0)
    grpo.add_gradient(model, traces, config, sums)
    reply(logprobs=logprobs[mask].tolist(), gradient=gradient_of(model))
    model.zero_grad(set_to_none=True)

    optimizer = make_optimizer(model, LR, 0.0, momentum=0.5)
    sampler = Sampler(model, floors.NO_STOP, len(plan.said), plan.slots)
    seed = 0
    while True:
        torch.set_num_threads(request()["threads"])
        seed += 1
        log = floors.grpo_step(sampler, optimizer, plan, config, seed)
        reply(seconds=log["time_sample"] + log["time_train"], sampling=log["time_sample"],
              tokens=len(plan.said) * args.reply, grad_norm=log["grad_norm"])


def trl_side(side: str, args: argparse.Namespace, request, reply) -> None:
    """TRL's GRPOTrainer. Sides: trl_PRECISION_ROWS, with the rows of a training batch."""
    import tokenizers
    from datasets import Dataset
    from transformers import PreTrainedTokenizerFast as Fast
    from transformers import PrinterCallback, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    _, precision, rows = side.split("_")
    all_rows, rows = args.questions * GROUP, int(rows)
    size = SHAPES[args.shape].vocab_size
    # A word per id. The stop id is one that the model doesn't have, so no reply ends early.
    words = {f"t{i}": i for i in range(size)} | {"<end>": size}
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="t0"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer = Fast(tokenizer_object=inner, eos_token="<end>", pad_token="<end>")
    prompts = [" ".join(f"t{i}" for i in ids) for ids in grpo_plan(args).prompts]
    model = hugging_face(make_model(args.shape, "cpu", torch.float32)).requires_grad_(True)

    def reward(prompts, completions, completion_ids, **_):
        return [floors.pseudo_reward(ids[-8:]) for ids in completion_ids]

    times = {"sampling": 0.0, "tokens": 0}
    with tempfile.TemporaryDirectory() as folder:
        config = GRPOConfig(
            folder, use_cpu=True, bf16=precision == "bf16", gradient_checkpointing=False, beta=0.0,
            num_iterations=1, num_generations=GROUP, max_completion_length=args.reply,
            per_device_train_batch_size=rows, gradient_accumulation_steps=all_rows // rows,
            steps_per_generation=all_rows // rows, generation_kwargs={"eos_token_id": None},
            learning_rate=LR, lr_scheduler_type="constant", loss_type="dapo", max_steps=10_000,
            optim="adamw_torch_fused", report_to="none", logging_strategy="no",
            save_strategy="no", disable_tqdm=True, shuffle_dataset=False, dataloader_num_workers=0)
        trainer = GRPOTrainer(model, reward, config, Dataset.from_dict({"prompt": prompts}),
                              processing_class=tokenizer)
    trainer.remove_callback(PrinterCallback)
    generate = trainer._generate_single_turn

    def timed(*given, **more):
        start = time.perf_counter()
        completion_ids, logprobs = generate(*given, **more)
        times["sampling"] += time.perf_counter() - start
        times["tokens"] += sum(map(len, completion_ids))
        return completion_ids, logprobs
    trainer._generate_single_turn = timed

    class Clock(TrainerCallback):
        """The request comes before a step, the answer after it."""

        def on_step_begin(self, *_, **__):
            torch.set_num_threads(request()["threads"])
            times.update(sampling=0.0, tokens=0, start=time.perf_counter())

        def on_step_end(self, *_, **__):
            reply(seconds=time.perf_counter() - times["start"], sampling=times["sampling"],
                  tokens=times["tokens"])
    trainer.add_callback(Clock())

    ids, advantages = check_batch(args)
    model.train()
    ids = torch.tensor(ids)
    ones = torch.ones_like(ids)
    trainer.current_gradient_accumulation_steps = all_rows // rows
    inputs = {"prompt_ids": ids[:, :240], "prompt_mask": ones[:, :240],
              "completion_ids": ids[:, 240:], "completion_mask": ones[:, 240:],
              "advantages": torch.tensor(advantages),
              "num_items_in_batch": ones[:, 240:].sum()}
    # TRL takes the mean over all batches of a step. This batch is a whole step.
    trainer.args.steps_per_generation = trainer.current_gradient_accumulation_steps = 1
    with torch.no_grad():
        logprobs, _, _ = trainer._get_per_token_logps_and_entropies(
            model, ids, ones, args.reply)
    with trainer.compute_loss_context_manager():
        loss = trainer._compute_loss(model, inputs)
    loss.backward()
    reply(logprobs=logprobs.flatten().tolist(), gradient=gradient_of(model))
    model.zero_grad(set_to_none=True)
    trainer.args.steps_per_generation = all_rows // rows
    trainer._metrics["train"].clear()
    trainer.train()


def time_grpo(args: argparse.Namespace) -> dict:
    """The part `grpo`."""
    found = {"shape": args.shape, "rows": args.questions * GROUP, "reply": args.reply,
             "floor_seconds": grpo_floor(args)}
    batches = [rows for rows in args.trl_batch if args.questions * GROUP % rows == 0]
    with workers() as start:
        sides = {name: start("grpo", name, args) for name in ("ours", "ours_float32")}
        for precision in ("float32", "bf16"):
            for rows in batches:
                name = f"trl_{precision}_{rows}"
                sides[name] = start("grpo", name, args)
        found["check"] = check_grpo(sides)
        best = {}  # side -> threads
        for name, worker in list(sides.items()):
            tries = {}
            for threads in args.threads:
                worker.ask(threads=threads)  # warm-up
                tries[threads] = worker.ask(threads=threads)["seconds"]
            shown = ", ".join(f"{t:.2f} s on {n} threads" for n, t in tries.items())
            print(f"{name:<16} first {shown}", flush=True)
            best[name] = min(tries, key=tries.get), min(tries.values())
        for precision in ("float32", "bf16"):  # the better training batch of each precision
            of = [name for name in sides if name.startswith(f"trl_{precision}")]
            of.sort(key=lambda name: best[name][1])
            for name in of[1:]:
                sides.pop(name).stop()
        rows = {name: [] for name in sides}
        for _ in range(args.rounds):
            for name, worker in sides.items():
                rows[name].append(worker.ask(threads=best[name][0]))
    found["sides"] = {}
    for name, answers in rows.items():
        assert all(a["tokens"] == args.questions * GROUP * args.reply for a in answers), answers
        row = {"threads": best[name][0]}
        for key in ("seconds", "sampling"):
            row[key] = round(statistics.median(a[key] for a in answers), 3)
        row["training"] = round(statistics.median(a["seconds"] - a["sampling"] for a in answers), 3)
        found["sides"][name] = row
        print(f"{name:<16}{row['seconds']:8.2f} s  sampling {row['sampling']:6.2f}  "
              f"the rest {row['training']:6.2f}  ({row['threads']} threads)", flush=True)
    ours = found["sides"]["ours"]
    theirs = [row for name, row in found["sides"].items() if name.startswith("trl")]
    better = min(theirs, key=lambda row: row["seconds"])
    found["times_ours"] = round(better["seconds"] / ours["seconds"], 2)
    found["times_ours_sampling"] = round(min(row["sampling"] for row in theirs)
                                         / ours["sampling"], 2)
    print("floor by FLOPs, seconds:", found["floor_seconds"])
    print(f"TRL takes {found['times_ours']} times as long for a step, "
          f"{found['times_ours_sampling']} times for sampling", flush=True)
    return found


def check_grpo(sides: dict[str, Worker]) -> dict:
    """Log-probabilities and gradient of TRL beside ours in the same precision. At ratio 1 the loss
    is about 0 for any model, so it says nothing.
    """
    found = {}
    for name, worker in sides.items():
        if not name.startswith("trl"):
            continue
        ours = sides["ours_float32" if "float32" in name else "ours"].first
        errors = {key: near(worker.first[key], ours[key]) for key in ("logprobs", "gradient")}
        found[name] = errors
        print(f"{name}: differs from ours by", {k: f"{v:.1e}" for k, v in errors.items()},
              flush=True)
        # bfloat16 has 8 significant bits, and products are rounded in another order.
        most = 1e-4 if "float32" in name else 5e-2
        assert max(errors.values()) < most, f"{name} does not compute what ours does: {errors}"
    return found


# ----------------------------------------------------------------------------------------- rollouts


def time_rollout(args: argparse.Namespace) -> dict:
    """The part `rollout`: bench/rollout.py's last line."""
    command = [sys.executable, "bench/rollout.py", "--shape", args.shape, "--rounds",
               str(args.rounds), "--sides", "reprefill", "--threads", *map(str, args.threads)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    if done.returncode:
        raise SystemExit(f"train.py: rollout.py has failed\n{done.stderr[-2000:]}")
    print(done.stdout.rstrip().rpartition("\n")[0], flush=True)
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["greedy_equal"] == {"reprefill": 1.0}, found["greedy_equal"]
    return found


# ----------------------------------------------------------------------------------------- SFT step


def sft_batch(args: argparse.Namespace, small: bool = False) -> list[Trace]:
    """Conversations of about 512 tokens. small: two short ones, for the check and to warm up."""
    rng = np.random.default_rng(0)
    size = SHAPES[args.sft_shape].vocab_size
    lengths = (64, 50) if small else rng.integers(480, 545, args.conversations).tolist()
    return [floors.random_trace(length, size, rng) for length in lengths]


def their_loss(peer, traces: list[Trace], number: int) -> torch.Tensor:
    """transformers' own loss of a micro-batch, over the loss tokens of the whole batch."""
    width = max(len(trace.ids) for trace in traces)
    ids = torch.zeros(len(traces), width, dtype=torch.long)
    labels = torch.full((len(traces), width), -100)
    for i, trace in enumerate(traces):
        ids[i, :len(trace.ids)] = torch.tensor(trace.ids)
        scored = torch.tensor(trace.mask, dtype=torch.bool)
        labels[i, :len(trace.ids)][scored] = ids[i, :len(trace.ids)][scored]
    with half_precision("cpu"):
        return peer(input_ids=ids, labels=labels, use_cache=False, num_items_in_batch=number).loss


def sft_side(side: str, args: argparse.Namespace, request, reply) -> None:
    """A step of stage 1. Sides: transformers, ours, recomputing."""
    model = make_model(args.sft_shape, "cpu", torch.float32).requires_grad_(True)
    model.save_memory = side == "recomputing"
    if side == "transformers":
        peer = hugging_face(model).requires_grad_(True)
        optimizer = torch.optim.AdamW(peer.parameters(), lr=LR, betas=(0.9, 0.95),
                                      weight_decay=0.01, fused=True)
    else:
        optimizer = make_optimizer(model, LR, 0.01)

    def step(traces: list[Trace], lr: float) -> tuple[float, float]:
        if side != "transformers":
            losses, _ = sft.train_step(model, [traces], args.micro_tokens)
            return losses[0], optimizer_step(model, optimizer, lr, 1.0)
        number = sum(sum(trace.mask) for trace in traces)
        loss = 0.0
        for part in micro_batches(traces, args.micro_tokens):
            value = their_loss(peer, part, number)
            value.backward()
            loss += float(value.detach())
        return loss, optimizer_step(peer, optimizer, lr, 1.0)

    torch.set_num_threads(max(args.threads))
    run.chosen["precision"] = "float32"
    loss, norm = step(sft_batch(args, small=True), lr=0.0)
    reply(loss=loss, grad_norm=norm)
    run.chosen["precision"] = args.precision
    while True:
        request()
        traces = sft_batch(args)
        before = memory_of(os.getpid(), "VmRSS")  # with weights and moments
        start = time.perf_counter()
        loss, norm = step(traces, LR)
        seconds = time.perf_counter() - start
        above = memory_of(os.getpid(), "VmHWM") - before
        reply(seconds=seconds, loss=loss, grad_norm=norm, above_gb=above / 1e9)


def time_sft(args: argparse.Namespace) -> dict:
    """The part `sft`. The memory does not hold two sides at once. So a process makes one step, which
    holds all that a first step sets up, and ends.
    """
    model = Transformer(SHAPES["tiny"])  # of the type that is trained
    run.chosen["precision"] = args.precision
    dtype = floors.training_dtype(model)
    torch.set_num_threads(max(args.threads))
    rates, _ = floors.machine("cpu", [dtype])
    with torch.device("meta"):
        model = Transformer(SHAPES[args.sft_shape])
    parts = micro_batches(sft_batch(args), args.micro_tokens)
    size = sum(p.numel() for p in model.parameters())
    floor = sum(floors.training_flops(model, part) for part in parts) / rates[dtype]
    tokens = sum(len(trace.ids) for part in parts for trace in part)
    scored = sum(sum(trace.mask) for part in parts for trace in part)
    found = {"shape": args.sft_shape, "tokens": tokens, "scored": scored, "passes": len(parts),
             "dtype": str(dtype).removeprefix("torch."), "floor_seconds": round(floor, 2),
             "weights_and_moments_gb": round(12 * size / 1e9, 2)}
    sides = args.sft_sides
    answers = {side: [] for side in sides}
    memory = {}
    reference = whole = None  # the first side's small and whole step, which all others must equal
    with workers() as start:
        for number in range(args.sft_rounds + 1):
            for side in sides:
                # The first round measures memory; its malloc is slower.
                worker = start("sft", side, args, exact=number == 0)
                reference = reference or worker.first
                compare_steps(side, worker.first, reference, 1e-4)
                answer = worker.ask()
                worker.stop()
                print(f"{side:<13} {answer['seconds']:7.2f} s, loss {answer['loss']:.4f}, gradient "
                      f"{answer['grad_norm']:.4f}, {answer['above_gb']:.2f} GB", flush=True)
                whole = whole or answer
                compare_steps(side, answer, whole, 2e-2)
                if number == 0:
                    memory[side] = answer["above_gb"]
                else:
                    answers[side].append(answer)
    found["sides"] = {}
    for side in sides:
        seconds = statistics.median(answer["seconds"] for answer in answers[side])
        found["sides"][side] = {"seconds": round(seconds, 2), "times_floor": round(seconds / floor, 2),
                                "above_gb": round(memory[side], 2)}
        print(f"{side:<13}{seconds:8.2f} s  {seconds / floor:5.2f} times the floor of {floor:.2f} s; "
              f"{memory[side]:.2f} GB above weights and moments", flush=True)
    peer = found["sides"].get("transformers")
    for side in sides:
        if peer and side != "transformers":
            ours = found["sides"][side]
            found[f"{side}_over_transformers"] = {
                "seconds": round(ours["seconds"] / peer["seconds"], 2),
                "memory": round(ours["above_gb"] / peer["above_gb"], 2)}
    return found


def compare_steps(side: str, answer: dict, first: dict, most: float) -> None:
    """Loss and norm of the gradient of two sides must agree."""
    for key in ("loss", "grad_norm"):
        error = abs(answer[key] / first[key] - 1)
        assert error < most, f"{side}: {key} {answer[key]}, expected {first[key]}"


# ---------------------------------------------------------------------------------------------- main

PARTS = {"grpo": time_grpo, "rollout": time_rollout, "sft": time_sft}


def command_line(words: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", choices=PARTS, nargs="+", default=list(PARTS), metavar="PART",
                        help="what is timed: grpo, rollout, sft (default: all)")
    parser.add_argument("--rounds", type=int, default=5,
                        help="rounds of grpo and rollout (default: 5)")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2],
                        help="numbers of threads to try; sft takes the largest (default: 1 2)")
    parser.add_argument("--shape", choices=SHAPES, default="miniature",
                        help="of grpo and rollout (default: miniature)")
    parser.add_argument("--questions", type=int, default=12, help="of grpo (default: 12)")
    parser.add_argument("--reply", type=int, default=34,
                        help="tokens of a reply in grpo (default: 34, the mean of the miniature's "
                             "turns)")
    parser.add_argument("--trl-batch", type=int, nargs="+", default=[16, 96],
                        help="rows of TRL's training batches to try (default: 16 96)")
    parser.add_argument("--sft-rounds", type=int, default=3,
                        help="rounds of sft; one more, the first, measures memory (default: 3)")
    parser.add_argument("--sft-shape", choices=SHAPES, default="0.5b", help="(default: 0.5b)")
    parser.add_argument("--sft-sides", nargs="+", default=["transformers", "ours", "recomputing"],
                        choices=("transformers", "ours", "recomputing"), metavar="SIDE",
                        help="transformers, ours, recomputing (default: all)")
    parser.add_argument("--conversations", type=int, default=4,
                        help="conversations of about 512 tokens in an SFT step (default: 4)")
    parser.add_argument("--micro-tokens", type=int, default=4096,
                        help="tokens of a training pass in sft, with padding (default: 4096)")
    parser.add_argument("--precision", choices=("auto", "float32"), default="auto",
                        help="of sft; auto: bfloat16 autocast where the processor has it")
    args = parser.parse_args(words)
    if min(args.rounds, args.sft_rounds) < 1:
        parser.error("--rounds and --sft-rounds: at least 1")
    return args


def main() -> None:
    """python bench/train.py"""
    args = command_line(sys.argv[1:])
    set_up(Config(device="cpu"))
    found = {}
    for part in args.parts:
        print(f"\n{part}", flush=True)
        found[part] = PARTS[part](args)
    print(json.dumps(found | floors.about() | {"threads_available": os.cpu_count()}))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(sys.argv[2], sys.argv[3], argparse.Namespace(**json.loads(sys.argv[4])))
    else:
        main()
