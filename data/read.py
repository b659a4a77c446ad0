"""Read question files in the official formats, and write prediction files for the official scripts.
The format is detected from the keys of the records. Nothing is downloaded."""
import csv
import io
import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from data import InputError


@dataclass(frozen=True)
class Item:
    """A question from a file. Only the scorer reads `golds`; no prompt contains them."""
    id: str
    text: str
    golds: list[str]       # accepted answers
    set: str               # file name without its suffix
    rule: str              # scoring rule: a key of FORMATS, or "2wiki_v1.1"
    paragraphs: str = ""   # the ToolActor receives them with --grounded


# Format: the keys that identify its records. The first match counts, so 2Wiki precedes HotpotQA.
FORMATS = {
    "2wiki": ("_id", "question", "answer", "context", "evidences"),
    "hotpotqa": ("_id", "question", "answer", "context"),
    "musique": ("id", "question", "answer", "answer_aliases", "paragraphs"),
    "bamboogle": ("Question", "Answer"),
    "common": ("question", "golden_answers"),
}


def read_questions(path: Path, skip_bad: bool = False) -> tuple[list[Item], list[str]]:
    """Return the questions of a file, and a message for each skipped record.
    Raise InputError if the format is unknown, a record is bad and not skipped, or all are bad. As
    in the v1.1 script of 2Wiki, a file id_aliases.json in the same folder adds golds."""
    file = Path(path)
    rows = _read_rows(file)
    form = _file_format(file, rows)
    aliases = _read_aliases(file.parent / "id_aliases.json") if form == "2wiki" else None
    items: list[Item] = []
    seen_ids: set[str] = set()
    bad: list[str] = []
    for number, (place, row) in enumerate(rows, 1):
        try:
            item = _to_item(file.stem, form, row, number, aliases)
            if item.id in seen_ids:
                raise ValueError("the id occurs twice")
            seen_ids.add(item.id)
            items.append(item)
        except ValueError as error:
            bad.append(f"{file}: {place}{_id_note(row)}: {error}")
    if bad and not skip_bad:
        raise InputError(f"{bad[0]}; {len(bad)} of {len(rows)} records are bad; try --skip-bad")
    if not items:
        raise InputError(f"{file}: all {len(rows)} records are bad; the first: {bad[0]}")
    return items, bad


def _read_rows(path: Path) -> list[tuple[str, object]]:
    """Return (place, record) for each record of a file. Error messages quote the place."""
    try:
        return _parse_rows(path.read_text(encoding="utf-8-sig").strip())
    except (OSError, ValueError, RecursionError, csv.Error) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise InputError(f"{path}: not readable as UTF-8 JSON, JSONL or CSV ({reason})") from None


def _parse_rows(text: str) -> list[tuple[str, object]]:
    """Parse a JSON list, JSON lines or CSV. The first character decides which."""
    if text.startswith("["):
        return [(f"record {i}", row) for i, row in enumerate(json.loads(text), 1)]
    if text.startswith("{"):
        lines = enumerate(text.split("\n"), 1)
        return [(f"line {i}", _parse_line(line)) for i, line in lines if line.strip()]
    csv_rows = csv.DictReader(io.StringIO(text), strict=True)
    return [(f"row {i}", row) for i, row in enumerate(csv_rows, 1)]


def _parse_line(line: str) -> object:
    """Parse a line of JSON. Return an invalid line unchanged; it counts as a bad record later."""
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return line


def _file_format(path: Path, rows: list[tuple[str, object]]) -> str:
    """Return the format of most records. Raise InputError if no record has a known format."""
    formats = [_record_format(row) for _, row in rows]
    known = [form for form in formats if form is not None]
    if known:
        return Counter(known).most_common(1)[0][0]
    found = "none"
    objects = [row for _, row in rows if isinstance(row, dict)]
    if objects:
        keys = sorted(map(str, objects[0]))
        found = f"a record with the keys {', '.join(keys[:8])}"
    raise InputError(f"{path}: expected records of HotpotQA, 2Wiki, MuSiQue or Bamboogle, "
                     f"or records with question and golden_answers; found {found}")


def _record_format(row: object) -> str | None:
    if isinstance(row, dict):
        for form, keys in FORMATS.items():
            if row.keys() >= set(keys):
                return form
    return None


def _to_item(name: str, form: str, row: object, number: int, aliases: dict | None) -> Item:
    """Convert a record to an Item. Raise ValueError with the reason if the record is bad."""
    _check_record(form, row)
    try:
        paragraphs = _paragraphs(form, row)
        golds = _golds(form, row)
    except (TypeError, ValueError, KeyError):
        raise ValueError("the paragraphs or aliases don't have the format's shape") from None
    question = row.get("question", row.get("Question"))
    _check_content(row, question, golds)
    rule = form
    if aliases is not None:
        rule = "2wiki_v1.1"
        more = aliases.get(str(row.get("answer_id")), [])
        golds = golds + [alias for alias in more if alias not in golds]
    item_id = str(row.get("_id", row.get("id", number)))
    return Item(item_id, question.strip(), golds, name, rule, paragraphs)


def _check_record(form: str, row: object) -> None:
    if not isinstance(row, dict):
        raise ValueError("not a JSON object")
    for key in FORMATS[form]:
        if key not in row:
            raise ValueError(f"no {key}")
    # A lone surrogate raises UnicodeEncodeError, a ValueError. No tokenizer accepts one.
    json.dumps(row, ensure_ascii=False).encode()


def _paragraphs(form: str, row: dict) -> str:
    """Return the paragraphs of a record, one line "title: text" each."""
    if form == "musique":
        return "\n".join(f"{part['title']}: {part['paragraph_text']}" for part in row["paragraphs"])
    if form in ("hotpotqa", "2wiki"):
        # HotpotQA's sentences include the space between them; 2Wiki's don't.
        join = " ".join if form == "2wiki" else "".join
        return "\n".join(f"{title}: {join(sentences)}" for title, sentences in row["context"])
    return ""


def _golds(form: str, row: dict) -> list[str]:
    golds = row.get("golden_answers")
    if golds is None:
        golds = [row.get("answer", row.get("Answer"))]
    if form == "musique":
        golds = [*golds, *row["answer_aliases"]]
    return golds


def _check_content(row: dict, question: object, golds: object) -> None:
    if row.get("answerable") is False:
        raise ValueError("not answerable (a record of MuSiQue-Full)")
    if not _is_text(question):
        raise ValueError(f"the question should be a non-empty string, found {question!r:.40}")
    if not isinstance(golds, list) or not golds or not all(map(_is_text, golds)):
        raise ValueError(f"each answer should be a non-empty string, found {golds!r:.40}")


def _is_text(value: object) -> bool:
    return isinstance(value, str) and value.strip() != ""


def _id_note(row: object) -> str:
    """Return the id of a record in parentheses, or "" if it has none."""
    for key in ("_id", "id"):
        if isinstance(row, dict) and key in row:
            return f" ({row[key]!r:.40})"
    return ""


def _read_aliases(path: Path) -> dict[str, list[str]] | None:
    """Return {Wikidata id: aliases} from 2Wiki's id_aliases.json, or None if it doesn't exist."""
    if not path.exists():
        return None
    try:
        return {row["Q_id"]: [*row["aliases"], *row["demonyms"]] for _, row in _read_rows(path)}
    except (TypeError, KeyError):
        raise InputError(f"{path}: expected Q_id, aliases and demonyms in each line") from None


def write_questions(questions: list, folder: Path) -> list[Path]:
    """Write one file per set in the format "common" and return the paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = {q.set: folder / f"{q.set}.jsonl" for q in questions}
    for name, path in paths.items():
        of_set = [q for q in questions if q.set == name]
        rows = [{"id": q.id, "question": q.text, "golden_answers": q.golds} for q in of_set]
        path.write_text(_json_lines(rows), encoding="utf-8")
    return list(paths.values())


def write_predictions(items: list[Item], answers: list[str], path: Path) -> None:
    """Write a prediction file for the official script; answers[i] is the answer to items[i].
    Supporting facts and evidence are left empty."""
    answer_of = {item.id: answer for item, answer in zip(items, answers, strict=True)}
    if items[0].rule == "musique":
        unused = {"predicted_support_idxs": [], "predicted_answerable": True}
        rows = [{"id": i, "predicted_answer": a, **unused} for i, a in answer_of.items()]
    else:
        empty: dict[str, list] = {item.id: [] for item in items}
        rows = [{"answer": answer_of, "sp": empty, "evidence": empty}]
    path.write_text(_json_lines(rows), encoding="utf-8")


def _json_lines(rows: list[dict]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
