"""Evaluation on question files and stage 0, by a scripted model: each row and reason is known.

Then the whole chain (traces, sft, grpo, eval) on a tiny random model.
"""
import fcntl
import json
import os
import shutil
import sys
import threading
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from test_agents import act, maker_text, object_of, say, scripted

import agents
import data as data_package
import evaluate
import graph
import grpo
import mtr
import sft
from agents import Tool, Toolbox, ToolMaker
from data import InputError, fingerprint
from data.folders import locks
from data.options import run_main
from data.prompts import SHORT
from data.read import Item, read_questions
from data.training import read_done, read_traces, to_records, why_not
from data.world import HELD_OUT, make_questions, make_world, tool_for
from evaluate import EvalConfig, TracesConfig, evaluate_files, make_traces
from model import load

TEXT = {"type": "string"}
BIRTHPLACE = Tool("birthplace", "Where a person was born.", object_of(person=TEXT),
                  object_of(birthplace=TEXT))
BIRTHPLACE.parameters["additionalProperties"] = False
OBSERVED = "</tool_response>"
GIL = act(("birthplace", {"person": "Gil"}))
# Question, gold answer, the agent's first turn, its second turn, why stage 0 does not keep it.
QUESTIONS = [
    ("Where was Bo born?", "Velka", act(("birthplace", {"person": "Bo"})), say(" velka."), ""),
    ("Where was Ada born?", "Doka", act(("birthplace", {"person": "Ada"})), say("in Velka"),
     "wrong answer"),
    ("Is Cy born?", "yes", "hello", "", "malformed: neither call nor answer"),
    ("Where was Di born?", "Suna",
     act(("birthplace", {"person": "Di"}), thought="It is Suna, I think."), say("Suna"),
     "answer in the first thought"),
    ("Is Ed or Flo older?", "Ed", act(("birthplace", {"who": "Ed"}), thought="Ed?"), say("Ed"),
     "refused call: "),
    ("Where was Gil born?", "Velka", GIL, GIL, "truncated: too many"),
]


def replies(context):
    """The reply of each role. The system prompt gives the role. AutoAgent's reply depends on the
    question and on whether the context holds an observation.
    """
    question = next((q for q in QUESTIONS if q[0] in context), None)
    if context.startswith("<|im_start|>system\n" + SHORT.actor):
        assert question is None, "the ToolActor was told the question"
        return json.dumps({"birthplace": "Velka"})
    if SHORT.maker[:40] in context:
        return maker_text(BIRTHPLACE.definition)
    if context.endswith(agents.CLOSED_BOOK):
        return f" {question[1] if question[1] in ('yes', 'Ed') else 'x'}</answer>"
    return question[3] if OBSERVED in context else question[2]


@pytest.fixture
def stand_in(monkeypatch, folder, tokenizer):
    """A checkpoint folder whose model is loaded but never asked: a script generates in its place.

    The value is the list of the samplers that were made, first the simulator's, then the agent's.
    """
    made = []

    def sampler(model, _, rows, slots):
        made.append(scripted(tokenizer, replies, rows))
        return made[-1]
    monkeypatch.setattr(graph, "Sampler", sampler)
    set_positions(folder)
    return made


def set_positions(folder, most=8000):
    """The tests' tokenizer needs many tokens per prompt, so the model gets many positions."""
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": most}))


@pytest.fixture
def data(tmp_path):
    """QUESTIONS as a MuSiQue file. Its paragraphs hold the word canary."""
    paragraph = {"title": "T", "paragraph_text": "canary", "is_supporting": True, "idx": 0}
    lines = [json.dumps({"id": f"q{i}", "question": question, "answer": gold, "answer_aliases": [],
                         "answerable": True, "paragraphs": [paragraph]}) + "\n"
             for i, (question, gold, *_) in enumerate(QUESTIONS)]
    path = tmp_path / "few.jsonl"
    path.write_text("".join(lines))
    return path


@pytest.fixture
def out(folder):
    """The run folder of `config`."""
    return folder.parent / "out"


def config(folder, data, /, **more):
    """The config of an evaluation of a checkpoint."""
    return EvalConfig(**{"out": str(folder.parent / "out"), "model": str(folder),
                         "data": (str(data),), "max_turns": 3, **more})


def teacher(folder, data, /, **more):
    """The config of stage 0, with one trace per question."""
    return TracesConfig(**{"out": str(folder.parent / "traces.jsonl"), "model": str(folder),
                           "data": (str(data),), "max_turns": 3, "samples": 1, **more})


def finished_run(folder, out, **more):
    """A run folder with the models and configs of both stages."""
    for stage in ("sft", "grpo"):
        shutil.copytree(folder, out / stage / "model")
    (out / "sft" / "config.json").write_text(json.dumps({"seed": 0}))
    trained = grpo.GRPOConfig(**{"max_turns": 2, "turn_tokens": 200, "trace_tokens": 4000, **more})
    (out / "grpo" / "config.json").write_text(json.dumps(asdict(trained)))


def read_kept(path):
    """The conversations for training and for the held-out loss, as sft.py reads them."""
    return read_traces(str(path), sft.split_conversation)


def read_lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


# ------------------------------------------------------------------------------------- evaluation


def test_a_row_by_hand(stand_in, folder, data, out):
    """Right: Bo, Di and Ed (velka. is Velka). "in Velka" has no word of Doka. Calls: Bo, Ada and Di
    one valid call each, Ed an invalid one, Gil three. A truncated trace has an empty answer.
    """
    row, = evaluate_files(config(folder, data))
    assert (row["set"], row["rule"], row["n"], row["bad"]) == ("few", "musique", 6, 0)
    assert row["em"] == row["f1"] == 3 / 6 and 0 <= row["em_low"] < row["em"] < row["em_high"] <= 1
    assert row["grammar"] == 4 / 6 and row["calls"] == 7 / 6 and row["valid_calls"] == 6 / 7
    assert row["failed_calls"] == 0
    # Velka was observed for Bo and for Ada ("in" says nothing). Suna and Ed were not observed.
    assert row["support"] == pytest.approx(2 / 6)
    assert row["backend"] == "simulated" and row["seconds"] > 0
    assert (row["model"], row["samples"], row["temperature"]) == (str(folder), 1, 0)
    names = {path.name for path in (out / "eval").iterdir()}
    assert names == {"few.json", "few.jsonl", "few.predictions"}
    assert json.loads((out / "eval" / "few.json").read_text()) == row
    traces = read_lines(out / "eval" / "few.jsonl")
    assert [trace["id"] for trace in traces] == [f"q{i}" for i in range(6)]
    assert [trace["status"] for trace in traces] == ["answered", "answered", "malformed",
                                                     "answered", "answered", "truncated"]
    assert traces[0]["story"].endswith("\n  thinks    Done.\n  answers   velka.")
    answers = [line["predicted_answer"] for line in read_lines(out / "eval" / "few.predictions")]
    assert answers == ["velka.", "in Velka", "", "Suna", "Ed", ""]


def test_samples_are_averaged_and_the_first_is_predicted(stand_in, folder, data, out, monkeypatch):
    """Two questions with three samples each. Two samples of the first question are right. The
    interval is over the two questions, whose means are 2/3 and 0.
    """
    real = agents.parse_turn
    answers = iter(["Velka", "velka", "x", "y", "x", "x"])

    def parse_turn(text, plain_answer=False):
        turn = real(text, plain_answer)
        if turn.answer is not None:
            turn.answer = next(answers)
        return turn
    monkeypatch.setattr(agents, "parse_turn", parse_turn)
    data.write_text("\n".join(data.read_text().split("\n")[:2]) + "\n")
    row, = evaluate_files(config(folder, data, temperature=1.0, samples=3))
    assert (row["n"], row["samples"], row["em_low"], row["em_high"]) == (2, 3, 0, 2 / 3)
    assert row["em"] == row["f1"] == pytest.approx(1 / 3)
    traces = read_lines(out / "eval" / "few.jsonl")
    assert [(t["id"], t["sample"], t["em"]) for t in traces] == [
        ("q0", 0, 1), ("q0", 1, 1), ("q0", 2, 0), ("q1", 0, 0), ("q1", 1, 0), ("q1", 2, 0)]
    predicted = read_lines(out / "eval" / "few.predictions")
    assert [line["predicted_answer"] for line in predicted] == ["Velka", "y"]


def test_batches_of_any_size_give_the_same_row(stand_in, folder, data):
    """A batch ends after two, four or all traces, also between the samples of a question. Each
    question gets its tools once.
    """
    rows = []
    for size in (2, 4, 64):
        stand_in.clear()
        row, = evaluate_files(config(folder, data, rows=size, samples=3, temperature=1.0,
                                     name=f"eval{size}"))
        rows.append({name: value for name, value in row.items() if name != "seconds"})
        maker = [stand_in[0].tokenizer.decode(ids) for ids in stand_in[0].before]
        assert sum(SHORT.maker[:40] in text for text in maker) == len(QUESTIONS)
        assert max(stand_in[1].opened) == min(size, 18) and stand_in[1].capacity == min(size, 18)
    assert rows[0] == rows[1] == rows[2]


def test_without_tools_the_answer_comes_at_once(stand_in, folder, data):
    row, = evaluate_files(config(folder, data, tools=False))
    assert row["em"] == 2 / 6 and row["calls"] == 0 and row["valid_calls"] is None
    assert row["backend"] == "none"
    prompts = [s.tokenizer.decode(ids) for s in stand_in for ids in s.before]
    assert len(prompts) == 6 and not any("<tools>" in text for text in prompts)


def test_only_the_toolactor_reads_the_paragraphs(stand_in, folder, data):
    for grounded in (True, False):
        stand_in.clear()
        row, = evaluate_files(config(folder, data, grounded=grounded, name=f"eval{grounded}"))
        simulator, agent = ([s.tokenizer.decode(ids) for ids in s.before] for s in stand_in)
        asked = [text for text in simulator if SHORT.actor in text]
        assert len(asked) == 4 and all(("T: canary" in text) == grounded for text in asked)
        assert not any("canary" in text for text in agent)


def test_equal_ids_in_two_files_are_two_questions(stand_in, folder, data, tmp_path):
    """The ToolMaker reads the questions of the second file, too. Each file has its own row."""
    other = tmp_path / "other.jsonl"
    other.write_text(data.read_text().replace("Where was", "Tell me: Where was"))
    few, more = evaluate_files(config(folder, data, data=(str(data), str(other))))
    assert (few["set"], more["set"]) == ("few", "other") and few["em"] == more["em"] == 3 / 6
    asked = [stand_in[0].tokenizer.decode(ids) for ids in stand_in[0].before]
    asked = [text for text in asked if SHORT.maker[:40] in text]
    assert len(asked) == 12 and sum("Tell me: " in text for text in asked) == 4


def test_a_users_tool_replaces_a_simulated_one(stand_in, folder, data, tmp_path):
    file = tmp_path / "mine.py"
    schema = json.dumps(BIRTHPLACE.schema).replace("false", "False")
    file.write_text('def born(person):\n'
                    '    return {"birthplace": {"Ada": "Doka"}.get(person, "?")}\n'
                    f'TOOLS = [({schema}, born)]\n')
    for backend in ("simulated", "real"):
        stand_in.clear()
        row, = evaluate_files(config(folder, data, real_tools=str(file), backend=backend,
                                     out=str(tmp_path / backend)))
        assert row["backend"] == f"{backend}, {file}"
        stories = [t["story"] for t in read_lines(tmp_path / backend / "eval" / "few.jsonl")]
        assert 'observes  {"birthplace": "Doka"}' in stories[1]
        assert not any('"birthplace": "Velka"' in story for story in stories)
        # With --backend real no tool is made. In both cases the ToolActor is never asked.
        assert len(stand_in[0].before) == (6 if backend == "simulated" else 0)


def test_a_users_tool_is_offered_beside_the_others(stand_in, folder, data):
    """The ToolMaker's tool comes first. A tool with code is not grounded."""
    players = evaluate.Players(config(folder, data, grounded=True))
    item = read_questions(data)[0][0]
    own = Tool("letters", "Counts.", object_of(text=TEXT), object_of(), run=len)
    players.own = [own]
    tools = players.tools(item, Toolbox("comparison", [BIRTHPLACE], 1))
    assert [tool.name for tool in tools] == ["birthplace", "compare", "letters"]
    assert [tool.source for tool in tools] == ["T: canary", "", ""] and tools[2] is own
    same_name = replace(own, name="birthplace")
    players.own = [same_name]
    tools = players.tools(item, Toolbox("composition", [BIRTHPLACE], 1))
    assert tools == [same_name]


FAILING = """
import sys

class Odd:
    pass

def birthplace(person):
    {body}

TOOLS = [({{"name": "birthplace", "description": "d", "parameters": {{"type": "object", "properties": {{"person": {{"type": "string"}}}}, "required": ["person"]}}}}, birthplace)]
"""


@pytest.mark.parametrize("body", ["raise ValueError('no')", "sys.exit(3)", "return float('nan')", "return Odd()"])
def test_a_real_tool_that_fails_every_time_shows_in_the_row(body, stand_in, folder, data, tmp_path):
    """Its calls are valid, so valid_calls does not show it. Of the 7 calls, one is refused."""
    path = tmp_path / "own.py"
    path.write_text(FAILING.format(body=body))
    row, = evaluate_files(config(folder, data, backend="real", real_tools=str(path)))
    assert row["valid_calls"] == 6 / 7 and row["failed_calls"] == 6 / 7 and row["em"] == 3 / 6
    row, = evaluate_files(config(folder, data, name="simulated"))
    assert row["failed_calls"] == 0


@pytest.mark.parametrize("more", [{"tools": False}, {"backend": "real"}])
def test_grounded_needs_the_toolactor(more, folder, data):
    """Otherwise the row would say grounded, and nothing would read the paragraphs."""
    with pytest.raises(InputError, match="^grounded: only the ToolActor reads the paragraphs"):
        config(folder, data, grounded=True, **more)


def test_a_users_simulated_tools_are_grounded_too(stand_in, folder, data, tmp_path):
    path = tmp_path / "own.json"
    path.write_text(json.dumps({"name": "age", "parameters": {}}))
    players = evaluate.Players(config(folder, data, grounded=True, real_tools=str(path)))
    item = read_questions(data).items[0]
    tools = players.tools(item, Toolbox("composition", [BIRTHPLACE], 1))
    assert [(tool.name, tool.source) for tool in tools] == [("birthplace", "T: canary"), ("age", "T: canary")]


def test_a_changed_neighbour_of_the_tools_does_not_continue_a_file(stand_in, folder, data, tmp_path):
    """Only what lies beside the tools file counts, and only if it was imported."""
    (tmp_path / "tools").mkdir()
    for name, text in (("neighbour_a.py", "x = 1"), ("unused.py", "x = 1"),
                       ("mine.py", FAILING.format(body="return {}") + "import neighbour_a\n")):
        (tmp_path / "tools" / name).write_text(text)
    own = teacher(folder, data, real_tools=str(tmp_path / "tools" / "mine.py"))
    why = make_traces(own)
    (tmp_path / "tools" / "unused.py").write_text("x = 2")
    assert make_traces(own) == why
    (tmp_path / "tools" / "neighbour_a.py").write_text("x = 2")
    with pytest.raises(InputError, match="was begun with another checkpoint, question file or tools file"):
        make_traces(own)


def test_a_backend_of_real_tools_needs_their_code(stand_in, folder, data, tmp_path, out):
    """The ToolActor would simulate a tool without code, and the row would say real."""
    path = tmp_path / "own.json"
    path.write_text(json.dumps([{"name": "lookup", "description": "d", "parameters": {"type": "object", "properties": {}}}]))
    with pytest.raises(InputError, match=f"^backend: lookup of {path} has no code; give a Python file"):
        evaluate_files(config(folder, data, backend="real", real_tools=str(path)))
    assert not out.exists()


@pytest.mark.parametrize("program", [lambda folder, data: evaluate_files(config(folder, data, grounded=True)),
                                     lambda folder, data: make_traces(teacher(folder, data, grounded=True))], ids=["eval", "traces"])
def test_grounded_needs_paragraphs(program, stand_in, folder, data, out):
    """One question without them is enough: the row would say grounded."""
    first, *others = read_lines(data)
    data.write_text("".join(json.dumps(line) + "\n" for line in [*others, first | {"paragraphs": []}]))
    with pytest.raises(InputError, match="^grounded: question (0 )?q0 of few has no paragraphs$"):
        program(folder, data)
    assert not out.exists() and not (folder.parent / "traces.jsonl").exists()


# ----------------------------------------------------------------------------------------- of a run


def test_a_run_sets_its_limits(stand_in, folder, data, out):
    """The limits of stage 2 hold, unless the user gives others."""
    finished_run(folder, out)
    for temperature in (0.0, 1.0):
        row, = evaluate_files(config(folder, data, model="", max_turns=None,
                                     temperature=temperature, name=f"eval{temperature}"))
        assert row["em"] == 3 / 6 and row["calls"] == 6 / 6  # Gil is stopped one turn earlier
        assert row["temperature"] == temperature
    assert len(list(out.glob("eval*/*.jsonl"))) == 2 and row["model"] == str(out)
    row, = evaluate_files(config(folder, data, model="", max_turns=3))
    assert row["calls"] == 7 / 6
    (out / "grpo" / "config.json").write_text("{}")  # of an older version: the defaults hold
    row, = evaluate_files(config(folder, data, model="", max_turns=None, name="other"))
    assert row["calls"] == (7 + evaluate.LIMITS["max_turns"] - 3) / 6


@pytest.mark.parametrize("backend", ["simulated", "real"])
def test_the_held_out_sets_of_a_run(backend, monkeypatch, folder, tokenizer, out):
    """The questions come from the run's world. With --backend real that world answers the calls.
    With simulated tools, any access to its facts raises while a model generates.
    """
    world = make_world(0)
    q = next(q for q in make_questions(world) if q.set == "hotpot" and q.kind == "composition")
    (relation, subject), value = q.steps[0], world.facts[q.steps[0]]
    observed = value if backend == "real" else "Nowhere"

    def script(context):
        with nullcontext() if backend == "real" else pytest.raises(PermissionError):
            assert players[0].world.real(relation, {"x": subject}) == {relation: value}
        if SHORT.maker[:40] in context:
            return maker_text(json.dumps(tool_for(relation)))
        if SHORT.actor in context:
            return json.dumps({relation: "Nowhere"})
        parameter, = tool_for(relation)["parameters"]["properties"]
        if json.dumps({relation: observed}) in context:
            return say(q.golds[0])
        return act((relation, {parameter: subject}))
    players = []
    real_init = evaluate.Players.__init__

    def init(self, *args):
        players.append(self)
        real_init(self, *args)
    monkeypatch.setattr(evaluate.Players, "__init__", init)
    monkeypatch.setattr(graph, "Sampler",
                        lambda model, _, rows, slots: scripted(tokenizer, script, rows))
    monkeypatch.setattr(evaluate, "make_questions",
                        lambda w: [q, replace(q, set="train"), replace(q, set="bamboogle")])
    set_positions(folder)
    finished_run(folder, out)
    rows = evaluate_files(EvalConfig(out=str(out), backend=backend))
    assert [(row["set"], row["rule"], row["n"], row["em"]) for row in rows] == [
        ("hotpot", "common", 1, 1.0), ("bamboogle", "common", 1, 1.0)]
    assert rows[0]["backend"] == backend and rows[0]["model"] == str(out)
    assert {path.name for path in (out / "heldout").iterdir()} == {"hotpot.jsonl",
                                                                   "bamboogle.jsonl"}
    assert not list((out / "eval").glob("*.predictions"))
    assert set(HELD_OUT) > {row["set"] for row in rows}


def test_a_result_is_never_overwritten(stand_in, folder, data, out):
    """An existing folder is refused before anything is read or asked, whoever wrote it. Another
    --name evaluates again. A stopped evaluation leaves such a folder, too.
    """
    evaluate_files(config(folder, data))
    before = {path: path.read_bytes() for path in (out / "eval").iterdir()}
    stand_in.clear()
    data.write_text(data.read_text().replace("yes", "no"))
    for other in (dict(), dict(temperature=1.0), dict(data=("none.json",)), dict(model="nowhere")):
        with pytest.raises(InputError, match="eval: holds a result; .* choose another --name"):
            evaluate_files(config(folder, data, **other))
    assert not stand_in
    assert before == {path: path.read_bytes() for path in (out / "eval").iterdir()}
    for samples in (2, 3):
        evaluate_files(config(folder, data, temperature=1.0, samples=samples, name=f"x{samples}"))
    assert [len(read_lines(path)) for path in sorted(out.glob("*/few.jsonl"))] == [6, 12, 18]


def test_a_stopped_evaluation_keeps_its_traces_and_is_refused(stand_in, folder, data, out,
                                                              monkeypatch):
    real, batches = evaluate.run_episodes, []

    def stop(*args, **more):
        batches.append(len(args[2]))
        if len(batches) == 2:
            raise KeyboardInterrupt
        return real(*args, **more)
    monkeypatch.setattr(evaluate, "run_episodes", stop)
    with pytest.raises(KeyboardInterrupt):
        evaluate_files(config(folder, data, rows=2))
    assert [path.name for path in (out / "eval").iterdir()] == ["few.jsonl"]
    assert len(read_lines(out / "eval" / "few.jsonl")) == 2
    with pytest.raises(InputError, match="choose another --name"):
        evaluate_files(config(folder, data, rows=2))
    assert batches == [2, 2]


# ----------------------------------------------------------------------------------------- stage 0


def test_stage_0_keeps_what_is_right_and_says_why_the_rest_is_not(stand_in, folder, data,
                                                                  tokenizer):
    why = make_traces(teacher(folder, data, samples=2))
    assert sum(why.values()) == 12 and all(n == 2 for n in why.values())
    for want, got in zip((q[4] for q in QUESTIONS), why, strict=True):
        assert got.startswith(want) and bool(got) == bool(want)
    records, valid = read_kept(folder.parent / "traces.jsonl")
    assert {role: len(part) for role, part in records.items()} == {"agent": 1, "maker": 1,
                                                                   "actor": 1}
    assert not any(valid.values())
    for role, generated in (("agent", "<answer> velka.</answer>"), ("maker", BIRTHPLACE.definition),
                            ("actor", '{"birthplace": "Velka"}')):
        trace = sft.to_trace(records[role][0], tokenizer)
        ids = [i for i, m in zip(trace.ids, trace.mask, strict=True) if m]
        assert generated in tokenizer.decode(ids)


def test_the_first_line_holds_the_settings(stand_in, folder, data):
    """sft.py reads over it, and a second run with the same settings adds nothing."""
    path = folder.parent / "traces.jsonl"
    why = make_traces(teacher(folder, data))
    first, *rest = read_lines(path)
    assert first == {"conversations": [], "settings": {
        "seed": 0, "temperature": 1.0, "max_turns": 3, "turn_tokens": 1024, "trace_tokens": 4096,
        "backend": "simulated", "grounded": False,
        "sources": fingerprint(folder, data), "prompts": asdict(SHORT)}}
    assert [(line["id"], line["sample"]) for line in rest] == [(f"0 q{i}", 0) for i in range(6)]
    text = path.read_bytes()
    assert make_traces(teacher(folder, data)) == why and path.read_bytes() == text


def test_a_stopped_stage_0_goes_on_where_it_was(stand_in, folder, data, monkeypatch):
    """It is stopped in the second of three batches, and its last line is cut off. Finished traces
    are not made again, and the file is the same as without the stop.
    """
    whole = folder.parent / "whole.jsonl"
    want = make_traces(teacher(folder, data, out=str(whole)))
    real, batches = evaluate.run_episodes, []

    def stop(*args, **more):
        batches.append([trace.question for trace in args[2]])
        if len(batches) == 2:
            raise KeyboardInterrupt
        return real(*args, **more)
    monkeypatch.setattr(evaluate, "run_episodes", stop)
    with pytest.raises(KeyboardInterrupt):
        make_traces(teacher(folder, data, rows=2))
    path = folder.parent / "traces.jsonl"
    assert len(path.read_text().splitlines()) == 3
    with open(path, "a") as file:
        file.write('{"id": "0 q2')
    assert make_traces(teacher(folder, data, rows=2)) == want
    assert path.read_bytes() == whole.read_bytes()
    asked = [q[0] for q in QUESTIONS]
    assert batches == [asked[:2], asked[2:4], asked[2:4], asked[4:]]
    assert make_traces(teacher(folder, data, rows=2)) == want and len(batches) == 4


def test_another_content_of_the_tools_file_does_not_continue_a_file(stand_in, folder, data, tmp_path):
    """The path alone does not say which tools were offered."""
    tools = tmp_path / "tools.json"
    tools.write_text(json.dumps([BIRTHPLACE.schema]))
    own = teacher(folder, data, real_tools=str(tools))
    make_traces(own)
    make_traces(own)
    tools.write_text(json.dumps([BIRTHPLACE.schema], indent=1))
    with pytest.raises(InputError, match="was begun with another checkpoint, question file or tools file; choose"):
        make_traces(own)


@contextmanager
def piped(tmp_path, content):
    """The path of a pipe, such as <(zcat a.gz), which another thread fills once."""
    path = tmp_path / "63"
    os.mkfifo(path)
    thread = threading.Thread(target=path.write_bytes, args=(content,), daemon=True)
    thread.start()
    yield path
    thread.join()
    path.unlink()
    data_package.piped.clear()  # another process reads the next one


def with_gold(data, gold):
    """A question file whose right answers are all this one."""
    return "".join(json.dumps(line | {"answer": gold}) + "\n" for line in read_lines(data)).encode()


def test_two_pipes_of_one_name_get_their_own_scores(stand_in, folder, data, tmp_path):
    """All that the name of a pipe, its size and a second look at it could tell is the same for both."""
    for name, gold, right in (("a", "Velka", 1), ("b", "Suna", 1), ("c", "Nobody", 0)):
        with piped(tmp_path, with_gold(data, gold)) as path:
            row, = evaluate_files(config(folder, path, name=name))
        fresh = tmp_path / f"{name}.jsonl"
        fresh.write_bytes(with_gold(data, gold))
        want, = evaluate_files(config(folder, fresh, name=f"fresh-{name}"))
        assert row["em"] == want["em"] == right / 6 and (row["set"], row["n"]) == ("63", 6)


def test_stage_0_does_not_go_on_with_another_pipe_of_the_same_name(stand_in, folder, data, tmp_path):
    with piped(tmp_path, data.read_bytes()) as path:
        made = make_traces(teacher(folder, path))
    with piped(tmp_path, data.read_bytes()) as path:
        assert make_traces(teacher(folder, path)) == made
    with piped(tmp_path, with_gold(data, "Doka")) as path, pytest.raises(InputError, match="was begun with another checkpoint, question file or tools file"):
        make_traces(teacher(folder, path))


@pytest.fixture
def two_wiki(tmp_path):
    """The questions as 2Wiki's, all with the answer of the id Q1, and the file of aliases, which is not written yet."""
    path = tmp_path / "dev.json"
    path.write_text(json.dumps([{"_id": f"q{i}", "question": question[0], "answer": "Nobody", "answer_id": "Q1", "type": "inference",
                                 "context": [["T", ["One."]]]} for i, question in enumerate(QUESTIONS)]))
    return path, tmp_path / "id_aliases.json"


def test_aliases_that_are_added_between_count(stand_in, folder, two_wiki):
    path, aliases = two_wiki
    row, = evaluate_files(config(folder, path, name="before"))
    assert (row["em"], row["rule"]) == (0, "2wiki")
    aliases.write_text(json.dumps({"Q_id": "Q1", "aliases": ["Velka"], "demonyms": []}))
    row, = evaluate_files(config(folder, path, name="after"))
    assert (row["em"], row["rule"]) == (1 / 6, "2wiki_v1.1")


def test_stage_0_does_not_go_on_with_other_aliases(stand_in, folder, two_wiki):
    path, aliases = two_wiki
    make_traces(teacher(folder, path))
    aliases.write_text(json.dumps({"Q_id": "Q1", "aliases": ["Velka"], "demonyms": []}))
    with pytest.raises(InputError, match="was begun with another checkpoint, question file or tools file"):
        make_traces(teacher(folder, path))


def test_a_prompt_that_is_changed_between_counts(stand_in, folder, data, monkeypatch):
    """With it the model answers otherwise. Stage 0 does not mix traces of two prompts."""
    row, = evaluate_files(config(folder, data, name="before"))
    make_traces(teacher(folder, data))
    longer = replace(SHORT, actor=SHORT.actor + " Be brief.")
    monkeypatch.setattr("data.tokenizer.SHORT", longer)
    with pytest.raises(InputError, match=r"was begun with other prompts \(data/prompts.py\); choose another --out$"):
        make_traces(teacher(folder, data))
    monkeypatch.setattr("test_eval.QUESTIONS", [(*question[:3], say("Nobody"), "") for question in QUESTIONS])
    changed, = evaluate_files(config(folder, data, name="after"))
    assert row["em"] == 3 / 6 and changed["em"] == 0


def test_stage_2_depends_on_the_aliases_beside_its_questions(folder, two_wiki, monkeypatch, tmp_path, out):
    """config.json names the bytes of the model, the questions and the aliases."""
    path, aliases = two_wiki
    record = json.loads(path.read_text())[0]
    path.write_text(json.dumps([record | {"_id": f"{i}", "question": f"Who is {i}?"} for i in range(60)]))
    monkeypatch.setattr(grpo, "loop", lambda *_: None)
    monkeypatch.setattr(grpo.Simulator, "make_tools", lambda *_: None)
    finished_run(folder, out)
    shutil.rmtree(out / "grpo")
    start = out / "sft" / "model"
    for content in (None, ["Velka"], ["Doka"]):
        files = [path] if content is None else [path, aliases]
        if content is not None:
            aliases.write_text(json.dumps({"Q_id": "Q1", "aliases": content, "demonyms": []}))
        train = grpo.GRPOConfig(out=str(out), data=(str(path),), steps=1, questions=2, trace_tokens=256)
        grpo.train_grpo(train)
        begun = json.loads((out / "grpo" / "config.json").read_text())
        assert begun["sha256_of_model_and_data"] == fingerprint(start, *files)
        shutil.rmtree(out / "grpo")


def test_two_programs_do_not_write_to_one_file_of_traces(stand_in, folder, data):
    path = folder.parent / "traces.jsonl"
    with open(path, "a") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        locks.clear()
        with pytest.raises(InputError, match=f"^{path}: another program is writing there"):
            make_traces(teacher(folder, data))
    assert path.read_bytes() == b"" and make_traces(teacher(folder, data)).total() == 6


def test_more_samples_continue_the_file(stand_in, folder, data):
    """The second sample of each question is added. The report counts all traces of the file."""
    make_traces(teacher(folder, data))
    why = make_traces(teacher(folder, data, samples=2))
    lines = read_lines(folder.parent / "traces.jsonl")[1:]
    assert [line["sample"] for line in lines] == [0] * 6 + [1] * 6 and why.total() == 12


def test_equal_ids_of_two_files_are_two_questions(stand_in, folder, data, tmp_path):
    """The number of the file is a part of the id."""
    copy = tmp_path / "copy.jsonl"
    shutil.copy(data, copy)
    assert make_traces(teacher(folder, data, data=(str(data), str(copy)))).total() == 12
    ids = [line["id"] for line in read_lines(folder.parent / "traces.jsonl")[1:]]
    assert ids == [f"{number} q{i}" for number in range(2) for i in range(6)]


@pytest.mark.parametrize("name, value, message", [
    ("seed", 1, "seed 0, not 1"), ("temperature", 0.5, "temperature 1.0, not 0.5"),
    ("max_turns", 4, "max_turns 3, not 4"), ("turn_tokens", 99, "turn_tokens 1024, not 99"),
    ("trace_tokens", 4000, "trace_tokens 4096, not 4000"), ("grounded", True, "grounded False"),
    ("real_tools", "tools.json", "another checkpoint, question file or tools file"),
    ("data", "other", "another checkpoint, question file or tools file"),
    ("prompts", "other", r"other prompts \(data/prompts.py\)"),
    ("backend", "real", "backend 'simulated', not 'real'")])
def test_other_settings_do_not_continue_a_file(name, value, message, stand_in, folder, data,
                                               monkeypatch, tmp_path):
    """Otherwise the file would hold traces of two distributions."""
    monkeypatch.chdir(tmp_path)
    make_traces(teacher(folder, data))
    text = (folder.parent / "traces.jsonl").read_bytes()
    more = {name: value}
    if name == "real_tools" or name == "backend":
        Path("tools.json").write_text(json.dumps([BIRTHPLACE.schema]))
        more["real_tools"] = "tools.json"
    if name in ("backend", "prompts"):  # read_done alone: a real backend needs tools, so two settings differ
        first = json.loads(text.split(b"\n")[0])["settings"]
        with pytest.raises(InputError, match=message):
            read_done(folder.parent / "traces.jsonl", first | {name: value})
        return
    if name == "data":
        other = tmp_path / "other.jsonl"
        other.write_text(data.read_text().replace("yes", "no"))
        more = {"data": (str(other),)}
    with pytest.raises(InputError, match=f"traces.jsonl: was begun with {message}.*another --out"):
        make_traces(teacher(folder, data, **more))
    assert (folder.parent / "traces.jsonl").read_bytes() == text


def test_an_empty_file_is_a_new_file(tmp_path):
    (tmp_path / "traces.jsonl").touch()
    assert read_done(tmp_path / "traces.jsonl", {"seed": 1}) == {}
    assert json.loads((tmp_path / "traces.jsonl").read_text())["settings"] == {"seed": 1}


@pytest.mark.parametrize("content", [
    b"hello\n", b'{"settings": {}', b'{"conversations": []}\n', b"[]\n", b"3\n", b"\xff\n",
    b'{"settings": {}}\n{"id": "a"}\n', b'{"settings": {}}\n{"id": [], "sample": 0, "why": ""}\n',
    b'{"settings": 3}\n', b"[" * 10_000 + b"\n"])
def test_a_file_of_something_else_is_refused_and_kept(content, tmp_path):
    path = tmp_path / "traces.jsonl"
    path.write_bytes(content)
    with pytest.raises(InputError, match="was not written by this command; choose another --out"):
        read_done(path, {"seed": 0})
    assert path.read_bytes() == content


def test_a_cut_off_line_is_removed(tmp_path):
    path = tmp_path / "traces.jsonl"
    assert read_done(path, {"seed": 0}) == {}
    begun = path.read_bytes()
    assert begun == b'{"settings": {"seed": 0}, "conversations": []}\n'
    line = b'{"id": "0 a", "sample": 1, "why": "wrong answer"}\n'
    path.write_bytes(begun + line + line[:20])
    assert read_done(path, {"seed": 0}) == {("0 a", 1): "wrong answer"}
    assert path.read_bytes() == begun + line
    with pytest.raises(InputError, match="was begun with seed 0, not 1"):
        read_done(path, {"seed": 1})


def test_a_record_of_a_trace_has_the_ids_and_mask_of_the_rollout(stand_in, folder, data, tokenizer):
    """sft.py trains on the record of a kept trace. It has to see what the agent generated."""
    players, item = evaluate.Players(config(folder, data)), read_questions(data)[0][0]
    box = players.simulator.maker.make([item.text])[0]
    trace = agents.Trace(item.text, players.tools(item, box), (0,))
    agent = players.simulator.agent(players.policy, 1, 0.0)
    agents.run_episodes(agent, players.simulator.actor.answer, [trace])
    record = to_records(trace, box, agents.ToolActor.NO_RESULT)[0]
    again = sft.to_trace(record, tokenizer)
    assert (again.ids, again.mask) == (trace.ids, trace.mask) and trace.status == "answered"


@pytest.mark.parametrize("thought, want", [
    ("I look up Ed.", ""), ("It is Gus.", "answer in the first thought"), ("gustav", "")])
def test_a_first_thought_may_name_what_the_question_named(thought, want):
    item = Item("q", "Is Ed or Flo older?", ["Ed", "Gus"], "few", "common")
    turns = [agents.Turn(thought), agents.Turn("It is Gus.", answer="Ed")]
    trace = agents.Trace(item.text, turns=turns, status="answered")
    assert why_not(trace, item) == want


@pytest.mark.parametrize("said, want", [
    (["<tool_call>{'name': 'f'}", "<think>t</think>Ed"], "a turn without a thought"),
    (["<think>t</think>I do. <tool_call>{'name': 'f'}", "Ed"], "a turn without a thought"),
    (["<think> </think><tool_call>{}</tool_call>", "Ed"], "refused call: a call has name and argume"),
    (["<think>t<tool_call>{'name': 'f'}", "<think>u</think>Ed"], "")])
def test_a_loose_trace_is_kept_if_each_turn_has_a_thought(said, want):
    """A kept trace is written anew in the strict form, which begins with a thought."""
    turns = [agents.parse_turn(text, plain_answer=True) for text in said]
    assert all(turn.departures for turn in turns)
    trace = agents.Trace("Who?", turns=turns, status="answered")
    assert why_not(trace, Item("q", "Who?", ["Ed"], "few", "common")) == want


def test_a_question_that_is_too_long_is_a_reason():
    item = Item("q", "Who?", ["Ed"], "few", "common")
    trace = agents.Trace(item.text, status="truncated")
    assert why_not(trace, item) == "the question is too long"


def test_the_fallback_and_failed_simulations_are_not_taught():
    lookup = agents.FALLBACK
    call = agents.Call("lookup", {"subject": "a", "property": "b"},
                       observation=agents.ToolActor.NO_RESULT)
    trace = agents.Trace("Who?", [lookup], turns=[agents.Turn("t", [call])])
    records = to_records(trace, Toolbox("composition", [lookup], 0), agents.ToolActor.NO_RESULT)
    assert [record["role"] for record in records] == ["agent"]


def test_tools_with_code_are_not_taught_to_the_toolactor():
    """Neither a utility nor a user's tool. The ToolMaker's record holds its own tools only."""
    own = Tool("own", "A user's.", object_of(a=TEXT), object_of(), run=len)
    calls = [agents.Call("own", {"a": "x"}, observation={"result": 1}),
             agents.Call("count", {"items": []}, observation={"result": 0}),
             agents.Call("birthplace", {"person": "Bo"}, observation={"birthplace": "Velka"}),
             agents.Call("unknown", {}, error="unknown tool", observation={"error": "x"})]
    box = Toolbox("arithmetic", [BIRTHPLACE], 2, "So.", "not JSON")
    trace = agents.Trace("Who?", [*box.tools, own],
                         turns=[agents.Turn("t", calls), agents.Turn("u", answer="x")])
    agent, maker, actor = to_records(trace, box, agents.ToolActor.NO_RESULT)
    assert [tool["name"] for tool in agent["tools"]] == ["birthplace", "own"]
    assert "run" not in agent["tools"][1] and agent["kind"] == "arithmetic"
    assert [tool["name"] for tool in maker["tools"]] == ["birthplace"]
    assert (maker["thought"], maker["rejected"]) == ("So.", "not JSON")
    assert actor["tool"]["name"] == "birthplace"
    assert actor["exchanges"] == [[{"person": "Bo"}, {"birthplace": "Velka"}]]


@pytest.mark.parametrize("content, message", [
    ("", "nothing to learn"), ("{}", "line 1"), ('{"conversations": []}', "nothing to learn"),
    ('{"conversations": [{"role": "agent"}]}', "line 1"),
    ('{"conversations": [{"role": "x"}]}', "line 1")])
def test_a_file_that_stage_0_did_not_write_is_refused(content, message, tmp_path):
    (tmp_path / "t.jsonl").write_text(content)
    with pytest.raises(InputError, match=message) as error:
        read_kept(tmp_path / "t.jsonl")
    assert "\n" not in str(error.value)


# ------------------------------------------------------------------------------ chain, command line


def test_the_chain_runs_on_a_tiny_random_model(folder, tmp_path, monkeypatch):
    """A script writes the traces, because random weights give none to keep. The model itself runs
    through sft, grpo and eval.
    """
    monkeypatch.setattr(ToolMaker, "TRIES", 1)
    set_positions(folder)
    call = {"name": "birthplace", "arguments": {"person": "Bo"}}
    turns = [{"thought": "t", "calls": [call], "observations": [{"birthplace": "x"}]},
             {"thought": "t", "answer": "x"}]
    record = {"role": "agent", "question": "Who?", "kind": "comparison",
              "tools": [json.loads(BIRTHPLACE.definition)], "turns": turns}
    (tmp_path / "t.jsonl").write_text(json.dumps({"conversations": [record]}) + "\n")
    questions = tmp_path / "q.jsonl"
    questions.write_text("".join(json.dumps({"question": f"Who {i}?", "golden_answers": ["x"]})
                                 + "\n" for i in range(20)))
    out, before = str(tmp_path / "run"), load(folder)[0]
    sft.train_sft(sft.SFTConfig(out=out, model=str(folder), traces=str(tmp_path / "t.jsonl"),
                                steps=2, eval_every=1))
    after = load(Path(out) / "sft" / "model")[0]
    moved = [not a.equal(b)
             for a, b in zip(before.parameters(), after.parameters(), strict=True)]
    assert sum(moved) > len(moved) / 2
    grpo.train_grpo(grpo.GRPOConfig(out=out, data=(str(questions),), steps=1, questions=2, group=2,
                                    turn_tokens=8))
    row, = evaluate_files(EvalConfig(out=out, data=(str(questions),), turn_tokens=4))
    assert row["n"] == 20 and row["em"] == 0 and row["model"] == out
    assert row["backend"] == "simulated"
    with pytest.raises(InputError, match="choose another --out"):
        sft.train_sft(sft.SFTConfig(out=out, model=f"{out}/sft/model",
                                    traces=str(tmp_path / "t.jsonl")))
    assert (Path(out) / "sft" / "model" / "config.json").exists()


@pytest.mark.parametrize("words, culprit", [
    (["eval", "--model", "nowhere", "--data", "none.json"], "none.json"),
    (["eval", "--model", "nowhere", "--data", "{data}"], "nowhere"),
    (["eval", "--model", "{folder}"], "data"), (["eval", "--grounded"], "data"),
    (["eval", "--samples", "2"], "samples"),
    (["eval", "--model", "{folder}", "--data", "{data}", "--backend", "real"], "real-tools"),
    (["eval", "--out", "nowhere"], "nowhere"),
    (["eval", "--model", "{folder}", "--data", "{data}", "--real-tools", "none.py"], "none.py"),
    (["traces", "--data", "{data}"], "--model"), (["traces", "--model", "{folder}"], "--data"),
    (["traces", "--model", "{folder}", "--data", "{data}", "--no-tools"], "tools"),
    (["eval", "--model", "{folder}", "--data", "{data}", "--trace-tokens", "9000"], "trace_tokens"),
    (["eval", "--rows", "0"], "rows")])
def test_a_mistake_is_one_line_and_exit_code_2(words, culprit, folder, data, monkeypatch, capsys,
                                               tmp_path):
    monkeypatch.chdir(tmp_path)
    words = [word.format(data=data, folder=folder) for word in words]
    monkeypatch.setattr(sys, "argv", ["mtr.py", *words])
    with pytest.raises(SystemExit) as stop:
        run_main(mtr.main)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and culprit in error and error.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_the_table_and_the_report_are_printed(stand_in, folder, data, out, monkeypatch, capsys):
    shared = ["--model", str(folder), "--data", str(data), "--max-turns", "3"]
    traces = str(folder.parent / "t.jsonl")
    for words, texts in (
            (["eval", "--out", str(out), "--name", "mine"],
             ["musique", f"agent: {folder}; calls answered by: simulated\n1 traces per question"]),
            (["traces", "--out", traces, "--samples", "1"],
             ["kept 1 of 6 traces\n       1  wrong answer\n",
              f"next: python sft.py --model STUDENT --traces {traces} --out RUN"])):
        monkeypatch.setattr(sys, "argv", ["mtr.py", words[0], *shared, *words[1:]])
        mtr.main()
        printed = capsys.readouterr().out
        assert all(text in printed for text in texts), printed
    assert (out / "mine" / "few.json").exists()


def test_two_files_of_one_name_are_refused(stand_in, folder, data, tmp_path):
    """The results of the second would replace those of the first."""
    other = tmp_path / "elsewhere" / data.name
    other.parent.mkdir()
    other.write_bytes(data.read_bytes())
    with pytest.raises(InputError, match="^data: two files are named few; rename one$"):
        evaluate_files(EvalConfig(out=str(tmp_path), model=str(folder), data=(str(data), str(other))))
    assert not (tmp_path / "eval").exists()


def test_a_row_names_who_answered(stand_in, folder, data, tmp_path):
    row, = evaluate_files(config(folder, data, grounded=True, seed=3, out=str(tmp_path)))
    assert row["backend"] == "simulated, grounded" and row["seed"] == 3


@pytest.mark.parametrize("name", ["", "sft", "grpo", "heldout", "../x", "a/b"])
def test_a_result_takes_no_name_of_a_part_of_the_run(stand_in, folder, data, tmp_path, name):
    with pytest.raises(InputError, match="^name: expected a name"):
        evaluate_files(config(folder, data, name=name, out=str(tmp_path)))
    assert not (tmp_path.parent / "x").exists()
