"""The whole chain on real question files, by hand: python tests/chain.py QWEN FILE...

QWEN is a folder with Qwen2.5's tokenizer; the weights are random, in its architecture with its 151,936 rows, two blocks deep.
So this shows that the stages take the real formats, how long they take and what memory; its scores mean nothing. Random
weights lead no trace that could be kept, so stage 1 learns from conversations that a script writes in the same form."""
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from agents import FALLBACK  # noqa: E402
from data.read import Item, read_questions  # noqa: E402
from model import ModelConfig, Tokenizer, Transformer, save_model  # noqa: E402

EACH = 12  # records a file


def first_records(path: Path, folder: Path) -> Path:
    """A file's first records in the format that it has."""
    text = path.read_text(encoding="utf-8")
    cut = json.dumps(json.loads(text)[:EACH]) if text.startswith("[") else "\n".join(text.split("\n")[:EACH])
    (folder / path.name).write_text(cut, encoding="utf-8")
    return folder / path.name


def conversation(item: Item) -> dict:
    """One lookup whose observation is the answer: all three roles, as stage 0 writes them."""
    tool = json.loads(FALLBACK.definition)
    call, told = {"name": "lookup", "arguments": {"subject": item.text, "property": "answer"}}, {"value": item.golds[0]}
    return {"conversations": [
        {"role": "agent", "question": item.text, "kind": "composition", "tools": [tool], "turns": [
            {"thought": "I look it up.", "calls": [call], "observations": [told]}, {"thought": "That is it.", "answer": item.golds[0]}]},
        {"role": "maker", "question": item.text, "thought": "A lookup.", "kind": "composition", "tools": [tool], "rejected": ""},
        {"role": "actor", "tool": tool, "exchanges": [[call["arguments"], told]]}]}


def stage(*words: object) -> None:
    """One command as a user types it; its seconds, and the largest memory of any command so far."""
    start = time.perf_counter()
    print(f"\n$ python {' '.join(map(str, words))}", flush=True)
    subprocess.run([sys.executable, *map(str, words)], cwd=ROOT, check=True)
    print(f"{time.perf_counter() - start:.0f} s; at most {resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20:.2f} GiB so far", flush=True)


def main(qwen: str, *files: str) -> None:
    """traces, sft, grpo, eval."""
    with tempfile.TemporaryDirectory() as name:
        folder, tokenizer = Path(name), Tokenizer(Path(qwen))
        data = [first_records(Path(file), folder) for file in files]
        shape = ModelConfig(151_936, 64, 128, 2, 2, 1, 4096, 1e-6, 1e6, True)
        save_model(Transformer(shape).init_weights(0), tokenizer, folder / "model")
        items = [item for file in data for item in read_questions(file)[0]]
        (folder / "script.jsonl").write_text("".join(json.dumps(conversation(item)) + "\n" for item in items), encoding="utf-8")
        short = ["--turn-tokens", 32, "--trace-tokens", 2048]
        stage("mtr.py", "traces", "--model", folder / "model", "--data", *data, "--out", folder / "traces.jsonl", "--samples", 1, *short)
        stage("sft.py", "--model", folder / "model", "--traces", folder / "script.jsonl", "--out", folder / "run", "--steps", 3)
        stage("grpo.py", "--out", folder / "run", "--data", *data, "--steps", 1, "--questions", 2, "--group", 2, *short)
        stage("mtr.py", "eval", "--out", folder / "run", "--data", *data)
        stage("mtr.py", "eval", "--model", folder / "run" / "grpo" / "model", "--data", *data, "--out", folder / "run", "--grounded",
              "--turn-tokens", 32, "--rows", 8)


if __name__ == "__main__":
    main(*sys.argv[1:])
