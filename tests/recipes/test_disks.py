"""Disks that are full or can only be read: a sentence, and nothing that was there is lost."""

import contextlib
import json
import shutil
import subprocess
import sys

import pytest

import prefix_dpo_single_device
from prefix_sharing.checkpoint import find_checkpoints
from prefix_sharing.datasets.tokenizing import TokenizeRecord
from prefix_sharing.errors import UserError
from runs import SHORT, as_overrides, losses, make_recipe, run_in_process

KEYS = {"epochs": 5, "save_every_n_steps": 1, "keep_last_n": 1, "seed": 1, "dataset_val": None, "self_check": False}


class Disk:
    """A small one, in memory; the test is skipped where none can be mounted."""

    def __init__(self, directory, megabytes):
        self.directory = directory
        directory.mkdir()
        self._mount("-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(directory))

    def _mount(self, *arguments):
        try:
            subprocess.run(["mount", *arguments], capture_output=True, text=True, check=True)
        except (OSError, subprocess.CalledProcessError) as error:
            pytest.skip(f"no disk can be mounted here: {getattr(error, 'stderr', error)}")

    def fill(self, *, leaving):
        """Takes all of its room but some bytes."""
        with (self.directory / "filler").open("wb") as filler, contextlib.suppress(OSError):
            filler.write(bytes(shutil.disk_usage(self.directory).free - leaving))

    def make_room(self):
        (self.directory / "filler").unlink()

    def make_read_only(self):
        self._mount("-o", "remount,ro", str(self.directory))


@pytest.fixture
def disk(tmp_path):
    made = Disk(tmp_path / "disk", 60)
    yield made
    subprocess.run(["umount", "--lazy", str(made.directory)], check=True)


@pytest.fixture
def refused(tmp_path, monkeypatch, capsys):
    """Runs the recipe with overrides, and returns the one line that it ends with."""

    def run(**keys):
        overrides = as_overrides(SHORT | KEYS | {"output_dir": tmp_path / "out"} | keys)
        monkeypatch.setattr(sys, "argv", ["recipe", "--config", "quickstart/single_device", *overrides])
        with pytest.raises(SystemExit) as caught:
            prefix_dpo_single_device.recipe_main()
        assert caught.value.code == 1
        said = capsys.readouterr().err
        assert "Traceback" not in said
        return said[said.rindex("Error: ") :]

    return run


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    directory = tmp_path_factory.mktemp("whole")
    run_in_process(directory, **KEYS)
    return losses(directory)


def test_a_disk_that_is_full_at_a_save_costs_no_checkpoint(disk, whole):
    out = disk.directory / "out"
    keys = KEYS | {"metric_logger.log_dir": str(out / "logs"), "resume": "auto"}
    recipe = make_recipe(out, **keys)
    recipe.setup()
    before = recipe.save_state

    def save_state(metrics):
        if recipe.global_step == 3:
            recipe.training_checkpoints.wait()
            disk.fill(leaving=4 * 10**6)
        before(metrics)

    recipe.save_state = save_state
    message = (
        rf"{out}/checkpoints/step_3\.writing could not be written \(.*No space left on device.*\); it takes 12\.\d MB, "
        r"and \d\.\d MB are free there\. The checkpoints before it are whole; resume=auto continues from the last one\."
    )
    with pytest.raises(UserError, match=message):
        recipe.train(prefix_dpo_single_device.StopRequest())
    recipe.cleanup()
    assert [path.name for path in (out / "checkpoints").iterdir()] == ["step_2"]
    disk.make_room()
    again = run_in_process(out, **keys)
    assert again.resumed.step == 2
    assert losses(out) == pytest.approx(whole, rel=1e-6)


@pytest.mark.parametrize("leaving", [0, 4096], ids=["before training", "in training"])
def test_a_log_that_cannot_be_written_ends_the_run_with_a_sentence(disk, tmp_path, refused, whole, leaving):
    logs = disk.directory / "logs"
    logs.mkdir()
    disk.fill(leaving=leaving)
    said = refused(**{"metric_logger.log_dir": logs, "resume": "auto"})
    assert said.startswith("Error: A disk is full (No space left on device); free: ")
    assert f"{logs} has 0.0 MB. The checkpoints are whole; make room, and resume=auto continues from the last" in said
    assert bool(find_checkpoints(tmp_path / "out" / "checkpoints")) == bool(leaving)
    disk.make_room()
    again = run_in_process(tmp_path / "out", **KEYS, **{"metric_logger.log_dir": str(logs), "resume": "auto"})
    assert (again.resumed is not None) == bool(leaving)
    assert losses(disk.directory) == pytest.approx(whole, rel=1e-6)


@pytest.mark.parametrize("key", ["output_dir", "checkpointer.output_dir", "metric_logger.log_dir"])
def test_a_directory_that_can_only_be_read_is_one_sentence_before_training(disk, refused, key):
    disk.make_read_only()
    said = refused(**{key: disk.directory / "out"})
    assert said.startswith(f"Error: Config key '{key.removesuffix('.log_dir')}': ")
    assert "Read-only file system" in said
    assert str(disk.directory / "out") in said


def test_caches_that_can_only_be_read_are_used(disk, tmp_path, monkeypatch, caplog):
    file = tmp_path / "pairs.jsonl"
    pairs = [{"prompt": f"What is {i}?", "chosen": "A number.", "rejected": "No idea."} for i in range(32)]
    file.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    builder = "prefix_sharing.datasets.prefix_preference_dataset"
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", disk.directory / "datasets")
    monkeypatch.setattr("runs.SHORT", {key: value for key, value in SHORT.items() if not key.startswith("dataset")})
    keys = KEYS | {"dataset": {"_component_": builder, "data_files": str(file)}, "epochs": 1, "max_steps_per_epoch": 2}
    keys |= {"reference.cache_dir": str(disk.directory / "reference")}
    run_in_process(tmp_path / "first", **keys)
    disk.make_read_only()

    other = file.with_name("others.jsonl")
    other.write_text(file.read_text().replace("What", "Who"))
    keys_of_other = keys | {"dataset": {"_component_": builder, "data_files": str(other)}}
    new = run_in_process(tmp_path / "new", **keys_of_other)  # data that is not in the caches
    assert len(new.dataset) == 32

    monkeypatch.setattr(TokenizeRecord, "__call__", lambda *args: pytest.fail("it is tokenized already"))
    monkeypatch.setattr("prefix_sharing.reference.cache.ReferenceCache.add", lambda *args: pytest.fail("it is known"))
    caplog.clear()
    run_in_process(tmp_path / "second", **keys)
    assert losses(tmp_path / "second") == losses(tmp_path / "first")
    assert "cannot be written (Read-only file system); what is there is used" in caplog.text
