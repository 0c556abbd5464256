"""A model's tensors in safetensors files, read and written so that no rank ever holds the whole model.

A rank reads what it keeps of each tensor, and tensors are written in the order of the layers, each gathered from the
ranks that share it and forgotten after it is written. Names and shapes in a file may differ from those in the model
(experts are apart in files and together in models): transformers' own table says how, in both directions.
"""

import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from torch.distributed.tensor import DTensor
from tqdm import tqdm
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import convert_and_load_state_dict_in_model, revert_weight_conversion
from transformers.modeling_utils import LoadStateDictConfig
from transformers.utils import logging

from prefix_sharing.distributed import is_rank_zero, local_part
from prefix_sharing.distributed.sharding import gathered_on_rank_zero
from prefix_sharing.errors import ConfigError, UserError
from prefix_sharing.hosts.fitting import check_not_all_zero, check_tensors_fit, check_values

_SINGLE_FILE, _INDEX_FILE = "model.safetensors", "model.safetensors.index.json"

_MOST_BYTES = 5_000_000_000
"""In a file."""

_FILES_OF_SHARDED = 16
"""At least as many files of a model that is sharded: rank 0 has one at a time in memory."""


def local_directory(path: str) -> Path:
    """The directory of a model, fetched from the hub if it is a name there.

    Args:
        path (str): directory, or name on the hub.

    Returns:
        Path: the directory.

    Raises:
        UserError: if there is none.
    """
    if Path(path).is_dir():
        return Path(path)
    if path.startswith(("/", ".", "~")):
        raise UserError(f"{path} not found; it must be a directory of a model, or a name on the hub.")
    try:
        return Path(snapshot_download(path, allow_patterns=["*.json", "*.jinja", "*.safetensors", "*.model", "*.txt"]))
    except (OSError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError) as error:
        raise UserError(
            f"'{path}' not found: there is no such directory, and the hub has no such model, does not let you read it, "
            f"or cannot be reached from here; where it can, tune download {path} --output-dir DIR, then give DIR."
        ) from error


def read_config(path: str) -> Any:
    """Transformers' config of a model; of a model of images and text, that of its decoder of text.

    Args:
        path (str): directory, or name on the hub.

    Returns:
        Any: a new one each time.

    Raises:
        UserError: if there is none.
    """
    directory = local_directory(path)
    if not (directory / "config.json").is_file():
        raise UserError(f"{path} has no config.json; it must be a directory of a model as transformers saves it.")
    try:
        config = AutoConfig.from_pretrained(directory).get_text_config(decoder=True)
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is no model of transformers: {' '.join(str(error).split())[:300]}") from error
    if getattr(config, "quantization_config", None) is not None:
        raise UserError(f"{path} has quantized weights, which cannot be trained; give the model they were made of.")
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise UserError(f"{path} is no decoder of text: transformers has no {config.model_type} ...ForCausalLM.")
    return config


class WeightFiles(Mapping[str, torch.Tensor]):
    """The tensors in a directory's safetensors files, each read when it is asked for.

    Of a model of images and text, those of its decoder of text.

    Args:
        directory (Path): the directory.

    Attributes:
        num_left_out (int): tensors that are not in its decoder of text.

    Raises:
        UserError: if there are none.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        index, single = directory / _INDEX_FILE, directory / _SINGLE_FILE
        if index.is_file():
            # The index decides, whatever other files there are.
            try:
                names: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            except (ValueError, KeyError, TypeError) as error:
                raise UserError(f"{index} is not the index of safetensors files; download it again.") from error
            files = {name: directory / file for name, file in names.items()}
        elif single.is_file():
            files = dict.fromkeys(_open(single).keys(), single)
        else:
            raise UserError(
                f"{directory} has no {_SINGLE_FILE} and no {_INDEX_FILE}; weights are read from these only."
            )
        for file in sorted(set(files.values())):
            if not file.is_file():
                raise UserError(f"{file} not found, which {index} names.")
        self._places = {ours: (files[name], name) for name, ours in _names_of_text(files).items()}
        self.num_left_out = len(files) - len(self._places)

    def __getitem__(self, name: str) -> torch.Tensor:
        path, name_there = self._places[name]
        return _open(path).get_tensor(name_there)

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)

    def slices(self) -> dict[str, Any]:
        """What tells the shape of a tensor and reads parts of it, by name."""
        by_file = {path: _open(path) for path in {path for path, _ in self._places.values()}}
        return {name: by_file[path].get_slice(name_there) for name, (path, name_there) in self._places.items()}


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except SafetensorError as error:
        raise UserError(f"{path} is damaged, or no safetensors file ({error}); download it again.") from error


def _names_of_text(names: Iterable[str]) -> dict[str, str]:
    """The name that a tensor has in the decoder of text, for each that belongs to it."""
    ours = {}
    for name in names:
        before, found, after = name.partition("language_model.")
        if found and before in ("", "model."):
            ours[name] = before + after
        elif name.startswith("lm_head."):
            ours[name] = name
    is_composite = any("language_model." in name for name in ours)
    return ours if is_composite else {name: name for name in names}


def read_into(tensors: Mapping[str, torch.Tensor], files: WeightFiles, config: Any) -> None:
    """Reads files into a model's tensors; of sharded ones each rank reads what it keeps.

    Args:
        tensors (Mapping[str, torch.Tensor]): parameters and buffers, overwritten, by the names that they have in the
            model as transformers builds it.
        files (WeightFiles): the files.
        config (Any): transformers' config of the model.

    Raises:
        ConfigError: if a tensor is missing, left over, or of another shape.
    """
    slices = files.slices()
    holder = _without_memory(config)
    wanted = _check_fit(slices, holder)
    for name, tensor in tensors.items():
        _put(holder, name, tensor)
    layers = [list(names) for _, names in itertools.groupby(sorted(slices, key=_layer_of), _layer_of)]
    for names in tqdm(layers, desc="Loading weights", unit="layer", disable=not is_rank_zero()):
        info = _load(holder, {name: slices[name] for name in names}, torch.device("cpu"))
        read = wanted - info.missing_keys
        with torch.no_grad():
            values = {name: local_part(holder.get_parameter_or_buffer(name)) for name in read}
            check_values({name: value for name, value in values.items() if value.is_floating_point()})
            for name in read:
                local_part(tensors[name]).copy_(values[name])
                _put(holder, name, tensors[name])  # and forget what was read
        wanted &= info.missing_keys
    check_not_all_zero({name: local_part(tensor).detach() for name, tensor in tensors.items()})
    if wanted:
        raise UserError(
            f"transformers needs more than a layer at a time to make {min(wanted)} of what is in the files."
        )


def _put(model: PreTrainedModel, name: str, tensor: torch.Tensor) -> None:
    """Has a model take a tensor for its own, so that what is read is laid out in the same way."""
    module_name, _, attribute = name.rpartition(".")
    module = model.get_submodule(module_name)
    if attribute in module._parameters:
        tensor = nn.Parameter(tensor.detach(), requires_grad=False)
    setattr(module, attribute, tensor)


def _check_fit(slices: Mapping[str, Any], model: PreTrainedModel) -> set[str]:
    """What the files have for the model, by name; found without reading them, on every rank, so that all would stop."""
    for name, part in slices.items():
        if name.endswith("weight") and part.get_dtype()[0] not in "FB":  # F32, BF16 and so on
            problem = f"{name} of the checkpoint holds {part.get_dtype()} numbers; quantized weights cannot be trained"
            raise ConfigError("path", problem)
    shapes = {name: torch.empty(part.get_shape(), device="meta") for name, part in slices.items()}
    info = _load(model, shapes, torch.device("meta"))
    expected = {name: tensor for name, tensor in model.state_dict().items() if name not in model.all_tied_weights_keys}
    given = {name: tensor for name, tensor in expected.items() if name not in info.missing_keys}
    given |= {name: shapes[name] if name in shapes else torch.empty(0) for name in info.unexpected_keys}
    given |= {name: torch.empty(shape, device="meta") for name, shape, _ in info.mismatched_keys}
    check_tensors_fit(expected, given, "path")
    return {name for name in expected if name not in info.missing_keys}


def _load(model: PreTrainedModel, tensors: Mapping[str, Any], device: torch.device) -> Any:
    conversions: Any = get_model_conversion_mapping(model)
    how = LoadStateDictConfig(device_map={"": device}, dtype=torch.float32, weight_mapping=conversions)
    shows_progress = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    info, _ = convert_and_load_state_dict_in_model(model, dict(tensors), how)
    if shows_progress:
        logging.enable_progress_bar()
    if info.conversion_errors:
        raise UserError(f"transformers cannot convert the weights: {next(iter(info.conversion_errors.values()))}")
    model._adjust_missing_and_unexpected_keys(info)
    return info


def _without_memory(config: Any) -> PreTrainedModel:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def write_from(
    tensors: Mapping[str, torch.Tensor],
    directory: Path,
    config: Any,
    *,
    dtype: torch.dtype,
    complete: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]] = lambda tensors: tensors,
) -> None:
    """Writes a model's tensors as transformers does, layer by layer; a collective if they are sharded.

    Args:
        tensors (Mapping[str, torch.Tensor]): by name, in the order of the layers, tied ones once.
        directory (Path): where the files go.
        config (Any): transformers' config of the model.
        dtype (torch.dtype): what to write.
        complete (Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]): makes of a layer's tensors those that
            the model has without an adapter. Default: nothing is changed.
    """
    is_sharded = any(isinstance(tensor, DTensor) for tensor in tensors.values())
    num_bytes = sum(tensor.numel() for tensor in tensors.values()) * dtype.itemsize
    writer = _Writer(directory, min(_MOST_BYTES, num_bytes // _FILES_OF_SHARDED) if is_sharded else _MOST_BYTES)
    model = _without_memory(config)
    layers = [list(names) for _, names in itertools.groupby(tensors, _layer_of)]
    for names in tqdm(layers, desc="Writing weights", unit="layer", disable=not is_rank_zero()):
        layer = {}
        for name in names:
            full = gathered_on_rank_zero(tensors[name])
            if full is not None:
                layer[name] = full
        if layer:
            layer = {name: tensor.to("cpu", dtype) for name, tensor in complete(layer).items()}
            writer.add(revert_weight_conversion(model, layer))
    if is_rank_zero():
        writer.close()


def _layer_of(name: str) -> tuple[str, ...]:
    """The layer that a tensor belongs to; tensors in none are by themselves."""
    parts = name.split(".")
    numbers = [i for i, part in enumerate(parts) if part.isdigit()]
    return tuple(parts[: numbers[0] + 1]) if numbers else tuple(parts)


class _Writer:
    """Files of a limited size, and the index that says what is where."""

    def __init__(self, directory: Path, most_bytes: int) -> None:
        self._directory = directory
        self._most_bytes = most_bytes
        self._pending: dict[str, torch.Tensor] = {}
        self._names_of_files: list[list[str]] = []
        self._num_bytes = 0

    def add(self, tensors: Mapping[str, torch.Tensor]) -> None:
        for name, tensor in tensors.items():
            if self._pending and _size((*self._pending.values(), tensor)) > self._most_bytes:
                self._write()
            self._pending[name] = tensor.contiguous()

    def _write(self) -> None:
        self._names_of_files.append(list(self._pending))
        self._num_bytes += _size(self._pending.values())
        save_file(self._pending, self._part(len(self._names_of_files)), metadata={"format": "pt"})
        self._pending = {}

    def _part(self, number: int) -> Path:
        return self._directory / f"model-part-{number}.safetensors"

    def close(self) -> None:
        self._write()
        count = len(self._names_of_files)
        weight_map: dict[str, str] = {}
        for number, names in enumerate(self._names_of_files, start=1):
            file = _SINGLE_FILE if count == 1 else f"model-{number:05}-of-{count:05}.safetensors"
            self._part(number).replace(self._directory / file)
            weight_map |= dict.fromkeys(names, file)
        if count > 1:
            index = {"metadata": {"total_size": self._num_bytes}, "weight_map": weight_map}
            (self._directory / _INDEX_FILE).write_text(json.dumps(index, indent=2), encoding="utf-8")


def _size(tensors: Iterable[torch.Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
