"""What a sweep's table shows, and what is told apart from noise, on planted runs."""

import numpy as np
import pytest

from prefix_sharing.reports.noise import least_difference
from prefix_sharing.reports.sweep import Measured, best_of, is_better_lower, plot_sweep, table_of, what_it_shows

ACCURACY = "eval/rewards/accuracies"


def planted(means, noise, seeds, rng, measure=ACCURACY):
    return [
        Measured((10.0**-i,), {measure: list(mean + noise * rng.standard_normal(seeds))})
        for i, mean in enumerate(means)
    ]


@pytest.mark.parametrize(("sizes", "freedom", "published"), [((2, 2, 2, 2), 4, 5.76), ((5, 5, 5), 12, 3.77)])
def test_the_least_difference_is_tukeys(sizes, freedom, published):
    # the studentized range at 5 %, from its table: q * s / sqrt(n)
    rng = np.random.default_rng(1)
    samples = [list(rng.standard_normal(n)) for n in sizes]
    pooled = np.sqrt(sum(((np.array(s) - np.mean(s)) ** 2).sum() for s in samples) / freedom)
    assert least_difference(samples) == pytest.approx(published * pooled / np.sqrt(sizes[0]), rel=2e-3)


def test_one_seed_says_nothing_of_noise():
    assert least_difference([[0.1], [0.9]]) is None
    text, is_warning = what_it_shows(["beta"], [Measured((b,), {ACCURACY: [b]}) for b in (0.1, 0.5)], ACCURACY)
    assert text.startswith(f"{ACCURACY}: best at beta=0.5. With one seed there is no telling")
    assert not is_warning


def test_equal_runs_are_warned_of_in_19_of_20_sweeps():
    rng = np.random.default_rng(0)
    warned = [what_it_shows(["beta"], planted([0.7] * 4, 0.02, 2, rng), ACCURACY)[1] for _ in range(80)]
    assert abs(np.mean(warned) - 0.95) < 4 * np.sqrt(0.05 * 0.95 / 80)


def test_runs_that_differ_are_told_apart_and_those_beside_the_best_are_named():
    rng = np.random.default_rng(0)
    text, is_warning = what_it_shows(["beta"], planted([0.5, 0.9, 0.6, 0.899], 0.002, 2, rng), ACCURACY)
    assert not is_warning
    assert "does not tell from beta=" in text
    assert "0.01" not in text
    text, is_warning = what_it_shows(["beta"], planted([0.5, 0.9, 0.6], 0.002, 2, rng), ACCURACY)
    assert text == f"{ACCURACY}: best at beta=0.1, by more than noise between seeds."
    assert not is_warning


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ([[1.0], [1.0]], "all runs have the same value; use more examples, to train on or held out."),
        ([[0.5, 0.6], [0.52, 0.6]], "the runs do not differ by more than noise (by 0.01; noise between seeds alone"),
    ],
)
def test_runs_that_cannot_be_told_apart_have_no_best(values, said):
    found = [Measured((b,), {ACCURACY: of_point}) for b, of_point in zip((0.1, 0.5), values, strict=True)]
    text, are_alike = what_it_shows(["beta"], found, ACCURACY)
    assert are_alike
    assert text.startswith(f"{ACCURACY}: {said}")
    assert "**" not in table_of(["beta"], found, [ACCURACY])


def test_the_best_of_a_loss_is_the_least():
    assert is_better_lower("eval/loss")
    assert is_better_lower("lm_eval.json:results/wikitext/word_perplexity,none")
    assert not is_better_lower(ACCURACY)
    found = [Measured((b,), {"eval/loss": [b]}) for b in (0.3, 0.2, 0.4)]
    assert best_of(found, "eval/loss").point == (0.2,)


def test_the_table_has_means_and_deviations_and_gaps(tmp_path, pictures):
    found = [
        Measured((0.1, "a|b"), {ACCURACY: [0.6, 0.62], "score": [1.0]}),
        Measured((0.5, {"split": "train"}), {ACCURACY: [0.9, 0.9], "score": []}),
    ]
    lines = table_of(["beta", "dataset"], found, [ACCURACY, "score"]).splitlines()
    cells = [[cell.strip() for cell in line.replace("\\|", "/").strip("|").split("|")] for line in lines]
    assert cells[0] == ["beta", "dataset", ACCURACY, "score"]
    assert cells[2] == ["0.1", "a/b", "0.61 ± 0.014", "**1**"]
    assert cells[3] == ["0.5", "split: train", "**0.9 ± 0**", "-"]
    plot_sweep(["beta", "dataset"], found, [ACCURACY, "score"], "title", tmp_path / "sweep.png")
    assert (tmp_path / "sweep.png").read_bytes().startswith(b"\x89PNG")
