"""Answers that are sampled beside training are those of the model, whatever is sampled beside them."""

import copy
import functools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchtune.models.gemma2 import gemma2

from plain import DIMS, FAMILIES
from prefix_sharing.hosts.torchtune import AnswerModel
from prefix_sharing.planning.batches import in_batches
from prefix_sharing.sampling import SamplingOptions, choose, sample_answers

CPU = torch.device("cpu")
GEMMA2 = DIMS | {"head_dim": 6, "intermediate_dim": 24, "hidden_capping_value": 2.0, "final_capping_value": 3.0}
GEMMA2 |= {"query_pre_attn_scalar": 3}
KEYS = [f"{i:032x}" for i in range(32)]


def random_prompts(num, vocab_size, longest=40):
    rng = np.random.default_rng(0)
    return [rng.integers(3, vocab_size, rng.integers(1, longest)) for _ in range(num)]


def torchtune_model(builder=FAMILIES["llama3"]):
    torch.manual_seed(0)
    plain = builder()
    for parameter in plain.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    model = AnswerModel(copy.deepcopy(plain), CPU, torch.float32)
    model.model.load_state_dict(plain.state_dict())

    def logits(tokens):
        with torch.no_grad():
            return plain(torch.from_numpy(tokens)[None])[0].float()

    return model, logits, plain.tok_embeddings.num_embeddings


def transformers_model(name):
    pytest.importorskip("transformers", minversion="5.24")
    import transformers

    from decoders import build
    from prefix_sharing.hosts.transformers import AnswerModel as OfTransformers

    plain = build(name).float().eval()
    for parameter in plain.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    with torch.device("meta"):
        empty = transformers.AutoModelForCausalLM.from_config(plain.config, attn_implementation="eager")
    model = OfTransformers(empty, CPU, torch.float32)
    model.model.load_state_dict(plain.state_dict())

    def logits(tokens):
        with torch.no_grad():
            return plain(torch.from_numpy(tokens)[None], use_cache=False).logits[0].float()

    return model, logits, plain.config.vocab_size, plain


MODELS = {
    "torchtune": lambda: torchtune_model(),
    "gemma2 of torchtune": lambda: torchtune_model(functools.partial(gemma2, **GEMMA2, sliding_window_size=64)),
    **{name: lambda name=name: transformers_model(name)[:3] for name in ("llama", "gemma2", "qwen3_moe")},
}


@pytest.mark.parametrize("name", MODELS)
def test_log_probs_are_those_of_the_plain_model(name):
    model, logits, vocab_size = MODELS[name]()
    prompts = random_prompts(6, vocab_size)
    options = SamplingOptions(
        num_answers=3, max_new_tokens=12, temperature=0.7, top_k=20, top_p=0.9, stop_tokens=(1, 2)
    )
    for prompt, answers in zip(prompts, sample_answers(model, prompts, KEYS[:6], options), strict=True):
        assert len(answers) == 3
        for answer in answers:
            whole = np.concatenate([prompt, answer.tokens])
            log_probs = logits(whole)[len(prompt) - 1 : -1].log_softmax(-1)
            expected = log_probs.gather(1, torch.from_numpy(answer.tokens)[:, None]).sum()
            assert answer.log_prob == pytest.approx(expected.item(), abs=1e-4)
            assert answer.is_complete == (answer.tokens[-1] in (1, 2))
            assert not set(answer.tokens[:-1]) & {1, 2}


def test_gemma_2_of_torchtune_takes_no_more_than_its_window():
    model, *_ = torchtune_model(functools.partial(gemma2, **GEMMA2, sliding_window_size=7))
    assert model.max_seq_len == 7


@pytest.mark.parametrize("name", MODELS)
def test_answers_do_not_depend_on_what_is_sampled_beside_them(name):
    model, _, vocab_size = MODELS[name]()
    prompts = random_prompts(4, vocab_size)
    options = SamplingOptions(num_answers=2, max_new_tokens=8, seed=3)
    together = sample_answers(model, prompts, KEYS[:4], options)
    assert any(not np.array_equal(*(answer.tokens for answer in answers)) for answers in together)
    for prompt, key, answers in zip(prompts, KEYS[:4], together, strict=True):
        (alone,) = sample_answers(model, [prompt], [key], options)
        for one, other in zip(answers, alone, strict=True):
            assert np.array_equal(one.tokens, other.tokens)


def test_greedy_answers_are_those_of_generate():
    model, _, vocab_size, plain = transformers_model("llama")
    prompts = random_prompts(32, vocab_size)
    options = SamplingOptions(max_new_tokens=16, temperature=0.0, stop_tokens=(5, 9))
    for prompt, (answer,) in zip(prompts, sample_answers(model, prompts, KEYS, options), strict=True):
        tokens = torch.from_numpy(prompt)[None]
        expected = plain.generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            max_new_tokens=16,
            do_sample=False,
            eos_token_id=[5, 9],
            pad_token_id=0,
        )
        assert answer.tokens.tolist() == expected[0, len(prompt) :].tolist()


@pytest.mark.parametrize("name", ["torchtune", "llama"])
def test_each_prompt_is_computed_once(name):
    model, _, vocab_size = MODELS[name]()
    prompts, computed = random_prompts(3, vocab_size), []
    layer = model.model.layers[0] if name == "torchtune" else model.model.model.layers[0]
    layer.register_forward_pre_hook(lambda module, inputs: computed.append(inputs[0].shape[:2]))
    sample_answers(model, prompts, KEYS[:3], SamplingOptions(num_answers=4, max_new_tokens=5))
    longest = max(map(len, prompts))
    assert computed == [(3, longest)] + [(12, 1)] * 4


@settings(max_examples=50)
@given(
    st.integers(1, 6),
    st.sampled_from([0.5, 1.0, 2.0]),
    st.sampled_from([None, 1, 3, 50]),
    st.sampled_from([1.0, 0.9, 0.3, 0.01]),
)
def test_tokens_are_chosen_as_often_as_transformers_truncated_distribution_says(seed, temperature, top_k, top_p):
    process = pytest.importorskip("transformers").generation.logits_process
    torch.manual_seed(seed)
    log_probs = torch.randn(1, 11).log_softmax(-1)
    scores = process.TemperatureLogitsWarper(temperature)(None, log_probs)
    if top_k is not None:
        scores = process.TopKLogitsWarper(top_k)(None, scores)
    if top_p < 1:
        scores = process.TopPLogitsWarper(top_p)(None, scores)
    expected = scores.softmax(-1)[0]
    num_draws = 20_000
    uniform = (torch.arange(num_draws, dtype=torch.float64) + 0.5) / num_draws
    options = SamplingOptions(temperature=temperature, top_k=top_k, top_p=top_p)
    tokens = choose(log_probs.expand(num_draws, -1), uniform, options)
    found = torch.bincount(tokens, minlength=11) / num_draws
    torch.testing.assert_close(found, expected, rtol=0, atol=2 / num_draws)


@settings(max_examples=50)
@given(st.lists(st.integers(1, 500), min_size=1, max_size=40), st.integers(1, 8), st.sampled_from([100, 4096]))
def test_batches_hold_every_prompt_once_and_no_more_tokens_than_allowed(lengths, num_answers, tokens_at_once):
    batches = list(in_batches([num_answers * (length + 16) for length in lengths], tokens_at_once))
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    for batch in batches:
        size = len(batch) * num_answers * (max(lengths[i] for i in batch) + 16)
        assert size <= tokens_at_once or len(batch) == 1
