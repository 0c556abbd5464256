"""prefix-tune: torchtune's command with our recipes and configs. The README's test runs what it copies."""

import subprocess
import sys
from pathlib import Path

import pytest
from torchtune import _recipe_registry as registry

from prefix_sharing import cli
from prefix_sharing.config import config_names, find_config


@pytest.fixture
def prefix_tune(monkeypatch, capsys):
    """The command in this process; returns what it prints."""

    def run(*args):
        monkeypatch.setattr(registry, "_ALL_RECIPES", [*registry._ALL_RECIPES])
        monkeypatch.setattr(sys, "argv", ["prefix-tune", *map(str, args)])
        cli.main()
        return capsys.readouterr().out

    return run


def test_every_config_names_its_recipe():
    assert all(cli.recipe_of(find_config(name)) in cli.RECIPES for name in config_names())


def test_ls_shows_torchtunes_recipes_and_ours(prefix_tune):
    shown = set(prefix_tune("ls").split())
    assert {"full_dpo_distributed", "llama3_1/8B_full_dpo"} <= shown
    assert set(cli.RECIPES) <= shown
    assert set(config_names()) <= shown


def test_cp_cat_and_validate_know_our_names(prefix_tune, tmp_path):
    prefix_tune("cp", "prefix_dpo_distributed", tmp_path / "my_recipe")
    prefix_tune("cp", "quickstart/distributed", tmp_path / "my_config")
    assert "class PrefixDPORecipeDistributed" in (tmp_path / "my_recipe.py").read_text()
    assert (tmp_path / "my_config.yaml").read_text() == Path(find_config("quickstart/distributed")).read_text()
    assert "_component_: prefix_sharing.losses.DPOLoss" in prefix_tune("cat", "quickstart/distributed")
    assert "well-formed" in prefix_tune("validate", tmp_path / "my_config.yaml")


@pytest.mark.slow
def test_the_command_runs_our_recipes_on_two_processes(tmp_path):
    short = ["max_steps_per_epoch=1", "dataset_val=null", "run_val_every_n_steps=null", "dataset.num_pairs=64"]
    config = ["prefix_dpo_distributed", "--config", "quickstart/distributed"]
    command = Path(sys.executable).with_name("prefix-tune")
    done = subprocess.run(
        [command, "run", "--nproc_per_node", "2", *config, *short], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
