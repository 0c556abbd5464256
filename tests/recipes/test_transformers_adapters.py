"""LoRA and DoRA of transformers' models: trained by the recipes, saved as PEFT saves them."""

import numpy as np
import pytest
import torch

transformers = pytest.importorskip("transformers", minversion="5.24")
peft = pytest.importorskip("peft")

from omegaconf import OmegaConf  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

from directories import DIMS, EXPERTS, keys_for, make_directory  # noqa: E402
from prefix_sharing.errors import UserError  # noqa: E402
from prefix_sharing.hosts import load_checkpoint, merged_weights  # noqa: E402
from prefix_sharing.hosts.transformers import lora_causal_lm  # noqa: E402
from prefix_sharing.hosts.transformers.adapters import have_peft_overlook_torchao, merged_weight  # noqa: E402
from runs import evaluated_log_probs, losses, run_in_process, transformers_log_probs, went_only_to  # noqa: E402


def lora_keys(path, output_dir, save_adapter_weights_only=True, adapter_checkpoint=None, **kwargs):
    keys = keys_for(path, output_dir, max_steps_per_epoch=4)
    component = "prefix_sharing.hosts.transformers.lora_causal_lm"
    keys["model"] = {"_component_": component, "path": path, "lora_rank": 4, **kwargs}
    keys |= {"save_adapter_weights_only": save_adapter_weights_only, "adapter_checkpoint": adapter_checkpoint}
    return keys


@pytest.fixture(autouse=True, scope="module")
def _peft_without_torchao():
    have_peft_overlook_torchao()  # as whatever adds an adapter does


@pytest.fixture
def path(tmp_path):
    return make_directory(tmp_path / "model")


def base_of(path):
    return transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)


@pytest.mark.parametrize("use_dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("adapter_only", [True, False], ids=["adapter", "merged"])
def test_what_is_saved_is_what_was_trained(tmp_path, path, use_dora, adapter_only):
    out = tmp_path / "out"
    run = run_in_process(out, **lora_keys(path, out, adapter_only, use_dora=use_dora))
    assert losses(out)[0] == pytest.approx(0.693147, abs=1e-6)  # a fresh adapter is the base, which is the reference
    expected = evaluated_log_probs(out)
    base = base_of(path)
    assert np.abs(transformers_log_probs(base, run.dataset_val) - expected).max() > 0.01
    saved = out / "epoch_0"
    where = saved if adapter_only else saved / "adapter"
    models = [peft.PeftModel.from_pretrained(base, where), peft.AutoPeftModelForCausalLM.from_pretrained(where)]
    if adapter_only:
        assert not (saved / "config.json").exists()
    else:
        models.append(transformers.AutoModelForCausalLM.from_pretrained(saved))
    for model in models:
        # A log-prob is a sum of tens of tokens' at -8, whose rounding in fp32 is 1e-6 each.
        assert transformers_log_probs(model, run.dataset_val) == pytest.approx(expected, abs=1e-4)


def test_an_adapter_beside_experts_is_what_was_trained(tmp_path):
    path = make_directory(tmp_path / "model", "qwen3_moe", **EXPERTS)
    out = tmp_path / "out"
    run = run_in_process(out, **lora_keys(path, out, False))
    model = transformers.AutoModelForCausalLM.from_pretrained(out / "epoch_0")
    assert transformers_log_probs(model, run.dataset_val) == pytest.approx(evaluated_log_probs(out), abs=1e-4)
    config = peft.PeftConfig.from_pretrained(out / "epoch_0" / "adapter")
    assert set(config.target_modules) == {"q_proj", "k_proj", "v_proj", "o_proj"}
    assert not config.target_parameters


@pytest.mark.parametrize("name", ["down_proj", "gate", ".*down_proj"])
def test_adapters_of_experts_and_routers_are_refused(tmp_path, name):
    path = make_directory(tmp_path / "model", "qwen3_moe", **EXPERTS)
    targets = name if "*" in name else ["q_proj", name]
    with pytest.raises(UserError, match=r"target_modules': adapters of experts and routers .* 'model.layers.0.mlp"):
        lora_causal_lm(path, target_modules=targets)


def test_a_run_goes_on_with_a_trained_adapter_and_with_pefts_own(tmp_path, path):
    first, second = tmp_path / "first", tmp_path / "second"
    run = run_in_process(first, **lora_keys(path, first))
    run_in_process(second, **lora_keys(path, second, adapter_checkpoint=str(first / "epoch_0")))
    assert losses(second)[0] == pytest.approx(0.693147, abs=1e-6)  # what it starts from is its reference
    before = evaluated_log_probs(second, "before")
    assert before == pytest.approx(evaluated_log_probs(first), abs=1e-4)

    config = peft.LoraConfig(r=4, lora_alpha=16, target_modules="all-linear", init_lora_weights=False)
    theirs = peft.get_peft_model(base_of(path), config)
    theirs.save_pretrained(tmp_path / "theirs")
    third = tmp_path / "third"
    run_in_process(third, **lora_keys(path, third, adapter_checkpoint=str(tmp_path / "theirs")))
    expected = transformers_log_probs(theirs, run.dataset_val)
    assert evaluated_log_probs(third, "before") == pytest.approx(expected, abs=1e-4)


def test_a_run_with_an_adapter_resumes_after_an_epoch(tmp_path, path):
    keys = {"epochs": 2, "seed": 1, "max_steps_per_epoch": 3}
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run_in_process(whole, **lora_keys(path, whole) | keys)
    went_only_to(3, whole, parts)
    run_in_process(parts, **lora_keys(path, parts) | keys | {"resume": "auto"})
    assert losses(parts) == pytest.approx(losses(whole), rel=1e-6)


@pytest.mark.parametrize("use_dora", [False, True], ids=["lora", "dora"])
def test_weights_are_merged_as_peft_merges_them(use_dora):
    torch.manual_seed(0)
    layer = torch.nn.Sequential(torch.nn.Linear(24, 40, bias=False)).double()
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=["0"], use_dora=use_dora, init_lora_weights=False)
    theirs = peft.get_peft_model(layer, config)
    lora = theirs.base_model.model[0]
    adapter = {"lora_A": lora.lora_A["default"].weight, "lora_B": lora.lora_B["default"].weight}
    if use_dora:
        magnitudes = lora.lora_magnitude_vector["default"].weight
        magnitudes.data.mul_(torch.rand_like(magnitudes) + 0.5)
        adapter["lora_magnitude_vector"] = magnitudes
    found = merged_weight(lora.base_layer.weight, adapter, lora.scaling["default"])
    expected = theirs.merge_and_unload()[0].weight
    torch.testing.assert_close(found, expected.float(), rtol=1e-5, atol=1e-6)


def test_a_checkpoint_and_its_adapter_make_the_model_that_peft_merges(tmp_path, path):
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    theirs = peft.get_peft_model(base_of(path), config)
    theirs.save_pretrained(tmp_path / "adapter")
    checkpointer = OmegaConf.create({"_component_": "prefix_sharing.hosts.transformers.checkpointer", "path": path})
    checkpointer.output_dir = str(tmp_path / "out")
    _, checkpoint = load_checkpoint("checkpointer", checkpointer, adapter=str(tmp_path / "adapter"))
    model = {"_component_": "prefix_sharing.hosts.transformers.lora_causal_lm", "path": path, "lora_rank": 4}
    model |= {"lora_alpha": 6, "target_modules": ["q_proj", "down_proj"]}
    found = merged_weights(OmegaConf.create(model), checkpoint)
    expected = theirs.merge_and_unload().state_dict()
    assert found.keys() == load_file(f"{path}/model.safetensors").keys()
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-5, atol=1e-6)


def test_an_adapter_that_does_not_fit_is_refused(tmp_path, path):
    with pytest.raises(UserError, match=r"PEFT cannot add the adapter: .*nowhere"):
        lora_causal_lm(path, target_modules=["nowhere"])
    other = make_directory(tmp_path / "other", **DIMS | {"num_hidden_layers": 1})
    out = tmp_path / "out"
    run_in_process(out, **lora_keys(other, out))
    keys = lora_keys(path, tmp_path / "second", adapter_checkpoint=str(out / "epoch_0"))
    with pytest.raises(UserError, match=r"layers.1.self_attn.q_proj.lora_A.weight is missing in the checkpoint"):
        run_in_process(tmp_path / "second", **keys)
    keys["adapter_checkpoint"] = str(tmp_path)
    with pytest.raises(UserError, match=r"adapter_model.safetensors not found; .* as PEFT saves it"):
        run_in_process(tmp_path / "second", **keys)
