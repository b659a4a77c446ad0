"""Chapter 4: reading ids again from text, and the gradient of observations."""
import copy
import random
from pathlib import Path

import pytest
import torch

import run
from agents import Trace
from data.world import make_questions, make_world, teach_agent
from model import load
from sft import masked_loss, to_trace

MODEL = Path(__file__).resolve().parents[1] / "data" / "miniature" / "sft" / "model"


@pytest.fixture(scope="module")
def loaded():
    return load(MODEL)


@pytest.fixture(scope="module")
def traces(loaded):
    """Conversations of the teacher with at least one observation."""
    world = make_world(0)
    rng = random.Random(5)
    questions = rng.sample(make_questions(world), 40)
    made = [to_trace(teach_agent(world, q, rng), loaded[1]) for q in questions]
    return [trace for trace in made if 0 in trace.mask[trace.mask.index(1):]][:8]


# -------------------------------------------------------------------------- reading ids again


def expected_difference(tokenizer, ids):
    """The length of the longest common beginning, unless both lists are equal."""
    again = tokenizer.full.encode(tokenizer.decode(ids)).ids
    same = max(n for n in range(len(ids) + 1) if ids[:n] == again[:n])
    return None if ids == again else same


def test_random_ids(exercise, loaded):
    """The ids of all tokens, control tokens and single bytes too."""
    tokenizer = loaded[1]
    rng = random.Random(0)
    found = []
    for _ in range(300):
        ids = [rng.randrange(tokenizer.size) for _ in range(rng.randint(1, 8))]
        found.append(exercise.first_difference(tokenizer, ids))
        assert found[-1] == expected_difference(tokenizer, ids), ids
    assert None in found and len(set(found)) > 3


def test_one_list_is_the_beginning_of_the_other(exercise, loaded):
    """The first byte of \ufffd alone decodes to \ufffd, which has two bytes more."""
    tokenizer = loaded[1]
    half = tokenizer.encode(["\ufffd"])[:1]
    assert exercise.first_difference(tokenizer, half) == 1
    assert exercise.first_difference(tokenizer, tokenizer.encode(["Tili"]) + half) == 2
    assert exercise.first_difference(tokenizer, []) is None


def test_a_word_in_two_tokens(exercise, loaded, traces):
    """Traces are stable until one space is cut off from its word."""
    tokenizer = loaded[1]
    space, = tokenizer.encode([" "])
    for trace in traces:
        assert exercise.first_difference(tokenizer, trace.ids) is None
        words = [(t, tokenizer.encode([tokenizer.decode([i])[1:]]))
                 for t, i in enumerate(trace.ids) if tokenizer.decode([i])[:1] == " "]
        place, word = next((t, word) for t, word in words if len(word) == 1 and t > 40)
        cut = [*trace.ids[:place], space, *word, *trace.ids[place + 1:]]
        assert tokenizer.decode(cut) == tokenizer.decode(trace.ids)
        assert exercise.first_difference(tokenizer, cut) == place


# ------------------------------------------------------------------------------ the mask


def test_the_mask_by_hand(exercise):
    trace = Trace()
    trace.hear([5, 6, 7])
    trace.say([8])
    trace.hear([9, 5])
    trace.say([6, 6])
    before = copy.deepcopy(vars(trace))
    assert exercise.unmask_observations(trace) == [0, 0, 0, 1, 1, 1, 1, 1]
    assert vars(trace) == before
    trace.hear([7])  # cut off after an observation
    assert exercise.unmask_observations(trace) == [0, 0, 0, 1, 1, 1, 1, 1, 1]
    prompt = Trace()
    prompt.hear([5, 6])
    assert exercise.unmask_observations(prompt) == [0, 0]


def test_the_mask_of_conversations(exercise, traces):
    for trace in traces:
        found = exercise.unmask_observations(trace)
        assert len(found) == len(trace.mask) and set(found) == {0, 1}
        added = [t for t in range(len(found)) if found[t] != trace.mask[t]]
        assert added == [t for t in range(trace.mask.index(1), len(found)) if not trace.mask[t]]


# -------------------------------------------------------------------------- the gradient


def projects_gradient(model, trace, mask, monkeypatch):
    """gradient_per_token with sft.masked_loss: a hook keeps the gradient of the states."""
    monkeypatch.setitem(run.chosen, "precision", "float32")
    kept = []

    def keep(module, inputs, states):
        states.retain_grad()
        kept.append(states)

    hook = model.register_forward_hook(keep)
    total, _ = masked_loss(model, [Trace(ids=trace.ids, mask=mask)])
    hook.remove()
    total.backward()
    model.zero_grad()
    norms = kept[0].grad[0].norm(dim=-1)
    return torch.cat([torch.zeros(1), norms[:len(mask) - 1]])


def test_the_gradient_is_that_of_the_projects_loss(exercise, loaded, traces, monkeypatch):
    """For the mask of the trace, for the unmasked one and for a random one."""
    model, _ = loaded
    rng = random.Random(1)
    for trace in traces[:4]:
        any_mask = [0] + [rng.randint(0, 1) for _ in trace.ids[1:]]
        for mask in (trace.mask, exercise.unmask_observations(trace), any_mask):
            found = exercise.gradient_per_token(model, trace.ids, mask)
            expected = projects_gradient(model, trace, mask, monkeypatch)
            torch.testing.assert_close(found.detach(), expected, atol=1e-3, rtol=1e-2)


def test_observations_get_a_gradient_only_when_they_count(exercise, loaded, traces):
    model, _ = loaded
    for trace in traces:
        own = torch.tensor(trace.mask, dtype=torch.bool)
        unmasked = torch.tensor(exercise.unmask_observations(trace), dtype=torch.bool)
        observed = unmasked & ~own
        before = exercise.gradient_per_token(model, trace.ids, trace.mask)
        after = exercise.gradient_per_token(model, trace.ids, unmasked.int().tolist())
        assert bool((before[observed] == 0).all()) and bool((before[~unmasked] == 0).all())
        assert bool((after[observed] > 0).any()) and bool((after[~unmasked] == 0).all())
        torch.testing.assert_close(after[own], before[own])
