"""Building the components that a config names with ``_component_``."""

import contextlib
import inspect
import logging
import os
import sys
from collections.abc import Callable, Iterator
from pkgutil import resolve_name
from typing import Any

from omegaconf import DictConfig, OmegaConf
from torchtune import config
from torchtune.training import metric_logging

from prefix_sharing.config.annotations import fits, in_words, may_be_list
from prefix_sharing.config.files import did_you_mean
from prefix_sharing.config.foreign import called_here
from prefix_sharing.errors import ConfigError, UserError

log = logging.getLogger(__name__)

_BUGS = (AttributeError, LookupError, NameError, AssertionError, ArithmeticError)
"""What a component raises because of its code rather than its arguments; its traceback is logged."""

_DROP_UNKNOWN = (metric_logging.DiskLogger, metric_logging.TensorBoardLogger)
"""Components that take arguments of any name and make no use of them."""

_USUAL_PLACES = {
    "loss": "prefix_sharing.losses",
    "optimizer": "torch.optim",
    "metric_logger": "torchtune.training.metric_logging",
}
"""Where components are whose names are given without a module."""

_VARIADIC = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


def instantiate(key: str, node: DictConfig, *args: Any, **kwargs: Any) -> Any:
    """Builds a component of the config; what it refuses becomes a sentence that names the key.

    Args:
        key (str): the config's key, for messages.
        node (DictConfig): its value, with ``_component_``.
        *args (Any): positional arguments of the component.
        **kwargs (Any): keyword arguments, which take precedence over the config's.

    Returns:
        Any: the component.

    Raises:
        ConfigError: if the component cannot be built.
    """
    with explained(key, node._component_):
        return config.instantiate(node, *args, **kwargs)


def component_name(node: DictConfig) -> str:
    """What a component of the config is called, without its module."""
    return node._component_.rsplit(".", 1)[-1]


def check_component(key: str, node: Any) -> None:
    """Checks that a component exists and takes the arguments that are given to it, as far as its annotations tell.

    Args:
        key (str): the config's key.
        node (Any): its value.

    Raises:
        ConfigError: if it does not.
    """
    if not OmegaConf.is_dict(node) or not isinstance(node.get("_component_"), str):
        raise ConfigError(key, "must name its component with _component_")
    component = find_component(key, node._component_)
    parameters = _parameters(component)
    if parameters is None:
        return
    kinds = {parameter.kind for parameter in parameters.values()}
    if component in _DROP_UNKNOWN:
        kinds.discard(inspect.Parameter.VAR_KEYWORD)
    names = [name for name, p in parameters.items() if p.kind not in _VARIADIC]
    values: Any = OmegaConf.to_container(node, resolve=True)
    for argument, value in values.items():
        if argument == "_component_":
            continue
        if argument in names:
            annotation = parameters[argument].annotation
            if not fits(value, annotation):
                raise ConfigError(f"{key}.{argument}", f"must be {in_words(annotation)}, but is {value!r}")
        elif inspect.Parameter.VAR_KEYWORD not in kinds:
            suggestion = called_here(f"{key}.{argument}", [key]) or did_you_mean(argument, names)
            end = f".{suggestion}" if suggestion else f"; remove it (~{key}.{argument} on the command line)"
            raise ConfigError(f"{key}.{argument}", f"unknown argument of {node._component_}{end}")


def find_component(key: str, path: Any) -> Callable[..., Any]:
    """The function or class that a config names.

    Args:
        key (str): the config's key.
        path (Any): its dotted path.

    Returns:
        Callable[..., Any]: the component.

    Raises:
        ConfigError: if there is none.
    """
    if not isinstance(path, str):
        raise ConfigError(key, f"must name its component with _component_, by a dotted path, not by {path}")
    if os.getcwd() not in sys.path:  # components in the user's own directory, as torchtune finds them
        sys.path.append(os.getcwd())
    try:
        component = resolve_name(path)
    except (ImportError, AttributeError, ValueError) as error:
        end = _component_like(key, path) or f": {one_line(error)}"
        raise ConfigError(key, f"component '{path}' not found{end}") from error
    if inspect.ismodule(component):
        raise ConfigError(key, f"{path} is a module; name a class or function in it")
    return component


def _component_like(key: str, path: str) -> str:
    """The end of a sentence about a component that is not there: one of nearly that name where it is looked for."""
    module, _, name = path.rpartition(".")
    place = module or _USUAL_PLACES.get(key, "")
    with contextlib.suppress(ImportError, AttributeError, ValueError):
        classes = [each for each, value in vars(resolve_name(place)).items() if inspect.isclass(value)]
        suggestion = did_you_mean(name, classes)
        return f".{suggestion if module else suggestion.replace(name, f'{place}.{name}')}" if suggestion else ""
    return ""


def default_of(component: Callable[..., Any], argument: str) -> Any:
    """The default of a component's argument; None where it takes none such."""
    parameter = (_parameters(component) or {}).get(argument)
    return None if parameter is None or parameter.default is inspect.Parameter.empty else parameter.default


def takes_list(component: Callable[..., Any], argument: str) -> bool:
    """Whether a component's argument is annotated as one that may be a list."""
    parameter = (_parameters(component) or {}).get(argument)
    return parameter is not None and may_be_list(parameter.annotation)


@contextlib.contextmanager
def explained(key: str, what: str | None = None) -> Iterator[None]:
    """Turns what the body raises over a key's value into an error that names the key.

    Args:
        key (str): the key. An error about a key below it gets the whole path.
        what (str | None): what refuses the value, such as the component. Default: None.

    Yields:
        None: to the body.

    Raises:
        ConfigError: for any exception of the body.
    """
    try:
        yield
    except ConfigError as error:
        raise ConfigError(f"{key}.{error.key}", error.problem) from error
    except UserError as error:
        raise ConfigError(key, str(error)) from error
    except Exception as error:
        if isinstance(error, _BUGS):
            log.error("Exception while building %s", key, exc_info=True)
        raise ConfigError(key, one_line(error) if what is None else f"{what}: {one_line(error)}") from error


def one_line(error: BaseException) -> str:
    """An error's message on one line, without its full stop."""
    text = " ".join(str(error).split()) or type(error).__name__
    return (text if len(text) <= 400 else f"{text[:400]} ...").rstrip(".")


def _parameters(component: Callable[..., Any]) -> dict[str, inspect.Parameter] | None:
    """A component's parameters by name; None for what has no signature, such as some functions written in C."""
    for eval_str in (True, False):  # annotations that are strings may name what only a type checker imports
        with contextlib.suppress(Exception):
            return dict(inspect.signature(component, eval_str=eval_str).parameters)
    return None
