"""A run that ended anywhere continues as if nothing had happened."""

import argparse
import contextlib
import json
import logging
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import prefix_dpo_single_device
from prefix_sharing import cli
from prefix_sharing.checkpoint import read_checkpoint
from prefix_sharing.errors import UserError
from prefix_sharing.run import directory as run_directory
from prefix_sharing.run.directory import locked_output_dir
from runs import evaluated_log_probs, lora, losses, make_config, make_recipe, read_log, run_in_process

KEYS = {"epochs": 2, "save_every_n_steps": 3, "seed": 1}


class KilledError(Exception):
    pass


def killed_after(directory, step, **keys):
    """A run that ends without a word in the step after one, as with kill -9."""
    recipe = make_recipe(directory, **KEYS | keys)
    recipe.setup()
    take = recipe.optimizer.step

    def take_or_die(*args, **kwargs):
        if recipe.global_step == step:
            # What was being written is written or not, as the moment may be.
            raise KilledError
        return take(*args, **kwargs)

    recipe.optimizer.step = take_or_die
    with pytest.raises(KilledError):
        recipe.train(prefix_dpo_single_device.StopRequest())
    recipe.cleanup()
    return recipe


def checkpoints(directory):
    return sorted(path.name for path in (Path(directory) / "checkpoints").glob("step_*"))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    directory = tmp_path_factory.mktemp("whole")
    recipe = run_in_process(directory, **KEYS)
    assert recipe.global_step == recipe.num_steps == 8
    return directory


def assert_same_run(directory, whole):
    assert losses(directory) == pytest.approx(losses(whole), rel=1e-6)
    # Every step once, in order, whichever of the runs it was in.
    assert [step for step, values in read_log(directory) if "loss" in values] == list(range(1, 9))
    assert evaluated_log_probs(directory) == pytest.approx(evaluated_log_probs(whole), rel=1e-5)
    assert evaluated_log_probs(directory, "before") == pytest.approx(evaluated_log_probs(whole, "before"), rel=1e-5)
    assert not list(directory.rglob("*.writing"))


@pytest.mark.parametrize("step", [3, 4, 7], ids=["at the end of an epoch", "in an epoch", "in the last step"])
def test_a_killed_run_continues_to_the_same_losses(tmp_path, whole, step):
    killed_after(tmp_path, step)
    run_in_process(tmp_path, **KEYS, resume="auto")
    assert_same_run(tmp_path, whole)


def test_a_run_killed_again_and_again_gets_there(tmp_path, whole):
    for step in (1, 4, 4, 6):
        killed_after(tmp_path, step, resume="auto")
    run_in_process(tmp_path, **KEYS, resume="auto")
    assert_same_run(tmp_path, whole)


def test_a_finished_run_is_finished_and_can_be_continued_for_more_epochs(tmp_path, whole, caplog):
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    logging.getLogger("prefix_sharing").propagate = True
    with caplog.at_level("INFO", logger="prefix_sharing"):
        again = run_in_process(tmp_path, **KEYS, resume="auto")
    assert "The run is finished, so nothing is left to train; to continue it, raise epochs." in caplog.messages
    assert again.global_step == 8
    assert_same_run(tmp_path, whole)
    more = run_in_process(tmp_path, **KEYS | {"epochs": 3}, resume="auto")
    assert more.global_step == 12
    assert len(losses(tmp_path)) == 12


def test_an_adapter_continues_alone(tmp_path):
    run_in_process(tmp_path / "whole", **KEYS, **lora())
    recipe = killed_after(tmp_path / "parts", 5, **lora())
    saved = read_checkpoint(sorted((tmp_path / "parts" / "checkpoints").glob("step_?"))[-1])
    size = sum(file["size"] for file in saved.content["files"].values())
    assert size < 4.0 * sum(p.numel() for p in recipe.model.parameters())  # without the base
    run_in_process(tmp_path / "parts", **KEYS, **lora(), resume="auto")
    assert losses(tmp_path / "parts") == pytest.approx(losses(tmp_path / "whole"), rel=1e-6)
    with pytest.raises(UserError, match="content of the base model's weights was"):
        run_in_process(tmp_path / "parts", **KEYS, **lora(), resume="auto", **{"checkpointer.seed": 9})


@pytest.mark.parametrize("damage", ["truncated", "flipped", "missing", "no json", "another step"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(tmp_path, whole, damage, caplog):
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    kept = checkpoints(tmp_path)
    assert kept == ["step_6", "step_8"]
    newest = tmp_path / "checkpoints" / "step_8"
    (shard,) = newest.glob("*.safetensors")
    content = bytearray(shard.read_bytes())
    if damage == "truncated":
        shard.write_bytes(content[: len(content) // 2])
    elif damage == "flipped":
        content[len(content) // 2] ^= 1
        shard.write_bytes(content)
    elif damage == "missing":
        shard.unlink()
    elif damage == "no json":
        (newest / "checkpoint.json").write_text("")
    else:
        said = (newest / "checkpoint.json").read_text()
        (newest / "checkpoint.json").write_text(said.replace('"step": 8', '"step": 9'))
    with pytest.raises(UserError, match=r"The checkpoint .*step_8 is damaged: .*"):
        run_in_process(tmp_path, **KEYS, resume=str(newest))
    with caplog.at_level("WARNING", logger="prefix_sharing"):
        run_in_process(tmp_path, **KEYS, resume="auto")
    assert "step_8 is damaged" in caplog.text
    assert_same_run(tmp_path, whole)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"seed": 2}, r"seed was 1 and is 2"),
        ({"loss.beta": 0.2}, r"loss was .*DPOLoss'\} and is .*0\.2"),
        ({"optimizer.lr": 0.5}, r"optimizer was"),
        ({"gradient_accumulation_steps": 1}, r"examples per step was"),
        ({"dataset.num_pairs": 72}, r"examples \(data and lengths\) was"),
        ({"checkpointer.seed": 9}, r"content of the reference's weights was \w+ and is"),
        ({"epochs": 1}, r"epochs is 1, which ended before step 8"),
        ({"max_steps_per_epoch": 2}, r"steps per epoch were 4 and are 2"),
    ],
    ids=str,
)
def test_what_would_be_another_run_is_refused_key_by_key(tmp_path, whole, changed, message):
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    with pytest.raises(UserError, match=rf"step_8 cannot be continued with this config: .*{message}"):
        run_in_process(tmp_path, **KEYS | changed, resume="auto")


def test_an_epoch_is_not_cut_where_its_weights_would_not_be_written(tmp_path):
    killed_after(tmp_path, 3, save_every_n_steps=2)
    with pytest.raises(UserError, match=r"step_2 cannot be continued.* steps per epoch were 4 and are 2"):
        run_in_process(tmp_path, **KEYS | {"max_steps_per_epoch": 2, "save_every_n_steps": 2}, resume="auto")
    assert not (tmp_path / "epoch_0").exists()


def test_other_held_out_data_are_not_compared_with_those_before(tmp_path, caplog):
    killed_after(tmp_path, 4)
    with caplog.at_level("WARNING", logger="prefix_sharing"):
        run_in_process(tmp_path, **KEYS, resume="auto", **{"dataset_val.num_pairs": 24})
    assert "is not what was evaluated before training, so the two are not compared" in caplog.text
    assert not (tmp_path / "margins.parquet").exists()


def test_logs_of_other_runs_in_the_same_place_stay(tmp_path):
    logs = tmp_path / "logs_of_all"
    logs.mkdir()
    entry = "Step 7 | loss:0.5 \n"
    (logs / "log_1.txt").write_text(entry)
    keys = {"metric_logger.log_dir": str(logs)}
    killed_after(tmp_path / "run", 4, **keys)
    run_in_process(tmp_path / "run", **KEYS, **keys, resume="auto")
    assert (logs / "log_1.txt").read_text() == entry
    (logs / "log_1.txt").unlink()
    lines = [line for file in logs.glob("log_*.txt") for line in file.read_text().splitlines()]
    assert sorted(int(line.split()[1]) for line in lines if "eval/" not in line) == list(range(1, 9))


def test_a_run_that_began_with_anothers_checkpoint_goes_on_from_it_until_it_has_one(tmp_path, whole):
    named = str(whole / "checkpoints" / "step_6")
    recipe = make_recipe(tmp_path, **KEYS, resume=named)
    recipe.setup()
    recipe.cleanup()  # killed before it had saved anything
    assert not checkpoints(tmp_path)
    again = make_recipe(tmp_path, **KEYS, resume="auto")
    again.setup()
    again.cleanup()
    assert again.global_step == 6


def test_a_run_is_not_written_over_unless_asked(tmp_path, whole):
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    with pytest.raises(UserError, match="holds the training checkpoints of another run; resume=auto continues it"):
        run_in_process(tmp_path, **KEYS)
    first = json.loads((tmp_path / "run.json").read_text())["id"]
    run_in_process(tmp_path, **KEYS, overwrite_output_dir=True)
    assert json.loads((tmp_path / "run.json").read_text())["id"] != first


def test_another_runs_checkpoint_is_never_taken_by_itself(tmp_path, whole, caplog):
    recipe = killed_after(tmp_path, 4)
    stranger = tmp_path / "checkpoints" / "step_8"
    shutil.copytree(whole / "checkpoints" / "step_8", stranger)
    with caplog.at_level("INFO", logger="prefix_sharing"):
        recipe = make_recipe(tmp_path, **KEYS, resume="auto")
        recipe.setup()
    assert recipe.global_step in (3, 4)
    assert "step_8 is another run's" in caplog.text
    recipe.cleanup()
    other = run_in_process(tmp_path / "other", **KEYS, resume=str(stranger))  # but if it is named
    assert other.global_step == 8


def test_nothing_to_resume_from_starts_from_the_beginning(tmp_path):
    recipe = run_in_process(tmp_path, resume="auto")
    assert recipe.resumed is None
    with pytest.raises(UserError, match="'resume': nowhere not found; give auto, or the directory of a training"):
        run_in_process(tmp_path / "two", resume="nowhere")
    with pytest.raises(
        UserError, match=r"'resume': .* is no training checkpoint; give auto, or .*/checkpoints/step_3\."
    ):
        run_in_process(tmp_path / "two", resume=str(tmp_path / "epoch_0"))


@contextlib.contextmanager
def process_that_locks(directory, models):
    """Another process with the locks of a run; killed at the end."""
    script = f"""if True:
        import sys, time
        sys.path[:0] = {sys.path!r}
        from omegaconf import OmegaConf
        from prefix_sharing.run.directory import locked_output_dir
        cfg = {{"output_dir": {str(directory)!r}, "checkpointer": {{"output_dir": {str(models)!r}}}}}
        with locked_output_dir(OmegaConf.create(cfg)):
            print("locked", flush=True)
            time.sleep(60)
        """
    other = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert other.stdout.readline() == "locked\n"
    yield other
    other.kill()
    other.wait()


def test_two_runs_in_one_directory_are_refused_and_a_stale_lock_is_not_one(tmp_path):
    cfg = make_config(tmp_path)
    with (
        process_that_locks(tmp_path, tmp_path) as other,
        pytest.raises(UserError, match=rf"in use by another run \(process {other.pid} on .*, since 20..-"),
        locked_output_dir(cfg),
    ):
        pass
    with locked_output_dir(cfg):
        assert str(os.getpid()) in (tmp_path / "run.lock").read_text()


def test_a_whole_run_directory_is_verified_by_one_command(tmp_path, whole, capsys):
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)

    def verify(directory):
        with pytest.raises(SystemExit) as caught:
            cli.verify(argparse.Namespace(output_dir=directory))
        return caught.value.code, capsys.readouterr()

    status, said = verify(tmp_path)
    assert status == 0
    assert re.fullmatch(r"(\S+/step_[68]: whole \(1 files, \d+\.\d MB\)\n){2}", said.out)
    (shard,) = (tmp_path / "checkpoints" / "step_6").glob("*.safetensors")
    shard.write_bytes(shard.read_bytes()[:-1])
    status, said = verify(tmp_path)
    assert status == 1
    assert re.search(r"step_6 is damaged: .* is not what was written\.\n.*step_8: whole", said.out)
    status, said = verify(tmp_path / "logs")
    assert (status, said.err) == (1, f"Error: There is no training checkpoint in {tmp_path}/logs/checkpoints.\n")


def test_a_checkpoint_is_on_the_disk_before_the_one_before_it_is_deleted(tmp_path, monkeypatch):
    seen = []
    fsync, rmtree = os.fsync, shutil.rmtree

    def see_fsync(descriptor):
        seen.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        fsync(descriptor)

    def see_rmtree(path, **kwargs):
        seen.append(f"{path.name} removed")
        rmtree(path, **kwargs)

    monkeypatch.setattr(os, "fsync", see_fsync)
    monkeypatch.setattr(shutil, "rmtree", see_rmtree)
    run_in_process(tmp_path, **KEYS | {"keep_last_n": 1, "epochs": 1, "dataset_val": None})
    monkeypatch.undo()
    shard = "shard-00001.safetensors"
    order = [shard, "checkpoint.json", "step_4.writing", "checkpoints", "step_3 removed"]
    last = {name: number for number, name in enumerate(seen)}
    assert sorted(order, key=last.__getitem__) == order


def test_a_damaged_later_checkpoint_costs_no_whole_one(tmp_path, whole):
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    later = (tmp_path / "checkpoints" / "step_8").rename(tmp_path / "checkpoints" / "step_99")
    (later / "checkpoint.json").write_text("")
    run_in_process(tmp_path, **KEYS | {"keep_last_n": 1}, resume="auto")
    assert checkpoints(tmp_path) == ["step_8", "step_99"]
    assert_same_run(tmp_path, whole)


def test_what_a_killed_run_was_writing_is_removed_and_what_it_replaced_is_put_back(tmp_path):
    for name in ("epoch_0.before", "epoch_1.before", "epoch_1", "epoch_1.writing", "checkpoints/step_3.writing"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "file").write_text(name)
    with locked_output_dir(make_config(tmp_path)):
        pass
    assert sorted(path.name for path in tmp_path.glob("epoch_*")) == ["epoch_0", "epoch_1"]
    assert (tmp_path / "epoch_0" / "file").read_text() == "epoch_0.before"
    assert (tmp_path / "epoch_1" / "file").read_text() == "epoch_1"
    assert not checkpoints(tmp_path)


def test_models_that_are_saved_elsewhere_have_their_lock_and_lose_their_leftovers_too(tmp_path):
    models = tmp_path / "models"
    (models / "epoch_0.writing").mkdir(parents=True)
    (models / "epoch_1.before").mkdir()
    cfg = make_config(tmp_path / "out", **{"checkpointer.output_dir": str(models)})
    with locked_output_dir(cfg):
        assert str(os.getpid()) in (models / "run.lock").read_text()
    assert sorted(path.name for path in models.glob("epoch_*")) == ["epoch_1"]
    other = make_config(tmp_path / "other", **{"checkpointer.output_dir": str(models)})
    with (
        process_that_locks(tmp_path / "first", models),
        pytest.raises(UserError, match=r"'checkpointer.output_dir': .*models is in use by another run \(process"),
        locked_output_dir(other),
    ):
        pass


def test_a_finished_run_that_evaluates_in_between_keeps_its_last_evaluation(tmp_path):
    keys = KEYS | {"run_val_every_n_steps": 4}
    run_in_process(tmp_path, **keys)
    after = evaluated_log_probs(tmp_path)
    logged = [step for step, values in read_log(tmp_path) if "eval/loss" in values]
    run_in_process(tmp_path, **keys, resume="auto")
    assert evaluated_log_probs(tmp_path) == pytest.approx(after, rel=1e-5)
    assert [step for step, values in read_log(tmp_path) if "eval/loss" in values] == logged == [0, 4, 8]


@pytest.fixture
def _small_disk():
    """One on which no file can be larger than 6 MB: the weights fit, a training checkpoint does not."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (6 * 10**6, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.usefixtures("_small_disk")
def test_a_save_that_does_not_fit_says_what_it_takes(tmp_path):
    message = (
        r"step_3\.writing could not be written \(File too large \(os error 27\)\); it takes \d+\.\d MB, and .* are "
        r"free there\. The checkpoints before it are whole; resume=auto continues from the last one\."
    )
    with pytest.raises(UserError, match=message):
        run_in_process(tmp_path, **KEYS)
    assert not list((tmp_path / "checkpoints").iterdir())


def test_too_little_room_is_found_before_training(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9 - 10**7, 10**7))
    message = (
        r"'output_dir': .* has 10\.0 MB free, but a training checkpoint takes 12\.\d MB and the trained model 4\.\d MB;"
    )
    with pytest.raises(UserError, match=message):
        run_in_process(tmp_path, **KEYS)
    assert not list(tmp_path.glob("logs/*"))


def test_too_little_room_for_the_model_on_a_disk_of_its_own_is_found(tmp_path, monkeypatch):
    disk_of, models = run_directory._disk_of, tmp_path / "models"
    monkeypatch.setattr(run_directory, "_disk_of", lambda path: SimpleNamespace(st_dev=int(path == str(models))))
    usage = lambda path: shutil._ntuple_diskusage(10**9, 0, 10**6 if path == models else 10**8)  # noqa: E731
    monkeypatch.setattr(shutil, "disk_usage", usage)
    models.mkdir()
    with pytest.raises(UserError, match=r"'checkpointer.output_dir': .*models has 1\.0 MB free, but the trained model"):
        run_in_process(tmp_path / "run", **KEYS | {"checkpointer.output_dir": str(models)})
    assert disk_of(str(tmp_path / "nowhere" / "yet")).st_dev == tmp_path.stat().st_dev


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
def test_a_signal_ends_the_run_after_a_step_and_it_continues(tmp_path, number):
    command = [Path(sys.executable).parent / "tune", "run", "prefix_dpo_single_device"]
    command += ["--config", "quickstart/single_device", "output_dir=out", "seed=0", "epochs=1"]
    run = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    log = tmp_path / "out" / "logs"
    while not any("Step 3 " in file.read_text() for file in log.glob("log_*.txt")):
        time.sleep(0.1)
        assert run.poll() is None
    run.send_signal(number)
    _, errors = run.communicate(timeout=60)
    assert run.returncode == 128 + number
    assert "Traceback" not in errors
    (saved,) = (tmp_path / "out" / "checkpoints").iterdir()
    step = int(saved.name.removeprefix("step_"))
    assert f"Stopped after step {step}; resume=auto continues from there." in errors
    assert max(entry for entry, _ in read_log(tmp_path / "out")) == step
    assert torch.isfinite(torch.tensor(losses(tmp_path / "out"))).all()
