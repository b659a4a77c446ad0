"""Stage 1: what is learned from, word by word; batches, schedule, loss, configs against hand-made numbers."""
import dataclasses
import inspect
import json
import math
import random
import re
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import get_args

import pytest
import torch
from test_agents import END, HEAD, START, TAIL, call_text, in_turn, scripted, segments

import agents
import run as run_file
import sft
from agents import AutoAgent, Tool, ToolActor, ToolMaker, Trace, check_tools, run_episodes
from data import InputError
from data.tools import Real
from data.world import HELD_OUT, imagined_questions, make_questions, make_world, teach_actor, teach_agent, teach_maker
from evaluate import EvalConfig
from grpo import GRPOConfig
from model import token_logprobs
from mtr import RunConfig
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
    f"<|im_start|>system\n{agents.AGENT_SYSTEM}{HEAD}\n{SCHEMA}\n{COMPARE_SCHEMA}{TAIL}"
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
MAKER_HEARS = [f"<|im_start|>system\n{agents.MAKER_SYSTEM.format(kinds=KINDS)}<|im_end|>\n<|im_start|>user\n"
               "Who was born earlier, Bo or Ada?\nRejected: not JSON<|im_end|>\n<|im_start|>assistant\n"]

ACTOR = {"role": "actor", "tool": BIRTH_YEAR, "exchanges": [
    [{"person": "Bo"}, {"birth_year": 1815}], [{"person": "é"}, {"error": "no birth year found"}]]}
ACTOR_SAYS = ['{"birth_year": 1815}<|im_end|>', '{"error": "no birth year found"}<|im_end|>']
ACTOR_HEARS = [f"<|im_start|>system\n{agents.ACTOR_SYSTEM}<|im_end|>\n<|im_start|>user\n"
               f"{DEFINITION}\n" '{"person": "Bo"}<|im_end|>\n<|im_start|>assistant\n',
               '\n<|im_start|>user\n{"person": "é"}<|im_end|>\n<|im_start|>assistant\n']

CONVERSATIONS = {"agent": (AGENT, AGENT_SAYS, AGENT_HEARS), "maker": (MAKER, MAKER_SAYS, MAKER_HEARS),
                 "actor": (ACTOR, ACTOR_SAYS, ACTOR_HEARS)}


@pytest.mark.parametrize("role", CONVERSATIONS)
def test_what_is_supervised_word_by_word(role, tokenizer):
    """What the role says and its <|im_end|> in; header, newlines, observations, prompt out."""
    record, says, hears = CONVERSATIONS[role]
    trace = to_trace(record, tokenizer)
    assert segments(trace, tokenizer, 1) == says and segments(trace, tokenizer, 0) == hears
    assert trace.mask[0] == 0 and trace.mask[-1] == 1 and trace.ids[-1] == tokenizer.end
    assert len(trace.ids) == len(trace.mask) == len(trace.logprobs)


@pytest.mark.parametrize("role", CONVERSATIONS)
def test_a_conversation_has_the_ids_of_its_whole_text(role, tokenizer):
    record, says, hears = CONVERSATIONS[role]
    text = "".join(part for pair in zip(hears, says) for part in pair)
    assert to_trace(record, tokenizer).ids == tokenizer.full.encode(text).ids


def teacher_records():
    """A few of the teacher's AutoAgent conversations of each kind, in an imagined world, and that world."""
    world = make_world(0)
    held_out = [q for q in make_questions(world) if q.set in HELD_OUT]
    other, questions = imagined_questions(world, 0, held_out)
    rng = random.Random(0)
    chosen = [q for kind in ("composition", "inference", "comparison")
              for q in rng.sample([q for q in questions if q.kind == kind], 12)]
    return other, [teach_agent(other, q, rng) for q in chosen]


def words(turn):
    """What a teacher's turn says, written here once more."""
    calls = ["\n" + call_text(call["name"], call["arguments"]) for call in turn.get("calls", [])]
    answer = f"\n<answer> {turn['answer']}</answer>" if "answer" in turn else ""
    return f"<think>{turn['thought']}</think>" + "".join(calls) + answer


def test_a_rollout_of_the_teachers_words_is_its_conversation(tokenizer):
    """The two stages see one type with one mask: same ids, same mask, same end."""
    world, records = teacher_records()
    for record in records:
        said = [words(turn) for turn in record["turns"]]
        box = agents.Toolbox(record["kind"], check_tools(record["tools"]), 1)
        trace, sampler = Trace(record["question"], box.tools, (0,)), scripted(tokenizer, in_turn(*said))
        run_episodes(AutoAgent(sampler, 12, 2000, 9000), Real(world.real), [trace])
        taught = to_trace(record, tokenizer)
        assert (trace.ids, trace.mask) == (taught.ids, taught.mask)
        assert trace.status == "answered" and trace.answer == record["turns"][-1]["answer"]
        assert trace.question == taught.question


def test_maker_and_actor_are_asked_as_they_were_taught(tokenizer):
    """The rollout's prompt is the prompt of stage 1, and the words taught are the result."""
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
    """The prompt of every conversation with a call holds that tool's schema."""
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


@pytest.mark.parametrize("stage", [sft.train, sft.train_on])
def test_as_many_worlds_are_imagined_as_asked(stage, tmp_path, monkeypatch):
    """300 conversations in each for AutoAgent and for ToolMaker, in stage 1 and in its control."""
    class Made(Exception):
        pass

    def teach(*asked):
        raise Made([len(real(*asked)[0][role]) for role in ("agent", "maker")])
    real = sft.teach
    monkeypatch.setattr(sft, "teach", teach)
    monkeypatch.setattr(sft, "load", lambda *_: (None, None))
    monkeypatch.setattr(sft, "Run", lambda *_: SimpleNamespace(finished=False))
    for worlds in (1, 2):
        with pytest.raises(Made) as made:
            stage(SFTConfig(out=str(tmp_path), worlds=worlds))
        assert made.value.args[0] == [pytest.approx(300 * worlds, rel=0.02), 300 * worlds]


# ------------------------------------------------------------------------------------- pieces, batches


def made_up(length, mask=None, start=0):
    """A trace whose ids tell the position, with every second token in the loss unless it is said."""
    return Trace(ids=list(range(start, start + length)), mask=mask or [i % 2 for i in range(length)])


@pytest.mark.parametrize("tokens", [2, 8, 20, 64])
def test_cut_makes_pieces_of_the_trace(tokens):
    trace = made_up(60, [0] * 10 + [1] * 30 + [0] * 5 + [1] + [0] * 4 + [1] * 5 + [0] * 5)
    pieces = sft.cut([trace], tokens, 10_000)
    for piece in pieces:
        start, length = piece.ids[0], len(piece.ids)
        assert length == len(piece.mask) <= tokens and piece.ids == trace.ids[start:start + length]
        assert piece.mask == [0, *trace.mask[start + 1:start + length]]  # a row's first id can't be scored
        assert piece.mask[-1] == 1  # nothing after it would be learned from
    covered = {i for piece in pieces for i, m in zip(piece.ids, piece.mask) if m}
    assert covered == {i for i, m in zip(trace.ids, trace.mask) if m}, "a loss token is in no piece"
    assert {40, 46, 55} <= {piece.ids[-1] + 1 for piece in pieces}, "a turn's end is the end of a piece"


def test_cut_brings_each_turn_with_what_was_before_it(tokenizer):
    pieces = sft.cut([to_trace(AGENT, tokenizer)], 10_000, 1)
    said = [text for pair in zip(AGENT_HEARS, AGENT_SAYS) for text in pair]
    assert [tokenizer.decode(p.ids) for p in pieces] == ["".join(said[:n]) for n in (2, 4, 6)]


def test_cut_leaves_its_input_alone():
    trace = made_up(50)
    sft.cut([trace], 8, 10_000)
    assert (trace.ids, trace.mask) == (list(range(50)), [i % 2 for i in range(50)])


def test_fit_goes_from_pieces_to_whole_conversations(monkeypatch, tiny):
    """Pieces of 8 tokens, AutoAgent's of 32, then 32, AutoAgent's whole, then nothing is cut."""
    ends = [1, 1, 0, 1, 1, 1]
    data = {role: [made_up(10 * n, [0] * (10 * n - 6) + ends, 1000 * n) for n in range(2, 10)]
            for role in sft.ROLES}
    batches = []
    monkeypatch.setattr(sft, "train_step", lambda _, parts, device: batches.append(parts) or ([0.0] * 3, 1))
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
    rises = sum(b > a for a, b in zip(longest, longest[1:])) / (len(longest) - 1)
    assert 0.3 < rises < 0.7, "the batches themselves come in no order of length"


# ------------------------------------------------------------------------------------ schedule, padding


@pytest.mark.parametrize("step, share", [
    (0, 0.1), (4, 0.5), (9, 1.0), (10, 1.0), (35, 0.8608757), (60, 0.525), (85, 0.1891243), (110, 0.05)])
def test_schedule_by_hand(step, share):
    """Ten steps of warm-up, 110 in all: 0.05 + 0.95 (1 + cos(pi (step - 10) / 100)) / 2."""
    assert sft.schedule(step, 110, 10) == pytest.approx(share, abs=1e-7)


def test_schedule_without_warm_up_and_with_too_much():
    assert sft.schedule(0, 10, 0) == 1.0 and sft.schedule(10, 10, 0, 0.5) == 0.5
    assert [sft.schedule(step, 2, 4) for step in range(2)] == [0.25, 0.5]


def test_schedule_never_rises_after_the_peak():
    shares = [sft.schedule(step, 200, 20) for step in range(200)]
    assert shares[:20] == sorted(shares[:20]) and shares[19:] == sorted(shares[19:], reverse=True)
    assert max(shares) == 1.0 and min(shares[20:]) >= 0.05


def test_the_optimizer_holds_every_weight_once(tiny):
    """Decay on matrices alone."""
    model = tiny(dtype=torch.float32)
    names, seen = {id(weight): name for name, weight in model.named_parameters()}, []
    for group in sft.make_optimizer(model, 1e-3, 0.1).param_groups:
        for weight in group["params"]:
            assert group["weight_decay"] == (0.1 if weight.dim() == 2 else 0.0)
            seen.append(names[id(weight)])
    assert sorted(seen) == sorted(names.values())


def test_optimizer_step_clips_steps_and_forgets():
    """The norm before clipping comes back; AdamW's first step is lr · sign(gradient), whatever the clip."""
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
    ids, mask = sft.pad([Trace(ids=[5, 6, 7], mask=[0, 1, 1]), Trace(ids=[8], mask=[0])])
    assert ids[0, :3].tolist() == [5, 6, 7] and ids[1, 0] == 8 and ids.shape == mask.shape == (2, 32)
    assert mask.nonzero().tolist() == [[0, 1], [0, 2]] and mask.dtype == torch.bool
    assert sft.pad([Trace(ids=[5] * 33, mask=[0] * 33)])[0].shape == (1, 64)


def spoken(tokenizer):
    """Traces of all three roles."""
    return [to_trace(record, tokenizer) for record in (AGENT, MAKER, ACTOR)]


@pytest.mark.parametrize("pad_id", [1, "end", "last"])
def test_the_pad_id_is_of_no_consequence(pad_id, tokenizer, tiny):
    """Nothing is read from it, not even where it is the end of a turn."""
    model, traces = tiny(tokenizer.size), spoken(tokenizer)
    ids, mask = sft.pad(traces)
    other = ids.clone()
    for row, trace in enumerate(traces):
        other[row, len(trace.ids):] = {"end": tokenizer.end, "last": tokenizer.size - 1}.get(pad_id, pad_id)
    assert not torch.equal(ids, other)
    for a, b in zip(token_logprobs(model, ids, mask), token_logprobs(model, other, mask)):
        assert torch.equal(a, b)


# ------------------------------------------------------------------------------------------------ loss


@pytest.fixture
def exact(monkeypatch):
    """No bfloat16 while numbers are compared."""
    monkeypatch.setattr(sft, "half_precision", lambda device: nullcontext())


def alone(model, trace):
    """Sum of -log p over a trace's loss tokens, one trace, one softmax a token."""
    logits = model.head(model(torch.tensor([trace.ids])))[0]
    return sum(-logits[t - 1].log_softmax(-1)[trace.ids[t]] for t in range(1, len(trace.ids))
               if trace.mask[t])


def test_masked_loss_is_the_sum_over_what_the_role_said(tokenizer, tiny, exact):
    model, traces = tiny(tokenizer.size), spoken(tokenizer)
    total, number = sft.masked_loss(model, traces, "cpu")
    assert number == sum(len(tokenizer.full.encode(text).ids) for says in (AGENT_SAYS, MAKER_SAYS, ACTOR_SAYS)
                         for text in says)
    assert float(total.detach()) == pytest.approx(float(sum(alone(model, trace)
                                                            for trace in traces).detach()), rel=1e-10)


def test_held_out_loss_of_a_model_that_knows_nothing(tokenizer, tiny):
    """Every logit 0: log V a token, whatever the traces are."""
    model = tiny(tokenizer.size, dtype=torch.float32)
    model.model["embed_tokens"].weight.data.zero_()
    loss = sft.held_out_loss(model, spoken(tokenizer) * 5, "cpu", 2000)
    assert loss == pytest.approx(math.log(tokenizer.size), rel=1e-6)


def test_held_out_loss_is_a_mean_over_tokens_not_over_batches(tokenizer, tiny, exact):
    """13 short traces and a long one, the batches unequal."""
    model = tiny(tokenizer.size)
    short, long = to_trace(ACTOR, tokenizer), to_trace(MAKER, tokenizer)
    want = (13 * alone(model, short) + alone(model, long)) / (13 * sum(short.mask) + sum(long.mask))
    for order in ([short] * 13 + [long], [long] + [short] * 13):
        assert sft.held_out_loss(model, order, "cpu", 4 * len(long.ids)) == pytest.approx(float(want.detach()), rel=1e-10)
    assert model.model["norm"].weight.grad is None


def test_each_role_counts_the_same(tokenizer, tiny, exact):
    """The step's gradient is that of the mean of the roles' means, however much each says."""
    model, traces = tiny(tokenizer.size), spoken(tokenizer)
    losses, tokens = sft.train_step(model, [[trace] for trace in traces], "cpu")
    got = [p.grad.clone() for p in model.parameters()]
    assert losses == pytest.approx([float(alone(model, t).detach()) / sum(t.mask)
                                    for t in traces]) and tokens == sum(sum(t.mask) for t in traces)
    model.zero_grad()
    (sum(alone(model, t) / sum(t.mask) for t in traces) / 3).backward()
    for gradient, p in zip(got, model.parameters()):
        assert float((gradient - p.grad).norm()) <= 1e-9 * float(p.grad.norm() + 1e-30)


def test_an_observation_is_not_learned_from(tokenizer, tiny, exact):
    """There are logits for the loss tokens, and of padding, all zeros, but for no others: nothing else can have a
    gradient."""
    model, trace = tiny(tokenizer.size), to_trace(AGENT, tokenizer)
    states = []
    model.head, head = lambda x: states.append(x) or head(x), model.head
    sft.masked_loss(model, [trace], "cpu")
    (rows,), n = states, sum(trace.mask)
    assert len(rows) == -(-n // 128) * 128 and rows[:n].any(1).all() and not rows[n:].any()


# --------------------------------------------------------------------------------------------- configs

CONFIGS = {  # where each is read, and under what name
    SFTConfig: {"sft.py": "config", "mtr.py": "first"},
    GRPOConfig: {"grpo.py": "(?:config|c)", "mtr.py": "second"},
    EvalConfig: {"evaluate.py": "(?:config|c)"},
    RunConfig: {"mtr.py": "config"}}


def without_class(source, name):
    """A file's text without the body of one class."""
    return re.sub(rf"(?ms)^@dataclass\nclass {name}:.*?(?=^\S)", "", source)


@pytest.mark.parametrize("config, field", [(c, f.name) for c in CONFIGS for f in dataclasses.fields(c)],
                         ids=lambda value: getattr(value, "__name__", value))
def test_every_option_is_read_somewhere(config, field):
    """Outside of the class itself, as an attribute of a config or by a getattr with a made-up name."""
    shared = inspect.getsource(run_file.set_up) + inspect.getsource(run_file.Run)  # which every stage hands its config to
    read = re.findall(rf"\bconfig\.{field}\b", shared)
    for file, name in CONFIGS[config].items():
        source = without_class((ROOT / file).read_text(encoding="utf-8"), config.__name__)
        assert f"class {config.__name__}" not in source
        read += re.findall(rf"\b{name}\.{field}\b(?!\s*=[^=])", source)
        read += [s for s in re.findall(r'getattr\(config, f"\{\w+\}(\w+)"', source) if field.endswith(s)]
    assert read, f"{config.__name__}.{field} is an option that nothing reads"


@pytest.mark.parametrize("config", CONFIGS)
def test_every_option_has_a_meaning_and_a_value_of_its_type(config):
    for field in dataclasses.fields(config):
        assert field.metadata["help"] and type(getattr(config(), field.name)) in (get_args(field.type) or (field.type,))
        assert field.default in field.metadata.get("choices", [field.default])


WRONG = [(SFTConfig, name, value) for name, values in {
    "steps": (0, -1), "lr": (0.0, -1e-3, math.nan), "clip_norm": (0.0,), "eval_every": (0,), "width": (0,),
    "layers": (0,), "heads": (0, 5), "kv_heads": (0,), "mlp": (0,), "piece": (0, 1), "piece_steps": (0,),
    "worlds": (0,), "agent_tokens": (0,), "maker_tokens": (0,), "actor_tokens": (0,), "vocab": (0, 100), "threads": (-1,),
    "weight_decay": (-1.0,)}.items() for value in values]
WRONG += [(GRPOConfig, name, value) for name, values in {
    "steps": (0, -1), "questions": (0,), "group": (1, 0, -3), "epochs": (0,), "minibatches": (0,),
    "lr": (0.0, math.nan), "clip_norm": (0.0,), "loss": ("ppo", ""), "clip_low": (0.0, -0.2),
    "clip_high": (0.0,), "beta": (-0.1,), "w_answer": (0.0, 0.2), "w_consistency": (0.0, -0.1),
    "partial": (-0.1, 1.1, 1.0, 0.9), "temperature": (0.0, -1.0), "max_turns": (0,), "turn_tokens": (0,),
    "trace_tokens": (0,), "eval_every": (0,), "threads": (-1,)}.items() for value in values]


@pytest.mark.parametrize("config, field, value", WRONG,
                         ids=lambda value: getattr(value, "__name__", str(value)))
def test_a_wrong_value_is_named(config, field, value):
    """When the config is built, in one line, not as a traceback an hour later."""
    with pytest.raises(InputError, match=field) as error:
        config(**{field: value})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("width, heads, kv_heads", [(192, 5, 1), (192, 4, 3), (6, 2, 1), (190, 38, 5)])
def test_a_shape_that_does_not_divide_is_named(width, heads, kv_heads):
    with pytest.raises(InputError, match="heads"):
        SFTConfig(width=width, heads=heads, kv_heads=kv_heads)


@pytest.mark.parametrize("options", [{}, {"width": 64, "heads": 2, "kv_heads": 2}, {"steps": 1, "warmup": 0}],
                         ids=str)
def test_right_values_pass(options):
    for name, value in options.items():
        assert getattr(SFTConfig(**options), name) == value
    with pytest.raises(TypeError):
        SFTConfig(no_such_option=1)


# ------------------------------------------------------------------------------------- teacher's lessons


def test_all_that_is_taught_fits_the_tokenizer_and_the_loss(tokenizer):
    """Each conversation ends on the role's own <|im_end|> and decodes to what was written."""
    world, rng = make_world(1), random.Random(0)
    questions = [q for q in make_questions(world) if q.set == "train"][::40]
    records = [teach_agent(world, q, rng) for q in questions] + [teach_maker(q, rng) for q in questions]
    for record in [*records, *teach_actor(world, rng)[::5]]:
        trace = to_trace(record, tokenizer)
        prompt, turns = sft.split_conversation(record)
        text = "".join(prompt) + "".join("".join([*said, END, *heard]) for said, heard in turns)
        assert tokenizer.decode(trace.ids) == text and trace.ids[-1] == tokenizer.end and trace.mask[-1] == 1
        assert trace.ids.count(tokenizer.control[START]) == trace.ids.count(tokenizer.end)
        assert sum(trace.mask) == sum(len(tokenizer.encode([*said, agents.IM_END])) for said, _ in turns)
