"""python mtr.py ask on a checkpoint: what it shows and when, tools of one's own, broken folders."""
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_agents import act, say, scripted
from test_model import BROKEN

import agents
import evaluate
import mtr
import run as run_file
from model import Tokenizer, save_model

ROOT = Path(__file__).resolve().parents[1]
REAL = os.environ.get("MTR_QWEN")
CITY = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"],
        "additionalProperties": False}
WEATHER = {"type": "function", "function": {"name": "weather", "description": "Weather <now> & later. " * 20,
                                            "strict": True, "parameters": CITY}}
MAYOR = {"name": "mayor", "description": "Who governs a city.", "parameters": CITY,
         "returns": {"type": "object", "properties": {"mayor": {"type": "string"}}, "required": ["mayor"]}}


@pytest.fixture
def ask(monkeypatch, capsys, tmp_path):
    """The program in this process, in a folder of its own -> exit code, what it printed since the last look, stderr."""
    monkeypatch.chdir(tmp_path)

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["mtr.py", "ask", *map(str, words)])
        try:
            run_file.run_main(mtr.main)
        except SystemExit as stop:
            return stop.code, *capsys.readouterr()
        return 0, *capsys.readouterr()
    return run


def write(path, value):
    path.write_text(value if isinstance(value, str) else json.dumps(value), encoding="utf-8")
    return path


# ------------------------------------------------------------------------------------------ end to end


@pytest.mark.parametrize("own", [True, False])
def test_random_weights_say_garbage_and_nothing_breaks(tiny, folder, tmp_path, ask, monkeypatch, own):
    """A malformed turn and malformed tools are events. With Qwen2.5's own tokenizer where MTR_QWEN names it."""
    tokenizer = Tokenizer(Path(REAL or folder))
    save_model(tiny(tokenizer.size + 7, dtype=torch.float32), tokenizer, tmp_path / "checkpoint")
    config = json.loads((tmp_path / "checkpoint" / "config.json").read_text())
    write(tmp_path / "checkpoint" / "config.json", config | {"max_position_embeddings": 32768})
    monkeypatch.setattr(evaluate, "TURN_TOKENS", 24)
    tools = ["--tools", write(tmp_path / "tools.json", [WEATHER])] if own else []
    code, out, err = ask("--model", tmp_path / "checkpoint", "Is it raining in Doka?", *tools)
    assert (code, err) == (0, "") and "malformed" in out and "it said" in out
    assert ("what it wrote was rejected" in out) is not own


@pytest.fixture
def played(monkeypatch, tokenizer, folder, capsys):
    """The sampler becomes a script -> list that fills with (context, what had come on the screen by then)."""
    config = json.loads((folder / "config.json").read_text())
    write(folder / "config.json", config | {"max_position_embeddings": 32768})
    seen = []

    def play(agent, actor="{}", maker=""):
        turns = iter(agent)

        def script(context):
            seen.append((context, capsys.readouterr().out))
            return actor if "You play a tool" in context else maker if "Write the tools" in context else next(turns)
        monkeypatch.setattr(evaluate, "Sampler", lambda *_: scripted(tokenizer, script))
        return seen
    return play


def test_each_part_is_shown_before_the_next_is_asked_for(folder, ask, played):
    """One checkpoint in three roles: the tools; the thought and the calls; what came back; thought and answer."""
    maker = agents.ToolMaker.reply("So.", "comparison", [agents.Tool(**MAYOR)])
    agent = [act(("mayor", {"city": "Doka"}), ("nothing", {})), say("Bo")]
    seen = played(agent, '{"mayor": "Bo"}', maker)
    code, last, err = ask("--model", folder, "Who governs Doka?")
    assert (code, err) == (0, "") and len(seen) == 4
    assert ["Write the tools" in c or "You play a tool" in c for c, _ in seen] == [True, False, True, False]
    tools, calls, observations = (screen for _, screen in seen[1:])
    assert seen[0][1] == "" and tools.startswith(f"\nToolMaker: comparison\n  {json.dumps(MAYOR)}\n  ")
    assert '\n  {"name": "compare"' in tools and tools.endswith("\n\nAutoAgent and ToolActor:\n")
    assert calls == "  thinks    I look it up.\n  calls     mayor(city='Doka')\n  calls     nothing()\n"
    assert observations == '  observes  {"mayor": "Bo"}\n  observes  {"error": "unknown tool"}\n'
    assert last == "  thinks    Done.\n  answers   Bo\n"


def test_tools_of_ones_own_take_the_toolmakers_place(folder, tmp_path, ask, played):
    """As they stand in the prompt; what an OpenAI function returns is not known, so any object will do."""
    seen = played([act(("weather", {"city": "Doka"}), ("weather", {"town": 1})), say("rain")], '{"sky": ["rain"]}')
    tools = write(tmp_path / "tools.json", [WEATHER, MAYOR])
    code, last, _ = ask("--model", folder, "Is it raining in Doka?", "--tools", tools)
    assert code == 0 and last.endswith("answers   rain\n") and "ToolMaker" not in "".join(s for _, s in seen)
    kept = {k: v for k, v in WEATHER["function"].items() if k != "strict"}
    assert all(json.dumps({"type": "function", "function": f}) in seen[0][0]
               for f in (kept, {k: v for k, v in MAYOR.items() if k != "returns"}))
    assert '{"sky": ["rain"]}' in seen[2][1] and "'city' is a required property" in seen[2][1]


def test_it_ends_when_the_turns_run_out(folder, tmp_path, ask, played):
    seen = played([act(("weather", {"city": "Doka"}))] * 9)
    code, last, _ = ask("--model", folder, "Is it raining?", "--tools", write(tmp_path / "tools.json", [WEATHER]))
    assert code == 0 and last.endswith("  truncated\n") and sum("play a tool" not in c for c, _ in seen) == evaluate.TURNS


# ------------------------------------------------------------------------------------------- mistakes


def without(part, **changes):
    return [{k: v for k, v in {**MAYOR, **changes}.items() if k != part}]


@pytest.mark.parametrize("tools, culprit", [
    ("{", "JSON"), (WEATHER, "list"), ([], "at least one"), ([WEATHER, 3], "tool 2"), ([MAYOR, MAYOR], "tool 2"),
    (without("name"), "tool 1"), (without("description"), "tool 1"), (without("", name="a b"), "name"),
    (without("", extra=1), "tool 1"), (without("", parameters=[]), "object"), (without("", returns={}), "object"),
    (without("", parameters={"type": "object", "properties": {"a": {"type": "text"}}}), "unknown type")], ids=repr)
def test_tools_that_are_none_are_refused_by_name(tmp_path, folder, ask, tools, culprit):
    code, out, err = ask("--model", folder, "Who?", "--tools", write(tmp_path / "my.json", tools))
    assert (code, out) == (2, "") and "my.json" in err and culprit in err and err.count("\n") == 1


def test_schemas_are_taken_as_they_are(tmp_path):
    """The 30 real ones too, where MTR_QWEN has them beside it."""
    real = sorted((Path(REAL).parent / "tools").glob("*.json")) if REAL else []
    for file in [write(tmp_path / "one.json", [WEATHER]), *real]:
        given = [schema["function"] for schema in json.loads(file.read_text(encoding="utf-8"))]
        taken = [tool.schema["function"] for tool in agents.load_tools(file)]
        assert taken == [{k: v for k, v in function.items() if k != "strict"} for function in given]
        assert all(agents.parse_observation(tool, '{"any": [1]}') == {"any": [1]} for tool in agents.load_tools(file))


TEN = ["no config", "config is no JSON", "scaled rotary", "weights cut short", "a shape turned round", "integers",
       "a NaN", "a tensor in two shards", "a shard missing", "no tokenizer"]


def everything_in(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("name", TEN)
def test_a_broken_checkpoint_ends_with_one_line(folder, tmp_path, ask, name):
    """Exit code 2, the culprit named, nothing on stdout, nothing written."""
    harm, culprit = BROKEN[name]
    harm(folder)
    before = everything_in(tmp_path)
    code, out, err = ask("--model", folder, "Who?")
    assert (code, out) == (2, "") and err.count("\n") == 1 and culprit in err and str(folder) in err
    assert everything_in(tmp_path) == before


def test_a_broken_checkpoint_from_the_command_line(folder, tmp_path):
    BROKEN["a NaN"][0](folder)
    done = subprocess.run([sys.executable, ROOT / "mtr.py", "ask", "--model", folder, "Who?"], cwd=tmp_path,
                          capture_output=True, text=True)
    assert done.returncode == 2 and not done.stdout and done.stderr.count("\n") == 1 and "finite" in done.stderr
    assert list(tmp_path.iterdir()) == [folder]


def test_a_question_longer_than_the_context_is_refused(folder, ask):
    """The tests' folder has room for 256 positions: refused from the first question that leaves nothing to say."""
    tokenizer, n = Tokenizer(folder), 1
    while len(tokenizer.encode(agents.AutoAgent.prompt("a" * n, []))) < 256:
        n += 1
    code, _, err = ask("--model", folder, "a" * n)
    assert code == 2 and "room for 256" in err and err.count("\n") == 1
    code, out, _ = ask("--model", folder, "a" * (n - 1))
    assert code == 0 and out.endswith("truncated\n")
