"""Start here. A model learns to use tools whose results are simulated by another model. The method
is that of "Adaptive Tool Generation with Models as Tools and Reinforcement Learning" (MTR).

  python mtr.py                 the miniature: train a small model from random weights in a
                                fictional world of people and cities (SFT, then GRPO), and
                                evaluate it; minutes on a CPU
  python mtr.py ask "question"  the trained model answers your question about this world
  python mtr.py ask --model FOLDER "question"    a Qwen2.5 checkpoint answers, as all three agents
  python mtr.py eval            evaluate a run or a checkpoint, on held-out or benchmark questions
  python mtr.py traces          optional stage 0: a larger checkpoint writes traces for SFT
  python mtr.py show            the tables of a finished run; --step N, --trace N: its traces
  python mtr.py compare A B     two runs side by side: options that differ, and scores
"""
import argparse
import sys
import time
from contextlib import nullcontext
from dataclasses import dataclass, fields
from pathlib import Path

import evaluate
from agents import AutoAgent, Trace, run_episodes
from data import InputError
from data.compare import CompareConfig, compare
from data.folders import lock, read_results
from data.options import Config, Parser, add_options, option, run_main
from data.own import check_question, run_or_miniature, show_answers, show_end, show_tools, story
from data.show import ShowConfig
from evaluate import AgentConfig, EvalConfig, TracesConfig, all_rows, load_tools, open_models
from grpo import GRPOConfig, train_grpo
from report import say, show, show_evaluation, show_kept, show_run, write_results
from sft import SFTConfig, train_sft

TOY_OPTIONS = {
    "sft": {"worlds": 2, "steps": 30, "agent_tokens": 600, "maker_tokens": 400,
            "actor_tokens": 400, "piece_steps": 5, "warmup": 5, "continued_steps": 5,
            "shape": "toy"},
    "grpo": {"steps": 2, "questions": 2, "group": 2, "turn_tokens": 48, "max_turns": 3,
             "eval_every": 2}}


@dataclass
class RunConfig(Config):
    """The options of the whole run. The stages have more when run alone (sft.py, grpo.py)."""
    toy: bool = option(False, "run every stage in under a minute, only to check that it works; the "
                       "run folder is then toy, unless you give --out")
    controls: bool = option(False, "add six control rows; with --resume, also to a finished run")
    resume: bool = option(False, "continue an interrupted run; finished stages are skipped")

    def __post_init__(self):
        super().__post_init__()
        if self.toy and self.out == RunConfig.out:  # the default
            self.out = "toy"


@dataclass
class AskConfig(AgentConfig):
    """The options of mtr.py ask. AgentConfig adds --model, --temperature, --samples, limits."""
    tools: str = option("", "your own tools in place of the ToolMaker's: JSON or Python")
    stage: str = option("grpo", "whose model is AutoAgent", choices=("sft", "grpo"))
    question: str = option("", 'for example "Who is the mayor of the birthplace of Borox?"',
                           positional=True)


def run_all(config: RunConfig) -> None:
    """Run the whole method: SFT, GRPO, the evaluation; with --controls, more SFT and rows."""
    shared = {f.name: getattr(config, f.name) for f in fields(Config)}
    shared["resume"] = config.resume
    options = TOY_OPTIONS if config.toy else {"sft": {}, "grpo": {}}
    first = SFTConfig(**shared, **options["sft"])
    second = GRPOConfig(**shared, **options["grpo"])
    out = Path(config.out)
    parts = 4 if config.controls else 3
    if not config.resume and (out / "grpo").exists():  # refused now, not after SFT
        raise InputError(f"{out}: holds a run; continue it with --resume, or choose another --out")
    lock(out / "lock")  # until the evaluation is written
    # The seconds of a finished run that gets controls.
    before = read_results(out).get("seconds", {}) if config.resume else {}
    seconds = {stage: before[stage] for stage in ("sft", "grpo") if stage in before}

    def timed(stage: str, function, *args, **more):
        start = time.perf_counter()
        result = function(*args, **more)
        seconds.setdefault(stage, round(time.perf_counter() - start, 1))
        return result

    say(f"1/{parts}  SFT: {first.steps} steps from random weights, on a scripted teacher's traces. "
        "The teacher often answers a step too early, on purpose: GRPO has to unlearn that")
    timed("sft", train_sft, first)
    say(f"2/{parts}  GRPO: {second.steps} rollouts of {second.questions} questions x "
        f"{second.group} traces")
    timed("grpo", train_grpo, second)
    if config.controls:
        say(f"3/4  the control: {first.continued_steps} more steps of SFT in place of GRPO")
        timed("sft_continued", train_sft, first, continued=True)
    enough = 5 if config.controls else 0  # 5 rows without the controls
    results = read_results(out) if config.resume else {}
    if len(results.get("rows", [])) <= enough:
        say(f"{parts}/{parts}  evaluation on held-out questions")
        new, *answered = timed("evaluation", all_rows, out, second, config.toy, config.controls)
        new["seconds"] = seconds | {"total": round(sum(seconds.values()), 1)}
        write_results(config.out, new, *answered)
    show_run(config.out)


def ask(config: AskConfig) -> None:
    """Let the three agents answer one question, and print each part as it comes."""
    question = config.question
    if not config.model:
        config.out = run_or_miniature(config.out)
    if not question.strip():
        raise InputError("question: it is empty")
    tools = load_tools(config.tools) if config.tools else []
    # The simulator is ToolMaker and ToolActor. With --model there is no world.
    simulator, policy, world = open_models(config, rows=config.samples, stage=config.stage)
    if world and not tools:
        check_question(config.out, world, question)
    agent = simulator.agent(policy, config.samples, config.temperature)
    tokenizer = simulator.tokenizer
    tokens = len(tokenizer.encode(AutoAgent.prompt(tokenizer.prompts, question, tools)))
    if tokens >= agent.trace_tokens:
        raise InputError(f"question: its prompt has {tokens} tokens, but there is room for "
                         f"{agent.trace_tokens} per trace")
    if not tools:
        box = simulator.maker.make([question], (config.seed,))[0]
        tools = box.tools
        show_tools(box)
    say("AutoAgent and ToolActor:")
    keys = [(config.seed, question, sample) for sample in range(config.samples)]
    traces = [Trace(question, tools, key) for key in keys]
    shown = 0

    def watch() -> None:
        nonlocal shown
        lines = story(traces[0]).splitlines()
        for line in lines[shown:]:
            print(line, flush=True)
        shown = len(lines)

    with world.sealed() if world else nullcontext():  # any look-up of a fact raises
        run_episodes(agent, simulator.actor.answer, traces, config.samples, watch=watch)
    show_end(traces[0], tokenizer.decode)
    if config.samples > 1:
        show_answers(traces)


def eval_command(config: EvalConfig) -> None:
    """Evaluate question files, or the held-out sets of a run."""
    show_evaluation(evaluate.evaluate_files(config))


def traces_command(config: TracesConfig) -> None:
    """Stage 0: write a teacher's traces over question files, and report how many were kept."""
    show_kept(evaluate.make_traces(config))
    print(f"next: python sft.py --model STUDENT --traces {config.out} --out RUN")


COMMANDS = {"ask": (AskConfig, ask), "eval": (EvalConfig, eval_command),
            "traces": (TracesConfig, traces_command), "show": (ShowConfig, show),
            "compare": (CompareConfig, compare)}


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
