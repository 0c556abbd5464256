"""How numbers of things are said."""


def counted(number: int, thing: str) -> str:
    """A number of things, such as ``1 step`` and ``1,200 steps``.

    Args:
        number (int): how many.
        thing (str): what one of them is called; several have an s behind it.

    Returns:
        str: both.
    """
    return f"{number:,} {thing}" if number == 1 else f"{number:,} {thing}s"
