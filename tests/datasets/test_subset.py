"""A subset of any data set: drawn by its seed alone, in place, the others counted."""

import json
import logging

import pytest

from prefix_sharing.datasets import preference_mixture, random_subset
from prefix_sharing.errors import ConfigError
from prefix_sharing.quickstart import tokenizer
from prefix_sharing.quickstart.pairs import generate_pairs


@pytest.fixture(scope="module")
def nodes(tmp_path_factory):
    """Two files of 40 and 10 pairs, a tie among the first."""
    directory = tmp_path_factory.mktemp("pairs")
    made = []
    for name, number in (("a", 40), ("b", 10)):
        pairs = list(generate_pairs(number, seed=number))
        if name == "a":
            pairs[3]["rejected"] = pairs[3]["chosen"]
        (directory / f"{name}.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
        made.append({"data_files": str(directory / f"{name}.jsonl")})
    return made


def subset(node, examples, **kwargs):
    node = {"_component_": "prefix_sharing.datasets.prefix_preference_dataset", **node}
    return random_subset(tokenizer(), dataset=node, examples=examples, **kwargs)


def test_a_subset_is_drawn_by_its_seed_and_the_others_are_counted(nodes):
    whole, drawn = subset(nodes[0], 100), subset(nodes[0], 15)
    assert len(whole) == 39
    assert len(drawn) == 15
    assert drawn.dropped == {"identical responses": 1, "not drawn for the subset": 24}
    assert sorted(drawn.record_index) == list(drawn.record_index)
    places = {record: i for i, record in enumerate(whole.record_index)}
    for i, record in enumerate(drawn.record_index):
        assert drawn.ids[i] == whole.ids[places[record]]
        assert drawn[i][0].tokens.tolist() == whole[places[record]][0].tokens.tolist()
    assert subset(nodes[0], 15).ids == drawn.ids
    assert subset(nodes[0], 15, seed=1).ids != drawn.ids
    assert set(subset(nodes[0], 14).ids.to_pylist()) < set(drawn.ids.to_pylist())


def test_records_merged_into_examples_that_are_not_drawn_are_not_used(tmp_path):
    records = [{"prompt": f"q{i % 10}", "chosen": f"yes {i}", "rejected": f"no {i}"} for i in range(30)]
    (tmp_path / "c.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    node = {"data_files": str(tmp_path / "c.jsonl"), "group_by_prompt": True}
    drawn = subset(node, 2)
    assert "30 records = 6 used (merged into 2 examples) + 24 dropped (not drawn for the subset: 24)" in repr(drawn)
    # the same prompts in both data sets, but all of the first one's are taken
    mixture = preference_mixture(tokenizer(), datasets=[node, {**node, "max_examples": 2}])
    beyond = {"beyond its share of the mixture": 24}
    assert (mixture.num_records, len(mixture), mixture.num_merged, mixture.dropped) == (60, 12, 24, beyond)
    whole = {
        "_component_": "prefix_sharing.datasets.preference_mixture",
        "datasets": [node, {**node, "max_examples": 2}],
    }
    fewer = subset(whole, 5)
    assert (len(fewer), fewer.num_merged) == (5, 10)
    assert fewer.dropped == beyond | {"not drawn for the subset": 21}


def test_a_subset_of_a_mixture_still_knows_where_examples_come_from(nodes):
    of_both = {"_component_": "prefix_sharing.datasets.preference_mixture"}
    of_both["datasets"] = [{**node, "weight": weight} for node, weight in zip(nodes, (2, 1), strict=True)]
    mixture = preference_mixture(tokenizer(), datasets=of_both["datasets"])
    drawn = subset(of_both, 12)
    assert mixture.dropped["beyond its share of the mixture"] == drawn.dropped["beyond its share of the mixture"] == 19
    assert drawn.dropped["not drawn for the subset"] == 30 - 12
    known = {mixture.ids[i]: mixture.describe(i) for i in range(len(mixture))}
    assert all(drawn.describe(i) == known[drawn.ids[i]] for i in range(12))


def test_too_few_examples_are_said_and_none_are_refused(nodes, caplog):
    with caplog.at_level(logging.INFO, "prefix_sharing"):
        subset(nodes[1], 11)
    assert "b.jsonl: all of its 10 examples are taken (11 asked for)" in caplog.text
    with pytest.raises(ConfigError, match="'examples': must be at least 1, but is 0"):
        subset(nodes[1], 0)
