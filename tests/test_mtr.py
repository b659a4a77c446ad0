"""The programs as a user runs them: every command at toy size, help, mistakes, reports.

Also: gold answers reach no prompt and change no trace.
"""
import csv
import json
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from test_docs import commands

import agents
import evaluate
import grpo
import mtr
import report
import run as run_file
import sft
from data import InputError, tables
from data.conversations import write_sample
from data.folders import locks
from data.options import run_main
from data.own import story
from data.prompts import SHORT
from data.tokenizer import CHAT_TEMPLATE, Tokenizer
from data.world import HELD_OUT, make_questions, make_world, tools_for
from model import load, save_model
from sft import SFT_COLUMNS

ROOT = Path(__file__).resolve().parents[1]
ROWS = ["untrained", "sft", "grpo", "grpo_real", "grpo_blanked"]
CONTROLS = ["majority", "closed_book", "sft_continued", "sft_blanked", "sft_shuffled",
            "grpo_shuffled"]


FIELDS = {"row", "n", "em_greedy", "em_sampled", "f1", "grammar", "valid_calls", "failed_calls",
          "clean_turns", "support", "calls", "length", "by_set"}


def program(*words, cwd=ROOT):
    """Run a program as a user runs it, on one thread."""
    return subprocess.run([sys.executable, *map(str, words)], cwd=cwd, capture_output=True,
                          text=True, env={"OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin"})


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished toy run and the text that it printed."""
    out = tmp_path_factory.mktemp("toy") / "run"
    done = program("mtr.py", "--toy", "--out", out, "--threads", 1)
    assert done.returncode == 0, done.stderr[-2000:]
    return out, done.stdout


# --------------------------------------------------------------------------------------- whole run


def test_a_run_leaves_what_the_readme_promises(run):
    out, _ = run
    for name in ("results.json", "story.txt", "curves.png", "sft/config.json", "sft/metrics.csv",
                 "grpo/metrics.csv", "grpo/traces.jsonl", "sft/model/model.safetensors",
                 "grpo/model/tokenizer_config.json"):
        assert (out / name).stat().st_size > 0, name
    assert not (out / "sft_continued").exists()


def test_results_hold_every_row_and_field(run):
    results = json.loads((run[0] / "results.json").read_text())
    assert [row["row"] for row in results["rows"]] == ROWS
    assert set(results) == {"seed", "seconds", "trained_by", "actor_recall", "actor_fidelity", "maker", "rows"}
    assert set(results["maker"]) == {"valid", "exact", "accepted", "regenerated", "fallback"}
    for row in results["rows"]:
        assert set(row) == FIELDS
        assert set(row["by_set"]) <= set(HELD_OUT)


def test_the_screen_ends_with_the_table_and_a_story(run):
    """A row stands in both tables, and once with its meaning."""
    heads = re.findall(r"^(\d)/(\d)  (\w+)", run[1], re.M)
    assert heads == [("1", "3", "SFT"), ("2", "3", "GRPO"), ("3", "3", "evaluation")]
    table = run[1][run[1].index("3/3"):]
    assert all(len(re.findall(rf"^{row} ", table, re.M)) == 3 for row in ROWS)
    assert not any(re.search(rf"^{row} ", table, re.M) for row in CONTROLS)
    assert "before GRPO" in table or "No held-out question" in table


@pytest.mark.parametrize("stage, columns", [("sft", SFT_COLUMNS), ("grpo", grpo.GRPO_COLUMNS)])
def test_metrics_have_the_columns_that_the_docs_define(run, stage, columns):
    with open(run[0] / stage / "metrics.csv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert rows and list(rows[0]) == columns and len(set(columns)) == len(columns)
    page = (ROOT / "docs" / "columns.md").read_text(encoding="utf-8")
    missing = [c for c in columns
               if f"`{c}`" not in page and not c.startswith("time_") and c != "step"]
    assert not missing


def test_traces_have_ids_and_mask_of_one_length(run):
    for line in (run[0] / "grpo" / "traces.jsonl").read_text(encoding="utf-8").splitlines():
        trace = json.loads(line)
        assert len(trace["ids"]) == len(trace["mask"]) > sum(trace["mask"]) > 0


def test_ask_and_show_work_on_a_finished_run(run):
    asked = program("mtr.py", "ask", "Who is the mayor of Tili?", "--out", run[0])
    assert asked.returncode == 0 and "ToolMaker:" in asked.stdout and "AutoAgent" in asked.stdout
    shown = program("mtr.py", "show", "--out", run[0])
    assert shown.returncode == 0 and "grpo_real" in shown.stdout


@pytest.fixture(scope="module")
def two_models(run, tmp_path_factory):
    """A copy of the run in which the model of GRPO differs from that of SFT. A toy learns nothing,
    so GRPO left it as it was.
    """
    out = tmp_path_factory.mktemp("two") / "run"
    shutil.copytree(run[0], out)
    model, tokenizer = load(out / "sft" / "model")
    save_model(model.init_weights(5), tokenizer, out / "grpo" / "model")
    return out


@pytest.mark.parametrize("stage", ["sft", "grpo"])
def test_ask_prints_the_greedy_traces_of_the_evaluation(two_models, stage, capsys):
    """The story is made of these traces, and ends with the commands that ask again. Tools, turns
    and even the text of a malformed turn are the same.
    """
    config = json.loads((two_models / "grpo" / "config.json").read_text())
    config = grpo.GRPOConfig(**{f.name: config[f.name] for f in fields(grpo.GRPOConfig)})
    questions = [q for q in make_questions(make_world(0)) if q.set in HELD_OUT][::70]
    simulator = grpo.Simulator(two_models / "sft" / "model", config)
    simulator.make_tools(questions)
    policy, tokenizer = load(two_models / stage / "model")
    agent = simulator.agent(policy, len(questions), 0.0)
    traces = grpo.score_heldout(simulator, agent, questions)[1]["greedy"]
    for q, trace in zip(questions, traces, strict=True):
        capsys.readouterr()
        mtr.ask(mtr.AskConfig(out=str(two_models), stage=stage, question=q.text))
        tools, lines = capsys.readouterr().out.split("\nAutoAgent and ToolActor:\n")
        want = story(trace).splitlines()
        last = trace.turns[-1]
        if not last.calls and last.answer is None:
            said = trace.ids[len(trace.ids) - trace.mask[::-1].index(0):]
            want.append(f"  the turn  {tokenizer.decode(said)!r}")
        assert lines.splitlines() == want
        named = re.findall(r"^  (\w+)\(.* -> ", tools, re.M)
        assert named == [tool.name for tool in trace.tools]
    assert len(traces) == 3


def test_an_unknown_word_is_named_before_anything_is_asked(run, command):
    """A question in words of this world is answered, whatever it asks."""
    for question in ("Who is the mayor of Paris?", "Is tili large?"):
        code, out, err = command("mtr.py", "ask", question, "--out", str(run[0]))
        first, *examples = err.splitlines()
        assert (code, out) == (2, "") and len(examples) == 3
    assert first == ("mtr.py: question: not in this run's world: Is (it is written is), tili (it is "
                     "written Tili), large. Three questions to try:")
    held_out = {q.text for q in make_questions(make_world(0)) if q.set in HELD_OUT}
    assert {json.loads(example) for example in examples} <= held_out


def test_controls_add_their_rows_to_a_finished_run(run, tmp_path, capsys):
    """The five rows stay as they are. A resumed run keeps the controls that it has."""
    out = tmp_path / "run"
    shutil.copytree(run[0], out)
    before = json.loads((out / "results.json").read_text())
    done = program("mtr.py", "--toy", "--controls", "--resume", "--out", out, "--threads", 1)
    assert done.returncode == 0, done.stderr[-2000:]
    heads = re.findall(r"^(\d)/(\d)  ", done.stdout, re.M)
    assert heads == [(number, "4") for number in "1234"]
    results = json.loads((out / "results.json").read_text())
    assert [row["row"] for row in results["rows"]] == ROWS + CONTROLS
    assert results["rows"][:5] == before["rows"]
    for row in results["rows"]:
        assert set(row) == FIELDS
    assert (out / "sft_continued" / "model" / "config.json").exists()
    assert set(results["seconds"]) == {"sft", "grpo", "sft_continued", "evaluation", "total"}
    mtr.run_all(mtr.RunConfig(out=str(out), toy=True, threads=1, resume=True))
    assert "\ngrpo_shuffled " in capsys.readouterr().out
    assert json.loads((out / "results.json").read_text()) == results
    mtr.run_all(mtr.RunConfig(out=str(out), toy=True, threads=1, resume=True, controls=True))
    assert json.loads((out / "results.json").read_text()) == results


def test_the_same_seed_gives_the_same_weights(run, tmp_path):
    flags = []
    for name, value in mtr.TOY_OPTIONS["sft"].items():
        flags += [f"--{name.replace('_', '-')}", value]
    done = program("sft.py", "--out", tmp_path, "--threads", 1, *flags)
    assert done.returncode == 0, done.stderr
    first, again = (load(folder / "sft" / "model")[0] for folder in (run[0], tmp_path))
    pairs = zip(first.parameters(), again.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_stage_2_starts_from_the_stage_1_of_another_run(run, tmp_path):
    """With the same options it writes the same traces and weights. A second start is refused. The
    run can be shown and compared, and mtr.py --resume adds its evaluation.
    """
    other = tmp_path / "other"
    words = ["grpo.py", "--sft", run[0] / "sft", "--out", other, "--threads", 1]
    for name, value in mtr.TOY_OPTIONS["grpo"].items():
        words += [f"--{name.replace('_', '-')}", value]
    done = program(*words)
    assert done.returncode == 0, done.stderr
    assert f": python mtr.py show --out {other}\n" in done.stdout
    traces = [(folder / "grpo" / "traces.jsonl").read_text() for folder in (run[0], other)]
    assert traces[0] == traces[1]
    first, again = (load(folder / "grpo" / "model")[0] for folder in (run[0], other))
    pairs = zip(first.parameters(), again.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    refused = program(*words)
    assert refused.returncode == 2 and "sft exists already" in refused.stderr
    shown = program("mtr.py", "show", "--out", other, "--step", 1)
    assert shown.returncode == 0 and shown.stdout.count("  advantage ") == 2 * 2
    compared = program("mtr.py", "compare", run[0], other)
    assert compared.returncode == 0 and "\ngrpo sft  -  " in compared.stdout
    mtr.run_all(mtr.RunConfig(out=str(other), toy=True, threads=1, resume=True))
    rows = [json.loads((folder / "results.json").read_text())["rows"] for folder in (run[0], other)]
    assert rows[0] == rows[1]


def test_resume_repeats_no_finished_stage(run, capsys):
    """With results.json nothing is repeated. Without it the evaluation runs again, with the same
    results.
    """
    out, results = run[0], json.loads((run[0] / "results.json").read_text())
    files = {path: path.stat().st_mtime_ns for stage in ("sft", "grpo")
             for path in (out / stage).rglob("*")}
    mtr.run_all(mtr.RunConfig(out=str(out), toy=True, threads=1, resume=True))
    printed = capsys.readouterr().out
    assert json.loads((out / "results.json").read_text()) == results
    assert printed[printed.index("\nrow"):] == run[1][run[1].index("\nrow"):]
    assert "3/3" not in printed
    (out / "results.json").unlink()
    locks.clear()  # as if the program had ended
    done = program("mtr.py", "--toy", "--resume", "--out", out, "--threads", 1)
    assert done.returncode == 0, done.stderr[-2000:]
    assert files == {path: path.stat().st_mtime_ns for path in files}
    again = json.loads((out / "results.json").read_text())
    assert all(again[name] == results[name] for name in results if name != "seconds")
    # Results of other models than those in the folder are no results of this run.
    (out / "results.json").write_text(json.dumps(again | {"trained_by": "others", "rows": []}))
    mtr.run_all(mtr.RunConfig(out=str(out), toy=True, threads=1, resume=True))
    assert json.loads((out / "results.json").read_text())["rows"] == results["rows"]


def test_gold_answers_reach_no_prompt_and_change_no_trace(run):
    """Every gold is replaced by a rare string after the data are made. The traces stay the same."""
    config = grpo.GRPOConfig(out=str(run[0]), turn_tokens=40, max_turns=3, group=2)
    world = make_world(0)
    questions = [q for q in make_questions(world) if q.set in HELD_OUT][:4]
    prompts = []

    def roll_out(asked):
        with world.sealed():
            simulator = grpo.Simulator(run[0] / "sft" / "model", config)
            encode = simulator.tokenizer.encode

            def spy(pieces):
                prompts.append("".join(pieces))
                return encode(pieces)
            simulator.tokenizer.encode = spy
            simulator.make_tools(asked)
            model, _ = load(run[0] / "grpo" / "model", run_file.pick_device())
            traces = simulator.traces(asked, config.group, 0)
            agents.run_episodes(simulator.agent(model, 8, 1.0), simulator.actor.answer, traces,
                                config.group)
            _, answered = grpo.score_heldout(simulator, simulator.agent(model, 3, 0.0), asked)
            heldout = answered["sampled"]
            assert len(traces) == 8 and len(heldout) == 4
            return [trace.ids for trace in [*traces, *heldout]]

    canary = "Qxzzy canary"
    assert roll_out(questions) == roll_out([replace(q, golds=[canary], chain=(canary,))
                                            for q in questions])
    assert prompts and not any("Qxzzy" in text for text in prompts)


def test_the_chat_template_is_saved_with_the_checkpoint(run):
    folder = run[0] / "grpo" / "model"
    config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    assert config["chat_template"] == CHAT_TEMPLATE.read_text(encoding="utf-8")
    assert Tokenizer(folder).stop_ids and Tokenizer(folder).prompts is SHORT


# ---------------------------------------------------------------------------- command line, README


PROGRAMS = {"mtr.py": mtr, "sft.py": sft, "grpo.py": grpo}


@pytest.fixture
def command(monkeypatch, capsys, tmp_path):
    """A program in this process, in an empty folder -> exit code, stdout, stderr."""
    monkeypatch.chdir(tmp_path)

    def run(name, *words):
        monkeypatch.setattr(sys, "argv", [name, *words])
        with pytest.raises(SystemExit) as stop:
            run_main(PROGRAMS[name].main)
        return stop.value.code, *capsys.readouterr()
    return run


@pytest.mark.parametrize("name", PROGRAMS)
def test_help_teaches(name, command):
    code, out, err = command(name, "--help")
    assert (code, err) == (0, "") and "--seed" in out and len(out) > 800


MISTAKES = [
    (["mtr.py", "--sed", "1"], "--sed"), (["mtr.py", "--seed", "one"], "one"),
    (["mtr.py", "show", "--out", "nowhere"], "nowhere"),
    (["mtr.py", "ask", "--out", "nowhere", "Who?"], "nowhere"),
    (["grpo.py", "--out", "nowhere"], "nowhere"), (["sft.py", "--steps", "0"], "steps"),
    (["grpo.py", "--loss", "ppo"], "ppo"), (["mtr.py", "train"], "train"),
    (["sft.py", "--out", "/proc/nowhere", "--worlds", "1"], "/proc/nowhere"),
    (["grpo.py", "--w-answer", "0.1"], "w_answer"),
    # Numbers out of range.
    (["mtr.py", "--seed", "-1"], "seed: expected a number of at least 0, found -1"),
    (["mtr.py", "--seed", "9" * 16], "seed: expected a number of at least 0, found 9999999999"),
    (["mtr.py", "ask", "--temperature", "-1", "Who?"],
     "temperature: expected a number of at least 0"),
    (["mtr.py", "eval", "--max-turns", "0"], "max_turns: expected a number above 0, found 0"),
    # Abbreviated options, and options in front of the command.
    (["mtr.py", "--see", "1"], "--see"), (["mtr.py", "ask", "--mod", "x", "Who?"], "--mod"),
    (["sft.py", "--step", "1"], "--step"),
    (["mtr.py", "--seed", "1", "show"], "--seed: put options after show"),
    (["mtr.py", "ask", "--stage", "dpo", "Who?"], "dpo"),
    (["mtr.py", "ask", "--stage", "sft", "--model", "nowhere", "Who?"], "stage"),
    (["mtr.py", "ask"], "question"), (["mtr.py", "ask", " "], "question: it is empty"),
    (["mtr.py", "ask", "--samples", "2", "Who?"], "samples: greedy answers are all equal"),
    (["mtr.py", "show", "--step", "0"], "run/grpo/traces.jsonl: no such file"),
    (["mtr.py", "show", "--trace", "x"], "--trace"),
    (["mtr.py", "compare", "nowhere", "."], "no run in nowhere"),
    (["grpo.py", "--sft", "nowhere"], "sft: no trained model in nowhere")]


@pytest.mark.parametrize("words, culprit", MISTAKES, ids=lambda value: str(value)[:40])
def test_a_mistake_is_one_line_and_exit_code_2(words, culprit, command, tmp_path):
    code, _, err = command(*words)
    assert code == 2 and not list(tmp_path.iterdir())
    assert err.startswith(f"{words[0]}: ") and culprit in err and err.count("\n") == 1, err


@pytest.mark.parametrize("words, culprit", [MISTAKES[i] for i in (2, 4, 5)], ids=lambda value: str(value)[:40])
def test_each_program_ends_with_one_line_as_a_process(words, culprit):
    done = program(*words)
    assert done.returncode == 2 and culprit in done.stderr, done.stderr
    assert done.stderr.count("\n") == 1, done.stderr


def test_a_toy_run_has_its_own_folder():
    """--toy writes to `toy`, unless the user names a folder."""
    assert mtr.RunConfig(toy=True).out == "toy" and mtr.RunConfig().out == "run"
    assert mtr.RunConfig(toy=True, out="mine").out == "mine"


def test_a_finished_run_is_not_repeated_without_resume(run):
    results = (run[0] / "results.json").stat().st_mtime_ns
    with pytest.raises(InputError, match="/run: holds a run; continue it with --resume"):
        mtr.run_all(mtr.RunConfig(out=str(run[0]), toy=True))
    assert (run[0] / "results.json").stat().st_mtime_ns == results


def test_a_finished_stage_is_not_prepared_again(run, monkeypatch):
    """--resume skips it before it makes conversations or tools."""
    def fail(*_, **__):
        raise AssertionError("a finished stage was prepared")
    monkeypatch.setattr(sft, "teach", fail)
    monkeypatch.setattr(grpo.Simulator, "make_tools", fail)
    shared = {"out": str(run[0]), "threads": 1, "resume": True}
    config = sft.SFTConfig(**shared, **mtr.TOY_OPTIONS["sft"])
    sft.train_sft(config)
    grpo.train_grpo(grpo.GRPOConfig(**shared, **mtr.TOY_OPTIONS["grpo"]))


def test_the_readme_has_the_two_commands():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for command in ("pip install -r requirements.txt && python mtr.py",
                    "pip install -r requirements.txt && pytest"):
        assert f"\n    {command}\n" in readme


def test_the_committed_sample_is_what_the_code_makes(tmp_path):
    write_sample(tmp_path)
    for path in (ROOT / "data" / "sample").glob("*.jsonl"):
        made = (tmp_path / path.name).read_text(encoding="utf-8")
        assert path.read_text(encoding="utf-8") == made
    committed = list((ROOT / "data" / "sample").iterdir())
    assert len(list(tmp_path.iterdir())) == len(committed) == 5


# ------------------------------------------------------------------------------- scores and reports


def test_the_shares_of_the_toolmaker_by_hand():
    """Four questions: accepted at once; at the second try; other tools than the teacher's; the
    fallback.
    """
    questions = [q for q in make_questions(make_world(0))
                 if len(q.steps) == 2 and q.steps[0][0] == "mayor"][:4]
    right = [agents.check_tools(tools_for(q)) for q in questions]
    boxes = [agents.Toolbox("composition", right[0], 1),
             agents.Toolbox("composition", right[1], 2),
             agents.Toolbox("composition", right[2][:1], 1),
             agents.Toolbox("composition", [agents.FALLBACK], 0)]
    by_id = {q.id: box for q, box in zip(questions, boxes, strict=True)}
    shares = evaluate.maker_shares(by_id, questions)
    assert shares == {"valid": 0.5, "exact": 0.5, "accepted": 0.75, "regenerated": 0.25,
                      "fallback": 0.25}


def test_tools_of_another_kind_are_not_exact():
    """The same tools with another kind come with other utility tools."""
    question = next(q for q in make_questions(make_world(0)) if q.kind == "composition")
    box = agents.Toolbox("arithmetic", agents.check_tools(tools_for(question)), 1)
    assert evaluate.maker_shares({question.id: box}, [question])["exact"] == 0
    box.kind = "composition"
    assert evaluate.maker_shares({question.id: box}, [question])["exact"] == 1


def test_the_fidelity_of_the_toolactor_by_hand():
    """One true and one false observation. A refused call and a utility's result don't count."""
    world = make_world(0)
    city = world.names["city"][0]
    true = {"mayor": world.facts["mayor", city]}
    calls = [agents.Call("mayor", {"city": city}, observation=true),
             agents.Call("country", {"city": city}, observation={"country": "Nowhere"}),
             agents.Call("mayor", {"town": city}, error="wrong", observation={"error": "wrong"}),
             agents.Call("compare", {}, observation={"result": "x"})]
    trace = agents.Trace(turns=[agents.Turn(calls=calls)])
    assert evaluate.actor_fidelity([trace], world) == 0.5


def test_the_recall_of_the_toolactor_by_hand(monkeypatch):
    """Every fact is asked once, with the teacher's tools, and never from the run's own memo."""
    world = make_world(0)
    asked = []

    def answer(actor, requests):
        asked.extend((tool.name, arguments) for tool, arguments in requests)
        assert actor.sampler == "sampler" and not actor.memo
        true = [{name: world.facts[name, *arguments.values()]} for name, arguments in asked]
        return true[:len(true) // 2] + [{"error": "no"}] * (len(true) - len(true) // 2)
    monkeypatch.setattr(agents.ToolActor, "answer", answer)
    actor = agents.ToolActor("sampler")
    actor.memo["an"] = {"old": "answer"}
    recall = evaluate.actor_recall(SimpleNamespace(actor=actor), world)
    assert len(asked) == len(world.facts) and recall == len(asked) // 2 / len(asked)


def test_the_majority_row_by_hand():
    """The most common training answer is Bo. One of the two held-out questions has it."""
    base = make_questions(make_world(0))[0]
    cases = [("Bo", "train"), ("Bo", "train"), ("Al", "train"), ("bo", "hotpot"), ("Al", "musique")]
    questions = [replace(base, id=str(i), golds=[gold], set=name)
                 for i, (gold, name) in enumerate(cases)]
    row = evaluate.majority(questions, questions[3:])
    assert row["em_greedy"] == row["em_sampled"] == row["f1"] == 0.5
    assert row["by_set"] == {"hotpot": 1.0, "musique": 0.0}


def test_a_table_is_aligned(capsys):
    """The first column is flush left, the others flush right. No value is printed as -."""
    rows = [{"row": "sft", "em": 0.12345, "n": 200, "more": 1}, {"row": "majority", "em": None}]
    tables.print_table(rows, {"row": "row", "em": "sampled", "n": "n"})
    assert capsys.readouterr().out == ("row       sampled    n\n"
                                       "sft         0.123  200\n"
                                       "majority        -    -\n")


def answering(questions, *right):
    """A trace for each question, with the right answer or with "no"."""
    made = []
    for i, (q, ok) in enumerate(zip(questions, right, strict=True)):
        turn = agents.Turn(f"Thought {i}.", answer=q.golds[0] if ok else "no")
        made.append(agents.Trace(q.text, turns=[turn]))
    return made


def test_the_story_is_the_first_question_that_only_grpo_answers():
    """Both answers are greedy. The sampled ones are not looked at."""
    questions = make_questions(make_world(0))[:4]
    sampled = answering(questions, False, False, False, False)
    traces = {"sft": {"greedy": answering(questions, True, True, False, False), "sampled": sampled},
              "grpo": {"greedy": answering(questions, True, False, True, True), "sampled": sampled}}
    q = questions[2]
    assert report.before_and_after(questions, traces, "ASK") == (
        f"{q.text}   (right: {q.golds[0]})\n"
        "before GRPO\n  thinks    Thought 2.\n  answers   no\n"
        f"after GRPO\n  thinks    Thought 2.\n  answers   {q.golds[0]}\n"
        "These commands print the same traces:\n"
        f'  ASK --stage sft "{q.text}"\n  ASK --stage grpo "{q.text}"')
    traces["sft"]["greedy"] = answering(questions, True, True, True, True)
    none = report.before_and_after(questions, traces, "ASK")
    assert none == "No held-out question went from wrong to right."


def test_a_trace_without_an_answer_is_wrong_in_the_story():
    """A truncated trace has no turn or no answer."""
    q = make_questions(make_world(0))[0]
    cut = {"greedy": [agents.Trace(q.text, status="truncated")]}
    right = {"greedy": answering([q], True)}
    story = report.before_and_after([q], {"sft": cut, "grpo": right}, "")
    assert "before GRPO\n  truncated\nafter GRPO\n  thinks    Thought 0.\n" in story
    none = report.before_and_after([q], {"sft": cut, "grpo": cut}, "")
    assert none.startswith("No held-out question")


@pytest.mark.parametrize("out, seed", [("run", 0), ("run", 3), ("my runs/it's", 0), ("/a/run", 12)])
def test_the_commands_of_the_story_are_read_as_they_are_meant(out, seed, monkeypatch):
    """A shell splits them, and the parser of mtr.py reads folder, seed, stage and question."""
    asked = []
    monkeypatch.setitem(mtr.COMMANDS, "ask", (mtr.AskConfig, asked.append))
    q = make_questions(make_world(0))[0]
    traces = {"sft": {"greedy": answering([q], False)}, "grpo": {"greedy": answering([q], True)}}
    story = report.before_and_after([q], traces, report.ask_command(out, seed))
    commands = story.splitlines()[-2:]
    for command in commands:
        python, *words = shlex.split(command)
        monkeypatch.setattr(sys, "argv", words)
        mtr.main()
        assert python == "python" and words[0] == "mtr.py"
        assert ("--out" in words, "--seed" in words) == (out != "run", seed != 0)
    assert [c.stage for c in asked] == ["sft", "grpo"]
    for c in asked:
        assert (c.out, c.seed, c.question, c.temperature, c.model) == (out, seed, q.text, 0.0, "")


def write_metrics(folder, stage, columns, rows):
    (folder / stage).mkdir()
    with open(folder / stage / "metrics.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)


def test_the_curves_show_the_rows_that_have_a_value(monkeypatch, tmp_path):
    """Held-out EM stands in few rows, and alone in the last. Only these are drawn, each at its
    step. The dashed line is the sampled EM before the first update. The losses are medians.
    """
    from matplotlib.axes import Axes
    drawn, levels = {}, []
    real, real_line = Axes.plot, Axes.axhline

    def plot(axis, steps, values, label, marker):
        drawn[label] = steps, values, marker, axis
        return real(axis, steps, values, label=label, marker=marker)

    def axhline(axis, value, **how):
        levels.append((axis, value, how["linestyle"]))
        return real_line(axis, value, **how)
    monkeypatch.setattr(Axes, "plot", plot)
    monkeypatch.setattr(Axes, "axhline", axhline)
    rows = [{name: step + 0.5 for name in grpo.GRPO_COLUMNS} | {"step": step} for step in range(3)]
    rows[1] |= {"heldout_sampled": "", "heldout_greedy": ""}
    rows.append({"step": 3, "heldout_sampled": 0.75, "heldout_greedy": 0.875})
    write_metrics(tmp_path, "grpo", grpo.GRPO_COLUMNS, rows)
    rows = [{name: float(step) + 1 for name in SFT_COLUMNS} | {"step": step} for step in range(30)]
    write_metrics(tmp_path, "sft", SFT_COLUMNS, rows)
    report.draw_curves(tmp_path)
    assert (tmp_path / "curves.png").stat().st_size > 1000
    assert drawn["reward"][:3] == drawn["calls"][:3] == ([0, 1, 2], [0.5, 1.5, 2.5], "")
    assert drawn["heldout_sampled"][:3] == ([0, 2, 3], [0.5, 2.5, 0.75], "o")
    assert drawn["heldout_greedy"][:3] == ([0, 2, 3], [0.5, 2.5, 0.875], "o")
    assert levels == [(drawn["heldout_sampled"][3], 0.5, "--")]
    # Of 1, 2, ..., 30: the median of the first, of the first two, of the last twenty.
    _, loss, _, axis = drawn["loss_maker"]
    assert len(loss) == 30 and loss[:2] == [1, 1.5] and loss[-1] == (20 + 21) / 2
    assert axis.get_yscale() == "log" and drawn["calls"][3].get_yscale() == "linear"
    for _, _, _, axis in drawn.values():
        ticks = axis.get_xticks()
        assert all(tick == int(tick) for tick in ticks) and axis.get_title()
    assert set(drawn) == {name for _, _, *names in report.PANELS for name in names}


def test_curves_of_a_run_without_a_first_evaluation_have_no_dashed_line(monkeypatch, tmp_path):
    from matplotlib.axes import Axes
    monkeypatch.setattr(Axes, "axhline", lambda *_, **__: pytest.fail("a line was drawn"))
    row = dict.fromkeys(grpo.GRPO_COLUMNS, 0.5)
    rows = [row | {"step": 0, "heldout_sampled": "", "heldout_greedy": ""}, row | {"step": 1}]
    write_metrics(tmp_path, "grpo", grpo.GRPO_COLUMNS, rows)
    write_metrics(tmp_path, "sft", SFT_COLUMNS, [dict.fromkeys(SFT_COLUMNS, 0.5) | {"step": 0}])
    report.draw_curves(tmp_path)
    assert (tmp_path / "curves.png").exists()


def finished(folder, rows=ROWS + CONTROLS):
    """Write results.json and story.txt of a finished run whose scores are all 0.5 or 10.25."""
    scores = dict.fromkeys(FIELDS - {"row", "by_set", "n"}, 0.5)
    scores |= {"n": 200, "calls": 10.25, "by_set": dict.fromkeys(HELD_OUT, 0.25)}
    shares = dict.fromkeys(["valid", "exact", "accepted", "regenerated", "fallback"], 0.125)
    results = {"seed": 3, "seconds": {"sft": 140.5, "total": 1203.5}, "actor_recall": 0.75,
               "actor_fidelity": 1.0, "maker": shares,
               "rows": [{"row": row, **scores} for row in rows]}
    folder.mkdir(exist_ok=True)
    (folder / "results.json").write_text(json.dumps(results))
    (folder / "story.txt").write_text("Once.\n")
    return results


def test_show_prints_a_run_as_it_was_written(tmp_path, capsys):
    """Two tables with each column under its title, then the simulator, the seconds, the story."""
    with pytest.raises(InputError, match="results.json is missing"):
        report.show_run(str(tmp_path))
    results = finished(tmp_path, ["grpo"])
    results["rows"][0] |= {"em_sampled": 0.625, "valid_calls": None, "by_set": {"hotpot": 0.75}}
    del results["rows"][0]["clean_turns"]  # runs before this column have no such score
    (tmp_path / "results.json").write_text(json.dumps(results))
    report.show_run(str(tmp_path))
    out = capsys.readouterr().out
    lines = out.splitlines()
    first = lines.index("row   sampled EM  0      1  greedy EM  clean turns  valid calls   calls")
    assert lines[first + 1] == ("grpo       0.625  #####         0.500            -            -  "
                                "10.250")
    second = lines.index("row   hotpot  musique  2wiki  bamboogle  support     F1")
    assert lines[second + 1] == "grpo   0.750        -      -          -    0.500  0.500"
    for text in ("the same 200 held-out questions", "\nToolActor recall       0.750  share of the",
                 "\nToolActor fidelity     1.000  ", "\nToolMaker exact        0.125  ",
                 "\nseconds: sft 140.5, total 1203.5\n", "\nOnce.\n",
                 f'python mtr.py ask --out {tmp_path} --seed 3 "..."'):
        assert text in out


@pytest.mark.parametrize("rows", [ROWS, ROWS + CONTROLS], ids=len)
def test_the_screen_has_80_columns_and_explains_all_that_it_shows(rows, tmp_path, monkeypatch, capsys):
    """A line of at most 80 characters for each column and each row that is there, and no other."""
    monkeypatch.chdir(tmp_path)
    finished(tmp_path / "run", rows)
    report.show_run("run")
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    explained = [line[:13].rstrip() for line in lines if re.match(r"(?!row).{13}  [a-z]", line)]
    scores = ["sampled EM", "0      1", "greedy EM", "clean turns", "valid calls", "calls"]
    assert explained == [*scores, *rows, *HELD_OUT, "support", "F1"]
    assert all(line.isascii() for line in lines)
    assert set(tables.ROWS) == {*ROWS, *CONTROLS}


def test_the_tables_of_eval_have_80_columns_and_all_fields(capsys):
    """With the names of the benchmarks' own files."""
    scores = ["n", "em", "em_low", "em_high", "f1", "f1_low", "f1_high", "grammar", "clean_turns",
              "valid_calls", "failed_calls", "support", "calls", "length", "seconds", "bad"]
    row = dict.fromkeys(scores, 0.5) | {"n": 7405, "bad": 0, "seconds": 12345.678, "length": 1234.5,
                                        "model": "qwen", "backend": "simulated", "samples": 1,
                                        "temperature": 0.0}
    report.show_evaluation([row | {"set": "hotpot_dev_distractor_v1", "rule": "hotpotqa"},
                            row | {"set": "dev", "rule": "2wiki_v1.1"}])
    lines = capsys.readouterr().out.splitlines()
    heads = [line.split() for line in lines if line.startswith("set ")]
    assert max(map(len, lines)) <= 80 and {head[0] for head in heads} == {"set"}
    assert sorted(sum([head[1:] for head in heads], [])) == sorted(["rule", *scores])
    assert len([line for line in lines if line.startswith("dev ")]) == 3


# --------------------------------------------------------------------------- the commands of the README


def readme_commands():
    """The words of the README's commands that start a program of the top level, in their order."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    return [shlex.split(command)[1:] for command in commands(text)]


def execute(words, monkeypatch):
    """Run a program in this process."""
    monkeypatch.setattr(sys, "argv", words)
    {"mtr.py": mtr, "sft.py": sft, "grpo.py": grpo}[words[0]].main()


SMALL = {"grpo.py": ["--steps", "1", "--questions", "2", "--group", "2", "--turn-tokens", "32"]}


def test_the_commands_of_the_miniature_run(run, tmp_path, monkeypatch, capsys):
    """After a toy run, in its folder: each exits without an error and prints something. `python mtr.py` is the run."""
    shutil.copytree(run[0], tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    ran = 0
    for words in readme_commands():
        if "--model" in words or "RUN" in words or len(words) == 1:
            continue
        execute([{"8": "1"}.get(word, word) for word in words] + SMALL.get(words[0], []), monkeypatch)
        assert capsys.readouterr().out.strip(), words
        ran += 1
    assert ran >= 5 and (tmp_path / "runs" / "b" / "grpo" / "model" / "config.json").exists()


def test_the_commands_of_a_checkpoint_run(tmp_path, tokenizer, tiny, monkeypatch, capsys):
    """With a tiny random checkpoint. Stage 0 keeps nothing of what it writes, so its file is replaced by a trace that a
    script wrote; a --turn-tokens of 8 keeps the turns short."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(agents.ToolMaker, "TRIES", 1)
    save_model(tiny(tokenizer.size + 4, dtype=torch.float32), tokenizer, tmp_path / "qwen")
    shape = json.loads((tmp_path / "qwen" / "config.json").read_text())
    (tmp_path / "qwen" / "config.json").write_text(json.dumps(shape | {"max_position_embeddings": 8000}))
    for name in ("TRAIN_FILE", "TEST_FILE"):
        lines = [json.dumps({"question": f"Who {i}?", "golden_answers": ["x"]}) + "\n" for i in range(20)]
        (tmp_path / name).write_text("".join(lines))
    turns = [{"thought": "t", "answer": "x"}]
    record = {"role": "agent", "question": "Who?", "kind": "composition", "tools": [], "turns": turns}
    more = {"ask": ["--turn-tokens", "8"], "traces": ["--turn-tokens", "8", "--samples", "1"],
            "eval": ["--turn-tokens", "8"], "sft.py": ["--steps", "1"],
            "grpo.py": [*SMALL["grpo.py"][:-1], "8"]}
    ran = []
    for words in readme_commands():
        if "qwen" not in words and "RUN" not in words:
            continue
        name = words[1] if words[0] == "mtr.py" else words[0]
        execute(words + more[name], monkeypatch)
        assert capsys.readouterr().out.strip(), words
        if name == "traces":
            Path("traces.jsonl").write_text(json.dumps({"conversations": [record]}) + "\n")
        ran.append(name)
    assert ran == ["ask", "traces", "sft.py", "grpo.py", "eval"]
