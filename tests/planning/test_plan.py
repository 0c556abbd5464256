"""The plan: the same examples in a step however they are packed and dealt, each exactly once an epoch."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from plain import uniform_sizes
from prefix_sharing.planning import ByLength, ExampleSizes, Fixed, Plan, WholeDataset, report_plan

PACK_LEN = 64


@st.composite
def plans(draw, **fixed):
    """The plans of all ranks: packed by length, by number, or the whole data set at once."""
    num_examples, world_size = draw(st.integers(1, 120)), fixed.pop("world_size", None) or draw(st.integers(1, 5))
    num_tokens = np.array(draw(st.lists(st.integers(1, PACK_LEN), min_size=num_examples, max_size=num_examples)))
    sizes = ExampleSizes(num_tokens, num_tokens + num_tokens**2 / 50, num_tokens % 3)
    mode = draw(
        st.sampled_from(
            [
                {"examples_per_step": draw(st.integers(1, 40)), "packing": Fixed(draw(st.integers(1, 9)))},
                {"examples_per_step": draw(st.integers(1, 40)), "packing": ByLength(PACK_LEN)},
                {"packing": WholeDataset(PACK_LEN, draw(st.integers(1, 8)))},
            ]
        )
    )
    shared = {"sizes": sizes, "seed": draw(st.integers(0, 5)), "shuffle": True, **mode, **fixed}
    return [Plan(rank=rank, world_size=world_size, **shared) for rank in range(world_size)]


@given(plans())
def test_every_example_comes_exactly_once_an_epoch(plans):
    seen = []
    for steps in zip(*(plan.epoch(3) for plan in plans), strict=True):
        examples = [i for step in steps for row in step.rows for i in row]
        for step in steps:
            assert sorted(step.example_index) == sorted(examples)
            assert step.num_terms == plans[0].sizes.num_terms[examples].sum()
        seen += examples
    assert sorted(seen) == list(range(len(plans[0].sizes.num_tokens)))


@given(plans())
def test_every_rank_has_as_many_rows_and_none_is_too_long(plans):
    for steps in zip(*(plan.epoch(0) for plan in plans), strict=True):
        assert len({len(step.rows) for step in steps}) == 1
        for row in (row for step in steps for row in step.rows):
            if isinstance(plans[0].packing, Fixed):
                assert len(row) <= plans[0].packing.batch_size
            else:
                assert plans[0].sizes.num_tokens[row].sum() <= PACK_LEN


@given(st.data(), st.integers(1, 6), st.sampled_from([64, 100, 1000]))
def test_a_step_takes_the_same_examples_for_any_ranks_and_row_length(data, world_size, pack_len):
    sizes = ExampleSizes(np.array(data.draw(st.lists(st.integers(1, 64), min_size=1, max_size=90))), *[None] * 2)
    sizes = ExampleSizes(sizes.num_tokens, sizes.num_tokens * 1.0, np.ones_like(sizes.num_tokens))
    shared = {"sizes": sizes, "examples_per_step": 16, "shuffle": True, "seed": 4}
    unpacked = [set(step.example_index) for step in Plan(packing=Fixed(1), **shared).epoch(1)]
    packed = [
        {i for step in steps for row in step.rows for i in row}
        for steps in zip(
            *(
                Plan(packing=ByLength(pack_len), rank=r, world_size=world_size, **shared).epoch(1)
                for r in range(world_size)
            ),
            strict=True,
        )
    ]
    assert packed == unpacked


def plan_of(num_examples, **kwargs):
    return Plan(sizes=uniform_sizes(num_examples), **{"packing": Fixed(1), **kwargs})


def test_order_depends_on_seed_and_epoch_only():
    def order(epoch=0, **kwargs):
        plan = plan_of(50, examples_per_step=8, shuffle=True, **kwargs)
        return [i for step in plan.epoch(epoch) for i in step.example_index]

    assert order() == order() == order(packing=Fixed(3))
    assert order() != order(seed=1)
    assert order() != order(epoch=1)
    # as seed + epoch would not have it
    assert order(seed=0, epoch=1) != order(seed=1, epoch=0)


def test_without_shuffling_the_order_is_the_data_sets():
    assert [step.example_index.tolist() for step in plan_of(5, examples_per_step=2).epoch(7)] == [[0, 1], [2, 3], [4]]


@pytest.mark.parametrize(("max_steps", "drop_last", "steps"), [(None, False, 3), (2, False, 2), (9, True, 2)])
def test_the_last_step_is_taken_as_it_is_unless_told_otherwise(max_steps, drop_last, steps):
    plan = plan_of(5, examples_per_step=2, max_steps=max_steps, drop_last=drop_last)
    assert plan.steps_per_epoch == steps == len(list(plan.epoch(0)))


def test_examples_visited_are_those_of_the_epochs_to_come():
    plan = plan_of(100, examples_per_step=4, shuffle=True, max_steps=3)
    expected = {i for epoch in (1, 2) for step in plan.epoch(epoch) for i in step.example_index}
    assert plan.examples_visited(1, 3).tolist() == sorted(expected)
    assert plan_of(5, examples_per_step=4).examples_visited(0, 1).tolist() == [0, 1, 2, 3, 4]


@given(plans(), st.data())
def test_a_pass_takes_just_the_examples_it_is_given(plans, data):
    some = np.array(sorted(data.draw(st.sets(st.integers(0, len(plans[0].sizes.num_tokens) - 1), min_size=1))))
    taken = [i for plan in plans for step in plan.of_pass(some).epoch() for row in step.rows for i in row]
    assert sorted(taken) == some.tolist()


def test_ranks_without_examples_get_empty_rows():
    plans = [plan_of(8, examples_per_step=8, packing=ByLength(4), rank=r, world_size=3) for r in range(3)]
    assert sorted(len(row) for plan in plans for row in plan.epoch()[0].rows) == [2, 3, 3]
    plans = [plan_of(2, examples_per_step=8, packing=ByLength(4), rank=r, world_size=3) for r in range(3)]
    assert [plan.epoch()[0].rows for plan in plans] == [[[0]], [[1]], [[]]]
    report = report_plan(plans[0])
    assert (report.num_rows, report.num_empty_rows) == (2, 1)
    assert str(report).startswith("2 Rows in 1 step (no fewer than 1 would do), 25.0% full, 1 empty Row, cost")
    # two busy ranks for three
    assert report.worst_imbalance == pytest.approx(1.5)


def test_an_example_longer_than_a_row_is_refused():
    with pytest.raises(ValueError, match="Example 1 has 9 tokens, more than pack_len 8"):
        Plan(sizes=ExampleSizes(np.array([3, 9]), np.ones(2), np.ones(2)), packing=ByLength(8), examples_per_step=2)


def test_the_papers_mode_packs_the_whole_data_set_first():
    sizes = ExampleSizes(np.array([3, 2, 4, 1, 2]), np.ones(5), np.ones(5, dtype=int))
    plan = Plan(sizes=sizes, packing=WholeDataset(4, rows_per_step=2))
    # first-fit decreasing: 4; 3 + 1; 2 + 2
    assert plan.rows_of_dataset == [[2], [0, 3], [1, 4]]
    assert [sorted(step.example_index.tolist()) for step in plan.epoch()] == [[0, 2, 3], [1, 4]]
    assert [step.num_terms for step in plan.epoch()] == [3, 2]


def test_no_plan_is_half_a_plan():
    sizes = uniform_sizes(5)
    assert [step.example_index.tolist() for step in Plan(sizes=sizes, packing=Fixed(2)).epoch()] == [[0, 1, 2, 3, 4]]
    with pytest.raises(ValueError, match="takes rows_per_step Rows per step, not examples_per_step examples"):
        Plan(sizes=sizes, packing=WholeDataset(4, 2), examples_per_step=3)


def test_plans_and_what_they_hold_can_be_compared():
    plan, other = plan_of(5), plan_of(5)
    assert plan == plan
    assert plan != other
    assert plan.epoch() != plan.epoch()
    assert plan.epoch()[0] != plan.epoch()[0]
    assert Fixed(2) == Fixed(2) != Fixed(3)


def test_a_report_of_some_steps_plans_no_more():
    plan = plan_of(100, examples_per_step=4)
    assert report_plan(plan).num_steps == 25
    report = report_plan(plan, max_steps=3)
    assert (report.num_steps, report.num_rows) == (3, 12)


def test_how_full_rows_are_is_their_share_of_pack_len():
    sizes = ExampleSizes(np.array([3, 4, 2, 5]), np.ones(4), np.ones(4))
    report = report_plan(Plan(sizes=sizes, packing=ByLength(10), examples_per_step=4), lambda tokens: 8)
    assert (report.num_rows, report.fill, report.padding) == (2, 14 / 20, 1 - 14 / 16)
    assert "2 Rows in 1 step (no fewer than 2 would do), 70.0% full" in str(report)
    assert "1 Row length for compiled attention (8 to 8 tokens, 12.5% of them padding)" in str(report)
    alone = report_plan(Plan(sizes=sizes, packing=Fixed(1), examples_per_step=4))
    assert (alone.fill, alone.padding) == (None, 0)
    assert "full" not in str(alone)
