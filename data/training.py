"""The training data: which traces stage 0 keeps, reading them, the questions of each rollout."""
import json
import math
import random
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from itertools import chain
from pathlib import Path

from data import InputError, printable, read_json
from data.conversations import read_conversations
from data.read import Item, read_questions
from data.score import exact_match, holds, normalize
from data.utilities import UTILITIES
from data.world import HELD_OUT, World, make_questions, mixed

ROLES = ("agent", "maker", "actor")
# The options of stage 0 that every line of a file of traces shares.
SETTINGS = ("seed", "temperature", "max_turns", "turn_tokens", "trace_tokens", "backend",
            "grounded")
# The contents that every line depends on, in words.
CONTENTS = {"sources": "another checkpoint, question file or tools file",
            "prompts": "other prompts (data/prompts.py)"}


def why_not(trace, item: Item) -> str:
    """Why stage 0 does not keep a trace (an agents.Trace); "" if it does."""
    if not trace.turns:
        return "the question is too long"
    if trace.status != "answered":
        return f"{trace.status}: {trace.turns[-1].error or 'too many turns or tokens'}"
    for call in trace.calls:
        if call.error:
            return f"refused call: {call.error}"[:40]
    if not normalize(trace.answer) or not exact_match(trace.answer, item.golds):
        return "wrong answer"
    for gold in item.golds:
        if holds(trace.turns[0].thought, gold) and not holds(item.text, gold):
            return "answer in the first thought"
    # Each turn is taught in the strict form, in which a thought comes first.
    if not all(turn.thought for turn in trace.turns):
        return "a turn without a thought"
    return ""


def to_records(trace, box, no_result: dict) -> list[dict]:
    """A kept trace and its agents.Toolbox -> the conversations of all three roles in it, as sft.py
    reads them. no_result: the observation of a failed simulation.
    """
    def parts(tool) -> dict:
        names = ["name", "description", "parameters", "returns"]
        if tool.source:
            names.append("source")
        return {name: getattr(tool, name) for name in names}

    # By their code, because a user's tool may have the name of a utility.
    utilities = [spec["run"] for spec in UTILITIES]
    tools = {tool.name: tool for tool in trace.tools if tool.run not in utilities}
    turns = []
    for turn in trace.turns:
        if turn.answer is not None:
            turns.append({"thought": turn.thought, "answer": turn.answer})
        else:
            calls = [{"name": call.name, "arguments": call.arguments} for call in turn.calls]
            turns.append({"thought": turn.thought, "calls": calls,
                          "observations": [call.observation for call in turn.calls]})
    records = [{"role": "agent", "question": trace.question, "kind": box.kind,
                "tools": [parts(tool) for tool in tools.values()], "turns": turns}]
    if box.tries:  # the ToolMaker did not write the fallback
        records.append({"role": "maker", "question": trace.question, "thought": box.thought,
                        "kind": box.kind, "tools": [parts(tool) for tool in box.made],
                        "rejected": box.rejected})
    for call in trace.calls:
        tool = tools.get(call.name)
        if tool and not tool.run and call.observation != no_result:
            exchange = [call.arguments, call.observation]
            records.append({"role": "actor", "tool": parts(tool), "exchanges": [exchange]})
    return records


def held_out(text: str) -> bool:
    """Whether a question is held out: one in twenty, by its words alone. So a repeated question
    stays on one side, and both stages hold out the same ones."""
    return _digest(text) % 20 == 0


def _digest(text: str) -> int:
    return zlib.crc32(normalize(text).encode("utf-8", "replace"))


def choose_held_out(texts: Iterable[str]) -> set[str]:
    """The normalized texts of the questions that are held out. Of 20 or more different questions
    it is at least one, of fewer perhaps none, and never all."""
    different = {normalize(text) for text in texts} - {""}
    chosen = {text for text in different if held_out(text)}
    if not chosen and len(different) >= 20:
        chosen = {min(different, key=_digest)}
    return chosen if chosen != different else set()


def read_traces(path: str, check: Callable[[dict], tuple]) -> tuple[dict, dict]:
    """The conversations of a file -> {role: records} for training, and for the held-out loss.
    check(record) gives prompt and turns, and raises if a part is missing.

    Equal conversations of different traces count once.
    """
    # By role: each different conversation, with the questions that it is about.
    records: dict[str, dict[str, tuple[dict, set]]] = {role: {} for role in ROLES}
    for place, conversations in read_conversations(path):
        question = ""  # those of the ToolActor in a line are about the question of the others
        for record in conversations:
            try:
                of_role = records[record["role"]]
                _, turns = check(record)
                if not turns:
                    raise ValueError("a conversation without turns")
                question = record.get("question", question)
                key = json.dumps(record, sort_keys=True)
                of_role.setdefault(key, (record, set()))[1].add(normalize(question))
            except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
                reason = printable(f"{type(error).__name__}: {error}")
                raise InputError(f"{path}: {place}: not a whole conversation of role agent, maker "
                                 f"or actor ({reason})") from None
    missing = [role for role in ROLES if not records[role]]
    if len(missing) == len(ROLES):
        raise InputError(f"{path}: no conversation in it, so there is nothing to learn")
    if missing:
        print(f"{path}: no conversations of the roles {', '.join(missing)}; they are not trained")
    asked = [about for _, about in chain(*[part.values() for part in records.values()])]
    chosen = choose_held_out(chain(*asked))
    train: dict[str, list[dict]] = {role: [] for role in ROLES}
    valid: dict[str, list[dict]] = {"agent": [], "maker": []}
    for role in ROLES:
        for record, about in records[role].values():
            if not about <= chosen:
                train[role].append(record)
            elif role in valid:  # the ToolActor must not learn the answers of held-out questions
                valid[role].append(record)
    numbers = ", ".join(f"{len(train[role])} of {role}" for role in ROLES)
    print(f"conversations: {numbers}; {len(valid['agent'])} of agent are held out")
    return train, valid


def texts_of(records: dict[str, list[dict]], split: Callable[[dict], tuple]) -> list[str]:
    """The texts of recorded conversations, to train a tokenizer on. split: sft.split_conversation.
    """
    texts = []
    for role in ROLES:
        for record in records[role][:1500]:  # enough for a tokenizer
            prompt, turns = split(record)
            texts.append("".join(prompt))
            for generated, received in turns:
                texts += ["".join(generated), "".join(received)]
    return texts


def schedule(step: int, steps: int, warmup: int, floor: float = 0.05) -> float:
    """Share of the peak learning rate: linear warm-up, then a cosine down to the floor."""
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress))


def micro_batches(traces: list, tokens: int) -> list[list]:
    """Batches of traces (agents.Trace) of similar length: one trace, or at most `tokens` tokens if
    padded to the longest.
    """
    made: list[list] = []
    for trace in sorted(traces, key=lambda trace: len(trace.ids)):
        if not made or len(trace.ids) * (len(made[-1]) + 1) > tokens:
            made.append([])
        made[-1].append(trace)
    return made


def spans_of_ones(mask: list[int]) -> Iterator[tuple[int, int]]:
    """(begin, end) of each run of ones."""
    begin = None
    for i, value in enumerate([*mask, 0]):
        if value and begin is None:
            begin = i
        elif not value and begin is not None:
            yield begin, i
            begin = None


def read_done(path: Path, settings: dict) -> dict[tuple[str, int], str]:
    """{(question, sample): why it was not kept}, of a file from mtr.py traces with these settings.

    The first line of the file holds the settings. A last line that a kill cut off is removed.
    """
    if not path.exists() or not path.stat().st_size:
        path.write_text(json.dumps({"settings": settings, "conversations": []}) + "\n")
    text = path.read_bytes()
    whole = text[:text.rfind(b"\n") + 1]
    try:
        first, *lines = [json.loads(line) for line in whole.split(b"\n")[:-1]]
        done = {(line["id"], line["sample"]): line["why"] for line in lines}
        found = dict(first["settings"])
    except (ValueError, KeyError, TypeError, RecursionError):
        raise InputError(f"{path}: was not written by this command; choose another --out") from None
    for name, value in settings.items():
        if found.get(name) != value:
            other = CONTENTS.get(name, f"{name} {found.get(name)!r}, not {value!r}")
            raise InputError(f"{path}: was begun with {other}; choose another --out")
    if whole != text:
        path.write_bytes(whole)
    return done


def world_seed(out: str) -> int:
    """The seed of the fictional world that a run was trained on."""
    path = Path(out) / "sft" / "config.json"
    seed = read_json(path).get("seed")
    if type(seed) is not int:
        raise InputError(f"{path}: seed should be a whole number, found {seed!r}")
    return seed


def is_checkpoint(stage1: Path) -> bool:
    """Whether a stage 1 (its sft folder) started from a checkpoint, not from random weights."""
    path = stage1 / "config.json"
    return path.exists() and bool(read_json(path).get("model"))


def read_all(files: tuple, skip_bad: bool) -> list[Item]:
    """The questions of several files, with ids that are unique over all of them."""
    items = []
    for number, file in enumerate(files):
        found = read_questions(file, skip_bad).items
        items += [replace(item, id=f"{number} {item.id}") for item in found]
    return items


def choose_questions(config, world: World | None) -> tuple[list[list], list]:
    """The questions of each step of stage 2, and the held-out questions (config: a GRPOConfig).
    Question files need no world.
    """
    rng = random.Random(f"grpo {config.seed}")
    if config.data:
        items = read_all(config.data, config.skip_bad)
        different: dict[str, Item] = {}
        for item in items:
            different.setdefault(normalize(item.text), item)
        if len(different) < 20:
            raise InputError(f"data: {len(different)} different questions; at least 20 are needed, "
                             "because one in twenty is held out")
        chosen = choose_held_out(different)
        pool = [item for item in items if normalize(item.text) not in chosen]
        asked = [item for text, item in different.items() if text in chosen][:100]
        print(f"{len(items)} questions; {len(asked)} are held out, and {len(pool)} are trained on")
        rng.shuffle(pool)
    else:
        questions = make_questions(world)
        train = [q for q in questions if q.set == "train"]
        pool = mixed(train, config.steps * config.questions, rng)  # all forms in equal shares
        asked = [q for q in questions if q.set in HELD_OUT][::4]  # a quarter, to save time
    plan = []
    for step in range(config.steps):
        first = step * config.questions
        plan.append([pool[(first + i) % len(pool)] for i in range(config.questions)])
    return plan, asked
