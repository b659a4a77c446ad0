"""Stage 1: the loss mask word by word; batches, schedule, loss and options against values by hand."""
import dataclasses
import inspect
import json
import math
import random
import re
import shutil
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import get_args

import pytest
import torch
from test_agents import END, HEAD, START, TAIL, call_text, in_turn, scripted, segments

import agents
import data.tools
import evaluate
import run as run_file
import sft
from agents import AutoAgent, Tool, ToolActor, ToolMaker, Trace, check_tools, run_episodes
from data import InputError, chat, fingerprint, training
from data.options import option, validate
from data.prompts import SHORT
from data.world import (
    HELD_OUT,
    imagined_questions,
    make_questions,
    make_world,
    teach_actor,
    teach_agent,
    teach_maker,
)
from evaluate import AgentConfig, EvalConfig, TracesConfig
from grpo import GRPOConfig
from model import load, pad, token_logprobs
from mtr import AskConfig, CompareConfig, RunConfig, ShowConfig
from run import Run
from sft import SFTConfig, to_trace

ROOT = Path(__file__).resolve().parents[1]

# ---------------------------------------------------------------- conversations of each role, word by word

PERSON = '{"type": "object", "properties": {"person": {"type": "string"}}, "required": ["person"]}'
YEAR = '{"type": "object", "properties": {"birth_year": {"type": "integer"}}, "required": ["birth_year"]}'
FUNCTION = '{"name": "birth_year", "description": "The year.", "parameters": ' + PERSON
DEFINITION = FUNCTION + ', "returns": ' + YEAR + "}"
SCHEMA = '{"type": "function", "function": ' + FUNCTION + "}}"
BIRTH_YEAR = json.loads(DEFINITION)
COMPARE_SCHEMA = json.dumps(agents.UTILITIES["compare"].schema)
COMPARE_ARGUMENTS = {"names": ["Bo", "Ada"], "values": [1815, 1790], "pick": "smallest"}

AGENT = {"role": "agent", "question": "Who was born earlier, Bo or Ada?", "kind": "comparison",
         "tools": [BIRTH_YEAR], "turns": [
    {"thought": "Both years.", "calls": [{"name": "birth_year", "arguments": {"person": name}}
                                         for name in ("Bo", "Ada")],
     "observations": [{"birth_year": 1815}, {"error": "none <found>"}]},
    {"thought": "Now compare.", "calls": [{"name": "compare", "arguments": COMPARE_ARGUMENTS}],
     "observations": [{"result": "Ada"}]},
    {"thought": "Ada it is.", "answer": "Ada"}]}
AGENT_SAYS = [
    '<think>Both years.</think>\n<tool_call>\n{"name": "birth_year", "arguments": {"person": "Bo"}}\n'
    '</tool_call>\n<tool_call>\n{"name": "birth_year", "arguments": {"person": "Ada"}}\n</tool_call>'
    '<|im_end|>',
    '<think>Now compare.</think>\n<tool_call>\n{"name": "compare", "arguments": {"names": ["Bo", "Ada"], '
    '"values": [1815, 1790], "pick": "smallest"}}\n</tool_call><|im_end|>',
    "<think>Ada it is.</think>\n<answer> Ada</answer><|im_end|>"]
AGENT_HEARS = [
    f"<|im_start|>system\n{SHORT.agent}{HEAD}\n{SCHEMA}\n{COMPARE_SCHEMA}{TAIL}"
    "<|im_start|>user\nWho was born earlier, Bo or Ada?<|im_end|>\n<|im_start|>assistant\n",
    '\n<|im_start|>user\n<tool_response>\n{"birth_year": 1815}\n</tool_response>\n<tool_response>\n'
    '{"error": "none \\u003cfound>"}\n</tool_response><|im_end|>\n<|im_start|>assistant\n',
    '\n<|im_start|>user\n<tool_response>\n{"result": "Ada"}\n</tool_response><|im_end|>\n'
    '<|im_start|>assistant\n']

MAKER = {"role": "maker", "question": "Who was born earlier, Bo or Ada?", "thought": "I need the birth year.",
         "kind": "comparison", "tools": [BIRTH_YEAR, {**BIRTH_YEAR, "name": "f"}], "rejected": "not JSON"}
MAKER_SAYS = ["<think>I need the birth year.</think>\n<kind>comparison</kind>\n<tools>\n" + DEFINITION +
              "\n" + DEFINITION.replace('"name": "birth_year"', '"name": "f"') + "\n</tools><|im_end|>"]
KINDS = "composition, inference, comparison, arithmetic"
MAKER_HEARS = [f"<|im_start|>system\n{SHORT.maker.format(kinds=KINDS)}<|im_end|>\n<|im_start|>user\n"
               "Who was born earlier, Bo or Ada?\nRejected: not JSON<|im_end|>\n<|im_start|>assistant\n"]

ACTOR = {"role": "actor", "tool": BIRTH_YEAR, "exchanges": [
    [{"person": "Bo"}, {"birth_year": 1815}], [{"person": "é"}, {"error": "no birth year found"}]]}
ACTOR_SAYS = ['{"birth_year": 1815}<|im_end|>', '{"error": "no birth year found"}<|im_end|>']
ACTOR_HEARS = [f"<|im_start|>system\n{SHORT.actor}<|im_end|>\n<|im_start|>user\n"
               f"{DEFINITION}\n" '{"person": "Bo"}<|im_end|>\n<|im_start|>assistant\n',
               '\n<|im_start|>user\n{"person": "é"}<|im_end|>\n<|im_start|>assistant\n']

CONVERSATIONS = {"agent": (AGENT, AGENT_SAYS, AGENT_HEARS), "maker": (MAKER, MAKER_SAYS, MAKER_HEARS),
                 "actor": (ACTOR, ACTOR_SAYS, ACTOR_HEARS)}


@pytest.mark.parametrize("role", CONVERSATIONS)
def test_what_is_supervised_word_by_word(role, tokenizer):
    """Mask 1: the text that the role generates and its <|im_end|>. Mask 0: header, newlines, observations, prompt."""
    record, says, hears = CONVERSATIONS[role]
    trace = to_trace(record, tokenizer)
    assert segments(trace, tokenizer, 1) == says and segments(trace, tokenizer, 0) == hears
    assert trace.mask[0] == 0 and trace.mask[-1] == 1 and trace.ids[-1] == tokenizer.end
    assert len(trace.ids) == len(trace.mask) == len(trace.logprobs)


@pytest.mark.parametrize("role", CONVERSATIONS)
def test_a_conversation_has_the_ids_of_its_whole_text(role, tokenizer):
    record, says, hears = CONVERSATIONS[role]
    text = "".join(part for pair in zip(hears, says, strict=True) for part in pair)
    assert to_trace(record, tokenizer).ids == tokenizer.full.encode(text).ids


def teacher_records():
    """An imagined world, and twelve of the teacher's AutoAgent conversations in it per kind of question."""
    world = make_world(0)
    held_out = [q for q in make_questions(world) if q.set in HELD_OUT]
    other, questions = imagined_questions(world, 0, held_out)
    rng = random.Random(0)
    chosen = [q for kind in ("composition", "inference", "comparison")
              for q in rng.sample([q for q in questions if q.kind == kind], 12)]
    return other, [teach_agent(other, q, rng) for q in chosen]


def words(turn):
    """The text of a teacher's turn, written here a second time."""
    calls = ["\n" + call_text(call["name"], call["arguments"]) for call in turn.get("calls", [])]
    answer = f"\n<answer> {turn['answer']}</answer>" if "answer" in turn else ""
    return f"<think>{turn['thought']}</think>" + "".join(calls) + answer


def test_a_rollout_of_the_teachers_words_is_its_conversation(tokenizer):
    """A rollout and stage 1 give the same ids, the same mask and the same end for the same text."""
    world, records = teacher_records()
    for record in records:
        said = [words(turn) for turn in record["turns"]]
        box = agents.Toolbox(record["kind"], check_tools(record["tools"]), 1)
        trace, sampler = Trace(record["question"], box.tools, (0,)), scripted(tokenizer, in_turn(*said))
        run_episodes(AutoAgent(sampler, 12, 2000, 9000), data.tools.real(world.real), [trace])
        taught = to_trace(record, tokenizer)
        assert (trace.ids, trace.mask) == (taught.ids, taught.mask)
        assert trace.status == "answered" and trace.answer == record["turns"][-1]["answer"]
        assert trace.question == taught.question


def test_maker_and_actor_are_asked_as_they_were_taught(tokenizer):
    """Rollouts use the prompts of stage 1. The replies that stage 1 teaches parse to the teacher's tools and result."""
    says = MAKER_SAYS[0].removesuffix(END)
    bad = says.replace("</tools>", "{</tools>")
    sampler = scripted(tokenizer, lambda context: says if "Rejected" in context else bad)
    box, = ToolMaker(sampler).make([MAKER["question"]])
    taught = to_trace(MAKER, tokenizer)
    assert sampler.before[1] == taught.ids[:taught.mask.index(1)] and sampler.heard[0] == taught.ids
    assert box.kind == "comparison" and [json.loads(t.definition) for t in box.made] == MAKER["tools"]
    sampler = scripted(tokenizer, lambda context: '{"birth_year": 1815}')
    assert ToolActor(sampler).answer([(Tool(**BIRTH_YEAR), {"person": "Bo"})]) == [{"birth_year": 1815}]
    taught = to_trace({**ACTOR, "exchanges": ACTOR["exchanges"][:1]}, tokenizer)
    assert sampler.heard[0] == taught.ids


def test_every_call_in_a_prompt_has_its_schema():
    """If a conversation calls a tool, its prompt holds the schema of that tool."""
    for record in [*teacher_records()[1], AGENT]:
        prompt = "".join(sft.split_conversation(record)[0])
        for turn in record["turns"]:
            assert all(f'"function": {{"name": "{call["name"]}"' in prompt for call in turn.get("calls", []))


def test_teach_gives_conversations_of_all_roles():
    records, valid = sft.teach(0, worlds=1)
    assert set(records) == {"agent", "maker", "actor"} and set(valid) == {"agent", "maker"}
    for role, part in [*records.items(), *valid.items()]:
        assert len(part) >= 50 and all(record["role"] == role for record in part)
    held_out = {q.text for q in make_questions(make_world(0)) if q.set in HELD_OUT}
    assert not held_out & {record["question"] for role in ("agent", "maker") for record in records[role]}
    assert {record["question"] for record in valid["agent"]} <= held_out
    assert sft.teach(0, worlds=1)[0] == records


@pytest.mark.parametrize("bad", [
    "{", "[]", '{"why": ""}', '{"messages": []}', '{"conversations": [{"role": "judge"}]}', '{"conversations": [{"role": "actor", "tool": {"name": 1}}]}',
    json.dumps({"conversations": [{**AGENT, "kind": "riddle"}]}), json.dumps({"conversations": [{**AGENT, "turns": []}]}), json.dumps({"conversations": [{**MAKER, "tools": None}]}),
    json.dumps({"conversations": [{**ACTOR, "exchanges": []}]}), '{"conversations": [3]}'], ids=lambda bad: bad[:60])
def test_read_traces_names_the_line_that_it_cannot_read(bad, tmp_path):
    path = tmp_path / "traces.jsonl"
    settings, good = '{"settings": {}, "conversations": []}', json.dumps({"conversations": [AGENT, MAKER, ACTOR]})
    path.write_text("\n".join([settings, good, bad, good]))
    with pytest.raises(InputError) as error:
        sft.read_traces(str(path), sft.split_conversation)
    assert str(error.value).startswith(f"{path}: line 3: ") and "\n" not in str(error.value)
    path.write_text("\n".join([settings, good, good]))
    records, valid = sft.read_traces(str(path), sft.split_conversation)  # equal conversations count once
    assert records == {"agent": [AGENT], "maker": [MAKER], "actor": [ACTOR]} and valid == {"agent": [], "maker": []}


def slow_crc(text):
    """CRC-32 bit by bit, as in IEEE 802.3."""
    crc = 0xFFFFFFFF
    for byte in text.encode():
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0xEDB88320 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


def twentieth(number):
    """Whether "who is NUMBER" is one of the twentieth that is held out."""
    return slow_crc(f"who is {number}") % 20 == 0


HELD = [number for number in range(400) if twentieth(number)]
KEPT = [number for number in range(400) if not twentieth(number)]
SPELLINGS = ("Who is {}?", "who is {}", " WHO is the {}!? ")  # one question by the rule of exact match


def write_traces(path, numbers, spellings=SPELLINGS):
    """A file of traces with a conversation of agent and maker for each spelling of each question."""
    rows = []
    for spelling in spellings:
        for question in map(spelling.format, numbers):
            rows.append({"conversations": [{**AGENT, "question": question}, {**MAKER, "question": question}, ACTOR]})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return sft.read_traces(str(path), sft.split_conversation)


def test_a_question_is_held_out_by_its_words_alone(tmp_path):
    """Its spelling, its place in the file and the other questions don't matter, so no held-out question is trained on."""
    assert 10 < len(HELD) < 30 and slow_crc("123456789") == 0xCBF43926
    for number in range(400):
        assert [training.held_out(spelling.format(number)) for spelling in SPELLINGS] == [twentieth(number)] * 3
    records, valid = write_traces(tmp_path / "t.jsonl", range(400))
    for role in ("agent", "maker"):
        assert [record["question"] for record in valid[role]] == [s.format(n) for s in SPELLINGS for n in HELD]
        assert [record["question"] for record in records[role]] == [s.format(n) for s in SPELLINGS for n in KEPT]
    assert records["actor"] == [ACTOR] and set(valid) == {"agent", "maker"}


def test_of_twenty_questions_one_is_held_out_and_of_fewer_perhaps_none(tmp_path):
    """If the rule takes none of at least twenty, the one of the smallest checksum is held out. All are never held out."""
    smallest = min(KEPT[:20], key=lambda number: slow_crc(f"who is {number}"))
    for numbers, want in ((KEPT[:20], [smallest]), (KEPT[:19], []), ([HELD[0], KEPT[0]], [HELD[0]]), (HELD[:3], [])):
        records, valid = write_traces(tmp_path / "t.jsonl", numbers, SPELLINGS[:1])
        assert [record["question"] for record in valid["agent"]] == [f"Who is {number}?" for number in want]
        assert len(records["agent"]) == len(numbers) - len(want)


def test_the_toolactor_does_not_learn_the_answers_of_held_out_questions(tmp_path, capsys):
    """An exchange that also belongs to another question is learned."""
    def exchange(person, city):
        return {**ACTOR, "exchanges": [[{"person": person}, {"birthplace": city}]]}
    kept, out = f"Who is {KEPT[0]}?", f"Who is {HELD[0]}?"
    lines = [{"conversations": [{**AGENT, "question": kept}, exchange("Bo", "Velka"), exchange("Al", "Doka")]},
             {"conversations": [{**AGENT, "question": out}, exchange("Al", "Doka"), exchange("Cy", "Suna")]},
             exchange("Di", "Tili")]
    lines += [{**AGENT, "question": f"Who is {number}?"} for number in KEPT[1:]]
    path = tmp_path / "traces.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    train, valid = sft.read_traces(str(path), sft.split_conversation)
    assert [record["exchanges"][0][0]["person"] for record in train["actor"]] == ["Bo", "Al", "Di"]
    assert [record["question"] for record in valid["agent"]] == [out] and "actor" not in valid
    assert capsys.readouterr().out == (
        f"{path}: no conversations of the roles maker; they are not trained\n"
        f"conversations: {len(KEPT)} of agent, 0 of maker, 3 of actor; 1 of agent are held out\n")


def test_a_question_without_words_is_trained_on(tmp_path):
    """Its text is empty by the rule of exact match, as if there was no question."""
    path = tmp_path / "t.jsonl"
    rows = [{**AGENT, "question": question} for question in ["", "the?", *map("Who is {}?".format, range(40))]]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    records, valid = sft.read_traces(str(path), sft.split_conversation)
    assert [record["question"] for record in records["agent"][:2]] == ["", "the?"]
    assert [record["question"] for record in valid["agent"]] == [f"Who is {number}?" for number in HELD if number < 40]


@pytest.mark.parametrize("continued", [False, True])
def test_as_many_worlds_are_imagined_as_asked(continued, tmp_path, monkeypatch):
    """Each world gives 300 conversations for AutoAgent and 300 for ToolMaker, in stage 1 and in its control."""
    class Made(Exception):
        pass

    def teach(*asked):
        raise Made([len(real(*asked)[0][role]) for role in ("agent", "maker")])
    real = sft.teach
    monkeypatch.setattr(sft, "teach", teach)
    monkeypatch.setattr(sft, "load", lambda *_: (SimpleNamespace(), None))
    monkeypatch.setattr(sft, "Run", lambda *_: SimpleNamespace(finished=False))
    for worlds in (1, 2):
        with pytest.raises(Made) as made:
            sft.train_sft(SFTConfig(out=str(tmp_path), worlds=worlds), continued)
        assert made.value.args[0] == [pytest.approx(300 * worlds, rel=0.02), 300 * worlds]


def lengthen(folder, tokens):
    """Set the context of a model folder."""
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(raw | {"max_position_embeddings": tokens}))


@pytest.fixture
def stage(monkeypatch, folder, tmp_path):
    """A function that runs stage 1, or its control, without training -> model, data, config and Run that fit gets."""
    lengthen(folder, 2048)
    fitted = []
    monkeypatch.setattr(sft, "fit", lambda model, tokenizer, data, valid, config, run: fitted.append((model, data, config, run)))
    monkeypatch.setattr(sft, "teach", lambda seed, worlds: ({role: [CONVERSATIONS[role][0]] * 3 for role in sft.ROLES},
                                                            {"agent": [AGENT], "maker": [MAKER]}))

    def train(continued=False, **options):
        fitted.clear()
        config = SFTConfig(out=str(tmp_path / "run"), shape="toy", seed=5, lr=0.5, steps=7, continued_steps=3, **options)
        sft.train_sft(config, continued)
        return fitted[0] if fitted else None
    return train


def test_stage_1_starts_from_random_weights_or_from_a_checkpoint(stage, folder, tmp_path, tokenizer):
    """A checkpoint is trained on whole conversations, because it can copy. config.json names its weights."""
    model, data, config, run = stage()
    assert (config.seed, config.lr, config.steps, config.piece) == (5, 0.5, 7, 24)
    assert {role: len(traces) for role, traces in data.items()} == dict.fromkeys(sft.ROLES, 3)
    assert run.folder == tmp_path / "run" / "sft" and model.config.hidden_size == 64
    assert json.loads((run.folder / "config.json").read_text())["sha256_of_model_and_data"] == fingerprint()
    assert (run.folder / "model" / "config.json").exists() and stage(resume=True) is None  # it is finished
    shutil.rmtree(run.folder)
    model, data, config, run = stage(model=str(folder))
    assert (config.seed, config.lr, config.steps, config.piece) == (5, 0.5, 7, 1_000_000)
    assert model.config.vocab_size == tokenizer.size + 4 and data["agent"][0].ids == to_trace(AGENT, tokenizer).ids
    assert json.loads((run.folder / "config.json").read_text())["sha256_of_model_and_data"] == fingerprint(folder)


def test_stage_1_reads_conversations_from_a_file(stage, folder, tmp_path):
    """config.json holds a fingerprint of the checkpoint's weights and of this file."""
    path = tmp_path / "traces.jsonl"
    path.write_text(json.dumps({"conversations": [AGENT, ACTOR]}))
    _, data, _, run = stage(model=str(folder), traces=str(path))
    assert {role: len(traces) for role, traces in data.items()} == {"agent": 1, "maker": 0, "actor": 1}
    assert json.loads((run.folder / "config.json").read_text())["sha256_of_model_and_data"] == fingerprint(folder, path)


def test_a_conversation_that_is_longer_than_the_models_context_is_refused(stage, folder, tmp_path, tokenizer):
    path, n = tmp_path / "traces.jsonl", len(to_trace(AGENT, tokenizer).ids)
    path.write_text(json.dumps({"conversations": [AGENT]}))
    for tokens in (n, n - 1):
        lengthen(folder, tokens)
        if tokens == n:
            assert stage(model=str(folder), traces=str(path))
            shutil.rmtree(tmp_path / "run")
        else:
            with pytest.raises(InputError, match=f"^traces: .* has {n} tokens, but the model is made for {n - 1}$"):
                stage(model=str(folder), traces=str(path))


def test_the_control_continues_with_other_batches_at_half_the_rate(stage, folder, tmp_path):
    """It starts from the model of stage 1 and writes its own folder."""
    shutil.copytree(folder, tmp_path / "run" / "sft" / "model")
    model, _, config, run = stage(continued=True)
    assert (config.seed, config.lr, config.steps, config.piece) == (1005, 0.25, 3, 1_000_000)
    assert run.folder == tmp_path / "run" / "sft_continued" and (run.folder / "model" / "config.json").exists()
    begun = json.loads((run.folder / "config.json").read_text())
    assert (begun["seed"], begun["lr"], begun["steps"]) == (5, 0.25, 3)
    assert begun["sha256_of_model_and_data"] == fingerprint(tmp_path / "run" / "sft" / "model")
    weights = dict(load(folder)[0].named_parameters())
    assert all(torch.equal(p, weights[name]) for name, p in model.named_parameters())


# ------------------------------------------------------------------------------------- pieces, batches


def made_up(length, mask=None, start=0):
    """A trace of consecutive ids. By default, every second token has mask 1."""
    return Trace(ids=list(range(start, start + length)), mask=mask or [i % 2 for i in range(length)])


@pytest.mark.parametrize("mask, spans", [
    ([], []), ([0, 0], []), ([1], [(0, 1)]), ([1, 1, 1], [(0, 3)]), ([0, 1], [(1, 2)]), ([1, 0], [(0, 1)]),
    ([1, 0, 1], [(0, 1), (2, 3)]), ([0, 1, 1, 0, 0, 1, 0, 1, 1, 1], [(1, 3), (5, 6), (7, 10)])], ids=str)
def test_spans_of_ones(mask, spans):
    assert list(sft.spans_of_ones(mask)) == spans


@pytest.mark.parametrize("tokens", [2, 8, 20, 64])
def test_cut_makes_pieces_of_the_trace(tokens):
    trace = made_up(60, [0] * 10 + [1] * 30 + [0] * 5 + [1] + [0] * 4 + [1] * 5 + [0] * 5)
    pieces = sft.cut([trace], tokens, 10_000)
    for piece in pieces:
        start, length = piece.ids[0], len(piece.ids)
        assert length == len(piece.mask) <= tokens and piece.ids == trace.ids[start:start + length]
        assert piece.mask == [0, *trace.mask[start + 1:start + length]]  # the first token has no context
        assert piece.mask[-1] == 1  # tokens after the last loss token would be computed for nothing
    covered = {i for piece in pieces for i, m in zip(piece.ids, piece.mask, strict=True) if m}
    assert covered == {i for i, m in zip(trace.ids, trace.mask, strict=True) if m}, "a loss token is in no piece"
    assert {40, 46, 55} <= {piece.ids[-1] + 1 for piece in pieces}, "a turn's end is the end of a piece"


def test_cut_brings_each_turn_with_what_was_before_it(tokenizer):
    pieces = sft.cut([to_trace(AGENT, tokenizer)], 10_000, 1)
    said = [text for pair in zip(AGENT_HEARS, AGENT_SAYS, strict=True) for text in pair]
    assert [tokenizer.decode(p.ids) for p in pieces] == ["".join(said[:n]) for n in (2, 4, 6)]


def test_cut_leaves_its_input_alone():
    trace = made_up(50)
    sft.cut([trace], 8, 10_000)
    assert (trace.ids, trace.mask) == (list(range(50)), [i % 2 for i in range(50)])


def test_fit_goes_from_pieces_to_whole_conversations(monkeypatch, tiny):
    """First: pieces of 8 tokens, AutoAgent's of 32. Then: pieces of 32, AutoAgent's traces whole. At last: all whole."""
    ends = [1, 1, 0, 1, 1, 1]
    data = {role: [made_up(10 * n, [0] * (10 * n - 6) + ends, 1000 * n) for n in range(2, 10)]
            for role in sft.ROLES}
    batches = []
    monkeypatch.setattr(sft, "train_step", lambda _, parts, most: batches.append(parts) or ([0.0] * 3, 1))
    monkeypatch.setattr(sft, "optimizer_step", lambda *_: 0.0)
    run = SimpleNamespace(log=lambda row: None, steps=lambda total, *_: range(total), state={"step": 0})
    sft.fit(tiny(), None, data, {}, SFTConfig(piece=8, piece_steps=3, steps=30, agent_tokens=100), run)
    longest = [[max(len(trace.ids) for parts in phase for trace in parts[role]) for role in range(3)]
               for phase in (batches[:3], batches[3:6])]
    assert longest[0] == [32, 8, 8] and longest[1][0] > 32 and longest[1][1:] == [32, 32] and len(batches) == 30
    whole = [trace.ids for trace in data["agent"]]
    seen = [trace.ids for parts in batches[3:] for trace in parts[0]] + [
        trace.ids for parts in batches[6:] for part in parts for trace in part]
    assert all(ids in seen for ids in whole) and all(ids in whole for ids in seen)
    agent = [trace.ids[0] for parts in batches[6:] for trace in parts[0]]
    assert len(agent) > 24 and all(len(set(agent[i:i + 8])) == 8 for i in range(0, len(agent) - 7, 8))  # whole epochs


def test_micro_batches_by_hand():
    """Traces are sorted by length. A batch counts with its padding. A trace that is too long gets its own batch."""
    traces = [made_up(n) for n in (5, 30, 2, 4, 9, 3, 50)]
    made = sft.micro_batches(traces, 16)
    assert [[len(trace.ids) for trace in batch] for batch in made] == [[2, 3, 4], [5], [9], [30], [50]]
    assert {id(trace) for batch in made for trace in batch} == set(map(id, traces)) and sft.micro_batches([], 16) == []


@pytest.mark.parametrize("number, tokens", [(1, 100), (70, 100), (130, 400), (64, 30)])
def test_batches_bring_every_trace_once_an_epoch(number, tokens):
    rng = random.Random(number)
    traces = [made_up(rng.randint(2, 60), start=1000 * i) for i in range(number)]
    stream = sft.batches(traces, tokens, random.Random(0))
    orders = []
    for _ in range(3):
        seen = []
        while len(seen) < number:
            batch = next(stream)
            assert batch and (len(batch) == 1 or len(batch) * max(len(t.ids) for t in batch) <= tokens)
            seen += [trace.ids[0] for trace in batch]
        assert sorted(seen) == [1000 * i for i in range(number)]
        orders.append(seen)
    assert number == 1 or orders[0] != orders[1]
    again = [trace.ids[0] for trace in next(sft.batches(traces, tokens, random.Random(0)))]
    assert again == orders[0][:len(again)]


def test_batches_hold_neighbours_in_length():
    rng = random.Random(0)
    traces = [made_up(rng.randint(2, 100)) for _ in range(256)]
    stream, real, padded, longest = sft.batches(traces, 800, rng), 0, 0, []
    while real < sum(len(t.ids) for t in traces):
        batch = next(stream)
        longest.append(max(len(t.ids) for t in batch))
        real += sum(len(t.ids) for t in batch)
        padded += len(batch) * longest[-1]
    assert real / padded > 0.8
    rises = sum(b > a for a, b in zip(longest, longest[1:], strict=False)) / (len(longest) - 1)
    assert 0.3 < rises < 0.7, "the order of the batches depends on their length"


# ------------------------------------------------------------------------------------ schedule, padding


@pytest.mark.parametrize("step, share", [
    (0, 0.1), (4, 0.5), (9, 1.0), (10, 1.0), (35, 0.8608757), (60, 0.525), (85, 0.1891243), (110, 0.05)])
def test_schedule_by_hand(step, share):
    """110 steps with 10 of warm-up, then 0.05 + 0.95 (1 + cos(pi (step - 10) / 100)) / 2."""
    assert sft.schedule(step, 110, 10) == pytest.approx(share, abs=1e-7)


def test_schedule_without_warm_up_and_with_too_much():
    assert sft.schedule(0, 10, 0) == 1.0 and sft.schedule(10, 10, 0, 0.5) == 0.5
    assert [sft.schedule(step, 2, 4) for step in range(2)] == [0.25, 0.5]


def test_schedule_never_rises_after_the_peak():
    shares = [sft.schedule(step, 200, 20) for step in range(200)]
    assert shares[:20] == sorted(shares[:20]) and shares[19:] == sorted(shares[19:], reverse=True)
    assert max(shares) == 1.0 and min(shares[20:]) >= 0.05


def test_the_optimizer_holds_every_weight_once(tiny):
    """Only matrices have weight decay."""
    model = tiny(dtype=torch.float32)
    names, seen = {id(weight): name for name, weight in model.named_parameters()}, []
    for group in sft.make_optimizer(model, 1e-3, 0.1).param_groups:
        for weight in group["params"]:
            assert group["weight_decay"] == (0.1 if weight.dim() == 2 else 0.0)
            seen.append(names[id(weight)])
    assert sorted(seen) == sorted(names.values())


def test_optimizer_step_clips_steps_and_forgets():
    """It returns the norm before clipping. AdamW's first step is lr · sign(gradient), whatever the clip."""
    layer = torch.nn.Linear(2, 1, bias=False, dtype=torch.float64)
    layer.weight.data = torch.tensor([[1.0, 2.0]], dtype=torch.float64)
    (layer.weight * torch.tensor([[3.0, -4.0]])).sum().backward()
    clipped = []
    optimizer = sft.make_optimizer(layer, 0.5, 0.0)
    optimizer.register_step_pre_hook(lambda *_: clipped.extend(layer.weight.grad.flatten().tolist()))
    assert sft.optimizer_step(layer, optimizer, 0.05, 1.0) == pytest.approx(5.0)
    assert clipped == pytest.approx([0.6, -0.8], abs=1e-5) and layer.weight.grad is None
    assert layer.weight.tolist()[0] == pytest.approx([0.95, 2.05], abs=1e-6)
    layer.weight.sum().backward()
    sft.optimizer_step(layer, optimizer, 0.2, 1.0)
    assert optimizer.param_groups[0]["lr"] == 0.2


def test_pad_puts_the_padding_on_the_right():
    """Rows are padded with zeros to a multiple of 32, in the type that is asked for."""
    ids, mask = pad([[5, 6, 7], [8]], "cpu"), pad([[0, 1, 1], [0]], "cpu", torch.bool)
    assert ids[0, :3].tolist() == [5, 6, 7] and ids[1, 0] == 8 and ids.shape == mask.shape == (2, 32)
    assert ids.sum() == 26 and ids.dtype == torch.long
    assert mask.nonzero().tolist() == [[0, 1], [0, 2]] and mask.dtype == torch.bool
    assert pad([[5] * 33], "cpu").shape == (1, 64) and pad([[5] * 32], "cpu").shape == (1, 32)
    assert pad([[0.5]], "cpu").dtype == torch.float32 and pad([[0.5]], "cpu", torch.float64).dtype == torch.float64


def padded(traces):
    """Ids and loss mask of some traces, both (B, T)."""
    return pad([trace.ids for trace in traces], "cpu"), pad([trace.mask for trace in traces], "cpu", torch.bool)


def spoken(tokenizer):
    """Traces of all three roles."""
    return [to_trace(record, tokenizer) for record in (AGENT, MAKER, ACTOR)]


@pytest.mark.parametrize("pad_id", [1, "end", "last"])
def test_the_pad_id_is_of_no_consequence(pad_id, tokenizer, tiny):
    """The log-probabilities don't depend on it, even if it is the id that ends a turn."""
    model, traces = tiny(tokenizer.size), spoken(tokenizer)
    ids, mask = padded(traces)
    other = ids.clone()
    for row, trace in enumerate(traces):
        other[row, len(trace.ids):] = {"end": tokenizer.end, "last": tokenizer.size - 1}.get(pad_id, pad_id)
    assert not torch.equal(ids, other)
    for a, b in zip(token_logprobs(model, ids, mask), token_logprobs(model, other, mask), strict=True):
        assert torch.equal(a, b)


# ------------------------------------------------------------------------------------------------ loss


@pytest.fixture
def exact(monkeypatch):
    """Turn off bfloat16, because numbers are compared."""
    monkeypatch.setattr(sft, "half_precision", lambda device: nullcontext())


def alone(model, trace):
    """Sum of -log p over the loss tokens of one trace, with one softmax per token."""
    logits = model.head(model(torch.tensor([trace.ids])))[0]
    return sum(-logits[t - 1].log_softmax(-1)[trace.ids[t]] for t in range(1, len(trace.ids))
               if trace.mask[t])


def test_masked_loss_is_the_sum_over_what_the_role_said(tokenizer, tiny, exact):
    model, traces = tiny(tokenizer.size), spoken(tokenizer)
    total, number = sft.masked_loss(model, traces)
    assert number == sum(len(tokenizer.full.encode(text).ids) for says in (AGENT_SAYS, MAKER_SAYS, ACTOR_SAYS)
                         for text in says)
    assert float(total.detach()) == pytest.approx(float(sum(alone(model, trace)
                                                            for trace in traces).detach()), rel=1e-10)


def test_held_out_loss_of_a_model_that_knows_nothing(tokenizer, tiny):
    """If all logits are 0, the loss is log V per token, whatever the traces are."""
    model = tiny(tokenizer.size, dtype=torch.float32)
    model.model["embed_tokens"].weight.data.zero_()
    loss = sft.held_out_loss(model, spoken(tokenizer) * 5, 2000)
    assert loss == pytest.approx(math.log(tokenizer.size), rel=1e-6)


def test_held_out_loss_is_a_mean_over_tokens_not_over_batches(tokenizer, tiny, exact):
    """13 short traces and a long one make batches of different sizes."""
    model = tiny(tokenizer.size)
    short, long = to_trace(ACTOR, tokenizer), to_trace(MAKER, tokenizer)
    want = (13 * alone(model, short) + alone(model, long)) / (13 * sum(short.mask) + sum(long.mask))
    for order in ([short] * 13 + [long], [long] + [short] * 13):
        assert sft.held_out_loss(model, order, 4 * len(long.ids)) == pytest.approx(float(want.detach()), rel=1e-10)
    assert model.model["norm"].weight.grad is None


def test_each_role_counts_the_same(tokenizer, tiny, exact):
    """The gradient is that of the mean of the three roles' means, however many tokens each role has."""
    model, traces = tiny(tokenizer.size), spoken(tokenizer)
    losses, tokens = sft.train_step(model, [[trace] for trace in traces], 4096)
    got = [p.grad.clone() for p in model.parameters()]
    assert losses == pytest.approx([float(alone(model, t).detach()) / sum(t.mask)
                                    for t in traces]) and tokens == sum(sum(t.mask) for t in traces)
    model.zero_grad()
    (sum(alone(model, t) / sum(t.mask) for t in traces) / 3).backward()
    for gradient, p in zip(got, model.parameters(), strict=True):
        assert float((gradient - p.grad).norm()) <= 1e-9 * float(p.grad.norm() + 1e-30)


def test_an_observation_is_not_learned_from(tokenizer, tiny, exact):
    """The head sees the states of the loss tokens, and rows of zeros as padding. So no other token has a gradient."""
    model, trace = tiny(tokenizer.size), to_trace(AGENT, tokenizer)
    states = []
    model.head, head = lambda x: states.append(x) or head(x), model.head
    sft.masked_loss(model, [trace])
    (rows,), n = states, sum(trace.mask)
    assert len(rows) == -(-n // 128) * 128 and rows[:n].any(1).all() and not rows[n:].any()


# --------------------------------------------------------------------------------------------- options

CONFIGS = {  # the files that read the config, and its name there
    SFTConfig: {"sft.py": "config", "mtr.py": "first"},
    GRPOConfig: {"grpo.py": "(?:config|c)", "graph.py": "config", "data/training.py": "config", "mtr.py": "second"},
    AgentConfig: {"evaluate.py": "config", "graph.py": "config"},
    EvalConfig: {"evaluate.py": "config", "graph.py": "config"},
    TracesConfig: {"evaluate.py": "config", "graph.py": "config", "mtr.py": "config"},
    AskConfig: {"evaluate.py": "config", "graph.py": "config", "mtr.py": "config"},
    RunConfig: {"mtr.py": "config"},
    ShowConfig: {"report.py": "config", "data/show.py": "config"},
    CompareConfig: {"data/compare.py": "config"}}
NEEDED = {TracesConfig: {"model": "teacher", "data": ("a.json",)}}  # options without a usable default


def without_class(source, name):
    """A file's text without the body of one class."""
    return re.sub(rf"(?ms)^@dataclass\nclass {name}\b.*?(?=^\S)", "", source)


@pytest.mark.parametrize("config, field", [(c, f.name) for c in CONFIGS for f in dataclasses.fields(c)],
                         ids=lambda value: getattr(value, "__name__", value))
def test_every_option_is_read_somewhere(config, field):
    """Outside of its class, as an attribute of a config or by getattr."""
    shared = inspect.getsource(run_file.set_up) + inspect.getsource(Run)  # every stage passes its config to them
    read = re.findall(rf"\bconfig\.{field}\b", shared)
    for file, name in CONFIGS[config].items():
        source = without_class((ROOT / file).read_text(encoding="utf-8"), config.__name__)
        assert f"class {config.__name__}" not in source
        read += re.findall(rf"\b{name}\.{field}\b(?!\s*=[^=])", source)
        read += [s for s in re.findall(r'getattr\(config, f"\{\w+\}(\w+)"', source) if field.endswith(s)]
        if field in evaluate.LIMITS:
            read += re.findall(r"getattr\(config, name\) or .* in LIMITS\b", source)
    assert read, f"{config.__name__}.{field} is an option that nothing reads"


@pytest.mark.parametrize("config", CONFIGS)
def test_every_option_has_a_meaning_and_a_value_of_its_type(config):
    built = config(**NEEDED.get(config, {}))
    for field in dataclasses.fields(config):
        types = get_args(field.type) or (field.type,)
        assert field.metadata["help"] and type(getattr(built, field.name)) in types and type(field.default) in types
        assert field.default in field.metadata.get("choices", [field.default])


WRONG = [(SFTConfig, name, value) for name, values in {
    "steps": (0, -1), "lr": (0.0, -1e-3, math.nan, math.inf), "clip_norm": (0.0,), "eval_every": (0,), "save_every": (0,),
    "piece": (0, 1), "piece_steps": (0,), "worlds": (0,), "agent_tokens": (0,), "maker_tokens": (0,), "actor_tokens": (0,),
    "threads": (-1,), "weight_decay": (-1.0, math.nan, math.inf), "warmup": (-1,), "continued_steps": (0,),
    "seed": (-1, 10 ** 16), "shape": ("", "huge")}.items() for value in values]
WRONG += [(GRPOConfig, name, value) for name, values in {
    "steps": (0, -1), "questions": (0,), "group": (1, 0, -3), "epochs": (0,), "minibatches": (0,),
    "lr": (0.0, math.nan), "clip_norm": (0.0,), "loss": ("ppo", ""), "beta": (-0.1,), "w_answer": (0.0, 0.2), "w_consistency": (0.0, -0.1),
    "partial": (-0.1, 1.1, 1.0, 0.9), "temperature": (0.0, -1.0), "max_turns": (0,), "turn_tokens": (0,),
    "trace_tokens": (0,), "micro_tokens": (0,), "eval_every": (0,), "save_every": (0,), "threads": (-1,),
    "seed": (-1,)}.items() for value in values]
WRONG += [(config, name, value) for config in (AgentConfig, EvalConfig, AskConfig) for name, values in {
    "seed": (-1,), "threads": (-1,), "temperature": (-0.1,), "max_turns": (0,), "turn_tokens": (0,),
    "trace_tokens": (-5,), "samples": (0, 2)}.items() for value in values]
WRONG += [(RunConfig, "seed", -1), (RunConfig, "threads", -1), (EvalConfig, "rows", 0),
          (EvalConfig, "backend", "live")]


@pytest.mark.parametrize("config, field, value", WRONG,
                         ids=lambda value: getattr(value, "__name__", str(value)))
def test_a_wrong_value_is_named(config, field, value):
    """The config refuses it when it is built, in one line."""
    with pytest.raises(InputError, match=field) as error:
        config(**{field: value})
    assert "\n" not in str(error.value)


@dataclasses.dataclass
class Numbers:
    """A config with each sort of field."""
    positive: float = option(1.0, "a number above 0")
    zero: int = option(0, "a number of at least 0", least=0)
    two: int = option(2, "a number of at least 2", least=2)
    unset: int | None = option(None, "no number")
    flag: bool = option(False, "no number")
    text: str = option("", "no number")
    word: str = option("a", "one of two", choices=("a", "b"))
    files: tuple = option((), "no number")


@pytest.mark.parametrize("field, value, message", [
    ("positive", 0.0, "positive: expected a number above 0, found 0.0"),
    ("positive", -1, "positive: expected a number above 0, found -1"),
    ("positive", math.nan, "positive: expected a number above 0, found nan"),
    ("positive", math.inf, "positive: expected a number above 0, found inf"),
    ("positive", 1.1e15, "positive: expected a number above 0, found 1100000000000000.0"),
    ("zero", -1, "zero: expected a number of at least 0, found -1"),
    ("zero", math.nan, "zero: expected a number of at least 0, found nan"),
    ("zero", 10 ** 16, "zero: expected a number of at least 0, found 10000000000000000"),
    ("two", 1, "two: expected a number of at least 2, found 1"),
    ("unset", 0, "unset: expected a number above 0, found 0"), ("word", "c", "word: expected one of a, b, found 'c'")])
def test_validate_names_field_bound_and_value(field, value, message):
    with pytest.raises(InputError) as error:
        validate(Numbers(**{field: value}))
    assert str(error.value) == message


@pytest.mark.parametrize("options", [
    {}, {"positive": 1e-9}, {"positive": 1e15}, {"zero": 0}, {"zero": 10 ** 15}, {"two": 2}, {"unset": 1},
    {"flag": True}, {"text": "-1"}, {"word": "b"}, {"files": ("0",)}], ids=str)
def test_validate_accepts_the_bounds_and_all_that_is_no_number(options):
    validate(Numbers(**options))


@pytest.mark.parametrize("options", [{}, {"shape": "toy", "piece": 2, "seed": 10 ** 15}, {"steps": 1, "warmup": 0}],
                         ids=str)
def test_right_values_pass(options):
    for name, value in options.items():
        assert getattr(SFTConfig(**options), name) == value
    with pytest.raises(TypeError):
        SFTConfig(no_such_option=1)


# ------------------------------------------------------------------------------- the random model, the teacher


@pytest.mark.parametrize("shape, numbers", [("miniature", (192, 512, 3, 3, 1)), ("toy", (64, 128, 2, 2, 1))])
def test_the_random_model_has_its_shape_and_knows_each_name_as_one_token(shape, numbers, tmp_path):
    """The tokenizer has at most 1280 ids. The weights depend on the seed alone."""
    records = {role: part[:40] for role, part in sft.teach(3, worlds=1)[0].items()}
    config = SFTConfig(out=str(tmp_path), seed=3, shape=shape)
    run = Run(tmp_path / "sft", config, sft.SFT_COLUMNS)
    model, tokenizer = sft.new_miniature(config, records, run)
    c = model.config
    assert (c.hidden_size, c.intermediate_size, c.num_hidden_layers, c.num_attention_heads, c.num_key_value_heads) == numbers
    assert c.vocab_size == tokenizer.size <= 1280 and c.tie_word_embeddings and c.max_position_embeddings == 2048
    names = [name for part in make_world(3).names.values() for name in part]
    assert len(names) > 80 and all(len(tokenizer.encode([name])) == 1 for name in names)
    again, _ = sft.new_miniature(config, records, run)
    other, _ = sft.new_miniature(dataclasses.replace(config, seed=4), records, run)
    for a, b in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)
    name = "model.layers.0.mlp.up_proj.weight"
    assert not torch.equal(dict(model.named_parameters())[name], dict(other.named_parameters())[name])


def test_world_seed_is_the_seed_of_stage_1(tmp_path):
    Run(tmp_path / "sft", SFTConfig(out=str(tmp_path), seed=77), sft.SFT_COLUMNS)
    assert training.world_seed(str(tmp_path)) == 77
    with pytest.raises(InputError, match="config.json: no such file"):
        training.world_seed(str(tmp_path / "nowhere"))


def test_all_that_is_taught_fits_the_tokenizer_and_the_loss(tokenizer):
    """Each conversation ends with an <|im_end|> that the role generates, and decodes to the recorded text."""
    world, rng = make_world(1), random.Random(0)
    questions = [q for q in make_questions(world) if q.set == "train"][::40]
    records = [teach_agent(world, q, rng) for q in questions] + [teach_maker(q, rng) for q in questions]
    for record in [*records, *teach_actor(world, rng)[::5]]:
        trace = to_trace(record, tokenizer)
        prompt, turns = sft.split_conversation(record)
        text = "".join(prompt) + "".join("".join([*generated, END, *received]) for generated, received in turns)
        assert tokenizer.decode(trace.ids) == text and trace.ids[-1] == tokenizer.end and trace.mask[-1] == 1
        assert trace.ids.count(tokenizer.control[START]) == trace.ids.count(tokenizer.end)
        assert sum(trace.mask) == sum(len(tokenizer.encode([*generated, chat.IM_END])) for generated, _ in turns)


def test_a_model_inside_of_the_run_folder_is_refused(tmp_path, folder):
    """The run would overwrite its config.json."""
    (tmp_path / "sft").mkdir()
    for name in ("config.json", "model.safetensors"):
        (tmp_path / "sft" / name).write_bytes((folder / name).read_bytes())
    before = (tmp_path / "sft" / "config.json").read_bytes()
    with pytest.raises(InputError, match="lies where this run would be written"):
        sft.train_sft(SFTConfig(out=str(tmp_path), model=str(tmp_path / "sft")))
    assert (tmp_path / "sft" / "config.json").read_bytes() == before
