"""Our Qwen2.5 against transformers' Qwen2.5 on random weights: logits at low and high positions, greedy tokens,
folders written by one and read by the other, the chat template byte by byte. Needs tests/requirements-peers.txt.

If MTR_QWEN names a folder with Qwen2.5's tokenizer.json and tokenizer_config.json, these files replace the tests' own
tokenizer, and the OpenAI schemas in ../tools beside that folder replace the miniature's.
"""
import json
import os
import random
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

pytest.importorskip("transformers")
from safetensors.torch import load_file, save_file  # noqa: E402  (must follow the lines above)
from test_agents import as_pieces  # noqa: E402  (must follow the lines above)
from test_messages import CASES  # noqa: E402  (must follow the lines above)
from test_walk import PAGE, blocks, write_checkpoint  # noqa: E402  (must follow the lines above)
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2Config, Qwen2ForCausalLM  # noqa: E402  (must follow the lines above)
from transformers.cache_utils import DynamicCache  # noqa: E402  (must follow the lines above)

import agents  # noqa: E402  (must follow the lines above)
from data import chat
from data.messages import read_messages  # noqa: E402  (must follow the lines above)
from data.prompts import LONG  # noqa: E402  (must follow the lines above)
from data.world import RELATIONS, tool_for  # noqa: E402  (must follow the lines above)
from model import CachePass, KVCache, Sampler, Tokenizer, load, save_model  # noqa: E402  (must follow the lines above)
from sft import to_trace  # noqa: E402  (must follow the lines above)

REAL = os.environ.get("MTR_QWEN")
SHAPES = [(heads, kv_heads, tied) for heads, kv_heads in ((4, 4), (4, 2), (7, 1)) for tied in (True, False)]
FAR = 30_000


def shape_name(shape):
    return f"{shape[0] // shape[1]} heads per kv-head, {'' if shape[2] else 'un'}tied"


@pytest.fixture(scope="module", params=SHAPES, ids=shape_name)
def pair(request, tokenizer, tmp_path_factory):
    """transformers' Qwen2 with random weights, biases and norms, and ours, loaded from its shards."""
    heads, kv_heads, tied = request.param
    config = Qwen2Config(vocab_size=tokenizer.size + 12, hidden_size=16 * heads, intermediate_size=96,
                         num_hidden_layers=3, num_attention_heads=heads, num_key_value_heads=kv_heads,
                         tie_word_embeddings=tied, rope_parameters={"rope_type": "default", "rope_theta": 1e6})
    theirs, rng = Qwen2ForCausalLM(config).eval(), torch.Generator().manual_seed(heads)
    for name, weight in theirs.named_parameters():
        scale = 0.5 if weight.dim() == 1 else 2 * weight.shape[-1] ** -0.5
        scale = 0.2 if "embed" in name or "lm_head" in name else scale
        weight.data = scale * torch.randn(weight.shape, generator=rng) + float("norm" in name)
    folder = tmp_path_factory.mktemp("theirs")
    theirs.save_pretrained(folder, max_shard_size="200KB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    for name, content in tokenizer.files.items():
        (folder / name).write_bytes(content)
    return load(folder)[0], theirs


def random_ids(model, *shape):
    return torch.randint(model.known_ids, shape, generator=torch.Generator().manual_seed(1))


def largest_gap(ours, theirs):
    """Largest difference over the ids that the tokenizer has. The logits are large enough for the bound to matter."""
    theirs = theirs[..., :ours.shape[-1]]
    assert ours.shape == theirs.shape and theirs.std() > 1
    return float((ours - theirs).abs().max())


@torch.no_grad()
def test_logits_at_512_tokens(pair):
    ours, theirs = pair
    ids = random_ids(ours, 2, 512)
    assert largest_gap(ours.head(ours(ids)), theirs(ids).logits) <= 1e-4


@torch.no_grad()
def test_logits_past_position_30000_behind_a_cache(pair):
    """256 tokens from position 0, then 64 from position 30,000. The mask hides the slots between."""
    ours, theirs = pair
    near, far = random_ids(ours, 1, 256), random_ids(ours, 1, 320)[:, 256:]
    cache = KVCache(ours, 1, FAR + 64)
    past = CachePass(cache, torch.tensor([256]), 256)
    ours(near, past)
    cache.length[:] = cache.longest = FAR
    past = CachePass(cache, torch.tensor([64]), 64)
    past.mask[..., 256:FAR] = -torch.inf
    logits = ours.head(ours(far, past))
    memory = DynamicCache()
    theirs(near, past_key_values=memory)
    want = theirs(far, past_key_values=memory, position_ids=FAR + torch.arange(64)[None]).logits
    assert largest_gap(logits, want) <= 1e-4
    elsewhere = theirs(random_ids(ours, 1, 320)).logits[:, 256:]
    assert largest_gap(logits, elsewhere) > 1e-2  # the positions matter


@torch.no_grad()
def test_a_stored_head_that_config_json_ties_gives_their_logits(tokenizer, tmp_path):
    """As a merged LoRA leaves it: config.json ties the head, but the stored head differs from the embedding."""
    config = Qwen2Config(vocab_size=tokenizer.size, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2,
                         num_key_value_heads=1, tie_word_embeddings=True)
    torch.manual_seed(0)
    Qwen2ForCausalLM(config).save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights["lm_head.weight"] = torch.randn(tokenizer.size, 32)
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    for name, content in tokenizer.files.items():
        (tmp_path / name).write_bytes(content)
    ours, theirs = load(tmp_path)[0], Qwen2ForCausalLM.from_pretrained(tmp_path).eval()
    ids = random_ids(ours, 2, 40)
    assert largest_gap(ours.head(ours(ids)), theirs(ids).logits) <= 1e-4


@torch.no_grad()
def test_64_greedy_tokens(pair):
    """Two prompts of different length: one batch for ours, one prompt at a time for theirs."""
    ours, theirs = pair
    prompts = [random_ids(ours, 40).tolist(), random_ids(ours, 9).tolist()]
    sampler = Sampler(ours, SimpleNamespace(stop_ids={-1}), 2, 128)
    turns = sampler.sample(sampler.open(prompts), [64, 64], np.zeros((2, 64)), temperature=0)
    theirs.lm_head.bias = torch.nn.Parameter(torch.zeros(theirs.config.vocab_size))
    theirs.lm_head.bias[ours.known_ids:] = -torch.inf  # ids without a token, which ours never samples
    for prompt, (got, _) in zip(prompts, turns, strict=True):
        want = theirs.generate(torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)), do_sample=False,
                               max_new_tokens=64, pad_token_id=0)[0, len(prompt):].tolist()
        assert got == want and len(got) == 64 and len(set(got)) > 8
    theirs.lm_head.bias = None


@torch.no_grad()
def test_bfloat16_is_as_near_as_theirs(pair, tmp_path, tokenizer, capsys):
    """Norm of the difference to float32, over the norm: about as large as that of transformers."""
    ours, theirs = pair
    ids = random_ids(ours, 2, 512)
    want = theirs(ids).logits[..., :ours.known_ids]
    save_model(ours, tokenizer, tmp_path)
    half = load(tmp_path, dtype=torch.bfloat16)[0]
    got = half.head(half(ids))
    peer = Qwen2ForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)(ids).logits
    gap, peers = (float((x.float()[..., :ours.known_ids] - want).norm() / want.norm()) for x in (got, peer))
    with capsys.disabled():
        print(f"\nbfloat16 against float32, 512 tokens: gap {gap:.4f} (transformers' {peers:.4f}), largest logit "
              f"difference {float((got - want).abs().max()):.3f} of logits up to {float(want.abs().max()):.1f}")
    assert 0 < gap < 1.2 * peers


@torch.no_grad()
@pytest.mark.parametrize("tied", [True, False])
def test_a_folder_written_here_is_theirs_to_load(tiny, folder, tmp_path, tied):
    """transformers loads it with no weight missing or left over: same logits, same ids of texts, same stop ids."""
    tokenizer = Tokenizer(Path(REAL or folder))
    model = tiny(tokenizer.size + 7, tied=tied, dtype=torch.float32, known_ids=tokenizer.size)
    save_model(model, tokenizer, tmp_path)
    theirs, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values()) and theirs.dtype == torch.float32
    ids = random_ids(model, 1, 64)
    assert largest_gap(model.head(model(ids)), theirs(ids).logits) <= 1e-4
    assert set(theirs.generation_config.eos_token_id) == tokenizer.stop_ids == Tokenizer(tmp_path).stop_ids
    reader = AutoTokenizer.from_pretrained(tmp_path)
    for text in ("Who is it?", "Zoë’s 東京\r\n\t😀 e\u0301. 1234", '{"a": [1.5, null]}\n</tool_response>\n  x'):
        ids = tokenizer.encode([text])
        assert reader(text).input_ids == ids and reader.decode(ids) == tokenizer.decode(ids)


# ------------------------------------------------------------------------------------------- rendering

WORDS = ["the mayor", "Zoë", "東京", "😀", "<b>", "&amp; &", "'quoted'", '"', "\\n", "\n", " ", "e\u0301", "{{ x }}",
         "</tool_response>", "1,024.5"]


def schemas():
    """The 30 real schemas, or the miniature's."""
    if not REAL:
        return [agents.Tool(**tool_for(relation)).schema for relation in RELATIONS]
    files = sorted((Path(REAL).parent / "tools").glob("*.json"))
    return [schema for file in files for schema in json.loads(file.read_text(encoding="utf-8"))]


def conversation(rng, tools, calls):
    """Random messages as apply_chat_template takes them, with `calls` calls, one to three per turn."""
    def text():
        return "".join(rng.choice(WORDS) for _ in range(rng.randrange(5)))

    messages = [{"role": "system", "content": text()}] * rng.randrange(2) + [{"role": "user", "content": text()}]
    while calls:
        now = rng.randint(1, min(3, calls))
        calls -= now
        made = [{"name": rng.choice(tools)["function"]["name"], "arguments": {
            text(): rng.choice([1, None, True, [text()], {"z": 1.5, "a": text()}])}} for _ in range(now)]
        messages.append({"role": "assistant", "content": text(), "tool_calls": [
            call if rng.random() < 0.5 else {"type": "function", "function": call} for call in made]})
        messages += [{"role": "tool", "content": rng.choice(["", chat.dumps({"value": text()})])} for _ in made]
    last = [{"role": "assistant", "content": text()}, {"role": "user", "content": text()}]
    return messages + last[:rng.randrange(3)]


def test_rendering_is_the_chat_templates(folder):
    """Bytes and ids of 60 conversations with 0 to 5 calls. Each has some of the schemas; every schema occurs."""
    source, available = Path(REAL or folder), schemas()
    ours, theirs = Tokenizer(source), AutoTokenizer.from_pretrained(source)
    assert theirs.chat_template == json.loads(ours.files["tokenizer_config.json"])["chat_template"]
    rendered = []
    for i in range(60):
        rng = random.Random(i)
        tools = rng.sample(available, i % 6) + [available[i % len(available)]]
        messages = conversation(rng, tools, calls=i % 6)
        tools = tools if i % 10 else []
        pieces = as_pieces(messages, tools)
        want = theirs.apply_chat_template(messages, tools=tools or None, tokenize=False, add_generation_prompt=True)
        assert "".join(pieces) == want
        ids = theirs.apply_chat_template(messages, tools=tools or None, add_generation_prompt=True, return_dict=False)
        assert ours.encode(pieces) == ids and ours.decode(ids) == theirs.decode(ids)
        rendered.append(want)
    everything = "".join(rendered)
    assert len(set(rendered)) == 60 and len(available) >= (30 if REAL else len(RELATIONS))
    assert all(chat.dumps(schema) in everything for schema in available)
    for shown in ("</tool_call>\n<tool_call>", "</tool_response>\n<tool_response>", "<|im_start|>assistant\n<tool_call>",
                  "<tool_response>\n\n</tool_response>", "user\n<|im_end|>", *WORDS[:7]):
        assert shown in everything, shown


def official(row):
    """A row of OpenAI messages in the form that apply_chat_template takes: messages up to the last reply to learn,
    tools, and the places of these replies. Written for the test, by another way than the reader."""
    tools = row.get("tools") or [{"type": "function", "function": f} for f in row.get("functions") or []] or None
    messages = []
    for message in row["messages"]:
        content = message["content"] or ""
        if isinstance(content, list):
            content = "".join(part["text"] for part in content)
        made = {"role": {"developer": "system", "function": "tool"}.get(message["role"], message["role"]), "content": content,
                "id": message.get("tool_call_id"), "learn": message["role"] == "assistant" and message.get("weight") != 0}
        calls = message.get("tool_calls") or [{"function": c} for c in [message.get("function_call")] if c]
        if calls:
            made["tool_calls"] = [json.loads(json.dumps(call)) for call in calls]
            for call in made["tool_calls"]:
                inner = call.get("function", call)
                if isinstance(inner["arguments"], str):
                    inner["arguments"] = json.loads(inner["arguments"])
        messages.append(made)
    for i, message in enumerate(messages):
        order = [call.get("id") for call in message.get("tool_calls", [])]
        results = messages[i + 1:i + 1 + len(order)]
        if all(order) and len(results) == len(order):
            messages[i + 1:i + 1 + len(order)] = sorted(results, key=lambda result: order.index(result["id"]))
    learned = [i for i, message in enumerate(messages) if message["learn"]]
    return messages[:learned[-1] + 1], tools, learned


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
def test_messages_have_the_ids_and_mask_of_the_chat_template(case, folder):
    """Learned is what the template appends to the prompt of each reply, without the newline after it."""
    source = Path(REAL or folder)
    ours, theirs = Tokenizer(source), AutoTokenizer.from_pretrained(source)
    messages, tools, learned = official(case["row"])

    def ids(end, **more):
        return theirs.apply_chat_template(messages[:end], tools=tools, return_dict=False, **more)
    want = ids(len(messages))[:-1]
    mask = [0] * len(want)
    for place in learned:
        begin, end = len(ids(place, add_generation_prompt=True)), len(ids(place + 1)) - 1
        mask[begin:end] = [1] * (end - begin)
    trace = to_trace(read_messages(case["row"]), ours)
    assert trace.ids == want and trace.mask == mask and 0 < sum(mask) < len(mask)
    assert ours.decode(want) == case["text"].replace("⟦", "").replace("⟧", "")


# --------------------------------------------------------------------------------------- docs/real.md


def test_the_code_of_the_walk_runs(tokenizer, tmp_path, monkeypatch, capsys):
    """Its prompt has the ids that AutoAgent samples from. It prints a turn that begins as AutoAgent's turns do."""
    write_checkpoint(tmp_path / "RUN" / "grpo" / "model", Tokenizer(Path(REAL)) if REAL else tokenizer)
    monkeypatch.chdir(tmp_path)
    code, = [block for language, block in blocks(PAGE.read_text(encoding="utf-8")) if language == "python"]
    names = {}
    exec(code, names)
    ours = Tokenizer(tmp_path / "RUN" / "grpo" / "model")
    function = names["tool"]["function"]
    tool = agents.Tool(**function, returns={"type": "object"})
    prompt = agents.AutoAgent.prompt(LONG, names["messages"][1]["content"], [tool])
    assert names["prompt"].input_ids[0].tolist() == ours.encode(prompt)
    assert capsys.readouterr().out.startswith(LONG.begin) and names["reply"].shape[1] > names["prompt"].input_ids.shape[1]
