"""The records in a text of JSON or JSON Lines, each with its place for error messages."""
import json
import re

SPACE = re.compile(r"\s*")


def json_rows(text: str) -> list[tuple[str, object]]:
    """(place, value) of each record in a text of JSON or JSON Lines. A single list, or an object
    with one, holds the records. A broken line stays a text. ValueError if the text is neither."""
    try:
        rows = _json_values(text)
    except (ValueError, RecursionError):
        rows = _json_lines(text)
        # If fewer than half of the lines are objects, these are not JSON lines.
        if sum(isinstance(row, dict) for _, row in rows) < len(rows) / 2:
            raise
    if len(rows) != 1:
        return rows
    held = _held(rows[0][1])
    return rows if held is None else [(f"record {i}", row) for i, row in enumerate(held, 1)]


def _held(value: object) -> list | None:
    """Return the records that a list, {"data": [...]} or {"rows": [...]} holds. None otherwise."""
    if isinstance(value, dict) and "question" not in map(str.lower, value):
        lists = [value[key] for key in ("data", "rows") if isinstance(value.get(key), list)]
        return lists[0] if len(lists) == 1 else None
    return value if isinstance(value, list) else None


def _json_values(text: str) -> list[tuple[str, object]]:
    """Parse values that stand one after another. Each may take any number of lines."""
    rows = []
    line = 1
    end = 0
    while end < len(text):
        start = SPACE.match(text, end).end()
        line += text.count("\n", end, start)
        value, end = json.JSONDecoder().raw_decode(text, start)
        rows.append((f"line {line}", value))
        line += text.count("\n", start, end)
    return rows


def _json_lines(text: str) -> list[tuple[str, object]]:
    """Parse each line. A broken line stays a text, which is no record."""
    rows: list[tuple[str, object]] = []
    for number, line in enumerate(text.split("\n"), 1):
        try:
            value = json.loads(line)
        except (ValueError, RecursionError):
            value = line
        if line.strip():
            rows.append((f"line {number}", value))
    return rows
