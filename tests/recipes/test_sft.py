"""Supervised fine-tuning is the same recipe with examples of one response."""

import json
import math

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.utils.data import DataLoader
from torchtune.data import padded_collate_packed
from torchtune.datasets import chat_dataset
from torchtune.models.convert_weights import hf_to_tune
from torchtune.models.llama3 import llama3
from torchtune.modules.loss import CEWithChunkedOutputLoss

from documents import PAGES, runs_of
from plain import plain_log_probs
from prefix_sharing.quickstart import preference_pairs, tokenizer
from prefix_sharing.quickstart.pairs import generate_pairs
from runs import (
    SHORT,
    as_overrides,
    eval_log,
    evaluated_log_probs,
    load_plain_model,
    losses,
    run_in_process,
    training_log,
    tune_run,
)

DIMS = {"vocab_size": 2048, "num_layers": 3, "num_heads": 4, "num_kv_heads": 2, "embed_dim": 128, "max_seq_len": 512}
EPOCHS = 6


@pytest.fixture
def chats(tmp_path):
    """Conversations of one or two rounds."""
    file = tmp_path / "chats.jsonl"
    made = list(generate_pairs(24, seed=3))
    with file.open("w") as out:
        for i, pair in enumerate(made):
            rounds = [pair, made[i - 1]] if i % 3 == 0 else [pair]
            messages = [
                {"role": role, "content": of_one[key]}
                for of_one in rounds
                for role, key in (("user", "prompt"), ("assistant", "chosen"))
            ]
            out.write(json.dumps({"messages": messages}) + "\n")
    return file


def torchtune_losses(file, initial_weights):
    """Packed supervised fine-tuning as torchtune's recipe does it, all of the data a step."""
    model = llama3(**DIMS, intermediate_dim=352)
    model.load_state_dict(hf_to_tune(load_file(initial_weights), num_heads=4, num_kv_heads=2, dim=128))
    loss_fn = CEWithChunkedOutputLoss()
    model.set_num_output_chunks(loss_fn.num_output_chunks)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.0)
    packs = chat_dataset(
        tokenizer(max_seq_len=512),
        source="json",
        data_files=str(file),
        conversation_column="messages",
        conversation_style="openai",
        packed=True,
    )
    assert len(packs) > 1
    found = []
    for _ in range(EPOCHS):
        total, num_tokens = 0.0, 0
        for batch in DataLoader(packs, batch_size=1, collate_fn=padded_collate_packed):
            labels = batch.pop("labels")
            num_in_batch = (labels != loss_fn.ignore_index).sum()
            logits = model(tokens=batch["tokens"], mask=batch["mask"], input_pos=batch["input_pos"])
            labels = torch.hstack((labels[..., 1:], torch.full_like(labels[..., :1], loss_fn.ignore_index)))
            loss = loss_fn(logits, labels) * num_in_batch
            loss.backward()
            total += loss.item()
            num_tokens += num_in_batch.item()
        for parameter in model.parameters():
            parameter.grad /= num_tokens
        optimizer.step()
        optimizer.zero_grad()
        found.append(total / num_tokens)
    return found, num_tokens


def test_nll_follows_torchtunes_packed_fine_tuning(tmp_path, chats):
    dataset = {
        "_component_": "prefix_sharing.datasets.prefix_preference_dataset",
        "source": "json",
        "data_files": str(chats),
    }
    recipe = run_in_process(
        tmp_path,
        dataset=dataset,
        dataset_val=dataset,
        loss={"_component_": "prefix_sharing.losses.NLLLoss"},
        packing="step",
        batch_size=None,
        gradient_accumulation_steps=None,
        global_batch_size=24,
        pack_len=512,
        epochs=EPOCHS,
        lr_scheduler=None,
        clip_grad_norm=None,
        **{"optimizer.lr": 2e-3},
    )
    theirs, num_tokens = torchtune_losses(chats, tmp_path / "initial_model" / "model.safetensors")
    ours = losses(tmp_path)
    assert ours == pytest.approx(theirs, rel=1e-5)
    assert ours[-1] < ours[0] - 0.5
    assert recipe.dataset.num_scored.sum() == num_tokens
    # the evaluation is of the same data, and there are no pairs to speak of
    before, after = eval_log(tmp_path)
    assert before["eval/loss"] == pytest.approx(ours[0], rel=1e-6)
    assert after["eval/loss"] < ours[-1]
    assert not any(name.startswith("rewards/") for name in training_log(tmp_path)[0])
    assert not (tmp_path / "margins.parquet").exists()


@pytest.mark.slow
def test_fine_tuning_on_the_chosen_answers_makes_a_reference(tmp_path):
    fine_tuning, with_reference = runs_of("prefix_dpo_single_device", PAGES["supervised.md"])
    short = as_overrides(SHORT | {"self_check": False})
    for command, more in ((fine_tuning, []), (with_reference, ["output_dir=dpo"])):
        done = tune_run(*command, *short, *more, cwd=tmp_path)
        assert done.returncode == 0, done.stderr[-3000:]
    assert training_log(tmp_path / "sft")[0]["loss"] == pytest.approx(math.log(2048), rel=0.05)
    assert len(losses(tmp_path / "dpo")) == 4
    # The policy begins as it was, at a distance from its reference: log-probs by a plain model of the fine-tuned one.
    before = evaluated_log_probs(tmp_path / "dpo", "before")
    tuned = load_plain_model(tmp_path / "sft" / "epoch_0", tmp_path)
    pairs = preference_pairs(tokenizer(max_seq_len=512), num_pairs=16, seed=1)
    with torch.no_grad():
        reference = np.array([plain_log_probs(tuned, pairs[i]).numpy() for i in range(len(pairs))])
    ratios = before - reference
    expected = np.log1p(np.exp(-0.1 * (ratios[:, 0] - ratios[:, 1]))).mean()
    assert eval_log(tmp_path / "dpo")[0]["eval/loss"] == pytest.approx(expected, rel=1e-4)
    assert abs(expected - math.log(2)) > 1e-4
