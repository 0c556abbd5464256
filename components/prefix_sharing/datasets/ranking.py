"""Which pairs a ranked list of responses is compared by."""

import itertools
from collections.abc import Sequence
from typing import Literal

PairStrategy = Literal["best_vs_rest", "adjacent", "all", "best_vs_worst", "best_only"]


def pairs_of_ranking(num_responses: int, strategy: PairStrategy) -> list[tuple[int, int]]:
    """The pairs of a ranking, chosen before rejected.

    Args:
        num_responses (int): K, ranked best first.
        strategy (PairStrategy): ``best_vs_rest`` compares the first with each other one, ``adjacent`` each with the
            next, ``all`` each with every later one, ``best_vs_worst`` the first with the last. For K = 2 they are the
            same. ``best_only`` compares none.

    Returns:
        list[tuple[int, int]]: indices into the ranking; none for K = 1.
    """
    ranks = range(num_responses)
    if strategy == "best_vs_rest":
        return [(0, worse) for worse in ranks[1:]]
    if strategy == "adjacent":
        return list(itertools.pairwise(ranks))
    if strategy == "all":
        return [(better, worse) for better in ranks for worse in ranks[better + 1 :]]
    return [(0, num_responses - 1)] if num_responses > 1 and strategy == "best_vs_worst" else []


def pairs_with_a_preference(
    responses: Sequence[object], scores: Sequence[float] | None, strategy: PairStrategy
) -> list[tuple[int, int]]:
    """The pairs of a ranking that say which response is better.

    Args:
        responses (Sequence[object]): the responses, best first; equal ones are no pair.
        scores (Sequence[float] | None): their scores; tied ones are no pair.
        strategy (PairStrategy): see ``pairs_of_ranking``.

    Returns:
        list[tuple[int, int]]: chosen before rejected.
    """
    return [
        (better, worse)
        for better, worse in pairs_of_ranking(len(responses), strategy)
        if responses[better] != responses[worse] and (scores is None or scores[better] != scores[worse])
    ]
