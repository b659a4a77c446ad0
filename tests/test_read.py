"""Question files in the official formats, their scores against rules written down a second time, and against the
official scripts where MTR_OFFICIAL names a folder that holds them; real records where MTR_REAL does."""
import csv
import json
import os
import random
import re
import subprocess
import sys
import unicodedata
from pathlib import Path

import numpy as np
import pytest

import data
from data import InputError
from data.read import question_files, read_questions
from data.score import exact_match, f1, interval, normalize
from data.world import make_questions, make_world
from data.write import write_predictions, write_questions

CASES = Path(__file__).parent / "cases" / "questions"

ASKED = [("Who built “Velka”?", "Ada Bo"), ("Is Doka a city?", "yes"), ("How many?", "1,000"), ("Wo? é", "Café Ünal")]
ALIASES = {"Ada Bo": ["A. Bo", "Ada"], "Café Ünal": ["Unal"]}


def wiki(i, question, answer, **more):
    """A record of HotpotQA; 2Wiki adds to it."""
    return {"_id": f"q{i}", "question": question, "answer": answer, "type": "bridge", "level": "hard",
            "supporting_facts": [["T", 0]], "context": [["T", ["One.", " Two."]], ["U", ["Three."]]], **more}


def two_wiki(i, question, answer):
    name = f"Q{i}" if answer in ALIASES else None
    return wiki(i, question, answer, evidences=[["a", "b", "c"]], evidences_id=[], answer_id=name, entity_ids="Q1_Q2")


def musique(i, question, answer):
    return {"id": f"2hop__{i}_9", "question": question, "answer": answer, "answer_aliases": ALIASES.get(answer, []),
            "answerable": True, "question_decomposition": [],
            "paragraphs": [{"idx": 0, "title": "T", "paragraph_text": "One. Two.", "is_supporting": True}]}


def lines(rows):
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def each(make):
    return [make(i, question, answer) for i, (question, answer) in enumerate(ASKED)]


def write_csv(path):
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("Question", "Answer"), *ASKED])


FILES = {  # file, rule, how it is written
    "hotpot.json": ("hotpotqa", lambda p: p.write_text(json.dumps(each(wiki)), encoding="utf-8")),
    "2wiki.json": ("2wiki", lambda p: p.write_text(json.dumps(each(two_wiki), indent=1), encoding="utf-8")),
    "aliased.json": ("2wiki_v1.1", lambda p: (
        p.write_text(json.dumps(each(two_wiki)), encoding="utf-8"), (p.parent / "id_aliases.json").write_text(lines(
            {"Q_id": f"Q{i}", "aliases": ALIASES.get(a, [])[:1], "demonyms": ALIASES.get(a, [])[1:]}
            for i, (_, a) in enumerate(ASKED)), encoding="utf-8"))),
    "musique.jsonl": ("musique", lambda p: p.write_text(lines(each(musique)) + "\n", encoding="utf-8-sig")),
    "bamboogle.csv": ("bamboogle", write_csv),
    "bamboogle.jsonl": ("bamboogle", lambda p: p.write_text(lines({"Question": q, "Answer": a} for q, a in ASKED),
                                                            encoding="utf-8")),
    "plain.jsonl": ("common", lambda p: p.write_text(lines({"question": q, "golden_answers": [a, *ALIASES.get(a, [])]}
                                                           for q, a in ASKED), encoding="utf-8")),
}


def written(tmp_path, name):
    FILES[name][1](tmp_path / name)
    return tmp_path / name


# --------------------------------------------------------------------------------------------- reading


@pytest.mark.parametrize("name", FILES)
def test_each_official_format_is_told_and_read(name, tmp_path):
    items, bad, ids = read_questions(written(tmp_path, name))
    assert ids == [item.id for item in items]
    assert [(item.text, item.golds[0]) for item in items] == ASKED and not bad
    assert {item.rule for item in items} == {FILES[name][0]} and {item.set for item in items} == {Path(name).stem}
    assert len({item.id for item in items}) == 4
    with_aliases = FILES[name][0] in ("2wiki_v1.1", "musique", "common")
    assert [item.golds[1:] for item in items] == [ALIASES.get(a, []) if with_aliases else [] for _, a in ASKED]


@pytest.mark.parametrize("name, want", [("hotpot.json", "T: One. Two.\nU: Three."), ("2wiki.json", "T: One.  Two.\nU: Three."),
                                        ("musique.jsonl", "T: One. Two."), ("bamboogle.csv", "")])
def test_paragraphs_are_joined_as_the_set_splits_them(name, want, tmp_path):
    assert {item.paragraphs for item in read_questions(written(tmp_path, name))[0]} == {want}


def without(key):
    return lambda row: {k: v for k, v in row.items() if k != key}


BROKEN = [  # file, what happens to its third record, what the message says
    ("hotpot.json", without("answer"), "record 3.*q2.*no answer"), ("hotpot.json", lambda r: r | {"question": " "}, "question should"),
    ("hotpot.json", lambda r: r | {"answer": None}, "no answer"), ("hotpot.json", lambda r: r | {"context": "x"}, "paragraphs"),
    ("hotpot.json", lambda r: r | {"_id": "q0"}, "twice"), ("hotpot.json", lambda r: 7, "not a JSON object"),
    ("hotpot.json", lambda r: r | {"context": [["T", [1]]]}, "paragraphs"),
    ("hotpot.json", lambda r: r | {"context": ["ab"]}, "paragraphs"),
    ("hotpot.json", lambda r: r | {"context": {"title": ["T", "U"], "sentences": [["One."]]}}, "paragraphs"),
    ("hotpot.json", lambda r: r | {"context": "[['T', ['One.']]]"}, "not JSON"),
    ("hotpot.json", lambda r: r | {"Answer": "x"}, "two values of answer"),
    ("hotpot.json", lambda r: two_wiki(2, "a", "b"), "of 2wiki among records of hotpotqa"),
    ("2wiki.json", lambda r: wiki(2, "a", "b"), "of hotpotqa among records of 2wiki"), ("2wiki.json", without("context"), "no context"),
    ("musique.jsonl", lambda r: r | {"answerable": False}, "line 3.*2hop__2_9.*not answerable"),
    ("musique.jsonl", without("paragraphs"), "no paragraphs"),
    ("musique.jsonl", lambda r: r | {"answer_aliases": True}, "answer"),
    ("musique.jsonl", lambda r: r | {"answer_aliases": [True]}, "answer"),
    ("musique.jsonl", lambda r: r | {"paragraphs": [{"title": None, "paragraph_text": "x"}]}, "paragraphs"),
    ("musique.jsonl", lambda r: r | {"question": "\ud800"}, "surrogates"), ("plain.jsonl", without("golden_answers"), "no answer"),
    ("plain.jsonl", lambda r: r | {"golden_answers": []}, "answer"), ("plain.jsonl", lambda r: r | {"golden_answers": ["x", ""]}, "answer"),
    ("plain.jsonl", lambda r: r | {"golden_answers": [["x"], ["y"]]}, "answer"),
    ("plain.jsonl", lambda r: r | {"golden_answers": {"value": "x"}}, "value"),
    ("plain.jsonl", lambda r: r | {"answer": "x"}, "answer and golden_answers hold different"),
    ("plain.jsonl", lambda r: r | {"context": [["T", ["One."]]]}, "paragraphs"),
    ("plain.jsonl", lambda r: r | {"paragraphs": ["One."]}, "paragraphs"),
    ("plain.jsonl", lambda r: {"row_idx": 2, "row": r, "truncated_cells": ["question"]}, "viewer of the hub has cut .'question'"),
    ("plain.jsonl", lambda r: "{", "line 3.*not a JSON object"), ("bamboogle.jsonl", lambda r: r | {"Answer": True}, "answer"),
    ("bamboogle.jsonl", lambda r: r | {"Answer": [[0.5]]}, "answer"), ("bamboogle.jsonl", lambda r: r | {"Answer": "['a', 'b']"}, "not JSON"),
]


@pytest.mark.parametrize("name, harm, message", BROKEN, ids=range(len(BROKEN)))
def test_a_broken_record_is_named_and_may_be_left_out(name, harm, message, tmp_path):
    path = written(tmp_path, name)
    text = path.read_text(encoding="utf-8-sig")
    rows = json.loads(text) if name.endswith(".json") else [json.loads(line) for line in text.strip().split("\n")]
    rows[2] = harm(rows[2])
    broken = json.dumps(rows) if name.endswith(".json") else "".join(
        (row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)
    path.write_text(broken, encoding="utf-8")
    with pytest.raises(InputError, match=message) as error:
        read_questions(path)
    assert "\n" not in str(error.value) and str(path) in str(error.value) and "--skip-bad" in str(error.value)
    items, bad, ids = read_questions(path, skip_bad=True)
    assert len(items) == 3 and len(bad) == 1 and re.search(message, bad[0])
    assert len(ids) == 4 and [item.id for item in items] == [*ids[:2], ids[3]]


LIKE_BOTH = {"_id": "a", "type": "comparison", "question": "x", "answer": "y", "context": [["T", ["One."]]]}


@pytest.mark.parametrize("content, found", [
    (b"", "none"), (b"hello\n", "none"), (b"name,age\nBo,3\n", "keys age, name .*expected at least question and answer"),
    (b'{"question": "x"}', "keys question "),
    (b"[1, 2]", "record 1: not a JSON object"), (b'{"data": [\n1]}', "not a JSON object"), (b'[{"id": 1, "answer": "y"}]', "keys answer, id .*expected at least question and answer"),
    (b"[{", "not readable"), (b"\xff\xfe\x00", "not readable"), (b"[" * 100_000, "not readable"), (b'Question,Answer\n"x', "not readable"),
    (b'[{"_id": 1, "question": "x", "context": []}]', "keys _id, context, question "),
    # Cut off, or a comma is missing: no part of such a file is a record of its own.
    (b'{\n "question": "x",\n "answer": "y"\n "id": 1\n}', "not readable.*line 4"), (b'{"question": "x", "answer": "y"', "not readable"),
    (b'{\n "question_decomposition": [\n{"question": "x", "answer": "y"}\n],\n "id": 1\n "answer": "z"\n}', "not readable.*line 6"),
    # A comma in an answer, and two columns of one name, would lose a part of it.
    (b"question,answer\nHow many?,1,000\n", "more fields than the header"), (b"question,answer,answer\nx,1,2\n", "same name"),
    (b'{"question": "x", "Question": "z", "answer": "y"}', "two values of question"),
    # Which set these are from is not known. The text of the last is a passage, or else a question.
    (json.dumps(LIKE_BOTH).encode(), "2wiki: none of evidences, .*hotpotqa: none of type=bridge, level=easy"),
    (json.dumps(LIKE_BOTH | {"paragraphs": ["x"]}).encode(), "musique: the paragraphs are not title and paragraph_text"),
    (b'{"text": "One.", "answer": "y"}', "keys answer, text "),
    (b'{"data": [{"question": "x", "answer": "y"}], "rows": []}', "keys data, rows ")], ids=range(22))
def test_what_is_none_of_them_is_refused_with_what_was_found(content, found, tmp_path):
    (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(InputError, match=found) as error:
        read_questions(tmp_path / "x.json")
    assert "x.json" in str(error.value) and "\n" not in str(error.value)


ASKS = "Who built the Velka Tower?", ["Ada Bo"], "Velka Tower: It stands in Doka. Ada Bo built it.\nDoka: A city."
MOTHER = "Who is the mother of the director of Red Lake?"
RED_LAKE = "Red Lake: Red Lake is a film. Jon Orn directed it.\nJon Orn: Son of Mila Orn."
INN = "Who owns the inn where Tam lives?"
TAM = "Inn: Bero owns it.\nTam: Tam lives in the inn."
FOUNDER = "When was the founder of Doka born?", ["1154"], ""
TWO = ["Ada Bo", "A. Bo"]
DRESSES = {  # file: rule, number of records, and of the first: question, golds, paragraphs, id
    "hotpot_official.json": ("hotpotqa", 3, *ASKS, "h1"), "hotpot_columns.jsonl": ("hotpotqa", 3, *ASKS, "h1"),
    "hotpot_objects.json": ("hotpotqa", 3, *ASKS, "h1"), "hotpot_strings.csv": ("hotpotqa", 3, *ASKS, "h1"),
    "2wiki_official.json": ("2wiki", 3, MOTHER, ["Mila Orn"], RED_LAKE, "w1"),
    "2wiki_strings.jsonl": ("2wiki", 3, MOTHER, ["Mila Orn"], RED_LAKE, "w1"),
    "2wiki_columns.jsonl": ("2wiki", 3, MOTHER, ["Mila Orn"], RED_LAKE, "w1"),
    "2wiki_objects.jsonl": ("2wiki", 3, MOTHER, ["Mila Orn"], RED_LAKE, "w1"),
    "aliased/dev.json": ("2wiki_v1.1", 3, MOTHER, ["Mila Orn", "Ludmila Orn"], RED_LAKE, "w1"),
    "musique_official.jsonl": ("musique", 2, INN, ["Old Bero", "Bero"], TAM, "2hop__1_2"),
    "musique_no_aliases.jsonl": ("musique", 2, INN, ["Old Bero"], TAM, "2hop__1_2"),
    "musique_columns.json": ("musique", 2, INN, ["Old Bero", "Bero"], TAM, "2hop__1_2"),
    "bamboogle.csv": ("bamboogle", 2, *FOUNDER, "1"), "bamboogle.jsonl": ("bamboogle", 2, *FOUNDER, "1"),
    "bamboogle.json": ("bamboogle", 2, *FOUNDER, "1"), "plain.jsonl": ("common", 2, *FOUNDER, "1"),
    "answer_list.jsonl": ("common", 2, "Who?", TWO, "", "a1"), "answers_list.jsonl": ("common", 2, "Who?", TWO, "", "n1"),
    "golden_string.jsonl": ("common", 2, "Who?", ["Ada Bo"], "", "g1"), "golden_and_answer.jsonl": ("common", 2, "Who?", TWO, "", "b1"),
    "squad.jsonl": ("common", 2, "Who founded Doka?", ["Ada Bo", "Bo"], "Doka is a city.\nAda Bo founded it.", "s1"),
    "squad_objects.jsonl": ("common", 1, "What is Doka?", ["a city", "city"], "Doka is a city.", "s1"),
    "upper.json": ("common", 2, "Who?", ["Ada Bo"], "", "u1"), "numbers.jsonl": ("common", 2, "How many?", ["1702"], "", "0"),
    "null_ids.jsonl": ("common", 2, "Who?", ["Ada Bo"], "", "1"), "lists.csv": ("common", 2, "Who?", TWO, "", "c1"),
    "aliases.jsonl": ("common", 2, "Who?", TWO, "", "k1"), "answer_aliases.jsonl": ("common", 2, "Who?", TWO, "", "k1"),
    "world.jsonl": ("common", 1, "What is the home of Borox?", ["Nila"], "", "train-0"),
    "data.json": ("common", 2, "Who?", ["Ada Bo"], "", "d1"), "viewer.json": ("common", 2, "Who?", ["Ada Bo"], "", "d1"),
    "one_record.json": ("common", 1, "Who?", ["Ada Bo"], "", "d1"), "pretty_records.json": ("common", 2, "Who?", ["Ada Bo"], "", "d1"),
    "tab.tsv": ("common", 2, "Who, or what?", ["Ada Bo"], "", "d1"), "semicolon.csv": ("common", 2, "Who, or what?", ["Ada Bo"], "", "d1"),
    "bom_crlf.jsonl": ("common", 2, "Who?", ["Ada Bo"], "", "d1"), "bom_crlf.csv": ("common", 2, "Who, or\r\nwhat?", ["Ada Bo"], "", "d1"),
}
LAST = {  # of some: question and golds of the last record
    "hotpot_columns.jsonl": ("Where was the builder of the tower born?", ["Sorn"]), "numbers.jsonl": ("How many gates?", ["4", "four"]),
    "2wiki_columns.jsonl": ("Who is the grandfather of Jon Orn?", ["Per Orn"]),
    "aliased/dev.json": ("Who is the grandfather of Jon Orn?", ["Per Orn"]),
    "musique_columns.json": ("When was the inn built?", ["1702"]), "bamboogle.csv": ("Who ruled Sorn, and when?", ["Ilo, 1200"]),
    "golden_and_answer.jsonl": ("Where?", ["Doka"]), "lists.csv": ("Where?", ["Doka"]), "pretty_records.json": ("Where?", ["Doka"]),
    "answer_aliases.jsonl": ("Where?", ["Doka"]), "bom_crlf.jsonl": ("Where?", ["Café"]), "bom_crlf.csv": ("Where?", ["Café"])}


@pytest.mark.parametrize("name", DRESSES)
def test_each_dress_of_a_format_is_read(name):
    items, bad, ids = read_questions(CASES / name)
    first = items[0]
    assert (first.rule, len(items), first.text, first.golds, first.paragraphs, first.id) == DRESSES[name]
    assert not bad and ids == [item.id for item in items] and len(set(ids)) == len(ids) and {item.rule for item in items} == {first.rule}
    if name in LAST:
        assert (items[-1].text, items[-1].golds) == LAST[name]


def test_every_file_of_the_cases_is_in_the_table():
    files = {path.relative_to(CASES).as_posix() for path in CASES.rglob("*") if path.is_file()}
    assert files == {*DRESSES, "aliased/id_aliases.json"}


@pytest.mark.parametrize("gone, rule, join", [
    (("evidences", "evidences_id", "entity_ids"), "2wiki", " "), (("evidences", "evidences_id", "answer_id"), "2wiki", " "),
    (("evidences", "entity_ids", "answer_id"), "2wiki", " "), (("evidences_id", "entity_ids", "answer_id"), "2wiki", " "),
    (("evidences", "evidences_id", "entity_ids", "answer_id"), "hotpotqa", "")])
def test_any_mark_of_2wiki_tells_it_from_hotpotqa(gone, rule, join, tmp_path):
    """wiki() gives each record a level and a type that only HotpotQA has."""
    rows = [{key: value for key, value in row.items() if key not in gone} for row in each(two_wiki)]
    rows = [row | {"answer_id": "Q1"} if "answer_id" in row else row for row in rows]
    (tmp_path / "x.json").write_text(json.dumps(rows))
    items = read_questions(tmp_path / "x.json").items
    assert {item.rule for item in items} == {rule} and items[0].paragraphs == f"T: One.{join} Two.\nU: Three."


@pytest.mark.parametrize("kind", ["compositional", "inference", "bridge_comparison"])
def test_a_type_tells_2wiki_for_the_records_without_one(kind, tmp_path):
    """Records of the type comparison are the same in both sets. The others of the file decide."""
    context = [["T", ["One.", "Two."]]]
    rows = [LIKE_BOTH | {"_id": i, "type": t, "context": context} for i, t in enumerate(["comparison", "comparison", kind])]
    (tmp_path / "x.json").write_text(json.dumps(rows))
    items = read_questions(tmp_path / "x.json").items
    assert [(item.rule, item.paragraphs) for item in items] == [("2wiki", "T: One. Two.")] * 3


def test_aliases_count_only_where_an_answer_has_an_id(tmp_path):
    """The file of aliases names ids of answers. Beside HotpotQA, or records without ids, it changes no score and no label."""
    aliased = CASES / "aliased"
    (tmp_path / "id_aliases.json").write_bytes((aliased / "id_aliases.json").read_bytes())
    for name, rule in (("2wiki_strings.jsonl", "2wiki"), ("hotpot_official.json", "hotpotqa"), ("plain.jsonl", "common"),
                       ("2wiki_official.json", "2wiki_v1.1")):
        (tmp_path / name).write_bytes((CASES / name).read_bytes())
        assert {item.rule for item in read_questions(tmp_path / name).items} == {rule}
        beside = [tmp_path / "id_aliases.json"] if rule == "2wiki_v1.1" else []
        assert question_files([tmp_path / name]) == [tmp_path / name, *beside]
    assert question_files([str(aliased / "dev.json"), CASES / "plain.jsonl"]) == [
        aliased / "dev.json", aliased / "id_aliases.json", CASES / "plain.jsonl"]
    with pytest.raises(InputError, match="none.json: no such file"):
        question_files([CASES / "none.json"])


@pytest.mark.parametrize("line", [{"Q_id": "Q1", "aliases": []}, {"Q_id": "Q1", "aliases": [None], "demonyms": []},
                                  {"Q_id": [], "aliases": [], "demonyms": []}, 7])
def test_a_broken_file_of_aliases_is_named(line, tmp_path):
    path = written(tmp_path, "aliased.json")
    (tmp_path / "id_aliases.json").write_text(json.dumps(line))
    with pytest.raises(InputError, match="id_aliases.json: expected Q_id, aliases and demonyms"):
        read_questions(path)


def test_a_pipe_is_read_more_than_once(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "piped", {})
    os.mkfifo(tmp_path / "pipe")
    writer = subprocess.Popen(["cp", CASES / "plain.jsonl", tmp_path / "pipe"])
    first = read_questions(tmp_path / "pipe")
    assert writer.wait() == 0 and len(first.items) == 2
    (tmp_path / "pipe").unlink()  # without its memory the program would wait for ever
    assert read_questions(tmp_path / "pipe") == first and question_files([tmp_path / "pipe"]) == [tmp_path / "pipe"]


def test_a_number_is_its_decimal_text(tmp_path):
    """As a cell of a CSV would hold it."""
    (tmp_path / "x.jsonl").write_text('{"question": "How long?", "answer": 3.5}\n{"question": "How many?", "answer": [4, "four"]}\n')
    assert [item.golds for item in read_questions(tmp_path / "x.jsonl").items] == [["3.5"], ["4", "four"]]


def test_a_message_counts_the_header_of_a_csv_and_empty_rows_are_none(tmp_path):
    (tmp_path / "x.csv").write_text('question;answer\nx;y\n;;\n"a\nb";z\nq;\n;\n')
    items, bad, _ = read_questions(tmp_path / "x.csv", skip_bad=True)
    assert [item.text for item in items] == ["x", "a\nb"] and bad == [f"{tmp_path / 'x.csv'}: line 6: no answer"]


def test_blank_lines_are_no_records_beside_a_broken_one(tmp_path):
    good = json.dumps({"question": "x", "answer": "y"})
    (tmp_path / "x.jsonl").write_text(f"{good}\n\n  \n{{\n{good}\n")
    items, bad, ids = read_questions(tmp_path / "x.jsonl", skip_bad=True)
    assert len(items) == 2 and bad == [f"{tmp_path / 'x.jsonl'}: line 4: not a JSON object"] and ids == ["1", "2", "3"]


@pytest.mark.parametrize("text, golds", [("[1990, 1991]", ["1990", "1991"]), ("[ 7 ]", ["7"]), ("[1990]s", ["[1990]s"]), ("1,000", ["1,000"]), ("3.5", ["3.5"])])
def test_a_list_of_whole_numbers_in_a_cell_is_a_list(text, golds, tmp_path):
    with open(tmp_path / "x.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("question", "answer"), ("When?", text)])
    assert read_questions(tmp_path / "x.csv").items[0].golds == golds


def test_a_message_names_the_line_of_a_record_over_several_lines(tmp_path):
    rows = [{"id": "a", "question": "x", "answer": "y"}, {"id": "b", "question": "", "answer": "y"}]
    (tmp_path / "x.json").write_text("\n\n" + "\n\n".join(json.dumps(row, indent=1) for row in rows))
    items, bad, ids = read_questions(tmp_path / "x.json", skip_bad=True)
    assert bad == [f"{tmp_path / 'x.json'}: line 9 ('b'): no question"] and ids == ["a", "b"]


def test_a_file_that_is_not_there_is_named(tmp_path):
    for path in (tmp_path / "none.json", tmp_path):
        with pytest.raises(InputError, match=re.escape(str(path))):
            read_questions(path)


def test_the_worlds_questions_survive_being_written(tmp_path):
    questions = [q for q in make_questions(make_world(1)) if q.set in ("hotpot", "2wiki")]
    files = write_questions(questions, tmp_path / "x")
    read = [item for file in files for item in read_questions(file).items]
    assert [(q.id, q.text, q.golds, q.set) for q in questions] == [(i.id, i.text, i.golds, i.set) for i in read]


# --------------------------------------------------------------------------------------------- scores


def slow_normal(text):
    """The official normaliser, a character and a word at a time."""
    kept = "".join(c for c in text.lower() if not (ord(c) < 128 and unicodedata.category(c)[0] in "PS"))
    words, word = [], ""
    for c in kept + " ":
        if c.isalnum() or c == "_" or unicodedata.category(c)[0] == "M" and word:
            word += c
            continue
        words += [word if word not in ("a", "an", "the") else " ", c]
        word = ""
    return [w for w in "".join(words).split() if w]


def slow_scores(prediction, golds, rule):
    """EM and F1 by the definition, the best over the golds."""
    def pair(gold):
        said, want = slow_normal(prediction), slow_normal(gold)
        em = float(said == want)
        if rule in ("hotpotqa", "2wiki", "2wiki_v1.1"):
            if not em and (said in (["yes"], ["no"], ["noanswer"]) or want in (["yes"], ["no"], ["noanswer"])):
                return em, 0.0
        elif not said or not want:
            return em, em
        left, shared = list(want), 0
        for word in said:
            if word in left:
                left.remove(word)
                shared += 1
        precision, recall = shared / max(1, len(said)), shared / max(1, len(want))
        return em, 2 * precision * recall / (precision + recall) if shared else 0.0
    return tuple(max(scores) for scores in zip(*map(pair, golds), strict=True))


WORDS = ["the", "The", "a", "An", "A", "yes", "Yes.", "no", "noanswer", "Velka", "velka", "VELKA!", "co-op", "coop", "U.S.", "us",
         "“x”", "x", "é", "É", "1,000", "1000", "Ünal", "the\u00a0end", "—", "'s", "", " ", "İ", "ß", "theory", "\t"]


def generated(n=300):
    """Predictions and golds: case, articles, punctuation, unicode, yes and no, nothing, aliases."""
    rng = random.Random(7)
    pairs = []
    for _ in range(n):
        golds = [" ".join(rng.choices(WORDS, k=rng.choice((1, 2, 3)))) for _ in range(rng.choice((1, 1, 2, 4)))]
        near = rng.choice(golds).split(" ")
        rng.shuffle(near)
        pairs.append((rng.choice([" ".join(near), rng.choice(golds).upper(), " ".join(near[1:] + ["Velka", "x"]), "Velka us x",
                                  rng.choice(["", "yes", "the"])]), golds))
    return pairs


RULES = ("hotpotqa", "2wiki", "2wiki_v1.1", "musique", "bamboogle", "common")


@pytest.mark.parametrize("rule", RULES)
def test_300_pairs_score_as_the_rule_says(rule):
    pairs = generated()
    ours = [(exact_match(p, golds), f1(p, golds, rule)) for p, golds in pairs]
    assert ours == [pytest.approx(slow_scores(p, golds, rule)) for p, golds in pairs]
    assert all(normalize(p) == " ".join(slow_normal(p)) for p, _ in pairs)
    right, partly = np.mean([em for em, _ in ours]), np.mean([0 < f < 1 for _, f in ours])
    assert 0.2 < right < 0.8 and partly > 0.1  # no side of the rule is left untried


def test_the_rules_differ_where_they_should():
    for prediction, gold, hotpot, musique in (("yes it is", "yes", 0, 0.5), ("", "A", 0, 1), ("the", "a", 0, 1), ("", "x", 0, 0)):
        assert (f1(prediction, [gold], "hotpotqa"), f1(prediction, [gold], "musique")) == (hotpot, musique)


@pytest.mark.parametrize("name", FILES)
def test_gold_as_prediction_is_right(name, tmp_path):
    for item in read_questions(written(tmp_path, name))[0]:
        assert all((exact_match(gold, item.golds), f1(gold, item.golds, item.rule)) == (1, 1) for gold in item.golds)


def test_the_interval_of_a_share_is_the_binomials():
    """40 of 100: normal approximation 0.304 to 0.496, a quantile of 2,000 resamples within 0.015 of it."""
    low, high = interval([1.0] * 40 + [0.0] * 60)
    assert abs(low - 0.304) < 0.015 and abs(high - 0.496) < 0.015 and interval([1.0] * 40 + [0.0] * 60) == (low, high)
    assert interval([1.0] * 9) == (1.0, 1.0) and interval([0.25]) == (0.25, 0.25)


# ------------------------------------------------------------------------------- prediction files, real files


def test_prediction_files_have_the_shape_that_the_scripts_read(tmp_path):
    questions = read_questions(written(tmp_path, "musique.jsonl"))
    write_predictions(questions, ["é", "", "x", "y"], tmp_path / "p")
    rows = [json.loads(line) for line in (tmp_path / "p").read_text(encoding="ascii").splitlines()]
    assert [row["id"] for row in rows] == [item.id for item in questions.items] and rows[0] == {
        "id": rows[0]["id"], "predicted_answer": "é", "predicted_support_idxs": [], "predicted_answerable": True}
    questions = read_questions(written(tmp_path, "2wiki.json"))
    write_predictions(questions, ["é", "", "x", "y"], tmp_path / "p")
    file = json.loads((tmp_path / "p").read_text(encoding="ascii"))
    assert file["answer"] == {"q0": "é", "q1": "", "q2": "x", "q3": "y"}
    assert file["sp"] == file["evidence"] == {item.id: [] for item in questions.items}


@pytest.mark.parametrize("name", ["hotpot.json", "aliased.json", "musique.jsonl"])
def test_a_skipped_record_gets_an_empty_answer_in_its_place(name, tmp_path):
    """MuSiQue's script stops if the ids are not those of the data in order. HotpotQA's looks up every id of the data."""
    path = written(tmp_path, name)
    text = path.read_text(encoding="utf-8-sig")
    rows = json.loads(text) if name.endswith(".json") else [json.loads(line) for line in text.strip().split("\n")]
    rows[0] |= {"answer": None}
    rows[2] |= {"question": " "}
    path.write_text(json.dumps(rows) if name.endswith(".json") else lines(rows), encoding="utf-8")
    questions = read_questions(path, skip_bad=True)
    write_predictions(questions, ["é", "y"], tmp_path / "p")
    ids = [row.get("_id", row.get("id")) for row in rows]
    text = (tmp_path / "p").read_text(encoding="ascii")
    if name == "musique.jsonl":
        found = [(row["id"], row["predicted_answer"]) for row in map(json.loads, text.splitlines())]
    else:
        file = json.loads(text)
        found = list(file["answer"].items())
        assert list(file["sp"]) == list(file["evidence"]) == ids
    assert found == list(zip(ids, ["", "é", "", "y"], strict=True)) and questions.ids == ids


def test_written_questions_are_ascii(tmp_path):
    items = [item for item in read_questions(written(tmp_path, "hotpot.json")).items if not item.text.isascii()]
    file, = write_questions(items, tmp_path / "out")
    assert [item.text for item in read_questions(file).items] == ["Who built “Velka”?", "Wo? é"] and file.read_bytes().isascii()


SCRIPTS = {  # data: script, maker of a record, what the script prints for EM and F1, its factor, half a unit of its last digit
    "hotpot.json": ("hotpot_evaluate_v1.py", wiki, ("em", "f1"), 1, 1e-12),
    "aliased.json": ("2wikimultihop_evaluate_v1.1.py", two_wiki, ("em", "f1"), 100, 0.005001),
    "musique.jsonl": ("evaluate_v1.0.py", musique, ("answer_em", "answer_f1"), 1, 0.0005001)}

if os.environ.get("MTR_OFFICIAL"):
    @pytest.mark.parametrize("skip", [0, 7], ids=["all", "some skipped"])
    @pytest.mark.parametrize("name", SCRIPTS)
    def test_the_official_script_prints_our_numbers(name, skip, tmp_path):
        """On our prediction file for 300 questions, in a locale without UTF-8. The script counts a skipped record as wrong.

        ujson, which two of the scripts import, may be missing here."""
        script, make, names, factor, precision = SCRIPTS[name]
        (tmp_path / "ujson.py").write_text("from json import *\n")
        pairs = [(said, [gold for gold in golds if gold.strip()] or ["x"]) for said, golds in generated()]
        rows = []
        for i, (_, golds) in enumerate(pairs):
            bad = skip and i % skip == 0
            if bad or not normalize(golds[0]):
                golds[:] = ["x"]
            row = make(i, " " if bad else "Who?", golds[0])
            rows.append(row | ({"answer_aliases": golds[1:]} if make is musique else {"answer_id": f"Q{i}"}))
        (tmp_path / name).write_text(json.dumps(rows) if name.endswith(".json") else "".join(json.dumps(row) + "\n" for row in rows))
        more = []
        if make is two_wiki:
            more = [tmp_path / "id_aliases.json"]
            more[0].write_text("".join(json.dumps({"Q_id": f"Q{i}", "aliases": golds[1:2], "demonyms": golds[2:]}) + "\n"
                                       for i, (_, golds) in enumerate(pairs)))
        questions = read_questions(tmp_path / name, skip_bad=True)
        place = {item_id: i for i, item_id in enumerate(questions.ids)}
        said = [pairs[place[item.id]][0] for item in questions.items]
        write_predictions(questions, said, tmp_path / "predictions")
        no_utf8 = {"PYTHONPATH": str(tmp_path), "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
        done = subprocess.run([sys.executable, Path(os.environ["MTR_OFFICIAL"]) / script, tmp_path / "predictions", tmp_path / name, *more],
                              capture_output=True, text=True, env=no_utf8)
        assert done.returncode == 0 and "missing" not in done.stdout, done.stderr
        theirs = json.loads(done.stdout.replace("'", '"'))
        scored = list(zip(said, questions.items, strict=True))
        ours = [sum(exact_match(s, item.golds) for s, item in scored) / len(rows),
                sum(f1(s, item.golds, item.rule) for s, item in scored) / len(rows)]
        assert len(questions.bad) == (43 if skip else 0) and 0.1 < ours[0] < 0.9 and any(not s.isascii() for s in said)
        assert [theirs[n] for n in names] == [pytest.approx(factor * value, abs=precision) for value in ours]

if os.environ.get("MTR_REAL"):
    @pytest.mark.parametrize("name, rule, n", [("hotpot_dev_distractor_v1.first53.json", "hotpotqa", 53),
                                               ("musique_train.sample100.jsonl", "musique", 100)])
    def test_real_records_are_read_and_scored(name, rule, n):
        items, bad, _ = read_questions(Path(os.environ["MTR_REAL"]) / "qa" / name)
        assert len(items) == n and not bad and all(item.rule == rule and item.paragraphs for item in items)
        assert all((exact_match(g, item.golds), f1(g, item.golds, rule)) == (1, 1) for item in items for g in item.golds)
