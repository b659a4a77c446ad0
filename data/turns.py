"""Read what models write: turns of AutoAgent, and JSON.

Models depart from the strict form, for example by a sentence beside a call. Such text is read
anyway, and each departure is added to `notes`. Every function takes linear time on any text.
"""
import re
from itertools import chain

from data.schema import STRING, Rejected, strict_json

TAG = re.compile(r"</?(?:think|answer|tool_call|tool_response)>")
NAME = re.compile(r"""\{\s*["']name["']\s*:""")
ARGUMENTS = re.compile(r"""["'](?:arguments|parameters)["']\s*:""")


def read_turn(text: str, plain_answer: bool, notes: list[str]) -> tuple:
    """A turn -> its thought, the JSON of its calls, its answer, its error (see agents.Turn)."""
    blocks, beside = split_blocks(text, notes)
    thoughts, answers, bodies = blocks.values()
    if not (answers or bodies):
        bodies, beside = bare_call(beside, notes)
    # A space replaces the tag. Else "<thi<think>nk>" would become a tag again.
    thought = "\n".join(part.replace("<think>", " ").strip() for part in thoughts).strip()
    first = text.lstrip().startswith("<think>") and "<think>" not in thoughts[0]
    misplaced = bool(thoughts[1:] if first else thoughts)
    more = any((misplaced, answers, bodies, TAG.search(beside)))
    plain = plain_answer and beside and not more
    departures = {"no thought": not thoughts, "thought out of place": misplaced,
                  "answer without a tag": plain, "text beside the tags": beside and not plain,
                  "answer beside the calls": answers and bodies, "several answers": answers[1:]}
    notes += [name for name, departs in departures.items() if departs]
    if bodies:
        objects = [find_objects(body, notes) or [body] for body in bodies]
        return thought, list(chain.from_iterable(objects)), None, None
    if plain:
        answers = [beside]
    error = answers_error(answers)
    if error:
        notes.append(error)
    return thought, [], None if error else answers[0], error


def bare_call(text: str, notes: list[str]) -> tuple[list[str], str]:
    """Text without tags -> the JSON of a call in it, the remaining text."""
    if NAME.search(text) and ARGUMENTS.search(text):
        notes.append("call without a tag")
        return [text], ""
    return [], text


def answers_error(answers: list[str]) -> str | None:
    """Why these are not one answer. None if they are."""
    if not answers:
        return "neither call nor answer"
    if any(TAG.search(answer) for answer in answers):
        return "tag in the answer"
    # Two different answers are none. Else an agent could try several in one turn.
    return "different answers" if len({answer.lower() for answer in answers}) > 1 else None


def split_blocks(text: str, notes: list[str]) -> tuple[dict[str, list[str]], str]:
    """The contents of the <think>, <answer> and <tool_call> blocks, and the text beside them.

    A block without a closing tag ends at the next tag of any kind.
    """
    blocks: dict[str, list[str]] = {"<think>": [], "<answer>": [], "<tool_call>": []}
    last = {tag: text.rfind("</" + tag[1:]) for tag in blocks}
    beside = []
    position = 0
    while match := TAG.search(text, position):
        tag = match[0]
        start = match.end()
        beside.append(text[position:match.start()])
        position = start
        if tag not in blocks:
            beside.append(tag)
            continue
        closed = start <= last[tag]  # else a search for the closing tag would be in vain
        if closed:
            end = text.index("</" + tag[1:], start)
            position = end + len(tag) + 1
        else:
            notes.append(f"{tag} not closed")
            following = TAG.search(text, start)
            end = following.start() if following else len(text)
            position = end
        content = text[start:end].strip()
        if closed or content or tag == "<think>":
            blocks[tag].append(content)
        else:
            beside.append(tag)  # a tag with nothing behind it is text
    return blocks, ("".join(beside) + text[position:]).strip()


SINGLE = STRING.pattern.replace('"', "'")
TOKEN = re.compile(rf"""{STRING.pattern} | (?P<single>{SINGLE}) | \b(?P<word>True|False|None)\b |
    (?P<comma>,)(?=\s*[\]}}]) | (?P<open>[\[{{]) | (?P<close>[\]}}])""", re.DOTALL | re.VERBOSE)


def find_objects(text: str, notes: list[str]) -> list[str]:
    """The outermost {...} of a text, each rewritten as strict JSON where that is possible.

    >>> find_objects("So: {'a': [True,]}", [])
    ['{"a": [true]}']
    """
    objects = []
    beside = ""
    position = 0
    while (start := text.find("{", position)) >= 0:
        beside = beside or text[position:start].strip()
        pieces = []
        depth = 0
        position = start
        for token in TOKEN.finditer(text, start):
            pieces += [text[position:token.start()], strict_token(token)]
            position = token.end()
            depth += {"open": 1, "close": -1}.get(token.lastgroup, 0)
            if depth == 0:
                break
        objects.append("".join(pieces))
        if objects[-1] != text[start:position]:
            notes.append("JSON that is not strict")
    if beside or text[position:].strip():
        notes.append("text beside the JSON")
    if len(objects) > 1:
        notes.append("several objects in a tag")
    return objects


def strict_token(token: re.Match) -> str:
    """A token as strict JSON: no Python quotes and words, no trailing comma, no raw newline."""
    text = token[0]
    if token["comma"]:
        return ""
    if token["word"]:
        return {"True": "true", "False": "false", "None": "null"}[text]
    if token["single"]:
        quotes = {"\\'": "'", '"': '\\"'}
        inner = re.sub(r'\\.|"', lambda m: quotes.get(m[0], m[0]), text[1:-1], flags=re.DOTALL)
        text = f'"{inner}"'
    return re.sub(r"[\x00-\x1f]", lambda m: f"\\u{ord(m[0]):04x}", text)


def read_object(text: str, notes: list[str]) -> dict:
    """The only JSON object of a text. Rejected if there is none, or another one."""
    objects = find_objects(text, notes)
    if len(objects) != 1:
        raise Rejected("not JSON")
    return strict_json(objects[0])


def unwrap(text: str, notes: list[str]) -> dict:
    """A JSON object. OpenAI's {"type": "function", "function": {...}} gives the inner object."""
    value = strict_json(text)
    if not isinstance(value, dict):
        raise Rejected("not an object")
    parts = {key: part for key, part in value.items() if key != "id"}
    if isinstance(parts.get("function"), dict):
        parts |= parts.pop("function")
    if parts.get("type") == "function":
        del parts["type"]
    if parts != value:
        notes.append("other keys in a call")
    return parts
