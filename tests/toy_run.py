"""A toy run of one stage that can be told to die: python tests/toy_run.py STAGE OUT FLAG... (test_resume.py starts it).

It is the stage's own program with a few changes, because a toy learns too little. Stage 1 trains on the conversations
in OUT/lesson.json, with a tokenizer of 500 ids. In stage 2 every turn is a call, so the ToolActor is asked. The
reward of stage 2 is one that random weights can earn. FLOAT64=1 in the environment computes in float64. To save time,
only 12 questions are held out, and the ToolMaker's replies have at most 60 tokens. The run writes its phases with
their times to OUT/phases. DIE="phase step seconds" in the environment kills it with SIGKILL: in that phase of that
step, after that many seconds, or at the end of the phase at the latest. DEAD_RANK="1": of several processes only this
one dies.
UTILITIES=1 gives every question a tool with code."""
import json
import os
import signal
import sys
import threading
import time
from contextlib import nullcontext
from functools import partial, partialmethod
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import agents
import grpo
import run as run_file
import sft
from data.options import run_main

STAGE, OUT = sys.argv[1], Path(sys.argv[2])
DIE = os.environ.get("DIE", "none 0 0").split()
if os.environ.get("DEAD_RANK") not in (None, "", os.environ.get("RANK")):
    DIE = ["none", "0", "0"]
PHASES = os.open(OUT / "phases", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
os.write(PHASES, b"\n")  # a run that died has left a line without an end
now = {"step": -1, "phase": None}


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def watch(owner: object, name: str, phase: str) -> None:
    """Note begin and end of each call of a function, and die in it if DIE says so. Calls inside a phase don't count."""
    real = getattr(owner, name)

    def watched(*args, **more):
        if now["phase"]:
            return real(*args, **more)
        now["phase"] = phase
        here = DIE[:2] == [phase, str(now["step"])]
        os.write(PHASES, f"{phase} {now['step']} {time.time()} ".encode())
        if here:
            threading.Timer(float(DIE[2]), die).start()
        result = real(*args, **more)
        if here:
            die()
        os.write(PHASES, f"{time.time()}\n".encode())
        now["phase"] = None
        return result
    setattr(owner, name, watched)


def follow(run, real, total, *args, **more):
    """Run.steps, and keep the number of the current step; after the last one, the number of steps."""
    for now["step"] in real(run, total, *args, **more):
        yield now["step"]
    now["step"] = total


def always_call(text: str, plain_answer: bool = False) -> agents.Turn:
    """Parse any turn as one of a few different calls of the fallback tool."""
    return agents.Turn("", [agents.Call("lookup", {"subject": text[:1], "property": "abc"[len(text) % 3]})])


def reward(trace: agents.Trace, golds: list[str], config: grpo.GRPOConfig) -> dict:
    """The mean of the sampled ids, in thousands."""
    said = [i for i, m in zip(trace.ids, trace.mask, strict=True) if m]
    value = sum(said) / len(said) / 1000
    return {"reward": value, "em": 0.0, "answer": 0.0, "consistency": value, **dict.fromkeys(grpo.PARTS, 1.0)}


def few_held_out(real, config: grpo.GRPOConfig, world: object) -> tuple[list, list]:
    """The questions of each step, and 12 held-out questions."""
    plan, held_out = real(config, world)
    return plan, held_out[:12]


def short_replies(maker: agents.ToolMaker, real, sampler: object, reply_tokens: int) -> None:
    """Make a ToolMaker with short replies. Random weights rarely end one, so each of its three tries takes all tokens."""
    real(maker, sampler, 60)


def main() -> None:
    if os.environ.get("FLOAT64"):
        for module in (run_file, sft, grpo):
            module.weights_type = lambda: torch.float64
        sft.half_precision = lambda device: nullcontext()
    run_file.Run.steps = partialmethod(follow, run_file.Run.steps)
    watch(run_file.Run, "_save_checkpoint", "saving")
    if STAGE == "sft":
        sft.teach = lambda *_: json.loads((OUT / "lesson.json").read_text(encoding="utf-8"))
        sft.VOCABULARY = 500
        watch(sft, "train_step", "update")
    else:
        agents.parse_turn, grpo.reward = always_call, reward
        if os.environ.get("UTILITIES"):
            agents.KINDS |= dict.fromkeys(agents.KINDS, ("calculator",))
        agents.ToolMaker.__init__ = partialmethod(short_replies, agents.ToolMaker.__init__)
        grpo.choose_questions = partial(few_held_out, grpo.choose_questions)
        watch(grpo, "run_episodes", "rollout")
        watch(grpo, "score_heldout", "evaluation")
        watch(grpo, "update", "update")
    sys.argv = [f"{STAGE}.py", "--out", str(OUT), *sys.argv[3:]]
    run_main({"sft": sft, "grpo": grpo}[STAGE].main)


if __name__ == "__main__":
    main()
