"""Finding config files by name, and what they are for."""

import difflib
import re
from collections.abc import Sequence
from pathlib import Path

from prefix_sharing.errors import UserError

_ALIKE = 0.7
"""How like a known name an unknown one has to be, of 1: below, ``fused`` is taken for ``seed``."""


def config_names() -> list[str]:
    """Names of this package's configs, such as ``quickstart/single_device``."""
    return sorted(
        str(file.relative_to(directory).with_suffix(""))
        for directory in _config_directories()
        for file in directory.rglob("*.yaml")
    )


def find_config(name: str) -> str:
    """The file of a config given by path or by name.

    Args:
        name (str): such as ``my_config.yaml`` or ``quickstart/single_device``.

    Returns:
        str: the path.

    Raises:
        UserError: if there is none.
    """
    candidates = [Path(name), *(directory / f"{name}.yaml" for directory in _config_directories())]
    file = next((file for file in candidates if file.is_file()), None)
    if file is None:
        suggestion = did_you_mean(name, config_names()) or " prefix-tune ls lists the configs of this package."
        raise UserError(f"Config '{name}' not found.{suggestion}")
    return str(file)


def recipe_of(file: str) -> str | None:
    """The recipe that a config is for, which its first line names.

    Args:
        file (str): the config's path.

    Returns:
        str | None: the recipe's name; None if the line names none, as in torchtune's own configs.
    """
    with open(file) as lines:
        match = re.match(r"# Config for (\w+)\.py", lines.readline())
    return match[1] if match else None


def did_you_mean(name: str, known: Sequence[str]) -> str:
    """The end of a sentence about an unknown name: a known one that is like it, if there is any.

    Args:
        name (str): the unknown name.
        known (Sequence[str]): the known ones.

    Returns:
        str: such as " Did you mean 'batch_size'?", or nothing.
    """
    matches = [one for one in known if one.lower() == name.lower()]
    matches = matches or difflib.get_close_matches(name, known, n=1, cutoff=_ALIKE)
    return f" Did you mean '{matches[0]}'?" if matches else ""


def _config_directories() -> list[Path]:
    """Where this package's configs are: next to the code when installed, at the top of a source tree."""
    package = Path(__file__).parents[1]
    return [d for d in (package / "configs", package.parents[1] / "configs") if d.is_dir()]
