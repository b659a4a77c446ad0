"""The programs as a user meets them: every command at toy size, help, mistakes; and that the gold answers leak nowhere."""
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
from data.world import HELD_OUT, make_questions, make_world, write_sample
from model import Tokenizer, load
from sft import COLUMNS as SFT_COLUMNS

ROOT = Path(__file__).resolve().parents[1]
ROWS = ["majority", "closed_book", "untrained", "sft", "sft_continued", "sft_blanked", "sft_shuffled", "grpo",
        "grpo_blanked", "grpo_shuffled", "grpo_real"]


def program(*words, cwd=ROOT):
    """A program run as a user runs it, on one thread."""
    return subprocess.run([sys.executable, *map(str, words)], cwd=cwd, capture_output=True, text=True,
                          env={"OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin"})


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished toy run and what it printed."""
    out = tmp_path_factory.mktemp("toy") / "run"
    done = program("mtr.py", "--toy", "--out", out, "--threads", 1)
    assert done.returncode == 0, done.stderr[-2000:]
    return out, done.stdout


def test_a_run_leaves_what_the_readme_promises(run):
    out, _ = run
    for name in ("results.json", "story.txt", "curves.png", "sft/config.json", "sft/metrics.csv", "grpo/metrics.csv",
                 "grpo/traces.jsonl", "sft/model/model.safetensors", "sft_continued/model/config.json",
                 "grpo/model/tokenizer_config.json"):
        assert (out / name).stat().st_size > 0, name


def test_results_hold_every_row_and_field(run):
    results = json.loads((run[0] / "results.json").read_text())
    assert [row["row"] for row in results["rows"]] == ROWS
    assert set(results) == {"seed", "seconds", "actor_recall", "actor_fidelity", "maker", "rows"}
    assert set(results["maker"]) == {"valid", "exact", "accepted", "regenerated", "fallback"}
    for row in results["rows"]:
        assert set(row) == {"row", "n", "em_greedy", "em_sampled", "f1", "grammar", "valid_calls", "support", "calls",
                            "length", "by_set"} and set(row["by_set"]) <= set(HELD_OUT)


def test_the_screen_ends_with_the_table_and_a_story(run):
    table = run[1][run[1].index("4/4"):]
    assert all(re.search(rf"^{row} ", table, re.M) for row in ROWS)
    assert "before GRPO" in table or "No held-out question" in table


@pytest.mark.parametrize("stage, columns", [("sft", SFT_COLUMNS), ("grpo", grpo.COLUMNS)])
def test_metrics_have_the_columns_that_the_readme_defines(run, stage, columns):
    rows = list(csv.DictReader(open(run[0] / stage / "metrics.csv", encoding="utf-8")))
    assert rows and list(rows[0]) == columns and len(set(columns)) == len(columns)
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    missing = [c for c in columns if f"`{c}`" not in readme and not c.startswith("time_") and c != "step"]
    assert not missing


def test_traces_keep_ids_and_mask_in_step(run):
    for line in (run[0] / "grpo" / "traces.jsonl").read_text(encoding="utf-8").splitlines():
        trace = json.loads(line)
        assert len(trace["ids"]) == len(trace["mask"]) > sum(trace["mask"]) > 0


def test_ask_eval_and_show_work_on_what_a_run_left(run):
    asked = program("mtr.py", "ask", "Who is the mayor of Doka?", "--out", run[0])
    assert asked.returncode == 0 and "ToolMaker:" in asked.stdout and "AutoAgent" in asked.stdout
    shown = program("mtr.py", "show", "--out", run[0])
    assert shown.returncode == 0 and "grpo_real" in shown.stdout


def test_a_seed_gives_the_same_result_twice(run, tmp_path):
    done = program("sft.py", "--out", tmp_path, "--threads", 1, *sum((
        [f"--{k.replace('_', '-')}", v] for k, v in mtr.TOY["sft"].items()), []))
    assert done.returncode == 0, done.stderr
    first, again = (load(folder / "sft" / "model")[0] for folder in (run[0], tmp_path))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters()))


def test_resume_repeats_no_finished_stage(run):
    """Nothing at all if it has its results; without them the evaluation, which comes to the same."""
    out, results = run[0], json.loads((run[0] / "results.json").read_text())
    files = {path: path.stat().st_mtime_ns for stage in ("sft", "sft_continued", "grpo") for path in (out / stage).rglob("*")}
    words = ("mtr.py", "--toy", "--resume", "--out", out, "--threads", 1)
    done = program(*words)
    assert done.returncode == 0 and json.loads((out / "results.json").read_text()) == results, done.stderr[-2000:]
    assert done.stdout[done.stdout.index("\nrow"):] == run[1][run[1].index("\nrow"):]
    (out / "results.json").unlink()
    done = program(*words)
    assert done.returncode == 0, done.stderr[-2000:]
    assert files == {path: path.stat().st_mtime_ns for path in files}
    again = json.loads((out / "results.json").read_text())
    assert all(again[name] == results[name] for name in results if name != "seconds")


@pytest.mark.parametrize("name", ["mtr.py", "sft.py", "grpo.py"])
def test_help_teaches(name):
    done = program(name, "--help")
    assert done.returncode == 0 and "--seed" in done.stdout and len(done.stdout) > 800


@pytest.mark.parametrize("words, culprit", [
    (["mtr.py", "--sed", "1"], "--sed"), (["mtr.py", "--seed", "one"], "one"), (["mtr.py", "show", "--out", "nowhere"], "nowhere"),
    (["mtr.py", "ask", "--out", "nowhere", "Who?"], "nowhere"), (["grpo.py", "--out", "nowhere"], "nowhere"),
    (["sft.py", "--steps", "0"], "steps"), (["grpo.py", "--loss", "ppo"], "ppo"), (["mtr.py", "train"], "train"),
    (["sft.py", "--out", "/proc/nowhere"], "/proc/nowhere"), (["grpo.py", "--w-answer", "0.1"], "w_answer")])
def test_a_mistake_is_one_line_and_exit_code_2(words, culprit):
    done = program(*words)
    assert done.returncode == 2 and culprit in done.stderr and done.stderr.count("\n") == 1, done.stderr


def test_the_readme_has_the_two_commands():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for command in ("pip install -r requirements.txt && python mtr.py", "pip install -r requirements.txt && pytest"):
        assert f"\n    {command}\n" in readme


def test_the_committed_sample_is_what_the_code_makes(tmp_path):
    write_sample(tmp_path)
    for path in (ROOT / "data" / "sample").glob("*.jsonl"):
        assert path.read_text(encoding="utf-8") == (tmp_path / path.name).read_text(encoding="utf-8")
    assert len(list(tmp_path.iterdir())) == len(list((ROOT / "data" / "sample").iterdir())) == 4


def test_gold_answers_reach_no_prompt_and_change_no_trace(run):
    """Every gold is replaced by a rare string after the data are made: the traces stay the same, id for id."""
    config = grpo.GRPOConfig(out=str(run[0]), turn_tokens=40, max_turns=3)
    world = make_world(0)
    questions = [q for q in make_questions(world) if q.set in HELD_OUT][:4]
    told = []

    def play(asked):
        with world.sealed():
            stage = grpo.Simulator(run[0] / "sft" / "model", config)
            encode = stage.tokenizer.encode
            stage.tokenizer.encode = lambda pieces: told.append("".join(pieces)) or encode(pieces)
            stage.make_tools(asked)
            model = load(run[0] / "grpo" / "model", stage.device)[0]
            rolled = grpo.roll_out(stage, stage.agent(model, 8, 1.0), asked, replace(config, group=2), 0)[0]
            return [trace.ids for trace in [*rolled, *grpo.score_heldout(stage, stage.agent(model, 3, 0.0), asked)[1]]]

    canary = "Qxzzy canary"
    assert play(questions) == play([replace(q, golds=[canary], chain=(canary,)) for q in questions])
    assert told and not any("Qxzzy" in text for text in told)


def test_chat_template_stands_beside_the_checkpoint(run):
    config = json.loads((run[0] / "grpo" / "model" / "tokenizer_config.json").read_text(encoding="utf-8"))
    assert config["chat_template"] == agents.CHAT_TEMPLATE and Tokenizer(run[0] / "grpo" / "model").stop_ids


def test_the_shares_of_the_toolmaker_by_hand():
    """Four questions: right at once, right at the second try, other tools than the teacher's, the fallback."""
    questions = [q for q in make_questions(make_world(0)) if q.kind == "composition" and q.steps[0][0] == "mayor"][:4]
    right = [agents.check_tools(evaluate.tools_for(q)) for q in questions]
    boxes = [agents.Toolbox("composition", right[0], 1), agents.Toolbox("composition", right[1], 2),
             agents.Toolbox("composition", right[2][:1], 1), agents.Toolbox("composition", [agents.FALLBACK], 0)]
    stage = SimpleNamespace(boxes={q.id: box for q, box in zip(questions, boxes)})
    assert evaluate.maker_report(stage, questions) == {"valid": 0.5, "exact": 0.5, "accepted": 0.75, "regenerated": 0.25,
                                                  "fallback": 0.25}


def test_the_fidelity_of_the_toolactor_by_hand():
    """One true and one false observation; a refused call and a utility's result don't count."""
    world = make_world(0)
    city = world.names["city"][0]
    calls = [agents.Call("mayor", {"city": city}, observation={"mayor": world.facts["mayor", city]}),
             agents.Call("country", {"city": city}, observation={"country": "Nowhere"}),
             agents.Call("mayor", {"town": city}, error="wrong", observation={"error": "wrong"}),
             agents.Call("compare", {}, observation={"result": "x"})]
    assert evaluate.actor_fidelity([agents.Trace(turns=[agents.Turn(calls=calls)])], world) == 0.5


def test_the_majority_row_by_hand():
    """The commonest training answer is Bo; one of the two held-out questions has it."""
    base = make_questions(make_world(0))[0]
    questions = [replace(base, id=str(i), golds=[gold], set=of) for i, (gold, of) in enumerate(
        [("Bo", "train"), ("Bo", "train"), ("Al", "train"), ("bo", "hotpot"), ("Al", "musique")])]
    row = evaluate.majority(questions, questions[3:])
    assert row["em_greedy"] == row["em_sampled"] == row["f1"] == 0.5 and row["by_set"] == {"hotpot": 1.0, "musique": 0.0}
