"""How the tensors of a training checkpoint get into files: as they lie in memory, each written once."""

import json
import os
from pathlib import Path
from typing import Any, cast

import torch
import xxhash
from safetensors.torch import save_file
from torch.distributed.checkpoint import HuggingFaceStorageWriter, SavePlan, SavePlanner
from torch.distributed.checkpoint.planner import TensorWriteData
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from prefix_sharing.torch_private import PLACES_IN_TENSORS


class TensorFileWriter(HuggingFaceStorageWriter):
    """Writes each rank's part of the tensors into a safetensors file, ``shard-<rank + 1>.safetensors``.

    The base class makes all bytes of a file in memory before it writes them, which takes a copy and several times the
    processor's time. ``HuggingFaceStorageReader`` reads both.

    Args:
        directory (Path): where they go.

    Attributes:
        files (dict[str, dict[str, Any]]): what ``describe_file`` says of those that this rank has written, by name.
    """

    def __init__(self, directory: Path) -> None:
        super().__init__(str(directory), save_distributed=True)
        self.files: dict[str, dict[str, Any]] = {}

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Writes a rank's part, and waits until it is on the disk.

        Args:
            plan (SavePlan): what this rank writes: tensors, nothing else.
            planner (SavePlanner): knows them.

        Returns:
            Future[list[WriteResult]]: done.
        """
        tensors, places, results = {}, {}, []
        for item in plan.items:
            tensor = cast(torch.Tensor, planner.resolve_data(item)).detach().cpu().contiguous()
            tensors[item.index.fqn] = tensor
            places[item.index.fqn] = {"saved_offsets": cast(TensorWriteData, item.tensor_data).chunk.offsets}
            results.append(WriteResult(item.index, tensor.nbytes, None))
        if tensors:
            file = Path(self.path) / f"shard-{plan.storage_data['shard_index']:05}.safetensors"
            save_file(tensors, file, metadata={PLACES_IN_TENSORS: json.dumps(places)})
            bring_to_disk(file)
            self.files[file.name] = describe_file(file)
        done: Future[list[WriteResult]] = Future()
        done.set_result(results)
        return done


def describe_file(file: Path) -> dict[str, Any]:
    """Size and checksum of a file, by which damage is found.

    Args:
        file (Path): the file.

    Returns:
        dict[str, Any]: ``size`` in bytes, and ``xxh3``.
    """
    digest = xxhash.xxh3_128()
    with file.open("rb") as stream:
        while block := stream.read(2**24):
            digest.update(block)
    return {"size": file.stat().st_size, "xxh3": digest.hexdigest()}


def bring_to_disk(path: Path) -> None:
    """Waits until a file or directory is on the disk, and not only in memory.

    Args:
        path (Path): what was written.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError:
        if not path.is_dir():  # for which some file systems cannot
            raise
    finally:
        os.close(descriptor)
