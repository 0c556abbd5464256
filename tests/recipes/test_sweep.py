"""A sweep: runs that are the plain recipe's, one reference pass for all, and a table that grows."""

import json
import logging
import sys

import pytest
from omegaconf import OmegaConf

import prefix_dpo_sweep
from documents import PAGES, runs_of
from prefix_sharing.config import TrainingConfig, check_config, find_config, instantiate
from prefix_sharing.config.sweeping import Axis
from prefix_sharing.quickstart import tokenizer
from prefix_sharing.reference import log_probs as reference_log_probs
from runs import SHORT, as_overrides, eval_log, losses, run_in_process, training_log

QUICK = SHORT | {
    "self_check": False,
    "lr_scheduler": None,
    "model.num_layers": 1,
    "max_steps_per_epoch": 2,
    "dataset_val.num_pairs": 8,
    "dataset.num_pairs": 32,
}


@pytest.fixture
def sweep(tmp_path, monkeypatch, capsys):
    """The command in this process; returns what it prints, or says, at the end."""

    def run(*arguments, fails=False, **keys):
        arguments = [*as_overrides(QUICK | {"output_dir": tmp_path / "sweep"} | keys), *arguments]
        monkeypatch.setattr(sys, "argv", ["prefix_dpo_sweep", "--config", "quickstart/single_device", *arguments])
        if fails:
            with pytest.raises(SystemExit, match="1"):
                prefix_dpo_sweep.recipe_main()
            return capsys.readouterr().err.splitlines()[-1]
        prefix_dpo_sweep.recipe_main()
        return "".join(line for line in capsys.readouterr().out.splitlines(keepends=True) if "log" not in line)

    return run


@pytest.fixture
def passes(monkeypatch):
    """The tokens of every forward pass for reference log-probs."""
    tokens = []
    compute = reference_log_probs.reference_log_probs

    def counted(forward, **kwargs):
        def forward_and_count(row):
            tokens.append(row.num_tokens)
            return forward(row)

        return compute(forward_and_count, **kwargs)

    monkeypatch.setattr(reference_log_probs, "reference_log_probs", counted)
    return tokens


def test_four_betas_take_one_pass_and_are_the_plain_recipes_runs(sweep, passes, tmp_path):
    ((*_, betas, examples, _),) = runs_of("prefix_dpo_sweep", PAGES["sweeps.md"])
    assert (betas, examples) == ("loss.beta=[0.01,0.05,0.1,0.5]", "examples=3200")
    printed = sweep(betas, examples=16)
    of_all = sum(passes)
    lines = [line for line in printed.splitlines() if line.startswith("|")]
    assert lines[0].split() == ["|", "beta", "|", "eval/rewards/accuracies", "|", "eval/rewards/margins", "|"]
    names = [f"beta={beta}" for beta in (0.01, 0.05, 0.1, 0.5)]
    after = [eval_log(tmp_path / "sweep" / name)[-1] for name in names]
    for name, metrics in zip(names, after, strict=True):
        (line,) = [line for line in lines if line.startswith(f"| {name.removeprefix('beta=')} ")]
        shown = [float(cell.strip(" *")) for cell in line.strip("|").split("|")[1:]]
        assert shown == [pytest.approx(metrics[f"eval/rewards/{what}"], rel=1e-3) for what in ("accuracies", "margins")]
    # the same by the plain recipe, with a cache of its own
    passes.clear()
    subset = {"_component_": "prefix_sharing.datasets.random_subset", "examples": 16}
    plain = {"_component_": "prefix_sharing.quickstart.preference_pairs", "num_pairs": 32, "seed": 0}
    keys = {key: value for key, value in QUICK.items() if not key.startswith("dataset.")}
    recipe = run_in_process(
        tmp_path / "plain",
        **keys | {"dataset": subset | {"dataset": plain}, "loss.beta": 0.5, "reference.cache_dir": str(tmp_path / "r")},
    )
    assert len(recipe.dataset) == 16
    assert losses(tmp_path / "plain") == losses(tmp_path / "sweep" / "beta=0.5")
    assert len({tuple(losses(tmp_path / "sweep" / name)) for name in names}) == 4
    assert sum(passes) > 0
    assert of_all <= 1.05 * sum(passes)


def test_what_is_finished_is_not_done_again_and_more_may_be_added(sweep, tmp_path, monkeypatch):
    sweep("loss.beta=[0.05,0.5]")
    result = (tmp_path / "sweep" / "beta=0.05" / "result.json").read_text()
    trained = []
    train = prefix_dpo_sweep.train
    monkeypatch.setattr(prefix_dpo_sweep, "train", lambda run: (trained.append(run.name), train(run)))
    sweep("loss.beta=[0.05,0.5]", num_workers=0)
    assert trained == []
    printed = sweep("loss.beta=[0.05,0.5]", seeds=2)
    assert trained == ["beta=0.05,seed=1", "beta=0.5,seed=1"]
    assert printed.count("±") >= 4
    assert "noise" in printed
    assert (tmp_path / "sweep" / "beta=0.05" / "result.json").read_text() == result
    # a number that something else has left there; and one that is not there yet
    scores = tmp_path / "sweep" / "beta=0.5" / "harness" / "results_1.json"
    scores.parent.mkdir()
    scores.write_text(json.dumps({"results": {"task": {"acc,none": 0.75}}}))
    measure = "harness/*.json:results/task/acc,none"
    printed = sweep("loss.beta=[0.05,0.5]", f'measures=["{measure}",loss]')
    assert trained == ["beta=0.05,seed=1", "beta=0.5,seed=1"]
    assert "**0.75**" in printed
    assert "fewer than two points have it" in printed
    final = [training_log(tmp_path / "sweep" / name)[-1]["loss"] for name in ("beta=0.05", "beta=0.5")]
    assert f"**{min(final):.4g}**" in printed
    said = sweep("loss.beta=[0.05,0.5]", "measures=[eval/lss]", fails=True)
    assert "'measures': no run logs 'eval/lss'" in said
    assert "Did you mean 'eval/loss'?" in said
    # another config is another sweep
    said = sweep("loss.beta=[0.05,0.5]", fails=True, **{"optimizer.lr": 1e-3})
    assert "beta=0.05 is finished, but was made with another optimizer: set that back" in said


def test_a_run_that_fails_does_not_stop_the_others(sweep, tmp_path):
    said = sweep("optimizer.lr=[1e18,1e-3]", fails=True, clip_grad_norm="null", max_steps_per_epoch=4)
    assert said.startswith("Error: 1 of 2 runs failed, lr=1e+18 because of: ")
    assert said.endswith("The same command tries them again.")
    table = (tmp_path / "sweep" / "sweep.md").read_text()
    assert "| 0.001 " in table
    assert "- lr=1e+18 failed: " in table


def test_data_sets_are_compared_on_the_same_held_out_pairs(sweep, tmp_path):
    nodes = "[{num_pairs: 12}, {num_pairs: 40, seed: 5}]"
    sweep(f"dataset={nodes}", examples=24, **{"dataset_val.num_pairs": 8})
    configs = [OmegaConf.load(file) for file in sorted((tmp_path / "sweep").glob("*/torchtune_config.yaml"))]
    assert [cfg.dataset.dataset.num_pairs for cfg in configs] == [12, 40]
    assert all(check_config(cfg, TrainingConfig) for cfg in configs)
    cfg = OmegaConf.load(find_config("quickstart/single_device"))
    cfg.dataset.num_pairs = 20
    by_size = prefix_dpo_sweep.PrefixDPOSweep(cfg, [Axis("examples", (5, 9))])
    subsets = [instantiate("dataset", run.cfg.dataset, tokenizer()) for run in by_size.runs]
    assert [len(subset) for subset in subsets] == [5, 9]
    assert set(subsets[0].ids.to_pylist()) < set(subsets[1].ids.to_pylist())


def test_held_out_pairs_that_change_with_the_run_are_warned_of(tmp_path, caplog):
    cfg = OmegaConf.load(find_config("quickstart/single_device"))
    cfg.merge_with({"output_dir": str(tmp_path), "dataset_val": {"seed": "${dataset.seed}"}})
    with caplog.at_level(logging.WARNING, "prefix_sharing"):
        prefix_dpo_sweep.PrefixDPOSweep(cfg, [Axis("dataset.seed", (1, 2))])
    assert "dataset_val is not the same in all runs" in caplog.text


def test_what_refers_to_the_data_set_still_does_with_a_subset_of_it(tmp_path):
    cfg = OmegaConf.load(find_config("quickstart/single_device"))
    references = {"seed": "${dataset.seed}", "num_pairs": "${dataset.num_pairs}"}
    cfg.merge_with({"output_dir": str(tmp_path), "dataset_val": references, "examples": 5})
    (run, _) = prefix_dpo_sweep.PrefixDPOSweep(cfg, [Axis("loss.beta", (0.1, 0.2))]).runs
    found = OmegaConf.to_container(check_config(run.cfg, TrainingConfig), resolve=True)
    assert found["dataset_val"] == {**found["dataset"]["dataset"], **{"num_pairs": 6400, "seed": 0}}


def test_answers_of_each_run_are_judged(sweep, tmp_path):
    judge = {
        "judge._component_": "prefix_sharing.judging.function_judge",
        "judge.function": "prefix_sharing.quickstart.online.vowel_rule",
        "sampler._component_": "prefix_sharing.sampling.in_process_sampler",
        "prompts_val._component_": "prefix_sharing.quickstart.online.prompts",
        "prompts_val.num_prompts": 4,
        "max_new_tokens": 6,
    }
    printed = sweep("loss.beta=[0.05,0.5]", **judge)
    assert printed.splitlines()[0].replace(" ", "").startswith("|beta|score|eval/rewards/accuracies|")
    results = [json.loads(file.read_text()) for file in sorted((tmp_path / "sweep").glob("*/result.json"))]
    assert all(0 <= result["metrics"]["score"] <= 1 for result in results)
    assert all(0 < result["metrics"]["answer_length"] <= 6 for result in results)
    assert all((tmp_path / "sweep" / f"beta={beta}" / "held_out" / "scores.parquet").exists() for beta in (0.05, 0.5))


@pytest.mark.parametrize(
    ("arguments", "keys", "problem"),
    [
        ([], {}, "There is nothing to sweep"),
        (["loss.beta=[0.1]"], {"measures": []}, "'measures': is empty"),
        (["loss.beta=[0.1,much]"], {}, "'loss.beta': must be a number, but is 'much'"),
        (["loss.bta=[0.1,0.2]"], {}, "'loss.bta': unknown argument"),
        (["seed=[1,2]"], {"seeds": 2}, "'seeds': not used while seed is swept"),
        (["loss.beta=[0.1,0.2]"], {"dataset_val": None}, "'dataset_val': required"),
        (["loss.beta=[0.1,0.2]"], {"temperature": -1}, "'temperature': must be at least 0"),
        (["loss.beta=[0.1,0.2]"], {"judge._component_": "a.b"}, "'judge': "),
    ],
)
def test_what_cannot_be_swept_is_refused_before_any_run(sweep, tmp_path, arguments, keys, problem):
    assert problem in sweep(*arguments, fails=True, **keys)
    assert not (tmp_path / "sweep").exists()
