"""Runs in the terminal: show --step and --trace, compare, what ask prints, a copied stage 1. No torch."""
import json
import re
import sys
from types import SimpleNamespace

import pytest

import report
from agents import FALLBACK, UTILITIES, Tool, Toolbox, Trace, Turn
from data import InputError, tables
from data.compare import CompareConfig, compare, short
from data.folders import stage1_model
from data.own import show_answers, show_end, show_tools
from data.show import ShowConfig, masked_text, show_traces
from data.tokenizer import Tokenizer, train_tokenizer

ESCAPE = "\x1b[2J\x9b\u202e"  # clears the screen, begins a sequence, turns the text round
PARTS = ("em", "answer", "consistency", "grammar", "valid", "arguments", "support", "economy")


def line(step, question, sample, reward=0.5, **more):
    """One trace as stage 2 writes it. Its tokens are 1 2 3 | 10 11 | 4 | 12, the agent's are 10 11 and 12."""
    call = {"name": "boss", "arguments": {"of": "Ada"}, "observation": {"boss": "Bo"}, "error": None}
    turns = [{"thought": "Hm.", "calls": [call], "answer": None, "error": None, "departures": []},
             {"thought": "", "calls": [], "answer": "Bo", "error": None, "departures": []}]
    rewards = {"reward": reward} | {name: i / 8 for i, name in enumerate(PARTS)}
    return {"step": step, "question": f"Who is {question}?", "status": "answered", "turns": turns,
            "key": [0, "eval" if sample is None else step, question, sample or 0], "tools": [],
            "ids": [1, 2, 3, 10, 11, 4, 12], "mask": [0, 0, 0, 1, 1, 0, 1], "advantage": -1.25, "weight": 0.25,
            "logprobs": [-0.5] * 3, "old": [], "golds": ["Bo", "Bob"], "rewards": rewards} | more


def write(out, records):
    (out / "grpo").mkdir(parents=True, exist_ok=True)
    texts = [text if isinstance(text, str) else json.dumps(text) for text in records]
    (out / "grpo" / "traces.jsonl").write_text("".join(text + "\n" for text in texts))
    return out


@pytest.fixture
def out(tmp_path):
    """A run of two steps: one held-out trace before each and after the last, two groups of two, half a line."""
    train_tokenizer(["the boss of Ada is Bo"] * 3, 280, tmp_path / "sft" / "model")
    lines = []
    for step in range(2):
        lines.append(line(step, "held", None, 0.125))
        for question in ("a", "b"):
            lines += [line(step, question, 0, 0.25), line(step, question, 1, 0.75)]
    return write(tmp_path, [*lines, line(2, "held", None), '{"step": 2, "ques'])


def shown(capsys, out, **more):
    report.show(ShowConfig(out=str(out), **more))
    return capsys.readouterr().out


# ------------------------------------------------------------------------------------------ a step


def test_a_step_shows_its_groups_best_first(out, capsys):
    """Step 1 has the lines 6 to 10: held out, two traces on a, two on b. The second of each is better."""
    text = shown(capsys, out, step=1)
    heads = re.findall(r"^ +(\d+)  reward (\S+)  advantage (\S+)  calls (\d+)  (.*)$", text, re.M)
    assert heads == [("8", "0.750", "-1.250", "1", "answer: Bo"), ("7", "0.250", "-1.250", "1", "answer: Bo"),
                     ("10", "0.750", "-1.250", "1", "answer: Bo"), ("9", "0.250", "-1.250", "1", "answer: Bo"),
                     ("6", "0.125", "-", "1", "answer: Bo")]
    others = [text for text in text.splitlines() if text and not text.startswith(" ")]
    right = "right: Bo or Bob"
    assert others[:-1] == ["step 1, training: 4 traces", "Who is a?", right, "Who is b?", right,
                           "step 1, held out: 1 traces", "Who is held?", right]
    block = text[text.index("     8  "):text.index("     7  ")]
    found = re.findall(r"(\w+) (\d\.\d{3})", block.split("\n", 1)[1])
    assert found == [(name, f"{i / 8:.3f}") for i, name in enumerate(PARTS)]
    assert max(map(len, text.splitlines())) <= 80 and "show --trace N" in text


def test_the_last_step_has_held_out_traces_alone(out, capsys):
    """And the parts of a changed reward are shown by their names."""
    text = shown(capsys, out, step=2)
    assert "held out" in text and "training" not in text and "\n    11  reward" in text
    write(out, [line(0, "a", 0, rewards={"reward": 2.0, "brevity": 0.375})])
    assert "reward 2.000 " in (text := shown(capsys, out, step=0)) and "  brevity 0.375\n" in text


def test_a_trace_without_an_answer_shows_its_status(out, capsys):
    write(out, [line(0, "a", 0, status="truncated"), line(0, "a", 1, status="truncated", turns=[])])
    assert re.findall("calls (.*)", shown(capsys, out, step=0)) == ["1  no answer, truncated", "0  no answer, truncated"]


@pytest.mark.parametrize("more, message", [
    ({"step": 3}, "step: .* has steps 0 to 2, not 3"), ({"step": -1}, "step: .* has steps 0 to 2, not -1"),
    ({"trace": 0}, "trace: .* has lines 1 to 12, not 0"), ({"trace": 13}, "trace: .* has lines 1 to 12, not 13"),
    ({"trace": -1}, "trace: .* has lines 1 to 12, not -1"), ({"trace": 12}, "line 12 is not a whole trace")])
def test_a_number_out_of_range_names_the_range(out, more, message):
    with pytest.raises(InputError, match=message) as error:
        show_traces(ShowConfig(out=str(out), **more))
    assert "\n" not in str(error.value)


def test_a_run_without_traces_is_refused_in_one_line(out, tmp_path):
    with pytest.raises(InputError, match="nowhere/grpo/traces.jsonl: no such file"):
        show_traces(ShowConfig(out=str(tmp_path / "nowhere"), step=0))
    for lines in ([], ["[]", "5", "{}"]):
        write(out, lines)
        with pytest.raises(InputError, match="holds no trace, not 0"):
            show_traces(ShowConfig(out=str(out), step=0))


# ----------------------------------------------------------------------------------------- a trace


def words(ids):
    return " ".join(f"t{i}" for i in ids)


def test_the_mask_by_hand():
    """Without colour, each run of own tokens is between brackets; with it, each run has its colour."""
    ids, mask = [1, 2, 3, 4, 5, 6], [0, 0, 1, 1, 0, 1]
    assert masked_text(ids, mask, words, color=False) == "t1 t2[[t3 t4]]t5[[t6]]"
    assert masked_text(ids, mask, words, color=True) == (
        "\x1b[2mt1 t2\x1b[0m\x1b[32mt3 t4\x1b[0m\x1b[2mt5\x1b[0m\x1b[32mt6\x1b[0m")
    assert masked_text([1, 2], [0, 0], words, color=False) == "t1 t2"  # no room for a turn


def test_of_a_long_prompt_the_last_lines_are_left():
    def decode(ids):
        return "\n".join(map(str, ids))

    text = masked_text([*range(10), 77], [0] * 10 + [1], decode, color=False)
    assert text == "... 4 lines of the prompt are left out\n4\n5\n6\n7\n8\n9[[77]]"
    assert masked_text([*range(6), 77], [0] * 6 + [1], decode, color=False) == "0\n1\n2\n3\n4\n5[[77]]"


def test_a_trace_is_printed_whole(out, capsys):
    """The texts between the brackets are those of the own tokens, with the control token spelled out."""
    tokenizer = Tokenizer(out / "sft" / "model")
    given, own = tokenizer.encode(["Who is Bo?\n"]), [*tokenizer.encode(["the boss\nof Ada"]), tokenizer.end]
    write(out, [line(3, "a", 5, ids=given + own + given + own, mask=[0] * len(given) + [1] * len(own)
                     + [0] * len(given) + [1] * len(own), advantage=0.5)])
    text = shown(capsys, out, trace=1)
    assert re.findall(r"\[\[(.*?)\]\]", text.split("\n\n", 1)[1], re.S) == ["the boss\nof Ada<|im_end|>"] * 2
    assert text.startswith("\nstep 3, training, sample 5\nWho is a?\nright: Bo or Bob\n")
    assert f"{2 * len(given + own)} tokens; the {2 * len(own)} that" in text and "\x1b" not in text
    assert "\n     1  reward 0.500  advantage +0.500  calls 1  answer: Bo\n" in text


@pytest.mark.parametrize("terminal, no_color, colored", [
    (True, None, True), (True, "", True), (True, "1", False), (False, None, False)])
def test_colour_is_for_terminals_that_want_it(out, capsys, monkeypatch, terminal, no_color, colored):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal)
    monkeypatch.delenv("NO_COLOR", raising=False)
    if no_color is not None:
        monkeypatch.setenv("NO_COLOR", no_color)
    text = shown(capsys, out, trace=2)
    assert ("\x1b[32m" in text, "[[" in text) == (colored, not colored)


@pytest.mark.parametrize("more", [{"step": 0}, {"trace": 1}])
def test_no_control_character_reaches_the_terminal(out, capsys, more):
    """Not from the question, the answer, the right answer, the status, a name of a reward, or the tokens."""
    tokenizer = Tokenizer(out / "sft" / "model")
    own = tokenizer.encode([ESCAPE])
    turn = {"thought": ESCAPE, "calls": [], "answer": ESCAPE, "error": None, "departures": []}
    hostile = {"golds": [ESCAPE], "turns": [turn], "ids": [*own, *own],
               "mask": [0] * len(own) + [1] * len(own), "rewards": {"reward": 1.0, ESCAPE: 0.5}}
    write(out, [line(0, ESCAPE, ESCAPE, **hostile), line(0, "b", 0, **hostile) | {"status": ESCAPE}])
    text = shown(capsys, out, **more)
    assert all(c.isprintable() or c == "\n" for c in text) and text.count("\\x1b[2J\\x9b\\u202e") >= 4


def test_without_a_number_show_prints_the_tables(out, capsys, monkeypatch):
    folders = []
    monkeypatch.setattr(report, "show_run", folders.append)
    assert shown(capsys, out) == "" and folders == [str(out)]


# ------------------------------------------------------------------------------------------ compare


def run_of(folder, options, metrics=(), rows=None):
    """A run with these options of stage 2, rows (heldout_sampled, heldout_greedy, em), results. Consistency: twice em."""
    for stage, config in (("sft", {"seed": 0, "steps": 9}), ("grpo", {"seed": 0, "out": str(folder), **options})):
        (folder / stage).mkdir(parents=True)
        (folder / stage / "config.json").write_text(json.dumps(config))
    table = "".join(",".join(map(str, (i, *row, 2 * row[-1]))) + "\n" for i, row in enumerate(metrics))
    (folder / "grpo" / "metrics.csv").write_text("step,heldout_sampled,heldout_greedy,em,consistency\n" + table)
    if rows is not None:
        (folder / "results.json").write_text(json.dumps({"rows": rows}))
    return str(folder)


def compared(capsys, a, b):
    compare(CompareConfig(a=a, b=b))
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 80
    return text


def test_results_of_models_that_were_trained_again_are_not_compared(tmp_path, capsys):
    """Then the last values of metrics.csv are, as of runs without results.json."""
    runs = [run_of(tmp_path / name, {}, [(0.5, 0.5, 0.5)], [{"row": "grpo", "em_sampled": 0.75}]) for name in "ab"]
    assert "0.750" in compared(capsys, *runs) and "held-out quarter" not in compared(capsys, *runs)
    (tmp_path / "b" / "results.json").write_text(json.dumps({"rows": [{"row": "grpo", "em_sampled": 0.75}], "trained_by": "other"}))
    text = compared(capsys, *runs)
    assert "0.750" not in text and "held-out quarter, sampled" in text


def test_the_options_that_differ(tmp_path, capsys):
    """Folder and --resume are no difference. A missing value is -, and the same as an empty text."""
    a = run_of(tmp_path / "a", {"lr": 0.5, "loss": "dapo", "resume": False, "data": [], "old": 1})
    b = run_of(tmp_path / "b", {"lr": 0.25, "loss": "dapo", "resume": True, "data": ["x" * 50], "sft": ""})
    text = compared(capsys, a, b)
    table = text.split("\n\n")[1].splitlines()
    assert [row.split() for row in table] == [
        ["option", "A", "B"], ["grpo", "lr", "0.5", "0.25"], ["grpo", "data", "[]", "['xxxxxx...xxxxxxxxx']"],
        ["grpo", "old", "1", "-"]]
    assert text.startswith(f"A: {a}\nB: {b}\n")
    assert "no option differs" in compared(capsys, a, a)


@pytest.mark.parametrize("value, text", [
    (0.5, "0.5"), (True, "True"), ("", "-"), (None, "-"), ("a" * 22, "a" * 22), ("\x1b", "\\x1b"),
    ("0123456789abcdefghijklmn", "01234567...defghijklmn")])
def test_the_value_of_an_option(value, text):
    assert short(value) == text


def test_runs_without_results_are_compared_by_their_metrics(tmp_path, capsys):
    """The last held-out EM that is there, and means of the last ten of twelve steps: 2 to 11. No reward."""
    rows = [("", "", i) for i in range(12)]
    rows[0], rows[8] = (0.125, 0.25, 0), (0.5, 0.75, 8)
    a = run_of(tmp_path / "a", {}, rows)
    b = run_of(tmp_path / "b", {}, [(0.25, 1.0, 0.5)], rows=[])
    assert [row.split() for row in compared(capsys, a, b).split("\n\n")[2].splitlines()] == [
        ["score", "A", "B", "B", "-", "A"], ["EM", "of", "a", "held-out", "quarter,", "sampled", "0.500", "0.250", "-0.250"],
        ["EM", "of", "a", "held-out", "quarter,", "greedy", "0.750", "1.000", "+0.250"],
        ["training", "EM,", "last", "ten", "steps", "6.500", "0.500", "-6.000"],
        ["consistency,", "last", "ten", "steps", "13.000", "1.000", "-12.000"]]
    c = run_of(tmp_path / "c", {})
    assert re.findall(r"sampled +0\.500 +- +-\n", compared(capsys, a, c))


def test_finished_runs_are_compared_by_the_rows_that_both_have(tmp_path, capsys):
    def row(name, *scores):
        return {"row": name, "n": 200} | dict(zip(("em_sampled", "em_greedy", "clean_turns", "calls"), scores, strict=False))

    a = run_of(tmp_path / "a", {}, rows=[row("sft", 0.5, 0.25, 1.0, 2.5), row("majority", 0.0, 0.0, None, 0.0)])
    b = run_of(tmp_path / "b", {}, rows=[row("untrained", 0.0), row("majority", 0.0, 0.0, None, 0.0),
                                         row("sft", 0.75, 0.125, 1.0)])
    table = compared(capsys, a, b).split("\n\n")[2].splitlines()
    assert [text.split() for text in table[:5]] == [
        ["row", "score", "A", "B", "B", "-", "A"], ["sft", "sampled", "EM", "0.500", "0.750", "+0.250"],
        ["greedy", "EM", "0.250", "0.125", "-0.125"], ["clean", "turns", "1.000", "1.000", "+0.000"],
        ["calls", "2.500", "-", "-"]]
    assert [text.split()[0] for text in table[5:]] == ["majority", "greedy", "clean", "calls"]


def test_the_longest_names_fit_80_columns(tmp_path, capsys):
    config = {"sha256_of_model_and_data": "0" * 64, "data": ["/" + "x" * 100]}
    rows = [dict.fromkeys(("em_sampled", "em_greedy", "clean_turns", "calls"), 10.125) | {"row": row}
            for row in tables.ROWS]
    a = run_of(tmp_path / "a", config, rows=rows)
    b = run_of(tmp_path / "b", {name: str(value) * 2 for name, value in config.items()}, rows=rows)
    compare(CompareConfig(a=a, b=b))
    lines = capsys.readouterr().out.splitlines()[2:]
    assert max(map(len, lines)) <= 80 and len(lines) > 4 * len(tables.ROWS)


def test_a_missing_run_is_one_line_and_nothing_else(tmp_path, capsys):
    a = run_of(tmp_path / "a", {})
    for pair in ((a, str(tmp_path / "nowhere")), (str(tmp_path / "nowhere"), a)):
        with pytest.raises(InputError, match=r"no run in .*nowhere \(sft/config.json is missing\)"):
            compare(CompareConfig(*pair))
        assert capsys.readouterr().out == ""


# ---------------------------------------------------------------------------------------------- ask


def test_tools_are_printed_as_signatures(capsys):
    """A parameter that is not required has a ?. A utility tool has a signature, too."""
    text = {"type": "string"}
    schema = {"type": "object", "properties": {"city": text, "year": text}, "required": ["city"]}
    mayor = Tool("mayor", "Who governs\na city.", schema, {"type": "object", "properties": {"mayor": text, "since": text}})
    bare = Tool("bare", "Nothing.", {"type": "object"}, {"type": "object"})
    show_tools(Toolbox("comparison", [mayor, bare], 1))
    compare_tool = UTILITIES["compare"].description
    assert capsys.readouterr().out == (
        "\nToolMaker: comparison\n  mayor(city, year?) -> mayor, since  Who governs\\na city.\n  bare() ->   Nothing.\n"
        f"  compare(names, values, pick) -> result  {compare_tool}\n")
    show_tools(Toolbox("composition", [FALLBACK], 0))
    assert capsys.readouterr().out == (
        "\nToolMaker: composition\n  its tools were rejected, so there is one general tool\n"
        "  lookup(subject, property) -> value  Look up a property of a subject.\n")


def test_the_answers_are_counted(capsys):
    """The most common answer comes first. An answer of a trace that did not end well does not count."""
    traces = [Trace(turns=[Turn(answer=answer)], status="answered") for answer in ("Bo", "Tili", "Tili", "Bo\x1b", "Tili")]
    traces.append(Trace(turns=[Turn()], status="truncated"))
    show_answers(traces)
    assert capsys.readouterr().out == (
        "\n3 of 6  Tili\n1 of 6  Bo\n1 of 6  Bo\\x1b\n1 of 6  (no answer: truncated)\n")


def test_the_end_of_a_trace(capsys):
    """Nothing after an answer or calls; the text of another last turn, which is the last run of own tokens."""
    show_end(Trace(turns=[Turn(answer="Bo")]), words)
    show_end(Trace(turns=[Turn(calls=[SimpleNamespace()])]), words)
    assert capsys.readouterr().out == ""
    show_end(Trace(turns=[Turn(), Turn()], ids=[1, 2, 3, 4, 5], mask=[0, 1, 0, 1, 1]), words)
    show_end(Trace(), words)
    assert capsys.readouterr().out == ("  the turn  't4 t5'\n"
                                       "  the definitions of its tools leave no tokens to answer\n")


# ------------------------------------------------------------------------------- a copied stage 1


def stage1(folder):
    """An sft folder with a model, a log, and a checkpoint, which is large."""
    for name in ("config.json", "metrics.csv", "model/config.json", "model/model.safetensors", "checkpoints/0000005/x"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"{folder.parent.name} {name}")
    return folder


def content(folder):
    return {path.relative_to(folder).as_posix(): path.read_text() for path in folder.rglob("*") if path.is_file()}


def test_another_runs_stage_1_is_copied_without_its_checkpoints(tmp_path):
    source = stage1(tmp_path / "run" / "sft")
    before, out = content(source), tmp_path / "other"
    assert stage1_model(str(out), str(source), False) == out / "sft" / "model"
    names = ["config.json", "metrics.csv", "model/config.json", "model/model.safetensors"]
    assert content(out) == {f"sft/{name}": f"run {name}" for name in names} | {"lock": ""}
    assert content(source) == before and {path.name for path in out.iterdir()} == {"sft", "lock"}
    assert stage1_model(str(out), "", False) == out / "sft" / "model"


def test_an_sft_folder_that_exists_is_kept(tmp_path):
    """--sft is refused. With --resume it is ignored, also if the other run is gone."""
    source, own = stage1(tmp_path / "run" / "sft"), stage1(tmp_path / "other" / "sft")
    before = content(own)
    with pytest.raises(InputError, match="^sft: .*other/sft exists already; .*choose another --out$"):
        stage1_model(str(own.parent), str(source), False)
    for folder in (source, tmp_path / "gone"):
        assert stage1_model(str(own.parent), str(folder), True) == own / "model"
    assert content(own) == before


def test_a_resumed_run_that_died_before_the_copy_is_copied(tmp_path):
    source, out = stage1(tmp_path / "run" / "sft"), tmp_path / "other"
    (out / "part").mkdir(parents=True)
    (out / "part" / "half").write_text("x")
    stage1_model(str(out), str(source), True)
    assert len(content(out)) == 5 and content(out)["sft/config.json"] == "run config.json"


@pytest.mark.parametrize("missing", ["config.json", "model/config.json"])
def test_a_folder_without_a_trained_model_is_refused_and_nothing_is_written(tmp_path, missing):
    source, out = stage1(tmp_path / "run" / "sft"), tmp_path / "other"
    (source / missing).unlink()
    with pytest.raises(InputError, match=rf"^sft: no trained model in .*run/sft \({missing} is missing\)"):
        stage1_model(str(out), str(source), False)
    assert not out.exists()
    with pytest.raises(InputError, match="^out: no trained model in .*run/sft "):
        stage1_model(str(source.parent), "", False)
