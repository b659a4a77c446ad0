"""Evaluation: the rows of a run's table, question files, and stage 0. You may skip this file."""
import json
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from itertools import chain, product
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import data.tools
import data.training
from agents import Tool, ToolActor, Toolbox, Trace, run_episodes
from data import InputError, fingerprint, read_json
from data.folders import lock, trained_by
from data.options import GRAPH, Config, option
from data.own import story
from data.read import Item, question_files, read_questions
from data.results import majority, maker_shares, result_row
from data.training import SETTINGS, read_all, read_done, to_records, why_not, world_seed
from data.world import HELD_OUT, RELATIONS, Question, World, make_questions, make_world, tool_for
from data.write import write_predictions, write_questions
from grpo import GRPOConfig, Simulator, measure, score_heldout
from model import ModelConfig, Transformer, load
from run import pick_device, set_up, weights_type

# ------------------------------------------------------------------------ the rows of a run's table


def all_rows(out: Path, config: GRPOConfig, few: bool = False, controls: bool = False
             ) -> tuple[dict, list[Question], dict[str, dict[str, list[Trace]]]]:
    """results.json of a run, its held-out questions (all or a few), and by row their traces, greedy
    and sampled. controls: also the rows that rule out other explanations of the result.
    """
    world = make_world(config.seed)
    questions = make_questions(world)
    held_out = [q for q in questions if q.set in HELD_OUT]
    if few:
        held_out = held_out[::24]
    simulator = Simulator(out / "sft" / "model", config)
    simulator.make_tools(held_out)
    simulated = simulator.actor.answer
    real = data.tools.real(world.real)
    plan = [("untrained", "untrained", simulated), ("sft", "sft", simulated),
            ("grpo", "grpo", simulated), ("grpo_real", "grpo", real),
            ("grpo_blanked", "grpo", data.tools.blanked)]
    if controls:
        plan += [("closed_book", "sft", simulated), ("sft_continued", "sft_continued", simulated),
                 ("sft_blanked", "sft", data.tools.blanked),
                 ("sft_shuffled", "sft", data.tools.shuffled(simulated)),
                 ("grpo_shuffled", "grpo", data.tools.shuffled(simulated))]
    device = pick_device()
    untrained = Transformer(simulator.model.config).init_weights(config.seed)
    models = {"untrained": untrained.to(device)}
    rows = []
    traces = {}
    for name, stage, backend in tqdm(plan, desc="rows", unit="row"):
        if stage not in models:
            models[stage], _ = load(out / stage / "model", device)
        with nullcontext() if backend is real else world.sealed():
            agent = simulator.agent(models[stage], len(held_out), 0.0)
            row, traces[name] = score_heldout(simulator, agent, held_out, backend,
                                              closed_book=name == "closed_book")
        rows.append({"row": name, **row})
    if controls:
        rows.insert(5, majority(questions, held_out))  # before the other controls
    results = {"seed": config.seed, "trained_by": trained_by(out),
               "actor_recall": actor_recall(simulator, world),
               "actor_fidelity": actor_fidelity(traces["grpo"]["sampled"], world),
               "maker": maker_shares(simulator.boxes, held_out), "rows": rows}
    return results, held_out, traces


def actor_recall(simulator: Simulator, world: World) -> float:
    """Share of the world's facts that the ToolActor gives, asked with the teacher's tools."""
    tools = {relation: Tool(**tool_for(relation)) for relation in RELATIONS}
    asked = [(tools[r], {RELATIONS[r][0]: subject}) for r, subject in world.facts]
    answers = ToolActor(simulator.actor.sampler).answer(asked)
    facts = [{relation: value} for (relation, _), value in world.facts.items()]
    return float(np.mean([a == fact for a, fact in zip(answers, facts, strict=True)]))


def actor_fidelity(traces: list[Trace], world: World) -> float:
    """Share of the ToolActor's observations that are true."""
    true = []
    for call in chain.from_iterable(trace.calls for trace in traces):
        if call.error is None and call.name in RELATIONS:
            true.append(call.observation == world.real(call.name, call.arguments))
    return sum(true) / max(1, len(true))


# ---------------------------------------------------------------------------- options and models

LIMITS = {"max_turns": 8, "turn_tokens": 1024, "trace_tokens": 4096}  # with --model


@dataclass
class AgentConfig(Config):
    """The options that ask, eval and traces share."""
    out: str = option("run", "run folder: its trained agent, its frozen ToolMaker and ToolActor")
    model: str = option("", "checkpoint folder that serves as all three agents instead")
    temperature: float = option(0.0, "temperature of AutoAgent; 0: greedy", least=0)
    max_turns: int | None = option(None, "turns per trace", unset="the run's, or 8")
    turn_tokens: int | None = option(None, "new tokens per turn", unset="the run's, or 1024")
    trace_tokens: int | None = option(None, "tokens per trace, prompt and observations included",
                                      unset="the run's, or 4096")
    samples: int = option(1, "traces per question")
    graph: bool = option(False, GRAPH)

    def __post_init__(self):
        super().__post_init__()
        if self.temperature == 0 and self.samples > 1:
            raise InputError("samples: greedy answers are all equal; set --temperature above 0")


@dataclass
class EvalConfig(AgentConfig):
    """The options of mtr.py eval."""
    data: tuple = option((), "question files", unset="the run's held-out questions")
    name: str = option("eval", "the results go to OUT/NAME")
    skip_bad: bool = option(False, "skip broken records and count them")
    backend: str = option("simulated", "who answers the calls: the ToolActor, or the run's world "
                          "or your own tools only", choices=("simulated", "real"))
    real_tools: str = option("", "your own tools: JSON, or Python, which is executed (see "
                             "docs/real_tools.py)")
    grounded: bool = option(False, "show the ToolActor the paragraphs of the question")
    tools: bool = option(True, "--no-tools is the baseline: a direct answer")
    rows: int = option(64, "traces at once; lower it if memory runs out")

    def __post_init__(self):
        super().__post_init__()
        for name in ("model", "grounded"):
            if getattr(self, name) and not self.data:
                raise InputError(f"{name}: it needs question files, --data FILE")
        if self.grounded and (self.backend == "real" or not self.tools):
            raise InputError("grounded: only the ToolActor reads the paragraphs; leave out "
                             "--no-tools and --backend real")


@dataclass
class TracesConfig(EvalConfig):
    """The options of mtr.py traces."""
    out: str = option("traces.jsonl", "file for the traces; questions that it holds are skipped")
    model: str = option("", "the teacher: a checkpoint folder that serves as all three agents")
    data: tuple = option((), "question files")
    name: str = option("traces", "title of the progress bar")
    temperature: float = option(1.0, "temperature of AutoAgent; 0: greedy", least=0)
    samples: int = option(4, "traces per question")

    def __post_init__(self):
        if not (self.model and self.data):
            raise InputError("traces: --model TEACHER and --data FILE are needed")
        if not self.tools:
            raise InputError("tools: a trace to learn from needs them")
        super().__post_init__()


def load_tools(path: str) -> list[Tool]:
    """Read a user's own tools (see data.tools.read_tools)."""
    return [Tool(**function) for function in data.tools.read_tools(path)]


def open_models(config: AgentConfig, rows: int, long_prompts: bool = False, stage: str = "grpo"
                ) -> tuple[Simulator, Transformer, World | None]:
    """Simulator, policy (the model of a stage) and world of a run. With --model, one checkpoint is
    simulator and policy, and there is no world.
    """
    if config.model:
        if stage != "grpo":  # the default
            raise InputError("stage: a checkpoint of --model has no stages")
        set_up(config, checkpoint=True)
        dtype = weights_type()
        folder = Path(config.model)
        most = ModelConfig.read(folder).max_position_embeddings
        limits = LIMITS | {"trace_tokens": min(LIMITS["trace_tokens"], most)}
        limits = {name: getattr(config, name) or limit for name, limit in limits.items()}
        simulator = Simulator(folder, replace(config, **limits), True, rows, dtype)
        return simulator, simulator.model, None
    out = Path(config.out)
    for part in ("sft", "grpo"):
        if not (out / part / "model" / "config.json").exists():
            raise InputError(f"--out: no finished run in {out} ({part}/model is missing); "
                             "python mtr.py makes one")
    trained = read_json(out / "grpo" / "config.json")
    limits = {name: getattr(config, name) or trained.get(name, LIMITS[name]) for name in LIMITS}
    checkpoint = data.training.is_checkpoint(out / "sft")
    set_up(config, checkpoint)
    dtype = weights_type() if checkpoint else torch.float32
    long_prompts = long_prompts or bool(trained.get("data"))
    simulator = Simulator(out / "sft" / "model", replace(config, **limits), long_prompts, rows,
                          dtype)
    policy, _ = load(out / stage / "model", pick_device(), dtype)
    return simulator, policy, make_world(world_seed(config.out))


# -------------------------------------------------------------------------------- question files


class Players:
    """Everything that answers question files: models, world, the user's tools, backend."""

    def __init__(self, config: EvalConfig):
        self.config = config
        self.own = load_tools(config.real_tools) if config.real_tools else []
        real = config.backend == "real"
        if real and config.model and not self.own:
            raise InputError("backend: --model has no world to answer; give --real-tools FILE")
        for tool in self.own:
            if real and not tool.run:
                raise InputError(f"backend: {tool.name} of {config.real_tools} has no code; give a "
                                 "Python file, or leave out --backend real")
        self.simulator, self.policy, self.world = open_models(config, config.rows, config.grounded)
        self.backend = self.simulator.actor.answer
        if real and self.world:
            self.backend = data.tools.real(self.world.real)
        self.only_own = real and bool(self.own)  # no tools are made, none is simulated

    def answer(self, asked: list[tuple[Item, int]]) -> Iterator[tuple[Item, int, Toolbox, Trace]]:
        """Answer each (question, sample), `rows` traces at once."""
        config = self.config
        boxes = self.simulator.boxes
        boxes.clear()  # ids may repeat in another file
        rows = min(config.rows, len(asked))
        agent = self.simulator.agent(self.policy, rows, config.temperature) if asked else None
        seal = self.world and config.backend == "simulated"
        for i in tqdm(range(0, len(asked), config.rows), desc=config.name, unit="batch"):
            part = asked[i:i + config.rows]
            with self.world.sealed() if seal else nullcontext():
                if config.tools and not self.only_own:
                    self.simulator.make_tools([item for item, _ in part])
                traces = []
                for item, sample in part:
                    box = boxes.setdefault(item.id, Toolbox("composition", [], 0))
                    key = (config.seed, "play", item.id, sample)
                    traces.append(Trace(item.text, self.tools(item, box), key))
                run_episodes(agent, self.backend, traces, closed_book=not config.tools)
            for (item, sample), trace in zip(part, traces, strict=True):
                yield item, sample, boxes[item.id], trace

    def answered_by(self) -> str:
        """Who answers the calls, for the row of a result."""
        grounded = "grounded" if self.config.grounded else ""
        parts = [self.config.backend, grounded, self.config.real_tools]
        return ", ".join(part for part in parts if part) if self.config.tools else "none"

    def tools(self, item: Item, box: Toolbox) -> list[Tool]:
        """The ToolMaker's tools and the user's. A user's tool replaces one of the same name."""
        if not self.config.tools:
            return []
        made = [] if self.only_own else box.tools
        tools = {tool.name: tool for tool in [*made, *self.own]}
        for name, tool in tools.items():
            if self.config.grounded and not tool.run:
                tools[name] = replace(tool, source=item.paragraphs)
        return list(tools.values())


def need_paragraphs(items: list[Item]) -> None:
    """InputError names a question without paragraphs, which can't be grounded."""
    for item in items:
        if not item.paragraphs:
            raise InputError(f"grounded: question {item.id} of {item.set} has no paragraphs")


def evaluate_files(config: EvalConfig) -> list[dict]:
    """A row of scores for each question file, or for each held-out set of a run.

    OUT/NAME gets the row of each set (SET.json), its traces (SET.jsonl) and, for official formats,
    the file that the official script reads (SET.predictions).
    """
    folder = Path(config.out) / config.name
    taken = ("", "..", "lock", "sft", "grpo", "sft_continued", "heldout")
    if "/" in config.name or config.name in taken:
        raise InputError(f"name: expected a name that no part of a run has, found {config.name!r}")
    if folder.exists():
        raise InputError(f"{folder}: holds a result; remove it or choose another --name")
    read = [read_questions(file, config.skip_bad) for file in config.data]
    names = [questions.items[0].set for questions in read]
    if len(set(names)) < len(names):
        raise InputError(f"data: two files are named {max(names, key=names.count)}; rename one")
    if config.grounded:
        need_paragraphs(chain(*[questions.items for questions in read]))
    players = Players(config)
    if not config.data:
        held_out = [q for q in make_questions(players.world) if q.set in HELD_OUT]
        files = write_questions(held_out, Path(config.out) / "heldout")
        read = [read_questions(file) for file in files]
    folder.mkdir(parents=True)
    rows = []
    for questions in read:
        first = questions.items[0]
        start = time.perf_counter()
        lines = []
        asked = list(product(questions.items, range(config.samples)))
        with open(folder / f"{first.set}.jsonl", "w", encoding="utf-8") as file:
            for item, sample, _, trace in players.answer(asked):
                answer = trace.answer if trace.status == "answered" else ""
                lines.append({"id": item.id, "question": item.text, "golds": item.golds,
                              "sample": sample, "prediction": answer,
                              **measure(trace, item.golds, item.rule), "status": trace.status})
                file.write(json.dumps({**lines[-1], "story": story(trace)}) + "\n")
        row = {"set": first.set, "rule": first.rule, **result_row(lines, config.samples),
               "seconds": time.perf_counter() - start, "bad": len(questions.bad),
               "skipped": questions.bad,
               "model": config.model or config.out, "temperature": config.temperature,
               "backend": players.answered_by(), "seed": config.seed}
        rows.append(row)
        (folder / f"{first.set}.json").write_text(json.dumps(row, indent=2) + "\n")
        if first.rule not in ("common", "bamboogle"):
            predictions = [line["prediction"] for line in lines[::config.samples]]
            write_predictions(questions, predictions, folder / f"{first.set}.predictions")
    return rows


# --------------------------------------------------------------------------------------- stage 0


def make_traces(config: TracesConfig) -> Counter:
    """Stage 0: a teacher's traces over question files, appended to config.out.

    Returns how many were kept (key "") and why the others were not. Traces that the file already
    holds are not made again.
    """
    items = read_all(config.data, config.skip_bad)
    if config.grounded:
        need_paragraphs(items)
    path = Path(config.out)
    players = Players(config)
    settings = asdict(players.simulator.config)
    settings = {name: settings[name] for name in SETTINGS}
    own_tools = data.tools.tool_files(Path(config.real_tools)) if config.real_tools else []
    settings["sources"] = fingerprint(config.model, *question_files(config.data), *own_tools)
    settings["prompts"] = asdict(players.simulator.tokenizer.prompts)
    lock(path)
    done = read_done(path, settings)
    why = Counter(done.values())
    pairs = product(items, range(config.samples))
    asked = [(item, sample) for item, sample in pairs if (item.id, sample) not in done]
    with open(path, "a", encoding="utf-8") as file:
        for item, sample, box, trace in players.answer(asked):
            reason = why_not(trace, item)
            why[reason] += 1
            records = [] if reason else to_records(trace, box, ToolActor.NO_RESULT)
            line = {"id": item.id, "sample": sample, "why": reason, "conversations": records,
                    "story": story(trace)}
            file.write(json.dumps(line) + "\n")
            file.flush()
    return why
