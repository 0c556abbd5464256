"""A directory of a transformers model trains by its path alone, and is written as transformers and others read it."""

import json
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

transformers = pytest.importorskip("transformers", minversion="5.24")

from directories import EXPERTS, keys_for, make_directory  # noqa: E402
from prefix_dpo_answers import AnswersConfig, PrefixDPOAnswers  # noqa: E402
from prefix_sharing.config import DistributedConfig, find_config  # noqa: E402
from prefix_sharing.datasets.answers import split_at_answer  # noqa: E402
from prefix_sharing.errors import UserError  # noqa: E402
from prefix_sharing.hosts.transformers import causal_lm  # noqa: E402
from runs import (  # noqa: E402
    MODEL,
    SHORT,
    evaluated_log_probs,
    losses,
    make_config,
    run_distributed,
    run_in_process,
    training_log,
    transformers_log_probs,
    went_only_to,
)


@pytest.mark.parametrize(
    ("name", "kwargs"),
    [("qwen3", {}), ("qwen3", {"tie_word_embeddings": True}), ("gemma2", {"sliding_window": 64}), ("qwen3_moe", {})],
    ids=["qwen3", "tied", "gemma2", "moe"],
)
def test_what_is_written_is_what_was_trained(tmp_path, name, kwargs):
    more = EXPERTS if name == "qwen3_moe" else {}
    path = make_directory(tmp_path / "model", name, dtype=torch.bfloat16, **kwargs, **more)
    run = run_in_process(tmp_path / "out", **keys_for(path, tmp_path / "out"))
    found = losses(tmp_path / "out")
    assert len(found) == 10
    assert found[0] == pytest.approx(0.693147, abs=1e-5)
    saved = tmp_path / "out" / "epoch_0"
    again = transformers.AutoModelForCausalLM.from_pretrained(saved)
    assert again.dtype == torch.float32
    expected = evaluated_log_probs(tmp_path / "out")
    assert transformers_log_probs(again, run.dataset_val) == pytest.approx(expected, rel=1e-5, abs=1e-4)
    base = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    assert transformers_log_probs(base, run.dataset_val) != pytest.approx(expected, rel=1e-3)
    assert json.loads((saved / "config.json").read_text())["dtype"] == "float32"
    assert (saved / "chat_template.jinja").read_text() == (Path(path) / "chat_template.jinja").read_text()
    # a second run of ours takes it as it is
    run_in_process(tmp_path / "second", **keys_for(str(saved), tmp_path / "second", max_steps_per_epoch=1))
    assert losses(tmp_path / "second")[0] == pytest.approx(0.693147, abs=1e-5)


def test_both_hosts_follow_the_same_curve(tmp_path):
    path = tmp_path / "model"
    rope = {"rope_theta": 500_000.0, "rms_norm_eps": 1e-5}
    dims = {"hidden_size": 128, "intermediate_size": 352, "head_dim": 32}
    make_directory(path, "llama", **rope, **dims)
    keys = keys_for(str(path), tmp_path / "ours")
    run_in_process(tmp_path / "ours", **keys)
    keys["checkpointer"] = {
        "_component_": "torchtune.training.FullModelHFCheckpointer",
        "checkpoint_dir": str(path),
        "checkpoint_files": ["model.safetensors"],
        "model_type": "LLAMA3",
        "output_dir": str(tmp_path / "theirs"),
    }
    keys["model"] = {**MODEL, "_component_": "torchtune.models.llama3.llama3"}
    run_in_process(tmp_path / "theirs", **keys)
    assert losses(tmp_path / "ours") == pytest.approx(losses(tmp_path / "theirs"), rel=1e-5)


@pytest.mark.parametrize(
    "keys",
    [
        {"enable_activation_checkpointing": True},
        {"enable_activation_checkpointing": True, "ac_mode": "selective"},
        {"pack_len": None, "packing": "none"},
    ],
    ids=str,
)
def test_how_a_step_is_computed_changes_nothing(tmp_path, keys):
    path = make_directory(tmp_path / "model")
    if keys.get("packing") == "none":
        keys = {**keys, "batch_size": 1}
    run_in_process(tmp_path / "one", **keys_for(path, tmp_path / "one"))
    run_in_process(tmp_path / "other", **keys_for(path, tmp_path / "other", **keys))
    assert losses(tmp_path / "other") == pytest.approx(losses(tmp_path / "one"), rel=1e-5)


def test_the_loss_of_routers_is_part_of_the_loss_and_logged(tmp_path):
    path = make_directory(tmp_path / "model", "qwen3_moe", **EXPERTS)
    found = []
    for checkpointing in (False, True):
        out = tmp_path / str(checkpointing)
        keys = keys_for(path, out, max_steps_per_epoch=3, enable_activation_checkpointing=checkpointing, pack_len=512)
        keys["model"]["router_aux_loss_coef"] = 0.1
        run_in_process(out, **keys)
        first, *_ = training_log(out)
        assert first["aux_loss"] > 0.1  # times the coefficient; 1 for experts that are all used alike
        assert first["loss"] == pytest.approx(0.693147 + first["aux_loss"], abs=1e-5)
        found.append(losses(out))
    assert found[0] == pytest.approx(found[1], rel=1e-5)
    with pytest.raises(UserError, match=r"model.router_aux_loss_coef.*qwen3 models have no loss of routers"):
        causal_lm(make_directory(tmp_path / "dense"), router_aux_loss_coef=0.1)


@pytest.mark.slow
def test_compiled_layers_change_nothing(tmp_path):
    path = make_directory(tmp_path / "model")
    # One Row, and no pass for a reference or held-out pairs: each would be compiled for itself.
    keys = {"loss": {"_component_": "prefix_sharing.losses.SimPOLoss"}, "dataset_val": None, "max_steps_per_epoch": 1}
    run_in_process(tmp_path / "plain", **keys_for(path, tmp_path / "plain", **keys))
    run_in_process(tmp_path / "compiled", **keys_for(path, tmp_path / "compiled", **keys, compile=True))
    (plain,), (compiled,) = (training_log(tmp_path / run) for run in ("plain", "compiled"))
    for name in ("loss", "grad_norm"):
        assert compiled[name] == pytest.approx(plain[name], rel=1e-5)


def test_a_run_resumes_after_an_epoch(tmp_path):
    path = make_directory(tmp_path / "model")
    keys = {"epochs": 2, "max_steps_per_epoch": 3, "seed": 1}
    run_in_process(tmp_path / "whole", **keys_for(path, tmp_path / "whole", **keys))
    parts = went_only_to(3, tmp_path / "whole", tmp_path / "parts")
    run_in_process(parts, **keys_for(path, parts, **keys, resume="auto"))
    assert losses(parts) == pytest.approx(losses(tmp_path / "whole"), rel=1e-6)


@pytest.mark.parametrize("save_dtype", ["bf16", "fp32"])
def test_weights_are_written_in_the_dtype_that_is_asked_for(tmp_path, save_dtype):
    path = make_directory(tmp_path / "model")
    keys = keys_for(path, tmp_path / "out", max_steps_per_epoch=1)
    keys["checkpointer"]["save_dtype"] = save_dtype
    run_in_process(tmp_path / "out", **keys)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "epoch_0")
    assert again.dtype == {"bf16": torch.bfloat16, "fp32": torch.float32}[save_dtype]


def test_answers_are_those_of_transformers(tmp_path):
    path = make_directory(tmp_path / "model", tie_word_embeddings=True)
    keys = keys_for(path, tmp_path / "out", max_steps_per_epoch=2)
    run_in_process(tmp_path / "out", **keys)
    cfg = make_config(tmp_path / "out", config_class=AnswersConfig, num_prompts=2, max_new_tokens=5, **keys)
    answers = PrefixDPOAnswers(cfg, torch.device("cpu"))
    answers.run()
    written = (tmp_path / "out" / "answers.md").read_text()
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "epoch_0")
    for i in range(2):
        prompt = torch.from_numpy(split_at_answer(answers.dataset[i][0])[0])[None]
        found = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=5, do_sample=False)
        assert answers.tokenizer.decode(found[0, prompt.shape[1] :].tolist()).strip() in written


def test_what_is_no_model_is_one_sentence(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="has no config.json; it must be a directory of a model"):
        causal_lm(str(tmp_path))
    with pytest.raises(UserError, match="nowhere not found; it must be a directory of a model, or a name on the hub"):
        causal_lm(str(tmp_path / "nowhere"))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(
        UserError, match=r"^'nobody/nothing' not found: .*; where it can, tune download nobody/nothing "
    ):
        causal_lm("nobody/nothing")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match="is no model of transformers"):
        causal_lm(str(tmp_path))


@pytest.mark.slow
@pytest.mark.parametrize("adapter", [None, {"use_dora": True, "lora_rank": 4}], ids=["full", "dora"])
def test_two_processes_follow_one(tmp_path, adapter):
    path = make_directory(tmp_path / "model", tie_word_embeddings=True)
    keys = SHORT | keys_for(path, tmp_path / "alone")
    if adapter is not None:
        keys["model"] |= adapter | {"_component_": "prefix_sharing.hosts.transformers.lora_causal_lm"}
        keys["save_adapter_weights_only"] = False
    run_in_process(tmp_path / "alone", **keys)
    cfg = OmegaConf.load(find_config("quickstart/distributed"))
    keys["checkpointer"]["output_dir"] = "out"
    for key, value in keys.items():
        OmegaConf.update(cfg, key, value, merge=False)
    OmegaConf.save(cfg, tmp_path / "config.yaml")
    together = run_distributed(tmp_path / "together", 2, config=str(tmp_path / "config.yaml"))
    assert losses(together) == pytest.approx(losses(tmp_path / "alone"), rel=1e-5)
    weights = [
        transformers.AutoModelForCausalLM.from_pretrained(run / "epoch_0").state_dict()
        for run in (together, tmp_path / "alone")
    ]
    for name, tensor in weights[0].items():
        torch.testing.assert_close(tensor, weights[1][name], rtol=1e-3, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("of_model", "of_run"),
    [
        ({}, {}),
        ({}, {"data_parallel_replicate_dim": 2}),
        ({"name": "qwen3_moe", **EXPERTS}, {"fsdp_sync_every_row": True}),
        ({"tie_word_embeddings": True}, {"enable_activation_checkpointing": True, "ac_mode": "selective"}),
    ],
    ids=["four_shards", "two_copies_of_two_shards", "experts", "recomputed"],
)
def test_four_processes_follow_one(tmp_path, of_model, of_run):
    path = make_directory(tmp_path / "model", **of_model)
    few = {"max_steps_per_epoch": 3, "dataset_val": None, "num_workers": 0}
    run_in_process(tmp_path / "alone", **keys_for(path, tmp_path / "alone", **few))
    keys = keys_for(path, "out", **few, **of_run)
    OmegaConf.save(make_config("out", "quickstart/distributed", DistributedConfig, **keys), tmp_path / "config.yaml")
    together = run_distributed(tmp_path / "together", 4, config=str(tmp_path / "config.yaml"))
    assert len(losses(together)) == 3
    assert losses(together) == pytest.approx(losses(tmp_path / "alone"), rel=1e-5)
