"""Sampling by the process that trains: a prompt is computed once, and its answers go on from there side by side."""

from collections.abc import Iterator, Sequence

import numpy as np
import torch

from prefix_sharing.errors import UserError
from prefix_sharing.hosts import build_answer_model
from prefix_sharing.hosts.answer_model import AnswerModel
from prefix_sharing.planning.batches import in_batches
from prefix_sharing.sampling.choose import SamplingOptions, choose
from prefix_sharing.sampling.sampler import Answer, Policy, Prompt, Sampler

TOKENS_AT_ONCE = 16384
"""Tokens of a batch where nothing else is said."""


def in_process_sampler(policy: Policy, tokens_at_once: int = TOKENS_AT_ONCE) -> Sampler:
    """Samples in the process that trains, on its device, for a config.

    Args:
        policy (Policy): whose answers.
        tokens_at_once (int): tokens of a batch, prompts counted once for each answer: higher is faster and takes more
            memory. Default: 16384.

    Returns:
        Sampler: the sampler.

    Example:
        .. code-block:: yaml

            sampler:
              _component_: prefix_sharing.sampling.in_process_sampler
              tokens_at_once: 65536
    """
    model = build_answer_model(policy.model, policy.device, policy.dtype)
    model.load_weights(policy.checkpoint, policy.seed)

    def sample(prompts: Sequence[Prompt], options: SamplingOptions) -> Iterator[tuple[int, list[Answer]]]:
        return sample_in_batches(model, prompts, options, tokens_at_once)

    return sample


def sample_in_batches(
    model: AnswerModel, prompts: Sequence[Prompt], options: SamplingOptions, tokens_at_once: int = TOKENS_AT_ONCE
) -> Iterator[tuple[int, list[Answer]]]:
    """Samples answers to any number of prompts.

    Args:
        model (AnswerModel): a host's, with weights.
        prompts (Sequence[Prompt]): the prompts.
        options (SamplingOptions): how.
        tokens_at_once (int): as for ``in_process_sampler``.

    Yields:
        tuple[int, list[Answer]]: index of a prompt, and its answers; the longest prompts come first.

    Raises:
        UserError: if the model does not take as many tokens.
    """
    longest = max((len(prompt.tokens) for prompt in prompts), default=0) + options.max_new_tokens
    if longest > model.max_seq_len:
        raise UserError(
            f"{options.max_new_tokens} tokens after the longest prompt make {longest:,}, but the model takes "
            f"{model.max_seq_len:,}; lower max_new_tokens or prompts.max_prompt_len."
        )
    lengths = [options.num_answers * (len(prompt.tokens) + options.max_new_tokens) for prompt in prompts]
    for batch in in_batches(lengths, tokens_at_once):
        some = [prompts[i] for i in batch]
        answers = sample_answers(model, [p.tokens for p in some], [p.key for p in some], options)
        yield from zip(batch, answers, strict=True)


def draws(seed: int, prompt: str, answer: int, length: int) -> np.ndarray:
    """The random numbers of an answer, which do not depend on what is sampled beside it, or was before.

    Args:
        seed (int): the pass's.
        prompt (str): the prompt's key.
        answer (int): which of its answers.
        length (int): how many.

    Returns:
        np.ndarray: uniform in [0, 1), shape ``[length]``.
    """
    return np.random.default_rng([seed, answer, int(prompt, 16)]).random(length)


def sample_answers(
    model: AnswerModel, prompts: Sequence[np.ndarray], keys: Sequence[str], options: SamplingOptions
) -> list[list[Answer]]:
    """Samples answers to a few prompts, all at once.

    Args:
        model (AnswerModel): a host's, with weights.
        prompts (Sequence[np.ndarray]): token ids of each, shape ``[L]``.
        keys (Sequence[str]): what decides the random numbers of each, in hexadecimal digits.
        options (SamplingOptions): how.

    Returns:
        list[list[Answer]]: n answers to each prompt.
    """
    n, longest = options.num_answers, max(map(len, prompts))
    tokens = torch.zeros(len(prompts), longest, dtype=torch.long)
    is_token = torch.zeros_like(tokens, dtype=torch.bool)
    for i, prompt in enumerate(prompts):
        tokens[i, longest - len(prompt) :] = torch.from_numpy(prompt)
        is_token[i, longest - len(prompt) :] = True
    numbers = np.stack([draws(options.seed, key, k, options.max_new_tokens) for key in keys for k in range(n)])
    uniform = torch.from_numpy(numbers).to(model.device)
    stop = torch.tensor(options.stop_tokens, dtype=torch.long, device=model.device)

    logits = model.prefill(tokens.to(model.device), is_token.to(model.device), options.max_new_tokens)
    logits = logits.repeat_interleave(n, dim=0)
    model.repeat(n)
    ended = torch.zeros(len(prompts) * n, dtype=torch.bool, device=model.device)
    chosen, log_probs, lengths = [], [], torch.zeros(len(ended), dtype=torch.long, device=model.device)
    for t in range(options.max_new_tokens):
        distribution = logits.log_softmax(-1)
        token = choose(distribution, uniform[:, t], options)
        chosen.append(token)
        log_probs.append(distribution.gather(1, token[:, None])[:, 0])
        lengths += ~ended
        ended |= torch.isin(token, stop)
        if t + 1 == options.max_new_tokens or ended.all():
            break
        logits = model.step(token)
    all_tokens, all_log_probs = torch.stack(chosen, 1).cpu().numpy(), torch.stack(log_probs, 1).cpu().double().numpy()
    answers = [
        Answer(row[:length], float(row_log_probs[:length].sum()), bool(has_ended))
        for row, row_log_probs, length, has_ended in zip(
            all_tokens, all_log_probs, lengths.tolist(), ended.tolist(), strict=True
        )
    ]
    return [answers[i : i + n] for i in range(0, len(answers), n)]
