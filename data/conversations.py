"""Files of conversations: the kinds of lines that stage 1 reads, and the sample in data/sample."""
import json
from codecs import BOM_UTF8
from collections.abc import Iterator
from pathlib import Path

from data import InputError, printable, read_file, read_json
from data.messages import read_messages
from data.prompts import SHORT
from data.world import HELD_OUT, make_questions, make_world, teach


def read_conversations(path: str) -> Iterator[tuple[str, dict]]:
    """Yield (place, conversation) from a JSONL file or a JSON list. InputError names the place.

    A line of mtr.py traces holds several conversations, or none if its trace was not kept.
    """
    for place, row in _json_rows(path):
        try:
            for record in _of_row(row):
                yield place, record
        except InputError as error:
            raise InputError(f"{path}: {place}: {printable(str(error))}") from None


def _json_rows(path: str) -> Iterator[tuple[str, object]]:
    content = read_file(path).removeprefix(BOM_UTF8)
    if content.lstrip().startswith(b"["):
        for number, row in enumerate(read_json(path, list), 1):
            yield f"element {number}", row
        return
    for number, line in enumerate(content.split(b"\n"), 1):
        if line.strip():
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise InputError(f"{path}: line {number}: not JSON ({error})") from None
            yield f"line {number}", row


def _of_row(row: object) -> list[dict]:
    """The conversations of a line, of whichever kind it is."""
    keys = row if isinstance(row, dict) else {}
    if isinstance(keys.get("messages"), list):
        return [read_messages(row)]
    if isinstance(keys.get("conversations"), list):
        return row["conversations"]
    if "role" in keys:
        return [row]
    raise InputError("expected an object with a list of conversations (a line of mtr.py traces), "
                     "a list of OpenAI messages, or a role (agent, maker or actor); "
                     f"found {row!r:.60}")


def to_messages(record: dict) -> dict:
    """A conversation of role agent, without utility tools, as OpenAI's messages and tools."""
    parts = ("name", "description", "parameters")
    tools = [{part: tool[part] for part in parts} for tool in record["tools"]]
    messages = [{"role": "system", "content": SHORT.agent},
                {"role": "user", "content": record["question"]}]
    for turn in record["turns"]:
        content = SHORT.thought.format(turn["thought"])
        if "answer" in turn:
            content += "\n" + SHORT.answer.format(turn["answer"])
            messages.append({"role": "assistant", "content": content})
            continue
        calls = []
        results = []
        for call, observation in zip(turn["calls"], turn["observations"], strict=True):
            number = f"call_{len(messages)}_{len(calls)}"
            function = {"name": call["name"], "arguments": json.dumps(call["arguments"])}
            calls.append({"id": number, "type": "function", "function": function})
            results.append({"role": "tool", "tool_call_id": number,
                            "content": json.dumps(observation, ensure_ascii=False)})
        messages += [{"role": "assistant", "content": content, "tool_calls": calls}, *results]
    return {"messages": messages,
            "tools": [{"type": "function", "function": tool} for tool in tools]}


def write_sample(folder: Path, each: int = 60) -> None:
    """Write a few questions and conversations as JSONL. This command writes data/sample:
    python -c "from data.conversations import *; write_sample(Path('data/sample'))" """
    records, _ = teach(0, worlds=20)
    samples = {role: part[::max(1, len(part) // each)][:each] for role, part in records.items()}
    chains = [record for record in samples["agent"] if record["kind"] == "composition"]
    samples["messages"] = [to_messages(record) for record in chains[:2]]
    questions = make_questions(make_world(0))
    samples["questions"] = []
    for name in ("train", *HELD_OUT):
        for q in [q for q in questions if q.set == name][:each // 2]:
            row = {"id": q.id, "question": q.text, "golden_answers": q.golds, "set": q.set,
                   "kind": q.kind, "steps": q.steps, "chain": q.chain}
            samples["questions"].append(row)
    folder.mkdir(exist_ok=True)
    for name, rows in samples.items():
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")
