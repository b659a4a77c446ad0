"""torchrun: two processes on a CPU (gloo) train what one process trains, and go on after a kill."""
import csv
import json
import pickle
import shutil
import subprocess
import sys
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from conftest import build_tiny
from safetensors.torch import load_file

import agents
import ranks
from data import InputError
from model import save_model

TESTS = Path(__file__).resolve().parent
SAMPLE = TESTS.parent / "data" / "sample"
FLAGS = {"sft": ["--steps", "4", "--agent-tokens", "900", "--maker-tokens", "600", "--actor-tokens", "600", "--warmup",
                 "1", "--eval-every", "2", "--save-every", "1", "--lr", "1e-3"],
         "grpo": ["--steps", "3", "--questions", "3", "--group", "3", "--turn-tokens", "12", "--max-turns", "2",
                  "--trace-tokens", "600", "--micro-tokens", "900", "--eval-every", "3", "--save-every", "1", "--lr",
                  "1e-3"]}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, tokenizer):
    """A random checkpoint in float64, conversations and questions."""
    folder = tmp_path_factory.mktemp("ranks")
    model = build_tiny(tokenizer.size)
    model.config = replace(model.config, max_position_embeddings=1024)
    save_model(model, tokenizer, folder / "model")
    text = "".join((SAMPLE / f"{role}.jsonl").read_text(encoding="utf-8") for role in ("agent", "maker", "actor"))
    (folder / "traces.jsonl").write_text(text, encoding="utf-8")
    lines = (SAMPLE / "questions.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (folder / "questions.jsonl").write_text("".join(lines[:24]), encoding="utf-8")
    return folder


def train(stage, out, checkpoint, *flags, processes=2, die="none 0 0", dead=""):
    """Run one stage of the toy with several processes -> what the process says."""
    out.mkdir(exist_ok=True)
    if stage == "sft":
        flags = ("--model", checkpoint / "model", "--traces", checkpoint / "traces.jsonl", *flags)
    else:
        if not (out / "sft").exists():
            (out / "sft").mkdir()
            shutil.copytree(checkpoint / "model", out / "sft" / "model")
            (out / "sft" / "config.json").write_text(json.dumps({"seed": 0, "model": "a checkpoint"}))
        flags = ("--data", checkpoint / "questions.jsonl", *flags)
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)] if processes > 1 else []
    command = [sys.executable, *launch, TESTS / "toy_run.py", stage, out, "--threads", "1", *FLAGS[stage], *flags]
    return subprocess.run(command, capture_output=True, text=True, timeout=200, env={
        "OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin", "DIE": die, "DEAD_RANK": dead, "FLOAT64": "1",
        "UTILITIES": "1"})


def same(one, two, stage):
    """Weights, moments and logs of two runs agree."""
    for name in ("model/model.safetensors", "checkpoints/*/optimizer.safetensors"):
        for a, b in zip(sorted((one / stage).glob(name)), sorted((two / stage).glob(name)), strict=True):
            a, b = load_file(a), load_file(b)
            assert a.keys() == b.keys() and len(a) > 5
            for key in a:
                assert a[key].dtype == torch.float64 or "step" in key
                torch.testing.assert_close(a[key], b[key], rtol=1e-9, atol=1e-12)
    rows = [list(csv.DictReader((run / stage / "metrics.csv").read_text().splitlines())) for run in (one, two)]
    assert len(rows[0]) >= 4
    for a, b in zip(*rows, strict=True):
        for name in a:
            if not name.startswith(("time_", "memo_", "gap_")):
                assert a[name] == b[name] or float(a[name]) == pytest.approx(float(b[name]), rel=1e-4, abs=1e-9), name


@pytest.mark.parametrize("flags", [
    ["--loss", "grpo", "--epochs", "2"], ["--loss", "dapo", "--epochs", "2", "--minibatches", "2"],
    ["--loss", "dr_grpo", "--epochs", "2", "--beta", "0.1"], ["--loss", "gspo", "--epochs", "2"], ["--loss", "dr_grpo"],
    ["--loss", "dapo", "--questions", "1", "--group", "2", "--minibatches", "2"]],
    ids=lambda flags: " ".join(flags))
def test_two_processes_train_what_one_trains(tmp_path, checkpoint, flags):
    for name, processes in (("one", 1), ("two", 2)):
        done = train("grpo", tmp_path / name, checkpoint, *flags, processes=processes)
        assert done.returncode == 0, done.stderr[-3000:]
    same(tmp_path / "one", tmp_path / "two", "grpo")
    traces = [[json.loads(line) for line in (tmp_path / name / "grpo" / "traces.jsonl").read_text().splitlines()]
              for name in ("one", "two")]
    assert len(traces[0]) == len(traces[1]) > 5
    for a, b in zip(*traces, strict=True):
        assert a.keys() == b.keys()
        for key in a:
            near = key in ("old", "logprobs", "advantage", "weight")
            assert a[key] == (pytest.approx(b[key], abs=2e-5) if near else b[key]), key
    assert any(t["old"] for t in traces[1])
    assert all("calculator" in json.dumps(t["tools"]) for t in traces[1])
    before = load_file(checkpoint / "model" / "model.safetensors")
    after = load_file(tmp_path / "two" / "grpo" / "model" / "model.safetensors")
    assert any(not torch.equal(before[key], after[key]) for key in before), "it has learned something"


def test_stage_1_shares_its_conversations(tmp_path, checkpoint):
    for name, processes in (("one", 1), ("two", 2)):
        done = train("sft", tmp_path / name, checkpoint, processes=processes)
        assert done.returncode == 0, done.stderr[-3000:]
    same(tmp_path / "one", tmp_path / "two", "sft")


@pytest.mark.parametrize("dead", ["0", "1"])
def test_two_processes_go_on_after_a_kill(tmp_path, checkpoint, dead):
    """Killed in the update of step 1, and resumed: equal to a run that was not killed. One process dies, and the other
    waits for it until torchrun stops it."""
    assert train("grpo", tmp_path / "whole", checkpoint).returncode == 0
    done = train("grpo", tmp_path / "killed", checkpoint, die="update 1 0.0", dead=dead)
    assert done.returncode != 0 and not (tmp_path / "killed" / "grpo" / "model").exists()
    done = train("grpo", tmp_path / "killed", checkpoint, "--resume")
    assert done.returncode == 0, done.stderr[-3000:]
    same(tmp_path / "whole", tmp_path / "killed", "grpo")


def test_a_trace_that_was_sent_has_the_same_tools():
    """The reward knows a utility tool by its code, so the code must be the same object."""
    tools = list(agents.UTILITIES.values())
    sent = pickle.loads(pickle.dumps(agents.Trace("How many?", tools))).tools
    assert [tool.schema for tool in sent] == [tool.schema for tool in tools] and len(tools) == 4
    assert all(a.run is b.run for a, b in zip(sent, tools, strict=True))


def test_one_process_has_all():
    assert (ranks.world_size(), ranks.rank(), ranks.share([1, 2, 3]), ranks.all_gather(4)) == (1, 0, [1, 2, 3], [4])
    assert ranks.gather([1, 2, 3], 2) == [1, 2, 3] and ranks.add_up({"a": 1.0}) == {"a": 1.0}


@pytest.mark.parametrize("n, group, size", [(7, 1, 2), (6, 2, 2), (12, 3, 4), (3, 3, 2), (0, 1, 2)])
def test_gather_restores_the_order_of_one_process(n, group, size, monkeypatch):
    items = list(range(n))
    blocks = [items[i:i + group] for i in range(0, n, group)]
    monkeypatch.setattr(ranks, "world_size", lambda: size)
    parts = []
    for number in range(size):
        monkeypatch.setattr(ranks, "rank", lambda number=number: number)
        parts.append(ranks.share(blocks))
    monkeypatch.setattr(ranks, "all_gather", lambda own: parts)
    assert ranks.gather([], group) == items


def test_each_rank_has_its_own_gpu(monkeypatch, capsys):
    """Weights go to the card of the rank: the bare name "cuda" would be card 0 for all. Rank 0 alone prints."""
    calls = []
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(ranks.torch.cuda, "set_device", lambda device: calls.append(device))
    monkeypatch.setattr(ranks.dist, "init_process_group", lambda backend, **more: calls.append((backend, more)))
    monkeypatch.setattr(ranks.atexit, "register", lambda function: None)
    monkeypatch.setattr(ranks, "rank", lambda: 3)
    monkeypatch.setattr(ranks.sys, "stdout", sys.stdout)  # so that it comes back
    monkeypatch.setattr(ranks.tqdm, "__init__", ranks.tqdm.__init__)
    assert ranks.join("cuda", True) == "cuda:1"
    print("this is rank 3")
    assert ranks.tqdm([]).disable
    assert calls == ["cuda:1", ("nccl", {"device_id": torch.device("cuda", 1), "timeout": timedelta(hours=2)})]
    assert not capsys.readouterr().out
    assert ranks.join("cpu", True) == "cpu" and calls[-1] == ("gloo", {"device_id": None, "timeout": timedelta(hours=2)})
    with pytest.raises(InputError, match="the miniature needs one process"):
        ranks.join("cpu", False)
    monkeypatch.delenv("WORLD_SIZE")
    assert ranks.join("cuda", True) == "cuda" and ranks.join("cpu", False) == "cpu" and len(calls) == 3
