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
from collections import Counter
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, fields
from pathlib import Path

import grpo
import sft
from agents import AutoAgent, Tool, ToolActor, ToolMaker, Trace, load_tools, run_calls
from data.score import exact_match, f1
from data.tools import Blanked, Real, Shuffled
from data.world import HELD_OUT, RELATIONS, Question, World, make_questions, make_world, tool_for, tools_for
from grpo import EvalConfig, GRPOConfig, Stage, TracesConfig, check_sampling, evaluate_files, open_run, teach
from model import InputError, Sampler, Tokenizer, Transformer, load_model, read_json
from sft import SFTConfig, at_least, option, set_up

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
    top_p: float = option(1.0, "only the fewest, likeliest tokens that hold this share are drawn")
    top_k: int = option(0, "and of these the likeliest so many; 0: all")
    seed: int = option(0, "all random numbers of the trace")
    threads: int = option(0, "CPU threads; 0 leaves the choice to torch")

    def __post_init__(self):
        at_least(self, threads=0)
        check_sampling(self)


def run(config: RunConfig) -> None:
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
        results, story = report(config, second, toy.get("questions"))
    results["seconds"] = seconds | {"total": round(sum(seconds.values()), 1)}
    (out / "story.txt").write_text(story + "\n", encoding="utf-8")
    draw_curves(out)
    (out / "results.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")  # last: the run is finished
    show(config)


def report(config: RunConfig, second: GRPOConfig, most: int | None) -> tuple[dict, str]:
    """All rows of the table, and one question's trace before and after GRPO."""
    world, out = make_world(config.seed), Path(config.out)
    questions = make_questions(world)
    held_out = [q for q in questions if q.set in HELD_OUT][::50 // most * 4 if most else 1]
    stage = Stage(out / "sft" / "model", second)
    stage.make_tools(held_out)
    models = {name: load_model(out / name / "model", stage.device) for name in ("sft", "sft_continued", "grpo")}
    models["untrained"] = Transformer(stage.frozen.config).init_weights(config.seed).to(stage.device)
    rows, traces = [majority(questions, held_out)], {}
    plan = [("closed_book", "sft", stage.actor), ("untrained", "untrained", stage.actor), ("sft", "sft", stage.actor),
            ("sft_continued", "sft_continued", stage.actor), ("sft_blanked", "sft", Blanked()),
            ("sft_shuffled", "sft", Shuffled(stage.actor)), ("grpo", "grpo", stage.actor),
            ("grpo_blanked", "grpo", Blanked()), ("grpo_shuffled", "grpo", Shuffled(stage.actor)),
            ("grpo_real", "grpo", Real(world.real))]
    for name, model, backend in sft.tqdm(plan, desc="rows", unit="row"):
        with nullcontext() if isinstance(backend, Real) else world.sealed():
            agent = stage.agent(models[model], len(held_out), 0.0)
            row, traces[name] = grpo.evaluate(stage, agent, held_out, backend, closed_book=name == "closed_book")
        rows.append({"row": name, **row})
    results = {"seed": config.seed, "actor_recall": actor_recall(stage, world),
               "actor_fidelity": actor_fidelity(traces["grpo"], world), "maker": maker_report(stage, held_out), "rows": rows}
    return results, before_and_after(held_out, traces["sft"], traces["grpo"])


def majority(questions: list[Question], held_out: list[Question]) -> dict:
    """The row of a program that always gives the commonest training answer."""
    answer = Counter(q.golds[0] for q in questions if q.set not in HELD_OUT).most_common(1)[0][0]
    right = {q.id: exact_match(answer, q.golds) for q in held_out}
    em = sum(right.values()) / len(right)
    of = {s: [right[q.id] for q in held_out if q.set == s] for s in HELD_OUT}
    return {"row": "majority", "n": len(held_out), "em_greedy": em, "em_sampled": em, "grammar": None,
            "f1": sum(f1(answer, q.golds) for q in held_out) / len(held_out), "valid_calls": None, "support": None,
            "calls": 0.0, "length": None, "by_set": {s: sum(v) / len(v) for s, v in of.items() if v}}


def actor_recall(stage: Stage, world: World) -> float:
    """Share of the world's facts that the ToolActor tells, asked with the teacher's own tools."""
    tools = {relation: Tool(**tool_for(relation)) for relation in RELATIONS}
    asked = [(tools[relation], {RELATIONS[relation][0]: subject}) for relation, subject in world.facts]
    told = ToolActor(stage.actor.sampler).answer(asked)
    return sum(told[i] == {r: v} for i, ((r, _), v) in enumerate(world.facts.items())) / len(told)


def actor_fidelity(traces: list[Trace], world: World) -> float:
    """Share of the observations which the ToolActor gave that are true."""
    calls = [c for t in traces for c in t.calls if c.error is None and c.name in RELATIONS]
    return sum(c.observation == world.real(c.name, c.arguments) for c in calls) / max(1, len(calls))


def maker_report(stage: Stage, questions: list[Question]) -> dict[str, float]:
    """Shares of the questions whose tools passed at the first try, are the teacher's, passed at all, passed at a
    later try, are the fallback."""
    boxes = [stage.boxes[q.id] for q in questions]
    exact = [b.kind == q.kind and b.tries and [json.loads(t.definition) for t in b.made] == tools_for(q)
             for b, q in zip(boxes, questions)]
    shares = {"valid": [b.tries == 1 for b in boxes], "exact": exact, "accepted": [b.tries > 0 for b in boxes],
              "regenerated": [b.tries > 1 for b in boxes], "fallback": [b.tries == 0 for b in boxes]}
    return {name: sum(map(bool, values)) / len(boxes) for name, values in shares.items()}


def before_and_after(questions: list[Question], before: list[Trace], after: list[Trace]) -> str:
    """The first held-out question that SFT alone got wrong and GRPO got right, both traces as sampled."""
    for q, old, new in zip(questions, before, after):
        if not exact_match(old.answer or "", q.golds) and exact_match(new.answer or "", q.golds):
            return f"{q.text}   (right: {q.golds[0]})\nbefore GRPO\n{old.story()}\nafter GRPO\n{new.story()}"
    return "No held-out question went from wrong to right."


@contextmanager
def clock(into: dict, name: str):
    """Seconds spent inside, into a dict."""
    start = time.perf_counter()
    yield
    into[name] = round(time.perf_counter() - start, 1)


def say(line: str) -> None:
    """A headline between the progress bars."""
    print(f"\n{line}", flush=True)


def show(config: RunConfig | ShowConfig) -> None:
    """Print a run's table and story."""
    out = config.out
    if not (Path(out) / "results.json").exists():
        raise InputError(f"--out: no finished run in {out} (results.json is missing); python mtr.py makes one")
    results = read_json(Path(out) / "results.json")
    columns = ("em_greedy", "em_sampled", "f1", "grammar", "valid_calls", "support", "calls")
    say(f"{'row':<14}" + "".join(f"{name:>12}" for name in columns) + "".join(f"{s:>11}" for s in HELD_OUT))
    for row in results["rows"]:
        cells = [row[name] for name in columns] + [row["by_set"].get(s) for s in HELD_OUT]
        widths = [12] * len(columns) + [11] * len(HELD_OUT)
        print(f"{row['row']:<14}" + "".join(f"{'-' if v is None else format(v, '.3f'):>{w}}" for v, w in zip(cells, widths)))
    maker = ", ".join(f"{name} {value:.3f}" for name, value in results["maker"].items())
    print(f"n = {results['rows'][0]['n']} held-out questions; the last columns are sampled EM by set\n"
          f"ToolActor: recall {results['actor_recall']:.3f}, fidelity {results['actor_fidelity']:.3f}   ToolMaker: {maker}\n"
          f"seconds: {results['seconds']}")
    say((Path(out) / "story.txt").read_text(encoding="utf-8"))
    print(f"everything else is in {out}/: metrics.csv of each stage, grpo/traces.jsonl, curves.png, the models\n"
          f'ask it: python mtr.py ask --out {out} "a question as above"')


def draw_curves(out: Path) -> None:
    """curves.png: loss of stage 1; reward, length, held-out EM and gradient norm of stage 2."""
    import csv

    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    tables = {stage: list(csv.DictReader(open(out / stage / "metrics.csv", encoding="utf-8"))) for stage in ("sft", "grpo")}
    panels = [("sft", ("loss_agent", "loss_maker", "loss_actor", "heldout_agent", "heldout_maker")),
              ("grpo", ("reward", "answer", "consistency", "heldout_sampled")), ("grpo", ("length",)), ("grpo", ("grad_norm",))]
    figure, axes = plt.subplots(2, 2, figsize=(11, 7), layout="constrained")
    for axis, (stage, names) in zip(axes.flat, panels):
        for name in names:
            points = [(int(r["step"]), float(r[name])) for r in tables[stage] if r[name]]
            axis.plot(*zip(*points), label=name, marker="o" if name.startswith("heldout") else "")
        axis.set(xlabel=f"{stage} step", yscale="log" if stage == "sft" else "linear")
        axis.legend()
    figure.savefig(out / "curves.png", dpi=110)
    plt.close(figure)


TURNS, TURN_TOKENS = 8, 512  # of a checkpoint's AutoAgent; what it hears may be as long again as what it says


def open_checkpoint(folder: str, question: str, tools: list[Tool]) -> tuple[ToolMaker, AutoAgent, ToolActor]:
    """A Qwen2.5 checkpoint in all three roles, with a KV cache that holds the longest trace."""
    model = load_model(folder, sft.pick_device(), sft.checkpoint_dtype()).requires_grad_(False)
    tokenizer, room = Tokenizer(folder), model.config.max_position_embeddings
    prompt = len(tokenizer.encode(AutoAgent.prompt(question, tools)))
    if prompt >= room:
        raise InputError(f"question: with its tools {prompt} tokens, the checkpoint in {folder} has room for {room}")
    slots = min(room, prompt + 2 * TURNS * TURN_TOKENS)
    other = Sampler(model, tokenizer, 1, slots)
    agent = AutoAgent(Sampler(model, tokenizer, 1, slots), TURNS, TURN_TOKENS, slots, temperature=0.0)
    return ToolMaker(other, 2 * TURN_TOKENS), agent, ToolActor(other, TURN_TOKENS)


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
    agent.temperature, agent.sampler.top_p, agent.sampler.top_k = config.temperature, config.top_p, config.top_k
    if not own:
        box = maker.make([question])[0]
        own = box.tools
        say(f"ToolMaker: {box.kind}" + ("" if box.tries else "; what it wrote was rejected: the general tool"))
        print("\n".join(f"  {tool.definition}" for tool in own))
    say("AutoAgent and ToolActor:")
    trace = Trace(question, own, (config.seed, question))
    with sealed:
        agent.meet([trace])
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


def evaluate(config: EvalConfig) -> None:
    """Question files, or a run's held-out sets, a row each."""
    rows = evaluate_files(config)
    print(f"{'set':<24}{'rule':<11}{'n':>6}{'EM':>7}{'95 %':>15}{'F1':>7}{'95 %':>15}{'grammar':>9}{'valid':>7}{'support':>9}"
          f"{'calls':>7}{'length':>8}{'seconds':>9}{'bad':>5}")
    for r in rows:
        valid = "-" if r["valid_calls"] is None else f"{r['valid_calls']:.3f}"
        print(f"{r['set']:<24.23}{r['rule']:<11}{r['n']:>6}" + "".join(
            f"{r[m]:>7.3f}{r[m + '_low']:>8.3f}-{r[m + '_high']:.3f} " for m in ("em", "f1")) +
            f"{r['grammar']:>8.3f}{valid:>7}{r['support']:>9.3f}{r['calls']:>7.2f}{r['length']:>8.1f}{r['seconds']:>9.1f}{r['bad']:>5}")
    print(f"agent {rows[0]['model']}; calls answered by {rows[0]['backend']}; samples {rows[0]['samples']} at temperature "
          f"{rows[0]['temperature']}. Rules: the benchmarks' own; common and bamboogle have none, F1 there is SQuAD 2.0's.")


def traces(config: TracesConfig) -> None:
    """Stage 0, and the report of what was kept."""
    why = teach(config)
    kept, total = why.pop("", 0), why.total()
    print(f"kept {kept} of {kept + total} traces" + "".join(f"\n  {n:>6}  {reason}" for reason, n in why.most_common()))
    print(f"learn from them with: python sft.py --model {config.model} --traces {config.out} --out RUN")


COMMANDS = (("ask", "answer one question", AskConfig, ask), ("eval", "evaluate on question files", EvalConfig, evaluate),
            ("traces", "stage 0: a teacher's traces", TracesConfig, traces), ("show", "print what a run left", ShowConfig, show))


def main() -> None:
    """Dispatch on the command."""
    parser = sft.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sft.add_options(parser, RunConfig)
    commands = parser.add_subparsers(dest="command", title="commands", parser_class=sft.Parser)
    for name, meaning, config, _ in COMMANDS:
        command = commands.add_parser(name, help=meaning, description=meaning)
        sft.add_options(command, config)
        if name == "ask":
            command.add_argument("question", help='for example "Who is the mayor of the birthplace of Borox?"')
    options = vars(parser.parse_args())
    command = options.pop("command")
    if command and sys.argv[1] != command:
        parser.error(f"{sys.argv[1]}: flags stand after {command}")
    config, act = {name: (config, act) for name, _, config, act in COMMANDS}.get(command, (RunConfig, run))
    config = config(**{f.name: options[f.name] for f in fields(config)})
    if command == "ask":
        ask(options["question"], config)
    else:
        act(config)


if __name__ == "__main__":
    sft.run_main(main)
