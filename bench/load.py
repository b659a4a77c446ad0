"""Load a checkpoint in Qwen2.5-0.5B's shape, beside transformers: seconds and peak memory.

    python bench/load.py

It writes a folder with random bfloat16 weights and a byte-level tokenizer of Qwen2.5's size, and
removes it at the end. Each load is a process of its own; ours and theirs take turns. A load ends
when model and tokenizer are ready to use. Memory is anonymous memory, which a process can't give
back to the page cache; weights that stay mapped from the file don't count. It is polled from
outside, so a peak inside the load is seen. Needs tests/requirements-peers.txt.
"""
import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import tokenizers
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from data.tokenizer import CONTROL_TOKENS, Tokenizer
from model import ModelConfig, Transformer, load, save_model

SHAPE = ModelConfig(151936, 896, 4864, 24, 14, 2, 32768, 1e-6, 1e6, True)
ROUNDS, SIDES, DTYPES = 5, ("ours", "transformers"), ("float32", "bfloat16")


def make_tokenizer(folder: Path) -> None:
    """A BPE of Qwen2.5's size. Each merge adds a byte to an earlier token."""
    letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    words, merges = list(letters), []
    for word in words:
        merges += [(word, letter) for letter in letters]
        words += [word + letter for letter in letters]
        if len(words) > SHAPE.vocab_size - 300:
            break
    words, merges = words[:151643], merges[:151643 - len(letters)]
    vocabulary = {word: i for i, word in enumerate(words)}
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, merges))
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    for name in CONTROL_TOKENS:
        bpe.add_tokens([tokenizers.AddedToken(name, special=True, normalized=False)])
    bpe.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "Qwen2Tokenizer", "eos_token": "<|im_end|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def make_folder(folder: Path) -> None:
    """A tokenizer and random weights."""
    make_tokenizer(folder)
    model = Transformer(SHAPE).bfloat16()
    for weight in model.parameters():
        weight.data.normal_(std=0.02)
    save_model(model, Tokenizer(folder), folder)


def timed_load(side: str, folder: str, dtype: str) -> tuple[float, float]:
    """Load model and tokenizer -> seconds, and CPU seconds of all threads, without the imports."""
    if side == "transformers":
        from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2ForCausalLM
        assert Qwen2ForCausalLM, "from_pretrained would import it after the clock has started"
        load_theirs, read = AutoModelForCausalLM.from_pretrained, AutoTokenizer.from_pretrained
    print("imported", flush=True)
    sys.stdin.readline()
    start, busy = time.perf_counter(), time.process_time()
    if side == "transformers":
        loaded = load_theirs(folder, dtype=getattr(torch, dtype)), read(folder)
    else:
        loaded = load(folder, dtype=getattr(torch, dtype))
    seconds = time.perf_counter() - start, time.process_time() - busy
    assert sum(p.numel() for p in loaded[0].parameters()) > 4.9e8
    return seconds


def memory_of(pid: int, kind: str) -> int:
    """Bytes of memory of one kind that a process holds now: RssAnon (anonymous) or VmRSS (all). 0 after it has ended."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(kind)), 0)


def measure(side: str, folder: str, dtype: str) -> tuple[float, ...]:
    """One load -> seconds, CPU seconds, peak GB of the process, and peak GB beyond the imports."""
    process = subprocess.Popen([sys.executable, __file__, side, folder, dtype], text=True,
                               stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                               stderr=subprocess.DEVNULL)
    assert process.stdout.readline() == "imported\n", (
        f"{side} can't be loaded; see tests/requirements-peers.txt")
    before = peak = memory_of(process.pid, "RssAnon")
    process.stdin.write("go\n")
    process.stdin.flush()
    while process.poll() is None:
        peak = max(peak, memory_of(process.pid, "RssAnon"))
        time.sleep(0.005)
    return *map(float, process.stdout.read().split()), peak / 1e9, (peak - before) / 1e9


def main() -> None:
    """Print the medians of some rounds. The first round warms the page cache and is not counted."""
    result = {"shape": "Qwen2.5-0.5B", "rounds": ROUNDS, "threads": torch.get_num_threads()}
    with tempfile.TemporaryDirectory() as folder:
        make_folder(Path(folder))
        for dtype in DTYPES:
            turns = [(side, measure(side, folder, dtype)) for side in SIDES * (ROUNDS + 1)]
            for side in SIDES:
                runs = [values for s, values in turns[len(SIDES):] if s == side]
                medians = [round(statistics.median(v), 3) for v in zip(*runs, strict=True)]
                names = ("seconds", "cpu_seconds", "peak_gb", "load_gb")
                row = dict(zip(names, medians, strict=True))
                result[f"{side}_{dtype}"] = row
                cells = "".join(f" {name} {value:<7}" for name, value in row.items())
                print(f"{dtype:<9} {side:<13}{cells}", flush=True)
    print(json.dumps(result))


if __name__ == "__main__":
    if len(sys.argv) == 4:  # a process of measure
        print(*timed_load(*sys.argv[1:]))
    else:
        argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
        main()
