"""LoRA, DoRA and QLoRA: what is trained, where it starts, and what is saved.

The config's ``model`` decides: torchtune's ``lora_...`` and ``qlora_...`` builders, ``use_dora: True`` with either. All
else is frozen. A fresh adapter changes nothing about the base model, so a run that begins with one has the base model
as its reference; one that begins with a trained adapter has that.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torchtune.models.qwen2._positional_embeddings import Qwen2RotaryPositionalEmbeddings
from torchtune.modules import TransformerDecoder
from torchtune.modules.peft import (
    DoRALinear,
    LoRALinear,
    get_adapter_params,
    get_merged_lora_ckpt,
    set_trainable_params,
)

_ADAPTERS = (LoRALinear, DoRALinear)

_PEFT_MAGNITUDE = "lora_magnitude_vector"
"""PEFT's name of DoRA's magnitudes."""


def has_adapter(model: nn.Module) -> bool:
    """Whether a model was built with LoRA or one of its relatives."""
    return any(isinstance(module, _ADAPTERS) for module in model.modules())


def freeze_base(model: nn.Module, dtype: torch.dtype) -> None:
    """Leaves nothing but the adapter to be trained, where there is one.

    Args:
        model (nn.Module): before it is wrapped or sharded; changed in place.
        dtype (torch.dtype): of the frozen weights of linear layers, which are never updated. Quantized ones stay so.
    """
    if not has_adapter(model):
        return
    set_trainable_params(model, get_adapter_params(model))
    for module in model.modules():
        if isinstance(module, (nn.Linear, *_ADAPTERS)):
            for parameter in (module.weight, module.bias):
                if parameter is not None and not parameter.requires_grad and type(parameter.data) is torch.Tensor:
                    parameter.data = parameter.data.to(dtype)


def is_adapter_key(name: str) -> bool:
    """Whether a key of a model's state dict belongs to an adapter."""
    return name.endswith((".lora_a.weight", ".lora_b.weight", ".magnitude"))


def initial_adapter(
    shapes: Mapping[str, torch.Size], base: Mapping[str, torch.Tensor], seed: int
) -> dict[str, torch.Tensor]:
    """A fresh adapter, which changes nothing yet, initialized as torchtune does.

    Args:
        shapes (Mapping[str, torch.Size]): of the adapter's tensors, by name.
        base (Mapping[str, torch.Tensor]): the base model's weights, which DoRA's magnitudes follow from.
        seed (int): decides the matrices A, on any number of ranks.

    Returns:
        dict[str, torch.Tensor]: a tensor for each name.
    """
    generator = torch.Generator().manual_seed(seed)
    adapter = {}
    for name, shape in shapes.items():
        if name.endswith(".lora_a.weight"):
            adapter[name] = torch.empty(shape)
            nn.init.kaiming_uniform_(adapter[name], a=math.sqrt(5), generator=generator)
        elif name.endswith(".lora_b.weight"):
            adapter[name] = torch.zeros(shape)
        else:
            weight = base[name.removesuffix("magnitude") + "weight"]
            adapter[name] = torch.linalg.norm(weight.float(), dim=1)
    return adapter


def adapter_to_save(model: nn.Module, state_dict: Mapping[str, torch.Tensor]) -> tuple[dict, dict[str, Any]]:
    """An adapter's weights, and what PEFT wants to know of it.

    Args:
        model (nn.Module): a model with an adapter.
        state_dict (Mapping[str, torch.Tensor]): its full state dict.

    Returns:
        tuple[dict, dict[str, Any]]: weights by name, and the adapter's config.
    """
    weights = {name: tensor for name, tensor in state_dict.items() if is_adapter_key(name)}
    layers = [(name, module) for name, module in model.named_modules() if isinstance(module, _ADAPTERS)]
    _, first = layers[0]
    rank, alpha = _rank_and_alpha(first)
    config = {
        "r": rank,
        "lora_alpha": alpha,
        "target_modules": sorted({name.rsplit(".", 1)[-1] for name, _ in layers}),
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "use_dora": isinstance(first, DoRALinear),
    }
    return weights, config


def correct_peft_file(file: Path, adapter: Mapping[str, torch.Tensor], model: TransformerDecoder) -> None:
    """Puts right what torchtune 0.6.1 gets wrong when it writes an adapter for PEFT.

    Hugging Face keeps the rows of query and key projections in another order, except for Qwen 2. torchtune reorders the
    matrices B of all models, Qwen 2's as well, and DoRA's magnitudes of none.

    Args:
        file (Path): torchtune's ``adapter_model.safetensors``, written anew.
        adapter (Mapping[str, torch.Tensor]): the adapter in torchtune's format.
        model (TransformerDecoder): the model it is of.
    """
    tensors = load_file(file)
    for i, layer in enumerate(model.layers):
        attn = layer.attn
        for projection, num_heads in (("q_proj", attn.num_heads), ("k_proj", attn.num_kv_heads)):
            rows = torch.arange(num_heads * attn.head_dim)
            if not isinstance(attn.pos_embeddings, Qwen2RotaryPositionalEmbeddings):
                rows = rows.view(num_heads, attn.head_dim // 2, 2).transpose(1, 2).flatten()
            for ours, theirs in (("lora_b.weight", "lora_B.weight"), ("magnitude", _PEFT_MAGNITUDE)):
                tensor = adapter.get(f"layers.{i}.attn.{projection}.{ours}")
                if tensor is not None:
                    tensors[f"base_model.model.model.layers.{i}.self_attn.{projection}.{theirs}"] = tensor[rows]
    # PEFT itself leaves out the last part, and reads both; transformers 5 reads a magnitude under its whole name only.
    tensors = {f"{name}.weight" if name.endswith(_PEFT_MAGNITUDE) else name: tensor for name, tensor in tensors.items()}
    save_file(tensors, file, metadata={"format": "pt"})


def merged(model: nn.Module, state_dict: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The weights of a model without an adapter that computes the same.

    Args:
        model (nn.Module): a model with an adapter.
        state_dict (Mapping[str, torch.Tensor]): its full state dict.

    Returns:
        dict[str, torch.Tensor]: in fp32.
    """
    first = next(module for module in model.modules() if isinstance(module, _ADAPTERS))
    rank, alpha = _rank_and_alpha(first)
    # Copies: torchtune merges in place, and these may be the model's own weights.
    weights = {name: tensor.to(torch.float32, copy=True) for name, tensor in state_dict.items()}
    return get_merged_lora_ckpt(weights, rank=rank, alpha=alpha)


def _rank_and_alpha(module: LoRALinear | DoRALinear) -> tuple[int, float]:
    rank = module.lora_a.out_features
    return rank, module.scaling * rank if isinstance(module, DoRALinear) else module.alpha
