"""Lists on the command line: which are axes, which are refused, and the configs of their points."""

import hypothesis
import hypothesis.strategies as st
import pytest
from omegaconf import OmegaConf

from prefix_sharing.config import find_config
from prefix_sharing.config.sweeping import Axis, check_axes, config_at, grid, run_name, short_names, take_axes
from prefix_sharing.errors import ConfigError

CFG = OmegaConf.load(find_config("quickstart/single_device"))


def test_lists_are_axes_and_everything_else_is_left():
    arguments = ["--config", "C", "loss.beta=[0.01, 1e-1]", "epochs=2", "~seed", "measures=[a,b]", "loss=[A,B]"]
    axes, left = take_axes(arguments, own=("measures",))
    assert axes == [Axis("loss.beta", (0.01, 0.1)), Axis("loss", ("A", "B"))]
    assert left == ["--config", "C", "epochs=2", "~seed", "measures=[a,b]"]


@pytest.mark.parametrize(
    ("argument", "problem"),
    [
        ("loss.beta=[]", "the list of values to try is empty"),
        ("loss.beta=[0.1, 0.10]", "a value is there twice in"),
        ("loss.beta=[0.1", "cannot be read as a list"),
    ],
)
def test_lists_that_are_no_values_to_try_are_refused(argument, problem):
    with pytest.raises(ConfigError, match=f"'loss.beta': .*{problem}"):
        take_axes([argument])


@pytest.mark.parametrize(
    ("key", "values"),
    [
        ("optimizer.betas", (0.9, 0.95)),  # by the annotation
        ("model.lora_attn_modules", ("q_proj", "v_proj")),
        ("checkpointer.checkpoint_files", ("a", "b")),  # by what the config has
        ("dataset.data_files", ("a.jsonl", "b.jsonl")),  # which may be one data set of two files
    ],
)
def test_a_key_that_takes_a_list_is_swept_by_lists_of_lists(key, values):
    cfg = CFG.copy()
    cfg.model = {"_component_": "torchtune.models.llama3.lora_llama3"}
    cfg.checkpointer = {"_component_": "torchtune.training.FullModelHFCheckpointer", "checkpoint_files": ["a"]}
    with pytest.raises(ConfigError, match=r"takes a list itself: .* \[\[a, b\]\] sets it"):
        check_axes(cfg, [Axis(key, values)])
    axis = Axis(key, (list(values), list(values[:1])))
    check_axes(cfg, [axis])
    found = [OmegaConf.select(config_at(cfg, [axis], point), key) for point in grid([axis])]
    assert found == [list(values), list(values[:1])]


@pytest.mark.parametrize("key", ["loss.beta", "optimizer.lr", "dataset.num_pairs", "seed"])
def test_other_keys_are_swept_by_plain_lists(key):
    check_axes(CFG, [Axis(key, (1, 2))])


def test_what_is_below_a_key_that_is_never_swept_is_not_swept_either():
    assert take_axes(["judge.path=[a]", "loss.beta=[1]"], ("judge",)) == ([Axis("loss.beta", (1,))], ["judge.path=[a]"])


@pytest.mark.parametrize("values", [(1, "1"), ("prefix_sharing.losses.DPOLoss", "DPOLoss")])
def test_values_that_would_share_a_directory_are_refused(values):
    with pytest.raises(ConfigError, match="two runs would be called"):
        check_axes(CFG, [Axis("loss", values)])


def test_what_the_sweep_sets_and_keys_given_twice_are_refused():
    with pytest.raises(ConfigError, match="'output_dir': set for each run by the sweep"):
        check_axes(CFG, [Axis("output_dir", ("a", "b"))])
    with pytest.raises(ConfigError, match="'seed': given twice"):
        check_axes(CFG, [Axis("seed", (1, 2)), Axis("seed", (3, 4))])


def test_points_change_what_they_name_and_nothing_else():
    axes = [
        Axis("loss", ("my.SimPOLoss", "my.ORPOLoss")),
        Axis("dataset", ({"num_pairs": 8}, {"num_pairs": 9, "seed": 5})),
        Axis("loss.beta", (1.0, 2.0)),
    ]
    configs = [config_at(CFG, axes, point) for point in grid(axes)]
    assert len(configs) == 8
    last = configs[-1]
    assert last.loss == {"_component_": "my.ORPOLoss", "beta": 2.0}
    assert last.dataset == {**CFG.dataset, "num_pairs": 9, "seed": 5}
    changed = {key for key in CFG if last[key] != CFG[key]}
    assert changed == {"loss", "dataset"}
    assert run_name(axes, grid(axes)[0]).startswith("loss=my.SimPOLoss,dataset=num_pairs_8,beta=1.0_")


def test_names_are_short_where_they_can_be():
    assert short_names([Axis("loss.beta", ()), Axis("optimizer.lr", ())]) == ["beta", "lr"]
    assert short_names([Axis("dataset.seed", ()), Axis("seed", ())]) == ["dataset.seed", "seed"]
    assert short_names([Axis("loss._component_", ())]) == ["loss"]
    assert run_name([Axis("loss.beta", ()), Axis("optimizer.lr", ())], (0.05, 1e-6)) == "beta=0.05,lr=1e-06"


VALUES = st.text() | st.integers() | st.floats(allow_nan=False)


@hypothesis.given(st.lists(VALUES, min_size=2, unique_by=str))
def test_names_of_runs_are_names_of_directories_and_differ(values):
    axes = [Axis("dataset.source", tuple(values))]
    names = [run_name(axes, point) for point in grid(axes)]
    assert len(set(names)) == len(values)
    assert all("/" not in name and len(name) <= 100 for name in names)
