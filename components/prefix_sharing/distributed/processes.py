"""Processes that a run starts: none lives on without the one that started it."""

import ctypes
import signal
import sys

_PR_SET_PDEATHSIG = 1


def end_with_parent(number: int) -> None:
    """Has the kernel send this process a signal when its parent ends, however it does; on Linux.

    Args:
        number (int): the signal.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, number)


def belong_to_parent() -> None:
    """Leaves to the parent what Ctrl-C in a terminal means, and ends with it. For a process that works for another."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    end_with_parent(signal.SIGKILL)
