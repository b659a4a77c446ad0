"""Qwen2.5's chat and tool format: the chat_template of Qwen2.5-Instruct's tokenizer_config.json.

A prompt is a list of strings. A plain `str` is text; a `Control` is one control token.
"""
import json
import re


class Control(str):
    """A control token. Tokenizer.encode gives its one id, which a plain str can never give."""


IM_START, IM_END = Control("<|im_start|>"), Control("<|im_end|>")
CALL_START, CALL_END = Control("<tool_call>"), Control("</tool_call>")
TOOLS_HEAD = ("\n\n# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
              "You are provided with function signatures within <tools></tools> XML tags:\n<tools>")
TOOLS_TAIL = ("\n</tools>\n\nFor each function call, return a json object with function name and "
              "arguments within <tool_call></tool_call> XML tags:\n<tool_call>\n"
              '{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call>')
GENERATE = [IM_START, "assistant\n"]  # header of the turn that is generated next


def dumps(value: object) -> str:
    """JSON as the chat template prints it: keys keep their order, non-ASCII is not escaped."""
    return json.dumps(value, ensure_ascii=False)


def chat_turn(speaker: str, *content: str) -> list[str]:
    """One whole turn of the system or of the user."""
    return [IM_START, f"{speaker}\n", *content, IM_END, "\n"]


def own_text(text: str) -> list[str]:
    """Split a text of this program. The tags of a call become control tokens."""
    parts = re.split("(</?tool_call>)", text)
    return [Control(part) if part in (CALL_START, CALL_END) else part for part in parts]


def system_turn(text: str, schemas: list[dict] = ()) -> list[str]:
    """The system turn: instructions, then the schemas of the tools, if there are any."""
    if not schemas:
        return chat_turn("system", *own_text(text))
    lines = ["\n" + dumps(schema) for schema in schemas]
    return chat_turn("system", *own_text(text + TOOLS_HEAD), *lines, *own_text(TOOLS_TAIL))


def assistant_content(text: str, calls: list[dict]) -> list[str]:
    """The content of an assistant turn: text, then calls, separated by newlines."""
    pieces = [text] if text else []
    for call in calls:
        body = f'\n{{"name": "{call["name"]}", "arguments": {dumps(call["arguments"])}}}\n'
        pieces += ["\n" if pieces else "", CALL_START, body, CALL_END]
    return pieces


def results_turn(results: list[str]) -> list[str]:
    """One user turn with the results of all calls of a turn, in the order of the calls."""
    texts = [f"\n<tool_response>\n{result}\n</tool_response>" for result in results]
    return [IM_START, "user" + "".join(texts), IM_END, "\n"]


def result_text(observation: dict) -> str:
    """JSON with each "<" escaped: a "</tool_response>" inside a result would end its block."""
    return dumps(observation).replace("<", "\\u003c")
