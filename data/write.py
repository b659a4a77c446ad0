"""Write question files, and prediction files for the official scripts. All of them are ASCII: the
script of HotpotQA opens files in the encoding of the locale."""
import json
from pathlib import Path

from data.read import Questions


def write_questions(questions: list, folder: Path) -> list[Path]:
    """Write one file per set in the format "common" and return the paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = {q.set: folder / f"{q.set}.jsonl" for q in questions}
    for name, path in paths.items():
        of_set = [q for q in questions if q.set == name]
        rows = [{"id": q.id, "question": q.text, "golden_answers": q.golds} for q in of_set]
        _write_lines(rows, path)
    return list(paths.values())


def write_predictions(questions: Questions, answers: list[str], path: Path) -> None:
    """Write a prediction file for the official script; answers[i] answers questions.items[i]. A
    skipped record gets an empty answer. Supporting facts and evidence are left empty."""
    given = {item.id: answer for item, answer in zip(questions.items, answers, strict=True)}
    answer_of = dict.fromkeys(questions.ids, "") | given
    if questions.items[0].rule == "musique":  # its script compares the ids line by line
        unused = {"predicted_support_idxs": [], "predicted_answerable": True}
        rows = [{"id": i, "predicted_answer": answer_of[i], **unused} for i in questions.ids]
    else:
        empty: dict[str, list] = {i: [] for i in questions.ids}
        rows = [{"answer": answer_of, "sp": empty, "evidence": empty}]
    _write_lines(rows, path)


def _write_lines(rows: list[dict], path: Path) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="ascii")
