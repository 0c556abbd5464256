"""The estimate of a run's memory, against what can be counted by hand."""

import re

import pytest

from prefix_dpo_memory import MemoryConfig, PrefixDPOMemory, describe_bytes, recipe_main
from prefix_sharing.errors import UserError
from prefix_sharing.memory.estimate import PeakMemory, full_row, peak_memory_estimate
from runs import lora, make_config, tune_run

PARAMETERS = 1_078_144  # of the quickstart's model


def memory_config(directory, **overrides):
    return make_config(directory, config_class=MemoryConfig, **overrides)


def peaks(cfg, world_size, *rows):
    with peak_memory_estimate(cfg, world_size) as peak_of:
        return [peak_of(row) for row in rows]


def test_a_full_row_holds_what_fits():
    row = full_row(1000, [100, 50, 50])
    assert row.num_tokens == 1000
    assert row.num_scored.tolist() == [[51, 51]] * 5
    # one example that alone is longer is cut
    assert full_row(100, [100, 50, 50]).num_tokens == 100


@pytest.mark.parametrize("world_size", [1, 4])
def test_parameters_gradients_and_optimizer_state_are_counted(tmp_path, world_size):
    short, long = (full_row(n, [64, 32, 32]) for n in (128, 512))
    peak, of_longer = peaks(memory_config(tmp_path), world_size, short, long)
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
        peaks(memory_config(tmp_path, fsdp_sync_every_row=every_row), 4, row)[0] for every_row in (False, True)
    )
    assert sharded.total < waiting.total - 1.5 * PARAMETERS


@pytest.mark.parametrize("world_size", [1, 2])
def test_what_is_frozen_has_no_gradient(tmp_path, world_size):
    full, adapter = (
        peaks(memory_config(tmp_path, **overrides), world_size, full_row(128, [64, 32, 32]))[0]
        for overrides in ({}, lora())
    )
    assert adapter.parameters > full.parameters
    assert adapter.gradients < 0.3 * full.gradients
    assert adapter.optimizer_state < 0.3 * full.optimizer_state


def test_activations_that_are_computed_again_are_not_held(tmp_path):
    row = full_row(512, [64, 32, 32])
    kept, again = (
        peaks(memory_config(tmp_path, enable_activation_checkpointing=ac), 1, row)[0] for ac in (False, True)
    )
    assert again.activations < 0.6 * kept.activations


PACKED = {"packing": "step", "global_batch_size": 8, "batch_size": None, "gradient_accumulation_steps": None}


def test_the_recipe_says_what_fits_and_what_would_help(tmp_path, capsys):
    keys = PACKED | {"world_size": 4, "example": [64, 32, 32], "pack_len": 512}
    PrefixDPOMemory(memory_config(tmp_path, device_memory="40MiB", **keys)).run()
    said = capsys.readouterr().out
    assert "It fits into 36.00 MiB" in said
    assert "512 " in next(line for line in said.splitlines() if "as configured" in line)
    longest = int(re.search(r"The longest pack_len that fits: about ([\d,]+) tokens", said)[1].replace(",", ""))
    assert "fsdp_sync_every_row: True" in said
    assert "enable_activation_checkpointing: True" in said
    assert "8-bit optimizer" in said
    # what it says fits does, and what is a quarter longer does not
    fits, too_long = peaks(
        memory_config(tmp_path, **keys), 4, full_row(longest, [64, 32, 32]), full_row(longest * 5 // 4, [64, 32, 32])
    )
    assert fits.total <= 36 * 1024**2 < too_long.total
    PrefixDPOMemory(memory_config(tmp_path, device_memory="9MiB", **keys)).run()
    said = capsys.readouterr().out
    assert "DOES NOT FIT into 8.10 MiB" in said
    assert "No pack_len fits that holds an example of 128 tokens" in said


@pytest.mark.parametrize(
    ("keys", "num_tokens", "promised"),
    [
        ({"batch_size": 4}, 512, ["  2.00 GiB  a smaller batch_size (activations)"]),
        (PACKED | {"pack_len": 512}, 512, ["  2.00 GiB  a smaller pack_len (activations)"]),
        ({"batch_size": 1}, 128, []),
        (
            {"enable_activation_checkpointing": False},
            128,
            ["  2.00 GiB  enable_activation_checkpointing: True (activations)"],
        ),
    ],
)
def test_what_does_not_depend_on_the_row_is_not_promised(tmp_path, keys, num_tokens, promised):
    keys = {"enable_activation_checkpointing": True} | keys
    recipe = PrefixDPOMemory(memory_config(tmp_path, example=[64, 32, 32], **keys))
    peak, shortest = (PeakMemory(2**30, 2**30, 2**30, size * 2**30) for size in (7, 5))
    said = recipe.changes(peak, shortest, num_tokens)
    assert [line for line in said if line.endswith("(activations)")] == promised


def test_short_rows_do_not_decide_what_long_ones_take(tmp_path, capsys):
    # at 128 and 256 tokens the peak is the optimizer's step: the line through both went to millions of tokens
    keys = PACKED | {"example": [64, 32, 32], "pack_len": 128}
    PrefixDPOMemory(memory_config(tmp_path, device_memory="60MiB", **keys)).run()
    said = capsys.readouterr().out
    longest = int(re.search(r"The longest pack_len that fits: about ([\d,]+) tokens", said)[1].replace(",", ""))
    (peak,) = peaks(memory_config(tmp_path, **keys), 1, full_row(longest, [64, 32, 32]))
    assert peak.total <= 54 * 1024**2
    assert peak.total > 0.7 * 54 * 1024**2


def test_an_example_longer_than_any_row_that_fits_is_said(tmp_path, capsys):
    keys = PACKED | {"example": [3000, 500, 500], "pack_len": 4096}
    PrefixDPOMemory(memory_config(tmp_path, device_memory="40MiB", **keys)).run()
    assert "No pack_len fits that holds an example of 4,000 tokens" in capsys.readouterr().out


def test_sizes_are_never_zero_gigabytes():
    assert [describe_bytes(size) for size in (80 * 1024**3, 9.5 * 1024**2, 2048)] == [
        "80.00 GiB",
        "9.50 MiB",
        "2.00 KiB",
    ]


def test_data_need_not_be_set(monkeypatch, capsys):
    monkeypatch.setattr(PrefixDPOMemory, "run", lambda self: print(self.cfg.dataset))
    arguments = ["prefix_dpo_memory", "--config", "smollm2/135M_prefix_dpo_single_device"]
    monkeypatch.setattr("sys.argv", arguments)
    recipe_main()
    assert "'data_files': None" in capsys.readouterr().out
    monkeypatch.setattr("sys.argv", [*arguments[:2], "transformers/prefix_dpo_single_device"])
    with pytest.raises(SystemExit):
        recipe_main()
    assert "Config key 'path': required, but not set" in capsys.readouterr().err


def test_the_old_name_still_works_and_says_so(tmp_path):
    done = tune_run("prefix_dpo_plan", "--config", "quickstart/single_device", "model.num_layers=1", cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "prefix_dpo_plan is now prefix_dpo_memory" in done.stderr
    assert "The longest Row" in done.stdout


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"device_memory": "80"}, "'device_memory': must be a size such as 80GiB, but is 80"),
        ({"example": [10, 5]}, "'example': must be tokens of prefix, chosen and rejected"),
        ({"world_size": 0}, "'world_size': must be at least 1"),
        ({"reference.precompute": False}, "'reference.precompute': False cannot be estimated"),
        ({"fsdp_cpu_offload": True}, "'fsdp_cpu_offload': cannot be estimated"),
    ],
)
def test_what_cannot_be_estimated_is_refused(tmp_path, overrides, message):
    with pytest.raises(UserError, match=message):
        PrefixDPOMemory(memory_config(tmp_path, **overrides))
