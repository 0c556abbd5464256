"""What any form is read into: the conversations of one prompt, best first."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from prefix_sharing.datasets.forms.messages import (
    check_order,
    is_transcript,
    parse_json,
    parse_messages,
    parse_transcript,
)
from prefix_sharing.datasets.forms.prompt import join
from prefix_sharing.datasets.forms.record import Record, RecordError, as_number, as_text, kind
from prefix_sharing.tokenizers import Turn


@dataclass
class Comparison:
    """A record as it was read.

    Attributes:
        conversations (list[list[Turn]]): K >= 1 conversations, best first, each ending with an assistant's turn.
        raw (list[Any]): their answers before anything was cut or joined, to tell identical answers from those that
            reading makes identical.
        given (list[str]): the beginning of each last turn that is part of the prompt, and not scored: "" mostly.
        scores (list[float] | None): of each, in the same order. Equal ones are no pair.
        label (bool | None): of a single answer: whether it is desirable.
        tools (list | None): the tools that the prompt offers, for the chat template.
        template_kwargs (dict[str, Any]): whatever else the record has for the chat template.
        order (list[int]): which of the record's answers each is.
    """

    conversations: list[list[Turn]]
    raw: list[Any]
    given: list[str]
    scores: list[float] | None = None
    label: bool | None = None
    tools: list | None = None
    template_kwargs: dict[str, Any] = field(default_factory=dict)
    order: list[int] = field(default_factory=list)

    def best(self) -> "Comparison":
        """The best answer alone; of equal ones the first."""
        first = {name: getattr(self, name)[:1] for name in ("conversations", "raw", "given")}
        return replace(self, **first, scores=None)


def compare(
    record: Record,
    prompt: Sequence[Turn],
    answers: Sequence[Any],
    keys: Sequence[str],
    scores: Sequence[float] | None = None,
    label: bool | None = None,
) -> Comparison:
    """Puts together what a form's reader found.

    Args:
        record (Record): the record, for its tools.
        prompt (Sequence[Turn]): the turns before the answers.
        answers (Sequence[Any]): text, a message, messages or turns of each, best first unless there are scores.
        keys (Sequence[str]): where each is, for messages.
        scores (Sequence[float] | None): of each, to be sorted by. Default: None.
        label (bool | None): whether the only one is desirable. Default: None.

    Returns:
        Comparison: the conversations, best first.

    Raises:
        RecordError: if an answer is malformed or does not fit the prompt.
    """
    turns = [read_answer(answer, key) for answer, key in zip(answers, keys, strict=True)]
    if any(list(prompt) == answer for answer in turns):
        prompt = []  # a copy of one of the conversations
    raw = [_raw(answer, read) for answer, read in zip(answers, turns, strict=True)]
    joined = [join(prompt, answer, key) for answer, key in zip(turns, keys, strict=True)]
    for (conversation, _), key in zip(joined, keys, strict=True):
        check_order(conversation, key)
    order = range(len(joined)) if scores is None else sorted(range(len(joined)), key=lambda i: -scores[i])
    return Comparison(
        [joined[i][0] for i in order],
        [raw[i] for i in order],
        [joined[i][1] for i in order],
        None if scores is None else [scores[i] for i in order],
        label,
        _tools_of(record),
        _template_kwargs_of(record),
        list(order),
    )


def _raw(answer: Any, turns: list[Turn]) -> Any:
    """An answer's text, whether it is a string or the content of one message; else its turns."""
    if isinstance(answer, str):
        return answer
    return turns[0]["content"] if len(turns) == 1 and turns[0].keys() == {"role", "content"} else turns


def read_answer(answer: Any, key: str) -> list[Turn]:
    """Reads an answer.

    Args:
        answer (Any): text, a transcript, a message or messages.
        key (str): where it is, for messages.

    Returns:
        list[Turn]: its turns, perhaps with the prompt's before them.

    Raises:
        RecordError: if it is malformed.
    """
    if is_transcript(answer):
        return parse_transcript(answer, key)
    if isinstance(answer, str):
        return [{"role": "assistant", "content": as_text(answer, key)}]
    if isinstance(answer, (list, dict)):
        return parse_messages(answer, key)
    raise RecordError(key, f"must be a string, a message or a list of messages, but is {kind(answer)}")


def scores_of(record: Record, num_answers: int) -> list[float] | None:
    """The ``scores`` of a record.

    Args:
        record (Record): the record.
        num_answers (int): how many there should be.

    Returns:
        list[float] | None: None where the record has none.

    Raises:
        RecordError: if they are malformed.
    """
    scores, key = record.get("scores"), record.key("scores")
    if scores is None:
        return None
    if not isinstance(scores, list) or len(scores) != num_answers:
        raise RecordError(key, f"must be a list of {num_answers} numbers, one for each response")
    return [as_number(score, f"{key}[{i}]") for i, score in enumerate(scores)]


def _tools_of(record: Record) -> list | None:
    tools, key = record.get("tools"), record.key("tools")
    if isinstance(tools, str):
        tools = parse_json(tools, key) if tools.strip() else None
    if tools is not None and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        raise RecordError(key, f"must be a list of tools, each an object, but is {kind(tools)}")
    return tools


def _template_kwargs_of(record: Record) -> dict[str, Any]:
    value, key = record.get("chat_template_kwargs"), record.key("chat_template_kwargs")
    if isinstance(value, str):
        value = parse_json(value, key) if value.strip() else None
    if not isinstance(value, (dict, type(None))):
        raise RecordError(key, f"must be an object, but is {kind(value)}")
    return value or {}
