"""Answers drawn from a model before and after training, for people and for judges of others."""

import json
import re

import numpy as np
import pytest
import torch

from documents import PAGES, runs
from plain import response
from prefix_dpo_answers import AnswersConfig, PrefixDPOAnswers
from prefix_sharing.datasets.answers import header_length, split_at_answer
from prefix_sharing.errors import ConfigError
from prefix_sharing.hosts import build_answer_model
from prefix_sharing.online.prompts import tokens_before_answer
from prefix_sharing.quickstart import tokenizer
from runs import lora, make_config, make_recipe, run_in_process, tune_run


def answers_of(directory, **overrides):
    recipe = make_recipe(directory, PrefixDPOAnswers, config_class=AnswersConfig, max_new_tokens=8, **overrides)
    recipe.run()
    text = (directory / "answers.md").read_text()
    return recipe, {
        name: re.findall(rf"\*\*{name}\*\*\n\n````text\n(.*?)\n````", text, re.DOTALL)
        for name in ("prompt", "before training", "after training", "chosen", "rejected")
    }


@pytest.mark.parametrize("overrides", [{}, lora()])
def test_answers_are_the_likeliest_tokens_of_each_model(tmp_path, overrides):
    trained = run_in_process(tmp_path, **overrides)
    recipe, answers = answers_of(tmp_path, num_prompts=2, **overrides)
    assert [len(texts) for texts in answers.values()] == [2, 2, 2, 2, 2]
    assert f"Greedy decoding (temperature 0); run: {tmp_path}" in (tmp_path / "answers.md").read_text()
    assert answers["before training"] != answers["after training"]
    assert all(prompt.rstrip().endswith("assistant") for prompt in answers["prompt"])

    # One token after the other without a cache, from the weights that training ended with.
    plain = build_answer_model(recipe.cfg.model, torch.device("cpu"), torch.float32).model
    plain.load_state_dict(trained.model.state_dict())
    tokens = list(split_at_answer(trained.dataset_val[0][0])[0])
    start = len(tokens)
    for _ in range(8):
        with torch.no_grad():
            tokens.append(plain(torch.tensor([tokens]))[0, -1].argmax().item())
        if tokens[-1] in tokenizer().stop_tokens:
            break
    assert answers["after training"][0] == tokenizer().decode(tokens[start:]).strip()


def test_answers_to_other_prompts_are_not_shown_as_the_datas(tmp_path):
    loss = {
        "loss": {"_component_": "prefix_sharing.losses.KTOLoss"},
        "max_steps_per_epoch": 1,
        "dataset_val.num_pairs": 4,
    }
    run_in_process(tmp_path, **loss)
    recipe, _ = answers_of(tmp_path, num_prompts=1, **loss)
    assert recipe.dataset.labels(0).tolist() == [1, -1, 0, 0]
    text = (tmp_path / "answers.md").read_text()
    assert re.findall(r"\*\*(.* of the data)\*\*", text) == ["response 1 of the data", "response 2 of the data"]


def test_a_sequence_is_parted_at_its_last_answer():
    prompt, answer = split_at_answer(response([1, 2, 3, 4, 5, 6, 7], [0, 1, 1, 0, 1, 1, 0]))
    assert prompt.tolist() == [1, 2, 3, 4]
    assert answer.tolist() == [5, 6]
    prompt, answer = split_at_answer(response([1, 2, 3], [0, 0, 1]))
    assert np.concatenate([prompt, answer]).tolist() == [1, 2, 3]


def test_the_header_of_an_answer_belongs_to_the_prompt():
    assert header_length(tokenizer()) == 0
    # torchtune's own tokenizers score <|start_header_id|>assistant<|end_header_id|> and a blank line with the answer
    assert header_length(WithScoredHeader()) == 2
    prompt, answer = split_at_answer(response([1, 2, 3, 4, 5], [0, 1, 1, 1, 1]), header=2)
    assert prompt.tolist() == [1, 2, 3]
    assert answer.tolist() == [4, 5]


class WithScoredHeader:
    def tokenize_messages(self, messages):
        return [1, 2, 7, 8, ord(messages[1].text_content), 9], [True, True, False, False, False, False]


def test_answers_before_are_those_of_the_adapter_the_run_began_with(tmp_path):
    run_in_process(tmp_path / "first", **lora())
    adapter = str(tmp_path / "first" / "epoch_0" / "adapter_model.pt")
    _, first = answers_of(tmp_path / "first", num_prompts=1, **lora())
    run_in_process(tmp_path / "second", **lora() | {"adapter_checkpoint": adapter})
    _, second = answers_of(tmp_path / "second", num_prompts=1, **lora() | {"adapter_checkpoint": adapter})
    assert second["before training"] == first["after training"] != first["before training"]


def test_more_tokens_than_the_model_takes_are_refused(tmp_path):
    run_in_process(tmp_path)
    with pytest.raises(ConfigError, match="'max_new_tokens': 500 after the longest prompt"):
        make_recipe(tmp_path, PrefixDPOAnswers, config_class=AnswersConfig, max_new_tokens=500).run()


def test_a_run_that_is_not_done_is_refused(tmp_path):
    with pytest.raises(
        ConfigError, match="'checkpointer.output_dir': .*epoch_0 not found; train with this config first"
    ):
        answers_of(tmp_path)
    with pytest.raises(ConfigError, match="'dataset_val': required: its prompts are the ones that are answered"):
        answers_of(tmp_path, dataset_val=None)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    directory = tmp_path_factory.mktemp("trained")
    return directory, run_in_process(directory, dataset_val=None)


def answer_file(directory, answer_format, records, **overrides):
    """What the recipe writes for the judge of a benchmark: answers before and after training."""
    prompts = directory / "prompts.jsonl"
    prompts.write_text("".join(f"{json.dumps(record)}\n" for record in records))
    keys = {"format": answer_format, "prompts": str(prompts), "max_new_tokens": 8, "dataset_val": None, **overrides}
    make_recipe(directory, PrefixDPOAnswers, config_class=AnswersConfig, **keys).run()
    files = sorted((directory / "answers" / answer_format).iterdir())
    lines = [file.read_text() if file.suffix == ".json" else file.read_text().splitlines() for file in files]
    return {
        file.stem: json.loads(text) if isinstance(text, str) else [json.loads(line) for line in text]
        for file, text in zip(files, lines, strict=True)
    }


def likeliest_answer(model, turns):
    """By torchtune's own model, one token after the other without a cache."""
    tokens = list(tokens_before_answer([{"role": role, "content": text} for role, text in turns], tokenizer()))
    start = len(tokens)
    for _ in range(8):
        with torch.no_grad():
            tokens.append(model(torch.tensor([tokens]))[0, -1].argmax().item())
        if tokens[-1] in tokenizer().stop_tokens:
            break
    return tokenizer().decode(tokens[start:]).strip()


def test_the_second_turn_of_mt_bench_is_asked_after_the_answer_to_the_first(trained):
    directory, run = trained
    records = [
        {"question_id": 81, "category": "writing", "turns": ["What did we find?", "And what then?"]},
        {"question_id": 7, "category": "math", "turns": ["What did we lose first, and when?"]},
        {"question_id": 9, "category": "math", "turns": ["What?", "Why?"]},
    ]
    written = answer_file(directory, "mt_bench", records, num_prompts=2, model_name="org/small")
    assert set(written) == {"org_small", "org_small_before"}
    assert [record["question_id"] for record in written["org_small"]] == [81, 7]
    assert {record["model_id"] for record in written["org_small_before"]} == {"org/small_before"}
    plain = build_answer_model(make_config(directory).model, torch.device("cpu"), torch.float32).model
    plain.load_state_dict(run.model.state_dict())
    first, second = written["org_small"][0]["choices"][0]["turns"]
    asked = [("user", "What did we find?")]
    assert first == likeliest_answer(plain, asked)
    assert second == likeliest_answer(plain, [*asked, ("assistant", first), ("user", "And what then?")])
    assert written["org_small_before"][0]["choices"] != written["org_small"][0]["choices"]


def test_answers_for_alpaca_eval_and_arena_hard(trained):
    directory, _ = trained
    (command,) = [run for run in runs(PAGES["evaluation.md"]) if "prefix_dpo_answers" in run]
    assert [override.split("=")[0] for override in command[3:]] == ["format", "prompts", "max_new_tokens"]
    assert command[3] == "format=alpaca_eval"
    one = answer_file(directory, "alpaca_eval", [{"dataset": "koala", "instruction": "What?", "output": "gold"}])
    name = directory.name
    assert [set(record) for record in one[name]] == [{"dataset", "instruction", "output", "generator"}]
    assert one[name][0]["generator"] == name
    assert one[name][0]["output"] != "gold"
    two = answer_file(directory, "arena_hard", [{"uid": "0f", "category": "hard_prompt", "prompt": "What?"}])
    assert two[name][0]["messages"][-1]["content"] == {"answer": one[name][0]["output"]}


def test_what_cannot_be_answered_is_refused_before_anything_is(trained):
    directory, _ = trained
    two_turns = [{"question_id": 1, "turns": ["What?", "Why?"]}]
    with pytest.raises(ConfigError, match="'max_new_tokens': 250 after the longest conversation make 5"):
        answer_file(directory, "mt_bench", two_turns, max_new_tokens=250)
    with pytest.raises(ConfigError, match="'prompts': required with format: mt_bench"):
        answer_file(directory, "mt_bench", two_turns, prompts=None)
    with pytest.raises(ConfigError, match="'prompts': not used with format: markdown"):
        answer_file(directory, "markdown", two_turns, dataset_val=make_config(directory).dataset)


@pytest.mark.slow
def test_torchtunes_generate_recipe_runs_on_what_was_trained(tmp_path):
    recipe = run_in_process(tmp_path, dataset_val=None)
    cfg = make_config(tmp_path)
    config = f"""
output_dir: {tmp_path}
model: {dict(cfg.model)}
checkpointer:
  _component_: torchtune.training.FullModelHFCheckpointer
  checkpoint_dir: {tmp_path}/epoch_0
  checkpoint_files: [model-00001-of-00001.safetensors]
  model_type: LLAMA3
  output_dir: {tmp_path}
tokenizer: {dict(cfg.tokenizer)}
device: cpu
dtype: fp32
seed: 0
prompt: {{system: null, user: What did we find?}}
max_new_tokens: 8
temperature: 0.6
top_k: 5
enable_kv_cache: True
quantizer: null
"""
    (tmp_path / "generate.yaml").write_text(config)
    done = tune_run("generate", "--config", "generate.yaml", cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "What did we find?" in done.stderr + done.stdout
    assert recipe.global_step == 4
