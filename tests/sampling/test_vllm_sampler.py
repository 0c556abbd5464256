"""What vLLM is asked for, and what becomes of what it gives: by a stand-in with the names and shapes it documents."""

import sys
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch

from prefix_sharing.checkpoint import Checkpoint
from prefix_sharing.errors import UserError
from prefix_sharing.sampling import Policy, Prompt, SamplingOptions, vllm_sampler

PROMPTS = [Prompt(f"{i:032x}", (), np.arange(10 * i, 10 * i + 3)) for i in range(1, 4)]
OPTIONS = SamplingOptions(num_answers=2, max_new_tokens=5, temperature=0.7, top_p=0.9, stop_tokens=(7, 8), seed=3)


def policy(directory, adapter=None):
    checkpoint = Checkpoint(adapter=adapter or {})
    return Policy(None, checkpoint, directory, None, torch.device("cpu"), torch.bfloat16, 0)


@pytest.fixture
def engine(monkeypatch):
    """Answers with the prompt's first token, the seed's last digits, and a token that ends it or not."""
    seen = SimpleNamespace(built=[], params=[])

    class LLM:
        def __init__(self, **kwargs):
            seen.built.append(kwargs)

        def generate(self, prompts, sampling_params, use_tqdm):
            seen.params += [vars(params) for params in sampling_params]
            for prompt, params in zip(prompts, sampling_params, strict=True):
                tokens = [prompt["prompt_token_ids"][0], params.seed % 1000, 7 if params.seed % 2 else 9]
                log_probs = [{token: SimpleNamespace(logprob=-0.5)} for token in tokens]
                reason = "stop" if params.seed % 2 else "length"
                output = SimpleNamespace(token_ids=tokens, logprobs=log_probs, finish_reason=reason)
                yield SimpleNamespace(outputs=[output])

    module = ModuleType("vllm")
    module.__spec__ = SimpleNamespace()
    module.LLM, module.SamplingParams = LLM, SimpleNamespace
    monkeypatch.setitem(sys.modules, "vllm", module)
    return seen


def test_answers_are_those_of_their_prompts_and_seeds(engine, tmp_path):
    sample = vllm_sampler(policy(tmp_path), gpu_memory_utilization=0.5)
    found = dict(sample(PROMPTS, OPTIONS))
    assert engine.built == [
        {"model": str(tmp_path), "dtype": "bfloat16", "enable_prefix_caching": True, "gpu_memory_utilization": 0.5}
    ]
    seeds = [params.pop("seed") for params in engine.params]
    assert len(set(seeds)) == 6
    asked = {"temperature": 0.7, "top_p": 0.9, "top_k": -1, "max_tokens": 5, "stop_token_ids": [7, 8]}
    assert engine.params == [asked | {"logprobs": 0, "skip_special_tokens": False}] * 6
    for i, prompt in enumerate(PROMPTS):
        for answer, seed in zip(found[i], seeds[2 * i : 2 * i + 2], strict=True):
            assert answer.tokens.tolist()[:2] == [prompt.tokens[0], seed % 1000]
            assert (answer.log_prob, answer.is_complete) == (-1.5, seed % 2 == 1)
    # A part of them by itself, as when a pass goes on, gives the same.
    (again,) = sample(PROMPTS[1:2], OPTIONS)
    assert [answer.tokens.tolist() for answer in again[1]] == [answer.tokens.tolist() for answer in found[1]]
    assert len(engine.built) == 1


def test_what_vllm_cannot_read_is_refused(engine, tmp_path, monkeypatch):
    with pytest.raises(UserError, match="'sampler': vllm_sampler reads the policy from its directory"):
        vllm_sampler(policy(None))
    with pytest.raises(UserError, match="set save_adapter_weights_only: False"):
        vllm_sampler(policy(tmp_path, {"a": torch.ones(1)}))
    monkeypatch.delitem(sys.modules, "vllm")
    monkeypatch.setattr("prefix_sharing.sampling.vllm.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'torchtune-prefix-sharing\[vllm\]'"):
        vllm_sampler(policy(tmp_path))
