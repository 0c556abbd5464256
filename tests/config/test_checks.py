"""What is checked before anything long runs, and how it is said."""

import sys
from dataclasses import dataclass

import pytest
from omegaconf import OmegaConf

from prefix_dpo_benchmark import BenchmarkConfig
from prefix_dpo_online import OnlineConfig
from prefix_sharing.config import (
    DistributedConfig,
    TrainingConfig,
    at_least,
    check_config,
    config_names,
    find_config,
    instantiate,
    parse,
)
from prefix_sharing.config.foreign import CALLED_HERE
from prefix_sharing.errors import ConfigError, UserError

QUICKSTART = find_config("quickstart/single_device")


def checked(config_class=TrainingConfig, **overrides):
    cfg = OmegaConf.load(QUICKSTART)
    for key, value in overrides.items():
        OmegaConf.update(cfg, key, value)
    return check_config(cfg, config_class)


def test_every_config_of_the_package_passes():
    names = config_names()
    assert {"quickstart/single_device", "quickstart/distributed", "tiny/hh_rlhf_single_device"} <= set(names)
    for name in names:
        cfg = OmegaConf.load(find_config(name))
        for key in OmegaConf.missing_keys(cfg):
            OmegaConf.update(cfg, key, "pairs.jsonl")
        config_class = DistributedConfig if "distributed" in name else TrainingConfig
        config_class = OnlineConfig if "online" in name else config_class
        cfg = check_config(cfg, BenchmarkConfig if name.startswith("benchmark/") else config_class)
        assert cfg.output_dir


def test_defaults_are_filled_in():
    cfg = checked()
    assert cfg.share_prefix is True
    assert cfg.attention_backend is None


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"bach_size": 2}, "'bach_size': unknown key. Did you mean 'batch_size'?"),
        ({"entirely_different": 2}, "'entirely_different': unknown key."),
        ({"fsdp_cpu_offload": True}, "'fsdp_cpu_offload': unknown key"),
        ({"reference.cache_dri": "x"}, "'reference.cache_dri': unknown key. Did you mean 'cache_dir'?"),
        ({"batch_size": "many"}, "'batch_size': must be a whole number, but is 'many'."),
        ({"batch_size": "${output_dir}"}, "'batch_size': must be a whole number, but is 'quickstart_output'."),
        ({"epochs": 1.5}, "'epochs': must be a whole number, but is 1.5."),
        ({"clip_grad_norm": "one"}, "'clip_grad_norm': must be a number, but is 'one'."),
        ({"reference.precompute": "maybe"}, "'reference.precompute': must be True or False, but is 'maybe'."),
        ({"reference": 5}, "'reference': must be a mapping, but is 5."),
        ({"output_dir": True}, "'output_dir': must be text, but is True; quote it."),
        ({"reference.cache_dir": True}, "'reference.cache_dir': must be text, but is True; quote it."),
        ({"resume": True}, "'resume': must be text, but is True; give auto, or the directory of a training checkpoint"),
        ({"batch_size": 0}, "'batch_size': must be at least 1, but is 0."),
        ({"epochs": -1}, "'epochs': must be at least 1, but is -1."),
        ({"max_steps_per_epoch": 0}, "'max_steps_per_epoch': must be at least 1"),
        ({"seed": -1}, "'seed': must be at least 0, but is -1."),
        ({"num_workers": -1}, "'num_workers': must be at least 0"),
        ({"dtype": "fp16"}, "'dtype': must be fp32 or bf16, but is fp16."),
        ({"attention_backend": "flash"}, "'attention_backend': must be flex, chains or varlen, but is flash."),
        ({"self_check": "gradient"}, "'self_check': must be True, False or gradients, but is gradient."),
        ({"clip_grad_norm": 0}, "'clip_grad_norm': must be above 0"),
        ({"clip_grad_norm": float("nan")}, "'clip_grad_norm': must be above 0"),
        ({"shuffle": "perhaps"}, "'shuffle': must be True or False, but is 'perhaps'."),
        (
            {"enable_activation_offloading": True},
            "'enable_activation_offloading': needs enable_activation_checkpointing",
        ),
        ({"ac_mode": "selective"}, "'ac_mode': selective needs enable_activation_checkpointing"),
        ({"ac_mode": "some"}, "'ac_mode': must be full or selective, but is some."),
        ({"output_dir": "${nowhere}"}, "'output_dir': Interpolation key 'nowhere' not found."),
        ({"output_dir": "???"}, "'output_dir': required, but not set."),
        ({"output_dir": None}, "'output_dir': required, but not set."),
        ({"dataset.num_pairs": "???"}, "'dataset.num_pairs': required, but not set."),
        (
            {"dataset.num_pairs": "???", "dataset_val.num_pairs": "${dataset.num_pairs}"},
            "'dataset.num_pairs': required, but not set.",
        ),
        ({"dataset.num_pairs": "???", "dataset_val": "${dataset}"}, "'dataset.num_pairs': required, but not set."),
        (
            {"dataset.num_pairs": "???", "loss.beta": "???"},
            "'dataset.num_pairs': required, but not set, and so is loss.beta.",
        ),
        (
            {"dataset.num_pairs": "???", "loss.beta": "???", "optimizer.lr": "???"},
            "'dataset.num_pairs': required, but not set, and so are loss.beta, optimizer.lr.",
        ),
        ({"loss._component_": "prefix_sharing.losses.DPO"}, "'loss': component 'prefix_sharing.losses.DPO' not found"),
        ({"loss._component_": "DPOLoss"}, "'DPOLoss' not found. Did you mean 'prefix_sharing.losses.DPOLoss'?"),
        ({"loss._component_": "nowhere.DPOLoss"}, "'nowhere.DPOLoss' not found: No module named 'nowhere'."),
        ({"optimizer._component_": "torch.optim.Adamw"}, "'torch.optim.Adamw' not found. Did you mean 'AdamW'?"),
        ({"metric_logger._component_": "json"}, "'metric_logger': json is a module; name a class or function in it."),
        (
            {"loss._component_": "prefix_sharing.losses.NLLLoss", "loss.beta": 1},
            "'loss.beta': unknown argument of prefix_sharing.losses.NLLLoss; remove it (~loss.beta on the command",
        ),
        (
            {"optimizer.learning_rate": 1},
            "'optimizer.learning_rate': unknown argument of torch.optim.AdamW. Here it is 'optimizer.lr'.",
        ),
        ({"loss.bta": 1}, "'loss.bta': unknown argument of prefix_sharing.losses.DPOLoss. Did you mean 'beta'?"),
        ({"model.num_layer": 3}, "'model.num_layer': unknown argument of torchtune.models.llama3.llama3. Did you mean"),
        ({"loss.beta": [0.1, 0.2]}, "'loss.beta': must be a number, but is [0.1, 0.2]."),
        ({"loss.beta": "abc"}, "'loss.beta': must be a number, but is 'abc'."),
        ({"optimizer.lr": "1e-4x"}, "'optimizer.lr': must be a number, but is '1e-4x'."),
        ({"optimizer.betas": 0.9}, "'optimizer.betas': must be a list"),
        ({"lr_scheduler.num_warmup_steps": "x"}, "'lr_scheduler.num_warmup_steps': must be a whole number, but is"),
        ({"model.num_layers": "two"}, "'model.num_layers': must be a whole number, but is 'two'."),
        ({"tokenizer.max_seq_len": "${device}"}, "'tokenizer.max_seq_len': must be a whole number, but is 'cpu'."),
        ({"optimizer": "adam"}, "'optimizer': must name its component with _component_"),
        ({"optimizer": 5}, "'optimizer': must name its component with _component_"),
        ({"loss._component_": 3}, "'loss': must name its component with _component_"),
        (
            {"dataset._component_": 3},
            "'dataset': must name its component with _component_, by a dotted path, not by 3.",
        ),
        ({"seed": 10**23}, "'seed': must be below 2^63, but is 1e+23."),
        ({"epochs": 10**25}, "'epochs': must be below 2^63"),
        ({"optimizer.lr": float("inf")}, "'optimizer.lr': must be finite, but is inf."),
        ({"optimizer.betas": [0.9, float("nan")]}, "'optimizer.betas': must be finite, but is nan."),
        ({"loss.beta": float("nan")}, "'loss.beta': must be finite, but is nan."),
        ({"clip_grad_norm": float("inf")}, "'clip_grad_norm': must be finite, but is inf."),
        ({"model.num_layers": 0}, "'model.num_layers': must be at least 1, but is 0."),
        ({"model.num_layers": 10**9}, "'model.num_layers': must be at most 10,000, but is 1,000,000,000."),
        ({"model.num_heads": 0}, "'model.num_heads': must be at least 1"),
        ({"model.embed_dim": 0}, "'model.embed_dim': must be at least 1"),
        ({"model.vocab_size": -5}, "'model.vocab_size': must be at least 1"),
        ({"tokenizer.max_seq_len": -1}, "'tokenizer.max_seq_len': must be at least 1, but is -1."),
        (
            {"metric_logger.lgo_dir": "x"},
            "'metric_logger.lgo_dir': unknown argument of torchtune.training.metric_logging",
        ),
        ({"reference.cache_dir": ""}, "'reference.cache_dir': must not be empty; null turns the cache off."),
        ({"output_dir": ""}, "'output_dir': must not be empty"),
        ({"device": "meta"}, "'device': must be cuda or cpu, but is meta."),
        (
            {
                "dataset._component_": "prefix_sharing.datasets.prefix_preference_dataset",
                "dataset.source": "json",
                "dataset.group_by_prompt": "maybe",
            },
            "'dataset.group_by_prompt': must be True or False, but is 'maybe'.",
        ),
    ],
)
def test_what_is_wrong_is_named(overrides, message):
    with pytest.raises(ConfigError, match="^Config key '") as caught:
        checked(**overrides)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "key", ["model", "tokenizer", "checkpointer", "dataset", "loss", "optimizer", "metric_logger", "output_dir"]
)
def test_null_is_not_a_value_of_a_required_key(monkeypatch, capsys, key):
    with pytest.raises(SystemExit):
        run_main(monkeypatch, "--config", "quickstart/single_device", f"{key}=null")
    assert capsys.readouterr().err == f"Error: Config key '{key}': required, but not set.\n"


@pytest.mark.parametrize("key", ["ref_checkpointer", "dataset_val", "lr_scheduler", "profiler", "clip_grad_norm"])
def test_null_is_a_value_of_the_other_keys(monkeypatch, key):
    argv = ["--config", "quickstart/single_device", "run_val_every_n_steps=null", f"{key}=null"]
    assert run_main(monkeypatch, *argv)[key] is None


PACKED = {"batch_size": None, "gradient_accumulation_steps": None, "packing": "step", "global_batch_size": 8}


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"pack_len": 512}, "'pack_len': not used with packing: none; remove it (~pack_len on the command line)."),
        ({"pack_len": "auto"}, "'pack_len': not used with packing: none"),
        ({"pack_rows_per_step": 2}, "'pack_rows_per_step': not used with packing: none"),
        (PACKED | {"batch_size": 2}, "'batch_size': not used with packing: step"),
        (PACKED | {"gradient_accumulation_steps": 1}, "'gradient_accumulation_steps': not used with packing: step"),
        (PACKED | {"pack_rows_per_step": 2}, "'pack_rows_per_step': not used with packing: step"),
        (
            PACKED | {"packing": "dataset", "pack_rows_per_step": 2},
            "'global_batch_size': not used with packing: dataset",
        ),
        ({"global_batch_size": 8}, "'gradient_accumulation_steps': not used with global_batch_size"),
        ({"dataset_val.packed": True}, "'dataset_val.packed': not used: held-out examples are packed as"),
        ({"dataset_val": None}, "'run_val_every_n_steps': not used without dataset_val"),
        (PACKED | {"global_batch_size": None}, "'global_batch_size': required with packing: step."),
        (
            PACKED | {"packing": "dataset", "global_batch_size": None},
            "'pack_rows_per_step': required with packing: dataset",
        ),
        (PACKED | {"packing": "rows"}, "'packing': must be none, step or dataset, but is rows."),
        (PACKED | {"pack_len": "longest"}, "'pack_len': must be auto or a number of tokens, but is longest."),
        (PACKED | {"pack_len": 0}, "'pack_len': must be auto or a number of tokens, but is 0."),
        (PACKED | {"dataset.packed": False}, "'packing': is step, but dataset.packed is False; keep one"),
        ({"packing": "none", "dataset.packed": True}, "'packing': is none, but dataset.packed is True; keep one"),
    ],
)
def test_a_key_that_would_not_be_used_is_an_error(overrides, message):
    with pytest.raises(ConfigError) as caught:
        checked(**overrides)
    assert message in str(caught.value)


def test_packed_of_a_data_set_is_an_alias_of_packing():
    unpacked = PACKED | {"packing": None}
    assert checked(**unpacked, **{"dataset.packed": True}).packing == "step"
    assert checked(**PACKED, **{"dataset.packed": True}).packing == "step"
    assert checked(**{"dataset.packed": False}).packing == "none"
    assert checked().packing == "none"
    whole = PACKED | {"packing": "dataset", "pack_rows_per_step": 2, "global_batch_size": None, "dataset.packed": True}
    assert checked(**whole).packing == "dataset"
    named = {"_component_": "prefix_sharing.datasets.packed_preference_dataset", "source": "json"}
    cfg = OmegaConf.merge(OmegaConf.load(QUICKSTART), unpacked)
    cfg.dataset = named
    cfg = check_config(cfg, TrainingConfig)
    assert cfg.packing == "step"
    assert "packed" not in cfg.dataset


def test_a_config_with_every_default_written_out_is_a_config():
    for overrides in ({}, PACKED):
        cfg = checked(**overrides)
        assert check_config(OmegaConf.create(OmegaConf.to_yaml(cfg)), TrainingConfig) == cfg


def test_run_val_every_n_steps_needs_something_to_evaluate():
    with pytest.raises(ConfigError, match="'run_val_every_n_steps': not used without dataset_val"):
        check_config(OmegaConf.merge(OmegaConf.load(QUICKSTART), {"dataset_val": None}), TrainingConfig)


def test_a_recipe_of_ones_own_adds_keys():
    @dataclass
    class MyConfig(TrainingConfig):
        my_key: int = at_least(1, default=3)

    assert checked(MyConfig).my_key == 3
    assert checked(MyConfig, my_key=4).my_key == 4
    with pytest.raises(ConfigError, match="'my_key': must be at least 1, but is 0"):
        checked(MyConfig, my_key=0)


@pytest.mark.parametrize(
    "overrides",
    [
        {"loss.beta": 1},
        {"lr_scheduler.num_warmup_steps": 1e1},
        {"optimizer.fused": None},
        {"optimizer.betas": [0.9, 0.95]},
        {"dataset._component_": "prefix_sharing.datasets.prefix_preference_dataset", "dataset.source": "json"},
    ],
)
def test_what_suits_an_argument_passes(overrides):
    assert checked(**overrides)


def test_what_a_component_refuses_names_its_key():
    node = OmegaConf.create({"_component_": "prefix_sharing.losses.DPOLoss", "beta": -1})
    with pytest.raises(
        UserError, match=r"^Config key 'loss': prefix_sharing.losses.DPOLoss: beta must be positive, not -1\.$"
    ):
        instantiate("loss", node)


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("batchsize", "batch_size"),
        ("num_epochs", "epochs"),
        ("grad_accumulation_steps", "gradient_accumulation_steps"),
        ("clip_grad", "clip_grad_norm"),
        ("fused", None),
        ("deepspeed", None),
        ("entirely_different", None),
    ],
)
def test_only_a_key_that_is_like_the_unknown_one_is_suggested(key, meant):
    with pytest.raises(ConfigError) as caught:
        checked(**{key: 1})
    suggestion = "" if meant is None else f" Did you mean '{meant}'?"
    assert str(caught.value) == f"Config key '{key}': unknown key.{suggestion}"


@pytest.mark.parametrize(("key", "here"), CALLED_HERE.items())
def test_a_key_of_torchtune_or_trl_is_given_its_name_here(key, here):
    with pytest.raises(ConfigError) as caught:
        checked(**{key: 1})
    assert str(caught.value).startswith(f"Config key '{key}': unknown ")
    assert str(caught.value).endswith(f" Here it is '{here}'.")
    name, _, value = here.partition("=")
    checked(**{name: value or OmegaConf.select(OmegaConf.load(QUICKSTART), name) or 1})


def test_names_and_paths_resolve(tmp_path, monkeypatch):
    assert find_config("quickstart/single_device").endswith("quickstart/single_device.yaml")
    (tmp_path / "mine.yaml").write_text("a: 1")
    assert find_config(str(tmp_path / "mine.yaml")) == str(tmp_path / "mine.yaml")
    with pytest.raises(
        UserError, match="'quickstart/single_devise' not found. Did you mean 'quickstart/single_device'?"
    ):
        find_config("quickstart/single_devise")
    for name in ("nowhere", "my_single_device.yaml"):
        with pytest.raises(UserError, match=f"'{name}' not found. prefix-tune ls lists the configs of this package"):
            find_config(name)


def run_main(monkeypatch, *argv, function=lambda cfg: None):
    monkeypatch.setattr(sys, "argv", ["recipe", *argv])
    read = []

    @parse(TrainingConfig)
    def recipe_main(cfg):
        read.append(cfg)
        function(cfg)

    recipe_main()
    return read[0]


def test_parse_reads_name_and_overrides(monkeypatch):
    cfg = run_main(
        monkeypatch,
        "--config",
        "quickstart/single_device",
        "batch_size=3",
        "loss=prefix_sharing.losses.ORPOLoss",
        "clip_grad_norm=None",
        "~lr_scheduler.num_cycles",
        "run_val_every_n_steps=null",
        "dataset_val=null",
    )
    assert cfg.batch_size == 3
    assert cfg.loss._component_ == "prefix_sharing.losses.ORPOLoss"
    assert cfg.clip_grad_norm is None
    assert "num_cycles" not in cfg.lr_scheduler
    assert cfg.dataset_val is None


def test_a_mapping_with_a_component_replaces_the_configs(monkeypatch):
    other = "{_component_: torch.optim.SGD, momentum: 0.9}"
    cfg = run_main(monkeypatch, "--config", "quickstart/single_device", f"optimizer={other}", "optimizer.lr=0.5")
    assert cfg.optimizer == {"_component_": "torch.optim.SGD", "momentum": 0.9, "lr": 0.5}


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--config", "quickstart/online"], "'prompts': unknown key. The config is for prefix_dpo_online."),
        ([], "Error: No config given; use --config NAME_OR_PATH."),
        (["--config", "nowhere"], "Error: Config 'nowhere' not found."),
        (["--config", "quickstart/single_device", "batch_size"], "cannot be read: Command-line overrides must be"),
        (["--config", "quickstart/single_device", "--fast"], "cannot be read: Additional flag arguments not supported"),
        (["--config", "{broken}"], "cannot be read: mapping values are not allowed"),
    ],
)
def test_parse_says_what_is_wrong_in_one_line(monkeypatch, capsys, tmp_path, argv, message):
    broken = tmp_path / "broken.yaml"
    broken.write_text("a: b: c\n")
    with pytest.raises(SystemExit) as caught:
        run_main(monkeypatch, *(arg.format(broken=broken) for arg in argv))
    assert caught.value.code == 1
    stderr = capsys.readouterr().err
    assert stderr.startswith("Error: ")
    assert message in stderr
    assert stderr.count("\n") == 1


def test_an_unforeseen_error_keeps_its_traceback_and_ends_with_one_line(monkeypatch, capsys):
    def fail(cfg):
        raise RuntimeError("out of luck")

    with pytest.raises(SystemExit):
        run_main(monkeypatch, "--config", "quickstart/single_device", function=fail)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("Traceback")
    assert lines[-1] == "Error: RuntimeError: out of luck"
