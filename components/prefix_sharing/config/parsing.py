"""From the command line to a checked config, and from an error to one line."""

import contextlib
import functools
import inspect
import os
import re
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from torchtune import config

from prefix_sharing.config.checks import check_config
from prefix_sharing.config.components import one_line
from prefix_sharing.config.files import find_config, recipe_of
from prefix_sharing.errors import UserError


def parse(config_class: type) -> Callable[[Callable[[DictConfig], None]], Callable[[], None]]:
    """Makes a recipe's main function read ``--config NAME_OR_PATH key=value ...`` as ``tune run`` hands them on.

    Config names of this package resolve as torchtune's own do. Whatever the user can put right is printed as one
    sentence, with exit status 1 and no traceback. ``prefix-tune validate`` finds the keys as ``main.config_class``.

    Args:
        config_class (type): a dataclass of the keys the recipe takes, ``TrainingConfig`` or one of your own.

    Returns:
        Callable[[Callable[[DictConfig], None]], Callable[[], None]]: the decorator.
    """

    def decorate(recipe_main: Callable[[DictConfig], None]) -> Callable[[], None]:
        @functools.wraps(recipe_main)
        def main() -> None:
            with readable_errors():
                cfg = read_config()
                meant_for = recipe_of(sys.argv[sys.argv.index("--config") + 1])
                this = Path(inspect.getfile(recipe_main)).stem
                recipe_main(check_config(cfg, config_class, meant_for if meant_for != this else None))

        main.config_class = config_class  # type: ignore[attr-defined]
        return main

    return decorate


def read_config() -> DictConfig:
    """The config named on the command line, with its overrides, by torchtune's own parser.

    Returns:
        DictConfig: as read, not checked.

    Raises:
        UserError: if there is none, or it cannot be read.
    """
    if "--config" not in sys.argv[:-1]:
        raise UserError("No config given; use --config NAME_OR_PATH.")
    name_at = sys.argv.index("--config") + 1
    sys.argv[name_at] = find_config(sys.argv[name_at])
    read: list[DictConfig] = []
    try:
        config.parse(read.append)()
    except SystemExit:  # how torchtune's parser ends, having called the function
        if not read:
            raise
    except Exception as error:
        raise UserError(f"Config '{sys.argv[name_at]}' cannot be read: {one_line(error)}.") from error
    _replace_components(read[0], sys.argv)
    return read[0]


def _replace_components(cfg: DictConfig, arguments: Sequence[str]) -> None:
    """Lets ``loss={_component_: NAME, ...}`` replace the config's loss: torchtune reads it as ``loss._component_``."""
    for key in map(str, cfg):
        named: Any = OmegaConf.select(cfg, f"{key}._component_", throw_on_resolution_failure=False)
        if OmegaConf.is_dict(named):
            given = [re.split("[.=]", argument)[1] for argument in arguments if argument.startswith(f"{key}.")]
            cfg[key] = OmegaConf.merge(named, OmegaConf.masked_copy(cfg[key], given))


@contextlib.contextmanager
def readable_errors() -> Iterator[None]:
    """Prints what the user can fix as one line and exits with status 1; a distributed run prints it once.

    Yields:
        None: to the body.
    """
    try:
        yield
    except Exception as error:
        rank = int(os.environ.get("RANK", 0))
        if rank > 0:
            # If rank 0 fails alike, its exit ends this process before it says the same once more.
            time.sleep(5)
        what = str(error)
        if not isinstance(error, UserError):
            traceback.print_exception(error)
            what = f"{type(error).__name__}: {one_line(error)}"
        where = f"rank {rank}: " if "RANK" in os.environ else ""
        print(f"Error: {where}{what}", file=sys.stderr, flush=True)
        sys.exit(1)
    except KeyboardInterrupt:
        print("Interrupted; nothing was begun that would have to be saved.", file=sys.stderr, flush=True)
        sys.exit(128 + signal.SIGINT)
