"""Our loss is that of TRL. The installed GRPOTrainer._compute_loss is called on a stub in place of the trainer, so
no number of TRL's is copied here. Needs tests/requirements-peers.txt."""
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("trl")
from trl import GRPOTrainer  # noqa: E402  (must follow the lines above)

import grpo  # noqa: E402  (must follow the lines above)
from grpo import GRPOConfig, Loss, policy_loss, token_weights  # noqa: E402  (must follow the lines above)

LOSSES = ("grpo", "dapo", "dr_grpo", "gspo")
LOW, HIGH, MOST = 0.2, 0.28, 9  # both clip bounds, and the constant that dr_grpo divides by


@pytest.fixture(autouse=True)
def double_precision():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture(autouse=True)
def same_bounds(monkeypatch):
    """The bounds that the stub has, for all four losses."""
    settings = Loss(scale_std=True, clip_low=LOW, clip_high=HIGH)
    monkeypatch.setattr(grpo, "LOSSES", dict.fromkeys(LOSSES, settings))


class OneProcess:
    """The part of accelerate that _compute_loss uses, for one process."""
    num_processes = 1
    sync_gradients = True

    def gather(self, x):
        return x

    gather_for_metrics = gather

    def reduce(self, x, reduction):
        return x


class Trainer:
    """A stub of GRPOTrainer: its settings, and given log-probabilities. TRL has no loss_type "gspo". GSPO is its
    "grpo" with the importance sampling level "sequence"."""
    aux_loss_enabled = use_vllm = vllm_importance_sampling_correction = _entropy_bonus_enabled = False
    top_entropy_quantile, off_policy_mask_threshold = 1.0, None
    epsilon_low, epsilon_high, max_completion_length = LOW, HIGH, MOST

    def __init__(self, loss, beta, logprobs, parts=1):
        self.loss_type = "grpo" if loss == "gspo" else loss
        self.importance_sampling_level = "sequence" if loss == "gspo" else "token"
        self.beta, self.logprobs = beta, logprobs
        self.args = SimpleNamespace(delta=None, use_bias_correction_kl=False, steps_per_generation=parts)
        self.current_gradient_accumulation_steps = parts
        self.model = SimpleNamespace(training=True)
        self.accelerator = OneProcess()
        self._metrics = {"train": defaultdict(list)}

    def _get_per_token_logps_and_entropies(self, model, input_ids, attention_mask, logits_to_keep, **more):
        assert logits_to_keep == self.logprobs.shape[1]
        return self.logprobs, torch.zeros_like(self.logprobs), None

    _compute_loss = GRPOTrainer._compute_loss


def batch(seed, rows=6, width=8):
    """Log-probabilities new, old and of the reference (B, T), advantages (B,), the rows' lengths as a mask and the
    mask (B, T), which has holes for observations. Where the mask is 0 all log-probabilities are 0, as in ours."""
    g = torch.Generator().manual_seed(seed)
    lengths = torch.randint(2, width + 1, (rows, 1), generator=g)
    finished = torch.arange(width) < lengths
    tools = torch.rand(rows, width, generator=g) < 0.25
    tools[:, 0] = False
    mask = finished & ~tools
    old = -2 * torch.rand(rows, width, generator=g)
    new = old + 0.4 * torch.randn(rows, width, generator=g)
    reference = old + 0.4 * torch.randn(rows, width, generator=g)
    return new * mask, old * mask, reference * mask, torch.randn(rows, generator=g), finished, mask


def theirs(loss, beta, new, old, reference, advantage, finished, mask, rows=slice(None), parts=1):
    """TRL's loss of some rows of a batch, and TRL's metrics."""
    trainer = Trainer(loss, beta, new[rows], parts)
    ids = torch.zeros_like(mask[rows], dtype=torch.long)
    inputs = {"prompt_ids": ids[:, :2], "prompt_mask": torch.ones_like(ids[:, :2]), "completion_ids": ids,
              "completion_mask": finished[rows].long(), "tool_mask": mask[rows].long(),
              "advantages": advantage[rows], "num_items_in_batch": mask.sum().double()}
    inputs |= {} if old is None else {"old_per_token_logps": old[rows]}
    inputs |= {"ref_per_token_logps": reference[rows]} if beta else {}
    return trainer._compute_loss(trainer.model, inputs), trainer._metrics["train"]


def ours(loss, beta, new, old, reference, advantage, mask):
    config = GRPOConfig(loss=loss, beta=beta, trace_tokens=MOST)
    weights = token_weights(mask.sum(1), loss, config.trace_tokens)
    old, reference = new.detach() if old is None else old, reference if beta else None
    return policy_loss(new, old, reference, advantage, mask, weights, config)


def slope(loss, x):
    return torch.autograd.grad(loss, x)[0]


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("beta", [0.0, 0.04])
@pytest.mark.parametrize("loss", LOSSES)
def test_loss_and_gradient_are_trls(loss, beta, seed):
    """All four losses after the policy has moved, with ratios beyond both bounds.

    dr_grpo: TRL divides by rows times max_completion_length, we by rows times trace_tokens, which includes the
    prompt. Both are constants, and here they are equal."""
    new, old, reference, advantage, finished, mask = batch(seed)
    new.requires_grad_()
    want, metrics = theirs(loss, beta, new, old, reference, advantage, finished, mask)
    got, stats = ours(loss, beta, new, old, reference, advantage, mask)
    assert got.item() == pytest.approx(want.item(), rel=1e-12)
    want, got = slope(want, new), slope(got, new)
    assert torch.allclose(got, want, rtol=1e-12, atol=1e-15) and float(want.abs().max()) > 0
    tokens = mask.sum()
    if beta:
        assert float(stats["kl"] / tokens) == pytest.approx(metrics["kl"][0], rel=1e-12)
    if loss != "gspo":  # for gspo TRL counts rows, we count tokens
        for side in ("low", "high"):  # TRL takes the share in float32
            share = float(stats[f"clip_{side}"] / tokens)
            assert share == pytest.approx(metrics[f"clip_ratio/{side}_mean"][0], rel=1e-6)


def test_the_batches_reach_both_bounds():
    """Otherwise the comparison above would not test the clip."""
    for loss in LOSSES:
        low, high = 0.0, 0.0
        for seed in range(8):
            _, metrics = theirs(loss, 0.0, *batch(seed))
            low, high = low + metrics["clip_ratio/low_mean"][0], high + metrics["clip_ratio/high_mean"][0]
        assert low > 0 and high > 0


@pytest.mark.parametrize("beta", [0.0, 0.04])
@pytest.mark.parametrize("loss", LOSSES)
def test_the_first_update_is_trls(loss, beta):
    """Without old log-probabilities, TRL takes the policy's own, detached. So do we."""
    new, _, reference, advantage, finished, mask = batch(100)
    new.requires_grad_()
    want, _ = theirs(loss, beta, new, None, reference, advantage, finished, mask)
    got, _ = ours(loss, beta, new, None, reference, advantage, mask)
    assert got.item() == pytest.approx(want.item(), rel=1e-12)
    assert torch.allclose(slope(got, new), slope(want, new), rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("parts", [2, 3])
@pytest.mark.parametrize("loss", LOSSES)
def test_gradient_accumulation_is_trls(loss, parts):
    """The sum of TRL's micro-batches, each with the same number of rows, is our whole step. TRL's grpo, gspo and
    dr_grpo divide each part by the number of parts; dapo divides by the tokens of the whole step. With parts of
    different sizes, the weight of a row in TRL's first three would depend on the size of its part. Ours does not."""
    new, old, reference, advantage, finished, mask = batch(200)
    new.requires_grad_()
    slices = [slice(i, i + 6 // parts) for i in range(0, 6, 6 // parts)]
    args = new, old, reference, advantage, finished, mask
    want = sum(theirs(loss, 0.04, *args, rows, parts)[0] for rows in slices)
    got, _ = ours(loss, 0.04, new, old, reference, advantage, mask)
    assert got.item() == pytest.approx(want.item(), rel=1e-12)
    assert torch.allclose(slope(got, new), slope(want, new), rtol=1e-12, atol=1e-15)
