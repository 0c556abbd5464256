"""Selections: each method against a plain reading of its definition, and what is said or refused."""

import logging
import random

import datasets
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prefix_sharing.datasets import preference_mixture, prefix_preference_dataset
from prefix_sharing.datasets.choosing import scoring
from prefix_sharing.datasets.choosing.selection import (
    A2,
    BEYOND_BUDGET,
    Alpagasus,
    Argilla,
    Deita,
    Longest,
    Pool,
    Random,
    draw,
)
from prefix_sharing.errors import UserError
from prefix_sharing.quickstart import tokenizer
from records import prompts_of, write

SCORES = st.integers(0, 20).map(lambda n: n / 2)  # many ties, and differences without rounding


@st.composite
def pools(draw):
    n = draw(st.integers(1, 30))
    of = lambda values: np.array(draw(st.lists(values, min_size=n, max_size=n)))  # noqa: E731
    angles = of(st.integers(0, 23)) * (np.pi / 12)
    return Pool(
        of(st.integers(0, 9)), of(SCORES), of(SCORES), of(SCORES), np.stack([np.cos(angles), np.sin(angles)], axis=1)
    )


def taken(selection, pool):
    return np.flatnonzero(selection.choose(pool) == "").tolist()


def assert_drawn(found, left, budget):
    """As many as the budget of those that are left."""
    assert set(found) <= set(left)
    assert len(found) == len(set(found)) == min(len(left), budget)


budgets = st.integers(1, 35)


@settings(deadline=None)
@given(pools(), budgets, st.integers(0, 3))
def test_random_takes_its_budget_by_its_seed(pool, budget, seed):
    n = len(pool.lengths)
    chosen = taken(Random(budget, seed), pool)
    assert_drawn(chosen, range(n), budget)
    assert chosen == taken(Random(budget, seed), pool)


def test_what_is_drawn_is_even():
    counts = np.bincount(np.concatenate([draw(20, 5, seed) for seed in range(2000)]), minlength=20)
    assert abs(counts - 500).max() < 5 * np.sqrt(2000 * 0.25 * 0.75)


@settings(deadline=None)
@given(pools(), budgets)
def test_longest(pool, budget):
    by_length = sorted(range(len(pool.lengths)), key=lambda i: (-pool.lengths[i], i))
    assert taken(Longest(budget), pool) == sorted(by_length[:budget])


@settings(deadline=None)
@given(pools(), budgets, SCORES, st.integers(0, 3))
def test_alpagasus(pool, budget, least, seed):
    left = [i for i, score in enumerate(pool.chosen) if score >= least]
    assert_drawn(taken(Alpagasus(budget, least, seed), pool), left, budget)


@settings(deadline=None)
@given(pools(), budgets, SCORES, st.integers(0, 4), st.integers(0, 3))
def test_argilla(pool, budget, least, gap, seed):
    pairs = list(zip(pool.chosen, pool.rejected, strict=True))
    left = [i for i, (a, b) in enumerate(pairs) if a >= least and b >= least and a - b >= gap]
    assert_drawn(taken(Argilla(budget, least, gap, seed), pool), left, budget)


@settings(deadline=None)
@given(pools(), budgets, st.sampled_from([0.5, 1.0, 2.0]))
def test_a2(pool, budget, width):
    bins = {}
    for i, (a, b) in enumerate(zip(pool.chosen, pool.rejected, strict=True)):
        if a - b >= 2:
            bins.setdefault(int((a - b - 2) // width), []).append(i)
    queues = [sorted(bins[b], key=lambda i: (-pool.chosen[i], i)) for b in sorted(bins)]
    expected = []
    while len(expected) < budget and any(queues):
        for queue in queues:
            if queue and len(expected) < budget:
                expected.append(queue.pop(0))
    assert taken(A2(budget, bin_width=width), pool) == sorted(expected)


@settings(deadline=None)
@given(pools(), budgets, st.sampled_from([0.2, 0.75, 0.9]))
def test_deita(pool, budget, limit):
    quality = pool.chosen * pool.complexity
    expected = []
    for i in sorted(range(len(quality)), key=lambda i: (-quality[i], i)):
        a = pool.embedding[i]
        if len(expected) < budget and all(a @ b < limit for b in pool.embedding[expected]):
            expected.append(i)
    assert taken(Deita(budget, "complexity", "embedding", limit), pool) == sorted(expected)


def test_deita_compares_across_blocks():
    rng = np.random.default_rng(0)
    n = 3000
    embedding = rng.normal(size=(n, 3)) * rng.uniform(0.1, 9, size=(n, 1))
    nothing = np.full(n, np.nan)
    pool = Pool(np.zeros(n), rng.uniform(size=n), nothing, np.ones(n), embedding)
    chosen = taken(Deita(400, "complexity", "embedding", 0.98), pool)
    unit = embedding / np.linalg.norm(embedding, axis=1, keepdims=True)
    expected = []
    for i in np.argsort(-pool.chosen):
        if len(expected) < 400 and not (unit[expected] @ unit[i] >= 0.98).any():
            expected.append(i)
    assert len(chosen) < 400  # the whole of the data was looked at
    assert chosen == sorted(expected)


def pair(i, **more):
    return {"prompt": f"Q{i}", "chosen": "A" * (1 + i % 7), "rejected": "B", **more}


def build(file, **keys):
    return prefix_preference_dataset(tokenizer(), data_files=file, **keys)


@pytest.fixture
def scored(tmp_path):
    """Forty pairs with scores, of which every tenth has none."""
    rng = random.Random(0)
    records = [pair(i, score_chosen=rng.randint(1, 10), score_rejected=rng.randint(1, 10)) for i in range(40)]
    for record in records[::10]:
        record["score_chosen"] = None
    return write(tmp_path / "scored.jsonl", records), records


def test_a_data_set_is_what_its_selection_takes(scored, caplog):
    file, records = scored
    with caplog.at_level(logging.INFO, logger="prefix_sharing"):
        dataset = build(file, select={"by": "a2", "budget": 8})
    there = [i for i, record in enumerate(records) if record["score_chosen"] is not None]
    scores = np.array([[records[i]["score_chosen"], records[i]["score_rejected"]] for i in there], dtype=float)
    nothing = np.full(len(there), np.nan)
    expected = taken(A2(8), Pool(nothing, scores[:, 0], scores[:, 1], nothing, nothing))
    assert dataset.record_index.tolist() == [there[i] for i in expected]
    few = int((scores[:, 0] - scores[:, 1] < 2).sum())
    assert dataset.dropped == {
        BEYOND_BUDGET: len(there) - few - 8,
        "scores differ by less than min_gap": few,
        "without a score": 4,
    }
    assert f"{file}: select by a2 takes 8 of 40 examples (beyond the budget: {len(there) - few - 8}, " in caplog.text
    assert "score_chosen" not in caplog.text.partition("not used:")[2]
    lines = caplog.text[caplog.text.index("beside as many at random") :].splitlines()
    assert lines[1].split() == ["a2", "random", "all"]
    chosen = np.mean([records[i]["score_chosen"] for i in dataset.record_index])
    row = next(line for line in lines if line.startswith("score of the chosen answer, mean"))
    assert float(row.split()[-3]) == pytest.approx(chosen, rel=1e-3)
    assert float(row.split()[-1]) == pytest.approx(scores[:, 0].mean(), rel=1e-3)


def test_columns_are_named_or_lists_or_those_of_a_form(tmp_path):
    named = write(tmp_path / "a.jsonl", [pair(i, good=str(i), bad=0) for i in range(5)])
    lists = write(tmp_path / "b.jsonl", [pair(i, both=[i, 0]) for i in range(5)])
    ranked = [
        {"prompt": f"Q{i}", "responses": ["a", "b", "c"], "scores": [1, i, 0], "raw": [5, 6, 7]} for i in range(5)
    ]
    ranked = write(tmp_path / "c.jsonl", ranked)
    select = {"by": "alpagasus", "budget": 9, "min_score": 3}
    assert prompts_of(build(named, select=select, scores=["good", "bad"])) == ["Q3", "Q4"]
    assert prompts_of(build(lists, select=select, scores="both")) == ["Q3", "Q4"]
    assert prompts_of(build(ranked, select=select)) == ["Q3", "Q4"]
    # A list is in the order of the record's answers: where the second is best, its number is the second.
    chosen = build(ranked, select={**select, "min_score": 6}, scores=["raw"])
    assert prompts_of(chosen) == ["Q2", "Q3", "Q4"]
    two = {"response_0": "a", "response_1": "b", "s": [1, 9], "t": 1, "u": 9}
    verdicts = write(tmp_path / "d.jsonl", [{"prompt": f"Q{i}", **two, "better_response_id": i % 2} for i in range(5)])
    select["min_score"] = 9
    assert prompts_of(build(verdicts, select=select, scores="s")) == ["Q1", "Q3"]
    assert prompts_of(build(verdicts, select=select, scores=["t", "u"])) == ["Q1", "Q3"]
    for scores, message in (
        ("t", "t must have 2 scores, one for each answer, but has 1"),
        (["u", "t", "u"], "u is one of 3 columns of scores, but this record has 2 answers"),
    ):
        with pytest.raises(UserError, match=message):
            build(verdicts, select=select, scores=scores)


def test_an_embedding_is_a_column(tmp_path):
    records = [pair(i, complexity=1, vector=[1, i // 2], score_chosen=i, score_rejected=0) for i in range(1, 7)]
    select = {"by": "deita", "budget": 3, "complexity": "complexity", "embedding": "vector", "max_similarity": 0.99}
    dataset = build(write(tmp_path / "a.jsonl", records), select=select)
    assert prompts_of(dataset) == ["Q3", "Q5", "Q6"]
    records[2]["vector"] = [1]
    with pytest.raises(UserError, match=r"record 2 \(line 3\): its embedding has fewer numbers than others, of 2 each"):
        build(write(tmp_path / "b.jsonl", records), select=select)


def test_a_judge_gives_scores_once(tmp_path, monkeypatch):
    (tmp_path / "choosing_rules.py").write_text(
        "calls = []\n\n\ndef rule(turns, answer):\n    calls.append(answer)\n    return len(answer)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    import choosing_rules

    file = write(tmp_path / "a.jsonl", [pair(i) for i in range(14)])
    judge = {"_component_": "prefix_sharing.judging.function_judge", "function": "choosing_rules.rule"}
    select = {"by": "alpagasus", "budget": 9, "min_score": 6}
    for _ in range(2):
        assert prompts_of(build(file, select=select, scores=judge)) == ["Q5", "Q6", "Q12", "Q13"]
        assert len(choosing_rules.calls) == 28


def test_a_judge_that_fails_on_the_way_is_asked_for_the_rest(tmp_path, monkeypatch):
    monkeypatch.setattr(scoring, "_PROMPTS_OF_A_PART", 5)
    read = datasets.Dataset.from_list(
        [{"prompt": [], "answers": [f"a{i}", "b"], "one_prompt": True} for i in range(14)]
    )
    read.save_to_disk(tmp_path / "read")  # what is in memory is not cached
    read = datasets.load_from_disk(tmp_path / "read")
    asked = []

    def judge(prompts, answers):
        if len(asked) == 10:
            asked.append(None)
            raise UserError("cannot be reached")
        asked.extend(first for first, _ in answers)
        return [np.array([float(first[1:]), 0.0]) for first, _ in answers]

    judged = scoring.Judged(judge, "key")
    with pytest.raises(UserError):
        judged.of(read, "scores")
    assert judged.of(read, "scores")[:, 0].tolist() == list(range(14))
    assert asked == [*(f"a{i}" for i in range(10)), None, *(f"a{i}" for i in range(10, 14))]


def test_answers_to_different_prompts_have_no_verdict(tmp_path):
    def chat(question, answer):
        return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]

    records = [{"chosen": chat("q", "yes"), "rejected": chat(other, "no")} for other in ("q", "another", "q")]
    parts = [{"data_files": write(tmp_path / "a.jsonl", records)}]
    judge = {"_component_": "prefix_sharing.judging.length_judge"}
    select = {"by": "alpagasus", "budget": 9, "min_score": 1}
    mixture = preference_mixture(tokenizer(), datasets=parts, select=select, scores=judge)
    assert mixture.record_index.tolist() == [0, 2]
    assert mixture.dropped == {"without a score": 1}


def test_what_cannot_be_selected_is_said(scored, tmp_path, caplog):
    file, _ = scored
    assert len(build(file, select={"by": "random", "budget": 10**6})) == 40
    assert "the budget is 1,000,000, but only 40 examples can be selected; all of them are taken" in caplog.text
    tied = write(tmp_path / "tied.jsonl", [pair(i, score_chosen=5, score_rejected=1) for i in range(9)])
    assert build(tied, select={"by": "a2", "budget": 4}).record_index.tolist() == [0, 1, 2, 3]
    assert "all have the same score of the chosen answer, 5" in caplog.text
    with pytest.raises(UserError, match="no usable example .* scores differ by less than min_gap: 9"):
        build(tied, select={"by": "argilla", "budget": 4, "min_score": 0, "min_gap": 7})


def test_missing_scores_are_refused_where_all_are(tmp_path):
    file = write(tmp_path / "a.jsonl", [pair(i) for i in range(9)])
    with pytest.raises(UserError, match="'select': no record of .* has a score of its chosen answer; say in scores"):
        build(file, select={"by": "a2", "budget": 4})
    with pytest.raises(UserError, match="has a score of its chosen answer in good, bad; say in scores"):
        build(file, select={"by": "a2", "budget": 4}, scores=["good", "bad"])
    deita = {"by": "deita", "budget": 4, "complexity": "hard", "embedding": "vector"}
    hard = [pair(i, score_chosen=5, score_rejected=1, hard=1) for i in range(9)]
    with pytest.raises(UserError, match="no record of .* has a number in its column 'vector'"):
        build(write(tmp_path / "d.jsonl", hard), select=deita)
    single = [{"messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}], "s": 1}]
    with pytest.raises(UserError, match="has scores of two answers in s"):
        build(write(tmp_path / "b.jsonl", single), select={"by": "a2", "budget": 4}, scores=["s"])
    words = write(tmp_path / "c.jsonl", [pair(0, score_chosen=1, score_rejected="bad")])
    with pytest.raises(UserError, match=r"c.jsonl, record 0 \(line 1\): score_rejected must be a number"):
        build(words, select={"by": "a2", "budget": 4})


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"select": "a2"}, "select.by': must be one of random, longest, .* but is a2"),
        ({"select": {"budget": 4}}, "select.by': must be one of"),
        ({"select": {"by": "longst", "budget": 4}}, "Did you mean 'longest'"),
        ({"select": {"by": "a2"}}, "select.budget': required by select by a2"),
        ({"select": {"by": "a2", "budget": 0}}, "select.budget': must be at least 1"),
        ({"select": {"by": "longest", "budget": 4, "min_gap": 2}}, "select.min_gap': no key of select by longest"),
        ({"scores": ["a", "b"]}, "scores': not used"),
        ({"select": {"by": "longest", "budget": 4}, "rescale": {"raw": ["a", "b"]}}, "rescale': not used"),
        ({"select": {"by": "a2", "budget": 4}, "rescale": ["a", "b"]}, "rescale': must be a mapping with raw"),
        ({"select": {"by": "a2", "budget": 4}, "scores": 3}, "scores': must name columns, or a judge"),
    ],
)
def test_what_is_no_selection_is_refused(keys, message):
    with pytest.raises(UserError, match=message):
        build("none.jsonl", **keys)


def test_records_that_are_answers_are_not_torn_from_their_prompts(tmp_path):
    answers = [
        {"prompt": f"Q{i // 2}", "response": f"A{i}", "helpfulness": i % 2 * 3, "correctness": 2, "coherence": 3}
        for i in range(8)
    ]
    file = write(tmp_path / "answers.jsonl", answers)
    assert len(build(file)) == 4
    with pytest.raises(UserError, match="'select': not used with format helpsteer2, whose records are answers"):
        build(file, select={"by": "random", "budget": 4})
    with pytest.raises(UserError, match=r"'deduplicate\.over': prompt would keep one record of each prompt"):
        build(file, deduplicate="exact")
    assert len(build(file, deduplicate={"method": "exact", "over": "prompt_and_answers"})) == 4
