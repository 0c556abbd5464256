"""What torchtune 0.6.1 leaves wrong in a directory it has written for transformers, PEFT and vLLM.

It copies every file of the base model but its weights, whatever it is. So ``config.json`` states the base model's
dtype, and it lies next to adapters, which transformers then takes for a whole model. And an adapter does not say what
it is of.
"""

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torchtune.training.checkpointing._utils import SUFFIXES_TO_NOT_COPY

from prefix_sharing.checkpoint import complete_file
from prefix_sharing.hosts.companions import is_companion

_INDEX_FILES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
_ADAPTER_CONFIG = "adapter_config.json"
_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
"""What the header of a safetensors file calls dtypes, with torch's names."""


_DESCRIPTIONS = ("config.json", "params.json")
"""What describes a base model, in Hugging Face's format and in Meta's."""


def remove_unknown_copies(epoch_dir: Path, base: Path) -> None:
    """Removes copies of files that do not belong to a model, such as notes or passwords next to it.

    Args:
        epoch_dir (Path): what a checkpointer has written after an epoch.
        base (Path): the base model's directory.
    """
    for path in sorted(epoch_dir.rglob("*"), reverse=True):  # what is in a directory before the directory
        if path.is_dir():
            if not any(path.iterdir()):
                path.rmdir()
        elif (base / path.relative_to(epoch_dir)).exists() and not _belongs(path):
            path.unlink()


def _belongs(file: Path) -> bool:
    is_written = file.name.endswith(tuple(SUFFIXES_TO_NOT_COPY)) or file.name == _ADAPTER_CONFIG
    return is_written or file.name in _DESCRIPTIONS or is_companion(file)


def complete_export(epoch_dir: Path, base_config: Path | None, *, adapter_only: bool) -> None:
    """Completes what a checkpointer has written after an epoch.

    Args:
        epoch_dir (Path): where it is.
        base_config (Path | None): the base model's ``config.json``; None where the format is not Hugging Face's.
        adapter_only (bool): whether an adapter was saved alone.
    """
    if base_config is None:
        return
    _remove_copied_adapter_configs(epoch_dir)
    adapter_config = epoch_dir / _ADAPTER_CONFIG
    if adapter_config.exists():
        # Where the weights were read from, whatever hub they once came from.
        _update(adapter_config, base_model_name_or_path=str(base_config.parent.resolve()))
    if not adapter_only:
        _put_adapter_apart(epoch_dir)
        _describe_weights(epoch_dir)
    elif epoch_dir.resolve() != base_config.parent.resolve():
        for name in ("config.json", *_INDEX_FILES):
            (epoch_dir / name).unlink(missing_ok=True)


def _remove_copied_adapter_configs(epoch_dir: Path) -> None:
    """Those of the base model's directory, which have no weights next to them."""
    for file in epoch_dir.rglob(_ADAPTER_CONFIG):
        if not any(file.parent.glob("adapter_model*")):
            file.unlink()


def _put_adapter_apart(epoch_dir: Path) -> None:
    """Moves PEFT's files: next to a whole model, transformers would apply the adapter a second time."""
    for file in list(epoch_dir.glob("adapter_*")):
        if file.suffix != ".pt":
            (epoch_dir / "adapter").mkdir(exist_ok=True)
            file.replace(epoch_dir / "adapter" / file.name)


def _describe_weights(epoch_dir: Path) -> None:
    """Has ``config.json`` state the dtype of the weights, and the index list those that are there."""
    index_file = next((epoch_dir / name for name in _INDEX_FILES if (epoch_dir / name).exists()), None)
    if index_file is None:
        return
    weight_map = json.loads(index_file.read_text(encoding="utf-8"))["weight_map"]
    elements: Counter[str] = Counter()
    found = {}
    for name in sorted(set(weight_map.values())):
        if (epoch_dir / name).exists():
            for key, dtype, size in _tensors(epoch_dir / name):
                found[key] = name
                elements[dtype] += size
    _update(index_file, weight_map={key: found[key] for key in weight_map if key in found})
    (dtype, _), *_ = elements.most_common()
    # transformers 5 reads the one and vLLM through it, older versions of both read the other.
    _update(epoch_dir / "config.json", dtype=dtype, torch_dtype=dtype)


def _tensors(file: Path) -> Iterator[tuple[str, str, int]]:
    """Name, dtype and number of elements of every tensor in a file, without reading what is in them."""
    if file.suffix == ".safetensors":
        with safe_open(file, framework="pt") as weights:
            for key in weights.keys():  # noqa: SIM118 (it is no mapping)
                tensor = weights.get_slice(key)
                dtype = tensor.get_dtype()
                yield key, _DTYPES.get(dtype, dtype), torch.Size(tensor.get_shape()).numel()
    else:
        for key, tensor in torch.load(file, map_location="cpu", weights_only=True, mmap=True).items():
            yield key, str(tensor.dtype).removeprefix("torch."), tensor.numel()


def _update(file: Path, **values: Any) -> None:
    """Sets keys of a JSON file by replacing it: what it may be a link to stays as it is."""
    content = json.loads(file.read_text(encoding="utf-8")) | values
    complete_file(file, json.dumps(content, indent=2, ensure_ascii=False) + "\n")
