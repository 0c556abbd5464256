"""What any host must write: directories that transformers, PEFT and vLLM load, and that compute what was trained."""

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors import safe_open
from safetensors.torch import load_file

from prefix_sharing.quickstart import preference_pairs, tokenizer
from runs import transformers_log_probs


@dataclass(frozen=True, eq=False)
class Export:
    """What a run left behind.

    Attributes:
        directory: what it wrote after its last epoch.
        base: the directory of the model it began with.
        before: log-probs of the held-out pairs by its own model before training, ``[16, 2]``.
        after: those after training.
    """

    directory: Path
    base: Path
    before: np.ndarray
    after: np.ndarray


def held_out_pairs():
    """What runs evaluate on, as ``runs.SHORT`` has it."""
    return preference_pairs(tokenizer(), num_pairs=16, seed=1)


def log_probs_by(model):
    """Log-probs of the held-out pairs by a model of transformers or PEFT."""
    return transformers_log_probs(model.eval(), held_out_pairs())


def whole_model(export, **kwargs):
    """By transformers' default call."""
    import transformers

    return transformers.AutoModelForCausalLM.from_pretrained(export.directory, **kwargs)


def base_model(export, **kwargs):
    """The same of the base model."""
    import transformers

    return transformers.AutoModelForCausalLM.from_pretrained(export.base, **kwargs)


def by_peft(export, directory, **kwargs):
    """An adapter on the base model."""
    import peft

    return peft.PeftModel.from_pretrained(base_model(export, **kwargs), str(directory))


def by_auto_peft(export, directory, **kwargs):
    """An adapter by itself, which has to name its base model."""
    import peft

    return peft.AutoPeftModelForCausalLM.from_pretrained(str(directory), **kwargs)


def by_transformers(export, directory, **kwargs):
    """An adapter by itself, as transformers loads any model."""
    import transformers

    return transformers.AutoModelForCausalLM.from_pretrained(str(directory), **kwargs)


ADAPTER_LOADERS = {
    "PeftModel": by_peft,
    "AutoPeftModelForCausalLM": by_auto_peft,
    "AutoModelForCausalLM": by_transformers,
}


def weights_for_vllm(directory):
    """The tensors that vLLM's default loader would read, by name; it takes nothing that is missing or there twice.

    As vLLM 0.33.0 does in ``model_executor/model_loader/default_loader.py`` (``_prepare_weights``) and
    ``weight_utils.py`` (``filter_duplicate_safetensors_files``).
    """
    assert not list(directory.glob("consolidated*.safetensors")), "would be read in Mistral's own format"
    files = set(directory.glob("*.safetensors"))
    index_file = directory / "model.safetensors.index.json"
    weight_map = None
    if index_file.is_file():
        weight_map = json.loads(index_file.read_text())["weight_map"]
        listed = {directory / name for name in weight_map.values()}
        assert listed <= files, "listed, but missing"
        files &= listed
    assert files
    found = {}
    for file in sorted(files):
        with safe_open(file, framework="pt") as opened:
            assert opened.metadata()["format"] == "pt"
            assert not found.keys() & set(opened.keys()), "there twice"
            if weight_map is not None:
                assert {key for key, name in weight_map.items() if name == file.name} == set(opened.keys())
        found |= load_file(file)
    return found


def dtype_of_most(tensors):
    """The dtype that most elements of tensors have."""
    elements = Counter()
    for tensor in tensors:
        elements[tensor.dtype] += tensor.numel()
    return elements.most_common(1)[0][0]


def adapter_for_vllm(directory):
    """The module names and matrices of an adapter, as vLLM reads them; what it would refuse fails.

    As vLLM 0.33.0 does in ``lora/peft_helper.py`` (``PEFTHelper``), ``lora/lora_model.py`` (``from_local_checkpoint``)
    and ``lora/utils.py`` (``parse_fine_tuned_lora_name``).
    """
    config = json.loads((directory / "adapter_config.json").read_text())
    assert {"r", "lora_alpha", "target_modules"} <= config.keys()
    assert config.get("bias", "none") == "none"
    assert not config.get("use_dora", False), "vLLM does not yet support DoRA"
    assert not config.get("modules_to_save")
    found = {}
    for name, tensor in load_file(directory / "adapter_model.safetensors").items():
        assert name.startswith("base_model.model.")
        module, which, weight = name.removeprefix("base_model.model.").rsplit(".", 2)
        assert weight == "weight"
        assert which in ("lora_A", "lora_B")
        assert module.rsplit(".", 1)[-1] in config["target_modules"]
        assert tensor.shape[0 if which == "lora_A" else 1] == config["r"]
        found.setdefault(module, {})[which] = tensor
    assert all(set(matrices) == {"lora_A", "lora_B"} for matrices in found.values())
    return config, found


def changed(after, before):
    """The part of elements that differ."""
    return (after.float() != before.float()).float().mean().item()
