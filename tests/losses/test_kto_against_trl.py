"""KTO and APO-zero-unpaired against TRL's trainer, which is given log-probs in place of a model."""

from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch

from prefix_sharing.losses import KTOLoss
from prefix_sharing.losses.kto import KTO_LOSS_TYPES
from prefix_sharing.run.kl import estimate_kl, loss_of_row
from prefix_sharing.scoring import ResponseLogProbs

NUM_RESPONSES = 24


@pytest.fixture
def values():
    """Labels, and log-probs of policy and reference, of responses and of as many answers to other prompts."""
    labels = torch.where(torch.rand(NUM_RESPONSES) < 0.6, 1, -1)
    reference = -30 * torch.rand(2, NUM_RESPONSES, dtype=torch.float64)
    policy = reference + torch.randn(2, NUM_RESPONSES, dtype=torch.float64) + 0.3
    return labels, policy, reference


def trls_loss(loss, labels, policy, reference):
    """What KTOTrainer computes for a batch, and its metrics."""
    kto_trainer = pytest.importorskip("trl.trainer.kto_trainer", reason="TRL is not installed: pip install '.[bench]'")
    metrics = defaultdict(lambda: defaultdict(list))
    accelerator = SimpleNamespace(device=torch.device("cpu"), gather_for_metrics=lambda value: value)
    trainer = SimpleNamespace(
        model=SimpleNamespace(training=True),
        accelerator=accelerator,
        aux_loss_enabled=False,
        precompute_ref_logps=True,
        calculate_KL=loss.needs.kl,
        beta=loss.beta,
        desirable_weight=loss.desirable_weight,
        undesirable_weight=loss.undesirable_weight,
        loss_type=loss.loss_type,
        _compute_kl_logps=lambda model, batch: policy[1],
        _metrics=metrics,
        _total_train_tokens=0,
        _tp_size=1,
    )
    # One token of prompt and one of completion, which has the whole log-prob.
    ids = torch.ones(NUM_RESPONSES, 2, dtype=torch.long)
    per_token = policy[0][:, None]
    nothing = torch.zeros_like(per_token)
    output = SimpleNamespace(log_probs=per_token, entropy=nothing, mean_logits=nothing)
    inputs = {
        "input_ids": ids,
        "attention_mask": ids,
        "completion_mask": torch.tensor([[0, 1]]).expand(NUM_RESPONSES, 2),
        "label": labels == 1,
        "ref_logps": reference[0],
        "ref_KL_logps": reference[1],
    }
    found = kto_trainer.KTOTrainer._compute_loss(trainer, lambda **kwargs: output, inputs, False)
    return found, {name: of_mode[0] for name, of_mode in metrics["train"].items() if of_mode}


@pytest.mark.parametrize("loss_type", KTO_LOSS_TYPES)
@pytest.mark.parametrize(("desirable_weight", "undesirable_weight"), [(1.0, 1.0), (0.7, 1.3)])
def test_loss_gradient_and_rewards_are_trls(values, loss_type, desirable_weight, undesirable_weight):
    labels, policy, reference = values
    loss = KTOLoss(0.3, desirable_weight, undesirable_weight, loss_type)
    theirs_policy, ours_policy = (policy.clone().requires_grad_() for _ in range(2))
    expected, metrics = trls_loss(loss, labels, theirs_policy, reference)

    # Each response with an answer to another prompt beside it, as an example of a Row.
    row = SimpleNamespace(
        labels=torch.stack([labels, torch.zeros_like(labels)], dim=1),
        num_scored=torch.ones(NUM_RESPONSES, 2, dtype=torch.long),
        pairs=None,
    )
    output = ResponseLogProbs(ours_policy.T, row.num_scored)
    known = lambda row: reference.T  # noqa: E731
    kl = estimate_kl([(row, output)], known)
    found = loss_of_row(loss, row, output, known, kl)
    total = found.losses.sum() / NUM_RESPONSES
    assert total.item() == pytest.approx(expected.item(), rel=1e-12)
    if loss.needs.kl:
        assert kl.item() == pytest.approx(metrics["kl"], rel=1e-12)
        assert kl > 0
    assert found.chosen_rewards.sum() / (labels == 1).sum() == pytest.approx(metrics["rewards/chosen"], rel=1e-12)
    assert found.rejected_rewards.sum() / (labels == -1).sum() == pytest.approx(metrics["rewards/rejected"], rel=1e-12)
    expected.backward()
    total.backward()
    torch.testing.assert_close(ours_policy.grad[0], theirs_policy.grad[0], rtol=1e-12, atol=0)
    assert ours_policy.grad[1].abs().max() == 0  # nothing is learned from answers to other prompts


def test_a_policy_that_is_no_farther_than_its_reference_has_no_distance(values):
    reference = values[2]
    row = SimpleNamespace(labels=torch.zeros(NUM_RESPONSES, 1), num_scored=torch.ones(NUM_RESPONSES, 1))
    output = ResponseLogProbs(reference[:1].T - 1, row.num_scored)
    assert estimate_kl([(row, output)], lambda row: reference[:1].T) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"beta": -1}, "beta must not be negative"),
        ({"desirable_weight": -1}, "desirable_weight must not be negative"),
        ({"loss_type": "apo"}, "loss_type must be one of kto, apo_zero_unpaired"),
    ],
)
def test_arguments_are_checked(arguments, message):
    with pytest.raises(ValueError, match=message):
        KTOLoss(**arguments)


def test_what_is_missing_is_named(values):
    output = ResponseLogProbs(torch.zeros(1, 1), torch.ones(1, 1))
    with pytest.raises(ValueError, match="KTOLoss needs labels of responses"):
        KTOLoss()(output, torch.zeros(1, 1))
    with pytest.raises(ValueError, match="KTOLoss needs the distance of policy and reference"):
        KTOLoss()(output, torch.zeros(1, 1), None, torch.ones(1, 1))
