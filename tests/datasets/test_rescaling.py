"""Raw values of a reward model on the scale of scores: a planted line, numpy's fit, and scores that stay."""

import logging

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prefix_sharing.datasets import preference_mixture, prefix_preference_dataset
from prefix_sharing.datasets.choosing.rescaling import fit, rescale
from prefix_sharing.errors import UserError
from prefix_sharing.quickstart import tokenizer
from records import prompts_of, write


def planted(rng, slope, offset, n=200, missing=0.5):
    raw = rng.normal(size=(n, 2)) * 7 - 3
    scores = slope * raw + offset
    scores[rng.random((n, 2)) < missing] = np.nan
    return scores, raw


@settings(deadline=None)
@given(st.integers(0, 10**6), st.floats(0.1, 10), st.floats(-10, 10))
def test_a_planted_line_is_recovered(seed, slope, offset):
    scores, raw = planted(np.random.default_rng(seed), slope, offset)
    line = fit(scores, raw)
    assert line.slope / (line.most - line.least) == pytest.approx(slope, abs=1e-6)
    assert line(np.zeros(1))[0] == pytest.approx(offset, abs=1e-6)
    assert line.error < 1e-6
    filled = rescale(scores, raw, "pairs")
    np.testing.assert_allclose(filled, slope * raw + offset, atol=1e-6)
    there = np.isfinite(scores)
    assert (filled[there] == scores[there]).all()  # to the bit


@settings(deadline=None)
@given(st.integers(0, 10**6))
def test_the_fit_is_numpys_and_pairs_are_counted_one_by_one(seed):
    rng = np.random.default_rng(seed)
    scores, raw = rng.integers(0, 5, size=(30, 3)).astype(float), rng.integers(0, 9, size=(30, 3)).astype(float)
    scores[rng.random((30, 3)) < 0.2] = np.nan
    raw[rng.random((30, 3)) < 0.2] = np.nan
    line = fit(scores, raw)
    both = np.isfinite(scores) & np.isfinite(raw)
    slope, offset = np.polyfit(raw[both], scores[both], 1)
    np.testing.assert_allclose(line(raw[both]), slope * raw[both] + offset, atol=1e-9)
    assert line.error == pytest.approx(np.sqrt(np.mean((slope * raw[both] + offset - scores[both]) ** 2)))
    agreed = []
    for i in range(30):
        for a, b in ((0, 1), (0, 2), (1, 2)):
            if both[i, a] and both[i, b] and scores[i, a] != scores[i, b]:
                by_raw = (raw[i, a] - raw[i, b]) * (scores[i, a] - scores[i, b])
                agreed.append(1.0 if by_raw > 0 else 0.5 if by_raw == 0 else 0.0)
    assert line.pair_accuracy == pytest.approx(np.mean(agreed))


def test_without_two_that_differ_there_is_no_line():
    nothing = np.full((3, 2), np.nan)
    raw = np.arange(6.0).reshape(3, 2)
    with pytest.raises(UserError, match="0 answers have both a score and a raw value; a line needs two that differ"):
        fit(nothing, raw)
    with pytest.raises(UserError, match="6 answers have both .*, and all raw values are 4"):
        fit(raw, np.full((3, 2), 4.0))


def records(name, has_scores):
    made = []
    for i in range(10):
        record = {"prompt": f"{name} {i}", "chosen": "yes", "rejected": "no"}
        record |= {"reward_chosen": i / 10, "reward_rejected": -i / 10}
        if has_scores(i):
            record |= {"score_chosen": 5 + i, "score_rejected": 5 - i}
        made.append(record)
    return made


def test_what_is_missing_is_filled_in_before_selecting(tmp_path, caplog):
    file = write(tmp_path / "a.jsonl", records("a", lambda i: i % 2 == 0))
    keys = {"select": {"by": "alpagasus", "budget": 9, "min_score": 11.5}}
    assert prompts_of(prefix_preference_dataset(tokenizer(), data_files=file, **keys)) == ["a 8"]
    with caplog.at_level(logging.INFO, logger="prefix_sharing"):
        dataset = prefix_preference_dataset(
            tokenizer(), data_files=file, **keys, rescale={"raw": ["reward_chosen", "reward_rejected"]}
        )
    assert prompts_of(dataset) == ["a 7", "a 8", "a 9"]
    assert "score = 18 * (raw - -0.9) / 1.8 + -4; on 10 answers with both" in caplog.text
    assert "pair accuracy 1.000; 10 scores filled in, 10 left as they were" in caplog.text
    assert "reward_chosen" not in caplog.text.partition("not used:")[2]


def test_one_line_is_fitted_for_a_mixture(tmp_path):
    parts = [
        {"data_files": write(tmp_path / "a.jsonl", records("a", lambda i: True))},
        {"data_files": write(tmp_path / "b.jsonl", records("b", lambda i: False))},
    ]
    select = {"by": "alpagasus", "budget": 9, "min_score": 12.5}
    raw = {"raw": ["reward_chosen", "reward_rejected"]}
    assert prompts_of(preference_mixture(tokenizer(), datasets=parts, select=select)) == ["a 8", "a 9"]
    mixture = preference_mixture(tokenizer(), datasets=parts, select=select, rescale=raw)
    assert prompts_of(mixture) == ["a 8", "a 9", "b 8", "b 9"]
