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

from data import InputError
from data.read import read_questions, write_predictions, write_questions
from data.score import exact_match, f1, interval, normalize
from data.world import make_questions, make_world

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
    items, bad = read_questions(written(tmp_path, name))
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
    ("hotpot.json", without("answer"), "record 3.*no answer"), ("hotpot.json", lambda r: r | {"question": " "}, "question"),
    ("hotpot.json", lambda r: r | {"answer": None}, "answer should"), ("hotpot.json", lambda r: r | {"context": "x"}, "paragraphs"),
    ("hotpot.json", lambda r: r | {"_id": "q0"}, "twice"), ("hotpot.json", lambda r: 7, "not a JSON object"),
    ("hotpot.json", lambda r: r | {"context": [["T", [1]]]}, "paragraphs"), ("2wiki.json", without("evidences"), "no evidences"),
    ("musique.jsonl", lambda r: r | {"answerable": False}, "line 3.*2hop__2_9.*not answerable"),
    ("musique.jsonl", lambda r: r | {"answer_aliases": None}, "aliases"), ("musique.jsonl", lambda r: r | {"answer_aliases": [3]}, "answer"),
    ("musique.jsonl", lambda r: r | {"question": "\ud800"}, "surrogates"), ("plain.jsonl", without("golden_answers"), "golden_answers"),
    ("plain.jsonl", lambda r: r | {"golden_answers": []}, "answer"), ("plain.jsonl", lambda r: r | {"golden_answers": "x"}, "answer"),
    ("plain.jsonl", lambda r: "{", "line 3.*not a JSON object"), ("bamboogle.jsonl", lambda r: r | {"Answer": 3}, "answer"),
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
    items, bad = read_questions(path, skip_bad=True)
    assert len(items) == 3 and len(bad) == 1 and re.search(message, bad[0])


@pytest.mark.parametrize("content, found", [
    (b"", "none"), (b"hello\n", "none"), (b"name,age\nBo,3\n", "age, name"), (b'{"question": "x"}', "question"), (b"[1, 2]", "none"),
    (b'[{"id": 1, "question": "x", "answer": "y"}]', "answer, id, question"), (b"[{", "not readable"), (b"\xff\xfe\x00", "not readable"),
    (b'{"data": [\n1]}', "none"), (b"[" * 100_000, "not readable"), (b'Question,Answer\n"x', "not readable"),
    (b'[{"_id": 1, "question": "x", "context": []}]', "_id, context, question")], ids=range(12))
def test_what_is_none_of_them_is_refused_with_what_was_found(content, found, tmp_path):
    (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(InputError, match=found) as error:
        read_questions(tmp_path / "x.json")
    assert "x.json" in str(error.value) and "\n" not in str(error.value)


def test_a_file_that_is_not_there_is_named(tmp_path):
    for path in (tmp_path / "none.json", tmp_path):
        with pytest.raises(InputError, match=re.escape(str(path))):
            read_questions(path)


def test_the_worlds_questions_survive_being_written(tmp_path):
    questions = [q for q in make_questions(make_world(1)) if q.set in ("hotpot", "2wiki")]
    files = write_questions(questions, tmp_path / "x")
    read = [item for file in files for item in read_questions(file)[0]]
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
    items, _ = read_questions(written(tmp_path, "musique.jsonl"))
    write_predictions(items, ["é", "", "x", "y"], tmp_path / "p")
    rows = [json.loads(line) for line in (tmp_path / "p").read_text(encoding="utf-8").splitlines()]
    assert [row["id"] for row in rows] == [item.id for item in items] and rows[0] == {
        "id": items[0].id, "predicted_answer": "é", "predicted_support_idxs": [], "predicted_answerable": True}
    items, _ = read_questions(written(tmp_path, "2wiki.json"))
    write_predictions(items, ["é", "", "x", "y"], tmp_path / "p")
    file = json.loads((tmp_path / "p").read_text(encoding="utf-8"))
    assert file["answer"] == {"q0": "é", "q1": "", "q2": "x", "q3": "y"}
    assert file["sp"] == file["evidence"] == {item.id: [] for item in items}


if os.environ.get("MTR_OFFICIAL"):
    @pytest.mark.parametrize("name, script", [("hotpot.json", "hotpot_evaluate_v1.py"), ("aliased.json", "2wikimultihop_evaluate_v1.1.py")])
    def test_the_official_script_prints_our_numbers(name, script, tmp_path):
        """On our prediction file for 300 questions; ujson, which the scripts import, may be missing here."""
        (tmp_path / "ujson.py").write_text("from json import *\n")
        pairs = generated()
        make = wiki if name == "hotpot.json" else two_wiki
        rows = [make(i, "Who?", golds[0] if normalize(golds[0]) else "x") | {"answer_id": f"Q{i}"} for i, (_, golds) in enumerate(pairs)]
        (tmp_path / name).write_text(json.dumps(rows), encoding="utf-8")
        if name == "aliased.json":
            (tmp_path / "id_aliases.json").write_text(lines({"Q_id": f"Q{i}", "aliases": golds[1:2], "demonyms": golds[2:]}
                                                            for i, (_, golds) in enumerate(pairs)))
        kept, _ = read_questions(tmp_path / name, skip_bad=True)
        said = [pairs[int(item.id[1:])][0] for item in kept]
        write_predictions(kept, said, tmp_path / "predictions")
        rows = [row for row in rows if row["_id"] in {item.id for item in kept}]
        (tmp_path / name).write_text(json.dumps(rows), encoding="utf-8")
        done = subprocess.run([sys.executable, Path(os.environ["MTR_OFFICIAL"]) / script, tmp_path / "predictions", tmp_path / name,
                               *([tmp_path / "id_aliases.json"] if name == "aliased.json" else [])], capture_output=True, text=True,
                              env={"PYTHONPATH": str(tmp_path), "PYTHONUTF8": "1"}, check=True)
        theirs = json.loads(done.stdout.replace("'", '"'))
        ours = {"em": np.mean([exact_match(s, item.golds) for s, item in zip(said, kept, strict=True)]),
                "f1": np.mean([f1(s, item.golds, item.rule) for s, item in zip(said, kept, strict=True)])}
        scale, precision = (1, 1e-12) if name == "hotpot.json" else (100, 0.005001)
        assert len(kept) > 250 and 0.1 < ours["em"] < 0.9
        assert all(abs(theirs[m] - scale * ours[m]) <= precision for m in ours)

if os.environ.get("MTR_REAL"):
    @pytest.mark.parametrize("name, rule, n", [("hotpot_dev_distractor_v1.first53.json", "hotpotqa", 53),
                                               ("musique_train.sample100.jsonl", "musique", 100)])
    def test_real_records_are_read_and_scored(name, rule, n):
        items, bad = read_questions(Path(os.environ["MTR_REAL"]) / "qa" / name)
        assert len(items) == n and not bad and all(item.rule == rule and item.paragraphs for item in items)
        assert all((exact_match(g, item.golds), f1(g, item.golds, rule)) == (1, 1) for item in items for g in item.golds)
