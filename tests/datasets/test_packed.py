"""Rows are built as planned, the same in other processes, from any step on."""

import dataclasses

import pytest
import torch
from torch.utils.data import DataLoader

from prefix_sharing.datasets import PackedPreferenceDataset, StepLoader, packed_preference_dataset
from prefix_sharing.quickstart import preference_pairs, tokenizer
from prefix_sharing.rows import ExampleSizes, Plan, Row

CPU = torch.device("cpu")


@pytest.fixture
def dataset():
    return preference_pairs(tokenizer(), num_pairs=20)


@pytest.fixture
def plan(dataset):
    num_tokens = dataset.sizes().num_tokens
    sizes = ExampleSizes(num_tokens, num_tokens * 1.0, dataset.num_pairs)
    return Plan(sizes=sizes, examples_per_step=6, pack_len=512, shuffle=True, rank=1, world_size=2)


def assert_same(ours, theirs):
    for field in dataclasses.fields(Row):
        a, b = getattr(ours, field.name), getattr(theirs, field.name)
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b, field.name


def test_an_item_is_this_ranks_share_of_a_step(dataset, plan):
    steps = plan.epoch(0)
    packed = PackedPreferenceDataset(dataset, steps)
    assert len(packed) == len(steps) == 4
    for step, made in zip(steps, packed, strict=True):
        assert [row.examples.tolist() for row in made.rows] == step.rows
        assert made.num_terms == step.num_terms == len(made.examples)
        for examples, row in zip(step.rows, made.rows, strict=True):
            assert row.num_tokens == dataset.sizes().num_tokens[examples].sum() <= 512
            assert_same(row, Row.from_examples([dataset[i] for i in examples], indices=examples, num_responses=2))


@pytest.mark.parametrize("num_workers", [0, 1, 2])
def test_rows_are_the_same_whichever_process_builds_them(dataset, plan, num_workers):
    steps = plan.epoch(1)
    expected = list(DataLoader(PackedPreferenceDataset(dataset, steps), batch_size=None))
    loaded = list(StepLoader(CPU, num_workers=num_workers)(dataset, steps, first_step=1))
    assert len(loaded) == 3
    for ours, theirs in zip(loaded, expected[1:], strict=True):
        for a, b in zip(ours.rows, theirs.rows, strict=True):
            assert_same(a, b)


def test_a_config_can_name_it_directly(tmp_path):
    file = tmp_path / "pairs.jsonl"
    file.write_text('{"prompt": "q", "chosen": "a", "rejected": "b"}\n')
    assert packed_preference_dataset(tokenizer(), source="json", data_files=str(file)).packed
