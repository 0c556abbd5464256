"""Random weights to start from, written as a Hugging Face checkpoint: the rest of a run is as with any model."""

import shutil
from pathlib import Path
from typing import Any

from prefix_sharing.hosts.torchtune.random_weights import random_llama_checkpointer
from prefix_sharing.tokenizers import HFChatTokenizer, hf_chat_tokenizer

TOKENIZER_DIR = Path(__file__).parent / "bpe_2048"
"""This project's own tokenizer, in Hugging Face's format."""


def tokenizer(max_seq_len: int | None = None) -> HFChatTokenizer:
    """This project's own tokenizer: a byte-level BPE of 2,048 tokens, for a config.

    Args:
        max_seq_len (int | None): longest sequence in tokens. Default: None.

    Returns:
        HFChatTokenizer: the tokenizer.
    """
    return hf_chat_tokenizer(str(TOKENIZER_DIR), max_seq_len)


def random_checkpointer(
    model: dict[str, Any],
    output_dir: str,
    seed: int = 0,
    checkpoint_files: list[str] | None = None,
    **checkpointer_kwargs: Any,
) -> Any:
    """Builds a checkpointer whose checkpoint is made up: random weights and this project's tokenizer.

    Args:
        model (dict[str, Any]): the config's ``model``, ``torchtune.models.llama3.llama3`` with its dimensions.
        output_dir (str): as for torchtune's checkpointer; the random weights go to ``initial_model`` there.
        seed (int): decides the weights. Default: 0.
        checkpoint_files (list[str] | None): weights to read instead, when a run resumes. Default: None.
        **checkpointer_kwargs (Any): other arguments of torchtune's ``FullModelHFCheckpointer``.

    Returns:
        Any: a ``FullModelHFCheckpointer``, which reads the random weights and writes Hugging Face checkpoints.

    Example:
        .. code-block:: yaml

            checkpointer:
              _component_: prefix_sharing.quickstart.random_checkpointer
              model: ${model}
              output_dir: ${output_dir}
    """
    directory = Path(output_dir) / "initial_model"
    shutil.copytree(TOKENIZER_DIR, directory, dirs_exist_ok=True)
    return random_llama_checkpointer(
        model, directory, output_dir, seed=seed, checkpoint_files=checkpoint_files, **checkpointer_kwargs
    )
