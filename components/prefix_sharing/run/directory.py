"""The ``output_dir`` of a run: one process tree at a time writes to it, and what is in it belongs to one run."""

import contextlib
import errno
import fcntl
import json
import os
import secrets
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch.optim import Optimizer

from prefix_sharing.checkpoint import (
    TrainingCheckpoint,
    complete_file,
    find_checkpoints,
    is_checkpoint,
    newest_checkpoint,
    read_checkpoint,
    remove_unfinished,
)
from prefix_sharing.checkpoint.state import readable_size
from prefix_sharing.distributed import broadcast_object, is_rank_zero
from prefix_sharing.errors import ConfigError, UserError
from prefix_sharing.hosts import TreeModel

CHECKPOINTS = "checkpoints"
"""Where training checkpoints are, below ``output_dir``."""

_LOCK, _RUN = "run.lock", "run.json"


@contextlib.contextmanager
def locked_output_dir(cfg: DictConfig) -> Iterator[None]:
    """Keeps others from writing to ``output_dir`` meanwhile, and to ``checkpointer.output_dir`` where that is another.

    The locks are the process's, and end with it in any case. What a killed run left half written there is removed.

    Args:
        cfg (DictConfig): the run's config.

    Yields:
        None: to the run.

    Raises:
        ConfigError: on every rank, if another process has a lock, or a directory cannot be written.
    """
    directories = {}  # by key, output_dir where both are the same
    for key in ("checkpointer.output_dir", "output_dir"):
        if OmegaConf.select(cfg, key) is not None:
            directories[Path(OmegaConf.select(cfg, key)).resolve()] = key
    problem = None
    with contextlib.ExitStack() as locks:
        if is_rank_zero():
            try:
                for directory, key in directories.items():
                    locks.enter_context(_locked(directory, key))
            except ConfigError as error:
                problem = error
        problem = broadcast_object(problem)
        if problem is not None:
            raise problem
        if is_rank_zero():
            for directory in directories:
                remove_unfinished(directory)
            remove_unfinished(Path(cfg.output_dir) / CHECKPOINTS)
        yield


@contextlib.contextmanager
def _locked(directory: Path, key: str) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        try:
            directory.mkdir(parents=True, exist_ok=True)
            stream = stack.enter_context((directory / _LOCK).open("a+", encoding="utf-8"))
            fcntl.lockf(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)  # which, unlike flock, no child process inherits
            stream.truncate(0)
            stream.write(f"process {os.getpid()} on {os.uname().nodename}, since {time.strftime('%Y-%m-%d %H:%M:%S')}")
            stream.flush()
        except BlockingIOError:
            stream.seek(0)
            problem = f"{directory} is in use by another run ({stream.read()}); choose another one"
            raise ConfigError(key, problem) from None
        except OSError as error:
            raise ConfigError(key, f"{directory} cannot be written: {error.strerror}") from error
        yield


@contextlib.contextmanager
def full_disk_explained(cfg: DictConfig) -> Iterator[None]:
    """Says which disk is full, of the log for instance; what is saved has messages of its own.

    Args:
        cfg (DictConfig): the run's config.

    Yields:
        None: to the run.

    Raises:
        UserError: if a disk is full.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        keys = ("output_dir", "checkpointer.output_dir", "metric_logger.log_dir")
        places = dict.fromkeys(str(OmegaConf.select(cfg, key)) for key in keys)
        rooms = [
            f"{place} has {readable_size(shutil.disk_usage(place).free)}" for place in places if Path(place).is_dir()
        ]
        raise UserError(
            f"A disk is full ({error.strerror}); free: {', '.join(rooms)}. The checkpoints are whole; make room, and "
            "resume=auto continues from the last one."
        ) from error


def find_resumed(cfg: DictConfig) -> TrainingCheckpoint | None:
    """The training checkpoint that the run continues from, as ``resume`` says; a collective.

    Args:
        cfg (DictConfig): the run's config.

    Returns:
        TrainingCheckpoint | None: None for a run that starts from the beginning.

    Raises:
        UserError: if what is asked for is not there, is damaged, or a run is there that would be lost.
    """
    directory = Path(cfg.output_dir) / CHECKPOINTS
    if cfg.resume is None:
        _make_room(cfg, directory)
        return None
    if cfg.resume == "auto":
        run = _read_run(cfg)
        found, begins_with = newest_checkpoint(directory, run.get("id")), broadcast_object(run.get("begins_with"))
        return found if found is not None or begins_with is None else read_checkpoint(Path(begins_with))
    if not Path(cfg.resume).is_dir():
        raise ConfigError("resume", f"{cfg.resume} not found; give auto, or the directory of a training checkpoint")
    if not is_checkpoint(Path(cfg.resume)):
        problem = f"{cfg.resume} is no training checkpoint; give auto, or a directory such as {directory}/step_3"
        raise ConfigError("resume", problem)
    if Path(cfg.resume).resolve().parent != directory.resolve():
        _make_room(cfg, directory)
    return read_checkpoint(Path(cfg.resume))


def check_room(cfg: DictConfig, model: TreeModel, optimizer: Optimizer) -> None:
    """Refuses a run that could not save what it is for: one training checkpoint and the model; a collective.

    Args:
        cfg (DictConfig): the run's config.
        model (TreeModel): the model.
        optimizer (Optimizer): its optimizer; of Adam's kind the state is counted, of others the weights alone.

    Raises:
        ConfigError: if there is clearly too little room.
    """
    everything = 4 * sum(parameter.numel() for parameter in model.parameters())
    trained = 4 * sum(parameter.numel() for parameter in model.trainable_parameters())
    checkpoint = trained * (3 if isinstance(optimizer, torch.optim.Adam | torch.optim.AdamW) else 1)
    exported = trained if model.has_adapter and cfg.save_adapter_weights_only else everything
    if cfg.checkpointer.get("save_dtype") == "bf16":
        exported //= 2
    a_checkpoint, the_model = f"a training checkpoint takes {readable_size(checkpoint)}", readable_size(exported)
    exports = cfg.checkpointer.output_dir
    if not is_rank_zero():
        lacking = None
    elif _disk_of(exports).st_dev == _disk_of(cfg.output_dir).st_dev:
        both = f"{a_checkpoint} and the trained model {the_model}"
        lacking = _lack_of_room("output_dir", cfg.output_dir, checkpoint + exported, both)
    else:
        lacking = _lack_of_room("output_dir", cfg.output_dir, checkpoint, a_checkpoint)
        lacking = lacking or _lack_of_room(
            "checkpointer.output_dir", exports, exported, f"the trained model takes {the_model}"
        )
    lacking = broadcast_object(lacking)
    if lacking is not None:
        raise ConfigError(*lacking)


def _lack_of_room(key: str, directory: str, size: int, what: str) -> tuple[str, str] | None:
    free = shutil.disk_usage(_existing(directory)).free
    if size <= free:
        return None
    return key, f"{directory} has {readable_size(free)} free, but {what}; choose another disk"


def _disk_of(directory: str) -> os.stat_result:
    return _existing(directory).stat()


def _existing(directory: str) -> Path:
    """A directory that is there already, or the one that it will be made in."""
    path = Path(directory).absolute()
    return next(parent for parent in (path, *path.parents) if parent.exists())


def run_id(cfg: DictConfig, resumed: TrainingCheckpoint | None, num_examples: int) -> str:
    """What the checkpoints in ``output_dir`` have in common; a collective.

    Args:
        cfg (DictConfig): the run's config.
        resumed (TrainingCheckpoint | None): what the run continues from.
        num_examples (int): of the training data set, which is remembered for ``examples_of_run``.

    Returns:
        str: that of the run that is continued, or a new one.
    """
    known = _read_run(cfg).get("id")
    goes_on = cfg.resume == "auto" and resumed is not None and known is not None
    new = broadcast_object(known if goes_on else secrets.token_hex(8))
    if is_rank_zero() and new != known:
        content = {"id": new, "started": time.strftime("%Y-%m-%d %H:%M:%S"), "examples": num_examples}
        if resumed is not None:  # which the run continues from as long as it has saved nothing itself
            content["begins_with"] = str(resumed.directory.resolve())
        complete_file(Path(cfg.output_dir) / _RUN, json.dumps(content))
    return new


def remember_log(cfg: DictConfig, file: Path) -> None:
    """Remembers a log as the run's own, wherever it is; on rank 0.

    Args:
        cfg (DictConfig): the run's config.
        file (Path): the log.
    """
    run = _read_run(cfg)
    logs = [*run.get("logs", []), str(file.resolve())]
    complete_file(Path(cfg.output_dir) / _RUN, json.dumps(run | {"logs": logs}))


def own_logs(cfg: DictConfig) -> list[Path]:
    """The logs on disk that are the run's own: those that it remembers, and whatever is in ``output_dir``."""
    log_dir = cfg.metric_logger.get("log_dir")
    files = [] if log_dir is None else sorted(Path(log_dir).glob("log_*.txt"))
    remembered, output_dir = _read_run(cfg).get("logs", []), Path(cfg.output_dir).resolve()
    return [file for file in files if str(file.resolve()) in remembered or file.resolve().is_relative_to(output_dir)]


def examples_of_run(output_dir: Path) -> int:
    """How many examples the data set has that a run was trained on.

    Args:
        output_dir (Path): the run's.

    Returns:
        int: the number.

    Raises:
        UserError: if there is no run, or it was made before this was remembered.
    """
    file = output_dir / _RUN
    try:
        return int(json.loads(file.read_text(encoding="utf-8"))["examples"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        problem = "does not say how many examples the run had" if file.is_file() else "not found"
        raise UserError(f"{file} {problem}; give the output_dir of a training run of this version.") from error


def _read_run(cfg: DictConfig) -> dict[str, Any]:
    """What ``run.json`` says; nothing if there is none."""
    with contextlib.suppress(OSError, ValueError):
        found = json.loads((Path(cfg.output_dir) / _RUN).read_text(encoding="utf-8"))
        return found if isinstance(found, dict) else {}
    return {}


def _make_room(cfg: DictConfig, directory: Path) -> None:
    """Refuses to write over another run, unless told to."""
    found = find_checkpoints(directory) if is_rank_zero() else []
    if found and cfg.overwrite_output_dir:
        shutil.rmtree(directory)
    if broadcast_object(bool(found) and not cfg.overwrite_output_dir):
        problem = f"{cfg.output_dir} holds the training checkpoints of another run"
        raise ConfigError(
            "output_dir",
            f"{problem}; resume=auto continues it, overwrite_output_dir=True replaces it, another directory keeps it",
        )
