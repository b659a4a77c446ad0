"""Files of conversations: the kinds of lines that stage 1 reads, and the sample in data/sample."""
import json
from collections.abc import Iterator
from pathlib import Path

from data import InputError, printable, read_file
from data.messages import read_messages
from data.prompts import SHORT
from data.rows import json_rows
from data.world import HELD_OUT, make_questions, make_world, teach


def read_conversations(path: str) -> Iterator[tuple[str, list[dict]]]:
    """Yield (place, conversations about one question) from a JSON or JSONL file. InputError names
    the place. The list is empty if mtr.py traces did not keep the trace.
    """
    content = read_file(path)
    try:
        rows = json_rows(content.decode("utf-8-sig").rstrip())
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not readable as UTF-8 JSON or JSONL ({error})") from None
    for place, row in rows:
        try:
            yield place, _conversations(row)
        except InputError as error:
            raise InputError(f"{path}: {place}: {printable(str(error))}") from None


def _conversations(row: object) -> list[dict]:
    """The conversations of a record, of whichever kind it is."""
    if isinstance(row, str):
        raise InputError(f"not JSON: {row!r:.60}")
    if isinstance(row, dict):
        if isinstance(row.get("messages"), list):
            return [read_messages(row)]
        if isinstance(row.get("conversations"), list):
            return row["conversations"]
        if "role" in row:
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
