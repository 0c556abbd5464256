"""What the README promises: its commands run, its configs, keys and components exist."""

import re
import shlex
import subprocess
import sys
from pathlib import Path
from pkgutil import resolve_name

import pytest
import yaml
from runs import SHORT, as_overrides, eval_log, losses, tune_run
from torchtune.training import FullModelHFCheckpointer

from prefix_sharing.config import DistributedConfig, config_names, find_config
from prefix_sharing.datasets import prefix_preference_dataset
from prefix_sharing.quickstart import tokenizer

README = (Path(__file__).parents[1] / "README.md").read_text()
BLOCKS = re.findall(r"```(\w*)\n(.*?)```", README, re.DOTALL)
COMMANDS = [line for kind, block in BLOCKS if kind == "bash" for line in block.strip().splitlines()]
RUNS = [shlex.split(command.split("&&")[-1]) for command in COMMANDS if "tune run" in command]
SHORT_OVERRIDES = as_overrides(SHORT)


@pytest.mark.slow
def test_the_quickstart_learns_what_it_promises(tmp_path):
    command = next(run for run in RUNS if run[-1] == "quickstart/single_device")
    done = tune_run(*command[2:], cwd=tmp_path, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    last_line = done.stderr.strip().splitlines()[-1]
    (promised,) = (block for kind, block in BLOCKS if not kind and block.startswith("Trained"))
    assert last_line.split("; held-out")[0] == promised.split("; held-out")[0]
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
def test_the_other_quickstart_commands_run(tmp_path):
    others = [run for run in RUNS if any(arg.startswith("quickstart/") for arg in run)][1:]
    (stats,) = (run for run in others if "prefix_dpo_stats" in run)
    others.remove(stats)
    (answers,) = (run for run in others if "prefix_dpo_answers" in run)
    others.remove(answers)
    assert len(others) == 2  # distributed, and another loss
    done = tune_run(*stats[2:], *SHORT_OVERRIDES, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "quickstart_output" / "stats" / "lengths.png").exists()
    for i, command in enumerate(others):
        directory = tmp_path / str(i)
        directory.mkdir()
        done = tune_run(*command[2:], *SHORT_OVERRIDES, cwd=directory)
        assert done.returncode == 0, done.stderr[-3000:]
        assert len(losses(directory / "quickstart_output")) == 4
    # of the run that was just done, on one device as any
    done = tune_run(*answers[2:], *SHORT_OVERRIDES, "max_new_tokens=8", cwd=directory)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "**after training**" in (directory / "quickstart_output" / "answers.md").read_text()


@pytest.mark.slow
def test_the_plan_is_made(tmp_path):
    (command,) = (run for run in RUNS if "prefix_dpo_memory" in run)
    smaller = ["model._component_=torchtune.models.llama3_2.llama3_2_1b", "pack_len=512"]
    done = tune_run(*command[2:], *smaller, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert re.search(r"It fits into 72.0 GiB.*\nThe longest pack_len that fits", done.stdout)


@pytest.mark.slow
def test_copying_a_recipe_as_told_works(tmp_path):
    (block,) = (block for kind, block in BLOCKS if kind == "bash" and "my_recipe.py" in block)
    *copies, run = block.strip().splitlines()
    path = f"{Path(sys.executable).parent}:/usr/bin:/bin"
    for command in copies:
        subprocess.run(["bash", "-c", command], cwd=tmp_path, env={"PATH": path}, check=True)
    done = tune_run(*shlex.split(run)[2:], *SHORT_OVERRIDES, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize("command", [c for c in COMMANDS if "prefix_sharing.attention.show" in c])
def test_masks_are_shown(tmp_path, command):
    arguments = shlex.split(command)[1:]
    done = subprocess.run([sys.executable, *arguments], cwd=tmp_path, check=True, capture_output=True, text=True)
    if "--png" in command:
        assert (tmp_path / "mask.png").read_bytes().startswith(b"\x89PNG")
    else:
        # The picture at the top of the README is what this command draws.
        drawn = [line for line in done.stdout.splitlines() if set(line) <= {"█", "·"}]
        (picture,) = (block for kind, block in BLOCKS if not kind and "█" in block)
        assert [line.split()[0] for line in picture.strip().splitlines()] == drawn


def test_every_config_is_listed_and_exists():
    assert sorted(re.findall(r"^\| `([\w/.]+)` \| `prefix_dpo", README, re.MULTILINE)) == config_names()
    for run in RUNS:
        name = run[run.index("--config") + 1]
        if name.endswith(".yaml"):
            continue
        recipe = next(arg for arg in run if arg.startswith("prefix_dpo_"))
        assert find_config(name)
        if recipe != "prefix_dpo_memory":  # which takes those of both
            assert ("distributed" in recipe) == ("distributed" in name)


def test_every_component_and_key_exists():
    for path in set(re.findall(r"prefix_sharing(?:\.\w+)+", README)):
        resolve_name(path)
    (table,) = re.findall(r"Those that are ours:\n\n(.*?)\n\n", README, re.DOTALL)
    keys = re.findall(r"^\| `(\w+)`", table, re.MULTILINE)
    assert len(keys) >= 5
    assert set(keys) <= set(DistributedConfig.__dataclass_fields__)


def test_every_form_of_data_is_read(tmp_path):
    rows = re.findall(r"^\| `(\w+)`[^|]* \| `(\{.*\})` \|$", README, re.MULTILINE)
    assert [name for name, _ in rows] == ["messages", "messages", "messages", "text", "hh", "ranked", "chat"]
    for i, (name, row) in enumerate(rows):
        # The table writes the second answer as "[...]" where it is like the first.
        chosen = re.search(r'"chosen": (\[.*?\])', row)
        if chosen:
            row = row.replace('"rejected": [...]', '"rejected": ' + chosen.group(1).replace('"A"', '"B"'))
        file = tmp_path / f"{i}.jsonl"
        file.write_text(row + "\n")
        dataset = prefix_preference_dataset(tokenizer(), source="json", data_files=str(file))
        assert len(dataset) == 1
        forced = prefix_preference_dataset(tokenizer(), source="json", data_files=str(file), format=name)
        assert [r.tokens.tolist() for r in forced[0]] == [r.tokens.tolist() for r in dataset[0]]


def test_the_yaml_shown_is_a_data_set(tmp_path):
    (block,) = (block for kind, block in BLOCKS if kind == "yaml" and block.startswith("dataset"))
    node = yaml.safe_load(block)["dataset"]
    assert resolve_name(node.pop("_component_")) is prefix_preference_dataset
    file = tmp_path / node.pop("data_files")
    file.write_text('{"prompt": "Q", "chosen": "A", "rejected": "B"}\n' * 101)
    assert len(prefix_preference_dataset(tokenizer(), data_files=str(file), **node)) == 1


def test_ci_runs_the_readmes_test_command():
    commands = [command for command in COMMANDS if "pytest" in command]
    assert commands == ["pip install -e '.[dev]' && pytest"]
    assert "grep -m1 -F 'pytest' README.md" in (Path(__file__).parents[1] / ".ci" / "run").read_text()
