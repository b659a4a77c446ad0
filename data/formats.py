"""The formats of question files: what tells the format of a record, and what a record holds."""
import json
import re
from typing import NamedTuple


class Format(NamedTuple):
    """How a record is recognized and read. A key in lower case stands for any spelling of it."""
    rule: str
    keys: tuple[str, ...]        # all must be there; "answer" stands for any of ANSWERS
    marks: tuple[str, ...] = ()  # one must be there: a key, or key=value
    texts: tuple[str, ...] = ()  # names of the text in the titled paragraphs of the last key
    join: str = ""               # what stands between the sentences of a text


FORMATS = (  # the first that fits a record counts
    Format("2wiki", ("question", "answer", "context"),
           marks=("evidences", "evidences_id", "entity_ids", "answer_id", "type=compositional",
                  "type=inference", "type=bridge_comparison"),
           texts=("sentences", "content"), join=" "),
    Format("hotpotqa", ("question", "answer", "context"),
           marks=("type=bridge", "level=easy", "level=medium", "level=hard"),
           texts=("sentences",)),  # they include the space between them
    Format("musique", ("question", "answer", "paragraphs"), texts=("paragraph_text",)),
    # The rest has at most a plain text, in `context`.
    Format("bamboogle", ("Question", "Answer")),
    Format("common", ("question", "answer")),
    Format("common", ("text", "golds")),  # the questions of the fictional world
)
ANSWERS = ("answer", "answers", "golden_answers", "golds")
ALIASES = ("answer_aliases", "aliases")
VIEWER = {"row_idx", "row", "truncated_cells"}  # what the hub's viewer puts around a record
IDS = ("_id", "id", "qid", "question_id", "idx")
NUMBERS_IN_TEXT = re.compile(r"\s*\[\s*\d+(\s*,\s*\d+)*\s*\]\s*")
LIST_IN_TEXT = re.compile(r"[\[{\s]*[\[{]\s*['\"]")  # how a list of texts starts


def fields_of(row: object) -> dict:
    """Return what a record holds, by its keys and by its keys in lower case. Keys without a value
    are left out. Raise ValueError if a part of the record is lost or counted twice."""
    if isinstance(row, dict) and "row" in row and row.keys() <= VIEWER:
        if row.get("truncated_cells"):
            raise ValueError(f"the viewer of the hub has cut {row['truncated_cells']!r:.40}")
        row = row["row"]
    if not isinstance(row, dict):
        raise ValueError("not a JSON object")
    if None in row:
        raise ValueError("more fields than the header of the CSV")
    given = {key: value for key, value in row.items() if value not in (None, "")}
    fields: dict[str, object] = {}
    for key, value in given.items():
        if fields.setdefault(key.strip().lower(), value) != value:
            raise ValueError(f"two values of {key.strip().lower()}")
    return given | fields


def misfit(fields: dict, form: Format) -> str:
    """Return why a record is not of a format, "" if it is."""
    for key in form.keys:
        if not any(name in fields for name in (ANSWERS if key == "answer" else (key,))):
            return f"no {key}"
    marks = [mark.partition("=") for mark in form.marks]
    if marks and not any(_has(fields, key, value) for key, _, value in marks):
        return f"none of {', '.join(form.marks)}"
    try:
        _paragraphs(fields, form)
    except ValueError as error:
        return str(error)
    return ""


def _has(fields: dict, key: str, value: str) -> bool:
    return key in fields and value in ("", fields[key])


def content_of(fields: dict, form: Format) -> tuple[str, list[str], str]:
    """Return question, golds and paragraphs of a record, whether it has a mark or not.
    Raise ValueError with the reason if it is bad."""
    problem = misfit(fields, form._replace(marks=()))
    if problem:
        raise ValueError(problem)
    # A lone surrogate raises UnicodeEncodeError, a ValueError. No tokenizer accepts one.
    json.dumps(fields, ensure_ascii=False).encode()
    if str(fields.get("answerable")).lower() == "false":
        raise ValueError("not answerable (a record of MuSiQue-Full)")
    question = fields[form.keys[0]]
    if not _is_text(question):
        raise ValueError(f"the question should be a non-empty string, found {question!r:.40}")
    return question.strip(), _golds(fields), _paragraphs(fields, form)


def _paragraphs(fields: dict, form: Format) -> str:
    """Return the context as it is, or titled paragraphs as lines "title: text"."""
    if not form.texts:
        context = _decoded(fields.get("context", ""))
        if "paragraphs" in fields or not isinstance(context, str):
            raise ValueError("the paragraphs are not a text in context")
        return context
    parts = _decoded(fields[form.keys[-1]])
    try:
        if isinstance(parts, dict):  # columns
            texts = [parts[name] for name in form.texts if name in parts]
            parts = list(zip(parts["title"], *texts, strict=True))
        return "\n".join(_paragraph(part, form) for part in parts)
    except (TypeError, ValueError, KeyError):
        raise ValueError(f"the paragraphs are not title and {' or '.join(form.texts)}") from None


def _paragraph(part: object, form: Format) -> str:
    """Return "title: text" of a pair or an object. Raise TypeError or KeyError if it is neither."""
    if isinstance(part, dict):
        part = [part["title"], *[part[name] for name in form.texts if name in part]]
    match part:
        case [str(title), str(text)]:
            return f"{title}: {text}"
        case [str(title), list(sentences)]:
            return f"{title}: {form.join.join(sentences)}"
    raise TypeError


def _golds(fields: dict) -> list[str]:
    """Return the accepted answers. Several keys may hold them if one of them holds all."""
    keys = [key for key in ANSWERS if key in fields]
    found = [_answers(fields[key]) for key in keys]
    golds = max(found, key=len)
    if any(set(answers) - set(golds) for answers in found):
        raise ValueError(f"{' and '.join(keys)} hold different answers")
    for key in ALIASES:
        if fields.get(key, []) != []:
            golds += [alias for alias in _answers(fields[key]) if alias not in golds]
    return golds


def _answers(value: object) -> list[str]:
    """Return the texts of a text, a number, a list of them, or SQuAD's {"text": ...}."""
    numbers = isinstance(value, str) and NUMBERS_IN_TEXT.fullmatch(value)
    held = json.loads(value) if numbers else _decoded(value)
    held = held.get("text") if isinstance(held, dict) else held
    parts = held if isinstance(held, list) else [held]
    parts = [part.get("text") if isinstance(part, dict) else part for part in parts]
    texts = [str(part) if type(part) in (int, float) else part for part in parts]
    if not texts or not all(map(_is_text, texts)):
        raise ValueError(f"each answer should be a non-empty string, found {value!r:.40}")
    return list(dict.fromkeys(texts))


def _decoded(value: object) -> object:
    """Return the list or object that a text holds as JSON; everything else as it is."""
    if not isinstance(value, str) or not LIST_IN_TEXT.match(value):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        raise ValueError(f"a list that is not JSON: {value!r:.40}") from None


def _is_text(value: object) -> bool:
    return isinstance(value, str) and value.strip() != ""
