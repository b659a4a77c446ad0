"""Evaluation on question files and stage 0, by a scripted model whose every row and reason can be told beforehand; then the
whole chain traces, sft, grpo, eval on a tiny random one."""
import json
import shutil
import sys
from pathlib import Path

import pytest
from test_agents import act, maker_text, object_of, say, scripted

import agents
import evaluate
import grpo
import mtr
import run as run_file
import sft
from agents import Tool, Toolbox, ToolMaker
from data import InputError
from data.read import Item, read_questions
from evaluate import EvalConfig, TracesConfig, evaluate_files
from model import load
from run import fingerprint

TEXT = {"type": "string"}
BIRTHPLACE = Tool("birthplace", "Where a person was born.", object_of(person=TEXT), object_of(birthplace=TEXT))
TOLD = "</tool_response>"
QUESTIONS = [  # question, gold, what the agent says in its first and its second turn, why stage 0 doesn't keep it
    ("Where was Bo born?", "Velka", act(("birthplace", {"person": "Bo"})), say(" velka."), ""),
    ("Where was Ada born?", "Doka", act(("birthplace", {"person": "Ada"})), say("in Velka"), "wrong answer"),
    ("Is Cy born?", "yes", "hello", "", "malformed: no thought"),
    ("Where was Di born?", "Suna", act(("birthplace", {"person": "Di"}), thought="It is Suna, I think."), say("Suna"),
     "answer in the first thought"),
    ("Is Ed or Flo older?", "Ed", act(("birthplace", {"who": "Ed"}), thought="Ed?"), say("Ed"), "refused call: "),
    ("Where was Gil born?", "Velka", act(("birthplace", {"person": "Gil"})), act(("birthplace", {"person": "Gil"})), "truncated: too many"),
]
BIRTHPLACE.parameters["additionalProperties"] = False


def replies(context):
    """Each role by its system prompt; the agent by the question and by whether it has been told something."""
    question = next((q for q in QUESTIONS if q[0] in context), None)
    if context.startswith("<|im_start|>system\n" + agents.ACTOR_SYSTEM):
        assert question is None, "the ToolActor was told the question"
        return json.dumps({"birthplace": "Velka"})
    if agents.MAKER_SYSTEM[:40] in context:
        return maker_text(BIRTHPLACE.definition)
    if context.endswith(agents.CLOSED_BOOK):
        return f" {question[1] if question[1] in ('yes', 'Ed') else 'x'}</answer>"
    return question[3] if TOLD in context else question[2]


@pytest.fixture
def stand_in(monkeypatch, folder, tokenizer):
    """A checkpoint folder that is loaded and then not asked: the script speaks. Gives the list of its samplers."""
    made = []

    def sampler(model, _, rows, slots):
        made.append(scripted(tokenizer, replies, rows))
        return made[-1]
    monkeypatch.setattr(grpo, "Sampler", sampler)
    roomy(folder)
    return made


def roomy(folder):
    """As many positions as a long prompt in few tokens needs."""
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 8000}))


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "few.jsonl"
    path.write_text("".join(json.dumps({"id": f"q{i}", "question": q, "answer": gold, "answer_aliases": [], "answerable": True, "paragraphs": [
        {"title": "T", "paragraph_text": "canary", "is_supporting": True, "idx": 0}]}) + "\n" for i, (q, gold, *_) in enumerate(QUESTIONS)))
    return path


def config(folder, data, **more):
    return EvalConfig(**{"out": "" if not folder else str(folder.parent / "out"), "model": str(folder), "data": (str(data),), "max_turns": 3, **more})


def test_a_row_by_hand(stand_in, folder, data):
    """Right: Bo, Di and Ed (velka. is Velka). "in Velka" has no word of Doka. Calls: Bo, Ada, Di one valid each, Ed an
    invalid one, Gil three. An unfinished trace is scored as an empty answer."""
    row, = evaluate_files(config(folder, data))
    assert (row["set"], row["rule"], row["n"], row["bad"]) == ("few", "musique", 6, 0)
    assert row["em"] == row["f1"] == 3 / 6 and 0 <= row["em_low"] < row["em"] < row["em_high"] <= 1
    assert row["grammar"] == 4 / 6 and row["calls"] == 7 / 6 and row["valid_calls"] == 6 / 7
    assert row["support"] == pytest.approx(1 / 6)  # Velka of Bo was told; "in Velka", Suna and Ed were not
    assert row["backend"] == f"simulated: {'/'.join(folder.parts[-2:])} {fingerprint(folder)[:8]}" and row["seconds"] > 0
    left = {path.suffix: path for path in (folder.parent / "out" / "eval").iterdir()}
    assert json.loads(left[".json"].read_text()) == row and len(left[".jsonl"].read_text().splitlines()) == 6
    said = [json.loads(line)["predicted_answer"] for line in left[".predictions"].read_text().splitlines()]
    assert said == ["velka.", "in Velka", "", "Suna", "Ed", ""]


def test_without_tools_the_answer_comes_at_once(stand_in, folder, data):
    row, = evaluate_files(config(folder, data, tools=False))
    assert row["em"] == 2 / 6 and row["calls"] == 0 and row["valid_calls"] is None and row["backend"] == "none"
    heard = [agent.tokenizer.decode(ids) for agent in stand_in for ids in agent.before]
    assert len(heard) == 6 and not any("<tools>" in text for text in heard)


def test_grounding_tells_the_toolactor_alone(stand_in, folder, data):
    for grounded in (True, False):
        stand_in.clear()
        row, = evaluate_files(config(folder, data, grounded=grounded))
        actor, agent = ([s.tokenizer.decode(ids) for ids in s.before] for s in stand_in)
        asked = [text for text in actor if agents.ACTOR_SYSTEM in text]
        assert len(asked) == 4 and all(("T: canary" in text) == grounded for text in asked)
        assert not any("canary" in text for text in agent) and row["backend"].endswith(" grounded") == grounded


def test_real_tools_take_the_place_of_simulated_ones(stand_in, folder, data, tmp_path):
    file = tmp_path / "mine.py"
    file.write_text('def born(person):\n    return {"birthplace": {"Ada": "Doka"}.get(person, "?")}\n'
                    f'TOOLS = [({json.dumps(BIRTHPLACE.schema)}.copy(), born)]\n'.replace("false", "False"))
    for backend, head in (("simulated", "simulated: "), ("real", "real: ")):
        row, = evaluate_files(config(folder, data, real_tools=str(file), backend=backend, out=str(tmp_path / backend)))
        assert row["backend"].startswith(head) and row["backend"].endswith(f"real: {file} {fingerprint(file)[:8]}")
        stories = [json.loads(line)["story"] for path in (tmp_path / backend / "eval").glob("*.jsonl") for line in open(path)]
        assert 'observes  {"birthplace": "Doka"}' in stories[1] and not any('"birthplace": "Velka"' in s for s in stories)


# ------------------------------------------------------------------------------------------- going on


def test_a_stopped_evaluation_goes_on_where_it_was(stand_in, folder, data, monkeypatch):
    """Stopped inside the second of three batches, the last line half written: what was done isn't asked again."""
    whole, = evaluate_files(config(folder, data, out=str(folder.parent / "whole")))
    real, batches = grpo.run_episodes, []

    def stop(*args, **more):
        batches.append(len(args[2]))
        if len(batches) == 2:
            raise KeyboardInterrupt
        return real(*args, **more)
    monkeypatch.setattr(evaluate, "run_episodes", stop)
    with pytest.raises(KeyboardInterrupt):
        evaluate_files(config(folder, data, rows=2))
    path, = (folder.parent / "out" / "eval").iterdir()
    assert len(path.read_text().splitlines()) == 2
    with open(path, "a") as file:
        file.write('{"by": "few')
    row, = evaluate_files(config(folder, data, rows=2))
    assert batches == [2, 2, 2, 2] and {k: v for k, v in row.items() if k != "seconds"} == {k: v for k, v in whole.items() if k != "seconds"}
    again, = evaluate_files(config(folder, data, rows=2))
    assert batches == [2, 2, 2, 2] and again == row


def test_a_run_brings_its_limits_and_keeps_its_settings_apart(stand_in, folder, data):
    """A run of the size that stage 2 was told; greedy and sampled answers are never taken for each other."""
    out = folder.parent / "out"
    for part in ("sft", "grpo"):
        shutil.copytree(folder, out / part / "model")
        (out / part / "config.json").write_text(json.dumps({"seed": 0} if part == "sft" else {"max_turns": 2, "turn_tokens": 200}))
    for temperature in (0.0, 1.0):
        row, = evaluate_files(config("", data, out=str(out), model="", max_turns=None, temperature=temperature))
        assert row["em"] == 3 / 6 and row["calls"] == 6 / 6  # Gil is stopped a turn earlier
    assert len(list((out / "eval").glob("*.jsonl"))) == 2 and row["model"].startswith("grpo/model ")
    row, = evaluate_files(config("", data, out=str(out), model="", max_turns=3))
    assert row["calls"] == 7 / 6


def test_other_settings_or_other_questions_are_no_continuation(stand_in, folder, data):
    """Each has a file of its own; stage 0, whose file the user names, refuses to mix."""
    evaluate_files(config(folder, data))
    evaluate_files(config(folder, data, temperature=1.0, samples=2))
    evaluate_files(config(folder, data, temperature=1.0, samples=3))
    data.write_text(data.read_text().replace("yes", "no"))
    evaluate_files(config(folder, data))
    paths = sorted((folder.parent / "out" / "eval").glob("*.jsonl"))
    assert sorted(len(path.read_text().splitlines()) for path in paths) == [6, 6, 18]
    path = folder.parent / "traces.jsonl"
    teach = dict(out=str(path), model=str(folder), data=(str(data),))
    evaluate.make_traces(TracesConfig(**teach, samples=1))
    for other in (dict(seed=1), dict(temperature=0.5)):
        with pytest.raises(InputError, match="other settings"):
            evaluate.make_traces(TracesConfig(**teach, samples=1, **other))
    path.write_text("hello\n")
    with pytest.raises(InputError, match="line 1"):
        evaluate.make_traces(TracesConfig(**teach))
    assert path.read_text() == "hello\n"


# --------------------------------------------------------------------------------------------- stage 0


def test_stage_0_keeps_what_is_right_and_says_why_the_rest_is_not(stand_in, folder, data, tokenizer):
    path = folder.parent / "traces.jsonl"
    why = evaluate.make_traces(TracesConfig(out=str(path), model=str(folder), data=(str(data),), samples=2, max_turns=3))
    assert sum(why.values()) == 12 and all(n == 2 for n in why.values())
    for want, got in zip((q[4] for q in QUESTIONS), why, strict=True):
        assert got.startswith(want) and bool(got) == bool(want)
    records, valid = sft.read_traces(str(path))
    assert {role: len(part) for role, part in records.items()} == {"agent": 1, "maker": 1, "actor": 1} and not any(valid.values())
    for role, said in (("agent", "<answer> velka.</answer>"), ("maker", BIRTHPLACE.definition), ("actor", '{"birthplace": "Velka"}')):
        trace = sft.to_trace(records[role][0], tokenizer)
        assert said in tokenizer.decode([i for i, m in zip(trace.ids, trace.mask) if m])


def test_a_record_of_a_trace_is_learned_as_it_was_led(stand_in, folder, data, tokenizer):
    """What sft trains on of a kept trace has the ids and the mask that the rollout had."""
    cast, item = evaluate.Players(config(folder, data)), read_questions(data)[0][0]
    cast.boxes = {item.id: cast.stage.maker.make([item.text])[0]}
    trace = agents.Trace(item.text, cast.tools(item), (0,))
    agents.run_episodes(cast.stage.agent(cast.model, 1, 0.0), cast.stage.actor, [trace])
    record = evaluate.to_records(trace, cast.boxes[item.id])[0]
    again = sft.to_trace(record, tokenizer)
    assert (again.ids, again.mask) == (trace.ids, trace.mask)


@pytest.mark.parametrize("thought, want", [("I look up Ed.", ""), ("It is Gus.", "answer in the first thought"), ("gustav", "")])
def test_a_first_thought_may_name_what_the_question_named(thought, want):
    item = Item("q", "Is Ed or Flo older?", ["Ed", "Gus"], "few", "common")
    trace = agents.Trace(item.text, turns=[agents.Turn(thought), agents.Turn("It is Gus.", answer="Ed")], status="answered")
    assert evaluate.why_not(trace, item) == want


def test_the_fallback_and_failed_simulations_are_not_taught():
    lookup = agents.FALLBACK
    trace = agents.Trace("Who?", [lookup], turns=[agents.Turn("t", [agents.Call("lookup", {"subject": "a", "property": "b"},
                                                                                observation=agents.ToolActor.NO_RESULT)])])
    assert [record["role"] for record in evaluate.to_records(trace, Toolbox("composition", [lookup], 0))] == ["agent"]


@pytest.mark.parametrize("content, message", [("", "line 1"), ("{}", "line 1"), ('{"conversations": []}', "nothing to learn"),
                                              ('{"conversations": [{"role": "agent"}]}', "line 1"), ('{"conversations": [{"role": "x"}]}', "line 1")])
def test_a_file_that_stage_0_did_not_write_is_refused(content, message, tmp_path):
    (tmp_path / "t.jsonl").write_text(content)
    with pytest.raises(InputError, match=message) as error:
        sft.read_traces(str(tmp_path / "t.jsonl"))
    assert "\n" not in str(error.value)


def test_every_twentieth_question_is_held_out_of_stage_1(tmp_path):
    def line(i):
        return json.dumps({"conversations": [{"role": "agent", "question": f"Q{i}?", "kind": "composition", "tools": [],
                                              "turns": [{"thought": f"t{j}", "answer": "x"}]} for j in range(2)]})
    (tmp_path / "t.jsonl").write_text("\n".join(line(i) for i in [*range(45), 3]))
    records, valid = sft.read_traces(str(tmp_path / "t.jsonl"))
    assert {r["question"] for r in valid["agent"]} == {"Q19?", "Q39?"} and len(valid["agent"]) == 4 and len(records["agent"]) == 86


# ------------------------------------------------------------------------------------- chain, command line


def test_the_chain_runs_on_a_tiny_random_model(folder, tmp_path, monkeypatch):
    """traces by a script, as random weights give none that could be kept; sft, grpo and eval by the model itself."""
    monkeypatch.setattr(ToolMaker, "TRIES", 1)
    roomy(folder)
    (tmp_path / "t.jsonl").write_text(json.dumps({"conversations": [
        {"role": "agent", "question": "Who?", "kind": "comparison", "tools": [json.loads(BIRTHPLACE.definition)], "turns": [
            {"thought": "t", "calls": [{"name": "birthplace", "arguments": {"person": "Bo"}}], "observations": [{"birthplace": "x"}]},
            {"thought": "t", "answer": "x"}]}]}) + "\n")
    (tmp_path / "q.jsonl").write_text("".join(json.dumps({"question": f"Who {i}?", "golden_answers": ["x"]}) + "\n" for i in range(20)))
    out, before = str(tmp_path / "run"), load(folder)[0]
    sft.train(sft.SFTConfig(out=out, model=str(folder), traces=str(tmp_path / "t.jsonl"), steps=2, eval_every=1))
    moved = [not a.equal(b) for a, b in zip(before.parameters(), load(Path(out) / "sft" / "model")[0].parameters())]
    assert sum(moved) > len(moved) / 2
    grpo.train(grpo.GRPOConfig(out=out, data=(str(tmp_path / "q.jsonl"),), steps=1, questions=2, group=2, turn_tokens=8))
    row, = evaluate_files(EvalConfig(out=out, data=(str(tmp_path / "q.jsonl"),), turn_tokens=4))
    assert row["n"] == 20 and row["em"] == 0 and row["model"].startswith("grpo/model ") and "sft/model" in row["backend"]
    with pytest.raises(InputError, match="give another --out"):
        sft.train(sft.SFTConfig(out=out, model=f"{out}/sft/model"))
    assert (Path(out) / "sft" / "model" / "config.json").exists()


@pytest.mark.parametrize("words, culprit", [
    (["eval", "--model", "nowhere", "--data", "none.json"], "none.json"), (["eval", "--model", "nowhere", "--data", "{data}"], "nowhere"),
    (["eval", "--model", "{folder}"], "data"), (["eval", "--grounded"], "data"), (["eval", "--samples", "2"], "samples"),
    (["eval", "--model", "{folder}", "--data", "{data}", "--backend", "real"], "real-tools"), (["eval", "--out", "nowhere"], "nowhere"),
    (["eval", "--model", "{folder}", "--data", "{data}", "--real-tools", "none.py"], "none.py"), (["traces", "--data", "{data}"], "--model"),
    (["traces", "--model", "{folder}"], "--data"), (["eval", "--rows", "0"], "rows")])
def test_a_mistake_is_one_line_and_exit_code_2(words, culprit, folder, data, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["mtr.py", *(word.format(data=data, folder=folder) for word in words)])
    with pytest.raises(SystemExit) as stop:
        run_file.run_main(mtr.main)
    said = capsys.readouterr().err
    assert stop.value.code == 2 and culprit in said and said.count("\n") == 1 and not (tmp_path / "run").exists()


def test_the_table_and_the_report_are_printed(stand_in, folder, data, monkeypatch, capsys):
    for words, want in ((["eval", "--out", str(folder.parent / "out")], "musique"), (
            ["traces", "--out", str(folder.parent / "t.jsonl"), "--samples", "1"], "kept 1 of 6 traces")):
        monkeypatch.setattr(sys, "argv", ["mtr.py", words[0], "--model", str(folder), "--data", str(data), "--max-turns", "3", *words[1:]])
        mtr.main()
        assert want in capsys.readouterr().out
