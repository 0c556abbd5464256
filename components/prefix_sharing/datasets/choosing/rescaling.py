"""A reward model's raw values on the scale of annotated scores, so that answers without a score get one."""

import logging
from dataclasses import dataclass

import numpy as np

from prefix_sharing.errors import UserError

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Fit:
    """The line from raw values to scores: ``score = slope * (raw - least) / (most - least) + offset``.

    Attributes:
        slope (float): scores that lie between the least and the greatest raw value.
        offset (float): score of the least raw value.
        least (float): the least raw value.
        most (float): the greatest raw value.
        num_fitted (int): answers that have both, which the line is fitted to.
        error (float): root of the mean squared error on them.
        pair_accuracy (float): share of the pairs of answers to one prompt with different scores which raw values put
            in the same order, ties counting half; NaN where there is no such pair.
    """

    slope: float
    offset: float
    least: float
    most: float
    num_fitted: int
    error: float
    pair_accuracy: float

    def __call__(self, raw: np.ndarray) -> np.ndarray:
        """The scores that raw values stand for, of the same shape."""
        return self.slope * (raw - self.least) / (self.most - self.least) + self.offset


def fit(scores: np.ndarray, raw: np.ndarray) -> Fit:
    """Scales raw values to 0–1 by their least and greatest, then fits the least-squares line to the scores.

    Args:
        scores (np.ndarray): annotated scores of each prompt's answers, shape ``[n, K]``, NaN where there is none.
        raw (np.ndarray): the reward model's values of the same answers, shape ``[n, K]``, NaN where there is none.

    Returns:
        Fit: the line.

    Raises:
        UserError: if fewer than two different raw values belong to answers with a score.
    """
    both = np.isfinite(scores) & np.isfinite(raw)
    x, y = raw[both], scores[both]
    if len(x) < 2 or x.min() == x.max():
        problem = f"{len(x):,} answers have both a score and a raw value"
        if len(x) > 1:
            problem += f", and all raw values are {x[0]:g}"
        raise UserError(f"{problem}; a line needs two that differ.")
    least, most = float(np.nanmin(raw)), float(np.nanmax(raw))
    x = (x - least) / (most - least)
    slope = float(((x - x.mean()) * (y - y.mean())).sum() / ((x - x.mean()) ** 2).sum())
    offset = float(y.mean() - slope * x.mean())
    error = float(np.sqrt(np.mean((slope * x + offset - y) ** 2)))
    return Fit(slope, offset, least, most, len(x), error, _pair_accuracy(scores, raw))


def _pair_accuracy(scores: np.ndarray, raw: np.ndarray) -> float:
    agreed, pairs = 0.0, 0
    for i in range(scores.shape[1]):
        for j in range(i + 1, scores.shape[1]):
            by_score, by_raw = scores[:, i] - scores[:, j], raw[:, i] - raw[:, j]
            counted = (by_score != 0) & np.isfinite(by_score) & np.isfinite(by_raw)
            agreed += float((1 + np.sign(by_score) * np.sign(by_raw))[counted].sum() / 2)
            pairs += int(counted.sum())
    return agreed / pairs if pairs else float("nan")


def rescale(scores: np.ndarray, raw: np.ndarray, name: str) -> np.ndarray:
    """Fills in scores that are missing; those that are there stay. The line, its error and its accuracy are logged.

    Args:
        scores (np.ndarray): annotated scores, see ``fit``.
        raw (np.ndarray): raw values, see ``fit``.
        name (str): where the records come from, for the log.

    Returns:
        np.ndarray: scores, shape ``[n, K]``; NaN where there is neither.

    Raises:
        UserError: if no line can be fitted.
    """
    line = fit(scores, raw)
    is_filled = np.isnan(scores) & np.isfinite(raw)
    log.info(
        "%s: rescaled raw values from %g–%g: score = %g * (raw - %g) / %g + %g; on %s answers with both, root mean "
        "squared error %.4g, pair accuracy %.3f; %s scores filled in, %s left as they were",
        name,
        line.least,
        line.most,
        line.slope,
        line.least,
        line.most - line.least,
        line.offset,
        f"{line.num_fitted:,}",
        line.error,
        line.pair_accuracy,
        f"{int(is_filled.sum()):,}",
        f"{int(np.isfinite(scores).sum()):,}",
    )
    if line.slope <= 0:
        log.warning("%s: scores do not rise with raw values, so what is filled in says little", name)
    return np.where(is_filled, line(raw), scores)
