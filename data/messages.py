"""Conversations as OpenAI's API takes them, with `messages` and `tools`, read for sft.py.

Checked: roles, contents, calls, results. Not checked: the tools' schemas. Other keys are ignored.
"""
import json

from data import InputError
from data.schema import Rejected, strict_json

# Qwen2.5's chat template writes this text if the first message is not the system's.
DEFAULT_SYSTEM = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."
ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant",
         "tool": "tool", "function": "tool"}  # developer is a newer name, function an older one


def read_messages(row: dict) -> dict:
    """An object with `messages` -> a record for sft.py. A turn is a reply to learn, and all that is
    heard before it. What follows the last reply is dropped. InputError names the message.
    """
    older = [{"type": "function", "function": part} for _, part in _functions(row, "functions")]
    tools = row.get("tools") or older
    names = [name for name, _ in _functions({"tools": tools}, "tools")]
    system = DEFAULT_SYSTEM
    questions = []
    turns = []
    heard: list[dict] = []
    calls: list = []    # of the message before
    ids: list = []      # of these calls
    results: list = []  # of these calls; None: not there yet
    for number, given in enumerate(row["messages"], 1):
        try:
            role, content = _read_message(given)
            if role == "tool":
                place = _place(given.get("tool_call_id"), ids, results)
                _check_name(given, calls[place])
                results[place] = content
                continue
            if None in results:
                raise InputError(f"expected a tool message with the result of a call, found {role}")
            calls, ids = _read_calls(given, names)
        except InputError as error:
            raise InputError(f"message {number}: {error}") from None
        said = {"content": content, "calls": calls}
        if role == "user":
            questions.append(content)
        if role == "assistant" and given.get("weight") != 0:  # 0: it is context
            turns.append({"heard": heard, **said})
            heard = []
        elif role == "system" and number == 1:
            system = content
        else:
            heard.append({"role": role, **said})
        results = [None] * len(calls)
        if calls:
            heard.append({"role": "tool", "results": results})
    if not turns:
        raise InputError("messages: expected an assistant message to learn, found none")
    question = questions[0] if questions else ""
    return {"role": "agent", "question": question, "system": system, "tools": tools, "turns": turns}


def _read_message(given: dict) -> tuple[str, str]:
    """Role and content of a message. A content is null, a text or a list of text parts."""
    if not isinstance(given, dict) or given.get("role") not in list(ROLES):
        raise InputError(f"expected a role of {', '.join(ROLES)}; found {given!r:.60}")
    role = ROLES[given["role"]]
    content = given.get("content")
    parts = content if isinstance(content, list) else [{"type": "text", "text": content}]
    if content is None:
        parts = []
    for part in parts:
        is_text = isinstance(part, dict) and part.get("type") == "text"
        if not is_text or not isinstance(part.get("text"), str):
            raise InputError(f"expected text as content, found {part!r:.60}")
    text = "".join(part["text"] for part in parts)
    if role == "assistant":
        _check_reply(given, text)
    return role, text


def _check_reply(given: dict, text: str) -> None:
    """Refuse an assistant message of which a part would be lost, or that is empty."""
    for key in ("reasoning_content", "reasoning"):
        if given.get(key):
            raise InputError(f"{key}: Qwen2.5's template leaves it out; write it into content")
    if given.get("weight") not in (0, 1, None):
        raise InputError(f"weight: expected 0 or 1, found {given['weight']!r:.60}")
    if "tool_call>" in text:
        raise InputError("expected calls in tool_calls, found a tag of a call in content")
    if not (text or given.get("tool_calls") or given.get("function_call")):
        raise InputError("expected content or tool_calls, found neither")


def _read_calls(given: dict, names: list[str]) -> tuple[list[dict], list]:
    """The calls of a message, and their ids. names: of the tools that it may call."""
    if given["role"] != "assistant":
        return [], []
    if given.get("function_call"):  # the older form
        given = {"tool_calls": [given["function_call"]]}
    calls = []
    for name, function in _functions(given, "tool_calls"):
        if name not in names:
            raise InputError(f"expected a call to one of the tools {names}, found {name!r:.60}")
        arguments = function.get("arguments")  # an object or the JSON of one
        text = arguments if isinstance(arguments, str) else json.dumps(arguments)
        try:
            arguments = strict_json(text, most=10_000)
        except Rejected:
            arguments = None
        if not isinstance(arguments, dict):
            raise InputError(f"arguments of {name}: expected a JSON object, found {text:.60}")
        calls.append({"name": name, "arguments": arguments})
    return calls, [call.get("id") for call in given.get("tool_calls") or []]


def _functions(row: dict, key: str) -> list[tuple[str, dict]]:
    """(name, function) of each tool or call under a key, where it is bare or under "function"."""
    try:
        functions = [part.get("function") or part for part in row.get(key) or []]
        return [(function["name"], function) for function in functions]
    except (TypeError, KeyError, AttributeError):
        raise InputError(f"{key}: expected functions with a name, found {row[key]!r:.60}") from None


def _check_name(given: dict, call: dict) -> None:
    """A tool message may name its tool."""
    if given.get("name") not in (None, call["name"]):
        raise InputError(f"expected a result of {call['name']}, found one of {given['name']!r:.60}")


def _place(call_id: object, ids: list, results: list) -> int:
    """Which call a tool message answers: the one with its id, or the next if there are no ids."""
    if None not in results:
        raise InputError("a tool message, but no call before it waits for a result")
    if call_id is None and ids.count(None) == len(ids):
        return results.index(None)
    if ids.count(call_id) != 1 or results[ids.index(call_id)] is not None:
        raise InputError(f"tool_call_id: expected each of {ids} once, found {call_id!r:.60}")
    return ids.index(call_id)
