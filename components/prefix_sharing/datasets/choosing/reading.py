"""What of a record it is chosen by: its prompt and answers as text, and numbers from its columns."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import datasets

from prefix_sharing.datasets.forms import FORMS, Comparison, Form, Record, RecordError
from prefix_sharing.datasets.forms.record import as_number
from prefix_sharing.datasets.source import Records, to_record
from prefix_sharing.datasets.tokenizing import PreferenceOptions, belong_to_map, prepare_record, processes_for
from prefix_sharing.errors import UserError
from prefix_sharing.fingerprint import code_fingerprint, fingerprint, source_of

SCORE_COLUMNS = (
    ("score_chosen", "score_rejected"),
    ("chosen_score", "rejected_score"),
    ("chosen_rating", "rejected_rating"),
)
"""Columns of scores that are known by their names, chosen and rejected."""

SCORES, RAW = OF_ANSWERS = ("scores", "raw")
"""The names of numbers that are read of answers: scores, and a reward model's raw values."""

_FEATURES = {
    "prompt_key": datasets.Value("string"),  # fingerprint of all that the model is given
    "answers_key": datasets.Value("string"),  # fingerprint of all turns
    "prompt": datasets.Value("large_string"),  # its turns as JSON
    "answers": datasets.Sequence(datasets.Value("large_string")),  # best first
    "one_prompt": datasets.Value("bool"),  # whether all answers have this prompt
    "num_answers": datasets.Value("int32"),
    "length": datasets.Value("int32"),  # of the best answer
    "problem": datasets.Value("string"),  # of the numbers
}
_NUMBERS = datasets.Sequence(datasets.Value("float64"))


@dataclass(frozen=True)
class RecordReader:
    """Reads the records of a data set once more, for what they are chosen by.

    Attributes:
        records (Records): the records.
        form (Form): how to read them.
        options (PreferenceOptions): how they are prepared.
        scores (tuple[str, ...]): columns with the scores of the answers; none for those that the form itself reads or
            that have a name of ``SCORE_COLUMNS``.
    """

    records: Records
    form: Form
    options: PreferenceOptions
    scores: tuple[str, ...] = ()

    def read(self, columns: Mapping[str, Sequence[str]]) -> datasets.Dataset:
        """A line for each record, in parallel, cached by ``datasets``.

        Args:
            columns (Mapping[str, Sequence[str]]): columns of the numbers that are asked for by name; for those of
                ``SCORES`` the reader's own come first.

        Returns:
            datasets.Dataset: prompt, answers and numbers of each; empty where a record cannot be read.
        """
        rows = self.records.rows
        named = {name: (self.scores if name == SCORES else ()) or tuple(given) for name, given in columns.items()}
        return rows.map(
            _ReadRecord(self.form, self.options, self.records.is_json, named),
            remove_columns=rows.column_names,
            features=datasets.Features({**_FEATURES, **dict.fromkeys(columns, _NUMBERS)}),
            num_proc=processes_for(len(rows)),
            desc=f"Reading {self.records.name}",
        )


@dataclass(frozen=True)
class _ReadRecord:
    form: Form
    options: PreferenceOptions
    is_json: bool
    columns: Mapping[str, tuple[str, ...]]
    source: str | None = field(init=False)  # a function is hashed by its name alone
    code: str = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "source", source_of(self.options.record_fn))
        object.__setattr__(self, "code", code_fingerprint("datasets"))

    def __getstate__(self) -> dict[str, Any]:
        # Only what decides the result, so that it is found again when something else changes.
        options = PreferenceOptions(column_map=self.options.column_map, record_fn=self.options.record_fn)
        return {**self.__dict__, "form": self.form.name, "options": options}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, form=FORMS[state["form"]])
        belong_to_map()

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        line: dict[str, Any] = {name: [] for name in self.columns}
        line |= {"prompt_key": "", "answers_key": "", "prompt": "", "answers": [], "one_prompt": False}
        line |= {"num_answers": 0, "length": 0, "problem": ""}
        try:
            values = prepare_record(to_record(row, self.is_json), self.options.record_fn)
            comparison = self.form.read(Record(values, self.options.column_map))
        except (RecordError, UserError, ValueError):
            return line  # tokenizing says what is wrong with it
        prompts = [turns[:-1] for turns in comparison.conversations]
        answers = [str(turns[-1].get("content", "")) for turns in comparison.conversations]
        line["prompt_key"] = fingerprint([prompts[0], comparison.tools, comparison.template_kwargs])
        line["answers_key"] = fingerprint(comparison.conversations)
        line["prompt"] = json.dumps(prompts[0], ensure_ascii=False)
        line["answers"] = answers
        line["one_prompt"] = all(prompt == prompts[0] for prompt in prompts)
        line["num_answers"] = len(answers)
        line["length"] = len(answers[0])
        try:
            for name, columns in self.columns.items():
                line[name] = _numbers(name, columns, values, comparison)
        except RecordError as error:
            line["problem"] = f"{error.key} {error.problem}"
        return line


def _numbers(
    name: str, columns: Sequence[str], values: Mapping[str, Any], comparison: Comparison
) -> list[float | None]:
    """Numbers of a record: of its answers, best first, unless the name is of something else."""
    expected, order = len(comparison.conversations), comparison.order
    if name == SCORES and not columns:
        if comparison.scores is not None:
            return list(comparison.scores)
        columns = next((names for names in SCORE_COLUMNS if names[0] in values), ())
        if len(columns) != expected:
            return []
        order = [0, 1]  # the chosen one is the better one, whichever is first in the record
    found, keys = [values.get(column) for column in columns], list(columns)
    if len(found) == 1 and isinstance(found[0], list):
        found, keys = found[0], [f"{columns[0]}[{i}]" for i in range(len(found[0]))]
    numbers = [_number(value, key) for value, key in zip(found, keys, strict=True)]
    if all(number is None for number in numbers):
        return []
    if name not in OF_ANSWERS:
        if None in numbers:
            raise RecordError(columns[0], "has an element that is no number")
        if name == "complexity" and len(numbers) > 1:
            raise RecordError(columns[0], f"must be one number, but has {len(numbers)}")
        return numbers
    if len(numbers) != expected:
        problem = f"must have {expected} scores, one for each answer, but has {len(numbers)}"
        if len(columns) > 1:
            problem = f"is one of {len(columns)} columns of scores, but this record has {expected} answers"
        raise RecordError(columns[0], problem)
    return [numbers[i] for i in order]


def _number(value: Any, key: str) -> float | None:
    if _is_missing(value):
        return None
    number = as_number(value, key)
    if math.isinf(number):
        raise RecordError(key, f"must be finite, but is {number}")
    return number


def _is_missing(value: Any) -> bool:
    return value is None or value == "" or (isinstance(value, float) and math.isnan(value))
