r"""The forms that records come in, read into K conversations, best first.

=========== ============================================== =====================================================
format      columns                                        what they hold
=========== ============================================== =====================================================
messages    ``chosen``, ``rejected``, perhaps ``prompt``   lists of messages, OpenAI's ``role`` and ``content`` or
                                                           ShareGPT's ``from`` and ``value``; whole conversations, or
                                                           answers to the messages or the string in ``prompt``
text        ``prompt``, ``chosen``, ``rejected``           strings: a user's question and two answers
hh          ``chosen``, ``rejected``                       Anthropic's transcripts, ``\n\nHuman: ...\n\nAssistant: ...``
ranked      ``prompt``, ``responses``, perhaps ``scores``  K answers to one prompt; without scores, best first
chat        ``messages``                                   for ``NLLLoss``: one conversation, messages or transcript
=========== ============================================== =====================================================
"""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal, cast, get_args

from prefix_sharing.errors import ConfigError, UserError
from prefix_sharing.tokenizers import Turn

Format = Literal["messages", "text", "hh", "ranked", "chat"]

_COLUMNS: dict[str, tuple[str, ...]] = {
    "messages": ("chosen", "rejected"),
    "text": ("prompt", "chosen", "rejected"),
    "hh": ("chosen", "rejected"),
    "ranked": ("prompt", "responses"),
    "chat": ("messages",),
}

_ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "ipython": "ipython",
    "tool": "ipython",
}

_HH_TURN = re.compile(r"\n\n(Human|Assistant):")


class RecordError(Exception):
    """A malformed record: ``key`` is where in the record, ``problem`` what is wrong."""

    def __init__(self, key: str, problem: str) -> None:
        super().__init__(key, problem)
        self.key = key
        self.problem = problem


def recognize_format(
    columns: Mapping[str, str], column_names: Sequence[str], first_records: Sequence[Mapping]
) -> Format:
    """Tells the format of a data set from its columns and first records.

    Args:
        columns (Mapping[str, str]): the user's ``column_map``, expected name to actual name.
        column_names (Sequence[str]): the columns there are.
        first_records (Sequence[Mapping]): a few records.

    Returns:
        Format: the format.

    Raises:
        UserError: if no format fits.
    """
    present = {
        name
        for name in ("prompt", "chosen", "rejected", "responses", "messages")
        if columns.get(name, name) in column_names
    }

    def first_value(name: str) -> Any:
        column = columns.get(name, name)
        return next((record[column] for record in first_records if record[column]), None)

    if columns.get("messages") in column_names or ("messages" in present and not present & {"chosen", "responses"}):
        return "chat"
    if {"prompt", "responses"} <= present:
        return "ranked"
    if {"chosen", "rejected"} <= present:
        chosen = first_value("chosen")
        if isinstance(chosen, list):
            return "messages"
        if "prompt" in present:
            return "text"
        if isinstance(chosen, str) and _HH_TURN.match(chosen):
            return "hh"
    raise UserError(
        f"The columns {', '.join(column_names)} match no known format: chosen and rejected (message lists or HH "
        "transcripts), prompt, chosen and rejected, prompt and responses, or messages; rename columns with column_map."
    )


def check_format(name: str, columns: Mapping[str, str], column_names: Sequence[str]) -> Format:
    """Checks a format the user chose against the columns there are.

    Raises:
        ConfigError: if there is no such format, or a column it needs is missing.
    """
    if name not in get_args(Format):
        raise ConfigError("format", f"unknown format '{name}'; choose from {', '.join(get_args(Format))}")
    for column in _COLUMNS[name]:
        if columns.get(column, column) not in column_names:
            problem = (
                f"{name} needs a column '{columns.get(column, column)}', but the columns are "
                f"{', '.join(column_names)}; name it with column_map"
            )
            raise ConfigError("format", problem)
    return cast(Format, name)


def to_conversations(record: Mapping[str, Any], format: Format, columns: Mapping[str, str]) -> list[list[Turn]]:
    """Reads a record into its K conversations, best first, each ending with an assistant's turn.

    Args:
        record (Mapping[str, Any]): one record of the data set.
        format (Format): how to read it.
        columns (Mapping[str, str]): expected column name to actual name, where they differ.

    Returns:
        list[list[Turn]]: K >= 1 conversations.

    Raises:
        RecordError: if the record is malformed.
    """
    named = {
        name: columns.get(name, name) for name in ("prompt", "chosen", "rejected", "responses", "scores", "messages")
    }

    if format == "hh":
        return [_parse_transcript(record[named[name]], named[name]) for name in ("chosen", "rejected")]

    if format == "chat":
        messages, key = record[named["messages"]], named["messages"]
        return [_parse_transcript(messages, key) if isinstance(messages, str) else _answer([], messages, key, "chat")]

    prompt = record.get(named["prompt"])
    if prompt is not None or format != "messages":
        prompt = _parse_prompt(prompt, named["prompt"])
    if format == "ranked":
        answers = record[named["responses"]]
        if not isinstance(answers, list) or not answers:
            raise RecordError(named["responses"], "must be a list of at least one response")
        keys = [f"{named['responses']}[{i}]" for i in range(len(answers))]
        scores = record.get(named["scores"])
        order = range(len(answers)) if scores is None else _best_first(scores, len(answers), named["scores"])
    else:
        answers = [record[named["chosen"]], record[named["rejected"]]]
        keys = [named["chosen"], named["rejected"]]
        order = range(2)
    return [_answer(prompt or [], answers[i], keys[i], format) for i in order]


def scores_best_first(record: Mapping[str, Any], format: Format, columns: Mapping[str, str]) -> list[float] | None:
    """The scores of a record's responses in the order of ``to_conversations``, which has checked them.

    Args:
        record (Mapping[str, Any]): one record of the data set.
        format (Format): how to read it.
        columns (Mapping[str, str]): expected column name to actual name, where they differ.

    Returns:
        list[float] | None: None where the record has none.
    """
    scores = record.get(columns.get("scores", "scores")) if format == "ranked" else None
    return None if scores is None else sorted(scores, reverse=True)


def _answer(prompt: list[Turn], answer: Any, key: str, format: Format) -> list[Turn]:
    """The conversation that ends with an answer, which may be a string, messages, or the whole conversation."""
    if isinstance(answer, str) and format in ("text", "ranked"):
        turns = [*prompt, {"role": "assistant", "content": answer}]
    elif isinstance(answer, list) and format != "text":
        turns = _parse_messages(answer, key)
        goes_on = turns[0]["role"] == "assistant" or (prompt and prompt[-1]["role"] == "assistant")
        if goes_on and turns[: len(prompt)] != prompt:
            turns = [*prompt, *turns]
        elif turns[0]["role"] == "user" and prompt and prompt[0]["role"] == "system":
            turns = [prompt[0], *turns]
    else:
        expected = {"text": "a string", "ranked": "a string or a list of messages"}
        raise RecordError(key, f"must be {expected.get(format, 'a list of messages')}, but is {_kind(answer)}")
    _check_order(turns, key)
    return turns


def _parse_prompt(prompt: Any, key: str) -> list[Turn]:
    if isinstance(prompt, str):
        return [{"role": "user", "content": prompt}]
    if isinstance(prompt, list):
        return _parse_messages(prompt, key)
    raise RecordError(key, f"must be a string or a list of messages, but is {_kind(prompt)}")


def _parse_messages(messages: list, key: str) -> list[Turn]:
    if not messages:
        raise RecordError(key, "is an empty list")
    turns = []
    for i, message in enumerate(messages):
        where = f"{key}[{i}]"
        if not isinstance(message, dict):
            raise RecordError(where, f"must be a message, but is {_kind(message)}")
        role_key, content_key = ("from", "value") if message.get("from") is not None else ("role", "content")
        role, content = message.get(role_key), message.get(content_key)
        if role is None:
            raise RecordError(where, "has no 'role' (or 'from')")
        if not isinstance(role, str) or role not in _ROLES:
            raise RecordError(f"{where}.{role_key}", f"is {role!r}; choose from {', '.join(_ROLES)}")
        if isinstance(content, list):  # OpenAI's parts
            texts = [part["text"] for part in content if isinstance(part, dict) and isinstance(part.get("text"), str)]
            content = "".join(texts) if len(texts) == len(content) else content
        if not isinstance(content, str):
            raise RecordError(f"{where}.{content_key}", f"must be a string, but is {_kind(content)}")
        turns.append({"role": _ROLES[role], "content": content})
    return turns


def _parse_transcript(transcript: Any, key: str) -> list[Turn]:
    """Splits an HH transcript; turns in a row by the same speaker are one turn, with the blank line between them."""
    if not isinstance(transcript, str):
        raise RecordError(key, f"must be a string, but is {_kind(transcript)}")
    before, *speakers_and_texts = _HH_TURN.split(transcript)
    if before.strip() or not speakers_and_texts:
        raise RecordError(key, "must begin with '\\n\\nHuman:'")
    turns: list[Turn] = []
    for speaker, text in zip(speakers_and_texts[::2], speakers_and_texts[1::2], strict=True):
        role = "user" if speaker == "Human" else "assistant"
        if turns and turns[-1]["role"] == role:
            turns[-1]["content"] = f"{turns[-1]['content']}\n\n{text.strip()}".strip()
        else:
            turns.append({"role": role, "content": text.strip()})
    _check_order(turns, key)
    return turns


def _check_order(turns: list[Turn], key: str) -> None:
    """Roles must come as a model is trained on them: perhaps a system turn, then user and assistant in turn."""
    roles = [turn["role"] for turn in turns]
    order = " ".join(roles)
    if not re.fullmatch(r"(system )?(user (assistant (ipython )+)*assistant ?)+", order):
        raise RecordError(
            key,
            f"has roles out of order ({', '.join(roles)}): a system turn may come first, then user and assistant "
            "alternate, and the assistant comes last",
        )


def _best_first(scores: Any, num_responses: int, key: str) -> list[int]:
    if not isinstance(scores, list) or len(scores) != num_responses:
        raise RecordError(key, f"must be a list of {num_responses} numbers, one for each response")
    for i, score in enumerate(scores):
        if not isinstance(score, (int, float)) or isinstance(score, bool) or math.isnan(score):
            raise RecordError(f"{key}[{i}]", f"must be a number, but is {_kind(score)}")
    return sorted(range(num_responses), key=lambda i: -scores[i])


def _kind(value: Any) -> str:
    names = {str: "a string", list: "a list", dict: "an object", bool: "a boolean", int: "a number", float: "a number"}
    return "missing" if value is None else names.get(type(value), f"a {type(value).__name__}")
