"""Loading the records of a preference data set, and naming a record's place when something is wrong with it."""

from dataclasses import dataclass
from typing import Any

import datasets

from prefix_sharing.config import one_line
from prefix_sharing.errors import UserError


@dataclass(frozen=True)
class Source:
    """Where records come from: arguments of ``datasets.load_dataset``.

    Attributes:
        path (str): hub name, or the kind of the local files (``json``, ``parquet``).
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
        if files is None:
            return self.path
        if isinstance(files, dict):
            files = [file for some in files.values() for file in ([some] if isinstance(some, str) else some)]
        return files if isinstance(files, str) else ", ".join(files)

    def load(self) -> datasets.Dataset:
        """Loads the records.

        Returns:
            datasets.Dataset: the records.

        Raises:
            UserError: if there is no such data, or it cannot be read.
        """
        try:
            return datasets.load_dataset(self.path, split=self.split, **self.kwargs)
        except TypeError as error:  # what load_dataset says to a key it does not know
            problem = "arguments that the builder does not know are passed to load_dataset, so check their spelling"
            raise UserError(f"{one_line(error)}; {problem}.") from error
        except StopIteration as error:
            raise UserError(f"{self.name} is empty.") from error
        except datasets.exceptions.DatasetGenerationError as error:
            raise UserError(f"{self.name} cannot be read: {one_line(error.__cause__ or error)}.") from error
        except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
            raise UserError(f"{self.name} cannot be loaded: {one_line(error)}.") from error

    def describe(self, records: datasets.Dataset, index: int) -> str:
        """The file and number of a record, for a message.

        Args:
            records (datasets.Dataset): what ``load`` returned.
            index (int): index of the record there.

        Returns:
            str: such as ``pairs.jsonl, record 12 (line 13)``; records count from 0, lines from 1.
        """
        if records.split is None or not records.info.splits:
            return f"{self.name}, record {index}"
        lengths = {split: info.num_examples for split, info in records.info.splits.items()}
        for part in datasets.ReadInstruction.from_spec(str(records.split)).to_absolute(lengths):
            if index < part.to - part.from_:
                index += part.from_
                break
            index -= part.to - part.from_

        name, files = self.name, self.kwargs.get("data_files")
        if isinstance(files, (list, tuple)) and len(files) > 1:
            for name in files:
                length = len(Source(self.path, "train", {**self.kwargs, "data_files": name}).load())
                if index < length:
                    break
                index -= length
        is_jsonl = name.endswith((".jsonl", ".jsonl.gz", ".ndjson"))
        return f"{name}, record {index}" + (f" (line {index + 1})" if is_jsonl else "")
