"""A model is held to its checkpoint's ``config.json``: what computes something else is refused, and nothing else is."""

import json
import re
from pkgutil import resolve_name

import pytest
import torch
from omegaconf import OmegaConf
from torchtune import config
from torchtune.models.llama3 import llama3
from torchtune.models.llama3_2 import llama3_2
from torchtune.models.mistral import mistral
from torchtune.training import FullModelHFCheckpointer, FullModelMetaCheckpointer

from prefix_sharing.checkpoint import Checkpoint
from prefix_sharing.config import config_names, find_config
from prefix_sharing.errors import ConfigError, UserError
from prefix_sharing.hosts import to_tree_model
from prefix_sharing.hosts.torchtune.geometry import check_geometry, config_file_of, missing_window
from prefix_sharing.hosts.torchtune.random_weights import random_llama_checkpointer
from prefix_sharing.quickstart import preference_pairs, tokenizer
from published import CONFIGS, FIXED_BUILDERS, PUBLISHED, as_transformers_5_writes_it
from runs import MODEL, hf_checkpointer, lora, make_recipe

LORA = {"lora_attn_modules": ["q_proj", "v_proj"], "apply_lora_to_mlp": True}
DIMS = {"vocab_size": 32, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "embed_dim": 16, "max_seq_len": 64}
SMALL = {
    "model_type": "llama",
    "vocab_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "hidden_size": 16,
    "intermediate_size": 24,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
}


def on_meta(builder, **arguments):
    with torch.device("meta"):
        return builder(**arguments)


def write(directory, hf_config):
    file = directory / "config.json"
    file.write_text(json.dumps(hf_config))
    return file


def built_on_meta(name):
    return on_meta(resolve_name(f"torchtune.models.{name}"))


@pytest.mark.parametrize("name", FIXED_BUILDERS)
def test_every_builder_fits_the_published_config_of_its_model(tmp_path, name):
    module, builder = name.split(".")
    hf_config = PUBLISHED[FIXED_BUILDERS[name]]
    models = [built_on_meta(name), to_tree_model(built_on_meta(name), "chains")]
    if module != "code_llama2":
        models.append(on_meta(resolve_name(f"torchtune.models.{module}.lora_{builder}"), **LORA))
    for model in models:
        for written in (hf_config, as_transformers_5_writes_it(hf_config)):
            check_geometry(model, write(tmp_path, written))


def test_a_quantized_model_fits_its_published_config(tmp_path):
    model = on_meta(resolve_name("torchtune.models.llama3_2.qlora_llama3_2_1b"), **LORA)
    check_geometry(model, write(tmp_path, PUBLISHED["Llama-3.2-1B"]))


OF_TORCHTUNE = [name for name in config_names() if "prefix_dpo" in name and not name.startswith("transformers/")]


@pytest.mark.parametrize("name", OF_TORCHTUNE)
def test_every_config_fits_the_published_config_of_its_model(tmp_path, name):
    published = next(CONFIGS[start] for start in CONFIGS if name.startswith(f"{start}_"))
    with torch.device("meta"):
        model = config.instantiate(OmegaConf.load(find_config(name)).model)
    check_geometry(model, write(tmp_path, PUBLISHED[published]))


CHANGES = [
    ("Llama-3.1-8B", "llama3_1.llama3_1_8b", key, value)
    for key, value in {
        "model_type": "gemma",
        "hidden_act": "gelu",
        "num_hidden_layers": 33,
        "hidden_size": 4097,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "head_dim": 64,
        "intermediate_size": 14337,
        "vocab_size": 128257,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "rope_scaling": None,
        "rope_scaling.factor": 32.0,
        "rope_scaling.low_freq_factor": 2.0,
        "rope_scaling.high_freq_factor": 2.0,
        "rope_scaling.original_max_position_embeddings": 4096,
        "rope_scaling.rope_type": "yarn",
        "partial_rotary_factor": 0.75,
        "tie_word_embeddings": True,
        "attention_bias": True,
    }.items()
]
CHANGES += [
    ("Llama-3-8B", "llama3.llama3_8b", "rope_scaling", {"rope_type": "llama3", "factor": 8.0}),
    ("Llama-3-8B", "llama3.llama3_8b", "rope_scaling", {"type": "linear", "factor": 2.0}),
    ("Qwen2.5-7B", "qwen2_5.qwen2_5_7b_base", "rope_scaling", {"rope_type": "yarn", "factor": 4.0}),
    ("Qwen2.5-0.5B", "qwen2_5.qwen2_5_0_5b", "tie_word_embeddings", False),
    ("Qwen2.5-7B", "qwen2_5.qwen2_5_7b_base", "model_type", "llama"),
    ("Mistral-7B-v0.1", "mistral.mistral_7b", "rope_theta", 1000000.0),
    ("Mistral-7B-v0.1", "mistral.mistral_7b", "vocab_size", 32768),
    ("Phi-3-mini-4k", "phi3.phi3_mini", "rope_scaling", {"type": "longrope"}),
    ("Phi-3-mini-4k", "phi3.phi3_mini", "model_type", "llama"),
    ("gemma-2b", "gemma.gemma_2b", "model_type", "gemma2"),
    ("gemma-2b", "gemma.gemma_2b", "tie_word_embeddings", False),
    ("gemma-2b", "gemma.gemma_2b", "head_dim", 128),
    ("gemma-2-2b", "gemma2.gemma2_2b", "sliding_window", 2048),
    ("gemma-2-2b", "gemma2.gemma2_2b", "query_pre_attn_scalar", 144),
    ("gemma-2-2b", "gemma2.gemma2_2b", "attn_logit_softcapping", 20.0),
    ("gemma-2-2b", "gemma2.gemma2_2b", "attn_logit_softcapping", None),
]


@pytest.mark.parametrize(("published", "builder", "key", "value"), CHANGES)
def test_each_key_that_differs_is_refused_by_name(tmp_path, published, builder, key, value):
    hf_config = json.loads(json.dumps(PUBLISHED[published]))
    outer, _, inner = key.partition(".")
    if inner:
        hf_config[outer][inner] = value
    else:
        hf_config[outer] = value
    model = built_on_meta(builder)
    for written in (hf_config, as_transformers_5_writes_it(hf_config)):
        file = write(tmp_path, written)
        with pytest.raises(ConfigError) as error:
            check_geometry(model, file)
        assert error.value.key == "model"
        assert str(file) in str(error.value)
        # Where the key is nested, or moved into rope_parameters, at least its last part is named.
        named = "rope_type" if isinstance(value, dict) else key.rsplit(".", 1)[-1]
        assert re.search(rf"\b{named}\b", str(error.value)), str(error.value)


def test_a_difference_is_told_in_one_sentence_with_both_values(tmp_path):
    model = on_meta(llama3, **DIMS, intermediate_dim=24, rope_base=10_000)
    file = write(tmp_path, SMALL | {"rope_theta": 100000.0})
    with pytest.raises(ConfigError) as error:
        check_geometry(model, file)
    assert str(error.value) == (
        f"Config key 'model': rope_base is 10000, but rope_theta in {file} is 100000; set model.rope_base: 100000, or "
        "name the builder of this checkpoint if model._component_ does not take rope_base."
    )


def test_a_builder_that_scales_by_one_fits_a_checkpoint_without_scaling(tmp_path):
    file = write(tmp_path, SMALL | {"tie_word_embeddings": True})
    check_geometry(on_meta(llama3_2, **DIMS, intermediate_dim=24, scale_factor=1), file)
    with pytest.raises(ConfigError, match="scale_factor is 32, but rope_scaling .* is not there; set model.scale"):
        check_geometry(on_meta(llama3_2, **DIMS, intermediate_dim=24), file)


@pytest.mark.parametrize(
    ("builder", "arguments", "published", "theta"),
    [
        ("phi4.phi4_14b", {}, "phi-4", 250000),
        ("phi4.lora_phi4_14b", LORA, "phi-4", 250000),
        ("code_llama2.lora_code_llama2_7b", LORA, "CodeLlama-7b", 1000000),
    ],
)
def test_builders_to_which_torchtune_gave_another_rope_base_are_refused(tmp_path, builder, arguments, published, theta):
    # As of 0.6.1; phi3.lora_phi3 and llama2.lora_llama2 take a rope_base.
    model = on_meta(resolve_name(f"torchtune.models.{builder}"), **arguments)
    with pytest.raises(ConfigError, match=f"rope_base is 10000, but rope_theta .* is {theta}"):
        check_geometry(model, write(tmp_path, PUBLISHED[published]))


def test_the_caps_that_torchtune_exchanged_are_warned_of(tmp_path, caplog):
    check_geometry(built_on_meta("gemma2.gemma2_2b"), write(tmp_path, PUBLISHED["gemma-2-2b"]))
    assert "caps attention scores at 30, but attn_logit_softcapping" in caplog.text


def test_absent_keys_have_the_defaults_of_transformers(tmp_path):
    rest = {key: value for key, value in SMALL.items() if key not in ("rope_theta", "rms_norm_eps")}
    fitting = on_meta(llama3, **DIMS, intermediate_dim=24, rope_base=10_000, norm_eps=1e-6)
    check_geometry(fitting, write(tmp_path, rest))
    for arguments, key in (
        ({"rope_base": 500_000, "norm_eps": 1e-6}, "rope_theta"),
        ({"rope_base": 10_000, "norm_eps": 1e-5}, "rms_norm_eps"),
    ):
        with pytest.raises(ConfigError, match=key):
            check_geometry(on_meta(llama3, **DIMS, intermediate_dim=24, **arguments), write(tmp_path, rest))


def test_the_defaults_are_those_of_transformers():
    transformers = pytest.importorskip("transformers")
    from prefix_sharing.hosts.torchtune import geometry

    for model_type, defaults in geometry._DEFAULTS.items():
        theirs = transformers.AutoConfig.for_model(model_type)
        assert theirs.rope_parameters["rope_theta"] == geometry._ROPE_THETA
        assert {key: getattr(theirs, key) for key in defaults} == defaults, model_type


def test_of_an_unknown_family_only_what_is_there_is_compared(tmp_path):
    model = on_meta(llama3, **DIMS, intermediate_dim=24)
    rest = {key: value for key, value in SMALL.items() if key not in ("rope_theta", "rms_norm_eps")}
    check_geometry(model, write(tmp_path, rest | {"model_type": "another"}))
    with pytest.raises(ConfigError, match="num_hidden_layers"):
        check_geometry(model, write(tmp_path, rest | {"model_type": "another", "num_hidden_layers": 3}))


@pytest.mark.parametrize("hf_config", [None, {}, {"text_config": SMALL, "hidden_size": 8}, {"dim": 8, "n_layers": 3}])
def test_other_layouts_are_not_compared(tmp_path, hf_config):
    file = tmp_path / "config.json" if hf_config is None else write(tmp_path, hf_config)
    check_geometry(on_meta(llama3, **DIMS), file)


def test_checkpointers_of_other_formats_are_not_compared(tmp_path):
    (tmp_path / "weights").mkdir()
    torch.save({}, tmp_path / "weights" / "consolidated.00.pth")
    checkpointer = FullModelMetaCheckpointer(
        checkpoint_dir=str(tmp_path / "weights"),
        checkpoint_files=["consolidated.00.pth"],
        model_type="LLAMA3",
        output_dir=str(tmp_path / "out"),
    )
    assert config_file_of(checkpointer) is None
    assert config_file_of(object()) is None


def test_made_up_weights_are_described_as_they_are_built(tmp_path):
    arguments = DIMS | {"intermediate_dim": 24, "rope_base": 10_000, "norm_eps": 1e-6}
    model = {"_component_": "torchtune.models.llama3.llama3", **arguments}
    checkpointer = random_llama_checkpointer(
        model, tmp_path / "base", str(tmp_path / "out"), seed=0, checkpoint_files=None
    )
    assert isinstance(checkpointer, FullModelHFCheckpointer)
    check_geometry(on_meta(llama3, **arguments), config_file_of(checkpointer))


@pytest.fixture
def base(tmp_path):
    """The quickstart's weights, and overrides for a recipe that reads them as any user's."""
    directory = tmp_path / "base"
    random_llama_checkpointer(MODEL, directory, str(tmp_path / "unused"), seed=0, checkpoint_files=None)
    checkpointer = hf_checkpointer(directory, tmp_path / "out") | {"checkpoint_files": ["model.safetensors"]}
    return directory, {"checkpointer": checkpointer}


@pytest.mark.parametrize("model", [MODEL, lora()["model"]], ids=["full", "lora"])
def test_a_run_stops_before_it_trains_another_model(tmp_path, base, model):
    _, keys = base
    make_recipe(tmp_path / "out", **keys, model=model).setup()
    recipe = make_recipe(tmp_path / "out", **keys, model={**model, "rope_base": 10_000})
    with pytest.raises(UserError, match="rope_base is 10000, but rope_theta in .*config.json is 500000"):
        recipe.setup()


@pytest.mark.parametrize("precompute", [True, False])
def test_a_reference_of_another_model_is_refused(tmp_path, base, precompute):
    directory, keys = base
    other = tmp_path / "other"
    other.mkdir()
    (other / "model.safetensors").hardlink_to(directory / "model.safetensors")
    write(other, json.loads((directory / "config.json").read_text()) | {"rms_norm_eps": 1e-3})
    reference = hf_checkpointer(other, tmp_path / "out") | {"checkpoint_files": ["model.safetensors"]}
    recipe = make_recipe(tmp_path / "out", **keys, ref_checkpointer=reference, **{"reference.precompute": precompute})
    with pytest.raises(UserError, match=f"rms_norm_eps in {other}/config.json is 0.001"):
        recipe.setup()


def test_weights_without_a_config_are_loaded_as_ever():
    model = to_tree_model(llama3(**DIMS), "chains")
    model.load_weights(Checkpoint(llama3(**DIMS).state_dict()), seed=0)


@pytest.mark.parametrize(
    ("changes", "window"),
    [
        ({"model_type": "mistral", "sliding_window": 48}, 48),
        ({"model_type": "mistral"}, 4096),
        ({"model_type": "mistral", "sliding_window": None}, None),
        ({"model_type": "phi3", "sliding_window": 48}, 48),
        ({"model_type": "qwen2", "sliding_window": 48, "use_sliding_window": False}, None),
        ({"model_type": "qwen2", "sliding_window": 48, "use_sliding_window": True, "max_window_layers": 2}, None),
        ({"model_type": "qwen2", "sliding_window": 48, "use_sliding_window": True, "max_window_layers": 1}, 48),
        ({"model_type": "llama"}, None),
    ],
)
def test_a_window_that_the_model_lacks_is_known(tmp_path, changes, window):
    file = write(tmp_path, SMALL | changes)
    model = on_meta(mistral, **DIMS, intermediate_dim=24)
    found = missing_window(model, OmegaConf.create({"checkpoint_dir": str(tmp_path)}))
    assert found == (None if window is None else (window, file))
    assert missing_window(model, None) is None
    assert missing_window(model, OmegaConf.create({"checkpoint_dir": str(tmp_path / "none")})) is None


def test_gemma_2_has_its_window(tmp_path):
    write(tmp_path, PUBLISHED["gemma-2-2b"])
    checkpointer = OmegaConf.create({"checkpoint_dir": str(tmp_path)})
    assert missing_window(built_on_meta("gemma2.gemma2_2b"), checkpointer) is None


def test_sequences_beyond_a_window_that_the_model_lacks_are_refused_and_shorter_ones_are_not(tmp_path, base):
    directory, keys = base
    longest = max(
        preference_pairs(tokenizer(), num_pairs=num_pairs, seed=seed).longest for num_pairs, seed in ((64, 0), (16, 1))
    )
    described = json.loads((directory / "config.json").read_text()) | {"model_type": "mistral"}
    write(directory, described | {"sliding_window": longest})
    make_recipe(tmp_path / "out", **keys).setup()
    write(directory, described | {"sliding_window": 16})
    with pytest.raises(UserError, match=f"max_seq_len': the longest .* tokens, but sliding_window in {directory}"):
        make_recipe(tmp_path / "out", **keys).setup()
