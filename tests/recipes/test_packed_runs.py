"""However rows are packed, dealt and scored against a reference, the loss curve is the unpacked run's."""

import json
import logging
import math

import pytest
from omegaconf import OmegaConf

from prefix_sharing.config import find_config
from prefix_sharing.errors import UserError
from prefix_sharing.quickstart.pairs import generate_pairs
from runs import eval_log, losses, run_distributed, run_in_process, training_log

BUILDER = "prefix_sharing.datasets.prefix_preference_dataset"


@pytest.fixture(scope="module")
def pairs_file(tmp_path_factory):
    """Pairs whose prompts, and so lengths, differ by a lot; 45 of them, so that the last step of an epoch has 5."""
    file = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    with file.open("w") as lines:
        for i, pair in enumerate(generate_pairs(45, seed=2)):
            pair["prompt"] = " ".join([pair["prompt"]] * (1 + i % 4))
            lines.write(json.dumps(pair) + "\n")
    return str(file)


def keys_for(file, **kwargs):
    dataset = OmegaConf.create({"_component_": BUILDER, "source": "json", "data_files": file})
    keys = {"dataset": dataset, "dataset_val.num_pairs": 8, "max_steps_per_epoch": None, "global_batch_size": 8}
    keys |= {"optimizer.lr": 1e-2, "lr_scheduler": None, "model.max_seq_len": 1024}
    keys |= {"gradient_accumulation_steps": None, "batch_size": None, "packing": "step"}
    return keys | kwargs


UNPACKED = {"packing": "none", "batch_size": 1, "pack_len": None}


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory, pairs_file):
    """Where the unpacked run wrote."""
    output_dir = tmp_path_factory.mktemp("unpacked")
    run_in_process(output_dir, **keys_for(pairs_file, **UNPACKED))
    return output_dir


@pytest.mark.parametrize(
    "keys",
    [
        {"pack_len": 1024},
        {"pack_len": 2048},
        {"pack_len": "auto"},
        {"pack_len": 2048, "share_prefix": False},
        {"pack_len": 2048, "reference.precompute": False},
        {"pack_len": 2048, "reference.cache_dir": None, "num_workers": 1},
    ],
    ids=str,
)
def test_packed_runs_follow_the_unpacked_one(tmp_path, pairs_file, unpacked, keys):
    run_in_process(tmp_path / "packed", **keys_for(pairs_file, **keys))
    packed = losses(tmp_path / "packed")
    assert len(packed) == 6
    assert packed == pytest.approx(losses(unpacked), rel=1e-5)
    assert packed[0] == pytest.approx(math.log(2), abs=1e-6)
    assert abs(packed[-1] - math.log(2)) > 0.01
    for key, value in eval_log(unpacked)[-1].items():
        if "per_second" not in key and "tokens_saved" not in key:
            assert eval_log(tmp_path / "packed")[-1][key] == pytest.approx(value, rel=1e-3, abs=1e-4), key


def test_the_papers_mode_takes_rows_not_examples(tmp_path, pairs_file, caplog):
    logging.getLogger("prefix_sharing").propagate = True
    keys = {"packing": "dataset", "pack_rows_per_step": 2, "pack_len": 1024, "global_batch_size": None}
    with caplog.at_level("INFO", logger="prefix_sharing"):
        recipe = run_in_process(tmp_path / "out", **keys_for(pairs_file, **keys))
    assert any("2 Rows per step" in message for message in caplog.messages)
    assert recipe.plan.steps_per_epoch == -(-len(recipe.plan.rows_of_dataset) // 2)
    assert len({len(step.example_index) for step in recipe.plan.epoch(0)}) > 1
    assert all(math.isfinite(loss) for loss in losses(tmp_path / "out"))


def test_a_second_run_computes_no_reference(tmp_path, pairs_file, caplog):
    logging.getLogger("prefix_sharing").propagate = True
    run_in_process(tmp_path / "first", **keys_for(pairs_file))
    caplog.clear()
    with caplog.at_level("INFO", logger="prefix_sharing"):
        # another loss, another order, other rows
        keys = {"loss.beta": 0.5, "seed": 3, "pack_len": 1024, "share_prefix": False}
        run_in_process(tmp_path / "second", **keys_for(pairs_file, **keys))
    found = [message for message in caplog.messages if "reference log-probs of" in message]
    assert [message.split(": ", 1)[1] for message in found] == [
        "reference log-probs of 45 examples in the cache, 0 to compute",
        "reference log-probs of 8 examples in the cache, 0 to compute",
    ]
    assert losses(tmp_path / "second")[0] == pytest.approx(math.log(2), abs=1e-6)


def test_ranked_responses_train_packed(tmp_path):
    file = tmp_path / "ranked.jsonl"
    with file.open("w") as lines:
        for pair, other in zip(generate_pairs(24, seed=2), generate_pairs(24, seed=5), strict=True):
            responses = [pair["chosen"], pair["rejected"], other["rejected"]][: 3 if len(pair["prompt"]) % 2 else 2]
            lines.write(json.dumps({"prompt": pair["prompt"], "responses": responses}) + "\n")
    keys = keys_for(str(file), pack_len=2048)
    keys["dataset"].pairs = "all"
    recipe = run_in_process(tmp_path / "packed", **keys)
    run_in_process(tmp_path / "unpacked", **keys | UNPACKED)
    assert set(recipe.dataset.num_pairs) == {1, 3}
    assert losses(tmp_path / "packed") == pytest.approx(losses(tmp_path / "unpacked"), rel=1e-5)
    assert losses(tmp_path / "packed")[0] == pytest.approx(math.log(2), abs=1e-6)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"pack_len": 128}, r"'pack_len': .*pairs.jsonl, record 31 \(line 32\) makes 522 tokens, more than 128"),
        ({"pack_len": 128}, r"raise it \(auto fits the longest\) or lower tokenizer.max_seq_len\."),
        (
            {"pack_len": 128, "dataset.max_seq_len": 500, "dataset.group_by_prompt": True},
            r", lower dataset.max_seq_len, or leave out dataset.group_by_prompt\.",
        ),
        ({"global_batch_size": 99, "drop_last": True}, "'drop_last': leaves no steps of 45 examples"),
    ],
    ids=str,
)
def test_what_cannot_be_packed_is_an_error_at_start(tmp_path, pairs_file, keys, message):
    with pytest.raises(UserError, match=message):
        run_in_process(tmp_path / "out", **keys_for(pairs_file, **keys))
    assert not (tmp_path / "out" / "logs").exists()


@pytest.mark.slow
def test_processes_share_rows_and_cache(tmp_path, pairs_file, unpacked):
    keys = {
        "max_steps_per_epoch": None,
        "global_batch_size": 8,
        "packing": "step",
        "gradient_accumulation_steps": None,
        "batch_size": None,
        "dataset_val.num_pairs": 8,
        "optimizer.lr": 1e-2,
        "lr_scheduler": None,
        "model.max_seq_len": 1024,
        "pack_len": 1024,
    }
    cfg = OmegaConf.load(find_config("quickstart/distributed"))
    cfg.dataset = {"_component_": BUILDER, "source": "json", "data_files": pairs_file}
    OmegaConf.save(cfg, tmp_path / "packed.yaml")
    config = str(tmp_path / "packed.yaml")
    two = run_distributed(tmp_path / "two", 2, config=config, **keys)
    assert losses(two) == pytest.approx(losses(unpacked), rel=1e-5)
    assert losses(two)[0] == pytest.approx(math.log(2), abs=1e-6)
    # Steps of 3 on four processes, the last of the 45 examples: some processes have nothing to do. A frozen reference.
    few = {"global_batch_size": 3, "max_steps_per_epoch": 2, "reference.precompute": False}
    four = run_distributed(tmp_path / "four", 4, config=config, **keys | few)
    run_in_process(tmp_path / "alone", **keys_for(pairs_file, **few | {"pack_len": 1024}))
    assert losses(four) == pytest.approx(losses(tmp_path / "alone"), rel=1e-5)
    assert training_log(four)[0]["tokens_saved"] > 0.3
