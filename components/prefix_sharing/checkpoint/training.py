"""Training checkpoints: all that it takes to continue a run from a step, on any number of ranks.

A checkpoint is a directory ``step_<n>``: tensors in safetensors files, of which each rank writes and reads its own part
(``torch.distributed.checkpoint``), and ``checkpoint.json`` with everything else, with size and checksum of every file,
and at its end with a checksum of itself. It is written under another name while training goes on, and renamed when all
of it is on the disk, so that it is either whole or not there. No file of it is a pickle.
"""

import json
import logging
import re
import shutil
import time
import warnings
from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import xxhash
from torch import nn
from torch.distributed.checkpoint import HuggingFaceStorageReader
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from prefix_sharing.checkpoint.state import UNFINISHED, readable_size
from prefix_sharing.checkpoint.tensor_files import TensorFileWriter, bring_to_disk, describe_file
from prefix_sharing.distributed import broadcast_object, is_rank_zero, sum_over_ranks, this_rank
from prefix_sharing.distributed.ranks import all_gather_objects
from prefix_sharing.errors import UserError

log = logging.getLogger(__name__)

# What it says of one process, from other threads as well, is as it should be.
warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")

_ABOUT, _CHECKSUM = "checkpoint.json", "xxh3"

_TRAINED = StateDictOptions(ignore_frozen_params=True, flatten_optimizer_state_dict=True)


@dataclass(frozen=True)
class TrainingCheckpoint:
    """A checkpoint on the disk, whole.

    Attributes:
        directory (Path): where it is.
        step (int): optimizer steps done.
        run_id (str): ``id`` of the run that saved it.
        values (dict[str, Any]): what the run saved besides tensors of model and optimizer.
        content (dict[str, Any]): everything in ``checkpoint.json``.
    """

    directory: Path
    step: int
    run_id: str
    values: dict[str, Any]
    content: dict[str, Any]


@dataclass(frozen=True)
class _Pending:
    """What is being written."""

    written: Future
    writer: TensorFileWriter
    directory: Path
    content: dict[str, Any]
    size: int


class TrainingCheckpoints:
    """Writes a run's training checkpoints. Every method is a collective.

    Args:
        directory (Path): where they go.
        run (Mapping[str, Any]): what they belong to; what decides a run's numbers, by name.
        keep_last_n (int): how many stay; older ones are deleted when a newer one is whole.
    """

    def __init__(self, directory: Path, run: Mapping[str, Any], keep_last_n: int) -> None:
        self._directory = directory
        self._run = dict(run)
        self._keep_last_n = keep_last_n
        self._pending: _Pending | None = None
        # Writing goes on beside training, whose collectives must not meet those of writing.
        self._group = dist.new_group(backend="gloo") if dist.is_initialized() else None

    def save(
        self,
        step: int,
        model: nn.Module,
        optimizer: Optimizer,
        lr_scheduler: LRScheduler | None,
        values: Mapping[str, Any],
    ) -> None:
        """Begins to write a checkpoint, from a copy of what is to be saved.

        Args:
            step (int): optimizer steps done.
            model (nn.Module): what of it is trained is saved.
            optimizer (Optimizer): its optimizer.
            lr_scheduler (LRScheduler | None): its schedule.
            values (Mapping[str, Any]): what else to remember, as JSON can say it.

        Raises:
            UserError: if the one before could not be written.
        """
        self.wait()
        directory = self._directory / f"step_{step}{UNFINISHED}"
        if is_rank_zero():
            shutil.rmtree(directory, ignore_errors=True)
        tensors, others = _apart(_state(model, optimizer))
        content = {
            "step": step,
            "saved": time.strftime("%Y-%m-%d %H:%M:%S"),
            "run": self._run,
            "values": dict(values),
            "lr_scheduler": None if lr_scheduler is None else lr_scheduler.state_dict(),
            "others": others,
        }
        try:
            json.dumps(content)  # what cannot be written is to be known at once
        except TypeError as error:
            raise UserError(f"The state of optimizer or schedule cannot be saved: {error}.") from error
        writer = TensorFileWriter(directory)
        written = dcp.async_save(tensors, storage_writer=writer, process_group=self._group, no_dist=self._group is None)
        size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        self._pending = _Pending(cast(Future, written), writer, directory, content, size)

    def poll(self) -> None:
        """Gives the checkpoint that is being written its name, if every rank has written its part."""
        if self._pending is None:
            return
        is_done = torch.tensor([float(self._pending.written.done())])
        if int(sum_over_ranks(is_done)) == this_rank().world_size:
            self._finish(self._pending)

    def wait(self) -> None:
        """Waits for the checkpoint that is being written, and gives it its name."""
        if self._pending is not None:
            self._finish(self._pending)

    def _finish(self, pending: _Pending) -> None:
        self._pending = None
        files, problem = {}, None
        try:
            pending.written.result()
            files = pending.writer.files
        except (OSError, RuntimeError, dcp.CheckpointException) as error:
            problem = _could_not_be_written(pending, error)
        found = all_gather_objects((files, problem))
        problems = [problem for _, problem in found if problem is not None]
        if not problems and is_rank_zero():
            try:
                self._make_visible(pending, {name: about for files, _ in found for name, about in files.items()})
            except OSError as error:
                problems = [_could_not_be_written(pending, error)]
        problem = broadcast_object(problems[0] if problems else None)
        if problem is not None:
            if is_rank_zero():
                shutil.rmtree(pending.directory, ignore_errors=True)
            raise UserError(f"{problem}. The checkpoints before it are whole; resume=auto continues from the last one.")

    def _make_visible(self, pending: _Pending, files: dict[str, dict[str, Any]]) -> None:
        content = pending.content | {"files": files}
        (pending.directory / _ABOUT).write_bytes(_with_checksum(content))
        bring_to_disk(pending.directory / _ABOUT)
        bring_to_disk(pending.directory)
        directory = pending.directory.with_suffix("")
        shutil.rmtree(directory, ignore_errors=True)
        pending.directory.rename(directory)
        bring_to_disk(self._directory)  # before older ones are deleted: the power may fail
        log.info("Training state saved to %s", directory)
        # Later ones, which are damaged or another run's, are not what this run would continue from.
        own = [found for found in find_checkpoints(self._directory) if _step_of(found) <= content["step"]]
        for older in own[: -self._keep_last_n]:
            shutil.rmtree(older, ignore_errors=True)


def find_checkpoints(directory: Path) -> list[Path]:
    """Those that have their name, whole or damaged.

    Args:
        directory (Path): where a run writes them.

    Returns:
        list[Path]: oldest first.
    """
    found = [path for path in directory.glob("step_*") if re.fullmatch(r"step_\d+", path.name)]
    return sorted(found, key=_step_of)


def is_checkpoint(directory: Path) -> bool:
    """Whether a directory is a training checkpoint, be it damaged or not."""
    return (directory / _ABOUT).is_file()


def newest_checkpoint(directory: Path, run_id: str | None) -> TrainingCheckpoint | None:
    """Finds a run's newest checkpoint that is whole, and says which are not; a collective.

    Args:
        directory (Path): where the run writes them.
        run_id (str | None): ``id`` of the run; None for any.

    Returns:
        TrainingCheckpoint | None: None if there is none.
    """
    for candidate in reversed(broadcast_object(find_checkpoints(directory))):
        try:
            found = read_checkpoint(candidate)
        except UserError as error:
            if is_rank_zero():
                log.warning("%s An older one is looked for.", error)
            continue
        if run_id in (None, found.run_id):
            return found
        if is_rank_zero():
            log.warning("%s is another run's. An older one is looked for.", candidate)
    return None


def read_checkpoint(directory: Path) -> TrainingCheckpoint:
    """Reads what is said of a checkpoint, and checks every file of it; a collective.

    Args:
        directory (Path): the checkpoint.

    Returns:
        TrainingCheckpoint: the same on every rank.

    Raises:
        UserError: if there is none, or a file is missing or has changed.
    """
    rank, world_size = this_rank()
    found, problem = None, None
    try:
        written = (directory / _ABOUT).read_bytes()
        content = json.loads(written)
        del content[_CHECKSUM]
        if _with_checksum(content) != written:
            problem = f"{_ABOUT} is not what was written"
        found = TrainingCheckpoint(directory, content["step"], content["run"]["id"], content["values"], content)
        for name, expected in sorted(content["files"].items())[rank::world_size]:
            if not (directory / name).is_file():
                problem = f"{name} is missing"
            elif describe_file(directory / name) != expected:
                problem = f"{name} is not what was written"
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        problem = f"{_ABOUT} cannot be read ({type(error).__name__})"
    problem = next(filter(None, all_gather_objects(problem)), None)
    if problem is not None or found is None:
        raise UserError(f"The checkpoint {directory} is damaged: {problem}.")
    return found


def load_checkpoint_into(
    checkpoint: TrainingCheckpoint, model: nn.Module, optimizer: Optimizer, lr_scheduler: LRScheduler | None
) -> None:
    """Puts model, optimizer and schedule where a checkpoint found them, on any number of ranks; a collective.

    Args:
        checkpoint (TrainingCheckpoint): the checkpoint.
        model (nn.Module): the model.
        optimizer (Optimizer): its optimizer.
        lr_scheduler (LRScheduler | None): its schedule.

    Raises:
        UserError: if it is another model's.
    """
    state = _state(model, optimizer)
    tensors, _ = _apart(state)
    _read_into(tensors, checkpoint)
    state |= tensors | checkpoint.content["others"]
    set_model_state_dict(model, _part(state, "model."), options=StateDictOptions(strict=False))
    set_optimizer_state_dict(model, optimizer, _part(state, "optimizer."), options=_TRAINED)
    if lr_scheduler is not None and checkpoint.content["lr_scheduler"] is not None:
        lr_scheduler.load_state_dict(checkpoint.content["lr_scheduler"])


def load_optimizer_state_into(checkpoint: TrainingCheckpoint, model: nn.Module, optimizer: Optimizer) -> None:
    """Gives an optimizer the moments that a checkpoint has; its learning rate and the like stay. A collective.

    Args:
        checkpoint (TrainingCheckpoint): the checkpoint.
        model (nn.Module): the model, which stays as it is.
        optimizer (Optimizer): its optimizer.

    Raises:
        UserError: if it is another model's, or another optimizer's.
    """
    state = _state(model, optimizer)
    moments = {name: tensor for name, tensor in _apart(state)[0].items() if name.startswith("optimizer.state.")}
    _read_into(moments, checkpoint)
    set_optimizer_state_dict(model, optimizer, _part(state | moments, "optimizer."), options=_TRAINED)


def _read_into(tensors: dict[str, torch.Tensor], checkpoint: TrainingCheckpoint) -> None:
    """Reads tensors by name; of sharded ones each rank reads its part."""
    try:
        dcp.load(
            tensors,
            storage_reader=HuggingFaceStorageReader(str(checkpoint.directory)),
            no_dist=not dist.is_initialized(),
        )
    except (dcp.CheckpointException, RuntimeError, ValueError) as error:
        problem = " ".join(str(error).split())[:300]
        raise UserError(f"The checkpoint {checkpoint.directory} does not fit the model: {problem}") from error


def _state(model: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
    named = {f"model.{name}": value for name, value in get_model_state_dict(model, options=_TRAINED).items()}
    of_optimizer = get_optimizer_state_dict(model, optimizer, options=_TRAINED)
    return named | {f"optimizer.{name}": value for name, value in of_optimizer.items()}


def _apart(state: Mapping[str, Any]) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    tensors = {name: value for name, value in state.items() if isinstance(value, torch.Tensor)}
    return tensors, {name: value for name, value in state.items() if name not in tensors}


def _part(state: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}


def _could_not_be_written(pending: _Pending, error: BaseException) -> str:
    # What the file system said is at the end of what torch says, whose exceptions hold those of the ranks.
    reason = " ".join(str(error).split())[-300:]
    found = re.findall(r"\[Errno \d+\] [\w ]+|[\w ]+ \(os error \d+\)", reason)
    free = readable_size(shutil.disk_usage(pending.directory.parent).free)
    return (
        f"{pending.directory} could not be written ({found[-1].strip() if found else reason}); it takes "
        f"{readable_size(pending.size)}, and {free} are free there"
    )


def _with_checksum(content: dict[str, Any]) -> bytes:
    """What ``checkpoint.json`` holds: its last key is a checksum of the others, and what is read gives it again."""
    checksum = xxhash.xxh3_128_hexdigest(json.dumps(content).encode())
    return json.dumps(content | {_CHECKSUM: checksum}, indent=1).encode()


def _step_of(directory: Path) -> int:
    return int(directory.name.removeprefix("step_"))
