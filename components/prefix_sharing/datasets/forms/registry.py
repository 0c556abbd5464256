"""The forms there are, and telling which one a data set has."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from prefix_sharing.config.files import did_you_mean
from prefix_sharing.datasets.forms import annotated, pairs, ranked, single
from prefix_sharing.datasets.forms.comparison import Comparison
from prefix_sharing.datasets.forms.messages import is_transcript
from prefix_sharing.datasets.forms.prompt import SOURCES
from prefix_sharing.datasets.forms.record import NAMES, Record, kind
from prefix_sharing.errors import ConfigError, UserError


@dataclass(frozen=True)
class Form:
    """A form that records come in.

    Attributes:
        name (str): what the key ``format`` calls it.
        needs (tuple[tuple[str, ...], ...]): its columns; of several names in one place, any will do.
        read (Callable[[Record], Comparison]): reads a record.
        fits (Callable[[Record], bool] | None): what a record with these columns must hold to be recognized.
        by_prompt (bool): whether the answers of one prompt are in several records.
    """

    name: str
    needs: tuple[tuple[str, ...], ...]
    read: Callable[[Record], Comparison]
    fits: Callable[[Record], bool] | None = None
    by_prompt: bool = False


def _chosen_is(*types: type) -> Callable[[Record], bool]:
    return lambda record: isinstance(record.get("chosen"), types)


_PAIR = (("chosen",), ("rejected",))

FORMS = {
    form.name: form
    for form in (
        Form("ranked", (SOURCES, ("responses",)), ranked.read_ranked),
        Form(
            "rejected_response",
            (("messages", "query"), ("rejected_response", "rejected_messages")),
            pairs.read_rejected_response,
        ),
        Form("steps", (SOURCES, ("initial_reason_steps",), *_PAIR), pairs.read_steps),
        Form("hh", _PAIR, pairs.read_transcripts, lambda record: is_transcript(record.get("chosen"))),
        Form("messages", _PAIR, pairs.read_pair, _chosen_is(list, dict)),
        Form("text", (SOURCES, *_PAIR), pairs.read_pair, _chosen_is(str)),
        Form("shared_beginning", _PAIR, pairs.read_shared_beginning, _chosen_is(str)),
        Form("nectar", (("prompt",), ("answers",)), ranked.read_nectar),
        Form("shp", (("history",), ("human_ref_A",), ("human_ref_B",), ("labels",)), annotated.read_shp),
        Form(
            "safe_rlhf",
            (("prompt",), ("response_0",), ("response_1",), ("better_response_id",)),
            annotated.read_safe_rlhf,
        ),
        Form("tldr_comparison", (("info",), ("summaries",), ("choice",)), annotated.read_tldr_comparison),
        Form(
            "helpsteer2_preference",
            (("prompt",), ("response_1",), ("response_2",), ("preference_strength",)),
            annotated.read_helpsteer2_preference,
        ),
        Form(
            "helpsteer3",
            (("context",), ("response1",), ("response2",), ("overall_preference",)),
            annotated.read_helpsteer3,
        ),
        Form("helpsteer2", (("prompt",), ("response",), ("helpfulness",)), ranked.read_helpsteer2, by_prompt=True),
        Form(
            "alpaca_eval",
            (("instruction",), ("output_1",), ("output_2",), ("preference",)),
            annotated.read_alpaca_eval,
        ),
        Form(
            "unpaired",
            (("completion", "output", "messages", "conversations"), ("label", "kto_tag")),
            single.read_unpaired,
            single.has_verdict,
        ),
        Form(
            "output_pair",
            (("instruction",), ("output",)),
            pairs.read_output_pair,
            lambda record: isinstance(record.get("output"), list),
        ),
        Form("chat", (("messages", "conversations"),), single.read_chat),
        Form("completion", (SOURCES, single.ANSWERS), single.read_completion, single.is_completion),
    )
}
"""Every form by its name, in the order in which they are tried."""


def recognize_form(
    records: Sequence[Mapping[str, Any]], columns: Mapping[str, str | None], where: str
) -> tuple[Form, str]:
    """Tells the form of a data set from its first records.

    Args:
        records (Sequence[Mapping[str, Any]]): a few records.
        columns (Mapping[str, str | None]): the user's ``column_map``.
        where (str): where they come from, for the message.

    Returns:
        tuple[Form, str]: the form, and what it was recognized by.

    Raises:
        UserError: if no form fits.
    """
    for form in FORMS.values():
        found = [_columns_of(form, Record(values, columns)) for values in records]
        having = [(record, names) for record, names in found if names is not None]
        fitting = [(record, names) for record, names in having if form.fits is None or form.fits(record)]
        if fitting and 2 * len(fitting) >= len(having):  # a few malformed records do not decide
            return form, _describe(*fitting[0])
    names = ", ".join(column_names(records))
    missing = _only_one_missing(Record(dict.fromkeys(column_names(records), True), columns))
    raise UserError(
        f"{where}: its columns {names} match no known form{missing}: chosen and rejected, prompt and responses, "
        "messages, or one of those that docs/data.md lists; rename columns with column_map, or make records of a known "
        "form with record_fn."
    )


def _columns_of(form: Form, record: Record) -> tuple[Record, list[str] | None]:
    """A record with which of the columns that a form needs it has; None unless it has one in each place."""
    found = [next((name for name in names if name in record), None) for names in form.needs]
    names = [name for name in found if name is not None]
    return record, names if len(names) == len(form.needs) else None


def _only_one_missing(record: Record) -> str:
    """The column without which a record has no form, in brackets; nothing where there is none or a choice of them."""
    lacking: dict[tuple[str, ...], int] = {}  # with how many columns that are there
    for form in FORMS.values():
        there = [names for names in form.needs if any(name in record for name in names)]
        absent = [names for names in form.needs if names not in there]
        if not absent:  # what is in the columns is at fault
            return ""
        if len(absent) == 1 and any(names[0] not in SOURCES for names in there):
            lacking[absent[0]] = max(len(there), lacking.get(absent[0], 0))
    nearest = [names for names, found in lacking.items() if found == max(lacking.values())]
    return f" ({' or '.join(nearest[0])} is missing)" if len(nearest) == 1 else ""


def _describe(record: Record, names: Sequence[str]) -> str:
    return "columns " + ", ".join(f"{record.key(name)} ({kind(record.get(name))})" for name in dict.fromkeys(names))


def choose_form(name: str, records: Sequence[Mapping[str, Any]], columns: Mapping[str, str | None]) -> Form:
    """The form of a name, checked against the columns there are.

    Args:
        name (str): its name.
        records (Sequence[Mapping[str, Any]]): a few records.
        columns (Mapping[str, str | None]): the user's ``column_map``.

    Returns:
        Form: the form.

    Raises:
        ConfigError: if there is no such form, or a column it needs is missing.
    """
    if name not in FORMS:
        raise ConfigError("format", f"unknown format '{name}'; choose from {', '.join(FORMS)}")
    form, readers = FORMS[name], [Record(values, columns) for values in records]
    for names in form.needs:
        if not any(one in record for one in names for record in readers):
            missing = " or ".join(f"'{Record({}, columns).key(one)}'" for one in names)
            there = ", ".join(column_names(records))
            raise ConfigError("format", f"{name} needs a column {missing}, but the columns are {there}")
    return form


def check_column_map(columns: Mapping[str, str | None], records: Sequence[Mapping[str, Any]]) -> None:
    """Checks the user's ``column_map``.

    Args:
        columns (Mapping[str, str | None]): the actual name of a column for a name that forms know.
        records (Sequence[Mapping[str, Any]]): a few records.

    Raises:
        ConfigError: if no form has such a name, or the data no such column.
    """
    known = list(dict.fromkeys([*NAMES, *(name for form in FORMS.values() for names in form.needs for name in names)]))
    there = column_names(records)
    for name, column in columns.items():
        if name not in known:
            problem = f"no form has a column of this name.{did_you_mean(name, known)}"
            if name in there and column in known:
                problem += f" It is {column}: {name} if {name} is your name of it."
            raise ConfigError(f"column_map.{name}", problem)
        if column is not None and column not in there:
            problem = f"there is no column '{column}'; the columns are {', '.join(there)}.{did_you_mean(column, there)}"
            raise ConfigError(f"column_map.{name}", problem)


def column_names(records: Sequence[Mapping[str, Any]]) -> list[str]:
    """The columns that any of some records has.

    Args:
        records (Sequence[Mapping[str, Any]]): the records.

    Returns:
        list[str]: in the order of the first record that has them.
    """
    return list(dict.fromkeys(name for record in records for name in record))
