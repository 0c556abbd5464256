import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefix_sharing.rows import Plan, deal_rows

PLANS = {
    "num_examples": st.integers(1, 200),
    "examples_per_step": st.integers(1, 40),
    "batch_size": st.integers(1, 9),
    "seed": st.integers(0, 5),
    "world_size": st.integers(1, 5),
}


def plans_of_ranks(world_size, **kwargs):
    return [Plan(rank=rank, world_size=world_size, shuffle=True, **kwargs) for rank in range(world_size)]


@given(**PLANS)
def test_every_example_comes_exactly_once_an_epoch(world_size, **kwargs):
    seen = []
    for steps in zip(*(plan.epoch(3) for plan in plans_of_ranks(world_size, **kwargs)), strict=True):
        examples = [i for step in steps for row in step.rows for i in row]
        assert {step.num_examples for step in steps} == {len(examples)}
        seen += examples
    assert sorted(seen) == list(range(kwargs["num_examples"]))


@given(**PLANS)
def test_every_rank_has_as_many_rows(world_size, **kwargs):
    for steps in zip(*(plan.epoch(0) for plan in plans_of_ranks(world_size, **kwargs)), strict=True):
        assert len({len(step.rows) for step in steps}) == 1
        assert all(len(row) <= kwargs["batch_size"] for step in steps for row in step.rows)


@given(**PLANS)
def test_a_step_takes_the_same_examples_on_any_number_of_ranks(world_size, **kwargs):
    alone = [{i for row in step.rows for i in row} for step in Plan(shuffle=True, **kwargs).epoch(1)]
    together = [
        {i for step in steps for row in step.rows for i in row}
        for steps in zip(*(plan.epoch(1) for plan in plans_of_ranks(world_size, **kwargs)), strict=True)
    ]
    assert together == alone


def test_order_depends_on_seed_and_epoch_only():
    def order(**kwargs):
        plan = Plan(num_examples=50, examples_per_step=8, batch_size=2, shuffle=True, seed=kwargs.get("seed", 0))
        return [i for step in plan.epoch(kwargs.get("epoch", 0)) for row in step.rows for i in row]

    assert order() == order()
    assert order() != order(seed=1)
    assert order() != order(epoch=1)
    # as seed + epoch would not have it
    assert order(seed=0, epoch=1) != order(seed=1, epoch=0)


def test_without_shuffling_the_order_is_the_data_sets():
    plan = Plan(num_examples=5, examples_per_step=2, batch_size=1)
    assert [step.rows for step in plan.epoch(7)] == [[[0], [1]], [[2], [3]], [[4]]]


@pytest.mark.parametrize(("max_steps", "steps"), [(None, 3), (2, 2), (10, 3)])
def test_max_steps_bounds_an_epoch(max_steps, steps):
    plan = Plan(num_examples=5, examples_per_step=2, batch_size=1, max_steps=max_steps)
    assert plan.steps_per_epoch == steps == len(list(plan.epoch(0)))


def test_examples_visited_are_those_of_the_epochs_to_come():
    plan = Plan(num_examples=100, examples_per_step=4, batch_size=2, shuffle=True, max_steps=3)
    visited = plan.examples_visited(1, 3)
    expected = {i for epoch in (1, 2) for step in plan.epoch(epoch) for row in step.rows for i in row}
    assert visited == sorted(expected)
    assert Plan(num_examples=5, examples_per_step=4, batch_size=2).examples_visited(0, 1) == [0, 1, 2, 3, 4]


def test_ranks_without_examples_get_empty_rows():
    assert [deal_rows([7], 2, rank, 3) for rank in range(3)] == [[[7]], [[]], [[]]]
