r"""Rows as people have them, read into K conversations, best first.

=========== ============================================== =====================================================
format      columns                                        what stands in them
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
from typing import Any, Literal, get_args

from prefix_sharing.errors import UserError

Format = Literal["messages", "text", "hh", "ranked", "chat"]

Turn = dict[str, str]
"""A ``role`` (system, user, assistant or ipython) and a ``content``."""

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


class RowError(Exception):
    """A malformed row: ``key`` is where in the row, ``problem`` what is wrong."""

    def __init__(self, key: str, problem: str) -> None:
        super().__init__(key, problem)
        self.key = key
        self.problem = problem


def recognise_format(columns: Mapping[str, str], column_names: Sequence[str], first_rows: Sequence[Mapping]) -> Format:
    """Tells the format of a data set from its columns and first rows.

    Args:
        columns (Mapping[str, str]): the user's ``column_map``, expected name to actual name.
        column_names (Sequence[str]): the columns there are.
        first_rows (Sequence[Mapping]): a few rows.

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
        return next((row[columns.get(name, name)] for row in first_rows if row[columns.get(name, name)]), None)

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
        f"dataset: its columns are {', '.join(column_names)}, which is none of the forms known: "
        "chosen and rejected (message lists or HH transcripts), prompt, chosen and rejected, prompt and responses, or "
        "messages; "
        "name them with column_map."
    )


def check_format(name: str, columns: Mapping[str, str], column_names: Sequence[str]) -> Format:
    """Checks a format the user chose against the columns there are.

    Raises:
        UserError: if there is no such format, or a column it needs is missing.
    """
    if name not in get_args(Format):
        raise UserError(f"dataset.format: there is no format '{name}'; choose one of {', '.join(get_args(Format))}.")
    for column in _COLUMNS[name]:
        if columns.get(column, column) not in column_names:
            raise UserError(
                f"dataset: format '{name}' needs a column '{columns.get(column, column)}', "
                f"but the columns are {', '.join(column_names)}; name it with column_map."
            )
    return name


def to_conversations(row: Mapping[str, Any], row_format: Format, columns: Mapping[str, str]) -> list[list[Turn]]:
    """Reads a row into its K conversations, best first, each ending with an assistant's turn.

    Args:
        row (Mapping[str, Any]): one row of the data set.
        row_format (Format): how to read it.
        columns (Mapping[str, str]): expected column name to actual name, where they differ.

    Returns:
        list[list[Turn]]: K >= 1 conversations.

    Raises:
        RowError: if the row is malformed.
    """
    named = {
        name: columns.get(name, name) for name in ("prompt", "chosen", "rejected", "responses", "scores", "messages")
    }

    if row_format == "hh":
        return [_parse_transcript(row[named[name]], named[name]) for name in ("chosen", "rejected")]

    if row_format == "chat":
        messages, key = row[named["messages"]], named["messages"]
        return [_parse_transcript(messages, key) if isinstance(messages, str) else _answer([], messages, key, "chat")]

    prompt = row.get(named["prompt"])
    if prompt is not None or row_format != "messages":
        prompt = _parse_prompt(prompt, named["prompt"])
    if row_format == "ranked":
        answers = row[named["responses"]]
        if not isinstance(answers, list) or not answers:
            raise RowError(named["responses"], "must be a list of at least one response")
        keys = [f"{named['responses']}[{i}]" for i in range(len(answers))]
        scores = row.get(named["scores"])
        order = range(len(answers)) if scores is None else _best_first(scores, len(answers), named["scores"])
    else:
        answers = [row[named["chosen"]], row[named["rejected"]]]
        keys = [named["chosen"], named["rejected"]]
        order = range(2)
    return [_answer(prompt or [], answers[i], keys[i], row_format) for i in order]


def scores_best_first(row: Mapping[str, Any], row_format: Format, columns: Mapping[str, str]) -> list[float] | None:
    """The scores of a row's responses in the order of ``to_conversations``, which has checked them.

    Args:
        row (Mapping[str, Any]): one row of the data set.
        row_format (Format): how to read it.
        columns (Mapping[str, str]): expected column name to actual name, where they differ.

    Returns:
        list[float] | None: None where the row has none.
    """
    scores = row.get(columns.get("scores", "scores")) if row_format == "ranked" else None
    return None if scores is None else sorted(scores, reverse=True)


def _answer(prompt: list[Turn], answer: Any, key: str, row_format: Format) -> list[Turn]:
    """The conversation that ends with an answer, which may be a string, messages, or the whole conversation."""
    if isinstance(answer, str) and row_format in ("text", "ranked"):
        turns = [*prompt, {"role": "assistant", "content": answer}]
    elif isinstance(answer, list) and row_format != "text":
        turns = _parse_messages(answer, key)
        goes_on = turns[0]["role"] == "assistant" or (prompt and prompt[-1]["role"] == "assistant")
        if goes_on and turns[: len(prompt)] != prompt:
            turns = [*prompt, *turns]
        elif turns[0]["role"] == "user" and prompt and prompt[0]["role"] == "system":
            turns = [prompt[0], *turns]
    else:
        expected = {"text": "a string", "ranked": "a string or a list of messages"}
        raise RowError(key, f"must be {expected.get(row_format, 'a list of messages')}, but is {_kind(answer)}")
    _check_order(turns, key)
    return turns


def _parse_prompt(prompt: Any, key: str) -> list[Turn]:
    if isinstance(prompt, str):
        return [{"role": "user", "content": prompt}]
    if isinstance(prompt, list):
        return _parse_messages(prompt, key)
    raise RowError(key, f"must be a string or a list of messages, but is {_kind(prompt)}")


def _parse_messages(messages: list, key: str) -> list[Turn]:
    if not messages:
        raise RowError(key, "is an empty list")
    turns = []
    for i, message in enumerate(messages):
        where = f"{key}[{i}]"
        if not isinstance(message, dict):
            raise RowError(where, f"must be a message, but is {_kind(message)}")
        role_key, content_key = ("from", "value") if message.get("from") is not None else ("role", "content")
        role, content = message.get(role_key), message.get(content_key)
        if role is None:
            raise RowError(where, "has no 'role' (or 'from')")
        if not isinstance(role, str) or role not in _ROLES:
            raise RowError(f"{where}.{role_key}", f"is {role!r}, which is none of {', '.join(_ROLES)}")
        if isinstance(content, list):  # OpenAI's parts
            parts = [part.get("text") if isinstance(part, dict) else None for part in content]
            content = "".join(parts) if all(isinstance(part, str) for part in parts) else content
        if not isinstance(content, str):
            raise RowError(f"{where}.{content_key}", f"must be a string, but is {_kind(content)}")
        turns.append({"role": _ROLES[role], "content": content})
    return turns


def _parse_transcript(transcript: Any, key: str) -> list[Turn]:
    """Splits an HH transcript; turns in a row by the same speaker are one turn, with the blank line between them."""
    if not isinstance(transcript, str):
        raise RowError(key, f"must be a string, but is {_kind(transcript)}")
    before, *speakers_and_texts = _HH_TURN.split(transcript)
    if before.strip() or not speakers_and_texts:
        raise RowError(key, "must begin with '\\n\\nHuman:'")
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
        raise RowError(
            key,
            f"has roles out of order ({', '.join(roles)}): a system turn may come first, then user and assistant "
            "alternate, and the assistant comes last",
        )


def _best_first(scores: Any, num_responses: int, key: str) -> list[int]:
    if not isinstance(scores, list) or len(scores) != num_responses:
        raise RowError(key, f"must be a list of {num_responses} numbers, one for each response")
    for i, score in enumerate(scores):
        if not isinstance(score, (int, float)) or isinstance(score, bool) or math.isnan(score):
            raise RowError(f"{key}[{i}]", f"must be a number, but is {_kind(score)}")
    return sorted(range(num_responses), key=lambda i: -scores[i])


def _kind(value: Any) -> str:
    names = {str: "a string", list: "a list", dict: "an object", bool: "a boolean", int: "a number", float: "a number"}
    return "missing" if value is None else names.get(type(value), f"a {type(value).__name__}")
