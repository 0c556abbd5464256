"""A run that ended anywhere continues as if nothing had happened."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import prefix_dpo_single_device
from prefix_sharing.checkpoint import read_checkpoint
from prefix_sharing.errors import UserError
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


def test_a_finished_run_is_finished_and_can_be_continued_for_more_epochs(tmp_path, whole):
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    again = run_in_process(tmp_path, **KEYS, resume="auto")
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


@pytest.mark.parametrize("damage", ["truncated", "flipped", "missing", "no json"])
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
    else:
        (newest / "checkpoint.json").write_text("")
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
    ],
    ids=str,
)
def test_what_would_be_another_run_is_refused_key_by_key(tmp_path, whole, changed, message):
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    with pytest.raises(UserError, match=rf"step_8 cannot be continued with this config: .*{message}"):
        run_in_process(tmp_path, **KEYS | changed, resume="auto")


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


def test_two_runs_in_one_directory_are_refused_and_a_stale_lock_is_not_one(tmp_path):
    cfg = make_config(tmp_path)
    script = f"""if True:
        import sys, time
        sys.path[:0] = {sys.path!r}
        from omegaconf import OmegaConf
        from prefix_sharing.run.directory import locked_output_dir
        with locked_output_dir(OmegaConf.create({{"output_dir": {str(tmp_path)!r}}})):
            print("locked", flush=True)
            time.sleep(60)
        """
    other = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert other.stdout.readline() == "locked\n"
    with (
        pytest.raises(UserError, match=rf"in use by another run \(process {other.pid} on .*, since 20..-"),
        locked_output_dir(cfg),
    ):
        pass
    other.kill()
    other.wait()
    with locked_output_dir(cfg):
        assert str(os.getpid()) in (tmp_path / "run.lock").read_text()


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
