"""Several data sets as one."""

import json
import logging

import pytest
from omegaconf import OmegaConf

from prefix_sharing.config import instantiate
from prefix_sharing.datasets.mixture import shares
from prefix_sharing.errors import UserError
from prefix_sharing.quickstart import tokenizer


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
    node = {"_component_": "prefix_sharing.datasets.preference_mixture", "datasets": parts, "seed": seed}
    return instantiate("dataset", OmegaConf.create(node), tokenizer())


def prompts(dataset):
    text = tokenizer()
    return [
        text.decode(dataset[i][0].tokens.tolist()).splitlines()[1].removesuffix("assistant")
        for i in range(len(dataset))
    ]


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
