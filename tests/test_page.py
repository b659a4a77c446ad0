"""report.html: what it holds of a run, that no text can become markup, its size, runs without traces."""
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import report
from data import InputError, tables
from data.folders import trained_by
from data.page import choose, encode, page_json
from data.tokenizer import Tokenizer, train_tokenizer
from data.world import make_world

ROOT = Path(__file__).resolve().parents[1]
TEMPLATE = (ROOT / "docs" / "report_template.html").read_text(encoding="utf-8")
HTML = "</script><img src=x onerror=alert(1)><!--"
REWARDS = {"reward": 0.85, "em": 1.0, "answer": 1.0, "consistency": 0.5}


@pytest.fixture
def out(tmp_path):
    """The folder of a run without traces: configs, metrics, and a tokenizer of ASCII words."""
    for stage, header in (("sft", "step,loss_agent"), ("grpo", "step,reward,heldout_sampled,heldout_greedy")):
        (tmp_path / stage).mkdir()
        (tmp_path / stage / "config.json").write_text('{"seed": 0, "data": []}')
        (tmp_path / stage / "metrics.csv").write_text(header + "\n")
    train_tokenizer(["the boss of Ada"] * 3, 270, tmp_path / "sft" / "model")
    return tmp_path


def line(key, ids=(1, 2, 3, 10, 11, 4, 12), mask=(0, 0, 0, 1, 1, 0, 1), step=None, **more):
    """One trace as stage 2 writes it."""
    trace = {"step": key[1] if step is None else step, "question": "Who?", "status": "answered",
             "turns": [{"thought": "Hm.", "calls": [], "answer": "Ada", "error": None, "departures": []}],
             "key": list(key), "tools": [], "ids": list(ids), "mask": list(mask), "advantage": 1.5,
             "weight": 0.25, "logprobs": [-0.12345, -0.00001, -2.5], "old": [-0.12245, -0.00001, -2.4],
             "golds": ["Ada"], "rewards": REWARDS}
    return trace | more


def write(out, lines):
    text = "".join(json.dumps(entry) + "\n" for entry in lines)
    (out / "grpo" / "traces.jsonl").write_text(text)


def read(out):
    """report.html and the data in it. NaN is no JSON, though Python would read it."""
    report.write_page(out)
    text = (out / "report.html").read_text(encoding="utf-8")
    found = re.findall(r'<script type="application/json" id="data">(.*?)</script>', text, re.S)
    assert len(found) == 1
    return text, json.loads(found[0], parse_constant=lambda name: pytest.fail(name))


def test_groups_by_hand(out):
    """Two traces of a rollout are one group; a held-out question is one group over all steps."""
    write(out, [line((0, "eval", "q9", 0), step=0, old=[]), line((0, 0, "q1", 0)), line((0, 0, "q1", 1)),
                line((0, 0, "q2", 0)), line((0, "eval", "q9", 0), step=4, old=[])])
    held_out, *training = sorted(read(out)[1]["groups"], key=lambda group: group["step"] is not None)
    assert [(g["step"], [t["key"][3] for t in g["traces"]]) for g in training] == [(0, [0, 1]), (0, [0])]
    assert held_out["step"] is None and [t["step"] for t in held_out["traces"]] == [0, 4]
    group = training[0]
    assert (group["prompt"], group["question"], group["golds"]) == ([1, 2, 3], "Who?", ["Ada"])
    trace = group["traces"][0]
    assert (trace["ids"], trace["runs"]) == ([10, 11, 4, 12], [2, 1, 1])
    assert (trace["logprobs"], trace["gap"]) == ([-0.123, 0, -2.5], [0.001, 0, 0.1])
    assert (trace["advantage"], trace["weight"], trace["rewards"]) == (1.5, 0.25, REWARDS)
    assert held_out["traces"][0]["gap"] == []


def test_a_trace_without_own_tokens(out):
    """Its tools left no room: the prompt is all that there is."""
    write(out, [line((0, 0, "q1", 0), ids=[1, 2], mask=[0, 0], logprobs=[], old=[], turns=[])])
    [group] = read(out)[1]["groups"]
    assert group["prompt"] == [1, 2] and group["traces"][0]["ids"] == group["traces"][0]["runs"] == []


@pytest.mark.parametrize("files", [[], ["questions.jsonl"]])
def test_the_truth_beside_an_observation(out, files):
    """Of calls that the world can answer. On question files there is no world."""
    world = make_world(0)
    (relation, subject), value = next(iter(world.facts.items()))
    calls = [{"name": relation, "arguments": {"x": subject}, "error": None, "observation": {relation: "Nobody"}},
             {"name": relation, "arguments": {"x": "Nobody"}, "error": None, "observation": {}},
             {"name": relation, "arguments": {"x": subject}, "error": "bad", "observation": {"error": "bad"}},
             {"name": "compare", "arguments": {"x": subject}, "error": None, "observation": {}}]
    turn = {"thought": "", "calls": calls, "answer": None, "error": None, "departures": []}
    write(out, [line((0, 0, "q1", 0), turns=[turn])])
    (out / "grpo" / "config.json").write_text(json.dumps({"seed": 0, "data": files}))
    [group] = read(out)[1]["groups"]
    truths = [call.get("truth") for call in group["traces"][0]["turns"][0]["calls"]]
    want = [{relation: value}, {"error": f"no {relation} found"}, None, None]
    assert truths == (want if not files else [None] * 4)


def test_the_texts_of_the_tokens(out):
    """Control tokens are spelled out. Half of a character is U+FFFD, which breaks nothing."""
    tokenizer = Tokenizer(out / "sft" / "model")
    words = tokenizer.encode(["the boss of Ada"])
    halves = tokenizer.encode(["é"])
    ids = [tokenizer.end, *words, *halves]
    write(out, [line((0, 0, "q1", 0), ids=ids, mask=[0, *[1] * (len(ids) - 1)])])
    tokens = read(out)[1]["tokens"]
    assert set(tokens) == {str(i) for i in ids} and len(halves) == 2
    assert tokens[str(tokenizer.end)] == "<|im_end|>"
    assert "".join(tokens[str(i)] for i in words) == "the boss of Ada"
    assert [tokens[str(i)] for i in halves] == ["\ufffd", "\ufffd"]


def test_no_text_becomes_markup(out):
    """In question, answer, observation, tool and tokens. The file has the template's tags and no other."""
    tokenizer = Tokenizer(out / "sft" / "model")
    said = tokenizer.encode([HTML])
    call = {"name": HTML, "arguments": {HTML: HTML}, "error": None, "observation": {"x": HTML}}
    turn = {"thought": HTML, "calls": [call], "answer": HTML, "error": HTML, "departures": [HTML]}
    tool = {"type": "function", "function": {"name": "x", "description": HTML, "parameters": {}}}
    write(out, [line((0, 0, HTML, 0), ids=[1, *said], mask=[0, *[1] * len(said)], question=HTML, golds=[HTML],
                     tools=[tool], turns=[turn], status=HTML)])
    text, data = read(out)
    assert text.count("<") == TEMPLATE.count("<") and "<img" not in text
    [group] = data["groups"]
    assert group["question"] == group["tools"][0]["function"]["description"] == HTML
    assert group["traces"][0]["turns"][0]["calls"][0]["observation"] == {"x": HTML}
    assert "".join(data["tokens"][str(i)] for i in group["traces"][0]["ids"]) == HTML


def test_half_a_surrogate_is_written(out):
    write(out, [line((0, 0, "q1", 0), question="\ud800")])
    assert read(out)[1]["groups"][0]["question"] == "\ud800"


def test_the_template_reads_no_text_as_html_and_loads_nothing():
    assert not re.findall("innerHTML|outerHTML|insertAdjacent|document.write|eval|srcdoc|import", TEMPLATE)
    assert re.findall(r"https?://[^\"]*", TEMPLATE) == ["http://www.w3.org/2000/svg"]
    assert "default-src 'none'" in TEMPLATE and not re.findall(r"<(link|img|iframe|script src)", TEMPLATE)
    assert TEMPLATE.count("REPORT_DATA") == 1


def test_the_template_can_be_read():
    assert len(TEMPLATE.splitlines()) <= 400
    assert max(map(len, TEMPLATE.splitlines())) <= 100


def test_a_page_of_a_long_run_stays_small(out):
    """It has less than 2 MB, uses most of them, and spreads its groups over all steps."""
    many = {"ids": [1, *range(50, 250), *range(50, 250)], "mask": [0, *[1] * 200, *[0] * 200],
            "logprobs": [-1.234] * 200, "old": [-1.111] * 200}
    lines = []
    for step in range(80):
        lines += [line((0, step, f"q{step}", sample), **many) for sample in range(8)]
    for step in range(0, 84, 4):
        lines += [line((0, "eval", f"h{i}", 0), step=step, **many) for i in range(12)]
    write(out, lines)
    assert (out / "grpo" / "traces.jsonl").stat().st_size > 4_000_000
    text, data = read(out)
    assert 1_000_000 < len(text.encode()) < 2_000_000
    steps = [group["step"] for group in data["groups"] if group["step"] is not None]
    assert steps[0] == 0 and steps[-1] >= 70 and max(b - a for a, b in zip(steps, steps[1:], strict=False)) <= 4
    held_out = [group for group in data["groups"] if group["step"] is None]
    assert len(held_out) == 12
    for group in held_out:
        shown = [trace["step"] for trace in group["traces"]]
        assert shown[0] == 0 and shown[-1] == 80


def test_which_groups_are_chosen():
    """Every n-th, and the last trace of a held-out question always: here 6 groups and 5 evaluations."""
    training = [{"step": i, "traces": ["x" * 100]} for i in range(6)]
    held_out = {"step": None, "traces": [f"{i}" + "x" * 99 for i in range(5)]}
    groups = [*training, held_out]

    def shown(room):
        kept = choose(groups, room)
        assert len(encode(kept)) <= max(room, 2)
        return [g["step"] for g in kept], [trace[0] for g in kept if g["step"] is None for trace in g["traces"]]

    whole = len(encode(groups))
    assert shown(whole) == ([0, 1, 2, 3, 4, 5, None], ["0", "1", "2", "3", "4"])
    assert shown(whole - 1) == ([0, 2, 4, None], ["0", "2", "4"])
    assert shown(700) == ([0, 3, None], ["0", "3", "4"])
    assert shown(550) == ([0, 4, None], ["0", "4"])
    assert shown(400) == ([0, None], ["0", "4"])
    assert shown(100) == ([], [])


def test_a_run_without_traces(out):
    data = read(out)[1]
    assert data["groups"] == [] and data["unread"] == 0 and data["tokens"] == {}


def test_lines_that_cannot_be_read_are_counted(out):
    """The last line of a run that goes on, a line of an older version, a number that is none."""
    write(out, [line((0, 0, "q1", 0)), line((0, 1, "q1", 0), logprobs=[float("nan")] * 3)])
    old = line((0, 1, "q2", 0))
    del old["logprobs"]
    with open(out / "grpo" / "traces.jsonl", "a") as file:
        file.write(json.dumps(old) + "\n[]\n5\n" + json.dumps(line((0, 1, "q3", 0)))[:200])
    data = read(out)[1]
    assert [group["step"] for group in data["groups"]] == [0] and data["unread"] == 5


def test_traces_without_a_tokenizer_are_refused_in_one_line(out):
    write(out, [line((0, 0, "q1", 0))])
    (out / "sft" / "model" / "tokenizer.json").unlink()
    with pytest.raises(InputError, match="tokenizer.json: no such file"):
        read(out)


def test_the_curves_of_the_page(out):
    """Rows without a value and values that are not finite are left out. A long curve is thinned."""
    (out / "grpo" / "metrics.csv").write_text("step,reward,heldout_sampled\n0,0.5,0.25\n1,nan,\n2,0.75,0.5\n")
    rows = "".join(f"{i},{i + 1}\n" for i in range(1000))
    (out / "sft" / "metrics.csv").write_text("step,loss_agent\n" + rows)
    panels = read(out)[1]["panels"]
    lines = {name: (steps, values) for _, _, lines in panels for name, steps, values in lines}
    assert lines["heldout_sampled"] == ([0, 2], [0.25, 0.5]) and lines["reward"] == ([0, 2], [0.5, 0.75])
    steps, values = lines["loss_agent"]
    assert len(steps) <= 300 and steps[:2] == [0, 4]
    assert values[:2] == [1, 3] and values[-1] == steps[-1] + 1 - 9.5  # the median of the last twenty
    assert lines["calls"] == ([], [])


def test_the_page_says_where_it_comes_from(out, monkeypatch):
    monkeypatch.setattr("sys.argv", ["/somewhere/mtr.py", "--out", "a b"])
    data = json.loads(page_json(out, {"run": "x"}, 10_000))
    assert data["command"] == "python mtr.py --out 'a b'" and data["run"] == "x"
    assert data["config"]["seed"] == 0 and data["processor"]
    assert re.fullmatch(r"([0-9a-f]{7,40}(-dirty)?)?", data["commit"])


@pytest.mark.parametrize("changed", ["grpo/traces.jsonl", "sft/metrics.csv", "sft_continued/metrics.csv", "template", "report.py"])
def test_a_page_is_written_again_if_anything_that_it_shows_is_newer(out, changed, monkeypatch):
    for path in ("grpo/traces.jsonl", "sft_continued/metrics.csv"):
        (out / path).parent.mkdir(exist_ok=True)
        (out / path).write_text("")
    report.write_page(out)
    (out / "report.html").write_text("kept")
    report.write_page(out)
    assert (out / "report.html").read_text() == "kept"
    source = {"template": Path(report.__file__).parent / "docs" / "report_template.html", "report.py": Path(report.__file__)}
    path = source.get(changed, out / changed)
    real, later = Path.stat, (out / "report.html").stat().st_mtime + 5

    def stat(self, **more):
        found = real(self, **more)
        return os.stat_result((*found[:8], later, later)) if self == path else found
    monkeypatch.setattr(Path, "stat", stat)
    report.write_page(out)
    assert (out / "report.html").read_text() != "kept"


def test_results_of_models_that_were_trained_again_are_not_shown(out, capsys):
    """One byte of a stage's config.json stands for other options, data or steps. Results of a version that wrote no
    fingerprint are shown."""
    shares = dict.fromkeys(["valid", "exact", "accepted", "regenerated", "fallback"], 0.5)
    row = {"row": "grpo", "n": 200, "em_sampled": 0.123, "by_set": {"hotpot": 0.25}}
    results = {"seed": 0, "rows": [row], "maker": shares, "actor_recall": 1.0, "actor_fidelity": 1.0, "seconds": {}}
    (out / "story.txt").write_text("Once.")
    for stage in ("sft", "grpo"):
        (out / "results.json").write_text(json.dumps(results | {"trained_by": trained_by(out)}))
        report.show_run(str(out))
        assert "0.123" in capsys.readouterr().out
        with open(out / stage / "config.json", "a") as file:
            file.write(" ")
        report.show_run(str(out))
        said = capsys.readouterr().out
        assert "0.123" not in said and "no table: results.json is missing, or older than the models" in said
        (out / "report.html").unlink()
        assert read(out)[1]["results"] == []
    (out / "results.json").write_text(json.dumps(results))
    report.show_run(str(out))
    assert "0.123" in capsys.readouterr().out


def test_a_picture_that_fails_does_not_end_the_run(out, monkeypatch, capsys):
    def fail(folder):
        raise RuntimeError("no font")
    monkeypatch.setattr(report, "draw_curves", fail)
    read(out)
    assert capsys.readouterr().out == "curves.png is missing: RuntimeError: no font\n"


@pytest.mark.parametrize("backend", ["module://matplotlib_inline.backend_inline", "nonsense", "TkAgg", "agg"])
def test_a_notebooks_backend_does_not_keep_the_curves_from_being_drawn(out, backend):
    """MPLBACKEND names a backend that matplotlib refuses when it is imported, or that needs a screen."""
    code = "import sys, report; from pathlib import Path; report.draw_curves(Path(sys.argv[1]))"
    done = subprocess.run([sys.executable, "-c", code, out], cwd=Path(report.__file__).parent, capture_output=True, text=True,
                          env={"MPLBACKEND": backend, "PATH": "/usr/bin:/bin", "HOME": str(out)})
    assert done.returncode == 0, done.stderr
    assert (out / "curves.png").stat().st_size > 1000


def test_show_writes_the_page_when_the_run_is_newer(out, capsys):
    """Also of stage 2 alone, which has no table. A page that is newer than the run is kept."""
    page = out / "report.html"
    report.show_run(str(out))
    assert f"{page}" in capsys.readouterr().out
    page.write_text("kept")
    report.show_run(str(out))
    assert page.read_text() == "kept"
    shares = dict.fromkeys(["valid", "exact", "accepted", "regenerated", "fallback"], 0.5)
    row = {"row": "grpo", "n": 200, "em_sampled": 0.5, "by_set": {"hotpot": 0.25}}
    results = {"seed": 0, "rows": [row], "maker": shares, "actor_recall": 1.0, "actor_fidelity": 1.0, "seconds": {}}
    (out / "results.json").write_text(json.dumps(results))
    (out / "story.txt").write_text("Once.")
    later = page.stat().st_mtime + 5
    os.utime(out / "results.json", (later, later))
    report.show_run(str(out))
    data = read(out)[1]
    assert data["results"] == [results] and data["meanings"] == tables.ROWS
    assert set(data["columns"]) == {*tables.SCORES, *tables.BY_SET}
