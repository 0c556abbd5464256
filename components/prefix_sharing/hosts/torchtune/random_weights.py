"""A Hugging Face checkpoint with random weights, for runs that need no download."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from safetensors.torch import save_file
from torchtune import config
from torchtune.models.convert_weights import tune_to_hf
from torchtune.training import FullModelHFCheckpointer

_WEIGHTS_FILE = "model.safetensors"


def random_llama_checkpointer(
    model: Mapping[str, Any],
    checkpoint_dir: Path,
    output_dir: str,
    *,
    seed: int,
    checkpoint_files: list[str] | None,
    **checkpointer_kwargs: Any,
) -> FullModelHFCheckpointer:
    """Writes random weights and builds torchtune's checkpointer, which reads them.

    Args:
        model (Mapping[str, Any]): the config's ``model``, ``torchtune.models.llama3.llama3`` with its dimensions.
        checkpoint_dir (Path): where the random weights go.
        output_dir (str): as for torchtune's checkpointer.
        seed (int): decides the weights.
        checkpoint_files (list[str] | None): weights to read instead, when a run resumes.
        **checkpointer_kwargs (Any): other arguments of ``FullModelHFCheckpointer``.

    Returns:
        FullModelHFCheckpointer: reads the random weights, writes Hugging Face checkpoints.
    """
    _write_random_llama(model, checkpoint_dir, seed)
    return FullModelHFCheckpointer(
        checkpoint_dir=str(checkpoint_dir),
        checkpoint_files=checkpoint_files or [_WEIGHTS_FILE],
        model_type="LLAMA3",
        output_dir=output_dir,
        **checkpointer_kwargs,
    )


def _write_random_llama(model: Mapping[str, Any], directory: Path, seed: int) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        weights = config.instantiate(OmegaConf.create(dict(model))).state_dict()
    directory.mkdir(parents=True, exist_ok=True)
    heads = {"num_heads": model["num_heads"], "num_kv_heads": model["num_kv_heads"], "dim": model["embed_dim"]}
    save_file(tune_to_hf(weights, **heads), directory / _WEIGHTS_FILE, metadata={"format": "pt"})
    hf_config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": model["vocab_size"],
        "hidden_size": model["embed_dim"],
        "intermediate_size": model["intermediate_dim"],
        "num_hidden_layers": model["num_layers"],
        "num_attention_heads": model["num_heads"],
        "num_key_value_heads": model["num_kv_heads"],
        "max_position_embeddings": model["max_seq_len"],
        "rms_norm_eps": model.get("norm_eps", 1e-5),
        "rope_theta": model.get("rope_base", 500_000.0),
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
    }
    (directory / "config.json").write_text(json.dumps(hf_config, indent=2) + "\n")
