"""Processes of their own that start at once: forked from one that has imported what recipes import.

A fresh interpreter takes longer for its imports than most runs of a test take.
"""

import gc
import multiprocessing
import os
import subprocess
import sys
import tempfile
from multiprocessing.connection import wait
from pathlib import Path
from pkgutil import resolve_name

import datasets
import torch
from torch.distributed import TCPStore

_forks = multiprocessing.get_context("forkserver")
_forks.set_forkserver_preload(["prefix_dpo_distributed", "prefix_dpo_single_device"])


def _run(main, arguments, cwd, environment, outputs, start_method):
    gc.freeze()
    multiprocessing.set_start_method(start_method, force=True)  # of what this process starts itself
    for descriptor, file in enumerate(outputs, start=1):
        os.dup2(os.open(file, os.O_WRONLY | os.O_APPEND | os.O_CREAT), descriptor)
    os.chdir(cwd)
    os.environ.update(environment)
    datasets.config.HF_DATASETS_CACHE = Path(environment.get("HF_DATASETS_CACHE", Path(cwd) / "datasets_cache"))
    torch.set_num_threads(1)
    sys.argv = list(arguments)
    resolve_name(main)()


def run_forked(main, arguments, cwd, environments=({},), timeout=300):
    """Calls a function in processes of its own, one for each environment, as if each had been started anew.

    Args:
        main: the function, as ``"module:function"``.
        arguments: what is in ``sys.argv``.
        cwd: the directory they run in.
        environments: for each process what is added to its environment.
        timeout: after how many seconds they are stopped.

    Returns:
        What ``subprocess.run`` would return, of all of them together. If one fails, the others are stopped.
    """
    with tempfile.TemporaryDirectory() as directory:
        start_method = multiprocessing.get_start_method()
        outputs = [f"{directory}/stdout", f"{directory}/stderr"]
        started = [
            _forks.Process(target=_run, args=(main, arguments, cwd, environment, outputs, start_method))
            for environment in environments
        ]
        for process in started:
            process.start()
        running = {process.sentinel: process for process in started}
        code = 0
        while running and code == 0:
            ended = wait(running, timeout)
            for process in [running.pop(sentinel) for sentinel in ended]:
                process.join()
                code = code or process.exitcode
            if not ended:
                code = "none: they took too long"
        for process in running.values():
            process.terminate()
            process.join()
        stdout, stderr = (Path(file).read_text() for file in outputs)
    return subprocess.CompletedProcess(arguments, code, stdout, stderr)


def run_on_ranks(main, arguments, cwd, num_processes, timeout=300, *, on_nodes_of_their_own=False):
    """The same in one process group, with what torchrun tells its processes.

    On nodes of their own they have no cache in common.
    """
    store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    shared = {
        "WORLD_SIZE": str(num_processes),
        "LOCAL_WORLD_SIZE": str(num_processes),
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_RUN_ID": "none",
        "TORCHELASTIC_RESTART_COUNT": "0",
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }
    ranks = [shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(num_processes)]
    if on_nodes_of_their_own:
        for rank, environment in enumerate(ranks):
            environment |= {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "GROUP_RANK": str(rank)}
            environment["HF_DATASETS_CACHE"] = str(Path(cwd) / f"node_{rank}")
    return run_forked(main, arguments, cwd, ranks, timeout)
