"""What is checked before anything long runs, and how it is said."""

import sys
from dataclasses import dataclass

import pytest
from omegaconf import OmegaConf

from prefix_dpo_benchmark import BenchmarkConfig
from prefix_sharing.config import config_names, find_config, instantiate
from prefix_sharing.errors import UserError
from prefix_sharing.training import DistributedConfig, TrainingConfig, parse
from prefix_sharing.training.config import check_config

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
        cfg = check_config(cfg, BenchmarkConfig if name.startswith("benchmark/") else config_class)
        assert cfg.output_dir


def test_defaults_are_filled_in():
    cfg = checked()
    assert cfg.share_prefix is True
    assert cfg.attention_backend is None


class OwnLoss:
    needs_reference = False
    mean_over = "rows"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"bach_size": 2}, "there is no key 'bach_size'; the nearest one is 'batch_size'"),
        ({"fsdp_cpu_offload": True}, "there is no key 'fsdp_cpu_offload'"),
        ({"batch_size": "many"}, "batch_size: Value 'many' of type 'str' could not be converted to Integer"),
        ({"batch_size": 0}, "batch_size must be at least 1, but is 0"),
        ({"epochs": -1}, "epochs must be at least 1, but is -1"),
        ({"max_steps_per_epoch": 0}, "max_steps_per_epoch must be at least 1"),
        ({"seed": -1}, "seed must not be negative"),
        ({"dtype": "fp16"}, "dtype must be fp32 or bf16, but is fp16"),
        ({"clip_grad_norm": 0}, "clip_grad_norm must be positive"),
        ({"shuffle": "perhaps"}, "shuffle: Value 'perhaps'"),
        ({"enable_activation_offloading": True}, "needs enable_activation_checkpointing"),
        ({"ac_mode": "selective"}, "ac_mode: selective needs enable_activation_checkpointing"),
        ({"ac_mode": "some", "enable_activation_checkpointing": True}, "ac_mode must be full or selective"),
        ({"output_dir": "${nowhere}"}, "Interpolation key 'nowhere' not found"),
        ({"output_dir": "???"}, "these keys are missing: output_dir"),
        ({"dataset.num_pairs": "???"}, "these keys are missing: dataset.num_pairs"),
        ({"loss._component_": "prefix_sharing.losses.DPO"}, "loss: there is no component 'prefix_sharing.losses.DPO'"),
        ({"loss.bta": 1}, "loss: prefix_sharing.losses.DPOLoss takes no 'bta'; the nearest one is 'beta'"),
        ({"loss._component_": "torchtune.rlhf.loss.DPOLoss"}, "use one of prefix_sharing.losses"),
        (
            {"loss._component_": "test_config.OwnLoss"},
            "needs an attribute mean_over, which is pairs, examples or tokens",
        ),
        ({"model.num_layer": 3}, "model: torchtune.models.llama3.llama3 takes no 'num_layer'; the nearest one is"),
        ({"optimizer": "adam"}, "optimizer must name its component with _component_"),
    ],
)
def test_what_is_wrong_is_named(overrides, message):
    with pytest.raises(UserError, match="Config: ") as caught:
        checked(**overrides)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_run_val_every_n_steps_needs_something_to_evaluate():
    with pytest.raises(UserError, match="run_val_every_n_steps is set, but there is no dataset_val"):
        check_config(OmegaConf.merge(OmegaConf.load(QUICKSTART), {"dataset_val": None}), TrainingConfig)


def test_a_recipe_of_ones_own_adds_keys():
    @dataclass
    class MyConfig(TrainingConfig):
        my_key: int = 3

    assert checked(MyConfig).my_key == 3
    assert checked(MyConfig, my_key=4).my_key == 4


def test_what_a_component_refuses_names_its_key():
    node = OmegaConf.create({"_component_": "prefix_sharing.losses.DPOLoss", "beta": -1})
    with pytest.raises(UserError, match=r"^loss: prefix_sharing.losses.DPOLoss: beta must be positive, not -1\.$"):
        instantiate("loss", node)


def test_names_and_paths_resolve(tmp_path, monkeypatch):
    assert find_config("quickstart/single_device").endswith("quickstart/single_device.yaml")
    (tmp_path / "mine.yaml").write_text("a: 1")
    assert find_config(str(tmp_path / "mine.yaml")) == str(tmp_path / "mine.yaml")
    with pytest.raises(
        UserError, match="neither a file nor a known name; the nearest one is 'quickstart/single_device'"
    ):
        find_config("quickstart/single_devise")


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


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "Error: Config: the recipe needs --config NAME_OR_PATH."),
        (["--config", "nowhere"], "Error: Config: 'nowhere' is neither a file nor a known name"),
        (["--config", "quickstart/single_device", "batch_size"], "Error: Config: Command-line overrides must be"),
        (["--config", "quickstart/single_device", "--fast"], "Error: Config: Additional flag arguments not supported"),
        (["--config", "{broken}"], "Error: Config: mapping values are not allowed"),
    ],
)
def test_parse_says_what_is_wrong_in_one_line(monkeypatch, capsys, tmp_path, argv, message):
    broken = tmp_path / "broken.yaml"
    broken.write_text("a: b: c\n")
    with pytest.raises(SystemExit) as caught:
        run_main(monkeypatch, *(arg.format(broken=broken) for arg in argv))
    assert caught.value.code == 1
    stderr = capsys.readouterr().err
    assert stderr.startswith(message)
    assert stderr.count("\n") == 1


def test_an_unforeseen_error_keeps_its_traceback_and_ends_with_one_line(monkeypatch, capsys):
    def fail(cfg):
        raise RuntimeError("out of luck")

    with pytest.raises(SystemExit):
        run_main(monkeypatch, "--config", "quickstart/single_device", function=fail)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("Traceback")
    assert lines[-1] == "Error: RuntimeError: out of luck"
