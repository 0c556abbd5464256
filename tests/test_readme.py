"""What the README promises: its commands run, and what it names exists."""

import re
import shlex
from pkgutil import resolve_name

import pytest
from torchtune.training import FullModelHFCheckpointer

from documents import README, ROOT, blocks, commands, runs, runs_of, table
from prefix_sharing.config import find_config
from prefix_sharing.datasets import prefix_preference_dataset
from prefix_sharing.quickstart import tokenizer
from processes import run_forked
from runs import SHORT, as_overrides, eval_log, losses, tune_run, tune_run_afresh

SHORT_OVERRIDES = as_overrides(SHORT)


@pytest.mark.slow
def test_the_quickstart_learns_what_it_promises(tmp_path):
    install_and_run = next(line for line in commands(README) if "pip install . &&" in line)
    done = tune_run_afresh(*shlex.split(install_and_run.split("&& tune run")[1]), cwd=tmp_path, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    last_line = done.stderr.strip().splitlines()[-1]
    assert last_line.split("; held-out")[0] + "; held-out" in README
    output_dir = tmp_path / "quickstart_output"
    assert (output_dir / "curves.png").read_bytes().startswith(b"\x89PNG")
    accuracies = [metrics["eval/rewards/accuracies"] for metrics in eval_log(output_dir)]
    assert accuracies[0] <= 0.65
    assert accuracies[-1] >= 0.90
    checkpointer = FullModelHFCheckpointer(
        checkpoint_dir=str(output_dir / "epoch_0"),
        checkpoint_files=["model-00001-of-00001.safetensors"],
        model_type="LLAMA3",
        output_dir=str(tmp_path / "again"),
    )
    assert checkpointer.load_checkpoint()["model"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "run", runs_of("prefix_dpo_distributed", README) + runs_of("prefix_dpo_single_device", README)[1:]
)
def test_the_other_quickstart_commands_run(tmp_path, run):
    done = tune_run(*run, *SHORT_OVERRIDES, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(losses(tmp_path / "quickstart_output")) == 4


@pytest.mark.slow
def test_copying_a_recipe_as_told_works(tmp_path):
    copying = next(block for block in blocks(README, "bash") if "my_recipe.py" in block)
    *copies, run = copying.strip().splitlines()
    for command in copies:
        assert command.startswith("prefix-tune ")
        done = run_forked("prefix_sharing.cli:main", shlex.split(command), tmp_path)
        assert done.returncode == 0, done.stderr[-3000:]
    done = tune_run(*shlex.split(run)[2:], *SHORT_OVERRIDES, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]


def test_every_config_and_recipe_that_is_run_exists():
    assert len(runs(README)) >= 5
    for run in runs(README):
        recipe = next(arg for arg in run if arg.endswith(".py") or arg.startswith("prefix_dpo_"))
        name = run[run.index("--config") + 1]
        if not name.endswith(".yaml"):
            assert find_config(name)
            assert resolve_name(f"{recipe}:recipe_main")
            assert ("distributed" in recipe) == ("distributed" in name)
    for cells in table(README, "recipe"):
        for recipe in re.findall(r"`(\w+)`", cells[0]):
            assert resolve_name(f"{recipe}:recipe_main")


def test_components_and_files_that_are_named_exist():
    for path in set(re.findall(r"prefix_sharing(?:\.\w+)+", README)):
        resolve_name(path)
    for link in re.findall(r"\]\((?!http)([^)#]+)", README):
        assert (ROOT / link).exists(), link


def test_the_record_shown_is_read(tmp_path):
    record = next(line for line in re.findall(r"`(\{.*?\})`", README) if "chosen" in line)
    file = tmp_path / "my_pairs.jsonl"
    file.write_text(record + "\n")
    assert len(prefix_preference_dataset(tokenizer(), source="json", data_files=str(file))) == 1


def test_figures_are_those_of_the_benchmark_page():
    page = (ROOT / "docs" / "benchmark.md").read_text()
    measured = {cells[0]: (cells[3], cells[4]) for cells in table(page, "lengths like")}
    assert {cells[0]: (cells[1], cells[2]) for cells in table(README, "lengths like")} == measured


def test_ci_runs_the_readmes_test_command():
    assert [command for command in commands(README) if "pytest" in command] == ["pip install -e '.[dev]' && pytest"]
    assert "grep -m1 -F 'pytest' README.md" in (ROOT / ".ci" / "run").read_text()
