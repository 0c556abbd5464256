"""What a user types: ``tune run`` from an empty directory, a copied recipe, bad input; and what is installed."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import prefix_dpo_distributed
import prefix_dpo_single_device
from prefix_sharing.config import config_names, find_config
from runs import SHORT, as_overrides, losses, tune_run, tune_run_afresh

ROOT = Path(__file__).parents[2]
OVERRIDES = as_overrides(SHORT)


@pytest.mark.slow
@pytest.mark.parametrize(("recipe", "processes"), [(prefix_dpo_single_device, 1), (prefix_dpo_distributed, 2)])
def test_a_copied_and_changed_recipe_runs_from_its_own_directory(tmp_path, recipe, processes):
    source = Path(recipe.__file__).read_text()
    changed = source.replace('"grad_norm"] = grad_norm.item()', '"grad_norm"], values["mine"] = grad_norm.item(), 7')
    assert changed != source
    (tmp_path / "my_recipe.py").write_text(changed)
    name = "quickstart/single_device" if processes == 1 else "quickstart/distributed"
    shutil.copy(find_config(name), tmp_path / "my.yaml")
    launcher = [] if processes == 1 else ["--nproc_per_node", str(processes)]
    done = tune_run(*launcher, "my_recipe.py", "--config", "my.yaml", *OVERRIDES, "output_dir=out", cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(losses(tmp_path / "out")) == 4
    (log,) = (tmp_path / "out" / "logs").glob("*.txt")
    assert log.read_text().count("mine:7") == 4


@pytest.mark.slow
def test_bad_input_is_one_line_for_tune_run_too(tmp_path):
    done = tune_run_afresh(
        "prefix_dpo_single_device", "--config", "quickstart/single_device", "bach_size=2", cwd=tmp_path
    )
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    said = done.stderr.splitlines()[-1]
    assert said == "Error: Config key 'bach_size': unknown key. Did you mean 'batch_size'?"
    assert not [file for file in tmp_path.rglob("*") if file.is_file()]


@pytest.mark.slow
def test_two_processes_of_the_single_device_recipe_are_refused_once_and_write_nothing(tmp_path):
    recipe = ["prefix_dpo_single_device", "--config", "quickstart/single_device"]
    done = tune_run("--nproc_per_node", "2", *recipe, cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr.count("This recipe runs on one process, but 2 were started") == 1
    assert done.stderr.count("Skipping import of cpp extensions") <= 1  # tune's own, before any of our code runs
    assert not [file for file in tmp_path.rglob("*") if file.is_file()]


def test_recipes_read_top_to_bottom():
    for recipe in (prefix_dpo_single_device, prefix_dpo_distributed):
        lines = Path(recipe.__file__).read_text().splitlines()
        assert len(lines) <= 300
        assert any(".backward()" in line for line in lines)


@pytest.mark.slow
def test_the_wheel_carries_package_recipes_and_configs(tmp_path):
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), str(ROOT)]
    subprocess.run(build, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        archive.extractall(tmp_path / "site")
    assert {"prefix_dpo_single_device.py", "prefix_dpo_distributed.py", "prefix_sharing/__init__.py"} <= names
    assert {f"prefix_sharing/configs/{name}.yaml" for name in config_names()} <= names
    assert "prefix_sharing/quickstart/bpe_2048/tokenizer.json" in names
    assert not [name for name in names if name.startswith(("tests", "recipes", "components", "configs"))]

    # It works from where it is unpacked, without this source tree.
    code = (
        "import prefix_sharing, prefix_dpo_single_device as recipe; from prefix_sharing.config import find_config; "
        "print(prefix_sharing.__file__, recipe.__file__, find_config('quickstart/single_device'))"
    )
    environment = {"PYTHONPATH": str(tmp_path / "site"), "PATH": "/usr/bin:/bin"}
    found = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, check=True, capture_output=True, text=True
    )
    assert all(path.startswith(str(tmp_path / "site")) for path in found.stdout.split())
