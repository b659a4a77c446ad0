"""Runs that are killed and resumed against a run that was not killed; the run folder; Ctrl-C, a full disk.

With MTR_DEEP=1 the runs are longer and are killed 26 times, not 5 times."""
import csv
import io
import json
import math
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode

import run as run_file
import sft
from agents import Trace
from data import InputError, fingerprint, prompts
from data.folders import gets_steps, locks, stage1_model
from data.options import Config, run_main
from model import load
from run import Run
from sft import SFTConfig

DEEP = "MTR_DEEP" in os.environ
STEPS = {"sft": 700 if DEEP else 40, "grpo": 300 if DEEP else 12}
FLAGS = {"sft": "--shape toy --agent-tokens 600 --maker-tokens 400 --actor-tokens 400 "
                "--piece-steps 20 --warmup 5 --save-every 6 --eval-every 25",
         "grpo": "--loss grpo --questions 3 --group 3 --turn-tokens 24 --max-turns 3 --save-every 4 --eval-every 7"}
# The number of kills in each phase, and how many more in any phase.
QUOTAS = {"sft": ({"update": 3, "saving": 3} if DEEP else {"update": 1, "saving": 1}, 0),
          "grpo": ({"rollout": 5, "update": 5, "saving": 3} if DEEP else {"rollout": 1, "update": 1, "saving": 1}, 7 * DEEP)}


def start(stage, out, *flags, die="none 0 0"):
    """Start the toy run as a process."""
    command = [sys.executable, Path(__file__).with_name("toy_run.py"), stage, out, "--steps", str(STEPS[stage]),
               "--threads", "1", *FLAGS[stage].split(), *flags]
    return subprocess.run(command, capture_output=True, text=True,
                          env={"OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin", "DIE": die})


def phases(out):
    """The phases of a run: (phase, step, begin, end). The phase in which it died has no end."""
    lines = [line.split() for line in (out / "phases").read_text().splitlines() if line]
    return [(p[0], int(p[1]), float(p[2]), float(p[3]) if len(p) == 4 else None) for p in lines]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of a run of both stages that was not killed, and the phases of each stage."""
    out = tmp_path_factory.mktemp("whole")
    lesson = sft.teach(0, worlds=1)
    rng = random.Random(0)
    few = [{role: rng.sample(part, n) for role, part in half.items()} for half, n in zip(lesson, (60, 10), strict=True)]
    (out / "lesson.json").write_text(json.dumps(few), encoding="utf-8")
    times = {}
    for stage in ("sft", "grpo"):
        done = start(stage, out)
        assert done.returncode == 0, done.stderr[-2000:]
        times[stage] = phases(out)
        (out / "phases").unlink()
    return out, times


def moments(timeline, quota, more, rng):
    """Times to die at, sorted -> "phase step seconds-after-its-begin". For each phase of the quota they are uniform over
    the time that the run spent in this phase. `more` times are uniform over all phases."""
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
    """Compare two folders of a stage: weights bit for bit, metrics without the times, traces, the last checkpoint."""
    assert (a / "model" / "model.safetensors").read_bytes() == (b / "model" / "model.safetensors").read_bytes()
    assert rows(a / "metrics.csv") == rows(b / "metrics.csv")
    assert (a / "traces.jsonl").read_text() == (b / "traces.jsonl").read_text()
    sources = [json.loads((x / "config.json").read_text())["sha256_of_model_and_data"] for x in (a, b)]
    assert sources[0] == sources[1]
    names = [[f.name for f in sorted((x / "checkpoints").glob("0*"))] for x in (a, b)]
    assert names[0] == names[1] and len(names[0]) == 2
    last = [json.loads((x / "checkpoints" / names[0][-1] / "state.json").read_text()) for x in (a, b)]
    for state in last:
        state["logs"].pop("metrics.csv")  # the times differ in length
    assert last[0] == last[1]
    moments_ = [(x / "checkpoints" / names[0][-1] / "optimizer.safetensors").read_bytes() for x in (a, b)]
    assert moments_[0] == moments_[1]


@pytest.mark.parametrize("stage", ["sft", "grpo"])
def test_killed_and_resumed_is_as_if_never_killed(stage, whole, tmp_path):
    """One run is killed while it samples, trains and saves, and is resumed each time. It ends with the same weights."""
    whole, times = whole
    out, landed = beginning(whole, tmp_path / "killed", stage), {}
    timeline = times[stage]
    print(f"{stage}: {timeline[-1][3] - timeline[0][2]:.1f} s in the run that was not killed")
    # Stage 2 is also killed in its last evaluation, between its last checkpoint and its model.
    ends = [f"evaluation {STEPS[stage]} 0"] if stage == "grpo" else []
    for moment in moments(timeline, *QUOTAS[stage], random.Random(f"kills {stage}")) + ends:
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


@pytest.mark.parametrize("stage, flags, files", [
    ("grpo", "--lora 4 --lr 3e-3", 28), ("sft", "--precision bfloat16", 26)])
def test_adapters_and_masters_survive_a_kill(stage, flags, files, whole, tmp_path):
    """Killed in the middle of an update and of a checkpoint."""
    first, second = [beginning(whole[0], tmp_path / name, stage) for name in ("whole", "killed")]
    done = start(stage, first, *flags.split())
    assert done.returncode == 0, done.stderr[-2000:]
    for moment in ("update 9 0.001", "saving 11 0.001"):  # checkpoints are made after the steps 3, 5, 7 and 11
        done = start(stage, second, *flags.split(), *["--resume"] * (second / stage).exists(), die=moment)
        assert done.returncode == -signal.SIGKILL and phases(second)[-1][:2] == (moment.split()[0], int(moment.split()[1])), done.stderr[-2000:]
    done = start(stage, second, *flags.split(), "--resume")
    assert done.returncode == 0, done.stderr[-2000:]
    assert_same(first / stage, second / stage)
    last = max((first / stage / "checkpoints").glob("0*"))
    kept = load_file(last / "model.safetensors")
    assert len(kept) == files and {name.endswith((".A", ".B")) for name in kept} == {"lora" in flags}
    assert any(name.endswith(".master") for name in load_file(last / "optimizer.safetensors")) == ("bfloat16" in flags)


def test_the_toy_is_no_trivial_run(whole):
    """The compared runs train, ask the ToolActor and use its memo."""
    out, _ = whole
    *made, last = rows(out / "grpo" / "metrics.csv")  # the last row holds only the held-out EM
    assert last["step"] == str(STEPS["grpo"]) and not last["updates"] and last["heldout_greedy"]
    assert len(made) == STEPS["grpo"] and sum(int(row["updates"]) for row in made) > 0.9 * len(made)
    assert any(0 < float(row["memo_hits"]) < 1 for row in made)
    before, after = (load(out / stage / "model")[0] for stage in ("sft", "grpo"))
    assert not any(torch.equal(a, b) for a, b in zip(before.parameters(), after.parameters(), strict=True))
    assert [row["step"] for row in rows(out / "sft" / "metrics.csv")] == [str(step) for step in range(STEPS["sft"])]
    assert (out / "grpo" / "traces.jsonl").stat().st_size > 0 and (out / "sft" / "traces.jsonl").read_bytes() == b""


# ------------------------------------------------------------------------------- within one process


def config(out, **more):
    return SFTConfig(out=str(out), shape="toy", **more)


@pytest.fixture
def begun(tmp_path, tokenizer, tiny):
    """A run that made three steps: its folder, and a function that resumes it and returns the steps that it makes."""
    def go(total, before=lambda step: None, **more):
        run = Run(tmp_path / "sft", config(tmp_path, save_every=1, **more), ["step", "loss"])
        model = tiny(tokenizer.size, dtype=torch.float32)
        made = []
        for step in run.steps(total, model, tokenizer, sft.make_optimizer(model, 0.1, 0.0)):
            before(step)
            run.log({"step": step, "loss": 0.5})
            made.append(step)
        return made
    go(3)
    return tmp_path / "sft", go


def checkpoints(folder):
    return sorted(int(f.name) for f in (folder / "checkpoints").glob("0*"))


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def finish(folder):
    """Make a run look finished."""
    (folder / "model").mkdir(exist_ok=True)
    (folder / "model" / "config.json").write_text("{}")


def test_resume_makes_the_steps_that_are_left(begun):
    folder, go = begun
    assert go(5, resume=True) == [3, 4] and go(5, resume=True) == []
    assert [row["step"] for row in rows(folder / "metrics.csv")] == list("01234")


def test_rows_after_the_checkpoint_are_written_again(begun):
    folder, go = begun
    with open(folder / "metrics.csv", "a") as file:
        file.write("3,0.5\r\n4,0")
    (folder / "traces.jsonl").write_text('{"step": 3}\n')
    assert go(5, resume=True) == [3, 4]
    assert [row["step"] for row in rows(folder / "metrics.csv")] == list("01234")
    assert (folder / "traces.jsonl").read_bytes() == b""


def test_the_last_two_are_kept(begun):
    """Also if a kill came before an old one was removed."""
    folder, go = begun
    shutil.rmtree(folder)
    go(8)
    assert checkpoints(folder) == [7, 8]
    for older in ("0000005", "0000006"):
        shutil.copytree(folder / "checkpoints" / "0000007", folder / "checkpoints" / older)
    assert go(9, resume=True) == [8] and checkpoints(folder) == [8, 9]


@pytest.mark.parametrize("finished", [False, True])
def test_a_run_is_not_overwritten(begun, finished):
    folder, go = begun
    if finished:
        shutil.rmtree(folder / "checkpoints")
        finish(folder)
    before = contents(folder)
    with pytest.raises(InputError, match="holds a run; continue it with --resume"):
        go(5)
    assert contents(folder) == before


@pytest.mark.parametrize("resume", [False, True])
def test_a_folder_that_is_not_a_run_is_left_alone(resume, tmp_path):
    (tmp_path / "sft").mkdir()
    (tmp_path / "sft" / "thesis.txt").write_text("important")
    with pytest.raises(InputError, match="holds something that is not a run"):
        Run(tmp_path / "sft", config(tmp_path, resume=resume), ["step"])
    assert [path.name for path in (tmp_path / "sft").iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize("finished", [False, True])
@pytest.mark.parametrize("more", [{"lr": 0.5}, {"seed": 1}, {"worlds": 3}, {"precision": "float32"}])
def test_resume_goes_on_as_the_run_began(more, finished, begun, tmp_path):
    folder, _ = begun
    if finished:
        finish(folder)
    before = contents(folder)
    with pytest.raises(InputError, match=f"^{next(iter(more))}: .* was started with") as error:
        Run(folder, config(tmp_path, **{"save_every": 1, "resume": True, **more}), ["step"])
    assert "\n" not in str(error.value) and contents(folder) == before


@pytest.mark.parametrize("more", [{"threads": 1}, {"save_every": 2}, {"traces": "elsewhere.jsonl"}, {"model": "elsewhere"}, {"steps": 1301}])
def test_what_a_resumed_run_may_change(more, begun, tmp_path, capsys):
    """Of its files only the bytes count. Where the weights may then differ, a line says so."""
    folder, _ = begun
    run = Run(folder, config(tmp_path, **{"save_every": 1, "resume": True, **more}), ["step"])
    assert run.state["step"] == 3 and not run.finished
    said, name = capsys.readouterr().out, next(iter(more))
    if name in ("threads", "steps"):
        assert said == f"{folder}: other {name} than at its start, so its weights will not be those of a run without a stop, bit for bit\n"
    else:
        assert said == ""


@pytest.mark.parametrize("before, now, said", [({}, False, False), ({}, True, True), ({"graph": True}, True, False),
                                               ({"graph": True}, False, True)])
def test_a_resumed_run_may_change_how_it_decodes(before, now, said, tmp_path, capsys):
    """A run may be older than the option --graph."""
    (tmp_path / "config.json").write_text(json.dumps({"steps": 5, "threads": 1} | before))
    assert not gets_steps(tmp_path, {"steps": 5, "threads": 1, "graph": now}, finished=False)
    assert ("other graph than at its start" in capsys.readouterr().out) is said


def test_a_finished_run_goes_on_if_it_gets_more_steps(begun, tmp_path):
    """From its last checkpoint. Fewer steps change nothing. config.json then holds the new number."""
    folder, _ = begun
    finish(folder)
    for steps, finished in ((7, True), (1300, True), (1301, False)):
        run = Run(folder, config(tmp_path, steps=steps, save_every=1, resume=True), ["step", "loss"])
        assert run.finished == finished and run.state["step"] == (0 if finished else 3)
    assert json.loads((folder / "config.json").read_text())["steps"] == 1301
    with open(folder / "metrics.csv", "a") as file:
        file.write("1300,0.5\r\n")
    Run(folder, config(tmp_path, steps=1302, save_every=1, resume=True), ["step", "loss"])
    assert [row["step"] for row in rows(folder / "metrics.csv")] == list("012")


def test_a_grown_run_that_was_stopped_is_not_finished(begun, tmp_path, tiny, tokenizer):
    """Its model is that of fewer steps. It stays and can be asked, but stage 2 does not start from it."""
    folder, _ = begun
    finish(folder)
    again = config(tmp_path, steps=1301, save_every=1, resume=True)
    for _ in range(2):
        run = Run(folder, again, ["step"])
        assert not run.finished and (folder / "model" / "config.json").exists()
        with pytest.raises(InputError, match=f"^{folder}: gets more steps; finish it with sft.py --resume first$"):
            stage1_model(str(tmp_path), "", False)
    run.save(tiny(tokenizer.size, dtype=torch.float32), tokenizer)
    assert Run(folder, again, ["step"]).finished and stage1_model(str(tmp_path), "", False)


def test_a_run_without_checkpoints_gets_no_more_steps(begun, tmp_path):
    """As grpo.py --sft copies it. It would start again from random weights."""
    folder, _ = begun
    finish(folder)
    shutil.rmtree(folder / "checkpoints")
    before = contents(folder)
    with pytest.raises(InputError, match=f"^steps: {folder} has no checkpoint to continue from$"):
        Run(folder, config(tmp_path, steps=1301, save_every=1, resume=True), ["step"])
    assert contents(folder) == before


def test_resume_wants_the_prompts_that_the_run_began_with(begun, tmp_path):
    folder, _ = begun
    old = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(old | {"sha256_of_prompts": "other"}))
    with pytest.raises(InputError, match=r"^sha256_of_prompts: .* was started with other prompts \(data/prompts.py\)$"):
        Run(folder, config(tmp_path, save_every=1, resume=True), ["step"])


def test_an_unfinished_run_gets_no_fewer_steps(begun, tmp_path):
    with pytest.raises(InputError, match="^steps: .* was started with 1300, not 7"):
        Run(begun[0], config(tmp_path, steps=7, save_every=1, resume=True), ["step"])


HOLD = """import sys; sys.path.insert(0, {root!r})
from pathlib import Path
from data.folders import lock
lock(Path({path!r}))
print("held", flush=True)
sys.stdin.read()"""


def test_two_programs_never_write_to_one_run(begun, tmp_path):
    """Another process holds the run's lock. Nothing is written until it ends, however it ends."""
    folder, go = begun
    code = HOLD.format(root=str(Path(__file__).parents[1]), path=str(tmp_path / "lock"))
    before = contents(folder)
    locks.clear()  # this process has held it since `begun`
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "held\n"
        for again in (lambda: go(5, resume=True), lambda: Run(tmp_path / "grpo", config(tmp_path), ["step"])):
            with pytest.raises(InputError, match=f"^{tmp_path / 'lock'}: another program is writing there"):
                again()
        assert contents(folder) == before and not (tmp_path / "grpo").exists()
        other.kill()
        other.wait()
        assert go(5, resume=True) == [3, 4]


def test_a_stage_folder_may_be_a_link(begun, tmp_path, tokenizer, tiny):
    """What it points to is written; the link stays. Its model/ may be a link, too."""
    folder, go = begun
    (tmp_path / "disk").mkdir()
    folder.rename(tmp_path / "disk" / "sft")
    folder.symlink_to(tmp_path / "disk" / "sft")
    (tmp_path / "disk" / "model").mkdir()
    (folder / "model").symlink_to(tmp_path / "disk" / "model")
    assert go(5, resume=True) == [3, 4] and folder.is_symlink() and checkpoints(tmp_path / "disk" / "sft") == [4, 5]
    Run(folder, config(tmp_path, save_every=1, resume=True), ["step"]).save(tiny(tokenizer.size, dtype=torch.float32), tokenizer)
    assert (folder / "model").is_symlink() and (tmp_path / "disk" / "model" / "model.safetensors").exists()


@pytest.mark.parametrize("umask, mode", [(0o022, 0o644), (0o002, 0o664), (0o077, 0o600)])
def test_what_is_written_can_be_read_as_the_umask_says(umask, mode, tmp_path, tiny, tokenizer):
    old = os.umask(umask)
    try:
        run = Run(tmp_path / "sft", config(tmp_path, save_every=1), ["step"])
        model = tiny(tokenizer.size, dtype=torch.float32)
        list(run.steps(1, model, tokenizer, sft.make_optimizer(model, 0.1, 0.0)))
        run.save(model, tokenizer)
    finally:
        os.umask(old)
    files = [path for path in tmp_path.glob("sft/**/*") if path.is_file()]
    assert len(files) > 12 and {path.stat().st_mode & 0o777 for path in files} == {mode}


def test_config_json_holds_the_options_and_a_fingerprint_of_the_sources(tmp_path, folder):
    file = tmp_path / "traces.jsonl"
    file.write_text("one")
    Run(tmp_path / "sft", config(tmp_path, lr=0.25), ["step"], (folder, file))
    begun = json.loads((tmp_path / "sft" / "config.json").read_text())
    assert begun.pop("sha256_of_prompts") == fingerprint(prompts.__file__)
    assert begun.pop("sha256_of_model_and_data") == fingerprint(folder, file) and SFTConfig(**begun) == config(tmp_path, lr=0.25)
    assert {path.name: path.stat().st_size for path in (tmp_path / "sft").iterdir() if path.name != "config.json"} == {
        "metrics.csv": 0, "traces.jsonl": 0}


@pytest.mark.parametrize("finished", [False, True])
def test_resume_wants_the_model_that_the_run_began_with(finished, begun, tmp_path, folder):
    run, _ = begun
    begun = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps({**begun, "sha256_of_model_and_data": fingerprint(folder)}))
    if finished:
        finish(run)
    again = config(tmp_path, save_every=1, resume=True)
    assert Run(run, again, ["step"], (folder,)).finished == finished
    weights = bytearray((folder / "model.safetensors").read_bytes())
    weights[-1] ^= 1  # one bit
    (folder / "model.safetensors").write_bytes(weights)
    for other in ((folder,), (), (run / "checkpoints" / "0000003",)):
        with pytest.raises(InputError, match="^sha256_of_model_and_data: .* was started with"):
            Run(run, again, ["step"], other)


def test_resume_wants_the_files_that_the_run_began_with(begun, tmp_path):
    (run, _), file = begun, tmp_path / "traces.jsonl"
    file.write_text("one")
    begun = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps({**begun, "sha256_of_model_and_data": fingerprint(file)}))
    again = config(tmp_path, save_every=1, resume=True)
    Run(run, again, ["step"], (str(file),))
    file.write_text("two")
    with pytest.raises(InputError, match="^sha256_of_model_and_data: .* was started with"):
        Run(run, again, ["step"], (str(file),))



@pytest.mark.parametrize("resume", [False, True])
def test_a_run_without_a_checkpoint_starts_at_the_beginning(resume, begun):
    """Also with other options. Logs of a run that was killed before it saved are emptied."""
    folder, go = begun
    shutil.rmtree(folder / "checkpoints")
    (folder / "traces.jsonl").write_text('{"step": 0}\n')
    assert go(2, resume=resume, lr=0.25) == [0, 1] and [row["step"] for row in rows(folder / "metrics.csv")] == list("01")
    assert (folder / "traces.jsonl").read_bytes() == b"" and json.loads((folder / "config.json").read_text())["lr"] == 0.25
    shutil.rmtree(folder)
    assert go(2, resume=resume) == [0, 1]


@pytest.mark.parametrize("row, name", [
    ({"step": 7, "loss": math.nan}, "loss"), ({"step": 7, "loss": math.inf}, "loss"), ({"step": 7, "loss": -math.inf}, "loss"),
    ({"step": 7, "loss": 0.5, "grad_norm": math.nan}, "grad_norm"), ({"step": 7, "loss": 0.5}, None),
    ({"step": 7, "loss": "", "grad_norm": None}, None), ({"step": 7, "loss": 10 ** 400}, None)], ids=str)
def test_a_value_that_is_not_finite_ends_the_run(row, name, tmp_path):
    """The row is written before, so that the reader of metrics.csv sees it."""
    run = Run(tmp_path / "sft", config(tmp_path), ["step", "loss", "grad_norm"])
    run.log({"step": 6, "loss": 0.123456789})
    if name:
        with pytest.raises(SystemExit) as end:
            run.log(row)
        assert end.value.code == (f"step 7: {name} is {row[name]}. The run ends here; {tmp_path / 'sft' / 'checkpoints'} "
                                  "keeps its last checkpoint")
    else:
        run.log(row)
    first, second = rows(tmp_path / "sft" / "metrics.csv")
    assert first == {"step": "6", "loss": "0.123457", "grad_norm": ""} and second["step"] == "7"


def test_traces_are_appended_one_per_line(tmp_path):
    run = Run(tmp_path / "sft", config(tmp_path), ["step"])
    run.save_traces(0, [Trace("Who\n?"), Trace("é\u2028")], [["a"], ["b"]], [{"em": 1.0}, {"em": 0.0}])
    run.save_traces(1, [Trace("x")], [["c"]], [{"em": 0.5}])
    lines = [json.loads(line) for line in (tmp_path / "sft" / "traces.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [(line["step"], line["question"]) for line in lines] == [(0, "Who\n?"), (0, "é\u2028"), (1, "x")]
    assert [(line["golds"], line["rewards"]["em"]) for line in lines] == [(["a"], 1.0), (["b"], 0.0), (["c"], 0.5)]


@pytest.fixture
def handlers():
    """Ctrl-C works, even where the tests run in the background, and the signal handlers come back."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


STOPPED = "sft.py: stopped; --resume continues a training run from its last checkpoint\n"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_and_sigterm_stop_at_once_and_tell_the_way_on(number, begun, handlers, capsys, monkeypatch):
    folder, go = begun
    monkeypatch.setattr(sys, "argv", ["sft.py", "--out", "a b"])
    with pytest.raises(SystemExit) as end:
        run_main(lambda: go(9, before=lambda step: step == 4 and os.kill(os.getpid(), number), resume=True))
    assert end.value.code == 130 and checkpoints(folder) == [3, 4] and capsys.readouterr().err == STOPPED
    assert [row["step"] for row in rows(folder / "metrics.csv")] == list("0123")
    assert go(6, resume=True) == [4, 5]


def test_sigterm_before_the_first_step_ends_at_once(handlers, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["sft.py"])
    with pytest.raises(SystemExit) as end:
        run_main(lambda: os.kill(os.getpid(), signal.SIGTERM))
    assert end.value.code == 130 and capsys.readouterr().err == STOPPED


def test_a_full_disk_ends_the_run_with_a_line_and_leaves_the_last_checkpoint_whole(begun, handlers, capsys):
    """No file may grow beyond 2,000 bytes from step 4 on, as if the disk were full."""
    folder, go = begun
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        with pytest.raises(SystemExit) as end:
            run_main(lambda: go(9, before=lambda step: step == 4 and resource.setrlimit(
                resource.RLIMIT_FSIZE, (2000, old[1])), resume=True))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    said = capsys.readouterr().err
    assert end.value.code == 2 and said.count("\n") == 1 and "too large" in said
    assert checkpoints(folder) == [3, 4] and go(6, resume=True) == [4, 5]


@pytest.mark.parametrize("error", [
    MemoryError(), MemoryError("Unable to allocate 8 GiB"), torch.OutOfMemoryError("CUDA out of memory. Tried to allocate\n8 GiB"),
    RuntimeError("MPS backend out of memory"), RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8"),
    RuntimeError("std::bad_alloc"), RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 8")], ids=repr)
def test_too_little_memory_is_one_line_that_names_the_options(error, handlers, capsys):
    def main():
        raise error
    with pytest.raises(SystemExit) as end:
        run_main(main)
    said = capsys.readouterr().err
    assert end.value.code == 2 and said.count("\n") == 1 and "out of memory; lower --rows, " in said


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252"])
def test_a_terminal_that_cannot_print_a_character_shows_another(encoding, handlers, monkeypatch):
    shown = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    monkeypatch.setattr(sys, "stdout", shown)
    run_main(lambda: print("Bo\u2192Velka \U0001f600", flush=True))
    assert shown.buffer.getvalue() == b"Bo?Velka ?\n"


@pytest.mark.parametrize("error", [RuntimeError("a bug"), RuntimeError("CUDA error: an illegal memory access was encountered"), ValueError("a bug"), KeyError("a bug")], ids=repr)
def test_a_bug_keeps_its_traceback(error, handlers):
    def main():
        raise error
    with pytest.raises(type(error)) as raised:
        run_main(main)
    assert raised.value is error


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
        run_file.set_up(Config())
    assert {call for call in calls.seen if call[0] != "ones"} == {("cos", 1), ("sin", 1), ("exp", 1)}


GPU = {"cuda": True, "mps": True}


@pytest.mark.parametrize("available, device, checkpoint, picked", [
    (GPU, "auto", False, "cpu"), (GPU, "auto", True, "cuda"), (GPU, "cuda", False, "cuda"), (GPU, "cpu", True, "cpu"),
    ({"cuda": False, "mps": True}, "auto", True, "mps"), ({"cuda": False, "mps": False}, "auto", True, "cpu"),
    ({"cuda": False, "mps": True}, "cuda", True, None), ({"cuda": False, "mps": False}, "mps", False, None)])
def test_the_device(available, device, checkpoint, picked, monkeypatch):
    """auto: the CPU for the miniature, for a checkpoint the best device that there is. A device that is not there is
    refused (None)."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: available["cuda"])
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: available["mps"])
    if picked is None:
        with pytest.raises(InputError, match=f"^device: {device} is not available here"):
            run_file.set_up(Config(device=device), checkpoint)
    else:
        run_file.set_up(Config(device=device), checkpoint)
        assert run_file.pick_device() == picked


@pytest.mark.parametrize("precision, supported, half, weights", [
    ("auto", True, True, torch.float32), ("auto", False, False, torch.float32), ("float32", True, False, torch.float32),
    ("bfloat16", False, False, torch.bfloat16), ("bfloat16", True, False, torch.bfloat16)])
def test_the_precision_of_weights_and_products_on_a_cpu(precision, supported, half, weights, monkeypatch):
    """Weights in bfloat16 need no autocast, which would keep copies of them."""
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: supported)
    run_file.set_up(Config(precision=precision))
    with run_file.half_precision("cpu"):
        product = torch.ones(2, 2) @ torch.ones(2, 2)
    assert product.dtype == (torch.bfloat16 if half else torch.float32) and run_file.weights_type() == weights


@pytest.mark.parametrize("precision, supported, weights", [
    ("auto", True, torch.bfloat16), ("auto", False, torch.float32), ("float32", True, torch.float32), ("bfloat16", True, torch.bfloat16)])
def test_the_type_of_the_weights_on_a_gpu(precision, supported, weights, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: supported)
    run_file.set_up(Config(precision=precision), checkpoint=True)
    assert run_file.weights_type() == weights and run_file.pick_device() == "cuda"
    assert not torch.backends.cuda.cudnn_sdp_enabled()


def test_a_folder_is_whole_or_as_it_was(tmp_path):
    """Also if writing breaks off in the middle. What an earlier kill left is removed."""
    def write(name, text, error=None):
        with run_file.whole_folder(tmp_path / "x") as part:
            (part / name).write_text(text)
            assert [f.name for f in part.iterdir()] == [name]
            if error:
                raise error
    write("a", "whole")
    for error in (OSError("no space"), KeyboardInterrupt()):
        with pytest.raises(type(error)):
            write("b", "half", error)
        assert [f.read_text() for f in (tmp_path / "x").iterdir()] == ["whole"]
    write("b", "new")
    assert [f.name for f in (tmp_path / "x").iterdir()] == ["b"] and [f.name for f in tmp_path.iterdir()] == ["x"]
