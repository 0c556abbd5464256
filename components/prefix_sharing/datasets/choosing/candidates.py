"""The records there are to choose from, of one source or several."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets.fingerprint import Hasher

from prefix_sharing.datasets.choosing.reading import RecordReader
from prefix_sharing.errors import UserError
from prefix_sharing.fingerprint import code_fingerprint


@dataclass(frozen=True)
class Candidates:
    """Records to choose from.

    Attributes:
        readers (Sequence[RecordReader]): how to read those of each source.
        usable (np.ndarray): which of all sources' records may be chosen, ascending indices, shape ``[n]``.
        names (Sequence[str]): of the sources.
        describe (Callable[[int], str]): where one of all sources' records comes from, for messages.
    """

    readers: Sequence[RecordReader]
    usable: np.ndarray
    names: Sequence[str]
    describe: Callable[[int], str]

    @property
    def sources(self) -> np.ndarray:
        """The source of each usable record, shape ``[n]``."""
        starts = np.cumsum([len(reader.records.rows) for reader in self.readers])
        return np.searchsorted(starts, self.usable, side="right")

    def read(self, columns: Mapping[str, Sequence[str]]) -> datasets.Dataset:
        """What the usable records are chosen by, see ``RecordReader.read``.

        Args:
            columns (Mapping[str, Sequence[str]]): columns of the numbers that are asked for.

        Returns:
            datasets.Dataset: a line for each usable record.

        Raises:
            UserError: if one of the numbers is none.
        """
        read = datasets.concatenate_datasets([reader.read(columns) for reader in self.readers])
        problems = read.data.column("problem").take(self.usable)
        first = pc.index(pc.not_equal(problems, ""), True).as_py()
        if first >= 0:
            raise UserError(f"{self.describe(int(self.usable[first]))}: {problems[first]}.")
        return read.select(self.usable) if len(self.usable) < len(read) else read

    def only(self, which: np.ndarray) -> "Candidates":
        """Some of the candidates.

        Args:
            which (np.ndarray): mask or indices into ``usable``.

        Returns:
            Candidates: those.
        """
        return Candidates(self.readers, self.usable[which], self.names, self.describe)


def numbers_of(read: datasets.Dataset, name: str) -> np.ndarray:
    """Numbers of each line.

    Args:
        read (datasets.Dataset): what ``Candidates.read`` returns.
        name (str): of the numbers.

    Returns:
        np.ndarray: shape ``[n, most that a line has]``, NaN where there is none.
    """
    lists = column_of(read, name).combine_chunks()
    lengths = pc.list_value_length(lists).to_numpy(zero_copy_only=False).astype(np.int64)
    values = np.full((len(read), int(lengths.max(initial=0))), np.nan)
    values[np.arange(values.shape[1]) < lengths[:, None]] = pc.list_flatten(lists).to_numpy(zero_copy_only=False)
    return values


def column_of(read: datasets.Dataset, name: str) -> pa.ChunkedArray:
    """A column as Arrow has it, of the lines that the data set has."""
    return read.select_columns([name]).with_format("arrow")[:].column(name)


def turns_of(prompt: str) -> list[dict[str, Any]]:
    """The turns of a prompt as ``Candidates.read`` returns it."""
    return json.loads(prompt) if prompt else []


def cached(read: datasets.Dataset, name: str, key: Any, compute: Callable[[], np.ndarray]) -> np.ndarray:
    """Whole numbers that are computed once, and kept in the cache of ``datasets`` beside what they are made of.

    Args:
        read (datasets.Dataset): what they are made of.
        name (str): of the numbers.
        key (Any): what else decides them.
        compute (Callable[[], np.ndarray]): computes one for each line, shape ``[n]``.

    Returns:
        np.ndarray: the numbers.
    """
    made = read.select_columns(["length"]).map(
        lambda _: {name: compute()},
        batched=True,
        batch_size=None,
        remove_columns=["length"],
        features=datasets.Features({name: datasets.Value("int64")}),
        new_fingerprint=Hasher.hash([read._fingerprint, name, key, code_fingerprint("datasets")]),
        desc=f"Finding {name}",
    )
    return made.data.column(name).to_numpy()
