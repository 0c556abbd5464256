"""Tables of a round, in Parquet: written part by part, so that an interrupted pass goes on, and whole under one name.

==================== ==================================================================================
column               of each prompt
==================== ==================================================================================
``key``              fingerprint of its tokens
``turns``            the conversation, as JSON
``prompt_tokens``    token ids of it
``answers``          token ids of each answer
``texts``            text of each answer, without special tokens
``log_probs``        log-prob of each answer by the model that gave it, see ``sampling.Answer``
``complete``         whether each answer ended by itself
``scores``           the judge's, once there are any
==================== ==================================================================================
"""

import io
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from prefix_sharing.checkpoint import complete_file
from prefix_sharing.distributed import this_rank
from prefix_sharing.errors import UserError
from prefix_sharing.sampling import Answer, Prompt
from prefix_sharing.tokenizers import ChatTokenizer

_SCHEMA = pa.schema(
    {
        "key": pa.string(),
        "turns": pa.string(),
        "prompt_tokens": pa.list_(pa.int32()),
        "answers": pa.list_(pa.list_(pa.int32())),
        "texts": pa.list_(pa.string()),
        "log_probs": pa.list_(pa.float64()),
        "complete": pa.list_(pa.bool_()),
        "scores": pa.list_(pa.float64()),
    }
)


_ROWS_OF_A_PART = 64


class RoundTable:
    """A table that may be whole, in parts, or not begun.

    Args:
        file (Path): its name when it is whole, such as ``round_0/answers.parquet``.
        made_by (Mapping[str, Any]): what decides its content, such as the policy and how it was sampled.

    Raises:
        UserError: if what is there was made by something else.
    """

    def __init__(self, file: Path, made_by: Mapping[str, Any]) -> None:
        self.file = file
        self._made_by = dict(made_by)
        self._parts = file.with_suffix(".parts")
        for part in [file] if self.is_whole else self._part_files():
            if read_made_by(part) != made_by:
                problem = "was made by another policy or with other settings"
                raise UserError(f"{part} {problem}; remove it, or choose another output_dir.")

    @property
    def is_whole(self) -> bool:
        """Whether nothing is left to do."""
        return self.file.exists()

    def rows(self) -> list[dict[str, Any]]:
        """The rows there are."""
        return [row for part in ([self.file] if self.is_whole else self._part_files()) for row in read_rows(part)]

    def add(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Writes a part, from any rank; an interrupted write leaves none."""
        self._parts.mkdir(parents=True, exist_ok=True)
        rank = f"rank_{this_rank().rank}"
        number = len(list(self._parts.glob(f"{rank}_*.parquet")))
        self._write(self._parts / f"{rank}_{number:06d}.parquet", rows)

    def finish(self, keys: Sequence[str]) -> list[dict[str, Any]]:
        """Puts the parts together under the table's name.

        Args:
            keys (Sequence[str]): the order of its rows.

        Returns:
            list[dict[str, Any]]: the rows.
        """
        by_key = {row["key"]: row for row in self.rows()}
        rows = [by_key[key] for key in keys]
        if not self.is_whole:
            self._write(self.file, rows)
        shutil.rmtree(self._parts, ignore_errors=True)
        return rows

    def _part_files(self) -> list[Path]:
        return sorted(self._parts.glob("*.parquet"))

    def _write(self, file: Path, rows: Sequence[Mapping[str, Any]]) -> None:
        schema = _SCHEMA.with_metadata({"made_by": json.dumps(self._made_by, sort_keys=True)})
        written = io.BytesIO()
        pq.write_table(pa.Table.from_pylist([dict(row) for row in rows], schema=schema), written)
        complete_file(file, written.getvalue())


def in_parts(rows: Sequence[Any]) -> list[Sequence[Any]]:
    """What is to be written, as parts that are each written together."""
    return [rows[start : start + _ROWS_OF_A_PART] for start in range(0, len(rows), _ROWS_OF_A_PART)]


def row_of(prompt: Prompt, answers: Sequence[Answer], tokenizer: ChatTokenizer) -> dict[str, Any]:
    """A row without scores."""
    return {
        "key": prompt.key,
        "turns": json.dumps(prompt.turns, ensure_ascii=False),
        "prompt_tokens": prompt.tokens.tolist(),
        "answers": [answer.tokens.tolist() for answer in answers],
        "texts": [tokenizer.decode(answer.tokens.tolist()) for answer in answers],
        "log_probs": [answer.log_prob for answer in answers],
        "complete": [answer.is_complete for answer in answers],
        "scores": [],
    }


def read_made_by(file: Path) -> dict[str, Any]:
    """What decided the content of a table or a part of one."""
    return json.loads((pq.read_schema(file).metadata or {}).get(b"made_by", b"{}"))


def read_rows(file: Path) -> list[dict[str, Any]]:
    """The rows of a whole table, whatever it was made by."""
    return pq.read_table(file).to_pylist()
