"""Whether runs differ by more than they differ from themselves under another seed."""

from collections.abc import Sequence

import numpy as np

_LEVEL = 0.95
_DRAWS = 20_000


def least_difference(samples: Sequence[Sequence[float]]) -> float | None:
    """The difference of two means that is more than noise: Tukey's honest significant difference at 5 %.

    Noise is the standard deviation within the groups, pooled. How far apart the means of so many equal groups are by
    chance is found by drawing them, so groups may differ in size.

    Args:
        samples (Sequence[Sequence[float]]): what was measured with each seed, by group; at least two groups.

    Returns:
        float | None: the largest and the smallest mean of equal groups are that far apart in one of twenty cases. None
            where no group has two values, so that noise is not known.
    """
    sizes = [len(sample) for sample in samples]
    freedom = sum(sizes) - len(sizes)
    if freedom == 0:
        return None
    ends = np.cumsum(sizes)[:-1]
    by_chance = _range_over_noise(
        np.split(np.random.default_rng(0).standard_normal((_DRAWS, sum(sizes))), ends, axis=1)
    )
    squares = sum(float(((np.asarray(sample) - np.mean(sample)) ** 2).sum()) for sample in samples)
    return float(np.quantile(by_chance, _LEVEL)) * (squares / freedom) ** 0.5


def _range_over_noise(groups: Sequence[np.ndarray]) -> np.ndarray:
    """The range of the groups' means over the noise within them, groups ``[draws, n]``."""
    means = np.stack([group.mean(axis=1) for group in groups])
    squares = np.stack([((group - mean[:, None]) ** 2).sum(axis=1) for group, mean in zip(groups, means, strict=True)])
    freedom = sum(group.shape[1] - 1 for group in groups)
    return np.ptp(means, axis=0) / np.sqrt(squares.sum(axis=0) / freedom)
