"""Kills a run with SIGKILL at random moments, resumes it each time until it is done, and compares it with a whole run.

    python tests/support/kill_and_resume.py DIRECTORY -- prefix_dpo_single_device --config CONFIG key=value ...

What follows ``--`` is what ``tune run`` gets; several processes with ``--nproc_per_node 2 prefix_dpo_distributed``.
Prints a line for every kill, then what the two runs have in common; the exit status is 1 if that is not everything.
Linux only: processes that were left are found in ``/proc``.
"""

import argparse
import contextlib
import os
import random
import re
import secrets
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

MARK = "KILL_AND_RESUME"
"""Variable in the environment of every process of a run, by which those that are left are found."""

POLL = 0.002
SECONDS_TO_END = 10


@dataclass(frozen=True)
class Moment:
    """Where in a run to kill it.

    Attributes:
        name (str): for the table.
        has_come (Callable[[Run, int], bool]): whether a run is there, at or after a step.
        spread (float): up to how many seconds later to kill it.
        cold (bool): whether the run needs empty caches to come there.
    """

    name: str
    has_come: Callable[["Run", int], bool]
    spread: float
    cold: bool = False


MOMENTS = (
    Moment("in tokenizing", lambda run, _: any(run.datasets_cache.rglob("*")), 0.5, cold=True),
    Moment("in the reference pass", lambda run, _: "reference log-probs" in run.said(), 0.7, cold=True),
    Moment("in a step", lambda run, step: run.last_step() >= step, 0.5),
    Moment("in a save", lambda run, step: run.is_writing("checkpoints/step_*.writing", step), 0.05),
    Moment("in the export", lambda run, step: run.is_writing("epoch_*.writing", step), 0.03),
)


class Run:
    """A run in a directory of its own, with its own caches.

    Args:
        directory (Path): for ``output_dir``, caches and what the processes say.
        arguments (list[str]): of ``tune run``.
    """

    def __init__(self, directory: Path, arguments: list[str]) -> None:
        self.directory = directory
        self.output_dir = directory / "out"
        self.datasets_cache = directory / "datasets_cache"
        self.reference_cache = directory / "reference_cache"
        self._mark = secrets.token_hex(8)
        self._said = directory / "said.txt"
        caches = [f"output_dir={self.output_dir}", f"reference.cache_dir={self.reference_cache}", "resume=auto"]
        self._command = [str(Path(sys.executable).with_name("tune")), "run", *arguments, *caches]
        directory.mkdir(parents=True, exist_ok=True)

    def start(self, *, cold: bool = False) -> subprocess.Popen:
        """Starts it, or continues it, in a process group of its own."""
        if cold:
            for cache in (self.datasets_cache, self.reference_cache):
                shutil.rmtree(cache, ignore_errors=True)
        environment = {**os.environ, MARK: self._mark, "HF_DATASETS_CACHE": str(self.datasets_cache)}
        with self._said.open("w") as said:
            return subprocess.Popen(
                self._command, cwd=self.directory, env=environment, stdout=said, stderr=said, start_new_session=True
            )

    def said(self) -> str:
        """What the processes of the last start have said."""
        return self._said.read_text(errors="replace")

    def finish(self) -> None:
        """Starts it, or continues it, and waits for its end."""
        if self.start().wait() != 0:
            raise SystemExit(f"The run failed:\n{self.said()[-3000:]}")

    def kill_at(self, moment: Moment, step: int, rng: random.Random) -> bool:
        """Continues it and kills it at or after a step; false if it ended before that moment came."""
        process = self.start(cold=moment.cold)
        while not moment.has_come(self, step):
            if process.poll() is not None:
                if process.returncode != 0:
                    raise SystemExit(f"The run failed:\n{self.said()[-3000:]}")
                return False
            time.sleep(POLL)
        time.sleep(rng.uniform(0, moment.spread))
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        return process.wait() == -signal.SIGKILL

    def losses(self) -> list[tuple[int, float]]:
        """Every entry of its log that has a loss: the step and the loss."""
        files = sorted((self.output_dir / "logs").glob("log_*.txt"))
        text = "".join(file.read_text() for file in files)
        return [(int(step), float(loss)) for step, loss in re.findall(r"^Step (\d+) \| loss:(\S+)", text, re.M)]

    def last_step(self) -> int:
        """The last step in its log."""
        return max((step for step, _ in self.losses()), default=0)

    def last_saved(self) -> int:
        """The step of its newest training checkpoint."""
        names = (path.name for path in (self.output_dir / "checkpoints").glob("step_*"))
        return max((int(name[5:]) for name in names if name[5:].isdecimal()), default=0)

    def is_writing(self, pattern: str, step: int) -> bool:
        """Whether it is writing such a directory, at or after a step."""
        return any(self.output_dir.glob(pattern)) and self.last_step() >= step

    def left_over(self) -> list[str]:
        """Directories that were begun and not finished."""
        found = [path for ending in ("writing", "before") for path in self.output_dir.rglob(f"*.{ending}")]
        return sorted(str(path.relative_to(self.output_dir)) for path in found)

    def processes(self) -> list[int]:
        """Those that are alive, a while after the end if there are any."""
        until = time.monotonic() + SECONDS_TO_END
        while (found := list(self._alive())) and time.monotonic() < until:
            time.sleep(0.1)
        return found

    def _alive(self):
        mark = f"{MARK}={self._mark}".encode()
        for path in Path("/proc").glob("[0-9]*/environ"):
            with contextlib.suppress(OSError):
                if mark in path.read_bytes().split(b"\0"):
                    yield int(path.parent.name)


def kill_and_resume(directory: Path, arguments: list[str], num_kills: int, *, seed: int = 0) -> dict[str, list]:
    """Runs the whole thing and prints its table.

    Args:
        directory (Path): an empty one.
        arguments (list[str]): of ``tune run``.
        num_kills (int): how often to kill the run.
        seed (int): decides the moments. Default: 0.

    Returns:
        dict[str, list]: what is not as it should be, by name; each list is empty if all is well.
    """
    whole = Run(directory / "whole", arguments)
    whole.finish()
    killed = Run(directory / "killed", arguments)
    rng = random.Random(seed)
    num_steps = max(step for step, _ in whole.losses())
    moments = [MOMENTS[i % len(MOMENTS)] for i in range(num_kills)]
    rng.shuffle(moments)
    alive: list[int] = []
    not_reached: list[str] = []
    print(f"{'kill':>4}  {'moment':22}  {'continued from':>14}  {'last step logged':>16}  left over")
    for i, moment in enumerate(moments, start=1):
        first = killed.last_saved()
        if not killed.kill_at(moment, i * num_steps // (num_kills + 1), rng):
            not_reached.append(moment.name)
        alive += killed.processes()
        left = ", ".join(killed.left_over()) or "nothing"
        print(f"{i:>4}  {moment.name:22}  {first:>14}  {killed.last_step():>16}  {left}", flush=True)
    killed.finish()

    expected, found = dict(whole.losses()), killed.losses()
    times = Counter(step for step, _ in found)
    worst = max(abs(loss - expected[step]) / abs(expected[step]) for step, loss in found if step in expected)
    print(f"{len(expected)} steps; largest relative difference of a loss: {worst:.1e}")
    faults = {
        "losses that differ by more than 1e-6": [step for step, x in found if abs(x / expected[step] - 1) > 1e-6],
        "steps not logged exactly once": [step for step in expected | times if times[step] != 1],
        "partial directories": killed.left_over(),
        "processes alive after 10 s": alive + killed.processes(),
        "moments that did not come": not_reached,
    }
    for name, found_here in faults.items():
        print(f"{name}: {', '.join(map(str, found_here)) or 'none'}")
    return faults


def main() -> None:
    """Reads the command line and runs."""
    at = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path, help="an empty directory")
    parser.add_argument("--kills", type=int, default=20, help="how often to kill the run; default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="decides the moments; default: %(default)s")
    options = parser.parse_args(sys.argv[1:at])
    faults = kill_and_resume(options.directory.resolve(), sys.argv[at + 1 :], options.kills, seed=options.seed)
    sys.exit(any(faults.values()))


if __name__ == "__main__":
    main()
