"""Whether a value from a config can be what a component's annotation asks for."""

from collections.abc import Mapping, MutableMapping, MutableSequence, Sequence
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from torch import Tensor

_LISTS = (list, tuple, set, frozenset, Sequence, MutableSequence)
_MAPPINGS = (dict, Mapping, MutableMapping)

_WORDS = {
    bool: ("True or False", "True or False"),
    int: ("a whole number", "whole numbers"),
    float: ("a number", "numbers"),
    Tensor: ("a number", "numbers"),  # all of a tensor that YAML can write
    str: ("a string", "strings"),
}
"""One and several of each kind."""


def fits(value: Any, annotation: Any) -> bool:
    """Whether a component that is annotated so can take the value.

    Only what is certain counts: None always passes, since many an argument takes it whatever its annotation says, and
    so does anything for a class that YAML cannot write, such as ``Path``.

    Args:
        value (Any): a value from a config, its lists and mappings plain ones.
        annotation (Any): the argument's.

    Returns:
        bool: False if it cannot.
    """
    if not isinstance(value, (int, float, str, list, dict)):
        return True
    kind, parts = get_origin(annotation) or annotation, get_args(annotation)
    if kind is Annotated:
        return fits(value, parts[0])
    if kind in (Union, UnionType):
        others = [part for part in parts if part is not type(None)]
        if float in others:  # "float | Tensor" is how torch's optimizers say that a number may be on a device
            others = [part for part in others if part is not Tensor]
        return any(fits(value, part) for part in others)
    if kind is Literal:  # a choice that is not listed is left to the component
        return any(fits(value, type(choice)) for choice in parts)
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if kind is bool:
        return isinstance(value, int) and value in (0, 1)
    if kind is int:  # 1e2 is a float to YAML
        return is_number and not (isinstance(value, float) and not value.is_integer())
    if kind is float:
        return is_number
    if kind is Tensor:
        return is_number or isinstance(value, list)
    if kind is str:
        return not isinstance(value, (list, dict))
    if kind in _LISTS:
        return isinstance(value, str) or (isinstance(value, list) and _elements_fit(value, kind, parts))
    if kind in _MAPPINGS:
        return isinstance(value, dict) and (len(parts) < 2 or all(fits(each, parts[1]) for each in value.values()))
    return True


def may_be_list(annotation: Any) -> bool:
    """Whether an annotation names a list among what it asks for; ``Any`` names nothing.

    Args:
        annotation (Any): an argument's.

    Returns:
        bool: True if it does.
    """
    kind, parts = get_origin(annotation) or annotation, get_args(annotation)
    if kind is Annotated:
        return may_be_list(parts[0])
    return kind in _LISTS or (kind in (Union, UnionType) and any(map(may_be_list, parts)))


def in_words(annotation: Any) -> str:
    """What an annotation asks for, such as ``a number`` or ``a list of strings``.

    Args:
        annotation (Any): one that some value does not fit.

    Returns:
        str: for the end of a sentence.
    """
    kind, parts = get_origin(annotation) or annotation, get_args(annotation)
    if kind is Annotated:
        return in_words(parts[0])
    if kind is Literal:
        parts = tuple(type(choice) for choice in parts)
    if kind in (Union, UnionType, Literal):
        words = dict.fromkeys(in_words(part) for part in parts if part is not type(None))
        if "a number" in words:
            words.pop("a whole number", None)
        return " or ".join(words)
    if kind in _LISTS:
        elements = {in_words(part) for part in parts if part in _WORDS or get_origin(part) in (Union, UnionType)}
        several = [many for one, many in _WORDS.values() if elements == {one}]
        number = f"{len(parts)} " if _has_fixed_length(kind, parts) else ""
        return f"a list of {number}{several[0]}" if several else "a list"
    if kind in _MAPPINGS:
        return "a mapping"
    return _WORDS[kind][0]


def _elements_fit(values: list[Any], kind: Any, parts: tuple[Any, ...]) -> bool:
    if _has_fixed_length(kind, parts):
        return len(values) == len(parts) and all(map(fits, values, parts))
    return not parts or all(fits(value, parts[0]) for value in values)


def _has_fixed_length(kind: Any, parts: tuple[Any, ...]) -> bool:
    return kind is tuple and len(parts) > 0 and Ellipsis not in parts
