"""A look at a data set before training."""

import json
import re

import numpy as np
import pytest

from plain import response
from prefix_dpo_stats import PrefixDPOStats, StatsConfig
from prefix_sharing.attention.varlen import has_grouped_queries
from prefix_sharing.errors import ConfigError
from prefix_sharing.reports.lengths import Lengths, mark_example, plot_lengths, prefix_ratio, shared_prefix
from prefix_sharing.reports.lengths import measure_lengths as measure
from runs import make_config


@pytest.fixture
def stats(tmp_path):
    return PrefixDPOStats(make_config(tmp_path, config_class=StatsConfig))


def test_lengths_are_those_of_the_examples(stats):
    lengths = measure(stats.dataset)
    for i in range(len(stats.dataset)):
        chosen, rejected = (r.tokens.tolist() for r in stats.dataset[i])
        prefix = next(n for n in range(len(chosen)) if chosen[n] != rejected[n])
        assert lengths.prefix[i] == prefix
        assert [branch[i] for branch in lengths.branches] == [len(chosen) - prefix, len(rejected) - prefix]
        assert lengths.example[i] == len({tuple(s[: n + 1]) for s in (chosen, rejected) for n in range(len(s))})
        assert lengths.repeated[i] == len(chosen) + len(rejected)
        assert prefix_ratio(lengths)[i] == pytest.approx(2 * prefix / (len(chosen) + len(rejected) - 2 * prefix))


def test_what_is_found_is_printed_and_written(stats, tmp_path, capsys, pictures):
    stats.run()
    found = json.loads((tmp_path / "stats" / "stats.json").read_text())
    dataset = stats.dataset
    assert (found["examples"], found["pairs"], found["dropped"]) == (64, 64, {})
    assert found["percentiles"]["prefix"]["50"] == int(np.median(measure(dataset).prefix))
    flops = [stats.model.forward_flops(dataset.sizes(share)).sum() for share in (False, True)]
    assert found["expected_speed_up"] == pytest.approx(flops[0] / flops[1])
    assert found["steps_per_epoch"] == stats.plan.steps_per_epoch == 4
    rows = [packing["rows"] for packing in found["packings"]]
    assert rows == sorted(rows, reverse=True)
    assert (tmp_path / "stats" / "lengths.png").read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert "branch 2" in printed
    assert "scored tokens in brackets:" in printed
    assert "\033" not in printed
    tokens = stats.plan.sizes.num_tokens[stats.plan.examples_visited(0, 1)].sum()
    for packing in found["packings"]:
        assert packing["fill"] == pytest.approx(tokens / (packing["rows"] * packing["pack_len"]))


def test_a_run_on_several_processes_is_planned_for_as_many(tmp_path, capsys):
    keys = {"name": "quickstart/distributed", "config_class": StatsConfig}
    for world_size, steps, said in (
        (1, 8, "8 examples per step, on 1 process"),
        (4, 2, "32 examples per step, on 4 proc"),
    ):
        stats = PrefixDPOStats(make_config(tmp_path, **keys, max_steps_per_epoch=None, world_size=world_size))
        assert stats.plan.steps_per_epoch == steps
        stats.run()
        assert said in capsys.readouterr().out


@pytest.mark.skipif(not has_grouped_queries(), reason="varlen_attn takes grouped heads from torch 2.12 on")
def test_what_the_device_decides_is_as_in_training(tmp_path):
    keys = {"config_class": StatsConfig, "device": "cuda", "dtype": None, "attention_backend": "varlen"}
    stats = PrefixDPOStats(make_config(tmp_path, **keys))  # nothing is computed, so there need be no such device
    assert (stats.cfg.dtype, stats.model.attention_backend) == ("bf16", "varlen")


def test_an_example_that_is_not_there_is_said(tmp_path):
    with pytest.raises(ConfigError, match="'show_example': is 64, but there are 64 examples"):
        PrefixDPOStats(make_config(tmp_path, config_class=StatsConfig, show_example=64))


class Letters:
    """A tokenizer of letters."""

    def decode(self, tokens):
        return "".join(chr(ord("a") + token) for token in tokens)


def test_scored_tokens_are_underlined_and_parts_have_colours():
    example = [response([0, 1, 2, 3], [0, 0, 1, 1]), response([0, 1, 4], [0, 0, 1])]
    marked = mark_example(Letters(), example, colors=True)
    grey, first, second, scored, reset = "\033[90m", "\033[32m", "\033[31m", "\033[1;4m", "\033[0m"
    assert f"{grey}ab{reset}" in marked
    assert f"{first}{scored}cd{reset}" in marked
    assert f"{second}{scored}e{reset}" in marked
    assert re.search(r"branch 1, 2 tokens, 2 of them scored", marked)
    plain = mark_example(Letters(), example, colors=False)
    assert plain.splitlines()[1::2] == ["ab", "[cd]", "[e]"]


@pytest.mark.parametrize(("prefix", "branch"), [([40], [10]), ([40] * 8, [10] * 8), ([0, 0], [300, 300])])
def test_lengths_that_do_not_vary_are_drawn(tmp_path, prefix, branch, pictures):
    prefixes, branches = np.array(prefix), np.array(branch)
    lengths = Lengths(prefixes, [branches, branches], np.full(len(prefix), 2), prefixes + 2 * branches)
    plot_lengths(lengths, "title", tmp_path / "lengths.png")
    assert (tmp_path / "lengths.png").exists()


def test_an_example_of_one_response_is_a_prompt_and_an_answer():
    assert shared_prefix([response([0, 1, 2], [0, 1, 1])]) == 1
    assert shared_prefix([response([0, 1], [0, 1]), response([5, 1], [0, 1])]) == 0
