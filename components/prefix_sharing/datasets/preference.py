"""The preference data set: rows as people have them, tokenized once, cached and memory-mapped by ``datasets``."""

import copy
import logging
import os
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pkgutil import resolve_name
from typing import Any, Literal, get_args

import numpy as np
import pyarrow.compute as pc
from torch.utils.data import Dataset
from torchtune.data import Message
from torchtune.modules.transforms.tokenizers import ModelTokenizer

import datasets
import prefix_sharing
from prefix_sharing.config import source_of
from prefix_sharing.datasets.conversations import (
    Format,
    RowError,
    Turn,
    check_format,
    recognise_format,
    scores_best_first,
    to_conversations,
)
from prefix_sharing.datasets.grouping import group_by_prompt as merge_by_prompt
from prefix_sharing.datasets.ranking import PairStrategy, pairs_with_a_preference
from prefix_sharing.datasets.source import describe_row, describe_source, load_rows
from prefix_sharing.datasets.tokenized import (
    BEYOND_ITS_SHARE,
    FEATURES,
    MERGED,
    dropped_example,
    fingerprint,
    tokenized_example,
)
from prefix_sharing.errors import UserError
from prefix_sharing.rows import Response, TreeSize

log = logging.getLogger(__name__)

MaskingStrategy = Literal["train_on_assistant", "train_on_last", "train_on_all"]
Truncation = Literal["keep_start", "keep_end", "drop"]

_ROWS_PER_PROCESS = 1000
"""Below this, starting a process takes longer than its share of the tokenizing."""


class PrefixPreferenceDataset(Dataset):
    """Tokenized examples, each with its K response sequences and the pairs they are compared by.

    Args:
        tokenized (datasets.Dataset): what tokenizing made of every row, dropped ones included; its columns are
            ``prefix_sharing.datasets.tokenized.FEATURES``.
        name (str): where the rows come from, for messages.
        packed (bool): whether recipes pack its examples into rows by length. Default: False.
        take (np.ndarray | None): which rows to use if they are not dropped, shape ``[rows]``. Default: None, all.

    Attributes:
        tokenized (datasets.Dataset): as given.
        name (str): where the rows come from.
        packed (bool): whether recipes pack its examples.
        num_rows (int): rows read.
        dropped (dict[str, int]): rows not used, by reason.
        num_merged (int): rows used as part of another example.
        num_responses (int): K, the most that an example has.
        num_responses_of (np.ndarray): responses of each example, shape ``[N]``.
        longest (int): tokens in the longest response sequence.
        largest_id (int): largest token id.
        num_pairs (np.ndarray): pairs of each example, shape ``[N]``.
        num_scored (np.ndarray): scored tokens of each example, over its responses, shape ``[N]``.
        source_rows (np.ndarray): row of ``tokenized`` that each example is, shape ``[N]``.
        ids (pyarrow.Array): fingerprint of each example's tokens and of which are scored, shape ``[N]``.
    """

    def __init__(
        self, tokenized: datasets.Dataset, name: str, *, packed: bool = False, take: np.ndarray | None = None
    ) -> None:
        self.tokenized = tokenized
        self.name = name
        self.packed = packed
        self.num_rows = len(tokenized)
        reasons = np.asarray(tokenized.data.column("dropped").to_pylist(), dtype=object)
        if take is not None:
            reasons[(reasons == "") & ~take] = BEYOND_ITS_SHARE
        counts = Counter(reasons.tolist())
        self.num_merged = counts.pop(MERGED, 0)
        self.dropped = {reason: n for reason, n in sorted(counts.items()) if reason}
        used = np.flatnonzero(reasons == "")
        if len(used) == 0:
            why = f" (dropped by reason: {self._describe_drops()})" if self.dropped else ""
            raise UserError(f"dataset: {name} has no example to train on{why}.")
        # Everything but the tokens, which stay on disk.
        columns = tokenized.data.table.select([c for c in FEATURES if c not in ("tokens", "scored", "pairs")])
        if len(used) < len(tokenized):
            columns, tokenized = columns.take(used), tokenized.select(used)
        self.source_rows = used
        self.num_responses_of = columns.column("num_responses").to_numpy()
        self.num_responses = int(self.num_responses_of.max())
        self.longest = pc.max(columns.column("longest")).as_py()
        self.largest_id = pc.max(columns.column("largest_id")).as_py()
        self.num_pairs = columns.column("num_pairs").to_numpy()
        self.num_scored = columns.column("num_scored").to_numpy()
        self.ids = columns.column("id").combine_chunks()
        self._sizes = {
            share_prefix: TreeSize(*(columns.column(f"{layout}_{field}").to_numpy() for field in TreeSize._fields))
            for share_prefix, layout in ((True, "tree"), (False, "paired"))
        }
        self._examples = tokenized.select_columns(["tokens", "scored"]).with_format("numpy")
        self._pairs = tokenized.select_columns(["pairs"]).with_format("numpy")

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, index: int) -> list[Response]:
        """The K response sequences of an example, best first unless it was merged of several."""
        example = self._examples[index]
        return [
            Response(np.asarray(tokens, dtype=np.int64), np.asarray(scored, dtype=bool))
            for tokens, scored in zip(example["tokens"], example["scored"], strict=True)
        ]

    def pairs(self, index: int) -> np.ndarray:
        """Chosen and rejected response of each pair of an example, shape ``[pairs, 2]``."""
        return np.asarray(self._pairs[index]["pairs"], dtype=np.int64).reshape(-1, 2)

    def num_terms(self, mean_over: str) -> np.ndarray:
        """How many ``pairs``, ``examples`` or scored ``tokens`` each example has, shape ``[N]``."""
        return {"pairs": self.num_pairs, "examples": np.ones_like(self.num_pairs), "tokens": self.num_scored}[mean_over]

    def describe(self, index: int) -> str:
        """Where an example comes from, for messages."""
        return f"row {self.source_rows[index]} of the split of {self.name}"

    def sizes(self, share_prefix: bool = True) -> TreeSize:
        """The size of each example's tree.

        Args:
            share_prefix (bool): False lays every response out on its own. Default: True.

        Returns:
            TreeSize: of arrays, each of shape ``[N]``.
        """
        return self._sizes[share_prefix]

    def _describe_drops(self) -> str:
        return ", ".join(f"{reason}: {n:,}" for reason, n in self.dropped.items())

    def __repr__(self) -> str:
        drops = f" ({self._describe_drops()})" if self.dropped else ""
        used = f"{len(self) + self.num_merged:,} used"
        if self.num_merged:
            used += f" (merged into {len(self):,} examples)"
        return f"{self.name}: {self.num_rows:,} rows = {used} + {sum(self.dropped.values()):,} dropped{drops}"


def prefix_preference_dataset(
    tokenizer: ModelTokenizer,
    *,
    source: str,
    split: str = "train",
    format: Format | None = None,
    column_map: dict[str, str] | None = None,
    masking_strategy: MaskingStrategy | None = None,
    train_on_input: bool = False,
    new_system_prompt: str | None = None,
    max_seq_len: int | None = None,
    truncation: Truncation = "keep_start",
    filter_fn: Callable[[dict], bool] | str | None = None,
    pairs: PairStrategy = "best_vs_rest",
    group_by_prompt: bool = False,
    packed: bool = False,
    **load_dataset_kwargs: Any,
) -> PrefixPreferenceDataset:
    """Builds a preference data set from files or the hub, for a config.

    The rows may be in any form of ``prefix_sharing.datasets.conversations``; which one is recognised from the columns
    and the first rows. They are tokenized in parallel, once: ``datasets`` caches the result under a fingerprint of the
    rows, the tokenizer and every argument here, the source of ``filter_fn`` included.

    Rows without a preference to learn are dropped, counted by reason, and the counts logged: identical responses, tied
    scores, a response with nothing scored or no text.

    Args:
        tokenizer (ModelTokenizer): one of torchtune's, or ``prefix_sharing.tokenizers.hf_chat_tokenizer``.
        source (str): hub name, or the kind of the local files in ``data_files`` (``json``, ``parquet``).
        split (str): which split. Default: "train".
        format (Format | None): ``messages``, ``text``, ``hh``, ``ranked`` or ``chat``. Default: None, recognised.
        column_map (dict[str, str] | None): actual name of a column for each expected one that is named otherwise.
        masking_strategy (MaskingStrategy | None): which tokens are scored: those of every assistant turn
            (``train_on_assistant``, torchtune's convention and the default), of the last one (``train_on_last``, TRL's
            convention), or of every turn (``train_on_all``).
        train_on_input (bool): torchtune's older name for ``train_on_all``. Default: False.
        new_system_prompt (str | None): system turn put in place of the rows' own; never scored.
        max_seq_len (int | None): most tokens in a response sequence. Default: None, the tokenizer's ``max_seq_len``.
        truncation (Truncation): what happens to an example that exceeds it: ``keep_start`` cuts each response at the
            end, ``keep_end`` cuts the same number of tokens from the start of all its responses, so that they still
            answer the same prompt, ``drop`` drops the example. Nothing is written over a cut. Default: "keep_start".
        filter_fn (Callable[[dict], bool] | str | None): rows for which it is false are dropped, and counted. A config
            names it by its dotted path.
        pairs (PairStrategy): which pairs a ranked list is compared by: ``best_vs_rest``, ``adjacent``, ``all`` or
            ``best_vs_worst``; tied responses are no pair. Each response is computed once whatever the number of its
            pairs. Default: "best_vs_rest".
        group_by_prompt (bool): whether rows with the same prompt are merged into one tree, in which prompt and repeated
            responses are computed once; every pair counts as it would apart. Default: False.
        packed (bool): whether recipes pack examples into rows of ``pack_len`` tokens, ``global_batch_size`` examples a
            step. Default: False.
        **load_dataset_kwargs (Any): ``data_files`` and whatever else ``datasets.load_dataset`` takes.

    Returns:
        PrefixPreferenceDataset: the data set.

    Raises:
        UserError: if the data cannot be loaded, an argument is wrong, a row is malformed (the message names file, row
            and key), or no example is left.

    Example:
        .. code-block:: yaml

            dataset:
              _component_: prefix_sharing.datasets.prefix_preference_dataset
              source: json
              data_files: my_pairs.jsonl
              split: train[:90%]
    """
    _check_choice("masking_strategy", masking_strategy, get_args(MaskingStrategy), optional=True)
    _check_choice("truncation", truncation, get_args(Truncation))
    if train_on_input:
        if masking_strategy not in (None, "train_on_all"):
            raise UserError(f"dataset: train_on_input is true, but masking_strategy is {masking_strategy}; keep one.")
        masking_strategy = "train_on_all"
    rows = load_rows(source, split=split, **load_dataset_kwargs)
    return preference_dataset_from_rows(
        rows,
        tokenizer,
        name=describe_source(source, load_dataset_kwargs),
        describe_row=lambda index: describe_row(rows, index, source, load_dataset_kwargs),
        format=format,
        column_map=column_map,
        masking_strategy=masking_strategy or "train_on_assistant",
        new_system_prompt=new_system_prompt,
        max_seq_len=max_seq_len,
        truncation=truncation,
        filter_fn=filter_fn,
        pairs=pairs,
        group_by_prompt=group_by_prompt,
        packed=packed,
    )


def packed_preference_dataset(tokenizer: ModelTokenizer, **kwargs: Any) -> PrefixPreferenceDataset:
    """``prefix_preference_dataset`` with ``packed: True``, for a config that names it.

    Args:
        tokenizer (ModelTokenizer): see there.
        **kwargs (Any): see there.

    Returns:
        PrefixPreferenceDataset: the data set.
    """
    return prefix_preference_dataset(tokenizer, **{**kwargs, "packed": True})


def preference_dataset_from_rows(
    rows: datasets.Dataset,
    tokenizer: ModelTokenizer,
    *,
    name: str,
    describe_row: Callable[[int], str] | None = None,
    format: Format | None = None,
    column_map: dict[str, str] | None = None,
    masking_strategy: MaskingStrategy = "train_on_assistant",
    new_system_prompt: str | None = None,
    max_seq_len: int | None = None,
    truncation: Truncation = "keep_start",
    filter_fn: Callable[[dict], bool] | str | None = None,
    pairs: PairStrategy = "best_vs_rest",
    group_by_prompt: bool = False,
    packed: bool = False,
) -> PrefixPreferenceDataset:
    """Builds a preference data set from rows that are loaded already.

    Args:
        rows (datasets.Dataset): the rows.
        tokenizer (ModelTokenizer): see ``prefix_preference_dataset``, as for every argument not named here.
        name (str): where the rows come from, for messages.
        describe_row (Callable[[int], str] | None): names a row in a message. Default: None, ``name`` and its index.
        format (Format | None): see there.
        column_map (dict[str, str] | None): see there.
        masking_strategy (MaskingStrategy): see there.
        new_system_prompt (str | None): see there.
        max_seq_len (int | None): see there.
        truncation (Truncation): see there.
        filter_fn (Callable[[dict], bool] | str | None): see there.
        pairs (PairStrategy): see there.
        group_by_prompt (bool): see there.
        packed (bool): see there.

    Returns:
        PrefixPreferenceDataset: the data set.

    Raises:
        UserError: as there.
    """
    _check_choice("pairs", pairs, get_args(PairStrategy))
    columns = dict(column_map or {})
    if format is None:
        format = recognise_format(columns, rows.column_names, rows.select(range(min(8, len(rows)))).to_list())
        log.info("%s: recognised format '%s'", name, format)
    else:
        check_format(format, columns, rows.column_names)
    if isinstance(filter_fn, str):
        filter_fn = _resolve_filter(filter_fn)
    if max_seq_len is None:
        max_seq_len = tokenizer.max_seq_len
    if tokenizer.max_seq_len is not None:
        # torchtune's tokenizers cut by themselves, and write EOS over the last token, which would then be learned.
        tokenizer = copy.copy(tokenizer)
        tokenizer.max_seq_len = None

    tokenize = _TokenizeRow(
        tokenizer,
        format,
        columns,
        masking_strategy,
        new_system_prompt,
        max_seq_len,
        truncation,
        filter_fn,
        source_of(filter_fn),
        pairs,
    )
    num_processes = min(os.cpu_count() or 1, len(rows) // _ROWS_PER_PROCESS)
    try:
        tokenized = rows.map(
            tokenize,
            with_indices=True,
            remove_columns=rows.column_names,
            features=FEATURES,
            num_proc=num_processes if num_processes > 1 else None,
            desc=f"Tokenizing {name}",
        )
    except MalformedRowError as error:
        where = describe_row(error.index) if describe_row else f"{name}, row {error.index}"
        raise UserError(f"dataset: {where}: {error.problem}.") from error
    if group_by_prompt:
        tokenized = merge_by_prompt(tokenized, name)
    dataset = PrefixPreferenceDataset(tokenized, name, packed=packed)
    log.info("%r", dataset)
    return dataset


class MalformedRowError(Exception):
    """A row that cannot be tokenized; travels from a worker process with its index."""

    def __init__(self, index: int, problem: str) -> None:
        super().__init__(index, problem)
        self.index = index
        self.problem = problem


@dataclass(frozen=True)
class _TokenizeRow:
    """A row to its response sequences. What stands in here decides the fingerprint of the cached result."""

    tokenizer: ModelTokenizer
    format: Format
    columns: dict[str, str]
    masking_strategy: MaskingStrategy
    new_system_prompt: str | None
    max_seq_len: int | None
    truncation: Truncation
    filter_fn: Callable[[dict], bool] | None
    filter_source: str | None  # a function is hashed by its name alone
    pairs: PairStrategy
    version: str = prefix_sharing.__version__

    def __call__(self, row: dict[str, Any], index: int) -> dict[str, Any]:
        if self.filter_fn is not None and not self.filter_fn(row):
            return dropped_example("filtered out")
        try:
            conversations = to_conversations(row, self.format, self.columns)
            if any(not conversation[-1]["content"].strip() for conversation in conversations):
                return dropped_example("empty response")
            responses = [self.tokenizer.tokenize_messages(self._to_messages(turns)) for turns in conversations]
        except RowError as error:
            raise MalformedRowError(index, f"{error.key} {error.problem}") from error
        except UserError as error:
            raise MalformedRowError(index, str(error).rstrip(".")) from error

        tokens = [ids for ids, _ in responses]
        scored = [[not masked for masked in mask] for _, mask in responses]
        if self.max_seq_len is not None:
            if self.truncation == "drop" and max(map(len, tokens)) > self.max_seq_len:
                return dropped_example("longer than max_seq_len")
            keep = self._kept(max(map(len, tokens)))
            tokens = [ids[keep] for ids in tokens]
            scored = [flags[keep] for flags in scored]
        if any(not any(flags[1:]) for flags in scored):
            return dropped_example("nothing scored")
        pairs = pairs_with_a_preference(tokens, scores_best_first(row, self.format, self.columns), self.pairs)
        if len(tokens) > 1 and not pairs:
            return dropped_example("tied scores" if any(ids != tokens[0] for ids in tokens) else "identical responses")
        if pairs:  # what is in no pair need not be computed
            used = sorted({k for pair in pairs for k in pair})
            tokens, scored = [tokens[k] for k in used], [scored[k] for k in used]
            pairs = [(used.index(chosen), used.index(rejected)) for chosen, rejected in pairs]
        prompts = [turns[:-1] for turns in conversations]
        prompt = fingerprint(prompts[0]) if all(p == prompts[0] for p in prompts) else ""
        return tokenized_example(tokens, scored, pairs, prompt)

    def _kept(self, longest: int) -> slice:
        if self.truncation == "keep_start":
            return slice(self.max_seq_len)
        return slice(max(0, longest - self.max_seq_len), None)

    def _to_messages(self, turns: list[Turn]) -> list[Message]:
        messages = []
        if self.new_system_prompt is not None:
            messages.append(Message(role="system", content=self.new_system_prompt, masked=True))
            turns = [turn for turn in turns if turn["role"] != "system"]
        for i, turn in enumerate(turns):
            scored = {
                "train_on_assistant": turn["role"] == "assistant",
                "train_on_last": i == len(turns) - 1,
                "train_on_all": True,
            }[self.masking_strategy]
            messages.append(Message(role=turn["role"], content=turn["content"], masked=not scored))
        return messages


def _check_choice(key: str, value: str | None, choices: tuple[str, ...], optional: bool = False) -> None:
    if value not in choices and not (optional and value is None):
        raise UserError(f"dataset.{key}: must be one of {', '.join(choices)}, not '{value}'.")


def _resolve_filter(path: str) -> Callable[[dict], bool]:
    try:
        return resolve_name(path)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(f"dataset.filter_fn: there is no '{path}': {error}.") from error
