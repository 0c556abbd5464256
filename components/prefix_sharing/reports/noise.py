"""Whether runs differ by more than they differ from themselves under another seed."""

from collections.abc import Sequence

import numpy as np
from scipy.stats import studentized_range


def least_difference(samples: Sequence[Sequence[float]]) -> float | None:
    """The difference of two means that is more than noise: Tukey's honest significant difference at 5 %.

    Noise is the standard deviation within the groups, pooled. Groups of different sizes count as their harmonic mean.

    Args:
        samples (Sequence[Sequence[float]]): what was measured with each seed, by group; at least two groups.

    Returns:
        float | None: the largest and the smallest mean of equal groups are that far apart in one of twenty cases. None
            where no group has two values, so that noise is not known.
    """
    sizes = np.array([len(sample) for sample in samples])
    freedom = int(sizes.sum()) - len(sizes)
    if freedom == 0:
        return None
    squares = sum(float(((np.asarray(sample) - np.mean(sample)) ** 2).sum()) for sample in samples)
    error_of_mean = np.sqrt(squares / freedom * np.mean(1 / sizes))
    return float(studentized_range.ppf(0.95, len(sizes), freedom) * error_of_mean)
