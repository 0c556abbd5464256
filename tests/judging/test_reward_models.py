"""Reward models score each answer as transformers does on that sequence alone."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from directories import DIMS
from prefix_sharing.errors import UserError
from prefix_sharing.judging import reward_model_judge
from prefix_sharing.quickstart.checkpointer import TOKENIZER_DIR

transformers = pytest.importorskip("transformers", minversion="5.24")

PROMPTS = [
    [{"role": "user", "content": "How many apples are there?"}],
    [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Why?"},
        {"role": "assistant", "content": "Why not?"},
        {"role": "user", "content": "Because of the long winter."},
    ],
    [{"role": "user", "content": "Go on."}],
]
ANSWERS = [["two", "three of them, and a pear " * 5, ""], ["because"], ["a", "b c d"]]


def make_reward_model(path, name="qwen3", num_labels=1, **kwargs):
    config = transformers.AutoConfig.for_model(name, **DIMS | {"num_labels": num_labels} | kwargs)
    torch.manual_seed(0)
    model = transformers.AutoModelForSequenceClassification.from_config(config)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(path)
    for file in Path(TOKENIZER_DIR).iterdir():
        shutil.copy(file, path)
    return str(path)


def plain_scores(path, prompts, answers):
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(path, dtype=torch.float32).eval()
    scores = []
    for turns, some in zip(prompts, answers, strict=True):
        chats = [[*turns, {"role": "assistant", "content": answer}] for answer in some]
        ids = [
            tokenizer.apply_chat_template(chat, return_tensors="pt", return_dict=True)["input_ids"] for chat in chats
        ]
        with torch.no_grad():
            scores.append(np.array([model(one).logits[0, 0].item() for one in ids]))
    return scores


@pytest.mark.parametrize("pad_token_id", [None, 0, 2, -1])
@pytest.mark.parametrize("tokens_at_once", [1, 100, 16384])
def test_scores_are_those_of_each_sequence_alone(tmp_path, pad_token_id, tokens_at_once):
    path = make_reward_model(tmp_path, pad_token_id=pad_token_id if pad_token_id != -1 else None)
    if pad_token_id == -1:  # as Llama's first config has it
        config = json.loads((tmp_path / "config.json").read_text())
        (tmp_path / "config.json").write_text(json.dumps(config | {"pad_token_id": -1}))
    expected = plain_scores(path, PROMPTS, ANSWERS)
    judge = reward_model_judge(path, tokens_at_once=tokens_at_once)
    for found, plain in zip(judge(PROMPTS, ANSWERS), expected, strict=True):
        assert found.dtype == np.float64
        np.testing.assert_allclose(found, plain, atol=1e-5, rtol=1e-5)
    assert len(np.unique(np.concatenate(expected))) == 6
    (again,) = judge(PROMPTS[2:], ANSWERS[2:])  # once loaded, with other sequences
    np.testing.assert_allclose(again, expected[2], atol=1e-5, rtol=1e-5)
    assert judge([], []) == []
    assert [len(scores) for scores in judge(PROMPTS[:2], [[], ["x"]])] == [0, 1]


def test_longest_first_and_no_more_tokens_than_allowed(tmp_path, monkeypatch):
    path = make_reward_model(tmp_path)
    judge = reward_model_judge(path, tokens_at_once=100)
    judge(PROMPTS[:1], [["x"]])
    shapes = []
    judge._model.register_forward_pre_hook(
        lambda module, args, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    judge(PROMPTS, ANSWERS)
    assert sum(number for number, _ in shapes) == 6
    assert [length for _, length in shapes] == sorted((length for _, length in shapes), reverse=True)
    assert all(number * length <= 100 or number == 1 for number, length in shapes)
    assert len(shapes) > 1


def test_what_does_not_fit_has_no_verdict(tmp_path, caplog):
    path = make_reward_model(tmp_path, max_position_embeddings=40)
    (scores,) = reward_model_judge(path)(PROMPTS[:1], [["two", "word " * 100]])
    assert np.isnan(scores).tolist() == [False, True]
    assert "1 answers are too long to be judged" in caplog.text


def test_directories_that_are_no_reward_model_are_refused(tmp_path):
    path = make_reward_model(tmp_path / "three", num_labels=3)
    with pytest.raises(UserError, match="three has 3 outputs; a reward model has one."):
        reward_model_judge(path)(PROMPTS, ANSWERS)

    path = make_reward_model(tmp_path / "small", vocab_size=100)
    with pytest.raises(UserError, match=r"makes token \d+ and a model of 100 tokens; they do not belong together"):
        reward_model_judge(path)(PROMPTS, ANSWERS)

    path = make_reward_model(tmp_path / "untold")
    (tmp_path / "untold" / "chat_template.jinja").unlink()
    with pytest.raises(UserError, match="untold has no chat template"):
        reward_model_judge(path)(PROMPTS, ANSWERS)

    config = transformers.AutoConfig.for_model("qwen3", **DIMS, num_labels=1)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "decoder")
    for file in Path(TOKENIZER_DIR).iterdir():
        shutil.copy(file, tmp_path / "decoder")
    with pytest.raises(UserError, match="decoder has no weights for score.weight, so it is no trained reward model"):
        reward_model_judge(str(tmp_path / "decoder"))(PROMPTS, ANSWERS)

    with pytest.raises(UserError, match="nowhere not found"):
        reward_model_judge(str(tmp_path / "nowhere"))(PROMPTS, ANSWERS)
    with pytest.raises(UserError, match="'dtype': must be one of fp32, bf16, fp16, not int8"):
        reward_model_judge(path, dtype="int8")
    with pytest.raises(UserError, match="'device': 'gpu' is no device"):
        reward_model_judge(path, device="gpu")
    with pytest.raises(UserError, match="'tokens_at_once': must be 1 or more"):
        reward_model_judge(path, tokens_at_once=0)


def test_a_template_that_refuses_is_named(tmp_path):
    path = make_reward_model(tmp_path)
    (tmp_path / "chat_template.jinja").write_text("{{ raise_exception('no such roles') }}")
    with pytest.raises(UserError, match="refuses turns of user, assistant: no such roles"):
        reward_model_judge(path)(PROMPTS, ANSWERS)


def test_encoders_see_no_padding(tmp_path):
    path = make_reward_model(tmp_path, "bert", pad_token_id=0)
    found = reward_model_judge(path)(PROMPTS, ANSWERS)
    for scores, plain in zip(found, plain_scores(path, PROMPTS, ANSWERS), strict=True):
        np.testing.assert_allclose(scores, plain, atol=1e-5, rtol=1e-5)
