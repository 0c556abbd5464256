"""A record as its reader sees it: values by the names that forms know them by, and what of it was read."""

import math
from collections.abc import Iterator, Mapping
from typing import Any

NAMES = (
    "prompt",
    "chosen",
    "rejected",
    "responses",
    "scores",
    "messages",
    "conversations",
    "question",
    "query",
    "instruction",
    "input",
    "output",
    "context",
    "history",
    "system",
    "tools",
    "chat_template_kwargs",
    "completion",
    "label",
    "response",
    "rejected_response",
    "rejected_messages",
    "initial_reason_steps",
)
"""The names of columns that ``column_map`` may give to others."""


class RecordError(Exception):
    """A malformed record: ``key`` is where in the record, ``problem`` what is wrong."""

    def __init__(self, key: str, problem: str) -> None:
        super().__init__(key, problem)
        self.key = key
        self.problem = problem


class Record:
    """The values of one record, which remembers what was read.

    Args:
        values (Mapping[str, Any]): the record.
        columns (Mapping[str, str | None]): the user's ``column_map``: the actual name of a column for a name that forms
            know, or None for a column that is to be left alone. A column with a new name has lost its own.
    """

    def __init__(self, values: Mapping[str, Any], columns: Mapping[str, str | None] | None = None) -> None:
        self._values = values
        self._columns = columns or {}
        self._read: set[str] = set()

    def key(self, name: str) -> str:
        """The actual name of a column, for messages."""
        return self._columns.get(name) or name

    def __contains__(self, name: str) -> bool:
        return self.peek(name) is not None

    def get(self, name: str) -> Any:
        """The value under a name, or None; it counts as read."""
        value = self.peek(name)
        if value is not None:
            self._read.add(self.key(name))
        return value

    def text(self, name: str) -> str:
        """The text under a name.

        Raises:
            RecordError: if there is none.
        """
        return as_text(self.get(name), self.key(name))

    def choice(self, name: str, choices: Mapping[Any, int]) -> int:
        """What one of a few values under a name stands for.

        Raises:
            RecordError: if it is none of them.
        """
        value = as_choice(self.get(name))
        if not is_choice(value, choices):
            expected = " or ".join(str(choice) for choice in list(choices)[:2])  # the rest say the same as text
            raise RecordError(self.key(name), f"must be {expected}, but is {kind(value)}{_shown(value)}")
        return choices[value]

    def number(self, name: str) -> float:
        """The number under a name, which a CSV file holds as text.

        Raises:
            RecordError: if there is none.
        """
        return as_number(self.get(name), self.key(name))

    def unused(self) -> Iterator[str]:
        """The columns with something in them that nobody read."""
        for key, value in self._values.items():
            if key not in self._read and value not in (None, "", [], {}):
                yield key

    def is_mapped(self, name: str) -> bool:
        """Whether the user has said which column a name stands for."""
        return name in self._columns

    def peek(self, name: str) -> Any:
        """The value under a name, or None, without counting as read."""
        if name in self._columns:
            key = self._columns[name]
            return None if key is None else self._values.get(key)
        return None if name in self._columns.values() else self._values.get(name)


def as_choice(value: Any) -> Any:
    """A value as choices are written: of text, as CSV files hold it, without case, space and ``.0``."""
    return value.strip().lower().removesuffix(".0") if isinstance(value, str) else value


def is_choice(value: Any, choices: Mapping[Any, int]) -> bool:
    """Whether a value, as ``as_choice`` has it, is one of some choices."""
    return not isinstance(value, (list, dict)) and value in choices


def as_text(value: Any, key: str) -> str:
    """Checks that a value is text.

    Args:
        value (Any): the value.
        key (str): where it is, for the message.

    Returns:
        str: the value.

    Raises:
        RecordError: if it is something else, or text that cannot be written as UTF-8.
    """
    if not isinstance(value, str):
        raise RecordError(key, f"must be a string, but is {kind(value)}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        problem = f"has half of a surrogate pair ({value[error.start]!a}) as its character {error.start}"
        raise RecordError(key, f"{problem}, which no tokenizer can take") from None
    return value


def as_number(value: Any, key: str) -> float:
    """Checks that a value is a number, or text that says one.

    Args:
        value (Any): the value.
        key (str): where it is, for the message.

    Returns:
        float: the number.

    Raises:
        RecordError: if it is something else.
    """
    number = value
    if isinstance(value, str):
        try:
            number = float(value)
        except ValueError:
            number = None
    if isinstance(number, bool) or not isinstance(number, (int, float)) or math.isnan(number):
        raise RecordError(key, f"must be a number, but is {kind(value)}{_shown(value)}")
    return number


def kind(value: Any) -> str:
    """What kind of value something is, in JSON's words."""
    names = {str: "a string", list: "a list", dict: "an object", bool: "a boolean", int: "a number", float: "a number"}
    return "missing" if value is None else names.get(type(value), f"a {type(value).__name__}")


def _shown(value: Any) -> str:
    return f" ({value})" if isinstance(value, (str, int, float)) and len(str(value)) <= 20 else ""
