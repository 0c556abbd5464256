"""Which ranks still live: a thread of each counts up in the launcher's store, and looks whether the others do.

A collective alone does not tell: over NCCL it ends the process without a word, and over gloo after minutes (in set-up,
hours) without a name.
"""

import os
import sys
import threading
import time
from collections.abc import Collection

import torch.distributed as dist

_SECONDS = 2.0
"""Between two counts."""

_PATIENCE = 60
"""Counts of this rank's own in which another one that lives would have counted at least once."""


class Watch:
    """Watches the other ranks; where one falls silent, the lowest of those that live says so and ends.

    Its launcher then ends the others. What is counted are the rank's own counts, not seconds, so that a run that was
    stopped and continued as a whole finds nobody missing.

    Args:
        rank (int): this one.
        world_size (int): how many there are.
    """

    def __init__(self, rank: int, world_size: int) -> None:
        self._rank = rank
        self._unchanged = [0] * world_size
        self._count = 0
        self._ended = threading.Event()
        store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
        self._store = dist.PrefixStore(f"watch/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
        self._store.set(str(rank), "0")
        self._thread = threading.Thread(target=self._run, daemon=True)

    def start(self) -> None:
        """Begins to count, once every rank has made its watch."""
        self._thread.start()

    def end(self) -> None:
        """Stops counting, since the run is about to end."""
        self._ended.set()
        self._thread.join()

    def silent(self) -> list[int]:
        """The ranks that do not count any more; takes a few seconds."""
        until = self._count + 4
        while self._thread.is_alive() and self._count < until:
            time.sleep(_SECONDS / 4)
        return [rank for rank, unchanged in enumerate(self._unchanged) if unchanged >= 2]

    def _run(self) -> None:
        ranks = [str(rank) for rank in range(len(self._unchanged))]
        seen = [b""] * len(ranks)
        while not self._ended.wait(_SECONDS):
            try:
                self._store.set(str(self._rank), str(self._count + 1))
                found = self._store.multi_get(ranks)
            except RuntimeError:  # the launcher has ended, which ends the ranks in another way
                return
            for rank, (before, now) in enumerate(zip(seen, found, strict=True)):
                self._unchanged[rank] = self._unchanged[rank] + 1 if before == now else 0
            seen = found
            self._count += 1
            gone = [rank for rank, unchanged in enumerate(self._unchanged) if unchanged >= _PATIENCE]
            if gone and self._rank == min({*range(len(ranks))} - {*gone}):
                print(f"Error: {describe(gone)}", file=sys.stderr, flush=True)
                os._exit(1)


def describe(gone: Collection[int]) -> str:
    """One sentence about ranks that do not live."""
    ranks = f"rank {min(gone)} does" if len(gone) == 1 else f"ranks {', '.join(map(str, gone))} do"
    return f"{ranks} not answer: the process has ended or hangs; resume=auto continues from the last checkpoint."
