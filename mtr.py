"""The map: tool use learned from simulated traces, end to end. Everything that happens is called from here.

  python mtr.py                 the miniature: world -> traces -> SFT -> GRPO -> evaluation, minutes on a CPU
  python mtr.py ask "question"  the three agents on one question of your own about the fictional world
  python mtr.py ask --model FOLDER "question"   a Qwen2.5 checkpoint plays all three; --tools FILE: your own tools
  python mtr.py eval            the trained agent, or any checkpoint, on its held-out questions or the benchmarks' files
  python mtr.py traces          stage 0: a teacher checkpoint's traces over question files, for sft.py --traces
  python mtr.py show            what a run left: its table, one question before and after GRPO
"""
import argparse
import json
import sys
import time
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, fields
from pathlib import Path

import grpo
import run
import sft
from agents import Trace, load_tools, run_calls
from data import InputError
from evaluate import EvalConfig, TracesConfig, all_rows, evaluate_files, make_traces, open_checkpoint, open_run
from grpo import GRPOConfig
from report import before_and_after, draw_curves, say, show, show_rows
from run import at_least, option, set_up
from sft import SFTConfig

TOY = {"sft": dict(worlds=2, steps=30, agent_tokens=600, maker_tokens=400, actor_tokens=400, piece_steps=5, warmup=5,
                   continued_steps=5, width=64, layers=2, heads=2, mlp=128),
       "grpo": dict(steps=2, questions=2, group=2, turn_tokens=48, max_turns=3, eval_every=2),
       "questions": 8}


@dataclass
class RunConfig:
    """What the whole run can be told; the stages have more to say when run alone (sft.py, grpo.py)."""
    out: str = option("run", "run folder")
    seed: int = option(0, "the world and all that follows from it")
    threads: int = option(0, "CPU threads; 0 leaves the choice to torch")
    toy: bool = option(False, "every stage in under a minute: a check that all works, nothing is learned; --out is toy then")
    resume: bool = option(False, "go on where an interrupted run stopped; finished stages are not repeated")

    def __post_init__(self):
        if self.toy and self.out == RunConfig.out:
            self.out = "toy"  # not where the real run will be


@dataclass
class ShowConfig:
    """What show can be told."""
    out: str = option("run", "run folder")


@dataclass
class AskConfig:
    """What ask can be told."""
    out: str = option("run", "run folder whose models are asked")
    model: str = option("", "a Qwen2.5 checkpoint folder that plays all three roles in their place")
    tools: str = option("", "your own tools in place of the ToolMaker's: JSON list of OpenAI functions, or Python")
    temperature: float = option(0.0, "of AutoAgent; 0 is greedy")
    seed: int = option(0, "all random numbers of the trace")
    threads: int = option(0, "CPU threads; 0 leaves the choice to torch")

    def __post_init__(self):
        at_least(self, threads=0, temperature=0)


def run_all(config: RunConfig) -> None:
    """The whole method, stage by stage, and its controls."""
    shared = dict(out=config.out, seed=config.seed, threads=config.threads, resume=config.resume)
    toy = TOY if config.toy else {"sft": {}, "grpo": {}}
    first, second = SFTConfig(**shared, **toy["sft"]), GRPOConfig(**shared, **toy["grpo"])
    out, seconds = Path(config.out), {}
    if not config.resume and (out / "results.json").exists():
        raise InputError(f"{out}: holds a finished run, which mtr.py show prints; for a new one remove it or name another --out")
    for part in () if config.resume else (out / "sft", out / "grpo", out / "sft_continued"):
        if (part / "checkpoints").exists() or (part / "model" / "config.json").exists():
            raise InputError(f"{part}: holds a run; --resume goes on with it; else remove it or name another --out")
    say(f"1/4  SFT: {first.steps} steps from random weights, on the conversations of an impatient teacher")
    with clock(seconds, "sft"):
        sft.train(first)
    say(f"2/4  GRPO: {second.steps} rollouts of {second.questions} questions x {second.group} traces")
    with clock(seconds, "grpo"):
        grpo.train(second)
    say("3/4  the control: SFT goes on for about as long as GRPO took")
    with clock(seconds, "sft_continued"):
        sft.train_on(first)
    if (out / "results.json").exists():  # a finished run was resumed: its evaluation and its seconds stand
        return show(config)
    say("4/4  evaluation: every row answers the same held-out questions")
    with clock(seconds, "evaluation"):
        results, held_out, traces = all_rows(out, second, toy.get("questions"))
    story = before_and_after(held_out, traces["sft"], traces["grpo"])
    results["seconds"] = seconds | {"total": round(sum(seconds.values()), 1)}
    (out / "story.txt").write_text(story + "\n", encoding="utf-8")
    draw_curves(out)
    (out / "results.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")  # last: the run is finished
    show(config)


@contextmanager
def clock(into: dict, name: str):
    """Seconds spent inside, into a dict."""
    start = time.perf_counter()
    yield
    into[name] = round(time.perf_counter() - start, 1)


def ask(question: str, config: AskConfig) -> None:
    """The three agents on one question, each part shown as it comes. With a checkpoint folder that one plays all three;
    with a file of tools the ToolMaker isn't asked."""
    if not question.strip():
        raise InputError("question: it is empty")
    set_up(config)
    own = load_tools(config.tools) if config.tools else []
    if config.model:
        (maker, agent, actor), sealed = open_checkpoint(config.model, question, own), nullcontext()
    else:
        stage, policy, world = open_run(config.out, rows=1)
        maker, agent, actor, sealed = stage.maker, stage.agent(policy, 1, 0.0), stage.actor, world.sealed()
    agent.temperature = config.temperature
    if not own:
        box = maker.make([question])[0]
        own = box.tools
        say(f"ToolMaker: {box.kind}" + ("" if box.tries else "; what it wrote was rejected: the general tool"))
        print("\n".join(f"  {tool.definition}" for tool in own))
    say("AutoAgent and ToolActor:")
    trace = Trace(question, own, (config.seed, question))
    with sealed:
        agent.start([trace])
        while trace.status == "open":  # agents.run_episodes, told as it happens
            start = len(trace.ids)
            agent.act([trace])
            turn = trace.turns[-1]
            print("\n".join(turn.said()), flush=True)
            if turn.error:
                print(f"  it said   {agent.sampler.tokenizer.decode(trace.ids[start:])!r}")
            if trace.status == "open":
                run_calls([trace], actor)
                print("\n".join(turn.heard()), flush=True)
                agent.observe([trace])
    if trace.status == "truncated":
        print("  truncated", flush=True)


def eval_command(config: EvalConfig) -> None:
    """Question files, or a run's held-out sets, a row each."""
    show_rows(evaluate_files(config))


def traces(config: TracesConfig) -> None:
    """Stage 0, and the report of what was kept."""
    why = make_traces(config)
    kept, total = why.pop("", 0), why.total()
    print(f"kept {kept} of {kept + total} traces" + "".join(f"\n  {n:>6}  {reason}" for reason, n in why.most_common()))
    print(f"learn from them with: python sft.py --model {config.model} --traces {config.out} --out RUN")


COMMANDS = (("ask", "answer one question", AskConfig, ask), ("eval", "evaluate on question files", EvalConfig, eval_command),
            ("traces", "stage 0: a teacher's traces", TracesConfig, traces), ("show", "print what a run left", ShowConfig, show))


def main() -> None:
    """Dispatch on the command."""
    parser = run.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    run.add_options(parser, RunConfig)
    commands = parser.add_subparsers(dest="command", title="commands", parser_class=run.Parser)
    for name, meaning, config, _ in COMMANDS:
        command = commands.add_parser(name, help=meaning, description=meaning)
        run.add_options(command, config)
        if name == "ask":
            command.add_argument("question", help='for example "Who is the mayor of the birthplace of Borox?"')
    options = vars(parser.parse_args())
    command = options.pop("command")
    if command and sys.argv[1] != command:
        parser.error(f"{sys.argv[1]}: flags stand after {command}")
    config, act = {name: (config, act) for name, _, config, act in COMMANDS}.get(command, (RunConfig, run_all))
    config = config(**{f.name: options[f.name] for f in fields(config)})
    if command == "ask":
        ask(options["question"], config)
    else:
        act(config)


if __name__ == "__main__":
    run.run_main(main)
