"""The plan of a run's memory, against what can be counted by hand."""

import pytest
from runs import make_config
from test_lora import lora

from prefix_dpo_plan import PlanConfig, PrefixDPOPlan
from prefix_sharing.errors import UserError
from prefix_sharing.training.prediction import full_row, predict_peak_memory

PARAMETERS = 1_078_144  # of the quickstart's model


def plan_config(directory, **overrides):
    return make_config(directory, config_class=PlanConfig, **overrides)


def test_a_full_row_holds_what_fits():
    row = full_row(1000, [100, 50, 50])
    assert row.num_tokens == 1000
    assert row.num_scored.tolist() == [[51, 51]] * 5
    # one example that alone is longer is cut
    assert full_row(100, [100, 50, 50]).num_tokens == 100


@pytest.mark.parametrize("world_size", [1, 4])
def test_parameters_gradients_and_optimizer_state_are_counted(tmp_path, world_size):
    short, long = (full_row(n, [64, 32, 32]) for n in (128, 512))
    peak, of_longer = predict_peak_memory(plan_config(tmp_path), world_size, [short, long])
    share = 4 * PARAMETERS / world_size
    assert peak.optimizer_state == pytest.approx(2 * share, rel=0.01)
    # sharded, the layers at work are there whole: less than all of the model twice
    assert peak.parameters == share if world_size == 1 else share < peak.parameters < share + 2 * 4 * PARAMETERS
    # sharded, the first row's gradients wait for the second's in full
    assert peak.gradients == pytest.approx(4 * PARAMETERS, rel=0.05)
    assert of_longer.activations > 2 * peak.activations
    assert of_longer.optimizer_state == peak.optimizer_state


def test_gradients_that_are_added_up_each_row_are_sharded(tmp_path):
    row = full_row(128, [64, 32, 32])
    waiting, sharded = (
        predict_peak_memory(plan_config(tmp_path, fsdp_sync_every_row=every_row), 4, [row])[0]
        for every_row in (False, True)
    )
    assert sharded.total < waiting.total - 1.5 * PARAMETERS


@pytest.mark.parametrize("world_size", [1, 2])
def test_what_is_frozen_has_no_gradient(tmp_path, world_size):
    full, adapter = (
        predict_peak_memory(plan_config(tmp_path, **overrides), world_size, [full_row(128, [64, 32, 32])])[0]
        for overrides in ({}, lora())
    )
    assert adapter.parameters > full.parameters
    assert adapter.gradients < 0.3 * full.gradients
    assert adapter.optimizer_state < 0.3 * full.optimizer_state


def test_activations_that_are_computed_again_are_not_held(tmp_path):
    row = full_row(512, [64, 32, 32])
    kept, again = (
        predict_peak_memory(plan_config(tmp_path, enable_activation_checkpointing=ac), 1, [row])[0]
        for ac in (False, True)
    )
    assert again.activations < 0.6 * kept.activations


def test_the_recipe_says_what_fits_and_what_would_help(tmp_path, capsys):
    keys = {"world_size": 4, "example": [64, 32, 32], "pack_len": 512}
    keys["dataset"] = {"_component_": "prefix_sharing.datasets.packed_preference_dataset", "source": "json"}
    PrefixDPOPlan(plan_config(tmp_path, device_memory="1GiB", **keys)).run()
    said = capsys.readouterr().out
    assert "It fits into 0.9 GiB" in said
    assert "The longest pack_len that fits" in said
    assert "fsdp_sync_every_row: True" in said
    assert "enable_activation_checkpointing: True" in said
    PrefixDPOPlan(plan_config(tmp_path, device_memory="9MiB", **keys)).run()
    assert "DOES NOT FIT into 0.0 GiB" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"device_memory": "80"}, "device_memory must be such as 80GiB, but is 80"),
        ({"example": [10, 5]}, "example must be tokens of prefix, chosen and rejected"),
        ({"world_size": 0}, "world_size must be at least 1"),
        ({"reference.precompute": False}, "reference.precompute: False is not planned for"),
        ({"fsdp_cpu_offload": True}, "fsdp_cpu_offload is not planned for"),
    ],
)
def test_what_cannot_be_planned_is_refused(tmp_path, overrides, message):
    with pytest.raises(UserError, match=message):
        PrefixDPOPlan(plan_config(tmp_path, **overrides))
