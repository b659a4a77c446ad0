"""The memory of one step of both stages, beside the plan of grpo.py --plan.

    python bench/memory.py --shape 0.5b                              on a GPU, or
    python bench/memory.py --shape 0.5b --device cpu --precision bfloat16 --questions 2 --group 4 \\
        --sim-rows 8 --trace-tokens 1024 --micro-tokens 1024 --turn-tokens 16 --max-turns 2

All options but --shape are grpo.py's. It writes a folder with random bfloat16 weights in the shape of a Qwen2.5 model,
and starts sft.py and grpo.py, each as a process of its own, for one step. Rewards are random, because random weights
earn none; nothing is evaluated. Both stages start with a rehearsal of the largest batch, so the peak of one step is
that of a run. On a GPU the peak is that of torch's allocator; "device" is all that the card had in use at the end,
with CUDA itself. On a CPU it is the resident memory beyond that of the imports. The last line is one JSON object.
"""
import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from floors import about
from load import make_tokenizer, memory_of
from rollout import SHAPES

import grpo
import run as run_file
import sft
from data.options import run_main
from data.plan import OTHER, count_bytes, flags_of, read_shape
from data.tokenizer import train_tokenizer
from model import Tokenizer, Transformer, save_model

ROOT = Path(__file__).resolve().parents[1]
SHARED = ("device", "precision", "micro_tokens", "lora", "offload")  # options of both stages


def write_files(folder: Path, shape: str) -> None:
    """A checkpoint with random weights, conversations for stage 1 and 30 questions for stage 2."""
    sample = ROOT / "data" / "sample"
    lines = [(sample / f"{role}.jsonl").read_text(encoding="utf-8") for role in sft.ROLES]
    (folder / "tokenizer").mkdir()
    config = replace(SHAPES[shape], max_position_embeddings=32768)
    if config.vocab_size > 100_000:
        make_tokenizer(folder / "tokenizer")
    else:
        train_tokenizer(lines, config.vocab_size, folder / "tokenizer")
    tokenizer = Tokenizer(folder / "tokenizer")
    with torch.device("meta"):
        model = Transformer(config).bfloat16()
    model = model.to_empty(device="cpu")
    fast = "cuda" if torch.cuda.is_available() else "cpu"  # a CPU takes minutes for 7B
    for name, weight in model.named_parameters():
        weight.data.copy_(torch.empty(weight.shape, device=fast).normal_(std=0.02) + float("norm" in name))
    torch.cuda.empty_cache()
    save_model(model, tokenizer, folder / "qwen")
    (folder / "traces.jsonl").write_text("".join(lines), encoding="utf-8")
    questions = (sample / "questions.jsonl").read_text(encoding="utf-8").splitlines()[:30]
    (folder / "questions.jsonl").write_text("\n".join(questions) + "\n", encoding="utf-8")


def child(stage: str, marker: Path) -> None:
    """One step of a stage, with what it takes as a line of JSON. The file `marker` says that training is over."""
    number = random.Random(0)
    zeros = dict.fromkeys(("em", "answer", "consistency", *grpo.PARTS), 0.0)
    grpo.reward = lambda *_: zeros | {"reward": number.random()}
    grpo.evaluate_heldout = lambda *_: {}
    sft.held_out_loss = lambda *_: 0.0
    save = run_file.Run._save_checkpoint
    run_file.Run._save_checkpoint = lambda *args: marker.touch() or save(*args)
    print("imported", flush=True)
    sys.stdin.readline()
    start = time.perf_counter()
    sys.argv = [f"{stage}.py", *sys.argv[4:]]
    run_main({"sft": sft, "grpo": grpo}[stage].main)
    found = {"seconds": round(time.perf_counter() - start, 1)}
    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        found |= {"peak": torch.cuda.max_memory_allocated() / 1e9,
                  "reserved": torch.cuda.max_memory_reserved() / 1e9, "device": (total - free) / 1e9}
    print(json.dumps(found))


def measure(stage: str, flags: list[str], marker: Path) -> dict:
    """Run one stage in a process and watch its memory, until it saves: copies that are written are not counted."""
    # glibc gives freed memory back at once, so resident memory is that of live tensors.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "100000"}
    process = subprocess.Popen([sys.executable, __file__, "child", stage, marker, *flags], text=True, cwd=ROOT, env=environment,
                               stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdout.readline() == "imported\n", f"{stage}.py can't be imported"
    before = peak = memory_of(process.pid, "VmRSS")
    process.stdin.write("go\n")
    process.stdin.flush()
    try:
        while process.poll() is None:
            if not marker.exists():
                peak = max(peak, memory_of(process.pid, "VmRSS"))
            time.sleep(0.005)
    finally:  # Ctrl-C stops the stage, too
        process.kill()
    if process.returncode:
        raise SystemExit(f"memory.py: {stage}.py has ended with code {process.returncode}")
    return {"peak": (peak - before) / 1e9} | json.loads(process.stdout.read().splitlines()[-1])


def main() -> None:
    """Write the files, run both stages, print plan and measurement."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="0.5b", choices=list(SHAPES))
    shape, rest = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_files(folder, shape.shape)
        sys.argv = ["grpo.py", *rest, "--plan", str(folder / "qwen")]
        config = grpo.command_line(grpo.GRPOConfig, "")
        plan = count_bytes(read_shape(folder / "qwen"), config)
        shared = flags_of({key: getattr(config, key) for key in SHARED if getattr(config, key)}).split()
        out = ["--out", str(folder / "run"), "--steps", "1"]
        for role in sft.ROLES:  # one batch each: more would take longer, and no more memory
            shared += [f"--{role}-tokens", str(config.micro_tokens)]
        found = {"sft": measure("sft", ["--model", str(folder / "qwen"), "--traces", str(folder / "traces.jsonl"), *out, *shared], folder / "sft"),
                 "grpo": measure("grpo", ["--data", str(folder / "questions.jsonl"), *out, *rest], folder / "grpo")}
    for stage, key in (("sft", "stage 1"), ("grpo", "stage 2")):
        found[stage]["plan"] = (plan[key] - OTHER) / 1e9
        print(stage, {k: round(v, 2) for k, v in found[stage].items()}, flush=True)
    print(json.dumps({"shape": shape.shape, "flags": rest} | found | about()))


if __name__ == "__main__":
    child(sys.argv[2], Path(sys.argv[3])) if sys.argv[1:2] == ["child"] else main()
