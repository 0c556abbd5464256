"""LoRA, DoRA and QLoRA: the adapter alone is trained and saved, and its reference is what it began with."""

import json
import math

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file
from torchtune.modules.peft import disable_adapter

from exports import log_probs_by
from prefix_dpo_single_device import PrefixDPORecipeSingleDevice
from prefix_sharing.config import find_config
from prefix_sharing.errors import UserError
from prefix_sharing.run import set_up_device
from prefix_sharing.run.signals import StopRequest
from prefix_sharing.trees import Row
from runs import (
    MODEL,
    eval_log,
    evaluated_log_probs,
    hf_checkpointer,
    lora,
    losses,
    make_config,
    make_recipe,
    run_distributed,
    run_in_process,
    training_log,
    went_only_to,
)

# NF4 wants weights of a multiple of 64 * 256 numbers, on each rank.
QUANTIZABLE = {**MODEL, "embed_dim": 256, "intermediate_dim": 384}


def is_adapter(name):
    return "lora" in name or "magnitude" in name


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run with LoRA and where it wrote."""
    output_dir = tmp_path_factory.mktemp("lora")
    return run_in_process(output_dir, **lora()), output_dir


@pytest.fixture(scope="module")
def untrained(tmp_path_factory):
    """The base model, by a run that changes nothing."""
    keys = {"max_steps_per_epoch": 1, "optimizer.lr": 0.0, "lr_scheduler": None, "dataset_val": None}
    return run_in_process(tmp_path_factory.mktemp("base"), **keys).model


@pytest.mark.parametrize("use_dora", [False, True])
def test_only_the_adapter_is_trained_and_saved(tmp_path, trained, untrained, use_dora):
    recipe, output_dir = (run_in_process(tmp_path, **lora(use_dora=True)), tmp_path) if use_dora else trained
    before, after = untrained.state_dict(), recipe.model.state_dict()
    assert {name for name in after if is_adapter(name)} == {
        n for n, p in recipe.model.named_parameters() if p.requires_grad
    }
    for name, tensor in after.items():
        if not is_adapter(name):
            assert (tensor == before[name]).all(), name
        elif "lora_b" in name:
            assert (tensor != 0).any(), name
    assert training_log(output_dir)[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert eval_log(output_dir)[-1]["eval/loss"] != pytest.approx(math.log(2), abs=1e-3)

    epoch = output_dir / "epoch_0"
    assert not list(epoch.glob("model-*"))
    saved = torch.load(epoch / "adapter_model.pt")
    assert all((after[name] == tensor).all() for name, tensor in saved.items())
    assert set(saved) == {name for name in after if is_adapter(name)}
    peft = json.loads((epoch / "adapter_config.json").read_text())
    assert (peft["r"], peft["lora_alpha"], peft["use_dora"]) == (4, 8, use_dora)
    assert set(peft["target_modules"]) == {"q_proj", "v_proj", "o_proj", "gate_proj", "down_proj", "up_proj"}
    assert len(load_file(epoch / "adapter_model.safetensors")) == len(saved)


def test_the_merged_model_computes_what_base_and_adapter_do(tmp_path):
    recipe = run_in_process(tmp_path / "lora", save_adapter_weights_only=False, **lora())
    row = Row.from_examples([recipe.dataset_val[i] for i in range(4)])
    expected = recipe.model(row).log_probs
    checkpointer = hf_checkpointer(tmp_path / "lora" / "epoch_0", tmp_path / "merged")
    merged = make_recipe(tmp_path / "merged", checkpointer=checkpointer)
    merged.setup()
    torch.testing.assert_close(merged.model(row).log_probs, expected, rtol=1e-5, atol=1e-4)


def test_with_its_adapter_disabled_the_policy_is_the_base_model(trained, untrained):
    recipe, _ = trained
    row = Row.from_examples([recipe.dataset_val[i] for i in range(4)])
    expected = untrained(row).log_probs
    assert (recipe.model(row).log_probs != expected).all()
    with disable_adapter(recipe.model):
        assert (recipe.model(row).log_probs == expected).all()


def test_a_reference_kept_and_one_computed_along_the_way_agree(tmp_path, trained):
    online = run_in_process(tmp_path, **lora() | {"reference.precompute": False})
    assert losses(tmp_path) == pytest.approx(losses(trained[1]), rel=1e-6)
    # By the model that is trained: there is no other.
    assert online.reference.forward.args[1] is online.model


def test_a_run_that_begins_with_a_trained_adapter_has_that_as_its_reference(tmp_path, trained):
    # LLaMA-Factory 8459
    first, output_dir = trained
    keys = lora() | {"adapter_checkpoint": str(output_dir / "epoch_0" / "adapter_model.pt")}
    for directory, precompute in (("kept", True), ("online", False)):
        recipe = run_in_process(
            tmp_path / directory, **keys | {"reference.precompute": precompute, "optimizer.lr": 0.0}
        )
        assert training_log(tmp_path / directory)[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
        assert all((a == b).all() for a, b in zip(recipe.model.parameters(), first.model.parameters(), strict=True))
    # Unless told otherwise: the base model, by its checkpoint.
    cfg = make_config(tmp_path / "base", **keys)
    cfg.ref_checkpointer = {**cfg.checkpointer, "output_dir": str(tmp_path / "reference")}
    recipe = PrefixDPORecipeSingleDevice(cfg, set_up_device(cfg))
    recipe.setup()
    recipe.train(StopRequest())
    recipe.cleanup()
    assert training_log(tmp_path / "base")[0]["loss"] < math.log(2) - 1e-3


def test_resuming_goes_on_from_the_adapter(tmp_path):
    keys = lora() | {"max_steps_per_epoch": 2, "epochs": 2, "seed": 3}
    run_in_process(tmp_path / "whole", **keys)
    went_only_to(2, tmp_path / "whole", tmp_path / "parts")
    recipe = run_in_process(tmp_path / "parts", **keys | {"resume": "auto"})
    assert recipe.global_step == 4
    assert losses(tmp_path / "parts") == pytest.approx(losses(tmp_path / "whole"), rel=1e-6)


def test_dropout_is_the_same_with_a_warm_reference_cache_other_workers_and_no_evaluation(tmp_path):
    keys = lora(lora_dropout=0.5)
    run_in_process(tmp_path / "cold", **keys, **{"reference.cache_dir": str(tmp_path / "cache")})
    expected = losses(tmp_path / "cold")
    for name, others in (
        ("warm", {"reference.cache_dir": str(tmp_path / "cache")}),
        ("no_cache", {"reference.cache_dir": None, "num_workers": 1}),
        ("no_evaluation", {"dataset_val": None}),
    ):
        run_in_process(tmp_path / name, **keys, **others)
        assert losses(tmp_path / name) == expected, name
    # dropout is at work, and another seed is another dropout
    run_in_process(tmp_path / "other", **keys, seed=1, shuffle=False)
    run_in_process(tmp_path / "same", **keys, seed=0, shuffle=False)
    assert losses(tmp_path / "other")[1:] != losses(tmp_path / "same")[1:]


def test_dropout_goes_on_as_it_would_have_when_a_run_is_resumed(tmp_path):
    keys = lora(lora_dropout=0.5) | {"max_steps_per_epoch": 2, "epochs": 2}
    run_in_process(tmp_path / "whole", **keys)
    went_only_to(2, tmp_path / "whole", tmp_path / "parts")
    run_in_process(tmp_path / "parts", **keys | {"resume": "auto"})
    assert losses(tmp_path / "parts") == pytest.approx(losses(tmp_path / "whole"), rel=1e-6)


def test_dropout_leaves_reference_and_evaluation_alone(tmp_path):
    run_in_process(tmp_path, **lora(lora_dropout=0.5))
    assert eval_log(tmp_path)[0]["eval/loss"] == pytest.approx(math.log(2), abs=1e-6)


def test_a_quantized_base_trains(tmp_path):
    keys = lora(QUANTIZABLE, quantize_base=True) | {"max_steps_per_epoch": 20, "dataset.num_pairs": 160}
    recipe = run_in_process(tmp_path, **keys)
    assert len(losses(tmp_path)) == 20
    assert losses(tmp_path)[0] == pytest.approx(math.log(2), abs=1e-6)
    assert losses(tmp_path)[-1] != pytest.approx(math.log(2), abs=1e-3)
    assert type(recipe.model.layers[0].attn.q_proj.weight.data).__name__ == "NF4Tensor"


def test_what_is_merged_with_a_quantized_base_is_loaded_as_it_was_trained(tmp_path):
    transformers = pytest.importorskip("transformers")
    run_in_process(tmp_path, save_adapter_weights_only=False, **lora(QUANTIZABLE, quantize_base=True))
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "epoch_0")
    assert merged.dtype == torch.float32
    assert log_probs_by(merged) == pytest.approx(evaluated_log_probs(tmp_path), abs=1e-3)


def test_an_adapter_for_a_model_without_one_is_refused(tmp_path):
    file = tmp_path / "adapter_model.pt"
    torch.save({"layers.0.attn.q_proj.lora_a.weight": torch.zeros(4, 8)}, file)
    recipe = make_recipe(tmp_path, adapter_checkpoint=str(file))
    with pytest.raises(UserError, match="lora_a.weight is 4x8 in the checkpoint, but missing in the model"):
        recipe.setup()


@pytest.mark.slow
@pytest.mark.parametrize("overrides", [lora(), lora(QUANTIZABLE, quantize_base=True)], ids=["lora", "qlora"])
def test_two_processes_follow_one(tmp_path, overrides):
    keys = {
        "max_steps_per_epoch": 6,
        "dataset.num_pairs": 64,
        "seed": 1,
        "dataset_val": None,
        "run_val_every_n_steps": None,
    }
    run_in_process(tmp_path / "alone", **keys | overrides | {"gradient_accumulation_steps": 4})
    cfg = OmegaConf.load(find_config("quickstart/distributed"))
    for key, value in overrides.items():
        OmegaConf.update(cfg, key, value, merge=False)
    OmegaConf.save(cfg, tmp_path / "lora.yaml")
    together = run_distributed(tmp_path / "together", 2, config=str(tmp_path / "lora.yaml"), batch_size=4, **keys)
    assert losses(together) == pytest.approx(losses(tmp_path / "alone"), rel=1e-4)
    alone = torch.load(tmp_path / "alone" / "epoch_0" / "adapter_model.pt")
    for name, tensor in torch.load(together / "epoch_0" / "adapter_model.pt").items():
        assert (alone[name] - tensor).norm() <= 1e-3 * tensor.norm().clamp(min=1e-6), name
