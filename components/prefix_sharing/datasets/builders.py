"""The builders that a config names: records are tokenized once, in parallel, and cached by ``datasets``."""

import copy
import inspect
import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from pkgutil import resolve_name
from typing import Any

import datasets

from prefix_sharing.config import one_line
from prefix_sharing.config.files import did_you_mean
from prefix_sharing.datasets.dataset import PrefixPreferenceDataset
from prefix_sharing.datasets.forms import Form, check_column_map, choose_form, recognize_form
from prefix_sharing.datasets.grouping import group_by_prompt as merge_by_prompt
from prefix_sharing.datasets.ranking import PairStrategy
from prefix_sharing.datasets.remarks import check_malformed, log_remarks
from prefix_sharing.datasets.source import Records, Source, UnknownArgumentError, kind_of_files
from prefix_sharing.datasets.splitting import split_at_turns
from prefix_sharing.datasets.table import FEATURES
from prefix_sharing.datasets.tokenizing import (
    MalformedRecordError,
    MaskingStrategy,
    OnMalformed,
    PreferenceOptions,
    TokenizeRecord,
    Truncation,
    prepare_record,
)
from prefix_sharing.errors import ConfigError, UserError
from prefix_sharing.tokenizers import ChatTokenizer

log = logging.getLogger(__name__)

_RECORDS_PER_PROCESS = 1000
"""Below this, starting a process takes longer than its share of the tokenizing."""

_RECORDS_TO_RECOGNISE = 64


def prefix_preference_dataset(
    tokenizer: ChatTokenizer,
    *,
    source: str | None = None,
    split: str = "train",
    format: str | None = None,
    column_map: Mapping[str, str | None] | None = None,
    record_fn: Callable[[dict], dict] | str | None = None,
    masking_strategy: MaskingStrategy | None = None,
    train_on_input: bool = False,
    new_system_prompt: str | None = None,
    max_seq_len: int | None = None,
    truncation: Truncation = "keep_start",
    filter_fn: Callable[[dict], bool] | str | None = None,
    pairs: PairStrategy = "best_vs_rest",
    group_by_prompt: bool = False,
    on_malformed: OnMalformed = "stop",
    max_malformed: float = 0.1,
    max_masked: float | None = None,
    empty_system_prob: float = 0.0,
    **load_dataset_kwargs: Any,
) -> PrefixPreferenceDataset:
    """Builds a preference data set from files or the hub, for a config.

    The records may be in any form of ``prefix_sharing.datasets.forms``; which one is recognized from the columns and
    the first records, and logged. They are tokenized in parallel, once: ``datasets`` caches the result under a
    fingerprint of the records, the tokenizer, every argument here (the source of ``filter_fn`` and ``record_fn``
    included), and the code that tokenizes.

    Records without a preference to learn are dropped, counted by reason, and the counts logged: identical responses,
    tied scores, a response with nothing scored or no text. So is whatever else was not used as it is: columns and
    message keys without a use, answers that lost their end to ``max_seq_len`` or some of their text to the chat
    template.

    Args:
        tokenizer (ChatTokenizer): one of torchtune's, or ``prefix_sharing.tokenizers.hf_chat_tokenizer``.
        source (str | None): hub name, or the kind of the local files in ``data_files`` (``json``, ``csv``,
            ``parquet``). Default: None, the kind that the names of ``data_files`` end with.
        split (str): which split. Default: "train".
        format (str | None): a name in ``prefix_sharing.datasets.forms.FORMS``. Default: None, recognized.
        column_map (Mapping[str, str | None] | None): actual name of a column for each expected one that is named
            otherwise; None for a column that is to be left alone.
        record_fn (Callable[[dict], dict] | str | None): makes a record of a known form of each record. A config names
            it by its dotted path.
        masking_strategy (MaskingStrategy | None): which tokens are scored: those of every assistant turn
            (``train_on_assistant``, torchtune's convention and the default), of the last one (``train_on_last``, TRL's
            convention), or of every turn (``train_on_all``).
        train_on_input (bool): torchtune's older name for ``train_on_all``. Default: False.
        new_system_prompt (str | None): system turn that replaces the records' own; never scored.
        max_seq_len (int | None): maximum number of tokens in a response sequence. Default: None, the tokenizer's
            ``max_seq_len``.
        truncation (Truncation): what happens to an example that exceeds it: ``keep_start`` cuts each response at the
            end, ``keep_end`` cuts the same number of tokens from the start of all its responses, so that they still
            answer the same prompt, ``drop`` drops the example, ``split_turns`` makes several of a conversation that
            ``NLLLoss`` learns from, each beginning with the system turn, if any, and a user's turn, and cuts what is
            still too long at the end. Nothing is written over a cut. Default: "keep_start".
        filter_fn (Callable[[dict], bool] | str | None): records for which it is false are dropped, and counted. A
            config names it by its dotted path.
        pairs (PairStrategy): which pairs a ranked list is compared by: ``best_vs_rest``, ``adjacent``, ``all`` or
            ``best_vs_worst``; tied responses are no pair. Each response is computed once whatever the number of its
            pairs. ``best_only`` keeps the best response alone, for ``NLLLoss``. Default: "best_vs_rest".
        group_by_prompt (bool): whether records with the same prompt are merged into one tree, in which prompt and
            repeated responses are computed once; every pair counts as it would apart. Default: False.
        on_malformed (OnMalformed): what happens to a record that cannot be read: ``stop`` ends with an error that names
            file, record and key, ``drop`` drops it, counts it, and logs the first ones. Default: "stop".
        max_malformed (float): share of the records that may be dropped so; more are an error. Default: 0.1.
        max_masked (float | None): examples of which a larger share of the tokens is not scored are dropped, and
            counted. Default: None, none are.
        empty_system_prob (float): probability that a conversation without a system turn gets an empty one. What is
            drawn depends on the prompt alone. Default: 0.0.
        **load_dataset_kwargs (Any): ``data_files`` and whatever else ``datasets.load_dataset`` takes.

    Returns:
        PrefixPreferenceDataset: the data set.

    Raises:
        UserError: if the data cannot be loaded, an argument is wrong, a record is malformed (the message names file,
            record and key), or no example is left.

    Example:
        .. code-block:: yaml

            dataset:
              _component_: prefix_sharing.datasets.prefix_preference_dataset
              data_files: my_pairs.jsonl
              split: train[:90%]
    """
    if train_on_input:
        if masking_strategy not in (None, "train_on_all"):
            raise ConfigError(
                "masking_strategy", f"is {masking_strategy}, but train_on_input is true; keep one of them"
            )
        masking_strategy = "train_on_all"
    options = PreferenceOptions(
        format=format,
        column_map=dict(column_map or {}),
        masking_strategy=masking_strategy or "train_on_assistant",
        new_system_prompt=new_system_prompt,
        max_seq_len=max_seq_len,
        truncation=truncation,
        filter_fn=_resolve("filter_fn", filter_fn),
        record_fn=_resolve("record_fn", record_fn),
        pairs=pairs,
        group_by_prompt=group_by_prompt,
        on_malformed=on_malformed,
        max_malformed=max_malformed,
        max_masked=max_masked,
        empty_system_prob=empty_system_prob,
    )
    try:
        records = Source(source or kind_of_files(load_dataset_kwargs), split, load_dataset_kwargs).load()
    except UnknownArgumentError as error:
        known = list(inspect.signature(prefix_preference_dataset).parameters)
        problem = f"unknown argument of prefix_preference_dataset.{did_you_mean(error.name, known)}"
        raise ConfigError(error.name, problem) from error
    return _tokenize(records, tokenizer, options)


def packed_preference_dataset(
    tokenizer: ChatTokenizer, *, packed: bool = True, **kwargs: Any
) -> PrefixPreferenceDataset:
    """``prefix_preference_dataset`` for a config that packs: naming it sets the run's ``packing: step``.

    Args:
        tokenizer (ChatTokenizer): the tokenizer.
        packed (bool): read by the config, as ``dataset.packed`` of any builder is. Default: True.
        **kwargs (Any): arguments of ``prefix_preference_dataset``.

    Returns:
        PrefixPreferenceDataset: the data set.
    """
    return prefix_preference_dataset(tokenizer, **kwargs)


def preference_dataset_from_records(
    records: datasets.Dataset,
    tokenizer: ChatTokenizer,
    options: PreferenceOptions | None = None,
    *,
    name: str,
) -> PrefixPreferenceDataset:
    """Builds a preference data set from records that are loaded already.

    Args:
        records (datasets.Dataset): the records.
        tokenizer (ChatTokenizer): one of torchtune's, or ``prefix_sharing.tokenizers.hf_chat_tokenizer``.
        options (PreferenceOptions | None): how records become examples. Default: None, the defaults.
        name (str): where the records come from, for messages.

    Returns:
        PrefixPreferenceDataset: the data set.

    Raises:
        UserError: if a record is malformed or no example is left.
    """
    return _tokenize(Records(records, name), tokenizer, options or PreferenceOptions())


def _tokenize(records: Records, tokenizer: ChatTokenizer, options: PreferenceOptions) -> PrefixPreferenceDataset:
    form = _form_of(records, options)
    if options.max_seq_len is None:
        options = replace(options, max_seq_len=tokenizer.max_seq_len)
    if tokenizer.max_seq_len is not None:
        # torchtune's tokenizers cut by themselves, and write EOS over the last token, which would then be learned.
        tokenizer = copy.copy(tokenizer)
        tokenizer.max_seq_len = None

    num_proc, name = _num_processes(records), records.name
    if options.truncation == "split_turns":
        name += ", split at turns"
        records = split_at_turns(records, TokenizeRecord(tokenizer, form, options, records.is_json), num_proc)
    rows = records.rows
    try:
        tokenized = rows.map(
            TokenizeRecord(tokenizer, form, options, records.is_json),
            with_indices=True,
            remove_columns=rows.column_names,
            features=FEATURES,
            num_proc=num_proc,
            desc=f"Tokenizing {records.name}",
        )
    except MalformedRecordError as error:
        raise UserError(f"{records.describe(error.index)}: {error.problem}.") from error
    check_malformed(tokenized, records, options.max_malformed)
    if options.group_by_prompt or form.by_prompt:
        tokenized = merge_by_prompt(tokenized, records.name, options.pairs)
    dataset = PrefixPreferenceDataset(tokenized, name)
    log.info("%r", dataset)
    log_remarks(dataset, records)
    return dataset


def _num_processes(records: Records) -> int | None:
    """How many processes to go through the records in; None for this one."""
    number = min(os.cpu_count() or 1, len(records.rows) // _RECORDS_PER_PROCESS)
    return number if number > 1 else None


def _form_of(records: Records, options: PreferenceOptions) -> Form:
    """The form of a data set: the user's choice, or what its first records look like."""
    first, problem = [], None
    for index in range(min(_RECORDS_TO_RECOGNISE, len(records.rows))):
        try:
            first.append(prepare_record(records[index], options.record_fn))
        except ValueError as error:  # whether it may be dropped is decided when all are read
            problem = problem or f"{records.describe(index)}: {error}."
    if not first and problem is not None:
        raise UserError(problem)
    check_column_map(options.column_map, first + _first_with(options.column_map, first, records, options))
    if options.format is not None:
        form = choose_form(options.format, first, options.column_map)
    else:
        form, reason = recognize_form(first, options.column_map)
        log.info("%s: format '%s' recognized by %s", records.name, form.name, reason)
    for name in ("label", "kto_tag"):
        column = options.column_map.get(name) or name
        feature = records.rows.features.get(column)
        if form.name == "unpaired" and options.record_fn is None and isinstance(feature, datasets.ClassLabel):
            problem = f"is a class ({', '.join(feature.names)}), not true or false; say with record_fn which is which"
            raise UserError(f"{records.name}: column {column} {problem}.")
    return form


def _first_with(
    columns: Mapping[str, str | None], first: list[dict], records: Records, options: PreferenceOptions
) -> list[dict]:
    """The first records with columns that ``column_map`` names and the very first ones lack."""
    missing = {column for column in columns.values() if column is not None and not any(column in r for r in first)}
    found = []
    for index in range(_RECORDS_TO_RECOGNISE, len(records.rows) if missing else 0):
        try:
            record = prepare_record(records[index], options.record_fn)
        except ValueError:
            continue
        if missing & record.keys():
            found.append(record)
            missing -= record.keys()
        if not missing:
            break
    return found


def _resolve(key: str, function: Callable[[dict], Any] | str | None) -> Callable[[dict], Any] | None:
    if not isinstance(function, str):
        return function
    try:
        return resolve_name(function)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(key, f"'{function}' not found: {one_line(error)}") from error
