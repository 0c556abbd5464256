"""The distributed recipe on gloo processes: the single-device loss curve, whatever the number of processes."""

import json

import pyarrow.parquet as pq
import pytest
from omegaconf import OmegaConf

from prefix_sharing.config import find_config
from prefix_sharing.quickstart.pairs import generate_pairs
from processes import run_on_ranks
from runs import SHORT, eval_log, load_plain_model, losses, run_distributed, run_in_process, tune_run, went_only_to

KEYS = SHORT | {"dataset.num_pairs": 160, "max_steps_per_epoch": 12, "batch_size": 2}


@pytest.mark.slow
def test_two_processes_follow_one_and_write_its_checkpoint(tmp_path):
    alone = tmp_path / "alone"
    run_in_process(alone, **KEYS | {"gradient_accumulation_steps": 6})
    together = run_distributed(
        tmp_path / "together", 2, **KEYS | {"gradient_accumulation_steps": 3, "enable_activation_checkpointing": True}
    )
    assert len(losses(together)) == 12
    assert losses(together) == pytest.approx(losses(alone), rel=1e-4)
    for key, value in eval_log(alone)[-1].items():
        if "per_second" not in key:
            assert eval_log(together)[-1][key] == pytest.approx(value, rel=1e-3, abs=1e-6), key
    margins = [pq.read_table(run / "margins.parquet")["margin_after"].to_numpy() for run in (together, alone)]
    assert margins[0] == pytest.approx(margins[1], rel=1e-3, abs=1e-3)
    ours = load_plain_model(together / "epoch_0", tmp_path).state_dict()
    for name, tensor in load_plain_model(alone / "epoch_0", tmp_path).state_dict().items():
        assert (ours[name] - tensor).norm() <= 1e-3 * tensor.norm(), name


@pytest.mark.slow
def test_three_processes_and_an_uneven_last_step(tmp_path):
    # 64 examples in steps of 12: the last step has 4, two rows for three processes
    keys = {"dataset.num_pairs": 64, "max_steps_per_epoch": None, "dataset_val": None}
    run_in_process(tmp_path / "alone", **KEYS | keys | {"gradient_accumulation_steps": 6})
    together = run_distributed(
        tmp_path / "together", 3, **KEYS | keys | {"gradient_accumulation_steps": 2, "fsdp_sync_every_row": True}
    )
    assert len(losses(together)) == 6
    assert losses(together) == pytest.approx(losses(tmp_path / "alone"), rel=1e-4)


@pytest.mark.slow
def test_two_copies_of_two_shards(tmp_path):
    run_in_process(tmp_path / "alone", **KEYS | {"gradient_accumulation_steps": 8, "dataset_val": None})
    keys = KEYS | {"gradient_accumulation_steps": 2, "data_parallel_replicate_dim": 2, "dataset_val": None}
    together = run_distributed(tmp_path / "together", 4, **keys)
    assert losses(together) == pytest.approx(losses(tmp_path / "alone"), rel=1e-4)


@pytest.mark.slow
def test_two_nodes_without_a_common_cache_save_and_resume(tmp_path):
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(f"{json.dumps(pair)}\n" for pair in generate_pairs(48, seed=3)))
    dataset = {"_component_": "prefix_sharing.datasets.prefix_preference_dataset", "data_files": str(file)}
    keys = {key: value for key, value in KEYS.items() if not key.startswith("dataset")}
    keys |= {"dataset_val": None, "max_steps_per_epoch": None, "seed": 3, "self_check": False}
    run_in_process(tmp_path / "alone", **keys | {"dataset": dataset, "gradient_accumulation_steps": 4})
    cfg = OmegaConf.load(find_config("quickstart/distributed"))
    cfg.dataset = dataset
    OmegaConf.save(cfg, tmp_path / "nodes.yaml")
    keys |= {"gradient_accumulation_steps": 2, "save_every_n_steps": 2, "keep_last_n": 9}
    nodes = {"config": str(tmp_path / "nodes.yaml"), "on_nodes_of_their_own": True}
    whole = run_distributed(tmp_path / "whole", 2, **nodes, **keys)
    assert all(any((tmp_path / "whole" / f"node_{rank}").rglob("*.arrow")) for rank in range(2))
    assert losses(whole) == pytest.approx(losses(tmp_path / "alone"), rel=1e-4)
    went_only_to(4, whole, tmp_path / "parts" / "out")
    parts = run_distributed(tmp_path / "parts", 2, **nodes, **keys | {"resume": "auto"})
    assert losses(parts) == pytest.approx(losses(whole), rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [(1, 2, 1), (2, 4)], ids=str)
def test_resuming_on_another_number_of_processes(tmp_path, ranks):
    """Each number of processes goes on from what the one before saved, in the last run it made."""
    keys = KEYS | {"dataset.num_pairs": 48, "max_steps_per_epoch": None, "dataset_val": None, "epochs": 2, "seed": 3}
    keys |= {"save_every_n_steps": 4, "keep_last_n": 4, "self_check": False}

    def run(directory, num_processes, **more):
        given = keys | {"gradient_accumulation_steps": 4 // num_processes} | more
        if num_processes == 1:
            run_in_process(directory / "out", **given)
        else:
            run_distributed(directory, num_processes, **given)
        return directory / "out"

    expected = losses(run_in_process(tmp_path / "alone", **keys | {"gradient_accumulation_steps": 4}).cfg.output_dir)
    saved = run(tmp_path / "first", ranks[0])
    for step, num_processes in zip((6, 8), ranks[1:], strict=False):
        directory = tmp_path / f"from_{step}"
        directory.mkdir()
        went_only_to(step, saved, directory / "out")
        saved = run(directory, num_processes, resume="auto")
        assert losses(saved) == pytest.approx(expected, rel=1e-5)


@pytest.mark.slow
def test_a_mistake_is_said_once_whatever_the_number_of_processes(tmp_path):
    arguments = ["recipe", "--config", "quickstart/distributed", "data_parallel_replicate_dim=3"]
    done = run_on_ranks("prefix_dpo_distributed:recipe_main", arguments, tmp_path, 2)
    assert done.returncode != 0
    said = [line for line in done.stderr.splitlines() if line.startswith("Error:")]
    assert said == [
        "Error: rank 0: Config key 'data_parallel_replicate_dim': is 3, which does not divide the 2 processes; "
        "choose a divisor."
    ]
    assert not list(tmp_path.rglob("epoch_*"))


def test_one_process_without_a_launcher_is_told_so(tmp_path):
    done = tune_run("prefix_dpo_distributed", "--config", "quickstart/distributed", cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("Error: prefix_dpo_distributed needs a launcher: tune run --nproc")
