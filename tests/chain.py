"""The whole chain on real question files, by hand: python tests/chain.py QWEN FILE...

QWEN is a folder with Qwen2.5's tokenizer. The model has Qwen2.5's architecture with its 151,936
embedding rows, two layers and random weights. So this shows that the stages read the real formats,
and their time and memory; the scores mean nothing. Random weights give no trace to keep, so stage 1
learns from conversations that this script writes in the format of stage 0.
"""
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from agents import FALLBACK
from data.read import Item, read_questions
from data.tokenizer import Tokenizer
from model import ModelConfig, Transformer, save_model

ROOT = Path(__file__).resolve().parents[1]
EACH = 12  # records per file


def first_records(path: Path, folder: Path) -> Path:
    """Copy the first records of a file, in its own format."""
    text = path.read_text(encoding="utf-8")
    if text.startswith("["):
        cut = json.dumps(json.loads(text)[:EACH])
    else:
        cut = "\n".join(text.split("\n")[:EACH])
    (folder / path.name).write_text(cut, encoding="utf-8")
    return folder / path.name


def conversation(item: Item) -> dict:
    """A line of stage 0 with all three roles: one lookup, whose observation is the answer."""
    tool = json.loads(FALLBACK.definition)
    arguments = {"subject": item.text, "property": "answer"}
    observation = {"value": item.golds[0]}
    lookup = {"thought": "I look it up.", "observations": [observation],
              "calls": [{"name": "lookup", "arguments": arguments}]}
    answer = {"thought": "That is it.", "answer": item.golds[0]}
    shared = {"question": item.text, "kind": "composition", "tools": [tool]}
    return {"conversations": [
        {"role": "agent", **shared, "turns": [lookup, answer]},
        {"role": "maker", **shared, "thought": "A lookup.", "rejected": ""},
        {"role": "actor", "tool": tool, "exchanges": [[arguments, observation]]}]}


def stage(*words: object) -> None:
    """Run one command as a user types it. Print its seconds and the peak memory so far."""
    start = time.perf_counter()
    print(f"\n$ python {' '.join(map(str, words))}", flush=True)
    subprocess.run([sys.executable, *map(str, words)], cwd=ROOT, check=True)
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
    seconds = time.perf_counter() - start
    print(f"{seconds:.0f} s; peak memory of a command so far: {peak:.2f} GiB", flush=True)


def main(qwen: str, *files: str) -> None:
    """Run traces, sft, grpo and eval."""
    with tempfile.TemporaryDirectory() as name:
        folder, tokenizer = Path(name), Tokenizer(Path(qwen))
        data = [first_records(Path(file), folder) for file in files]
        shape = ModelConfig(151_936, 64, 128, 2, 2, 1, 4096, 1e-6, 1e6, True)
        save_model(Transformer(shape).init_weights(0), tokenizer, folder / "model")
        lines = []
        for file in data:
            lines += [json.dumps(conversation(item)) + "\n" for item in read_questions(file)[0]]
        (folder / "script.jsonl").write_text("".join(lines), encoding="utf-8")
        model, run = folder / "model", folder / "run"
        short = ["--turn-tokens", 32, "--trace-tokens", 2048]
        traces = ["mtr.py", "traces", "--model", model, "--out", folder / "traces.jsonl",
                  "--samples", 1, *short, "--data", *data]
        stage(*traces)
        stage(*traces)  # all traces are there, so nothing is sampled
        stage("sft.py", "--model", model, "--traces", folder / "script.jsonl", "--out", run,
              "--steps", 3)
        stage("grpo.py", "--out", run, "--data", *data, "--steps", 1, "--questions", 2,
              "--group", 2, *short)
        stage("mtr.py", "eval", "--out", run, "--data", *data)
        stage("mtr.py", "eval", "--model", run / "grpo" / "model", "--data", *data, "--out", run,
              "--name", "grounded", "--grounded", "--turn-tokens", 32, "--rows", 8)


if __name__ == "__main__":
    main(*sys.argv[1:])
