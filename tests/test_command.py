"""prefix-tune: torchtune's command with our recipes and configs. The README's test runs what it copies."""

import logging
import subprocess
import sys
from pathlib import Path

import pytest
from torchtune import _recipe_registry as registry

import prefix_dpo_single_device
from prefix_sharing import cli
from prefix_sharing.config import config_names, find_config
from processes import run_forked


@pytest.fixture
def prefix_tune(monkeypatch, capsys):
    """The command in this process; returns what it prints."""

    def run(*args):
        monkeypatch.setattr(registry, "_ALL_RECIPES", [*registry._ALL_RECIPES])
        monkeypatch.setattr(cli.tune, "Validate", cli.tune.Validate)
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


def test_cp_and_cat_know_our_names(prefix_tune, tmp_path):
    prefix_tune("cp", "prefix_dpo_distributed", tmp_path / "my_recipe")
    prefix_tune("cp", "quickstart/distributed", tmp_path / "my_config")
    assert "class PrefixDPORecipeDistributed" in (tmp_path / "my_recipe.py").read_text()
    assert (tmp_path / "my_config.yaml").read_text() == Path(find_config("quickstart/distributed")).read_text()
    assert "_component_: prefix_sharing.losses.DPOLoss" in prefix_tune("cat", "quickstart/distributed")


WELL_FORMED = "Config is well-formed!\n"


@pytest.mark.parametrize("name", config_names())
def test_every_config_is_well_formed_and_needs_no_files(prefix_tune, monkeypatch, tmp_path, name):
    monkeypatch.chdir(tmp_path)
    text = Path(find_config(name)).read_text()
    data = "prompts" if "\nprompts:" in text else "dataset"
    to_set = ["path"] * ("\npath: ???" in text) + [f"{data}.data_files"] * ("data_files: ???" in text)
    to_set += ["judge.path"] * ("\n  path: ???" in text)
    still = f" Still to be set on the command line: {', '.join(to_set)}." if to_set else ""
    expected = WELL_FORMED.replace("\n", f"{still}\n")
    assert prefix_tune("validate", name) == expected
    assert prefix_tune("validate", find_config(name)) == expected
    assert not list(tmp_path.iterdir())


def test_configs_of_torchtune_are_validated_as_torchtune_does(prefix_tune, tmp_path, capsys):
    name = "llama3_1/8B_full_dpo"
    assert prefix_tune("validate", name) == WELL_FORMED
    prefix_tune("cp", name, tmp_path / "theirs")
    file = tmp_path / "theirs.yaml"
    assert prefix_tune("validate", file) == WELL_FORMED
    file.write_text(file.read_text().replace("  beta: 0.05", "  bta: 0.05"))
    with pytest.raises(SystemExit) as caught:
        prefix_tune("validate", file)
    assert caught.value.code == 2
    assert "TypeError: DPOLoss got an unexpected keyword argument 'bta'" in capsys.readouterr().err


@pytest.fixture
def refused(prefix_tune, capsys):
    """The line that ``validate`` says instead of a success."""

    def run(name):
        capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            prefix_tune("validate", name)
        assert caught.value.code == 1
        said = capsys.readouterr()
        assert not said.out
        assert said.err.count("\n") == 1
        return said.err.rstrip()

    return run


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("shuffle: True", "shufle: True"), "Config key 'shufle': unknown key. Did you mean 'shuffle'?"),
        (("lr: 2e-3", "lr: fast"), "Config key 'optimizer.lr': must be a number, but is 'fast'."),
        (("output_dir: quickstart_output", "output_dir: ???"), "Config key 'output_dir': required, but not set."),
        (("epochs: 1", "epochs: [1"), "Config '{file}' cannot be read: "),
        (("# Config for prefix_dpo_single_device.py", "# Mine"), None),
        (
            ("# Config for prefix_dpo_single_device.py", "# Config for my_own_recipe.py"),
            "Config '{file}' is for my_own_recipe.py, which was not found; run this where that file is.",
        ),
    ],
)
def test_a_config_of_ones_own_is_checked_as_its_recipe_does(prefix_tune, refused, tmp_path, change, message):
    file = tmp_path / "mine.yaml"
    text = Path(find_config("quickstart/single_device")).read_text()
    assert change[0] in text
    file.write_text(text.replace(*change))
    if message is None:
        assert prefix_tune("validate", file) == WELL_FORMED
    else:
        assert refused(file).startswith(f"Error: {message.format(file=file)}")


def test_without_its_recipe_named_a_config_with_our_components_is_checked_too(refused, tmp_path):
    file = tmp_path / "mine.yaml"
    lines = Path(find_config("quickstart/single_device")).read_text().splitlines()[1:]
    file.write_text("\n".join([*lines, "bach_size: 2"]))
    assert refused(file) == "Error: Config key 'bach_size': unknown key. Did you mean 'batch_size'?"


def test_a_recipe_of_ones_own_brings_its_keys(prefix_tune, refused, tmp_path, monkeypatch):
    source = Path(prefix_dpo_single_device.__file__).read_text()
    keys = "@dataclass\nclass MyConfig(TrainingConfig):\n    my_key: int = 1\n\n\n@parse(MyConfig)"
    own = "from dataclasses import dataclass\n" + source.partition('"""\n\n')[2].replace("@parse(TrainingConfig)", keys)
    (tmp_path / "my_recipe_with_keys.py").write_text(own)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    text = Path(find_config("quickstart/single_device")).read_text()
    file = tmp_path / "mine.yaml"
    file.write_text(text.replace("prefix_dpo_single_device.py", "my_recipe_with_keys.py") + "my_key: 3\n")
    assert prefix_tune("validate", file) == WELL_FORMED
    file.write_text(file.read_text() + "my_other_key: 3\n")
    assert refused(file) == "Error: Config key 'my_other_key': unknown key."


def test_validate_of_a_name_that_nobody_knows(refused):
    assert refused("quickstart/single_devise") == (
        "Error: Config 'quickstart/single_devise' not found. Did you mean 'quickstart/single_device'?"
    )
    assert refused("nowhere") == (
        "Error: Config 'nowhere' not found. prefix-tune ls lists the configs of this package."
    )


def test_torchao_says_nothing_about_its_extensions_but_all_else(tmp_path, caplog):
    command = Path(sys.executable).with_name("prefix-tune")
    done = subprocess.run(
        [command, "validate", "quickstart/single_device"], cwd=tmp_path, capture_output=True, text=True
    )
    assert (done.stdout, done.stderr) == (WELL_FORMED, "")
    logging.getLogger("torchao").warning("something else")
    assert caplog.messages == ["something else"]


@pytest.mark.slow
def test_the_command_runs_our_recipes_on_two_processes(tmp_path):
    short = ["max_steps_per_epoch=1", "dataset_val=null", "run_val_every_n_steps=null", "dataset.num_pairs=64"]
    config = ["prefix_dpo_distributed", "--config", "quickstart/distributed"]
    done = run_forked(
        "prefix_sharing.cli:main", ["prefix-tune", "run", "--nproc_per_node", "2", *config, *short], tmp_path
    )
    assert done.returncode == 0, done.stderr[-3000:]
