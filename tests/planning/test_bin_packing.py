"""Packing: no example twice, no row too long, few rows, ranks equally busy."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefix_sharing.benchmark.workloads import DATASETS
from prefix_sharing.planning import ByLength, ExampleSizes, Plan, report_plan
from prefix_sharing.planning import bin_packing as heuristics
from prefix_sharing.planning.bin_packing import deal, first_fit_decreasing, lower_bound, pack
from prefix_sharing.trees import bucket_length

lengths_and_room = st.lists(st.integers(1, 50), min_size=1, max_size=60).flatmap(
    lambda lengths: st.tuples(st.just(np.array(lengths)), st.integers(max(lengths), 120))
)


def check(rows, lengths, pack_len):
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    assert all(row for row in rows)
    assert all(lengths[row].sum() <= pack_len for row in rows)


@given(lengths_and_room, st.integers(1, 9))
def test_each_example_is_in_one_row_with_room(lengths_and_room, world_size):
    lengths, pack_len = lengths_and_room
    bound = lower_bound(lengths, pack_len)
    rows = pack(lengths, lengths * 1.0, pack_len, world_size)
    check(rows, lengths, pack_len)
    best_fit = heuristics._best_fit(np.argsort(-lengths, kind="stable").tolist(), lengths.tolist(), pack_len)
    check(best_fit, lengths, pack_len)
    assert bound <= len(best_fit)
    # never more rows a rank than best-fit decreasing takes
    assert -(-len(rows) // world_size) <= -(-len(best_fit) // world_size)
    check(first_fit_decreasing(lengths, pack_len), lengths, pack_len)


@given(st.lists(st.integers(1, 9), min_size=1, max_size=7), st.integers(9, 16))
def test_the_lower_bound_is_below_the_least_number_of_rows(lengths, pack_len):
    lengths = np.array(lengths)
    least = next(
        n
        for n in itertools.count(1)
        if any(
            max(np.bincount(rows, weights=lengths, minlength=n)) <= pack_len
            for rows in itertools.product(range(n), repeat=len(lengths))
        )
    )
    assert lengths.sum() / pack_len <= lower_bound(lengths, pack_len) <= least
    assert least <= len(pack(lengths, lengths * 1.0, pack_len)) <= least + 1


def test_the_lower_bound_knows_that_large_examples_need_a_row_each():
    assert lower_bound(np.array([6, 6, 6]), 10) == 3
    assert lower_bound(np.array([7, 7, 3, 3, 4]), 10) == 3
    assert lower_bound(np.array([7, 7, 3, 3]), 10) == 2


def test_filling_finds_what_fitting_misses():
    # 6 + 4, 5 + 3 + 2, twice: best-fit decreasing puts 5 with 5 and needs a fifth row
    lengths = np.array([6, 4, 5, 3, 2] * 2 + [7, 3, 8, 2] + [4, 3, 3])
    order = np.argsort(-lengths, kind="stable").tolist()
    rows = heuristics._fill(order, lengths.tolist(), 10, lower_bound(lengths, 10))
    check(rows, lengths, 10)
    assert len(rows) == lower_bound(lengths, 10) == lengths.sum() // 10
    assert heuristics._fill(order, lengths.tolist(), 10, len(rows) - 1) is None


@given(lengths_and_room, st.integers(0, 4), st.randoms(use_true_random=False))
def test_evening_out_keeps_rows_valid_and_lowers_the_costliest(lengths_and_room, empty_rows, random):
    lengths, pack_len = lengths_and_room
    costs = lengths * np.array([random.uniform(0.5, 2) for _ in lengths])
    rows = heuristics._best_fit(np.argsort(-lengths, kind="stable").tolist(), lengths.tolist(), pack_len)
    evened = heuristics._even_out(rows, lengths, costs, pack_len, len(rows) + empty_rows)
    check(evened, lengths, pack_len)
    assert len(evened) <= len(rows) + empty_rows
    assert max(costs[row].sum() for row in evened) <= max(costs[row].sum() for row in rows) + 1e-9


@given(st.lists(st.floats(0.1, 10.0), min_size=1, max_size=40), st.integers(1, 6))
def test_dealing_gives_every_rank_as_many_rows_of_like_cost(costs, world_size):
    dealt = deal([[i] for i in range(len(costs))], costs, world_size)
    assert sorted(i for rows in dealt for row in rows for i in row) == list(range(len(costs)))
    assert {len(rows) for rows in dealt} == {-(-len(costs) // world_size)}
    # rows computed at the same time are neighbours in cost
    together = [[costs[row[0]] for row in rows if row] for rows in zip(*dealt, strict=True)]
    assert all(min(a) >= max(b) for a, b in itertools.pairwise(together) if a and b)


def lognormal_sizes(name, num_examples, seed=0, most=8192):
    """Trees of lognormal lengths: a prefix and two responses, costing what they cost a 51.6 M model."""
    median, ratio = DATASETS[name]
    rng = np.random.default_rng(seed)
    length = np.clip(rng.lognormal(np.log(median), 0.6, num_examples), 8, most / 2).astype(int)
    response = np.maximum(2, (length / (1 + ratio)).astype(int))
    prefix = length - response
    tokens = prefix + 2 * response
    visible = prefix * (prefix + 1) // 2 + 2 * response * prefix + response * (response + 1)
    flops = 2.0 * 18.9e6 * tokens + 4.0 * 512 * 6 * visible + 2.0 * 32000 * 512 * 2 * response
    return ExampleSizes(tokens, flops, np.ones_like(tokens))


@pytest.mark.parametrize("name", DATASETS)
@pytest.mark.parametrize(
    ("world_size", "rows_per_rank", "imbalance"), [(8, 2, 1.10), (8, 8, 1.05), (64, 2, 1.10), (64, 8, 1.05)]
)
def test_rows_are_full_and_ranks_equally_busy(name, world_size, rows_per_rank, imbalance):
    pack_len = 8192
    sizes = lognormal_sizes(name, 40_000)
    # As many examples a step as fill that many rows a rank to 94 %.
    per_step = int(0.94 * world_size * rows_per_rank * pack_len / sizes.num_tokens.mean())
    plan = Plan(
        sizes=sizes,
        examples_per_step=per_step,
        packing=ByLength(pack_len),
        shuffle=True,
        max_steps=8,
        world_size=world_size,
    )
    report = report_plan(plan, bucket_length)
    assert report.padding <= 0.05
    assert report.mean_imbalance <= imbalance
    assert len(report.row_lengths) <= 32
