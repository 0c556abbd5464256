"""What prefix_dpo_memory estimates against what a training step really takes of a process's memory."""

import re
import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from directories import DIMS
from prefix_sharing.config import DistributedConfig
from prefix_sharing.memory.estimate import MOST_TOKENS, full_row, longest_row, peak_memory_estimate
from runs import make_config, torchrun

EXAMPLE = [256, 128, 128]
NUM_TOKENS = 1024
MODEL = {
    "_component_": "torchtune.models.llama3.llama3",
    "vocab_size": 16000,
    "num_layers": 4,
    "num_heads": 8,
    "num_kv_heads": 4,
    "embed_dim": 384,
    "intermediate_dim": 1024,
    "max_seq_len": 2048,
}
SMALL = {"num_layers": 2, "embed_dim": 64, "intermediate_dim": 64, "vocab_size": 128}
DIRECTORY = {
    "vocab_size": 16000,
    "hidden_size": 384,
    "intermediate_size": 1024,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 48,
    "max_position_embeddings": 2048,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 512}


def of_torchtune(tmp_path):
    """The model of a config, and a small one of its kind."""
    return MODEL, MODEL | SMALL


def of_transformers(name, **kwargs):
    """The same by directories of transformers, without weights."""

    def build(tmp_path):
        transformers = pytest.importorskip("transformers", minversion="5.24")
        models = []
        for size, dims in (("whole", DIRECTORY), ("small", DIMS)):
            transformers.AutoConfig.for_model(name, **dims | kwargs).save_pretrained(tmp_path / size)
            path = str(tmp_path / size)
            models.append({"_component_": "prefix_sharing.hosts.transformers.causal_lm", "path": path})
        return models

    return build


def real_peak(configs, directory, num_processes):
    files = []
    for cfg, name in zip(configs, ("whole", "small"), strict=True):
        files.insert(0, str(directory / f"{name}.yaml"))
        OmegaConf.save(cfg, files[0])
    printed = torchrun(
        num_processes,
        Path(__file__).parents[1] / "support" / "real_step.py",
        *(*files, str(NUM_TOKENS), ",".join(map(str, EXAMPLE))),
        # Tensors go back to the system when they are freed, instead of into the allocator's own store.
        MALLOC_MMAP_THRESHOLD_="65536",
        MALLOC_TRIM_THRESHOLD_="65536",
    )
    return int(re.search(r"peak (\d+)", printed)[1])


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads memory from /proc")
@pytest.mark.parametrize(
    ("num_processes", "models", "keys"),
    [
        (1, of_torchtune, {"enable_activation_checkpointing": True}),
        (2, of_torchtune, {}),
        (1, of_transformers("qwen3"), {"enable_activation_checkpointing": True}),
        (2, of_transformers("qwen3_moe", **EXPERTS), {}),
    ],
    ids=["one", "two", "one_of_transformers", "two_with_experts"],
)
def test_predicted_peak_is_within_a_tenth_of_the_real_one(tmp_path, num_processes, models, keys):
    configs = [make_config(tmp_path, config_class=DistributedConfig, model=model, **keys) for model in models(tmp_path)]
    with peak_memory_estimate(configs[0], num_processes) as peak_of:
        predicted = peak_of(full_row(NUM_TOKENS, EXAMPLE))
    real = real_peak(configs, tmp_path, num_processes)
    print(f"{num_processes} processes, {keys}: predicted {predicted.total:,}, real {real:,}")
    assert predicted.total == pytest.approx(real, rel=0.1)


@pytest.mark.parametrize("bytes_per_token", [1, 0.4, 7])
@pytest.mark.parametrize("fixed", [0, 3000])
@pytest.mark.parametrize("begin", [128, 1024, 8192])
def test_the_longest_row_that_fits_is_found_by_trying(bytes_per_token, fixed, begin):
    usable, tried = 20_000, []

    def peak_of(num_tokens):
        tried.append(num_tokens)
        # Up to some length, something else holds most: the line through two short Rows would say nothing.
        return max(fixed + bytes_per_token * num_tokens, 9000)

    found = longest_row(peak_of, begin, usable)
    most = min((usable - fixed) / bytes_per_token, MOST_TOKENS)
    assert found % 128 == 0
    assert most - max(128, most / 8) - 128 <= found <= most
    assert len(tried) == len(set(tried)) <= 12


def test_nothing_is_tried_beyond_the_longest_row():
    tried = []
    assert longest_row(lambda n: tried.append(n) or 0, 128, 1) == MOST_TOKENS
    assert max(tried) == MOST_TOKENS
    assert longest_row(lambda n: 2, 4096, 1) is None
