"""Scores of candidates' answers, from columns or from a judge."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from pkgutil import resolve_name
from typing import Any, Protocol

import datasets
import numpy as np
from datasets.fingerprint import Hasher
from omegaconf import OmegaConf

from prefix_sharing.config import instantiate
from prefix_sharing.datasets.choosing.candidates import numbers_of, turns_of
from prefix_sharing.datasets.choosing.keys import plain
from prefix_sharing.errors import ConfigError
from prefix_sharing.fingerprint import code_fingerprint, source_of
from prefix_sharing.tokenizers import Turn

_PROMPTS_OF_A_CALL = 256
_PROMPTS_OF_A_PART = 1024

_VERDICTS = "verdicts"


class Judge(Protocol):
    """Scores answers, as those of ``prefix_sharing.judging`` do; higher is better."""

    def __call__(self, prompts: Sequence[Sequence[Turn]], answers: Sequence[Sequence[str]]) -> list[np.ndarray]:
        """Scores the answers to each prompt; NaN where there is no verdict."""
        ...


@dataclass(frozen=True)
class Columns:
    """Scores that the records have.

    Attributes:
        names (tuple[str, ...]): one column with a list, or one for each answer; none for those known by their names.
    """

    names: tuple[str, ...] = ()

    def of(self, read: datasets.Dataset, name: str) -> np.ndarray:
        """The scores of each line's answers, see ``numbers_of``.

        Args:
            read (datasets.Dataset): what ``Candidates.read`` returns.
            name (str): of the numbers that it has of these columns.
        """
        return numbers_of(read, name)


@dataclass(frozen=True)
class Judged:
    """Scores that a judge gives.

    Attributes:
        judge (Judge): the judge.
        key (str): fingerprint of what decides its scores: its arguments, and the source of functions they name.
    """

    judge: Judge
    key: str

    def of(self, read: datasets.Dataset, name: str) -> np.ndarray:
        """The scores of each line's answers, see ``Columns.of``; they are given once, and cached by ``datasets``.

        In parts, so that a pass that was interrupted goes on.
        """
        asked = read.select_columns(["prompt", "answers", "one_prompt"])
        parts = [self._of_part(asked, start) for start in range(0, max(1, len(asked)), _PROMPTS_OF_A_PART)]
        return numbers_of(datasets.concatenate_datasets(parts), _VERDICTS)

    def _of_part(self, asked: datasets.Dataset, start: int) -> datasets.Dataset:
        end = min(start + _PROMPTS_OF_A_PART, len(asked))
        return asked.select(range(start, end)).map(
            self._judge,
            batched=True,
            batch_size=_PROMPTS_OF_A_CALL,
            remove_columns=asked.column_names,
            features=datasets.Features({_VERDICTS: datasets.Sequence(datasets.Value("float64"))}),
            new_fingerprint=Hasher.hash([asked._fingerprint, start, end, self.key, code_fingerprint("datasets")]),
            desc=f"Judging answers to prompts {start:,} to {end:,} of {len(asked):,}",
        )

    def _judge(self, batch: Mapping[str, list[Any]]) -> dict[str, list[list[float]]]:
        # A judge may compare the answers to a prompt with one another: those to several prompts have no verdict.
        asked = [i for i, is_one in enumerate(batch["one_prompt"]) if is_one]
        given = self.judge([turns_of(batch["prompt"][i]) for i in asked], [batch["answers"][i] for i in asked])
        verdicts: list[list[float]] = [[] for _ in batch["prompt"]]
        for i, scores in zip(asked, given, strict=True):
            verdicts[i] = [float(score) for score in scores]
        return {_VERDICTS: verdicts}


Scores = Columns | Judged


def read_scores(key: str, value: Any) -> Scores:
    """Reads a key that says where scores come from.

    Args:
        key (str): the key, for messages.
        value (Any): None, a column, a list of columns, a judge, or a mapping that names one with ``_component_``.

    Returns:
        Scores: where they come from.

    Raises:
        ConfigError: if it is something else, or the judge cannot be built.
    """
    if value is None:
        return Columns()
    if isinstance(value, str):
        return Columns((value,))
    if isinstance(value, Sequence) and value and all(isinstance(name, str) for name in value):
        return Columns(tuple(value))
    if isinstance(value, Mapping) and "_component_" in value:
        sources = [source for text in value.values() if (source := _source_named(text)) is not None]
        states = [_state_of(text) for text in value.values()]
        made_by = [json.dumps(value, sort_keys=True, default=str), sources, states, code_fingerprint("judging")]
        return Judged(instantiate(key, OmegaConf.create(dict(value))), Hasher.hash(made_by))
    if callable(value):
        return Judged(value, Hasher.hash([value, source_of(value)]))
    raise ConfigError(key, f"must name columns, or a judge with _component_, but is {value!r}")


def read_columns(key: str, value: Any) -> tuple[str, ...]:
    """Reads a key that names columns of scores.

    Args:
        key (str): the key, for messages.
        value (Any): a column or a list of columns.

    Returns:
        tuple[str, ...]: the columns.

    Raises:
        ConfigError: if it is something else.
    """
    scores = read_scores(key, plain(value))
    if not isinstance(scores, Columns):
        raise ConfigError(key, "must name columns; a judge belongs to what selects")
    return scores.names


def _state_of(value: Any) -> list[tuple[str, int, int]]:
    """Size and time of the files that a judge's argument names, so that its scores are not kept once they change."""
    try:
        path = Path(value)
        files = sorted(path.iterdir()) if path.is_dir() else [path]
        return [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    except (OSError, TypeError, ValueError):
        return []


def _source_named(text: Any) -> str | None:
    """The source of a function that a judge's argument names, so that its scores are not kept once it changes."""
    if not isinstance(text, str) or "." not in text:
        return None
    try:
        return source_of(resolve_name(text))
    except (ImportError, AttributeError, ValueError):
        return None
