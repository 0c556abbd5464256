"""A cache of ``datasets`` that can only be read, such as one that is shared; ``datasets`` itself has to write to it."""

import contextlib
import functools
import logging
import os
import tempfile
from pathlib import Path

log = logging.getLogger(__name__)


_kept: list[tempfile.TemporaryDirectory] = []
"""Removed when the process ends."""


def writable_cache(cache_dir: str) -> str:
    """Where ``datasets`` can find what a cache holds, and write.

    Args:
        cache_dir (str): the cache.

    Returns:
        str: the cache; if it cannot be written, a directory with links to its files, which lasts as long as the
            process.
    """
    with contextlib.suppress(OSError):
        Path(cache_dir).mkdir(parents=True, exist_ok=True)
    return cache_dir if os.access(cache_dir, os.W_OK) else _stand_in_for(cache_dir)


@functools.cache
def _stand_in_for(cache_dir: str) -> str:
    _kept.append(tempfile.TemporaryDirectory(prefix="datasets_cache_"))
    stand_in = Path(_kept[-1].name)
    log.warning("%s cannot be written; what it holds is used, and what is new goes to %s.", cache_dir, stand_in)
    for parent, _, names in os.walk(cache_dir, followlinks=True):
        directory = stand_in / Path(parent).relative_to(cache_dir)
        directory.mkdir(exist_ok=True)
        for name in names:
            if not name.endswith(".lock"):  # those are opened for writing
                (directory / name).symlink_to(Path(parent).resolve() / name)
    return str(stand_in)
