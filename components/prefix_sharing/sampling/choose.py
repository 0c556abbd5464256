"""Choosing the next token."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class SamplingOptions:
    """How answers are sampled.

    Attributes:
        num_answers (int): n, answers to each prompt.
        max_new_tokens (int): maximum number of tokens in an answer.
        temperature (float): logits are divided by it; 0 takes the most likely token each time.
        top_k (int | None): only the k most likely tokens. None for all.
        top_p (float): only the most likely tokens that together have this probability (Holtzman et al. 2020).
        stop_tokens (tuple[int, ...]): tokens that end an answer, and belong to it.
        seed (int): decides every answer, see ``draws``.
    """

    num_answers: int = 1
    max_new_tokens: int = 128
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0
    stop_tokens: tuple[int, ...] = ()
    seed: int = 0


def choose(log_probs: torch.Tensor, draws: torch.Tensor, options: SamplingOptions) -> torch.Tensor:
    """Chooses a token of each distribution, by the inverse of its cumulative distribution.

    Args:
        log_probs (torch.Tensor): of the model, shape ``[B, vocab]``.
        draws (torch.Tensor): uniform in [0, 1), one for each, shape ``[B]``, in fp64.
        options (SamplingOptions): temperature, and how the distribution is truncated.

    Returns:
        torch.Tensor: token ids, shape ``[B]``.
    """
    if options.temperature == 0:
        return log_probs.argmax(-1)
    scaled = log_probs.double() / options.temperature
    if options.top_k is None and options.top_p >= 1:
        return _by_inverse(scaled.softmax(-1), draws)
    # Most likely first.
    most = scaled.shape[-1] if options.top_k is None else min(options.top_k, scaled.shape[-1])
    ordered, tokens = scaled.topk(most, dim=-1)
    probs = ordered.softmax(-1)
    # A token is kept if those before it do not have all of top_p; the first one is always.
    goes = probs.cumsum(-1) - probs >= options.top_p
    goes[:, 0] = False
    return tokens.gather(1, _by_inverse(probs.masked_fill(goes, 0.0), draws)[:, None])[:, 0]


def _by_inverse(probs: torch.Tensor, draws: torch.Tensor) -> torch.Tensor:
    """Places in distributions that need not sum to 1, none of them where the probability is 0."""
    up_to = probs.cumsum(-1)
    place = torch.searchsorted(up_to, draws[:, None] * up_to[:, -1:], right=True)[:, 0]
    # Where rounding leads beyond the last place that may be chosen.
    last = probs.shape[-1] - 1 - (probs > 0).flip(-1).int().argmax(-1)
    return torch.minimum(place, last)
