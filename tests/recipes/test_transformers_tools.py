"""What is asked before training, of a model of transformers: data, memory and speed; its config.json is enough."""

import json
import shutil
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

transformers = pytest.importorskip("transformers", minversion="5.24")

from directories import DIMS, EXPERTS, keys_for  # noqa: E402
from prefix_dpo_benchmark import BenchmarkConfig, PrefixDPOBenchmark  # noqa: E402
from prefix_dpo_memory import MemoryConfig, PrefixDPOMemory  # noqa: E402
from prefix_dpo_stats import PrefixDPOStats, StatsConfig  # noqa: E402
from prefix_sharing.config import check_config, find_config  # noqa: E402
from prefix_sharing.memory.estimate import full_row, peak_memory_estimate  # noqa: E402
from prefix_sharing.quickstart.checkpointer import TOKENIZER_DIR  # noqa: E402
from prefix_sharing.run import build_model  # noqa: E402
from runs import make_config, transformers_log_probs  # noqa: E402


def config_alone(path, name="qwen3", **kwargs):
    """A directory without weights."""
    transformers.AutoConfig.for_model(name, **DIMS | kwargs).save_pretrained(path)
    return str(path)


def num_parameters(path):
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.from_pretrained(path))
    return model.num_parameters()


@pytest.fixture
def memory_config(tmp_path):
    def build(path, **keys):
        of_run = keys_for(path, tmp_path, **{"num_workers": 0} | keys)
        del of_run["tokenizer"], of_run["max_steps_per_epoch"]
        return make_config(tmp_path, config_class=MemoryConfig, **of_run)

    return build


@pytest.mark.parametrize(
    ("name", "kwargs", "world_size"), [("qwen3", {"tie_word_embeddings": True}, 4), ("qwen3_moe", EXPERTS, 1)]
)
def test_parameters_gradients_and_optimizer_state_are_counted(tmp_path, memory_config, name, kwargs, world_size):
    path = config_alone(tmp_path / "model", name, **kwargs)
    with peak_memory_estimate(memory_config(path), world_size) as peak_of:
        short, long = (peak_of(full_row(n, [64, 32, 32])) for n in (128, 512))
    whole = 4 * num_parameters(path)
    share = whole / world_size
    assert short.optimizer_state == pytest.approx(2 * share, rel=0.01)
    assert short.parameters == share if world_size == 1 else share < short.parameters < share + 2 * whole
    assert short.gradients == pytest.approx(whole, rel=0.05)
    assert long.activations > 2 * short.activations
    assert long.optimizer_state == short.optimizer_state


def test_what_an_adapter_leaves_as_it_is_has_no_gradient(tmp_path, memory_config):
    path, peaks = config_alone(tmp_path / "model"), []
    for builder in ("causal_lm", "lora_causal_lm"):
        cfg = memory_config(path)
        cfg.model._component_ = f"prefix_sharing.hosts.transformers.{builder}"
        with peak_memory_estimate(cfg, 2) as peak_of:
            peaks.append(peak_of(full_row(128, [64, 32, 32])))
    full, adapter = peaks
    assert adapter.parameters > full.parameters
    assert adapter.gradients < 0.3 * full.gradients
    assert adapter.optimizer_state < 0.3 * full.optimizer_state


def test_what_an_adapter_leaves_as_it_is_takes_half_in_bf16_on_one_device_experts_too(tmp_path, memory_config):
    cfg = memory_config(config_alone(tmp_path / "model", "qwen3_moe", **EXPERTS), dtype="bf16")
    cfg.model._component_ = "prefix_sharing.hosts.transformers.lora_causal_lm"
    model = build_model(cfg, torch.device("cpu"))
    kept = [parameter for parameter in model.parameters() if not parameter.requires_grad and parameter.dim() == 3]
    assert len(kept) == 2 * DIMS["num_hidden_layers"]  # in each layer two matrices for every expert
    assert {parameter.dtype for parameter in kept} == {torch.bfloat16}
    assert {parameter.dtype for parameter in model.trainable_parameters()} == {torch.float32}
    with peak_memory_estimate(cfg, 1) as peak_of:
        peak = peak_of(full_row(128, [64, 32, 32]))
    assert peak.parameters == sum(p.numel() * p.element_size() for p in model.parameters())


def test_the_recipe_needs_no_weights(tmp_path, memory_config, capsys):
    keys = {"example": [64, 32, 32], "pack_len": 512, "device_memory": "40MiB"}
    PrefixDPOMemory(memory_config(config_alone(tmp_path / "model"), **keys)).run()
    said = capsys.readouterr().out
    assert "512 " in next(line for line in said.splitlines() if "as configured" in line)
    assert "The longest pack_len" in said
    assert "LoRA, with the lora_ builder of the model (gradients)" in said


def test_stats_need_no_weights_and_know_the_operations_of_the_model(tmp_path, capsys):
    path = config_alone(tmp_path / "model")
    for file in Path(TOKENIZER_DIR).iterdir():
        shutil.copy(file, path)
    stats = PrefixDPOStats(make_config(tmp_path, config_class=StatsConfig, **keys_for(path, tmp_path), world_size=2))
    stats.run()
    found = json.loads((tmp_path / "stats" / "stats.json").read_text())
    flops = [stats.model.forward_flops(stats.dataset.sizes(share)).sum() for share in (False, True)]
    assert found["expected_speed_up"] == pytest.approx(flops[0] / flops[1])
    assert 1 < found["expected_speed_up"] < 2
    assert "4 examples per step, on 2 processes" in capsys.readouterr().out


SMALL = {"workloads": ["20,5,6"], "num_pairs": 3, "batch_size": 2, "rounds": 1, "measure_memory": False}


def benchmark(directory, path, config="benchmark/transformers", **overrides):
    cfg = OmegaConf.load(find_config(config))
    cfg.model = {"_component_": "prefix_sharing.hosts.transformers.causal_lm", "path": path}
    for key, value in (SMALL | {"path": path, "output_dir": str(directory)} | overrides).items():
        OmegaConf.update(cfg, key, value)
    return PrefixDPOBenchmark(check_config(cfg, BenchmarkConfig))


@pytest.mark.parametrize(("name", "kwargs"), [("qwen3", {"tie_word_embeddings": True}), ("qwen3_moe", EXPERTS)])
def test_the_benchmark_compares_with_transformers_own_computation(tmp_path, name, kwargs):
    run = benchmark(tmp_path, config_alone(tmp_path / "model", name, **kwargs))
    pairs = run.pairs_of("20,5,6")
    expected = transformers_log_probs(run.model, pairs)
    assert run.check_log_probs(pairs).numpy() == pytest.approx(expected, rel=1e-5)
    run.run()
    (workload,) = json.loads((tmp_path / "benchmark.json").read_text())["workloads"]
    names = ["transformers", "trl", "paired_packed", "prefix", "prefix_packed"]
    assert list(workload["formats"]) == [name for name in names if name != "trl" or find_spec("trl")]
    flops = [workload["formats"][name]["flops"] for name in ("transformers", "paired_packed", "prefix")]
    assert flops[0] > flops[1] > flops[2]


def test_what_is_torchtunes_alone_is_left_out_of_the_benchmark_with_a_note(tmp_path, caplog):
    with caplog.at_level("WARNING", logger="prefix_sharing"):
        run = benchmark(tmp_path, config_alone(tmp_path / "model"), "benchmark/cpu")
    assert run.measure == ["steps"]
    assert "measure: layers and scaling are left out" in caplog.text
    assert run.formats[0].name == "transformers"
