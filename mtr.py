"""Start here. A model learns to use tools whose results are simulated by another model. The method
is that of "Adaptive Tool Generation with Models as Tools and Reinforcement Learning" (MTR).

  python mtr.py                 the miniature: train a small model from random weights in a
                                fictional world of people and cities (SFT, then GRPO), and
                                evaluate it; minutes on a CPU
  python mtr.py ask "question"  the trained model answers your question about this world
  python mtr.py ask --model FOLDER "question"    a Qwen2.5 checkpoint answers, as all three agents
  python mtr.py eval            evaluate a run or a checkpoint, on held-out or benchmark questions
  python mtr.py traces          optional stage 0: a larger checkpoint writes traces for SFT
  python mtr.py show            the table of a finished run, and a question before and after GRPO
"""
import argparse
import json
import sys
import time
from contextlib import nullcontext
from dataclasses import dataclass, fields
from pathlib import Path

import evaluate
from agents import AutoAgent, Trace, run_episodes
from data import InputError
from evaluate import AgentConfig, EvalConfig, TracesConfig, all_rows, load_tools, open_models
from grpo import GRPOConfig, train_grpo
from report import before_and_after, draw_curves, say, show_evaluation, show_run
from run import Parser, add_options, option, run_main, validate
from sft import SFTConfig, train_sft

TOY_OPTIONS = {
    "sft": {"worlds": 2, "steps": 30, "agent_tokens": 600, "maker_tokens": 400,
            "actor_tokens": 400, "piece_steps": 5, "warmup": 5, "continued_steps": 5,
            "shape": "toy"},
    "grpo": {"steps": 2, "questions": 2, "group": 2, "turn_tokens": 48, "max_turns": 3,
             "eval_every": 2}}


@dataclass
class RunConfig:
    """The options of the whole run. The stages have more when run alone (sft.py, grpo.py)."""
    out: str = option("run", "run folder")
    seed: int = option(0, "seed of the world and of everything else", least=0)
    threads: int = option(0, "CPU threads; 0: torch's choice", least=0)
    toy: bool = option(False, "run every stage in under a minute, only to check that it works; the "
                       "run folder is then toy, unless you give --out")
    resume: bool = option(False, "continue an interrupted run; finished stages are skipped")

    def __post_init__(self):
        validate(self)
        if self.toy and self.out == RunConfig.out:  # the default
            self.out = "toy"


@dataclass
class AskConfig(AgentConfig):
    """The options of mtr.py ask. AgentConfig adds --model, --temperature, --seed and limits."""
    tools: str = option("", "your own tools in place of the ToolMaker's: JSON or Python")
    question: str = option("", 'for example "Who is the mayor of the birthplace of Borox?"',
                           positional=True)


@dataclass
class ShowConfig:
    """The options of mtr.py show."""
    out: str = option("run", "run folder")


def run_all(config: RunConfig) -> None:
    """Run the whole method: SFT, GRPO, a control (more SFT in place of GRPO), the evaluation."""
    shared = {"out": config.out, "seed": config.seed, "threads": config.threads,
              "resume": config.resume}
    options = TOY_OPTIONS if config.toy else {"sft": {}, "grpo": {}}
    first = SFTConfig(**shared, **options["sft"])
    second = GRPOConfig(**shared, **options["grpo"])
    out = Path(config.out)
    finished = (out / "results.json").exists()
    if finished and not config.resume:
        raise InputError(f"{out}: holds a finished run (see mtr.py show); remove it or choose "
                         "another --out")
    for stage in ("sft", "grpo", "sft_continued"):
        if not config.resume and (out / stage / "checkpoints").exists():
            raise InputError(f"{out / stage}: holds a run; continue it with --resume, remove it or "
                             "choose another --out")
    seconds = {}  # after --resume: only of what was left to do

    def timed(stage: str, function, *args, **more):
        start = time.perf_counter()
        result = function(*args, **more)
        seconds[stage] = round(time.perf_counter() - start, 1)
        return result

    say(f"1/4  SFT: {first.steps} steps from random weights, on a scripted teacher's traces. This "
        "teacher often answers a step too early, on purpose: GRPO has to unlearn that")
    timed("sft", train_sft, first)
    say(f"2/4  GRPO: {second.steps} rollouts of {second.questions} questions x {second.group} "
        "traces")
    timed("grpo", train_grpo, second)
    say(f"3/4  the control: {first.continued_steps} more steps of SFT in place of GRPO")
    timed("sft_continued", train_sft, first, continued=True)
    if not finished:
        say("4/4  evaluation: every model and control answers the same held-out questions, one row "
            "of the table each")
        results, questions, traces = timed("evaluation", all_rows, out, second, few=config.toy)
        results["seconds"] = seconds | {"total": round(sum(seconds.values()), 1)}
        story = before_and_after(questions, traces["sft"], traces["grpo"])
        (out / "story.txt").write_text(story + "\n", encoding="utf-8")
        draw_curves(out)
        # This file marks the run as finished, so it is written last.
        (out / "results.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    show_run(config.out)


def ask(config: AskConfig) -> None:
    """Let the three agents answer one question, and print each part as it comes."""
    question = config.question
    if not question.strip():
        raise InputError("question: it is empty")
    tools = load_tools(config.tools) if config.tools else []
    # The simulator is ToolMaker and ToolActor. With --model there is no world.
    simulator, policy, world = open_models(config, rows=1)
    agent = simulator.agent(policy, 1, config.temperature)
    tokenizer = simulator.tokenizer
    tokens = len(tokenizer.encode(AutoAgent.prompt(tokenizer.prompts, question, tools)))
    if tokens >= agent.trace_tokens:
        raise InputError(f"question: its prompt has {tokens} tokens, but there is room for "
                         f"{agent.trace_tokens} per trace")
    if not tools:
        box = simulator.maker.make([question])[0]
        tools = box.tools
        say(f"ToolMaker: {box.kind}")
        if box.tries == 0:
            print("  its tools were rejected, so there is one general tool")
        for tool in tools:
            print(f"  {tool.definition}")
    say("AutoAgent and ToolActor:")
    trace = Trace(question, tools, (config.seed, question))
    shown = 0

    def watch() -> None:
        nonlocal shown
        lines = trace.story().splitlines()
        for line in lines[shown:]:
            print(line, flush=True)
        shown = len(lines)

    with world.sealed() if world else nullcontext():  # any look-up of a fact raises
        run_episodes(agent, simulator.actor.answer, [trace], watch=watch)
    last = trace.turns[-1] if trace.turns else None
    if last is None:
        print("  the definitions of its tools leave no tokens to answer")
    elif not last.calls and last.answer is None:  # malformed or cut off
        length = trace.mask[::-1].index(0)  # the last turn is the run of ones at the end
        print(f"  the turn  {tokenizer.decode(trace.ids[-length:])!r}")


def eval_command(config: EvalConfig) -> None:
    """Evaluate question files, or the held-out sets of a run."""
    show_evaluation(evaluate.evaluate_files(config))


def traces_command(config: TracesConfig) -> None:
    """Stage 0: write a teacher's traces over question files, and report how many were kept."""
    reasons = evaluate.make_traces(config)  # why traces were not kept; "" counts the kept ones
    total = reasons.total()
    print(f"kept {reasons.pop('', 0)} of {total} traces")
    for reason, number in reasons.most_common():
        print(f"  {number:>6}  {reason}")
    print(f"next: python sft.py --model STUDENT --traces {config.out} --lr 1e-5 --out RUN")


def show(config: ShowConfig) -> None:
    """Print the table of a finished run, and one question before and after GRPO."""
    show_run(config.out)


COMMANDS = {"ask": (AskConfig, ask), "eval": (EvalConfig, eval_command),
            "traces": (TracesConfig, traces_command), "show": (ShowConfig, show)}


def main() -> None:
    """Parse the command line and run the command."""
    parser = Parser(description=__doc__, allow_abbrev=False,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser, RunConfig)
    commands = parser.add_subparsers(dest="command", title="commands", parser_class=Parser)
    for name, (config_class, function) in COMMANDS.items():
        command = commands.add_parser(name, help=function.__doc__, description=function.__doc__,
                                      allow_abbrev=False)
        add_options(command, config_class)
    options = vars(parser.parse_args())
    name = options.pop("command")
    if name and sys.argv[1] != name:  # argparse would replace them by the defaults of the command
        parser.error(f"{sys.argv[1]}: put options after {name}")
    config_class, function = COMMANDS.get(name, (RunConfig, run_all))
    function(config_class(**{f.name: options[f.name] for f in fields(config_class)}))


if __name__ == "__main__":
    run_main(main)
