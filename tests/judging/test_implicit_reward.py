"""The implicit reward of a tree is that of plain forward passes, sequence by sequence."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from directories import make_directory
from prefix_sharing.errors import UserError
from prefix_sharing.judging import implicit_reward_judge
from prefix_sharing.tokenizers import hf_chat_tokenizer

transformers = pytest.importorskip("transformers", minversion="5.24")

PROMPTS = [
    [{"role": "user", "content": "How many apples are there?"}],
    [
        {"role": "user", "content": "Why?"},
        {"role": "assistant", "content": "Why not?"},
        {"role": "user", "content": "Because of the long winter."},
    ],
]
ANSWERS = [["two", "two of them, and a pear", "", "four"], ["because"]]


def make_policy(path, seed, **kwargs):
    make_directory(path, **kwargs)
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    torch.manual_seed(seed)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(path)
    return str(path)


def plain_log_prob(path, turns, answer):
    """Of the answer and the end of its turn, by transformers alone."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    prompt = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
    prompt_ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    answer_ids = tokenizer(answer + "<|end|>", add_special_tokens=False)["input_ids"]
    ids = torch.tensor([prompt_ids + answer_ids])
    with torch.no_grad():
        log_probs = model(ids).logits[0, :-1].log_softmax(-1)
    return log_probs.gather(1, ids[0, 1:, None])[len(prompt_ids) - 1 :].double().sum().item()


@pytest.mark.parametrize("name", ["qwen3", "gemma2"])
def test_rewards_are_those_of_plain_forward_passes(tmp_path, name):
    policy = make_policy(tmp_path / "policy", 1, name=name)
    reference = make_policy(tmp_path / "reference", 2, name=name)
    judge = implicit_reward_judge(policy, reference, beta=0.3)
    found = judge(PROMPTS, ANSWERS)
    for turns, some, scores in zip(PROMPTS, ANSWERS, found, strict=True):
        assert scores.dtype == np.float64
        for answer, score in zip(some, scores, strict=True):
            expected = 0.3 * (plain_log_prob(policy, turns, answer) - plain_log_prob(reference, turns, answer))
            assert score == pytest.approx(expected, rel=1e-5, abs=1e-5)
    assert judge([], []) == []


def test_a_prompt_is_computed_once(tmp_path):
    policy, reference = (make_policy(tmp_path / name, i) for i, name in enumerate(["policy", "reference"]))
    judge = implicit_reward_judge(policy, reference)
    judge(PROMPTS, ANSWERS)
    lengths = []
    judge._models[0].layers[0].register_forward_pre_hook(lambda module, inputs: lengths.append(inputs[0].shape[1]))
    judge(PROMPTS[:1], [["two", "four"]])
    tokenizer = hf_chat_tokenizer(policy)
    turns = [[*PROMPTS[0], {"role": "assistant", "content": answer}] for answer in ("two", "four")]
    alone = [len(tokenizer.tokenize_chat(some, [False, True]).tokens) for some in turns]
    assert lengths[0] < sum(alone) - 10


def test_what_does_not_fit_has_no_verdict(tmp_path, caplog):
    directories = [
        make_policy(tmp_path / name, i, max_position_embeddings=40) for i, name in enumerate(["policy", "reference"])
    ]
    (scores,) = implicit_reward_judge(*directories)(PROMPTS[:1], [["word " * 100, "two"]])
    assert np.isnan(scores).tolist() == [True, False]
    assert "1 answers are too long to be judged" in caplog.text


def test_models_that_do_not_belong_together_are_refused(tmp_path):
    policy, reference = (make_policy(tmp_path / name, i) for i, name in enumerate(["policy", "reference"]))
    tokenizer = json.loads((tmp_path / "reference" / "tokenizer.json").read_text())
    tokenizer["added_tokens"].append(tokenizer["added_tokens"][-1] | {"id": 3000, "content": "<|more|>"})
    (tmp_path / "reference" / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(UserError, match="policy and .*reference have different vocabularies; reference must be"):
        implicit_reward_judge(policy, reference)(PROMPTS, ANSWERS)

    small = make_policy(tmp_path / "small", 3, vocab_size=100)
    with pytest.raises(UserError, match="small has a model of 100 tokens, but 2048 in its tokenizer"):
        implicit_reward_judge(policy, small)(PROMPTS, ANSWERS)

    files = tmp_path / "policy" / "model.safetensors"
    save_file({k: v for k, v in load_file(files).items() if "layers.1." not in k}, files)
    make_directory(tmp_path / "reference")
    with pytest.raises(UserError, match=r"^\S*policy cannot be read: .*layers.1.*\.$"):
        implicit_reward_judge(policy, reference)(PROMPTS, ANSWERS)
    with pytest.raises(UserError, match="nowhere not found"):
        implicit_reward_judge(policy, str(tmp_path / "nowhere"))(PROMPTS, ANSWERS)


def test_bf16_is_close(tmp_path):
    policy, reference = (make_policy(tmp_path / name, i) for i, name in enumerate(["policy", "reference"]))
    exact = implicit_reward_judge(policy, reference)(PROMPTS, ANSWERS)
    rounded = implicit_reward_judge(policy, reference, dtype="bf16")
    for scores, others in zip(exact, rounded(PROMPTS, ANSWERS), strict=True):
        np.testing.assert_allclose(scores, others, rtol=0.1, atol=0.5)
    assert {parameter.dtype for parameter in rounded._models[0].parameters()} == {torch.bfloat16}
    frequencies = [b for name, b in rounded._models[0].named_buffers() if name.endswith("inv_freq")]
    assert frequencies
    assert all(b.dtype == torch.float32 for b in frequencies)
