"""The benchmark, short: it compares like with like, writes what it says, and asserts no timing."""

import dataclasses
import json

import pytest
from omegaconf import OmegaConf
from runs import tune_run

from prefix_dpo_benchmark import BenchmarkConfig, PrefixDPOBenchmark
from prefix_sharing.benchmark.workloads import DATASETS, draw_lengths
from prefix_sharing.config import find_config
from prefix_sharing.errors import UserError
from prefix_sharing.training import check_config

SMALL = {
    "model.vocab_size": 100,
    "model.num_layers": 2,
    "model.num_heads": 4,
    "model.num_kv_heads": 2,
    "model.embed_dim": 32,
    "model.intermediate_dim": 48,
    "workloads": ["hh", "20,5,6"],
    "num_pairs": 3,
    "batch_size": 2,
    "rounds": 2,
    "measure_memory": False,
    "device": "cpu",
}


def benchmark(directory, config="benchmark/cpu", **overrides):
    cfg = OmegaConf.load(find_config(config))
    for key, value in (SMALL | {"output_dir": str(directory)} | overrides).items():
        OmegaConf.update(cfg, key, value)
    return PrefixDPOBenchmark(check_config(cfg, BenchmarkConfig))


@pytest.mark.parametrize("config", ["benchmark/cpu", "benchmark/cuda"])
def test_every_format_is_timed_on_every_workload(tmp_path, config, capsys):
    benchmark(tmp_path, config).run()
    results = json.loads((tmp_path / "benchmark.json").read_text())
    assert [workload["name"] for workload in results["workloads"]] == ["hh", "20,5,6"]
    for workload in results["workloads"]:
        formats = workload["formats"]
        assert list(formats) == ["torchtune", "paired_packed", "prefix", "prefix_packed"]
        assert all(found["examples_per_s"] > 0 for found in formats.values())
        assert formats["prefix"]["num_tokens"] < formats["paired_packed"]["num_tokens"]
    # The last token of a response is a target only: torchtune reads it, a tree does not.
    assert results["workloads"][1]["formats"]["torchtune"]["num_tokens"] == 3 * (25 + 26)
    assert results["workloads"][1]["formats"]["prefix"]["num_tokens"] == 3 * (20 + 4 + 5)
    assert (tmp_path / "benchmark.png").read_bytes().startswith(b"\x89PNG")
    assert capsys.readouterr().out.count("prefix_packed") == 2


def test_formats_that_disagree_are_not_timed(tmp_path):
    run = benchmark(tmp_path)
    right = run.formats[2]
    run.formats[2] = dataclasses.replace(right, log_probs=lambda batch: right.log_probs(batch) * 1.01)
    with pytest.raises(
        UserError, match="prefix and torchtune differ by .* in a response's log-prob; nothing was timed"
    ):
        run.run()
    assert not (tmp_path / "benchmark.json").exists()


def test_all_formats_train_the_same_parameters(tmp_path):
    run = benchmark(tmp_path)
    pairs = run.pairs_of("hh")
    reference = run.reference_log_probs(pairs)
    for form in run.formats:
        before = [p.detach().clone() for p in run.model.parameters()]
        run.step(form, pairs, reference)
        assert all((p != b).any() for p, b in zip(run.model.parameters(), before, strict=True)), form.name


def test_peak_memory_is_that_of_a_process_of_its_own(tmp_path):
    assert 0.1 < benchmark(tmp_path).memory_of("20,5,6", "prefix") < 10


@pytest.mark.parametrize(
    ("keys", "message"), [({"formats": ["trees"]}, "there is no 'trees'"), ({}, "'alpaca' is neither")]
)
def test_what_there_is_not_is_said(tmp_path, keys, message):
    with pytest.raises(UserError, match=message):
        benchmark(tmp_path, workloads=["alpaca"], **keys).run()


def test_lengths_have_the_medians_of_their_data_set():
    for name, (median, ratio) in DATASETS.items():
        lengths = draw_lengths(name, 20_000)
        response = median / (1 + ratio)
        for drawn, expected in zip(lengths, (median - response, response, response), strict=True):
            assert abs(sorted(drawn)[10_000] / expected - 1) < 0.05, name


@pytest.mark.slow
def test_the_command_runs(tmp_path):
    overrides = [f"{key}={str(value).replace(' ', '')}" for key, value in SMALL.items()]
    done = tune_run("prefix_dpo_benchmark", "--config", "benchmark/cpu", *overrides, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "prefix_packed" in done.stdout
    assert (tmp_path / "benchmark_output" / "benchmark.json").exists()
