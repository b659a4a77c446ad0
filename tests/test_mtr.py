"""The programs as a user runs them: every command at toy size, help, mistakes, reports.

Also: gold answers reach no prompt and change no trace.
"""
import csv
import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import agents
import evaluate
import grpo
import mtr
import report
import run as run_file
import sft
from data import InputError
from data.prompts import SHORT
from data.tokenizer import CHAT_TEMPLATE, Tokenizer
from data.world import HELD_OUT, make_questions, make_world, tools_for, write_sample
from model import load
from sft import SFT_COLUMNS

ROOT = Path(__file__).resolve().parents[1]
ROWS = ["majority", "closed_book", "untrained", "sft", "sft_continued", "sft_blanked",
        "sft_shuffled", "grpo", "grpo_blanked", "grpo_shuffled", "grpo_real"]


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
                 "sft_continued/model/config.json", "grpo/model/tokenizer_config.json"):
        assert (out / name).stat().st_size > 0, name


def test_results_hold_every_row_and_field(run):
    results = json.loads((run[0] / "results.json").read_text())
    assert [row["row"] for row in results["rows"]] == ROWS
    assert set(results) == {"seed", "seconds", "actor_recall", "actor_fidelity", "maker", "rows"}
    assert set(results["maker"]) == {"valid", "exact", "accepted", "regenerated", "fallback"}
    for row in results["rows"]:
        assert set(row) == {"row", "n", "em_greedy", "em_sampled", "f1", "grammar", "valid_calls",
                            "clean_turns", "support", "calls", "length", "by_set"}
        assert set(row["by_set"]) <= set(HELD_OUT)


def test_the_screen_ends_with_the_table_and_a_story(run):
    table = run[1][run[1].index("4/4"):]
    assert all(re.search(rf"^{row} ", table, re.M) for row in ROWS)
    assert "before GRPO" in table or "No held-out question" in table


@pytest.mark.parametrize("stage, columns", [("sft", SFT_COLUMNS), ("grpo", grpo.GRPO_COLUMNS)])
def test_metrics_have_the_columns_that_the_readme_defines(run, stage, columns):
    with open(run[0] / stage / "metrics.csv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert rows and list(rows[0]) == columns and len(set(columns)) == len(columns)
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    missing = [c for c in columns
               if f"`{c}`" not in readme and not c.startswith("time_") and c != "step"]
    assert not missing


def test_traces_have_ids_and_mask_of_one_length(run):
    for line in (run[0] / "grpo" / "traces.jsonl").read_text(encoding="utf-8").splitlines():
        trace = json.loads(line)
        assert len(trace["ids"]) == len(trace["mask"]) > sum(trace["mask"]) > 0


def test_ask_eval_and_show_work_on_a_finished_run(run):
    asked = program("mtr.py", "ask", "Who is the mayor of Doka?", "--out", run[0])
    assert asked.returncode == 0 and "ToolMaker:" in asked.stdout and "AutoAgent" in asked.stdout
    shown = program("mtr.py", "show", "--out", run[0])
    assert shown.returncode == 0 and "grpo_real" in shown.stdout


def test_the_same_seed_gives_the_same_weights(run, tmp_path):
    flags = []
    for name, value in mtr.TOY_OPTIONS["sft"].items():
        flags += [f"--{name.replace('_', '-')}", value]
    done = program("sft.py", "--out", tmp_path, "--threads", 1, *flags)
    assert done.returncode == 0, done.stderr
    first, again = (load(folder / "sft" / "model")[0] for folder in (run[0], tmp_path))
    pairs = zip(first.parameters(), again.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_resume_repeats_no_finished_stage(run, capsys):
    """With results.json nothing is repeated. Without it the evaluation runs again, with the same
    results.
    """
    out, results = run[0], json.loads((run[0] / "results.json").read_text())
    files = {path: path.stat().st_mtime_ns for stage in ("sft", "sft_continued", "grpo")
             for path in (out / stage).rglob("*")}
    mtr.run_all(mtr.RunConfig(out=str(out), toy=True, threads=1, resume=True))
    printed = capsys.readouterr().out
    assert json.loads((out / "results.json").read_text()) == results
    assert printed[printed.index("\nrow"):] == run[1][run[1].index("\nrow"):]
    (out / "results.json").unlink()
    done = program("mtr.py", "--toy", "--resume", "--out", out, "--threads", 1)
    assert done.returncode == 0, done.stderr[-2000:]
    assert files == {path: path.stat().st_mtime_ns for path in files}
    again = json.loads((out / "results.json").read_text())
    assert all(again[name] == results[name] for name in results if name != "seconds")


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
            run_file.run_main(PROGRAMS[name].main)
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
    (["mtr.py", "ask"], "question"), (["mtr.py", "ask", " "], "question: it is empty")]


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


def test_a_finished_run_is_not_repeated_without_resume(tmp_path):
    (tmp_path / "results.json").write_text("{}")
    with pytest.raises(InputError, match="holds a finished run"):
        mtr.run_all(mtr.RunConfig(out=str(tmp_path), toy=True))
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]


@pytest.mark.parametrize("stage", ["sft", "grpo", "sft_continued"])
def test_leftovers_of_a_run_are_refused_before_the_first_stage(stage, tmp_path, capsys):
    """Otherwise the run would stop at that stage, after minutes of training."""
    (tmp_path / stage / "checkpoints").mkdir(parents=True)
    with pytest.raises(InputError, match=f"/{stage}: holds a run; continue it with --resume"):
        mtr.run_all(mtr.RunConfig(out=str(tmp_path), toy=True))
    assert [path.name for path in tmp_path.iterdir()] == [stage] and not capsys.readouterr().out


def test_a_finished_stage_is_not_prepared_again(run, monkeypatch):
    """--resume skips it before it makes conversations or tools."""
    def fail(*_, **__):
        raise AssertionError("a finished stage was prepared")
    monkeypatch.setattr(sft, "teach", fail)
    monkeypatch.setattr(grpo.Simulator, "make_tools", fail)
    shared = {"out": str(run[0]), "threads": 1, "resume": True}
    config = sft.SFTConfig(**shared, **mtr.TOY_OPTIONS["sft"])
    sft.train_sft(config)
    sft.train_sft(config, continued=True)
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
    assert len(list(tmp_path.iterdir())) == len(committed) == 4


# ------------------------------------------------------------------------------- scores and reports


def test_the_shares_of_the_toolmaker_by_hand():
    """Four questions: accepted at once; at the second try; other tools than the teacher's; the
    fallback.
    """
    questions = [q for q in make_questions(make_world(0))
                 if q.kind == "composition" and q.steps[0][0] == "mayor"][:4]
    right = [agents.check_tools(tools_for(q)) for q in questions]
    boxes = [agents.Toolbox("composition", right[0], 1),
             agents.Toolbox("composition", right[1], 2),
             agents.Toolbox("composition", right[2][:1], 1),
             agents.Toolbox("composition", [agents.FALLBACK], 0)]
    by_id = {q.id: box for q, box in zip(questions, boxes, strict=True)}
    shares = evaluate.maker_shares(SimpleNamespace(boxes=by_id), questions)
    assert shares == {"valid": 0.5, "exact": 0.5, "accepted": 0.75, "regenerated": 0.25,
                      "fallback": 0.25}


def test_tools_of_another_kind_are_not_exact():
    """The same tools with another kind come with other utility tools."""
    question = next(q for q in make_questions(make_world(0)) if q.kind == "composition")
    box = agents.Toolbox("arithmetic", agents.check_tools(tools_for(question)), 1)
    simulator = SimpleNamespace(boxes={question.id: box})
    assert evaluate.maker_shares(simulator, [question])["exact"] == 0
    box.kind = "composition"
    assert evaluate.maker_shares(simulator, [question])["exact"] == 1


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
    report.print_table(rows, ["row", "em", "n"])
    assert capsys.readouterr().out == ("row          em    n\n"
                                       "sft       0.123  200\n"
                                       "majority      -    -\n")


def test_the_story_is_the_first_question_that_only_grpo_answers():
    questions = make_questions(make_world(0))[:4]

    def traces(*right):
        made = []
        for i, (q, ok) in enumerate(zip(questions, right, strict=True)):
            turn = agents.Turn(f"Thought {i}.", answer=q.golds[0] if ok else "no")
            made.append(agents.Trace(q.text, turns=[turn]))
        return made
    after = traces(True, False, True, True)
    q = questions[2]
    assert report.before_and_after(questions, traces(True, True, False, False), after) == (
        f"{q.text}   (right: {q.golds[0]})\n"
        "before GRPO\n  thinks    Thought 2.\n  answers   no\n"
        f"after GRPO\n  thinks    Thought 2.\n  answers   {q.golds[0]}")
    none = report.before_and_after(questions, traces(True, True, True, True), after)
    assert none == "No held-out question went from wrong to right."


def test_a_trace_without_an_answer_is_wrong_in_the_story():
    """A truncated trace has no turn or no answer."""
    q = make_questions(make_world(0))[0]
    cut, right = agents.Trace(q.text, status="truncated"), agents.Turn("t", answer=q.golds[0])
    story = report.before_and_after([q], [cut], [agents.Trace(q.text, turns=[right])])
    assert "before GRPO\n  truncated\nafter GRPO\n  thinks    t\n" in story
    assert report.before_and_after([q], [cut], [cut]).startswith("No held-out question")


def test_the_curves_show_the_rows_that_have_a_value(monkeypatch, tmp_path):
    """A held-out score is there in few rows. Only these are drawn, each at its step."""
    from matplotlib.axes import Axes
    drawn = {}
    real = Axes.plot

    def plot(axis, steps, values, label, marker):
        drawn[label] = steps, values, marker
        return real(axis, steps, values, label=label, marker=marker)
    monkeypatch.setattr(Axes, "plot", plot)
    for stage, columns in (("sft", SFT_COLUMNS), ("grpo", grpo.GRPO_COLUMNS)):
        (tmp_path / stage).mkdir()
        with open(tmp_path / stage / "metrics.csv", "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            for step in range(3):
                row = {name: step + 0.5 for name in columns} | {"step": step}
                rare = [name for name in columns if name.startswith("heldout") and step != 1]
                writer.writerow(row | dict.fromkeys(rare, ""))
    report.draw_curves(tmp_path)
    assert (tmp_path / "curves.png").stat().st_size > 1000
    assert drawn["loss_agent"] == drawn["reward"] == ([0, 1, 2], [0.5, 1.5, 2.5], "")
    assert drawn["heldout_agent"] == drawn["heldout_sampled"] == ([1], [1.5], "o")
    assert set(drawn) == {name for _, *names in report.PANELS for name in names}


def test_show_prints_a_run_as_it_was_written(tmp_path, capsys):
    """The table with a column per set, the ToolMaker's shares, the story and the seconds."""
    row = {"row": "grpo", "n": 8, "em_greedy": 0.5, "em_sampled": 0.25, "f1": 0.5, "grammar": 1.0,
           "valid_calls": None, "support": 1.0, "calls": 2.0, "length": 40.0,
           "by_set": {"hotpot": 0.75}}
    results = {"seed": 0, "seconds": {"total": 3.5}, "actor_recall": 0.5, "actor_fidelity": 1.0,
               "maker": {"valid": 0.125}, "rows": [row]}
    with pytest.raises(InputError, match="results.json is missing"):
        report.show_run(str(tmp_path))
    (tmp_path / "results.json").write_text(json.dumps(results))
    (tmp_path / "story.txt").write_text("Once.\n")
    report.show_run(str(tmp_path))
    out = capsys.readouterr().out
    head, line = out.splitlines()[1:3]
    assert head.split()[-4:] == list(HELD_OUT)
    assert line.split() == ["grpo", "0.500", "0.250", "0.500", "1.000", "-", "1.000", "2.000",
                            "0.750", "-", "-", "-"]
    for text in ("n = 8 held-out questions", "recall 0.500, fidelity 1.000", "valid 0.125",
                 "seconds: {'total': 3.5}", "\nOnce.\n"):
        assert text in out
