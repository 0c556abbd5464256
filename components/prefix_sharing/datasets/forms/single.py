"""Forms of one answer: for supervised fine-tuning, and with a verdict of its own for KTO."""

from collections.abc import Iterator
from typing import Any

from prefix_sharing.datasets.forms.comparison import Comparison, compare
from prefix_sharing.datasets.forms.messages import parse_messages, parse_transcript
from prefix_sharing.datasets.forms.prompt import prompt_of, with_system
from prefix_sharing.datasets.forms.record import Record, RecordError, as_choice, is_choice

_VERDICTS: dict[Any, int] = {True: 1, False: 0}  # and the numbers 1 and 0, which equal them
_VERDICTS |= {"true": 1, "false": 0, "1": 1, "0": 0}  # as CSV files hold them

_OF_PREFERENCES = ("chosen", "rejected", "rejected_response", "rejected_messages", "label", "kto_tag")
"""Columns that say which answers are good, which nothing is learned of from a conversation alone."""


ANSWERS = ("completion", "response", "output")
"""Columns of an answer by itself."""


def read_chat(record: Record) -> Comparison:
    """One conversation, messages or a transcript, for ``NLLLoss``."""
    if not record.is_mapped("messages"):
        _refuse_preferences(record, "messages")
    return _conversation(record)


def is_completion(record: Record) -> bool:
    """Whether nothing in a record says how good its answer is."""
    return not any(_preferences_in(record))


def read_completion(record: Record) -> Comparison:
    """A prompt and an answer to it, for ``NLLLoss``: TRL's ``completion``, Alpaca's ``output``."""
    name = next((name for name in ANSWERS if name in record), ANSWERS[0])
    if not record.is_mapped(name):
        _refuse_preferences(record, name)
    return compare(record, prompt_of(record), [record.get(name)], [record.key(name)])


def _preferences_in(record: Record) -> Iterator[str]:
    for name in _OF_PREFERENCES:
        if name in record and (name not in ("label", "kto_tag") or has_verdict(record)):
            yield name


def _refuse_preferences(record: Record, beside: str) -> None:
    for name in _preferences_in(record):
        problem = f"is beside {beside} in this record but not in the first ones"
        raise RecordError(record.key(name), f"{problem}; column_map: {{{name}: null}} leaves it alone")


def _verdict_of(record: Record) -> str:
    """The column of an answer's verdict."""
    return "kto_tag" if "kto_tag" in record else "label"


def has_verdict(record: Record) -> bool:
    """Whether a record's ``label`` is a verdict, not the class of something."""
    return is_choice(as_choice(record.peek(_verdict_of(record))), _VERDICTS)


def read_unpaired(record: Record) -> Comparison:
    """An answer with a ``label``, or LLaMA-Factory's ``kto_tag``: whether it is desirable."""
    label = bool(record.choice(_verdict_of(record), _VERDICTS))
    name = next((name for name in ("completion", "output") if name in record), None)
    if name is None:
        return _conversation(record, label)
    return compare(record, prompt_of(record), [record.get(name)], [record.key(name)], label=label)


def _conversation(record: Record, label: bool | None = None) -> Comparison:
    name = "messages" if "messages" in record else "conversations"
    value, key = record.get(name), record.key(name)
    turns = parse_transcript(value, key) if isinstance(value, str) else parse_messages(value, key)
    return compare(record, [], [with_system(record, turns)], [key], label=label)
