"""Training follows torchtune's own paired computation, and does not depend on how examples are spread over rows."""

import math

import pytest
import torch
from safetensors.torch import load_file
from torchtune import rlhf
from torchtune.data import padded_collate_dpo
from torchtune.models.convert_weights import hf_to_tune
from torchtune.models.llama3 import llama3
from torchtune.rlhf.loss import DPOLoss

from plain import uniform_sizes
from prefix_sharing.hosts.torchtune.paired import as_torchtunes_sample
from prefix_sharing.planning import Fixed, Plan
from prefix_sharing.quickstart import preference_pairs, tokenizer
from runs import losses, run_in_process, training_log

DIMS = {"vocab_size": 2048, "num_layers": 3, "num_heads": 4, "num_kv_heads": 2, "embed_dim": 128, "max_seq_len": 512}
STEPS = 20
TRAINING = {
    "dataset.num_pairs": 160,
    "dataset_val": None,
    "max_steps_per_epoch": STEPS,
    "batch_size": 8,
    "gradient_accumulation_steps": 1,
    "lr_scheduler": None,
    "optimizer.lr": 2e-4,
}


def torchtune_losses(initial_weights):
    """DPO as torchtune's recipes do it: paired batch, full logits, its log-prob function, its loss."""
    weights = hf_to_tune(load_file(initial_weights), num_heads=4, num_kv_heads=2, dim=128)
    policy, reference = (llama3(**DIMS, intermediate_dim=352) for _ in range(2))
    policy.load_state_dict(weights)
    reference.load_state_dict(weights)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=2e-4, weight_decay=0.0)
    loss_fn = DPOLoss()
    pairs = preference_pairs(tokenizer(), num_pairs=160)
    plan = Plan(sizes=uniform_sizes(160), packing=Fixed(8), examples_per_step=8, seed=0, shuffle=True)

    def log_probs(model, batch):
        input_ids, labels = batch
        both = rlhf.get_batch_log_probs(model(input_ids), labels)
        return both[:8], both[8:]

    found = []
    for step in plan.epoch(0):
        samples = [as_torchtunes_sample(pairs[i]) for i in step.rows[0]]
        batch = padded_collate_dpo(samples)
        with torch.no_grad():
            reference_log_probs = log_probs(reference, batch)
        step_losses, _, _ = loss_fn(*log_probs(policy, batch), *reference_log_probs)
        step_losses.mean().backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        found.append(step_losses.mean().item())
    return found


def test_twenty_steps_follow_torchtunes_paired_computation(tmp_path):
    run_in_process(tmp_path, **TRAINING)
    ours = losses(tmp_path)
    theirs = torchtune_losses(tmp_path / "initial_model" / "model.safetensors")
    assert len(ours) == STEPS
    assert ours == pytest.approx(theirs, rel=1e-5)
    # and something was learned to compare
    assert abs(ours[-1] - math.log(2)) > 1e-3


@pytest.mark.parametrize("loss", ["DPOLoss", "SimPOLoss", "ORPOLoss"])
def test_losses_do_not_depend_on_rows_accumulation_or_sharing(tmp_path, loss):
    settings = {
        "loss._component_": f"prefix_sharing.losses.{loss}",
        "dataset.num_pairs": 44,
        "dataset_val": None,
        "max_steps_per_epoch": None,
    }
    variants = [
        {"batch_size": 8, "gradient_accumulation_steps": 1},
        {"batch_size": 1, "gradient_accumulation_steps": 8},
        # 3 + 3 + 2 examples to a step of 8: a mean of means would differ
        {"batch_size": 4, "gradient_accumulation_steps": 2, "share_prefix": False},
    ]
    curves = []
    for i, variant in enumerate(variants):
        run_in_process(tmp_path / str(i), **settings, **variant)
        curves.append(losses(tmp_path / str(i)))
    # 44 examples are 5 steps of 8 and one of 4, which is not dropped
    assert [len(curve) for curve in curves] == [6, 6, 6]
    for curve in curves[1:]:
        assert curve == pytest.approx(curves[0], rel=1e-5)


def test_compiled_layers_and_activation_checkpointing_change_nothing(tmp_path):
    keys = {"dataset_val": None, "model.num_layers": 2}
    run_in_process(tmp_path / "plain", **keys)
    run_in_process(tmp_path / "checkpointed", enable_activation_checkpointing=True, **keys)
    run_in_process(tmp_path / "selective", enable_activation_checkpointing=True, ac_mode="selective", **keys)
    run_in_process(tmp_path / "compiled", compile=True, **keys)
    expected = losses(tmp_path / "plain")
    assert losses(tmp_path / "checkpointed") == pytest.approx(expected, rel=1e-6)
    assert losses(tmp_path / "selective") == pytest.approx(expected, rel=1e-6)
    assert losses(tmp_path / "compiled") == pytest.approx(expected, rel=1e-5)


def test_bf16_computes_in_bf16_and_trains_fp32_weights(tmp_path):
    recipe = run_in_process(tmp_path, dataset_val=None, dtype="bf16", **{"optimizer.lr": 5e-7, "lr_scheduler": None})
    assert all(p.dtype == torch.float32 for p in recipe.model.parameters())
    initial = load_file(tmp_path / "initial_model" / "model.safetensors")
    trained = load_file(tmp_path / "epoch_0" / "model-00001-of-00001.safetensors")
    # At this learning rate pure bf16 would leave most weights where they were.
    name = "model.layers.0.mlp.up_proj.weight"
    assert (initial[name] != trained[name]).float().mean() > 0.9
    assert training_log(tmp_path)[0]["loss"] == pytest.approx(math.log(2), abs=1e-2)
