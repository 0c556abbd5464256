"""The single-device recipe from config to checkpoint, in this process."""

import logging
import math

import matplotlib.figure
import pyarrow.parquet as pq
import pytest
import torch
from omegaconf import OmegaConf

import prefix_dpo_single_device
from plain import plain_log_probs
from prefix_sharing.config import TrainingConfig, check_config
from prefix_sharing.errors import UserError
from prefix_sharing.quickstart import preference_pairs, tokenizer
from prefix_sharing.tokenizers import hf_chat_tokenizer
from runs import (
    eval_log,
    evaluated_log_probs,
    hf_checkpointer,
    load_plain_model,
    losses,
    make_config,
    read_log,
    run_in_process,
    training_log,
    transformers_log_probs,
)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    output_dir = tmp_path_factory.mktemp("run")
    return run_in_process(output_dir, log_peak_memory_stats=True), output_dir


def test_margins_of_held_out_pairs_are_those_of_the_evaluation(run):
    recipe, output_dir = run
    table = pq.read_table(output_dir / "margins.parquet")
    assert table["record"].to_pylist() == list(range(len(recipe.dataset_val)))
    before, after = (table[f"margin_{when}"].to_numpy() for when in ("before", "after"))
    evaluation = eval_log(output_dir)[-1]
    # DPO's reward is beta times the change, for the policy before training is the reference
    assert 0.1 * (after - before).mean() == pytest.approx(evaluation["eval/rewards/margins"], rel=1e-5)
    assert (after > before).mean() == evaluation["eval/rewards/accuracies"]
    assert table["chosen_log_prob_after"].to_numpy().mean() == pytest.approx(evaluation["eval/log_probs/chosen"])
    assert (output_dir / "margins.png").exists()


def test_metrics_have_torchtunes_names(run):
    _, output_dir = run
    assert [step for step, _ in read_log(output_dir)] == [0, 1, 2, 3, 4, 4]
    expected = {
        "loss",
        "rewards/chosen",
        "rewards/rejected",
        "rewards/accuracies",
        "rewards/margins",
        "log_probs/chosen",
        "log_probs/rejected",
        "examples_per_second",
        "tokens_per_second_per_gpu",
        "tokens_saved",
    }
    assert set(eval_log(output_dir)[0]) == {f"eval/{name}" for name in expected}
    memory = {"peak_memory_process", "memory_parameters", "memory_gradients", "memory_optimizer_state"}
    assert set(training_log(output_dir)[0]) == expected | memory | {"lr", "grad_norm"}
    assert 0.3 < training_log(output_dir)[0]["tokens_saved"] < 0.5


def test_logged_log_probs_are_those_of_plain_sequences(run, tmp_path):
    _, output_dir = run
    model = load_plain_model(output_dir / "epoch_0", tmp_path)
    held_out = preference_pairs(tokenizer(), num_pairs=16, seed=1)
    with torch.no_grad():
        log_probs = torch.stack([plain_log_probs(model, held_out[i]) for i in range(16)]).mean(0)
    logged = eval_log(output_dir)[-1]
    assert logged["eval/log_probs/chosen"] == pytest.approx(log_probs[0].item(), rel=1e-5)
    assert logged["eval/log_probs/rejected"] == pytest.approx(log_probs[1].item(), rel=1e-5)


def test_transformers_loads_the_checkpoint_and_agrees(run):
    transformers = pytest.importorskip("transformers")
    _, output_dir = run
    model = transformers.AutoModelForCausalLM.from_pretrained(output_dir / "epoch_0", dtype=torch.float32)
    held_out = preference_pairs(hf_chat_tokenizer(str(output_dir / "epoch_0")), num_pairs=16, seed=1)
    assert evaluated_log_probs(output_dir) == pytest.approx(transformers_log_probs(model, held_out), abs=1e-3)


def test_longer_responses_are_discounted_in_policy_and_reference(tmp_path):
    run_in_process(tmp_path, **{"loss.ld_alpha": 0.3, "max_steps_per_epoch": 2, "dataset_val": None})
    run_in_process(tmp_path / "plain", **{"max_steps_per_epoch": 2, "dataset_val": None})
    discounted, plain = (training_log(directory)[0] for directory in (tmp_path, tmp_path / "plain"))
    # Policy and reference are the same model before the first step, discounted or not.
    assert discounted["loss"] == plain["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert discounted["log_probs/chosen"] >= plain["log_probs/chosen"]


@pytest.mark.parametrize(
    ("name", "argument"), [("DPOLoss", "use_weighting"), ("DPOLoss", "ld_alpha"), ("ORPOLoss", "nll_over_prompt")]
)
def test_what_needs_more_than_a_sum_does_not_depend_on_rows(tmp_path, name, argument):
    loss = {"_component_": f"prefix_sharing.losses.{name}", argument: 0.3 if argument == "ld_alpha" else True}
    keys = {"loss": loss, "max_steps_per_epoch": 3}
    plain = {"loss": {"_component_": loss["_component_"]}, "max_steps_per_epoch": 3}
    run_in_process(tmp_path / "one", **keys | {"batch_size": 8, "gradient_accumulation_steps": 1})
    run_in_process(tmp_path / "four", **keys | {"batch_size": 2, "gradient_accumulation_steps": 4})
    run_in_process(tmp_path / "plain", **plain | {"batch_size": 8, "gradient_accumulation_steps": 1})
    assert losses(tmp_path / "four") == pytest.approx(losses(tmp_path / "one"), rel=1e-5)
    assert losses(tmp_path / "one")[-1] != pytest.approx(losses(tmp_path / "plain")[-1], rel=1e-4)
    assert eval_log(tmp_path / "four")[-1]["eval/loss"] == pytest.approx(
        eval_log(tmp_path / "one")[-1]["eval/loss"], rel=1e-5
    )


def test_another_checkpoint_can_be_the_reference(tmp_path):
    run_in_process(tmp_path / "first", dataset_val=None, **{"optimizer.lr": 1e-2})
    reference = hf_checkpointer(tmp_path / "first" / "epoch_0", tmp_path / "unused")
    recipe = run_in_process(tmp_path / "second", dataset_val=None, ref_checkpointer=reference)
    model = load_plain_model(tmp_path / "first" / "epoch_0", tmp_path)
    visited = recipe.plan.examples_visited(0, 1)
    with torch.no_grad():
        expected = torch.stack([plain_log_probs(model, recipe.dataset[i]) for i in visited])
    torch.testing.assert_close(recipe.reference.log_probs[visited], expected, rtol=1e-5, atol=1e-4)
    assert abs(losses(tmp_path / "second")[0] - math.log(2)) > 1e-2
    # The policy starts from its own weights.
    assert losses(tmp_path / "second")[0] != losses(tmp_path / "first")[0]
    first = training_log(tmp_path / "first")[0]["log_probs/chosen"]
    assert training_log(tmp_path / "second")[0]["log_probs/chosen"] == pytest.approx(first, rel=1e-6)


@pytest.mark.parametrize("loss", ["SimPOLoss", "ORPOLoss"])
def test_losses_without_reference_compute_none(tmp_path, loss):
    recipe = run_in_process(tmp_path, **{"loss._component_": f"prefix_sharing.losses.{loss}"})
    assert recipe.reference is None
    assert all(math.isfinite(value) for _, metrics in read_log(tmp_path) for value in metrics.values())


def test_every_n_steps_are_logged_and_evaluated(tmp_path):
    run_in_process(tmp_path, log_every_n_steps=2, run_val_every_n_steps=3)
    assert [step for step, metrics in read_log(tmp_path) if "loss" in metrics] == [2, 4]
    assert [step for step, metrics in read_log(tmp_path) if "eval/loss" in metrics] == [0, 3, 4]


def test_an_entry_covers_all_steps_since_the_last_one_across_epochs_and_to_the_end(tmp_path):
    keys = {"max_steps_per_epoch": 5, "epochs": 2, "dataset_val": None}
    run_in_process(tmp_path / "each", **keys)
    run_in_process(tmp_path / "third", log_every_n_steps=3, **keys)
    each = losses(tmp_path / "each")
    entries = {step: metrics["loss"] for step, metrics in read_log(tmp_path / "third")}
    assert list(entries) == [3, 6, 9, 10]
    for step, since in ((3, 0), (6, 3), (9, 6), (10, 9)):
        assert entries[step] == pytest.approx(sum(each[since:step]) / (step - since), rel=1e-6), step


def test_curves_are_of_one_run(tmp_path, monkeypatch):
    run_in_process(tmp_path, max_steps_per_epoch=3, dataset_val=None)
    drawn = []
    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", lambda figure, *args, **kwargs: drawn.append(figure))
    run_in_process(tmp_path, max_steps_per_epoch=2, dataset_val=None, overwrite_output_dir=True)
    (line,) = drawn[0].axes[0].lines
    assert line.get_xdata().tolist() == [1, 2]


def test_without_clipping_no_gradient_is_changed(tmp_path, monkeypatch):
    from prefix_sharing.run.optimization import clip_grad_norm

    model = torch.nn.Linear(3, 2)
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 5.0)
    versions = [parameter.grad._version for parameter in model.parameters()]
    norm = clip_grad_norm(model, None)
    assert norm.item() == pytest.approx(5 * math.sqrt(8))
    assert [parameter.grad._version for parameter in model.parameters()] == versions
    assert clip_grad_norm(model, 1.0).item() == pytest.approx(norm.item())
    assert clip_grad_norm(model, None).item() == pytest.approx(1.0, rel=1e-5)


def test_the_log_is_closed_when_a_run_fails(tmp_path, monkeypatch):
    closed = []
    recipe_class = prefix_dpo_single_device.PrefixDPORecipeSingleDevice
    cleanup = recipe_class.cleanup
    monkeypatch.setattr(recipe_class, "cleanup", lambda self: closed.append(self) or cleanup(self))
    monkeypatch.setattr(recipe_class, "train", lambda self: 1 / 0)
    cfg = make_config(tmp_path, dataset_val=None)
    OmegaConf.save(cfg, tmp_path / "config.yaml")
    monkeypatch.setattr("sys.argv", ["recipe", "--config", str(tmp_path / "config.yaml")])
    with pytest.raises(SystemExit):
        prefix_dpo_single_device.recipe_main()
    assert closed[0].metric_logger._file.closed


def test_examples_without_pairs_are_refused(tmp_path):
    file = tmp_path / "ranked.jsonl"
    file.write_text('{"prompt": "q", "responses": ["a", "b", "c"]}\n{"prompt": "q", "responses": ["a"]}\n')
    dataset = {
        "_component_": "prefix_sharing.datasets.prefix_preference_dataset",
        "source": "json",
        "data_files": str(file),
    }
    with pytest.raises(UserError, match="DPOLoss compares pairs, but 1 of 2 examples have one response"):
        run_in_process(tmp_path / "out", dataset=OmegaConf.create(dataset))


def test_the_last_line_says_what_became_of_the_accuracy(tmp_path, caplog):
    logging.getLogger("prefix_sharing").propagate = True
    with caplog.at_level("INFO", logger="prefix_sharing"):
        recipe = run_in_process(tmp_path)
    line = caplog.messages[-1]
    trained = "Trained llama3 (1.1 M parameters) with DPOLoss for 4 steps on generated pairs (seed 0)"
    assert line.startswith(f"{trained} (32 of 64 examples)")
    assert f"checkpoint saved to {tmp_path / 'epoch_0'}" in line
    before, after = (metrics["eval/rewards/accuracies"] for metrics in eval_log(tmp_path))
    assert line.endswith(f"held-out accuracy {before:.3f} -> {after:.3f}.")
    assert recipe.global_step == 4
    assert f"Checkpoint saved to {tmp_path / 'epoch_0'}" in caplog.messages
    assert "epoch_0.writing" not in caplog.text  # as torchtune says of a directory that is renamed


def test_the_seed_that_was_drawn_is_in_the_saved_config(tmp_path):
    recipe = run_in_process(tmp_path, seed=None, dataset_val=None, max_steps_per_epoch=1)
    saved = OmegaConf.load(tmp_path / "torchtune_config.yaml")
    assert saved.seed == recipe.seed
    # which is a config that runs again
    assert check_config(saved, TrainingConfig).seed == recipe.seed
