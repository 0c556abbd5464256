"""Several data sets as one."""

import json
import logging

import pytest
from omegaconf import OmegaConf

from prefix_sharing.config import instantiate
from prefix_sharing.datasets import preference_mixture
from prefix_sharing.datasets.mixture import shares
from prefix_sharing.errors import UserError
from prefix_sharing.quickstart import tokenizer
from records import prompts_of as prompts
from records import write

MIXTURE = "prefix_sharing.datasets.preference_mixture"


@pytest.fixture
def files(tmp_path):
    """Ten and thirty pairs, of which the third record of each is dropped."""
    for name, count in (("a", 11), ("b", 31)):
        with (tmp_path / f"{name}.jsonl").open("w") as out:
            for i in range(count):
                rejected = "yes" if i == 2 else "no"
                out.write(json.dumps({"prompt": f"{name} {i}", "chosen": "yes", "rejected": rejected}) + "\n")
    return {name: str(tmp_path / f"{name}.jsonl") for name in "ab"}


def mixture_of(files, *, seed=0, a=None, b=None):
    parts = [{"source": "json", "data_files": files[name]} for name in "ab"]
    for part, weight in zip(parts, (a, b), strict=True):
        if weight is not None:
            part["weight"] = weight
    node = {"_component_": MIXTURE, "datasets": parts, "seed": seed}
    return instantiate("dataset", OmegaConf.create(node), tokenizer())


def test_without_weights_everything_is_taken(files):
    mixture = mixture_of(files)
    assert prompts(mixture) == [f"{name} {i}" for name, n in (("a", 11), ("b", 31)) for i in range(n) if i != 2]
    assert mixture.dropped == {"identical responses": 2}
    # where an example comes from, whatever came before
    assert mixture.describe(2) == f"record 3 of the split of {files['a']}"
    assert mixture.describe(12) == f"record 3 of the split of {files['b']}"


def test_weights_share_examples_out_and_none_is_used_twice(files, caplog):
    with caplog.at_level(logging.INFO, logger="prefix_sharing"):
        mixture = mixture_of(files, a=1, b=1)
    names = prompts(mixture)
    assert len(set(names)) == 20
    assert sum(name.startswith("b") for name in names) == 10
    assert mixture.dropped == {"beyond its share of the mixture": 20, "identical responses": 2}
    assert f"{files['b']}: 10 of 30 examples, 50.0 % of the mixture" in caplog.text
    assert "42 records = 20 used + 22 dropped" in caplog.text
    assert all(mixture.describe(i).endswith(files[name[0]]) for i, name in enumerate(names))


def test_the_seed_decides_what_is_left_out(files):
    again, other = mixture_of(files, a=0.5, b=0.5), mixture_of(files, a=0.5, b=0.5, seed=1)
    assert prompts(mixture_of(files, a=0.5, b=0.5)) == prompts(again) != prompts(other)


def test_fractions_and_caps_limit_what_there_is_to_share(files, caplog):
    def mixture_with(a, b, **keys):
        parts = [{"data_files": files["a"], **a}, {"data_files": files["b"], **b}]
        node = {"_component_": MIXTURE, "datasets": parts, **keys}
        names = prompts(instantiate("dataset", OmegaConf.create(node), tokenizer()))
        return [sum(name.startswith(part) for name in names) for part in "ab"]

    assert mixture_with({}, {"fraction": 0.1}) == [10, 3]
    assert mixture_with({"max_examples": 4}, {"fraction": 0.5, "max_examples": 20}) == [4, 15]
    assert mixture_with({"max_examples": 100}, {"max_examples": 12}) == [10, 12]
    assert mixture_with({"weight": 1}, {"weight": 1, "fraction": 0.2}) == [6, 6]
    assert mixture_with({"fraction": 0.001}, {}) == [1, 30]
    for bad, message in (
        ({"fraction": 0}, r"datasets\[0\].fraction': must be above 0 and at most 1"),
        ({"fraction": 1.5}, "must be above 0 and at most 1"),
        ({"max_examples": 0}, "max_examples': must be a whole number of at least 1"),
        ({"max_examples": 2.5}, "max_examples': must be a whole number of at least 1"),
    ):
        with pytest.raises(UserError, match=message):
            mixture_with(bad, {})


def test_a_mixture_selects_across_its_data_sets(tmp_path, caplog):
    records = {
        "a": [{"prompt": f"a {i}", "chosen": "yes", "rejected": "no", "good": i, "bad": 0} for i in range(12)],
        "b": [{"prompt": f"b {i}", "chosen": "yes", "rejected": "no", "score_chosen": 5 * i} for i in range(6)],
    }
    for record in records["b"]:
        record["score_rejected"] = 0
    parts = [{"data_files": write(tmp_path / f"{name}.jsonl", some)} for name, some in records.items()]
    parts[0]["scores"] = ["good", "bad"]
    select = {"by": "alpagasus", "budget": 50, "min_score": 10}
    with caplog.at_level(logging.INFO, logger="prefix_sharing"):
        mixture = preference_mixture(tokenizer(), datasets=parts, select=select)
    assert prompts(mixture) == ["a 10", "a 11", "b 2", "b 3", "b 4", "b 5"]
    assert mixture.dropped == {"score below min_score": 12}
    assert f"share of {parts[1]['data_files']}" in caplog.text
    for change, message in (
        ({"scores": ["good", "bad"]}, "scores': must be a judge; columns are named by scores at each"),
        ({"select": None}, r"datasets\[0\].scores': not used"),
    ):
        with pytest.raises(UserError, match=message):
            instantiate(
                "dataset",
                OmegaConf.create({"_component_": MIXTURE, "datasets": parts, "select": select, **change}),
                tokenizer(),
            )
    grouped = [{"data_files": write(tmp_path / "c.jsonl", records["b"] * 2), "group_by_prompt": True}]
    assert len(preference_mixture(tokenizer(), datasets=grouped, deduplicate="exact")) == 6
    with pytest.raises(UserError, match=r"datasets\[0\].group_by_prompt': merges records before the mixture chooses"):
        preference_mixture(tokenizer(), datasets=grouped, select=select)


@pytest.mark.parametrize(
    ("sizes", "weights", "expected"),
    [
        ([10, 30], [None, None], [10, 30]),
        ([10, 30], [0.25, 0.75], [10, 30]),
        ([10, 30], [3, 1], [10, 3]),
        ([1000, 10, 30], [0.98, 0.01, 0.01], [980, 10, 10]),
        ([5, 100000], [1000, 1], [5, 1]),
    ],
)
def test_shares(sizes, weights, expected):
    assert shares(sizes, weights) == expected


def test_weights_that_say_nothing_are_refused(files):
    for weights in ({"a": 0.5}, {"a": 0.5, "b": 0}, {"a": 1, "b": -1}):
        with pytest.raises(UserError, match="every data set or none has a positive weight"):
            mixture_of(files, **weights)
