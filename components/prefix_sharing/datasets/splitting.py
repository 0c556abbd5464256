"""Conversations that are too long, split between turns into several that are not."""

import itertools
import json
import logging
from dataclasses import dataclass, replace
from typing import Any

import datasets
import numpy as np

from prefix_sharing.datasets.forms import Comparison, Record, RecordError
from prefix_sharing.datasets.source import Records, json_records, to_record
from prefix_sharing.datasets.tokenizing import EMPTY_SYSTEM_TURN, TokenizeRecord
from prefix_sharing.errors import ConfigError, UserError
from prefix_sharing.tokenizers import Turn

log = logging.getLogger(__name__)

_TEXT, _ORIGIN = "text", "origin"


def split_at_turns(records: Records, tokenize: TokenizeRecord, num_proc: int | None) -> Records:
    """Splits each conversation that is longer than ``max_seq_len`` before a user's turn, as late as it goes.

    Every part begins with the conversation's system turn, if it has one, and knows nothing else of the parts before it.
    One round that is too long by itself is a part, and is cut later on. The result is cached by ``datasets``.

    Args:
        records (Records): the records, each one conversation.
        tokenize (TokenizeRecord): what is going to tokenize them.
        num_proc (int | None): processes to do it in.

    Returns:
        Records: whole conversations and parts, as lines of JSON; each is described as the record that it comes from.

    Raises:
        ConfigError: if a key does not go with it.
    """
    options = tokenize.options
    if tokenize.form.name != "chat":
        problem = f"split_turns is for conversations, format: chat, but the format is {tokenize.form.name}"
        raise ConfigError("truncation", problem)
    if options.masking_strategy == "train_on_last":
        problem = "train_on_last would have the last answer of every part learned with truncation: split_turns"
        raise ConfigError("masking_strategy", f"{problem}; use train_on_assistant, or truncation: keep_end")
    if options.record_fn is not None:
        raise ConfigError("record_fn", "not used with truncation: split_turns; write the records it makes to a file")
    if options.filter_fn is not None:
        problem = "not used with truncation: split_turns, where it would be asked of every part"
        raise ConfigError("filter_fn", f"{problem}; write the records it keeps to a file")
    rows = records.rows.map(
        _SplitRecords(tokenize),
        batched=True,
        with_indices=True,
        remove_columns=records.rows.column_names,
        features=datasets.Features({_TEXT: datasets.Value("large_string"), _ORIGIN: datasets.Value("int64")}),
        num_proc=num_proc,
        desc=f"Splitting {records.name}",
    )
    origin = rows.data.column(_ORIGIN).to_numpy()
    _, parts = np.unique(origin, return_counts=True)
    log.info(
        "%s: %s of %s conversations, longer than max_seq_len, are split at turns into %s parts",
        records.name,
        f"{int((parts > 1).sum()):,}",
        f"{len(records.rows):,}",
        f"{int(parts[parts > 1].sum()):,}",
    )
    return replace(
        records,
        rows=json_records(rows.select_columns([_TEXT])),
        origin=origin if records.origin is None else records.origin[origin],
    )


@dataclass(frozen=True)
class _SplitRecords:
    tokenize: TokenizeRecord

    def __call__(self, batch: dict[str, list[Any]], indices: list[int]) -> dict[str, list[Any]]:
        names = list(batch)
        rows = [dict(zip(names, values, strict=True)) for values in zip(*batch.values(), strict=True)]
        lines = [self._lines_of(row) for row in rows]
        origins = [[index] * len(some) for index, some in zip(indices, lines, strict=True)]
        return {_TEXT: list(itertools.chain(*lines)), _ORIGIN: list(itertools.chain(*origins))}

    def _lines_of(self, row: dict[str, Any]) -> list[str]:
        whole = next(iter(row.values())) if self.tokenize.is_json else json.dumps(to_record(row, False), default=str)
        try:
            values = self.tokenize.values_of(row)
            record = Record(values, self.tokenize.options.column_map)
            comparison = self.tokenize.form.read(record)
            parts = self._parts_of(comparison)
        except (RecordError, UserError, ValueError):  # tokenizing comes upon the same, and says so
            return [whole]
        if len(parts) == 1:
            return [whole]
        name = "messages" if "messages" in record else "conversations"
        others = {key: values[key] for key in record.unused()}
        others |= {
            record.key(key): values[record.key(key)] for key in ("tools", "chat_template_kwargs") if key in record
        }
        return [json.dumps({**others, record.key(name): part}, default=str) for part in parts]

    def _parts_of(self, comparison: Comparison) -> list[list[Turn]]:
        """The turns of each part."""
        turns, limit = comparison.conversations[0], self.tokenize.options.max_seq_len
        if limit is None or self._num_tokens(turns, comparison) <= limit:
            return [turns]
        system = turns[:1] if turns[0]["role"] == "system" else []
        parts: list[list[Turn]] = []
        for of_round in _rounds(turns[len(system) :]):
            if parts and self._num_tokens([*parts[-1], *of_round], comparison) <= limit:
                parts[-1] += of_round
            else:
                parts.append([*system, *of_round])
        return parts

    def _num_tokens(self, turns: list[Turn], comparison: Comparison) -> int:
        if self.tokenize.options.empty_system_prob > 0 and turns[0]["role"] != "system":
            turns = [EMPTY_SYSTEM_TURN, *turns]
        return len(self.tokenize.chat_of(turns, "", comparison, self.tokenize.options.masking_strategy).tokens)


def _rounds(turns: list[Turn]) -> list[list[Turn]]:
    """Turns from a user's, after the assistant's, to the next such."""
    rounds: list[list[Turn]] = []
    for turn in turns:
        if not rounds or (turn["role"] == "user" and rounds[-1][-1]["role"] == "assistant"):
            rounds.append([])
        rounds[-1].append(turn)
    return rounds
