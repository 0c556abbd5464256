"""Loading the rows of a preference data set, and naming a row's place when something is wrong with it."""

from typing import Any

import datasets
from prefix_sharing.errors import UserError


def load_rows(source: str, *, split: str, **load_dataset_kwargs: Any) -> datasets.Dataset:
    """Loads a split with ``datasets.load_dataset``.

    Args:
        source (str): hub name, or the kind of the local files (``json``, ``parquet``).
        split (str): which split, slices such as ``train[:90%]`` included.
        **load_dataset_kwargs (Any): ``data_files`` and whatever else ``load_dataset`` takes.

    Returns:
        datasets.Dataset: the rows.

    Raises:
        UserError: if there is no such data, or it cannot be read.
    """
    name = describe_source(source, load_dataset_kwargs)
    try:
        return datasets.load_dataset(source, split=split, **load_dataset_kwargs)
    except TypeError as error:  # what load_dataset says to a key it does not know
        raise UserError(f"dataset: {error}; every key that is not the builder's own goes to load_dataset.") from error
    except StopIteration as error:
        raise UserError(f"dataset: {name} is empty.") from error
    except datasets.exceptions.DatasetGenerationError as error:
        raise UserError(f"dataset: {name} cannot be read: {error.__cause__ or error}.") from error
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise UserError(f"dataset: {name} cannot be loaded: {_one_line(error)}.") from error


def describe_source(source: str, load_dataset_kwargs: dict[str, Any]) -> str:
    """The files a data set is read from, or else its name."""
    files = load_dataset_kwargs.get("data_files") or load_dataset_kwargs.get("data_dir")
    if files is None:
        return source
    if isinstance(files, dict):
        files = [file for some in files.values() for file in ([some] if isinstance(some, str) else some)]
    return files if isinstance(files, str) else ", ".join(files)


def describe_row(rows: datasets.Dataset, index: int, source: str, load_dataset_kwargs: dict[str, Any]) -> str:
    """The file and number of a row, for a message.

    Args:
        rows (datasets.Dataset): what ``load_rows`` returned.
        index (int): index of the row there.
        source (str): as ``load_rows`` got it.
        load_dataset_kwargs (dict[str, Any]): as ``load_rows`` got them.

    Returns:
        str: such as ``pairs.jsonl, row 12 (line 13)``; rows count from 0, lines from 1.
    """
    name = describe_source(source, load_dataset_kwargs)
    if rows.split is None or not rows.info.splits:
        return f"{name}, row {index}"
    lengths = {split: info.num_examples for split, info in rows.info.splits.items()}
    for part in datasets.ReadInstruction.from_spec(str(rows.split)).to_absolute(lengths):
        if index < part.to - part.from_:
            index += part.from_
            break
        index -= part.to - part.from_

    files = load_dataset_kwargs.get("data_files")
    if isinstance(files, (list, tuple)) and len(files) > 1:
        for name in files:
            length = len(load_rows(source, split="train", **{**load_dataset_kwargs, "data_files": name}))
            if index < length:
                break
            index -= length
    is_jsonl = any(name.endswith(end) for end in (".jsonl", ".jsonl.gz", ".ndjson"))
    return f"{name}, row {index}" + (f" (line {index + 1})" if is_jsonl else "")


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()).rstrip(".")
