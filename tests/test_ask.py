"""python mtr.py ask --model FOLDER: what it prints and when, a user's own tools, broken input."""
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from test_agents import act, say, scripted
from test_model import BROKEN

import agents
import evaluate
import graph
import grpo
import mtr
from data.options import run_main
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
    """Run the program in this process, in a temporary folder -> exit code, stdout since the last read, stderr."""
    monkeypatch.chdir(tmp_path)

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["mtr.py", "ask", *map(str, words)])
        try:
            run_main(mtr.main)
        except SystemExit as stop:
            return stop.code, *capsys.readouterr()
        return 0, *capsys.readouterr()
    return run


def write(path, value):
    path.write_text(value if isinstance(value, str) else json.dumps(value), encoding="utf-8")
    return path


# ------------------------------------------------------------------------------------------ end to end


@pytest.mark.parametrize("own", [True, False])
def test_the_garbage_of_random_weights_breaks_nothing(tiny, folder, tmp_path, ask, monkeypatch, own):
    """The tools are replaced by the fallback, and the trace ends. With Qwen2.5's tokenizer if MTR_QWEN is set."""
    tokenizer = Tokenizer(Path(REAL or folder))
    save_model(tiny(tokenizer.size + 7, dtype=torch.float32), tokenizer, tmp_path / "checkpoint")
    config = json.loads((tmp_path / "checkpoint" / "config.json").read_text())
    write(tmp_path / "checkpoint" / "config.json", config | {"max_position_embeddings": 32768})
    tools = ["--tools", write(tmp_path / "tools.json", [WEATHER])] if own else []
    code, out, err = ask("--model", tmp_path / "checkpoint", "Is it raining in Doka?", "--turn-tokens", 24, *tools)
    assert (code, err) == (0, "") and re.search(r"\n  truncated\n  the turn  '.+'\n$", out)
    assert ("its tools were rejected, so there is one general tool" in out) is not own


@pytest.fixture
def played(monkeypatch, tokenizer, folder, capsys):
    """Replace the sampler by a script -> a list that collects (prompt, stdout since the previous prompt)."""
    config = json.loads((folder / "config.json").read_text())
    write(folder / "config.json", config | {"max_position_embeddings": 32768})
    seen = []

    def play(agent, actor="{}", maker=""):
        turns = iter(agent)

        def script(context):
            seen.append((context, capsys.readouterr().out))
            return actor if "You play a tool" in context else maker if "Write the tools" in context else next(turns)
        monkeypatch.setattr(graph, "Sampler", lambda *_: scripted(tokenizer, script))
        return seen
    return play


def test_each_part_is_printed_before_the_next_is_generated(folder, ask, played):
    """One checkpoint in three roles: the tools, then thought and calls, then observations, then thought and answer."""
    maker = agents.ToolMaker.reply("So.", "comparison", [agents.Tool(**MAYOR)])
    agent = [act(("mayor", {"city": "Doka"}), ("nothing", {})), say("Bo")]
    seen = played(agent, '{"mayor": "Bo"}', maker)
    code, last, err = ask("--model", folder, "Who governs Doka?")
    assert (code, err) == (0, "") and len(seen) == 4
    assert ["Write the tools" in c or "You play a tool" in c for c, _ in seen] == [True, False, True, False]
    tools, calls, observations = (screen for _, screen in seen[1:])
    assert seen[0][1] == "" and tools.startswith(
        "\nToolMaker: comparison\n  mayor(city) -> mayor  Who governs a city.\n  compare(names, values, pick) -> result  ")
    assert tools.count("\n") == 6 and tools.endswith("\n\nAutoAgent and ToolActor:\n")
    assert calls == "  thinks    I look it up.\n  calls     mayor(city='Doka')\n  calls     nothing()\n"
    assert observations == '  observes  {"mayor": "Bo"}\n  observes  {"error": "unknown tool"}\n'
    assert last == "  thinks    Done.\n  answers   Bo\n"


def test_a_users_own_tools_replace_the_toolmakers(folder, tmp_path, ask, played):
    """The prompt holds their schemas unchanged. An OpenAI function has no return schema, so any object is a result."""
    seen = played([act(("weather", {"city": "Doka"}), ("weather", {"town": 1})), say("rain")], '{"sky": ["rain"]}')
    tools = write(tmp_path / "tools.json", [WEATHER, MAYOR])
    code, last, _ = ask("--model", folder, "Is it raining in Doka?", "--tools", tools)
    assert code == 0 and last.endswith("answers   rain\n") and "ToolMaker" not in "".join(s for _, s in seen)
    kept = {k: v for k, v in WEATHER["function"].items() if k != "strict"}
    assert all(json.dumps({"type": "function", "function": f}) in seen[0][0]
               for f in (kept, {k: v for k, v in MAYOR.items() if k != "returns"}))
    assert '{"sky": ["rain"]}' in seen[2][1] and "'city' is a required property" in seen[2][1]


@pytest.mark.parametrize("words, turns", [((), 8), (("--max-turns", 3), 3)])
def test_it_ends_when_the_turns_run_out(folder, tmp_path, ask, played, words, turns):
    seen = played([act(("weather", {"city": "Doka"}))] * 9)
    tools = write(tmp_path / "tools.json", [WEATHER])
    code, last, _ = ask("--model", folder, "Is it raining?", "--tools", tools, *words)
    assert code == 0 and last.endswith("  truncated\n")
    assert sum("play a tool" not in c for c, _ in seen) == turns and evaluate.LIMITS["max_turns"] == 8


def test_the_text_of_a_malformed_turn_is_printed(folder, tmp_path, ask, played):
    """Of the last turn only, with its end and in quotes."""
    played([act(("weather", {"city": "Doka"})), "<answer>It \nrains.</answer></think><answer>No.</answer>"])
    code, last, _ = ask("--model", folder, "Is it raining?", "--tools", write(tmp_path / "tools.json", [WEATHER]))
    assert (code, last) == (
        0, "  malformed different answers\n  departs   no thought, text beside the tags, several answers, different answers\n"
        "  the turn  '<answer>It \\nrains.</answer></think><answer>No.</answer><|im_end|>'\n")


@pytest.mark.parametrize("words, temperature", [((), 0.0), (("--temperature", 0.7), 0.7)])
def test_the_temperature_is_the_agents_alone(folder, ask, tokenizer, monkeypatch, words, temperature):
    """The first tries of ToolMaker and ToolActor are greedy."""
    config = json.loads((folder / "config.json").read_text())
    write(folder / "config.json", config | {"max_position_embeddings": 32768})
    maker = agents.ToolMaker.reply("So.", "composition", [agents.Tool(**MAYOR)])
    samplers = []  # of the ToolMaker and the ToolActor, and of AutoAgent

    def sampler(*_):
        turns = iter([act(("mayor", {"city": "Doka"})), say("Bo")] if samplers else [maker, '{"mayor": "Bo"}'])
        samplers.append(scripted(tokenizer, lambda context: next(turns)))
        return samplers[-1]
    monkeypatch.setattr(graph, "Sampler", sampler)
    code, out, _ = ask("--model", folder, "Who governs Doka?", *words)
    assert code == 0 and out.endswith("  answers   Bo\n")
    assert [s.temperatures for s in samplers] == [[0.0, 0.0], [temperature, temperature]]


def test_the_answers_of_several_samples_are_counted(folder, ask, played, monkeypatch):
    """Three traces of one prompt; the second answers at once. Only the first is told. Each draws its own numbers."""
    started = []

    def run_episodes(agent, backend, traces, group=1, **more):
        started.append(([trace.key for trace in traces], group))
        agents.run_episodes(agent, backend, traces, group, **more)
    monkeypatch.setattr(mtr, "run_episodes", run_episodes)
    maker = agents.ToolMaker.reply("So.", "composition", [agents.Tool(**MAYOR)])
    call = act(("mayor", {"city": "Doka"}))
    seen = played([call, say("Al"), call, say("Bo"), say("Bo")], '{"mayor": "Bo"}', maker)
    code, last, err = ask("--model", folder, "Who?", "--samples", 3, "--temperature", 0.5, "--seed", 4)
    assert (code, err) == (0, "") and len(seen) == 7  # five turns, the tools, one result for both calls
    screen = "".join(text for _, text in seen) + last
    assert screen.endswith("\nAutoAgent and ToolActor:\n  thinks    I look it up.\n  calls     mayor(city='Doka')\n"
                           '  observes  {"mayor": "Bo"}\n  thinks    Done.\n  answers   Bo\n'
                           "\n2 of 3  Bo\n1 of 3  Al\n")
    assert started == [([(4, "Who?", sample) for sample in range(3)], 3)]


@pytest.mark.parametrize("seed", [0, 3])
def test_the_tools_are_drawn_as_in_the_evaluation(folder, ask, monkeypatch, seed):
    """The retries of the ToolMaker draw with question and seed. So ask makes the same tools as Simulator.make_tools."""
    made = []

    def make(maker, questions, key=()):
        made.append((questions, key))
        return [agents.Toolbox("composition", [agents.FALLBACK], 0)] * len(questions)
    monkeypatch.setattr(agents.ToolMaker, "make", make)
    assert ask("--model", folder, "Who?", "--seed", seed, "--turn-tokens", 2, "--max-turns", 1)[0] == 0
    simulator = SimpleNamespace(boxes={}, maker=agents.ToolMaker(None), config=grpo.GRPOConfig(seed=seed))
    grpo.Simulator.make_tools(simulator, [SimpleNamespace(id="q", text="Who?")])
    assert made == [(["Who?"], (seed,))] * 2


# ------------------------------------------------------------------------------------------- mistakes


def without(part, **changes):
    return [{k: v for k, v in {**MAYOR, **changes}.items() if k != part}]


@pytest.mark.parametrize("tools, culprit", [
    ("{", "JSON"), (3, "object"), ([], "at least one"), ([WEATHER, 3], "tool 2"), ([MAYOR, MAYOR], "tool 2"),
    (without("name"), "tool 1"), (without("", description=3), "tool 1"), (without("", name="a b"), "name"),
    (without("", extra=1), "tool 1"), (without("", parameters=[]), "object"), (without("", returns=[]), "object"),
    (without("", parameters={"type": "object", "properties": {"a": {"type": "text"}}}), "properties/a/type")], ids=repr)
def test_a_broken_file_of_tools_is_refused_by_name(tmp_path, folder, ask, tools, culprit):
    code, out, err = ask("--model", folder, "Who?", "--tools", write(tmp_path / "my.json", tools))
    assert (code, out) == (2, "") and "my.json" in err and culprit in err and err.count("\n") == 1


def test_schemas_are_taken_as_they_are(tmp_path):
    """Also the 30 real schemas, which stand beside MTR_QWEN if it is set."""
    real = sorted((Path(REAL).parent / "tools").glob("*.json")) if REAL else []
    for file in [write(tmp_path / "one.json", [WEATHER]), *real]:
        given = [schema["function"] for schema in json.loads(file.read_text(encoding="utf-8"))]
        taken = [tool.schema["function"] for tool in evaluate.load_tools(file)]
        assert taken == [{k: v for k, v in function.items() if k != "strict"} for function in given]
        assert all(agents.parse_observation(tool, '{"any": [1]}') == {"any": [1]} for tool in evaluate.load_tools(file))


TEN = ["no config", "config is no JSON", "scaled rotary", "weights cut short", "a shape turned round", "integers",
       "a NaN", "a tensor in two shards", "a shard missing", "no tokenizer"]


def everything_in(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("name", TEN)
def test_a_broken_checkpoint_ends_with_one_line(folder, tmp_path, ask, name):
    """The exit code is 2, the line names the culprit, stdout is empty, and no file changes."""
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


@pytest.mark.parametrize("most, words, room", [(512, (), 512), (512, ("--trace-tokens", 400), 400), (8192, (), 4096)])
def test_a_question_longer_than_the_context_is_refused(folder, tmp_path, ask, most, words, room):
    """The room is that of the checkpoint, but at most 4096, or that of --trace-tokens. A prompt that fills it is refused.
    One token less leaves room for one token of the agent."""
    config = json.loads((folder / "config.json").read_text())
    write(folder / "config.json", config | {"max_position_embeddings": most})
    tools = write(tmp_path / "tools.json", [MAYOR])
    tokenizer, made = Tokenizer(folder), evaluate.load_tools(tools)

    def tokens(n):
        return len(tokenizer.encode(agents.AutoAgent.prompt(tokenizer.prompts, "?" * n, made)))
    n = room - tokens(1) + 1
    while tokens(n) < room:
        n += 1
    code, out, err = ask("--model", folder, "?" * n, "--tools", tools, *words)
    assert (code, out) == (2, "") and f"question: its prompt has {room} tokens" in err and err.count("\n") == 1
    assert f"room for {room} " in err
    code, out, _ = ask("--model", folder, "?" * (n - 1), "--tools", tools, *words)
    assert code == 0 and "\n  truncated\n  the turn  " in out


def test_more_tokens_per_trace_than_the_checkpoint_has_are_refused(folder, ask):
    """The folder of the tests has 256 positions."""
    code, out, err = ask("--model", folder, "Who?", "--trace-tokens", 257)
    assert (code, out) == (2, "") and "trace_tokens: 257" in err and "made for 256" in err and err.count("\n") == 1


@pytest.mark.parametrize("question", ["", " \n"])
def test_an_empty_question_is_refused(folder, ask, question):
    code, out, err = ask("--model", folder, question)
    assert (code, out) == (2, "") and "question: it is empty" in err and err.count("\n") == 1


@pytest.mark.parametrize("words, culprit", [
    (("--temperature", -0.5), "temperature"), (("--seed", -1), "seed"), (("--threads", -1), "threads"),
    (("--max-turns", 0), "max_turns"), (("--turn-tokens", 0), "turn_tokens"), (("--trace-tokens", -5), "trace_tokens")])
def test_a_number_out_of_range_is_refused_by_name(folder, ask, words, culprit):
    code, out, err = ask("--model", folder, "Who?", *words)
    assert (code, out) == (2, "") and f"{culprit}: expected a number " in err and err.count("\n") == 1
