"""How often a model would win at equal length: the fit against another one, and on data made to have an answer."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from prefix_sharing.online.length_control import control_length


def features_of(differences, difficulty):
    lengths = np.tanh(differences / np.std(differences, ddof=1))
    return torch.tensor(np.stack([np.ones_like(lengths), lengths, difficulty], axis=1))


def fitted_by_gradients(features, preferences):
    """The same penalized likelihood, maximized by torch in fp64."""
    coefficients = torch.zeros(features.shape[1], dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [coefficients], max_iter=1000, tolerance_grad=1e-12, tolerance_change=1e-16, line_search_fn="strong_wolfe"
    )

    def loss():
        optimizer.zero_grad()
        log_loss = torch.nn.functional.binary_cross_entropy_with_logits(
            features @ coefficients, torch.tensor(preferences), reduction="sum"
        )
        total = log_loss + coefficients.square().sum() / 200
        total.backward()
        return total

    optimizer.step(loss)
    return coefficients.detach()


def random_comparisons(seed, num):
    rng = np.random.default_rng(seed)
    return rng.choice([0.0, 0.5, 1.0], num), rng.normal(50, 300, num), rng.normal(0, 1, num)


@settings(max_examples=30)
@given(seed=st.integers(0, 10_000), num=st.integers(2, 200))
def test_the_fit_is_that_of_another_optimizer(seed, num):
    preferences, differences, difficulty = random_comparisons(seed, num)
    found = control_length(preferences, differences, difficulty)
    expected = fitted_by_gradients(features_of(differences, difficulty), preferences)
    assert [found.model, found.length, found.difficulty] == pytest.approx(expected.tolist(), abs=1e-6)
    win_rate = torch.sigmoid(expected[0] + expected[2] * torch.tensor(difficulty)).mean()
    assert found.win_rate == pytest.approx(win_rate.item(), abs=1e-6)


def test_the_fit_is_scikit_learns():
    linear_model = pytest.importorskip("sklearn.linear_model")
    preferences, differences, difficulty = random_comparisons(0, 300)
    features = features_of(differences, difficulty).numpy()
    fit = linear_model.LogisticRegression(C=100, fit_intercept=False, tol=1e-10, max_iter=1000)
    # each comparison once as won and once as lost, weighted by how much it was
    labels, weights = np.repeat([1, 0], 300), np.concatenate([preferences, 1 - preferences])
    fit.fit(np.concatenate([features, features]), labels, sample_weight=weights)
    found = control_length(preferences, differences, difficulty)
    assert [found.model, found.length, found.difficulty] == pytest.approx(fit.coef_[0].tolist(), abs=1e-6)


def planted(model, length, difficult, num=20_000):
    rng = np.random.default_rng(0)
    differences, difficulty = rng.normal(50, 100, num), rng.normal(0.3, 1, num)
    features = features_of(differences, difficulty).numpy()
    probability = 1 / (1 + np.exp(-features @ [model, length, difficult]))
    return (rng.random(num) < probability).astype(float), differences, difficulty


@pytest.mark.parametrize(("model", "length"), [(0.0, 2.0), (0.8, 1.0), (-0.5, 3.0), (1.0, 0.0)])
def test_what_was_planted_is_found(model, length):
    preferences, differences, difficulty = planted(model, length, 0.5)
    found = control_length(preferences, differences, difficulty)
    # The standard error of a coefficient is below 0.04, and that of the win rate at most a quarter of it.
    assert [found.model, found.length, found.difficulty] == pytest.approx([model, length, 0.5], abs=0.15)
    assert found.win_rate == pytest.approx(np.mean(1 / (1 + np.exp(-model - 0.5 * difficulty))), abs=0.03)


def test_wins_by_length_alone_are_none_at_equal_length():
    preferences, differences, _ = planted(0.0, 3.0, 0.0)
    assert preferences.mean() > 0.65
    assert control_length(preferences, differences).win_rate == pytest.approx(0.5, abs=0.03)


@given(seed=st.integers(0, 10_000), num=st.integers(1, 60))
def test_seen_from_the_other_model_it_is_the_rest(seed, num):
    preferences, differences, difficulty = random_comparisons(seed, num)
    one, other = (
        control_length(preferences, differences, difficulty),
        control_length(1 - preferences, -differences, difficulty),
    )
    # Whoever compares losses finds the least one to about the square root of their rounding.
    assert one.win_rate + other.win_rate == pytest.approx(1, abs=1e-7)
    assert one.length == pytest.approx(other.length, abs=1e-6)


@pytest.mark.parametrize("win_rate", [0.0, 1.0])
def test_a_model_that_always_wins_or_never_has_a_finite_fit(win_rate):
    preferences = np.full(64, win_rate)
    for differences in (np.zeros(64), np.arange(64.0)):
        found = control_length(preferences, differences)
        assert np.isfinite([found.model, found.length]).all()
        assert found.win_rate == pytest.approx(win_rate, abs=0.02)
    assert np.isnan(control_length(np.array([]), np.array([])).win_rate)


def test_the_longer_answer_always_winning_says_nothing_of_the_model():
    differences = np.array([-30.0, -10.0, 10.0, 30.0] * 10)
    found = control_length((differences > 0).astype(float), differences)
    assert found.win_rate == pytest.approx(0.5, abs=1e-9)
    assert found.length > 5
