"""Selections: which candidates to train on, within a budget, by their scores, their lengths or at random.

The methods are those that LIONs (arXiv 2407.06542) compares. There, of 10,000 of 264,000 pairs, only those of ``a2``
were as good as pairs drawn at random, and ten times as many drawn at random were better than all.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import numpy as np

from prefix_sharing.errors import ConfigError

BEYOND_BUDGET = "beyond the budget"
"""In ``dropped`` where a candidate could have been selected, but others were."""


@dataclass(frozen=True)
class Pool:
    """What candidates are selected by.

    Attributes:
        lengths (np.ndarray): characters of the best answer, shape ``[n]``.
        chosen (np.ndarray): score of the best answer, shape ``[n]``.
        rejected (np.ndarray): score of the worst answer, shape ``[n]``.
        complexity (np.ndarray): of the prompt, shape ``[n]``.
        embedding (np.ndarray): a vector, shape ``[n, d]``.
    """

    lengths: np.ndarray
    chosen: np.ndarray
    rejected: np.ndarray
    complexity: np.ndarray
    embedding: np.ndarray

    @property
    def gap(self) -> np.ndarray:
        """By how much the best answer's score exceeds the worst one's, shape ``[n]``."""
        return self.chosen - self.rejected

    def only(self, which: np.ndarray) -> "Pool":
        """Some of the candidates, by a mask or by indices."""
        return Pool(*(getattr(self, name)[which] for name in self.__dataclass_fields__))


class Selection(Protocol):
    """A method with its settings; its keys in a config are its fields."""

    needs: ClassVar[tuple[str, ...]]
    """Which attributes of a ``Pool`` it reads."""

    @property
    def budget(self) -> int:
        """How many to take at most."""
        ...

    def choose(self, pool: Pool) -> np.ndarray:
        """Why each candidate is left out, shape ``[n]``; "" for those that are taken."""
        ...


@dataclass(frozen=True)
class Random:
    """At random.

    Attributes:
        budget (int): how many to take at most.
        seed (int): decides which. Default: 0.
    """

    needs: ClassVar[tuple[str, ...]] = ()
    budget: int
    seed: int = 0

    def __post_init__(self) -> None:
        _check_budget(self.budget)

    def choose(self, pool: Pool) -> np.ndarray:
        """See ``Selection``."""
        return _take(draw(len(pool.lengths), self.budget, self.seed), _nothing_against(pool))


@dataclass(frozen=True)
class Longest:
    """Those with the longest chosen answers (Zhao et al., arXiv 2402.04833); of equally long ones the first.

    Attributes:
        budget (int): how many to take at most.
    """

    needs: ClassVar[tuple[str, ...]] = ("lengths",)
    budget: int

    def __post_init__(self) -> None:
        _check_budget(self.budget)

    def choose(self, pool: Pool) -> np.ndarray:
        """See ``Selection``."""
        return _take(_highest(pool.lengths)[: self.budget], _nothing_against(pool))


@dataclass(frozen=True)
class Alpagasus:
    """At random among those whose chosen answer has a high score (AlpaGasus, arXiv 2307.08701).

    Attributes:
        budget (int): how many to take at most.
        min_score (float): the least score of a chosen answer.
        seed (int): decides which are drawn. Default: 0.
    """

    needs: ClassVar[tuple[str, ...]] = ("chosen",)
    budget: int
    min_score: float
    seed: int = 0

    def __post_init__(self) -> None:
        _check_budget(self.budget)

    def choose(self, pool: Pool) -> np.ndarray:
        """See ``Selection``."""
        against = _nothing_against(pool)
        against[pool.chosen < self.min_score] = "score below min_score"
        return _draw_among(against, self.budget, self.seed)


@dataclass(frozen=True)
class Argilla:
    """At random among those of which both answers have a high score, with a gap between the two.

    Attributes:
        budget (int): how many to take at most.
        min_score (float): the least score of an answer, chosen or rejected.
        min_gap (float): by how much a chosen answer's score exceeds the rejected one's. Default: 1.
        seed (int): decides which are drawn. Default: 0.
    """

    needs: ClassVar[tuple[str, ...]] = ("chosen", "rejected")
    budget: int
    min_score: float
    min_gap: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        _check_budget(self.budget)

    def choose(self, pool: Pool) -> np.ndarray:
        """See ``Selection``."""
        against = _nothing_against(pool)
        against[pool.gap < self.min_gap] = "scores differ by less than min_gap"
        against[np.minimum(pool.chosen, pool.rejected) < self.min_score] = "score below min_score"
        return _draw_among(against, self.budget, self.seed)


@dataclass(frozen=True)
class A2:
    """LIONs' own: the highest scores of chosen answers within each bin of the difference of the scores.

    Bins take turns, the one of the least difference first, each with its highest score that is left, until the budget
    is spent: every bin gives as many, or all it has. Of equal scores, the first is taken.

    Attributes:
        budget (int): how many to take at most.
        min_gap (float): pairs whose scores differ by less are left out. Default: 2.
        bin_width (float): differences from ``min_gap`` on are put into bins of this width. Default: 1.
    """

    needs: ClassVar[tuple[str, ...]] = ("chosen", "rejected")
    budget: int
    min_gap: float = 2.0
    bin_width: float = 1.0

    def __post_init__(self) -> None:
        _check_budget(self.budget)
        if self.bin_width <= 0:
            raise ConfigError("bin_width", f"must be above 0, but is {self.bin_width}")

    def choose(self, pool: Pool) -> np.ndarray:
        """See ``Selection``."""
        against = _nothing_against(pool)
        against[pool.gap < self.min_gap] = "scores differ by less than min_gap"
        left = np.flatnonzero(against == "")
        bins = np.floor((pool.gap[left] - self.min_gap) / self.bin_width).astype(np.int64)
        order = np.lexsort((-pool.chosen[left], bins))  # by bin, then from the highest score; stable
        starts = np.flatnonzero(np.diff(bins[order], prepend=-1))
        turn = np.arange(len(left)) - np.repeat(starts, np.diff([*starts, len(left)]))
        by_turn = np.lexsort((bins[order], turn))
        return _take(left[order[by_turn[: self.budget]]], against)


@dataclass(frozen=True)
class Deita:
    """The highest quality times complexity, of which none is like another that is taken (DEITA, arXiv 2312.15685).

    Quality is the score of the chosen answer. From the highest product on, a candidate is taken unless its embedding is
    as similar to one that is taken as ``max_similarity``.

    Attributes:
        budget (int): how many to take at most.
        complexity (str): column with the complexity of the prompt.
        embedding (str): column with a vector.
        max_similarity (float): cosine similarity from which two are too much alike. Default: 0.9.
    """

    needs: ClassVar[tuple[str, ...]] = ("chosen", "complexity", "embedding")
    budget: int
    complexity: str
    embedding: str
    max_similarity: float = 0.9

    def __post_init__(self) -> None:
        _check_budget(self.budget)
        if not -1 < self.max_similarity <= 1:
            raise ConfigError("max_similarity", f"must be above -1 and at most 1, but is {self.max_similarity}")

    def choose(self, pool: Pool) -> np.ndarray:
        """See ``Selection``."""
        against = _nothing_against(pool)
        order = _highest(pool.chosen * pool.complexity)
        norms = np.linalg.norm(pool.embedding, axis=1, keepdims=True)
        vectors = pool.embedding / np.where(norms == 0, 1, norms)
        taken: list[int] = []
        block = 1024  # similarities to what is taken are computed for a block at once, those within it beside them
        for start in range(0, len(order), block):
            mine = order[start : start + block]
            is_like = (vectors[mine] @ vectors[taken].T >= self.max_similarity).any(axis=1)
            alike = vectors[mine] @ vectors[mine].T >= self.max_similarity
            for i, candidate in enumerate(mine):
                if len(taken) == self.budget:
                    return _take(np.array(taken), against)
                if is_like[i]:
                    against[candidate] = "like one that is selected"
                else:
                    taken.append(int(candidate))
                    is_like |= alike[i]
        return _take(np.array(taken, dtype=np.int64), against)


SELECTIONS: dict[str, type[Any]] = {
    "random": Random,
    "longest": Longest,
    "alpagasus": Alpagasus,
    "deita": Deita,
    "argilla": Argilla,
    "a2": A2,
}
"""Every method by the name that ``select.by`` gives it."""


def draw(num: int, budget: int, seed: int) -> np.ndarray:
    """Draws at random without replacement.

    Args:
        num (int): how many there are.
        budget (int): how many to draw at most.
        seed (int): decides which.

    Returns:
        np.ndarray: indices, ascending.
    """
    return np.sort(np.random.default_rng(seed).permutation(num)[:budget])


def _draw_among(against: np.ndarray, budget: int, seed: int) -> np.ndarray:
    left = np.flatnonzero(against == "")
    return _take(left[draw(len(left), budget, seed)], against)


def _take(taken: np.ndarray, against: np.ndarray) -> np.ndarray:
    """The reasons against candidates, with one for those that are not taken though there was none."""
    is_left = against == ""
    is_left[taken] = False
    against[is_left] = BEYOND_BUDGET
    return against


def _nothing_against(pool: Pool) -> np.ndarray:
    return np.full(len(pool.lengths), "", dtype=object)


def _highest(values: np.ndarray) -> np.ndarray:
    """Indices from the highest value to the lowest; of equal ones the first comes first."""
    return np.argsort(-values, kind="stable")


def _check_budget(budget: int) -> None:
    if budget < 1:
        raise ConfigError("budget", f"must be at least 1, but is {budget}")
