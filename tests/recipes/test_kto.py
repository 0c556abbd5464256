"""KTO: the plain computation's losses, however Rows are packed and dealt, with each prompt computed once."""

import copy
import json

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file
from torchtune.models.convert_weights import hf_to_tune
from torchtune.models.llama3 import llama3

from plain import plain_log_probs
from prefix_sharing.config import find_config
from prefix_sharing.quickstart.pairs import generate_pairs
from runs import SHORT, eval_log, losses, run_distributed, run_in_process, training_log

DIMS = {"vocab_size": 2048, "num_layers": 3, "num_heads": 4, "num_kv_heads": 2, "embed_dim": 128, "max_seq_len": 512}
LOSS = {"_component_": "prefix_sharing.losses.KTOLoss", "beta": 0.5, "desirable_weight": 1.5}
STEP = 8


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    """Single answers with labels: those of each prompt apart, and a few prompts with one answer only."""
    file = tmp_path_factory.mktemp("answers") / "answers.jsonl"
    pairs = list(generate_pairs(24, seed=3))
    with file.open("w") as lines:
        for which, label in (("chosen", True), ("rejected", False)):
            for pair in pairs[: 24 if label else 16]:
                lines.write(json.dumps({"prompt": pair["prompt"], "completion": pair[which], "label": label}) + "\n")
    return str(file)


def keys_for(file, **kwargs):
    dataset = {"_component_": "prefix_sharing.datasets.prefix_preference_dataset", "source": "json", "data_files": file}
    keys = {"dataset": dataset, "dataset_val": dataset, "loss": LOSS, "max_steps_per_epoch": None, "epochs": 2}
    keys |= {"global_batch_size": STEP, "batch_size": None, "gradient_accumulation_steps": None, "packing": "step"}
    return keys | {"pack_len": 2048, "optimizer.lr": 2e-3, "lr_scheduler": None, "clip_grad_norm": None} | kwargs


UNPACKED = {"packing": "none", "batch_size": 1, "pack_len": None}


def plain_losses(recipe, initial_weights):
    """The same run one full sequence at a time, with the formula as the paper has it."""
    model = llama3(**DIMS, intermediate_dim=352)
    model.load_state_dict(hf_to_tune(load_file(initial_weights), num_heads=4, num_kv_heads=2, dim=128))
    reference = copy.deepcopy(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.0)
    dataset, found, kls = recipe.dataset, [], []
    for epoch in range(2):
        steps = recipe.plan.epoch(epoch)
        for s in range(len(steps)):
            examples = [i for row in steps[s].rows for i in row]
            labels = torch.from_numpy(np.concatenate([dataset.labels(i) for i in examples]))
            responses = [response for i in examples for response in dataset[i]]
            with torch.no_grad():
                known = plain_log_probs(reference, responses)
            ratios = plain_log_probs(model, responses) - known
            kl = ratios[labels == 0].mean().detach().clamp(min=0)
            good = 1.5 * (1 - torch.sigmoid(0.5 * (ratios[labels == 1] - kl)))
            bad = 1 - torch.sigmoid(0.5 * (kl - ratios[labels == -1]))
            loss = torch.cat([good, bad]).mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            found.append(loss.item())
            kls.append(kl.item())
    return found, kls


@pytest.fixture(scope="module")
def packed(tmp_path_factory, answers):
    """A packed run and where it wrote."""
    output_dir = tmp_path_factory.mktemp("packed")
    return run_in_process(output_dir, **keys_for(answers)), output_dir


def test_kto_follows_the_plain_computation(packed):
    recipe, output_dir = packed
    expected, kls = plain_losses(recipe, output_dir / "initial_model" / "model.safetensors")
    found = losses(output_dir)
    assert found[:5] == pytest.approx(expected[:5], rel=1e-5)
    assert found == pytest.approx(expected, rel=1e-4)  # AdamW makes rounding errors of small gradients large
    assert [metrics["kl"] for metrics in training_log(output_dir)] == pytest.approx(kls, rel=1e-3, abs=1e-4)
    assert max(kls) > 0.1
    last = eval_log(output_dir)[-1]
    assert last["eval/rewards/margins"] > 0.1
    assert last["eval/kl"] >= 0
    assert "eval/rewards/accuracies" not in last


@pytest.mark.parametrize(
    "keys",
    [UNPACKED, {"pack_len": 512}, {"share_prefix": False}, {"reference.precompute": False}, {"num_workers": 1}],
    ids=str,
)
def test_packing_changes_nothing(tmp_path, answers, packed, keys):
    run_in_process(tmp_path, **keys_for(answers, **keys))
    expected, found = training_log(packed[1]), training_log(tmp_path)
    assert len(expected) == 10
    for key in ("loss", "kl", "rewards/chosen", "rewards/rejected", "rewards/margins", "log_probs/chosen"):
        values = [metrics[key] for metrics in found]
        assert values == pytest.approx([m[key] for m in expected], rel=1e-5 if key == "loss" else 1e-3, abs=1e-4), key
    assert eval_log(tmp_path)[-1]["eval/loss"] == pytest.approx(eval_log(packed[1])[-1]["eval/loss"], rel=1e-4)


def test_prompts_are_shared_with_answers_to_other_prompts(tmp_path, answers):
    alone = run_in_process(tmp_path / "alone", **keys_for(answers, max_steps_per_epoch=1))
    assert training_log(tmp_path / "alone")[0]["tokens_saved"] > 0.3
    dataset = keys_for(answers)["dataset"] | {"group_by_prompt": True}
    grouped = run_in_process(tmp_path / "grouped", **keys_for(answers, dataset=dataset, max_steps_per_epoch=1))
    assert grouped.dataset.num_labels.sum() == alone.dataset.num_labels.sum() == 40
    saved = [
        1 - run.dataset.sizes().num_tokens.sum() / run.dataset.sizes(share_prefix=False).num_tokens.sum()
        for run in (alone, grouped)
    ]
    print(f"MEASURE kto_tokens_saved {saved[0]:.3f} grouped {saved[1]:.3f}")
    assert saved[1] > saved[0] > 0.3


def test_pairs_are_taken_apart(tmp_path):
    keys = SHORT | {"loss": LOSS, "loss.loss_type": "apo_zero_unpaired", "epochs": 1}
    recipe = run_in_process(tmp_path, **keys)
    assert recipe.dataset.num_labels.tolist() == [2] * 64
    assert recipe.dataset.num_responses == 2  # apo_zero_unpaired needs no other answers
    log = training_log(tmp_path)
    assert log[0]["loss"] == pytest.approx(0.5 * (1.5 + 1) / 2, rel=1e-5)
    assert "kl" not in log[0]
    assert log[-1]["rewards/margins"] == log[-1]["rewards/chosen"] - log[-1]["rewards/rejected"] != 0


@pytest.mark.slow
def test_two_processes_follow_one(tmp_path, answers, packed):
    # One Row for each process, and several.
    for name, keys in (("one", {}), ("several", {"pack_len": 512})):
        cfg = OmegaConf.load(find_config("quickstart/distributed"))
        for key, value in (SHORT | keys_for(answers, **keys)).items():
            OmegaConf.update(cfg, key, value, merge=False)
        OmegaConf.save(cfg, tmp_path / f"{name}.yaml")
        together = run_distributed(tmp_path / f"together_{name}", 2, config=str(tmp_path / f"{name}.yaml"))
        assert len(losses(together)) == 10
        assert losses(together) == pytest.approx(losses(packed[1]), rel=1e-5)
