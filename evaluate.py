"""How well agents answer: the rows of a run's table, question files, stage 0, a checkpoint in all three roles."""
import json
import time
import zlib
from collections import Counter
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import agents
from agents import AutoAgent, Tool, ToolActor, Toolbox, ToolMaker, Trace, load_tools, run_episodes
from data import InputError
from data.read import Item, read_questions, write_predictions, write_questions
from data.score import exact_match, f1, interval, normalize
from data.tools import Blanked, Real, Shuffled
from data.world import HELD_OUT, RELATIONS, Question, World, make_questions, make_world, tool_for, tools_for
from grpo import GRPOConfig, Simulator, holds, means, measure, score_heldout
from model import ModelConfig, Sampler, Transformer, load
from run import at_least, checkpoint_dtype, fingerprint, option, pick_device, positive, read_config, set_up
from sft import SFTConfig


def all_rows(out: Path, second: GRPOConfig, most: int | None) -> tuple[dict, list[Question], dict[str, list[Trace]]]:
    """All rows of the table; the held-out questions, and their traces by row."""
    world = make_world(second.seed)
    questions = make_questions(world)
    held_out = [q for q in questions if q.set in HELD_OUT][::50 // most * 4 if most else 1]
    stage = Simulator(out / "sft" / "model", second)
    stage.make_tools(held_out)
    models = {name: load(out / name / "model", stage.device)[0] for name in ("sft", "sft_continued", "grpo")}
    models["untrained"] = Transformer(stage.frozen.config).init_weights(second.seed).to(stage.device)
    rows, traces = [majority(questions, held_out)], {}
    plan = [("closed_book", "sft", stage.actor), ("untrained", "untrained", stage.actor), ("sft", "sft", stage.actor),
            ("sft_continued", "sft_continued", stage.actor), ("sft_blanked", "sft", Blanked()),
            ("sft_shuffled", "sft", Shuffled(stage.actor)), ("grpo", "grpo", stage.actor),
            ("grpo_blanked", "grpo", Blanked()), ("grpo_shuffled", "grpo", Shuffled(stage.actor)),
            ("grpo_real", "grpo", Real(world.real))]
    for name, model, backend in tqdm(plan, desc="rows", unit="row"):
        with nullcontext() if isinstance(backend, Real) else world.sealed():
            agent = stage.agent(models[model], len(held_out), 0.0)
            row, traces[name] = score_heldout(stage, agent, held_out, backend, closed_book=name == "closed_book")
        rows.append({"row": name, **row})
    results = {"seed": second.seed, "actor_recall": actor_recall(stage, world),
               "actor_fidelity": actor_fidelity(traces["grpo"], world), "maker": maker_report(stage, held_out), "rows": rows}
    return results, held_out, traces


def majority(questions: list[Question], held_out: list[Question]) -> dict:
    """The row of a program that always gives the commonest training answer."""
    answer = Counter(q.golds[0] for q in questions if q.set not in HELD_OUT).most_common(1)[0][0]
    right = {q.id: exact_match(answer, q.golds) for q in held_out}
    em = sum(right.values()) / len(right)
    of = {s: [right[q.id] for q in held_out if q.set == s] for s in HELD_OUT}
    return {"row": "majority", "n": len(held_out), "em_greedy": em, "em_sampled": em, "grammar": None,
            "f1": sum(f1(answer, q.golds) for q in held_out) / len(held_out), "valid_calls": None, "support": None,
            "calls": 0.0, "length": None, "by_set": {s: sum(v) / len(v) for s, v in of.items() if v}}


def actor_recall(stage: Simulator, world: World) -> float:
    """Share of the world's facts that the ToolActor tells, asked with the teacher's own tools."""
    tools = {relation: Tool(**tool_for(relation)) for relation in RELATIONS}
    asked = [(tools[relation], {RELATIONS[relation][0]: subject}) for relation, subject in world.facts]
    told = ToolActor(stage.actor.sampler).answer(asked)
    return sum(told[i] == {r: v} for i, ((r, _), v) in enumerate(world.facts.items())) / len(told)


def actor_fidelity(traces: list[Trace], world: World) -> float:
    """Share of the observations which the ToolActor gave that are true."""
    calls = [c for t in traces for c in t.calls if c.error is None and c.name in RELATIONS]
    return sum(c.observation == world.real(c.name, c.arguments) for c in calls) / max(1, len(calls))


def maker_report(stage: Simulator, questions: list[Question]) -> dict[str, float]:
    """Shares of the questions whose tools passed at the first try, are the teacher's, passed at all, passed at a
    later try, are the fallback."""
    boxes = [stage.boxes[q.id] for q in questions]
    exact = [b.kind == q.kind and b.tries and [json.loads(t.definition) for t in b.made] == tools_for(q)
             for b, q in zip(boxes, questions)]
    shares = {"valid": [b.tries == 1 for b in boxes], "exact": exact, "accepted": [b.tries > 0 for b in boxes],
              "regenerated": [b.tries > 1 for b in boxes], "fallback": [b.tries == 0 for b in boxes]}
    return {name: sum(map(bool, values)) / len(boxes) for name, values in shares.items()}


LIMITS = {"max_turns": 8, "turn_tokens": 1024, "trace_tokens": 4096}  # of a checkpoint that no run says more of


@dataclass
class EvalConfig:
    """What mtr.py eval can be told."""
    out: str = option("run", "run folder: its models play, its held-out questions are asked; writes OUT/eval")
    model: str = option("", "checkpoint folder that plays all three roles in their place")
    data: tuple = option((), "question files, their formats told from the content; without them the run's held-out questions")
    skip_bad: bool = option(False, "count broken records and leave them out")
    backend: str = option("simulated", "who answers the calls: the ToolActor; or the world, or with --real-tools these alone",
                          choices=("simulated", "real"))
    real_tools: str = option("", "Python file, which is executed, or JSON: see TOOLS in docs/real_tools.py; offered to each question")
    grounded: bool = option(False, "the ToolActor is told the question's paragraphs")
    tools: bool = option(True, "without them: the baseline, a direct answer")
    samples: int = option(1, "answers a question")
    temperature: float = option(0.0, "of AutoAgent; 0 is greedy")
    seed: int = option(0, "all random numbers of the traces")
    threads: int = option(0, "CPU threads; 0 leaves the choice to torch")
    rows: int = option(64, "traces side by side; turn down if memory runs out")
    max_turns: int | None = option(None, "turns until a trace is cut off", unset="the run's; with --model 8")
    turn_tokens: int | None = option(None, "new tokens a turn", unset="the run's; with --model 1024")
    trace_tokens: int | None = option(None, "tokens a trace, prompt included", unset="the run's; with --model 4096")

    def __post_init__(self):
        positive(self, "samples", "rows", *(name for name in LIMITS if getattr(self, name) is not None))
        at_least(self, threads=0, temperature=0)
        if self.temperature == 0 and self.samples > 1:
            raise InputError("samples: greedy answers are all the same; give a --temperature above 0")
        for name in ("model", "grounded"):
            if getattr(self, name) and not self.data:
                raise InputError(f"{name}: it needs question files, --data FILE")


@dataclass
class TracesConfig(EvalConfig):
    """What mtr.py traces can be told."""
    out: str = option("traces.jsonl", "file for the traces; what stands in it isn't sampled again")
    model: str = option("", "the teacher: a checkpoint folder that plays all three roles")
    data: tuple = option((), "question files, their formats told from the content")
    samples: int = option(4, "traces a question")
    temperature: float = option(1.0, "of AutoAgent")

    def __post_init__(self):
        if not (self.model and self.data):
            raise InputError("traces: --model TEACHER and --data FILE are needed")
        if not self.tools:
            raise InputError("tools: a trace to learn from needs them")
        super().__post_init__()


def open_run(out: str, room: int | None = None, rows: int = 64) -> tuple[Simulator, Transformer, World]:
    """What a finished run left: frozen tools, trained agent, world; of a run on question files, on a GPU, in bfloat16."""
    folder = Path(out)
    for part in ("sft", "grpo"):
        if not (folder / part / "model" / "config.json").exists():
            raise InputError(f"--out: no finished run in {out} ({part}/model is missing); python mtr.py makes one")
    config = read_config(GRPOConfig, folder / "grpo" / "config.json")
    dtype = checkpoint_dtype() if config.data else torch.float32
    stage = Simulator(folder / "sft" / "model", config, rows, room or (config.trace_tokens if config.data else None), dtype)
    world = make_world(read_config(SFTConfig, folder / "sft" / "config.json").seed)
    return stage, load(folder / "grpo" / "model", stage.device, dtype)[0], world


class Players:
    """Who plays when question files are asked: a run's agent before its frozen simulator, or one checkpoint in all roles."""

    def __init__(self, config: EvalConfig):
        set_up(config)
        self.config, self.real, self.world = config, load_tools(config.real_tools) if config.real_tools else [], None
        folders = [Path(config.model)] * 2 if config.model else [Path(config.out) / part / "model" for part in ("grpo", "sft")]
        if config.model:
            most = ModelConfig.read(folders[0]).max_position_embeddings
            limits = LIMITS | {"trace_tokens": min(LIMITS["trace_tokens"], most)}
        else:
            room = config.trace_tokens or LIMITS["trace_tokens"] if config.grounded else None
            self.stage, self.model, self.world = open_run(config.out, room, config.rows)
            limits = {name: getattr(self.stage.config, name) for name in LIMITS}
        c = replace(config, **{name: getattr(config, name) or limit for name, limit in limits.items()})
        if config.model:
            if c.trace_tokens > most:
                raise InputError(f"trace_tokens: {c.trace_tokens}, but the checkpoint in {folders[0]} has room for {most}")
            self.stage = Simulator(folders[0], c, c.rows, c.trace_tokens, checkpoint_dtype())
            self.model = self.stage.frozen
        self.stage.config = c
        digests = {folder: fingerprint(folder)[:8] for folder in set(folders)}
        self.name, simulator = (f"{'/'.join(folder.resolve().parts[-2:])} {digests[folder]}" for folder in folders)
        self.alone = config.backend == "real" and bool(self.real)  # no tool is made, none is played
        if config.backend == "real" and not (self.real or self.world):
            raise InputError("backend: there is no world to answer for --model; give --real-tools FILE")
        played = "real: the world" if config.backend == "real" else f"simulated: {simulator}" + " grounded" * config.grounded
        own = f"real: {config.real_tools} {fingerprint(config.real_tools)[:8]}" if self.real else ""
        self.backend = " + ".join(filter(None, ["" if self.alone else played, own])) if config.tools else "none"
        self.settings = [self.name, self.backend, c.seed, c.temperature, c.max_turns, c.turn_tokens, c.trace_tokens]

    def tools(self, item: Item) -> list[Tool]:
        """The ToolMaker's for this question, with the user's; where both have a name, the user's."""
        own = {tool.name: tool for tool in self.real}
        made = [] if self.alone else [own.pop(tool.name, tool) for tool in self.boxes[item.id].tools]
        if self.config.grounded:
            made = [tool if tool.run else replace(tool, source=item.paragraphs) for tool in made]
        return made + list(own.values()) if self.config.tools else []

    def play(self, items: list[Item], path: Path, by: str, describe) -> list[dict]:
        """Answer what the file hasn't answered yet, a batch at a time, each added to the file when it is done -> the
        file's lines, by question and sample: what describe(trace, item, toolbox) makes of a trace, and its seconds."""
        config, done = self.config, read_lines(path, by)
        todo = [(q, sample) for q in items for sample in range(config.samples) if (q.id, sample) not in done]
        agent = self.stage.agent(self.model, min(config.rows, len(todo)), config.temperature) if todo else None
        backend, self.boxes = Real(self.world.real) if self.world and config.backend == "real" else self.stage.actor, {}
        with open(path, "a", encoding="utf-8", errors="backslashreplace") as file:
            for i in tqdm(range(0, len(todo), config.rows), desc=items[0].set, unit="batch"):
                start, part = time.perf_counter(), todo[i:i + config.rows]
                new = list({q.id: q for q, _ in part if q.id not in self.boxes}.values())
                self.boxes |= zip([q.id for q in new], self.stage.maker.make([q.text for q in new], (config.seed,))
                                  if config.tools and not self.alone else [Toolbox("composition", [], 0)] * len(new))
                traces = [Trace(q.text, self.tools(q), (config.seed, "play", q.id, sample)) for q, sample in part]
                run_episodes(agent, backend, traces, closed_book=not config.tools)
                seconds = (time.perf_counter() - start) / len(part)
                lines = [{"by": by, "id": q.id, "sample": sample, "seconds": seconds, **describe(trace, q, self.boxes[q.id])}
                         for (q, sample), trace in zip(part, traces)]
                file.write("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
                file.flush()
                done |= {(line["id"], line["sample"]): line for line in lines}
        return [done[q.id, sample] for q in items for sample in range(config.samples)]


def read_lines(path: Path, by: str) -> dict[tuple[str, int], dict]:
    """The lines that an earlier run left, by question and sample; one that was cut off in writing is taken out."""
    done: dict[tuple[str, int], dict] = {}
    if not path.exists():
        return done
    text = path.read_bytes()
    whole = text[:text.rfind(b"\n") + 1]
    for number, row in enumerate(whole.splitlines(), 1):
        try:
            line = json.loads(row)
            done[line["id"], line["sample"]] = line
            stranger = line["by"] != by
        except (ValueError, KeyError, TypeError):
            raise InputError(f"{path}: line {number} is none that this command wrote; name another file") from None
        if stranger:
            raise InputError(f"{path}: holds what another model, other questions or other settings gave; name another file")
    if whole != text:
        path.write_bytes(whole)
    return done


def digest(*values: object) -> str:
    """Eight digits for who played, with which settings, on what."""
    return f"{zlib.crc32(repr(values).encode()):08x}"


def evaluate_files(config: EvalConfig) -> list[dict]:
    """A row for each question file, or for each held-out set of a run. Beside OUT/eval/NAME.json, the row: NAME.jsonl
    with every trace, from which a stopped evaluation goes on, and for official formats the prediction file."""
    files, read = config.data, [read_questions(file, config.skip_bad) for file in config.data]
    players, folder, rows = Players(config), Path(config.out) / "eval", []
    if not files:
        files = write_questions([q for q in make_questions(players.world) if q.set in HELD_OUT], Path(config.out) / "heldout")
        read = [read_questions(file) for file in files]
    folder.mkdir(parents=True, exist_ok=True)
    with players.world.sealed() if players.world and config.backend != "real" else nullcontext():
        for file, (items, bad) in zip(files, read):
            name = f"{items[0].set}-{digest(players.settings, fingerprint(file))}"
            lines = players.play(items, folder / f"{name}.jsonl", name, describe_answer)
            rows.append({"set": items[0].set, "rule": items[0].rule, **result_row(lines, config.samples), "bad": len(bad),
                         "model": players.name, "backend": players.backend, "temperature": config.temperature})
            (folder / f"{name}.json").write_text(json.dumps(rows[-1], indent=2) + "\n", encoding="utf-8")
            if items[0].rule not in ("common", "bamboogle"):
                write_predictions(items, [line["prediction"] for line in lines[::config.samples]], folder / f"{name}.predictions")
    return rows


def describe_answer(trace: Trace, item: Item, box: Toolbox) -> dict:
    """What evaluation writes down of a trace."""
    said = trace.answer if trace.status == "answered" else ""
    return {"prediction": said, **measure(trace, item.golds, item.rule), "status": trace.status, "story": trace.story()}


def result_row(lines: list[dict], samples: int) -> dict:
    """n, EM and F1 with their intervals over the questions, the other columns, seconds."""
    row = {"n": len(lines) // samples, "samples": samples}
    for name in ("em", "f1"):
        by_question = np.array([line[name] for line in lines]).reshape(-1, samples).mean(1)
        low, high = interval(by_question)
        row |= {name: float(by_question.mean()), f"{name}_low": low, f"{name}_high": high}
    return row | means(lines) | {"seconds": sum(line["seconds"] for line in lines)}


def why_not(trace: Trace, item: Item) -> str:
    """Why a trace of stage 0 isn't kept; "" if it is."""
    if trace.status != "answered":
        return f"{trace.status}: {trace.turns[-1].error or 'too many turns or tokens'}" if trace.turns else "no room for the question"
    if refused := [call.error for call in trace.calls if call.error]:
        return f"refused call: {refused[0]}"[:40]
    if not normalize(trace.answer) or not exact_match(trace.answer, item.golds):
        return "wrong answer"
    first = trace.turns[0].thought
    return "answer in the first thought" * any(holds(first, g) and not holds(item.text, g) for g in item.golds)


def describe_teaching(trace: Trace, item: Item, box: Toolbox) -> dict:
    """What stage 0 writes down of a trace."""
    why = why_not(trace, item)
    return {"why": why, "conversations": [] if why else to_records(trace, box), "story": trace.story()}


def make_traces(config: TracesConfig) -> Counter:
    """Stage 0: a teacher's traces over question files, to config.out -> how many were kept (""), and why others not."""
    read, players, path = [read_questions(file, config.skip_bad) for file in config.data], Players(config), Path(config.out)
    items = [replace(item, id=f"{n} {item.id}") for n, (items, _) in enumerate(read) for item in items]
    by = digest(players.settings, fingerprint(*config.data))
    return Counter(line["why"] for line in players.play(items, path, by, describe_teaching))


def to_records(trace: Trace, box: agents.Toolbox) -> list[dict]:
    """A trace that a model led -> the conversations of all three roles in it, as a teacher's."""
    def parts(tool: Tool) -> dict:
        return {k: v for k, v in vars(tool).items() if k in ("name", "description", "parameters", "returns", "source") and v}

    tools = {tool.name: tool for tool in trace.tools if tool.name not in agents.UTILITIES}
    turns = [{"thought": t.thought, "answer": t.answer} if t.answer is not None else
             {"thought": t.thought, "calls": [{"name": c.name, "arguments": c.arguments} for c in t.calls],
              "observations": [c.observation for c in t.calls]} for t in trace.turns]
    records = [{"role": "agent", "question": trace.question, "kind": box.kind, "tools": list(map(parts, tools.values())),
                "turns": turns}]
    if box.tries:  # the fallback isn't ToolMaker's own
        records.append({"role": "maker", "question": trace.question, "thought": box.thought, "kind": box.kind,
                        "tools": list(map(parts, box.made)), "rejected": box.rejected})
    return records + [{"role": "actor", "tool": parts(tools[c.name]), "exchanges": [[c.arguments, c.observation]]}
                      for c in trace.calls if c.name in tools and not tools[c.name].run and c.observation != ToolActor.NO_RESULT]


TURNS, TURN_TOKENS = 8, 512  # of a checkpoint's AutoAgent; what it hears may be as long again as what it says


def open_checkpoint(folder: str, question: str, tools: list[Tool]) -> tuple[ToolMaker, AutoAgent, ToolActor]:
    """A Qwen2.5 checkpoint in all three roles, with a KV cache that holds the longest trace."""
    model, tokenizer = load(folder, pick_device(), checkpoint_dtype())
    model.requires_grad_(False)
    room = model.config.max_position_embeddings
    prompt = len(tokenizer.encode(AutoAgent.prompt(question, tools)))
    if prompt >= room:
        raise InputError(f"question: with its tools {prompt} tokens, the checkpoint in {folder} has room for {room}")
    slots = min(room, prompt + 2 * TURNS * TURN_TOKENS)
    other = Sampler(model, tokenizer, 1, slots)
    agent = AutoAgent(Sampler(model, tokenizer, 1, slots), TURNS, TURN_TOKENS, slots, temperature=0.0)
    return ToolMaker(other, 2 * TURN_TOKENS), agent, ToolActor(other, TURN_TOKENS)
