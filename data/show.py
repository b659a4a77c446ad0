"""The traces of stage 2 in the terminal: python mtr.py show --step N, show --trace N."""
import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from data import InputError, printable, read_file
from data.options import option
from data.tables import cell
from data.tokenizer import Tokenizer


@dataclass
class ShowConfig:
    """The options of mtr.py show."""
    out: str = option("run", "run folder")
    step: int | None = option(None, "print the traces of this step of GRPO, best first",
                              unset="the tables of the run")
    trace: int | None = option(None, "print this line of OUT/grpo/traces.jsonl, token by token",
                               unset="the tables of the run")


NEEDED = {"step", "question", "status", "turns", "key", "ids", "mask", "advantage", "golds",
          "rewards"}  # of what a line holds
OWN = ("\033[32m", "\033[0m")  # green
GIVEN = ("\033[2m", "\033[0m")  # dim
PROMPT_LINES = 6  # shown of a prompt


def show_traces(config: ShowConfig) -> None:
    """Print the traces of config.step, then the trace config.trace."""
    out = Path(config.out)
    path = out / "grpo" / "traces.jsonl"
    lines = read_file(path).splitlines()
    if config.step is not None:
        show_step(path, lines, config.step)
    if config.trace is not None:
        number = config.trace
        if not 0 < number <= len(lines):
            raise InputError(f"trace: {path} has lines 1 to {len(lines)}, not {number}")
        record = read_record(lines[number - 1])
        if not record:
            raise InputError(f"{path}: line {number} is not a whole trace")
        color = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
        show_trace(number, record, Tokenizer(out / "sft" / "model").decode, color)


def read_record(line: bytes) -> dict | None:
    """A line of traces.jsonl; None for half a line, or one of another version."""
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) and record.keys() >= NEEDED else None


def show_step(path: Path, lines: list[bytes], step: int) -> None:
    """Print the groups of a step, each sorted by reward, then its held-out traces."""
    records = {number: read_record(line) for number, line in enumerate(lines, 1)}
    whole = {number: record for number, record in records.items() if record}
    steps = [record["step"] for record in whole.values()]
    if step not in steps:
        found = f"has steps {min(steps)} to {max(steps)}" if steps else "holds no trace"
        raise InputError(f"step: {path} {found}, not {step}")
    numbers = [number for number, record in whole.items() if record["step"] == step]
    for title, held_out in (("training", False), ("held out", True)):
        part = [number for number in numbers if is_held_out(whole[number]) == held_out]
        if part:
            print(f"\nstep {step}, {title}: {len(part)} traces")
        for _, group in groupby(part, key=lambda number: whole[number]["key"][2]):
            ranked = sorted(group, key=lambda number: -whole[number]["rewards"]["reward"])
            print("\n" + "\n".join(question_lines(whole[ranked[0]])))
            for number in ranked:
                print("\n".join(score_lines(number, whole[number])))
    print("\nshow --trace N prints one of them whole. N is the number before its reward.")


def is_held_out(record: dict) -> bool:
    """Whether the question of a trace is held out. Its key is then (seed, "eval", ...)."""
    return record["key"][1] == "eval"


def question_lines(record: dict) -> list[str]:
    """The question of a trace and its right answers."""
    return [printable(record["question"]), "right: " + printable(" or ".join(record["golds"]))]


def score_lines(number: int, record: dict) -> list[str]:
    """A short block: reward, advantage, calls, answer; then the parts of the reward."""
    parts = dict(record["rewards"])
    reward = parts.pop("reward")
    turns = record["turns"]
    calls = sum(len(turn["calls"]) for turn in turns)
    answer = f"no answer, {record['status']}"
    if record["status"] == "answered":
        answer = f"answer: {turns[-1]['answer']}"
    advantage = "-" if is_held_out(record) else f"{record['advantage']:+.3f}"
    first = f"reward {cell(reward)}  advantage {advantage}  calls {calls}  {answer}"
    texts = [f"{name} {cell(value)}" for name, value in parts.items()]
    lines = [first, *["  ".join(texts[i:i + 4]) for i in range(0, len(texts), 4)]]
    heads = [f"{number:>6}", *[" " * 6] * (len(lines) - 1)]
    return [f"{head}  {printable(line)}" for head, line in zip(heads, lines, strict=True)]


def show_trace(number: int, record: dict, decode: Callable[[list[int]], str], color: bool) -> None:
    """Print a trace: its question, its tokens with their mask, its scores."""
    place = "held out" if is_held_out(record) else f"training, sample {record['key'][3]}"
    own = sum(record["mask"])
    print(f"\nstep {record['step']}, {printable(place)}")
    print("\n".join(question_lines(record)))
    how = "in green, the given ones dim" if color else "between [[ and ]]"
    print(f"{len(record['ids'])} tokens; the {own} that the agent generated (mask 1) are {how}\n")
    print(masked_text(record["ids"], record["mask"], decode, color))
    print("\n" + "\n".join(score_lines(number, record)))


def masked_text(ids: list[int], mask: list[int], decode: Callable[[list[int]], str],
                color: bool) -> str:
    """The text of a trace with each run of own tokens marked, and the last lines of its prompt."""
    given, own = (GIVEN, OWN) if color else (("", ""), ("[[", "]]"))
    n = (mask + [1]).index(1)  # tokens of the prompt
    prompt = decode(ids[:n]).split("\n")
    hidden = len(prompt) - PROMPT_LINES
    text = f"... {hidden} lines of the prompt are left out\n" if hidden > 0 else ""
    text += mark("\n".join(prompt[-PROMPT_LINES:]), given)
    for generated, run in groupby(zip(mask[n:], ids[n:], strict=True), key=lambda pair: pair[0]):
        text += mark(decode([i for _, i in run]), own if generated else given)
    return text


def mark(text: str, marks: tuple[str, str]) -> str:
    """The text between two marks. Its newlines stay; other control characters are escaped."""
    return marks[0] + "\n".join(printable(line) for line in text.split("\n")) + marks[1]
