"""Every training config: its components exist and take what they are given, and two steps run, shrunk."""

import json
from pkgutil import resolve_name

import pytest
import torch
from omegaconf import OmegaConf
from torchtune import config

from directories import make_directory
from prefix_dpo_single_device import PrefixDPORecipeSingleDevice
from prefix_sharing import cli
from prefix_sharing.config import DistributedConfig, TrainingConfig, check_config, config_names, find_config
from prefix_sharing.hosts import to_tree_model
from prefix_sharing.quickstart.pairs import generate_pairs
from prefix_sharing.run import set_up_device
from prefix_sharing.run.signals import StopRequest

CONFIG_CLASSES = {"prefix_dpo_single_device": TrainingConfig, "prefix_dpo_distributed": DistributedConfig}
ALL_NAMES = [
    name
    for name in config_names()
    if cli.recipe_of(find_config(name)) in CONFIG_CLASSES and not name.startswith("lions/")
]
NAMES = [name for name in ALL_NAMES if not name.startswith("transformers/")]

# NF4 wants weights of a multiple of 64 * 256 numbers.
DIMS = {"vocab_size": 2048, "num_layers": 2, "num_heads": 4, "num_kv_heads": 4, "embed_dim": 128, "max_seq_len": 512}
DIMS["intermediate_dim"] = 384

MODELS = {
    "llama3": "llama3",
    "llama3_1": "llama3_1",
    "llama3_2": "llama3_2",
    "qwen2_5": "qwen2",
    "mistral": "mistral",
    "gemma2": "gemma2",
    "phi3": "phi3",
}
"""For each family the module of its component builder."""


def shrunk(name, directory):
    """The config with a small model and data made up, for one CPU."""
    cfg = OmegaConf.load(find_config(name))
    family = cfg.model._component_.split(".")[2]
    builder = MODELS[family]
    path = f"torchtune.models.{builder}"
    base = {**DIMS, "_component_": f"{path}.{builder}"}
    if family == "gemma2":
        base["head_dim"] = 32
    model = base
    if "lora_rank" in cfg.model:
        of_adapter = ("lora_attn_modules", "apply_lora_to_mlp", "lora_alpha", "lora_dropout", "use_dora")
        adapter = {key: value for key, value in cfg.model.items() if key in of_adapter} | {"lora_rank": 4}
        if "qlora" in cfg.model._component_:
            adapter["quantize_base"] = True
        model = {**base, **adapter, "_component_": f"{path}.lora_{builder}"}
    overrides = {
        "model": model,
        "tokenizer": {"_component_": "prefix_sharing.quickstart.tokenizer", "max_seq_len": 512},
        "checkpointer": {"_component_": "stubs.StubCheckpointer", "model": base, "output_dir": str(directory)},
        "dataset": {"_component_": "prefix_sharing.quickstart.preference_pairs", "num_pairs": 8},
        "dataset_val": None,
        "run_val_every_n_steps": None,
        "output_dir": str(directory),
        "device": "cpu",
        "dtype": "fp32",
        "compile": False,  # takes a quarter of a minute for each, and has tests of its own
        "max_steps_per_epoch": 2,
        "enable_activation_offloading": False,
    }
    for key, value in overrides.items():
        OmegaConf.update(cfg, key, value, merge=False)
    cfg.global_batch_size = 4
    cfg.pop("gradient_accumulation_steps", None)
    for key in list(cfg):
        if key not in TrainingConfig.__dataclass_fields__:
            del cfg[key]
    return check_config(cfg, TrainingConfig)


def test_there_are_configs_for_every_common_model():
    families = {name.split("/")[0] for name in NAMES}
    assert {"llama3_1", "llama3_2", "qwen2_5", "mistral", "gemma2", "phi4", "smollm2"} <= families


@pytest.mark.parametrize("name", NAMES)
def test_components_exist_and_the_model_is_covered(name):
    cfg = OmegaConf.load(find_config(name))
    for key in ("dataset", "dataset_val"):  # what a user has to give
        if cfg.get(key) is not None and OmegaConf.is_missing(cfg[key], "data_files"):
            cfg[key].data_files = "my_pairs.jsonl"
    cfg = check_config(cfg, CONFIG_CLASSES[cli.recipe_of(find_config(name))])
    assert resolve_name(cfg.model._component_)
    with torch.device("meta"):
        model = config.instantiate(cfg.model)
    assert to_tree_model(model, "chains").has_adapter == ("lora" in name)


QWEN3 = {"vocab_size": 151_936, "head_dim": 128, "num_key_value_heads": 8}
GEMMA3 = {"vocab_size": 262_144, "head_dim": 256}
LLAMA3 = {"vocab_size": 128_256, "num_key_value_heads": 8}
BY_PATH = {  # config.json of what people tune, hidden_size, intermediate_size, layers, heads; billions of parameters
    "Qwen3-0.6B": ("qwen3", (1024, 3072, 28, 16), QWEN3 | {"tie_word_embeddings": True}, 0.596),
    "Qwen3-1.7B": ("qwen3", (2048, 6144, 28, 16), QWEN3 | {"tie_word_embeddings": True}, 1.721),
    "Qwen3-4B": ("qwen3", (2560, 9728, 36, 32), QWEN3 | {"tie_word_embeddings": True}, 4.022),
    "Qwen3-8B": ("qwen3", (4096, 12288, 36, 32), QWEN3, 8.191),
    "Qwen3-14B": ("qwen3", (5120, 17408, 40, 40), QWEN3, 14.768),
    "Qwen3-32B": ("qwen3", (5120, 25600, 64, 64), QWEN3, 32.762),
    "Qwen3-30B-A3B": (
        "qwen3_moe",
        (2048, 6144, 48, 32),
        QWEN3 | {"num_key_value_heads": 4, "num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768},
        30.532,
    ),
    "gemma-3-1b": ("gemma3_text", (1152, 6912, 26, 4), GEMMA3 | {"num_key_value_heads": 1}, 1.0),
    "gemma-3-4b": ("gemma3_text", (2560, 10240, 34, 8), GEMMA3 | {"num_key_value_heads": 4}, 3.88),
    "gemma-3-12b": ("gemma3_text", (3840, 15360, 48, 16), GEMMA3 | {"num_key_value_heads": 8}, 11.77),
    "SmolLM3-3B": ("smollm3", (2048, 11008, 36, 16), LLAMA3 | {"num_key_value_heads": 4}, 3.075),
    "OLMo-2-7B": ("olmo2", (4096, 11008, 32, 32), {"vocab_size": 100_352, "num_key_value_heads": 32}, 7.299),
    "Llama-3.1-8B": ("llama", (4096, 14336, 32, 32), LLAMA3, 8.03),
    "Llama-3.2-1B": ("llama", (2048, 8192, 16, 32), LLAMA3 | {"tie_word_embeddings": True}, 1.236),
    "Llama-3.2-3B": ("llama", (3072, 8192, 28, 24), LLAMA3 | {"tie_word_embeddings": True}, 3.213),
    "Mistral-Small-24B": (
        "mistral",
        (5120, 32768, 40, 32),
        {"vocab_size": 131_072, "num_key_value_heads": 8, "head_dim": 128, "sliding_window": None},
        23.572,
    ),
    "phi-4": ("phi3", (5120, 17920, 40, 40), {"vocab_size": 100_352, "num_key_value_heads": 10}, 14.66),
}


@pytest.mark.parametrize("component", ["causal_lm", "lora_causal_lm"])
@pytest.mark.parametrize("name", BY_PATH)
def test_what_people_tune_is_covered_by_its_path(name, component, tmp_path):
    transformers = pytest.importorskip("transformers", minversion="5.24")
    kind, dims, kwargs, billions = BY_PATH[name]
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    cfg = transformers.AutoConfig.for_model(kind, **dict(zip(names, dims, strict=True)), **kwargs, **tokens)
    cfg.save_pretrained(tmp_path)
    with torch.device("meta"):
        model = config.instantiate(
            OmegaConf.create(
                {
                    "_component_": f"prefix_sharing.hosts.transformers.{component}",
                    "path": str(tmp_path),
                }
            )
        )
    tree = to_tree_model(model, "chains")
    assert tree.has_adapter == (component == "lora_causal_lm")
    frozen_or_not = sum(p.numel() for key, p in tree.named_parameters() if ".lora_" not in key)
    assert frozen_or_not / 1e9 == pytest.approx(billions, rel=0.01)


@pytest.mark.parametrize("name", [name for name in ALL_NAMES if name not in NAMES])
def test_two_steps_run_with_a_small_model_by_its_path(name, tmp_path):
    pytest.importorskip("transformers", minversion="5.24")
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps(pair) + "\n" for pair in generate_pairs(104, seed=1)))
    cfg = OmegaConf.load(find_config(name))
    cfg.merge_with({"path": make_directory(tmp_path / "model"), "output_dir": str(tmp_path / "out"), "device": "cpu"})
    cfg.merge_with({"dtype": "fp32", "max_steps_per_epoch": 2, "global_batch_size": 4, "pack_len": 1024})
    cfg.dataset.data_files = str(file)
    cfg.tokenizer.max_seq_len = 512
    cfg = check_config(cfg, CONFIG_CLASSES[cli.recipe_of(find_config(name))])
    recipe = PrefixDPORecipeSingleDevice(cfg, set_up_device(cfg))
    recipe.setup()
    recipe.train(StopRequest())
    recipe.cleanup()
    assert recipe.global_step == 2


@pytest.mark.parametrize("name", NAMES)
def test_two_steps_run_with_a_small_model(name, tmp_path):
    cfg = shrunk(name, tmp_path)
    recipe = PrefixDPORecipeSingleDevice(cfg, set_up_device(cfg))
    recipe.setup()
    recipe.train(StopRequest())
    recipe.cleanup()
    assert recipe.global_step == 2
