"""Each loss against hand-computed values, an independent formulation, and the ends of its range."""

import math

import numpy as np
import pytest
import torch
from torchtune.rlhf.loss import DPOLoss as TorchtuneDPOLoss

from prefix_sharing.losses import (
    CPOLoss,
    DPOLoss,
    Loss,
    LossNeeds,
    LossOutput,
    NLLLoss,
    ORPOLoss,
    PlackettLuceLoss,
    SimPOLoss,
)
from prefix_sharing.losses.dpo import LOSS_TYPES
from prefix_sharing.scoring import ResponseLogProbs

COUNTS = torch.tensor([[4, 2], [1, 5], [7, 7]])

EVERY_LOSS = [
    *(DPOLoss(loss_type=loss_type, label_smoothing=0.1 * (loss_type == "exo_pair")) for loss_type in LOSS_TYPES),
    SimPOLoss(),
    ORPOLoss(),
    CPOLoss(),
]


def random_pairs(scale=20.0):
    return [-scale * torch.rand(3, 2, dtype=torch.float64) for _ in range(2)]


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


@pytest.mark.parametrize("beta", [0.1, 0.5])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.2])
def test_dpo_equals_torchtunes(beta, label_smoothing):
    policy, reference = random_pairs()
    ours = DPOLoss(beta=beta, label_smoothing=label_smoothing)(ResponseLogProbs(policy, COUNTS), reference)
    theirs = TorchtuneDPOLoss(beta=beta, label_smoothing=label_smoothing)(
        policy[:, 0], policy[:, 1], reference[:, 0], reference[:, 1]
    )
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=0)


def test_dpo_by_hand():
    loss = DPOLoss(beta=0.5)(ResponseLogProbs(torch.tensor([[-3.0, -7.0]]), COUNTS[:1]), torch.tensor([[-4.0, -5.0]]))
    # rewards 0.5 * (-3 + 4) = 0.5 and 0.5 * (-7 + 5) = -1
    assert loss.chosen_rewards.item() == 0.5
    assert loss.rejected_rewards.item() == -1.0
    assert loss.losses.item() == pytest.approx(-math.log(sigmoid(1.5)))


def test_dpo_of_policy_and_reference_alike_is_ln_2():
    policy, _ = random_pairs()
    loss = DPOLoss()(ResponseLogProbs(policy, COUNTS), policy)
    torch.testing.assert_close(loss.losses, torch.full((3,), math.log(2), dtype=torch.float64))
    assert (loss.chosen_rewards == 0).all()


def test_simpo_by_hand():
    loss = SimPOLoss(beta=2.0, gamma=0.5)(ResponseLogProbs(torch.tensor([[-4.0, -6.0]]), COUNTS[:1]))
    # rewards 2 * -4 / 4 = -2 and 2 * -6 / 2 = -6
    assert loss.chosen_rewards.item() == -2.0
    assert loss.rejected_rewards.item() == -6.0
    assert loss.losses.item() == pytest.approx(-math.log(sigmoid(4 - 0.5)))


def test_simpo_in_the_form_of_its_authors_code():
    policy, _ = random_pairs()
    beta, ratio, smoothing = 2.5, 0.4, 0.1
    ours = SimPOLoss(beta=beta, gamma_beta_ratio=ratio, label_smoothing=smoothing)(ResponseLogProbs(policy, COUNTS))
    logits = (policy / COUNTS)[:, 0] - (policy / COUNTS)[:, 1] - ratio
    expected = (1 - smoothing) * torch.log1p(torch.exp(-beta * logits)) + smoothing * torch.log1p(
        torch.exp(beta * logits)
    )
    torch.testing.assert_close(ours.losses, expected)


def test_simpo_takes_its_margin_one_way():
    assert SimPOLoss(beta=2.0).margin == 0.5
    assert SimPOLoss(beta=2.0, gamma_beta_ratio=0.3).margin == 0.6
    assert SimPOLoss(beta=2.0, gamma=1.4).margin == 1.4
    with pytest.raises(ValueError, match="give one of them"):
        SimPOLoss(gamma=1.0, gamma_beta_ratio=0.5)


def test_orpo_by_hand():
    log_probs = torch.tensor([[4 * math.log(0.5), 2 * math.log(0.2)]])
    loss = ORPOLoss(beta=0.3)(ResponseLogProbs(log_probs, COUNTS[:1]))
    # per-token probabilities 0.5 and 0.2: odds 1 and 1/4
    assert loss.losses.item() == pytest.approx(-math.log(0.5) - 0.3 * math.log(sigmoid(math.log(4))), rel=1e-6)
    assert loss.chosen_rewards.item() == pytest.approx(0.3 * math.log(0.5))


def test_orpo_from_odds_themselves():
    policy, _ = random_pairs()
    p = torch.exp(policy / COUNTS)
    odds = p / (1 - p)
    expected = -torch.log(p[:, 0]) - 0.1 * torch.log(1 / (1 + odds[:, 1] / odds[:, 0]))
    torch.testing.assert_close(ORPOLoss()(ResponseLogProbs(policy, COUNTS)).losses, expected)


def test_orpo_weighs_pairs_alike_whatever_their_lengths():
    log_probs = torch.tensor([[-1.0, -2.0]])
    short, long = torch.tensor([[1, 1]]), torch.tensor([[100, 100]])
    a, b = (ORPOLoss()(ResponseLogProbs(*values)).losses for values in ((log_probs, short), (100 * log_probs, long)))
    torch.testing.assert_close(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("loss", EVERY_LOSS)
def test_extreme_log_probs_give_finite_losses_and_gradients(loss, dtype):
    ends = [0.0, -1e-30, -1e-8, -1.0, -1e4, -1e8]
    log_probs = torch.tensor([[a, b] for a in ends for b in ends], dtype=dtype, requires_grad=True)
    counts = torch.ones_like(log_probs, dtype=torch.long)
    result = loss(ResponseLogProbs(log_probs, counts), torch.zeros_like(log_probs))
    (grad,) = torch.autograd.grad(result.losses.sum(), log_probs)
    for value in (*result, grad):
        assert value.isfinite().all()


@pytest.mark.parametrize("loss", EVERY_LOSS)
def test_gradients_are_those_of_finite_differences(loss):
    policy, reference = random_pairs(3.0)
    policy.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: loss(ResponseLogProbs(x, COUNTS), reference).losses, policy)


@pytest.mark.parametrize("loss", EVERY_LOSS)
def test_pairwise_losses_refuse_other_than_pairs(loss):
    three = torch.zeros(2, 3)
    with pytest.raises(ValueError, match="needs 2 responses per example, but there are 3"):
        loss(ResponseLogProbs(three, torch.ones(2, 3)), three)


@pytest.mark.parametrize("loss", EVERY_LOSS)
def test_no_examples_have_no_losses(loss):
    none = torch.zeros(0, 2)
    assert loss(ResponseLogProbs(none, none), none).losses.shape == (0,)


@pytest.mark.parametrize(
    "make",
    [
        lambda: DPOLoss(beta=0),
        lambda: SimPOLoss(beta=-1),
        lambda: ORPOLoss(-1),
        lambda: DPOLoss(0.1, 0.5),
        lambda: CPOLoss(beta=0),
        lambda: CPOLoss(cpo_alpha=-1),
        lambda: DPOLoss(loss_type="hing"),
        lambda: DPOLoss(ld_alpha=1.5),
        lambda: DPOLoss(f_divergence="total_variation"),
        lambda: DPOLoss(rpo_alpha=-1),
    ],
)
def test_parameters_out_of_range_are_refused(make):
    with pytest.raises(ValueError, match="must"):
        make()


def test_what_does_not_go_together_is_refused():
    with pytest.raises(ValueError, match="use_weighting cannot be combined with loss_type aot"):
        DPOLoss(loss_type="aot", use_weighting=True)
    with pytest.raises(ValueError, match="cannot be combined with loss_type apo_zero"):
        DPOLoss(loss_type="apo_zero", f_divergence="forward_kl")
    with pytest.raises(ValueError, match="exo_pair needs a label_smoothing above 0"):
        DPOLoss(loss_type="exo_pair")


def test_what_would_not_be_used_is_refused():
    for loss_type in ("hinge", "ipo", "bco_pair", "nca_pair", "sppo_hard", "apo_zero", "apo_down"):
        with pytest.raises(ValueError, match=f"^label_smoothing is not used by loss_type {loss_type}; remove it.$"):
            DPOLoss(loss_type=loss_type, label_smoothing=0.2)
    for divergence in ("reverse_kl", "forward_kl", "js_divergence"):
        with pytest.raises(ValueError, match=f"^f_alpha is not used by f_divergence {divergence}; remove it.$"):
            DPOLoss(f_divergence=divergence, f_alpha=0.3)
    DPOLoss(f_divergence="alpha_divergence", f_alpha=0.3)


def test_only_dpo_needs_a_reference():
    assert DPOLoss().needs.reference
    assert not SimPOLoss().needs.reference
    assert not ORPOLoss().needs.reference


def test_what_a_loss_needs_follows_from_its_arguments():
    assert DPOLoss(use_weighting=True, ld_alpha=0.5).needs == LossNeeds(
        reference=True, confidence=True, tail_weight=0.5
    )
    assert ORPOLoss(nll_over_prompt=True).needs == LossNeeds(whole_sequence=True)
    assert CPOLoss().needs == NLLLoss().needs == LossNeeds()


@pytest.mark.parametrize(
    ("loss", "missing"),
    [
        (DPOLoss(), "DPOLoss needs log-probs under the reference"),
        (DPOLoss(use_weighting=True), "DPOLoss needs the policy's confidence for use_weighting"),
        (ORPOLoss(nll_over_prompt=True), "ORPOLoss needs log-probs of the whole sequence for nll_over_prompt"),
        (PlackettLuceLoss(), "PlackettLuceLoss needs the pairs of each ranking"),
    ],
)
def test_what_is_missing_is_an_error(loss, missing):
    policy, reference = random_pairs()
    with pytest.raises(ValueError, match=missing):
        loss(ResponseLogProbs(policy, COUNTS), None if missing.startswith("DPOLoss needs log") else reference)


def test_a_loss_of_ones_own():
    class MarginLoss(Loss):
        def __call__(self, policy, reference=None, pairs=None):
            chosen, rejected = policy.log_probs.unbind(1)
            return LossOutput(rejected - chosen, chosen.detach(), rejected.detach())

    policy, _ = random_pairs()
    assert MarginLoss().mean_over == "pairs"
    assert MarginLoss()(ResponseLogProbs(policy, COUNTS)).losses.tolist() == (policy[:, 1] - policy[:, 0]).tolist()


ALL_OF_FOUR = [(0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)]


def random_rankings(num_examples=5, num_responses=4):
    values = [-20 * torch.rand(num_examples, num_responses, dtype=torch.float64) for _ in range(2)]
    pairs = torch.tensor([(a + e * num_responses, b + e * num_responses) for e in range(5) for a, b in ALL_OF_FOUR])
    return *values, pairs


def test_plackett_luce_is_the_likelihood_of_the_ranking():
    policy, reference, pairs = random_rankings()
    policy.requires_grad_()
    loss = PlackettLuceLoss(beta=0.3)(ResponseLogProbs(policy, torch.ones_like(policy)), reference, pairs)
    rewards = 0.3 * (policy - reference)
    # a response is drawn in proportion to exp(reward) from those that are left
    expected = -sum((rewards[:, k] - torch.logsumexp(rewards[:, k:], dim=1)).sum() for k in range(3))
    torch.testing.assert_close(loss.losses.sum(), expected, rtol=1e-12, atol=0)
    ours, theirs = (torch.autograd.grad(value, policy, retain_graph=True)[0] for value in (loss.losses.sum(), expected))
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-14)
    assert (loss.losses.view(5, 4)[:, 3] == 0).all()
    assert len(loss.chosen_rewards) == len(loss.rejected_rewards) == len(pairs)


def test_plackett_luce_of_pairs_is_dpo():
    policy, reference = random_pairs(scale=2000.0)
    pairs = torch.arange(6).view(3, 2)
    ours = PlackettLuceLoss(beta=0.5)(ResponseLogProbs(policy, COUNTS), reference, pairs)
    dpo = DPOLoss(beta=0.5)(ResponseLogProbs(policy, COUNTS), reference)
    torch.testing.assert_close(ours.losses[::2], dpo.losses, rtol=1e-12, atol=1e-300)
    torch.testing.assert_close(ours.chosen_rewards, dpo.chosen_rewards)


def test_tied_responses_do_not_compete_under_plackett_luce():
    # the first is better than the two others, which are tied: only its own factor is left
    rewards = torch.tensor([[1.0, 0.0, -1.0]], dtype=torch.float64)
    pairs = torch.tensor([(0, 1), (0, 2)])
    loss = PlackettLuceLoss(beta=1.0)(
        ResponseLogProbs(rewards, torch.ones_like(rewards)), torch.zeros_like(rewards), pairs
    )
    assert loss.losses.sum().item() == pytest.approx(-math.log(math.exp(1) / (math.exp(1) + 1 + math.exp(-1))))


@pytest.mark.parametrize("loss", [DPOLoss(), SimPOLoss(), ORPOLoss(), CPOLoss()])
def test_pairs_are_read_off_responses(loss):
    policy, reference, pairs = random_rankings()
    counts = torch.randint(1, 9, policy.shape)
    apart = [
        torch.stack([values[e, [a, b]] for e in range(5) for a, b in ALL_OF_FOUR])
        for values in (policy, counts, reference)
    ]
    of_responses = loss(ResponseLogProbs(policy, counts), reference, pairs)
    of_pairs = loss(ResponseLogProbs(*apart[:2]), apart[2])
    for a, b in zip(of_responses, of_pairs, strict=True):
        assert torch.equal(a, b)


def test_a_pair_that_stands_twice_is_one_under_plackett_luce():
    rewards = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
    pairs = torch.tensor([(0, 1), (0, 1)])
    loss = PlackettLuceLoss(beta=1.0)(
        ResponseLogProbs(rewards, torch.ones_like(rewards)), torch.zeros_like(rewards), pairs
    )
    assert loss.losses.sum().item() == pytest.approx(math.log1p(math.exp(-1)))
    assert len(loss.chosen_rewards) == 2  # as many as the row has pairs, for the metrics


def test_nll_is_a_sum_over_tokens():
    loss = NLLLoss()(ResponseLogProbs(torch.tensor([[-3.0], [-5.0]]), torch.tensor([[2], [7]])))
    assert loss.losses.tolist() == [3.0, 5.0]
    assert loss.chosen_rewards.numel() == 0


def test_aot_compares_quantiles():
    policy, reference = random_pairs()
    eps = 0.1
    margins, reference_margins = (np.sort((values[:, 0] - values[:, 1]).numpy()) for values in (policy, reference))
    ratios = (policy - reference).numpy()
    for loss_type, expected in (
        ("aot", margins - reference_margins),
        ("aot_unpaired", np.sort(ratios[:, 0]) - np.sort(ratios[:, 1])),
    ):
        losses = DPOLoss(beta=0.3, loss_type=loss_type, label_smoothing=eps)(
            ResponseLogProbs(policy, COUNTS), reference
        ).losses
        h = 0.3 * expected
        by_hand = (1 - eps) * np.log1p(np.exp(-h)) + eps * np.log1p(np.exp(h))
        assert losses.numpy() == pytest.approx(by_hand, rel=1e-12)


def test_orpo_takes_its_likelihood_from_prompt_and_response_if_told_so():
    values = -20 * torch.rand(5, 3, dtype=torch.float64)  # chosen, rejected, prompt and chosen
    numbers = torch.randint(1, 9, values.shape)
    policy = ResponseLogProbs(values[:, :2], numbers[:, :2], None, values[:, 2], numbers[:, 2])
    pairs = torch.arange(10).view(5, 2)
    ours = ORPOLoss(beta=0.2, nll_over_prompt=True)(policy, None, pairs)
    without = ORPOLoss(beta=0.2)(policy)
    average = values / numbers
    torch.testing.assert_close(ours.losses, without.losses + average[:, 0] - average[:, 2], rtol=1e-12, atol=1e-12)
    # without pairs, each example is one
    for a, b in zip(ours, ORPOLoss(beta=0.2, nll_over_prompt=True)(policy), strict=True):
        torch.testing.assert_close(a, b)


def test_pairs_are_weighed_by_the_confidence_in_both_responses():
    policy, reference = random_pairs()
    confidence = -torch.rand(3, 2, dtype=torch.float64)
    loss = DPOLoss()(ResponseLogProbs(policy, COUNTS), reference)
    weighed = DPOLoss(use_weighting=True)(ResponseLogProbs(policy, COUNTS, confidence), reference)
    expected = loss.losses * confidence[:, 0].exp() * confidence[:, 1].exp()
    torch.testing.assert_close(weighed.losses, expected, rtol=1e-12, atol=0)
    assert torch.equal(weighed.chosen_rewards, loss.chosen_rewards)
    pairs = torch.tensor([(0, 1), (4, 5)])
    some = DPOLoss(use_weighting=True)(ResponseLogProbs(policy, COUNTS, confidence), reference, pairs)
    torch.testing.assert_close(some.losses, expected[[0, 2]], rtol=1e-12, atol=0)
