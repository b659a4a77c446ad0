"""A toy run of one stage that can be told to die: python tests/toy_run.py STAGE OUT FLAG... (test_resume.py starts it).

The stage's own program, but for three things that a toy has too little time for. Stage 1's lesson is read from
OUT/lesson.json; in stage 2 every turn is a call, so that the ToolActor is asked, and the reward is one that random
weights can earn. OUT/phases says what the run is doing and since when; DIE="phase step seconds" in the environment
kills it (SIGKILL) in that phase of that step, after that many seconds or at the phase's end."""
import json
import os
import signal
import sys
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import agents  # noqa: E402
import grpo  # noqa: E402
import run as run_file  # noqa: E402
import sft  # noqa: E402

STAGE, OUT = sys.argv[1], Path(sys.argv[2])
DIE = os.environ.get("DIE", "none 0 0").split()
PHASES = os.open(OUT / "phases", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
now = {"step": -1}


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def watch(owner: object, name: str, phase: str) -> None:
    """Note each begin and end of a function, and die inside it if that was ordered."""
    real = getattr(owner, name)

    def watched(*args, **more):
        here = DIE[:2] == [phase, str(now["step"])]
        os.write(PHASES, f"{phase} {now['step']} {time.time()} ".encode())
        if here:
            threading.Timer(float(DIE[2]), die).start()
        result = real(*args, **more)
        if here:
            die()
        os.write(PHASES, f"{time.time()}\n".encode())
        return result
    setattr(owner, name, watched)


def follow(real, self, *args):
    """The run's steps, with an eye on which one it is."""
    for now["step"] in real(self, *args):
        yield now["step"]


def always_call(text: str) -> agents.Turn:
    """Any turn as a call of the fallback tool, out of few different ones."""
    return agents.Turn("", [agents.Call("lookup", {"subject": text[:1], "property": "abc"[len(text) % 3]})])


def reward(trace: agents.Trace, golds: list[str], config: grpo.GRPOConfig) -> dict:
    """How large the sampled ids are."""
    said = [i for i, m in zip(trace.ids, trace.mask) if m]
    value = sum(said) / len(said) / 1000
    return {"reward": value, "em": 0.0, "answer": 0.0, "consistency": value, **dict.fromkeys(grpo.PARTS), "grammar": 1.0}


def main() -> None:
    run_file.Run.steps = (lambda real: lambda *args: follow(real, *args))(run_file.Run.steps)
    watch(run_file.Run, "_save_checkpoint", "saving")
    if STAGE == "sft":
        sft.teach = lambda *_: json.loads((OUT / "lesson.json").read_text(encoding="utf-8"))
        watch(sft, "train_step", "update")
    else:
        agents.parse_turn, grpo.reward = always_call, reward
        watch(grpo, "roll_out", "rollout")
        watch(grpo, "update", "update")
    sys.argv = [f"{STAGE}.py", "--out", str(OUT), *sys.argv[3:]]
    run_file.run_main({"sft": sft, "grpo": grpo}[STAGE].main)


if __name__ == "__main__":
    main()
