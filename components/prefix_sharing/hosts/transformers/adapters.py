"""LoRA and DoRA by PEFT: how they are put into a model, where they start, and what is saved of them.

All but the adapter is frozen. A fresh adapter changes nothing about the base model, so a run that begins with one has
the base model as its reference; one that begins with a trained adapter has that.
"""

import contextlib
import math
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import ParamWrapper
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file, save_file
from torch import nn

from prefix_sharing.errors import ConfigError, UserError

_NAME = "default"
"""What PEFT calls an adapter that is not given a name."""

ADAPTER_FILE = "adapter_model.safetensors"


def have_peft_overlook_torchao() -> None:
    """Has PEFT make adapters beside a torchao older than 0.16, which torchtune needs and an adapter does not."""
    from peft.import_utils import is_torchao_available

    try:
        is_torchao_available()
    except ImportError:
        for name, module in list(sys.modules.items()):
            if name.startswith("peft.") and hasattr(module, "is_torchao_available"):
                vars(module)["is_torchao_available"] = lambda: False


def add_adapter(model: nn.Module, config: LoraConfig) -> None:
    """Puts an adapter into a model without weights, in place; nothing else of it is trained from now on.

    Args:
        model (nn.Module): a model of transformers, on the meta device.
        config (LoraConfig): PEFT's.

    Raises:
        ConfigError: if PEFT cannot, or puts some of it into experts or a router.
    """
    have_peft_overlook_torchao()
    try:
        inject_adapter_in_model(config, model)
    except ValueError as error:
        raise ConfigError("model", f"PEFT cannot add the adapter: {error}") from error
    # PEFT takes names of older versions of a mixture, such as ``down_proj``, for those of experts.
    beyond = [name for name, module in model.named_modules() if isinstance(module, ParamWrapper)]
    if beyond:
        problem = f"adapters of experts and routers are not supported, such as that of '{beyond[0]}'"
        raise ConfigError("model.target_modules", f"{problem}; name layers of attention, such as [q_proj, v_proj]")


def has_experts(model: nn.Module) -> bool:
    """Whether a model is a mixture of experts, whose matrices transformers keeps in one tensor."""
    return any(parameter.dim() == 3 for parameter in model.parameters())


def linear_layers_of_attention(model: nn.Module) -> list[str]:
    """The ends of the names of the linear layers of a model's attention."""
    names = {name for name, module in model.named_modules() if isinstance(module, nn.Linear) and "attn" in name}
    return sorted({name.rpartition(".")[2] for name in names})


def has_adapter(model: nn.Module) -> bool:
    """Whether a model has an adapter of PEFT."""
    return any(isinstance(module, BaseTunerLayer) for module in model.modules())


def freeze_base(model: nn.Module, dtype: torch.dtype) -> None:
    """Keeps the frozen weights of linear layers and experts in another precision, where there is an adapter.

    Args:
        model (nn.Module): before it is wrapped or sharded; changed in place.
        dtype (torch.dtype): of weights that are never updated.
    """
    if not has_adapter(model):
        return
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            is_of_experts = parameter.dim() == 3  # their matrices lie in one tensor
            if not parameter.requires_grad and (isinstance(module, nn.Linear) or is_of_experts):
                parameter.data = parameter.data.to(dtype)


@contextlib.contextmanager
def without_adapter(model: nn.Module) -> Iterator[None]:
    """The base model alone.

    Args:
        model (nn.Module): with an adapter or without one.
    """
    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    # PEFT's own ``enable_adapters`` would also say anew what is trained.
    for layer in layers:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer in layers:
            layer._disable_adapters = False


def is_adapter_key(name: str) -> bool:
    """Whether a key of a model's state dict belongs to an adapter."""
    return ".lora_" in name


def base_name(name: str) -> str:
    """The name that a weight of the base has where there is no adapter."""
    return name.replace(".base_layer.", ".")


def initial_adapter(model: nn.Module, seed: int) -> dict[str, torch.Tensor]:
    """A fresh adapter, which changes nothing yet, initialized as PEFT does.

    Args:
        model (nn.Module): with the base's weights, sharded or not.
        seed (int): decides the matrices A, on any number of ranks.

    Returns:
        dict[str, torch.Tensor]: by name; sharded as the model is, or full and the same on every rank.
    """
    generator = torch.Generator().manual_seed(seed)
    adapter = {}
    state_dict = model.state_dict()
    for name, tensor in state_dict.items():
        if ".lora_A." in name:
            adapter[name] = torch.empty(tensor.shape)
            nn.init.kaiming_uniform_(adapter[name], a=math.sqrt(5), generator=generator)
        elif ".lora_B." in name:
            adapter[name] = torch.zeros(tensor.shape)
        elif ".lora_magnitude_vector." in name:
            weight = state_dict[f"{name.partition('.lora_')[0]}.base_layer.weight"]
            adapter[name] = torch.linalg.vector_norm(weight.float(), dim=1)
    return adapter


def merged_weight(weight: torch.Tensor, adapter: Mapping[str, torch.Tensor], scaling: float) -> torch.Tensor:
    """A weight that computes alone what it computes with its adapter.

    Args:
        weight (torch.Tensor): the base's, shape ``[out, in]``.
        adapter (Mapping[str, torch.Tensor]): ``lora_A`` ``[r, in]``, ``lora_B`` ``[out, r]``, and for DoRA (Liu et al.
            2024) ``lora_magnitude_vector`` ``[out]``.
        scaling (float): of the product of B and A.

    Returns:
        torch.Tensor: in fp32.
    """
    merged = weight.float() + scaling * (adapter["lora_B"].float() @ adapter["lora_A"].float())
    if "lora_magnitude_vector" in adapter:
        merged *= (adapter["lora_magnitude_vector"].float() / torch.linalg.vector_norm(merged, dim=1))[:, None]
    return merged


def adapter_of(layer: str, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The parts of a layer's adapter, for ``merged_weight``, from tensors by the model's names."""
    parts = ("lora_A", "lora_B", "lora_magnitude_vector")
    names = {part: f"{layer}.{part}.{_NAME}.weight" for part in parts}
    return {part: tensors[name] for part, name in names.items() if name in tensors}


def scaling_of(model: nn.Module, layer: str) -> float:
    """What the product of B and A is multiplied with, in a layer that has an adapter, by name."""
    scaling: dict[str, float] = model.get_submodule(layer).scaling  # type: ignore[assignment]
    return scaling[_NAME]


def read_adapter(directory: Path) -> dict[str, torch.Tensor]:
    """Reads an adapter that PEFT saved.

    Args:
        directory (Path): with ``adapter_model.safetensors``.

    Returns:
        dict[str, torch.Tensor]: by PEFT's names.

    Raises:
        UserError: if it is not there.
    """
    file = directory / ADAPTER_FILE
    if not file.is_file():
        raise UserError(f"{file} not found; {directory} must be the directory of an adapter as PEFT saves it.")
    return load_file(file)


def peft_names(model: nn.Module) -> dict[str, str]:
    """The name in PEFT's files of every tensor of a model's adapter, by the model's own name."""
    return {name: _peft_name(name) for name in model.state_dict() if is_adapter_key(name)}


def save_adapter(directory: Path, model: Any, adapter: Mapping[str, torch.Tensor], base: str) -> None:
    """Writes an adapter as PEFT does.

    Args:
        directory (Path): where its two files go.
        model (Any): with the adapter.
        adapter (Mapping[str, torch.Tensor]): its full tensors, by the model's names.
        base (str): directory of the base, or its name on the hub.
    """
    directory.mkdir(parents=True, exist_ok=True)
    tensors = {_peft_name(name): tensor.contiguous() for name, tensor in adapter.items()}
    save_file(tensors, directory / ADAPTER_FILE, metadata={"format": "pt"})
    config: LoraConfig = model.peft_config[_NAME]
    config.base_model_name_or_path = base
    config.inference_mode = True
    config.save_pretrained(str(directory))


def _peft_name(name: str) -> str:
    """The name in PEFT's files."""
    name = name.replace(f".lora_magnitude_vector.{_NAME}.weight", ".lora_magnitude_vector")
    return f"base_model.model.{name.replace(f'.{_NAME}.', '.')}"
