"""Read question files: the benchmarks as published and as copied, and any questions with answers.
The file may be JSON, JSON Lines or CSV. Nothing is downloaded."""
import csv
import io
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from data import InputError, printable, read_file
from data.formats import FORMATS, IDS, Format, content_of, fields_of, misfit
from data.rows import json_rows


@dataclass(frozen=True)
class Item:
    """A question from a file. Only the scorer reads `golds`; no prompt contains them."""
    id: str
    text: str
    golds: list[str]       # accepted answers
    set: str               # file name without its suffix
    rule: str              # scoring rule: one of FORMATS, or "2wiki_v1.1"
    paragraphs: str = ""   # the ToolActor receives them with --grounded


class Questions(NamedTuple):
    """The questions of a file, a message for each skipped record, the ids of all its records."""
    items: list[Item]
    bad: list[str]
    ids: list[str]   # the number of the record where it has no id


class Record(NamedTuple):
    """A record of a file. An unreadable one has no fields."""
    place: str
    id: str
    fields: dict
    form: Format | None   # the first of FORMATS that fits
    error: str


def read_questions(path: Path, skip_bad: bool = False) -> Questions:
    """Return the questions of a file. Raise InputError if its format is unknown, or if a record is
    bad and not skipped, or if all are bad. As in the v1.1 script of 2Wiki, a file id_aliases.json
    in the same folder adds golds."""
    file = Path(path)
    records, form = _read_records(file)
    alias_file = _alias_file(file, records, form)
    aliases = _read_aliases(alias_file) if alias_file else {}
    rule = "2wiki_v1.1" if alias_file else form.rule
    items: dict[str, Item] = {}
    bad: list[str] = []
    for record in records:
        try:
            if record.error:
                raise ValueError(record.error)
            question, golds, paragraphs = content_of(record.fields, form)
            if record.form not in (None, form):
                raise ValueError(f"a record of {record.form.rule} among records of {form.rule}")
            if record.id in items:
                raise ValueError("the id occurs twice")
            more = aliases.get(str(record.fields.get("answer_id")), [])
            golds += [alias for alias in more if alias not in golds]
            items[record.id] = Item(record.id, question, golds, file.stem, rule, paragraphs)
        except ValueError as error:
            bad.append(f"{file}: {record.place}: {printable(str(error))}")
    if not items:
        raise InputError(f"{file}: all {len(records)} records are bad; the first: {bad[0]}")
    if bad and not skip_bad:
        raise InputError(f"{bad[0]}; {len(bad)} of {len(records)} records are bad; try --skip-bad")
    return Questions(list(items.values()), bad, [record.id for record in records])


def question_files(paths: list[Path]) -> list[Path]:
    """Return the files that a result on these questions depends on: each file, and the
    id_aliases.json that adds golds to it. Raise InputError if the format of a file is unknown."""
    files = []
    for file in map(Path, paths):
        alias_file = _alias_file(file, *_read_records(file))
        files += [file, alias_file] if alias_file else [file]
    return files


def _alias_file(file: Path, records: list[Record], form: Format) -> Path | None:
    """Return the id_aliases.json beside a file of 2Wiki, if any answer of it has an id."""
    path = file.parent / "id_aliases.json"
    has_ids = any("answer_id" in record.fields for record in records)
    return path if form.rule == "2wiki" and has_ids and path.exists() else None


def _read_aliases(path: Path) -> dict[str, list[str]]:
    """Return {Wikidata id: aliases} from 2Wiki's id_aliases.json."""
    aliases = {}
    try:
        for _, row in _read_rows(path):
            names = [*row["aliases"], *row["demonyms"]]
            "".join(names)  # TypeError if one is not a text
            aliases[row["Q_id"]] = names
        if not aliases:
            raise KeyError
    except (TypeError, KeyError):
        raise InputError(f"{path}: expected Q_id, aliases and demonyms in each line") from None
    return aliases


def _read_records(file: Path) -> tuple[list[Record], Format]:
    """Return the records of a file, and the format of most of them."""
    rows = _read_rows(file)
    records = [_to_record(place, row, number) for number, (place, row) in enumerate(rows, 1)]
    known = Counter(record.form for record in records if record.form)
    if known:
        return records, known.most_common(1)[0][0]
    readable = [record.fields for record in records if not record.error]
    if readable:
        keys = printable(", ".join(sorted({key.lower() for key in readable[0]}))) or "none"
        raise InputError(f"{file}: a record with the keys {keys} is of no known format "
                         f"({_why_none(readable[0])})")
    found = f"{records[0].place}: {printable(records[0].error)}" if records else "none"
    raise InputError(f"{file}: expected records with a question and an answer, found {found}")


def _why_none(fields: dict) -> str:
    """Return why a record is of no format: what each format lacks whose question it has."""
    near = [form for form in FORMATS if form.keys[0] in fields]
    if not near:
        return "expected at least question and answer"
    return "; ".join(f"{form.rule}: {misfit(fields, form)}" for form in near)


def _to_record(place: str, row: object, number: int) -> Record:
    try:
        fields = fields_of(row)
    except ValueError as error:
        return Record(place, str(number), {}, None, str(error))
    ids = [str(fields[key]) for key in IDS if key in fields]
    form = next((form for form in FORMATS if not misfit(fields, form)), None)
    if ids:
        return Record(f"{place} ({ids[0]!r:.40})", ids[0], fields, form, "")
    return Record(place, str(number), fields, form, "")


def _read_rows(path: Path) -> list[tuple[str, object]]:
    """Return (place, value) for each record of a file. Error messages quote the place.
    Raise InputError if the file is neither JSON nor CSV."""
    content = read_file(path)
    try:
        text = content.decode("utf-8-sig").rstrip()
        is_json = text.lstrip().startswith(("[", "{"))
        return json_rows(text) if is_json else _csv_rows(text.lstrip("\r\n"))
    except (ValueError, RecursionError, csv.Error) as error:
        hint = ""
        if isinstance(error, UnicodeDecodeError):
            hint = "; save it as UTF-8, and unpack or convert .gz, .xlsx and .parquet first"
        reason = f"not readable as UTF-8 JSON, JSONL or CSV ({error}){hint}"
        raise InputError(f"{path}: {reason}") from None


def _csv_rows(text: str) -> list[tuple[str, object]]:
    """Read a header and rows. The delimiter is the one that splits the header most."""
    header = text.partition("\n")[0]
    delimiter = max(",\t;", key=lambda mark: len(next(csv.reader([header], delimiter=mark))))
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    names = reader.fieldnames or []
    if len(set(names)) < len(names):
        raise ValueError("two columns have the same name")
    rows = []
    for row in reader:
        if any(value and any(value) for value in row.values()):  # Excel may leave empty rows
            rows.append((f"line {reader.line_num}", row))
    return rows
