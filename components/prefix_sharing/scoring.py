"""Log-probs of the scored tokens, and nothing else, from hidden states.

Only hidden states that predict a scored token reach the output projection, a chunk at a time, so that the logits of a
long Row over a large vocabulary are never in memory at once.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch.utils.checkpoint import checkpoint

from prefix_sharing.trees import Row

_LOGITS_AT_ONCE = 2**26
"""Maximum number of logits in memory at once, 256 MiB of fp32, unless those are of very few hidden states."""

_FEWEST_AT_ONCE = 1024
"""Hidden states projected at once at least. The backward of each chunk reads and writes the gradient of the whole
weight: 6 bytes of an entry for 6 operations with each hidden state, and a GPU does some 300 while it moves a byte."""


class ResponseLogProbs(NamedTuple):
    """What a model makes of a Row.

    Attributes:
        log_probs (torch.Tensor): summed log-prob of each response's scored tokens, by their weight, shape ``[E, K]``,
            in fp32 (fp64 if the logits are); 0 where nothing is scored.
        num_scored (torch.Tensor): number of those tokens, shape ``[E, K]``.
        confidence (torch.Tensor | None): for each response the mean over its scored tokens of the token's log-prob less
            the log of the sum of all tokens' squared probs, detached, shape ``[E, K]``. None unless the Row asks for
            it.
        whole_log_probs (torch.Tensor | None): summed log-prob of each example's first response with its prompt, shape
            ``[E]``; ``[0]`` unless the Row asks for it.
        whole_num_scored (torch.Tensor | None): number of those tokens, likewise.
        aux_loss (torch.Tensor | None): a scalar that the model itself adds to the loss, with its coefficient: how
            unevenly the tokens of the Row are shared out among experts. None where there is none.
    """

    log_probs: torch.Tensor
    num_scored: torch.Tensor
    confidence: torch.Tensor | None = None
    whole_log_probs: torch.Tensor | None = None
    whole_num_scored: torch.Tensor | None = None
    aux_loss: torch.Tensor | None = None


def chunk_size(vocab_size: int) -> int:
    """How many hidden states are projected at once."""
    return max(_FEWEST_AT_ONCE, _LOGITS_AT_ONCE // vocab_size)


def response_log_probs(
    project: Callable[[torch.Tensor], torch.Tensor], hidden: torch.Tensor, row: Row, vocab_size: int
) -> ResponseLogProbs:
    """Sums the log-probs of each response's scored tokens.

    Args:
        project (Callable[[torch.Tensor], torch.Tensor]): the model's output projection, ``[n, dim] -> [n, vocab]``.
        hidden (torch.Tensor): normalized hidden states of the tokens at ``row.predictor_index``, shape ``[p, dim]``.
        row (Row): the Row, on the device of ``hidden``.
        vocab_size (int): logits that the projection makes of a hidden state.

    Returns:
        ResponseLogProbs: of the Row's examples.
    """

    def score(hidden: torch.Tensor, predictor: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return _TargetLogProbs.apply(project(hidden), predictor, target, row.confidence)

    num_predictors, at_once = hidden.shape[0], chunk_size(vocab_size)
    scores = []
    for first in range(0, max(num_predictors, 1), at_once):
        last = min(first + at_once, num_predictors)
        tokens = slice(row.predictor_offsets[first], row.predictor_offsets[last])
        inputs = hidden[first:last], row.scored_predictor[tokens] - first, row.scored_target[tokens]
        if last < num_predictors and torch.is_grad_enabled():
            # The backward projects the chunk once more instead of keeping its logits. It begins with the last chunk,
            # which may as well keep them.
            scores.append(checkpoint(score, *inputs, use_reentrant=False))
        else:
            scores.append(score(*inputs))

    num_responses, num_whole = row.num_scored.numel(), len(row.whole_num_scored)

    def of_responses(of_tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        totals = of_tokens.new_zeros(num_responses + num_whole).index_add(0, row.scored_response, of_tokens)
        # Copies, because FSDP2 warns of modules that return views.
        return totals[:num_responses].view(row.num_scored.shape).clone(), totals[num_responses:].clone()

    log_probs, log_sums_of_squares = (torch.cat(values) for values in zip(*scores, strict=True))
    summed, whole = of_responses(log_probs * row.scored_weight.to(log_probs.dtype))
    confidence = None
    if row.confidence:
        confidence = of_responses(log_probs.detach() - log_sums_of_squares)[0] / row.num_scored.clamp(min=1)
    return ResponseLogProbs(summed, row.num_scored, confidence, whole, row.whole_num_scored)


class _TargetLogProbs(torch.autograd.Function):
    """``logits.log_softmax(-1)[predictor, target]``, with a backward that passes over the vocabulary less often.

    Where ``with_squares`` is true it also returns the log of the sum of squared probs, ``[predictor]``, without a
    gradient.
    """

    @staticmethod
    def forward(
        ctx: Any, logits: torch.Tensor, predictor: torch.Tensor, target: torch.Tensor, with_squares: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        # log_softmax, not logsumexp, to round as the plain computation does: on CPU they differ over large
        # vocabularies.
        log_probs = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
        ctx.save_for_backward(log_probs, predictor, target)
        ctx.dtype = logits.dtype
        squares = (2 * log_probs).logsumexp(-1)[predictor] if with_squares else log_probs.new_zeros(0)
        ctx.mark_non_differentiable(squares)
        return log_probs[predictor, target], squares

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor, _: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        log_probs, predictor, target = ctx.saved_tensors
        of_predictor = grad.new_zeros(len(log_probs)).index_add_(0, predictor, grad)
        grad_logits = log_probs.exp().mul_(-of_predictor[:, None])
        grad_logits.index_put_((predictor, target), grad, accumulate=True)
        return grad_logits.to(ctx.dtype), None, None, None
