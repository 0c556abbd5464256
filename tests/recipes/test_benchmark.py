"""The benchmark, short: it compares like with like, writes what it says, and asserts no timing."""

import dataclasses
import importlib.util
import json
import sys

import pytest
import torch
import torch.nn.functional as F
from omegaconf import OmegaConf

from prefix_dpo_benchmark import BenchmarkConfig, PrefixDPOBenchmark, reference_like
from prefix_sharing.benchmark.bare import RecordProducts
from prefix_sharing.benchmark.workloads import DATASETS, draw_lengths, pairs_in
from prefix_sharing.config import check_config, find_config
from prefix_sharing.errors import UserError
from runs import tune_run

FORMATS = ["torchtune", "trl", "paired_packed", "prefix", "prefix_packed"]
if importlib.util.find_spec("trl") is None:
    FORMATS.remove("trl")

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
    "longest": 300,
    "rounds": 2,
    "prefix_lengths": [16, 32],
    "completion_lengths": [8],
    "layer_backends": ["chains"],
    "tokens_per_row": [512, 1024],
    "num_examples": [1000, 2000],
    "measure_memory": False,
    "device": "cpu",
}


def benchmark(directory, config="benchmark/cpu", **overrides):
    cfg = OmegaConf.load(find_config(config))
    for key, value in (SMALL | {"output_dir": str(directory)} | overrides).items():
        OmegaConf.update(cfg, key, value)
    return PrefixDPOBenchmark(check_config(cfg, BenchmarkConfig))


@pytest.mark.parametrize("config", ["benchmark/cpu", "benchmark/cuda"])
def test_everything_is_measured(tmp_path, config, capsys, pictures):
    benchmark(tmp_path, config).run()
    results = json.loads((tmp_path / "benchmark.json").read_text())
    assert [workload["name"] for workload in results["workloads"]] == ["hh", "20,5,6"]
    for workload in results["workloads"]:
        formats = workload["formats"]
        assert list(formats) == FORMATS
        assert all(found["examples_per_s"] > 0 for found in formats.values())
        assert formats["prefix"]["num_tokens"] < formats["paired_packed"]["num_tokens"]
        assert formats["prefix"]["flops"] < formats["paired_packed"]["flops"] < formats["torchtune"]["flops"]
    # The last token of a response is a target only: torchtune reads it, a tree does not.
    assert results["workloads"][1]["formats"]["torchtune"]["num_tokens"] == 3 * (25 + 26)
    assert results["workloads"][1]["formats"]["prefix"]["num_tokens"] == 3 * (20 + 4 + 5)

    assert [(each["part"], each["prefix"]) for each in results["layers"]] == [
        (part, prefix) for prefix in (16, 32) for part in ("mlp", "attention", "attention_layer")
    ]
    of_mlp = results["layers"][0]
    assert of_mlp["ideal"] == 2 * (16 + 8) / (16 + 2 * 8)
    assert [each["tokens"] for each in results["scaling"]["rows"]] == [512, 1024]
    assert [each["examples"] for each in results["scaling"]["examples"]] == [1000, 2000]

    for picture in ("steps", "layers", "scaling"):
        assert (tmp_path / f"{picture}.png").read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert printed.count("prefix_packed") == 2
    assert "attention_layer" in printed
    assert printed.count("power") == 2


def test_an_interrupted_benchmark_leaves_what_was_measured(tmp_path, monkeypatch):
    run = benchmark(tmp_path)
    of_pairs = run.pairs_of

    def interrupted_at_the_second(workload):
        if workload == "20,5,6":
            raise KeyboardInterrupt
        return of_pairs(workload)

    monkeypatch.setattr(run, "pairs_of", interrupted_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        run.run()
    (workload,) = json.loads((tmp_path / "benchmark.json").read_text())["workloads"]
    assert workload["name"] == "hh"
    assert list(workload["formats"]) == FORMATS


def test_backends_that_cannot_run_are_left_out_with_a_note(tmp_path, caplog):
    with caplog.at_level("WARNING", logger="prefix_sharing"):
        keys = {"measure": ["steps", "layers"], "layer_backends": ["chains", "varlen"]}
        run = benchmark(tmp_path, "benchmark/cuda_short", **keys)
    assert run.layer_backends == ["chains"]
    assert "paired_packed_varlen" not in [form.name for form in run.formats]
    for what in ("layer_backends: varlen", "formats: paired_packed_varlen"):
        assert f"{what} is left out: Config key 'attention_backend': varlen needs CUDA" in caplog.text


def test_pairs_on_flash_attention_are_the_same_pairs(tmp_path, on_cpu, monkeypatch):
    monkeypatch.setattr("prefix_dpo_benchmark.choose_attention_backend", lambda name, *_: name or "chains")
    formats = ["torchtune", "paired_packed_varlen"]
    run = benchmark(tmp_path, measure=["steps"], formats=formats, attention_backend=None)
    assert [form.name for form in run.formats] == formats
    run.run()  # which compares log-probs and losses


def test_what_is_not_asked_for_is_not_measured(tmp_path, pictures):
    benchmark(tmp_path, measure=["scaling"]).run()
    assert "workloads" not in json.loads((tmp_path / "benchmark.json").read_text())
    assert [file.name for file in tmp_path.glob("*.png")] == ["scaling.png"]


def test_formats_that_disagree_are_not_timed(tmp_path):
    run = benchmark(tmp_path, measure=["steps"])
    at = FORMATS.index("prefix")
    right = run.formats[at]
    run.formats[at] = dataclasses.replace(right, log_probs=lambda batch: right.log_probs(batch) * 1.01)
    with pytest.raises(
        UserError, match="prefix and torchtune differ by .* in a response's log-prob; nothing was timed"
    ):
        run.run()
    assert not (tmp_path / "benchmark.json").exists()


def test_a_step_with_another_loss_stops_the_benchmark(tmp_path):
    run = benchmark(tmp_path, measure=["steps"])
    at = FORMATS.index("prefix")
    right = run.formats[at]
    run.formats[at] = dataclasses.replace(right, loss=lambda batch, reference: right.loss(batch, reference) * 1.01)
    with pytest.raises(UserError, match="hh: the loss of prefix is"):
        run.run()


def test_all_formats_train_the_same_parameters(tmp_path):
    run = benchmark(tmp_path)
    pairs = run.pairs_of("hh")
    reference = reference_like(run.check_log_probs(pairs))
    for optimizer in run.optimizers.values():
        optimizer.param_groups[0]["lr"] = 1e-3
    for form in run.formats:
        before = [p.detach().clone() for p in form.model.parameters()]
        run.step(form, pairs, reference)
        assert all((p != b).any() for p, b in zip(form.model.parameters(), before, strict=True)), form.name
        # All but TRL, whose model is transformers', share one model.
        assert (form.model is run.model) == (form.name != "trl")


def test_trl_is_left_out_with_a_note_where_it_is_not_installed(tmp_path, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "trl", None)
    monkeypatch.delitem(sys.modules, "prefix_sharing.hosts.trl", raising=False)
    with caplog.at_level("WARNING", logger="prefix_sharing"):
        formats = benchmark(tmp_path).formats
    assert [form.name for form in formats] == [name for name in FORMATS if name != "trl"]
    assert "pip install 'torchtune-prefix-sharing[bench]'" in caplog.text


def test_matrix_products_are_counted_and_those_of_attention_apart():
    a, b = torch.randn(4, 8), torch.randn(8, 16, requires_grad=True)
    q, k, v = (torch.randn(1, 2, 6, 8, requires_grad=True) for _ in range(3))
    with RecordProducts() as record:
        (a @ b).sum().backward()
        F.scaled_dot_product_attention(q, k, v, is_causal=True).sum().backward()
    shapes = {tuple(shape for shape, _ in operands): count for operands, count in record.operands.items()}
    assert shapes == {((4, 8), (8, 16)): 1, ((8, 4), (4, 16)): 1}  # forward, and the gradient of b
    # two heads, six queries that see three keys on average, two products forward and five backward
    assert record.attention_flops == (2 + 5) * 2 * 2 * 6 * 8 * 3


def test_products_with_a_bias_and_those_of_experts_are_counted():
    tokens, experts = torch.randn(6, 8), torch.randn(3, 8, 16, requires_grad=True)
    bias, weight = torch.randn(4), torch.randn(4, 8)
    with RecordProducts() as record:
        F.linear(tokens, weight, bias)
        F.grouped_mm(tokens, experts, offs=torch.tensor([1, 1, 6], dtype=torch.int32)).square().sum().backward()
    shapes = {tuple(shape for shape, _ in operands): count for operands, count in record.operands.items()}
    # each token with one expert's matrix, and the gradient of the matrices
    assert shapes == {((6, 8), (8, 4)): 1, ((6, 8), (8, 16)): 1, ((8, 6), (6, 16)): 1}


def test_peak_memory_is_that_of_a_process_of_its_own(tmp_path):
    parts = benchmark(tmp_path).memory_of("20,5,6", "prefix")
    assert 0.1 < parts["peak_memory"] < 10
    # AdamW has two numbers and a step count a parameter.
    assert parts["memory_gradients"] == parts["memory_parameters"]
    assert parts["memory_optimizer_state"] == pytest.approx(2 * parts["memory_parameters"], rel=0.01)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"formats": ["trees"]}, "unknown format 'trees'"),
        ({"measure": ["speed"]}, "unknown measurement 'speed'"),
        ({}, "unknown workload 'alpaca'"),
    ],
)
def test_what_there_is_not_is_said(tmp_path, keys, message):
    with pytest.raises(UserError, match=message):
        benchmark(tmp_path, workloads=["alpaca"], **keys).run()


def test_pairs_of_a_file_are_a_workload(tmp_path):
    file = tmp_path / "my_pairs.jsonl"
    file.write_text('{"prompt": "A question", "chosen": "Yes.", "rejected": "No."}\n' * 5)
    vocabulary = {"model.vocab_size": 2048, "tokens_per_step": 60}
    benchmark(tmp_path, measure=["steps"], workloads=[str(file)], **vocabulary).run()
    (workload,) = json.loads((tmp_path / "benchmark.json").read_text())["workloads"]
    assert workload["name"] == "my_pairs.jsonl"
    assert 1 < workload["pairs"] < 5


def test_a_step_takes_pairs_of_so_many_tokens():
    prefix, chosen, rejected = draw_lengths("hh", pairs_in("hh", 5000))
    assert abs((2 * prefix + chosen + rejected).sum() - 5000) < 500


def test_lengths_have_the_medians_of_their_data_set():
    for name, (median, ratio) in DATASETS.items():
        lengths = draw_lengths(name, 20_000)
        response = median / (1 + ratio)
        for drawn, expected in zip(lengths, (median - response, response, response), strict=True):
            assert abs(sorted(drawn)[10_000] / expected - 1) < 0.05, name


@pytest.mark.slow
def test_the_command_runs(tmp_path):
    overrides = [f"{key}={str(value).replace(' ', '')}" for key, value in SMALL.items()]
    done = tune_run("prefix_dpo_benchmark", "--config", "benchmark/cpu", *overrides, "measure=[steps]", cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "prefix_packed" in done.stdout
    assert (tmp_path / "benchmark_output" / "benchmark.json").exists()
