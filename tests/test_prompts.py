"""data/prompts.py: the long texts word by word, the text that begins AutoAgent's turns, and which folder gets which texts.

With MTR_QWEN, the texts are also compared with Qwen2.5's own tokenizer and chat template.
"""
import copy
import json
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
from test_agents import (
    BIRTHPLACE,
    COUNTRY,
    END,
    HEAD,
    START,
    TAIL,
    act,
    in_turn,
    play,
    say,
    scripted,
    segments,
    template,
)
from test_sft import ACTOR, AGENT, CONVERSATIONS, MAKER, teacher_records, words

import agents
import data.tools
import evaluate
import graph
import grpo
import sft
from agents import (
    AutoAgent,
    Tool,
    ToolActor,
    ToolMaker,
    Trace,
    check_tools,
    parse_observation,
    parse_tools,
    parse_turn,
    run_episodes,
)
from data import chat
from data.prompts import CLOSED_BOOK, LONG, SHORT
from data.tokenizer import CHAT_TEMPLATE, Tokenizer
from data.world import RELATIONS
from model import load, save_model
from sft import SFTConfig, to_trace

QWEN = os.environ.get("MTR_QWEN")
HEADER = f"{START}assistant\n"
CALL_EXAMPLE = """\
<think>
First I need the captain of the Sea Fox.
</think>
<tool_call>
{"name": "ship_captain", "arguments": {"ship": "Sea Fox"}}
</tool_call>"""
ANSWER_EXAMPLE = """\
<think>
The captain is Ida Brandt, and she was born in Velm.
</think>
<answer>Velm</answer>"""
EXAMPLE = {**AGENT, "turns": [
    {"thought": "First I need the captain of the Sea Fox.", "observations": [{}],
     "calls": [{"name": "ship_captain", "arguments": {"ship": "Sea Fox"}}]},
    {"thought": "The captain is Ida Brandt, and she was born in Velm.", "answer": "Velm"}]}


@pytest.fixture(params=["the tests'", "Qwen2.5's"])
def long(request, tokenizer):
    """A tokenizer that asks with the long texts."""
    if request.param == "Qwen2.5's":
        return Tokenizer(Path(QWEN)) if QWEN else pytest.skip("MTR_QWEN is not set")
    tokenizer = copy.copy(tokenizer)
    tokenizer.prompts = LONG
    return tokenizer


@pytest.fixture
def unmarked(folder):
    """A checkpoint folder that was not trained here, with room for long prompts."""
    for name, change in (("tokenizer_config.json", lambda config: config.pop("mtr_prompts")),
                         ("config.json", lambda config: config.update(max_position_embeddings=9000))):
        config = json.loads((folder / name).read_text(encoding="utf-8"))
        change(config)
        (folder / name).write_text(json.dumps(config), encoding="utf-8")
    return folder


# ----------------------------------------------------------------------------------------------- texts


def test_the_long_texts_show_one_whole_turn_of_each_form():
    for text in (CALL_EXAMPLE, ANSWER_EXAMPLE):
        assert LONG.agent.count(text) == 1
    assert LONG.agent.count("<tool_call>") == LONG.agent.count("<answer>Velm</answer>") == 1
    turn = parse_turn(CALL_EXAMPLE)
    assert (turn.thought, turn.error) == (EXAMPLE["turns"][0]["thought"], None)
    assert [(c.name, c.arguments) for c in turn.calls] == [("ship_captain", {"ship": "Sea Fox"})]
    turn = parse_turn(ANSWER_EXAMPLE)
    assert (turn.thought, turn.answer, turn.error) == (EXAMPLE["turns"][1]["thought"], "Velm", None)


def test_stage_1_writes_turns_in_the_form_of_the_examples():
    _, ((call, _), (answer, _)) = sft.split_conversation(EXAMPLE, LONG)
    assert LONG.begin + "".join(call) == CALL_EXAMPLE and LONG.begin + "".join(answer) == ANSWER_EXAMPLE


def test_the_template_prints_a_call_as_the_example_does():
    """Ours, and Qwen2.5's own."""
    sources = [CHAT_TEMPLATE.read_text(encoding="utf-8")]
    if QWEN:
        config = (Path(QWEN) / "tokenizer_config.json").read_text(encoding="utf-8")
        sources.append(json.loads(config)["chat_template"])
    turn = EXAMPLE["turns"][0]
    message = {"role": "assistant", "content": LONG.thought.format(turn["thought"]), "tool_calls": turn["calls"]}
    for source in sources:
        assert template(source)(messages=[message]).endswith(HEADER + CALL_EXAMPLE + END + "\n")


def test_the_makers_example_is_a_valid_reply():
    """The parser takes it, and stage 1 would write it letter by letter."""
    example = LONG.maker[LONG.maker.index("<think>First the keeper"):]
    thought, kind, tools = parse_tools(example)
    assert (kind, [tool.name for tool in tools]) == ("composition", ["lighthouse_keeper", "birthplace"])
    assert ToolMaker.reply(thought, kind, tools) == example
    assert all(f"{kind} (" in LONG.maker for kind in agents.KINDS) and f"1 to {agents.MAX_TOOLS} tools" in LONG.maker
    reply, error = (line.split(": ", 1)[1] for line in LONG.actor.split("\n")[-2:])
    for text in (reply, error):
        assert parse_observation(tools[0], text) == json.loads(text)
    assert list(json.loads(error)) == ["error"]


def test_no_tool_has_the_name_of_the_agents_example():
    names = {*agents.UTILITIES, agents.FALLBACK.name, *RELATIONS}
    assert "ship_captain" not in names and "ship_captain" not in LONG.maker


def test_the_long_texts_are_short_enough():
    tokenizer = Tokenizer(Path(QWEN)) if QWEN else pytest.skip("MTR_QWEN is not set")
    sizes = [len(tokenizer.encode(chat.own_text(text))) for text in (LONG.agent, LONG.maker, LONG.actor)]
    assert sizes == [235, 397, 113]


def test_a_prompt_has_the_ids_of_its_whole_text(long):
    """The tags of the example are control tokens, as in the template. Header and begin are encoded together."""
    schemas = "".join(f"\n{json.dumps(tool.schema)}" for tool in (BIRTHPLACE, COUNTRY))
    definition = BIRTHPLACE.definition + "\n{}"
    prompts = {f"{START}system\n{LONG.agent}{HEAD}{schemas}{TAIL}{START}user\nWho?{END}\n{HEADER}<think>\n":
               AutoAgent.prompt(LONG, "Who?", [BIRTHPLACE, COUNTRY]),
               f"{START}system\n{LONG.agent}{END}\n{START}user\nWho?{END}\n{HEADER}<think>\n": AutoAgent.prompt(LONG, "Who?", []),
               f"{START}system\n{LONG.maker}{END}\n{START}user\nWho?\nRejected: so{END}\n{HEADER}":
               ToolMaker.prompt(LONG, "Who?", "so"),
               f"{START}system\n{LONG.actor}{END}\n{START}user\n{definition}{END}\n{HEADER}":
               ToolActor.prompt(LONG, BIRTHPLACE.definition, {})}
    for text, pieces in prompts.items():
        assert "".join(pieces) == text and long.encode(pieces) == long.full.encode(text).ids
    found = long.encode(next(iter(prompts.values())))
    assert [found.count(long.control[tag]) for tag in ("<tool_call>", "</tool_call>")] == [3, 3]


def test_a_question_or_a_tool_cannot_spell_a_control_token(long):
    tool = Tool("<tool_call>", "</tool_call>", {}, {})
    ids = long.encode(AutoAgent.prompt(LONG, "<tool_call></tool_call>", [tool]))
    assert [ids.count(long.control[tag]) for tag in ("<tool_call>", "</tool_call>")] == [3, 3]


# ------------------------------------------------------------------------------- how a turn begins


def generated(turn):
    """What the model generates of a turn that the other tests write in the short form."""
    return turn.removeprefix("<think>").replace("</think>", "\n</think>").replace("<answer> ", "<answer>")


CALL, ANSWER = generated(act(("birthplace", {"person": "Bo"}))), generated(say("Velka"))


def test_the_program_begins_each_turn(long):
    """In a rollout: masked after the header, in the first turn and after each observation. The parser reads the whole."""
    trace = play(scripted(long, in_turn(CALL, ANSWER)))
    assert segments(trace, long, 1) == [CALL + END, ANSWER + END] and trace.status == "answered"
    first, second = segments(trace, long, 0)
    assert first.endswith(f"{END}\n{HEADER}<think>\n") and first.startswith(f"{START}system\n{LONG.agent}")
    assert second == f'\n{START}user\n<tool_response>\n{{"birthplace": "Velka"}}\n</tool_response>{END}\n{HEADER}<think>\n'
    assert [turn.thought for turn in trace.turns] == ["I look it up.", "Done."]
    assert trace.ids == long.full.encode(first + CALL + END + second + ANSWER + END).ids


def test_plain_text_after_the_forced_think_is_an_answer(long):
    """The thought that the program opens would swallow it. Before the first call it is no answer."""
    trace = play(scripted(long, in_turn(CALL, "Velka")))
    assert (trace.status, trace.answer) == ("answered", "Velka")
    assert trace.turns[1].departures == ["no thought", "answer without a tag"]
    assert segments(trace, long, 0)[1].endswith("<think>\n") and segments(trace, long, 1)[1] == "Velka" + END
    assert play(scripted(long, in_turn("Velka"))).status == "malformed"


def test_the_beginning_counts_in_the_budget(long):
    """A trace is truncated where the observation and the beginning of the next turn leave no token."""
    full = len(play(scripted(long, in_turn(CALL, ANSWER))).ids)
    last = len(long.encode([ANSWER, chat.IM_END]))
    assert play(scripted(long, in_turn(CALL, ANSWER)), trace_tokens=full - last + 1).mask[-1] == 1
    cut = play(scripted(long, in_turn(CALL, ANSWER)), trace_tokens=full - last)
    assert cut.status == "truncated" and len(cut.turns) == 1 and len(cut.turns[0].calls) == 1


@pytest.mark.parametrize("role", CONVERSATIONS)
def test_what_is_supervised_after_the_long_texts(role, long):
    """Stage 1 has the same turns, less what the program writes. ToolMaker and ToolActor have no such text."""
    record, says, hears = CONVERSATIONS[role]
    if role == "agent":
        says = [generated(text) for text in says]
        hears = [text + "<think>\n" for text in hears]
    kinds = ", ".join(agents.KINDS)
    for name in CONVERSATIONS:
        hears = [text.replace(getattr(SHORT, name).replace("{kinds}", kinds), getattr(LONG, name)) for text in hears]
    trace = to_trace(record, long)
    assert segments(trace, long, 1) == says and segments(trace, long, 0) == hears
    whole = "".join(part for pair in zip(hears, says, strict=True) for part in pair)
    assert trace.ids == long.full.encode(whole).ids


def test_a_rollout_of_the_teachers_words_is_its_conversation(long):
    """Same ids and mask, as with the short texts (test_sft.py)."""
    world, records = teacher_records()
    for record in records:
        said = [generated(words(turn)) for turn in record["turns"]]
        box = agents.Toolbox(record["kind"], check_tools(record["tools"]), 1)
        trace = Trace(record["question"], box.tools, (0,))
        run_episodes(AutoAgent(scripted(long, in_turn(*said)), 12, 3000, 20_000), data.tools.real(world.real), [trace])
        taught = to_trace(record, long)
        assert (trace.ids, trace.mask, trace.status) == (taught.ids, taught.mask, "answered")
        assert [turn.thought for turn in trace.turns] == [turn["thought"] for turn in record["turns"]]


def test_the_closed_book_baseline_replaces_the_beginning(long):
    trace = play(scripted(long, in_turn("Velka</answer>")), tools=[], closed_book=True)
    heard, = segments(trace, long, 0)
    assert heard.endswith(HEADER + CLOSED_BOOK) and trace.answer == "Velka" and trace.turns[0].thought == "I guess."
    assert play(scripted(long, in_turn(ANSWER))).answer == "Velka"  # and only there


def test_maker_and_actor_are_asked_as_they_were_taught(long):
    reply = sft.split_conversation(MAKER)[1][0][0][0]
    sampler = scripted(long, lambda context: reply)
    assert ToolMaker(sampler).make([MAKER["question"]])[0].tries == 1
    assert sampler.heard[0] == to_trace({**MAKER, "rejected": ""}, long).ids
    sampler = scripted(long, lambda context: '{"birth_year": 1815}')
    assert ToolActor(sampler).answer([(Tool(**ACTOR["tool"]), {"person": "Bo"})]) == [{"birth_year": 1815}]
    assert sampler.heard[0] == to_trace({**ACTOR, "exchanges": ACTOR["exchanges"][:1]}, long).ids


# ------------------------------------------------------------------------ which folder gets which texts


def test_a_model_that_was_trained_here_gets_the_short_texts(folder, tmp_path):
    """Its tokenizer is marked, and the mark is saved with each model that starts from it."""
    assert Tokenizer(folder).prompts is SHORT
    save_model(*load(folder), tmp_path / "next")
    assert Tokenizer(tmp_path / "next").prompts is SHORT


def test_any_other_checkpoint_gets_the_long_texts(unmarked, tmp_path):
    assert Tokenizer(unmarked).prompts is LONG
    save_model(*load(unmarked), tmp_path / "next")
    assert Tokenizer(tmp_path / "next").prompts is LONG
    (unmarked / "tokenizer_config.json").unlink()
    assert Tokenizer(unmarked).prompts is LONG
    assert not QWEN or Tokenizer(Path(QWEN)).prompts is LONG


def test_the_simulator_has_room_for_the_long_texts(folder, unmarked, tokenizer):
    """Also where its questions are the fictional world's."""
    config = SimpleNamespace(trace_tokens=1800, turn_tokens=500, graph=False)
    simulator = grpo.Simulator(unmarked, config)
    assert simulator.maker.sampler.slots == 2300 and simulator.maker.reply_tokens == simulator.actor.reply_tokens == 500
    save_model(load(folder)[0], tokenizer, folder)
    simulator = grpo.Simulator(folder, config)
    assert simulator.maker.sampler.slots == 640 and simulator.actor.reply_tokens == 64


def test_all_stages_ask_with_the_texts_of_the_checkpoint(unmarked, tmp_path, monkeypatch):
    """Stage 0, stage 1 on its traces, and the agents of the run. A script generates in place of the model."""
    made = []

    def replies(context):
        if LONG.maker in context:
            return ToolMaker.reply("So.", "composition", [BIRTHPLACE])
        if LONG.actor in context:
            return '{"birthplace": "Velka"}'
        assert context.startswith(f"{START}system\n{LONG.agent}") and context.endswith(f"{HEADER}<think>\n")
        return ANSWER if "</tool_response>" in context else CALL

    def sampler(model, tokenizer, rows, slots):
        made.append(scripted(tokenizer, replies, rows))
        return made[-1]
    monkeypatch.setattr(graph, "Sampler", sampler)
    questions = tmp_path / "few.jsonl"
    questions.write_text(json.dumps({"id": "a", "question": "Where was Bo born?", "golden_answers": ["Velka"]}))
    options = {"model": str(unmarked), "data": (str(questions),), "samples": 1}
    why = evaluate.make_traces(evaluate.TracesConfig(out=str(tmp_path / "traces.jsonl"), **options))
    assert why == {"": 1} and len(made) == 2
    fitted = []
    monkeypatch.setattr(sft, "fit", lambda model, tokenizer, data, *_: fitted.append(data))
    sft.train_sft(SFTConfig(out=str(tmp_path / "run"), model=str(unmarked), traces=str(tmp_path / "traces.jsonl")))
    (agent,), (maker,), (actor,) = (fitted[0][role] for role in sft.ROLES)
    played, asked = made[1].heard[0], made[0].heard[0]
    assert agent.ids == played and actor.ids == asked and maker.ids[:maker.mask.index(1)] == made[0].before[0]
    trained = tmp_path / "run" / "sft" / "model"
    config = SimpleNamespace(max_turns=3, turn_tokens=500, trace_tokens=9000, graph=False)
    simulator = grpo.Simulator(trained, config)
    trace = Trace("Where was Bo born?", [BIRTHPLACE])
    run_episodes(simulator.agent(simulator.model, 1, 0.0), simulator.actor.answer, [trace])
    assert trace.answer == "Velka" and simulator.tokenizer.prompts is LONG
    row, = evaluate.evaluate_files(evaluate.EvalConfig(out=str(tmp_path), **options))
    assert row["em"] == row["calls"] == 1
