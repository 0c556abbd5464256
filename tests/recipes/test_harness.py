"""lm-eval scores what a run saves as it scores the same weights saved by transformers."""

import json
import shlex
import shutil
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from torchtune.models.convert_weights import tune_to_hf

from documents import PAGES, commands, table
from prefix_dpo_harness_task import HarnessTaskConfig, write_task
from prefix_sharing.datasets import prefix_preference_dataset
from prefix_sharing.errors import ConfigError, UserError
from prefix_sharing.quickstart import tokenizer
from prefix_sharing.quickstart.checkpointer import TOKENIZER_DIR
from prefix_sharing.reports.harness_task import write_harness_task
from runs import MODEL, make_config, run_in_process

PAGE = PAGES["evaluation.md"]


def trained_by_torchtune(directory):
    """A run, and its weights in a model of transformers."""
    import transformers

    run = run_in_process(directory)
    config = transformers.AutoConfig.from_pretrained(directory / "epoch_0")
    model = transformers.AutoModelForCausalLM.from_config(config)
    heads = {"num_heads": MODEL["num_heads"], "num_kv_heads": MODEL["num_kv_heads"], "dim": MODEL["embed_dim"]}
    model.load_state_dict(tune_to_hf(run.model.state_dict(), **heads))
    return run, model


def trained_by_transformers(directory):
    """The same, of a model that is transformers' own."""
    from directories import keys_for, make_directory

    path = make_directory(directory / "model")
    run = run_in_process(directory, **keys_for(path, directory))
    return run, run.model


def score(model, include, tasks):
    """What lm-eval finds, and the log-likelihoods of each question's chosen and rejected answer."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    found = lm_eval.simple_evaluate(
        model="hf",
        model_args={"pretrained": str(model), "device": "cpu"},
        tasks=[tasks],
        task_manager=TaskManager(include_path=str(include), include_defaults=False),  # which take seconds to index
        bootstrap_iters=0,
    )
    samples = sorted(found["samples"][tasks], key=lambda sample: sample["doc_id"])
    log_likelihoods = [[float(choice[0]) for choice in sample["filtered_resps"]] for sample in samples]
    by_chosen = [
        both[::-1] if sample["doc"]["gold"] else both for sample, both in zip(samples, log_likelihoods, strict=True)
    ]
    return found["results"][tasks], by_chosen


@pytest.mark.parametrize("train", [trained_by_torchtune, trained_by_transformers])
def test_a_saved_model_scores_as_the_same_weights_saved_by_transformers(tmp_path, train):
    pytest.importorskip("lm_eval")
    pytest.importorskip("transformers", minversion="5.24")
    run, model = train(tmp_path)
    write_harness_task(run.dataset_val, tokenizer(), "pairs", tmp_path / "harness")
    shutil.copytree(TOKENIZER_DIR, tmp_path / "theirs")
    model.save_pretrained(tmp_path / "theirs")
    ours, theirs = (
        score(where, tmp_path / "harness", "pairs") for where in (tmp_path / "epoch_0", tmp_path / "theirs")
    )
    assert ours == theirs
    # and as the run's own evaluation does, without a reference
    margins = pq.read_table(tmp_path / "margins.parquet")["margin_after"].to_numpy()
    results, log_likelihoods = ours
    assert results["acc,none"] == (margins > 0).mean()
    assert [chosen - rejected for chosen, rejected in log_likelihoods] == pytest.approx(margins.tolist(), abs=1e-3)


def test_the_documented_commands_score_a_run(tmp_path, monkeypatch, capsys):
    pytest.importorskip("transformers", minversion="5.24")
    main = pytest.importorskip("lm_eval.__main__")
    run_in_process(tmp_path / "quickstart_output", max_steps_per_epoch=1)
    monkeypatch.chdir(tmp_path)
    write, evaluate = commands(PAGE.split("## A task of your own pairs")[1])[:2]
    recipe, option, config, *more = shlex.split(write)[2:]
    assert (recipe, option, config, more) == ("prefix_dpo_harness_task", "--config", "quickstart/single_device", [])
    cfg = make_config(tmp_path / "quickstart_output", config_class=HarnessTaskConfig)
    write_task(cfg)
    monkeypatch.setattr(sys, "argv", [*shlex.split(evaluate), "--device", "cpu", "--output_path", "results"])
    main.cli_evaluate()
    assert "|held_out_pairs|" in capsys.readouterr().out.replace(" ", "")
    (file,) = Path("results").rglob("results*.json")
    margins = pq.read_table("quickstart_output/margins.parquet")["margin_after"].to_numpy()
    assert json.loads(file.read_text())["results"]["held_out_pairs"]["acc,none"] == (margins > 0).mean()


def test_the_papers_set_is_lm_evals_group():
    lm_eval = pytest.importorskip("lm_eval")
    import yaml

    group = yaml.safe_load((Path(lm_eval.__file__).parent / "tasks/benchmarks/openllm.yaml").read_text())
    shots = {task["task"]: task["num_fewshot"] for task in group["task"]}
    assert {cells[0].strip("`"): int(cells[1]) for cells in table(PAGE, "task")} == shots
    assert any("--tasks openllm" in command for command in commands(PAGE))


@pytest.mark.parametrize(
    "keys",
    [
        {"loss": {"_component_": "prefix_sharing.losses.KTOLoss"}},
        {"attention_backend": "flex", "flex_kernel_options": {"BLOCK_M": 32}, "compile": True},
    ],
)
def test_the_task_does_not_depend_on_how_a_run_trains(tmp_path, keys):
    write_task(make_config(tmp_path, config_class=HarnessTaskConfig, **keys))
    assert len((tmp_path / "harness" / "held_out_pairs.jsonl").read_text().splitlines()) == 16


def test_data_without_pairs_is_no_task(tmp_path):
    (tmp_path / "answers.jsonl").write_text('{"prompt": "q", "completion": "a", "label": true}\n')
    node = {"_component_": "prefix_sharing.datasets.prefix_preference_dataset"}
    node["data_files"] = str(tmp_path / "answers.jsonl")
    with pytest.raises(UserError, match="answers.jsonl has no pair that lm-eval could be asked about"):
        write_task(make_config(tmp_path, config_class=HarnessTaskConfig, dataset_val=node))
    node = {"_component_": "builtins.str"}
    with pytest.raises(ConfigError, match="'dataset_val': builds a str, which has no pairs to ask about; use prefix"):
        write_task(make_config(tmp_path, config_class=HarnessTaskConfig, dataset_val=node))


def questions(directory, records, **arguments):
    """What the task of some records asks."""
    data = directory / "pairs.jsonl"
    data.write_text("".join(f"{json.dumps(record)}\n" for record in records))
    dataset = prefix_preference_dataset(tokenizer(), data_files=str(data), **arguments)
    write_harness_task(dataset, tokenizer(), "task", directory)
    return [json.loads(line) for line in (directory / "task.jsonl").read_text().splitlines()]


def test_a_question_has_the_text_of_the_tokens(tmp_path):
    turns = [{"role": role, "content": text} for role, text in (("user", "Hi"), ("assistant", "Yes?"), ("user", " q"))]
    records = [{"prompt": turns, "chosen": " An answer", "rejected": "An other  "}]
    (question,) = questions(tmp_path, records)
    assert question["context"].endswith("<|start|>assistant\n")
    assert question["context"].count("Yes?") == 1
    assert question["choices"] == [" An answer<|end|>", "An other  <|end|>"]
    assert question["record"] == 0


def test_each_pair_of_a_ranking_is_a_question_and_pairs_with_two_prompts_are_none(tmp_path, caplog):
    records = [
        {"prompt": "q", "responses": ["one", "two", "three"]},
        {"prompt": "p", "responses": ["four", "four five"]},
    ]
    found = questions(tmp_path, records, pairs="all")
    assert [[choice.removesuffix("<|end|>") for choice in question["choices"]] for question in found] == [
        ["one", "two"],
        ["three", "one"],  # a model that cannot tell is right about half of them
        ["two", "three"],
        ["four five", "four"],
    ]
    assert [question["gold"] for question in found] == [0, 1, 0, 1]
    user = lambda text: {"role": "user", "content": text}  # noqa: E731
    answer = {"role": "assistant", "content": "a"}
    other = {"role": "assistant", "content": "b"}
    two_prompts = {"chosen": [user("q"), answer], "rejected": [user("another"), other]}
    with caplog.at_level("INFO", logger="prefix_sharing"):
        found = questions(tmp_path, [two_prompts, {"chosen": [user("q"), answer], "rejected": [user("q"), other]}])
    assert [question["record"] for question in found] == [1]
    assert "1 questions, 1 left out (prompts differ: 1)" in caplog.text
    with pytest.raises(UserError, match=r"has no pair that lm-eval could be asked about \(prompts differ: 1\)"):
        questions(tmp_path, [two_prompts])
