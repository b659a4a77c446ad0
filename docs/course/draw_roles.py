"""Figure of chapter 1: a trace of two lookups, coloured by who wrote each token."""
import re
from itertools import groupby

from picture import ACROSS, CHAR, LEFT, LINE, Picture

COLORS = {"program": "given", "ToolMaker": "two", "AutoAgent": "one", "ToolActor": "right"}
MEANINGS = {"program": "fixed text of the chat format, and the question",
            "ToolMaker": "the tools, written before the trace began",
            "AutoAgent": "thoughts, calls and the answer: mask 1",
            "ToolActor": "the results of the calls"}
# Where the text of the two other roles stands in a conversation of AutoAgent.
PLACES = {"ToolMaker": r"(?<=:\n<tools>\n).*?(?=\n</tools>)",
          "ToolActor": r"(?<=<tool_response>\n).*?(?=\n</tool_response>)"}


def authors(texts: list[str], mask: list[int]) -> list[str]:
    """Who wrote each token. A token with text of two authors belongs to the author of its start."""
    whole = "".join(texts)
    spans = []
    for name, pattern in PLACES.items():
        spans += [(name, *match.span()) for match in re.finditer(pattern, whole, re.DOTALL)]
    found = []
    start = 0
    for text, own in zip(texts, mask, strict=True):
        inside = [name for name, first, end in spans if first <= start < end]
        found.append("AutoAgent" if own else inside[0] if inside else "program")
        start += len(text)
    return found


def lines_of(tokens: list[tuple[str, str]]) -> list[list[tuple[str, str]]]:
    """Pairs (author, text) in lines that fit the picture. Lines break between words. A turn begins
    a line, and so does what a role writes after a newline."""
    words = []
    for author, text in tokens:
        if not words or text.startswith((" ", "<")) or words[-1][-1][1].endswith("\n"):
            words.append([])
        words[-1].append((author, text))
    lines = [[]]
    for word in words:
        before = lines[-1][-1] if lines[-1] else ("", "")
        full = sum(len(text) for _, text in lines[-1] + word) > ACROSS
        row = before[1].endswith("\n") and before[0] == word[0][0] != "program"
        if lines[-1] and (full or row or word[0][1] == "<|im_start|>"):
            lines.append([])
        lines[-1] += word
    return lines


def shorten(tokens: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """A long text of the program: its start, dots, and its last turns or its last tokens."""
    if len(tokens) < 40 or tokens[0][0] != "program":
        return tokens
    turns = [i for i, (_, text) in enumerate(tokens) if text == "<|im_start|>" and i > 0]
    return [*tokens[:12], ("program", " …"), *tokens[turns[0] if turns else -6:]]


def draw(picture: Picture, run: dict) -> str:
    """The second trace of the story: a legend, then its tokens in shortened form."""
    for name, meaning in MEANINGS.items():
        draw_token(picture, LEFT, name, name)
        picture.text(LEFT + 132, picture.y + 19, meaning, COLORS[name])
        picture.y += LINE + 3
    picture.y += 16
    trace = run["story"][1]
    decode = run["tokenizer"].decode
    texts = [decode([i], skip_special_tokens=False) for i in trace["ids"]]
    tokens = []
    for _, part in groupby(zip(authors(texts, trace["mask"]), texts, strict=True),
                           key=lambda token: token[0]):
        tokens += shorten(list(part))
    for line in lines_of(tokens):
        x = LEFT
        for author, text in line:
            x = draw_token(picture, x, author, text)
        picture.y += LINE
    return "A trace of two lookups, and who wrote each token"


def draw_token(picture: Picture, x: float, author: str, text: str) -> float:
    """One token in the colour of its author -> where it ends."""
    color = COLORS[author]
    if author != "program":
        picture.add("rect", x=x, y=picture.y, width=CHAR * len(text) - 1, height=LINE - 3, rx=4,
                    fill=color, fill_opacity=0.2)
    return picture.tokens(x, [text], color)
