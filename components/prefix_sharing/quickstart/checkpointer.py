"""Random weights to start from, written as a Hugging Face checkpoint: the rest of a run is as with any model."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from safetensors.torch import save_file
from torchtune import config
from torchtune.models.convert_weights import tune_to_hf
from torchtune.training import FullModelHFCheckpointer

from prefix_sharing.tokenizers import HFChatTokenizer, hf_chat_tokenizer

_TOKENIZER = Path(__file__).parent / "bpe_2048"
_WEIGHTS_FILE = "model.safetensors"


def tokenizer(max_seq_len: int | None = None) -> HFChatTokenizer:
    """This project's own tokenizer: a byte-level BPE of 2,048 tokens, for a config.

    Args:
        max_seq_len (int | None): longest sequence in tokens. Default: None.

    Returns:
        HFChatTokenizer: the tokenizer.
    """
    return hf_chat_tokenizer(str(_TOKENIZER), max_seq_len)


def random_checkpointer(
    model: dict[str, Any],
    output_dir: str,
    seed: int = 0,
    checkpoint_files: list[str] | None = None,
    **checkpointer_kwargs: Any,
) -> FullModelHFCheckpointer:
    """Builds a checkpointer whose checkpoint is made up: random weights and this project's tokenizer.

    Args:
        model (dict[str, Any]): the config's ``model``, ``torchtune.models.llama3.llama3`` with its
            dimensions.
        output_dir (str): as for torchtune's checkpointer; the random weights go to ``initial_model`` there.
        seed (int): decides the weights. Default: 0.
        checkpoint_files (list[str] | None): weights to read instead, when a run resumes. Default: None.
        **checkpointer_kwargs (Any): handed on to ``FullModelHFCheckpointer``.

    Returns:
        FullModelHFCheckpointer: reads the random weights, writes Hugging Face checkpoints.

    Example:
        .. code-block:: yaml

            checkpointer:
              _component_: prefix_sharing.quickstart.random_checkpointer
              model: ${model}
              output_dir: ${output_dir}
    """
    directory = Path(output_dir) / "initial_model"
    _write_random_model(model, directory, seed)
    return FullModelHFCheckpointer(
        checkpoint_dir=str(directory),
        checkpoint_files=checkpoint_files or [_WEIGHTS_FILE],
        model_type="LLAMA3",
        output_dir=output_dir,
        **checkpointer_kwargs,
    )


def _write_random_model(model: dict[str, Any], directory: Path, seed: int) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        weights = config.instantiate(OmegaConf.create(model)).state_dict()
    directory.mkdir(parents=True, exist_ok=True)
    shutil.copytree(_TOKENIZER, directory, dirs_exist_ok=True)
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
        "rms_norm_eps": 1e-5,
        "rope_theta": 500_000.0,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
    }
    (directory / "config.json").write_text(json.dumps(hf_config, indent=2) + "\n")
