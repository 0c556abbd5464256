"""Rows are built as planned, the same in other processes, from any step on."""

import dataclasses

import pytest
import torch
from torch.utils.data import DataLoader

from prefix_sharing.datasets import StepDataset, StepLoader, packed_preference_dataset, prefix_preference_dataset
from prefix_sharing.planning import ByLength, ExampleSizes, Plan
from prefix_sharing.quickstart import preference_pairs, tokenizer
from prefix_sharing.trees import Row

CPU = torch.device("cpu")


@pytest.fixture
def dataset():
    return preference_pairs(tokenizer(), num_pairs=20)


@pytest.fixture
def plan(dataset):
    num_tokens = dataset.sizes().num_tokens
    sizes = ExampleSizes(num_tokens, num_tokens * 1.0, dataset.num_pairs)
    return Plan(sizes=sizes, packing=ByLength(512), examples_per_step=6, shuffle=True, rank=1, world_size=2)


def assert_same(ours, theirs):
    for field in dataclasses.fields(Row):
        a, b = getattr(ours, field.name), getattr(theirs, field.name)
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b, field.name


def test_an_item_is_this_ranks_share_of_a_step(dataset, plan):
    steps = plan.epoch(0)
    packed = StepDataset(dataset, steps)
    assert len(packed) == len(steps) == 4
    for step, made in zip(steps, packed, strict=True):
        assert [row.example_index.tolist() for row in made.rows] == step.rows
        assert made.num_terms == step.num_terms == len(made.example_index)
        for examples, row in zip(step.rows, made.rows, strict=True):
            assert row.num_tokens == dataset.sizes().num_tokens[examples].sum() <= 512
            assert_same(row, Row.from_examples([dataset[i] for i in examples], example_index=examples, num_responses=2))


@pytest.mark.parametrize("num_workers", [0, 1, 2])
def test_rows_are_the_same_whichever_process_builds_them(dataset, plan, num_workers):
    steps = plan.epoch(1)
    expected = list(DataLoader(StepDataset(dataset, steps), batch_size=None))
    loaded = list(StepLoader(CPU, num_workers=num_workers)(dataset, steps, first_step=1))
    assert len(loaded) == 3
    for ours, theirs in zip(loaded, expected[1:], strict=True):
        for a, b in zip(ours.rows, theirs.rows, strict=True):
            assert_same(a, b)


def test_a_loader_leaves_the_random_numbers_of_the_training_loop_alone(dataset, plan):
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    list(StepLoader(CPU, num_workers=1)(dataset, plan.epoch(0)))
    assert torch.equal(torch.rand(3), expected)


def test_a_config_can_name_the_packed_data_set(tmp_path):
    file = tmp_path / "pairs.jsonl"
    file.write_text('{"prompt": "q", "chosen": "a", "rejected": "b"}\n')
    arguments = {"source": "json", "data_files": str(file)}
    packed = packed_preference_dataset(tokenizer(), **arguments)
    assert packed.ids == prefix_preference_dataset(tokenizer(), **arguments).ids
