"""docs/real.md: all of its commands run in their order, through the shell, on a tiny checkpoint with random weights.

If MTR_QWEN names a folder with Qwen2.5's tokenizer.json and tokenizer_config.json, these files replace the tests' own
tokenizer. tests/test_reference.py runs the page's Python code.
"""
import csv
import json
import math
import os
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from safetensors import safe_open

import grpo
import sft
from data.prompts import LONG
from data.tokenizer import Tokenizer
from model import ModelConfig, Transformer, save_model

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "real.md"
SAMPLE = ROOT / "data" / "sample"

NOT_TRIED = {"vllm serve RUN/grpo/model"}
ANSWER = "--turn-tokens 8"
SFT = "--steps 1 --micro-tokens 64 --agent-tokens 1024 --maker-tokens 1024 --actor-tokens 1024"
GRPO = "--steps 2 --questions 2 --group 2 --turn-tokens 8 --trace-tokens 1536 --micro-tokens 64"
EVAL = "python mtr.py eval"
TRACES = "python mtr.py traces --model qwen --data train.jsonl --out traces.jsonl"
STAGE = ("config.json", "metrics.csv", "model/config.json", "model/model.safetensors", "model/tokenizer.json")


def stage(folder):
    steps = {"sft": 1, "grpo": 2}[Path(folder).name]
    return [f"{folder}/{name}" for name in (*STAGE, f"checkpoints/{steps:07d}/state.json")]


# Each command of the page: flags that make it short, files that it writes, texts that it prints.
STEPS = {
    "hf download Qwen/Qwen2.5-0.5B-Instruct --local-dir qwen": ("", ["qwen/config.json"], []),
    "python grpo.py --plan qwen": ("", [], ["weights of the policy", "grpo.py in all", "and --offload"]),
    'python mtr.py ask --model qwen "Which river is longer, the Elbe or the Oder?"': (
        ANSWER, [], ["ToolMaker: ", "AutoAgent and ToolActor:"]),
    f"{EVAL} --model qwen --data test.jsonl --out RUN --name before": (
        ANSWER, ["RUN/before/test.json", "RUN/before/test.jsonl"], ["em_low", "clean_turns", "agent: qwen"]),
    f"{EVAL} --model qwen --data test.jsonl --out RUN --name direct --no-tools": (
        ANSWER, ["RUN/direct/test.json", "RUN/direct/test.jsonl"], ["calls answered by: none"]),
    TRACES: (ANSWER, ["traces.jsonl"], ["kept 0 of 80 traces\n", "next: python sft.py"]),
    f"{TRACES} --samples 8": (ANSWER, ["traces.jsonl"], ["kept 0 of 160 traces\n"]),
    "python sft.py --model qwen --traces traces.jsonl --out RUN": (
        SFT, stage("RUN/sft"), ["conversations: ", "stage 1 is done; next: python grpo.py --out RUN --data FILE"]),
    "python sft.py --model qwen --traces messages.jsonl --out OWN": (
        SFT, stage("OWN/sft"), ["conversations: 2 of agent", "stage 1 is done"]),
    "python grpo.py --out RUN --data train.jsonl": (
        GRPO, [*stage("RUN/grpo"), "RUN/grpo/traces.jsonl"], ["20 questions; ", "stage 2 is done: RUN/grpo"]),
    "python grpo.py --out RUN --data train.jsonl --resume": (GRPO, stage("RUN/grpo"), ["stage 2 is done: RUN/grpo"]),
    f"{EVAL} --model RUN/sft/model --data test.jsonl --out RUN --name after_sft": (
        ANSWER, ["RUN/after_sft/test.json"], ["agent: RUN/sft/model"]),
    f"{EVAL} --out RUN --data test.jsonl --name after --turn-tokens 1024": (
        ANSWER, ["RUN/after/test.json"], ["agent: RUN;"]),
    "python mtr.py show --out RUN": ("", ["RUN/report.html", "RUN/curves.png"], ["no table: results.json is missing"]),
    "python mtr.py show --out RUN --step 0": ("", [], ["step 0, training: 4 traces", "right: "]),
    "python mtr.py show --out RUN --trace 1": ("", [], ["that the agent generated (mask 1) are between [[ and ]]"]),
    "python sft.py --model qwen --traces traces.jsonl --out LORA --lora 16": (
        SFT, stage("LORA/sft"), ["stage 1 is done"]),
    "python grpo.py --out LORA --data train.jsonl --lora 16": (
        GRPO, stage("LORA/grpo"), ["stage 2 is done: LORA/grpo"])}


def blocks(text):
    """(language, text) of each block of a page. An indented block holds commands, as one in the language sh does."""
    found = re.findall(r"^```(\w+)\n(.*?)^```$|((?:^ {4}[^\n]*\n)+)", text, re.M | re.S)
    return [(language or "sh", fenced or textwrap.dedent(indented)) for language, fenced, indented in found]


def commands(text):
    return "".join(block for language, block in blocks(text) if language == "sh").splitlines()


def test_the_blocks_of_a_page_by_hand():
    text = "a\n\n    one\n    two\n\nb\n\n```sh\nthree\n```\n\n```python\nif x:\n    four\n```\n\n    five\n"
    assert blocks(text) == [("sh", "one\ntwo\n"), ("sh", "three\n"), ("python", "if x:\n    four\n"), ("sh", "five\n")]
    assert commands(text) == ["one", "two", "three", "five"]


def write_checkpoint(folder, tokenizer):
    """A Qwen folder with random weights, as small as its tokenizer lets it be. A turn has ten tokens in the mean: the
    first number of an embedding is large, so in all logits, and largest in that of <|im_end|>."""
    config = ModelConfig(tokenizer.size, 32, 64, 2, 2, 1, 8192, 1e-6, 1e6, tie_word_embeddings=True)
    model = Transformer(config).init_weights(0)
    model.model["embed_tokens"].weight.data[:, 0] = 1
    model.model["embed_tokens"].weight.data[tokenizer.end, 0] += math.log(tokenizer.size / 9) / 32 ** 0.5
    save_model(model, tokenizer, folder)
    path = folder / "tokenizer_config.json"  # without the mark of a tokenizer that was trained here
    path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != "mtr_prompts"}))
    assert Tokenizer(folder).prompts is LONG


def sample(name):
    return [json.loads(line) for line in (SAMPLE / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


@pytest.fixture
def walk(tmp_path, tokenizer):
    """A function that runs a command in a folder with the programs, the user's files and a download that needs no network."""
    qwen = os.environ.get("MTR_QWEN")
    write_checkpoint(tmp_path / "hub", Tokenizer(Path(qwen)) if qwen else tokenizer)
    bin_folder, work = tmp_path / "bin", tmp_path / "work"
    bin_folder.mkdir()
    work.mkdir()
    for path in [*ROOT.glob("*.py"), ROOT / "data", ROOT / "docs"]:
        (work / path.name).symlink_to(path)
    programs = {"python": f'exec "{sys.executable}" "$@"',
                "hf": f'[ "$1 $3" = "download --local-dir" ] && cp -r "{tmp_path}/hub" "$4"'}
    for name, line in programs.items():
        (bin_folder / name).write_text(f"#!/bin/sh\n{line}\n")
        (bin_folder / name).chmod(0o755)
    example = [json.loads(block) for language, block in blocks(PAGE.read_text(encoding="utf-8")) if language == "json"]
    questions = sample("questions")
    write_lines(work / "train.jsonl", [*example, *questions[:19]])
    write_lines(work / "test.jsonl", questions[-3:])
    shutil.copy(SAMPLE / "messages.jsonl", work)
    # glibc keeps freed memory. Else half of the time goes into fresh pages for logits of 151,665 ids.
    environment = os.environ | {"PATH": f"{bin_folder}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1",
                                "MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2 ** 33)}

    def run(command):
        return subprocess.run(command, shell=True, cwd=work, env=environment, capture_output=True, text=True, timeout=120)
    run.folder = work
    return run


def add_conversations(path):
    """Append lines as stage 0 writes them of kept traces."""
    lines = path.read_text(encoding="utf-8").splitlines()
    assert len(lines) == 1 + 160 and all(json.loads(line)["why"] for line in lines[1:])
    kept = zip(sample("agent")[:24], sample("maker")[:24], sample("actor")[:24], strict=True)
    rows = [{"id": f"kept {i}", "sample": 0, "why": "", "conversations": three, "story": ""} for i, three in enumerate(kept)]
    with open(path, "a", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def tensors(folder):
    """{name: (shape, type)} of a model folder, and the tensors."""
    with safe_open(folder / "model.safetensors", "pt") as file:
        found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  it is no dict
    return {name: (tuple(t.shape), t.dtype) for name, t in found.items()}, found


def read_metrics(folder):
    return list(csv.DictReader((folder / "metrics.csv").read_text().splitlines()))


def test_the_commands_run_in_their_order(walk):
    """Each exits without an error, prints what the table says and writes the files."""
    ran = []
    for command in commands(PAGE.read_text(encoding="utf-8")):
        if command in NOT_TRIED:
            continue
        flags, files, texts = STEPS[command]
        done = walk(f"{command} {flags}")
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
        for text in texts:
            assert text in done.stdout, f"{command}\n{done.stdout}"
        for file in files:
            assert (walk.folder / file).stat().st_size, f"{command}: {file}"
        ran.append(command)
        if command == f"{TRACES} --samples 8":
            add_conversations(walk.folder / "traces.jsonl")
    assert ran == list(STEPS)

    base, weights = tensors(walk.folder / "qwen")
    for run in ("RUN", "LORA"):
        for name in ("sft", "grpo"):
            trained, changed = tensors(walk.folder / run / name / "model")
            assert trained == base, f"{run}/{name}"
            assert not changed["model.layers.0.mlp.up_proj.weight"].equal(weights["model.layers.0.mlp.up_proj.weight"])
        first, second = [read_metrics(walk.folder / run / name) for name in ("sft", "grpo")]
        assert [row["step"] for row in first] == ["0"] and float(first[0]["heldout_agent"]) > 0
        assert [row["step"] for row in second] == ["0", "1", "2"] and {row["reward"] for row in second[:2]} == {"0"}
    assert len(base) == 2 * 12 + 2


def test_the_page_names_columns_and_reasons_that_exist():
    text = PAGE.read_text(encoding="utf-8")
    table = text[text.index("| column of metrics.csv"):].split("\n\n")[0]
    named = [name for row in table.splitlines()[2:] for name in re.findall(r"`(\w+)`", row.split("|")[1])]
    assert len(named) >= 6 and set(named) <= set(grpo.GRPO_COLUMNS)
    assert {"loss_agent", "heldout_agent"} <= set(sft.SFT_COLUMNS)
    table = text[text.index("| if many fail with"):].split("\n\n")[0]
    reasons = [name for row in table.splitlines()[2:] for name in re.findall(r"`(.+?)`", row.split("|")[1])]
    source = (ROOT / "data" / "training.py").read_text() + (ROOT / "agents.py").read_text()
    assert len(reasons) >= 5 and all(f'"{reason}' in source for reason in reasons)
