"""Runs that are killed and resumed against the run that nobody killed; Ctrl-C, a full disk, damaged checkpoints.

MTR_DEEP=1 makes the runs longer, and 26 kills of the 5."""
import csv
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import run as run_file
import sft
from data import InputError
from model import load
from run import Run, fingerprint
from sft import SFTConfig

DEEP = "MTR_DEEP" in os.environ
STEPS = {"sft": 700 if DEEP else 40, "grpo": 300 if DEEP else 12}
FLAGS = {"sft": "--width 64 --layers 2 --heads 2 --mlp 128 --vocab 500 --agent-tokens 600 --maker-tokens 400 --actor-tokens 400 "
                "--piece-steps 20 --warmup 5 --save-every 6 --eval-every 25",
         "grpo": "--loss grpo --questions 3 --group 3 --turn-tokens 24 --max-turns 3 --save-every 4 --eval-every 7"}
# Which phases are hit at least how often, and how many kills more anywhere.
QUOTAS = {"sft": ({"update": 3, "saving": 3} if DEEP else {"update": 1, "saving": 1}, 0),
          "grpo": ({"rollout": 5, "update": 5, "saving": 3} if DEEP else {"rollout": 1, "update": 1, "saving": 1}, 7 * DEEP)}


def start(stage, out, *flags, die="none 0 0"):
    """The toy run as a process of its own."""
    command = [sys.executable, Path(__file__).with_name("toy_run.py"), stage, out, "--steps", str(STEPS[stage]),
               "--threads", "1", *FLAGS[stage].split(), *flags]
    return subprocess.run(command, capture_output=True, text=True,
                          env={"OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin", "DIE": die})


def phases(out):
    """What a run was doing: (phase, step, begin, end), no end for what it died in."""
    lines = [line.split() for line in (out / "phases").read_text().splitlines()]
    return [(p[0], int(p[1]), float(p[2]), float(p[3]) if len(p) == 4 else None) for p in lines]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Both stages, killed by nobody; when they did what."""
    out = tmp_path_factory.mktemp("whole")
    lesson = sft.teach(0, worlds=1)
    rng = random.Random(0)
    few = [{role: rng.sample(part, n) for role, part in half.items()} for half, n in zip(lesson, (60, 10))]
    (out / "lesson.json").write_text(json.dumps(few), encoding="utf-8")
    times = {}
    for stage in ("sft", "grpo"):
        done = start(stage, out)
        assert done.returncode == 0, done.stderr[-2000:]
        times[stage] = phases(out)
        (out / "phases").unlink()
    return out, times


def moments(timeline, quota, more, rng):
    """Times to die at, in order: uniform over all the time that the run spent in a phase, for each phase of the quota,
    then `more` uniform over all of them -> (phase, step, seconds after its begin)."""
    chosen = []
    for phase in [name for name, n in quota.items() for _ in range(n)] + [None] * more:
        parts = [p for p in timeline if phase in (None, p[0])]
        at = rng.choices(parts, [end - begin for _, _, begin, end in parts])[0]
        chosen.append((at[2], at[0], at[1], rng.random() * (at[3] - at[2])))
    return [f"{phase} {step} {after}" for _, phase, step, after in sorted(chosen)]


def beginning(whole, folder, stage):
    """A folder from which the stage can be started."""
    folder.mkdir()
    shutil.copy(whole / "lesson.json", folder)
    if stage == "grpo":
        shutil.copytree(whole / "sft", folder / "sft")
    return folder


def rows(path):
    with open(path, encoding="utf-8", newline="") as file:
        return [{k: v for k, v in row.items() if not k.startswith("time_")} for row in csv.DictReader(file)]


def assert_same(a, b):
    """Two folders of a stage: weights bit for bit, metrics but for the times, traces, what the last checkpoint holds."""
    assert (a / "model" / "model.safetensors").read_bytes() == (b / "model" / "model.safetensors").read_bytes()
    assert rows(a / "metrics.csv") == rows(b / "metrics.csv")
    if (a / "traces.jsonl").exists():
        assert (a / "traces.jsonl").read_text() == (b / "traces.jsonl").read_text()
    names = [[f.name for f in sorted((x / "checkpoints").glob("0*"))] for x in (a, b)]
    assert names[0] == names[1] and 2 <= len(names[0]) <= 3
    last = [json.loads((x / "checkpoints" / names[0][-1] / "state.json").read_text()) for x in (a, b)]
    for state in last:
        state["logs"].pop("metrics.csv")  # the times differ in length
        state["source"] = state["source"] and state["source"]["sha256"]
    assert last[0] == last[1]
    moments_ = [(x / "checkpoints" / names[0][-1] / "optimizer.safetensors").read_bytes() for x in (a, b)]
    assert moments_[0] == moments_[1]


@pytest.mark.parametrize("stage", ["sft", "grpo"])
def test_killed_and_resumed_is_as_if_never_killed(stage, whole, tmp_path):
    """One run, killed again and again while it samples, learns and saves, each time resumed."""
    whole, times = whole
    out, landed = beginning(whole, tmp_path / "killed", stage), {}
    timeline = times[stage]
    print(f"{stage}: {timeline[-1][3] - timeline[0][2]:.1f} s in the run that nobody killed")
    for moment in moments(timeline, *QUOTAS[stage], random.Random(f"kills {stage}")):
        done = start(stage, out, *["--resume"] * (out / stage).exists(), die=moment)
        assert done.returncode == -signal.SIGKILL, done.stderr[-2000:]
        phase, step, _, end = phases(out)[-1]
        assert end is None and moment.split()[:2] == [phase, str(step)]
        landed[phase] = landed.get(phase, 0) + 1
        assert all(int(folder.name) for folder in (out / stage / "checkpoints").glob("0*"))
    done = start(stage, out, "--resume")
    assert done.returncode == 0, done.stderr[-2000:]
    print("killed in", landed)
    assert all(landed[phase] >= n for phase, n in QUOTAS[stage][0].items())
    assert_same(out / stage, whole / stage)


def test_the_toy_is_no_trivial_run(whole):
    """The runs that are compared learn, ask the ToolActor and remember what it said."""
    out, _ = whole
    made = rows(out / "grpo" / "metrics.csv")
    assert len(made) == STEPS["grpo"] and sum(int(row["updates"]) for row in made) > 0.9 * len(made)
    assert any(0 < float(row["memo_hits"]) < 1 for row in made)
    before, after = (load(out / stage / "model")[0] for stage in ("sft", "grpo"))
    assert not any(torch.equal(a, b) for a, b in zip(before.parameters(), after.parameters()))


# ------------------------------------------------------------------------------- within one process


def config(out, **more):
    return SFTConfig(out=str(out), width=16, heads=2, mlp=16, layers=1, **more)


@pytest.fixture
def begun(tmp_path, tokenizer, tiny):
    """A run that made three steps: its folder; a function that takes it up and makes some more."""
    def go(total, scores=(), before=lambda step: None, **more):
        run = Run(tmp_path / "sft", config(tmp_path, save_every=1, **more), ["step", "dropped", "heldout_greedy"])
        model = tiny(tokenizer.size, dtype=torch.float32)
        made = []
        for step in run.steps(total, model, tokenizer, sft.make_optimizer(model, 0.1, 0.0)):
            before(step)
            run.log({"step": step, "dropped": 0, "heldout_greedy": dict(enumerate(scores)).get(step, "")})
            made.append(step)
        return made
    go(3)
    return tmp_path / "sft", go


def checkpoints(folder):
    return sorted(int(f.name) for f in (folder / "checkpoints").glob("0*"))


def test_resume_makes_the_steps_that_are_left(begun):
    folder, go = begun
    assert go(5, resume=True) == [3, 4] and go(5, resume=True) == []
    assert [row["step"] for row in rows(folder / "metrics.csv")] == list("01234")


def test_rows_after_the_checkpoint_are_written_again(begun):
    folder, go = begun
    with open(folder / "metrics.csv", "a") as file:
        file.write("3,0,\r\n4,0")
    assert go(5, resume=True) == [3, 4]
    assert [row["step"] for row in rows(folder / "metrics.csv")] == list("01234")


@pytest.mark.parametrize("scores, kept", [
    ([], [7, 8]), ([0.1, 0.5, 0.3, 0.2], [2, 7, 8]), ([0.0] * 8, [7, 8]), ([0.1] * 6 + [0.9], [7, 8])])
def test_the_last_two_and_the_best_are_kept(scores, kept, begun):
    folder, go = begun
    shutil.rmtree(folder)
    go(8, scores)
    assert checkpoints(folder) == kept


@pytest.mark.parametrize("finished", [False, True])
def test_a_run_is_not_overwritten(begun, finished):
    folder, go = begun
    if finished:
        shutil.rmtree(folder / "checkpoints")
        (folder / "model").mkdir(exist_ok=True)
        (folder / "model" / "config.json").write_text("{}")
    before = sorted(folder.rglob("*"))
    with pytest.raises(InputError, match="holds a run; --resume"):
        go(5)
    assert sorted(folder.rglob("*")) == before


@pytest.mark.parametrize("more", [{"lr": 0.5}, {"seed": 1}, {"threads": 1}])
def test_resume_goes_on_as_the_run_began(more, begun):
    folder, go = begun
    before = (folder / "metrics.csv").read_bytes()
    with pytest.raises(InputError, match=f"^{next(iter(more))}: .* was begun with"):
        go(5, resume=True, **more)
    assert (folder / "metrics.csv").read_bytes() == before


def test_resume_wants_the_model_that_the_run_began_with(begun, tmp_path, folder):
    run, _ = begun
    state = json.loads((run / "checkpoints" / "0000003" / "state.json").read_text())
    state["source"] = {"name": "elsewhere", "sha256": "0" * 64}
    (run / "checkpoints" / "0000003" / "state.json").write_text(json.dumps(state))
    for finished in (False, True):
        if finished:
            (run / "model").mkdir(exist_ok=True)
            (run / "model" / "config.json").write_text("{}")
        with pytest.raises(InputError, match="begun with another"):
            Run(run, config(tmp_path, save_every=1, resume=True), ["step"], folder)


def test_resume_wants_the_files_that_the_run_began_with(begun, tmp_path):
    (run, _), file = begun, tmp_path / "traces.jsonl"
    file.write_text("one")
    state = json.loads((run / "checkpoints" / "0000003" / "state.json").read_text())
    state["source"] = {"name": "", "sha256": fingerprint(file)}
    (run / "checkpoints" / "0000003" / "state.json").write_text(json.dumps(state))
    again = config(tmp_path, save_every=1, resume=True)
    Run(run, again, ["step"], files=(str(file),)).file.close()
    file.write_text("two")
    with pytest.raises(InputError, match="begun with another"):
        Run(run, again, ["step"], files=(str(file),))


def test_resume_of_nothing_starts_at_the_beginning_and_says_so(begun, capsys):
    folder, go = begun
    shutil.rmtree(folder)
    assert go(2, resume=True) == [0, 1] and "no checkpoint" in capsys.readouterr().err


def test_too_small_a_disk_is_found_before_the_first_step(begun, monkeypatch):
    folder, go = begun
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(InputError, match="needed for checkpoints"):
        go(5, resume=True)
    assert checkpoints(folder) == [2, 3]


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_ctrl_c_and_sigterm_finish_the_step_and_tell_the_way_on(number, code, begun, capsys, monkeypatch):
    folder, go = begun
    monkeypatch.setattr(sys, "argv", ["sft.py", "--out", "a b"])
    term = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as end:
        run_file.run_main(lambda: go(9, before=lambda step: step == 4 and os.kill(os.getpid(), number), resume=True))
    signal.signal(signal.SIGTERM, term)
    assert end.value.code == code and checkpoints(folder) == [4, 5]
    assert capsys.readouterr().err == "stopped after step 4; go on with: python sft.py --out 'a b' --resume\n"
    assert go(6, resume=True) == [5]


def test_sigterm_before_the_first_step_ends_at_once(capsys):
    term = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as end:
        run_file.run_main(lambda: os.kill(os.getpid(), signal.SIGTERM))
    signal.signal(signal.SIGTERM, term)
    assert end.value.code == 143 and capsys.readouterr().err == "terminated\n"


def test_a_full_disk_ends_the_run_with_a_line_and_leaves_the_last_checkpoint_whole(begun, capsys):
    """No file may grow beyond 2,000 bytes from step 4 on, as if the disk had no more room."""
    folder, go = begun
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    term = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(SystemExit) as end:
            run_file.run_main(lambda: go(9, before=lambda step: step == 4 and resource.setrlimit(
                resource.RLIMIT_FSIZE, (2000, old[1])), resume=True))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
        signal.signal(signal.SIGTERM, term)
    said = capsys.readouterr().err
    assert end.value.code == 2 and said.count("\n") == 1 and "too large" in said
    assert checkpoints(folder) == [3, 4] and go(6, resume=True) == [4, 5]


def test_a_damaged_checkpoint_is_passed_over(begun, capsys):
    """What a broken copy of a run left of its newest checkpoint costs the steps since the one before."""
    folder, go = begun
    for name, size in (("model.safetensors", 1000), ("state.json", 20), ("optimizer.safetensors", 0)):
        os.truncate(folder / "checkpoints" / "0000003" / name, size)
        assert go(3, resume=True) == [2] and "0000003: damaged" in capsys.readouterr().err
        assert checkpoints(folder) == [2, 3]


def test_the_second_ctrl_c_ends_at_once_and_the_handlers_come_back(request):
    was = signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored, where the tests run in the background
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, was))
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(KeyboardInterrupt), run_file.interrupts() as asked:
        os.kill(os.getpid(), signal.SIGINT)
        assert asked == [signal.SIGINT]
        os.kill(os.getpid(), signal.SIGINT)
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


class Calls(TorchDispatchMode):
    """Records every operator that torch runs, with the number of elements in its first argument."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        elements = args[0].numel() if isinstance(args[0], torch.Tensor) else None
        self.seen.append((func.overloadpacket.__name__, elements))
        return func(*args, **(kwargs or {}))


def test_set_up_calls_each_vector_function_on_one_element():
    """run.set_up says why. The error shows in few processes, so this test counts the calls instead."""
    with Calls() as calls:
        run_file.set_up(SimpleNamespace(seed=0, threads=0))
    assert {call for call in calls.seen if call[0] != "ones"} == {("cos", 1), ("sin", 1), ("exp", 1)}


def test_a_folder_is_whole_or_as_it_was(tmp_path):
    """Also where writing breaks off in the middle."""
    def broken(part):
        (part / "a").write_text("half")
        raise OSError("no space")
    run_file.write_whole(tmp_path / "x", lambda part: (part / "a").write_text("whole"))
    with pytest.raises(OSError):
        run_file.write_whole(tmp_path / "x", broken)
    assert [f.read_text() for f in (tmp_path / "x").iterdir()] == ["whole"]
    run_file.write_whole(tmp_path / "x", lambda part: (part / "b").write_text("new"))
    assert [f.name for f in (tmp_path / "x").iterdir()] == ["b"] and [f.name for f in tmp_path.iterdir()] == ["x"]
