"""The keys of a mapping below a key of a builder, checked as those of a component are."""

import dataclasses
from collections.abc import Mapping
from typing import Any, TypeVar, get_type_hints

from omegaconf import OmegaConf

from prefix_sharing.config import explained
from prefix_sharing.config.annotations import fits, in_words
from prefix_sharing.config.files import did_you_mean
from prefix_sharing.errors import ConfigError

T = TypeVar("T")


def plain(value: Any) -> Any:
    """A value of a config as Python's own mappings and lists."""
    return OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value


def read_keys(kind: type[T], key: str, values: Mapping[str, Any], what: str) -> T:
    """Makes a dataclass of a mapping.

    Args:
        kind (type[T]): the dataclass; its fields are the keys.
        key (str): the mapping's own key, for messages.
        values (Mapping[str, Any]): the mapping.
        what (str): what the keys belong to, for messages, such as ``select by a2``.

    Returns:
        T: the dataclass.

    Raises:
        ConfigError: if a key is unknown, missing, or of the wrong type.
    """
    hints = get_type_hints(kind)
    fields = {field.name: field for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    for name, value in values.items():
        if name not in fields:
            raise ConfigError(f"{key}.{name}", f"no key of {what}.{did_you_mean(name, list(fields))}")
        if value is None or not fits(value, hints[name]):
            raise ConfigError(f"{key}.{name}", f"must be {in_words(hints[name])}, but is {value!r}")
    for name, field in fields.items():
        if name not in values and field.default is dataclasses.MISSING:
            raise ConfigError(f"{key}.{name}", f"required by {what}, but not set")
    # 1e4 is a float to YAML.
    given = {name: int(value) if hints[name] is int else value for name, value in values.items()}
    with explained(key):
        return kind(**given)
