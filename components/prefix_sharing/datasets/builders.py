"""The builders that a config names: records are tokenized once, in parallel, and cached by ``datasets``."""

import copy
import inspect
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pkgutil import resolve_name
from typing import Any

import datasets
import numpy as np
import pyarrow.compute as pc

from prefix_sharing.config import one_line
from prefix_sharing.config.files import did_you_mean
from prefix_sharing.datasets.choosing import Candidates, Choice, RecordReader
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
    processes_for,
)
from prefix_sharing.errors import ConfigError, UserError
from prefix_sharing.tokenizers import ChatTokenizer

log = logging.getLogger(__name__)

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
    max_prompt_length: int | None = None,
    truncation: Truncation = "keep_start",
    filter_fn: Callable[[dict], bool] | str | None = None,
    pairs: PairStrategy = "best_vs_rest",
    group_by_prompt: bool = False,
    deduplicate: Mapping[str, Any] | str | None = None,
    select: Mapping[str, Any] | None = None,
    scores: Sequence[str] | Mapping[str, Any] | None = None,
    rescale: Mapping[str, Any] | None = None,
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
        max_prompt_length (int | None): what an example that exceeds ``max_seq_len`` is cut to first: so many tokens
            before the last answer, by taking tokens from the start of all its responses, as many of each. What is
            still too long then is up to ``truncation``. Default: None, the prompt is not cut first.
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
        deduplicate (Mapping[str, Any] | str | None): drops records that say what an earlier one says: ``exact``,
            ``minhash``, or a mapping of ``method`` and the fields of ``prefix_sharing.datasets.choosing.duplicates``.
            Default: None, they stay.
        select (Mapping[str, Any] | None): which records to take: ``by`` one of ``random``, ``longest``, ``alpagasus``,
            ``argilla``, ``a2``, ``deita``, with ``budget`` and the fields of
            ``prefix_sharing.datasets.choosing.selection``. Default: None, all.
        scores (Sequence[str] | Mapping[str, Any] | None): where scores of answers come from that ``select`` goes by:
            columns, one for each answer in the order of the record, or one with a list; or a judge, with
            ``_component_``. Default: None, those that the form has, or ``score_chosen`` and ``score_rejected``.
        rescale (Mapping[str, Any] | None): ``raw`` names columns or a judge, as ``scores`` does, whose values are
            fitted to the scores there are, and fill in those that are missing. Default: None, none is filled in.
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
        max_prompt_length=max_prompt_length,
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
    choice = Choice.from_keys(deduplicate=deduplicate, select=select, scores=scores, rescale=rescale)
    try:
        records = Source(source or kind_of_files(load_dataset_kwargs), split, load_dataset_kwargs).load()
    except UnknownArgumentError as error:
        known = list(inspect.signature(prefix_preference_dataset).parameters)
        problem = f"unknown argument of prefix_preference_dataset.{did_you_mean(error.name, known)}"
        raise ConfigError(error.name, problem) from error
    return _tokenize(records, tokenizer, options, choice)


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
    return _tokenize(Records(records, name), tokenizer, options or PreferenceOptions(), Choice())


def _tokenize(
    records: Records, tokenizer: ChatTokenizer, options: PreferenceOptions, choice: Choice
) -> PrefixPreferenceDataset:
    form = _form_of(records, options)
    by_prompt = options.group_by_prompt or form.by_prompt
    if form.by_prompt and choice.selection is not None:
        problem = f"not used with format {form.name}, whose records are answers: it would tear prompts apart"
        raise ConfigError("select", f"{problem}; group them first, in a file of responses and scores")
    if by_prompt and choice.duplicates is not None and choice.duplicates.over == "prompt":
        problem = "prompt would keep one record of each prompt, of those to be merged; use prompt_and_answers"
        raise ConfigError("deduplicate.over", problem)
    if options.max_seq_len is None:
        options = replace(options, max_seq_len=tokenizer.max_seq_len)
    if options.max_prompt_length is not None:
        if options.max_seq_len is None:
            raise ConfigError("max_prompt_length", "not used without max_seq_len; set that as well")
        if options.max_prompt_length >= options.max_seq_len:
            problem = f"must be less than max_seq_len, {options.max_seq_len}, for an answer to be left"
            raise ConfigError("max_prompt_length", problem)
    if tokenizer.max_seq_len is not None:
        # torchtune's tokenizers cut by themselves, and write EOS over the last token, which would then be learned.
        tokenizer = copy.copy(tokenizer)
        tokenizer.max_seq_len = None

    num_proc, name = processes_for(len(records.rows)), records.name
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
    reader = RecordReader(records, form, options, choice.score_columns)
    left_out = np.full(len(rows), "", dtype=object)
    usable = pc.indices_nonzero(pc.equal(tokenized.data.column("dropped"), "")).to_numpy().astype(np.int64)
    left_out[usable] = choice.left_out(Candidates([reader], usable, [records.name], records.describe), records.name)
    if by_prompt:
        tokenized = merge_by_prompt(tokenized, records.name, options.pairs, left_out)
    dataset = PrefixPreferenceDataset(tokenized, name, left_out=left_out, reader=reader)
    log.info("%r", dataset)
    log_remarks(dataset, records, choice.columns)
    return dataset


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
        form, reason = recognize_form(first, options.column_map, records.name)
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
