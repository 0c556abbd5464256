"""Finding config files by name, and building the components they name."""

import contextlib
import difflib
import inspect
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from torchtune import config

from prefix_sharing.errors import UserError

log = logging.getLogger(__name__)


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
        raise UserError(f"Config: '{name}' is neither a file nor a known name{nearest(name, config_names())}.")
    return str(file)


def instantiate(key: str, node: DictConfig, *args: Any, **kwargs: Any) -> Any:
    """Builds a component of the config; what it refuses becomes a sentence that names the key.

    Args:
        key (str): the config's key, for messages.
        node (DictConfig): its value, with ``_component_``.
        *args (Any): handed on.
        **kwargs (Any): handed on, over the config's.

    Returns:
        Any: the component.

    Raises:
        UserError: if the component cannot be built.
    """
    with explained(f"{key}: {node._component_}"):
        return config.instantiate(node, *args, **kwargs)


def component_name(node: DictConfig) -> str:
    """What a component of the config is called, without its module."""
    return node._component_.rsplit(".", 1)[-1]


@contextlib.contextmanager
def explained(what: str) -> Iterator[None]:
    """Turns what a component raises over its input into a sentence that begins with ``what``.

    Args:
        what (str): the key and the component.

    Yields:
        None: to the body, whose errors are turned.

    Raises:
        UserError: for any exception of the body.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        log.debug("%s", what, exc_info=True)
        raise UserError(f"{what}: {one_line(error)}.") from error


def source_of(component: Any) -> str | None:
    """The source of a function or class, which tells two versions of it apart; None where there is none.

    Args:
        component (Any): a function, a class, or None.

    Returns:
        str | None: its text, without that of what it calls.
    """
    try:
        return inspect.getsource(component)
    except (OSError, TypeError):
        return None


def nearest(name: str, known: list[str]) -> str:
    """The end of a sentence about an unknown name: which known one is nearest to it."""
    matches = difflib.get_close_matches(name, known, n=1, cutoff=0.0)
    return f"; the nearest one is '{matches[0]}'" if matches else ""


def one_line(error: BaseException) -> str:
    """An error's message on one line, without its full stop."""
    text = " ".join(str(error).split()) or type(error).__name__
    return (text if len(text) <= 400 else f"{text[:400]} ...").rstrip(".")


def _config_directories() -> list[Path]:
    """Where this package's configs lie: beside the code when installed, at the top of a source tree."""
    package = Path(__file__).parent
    return [d for d in (package / "configs", package.parents[1] / "configs") if d.is_dir()]
