"""bench/gpu.sh at toy size and with parts that hang or fail; the arithmetic of bench/floors.py and bench/train.py; the
tables of bench/README.md. Where the peers are installed, bench/train.py runs at toy size, too."""
import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import floors
import numpy as np
import pytest
import torch
import train
from conftest import build_tiny
from rollout import make_plan

from agents import Trace
from data import InputError
from model import Sampler
from sft import trace_logprobs

ROOT = Path(__file__).resolve().parents[1]
PEERS = importlib.util.find_spec("trl") is not None


def run_gpu(folder, *flags, **settings):
    environment = os.environ | {"OUT": str(folder), "PYTHON": sys.executable} | settings
    return subprocess.run(["bash", "bench/gpu.sh", *flags], cwd=ROOT, capture_output=True, text=True, env=environment)


def test_every_part_for_the_gpu_runs_at_toy_size(tmp_path):
    parts = ["check", "step-7b", "train-7b", "grpo-7b", "memory-7b", *["rollout-0.5b"] * PEERS]
    done = run_gpu(tmp_path, "--dry", PARTS=" ".join(parts))
    assert done.returncode == 0, done.stderr[-2000:]
    found = {part: json.loads((tmp_path / f"{part}.json").read_text()) for part in parts}
    assert not any("failed" in result for result in found.values()), done.stdout
    check = found["check"]
    for name in ("lora", "gap", "graph", *["greedy"] * PEERS):
        assert check[name]["ok"], check
    assert ("A CHECK HAS FAILED" in done.stdout) == (not check["ok"]) == (not PEERS)
    assert {(step["rows"], step["part"]) for step in found["step-7b"]["steps"]} == {
        (1, "read"), (1, "step"), (8, "read"), (8, "step")}
    assert 0 < found["train-7b"]["share"] < 1 and found["train-7b"]["lora"] == 4
    assert set(found["grpo-7b"]["parts"]) == {
        "prompts", "decode", "observations", "forward", "backward", "optimizer", "the rest"}
    assert found["memory-7b"]["grpo"]["peak"] > 0 < found["memory-7b"]["sft"]["peak"]
    made = (tmp_path / "tables.md").read_text()
    for row in ("| 7B | 1 |", "| 7B | LoRA 4 | 128 |", "| decode |", "| 7B | `--lora 16` |"):
        line = next(line for line in made.splitlines() if line.startswith(row))
        assert re.search(r"\d\.\d", line), line


def test_a_part_that_hangs_or_fails_costs_no_other_part(tmp_path):
    """A stub in place of Python hangs in one part, fails in another and prints no JSON in a third."""
    stub = tmp_path / "python"
    stub.write_text("""#!/bin/sh
case "$*" in
  *floors.py\\ step*) sleep 60 ;;
  *floors.py\\ train*) echo 'two "quoted" words' >&2; exit 3 ;;
  *floors.py\\ grpo*) echo 'no object' ;;
  *) echo '{"fine": 1}' ;;
esac
""")
    stub.chmod(0o755)
    done = run_gpu(tmp_path / "out", "--dry", PYTHON=str(stub), MOST="1")
    found = {path.stem: json.loads(path.read_text()) for path in (tmp_path / "out").glob("*.json")}
    assert found == {
        "check": {"fine": 1}, "rollout-0.5b": {"fine": 1}, "memory-7b": {"fine": 1},
        "step-7b": {"part": "step-7b", "failed": "out of time", "message": ""},
        "train-7b": {"part": "train-7b", "failed": "exit code 3", "message": 'two "quoted" words'},
        "grpo-7b": {"part": "grpo-7b", "failed": "exit code 0", "message": "no object"}}
    assert done.returncode == 0 and "A CHECK HAS FAILED" in done.stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
@pytest.mark.parametrize("words, code, said", [([], 2, "no GPU found"), (["--dri"], 2, "--dri: expected"),
                                               (["--help"], 0, "bash bench/gpu.sh --dry")])
def test_without_a_gpu_nothing_is_started(tmp_path, words, code, said):
    done = run_gpu(tmp_path / "out", *words)
    assert done.returncode == code and said in done.stdout + done.stderr and not (tmp_path / "out").exists()


def gpu_commands():
    """The program and arguments of each part on a card."""
    text = (ROOT / "bench" / "gpu.sh").read_text().partition("\nelse\n")[2].replace("\\\n", " ")
    lines = [line for line in text.splitlines() if line.strip().startswith("part ")]
    return [line.replace("$shape", "7b").split()[3:] for line in lines]


@pytest.mark.parametrize("words", gpu_commands(), ids=" ".join)
def test_each_command_for_the_card_is_accepted(words, monkeypatch):
    """By the programs' own parsers. Nothing is run."""
    noted = []
    program, *arguments = words
    monkeypatch.setattr(sys, "argv", [program, *arguments])
    if program == "bench/floors.py":
        for name in ("profile_step", "profile_train", "profile_grpo", "check"):
            monkeypatch.setattr(floors, name, lambda **options: noted.append(options))
        floors.main()
        assert noted and noted[0]["shape"] == arguments[arguments.index("--shape") + 1]
    elif program == "bench/memory.py":
        from grpo import GRPOConfig, command_line
        monkeypatch.setattr(sys, "argv", ["grpo.py", *arguments[2:], "--plan", "folder"])
        assert command_line(GRPOConfig, "").turn_tokens == 64
    else:
        import rollout
        monkeypatch.setattr(rollout, "set_up", lambda *args, **more: noted.append(1) or 1 / 0)
        with pytest.raises(ZeroDivisionError):
            rollout.main()


def test_a_wrong_command_is_noticed(monkeypatch):
    assert len(gpu_commands()) == 9
    monkeypatch.setattr(sys, "argv", ["bench/floors.py", "train", "--shapes", "7b"])
    with pytest.raises(InputError):
        floors.main()


def test_the_readme_has_the_tables_that_the_card_fills(tmp_path):
    """Titles and the first cells of all rows, in this order. The other cells may be filled."""
    readme = (ROOT / "bench" / "README.md").read_text(encoding="utf-8")
    for table in floors.tables(tmp_path).split("\n\n"):
        title, rule, *rows = table.splitlines()
        there = readme.partition(f"{title}\n{rule}\n")[2].splitlines()
        assert len(there) >= len(rows), title
        for row, line in zip(rows, there, strict=False):
            assert line.startswith(row.partition(" | |")[0] + " |"), row


def test_a_table_by_hand():
    assert floors.table(["a", "b"], [[1, None], [None, "x"]]) == (
        "| a | b |\n| --- | --- |\n| 1 | |\n| | x |\n")
    assert floors.table(["a", "b", "c", "d"], [[1, None, None, None]]).endswith("| 1 | | | |\n")


def test_the_kernels_of_a_step_are_counted(capsys):
    """A decode step of two layers: seven products per layer and the head, one attention per layer."""
    floors.profile_why("tiny")
    lines = capsys.readouterr().out.splitlines()
    L = floors.SHAPES["tiny"].num_hidden_layers
    step = lines[next(i for i, line in enumerate(lines) if line.startswith("decode step")):]
    calls = {kind: int(re.search(rf"  {kind} .* (\d+) calls", "\n".join(step))[1]) for kind in floors.KINDS}
    assert (calls["matrix products"], calls["fused attention"], calls["softmax"]) == (7 * L + 1, L, 1)
    assert calls["element by element"] > 10 < calls["copies and lookups"]
    for times in json.loads(lines[-1])["parts"].values():
        assert times["all"] == pytest.approx(sum(ms for kind, ms in times.items() if kind != "all"), abs=0.01)


# ------------------------------------------------------------------------------------------------------ arithmetic


def test_the_flops_of_a_pass_by_hand(tiny):
    """2 layers, D 32, MLP 24, 4 heads and 2 kv-heads of 8, 40 ids; two traces of 4 and 3 tokens, 3 of them scored."""
    model = tiny()
    matrices = 2 * (32 * 32 + 2 * 32 * 16 + 32 * 32 + 3 * 32 * 24)
    attention = 4 * 2 * 4 * 8 * 2  # q kᵀ and its product with v; a token sees half of 4 keys
    forward = 2 * 4 * (2 * matrices + attention) + 2 * 3 * 40 * 32
    traces = [Trace(ids=[1, 2, 3, 4], mask=[0, 0, 1, 1]), Trace(ids=[1, 2, 3], mask=[0, 0, 1])]
    assert floors.training_flops(model, traces) == 3 * forward
    assert floors.training_flops(model, traces, frozen=True) == 2 * forward


def test_a_random_trace_has_spans_of_both_kinds():
    trace = floors.random_trace(512, 100, np.random.default_rng(0))
    assert len(trace.ids) == 512 and trace.mask[:242] == [0] * 240 + [1] * 2
    assert sum(trace.mask) == 4 * 40 + 24 and trace.mask[280:302] == [0] * 22


def test_a_planned_rollout_has_its_lengths_and_the_trainers_log_probabilities(tiny):
    model = build_tiny(300, dtype=torch.float64)
    plan = make_plan("tiny", 2, 2)
    plan.prompts = [prompt[:9] for prompt in plan.prompts]
    plan.said = [turns[:2] for turns in plan.said]
    traces = floors.forced_rollout(Sampler(model, floors.NO_STOP, 4, 256), plan, seed=3)
    for i, trace in enumerate(traces):
        heard = sum(len(ids) for ids in plan.heard[i][:len(plan.said[i])])
        assert sum(trace.mask) == sum(plan.said[i]) and len(trace.ids) == 9 + sum(plan.said[i]) + heard
    logprobs, _, mask = trace_logprobs(model, traces)
    want = torch.tensor([value for t in traces for value, m in zip(t.logprobs, t.mask, strict=True) if m])
    assert torch.allclose(logprobs[mask], want.double(), atol=1e-6)


def test_differences_of_greedy_ids(tiny):
    """Equal but for one pair, which differs in its third id."""
    model = tiny()
    logits = model.head(model(torch.tensor([[1, 2]])))[0, -1].detach()
    share, gap = floors.difference(model, [[1, 2, 3], [1, 2, 4]], [[1, 2, 3], [1, 2, 5]])
    assert share == 0.5 and gap == pytest.approx(abs(float(logits[4] - logits[5])))
    assert floors.difference(model, [[1]], [[1]]) == (1.0, 0.0)


def test_the_prompts_and_replies_of_the_grpo_step():
    args = train.command_line([])
    plan = train.grpo_plan(args)
    assert len(plan.prompts) == 12 and {len(ids) for ids in plan.prompts} == {240}
    assert plan.said == [[34]] * 96 and plan.group == 8
    assert {len(trace.ids) // 100 for trace in train.sft_batch(args)} <= {4, 5}


def test_two_sides_that_differ_are_refused():
    first = {"loss": 2.0, "grad_norm": 1.0}
    train.compare_steps("ours", first, first, 1e-4)
    with pytest.raises(AssertionError, match="loss"):
        train.compare_steps("ours", first | {"loss": 2.01}, first, 1e-4)
    ours = type("Side", (), {"first": {"logprobs": [1.0], "gradient": [1.0, 2.0], "loss": 0.5}})
    theirs = type("Side", (), {"first": ours.first | {"gradient": [1.0, 2.1]}})
    sides = {"ours": ours, "ours_float32": ours, "trl_float32_96": theirs}
    with pytest.raises(AssertionError, match="trl_float32_96"):
        train.check_grpo(sides)


if PEERS:
    def test_train_at_toy_size():
        command = [sys.executable, "bench/train.py", "--shape", "tiny", "--sft-shape", "tiny", "--rounds", "1",
                   "--sft-rounds", "1", "--reply", "4", "--questions", "2", "--trl-batch", "16", "--threads", "1",
                   "--parts", "grpo", "sft"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
        found = json.loads(done.stdout.splitlines()[-1])
        assert set(found["grpo"]["sides"]) == {"ours", "ours_float32", "trl_float32_16", "trl_bf16_16"}
        assert set(found["sft"]["sides"]) == {"transformers", "ours", "recomputing"}
        for side in [*found["grpo"]["sides"].values(), *found["sft"]["sides"].values()]:
            assert side["seconds"] > 0
