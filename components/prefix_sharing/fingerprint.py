"""Short names for what decides a cached result, so that a cache is not read where something else is computed."""

import functools
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import xxhash

_PACKAGE = Path(__file__).parent


def fingerprint(value: Any) -> str:
    """A short name for a value made of lists, numbers and strings.

    Args:
        value (Any): the value.

    Returns:
        str: 32 hexadecimal digits.
    """
    return xxhash.xxh3_128_hexdigest(repr(value).encode())


def source_of(component: Callable[..., Any] | None) -> str | None:
    """The source of the file that a function or class is in, which tells two versions of it apart.

    Args:
        component (Callable[..., Any] | None): a function, a class, an instance that can be called, or None.

    Returns:
        str | None: the text of the file, so that what it uses of it counts as well; None where there is none.
    """
    while isinstance(component, functools.partial):
        component = component.func
    if component is None:
        return None
    defined = component if inspect.isroutine(component) or inspect.isclass(component) else type(component)
    try:
        file = inspect.getsourcefile(defined)
        return None if file is None else Path(file).read_text(encoding="utf-8")
    except (OSError, TypeError):
        return None


@functools.cache
def code_fingerprint(*parts: str, package: Path = _PACKAGE) -> str:
    """A short name for the code of some parts of this package.

    A cache that has it in its key is not read by code that computes something else, whatever the version says.

    Args:
        *parts (str): folders or modules of the package, such as ``trees`` or ``scoring.py``.
        package (Path): the package. Default: this one.

    Returns:
        str: 32 hexadecimal digits.
    """
    digest = xxhash.xxh3_128()
    for part in parts:
        path = package / part
        for file in sorted(path.rglob("*.py")) if path.is_dir() else [path]:
            digest.update(f"{file.relative_to(package).as_posix()}\0".encode())
            digest.update(file.read_bytes())
    return digest.hexdigest()
