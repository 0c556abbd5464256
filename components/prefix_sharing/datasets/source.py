"""Loading the records of a preference data set as they were written, and naming a record's place in a message.

``datasets`` gives the values of JSON and CSV files types: in a column of strings that may be something else in one
record, text such as ``"42"``, ``true`` or ``2026-01-01`` comes back as a number, a boolean or a date. So JSON is loaded
as text, a line for each record, and parsed record by record; CSV is loaded as strings.
"""

import json
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import datasets
import fsspec
import numpy as np
import pyarrow.compute as pc
from datasets.arrow_writer import SchemaInferenceError
from datasets.features.features import require_decoding
from datasets.packaged_modules.csv.csv import Csv
from datasets.packaged_modules.json.json import Json

from prefix_sharing.config import one_line
from prefix_sharing.datasets.read_only import writable_cache
from prefix_sharing.errors import ConfigError, UserError

log = logging.getLogger(__name__)

_LINE, _VALUE = "line of JSON", "value of JSON"
"""The only column of records in JSON, from files with a record in each line, and from others."""

_KINDS = {"json": "json", "jsonl": "json", "ndjson": "json", "csv": "csv", "parquet": "parquet"}
"""What ``load_dataset`` calls files whose names end so."""

_PANDAS_INDEX = "__index_level_0__"
"""What pandas makes of first cells for which there is no header."""

_BOM = "\ufeff"

MAX_TEXT = 16_000_000
"""Bytes in a line of JSON, and characters in what a tokenizer is given at once, which takes 300 times its size."""

_MAX_DOCUMENT = 1_000_000_000
"""Bytes in a line that may be a whole JSON list or mapping."""

_BLOCK = 2**20

_LINES_TO_LOOK_AT = 64
"""Enough to tell lines of JSON from a file that is one JSON value, even if some are malformed."""


class UnknownArgumentError(Exception):
    """An argument that ``load_dataset`` does not take for this kind of data: ``name``."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.name = name


@dataclass(frozen=True)
class Records:
    """The records of a data set.

    Attributes:
        rows (datasets.Dataset): a row for each; ``to_record`` reads it.
        name (str): the files they are read from, or else the data set's name on the hub.
        are_lines (bool): whether each is a line of its file. Default: False.
        origin (np.ndarray | None): index of each in its split, all files and blank lines counted. Default: None, that
            of its row.
        files (Sequence[str]): several files that they come from, in their order.
        length_of (Callable[[str], int] | None): tells how many records or lines one of the files has.
    """

    rows: datasets.Dataset
    name: str
    are_lines: bool = False
    origin: np.ndarray | None = None
    files: Sequence[str] = ()
    length_of: Callable[[str], int] | None = None

    @property
    def is_json(self) -> bool:
        """Whether a row is a line of JSON."""
        return _is_json(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """A record; raises ValueError if it is not JSON that should be."""
        return to_record(self.rows[index], self.is_json)

    def describe(self, index: int) -> str:
        """The file and number of a record, for a message.

        Args:
            index (int): index of its row.

        Returns:
            str: such as ``pairs.jsonl, record 12 (line 13)``; records count from 0, lines from 1.
        """
        if self.origin is not None:
            index = int(self.origin[index])
        name = self.name
        if self.length_of is not None:
            for name in self.files:
                length = self.length_of(name)
                if index < length:
                    break
                index -= length
        return f"{name}, record {index}" + (f" (line {index + 1})" if self.are_lines else "")


def kind_of_files(kwargs: Mapping[str, Any]) -> str:
    """The kind of some files, told by how their names end.

    Args:
        kwargs (Mapping[str, Any]): arguments of ``load_dataset``, ``data_files`` among them.

    Returns:
        str: what ``load_dataset`` calls it, such as ``json``.

    Raises:
        ConfigError: if there are no files, or they are of no kind that is known, or of several.
    """
    files = _names(kwargs.get("data_files"))
    if not files:
        raise ConfigError("source", "required: the name of a data set on the hub, or files in data_files")
    endings = {file: re.sub(r"\.(gz|bz2|xz|zst)$", "", file.lower()).rpartition(".")[2] for file in files}
    kinds = {file: _KINDS.get(ending) for file, ending in endings.items()}
    unknown = [file for file, kind in kinds.items() if kind is None]
    if unknown:
        problem = f"cannot tell the file type of {', '.join(unknown)} from its name; set it to json, csv or parquet"
        raise ConfigError("source", problem)
    first, *others = {kind for kind in kinds.values() if kind is not None}
    if others:
        raise ConfigError("data_files", f"must be files of one type, but are {', '.join(files)}")
    return first


def _names(files: Any) -> list[str]:
    """The files that ``data_files`` names, which may be one, a list, or a mapping of splits to either."""
    if isinstance(files, Mapping):
        return [name for some in files.values() for name in _names(some)]
    if files is None or isinstance(files, str):
        return [files] if files else []
    return [str(name) for name in files]


def to_record(row: Mapping[str, Any], is_json: bool) -> dict[str, Any]:
    """Reads a row.

    Args:
        row (Mapping[str, Any]): a row of ``Records``.
        is_json (bool): whether it is a line of JSON.

    Returns:
        dict[str, Any]: the record. Arrow fills in None for the keys that one object of a column has and another has
            not: they are left out.

    Raises:
        ValueError: if it is JSON, but not an object, or not JSON.
    """
    if not is_json:
        return {name: _without_none(value) for name, value in row.items()}
    try:
        record = json.loads(next(iter(row.values())).lstrip(_BOM), object_pairs_hook=_without_duplicates)
    except json.JSONDecodeError as error:
        raise ValueError(f"it is not JSON: {error.msg} at character {error.pos}") from None
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if not isinstance(record, dict):
        raise ValueError("it is not a JSON object")
    return record


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"it has the key '{next(name for name in names if names.count(name) > 1)}' twice")
    return made


def _without_none(value: Any) -> Any:
    if isinstance(value, list):
        return [_without_none(entry) for entry in value]
    if isinstance(value, dict):
        return {name: _without_none(entry) for name, entry in value.items() if entry is not None}
    return value


@dataclass(frozen=True)
class Source:
    """Where records come from: arguments of ``datasets.load_dataset``.

    Attributes:
        path (str): hub name, or the kind of the local files (``json``, ``csv``, ``parquet``).
        split (str): which split, slices such as ``train[:90%]`` included.
        kwargs (dict[str, Any]): ``data_files`` and whatever else ``load_dataset`` takes.
    """

    path: str
    split: str
    kwargs: dict[str, Any]

    @property
    def name(self) -> str:
        """The files the data set is read from, or else its name on the hub."""
        files = self.kwargs.get("data_files") or self.kwargs.get("data_dir")
        return self.path if files is None else ", ".join(_names(files))

    def load(self) -> Records:
        """Loads the records.

        Returns:
            Records: the records.

        Raises:
            UserError: if there is no such data, or it cannot be read.
            UnknownArgumentError: if ``kwargs`` has a key that is not known.
        """
        cache_dir = str(self.kwargs.get("cache_dir") or datasets.config.HF_DATASETS_CACHE)
        if writable_cache(cache_dir) != cache_dir:
            return replace(self, kwargs={**self.kwargs, "cache_dir": writable_cache(cache_dir)}).load()
        try:
            builder = datasets.load_dataset_builder(self.path, **self.kwargs)
            splits = self._load_splits(builder)
        except TypeError as error:
            unknown = re.search(r"unexpected keyword argument '(\w+)'", str(error))
            if unknown is None:
                raise UserError(f"{self.name} cannot be loaded: {one_line(error)}.") from error
            raise UnknownArgumentError(unknown[1]) from error
        except StopIteration as error:
            raise UserError(f"{self.name} is empty.") from error
        except datasets.exceptions.DatasetGenerationError as error:
            if isinstance(error.__cause__, SchemaInferenceError):  # of a file without a line
                raise UserError(f"{self.name} is empty.") from error
            raise UserError(f"{self.name} cannot be read: {one_line(error.__cause__ or error)}.") from error
        except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
            raise UserError(f"{self.name} cannot be loaded: {one_line(error)}.") from error
        return self._take_split(splits, builder)

    def _load_splits(self, builder: datasets.DatasetBuilder) -> Mapping[str, datasets.Dataset]:
        if isinstance(builder, Json):
            return self._load_json(builder)
        kwargs = dict(self.kwargs)
        if isinstance(builder, Csv) and builder.config.features is None:
            heads = datasets.load_dataset(self.path, nrows=1, **kwargs)
            names = next(iter(heads.values())).column_names
            if _PANDAS_INDEX in names and builder.config.index_col is None:
                raise ValueError("its rows have more cells than its header; put cells with commas in quotes")
            text = datasets.Features({name: datasets.Value("string") for name in names})
            kwargs = {"features": text, "keep_default_na": False, "na_filter": False, **kwargs}
        splits = datasets.load_dataset(self.path, **kwargs)
        # Images and audio would be decoded to no use, or not at all where a library is missing.
        media = {name for rows in splits.values() for name, f in rows.features.items() if require_decoding(f)}
        if media:
            log.info("%s: not used: column %s (images or audio)", self.name, ", column ".join(sorted(media)))
        return {name: rows.remove_columns(list(media & set(rows.column_names))) for name, rows in splits.items()}

    def _load_json(self, builder: datasets.DatasetBuilder) -> dict[str, datasets.Dataset]:
        """Every split as lines of JSON, whether its files hold lines, a list of records, or a record."""
        config = builder.config
        if config.features is not None:
            raise ValueError("features are not used: JSON is read as it was written")
        # Those of load_dataset itself; the rest are the JSON builder's.
        general = {"cache_dir", "download_config", "download_mode", "num_proc", "storage_options", "token"}
        kwargs = {name: value for name, value in self.kwargs.items() if name in general}
        kwargs |= {"encoding": config.encoding, "encoding_errors": config.encoding_errors}
        files = {split: list(names) for split, names in config.data_files.items()}
        for name in (name for names in files.values() for name in names):
            _check_lines(name, config.field)
        if config.field is None:
            lines = datasets.load_dataset("text", data_files=files, **kwargs)
            if all(_holds_lines(split) for split in lines.values()):
                return {name: split.rename_column("text", _LINE) for name, split in lines.items()}
        documents = datasets.load_dataset("text", data_files=files, sample_by="document", **kwargs)
        try:
            return {
                name: split.map(
                    _split_document,
                    batched=True,
                    batch_size=1,
                    remove_columns="text",
                    fn_kwargs={"field": config.field},
                    features=datasets.Features({_VALUE: datasets.Value("string")}),
                    desc=f"Reading {self.name}",
                )
                for name, split in documents.items()
            }
        except ValueError as error:
            problem = f"{self.name} cannot be read: it has no JSON object in each line, and is no JSON list of objects"
            raise UserError(f"{problem} ({one_line(error)}).") from error

    def _take_split(self, splits: Mapping[str, datasets.Dataset], builder: datasets.DatasetBuilder) -> Records:
        kept = {name: _not_blank(rows) for name, rows in splits.items()}
        lengths = {name: len(indices) for name, indices in kept.items()}
        try:
            parts = datasets.ReadInstruction.from_spec(self.split).to_absolute(lengths)
        except (ValueError, AssertionError) as error:
            raise ConfigError("split", f"'{self.split}' of {self.name}: {one_line(error).rstrip('.')}") from error
        names = [part.splitname for part in parts]
        taken = [kept[part.splitname][part.from_ : max(part.from_, part.to)] for part in parts]
        if not any(len(indices) for indices in taken):
            if not any(lengths[name] for name in names):
                raise UserError(f"{self.name} is empty.")
            there = ", ".join(f"{name} has {lengths[name]:,}" for name in dict.fromkeys(names))
            problem = f"'{self.split}' takes no record of {self.name}: {there}; choose another slice"
            name, part = names[0], lengths[names[0]] // 10 or 1
            if lengths[name] > 1:
                problem += f", such as {name}[:-{part}] to train on and {name}[-{part}:] to evaluate on"
            raise ConfigError("split", problem)
        rows = datasets.concatenate_datasets(
            [splits[name].select(indices) for name, indices in zip(names, taken, strict=True)]
        )
        if len(set(names)) > 1:
            return Records(rows, f"{self.name}, split {self.split}")
        files = list((builder.config.data_files or {}).get(names[0], [])) if "data_files" in self.kwargs else []
        several = len(files) > 1
        return Records(
            rows,
            self.name,
            are_lines=rows.column_names == [_LINE],
            origin=np.concatenate(taken),
            files=files if several else (),
            length_of=self._length_of if several else None,
        )

    def _length_of(self, file: str) -> int:
        alone = replace(self, kwargs={**self.kwargs, "data_files": file})
        return len(alone._load_splits(datasets.load_dataset_builder(self.path, **alone.kwargs))["train"])


def _check_lines(file: str, field: str | None) -> None:
    """Refuses a local file with a line that is too long, before all of it is in memory: compressed it may be small."""
    if not Path(file).is_file():
        return
    number, length = 1, 0
    try:
        with fsspec.open(file, compression="infer") as stream:
            block = stream.read(_BLOCK)
            is_document = field is not None or block.lstrip(_BOM.encode() + b" \t\r\n").startswith(b"[")
            limit = _MAX_DOCUMENT if is_document else MAX_TEXT
            while block and length <= limit:
                if b"\n" in block:
                    number += block.count(b"\n")
                    length = len(block) - block.rindex(b"\n")
                else:
                    length += len(block)
                block = stream.read(_BLOCK)
    except Exception:
        return  # loading says what is wrong with it
    if length > limit:
        what_to_do = "write each record in a line of its own" if is_document else "shorten it or leave it out"
        raise UserError(f"{file}, line {number}: it is longer than {limit / 1e6:,.0f} MB; {what_to_do}.")


def json_records(lines: datasets.Dataset) -> datasets.Dataset:
    """Rows for ``Records`` from a data set whose only column holds a record of JSON in each row."""
    return lines.rename_column(lines.column_names[0], _VALUE)


def _not_blank(rows: datasets.Dataset) -> np.ndarray:
    """Indices of the rows with something in them."""
    if not _is_json(rows):
        return np.arange(len(rows))
    return np.flatnonzero(pc.not_equal(pc.utf8_trim_whitespace(rows.data.column(0)), "").to_numpy())


def _is_json(rows: datasets.Dataset) -> bool:
    return rows.column_names in ([_LINE], [_VALUE])


def _holds_lines(rows: datasets.Dataset) -> bool:
    """Whether a file's rows are objects of JSON, as its first lines tell."""
    lines = (text.lstrip(_BOM).strip() for text in rows[:_LINES_TO_LOOK_AT]["text"])
    first, *others = [line for line in lines if line] or [""]
    column = rows.data.column(0)
    begins_list = pc.filter(column, pc.starts_with(pc.utf8_ltrim_whitespace(column), "[")).to_pylist()
    if any(map(_begins_list_of_objects, begins_list)):
        return False
    return not first or any(_is_object(line) for line in (first, *others))


def _begins_list_of_objects(line: str) -> bool:
    """Whether a line is a list of objects, or the beginning of a list that goes on in the next lines."""
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return True
    return bool(value) and isinstance(value[0], dict)


def _is_object(line: str) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def _split_document(batch: dict[str, list[str]], field: str | None) -> dict[str, list[str]]:
    """The records of a file that is one JSON value, each as a line."""
    text = batch["text"][0].lstrip(_BOM)
    try:
        if field is None and _is_object(text.strip().partition("\n")[0]):  # lines, beside a file that is a list
            lines = [line for line in text.split("\n") if line.strip()]
            value = [json.loads(line, object_pairs_hook=_without_duplicates) for line in lines]
        else:
            value = json.loads(text, object_pairs_hook=_without_duplicates)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if field is not None:
        if not isinstance(value, dict) or field not in value:
            raise ValueError(f"there is no field '{field}' at its top")
        value = value[field]
    if isinstance(value, dict):
        value = [value]
    if not isinstance(value, list):
        raise ValueError("it holds neither an object in each line nor a list of objects")
    return {_VALUE: [json.dumps(record) for record in value]}
