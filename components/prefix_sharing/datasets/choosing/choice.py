"""The keys of a builder that choose among its records, and what they leave out."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from prefix_sharing.config import explained
from prefix_sharing.config.files import did_you_mean
from prefix_sharing.datasets.choosing.candidates import Candidates, column_of, numbers_of
from prefix_sharing.datasets.choosing.duplicates import DUPLICATE, Exact, MinHash, deduplicate
from prefix_sharing.datasets.choosing.keys import plain, read_keys
from prefix_sharing.datasets.choosing.reading import RAW, SCORE_COLUMNS, SCORES
from prefix_sharing.datasets.choosing.report import log_selection
from prefix_sharing.datasets.choosing.rescaling import rescale
from prefix_sharing.datasets.choosing.scoring import Columns, Scores, read_scores
from prefix_sharing.datasets.choosing.selection import SELECTIONS, Deita, Pool, Selection
from prefix_sharing.errors import ConfigError, UserError

_METHODS: dict[str, type[Exact] | type[MinHash]] = {"exact": Exact, "minhash": MinHash}

_NO_NUMBER = {
    "chosen": "without a score",
    "rejected": "without a score of another answer",
    "complexity": "without complexity",
    "embedding": "without an embedding",
}
"""In ``dropped`` where a candidate lacks what it would be selected by."""


@dataclass(frozen=True)
class Choice:
    """How to choose among candidates.

    Attributes:
        duplicates (Exact | MinHash | None): what a duplicate is. Default: None, they stay.
        selection (Selection | None): which to take. Default: None, all.
        scores (Scores): where scores of answers come from. Default: columns that are known by their names.
        raw (Scores | None): where a reward model's raw values come from. Default: None, there are none.
    """

    duplicates: Exact | MinHash | None = None
    selection: Selection | None = None
    scores: Scores = field(default_factory=Columns)
    raw: Scores | None = None

    @classmethod
    def from_keys(
        cls, *, deduplicate: Any = None, select: Any = None, rescale: Any = None, scores: Any = None
    ) -> "Choice":
        """Reads the keys of a builder.

        Args:
            deduplicate (Any): ``exact``, ``minhash``, or a mapping with ``method``. Default: None.
            select (Any): a mapping with ``by`` and ``budget``. Default: None.
            rescale (Any): a mapping with ``raw``. Default: None.
            scores (Any): columns, or a judge. Default: None.

        Returns:
            Choice: what they say.

        Raises:
            ConfigError: if a key is malformed or would not be used.
        """
        choice = cls(
            _read_duplicates(plain(deduplicate)),
            _read_selection(plain(select)),
            read_scores("scores", plain(scores)),
            _read_raw(plain(rescale)),
        )
        for key, value in (("rescale", rescale), ("scores", scores)):
            if value is not None and not choice.needs_scores:
                raise ConfigError(key, "not used: it is for a select by scores, such as a2")
        return choice

    @property
    def needs_scores(self) -> bool:
        """Whether it chooses by scores."""
        return self.selection is not None and "chosen" in self.selection.needs

    @property
    def is_by_prompt(self) -> bool:
        """Whether it looks at nothing but prompts."""
        by_answers = self.duplicates is not None and self.duplicates.over != "prompt"
        return not by_answers and (self.selection is None or not self.selection.needs)

    @property
    def score_columns(self) -> tuple[str, ...]:
        """The columns of scores that were named."""
        return self.scores.names if isinstance(self.scores, Columns) else ()

    @property
    def columns(self) -> set[str]:
        """Every column that it reads, or may."""
        named = set(self.raw.names) if isinstance(self.raw, Columns) else set()
        if isinstance(self.selection, Deita):
            named |= {self.selection.complexity, self.selection.embedding}
        if self.needs_scores and isinstance(self.scores, Columns):
            named |= set(self.scores.names) or {name for names in SCORE_COLUMNS for name in names}
        return named

    def left_out(self, candidates: Candidates, name: str) -> np.ndarray:
        """Why each candidate is left out: duplicates first, then what is not selected. All of it is logged.

        Args:
            candidates (Candidates): the records.
            name (str): where they come from, for the log.

        Returns:
            np.ndarray: shape ``[n]``; "" for those that stay.

        Raises:
            UserError: if a number is malformed, or no candidate has what it would be selected by.
        """
        against = np.full(len(candidates.usable), "", dtype=object)
        if self.duplicates is not None and len(against):
            against[deduplicate(candidates, self.duplicates)] = DUPLICATE
        left = np.flatnonzero(against == "")
        if self.selection is not None and len(left):
            against[left] = self._not_selected(candidates.only(left), self.selection, name)
        return against

    def _not_selected(self, candidates: Candidates, selection: Selection, name: str) -> np.ndarray:
        pool = self._pool_of(candidates, selection, name)
        against = np.full(len(candidates.usable), "", dtype=object)
        for needed in selection.needs:
            values = getattr(pool, needed).reshape(len(against), -1)
            is_missing = np.isnan(values).any(axis=1) | (values.shape[1] == 0)
            if is_missing.all():
                raise ConfigError("select", f"no record of {name} has {self._what(needed)}")
            if is_missing.any():  # lengths are never missing, and _NO_NUMBER has no words for them
                against[is_missing & (against == "")] = _NO_NUMBER[needed]
        left = np.flatnonzero(against == "")
        against[left] = selection.choose(pool.only(left))
        log_selection(selection, pool, against, candidates, name)
        return against

    def _pool_of(self, candidates: Candidates, selection: Selection, name: str) -> Pool:
        columns: dict[str, Sequence[str]] = {}
        if self.needs_scores and isinstance(self.scores, Columns):
            columns[SCORES] = self.score_columns
        if isinstance(self.raw, Columns):
            columns[RAW] = self.raw.names
        if isinstance(selection, Deita):
            columns |= {"complexity": (selection.complexity,), "embedding": (selection.embedding,)}
        read = candidates.read(columns)
        nothing = np.full(len(read), np.nan)
        chosen = rejected = nothing
        if self.needs_scores:
            scores = self.scores.of(read, SCORES)
            if self.raw is not None:
                raw = self.raw.of(read, RAW)
                width = max(scores.shape[1], raw.shape[1])
                with explained("rescale"):
                    scores = rescale(_widened(scores, width), _widened(raw, width), name)
            chosen, rejected = _ends(scores, column_of(read, "num_answers").to_numpy())
        embedding = numbers_of(read, "embedding") if "embedding" in columns else nothing[:, None]
        is_short = np.isnan(embedding[:, -1:]).any(axis=1) & np.isfinite(embedding).any(axis=1)
        if is_short.any():
            where = candidates.describe(int(candidates.usable[is_short.argmax()]))
            raise UserError(f"{where}: its embedding has fewer numbers than others, of {embedding.shape[1]:,} each.")
        return Pool(
            column_of(read, "length").to_numpy(),
            chosen,
            rejected,
            _widened(numbers_of(read, "complexity"), 1)[:, 0] if "complexity" in columns else nothing,
            embedding,
        )

    def _what(self, needed: str) -> str:
        if needed in ("complexity", "embedding"):
            return f"a number in its column '{getattr(self.selection, needed)}'"
        which = "a score of its chosen answer" if needed == "chosen" else "scores of two answers"
        if self.score_columns:
            which += f" in {', '.join(self.score_columns)}"
        return f"{which}; say in scores which columns hold them, or which judge gives them"


def _ends(scores: np.ndarray, num_answers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The scores of the best and the worst answer, which has none where there is only one."""
    scores = _widened(scores, 1)
    last = np.clip(num_answers - 1, 0, scores.shape[1] - 1)
    rejected = np.where(num_answers > 1, scores[np.arange(len(scores)), last], np.nan)
    return scores[:, 0], rejected


def _widened(values: np.ndarray, width: int) -> np.ndarray:
    """As many columns at least."""
    missing = max(0, width - values.shape[1])
    return np.pad(values, ((0, 0), (0, missing)), constant_values=np.nan)


def _read_selection(value: Any) -> Selection | None:
    if value is None:
        return None
    if not isinstance(value, Mapping) or value.get("by") not in list(SELECTIONS):
        given = value.get("by") if isinstance(value, Mapping) else value
        problem = f"must be one of {', '.join(SELECTIONS)}, but is {given}.{did_you_mean(str(given), list(SELECTIONS))}"
        raise ConfigError("select.by", problem)
    by = value["by"]
    return read_keys(SELECTIONS[by], "select", {k: v for k, v in value.items() if k != "by"}, f"select by {by}")


def _read_duplicates(value: Any) -> Exact | MinHash | None:
    if value is None:
        return None
    keys = dict(value) if isinstance(value, Mapping) else {"method": value}
    method = keys.pop("method", "exact")
    if method not in list(_METHODS):
        raise ConfigError("deduplicate.method", f"must be one of {', '.join(_METHODS)}, but is {method}")
    return read_keys(_METHODS[method], "deduplicate", keys, f"deduplicate by {method}")


def _read_raw(value: Any) -> Scores | None:
    if value is None:
        return None
    if not isinstance(value, Mapping) or value.keys() != {"raw"} or value["raw"] is None:
        raise ConfigError("rescale", f"must be a mapping with raw, columns or a judge, but is {value!r}")
    return read_scores("rescale.raw", value["raw"])
