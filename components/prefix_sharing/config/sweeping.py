"""Lists on the command line as values to be tried one after the other: the axes of a sweep, and the points of its grid.

``loss.beta=[0.01,0.1]`` is an axis; several are a grid. A list in the config's file stays what it is. For a key that
takes a list itself, a list on the command line could mean either, and is refused: its axis is a list of lists.
"""

import itertools
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from omegaconf import DictConfig, OmegaConf

from prefix_sharing.config.components import find_component, one_line, takes_list
from prefix_sharing.config.schema import COMPONENTS
from prefix_sharing.errors import ConfigError
from prefix_sharing.fingerprint import fingerprint

_SET_BY_THE_SWEEP = (
    "output_dir",
    "checkpointer.output_dir",
    "metric_logger.log_dir",
    "resume",
    "overwrite_output_dir",
)

_LONGEST_NAME = 80
"""Characters of a run's name, which is that of a directory."""


@dataclass(frozen=True)
class Axis:
    """A key with the values that it takes by turns.

    Attributes:
        key (str): the dotted key.
        values (tuple[Any, ...]): plain values; a mapping changes what it names of the config's.
    """

    key: str
    values: tuple[Any, ...]


Point = tuple[Any, ...]
"""A value of each axis."""


def take_axes(arguments: Sequence[str], own: Collection[str] = ()) -> tuple[list[Axis], list[str]]:
    """Takes the keys with a list of values from the arguments of a command.

    Args:
        arguments (Sequence[str]): such as ``--config C loss.beta=[0.01,0.1] epochs=2``.
        own (Collection[str]): keys that are never swept, nor what is below them. Default: ().

    Returns:
        tuple[list[Axis], list[str]]: the axes, and the arguments that are left.

    Raises:
        ConfigError: if a list cannot be read, is empty, or has a value twice.
    """
    axes: list[Axis] = []
    left: list[str] = []
    for argument in arguments:
        key, _, text = argument.partition("=")
        if not text.lstrip().startswith("[") or key.startswith(("-", "~")) or key.partition(".")[0] in own:
            left.append(argument)
            continue
        try:
            values = OmegaConf.select(OmegaConf.from_dotlist([argument]), key, throw_on_missing=True)
            plain: Any = OmegaConf.to_container(values)
        except Exception as error:
            raise ConfigError(key, f"{text} cannot be read as a list: {one_line(error)}") from error
        if not isinstance(plain, list) or not plain:
            raise ConfigError(key, "the list of values to try is empty")
        if any(value in plain[:i] for i, value in enumerate(plain)):
            raise ConfigError(key, f"a value is there twice in {text}")
        axes.append(Axis(key, tuple(plain)))
    return axes, left


def check_axes(cfg: DictConfig, axes: Sequence[Axis]) -> None:
    """Refuses axes that cannot be, and lists that might be meant as one value.

    Args:
        cfg (DictConfig): the config without them, as read.
        axes (Sequence[Axis]): the axes.

    Raises:
        ConfigError: if a key is there twice, is set by the sweep itself, or takes a list.
    """
    keys = [axis.key for axis in axes]
    for axis in axes:
        if keys.count(axis.key) > 1:
            raise ConfigError(axis.key, "given twice; put all values to try into one list")
        if axis.key in _SET_BY_THE_SWEEP:
            raise ConfigError(axis.key, "set for each run by the sweep, so it cannot be swept")
        if _takes_list(cfg, axis.key) and not all(isinstance(value, list) for value in axis.values):
            problem = (
                "takes a list itself: values to try are a list of lists, and [[a, b]] sets it to [a, b] in all runs"
            )
            raise ConfigError(axis.key, problem)
    names = [run_name(axes, point) for point in grid(axes)]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ConfigError(axes[0].key, f"two runs would be called {twice}; write the values so that they differ")


def _takes_list(cfg: DictConfig, key: str) -> bool:
    if key.rpartition(".")[2] == "data_files":  # which datasets.load_dataset takes one or several of
        return True
    if OmegaConf.is_list(OmegaConf.select(cfg, key, throw_on_resolution_failure=False)):
        return True
    node, _, argument = key.rpartition(".")
    component = OmegaConf.select(cfg, f"{node}._component_") if node in COMPONENTS else None
    return component is not None and takes_list(find_component(node, component), argument)


def grid(axes: Sequence[Axis]) -> list[Point]:
    """Every combination of the axes' values, the last axis fastest."""
    return list(itertools.product(*(axis.values for axis in axes)))


def config_at(cfg: DictConfig, axes: Sequence[Axis], point: Point) -> DictConfig:
    """The config with the values of a point.

    Args:
        cfg (DictConfig): the config without them, as read.
        axes (Sequence[Axis]): the axes.
        point (Point): a value of each.

    Returns:
        DictConfig: another config.

    Raises:
        ConfigError: if there is no place for a key.
    """
    cfg = cfg.copy()
    for axis, value in zip(axes, point, strict=True):
        key = axis.key
        try:
            is_node = OmegaConf.is_dict(OmegaConf.select(cfg, key, throw_on_resolution_failure=False))
            if is_node and isinstance(value, str):  # as torchtune reads loss=NAME
                key = f"{key}._component_"
            OmegaConf.update(cfg, key, value, merge=is_node and isinstance(value, dict), force_add=True)
        except Exception as error:
            raise ConfigError(key, f"cannot be set to {value}: {one_line(error)}") from error
    return cfg


def short_names(axes: Sequence[Axis]) -> list[str]:
    """What each axis is called in names and tables: the last part of its key, or all of it where that is not enough."""
    last = [axis.key.removesuffix("._component_").rpartition(".")[2] for axis in axes]
    return [name if last.count(name) == 1 else axis.key for name, axis in zip(last, axes, strict=True)]


def label(value: Any) -> str:
    """A value as it is shown, such as ``0.05``, ``DPOLoss`` or ``data_files: a.jsonl, split: train``."""
    if isinstance(value, dict):
        return ", ".join(f"{key}: {label(part)}" for key, part in value.items())
    if isinstance(value, list):
        return f"[{', '.join(map(label, value))}]"
    if isinstance(value, str) and value.startswith("prefix_sharing."):
        return value.rpartition(".")[2]
    return "null" if value is None else str(value)


def run_name(axes: Sequence[Axis], point: Point) -> str:
    """The name of a point's run, and of its directory.

    Args:
        axes (Sequence[Axis]): the axes.
        point (Point): a value of each.

    Returns:
        str: such as ``beta=0.05,lr=1e-06``; what a directory's name should not have is ``_``. Where that or its length
            would make two names one, there is a fingerprint of the values behind it.
    """
    whole = ",".join(f"{name}={label(value)}" for name, value in zip(short_names(axes), point, strict=True))
    name = re.sub(r"[^\w.,=+-]+", "_", whole)
    return name if name == whole and len(name) <= _LONGEST_NAME else f"{name[:_LONGEST_NAME]}_{fingerprint(point)[:6]}"
