"""Prompts: the beginnings of conversations that are to be answered."""

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from tqdm import tqdm

from prefix_sharing.datasets.forms import Record, RecordError, recognize_form
from prefix_sharing.datasets.forms.prompt import prompt_of
from prefix_sharing.datasets.source import Records, Source, UnknownArgumentError, kind_of_files
from prefix_sharing.errors import ConfigError, UserError
from prefix_sharing.fingerprint import fingerprint
from prefix_sharing.sampling import Prompt
from prefix_sharing.tokenizers import ChatTokenizer, Turn, tokenize_turns
from prefix_sharing.trees import common_prefix_length

log = logging.getLogger(__name__)


def prompt_dataset(
    tokenizer: ChatTokenizer,
    *,
    source: str | None = None,
    split: str = "train",
    column_map: Mapping[str, str | None] | None = None,
    max_prompt_len: int | None = None,
    **load_dataset_kwargs: Any,
) -> list[Prompt]:
    """Reads prompts from files or the hub, for a config: of records with prompts alone, or of preference data.

    Prompts that are there twice, and those that are too long, are left out and counted.

    Args:
        tokenizer (ChatTokenizer): one of torchtune's, or ``prefix_sharing.tokenizers.hf_chat_tokenizer``.
        source (str | None): as for ``prefix_sharing.datasets.prefix_preference_dataset``. Default: None.
        split (str): which split. Default: "train".
        column_map (Mapping[str, str | None] | None): as there. Default: None.
        max_prompt_len (int | None): tokens in a prompt at most. Default: None, any number.
        **load_dataset_kwargs (Any): ``data_files`` and whatever else ``datasets.load_dataset`` takes.

    Returns:
        list[Prompt]: each once, in the order of the data.

    Raises:
        UserError: if the data cannot be loaded, a record is malformed, or no prompt is left.

    Example:
        .. code-block:: yaml

            prompts:
              _component_: prefix_sharing.online.prompt_dataset
              data_files: my_prompts.jsonl
    """
    try:
        records = Source(source or kind_of_files(load_dataset_kwargs), split, load_dataset_kwargs).load()
    except UnknownArgumentError as error:
        raise ConfigError(error.name, "unknown argument of prompt_dataset") from error
    conversations = []
    for index in range(len(records.rows)):
        try:
            conversations.append(_turns_before_answer(records, index, column_map or {}))
        except (RecordError, ValueError) as error:
            problem = f"'{error.key}' {error.problem}" if isinstance(error, RecordError) else str(error)
            raise UserError(f"{records.describe(index)}: {problem}.") from error
    return make_prompts(conversations, tokenizer, records.name, max_prompt_len)


def _turns_before_answer(records: Records, index: int, columns: Mapping[str, str | None]) -> list[Turn]:
    values = records[index]
    turns = prompt_of(Record(values, columns))
    if turns and turns[-1]["role"] != "assistant":
        return turns
    # Preference data whose prompt is in its answers, or a conversation that is whole.
    form, _ = recognize_form([values], columns, records.describe(index))
    conversation = form.read(Record(values, columns)).conversations[0]
    return list(conversation[:-1])


def make_prompts(
    conversations: Sequence[Sequence[Turn]], tokenizer: ChatTokenizer, name: str, max_prompt_len: int | None = None
) -> list[Prompt]:
    """Tokenizes prompts.

    Args:
        conversations (Sequence[Sequence[Turn]]): turns of each, the last one not the assistant's.
        tokenizer (ChatTokenizer): the tokenizer.
        name (str): where they come from, for messages.
        max_prompt_len (int | None): tokens in a prompt at most. Default: None, any number.

    Returns:
        list[Prompt]: each once.

    Raises:
        UserError: if none is left.
    """
    found: dict[str, Prompt] = {}
    left_out: Counter[str] = Counter()
    for turns in tqdm(conversations, desc=f"Tokenizing {name}", unit=" prompts", delay=5):
        tokens = tokens_before_answer(turns, tokenizer)
        key = fingerprint(tokens.tolist())
        if max_prompt_len is not None and len(tokens) > max_prompt_len:
            left_out["too long"] += 1
        elif key in found:
            left_out["there already"] += 1
        else:
            found[key] = Prompt(key, tuple(turns), tokens)
    why = f" ({', '.join(f'{reason}: {n:,}' for reason, n in sorted(left_out.items()))})" if left_out else ""
    log.info("%s: %s prompts, %s left out%s", name, f"{len(found):,}", f"{sum(left_out.values()):,}", why)
    if not found:
        raise UserError(f"{name} has no usable prompt{why}.")
    return list(found.values())


def tokens_before_answer(turns: Sequence[Turn], tokenizer: ChatTokenizer) -> np.ndarray:
    """The tokens of a conversation up to where the assistant's answer begins, what opens it included.

    Args:
        turns (Sequence[Turn]): the conversation.
        tokenizer (ChatTokenizer): the tokenizer.

    Returns:
        np.ndarray: token ids, shape ``[L]``.
    """
    sequences = []
    for answer in ("a", "b"):
        chat = tokenize_turns(
            tokenizer, [*turns, {"role": "assistant", "content": answer}], [False] * len(turns) + [True]
        )
        sequences.append(np.asarray(chat.tokens, dtype=np.int64))
    # Two answers tell the prompt from the answer, also where a tokenizer scores what opens it.
    return sequences[0][: common_prefix_length(sequences)]
