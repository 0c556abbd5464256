"""A run any of whose processes is killed or stopped: the others end, one of them says why, and the run continues."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from kill_and_resume import SECONDS_TO_END, kill_and_resume
from runs import SHORT, as_overrides, read_log

RECIPE = """
from prefix_sharing.distributed import watch
watch._SECONDS, watch._PATIENCE = 0.5, 6
from prefix_dpo_distributed import recipe_main
if __name__ == "__main__":
    recipe_main()
"""
"""The distributed recipe, but of whose ranks none is waited for long."""

KEYS = SHORT | {"num_workers": 1, "epochs": 50, "dataset_val": None, "seed": 0, "self_check": False}


def ranks_of(launcher):
    """Its processes by rank."""
    found = {}
    for status in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            if int(status.read_text().rpartition(")")[2].split()[1]) == launcher:
                variables = (status.parent / "environ").read_bytes().split(b"\0")
                found |= {int(v[5:]): int(status.parent.name) for v in variables if v.startswith(b"RANK=")}
    return found


def alive(directory):
    """Processes that work there, workers of ranks included; one that is stopped is not counted."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            stopped = (process / "stat").read_text().rpartition(")")[2].split()[0] in "TZ"
            if (process / "cwd").resolve() == directory and not stopped:
                found.append(int(process.name))
    return found


@pytest.fixture
def launched(tmp_path):
    """A run on two ranks with a worker each, once it is training."""
    (tmp_path / "impatient.py").write_text(RECIPE)
    command = [Path(sys.executable).with_name("tune"), "run", "--nproc_per_node", "2", "impatient.py"]
    command += ["--config", "quickstart/distributed", "output_dir=out", *as_overrides(KEYS)]
    with (tmp_path / "said.txt").open("w") as said:
        launcher = subprocess.Popen(command, cwd=tmp_path, stdout=said, stderr=said)
    while not read_log(tmp_path / "out"):
        assert launcher.poll() is None, (tmp_path / "said.txt").read_text()[-3000:]
        time.sleep(0.1)
    yield launcher
    for process in (*alive(tmp_path), *ranks_of(launcher.pid).values()):
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)
    launcher.wait()


def wait_until_gone(directory, seconds):
    until = time.monotonic() + seconds
    while alive(directory) and time.monotonic() < until:
        time.sleep(0.1)
    assert alive(directory) == []


@pytest.mark.slow
def test_nothing_outlives_a_launcher_that_is_killed(launched, tmp_path):
    assert len(alive(tmp_path)) >= 4  # ranks and their workers
    launched.kill()
    launched.wait()
    wait_until_gone(tmp_path, SECONDS_TO_END)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP], ids=lambda number: number.name)
def test_a_rank_that_ended_or_hangs_is_named_and_takes_the_others_along(launched, tmp_path, number):
    ranks = ranks_of(launched.pid)
    os.kill(ranks[1], number)
    until = time.monotonic() + 30
    while "does not answer" not in (tmp_path / "said.txt").read_text() and time.monotonic() < until:
        time.sleep(0.1)
    if number == signal.SIGSTOP:
        os.kill(ranks[1], signal.SIGKILL)  # as the launcher does after half a minute
    assert launched.wait(30) != 0
    lines = (tmp_path / "said.txt").read_text().replace("\r", "\n").splitlines()
    (said,) = (line[line.index("Error: ") :] for line in lines if "does not answer" in line)
    assert said.removeprefix("Error: rank 0: ").removeprefix("Error: ") == (
        "rank 1 does not answer: the process has ended or hangs; resume=auto continues from the last checkpoint."
    )
    wait_until_gone(tmp_path, SECONDS_TO_END)


@pytest.mark.slow
def test_a_run_that_is_killed_at_random_moments_is_the_same_run(tmp_path):
    keys = SHORT | {"epochs": 2, "dataset_val": None, "seed": 0, "save_every_n_steps": 1, "self_check": False}
    arguments = ["prefix_dpo_single_device", "--config", "quickstart/single_device", *as_overrides(keys)]
    faults = kill_and_resume(tmp_path, arguments, 2)
    faults.pop("moments that did not come")  # so short a run may be over before
    assert not any(faults.values()), faults
