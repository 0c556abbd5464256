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

CONFIG_CLASSES = {"prefix_dpo_single_device": TrainingConfig, "prefix_dpo_distributed": DistributedConfig}
ALL_NAMES = [name for name in config_names() if cli.recipe_of(find_config(name)) in CONFIG_CLASSES]
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
    recipe.train()
    recipe.cleanup()
    assert recipe.global_step == 2


@pytest.mark.parametrize("name", NAMES)
def test_two_steps_run_with_a_small_model(name, tmp_path):
    cfg = shrunk(name, tmp_path)
    recipe = PrefixDPORecipeSingleDevice(cfg, set_up_device(cfg))
    recipe.setup()
    recipe.train()
    recipe.cleanup()
    assert recipe.global_step == 2
