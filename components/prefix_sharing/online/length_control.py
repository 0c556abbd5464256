"""How often a model would win if its answers were as long as the other's: AlpacaEval's regression.

Judges prefer longer answers. [Dubois et al. 2024](https://arxiv.org/abs/2404.04475) therefore fit who wins by who the
model is and by which answer is longer, and ask the fit what it expects without a difference of length:

    P(win) = sigmoid(model + length * tanh(d / std(d)) + difficulty * difficulty of the instruction)

where d is the length of the model's answer less that of the other's. Their fit also has answers that were made to win
by length alone, and a penalty found by cross-validation; neither is there for prompts and judges in general.
"""

from dataclasses import dataclass

import numpy as np
from scipy.optimize import minimize

_PENALTY = 0.01
"""Weight of half the squared coefficients beside the sum of the log-losses: what keeps the fit finite where one model
always wins, or the longer answer does."""


@dataclass(frozen=True)
class LengthControl:
    """A fit.

    Attributes:
        win_rate (float): expected at equal length, from 0 to 1.
        model (float): coefficient of the model.
        length (float): of the difference of lengths; above 0 where longer answers win.
        difficulty (float): of the instruction's difficulty; 0 where that is not known.
    """

    win_rate: float
    model: float
    length: float
    difficulty: float


def control_length(
    preferences: np.ndarray, differences: np.ndarray, difficulty: np.ndarray | None = None
) -> LengthControl:
    """Fits the regression to judged comparisons of two models.

    Args:
        preferences (np.ndarray): 1 where the model won, 0 where the other did, 0.5 for a tie, shape ``[M]``.
        differences (np.ndarray): length of the model's answer less that of the other's, in any unit, shape ``[M]``.
        difficulty (np.ndarray | None): of the instructions, as AlpacaEval estimates it, shape ``[M]``. Default: None.

    Returns:
        LengthControl: the fit; NaN without comparisons.
    """
    if len(preferences) == 0:
        return LengthControl(*[float("nan")] * 4)
    spread = np.std(differences, ddof=1) if len(differences) > 1 else 0.0
    lengths = np.tanh(differences / spread) if spread > 0 else np.zeros(len(differences))
    hardness = np.zeros(len(preferences)) if difficulty is None else difficulty
    features = np.stack([np.ones(len(preferences)), lengths, hardness], axis=1)
    model, length, difficult = _fit(features, preferences.astype(np.float64)).tolist()
    expected = float(_sigmoid(model + difficult * hardness).mean())
    return LengthControl(expected, model, length, difficult)


def _fit(features: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """The coefficients with the least penalized log-loss."""

    def loss(coefficients: np.ndarray) -> float:
        logits = features @ coefficients
        losses = np.logaddexp(0, logits) - targets * logits
        return float(losses.sum() + _PENALTY / 2 * coefficients @ coefficients)

    def gradient(coefficients: np.ndarray) -> np.ndarray:
        return features.T @ (_sigmoid(features @ coefficients) - targets) + _PENALTY * coefficients

    def hessian(coefficients: np.ndarray) -> np.ndarray:
        expected = _sigmoid(features @ coefficients)
        return (features.T * (expected * (1 - expected))) @ features + _PENALTY * np.eye(len(coefficients))

    start, options = np.zeros(features.shape[1]), {"gtol": 1e-10 * len(targets)}
    return minimize(loss, start, jac=gradient, hess=hessian, method="trust-exact", options=options).x


def _sigmoid(logits: np.ndarray) -> np.ndarray:
    return np.exp(-np.logaddexp(0, -logits))
