"""Sampling by vLLM in the process that trains, on the same GPU and between rounds."""

import math
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from typing import Any

import numpy as np

from prefix_sharing.errors import ConfigError, UserError
from prefix_sharing.sampling.choose import SamplingOptions
from prefix_sharing.sampling.sampler import Answer, Policy, Prompt, answer_seed


def vllm_sampler(policy: Policy, **engine_args: Any) -> "VLLMSampler":
    """Samples with vLLM in the process that trains, for a config; needs ``torchtune-prefix-sharing[vllm]``.

    Written with the calls that vLLM documents, and tried with a stand-in for them; vLLM itself has not been run.

    The engine lives as long as the sampler, which is for a pass, so that training has the GPU's memory. A prompt is
    computed once for its answers by vLLM's prefix cache. Each answer has a seed of its own, made of the pass's, the
    prompt's key and its number.

    Args:
        policy (Policy): whose answers; its directory must hold the whole model.
        **engine_args (Any): of ``vllm.LLM``, such as ``gpu_memory_utilization`` and ``tensor_parallel_size``.

    Returns:
        VLLMSampler: the sampler.

    Raises:
        ConfigError: if the policy is an adapter, or in no directory.
        UserError: if vLLM is not installed.

    Example:
        .. code-block:: yaml

            sampler:
              _component_: prefix_sharing.sampling.vllm_sampler
              gpu_memory_utilization: 0.6
    """
    if find_spec("vllm") is None:
        raise UserError("vllm_sampler needs vLLM; pip install 'torchtune-prefix-sharing[vllm]' where there is a GPU.")
    if policy.directory is None:
        raise ConfigError("sampler", "vllm_sampler reads the policy from its directory, and this one has none")
    if policy.checkpoint.adapter and not (policy.directory / "adapter").is_dir():  # which is beside a whole model
        raise ConfigError("sampler", "vllm_sampler needs the whole model; set save_adapter_weights_only: False")
    return VLLMSampler(policy, engine_args)


class VLLMSampler:
    """See ``vllm_sampler``, and ``Sampler``."""

    def __init__(self, policy: Policy, engine_args: dict[str, Any]) -> None:
        from vllm import LLM

        dtype = str(policy.dtype).removeprefix("torch.")
        self._engine = LLM(model=str(policy.directory), dtype=dtype, enable_prefix_caching=True, **engine_args)

    def __call__(self, prompts: Sequence[Prompt], options: SamplingOptions) -> Iterator[tuple[int, list[Answer]]]:
        """See ``Sampler``."""
        from vllm import SamplingParams

        requests = [(prompt, k) for prompt in prompts for k in range(options.num_answers)]
        how = [
            SamplingParams(
                temperature=options.temperature,
                top_p=options.top_p,
                top_k=-1 if options.top_k is None else options.top_k,
                max_tokens=options.max_new_tokens,
                seed=answer_seed(options.seed, prompt.key, k),
                stop_token_ids=list(options.stop_tokens),
                logprobs=0,  # of the token that was sampled alone
                skip_special_tokens=False,
            )
            for prompt, k in requests
        ]
        given = [{"prompt_token_ids": prompt.tokens.tolist()} for prompt, _ in requests]
        answers = [_answer(output.outputs[0]) for output in self._engine.generate(given, how, use_tqdm=False)]
        for i in range(len(prompts)):
            yield i, answers[i * options.num_answers : (i + 1) * options.num_answers]


def _answer(output: Any) -> Answer:
    tokens = list(output.token_ids)
    of_tokens = [found[token].logprob for token, found in zip(tokens, output.logprobs or [], strict=False)]
    log_prob = math.fsum(of_tokens) if len(of_tokens) == len(tokens) else math.nan
    return Answer(np.array(tokens, dtype=np.int64), log_prob, output.finish_reason == "stop")
