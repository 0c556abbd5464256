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


EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}


def make_directory(path, name="qwen3", dtype=torch.float32, **kwargs):
    import transformers

    config = transformers.AutoConfig.for_model(name, **DIMS | kwargs)
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).save_pretrained(path)
    for file in Path(TOKENIZER_DIR).iterdir():
        shutil.copy(file, path)
    return str(path)


def keys_for(path, output_dir, **kwargs):
    host = "prefix_sharing.hosts.transformers"
    keys = {"model": {"_component_": f"{host}.causal_lm", "path": path}}
    keys["tokenizer"] = {"_component_": "prefix_sharing.tokenizers.hf_chat_tokenizer", "path": path}
    keys["checkpointer"] = {"_component_": f"{host}.checkpointer", "path": path, "output_dir": str(output_dir)}
    keys |= {"optimizer.lr": 2e-3, "lr_scheduler": None, "max_steps_per_epoch": 10}
    keys |= {"packing": "step", "global_batch_size": 4, "pack_len": 1024, "batch_size": None}
    return keys | {"gradient_accumulation_steps": None} | kwargs
