"""The relatives of DPO against TRL's trainer, which is given log-probs in place of a model."""

import itertools
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch

from prefix_sharing.losses import CPOLoss, DPOLoss
from prefix_sharing.losses.dpo import LOSS_TYPES
from prefix_sharing.scoring import ResponseLogProbs

dpo_trainer = pytest.importorskip("trl.trainer.dpo_trainer", reason="TRL is not installed: pip install '.[bench]'")

NUM_PAIRS = 20


@pytest.fixture
def values():
    """Log-probs of policy and reference, and the number of scored tokens, each [P, 2]."""
    counts = torch.randint(1, 9, (NUM_PAIRS, 2))
    reference = -3 * torch.rand(NUM_PAIRS, 2, dtype=torch.float64) * counts
    policy = reference + torch.randn(NUM_PAIRS, 2, dtype=torch.float64)
    return policy, counts, reference


def trls_losses(loss, policy, counts, reference, *, loss_types, weights=(1.0,), pairs_at_once=1, log_squares=None):
    """What DPOTrainer computes for each pair by itself, or the mean over several at once."""
    accelerator = SimpleNamespace(
        device=torch.device("cpu"), gather=lambda value: value, gather_for_metrics=lambda value: value
    )
    trainer = SimpleNamespace(
        model=SimpleNamespace(training=True),
        accelerator=accelerator,
        aux_loss_enabled=False,
        ld_alpha=None,
        precompute_ref_logps=True,
        f_divergence_type=loss.f_divergence,
        f_alpha_divergence_coef=loss.f_alpha,
        loss_types=list(loss_types),
        loss_weights=list(weights),
        beta=loss.beta,
        label_smoothing=loss.label_smoothing,
        use_weighting=log_squares is not None,
        _metrics=defaultdict(lambda: defaultdict(list)),
        _total_train_tokens=0,
        _tp_size=1,
    )
    losses = []
    for at_once in torch.arange(len(policy)).split(pairs_at_once):
        # Chosen ones first, then rejected ones.
        log_probs, num_scored, of_reference = (values[at_once].T.flatten() for values in (policy, counts, reference))
        length = int(num_scored.max())
        scored = torch.arange(length) < num_scored[:, None]
        # One token before the response, which predicts its first.
        completion_mask = torch.cat([torch.zeros(len(scored), 1, dtype=torch.long), scored.long()], dim=1)
        # Each token as likely as the others of its response.
        per_token = (log_probs / num_scored)[:, None] * scored
        nothing = torch.zeros_like(per_token)
        output = SimpleNamespace(
            log_probs=per_token, entropy=nothing, mean_logits=nothing, is_top1=torch.zeros_like(scored)
        )
        if log_squares is not None:  # the same for each token of a response
            output.log_sum_sq_probs = log_squares[at_once].T.flatten()[:, None].expand_as(per_token)
        inputs = {
            "input_ids": completion_mask,
            "attention_mask": torch.ones_like(completion_mask),
            "completion_mask": completion_mask,
            "ref_chosen_logps": of_reference[: len(at_once)],
            "ref_rejected_logps": of_reference[len(at_once) :],
        }
        model = lambda output=output, **kwargs: output  # noqa: E731
        losses.append(dpo_trainer.DPOTrainer._compute_loss(trainer, model, inputs, False))
    return torch.stack(losses)


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_every_loss_type_is_trls(values, loss_type):
    # TRL smooths labels for these only.
    label_smoothing = 0.1 if loss_type in ("robust", "exo_pair", "aot", "aot_unpaired") else 0.0
    loss = DPOLoss(beta=0.3, label_smoothing=label_smoothing, loss_type=loss_type)
    policy, counts, reference = values
    ours = loss(ResponseLogProbs(policy, counts), reference).losses
    together = trls_losses(loss, *values, loss_types=[loss_type], pairs_at_once=NUM_PAIRS)
    torch.testing.assert_close(ours.mean(), together[0], rtol=1e-6, atol=1e-6)
    if not loss_type.startswith("aot"):  # which compare pairs with one another
        torch.testing.assert_close(ours, trls_losses(loss, *values, loss_types=[loss_type]), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("divergence", "loss_type"),
    list(
        itertools.product(
            ["forward_kl", "js_divergence", "alpha_divergence"], ["sigmoid", "sigmoid_norm", "hinge", "ipo", "robust"]
        )
    ),
)
def test_every_divergence_is_trls(values, divergence, loss_type):
    alpha = {"f_alpha": 0.3} if divergence == "alpha_divergence" else {}
    loss = DPOLoss(beta=0.3, loss_type=loss_type, f_divergence=divergence, **alpha)
    policy, counts, reference = values
    tolerance = 1e-6
    if divergence == "alpha_divergence":  # TRL's takes no fp64
        policy, reference, tolerance = policy.float(), reference.float(), 1e-5
    expected = trls_losses(loss, policy, counts, reference, loss_types=[loss_type])
    torch.testing.assert_close(
        loss(ResponseLogProbs(policy, counts), reference).losses, expected, rtol=tolerance, atol=tolerance
    )


def test_weighting_is_trls(values):
    policy, counts, reference = values
    log_squares = -torch.rand(NUM_PAIRS, 2, dtype=torch.float64)
    loss = DPOLoss(beta=0.3, use_weighting=True)
    ours = loss(ResponseLogProbs(policy, counts, policy / counts - log_squares), reference).losses
    expected = trls_losses(loss, *values, loss_types=["sigmoid"], log_squares=log_squares)
    torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-6)


def test_rpo_adds_the_negative_log_likelihood_of_the_chosen_response(values):
    loss = DPOLoss(beta=0.3, rpo_alpha=0.7)
    expected = trls_losses(loss, *values, loss_types=["sigmoid", "sft"], weights=[1.0, 0.7])
    policy, counts, reference = values
    ours = loss(ResponseLogProbs(policy, counts), reference).losses
    torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-6)


def test_cpo_is_trls(values):
    cpo_trainer = pytest.importorskip("trl.experimental.cpo.cpo_trainer")
    policy, counts, _ = values
    trainer = SimpleNamespace(
        accelerator=SimpleNamespace(device=torch.device("cpu")),
        loss_type="sigmoid",
        alpha=0.0,
        beta=0.2,
        label_smoothing=0.1,
        cpo_alpha=0.0,
    )
    expected, chosen, rejected = cpo_trainer.CPOTrainer.cpo_loss(trainer, policy[:, 0], policy[:, 1])
    found = CPOLoss(beta=0.2, label_smoothing=0.1, cpo_alpha=0.0)(ResponseLogProbs(policy, counts))
    torch.testing.assert_close(found.losses, expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found.chosen_rewards, chosen)
    torch.testing.assert_close(found.rejected_rewards, rejected)
    # The likelihood term, as TRL adds it for a batch of one pair.
    with_likelihood = CPOLoss(beta=0.2, label_smoothing=0.1, cpo_alpha=0.5)(ResponseLogProbs(policy, counts)).losses
    torch.testing.assert_close(with_likelihood, expected - 0.5 * policy[:, 0] / counts[:, 0], rtol=1e-6, atol=1e-6)
