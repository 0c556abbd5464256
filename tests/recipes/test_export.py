"""What a run writes, read by transformers, PEFT and vLLM, for families that are converted in different ways.

Nothing here knows how a host writes: another one adds its runs to ``HOSTS``.
"""

import functools
import json

import pytest
import torch
from safetensors.torch import load_file

from exports import (
    ADAPTER_LOADERS,
    Export,
    adapter_for_vllm,
    base_model,
    changed,
    dtype_of_most,
    log_probs_by,
    weights_for_vllm,
    whole_model,
)
from runs import evaluated_log_probs, run_in_process

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

DIMS = {"vocab_size": 2048, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "embed_dim": 64, "max_seq_len": 512}
ADAPTER = {
    "lora_attn_modules": ["q_proj", "k_proj", "v_proj", "output_proj"],
    "apply_lora_to_mlp": True,
    "lora_rank": 4,
    "lora_alpha": 8,
}
HF_DIMS = {
    "vocab_size": 2048,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "hidden_size": 64,
    "intermediate_size": 160,
    "max_position_embeddings": 512,
}

FAMILIES = {
    "llama3": lambda: transformers.LlamaConfig(
        **HF_DIMS, rope_parameters={"rope_type": "default", "rope_theta": 500_000.0}, rms_norm_eps=1e-5
    ),
    "qwen2": lambda: transformers.Qwen2Config(
        **HF_DIMS, rope_parameters={"rope_type": "default", "rope_theta": 1_000_000.0}, rms_norm_eps=1e-5
    ),
    # torchtune caps what comes out of the last norm where Gemma 2 caps logits: here neither does.
    "gemma2": lambda: transformers.Gemma2Config(
        **HF_DIMS, head_dim=16, sliding_window=48, query_pre_attn_scalar=16, final_logit_softcapping=None
    ),
}
KINDS = ["full", "lora", "dora", "lora_merged", "dora_merged"]
"""What a run trains, and whether it saves the merged model."""

TORCHTUNE_MODELS = {
    "llama3": {"intermediate_dim": 160},
    "qwen2": {"intermediate_dim": 160},
    "gemma2": {
        "intermediate_dim": 160,
        "head_dim": 16,
        "sliding_window_size": 48,
        "query_pre_attn_scalar": 16,
        "final_capping_value": 1e4,
    },
}


def train_with_torchtune(directory, base, family, kind):
    """Overrides of a run's config decide all that is torchtune's."""
    model = {"_component_": f"torchtune.models.{family}.{family}", **DIMS, **TORCHTUNE_MODELS[family]}
    if kind != "full":
        model |= {**ADAPTER, "_component_": f"torchtune.models.{family}.lora_{family}", "use_dora": "dora" in kind}
    checkpointer = {
        "_component_": "torchtune.training.FullModelHFCheckpointer",
        "checkpoint_dir": str(base),
        "checkpoint_files": ["model.safetensors"],
        "model_type": family.upper(),
        "output_dir": str(directory),
    }
    run_in_process(
        directory,
        model=model,
        checkpointer=checkpointer,
        save_adapter_weights_only="merged" not in kind,
        lr_scheduler=None,
        **{"optimizer.lr": 1e-3 if kind == "full" else 1e-2},
    )
    return directory / "epoch_0"


HOSTS = {"torchtune": train_with_torchtune}


@pytest.fixture(scope="module")
def export_of(tmp_path_factory):
    """The export of a run, which is not run again for every test."""

    @functools.cache
    def run(host, family, kind):
        directory = tmp_path_factory.mktemp(f"{host}_{family}_{kind}")
        base = directory / "base"
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(FAMILIES[family](), dtype=torch.float32)
        for parameter in model.parameters():  # norms and biases begin as all the same, so that none could be mistaken
            if parameter.dim() == 1:
                parameter.data += 0.2 * torch.randn_like(parameter)
        # Most models are published in bf16; an adapter is compared on a base that computes as precisely as the run.
        model.to(torch.float32 if kind in ("lora", "dora") else torch.bfloat16).save_pretrained(base)
        config = (base / "config.json").read_bytes()
        written = HOSTS[host](directory / "run", base, family, kind)
        assert (base / "config.json").read_bytes() == config
        before, after = (evaluated_log_probs(directory / "run", when) for when in ("before", "after"))
        return Export(written, base, before, after)

    return run


@pytest.fixture(autouse=True)
def _without_torchao(monkeypatch):
    # PEFT would refuse torchtune's, of which nothing here makes use.
    monkeypatch.setattr("peft.tuners.lora.torchao.is_torchao_available", lambda: False)


def close(found, expected):
    """Compares log-probs and prints how far apart they are."""
    print(f"largest difference of log-probs: {abs(found - expected).max():.2e}")
    return found == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize("kind", ["full", "lora_merged", "dora_merged"])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("host", HOSTS)
def test_a_whole_model_is_what_was_trained_by_the_default_call(export_of, host, family, kind):
    export = export_of(host, family, kind)
    assert abs(export.after - export.before).max() > 0.1
    assert close(log_probs_by(base_model(export, dtype=torch.float32)), export.before)
    loaded = whole_model(export)
    assert close(log_probs_by(loaded), export.after)
    # In the dtype of the file, in which nothing of the training is rounded away.
    written = weights_for_vllm(export.directory)
    assert loaded.dtype == dtype_of_most(written.values()) == torch.float32
    config = json.loads((export.directory / "config.json").read_text())
    assert config["dtype"] == config["torch_dtype"] == "float32"
    after, before = loaded.state_dict(), base_model(export).state_dict()
    assert all(after[name].equal(tensor) for name, tensor in written.items())
    for name in after:
        if name.endswith("_proj.weight"):
            assert changed(after[name], before[name]) > 0.99, name


@pytest.mark.parametrize("loader", ADAPTER_LOADERS)
@pytest.mark.parametrize("kind", ["lora", "dora"])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("host", HOSTS)
def test_an_adapter_is_what_was_trained_by_every_loader(export_of, host, family, kind, loader):
    export = export_of(host, family, kind)
    assert abs(export.after - export.before).max() > 0.1
    assert close(log_probs_by(ADAPTER_LOADERS[loader](export, export.directory)), export.after)


@pytest.mark.parametrize("loader", ADAPTER_LOADERS)
@pytest.mark.parametrize("kind", ["lora_merged", "dora_merged"])
@pytest.mark.parametrize("host", HOSTS)
def test_the_adapter_beside_a_merged_model_is_what_was_trained_by_every_loader(export_of, host, kind, loader):
    export = export_of(host, "llama3", kind)
    adapted = ADAPTER_LOADERS[loader](export, export.directory / "adapter", dtype=torch.float32)
    assert close(log_probs_by(adapted), export.after)


@pytest.mark.parametrize("kind", ["lora", "dora", "lora_merged", "dora_merged"])
@pytest.mark.parametrize("host", HOSTS)
def test_an_adapter_says_what_it_is_of_and_has_no_config_of_a_model_beside_it(export_of, host, kind):
    export = export_of(host, "llama3", kind)
    directory = export.directory / "adapter" if "merged" in kind else export.directory
    config = json.loads((directory / "adapter_config.json").read_text())
    assert (config["task_type"], config["peft_type"]) == ("CAUSAL_LM", "LORA")
    assert config["base_model_name_or_path"] == str(export.base.resolve())
    assert not list(directory.glob("config.json"))
    assert not list(directory.glob("*.index.json"))


@pytest.mark.parametrize("kind", ["full", "lora_merged", "dora_merged"])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("host", HOSTS)
def test_vllm_finds_every_weight_of_a_whole_model_once(export_of, host, family, kind):
    export = export_of(host, family, kind)
    written, before = weights_for_vllm(export.directory), load_file(export.base / "model.safetensors")
    assert {name: tensor.shape for name, tensor in written.items()} == {
        name: tensor.shape for name, tensor in before.items()
    }


@pytest.mark.parametrize("kind", ["lora", "lora_merged"])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("host", HOSTS)
def test_vllm_can_read_an_adapter(export_of, host, family, kind):
    export = export_of(host, family, kind)
    directory = export.directory / "adapter" if "merged" in kind else export.directory
    config, matrices = adapter_for_vllm(directory)
    modules = {f"{name}.weight" for name in matrices}
    shapes = {name: tensor.shape for name, tensor in load_file(export.base / "model.safetensors").items()}
    targets = tuple(f".{name}.weight" for name in config["target_modules"])
    assert modules == {name for name in shapes if name.endswith(targets)}
    for name, pair in matrices.items():
        assert (pair["lora_B"] @ pair["lora_A"]).shape == shapes[f"{name}.weight"], name
