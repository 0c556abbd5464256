"""What docs/choosing_data.md promises: its configs run, and its tables list the keys there are."""

import dataclasses
import json
import re
import sys
import types

import pytest
import yaml
from omegaconf import OmegaConf

from documents import PAGES, blocks, table
from prefix_sharing.config import instantiate
from prefix_sharing.config.checks import check_component
from prefix_sharing.datasets.choosing.duplicates import Exact, MinHash
from prefix_sharing.datasets.choosing.reading import SCORE_COLUMNS
from prefix_sharing.datasets.choosing.selection import SELECTIONS
from prefix_sharing.quickstart import tokenizer
from records import write

PAGE = PAGES["choosing_data.md"]
SNIPPETS = blocks(PAGE, "yaml")


def pair(name, i):
    numbers = {column: 4 + i % 5 + 3 * k for names in SCORE_COLUMNS for k, column in enumerate(reversed(names))}
    numbers |= {"reward_chosen": i, "reward_rejected": -i}
    return {"prompt": f"{name} {i} {i * i}", "chosen": "A", "rejected": "B", **numbers}


@pytest.mark.parametrize("snippet", SNIPPETS)
def test_configs_shown_run(snippet, tmp_path, monkeypatch):
    rules = types.ModuleType("my_rules")
    rules.politeness = lambda turns, answer: 5.0
    monkeypatch.setitem(sys.modules, "my_rules", rules)
    monkeypatch.chdir(tmp_path)
    for file in re.findall(r"data_files: (\S+)", snippet):
        write(tmp_path / file, [pair(file, i) for i in range(20)])
    node = OmegaConf.create(yaml.safe_load(snippet)).dataset
    check_component("dataset", node)
    assert len(instantiate("dataset", node, tokenizer())) > 5


def keys_and_defaults(kind):
    fields = [field for field in dataclasses.fields(kind) if field.name != "budget"]
    return {f.name: None if f.default is dataclasses.MISSING else f.default for f in fields}


def test_the_keys_of_selections_are_listed():
    listed = {}
    for by, _, keys in table(PAGE, "`by`"):
        named = [key.partition(": ") for key in re.findall(r"`([^`]+)`", keys)]
        listed[by.strip("`")] = {name: json.loads(default) if default else None for name, _, default in named}
    assert listed == {by: keys_and_defaults(kind) for by, kind in SELECTIONS.items()}


def test_the_keys_of_deduplication_are_listed():
    listed = {cells[0].strip("`"): cells[1].strip("`") for cells in table(PAGE, "key of `deduplicate`")}
    assert listed.pop("method") == "exact"
    assert listed == {name: str(default) for name, default in keys_and_defaults(MinHash).items()}
    assert keys_and_defaults(Exact) == {"over": listed["over"]}


def test_known_columns_are_named():
    assert all(f"`{names[0]}` and `{names[1]}`" in " ".join(PAGE.split()) for names in SCORE_COLUMNS)
