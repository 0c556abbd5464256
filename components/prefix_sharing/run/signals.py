"""Stopping at the end of a step when asked to."""

import contextlib
import os
import signal
import sys
import time
from collections.abc import Iterator
from types import FrameType
from typing import Protocol

import torch
import torch.distributed as dist

from prefix_sharing.distributed import sum_over_ranks

_SECOND = 1.0
"""Seconds after which a signal is another one: a terminal and a launcher may both send the first."""

_SECONDS_ALONE = 8
"""How long a rank may take for that when its launcher was killed: others may wait for its place."""


class StopRequest:
    """Whether SIGTERM or SIGINT has come. A second one ends the process at once."""

    def __init__(self) -> None:
        self._signal = 0
        self._since = 0.0
        self._launcher = os.getppid() if dist.is_torchelastic_launched() else None

    def receive(self, number: int, frame: FrameType | None) -> None:
        """The signal handler."""
        if self._signal and time.monotonic() - self._since > _SECOND:
            sys.exit(128 + number)
        if not self._signal:
            self._signal, self._since = number, time.monotonic()
            name = signal.Signals(number).name
            print(f"{name}: stopping after this step; once more stops at once", file=sys.stderr, flush=True)
            if self._launcher not in (None, os.getppid()):
                signal.alarm(_SECONDS_ALONE)

    def exit_code(self) -> int:
        """128 and the signal's number if it came to any rank, else 0: a collective."""
        numbers = torch.zeros(2, dtype=torch.float64)
        numbers[0], numbers[1] = self._signal, float(self._signal > 0)
        total, count = sum_over_ranks(numbers).tolist()
        return 128 + round(total / count) if count else 0


class Recipe(Protocol):
    """What ``run_to_end`` runs."""

    def setup(self) -> None:
        """Builds what training needs."""
        ...

    def train(self, stop: StopRequest) -> None:
        """Trains, unless it is asked to stop."""
        ...

    def cleanup(self) -> None:
        """Closes what is open."""
        ...


def run_to_end(recipe: Recipe) -> int:
    """Sets a recipe up, trains, and cleans up whatever happens.

    Args:
        recipe (Recipe): a training recipe.

    Returns:
        int: 128 and the number of a signal that came too late to stop training, else 0.
    """
    try:
        recipe.setup()
        with stop_signals() as stop:
            recipe.train(stop)
            return stop.exit_code()
    finally:
        recipe.cleanup()


@contextlib.contextmanager
def stop_signals() -> Iterator[StopRequest]:
    """Receives SIGTERM and SIGINT meanwhile.

    Yields:
        StopRequest: to be asked after every step.
    """
    request = StopRequest()
    before = {number: signal.signal(number, request.receive) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
