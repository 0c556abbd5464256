"""Steps whose loss or gradient is not finite: named, and kept from weights, optimizer and log."""

import json
import math
import shutil

import pytest
import torch

from prefix_sharing.errors import UserError
from prefix_sharing.run.signals import StopRequest
from runs import SHORT, as_overrides, losses, make_recipe, read_log, run_distributed, run_in_process, tune_run

STEPS = {"dataset.num_pairs": 64, "dataset_val": None, "max_steps_per_epoch": 6, "lr_scheduler": None}


def diverging(*at_calls, **arguments):
    return {"loss": {"_component_": "stubs.DivergingLoss", "at_calls": list(at_calls), **arguments}}


def test_a_run_that_diverges_stops_and_names_step_and_examples(tmp_path):
    recipe = make_recipe(tmp_path, **{"optimizer.lr": 1e18, "lr_scheduler": None, "dataset_val": None})
    recipe.setup()
    with pytest.raises(UserError, match="Training diverged at step 2: the loss is not finite. Its examples are record"):
        recipe.train(StopRequest())
    assert len(losses(tmp_path)) == 1
    assert not (tmp_path / "epoch_0").exists()


def test_the_examples_whose_loss_is_not_finite_are_named_and_nothing_is_updated(tmp_path):
    recipe = make_recipe(tmp_path, dataset_val=None)
    recipe.setup()
    bad = recipe.plan.epoch(0)[1].example_index[2]
    recipe.reference.log_probs[bad, 1] = torch.nan
    saved = {}
    step = recipe.optimizer.step

    def remember():
        step()
        saved.update({name: tensor.clone() for name, tensor in recipe.model.state_dict().items()})

    recipe.optimizer.step = remember
    record = f"record {bad} of the split of generated pairs"
    message = (
        rf"at step 2: the loss is not finite. Its examples are {record} \(seed 0\) \(log-probs -\d+\.\d+, -\d.*\)\. N"
    )
    with pytest.raises(UserError, match=message):
        recipe.train(StopRequest())
    assert all(torch.equal(tensor, saved[name]) for name, tensor in recipe.model.state_dict().items())


def test_a_gradient_that_is_not_finite_stops_the_run(tmp_path):
    recipe = make_recipe(tmp_path, dataset_val=None)
    recipe.setup()
    recipe.model.layers[0].mlp.w1.weight.register_hook(lambda gradient: gradient * torch.inf)
    with pytest.raises(UserError, match="at step 1: the norm of the gradient is not finite. Its examples are record"):
        recipe.train(StopRequest())


def test_a_step_is_left_out_as_if_it_had_not_been(tmp_path, caplog):
    # Two Rows a step: calls 5 and 6 are step 3's.
    recipe = make_recipe(tmp_path, **STEPS, **diverging(6), on_nonfinite="skip")
    recipe.setup()
    states = []
    step = recipe.optimizer.step

    def remember():
        states.append([parameter.detach().clone() for parameter in recipe.model.parameters()])
        step()

    recipe.optimizer.step = remember
    with caplog.at_level("WARNING", logger="prefix_sharing"):
        recipe.train(StopRequest())
    recipe.cleanup()
    assert len(states) == 5  # of 6 steps
    assert recipe.global_step == 6
    entries = dict(read_log(tmp_path))
    assert [entries[i].get("num_skipped_steps") for i in range(1, 7)] == [0, 0, 1, 1, 1, 1]
    assert "loss" not in entries[3]
    assert "grad_norm" not in entries[3]
    assert all(math.isfinite(value) for metrics in entries.values() for value in metrics.values())
    assert all("loss" in entries[i] for i in (1, 2, 4, 5, 6))
    (line,) = (message for message in caplog.messages if message.startswith("Step "))
    assert line.startswith("Step 3 is left out: the loss is not finite. Its examples are record ")
    assert "(log-probs -" in line


def test_an_entry_over_several_steps_is_that_of_those_that_were_taken(tmp_path):
    keys = STEPS | {"optimizer.lr": 1e-30}
    run_in_process(tmp_path / "each", **keys)
    run_in_process(tmp_path / "skipped", **keys, **diverging(6), on_nonfinite="skip", log_every_n_steps=3)
    each = [metrics["log_probs/chosen"] for _, metrics in read_log(tmp_path / "each")]
    together = [metrics["log_probs/chosen"] for _, metrics in read_log(tmp_path / "skipped")]
    assert together == pytest.approx([sum(each[:2]) / 2, sum(each[3:]) / 3], rel=1e-6)


def test_too_many_in_a_row_end_the_run(tmp_path):
    keys = STEPS | {"on_nonfinite": "skip", "max_nonfinite_in_a_row": 2}
    run_in_process(tmp_path / "two", **keys, **diverging(1, 3, 7, 9))  # steps 1 and 2, 4 and 5
    message = (
        "at step 4: the loss is not finite.* 2 steps before it were left out, which is as many as max_nonfinite_in"
    )
    with pytest.raises(UserError, match=message):
        run_in_process(tmp_path / "three", **keys, **diverging(3, 5, 7))


def test_the_count_goes_on_after_a_resume(tmp_path):
    keys = STEPS | {"on_nonfinite": "skip", "save_every_n_steps": 3, "keep_last_n": 9, "seed": 1}
    run_in_process(tmp_path, **keys, **diverging(5))  # step 3
    shutil.rmtree(tmp_path / "checkpoints" / "step_6")
    content = json.loads((tmp_path / "checkpoints" / "step_3" / "checkpoint.json").read_text())
    assert content["values"]["finite"] == {"skipped": 1, "in_a_row": 1}
    resumed = run_in_process(tmp_path, **keys, **diverging(5), resume="auto")
    assert resumed.finite.metrics() == {"num_skipped_steps": 2}  # its fifth call is in step 6


DISTRIBUTED = SHORT | STEPS | {"batch_size": 2, "seed": 0}
ON_RANK_1 = ["loss=stubs.DivergingLoss", "loss.at_calls=[6]", "loss.on_rank=1"]


@pytest.mark.slow
def test_one_rank_of_two_stops_both(tmp_path, request):
    shutil.copy(request.config.rootpath / "tests" / "support" / "stubs.py", tmp_path)
    command = ["--nproc_per_node", "2", "prefix_dpo_distributed", "--config", "quickstart/distributed"]
    done = tune_run(*command, *as_overrides(DISTRIBUTED), *ON_RANK_1, "output_dir=out", cwd=tmp_path)
    assert done.returncode != 0
    assert "Error: rank 0: Training diverged at step 3: the loss is not finite. Its examples are record" in done.stderr
    assert done.stderr.count("(log-probs -") == 1
    assert len(losses(tmp_path / "out")) == 2


@pytest.mark.slow
def test_one_rank_of_two_is_left_out_on_both(tmp_path, request):
    (tmp_path / "run").mkdir()
    shutil.copy(request.config.rootpath / "tests" / "support" / "stubs.py", tmp_path / "run")
    keys = dict(item.split("=") for item in ON_RANK_1)
    out = run_distributed(tmp_path / "run", 2, **DISTRIBUTED, **keys, on_nonfinite="skip")
    assert len(losses(out)) == 5
    assert all(math.isfinite(value) for _, metrics in read_log(out) for value in metrics.values())
    assert [metrics["num_skipped_steps"] for _, metrics in read_log(out)] == [0, 0, 1, 1, 1, 1]
