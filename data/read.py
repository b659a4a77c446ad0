"""Question files in the benchmarks' official formats, told from what stands in them, and the prediction files that
the official scripts read. Nothing is downloaded."""
import csv
import io
import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from data import InputError


@dataclass(frozen=True)
class Item:
    """One question of a file. golds are for the scorer alone; paragraphs may ground the ToolActor, if the user asks."""
    id: str
    text: str
    golds: list[str]
    set: str    # the file's name
    rule: str   # whose rules score it, see FORMATS
    paragraphs: str = ""


FORMATS = {  # whose format: the keys that tell it; the first that fits
    "2wiki": ("_id", "question", "answer", "context", "evidences"),
    "hotpotqa": ("_id", "question", "answer", "context"),
    "musique": ("id", "question", "answer", "answer_aliases", "paragraphs"),
    "bamboogle": ("Question", "Answer"),
    "common": ("question", "golden_answers"),
}


def read_questions(path: Path, skip_bad: bool = False) -> tuple[list[Item], list[str]]:
    """A question file -> its questions, and of each record that was left out where it stands and why. Without
    skip_bad the first such record is an InputError, as is a file of no known format.

    Where id_aliases.json stands beside a file of 2Wiki, its aliases count, as they do for the v1.1 script."""
    path, items, bad, seen = Path(path), [], [], set()
    rows = _rows(path)
    told = Counter(form for _, row in rows if (form := _format(row))).most_common(1)
    if not told:
        found = next((f"one with {', '.join(sorted(map(str, row))[:8])}" for _, row in rows if isinstance(row, dict)), "none")
        raise InputError(f"{path}: records of HotpotQA, 2Wiki, MuSiQue, Bamboogle or with question and golden_answers "
                         f"were expected, {found} was found")
    form = told[0][0]
    aliases = _aliases(path.parent / "id_aliases.json") if form == "2wiki" else None
    for number, (place, row) in enumerate(rows, 1):
        try:
            item = _item(path.stem, form, row, number, aliases)
            if item.id in seen:
                raise ValueError("its id stands twice")
            seen.add(item.id)
            items.append(item)
        except ValueError as error:
            name = next((f" ({row[key]!r:.40})" for key in ("_id", "id") if isinstance(row, dict) and key in row), "")
            bad.append(f"{path}: {place}{name}: {error}")
    if bad and not skip_bad:
        raise InputError(f"{bad[0]}; {len(bad)} of {len(rows)} records are bad, --skip-bad leaves them out")
    if not items:
        raise InputError(f"{path}: no good record among {len(rows)}; {bad[0]}")
    return items, bad


def _rows(path: Path) -> list[tuple[str, object]]:
    """A file's records and where each stands: a JSON list, JSON lines, or CSV. What isn't JSON stays a str."""
    try:
        text = path.read_text(encoding="utf-8-sig").strip()
        if text.startswith("["):
            return [(f"record {i}", row) for i, row in enumerate(json.loads(text), 1)]
        if not text.startswith("{"):
            return [(f"row {i}", row) for i, row in enumerate(csv.DictReader(io.StringIO(text), strict=True), 1)]
        return [(f"line {i}", _json(line)) for i, line in enumerate(text.split("\n"), 1) if line.strip()]
    except (OSError, ValueError, RecursionError, csv.Error) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise InputError(f"{path}: not readable as UTF-8 JSON, JSON lines or CSV ({reason})") from None


def _json(line: str) -> object:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return line


def _format(row: object) -> str | None:
    return next((form for form, keys in FORMATS.items() if isinstance(row, dict) and row.keys() >= set(keys)), None)


def _item(name: str, form: str, row: object, number: int, aliases: dict[str, list[str]] | None) -> Item:
    """A record -> question; ValueError says what is wrong with it."""
    if not isinstance(row, dict):
        raise ValueError("not a JSON object")
    if missing := [key for key in FORMATS[form] if key not in row]:
        raise ValueError(f"no {missing[0]}")
    json.dumps(row, ensure_ascii=False).encode()  # a lone surrogate is no character, and no tokenizer takes it
    question, golds = row.get("question", row.get("Question")), row.get("golden_answers")
    if golds is None:
        golds = [row.get("answer", row.get("Answer"))]
    paragraphs = ""
    try:
        if form in ("hotpotqa", "2wiki"):  # HotpotQA's sentences bring the space between them along
            join = " ".join if form == "2wiki" else "".join
            paragraphs = "\n".join(f"{title}: {join(sentences)}" for title, sentences in row["context"])
        if form == "musique":
            paragraphs = "\n".join(f"{part['title']}: {part['paragraph_text']}" for part in row["paragraphs"])
            golds = [*golds, *row["answer_aliases"]]
    except (TypeError, ValueError, KeyError):
        raise ValueError("its paragraphs or aliases don't have the format's shape") from None
    if row.get("answerable") is False:
        raise ValueError("not answerable (a record of MuSiQue-Full)")
    if not isinstance(question, str) or not question.strip():
        raise ValueError(f"the question should be a text, found {question!r:.40}")
    if not isinstance(golds, list) or not golds or not all(isinstance(gold, str) and gold.strip() for gold in golds):
        raise ValueError(f"the answer should be a text, found {golds!r:.40}")
    if aliases is not None:
        golds += [alias for alias in aliases.get(str(row.get("answer_id")), []) if alias not in golds]
    rule = "2wiki_v1.1" if aliases is not None else form
    return Item(str(row.get("_id", row.get("id", number))), question.strip(), golds, name, rule, paragraphs)


def _aliases(path: Path) -> dict[str, list[str]] | None:
    """Wikidata id -> other names, from 2Wiki's id_aliases.json (one object a line); None where there is no such file."""
    if not path.exists():
        return None
    try:
        return {row["Q_id"]: [*row["aliases"], *row["demonyms"]] for _, row in _rows(path)}
    except (TypeError, KeyError):
        raise InputError(f"{path}: Q_id, aliases and demonyms were expected in each line") from None


def write_questions(questions: list, folder: Path) -> list[Path]:
    """Questions in the common form (question, golden_answers), a file for each set -> the files."""
    folder.mkdir(parents=True, exist_ok=True)
    files = {q.set: folder / f"{q.set}.jsonl" for q in questions}
    for name, path in files.items():
        rows = ({"id": q.id, "question": q.text, "golden_answers": q.golds} for q in questions if q.set == name)
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return list(files.values())


def write_predictions(items: list[Item], answers: list[str], path: Path) -> None:
    """What the official script of the items' benchmark reads; answers alone, no supporting facts or evidence."""
    if items[0].rule == "musique":
        rows = [{"id": item.id, "predicted_answer": answer, "predicted_support_idxs": [], "predicted_answerable": True}
                for item, answer in zip(items, answers)]
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    else:
        none: dict[str, list] = {item.id: [] for item in items}
        answer = {item.id: answer for item, answer in zip(items, answers)}
        text = json.dumps({"answer": answer, "sp": none, "evidence": none}, ensure_ascii=False) + "\n"
    path.write_text(text, encoding="utf-8")
