"""Sampler, stage 1's step and stage 2's update on the device cuda, at the widths of Qwen2.5. No GPU is needed: the tensors
are fake (see fake_cuda.py)."""
import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest

from bench.rollout import SHAPES
from data import plan
from grpo import GRPOConfig

TESTS = Path(__file__).resolve().parent
LIMIT = 10_000  # bytes of ids, masks and numbers per copy; the smallest matrix of an adapter has 57 kB
HALF, FULL, HOST = "cuda:0 bfloat16", "cuda:0 float32", "cpu float32"
LAYERS = 4
EMBEDDING = {"0.5b": 151936 * 896, "7b": 152064 * 3584}
WEIGHTS = {"0.5b": LAYERS * 12 + 2, "7b": LAYERS * 12 + 3}


def start(guard, shape, what):
    command = [sys.executable, TESTS / "fake_cuda.py", guard, shape, what]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=TESTS.parent)


@pytest.fixture(scope="session")
def started(guard):
    """Both shapes at the same time."""
    return {shape: start(guard, shape, "check") for shape in WEIGHTS}


@pytest.fixture(scope="session", params=["0.5b", "7b"])
def facts(request, started):
    """What fake_cuda.py found at one shape. A device mismatch ends it."""
    process = started[request.param]
    out, errors = process.communicate()
    assert process.returncode == 0, errors[-3000:]
    return {"shape": request.param, **json.loads(out.splitlines()[-1])}


def test_the_decode_loop_waits_once_per_step(facts):
    """Rows finish at different steps of both turns. Only a step that swaps rows copies from the host: the row numbers."""
    reads, uploads, swaps = zip(*facts["sampler"]["steps"], strict=True)
    assert swaps == (0, 1, 1, 0, 1)
    assert reads == (1, 1, 1, 1, 1)
    assert [bool(number) for number in uploads] == [bool(number) for number in swaps]


def test_keys_come_in_multiples_of_64(facts):
    found = facts["sampler"]
    assert found["slots"] == 256  # 200 were asked for
    assert found["keys"] == [64, 128]
    assert found["cache"] == [HALF, "cuda:0 int64"]


@pytest.mark.parametrize("kind", ["full", "offload", "lora", "grpo", "dapo", "dr_grpo", "gspo"])
def test_a_training_step_leaves_everything_in_its_place(facts, kind):
    found = facts[kind]
    lora, offload = kind == "lora", kind == "offload"
    state = HOST if offload else FULL
    assert found["stayed"] and found["left"] == 0
    assert found["weights"] == ([HALF, FULL] if lora else [HALF])
    assert found["trained"] == (2 * LAYERS * 7 if lora else WEIGHTS[facts["shape"]])
    assert found["gradients"] == [[FULL if lora else HALF]] * len(found["gradients"])
    assert found["masters"] == ([] if lora else [state])
    assert found["state"] == [state] and found["states"] == 2 * found["trained"]
    if offload:  # gradients and weights go over the bus in bfloat16
        largest = EMBEDDING[facts["shape"]]
        assert found["copies"] == {"cuda to cpu": 2 * largest, "cpu to cuda": 2 * largest}
    else:
        assert max(found["copies"].values()) < LIMIT


@pytest.mark.parametrize("loss", ["grpo", "dapo", "dr_grpo", "gspo"])
def test_the_update_takes_all_its_steps(facts, loss):
    """Two epochs of two minibatches. Both models have scored both traces."""
    found = facts[loss]
    assert len(found["gradients"]) == 4
    assert found["old"] == found["reference"] == [60, 39]


def test_the_plan_counts_the_bytes_that_are_alive(guard, tmp_path):
    """Peaks above weights and caches: of training, in a pass that finds all gradients, and of a prefill of 32 x 512 tokens."""
    running = {shape: start(guard, shape, "memory") for shape in WEIGHTS}
    for shape, process in running.items():
        out, errors = process.communicate()
        assert process.returncode == 0, errors[-3000:]
        found = json.loads(out.splitlines()[-1])
        (tmp_path / "config.json").write_text(json.dumps(asdict(SHAPES[shape])))
        c = plan.read_shape(tmp_path)
        for lora in (0, 16):
            config = GRPOConfig(plan=str(tmp_path), questions=16, trace_tokens=4096, lora=lora)
            measured = found[f"train lora={lora} scored=1.0"]
            assert measured["second"] == pytest.approx(plan.training_peak(c, config, 2), rel=0.1)
            weights, trained = plan.count_weights(c, lora)
            assert measured["gradients"] == trained * (4 if lora else 2) + 4  # and the sum of the loss
            assert measured["weights"] == 2 * weights + (4 * trained if lora else 0)
        assert found["prefill 32 x 512"]["peak"] == pytest.approx(plan.sampling_peak(c, config, 2), rel=0.02)


@pytest.mark.parametrize("broken", ["stop", "pad"])
def test_a_tensor_on_the_wrong_device_is_found(guard, broken):
    """The sampler's stop ids, or the ids of traces, lie on the CPU."""
    process = start(guard, "0.5b", broken)
    _, errors = process.communicate()
    assert process.returncode == 1
    assert "at least two devices, cuda:0 and cpu" in errors.splitlines()[-1]
