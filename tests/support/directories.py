"""Small random models of transformers in directories, with a tokenizer."""

import shutil
from pathlib import Path

import torch

from prefix_sharing.quickstart.checkpointer import TOKENIZER_DIR

DIMS = {
    "vocab_size": 2048,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
}


def make_directory(path, name="qwen3", dtype=torch.float32, **kwargs):
    import transformers

    config = transformers.AutoConfig.for_model(name, **DIMS | kwargs)
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).save_pretrained(path)
    for file in Path(TOKENIZER_DIR).iterdir():
        shutil.copy(file, path)
    return str(path)
