"""Numbers that no config can mean, wherever they are in it."""

import math
from typing import Any

from prefix_sharing.errors import ConfigError

_LARGEST = 2**63 - 1

_MAX_LAYERS = 10_000

_SIZES = ("num_", "max_seq_len", "_dim", "_size", "_rank")
"""How arguments of models and tokenizers that are sizes begin or end."""


def check_numbers(key: str, value: Any) -> None:
    """Refuses numbers that are not finite, or too large for any computation.

    Args:
        key (str): the key of the value, for messages.
        value (Any): a plain value; lists and mappings are gone through.

    Raises:
        ConfigError: naming the first such number's key.
    """
    if isinstance(value, dict):
        for name, part in value.items():
            check_numbers(f"{key}.{name}" if key else str(name), part)
    elif isinstance(value, list):
        for part in value:
            check_numbers(key, part)
    elif isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(key, f"must be finite, but is {value}")
    elif isinstance(value, (int, float)) and abs(value) > _LARGEST:
        raise ConfigError(key, f"must be below 2^63, but is {value:.3g}")


def check_sizes(key: str, arguments: dict[str, Any]) -> None:
    """Refuses sizes of a model or tokenizer that are below 1, and numbers of layers that nobody has.

    Args:
        key (str): ``model`` or ``tokenizer``, for messages.
        arguments (dict[str, Any]): what is given to the component.

    Raises:
        ConfigError: naming the argument.
    """
    for name, value in arguments.items():
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if is_number and (name.startswith(_SIZES) or name.endswith(_SIZES)) and not value >= 1:
            raise ConfigError(f"{key}.{name}", f"must be at least 1, but is {value}")
        if is_number and name == "num_layers" and value > _MAX_LAYERS:
            raise ConfigError(f"{key}.{name}", f"must be at most {_MAX_LAYERS:,}, but is {value:,}")
