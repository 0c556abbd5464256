"""prefix-tune: torchtune's command with our recipes and configs."""

import subprocess
import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from prefix_sharing import cli
from prefix_sharing.config import config_names, find_config


def prefix_tune(*args, cwd):
    # That of this environment, whatever the PATH.
    command = Path(sys.executable).with_name("prefix-tune")
    return subprocess.run([command, *map(str, args)], cwd=cwd, capture_output=True, text=True)


def test_every_config_names_its_recipe():
    assert all(cli.recipe_of(find_config(name)) in cli.RECIPES for name in config_names())


def test_ls_shows_torchtunes_recipes_and_ours(tmp_path):
    shown = set(prefix_tune("ls", cwd=tmp_path).stdout.split())
    assert {"full_dpo_distributed", "llama3_1/8B_full_dpo"} <= shown
    assert set(cli.RECIPES) <= shown
    assert set(config_names()) <= shown


@pytest.mark.slow
def test_a_copied_recipe_and_config_run(tmp_path):
    assert prefix_tune("cp", "prefix_dpo_single_device", "my_recipe", cwd=tmp_path).returncode == 0
    assert prefix_tune("cp", "quickstart/single_device", "my_config", cwd=tmp_path).returncode == 0
    config = tmp_path / "my_config.yaml"
    assert "class PrefixDPORecipeSingleDevice" in (tmp_path / "my_recipe.py").read_text()
    cfg = OmegaConf.load(config)
    cfg.max_steps_per_epoch, cfg.dataset_val, cfg.run_val_every_n_steps = 1, None, None
    OmegaConf.save(cfg, config)
    assert "well-formed" in prefix_tune("validate", config, cwd=tmp_path).stdout
    done = prefix_tune("run", "my_recipe.py", "--config", "my_config.yaml", cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Trained llama3" in done.stderr


@pytest.mark.slow
def test_cat_and_run_take_our_names(tmp_path):
    assert "prefix_sharing.losses.DPOLoss" in prefix_tune("cat", "quickstart/distributed", cwd=tmp_path).stdout
    short = ["max_steps_per_epoch=1", "dataset_val=null", "run_val_every_n_steps=null", "dataset.num_pairs=64"]
    config = ["prefix_dpo_distributed", "--config", "quickstart/distributed"]
    done = prefix_tune("run", "--nproc_per_node", 2, *config, *short, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
