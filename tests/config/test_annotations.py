"""What is refused because of a component's annotation, and what never is."""

from pathlib import Path
from typing import Annotated, Any, Literal, Optional

import pytest
import torch
from omegaconf import OmegaConf
from torchtune import _recipe_registry as registry

from prefix_sharing.config import components
from prefix_sharing.config.annotations import fits, in_words
from prefix_sharing.config.schema import COMPONENTS
from prefix_sharing.errors import ConfigError


@pytest.mark.parametrize(
    ("value", "annotation", "words"),
    [
        ("abc", float, "a number"),
        ([0.1, 0.2], float, "a number"),
        ({"a": 1}, float, "a number"),
        (True, float, "a number"),
        (True, int, "a whole number"),
        (2.5, int, "a whole number"),
        (float("inf"), int, "a whole number"),
        ("yes", bool, "True or False"),
        (2, bool, "True or False"),
        (["a"], str, "a string"),
        ("abc", Optional[int], "a whole number"),  # noqa: UP045
        ("abc", int | None, "a whole number"),
        ("abc", float | torch.Tensor, "a number"),
        ([0.1], float | torch.Tensor, "a number"),
        ([1, [2]], float | torch.Tensor, "a number"),
        ("abc", int | float, "a number"),
        ("abc", Annotated[float, "positive"], "a number"),
        (3, list[str] | dict[str, str], "a list of strings or a mapping"),
        ([3, "x"], list[int], "a list of whole numbers"),
        ([0.9, "x"], tuple[float, float], "a list of 2 numbers"),
        ([0.9], tuple[float, float], "a list of 2 numbers"),
        ([1, [2]], tuple[float | torch.Tensor, float | torch.Tensor], "a list of 2 numbers"),
        ([1, [2]], tuple[int, ...], "a list of whole numbers"),
        (3, list, "a list"),
        ([[1]], list[Literal["q_proj", "v_proj"]], "a list"),
        ({"a": 1}, Literal["a", "b"], "a string"),
        ([1], dict[str, Any], "a mapping"),
        ({"a": "b"}, dict[str, float], "a mapping"),
    ],
)
def test_what_cannot_be_is_told_in_words(value, annotation, words):
    assert not fits(value, annotation)
    assert in_words(annotation) == words


@pytest.mark.parametrize(
    ("value", "annotation"),
    [
        (1, float),
        (1e2, int),
        (1, bool),
        (3, str),
        (None, float),
        ([0.9, 0.95], tuple[float | torch.Tensor, float | torch.Tensor]),
        ([1, 2, 3], tuple[int, ...]),
        ("q_proj", list[str]),
        ("other", Literal["a", "b"]),
        ("file", Path),
        ("file", Path | None),
        ("file", float | Path),
        ([1], torch.Tensor),
        ({"a": 1}, Any),
        ({"a": {"b": 1}}, dict[str, Any]),
        ({"a": 1}, object),
        ("abc", "float"),
    ],
)
def test_what_may_be_or_cannot_be_judged_passes(value, annotation):
    assert fits(value, annotation)


def test_a_component_whose_annotations_cannot_be_read_is_left_alone():
    node = OmegaConf.create({"_component_": "stubs.annotated_for_type_checkers", "size": "abc"})
    components.check_component("model", node)
    with pytest.raises(ConfigError, match="'model.sise': unknown argument"):
        components.check_component("model", OmegaConf.create({**node, "sise": 1}))


def test_no_config_of_torchtune_is_refused_for_a_type():
    directory = Path(registry.__file__).parents[1] / "recipes" / "configs"
    refused, passed = [], set()
    for file in sorted(directory.rglob("*.yaml")):
        cfg = OmegaConf.load(file)
        for key in COMPONENTS:
            try:
                components.check_component(key, cfg.get(key))
                passed.add(key)
            except Exception as error:  # among them packages that are not installed
                refused.append(str(error))
    assert not [error for error in refused if "must be" in error]
    assert {"model", "tokenizer", "optimizer", "checkpointer", "dataset", "metric_logger"} <= passed
