"""How much better a policy's answers to held-out prompts have become, by the judge."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class HeldOut:
    """A policy's judged answers to the held-out prompts.

    Attributes:
        scores (np.ndarray): shape ``[P, n]``; NaN where there is no verdict.
        lengths (np.ndarray): tokens of each answer, shape ``[P, n]``.
        log_probs (np.ndarray): of each answer by the policy, shape ``[P, n]``.
        share_complete (float): of answers that ended by themselves.
    """

    scores: np.ndarray
    lengths: np.ndarray
    log_probs: np.ndarray
    share_complete: float

    @classmethod
    def of_rows(cls, rows: Sequence[dict[str, Any]]) -> "HeldOut":
        """From the rows of a table."""
        return cls(
            np.array([row["scores"] for row in rows], dtype=np.float64),
            np.array([[len(answer) for answer in row["answers"]] for row in rows], dtype=np.float64),
            np.array([row["log_probs"] for row in rows], dtype=np.float64),
            float(np.mean([row["complete"] for row in rows])),
        )


def compare(new: HeldOut, before: HeldOut, first: HeldOut) -> dict[str, float]:
    """What a round has changed.

    Args:
        new (HeldOut): the policy after the round.
        before (HeldOut): the policy before it.
        first (HeldOut): the first policy.

    Returns:
        dict[str, float]: ``score``, the judged mean; ``score_gain`` over the first policy, and
        ``length_controlled_gain``, what is left of it at equal length; ``win_rate_over_last`` and
        ``win_rate_over_first``, ties as halves; ``answer_length`` in tokens; ``entropy`` in nats a token, estimated by
        the answers' own log-probs; ``share_complete``.
    """
    gain = float(np.nanmean(new.scores) - np.nanmean(first.scores))
    longer = float(new.lengths.mean() - first.lengths.mean())
    known = ~np.isnan(new.log_probs)  # some servers do not tell
    return {
        "score": float(np.nanmean(new.scores)),
        "score_gain": gain,
        "length_controlled_gain": gain - score_per_token([new, first]) * longer,
        "win_rate_over_last": win_rate(new.scores, before.scores),
        "win_rate_over_first": win_rate(new.scores, first.scores),
        "answer_length": float(new.lengths.mean()),
        "entropy": float(-new.log_probs[known].sum() / new.lengths[known].sum()) if known.any() else float("nan"),
        "share_complete": new.share_complete,
    }


def win_rate(scores: np.ndarray, others: np.ndarray) -> float:
    """How often an answer is better than one of another policy to the same prompt, ties as halves.

    Args:
        scores (np.ndarray): shape ``[P, n]``.
        others (np.ndarray): shape ``[P, m]``.

    Returns:
        float: over all pairs of answers with verdicts.
    """
    difference = scores[:, :, None] - others[:, None, :]
    difference = difference[~np.isnan(difference)]
    return float(np.mean((np.sign(difference) + 1) / 2)) if len(difference) else float("nan")


def score_per_token(policies: Sequence[HeldOut]) -> float:
    """How much more a longer answer scores, a token: the slope within each prompt's answers by a policy.

    With one answer to each prompt, it is the slope within a policy's answers, which prompts may have a part in.

    Args:
        policies (Sequence[HeldOut]): whose answers are compared each with those of the same policy.

    Returns:
        float: 0 where all answers are of one length.
    """
    lengths, scores = [], []
    for policy in policies:
        several = policy.scores.shape[1] > 1
        answers_of = zip(policy.lengths, policy.scores, strict=True) if several else [(policy.lengths, policy.scores)]
        for of_prompt, scored in answers_of:
            usable = ~np.isnan(scored)
            if usable.any():
                lengths.append(of_prompt[usable] - of_prompt[usable].mean())
                scores.append(scored[usable] - scored[usable].mean())
    if not lengths:
        return 0.0
    x, y = np.concatenate(lengths), np.concatenate(scores)
    return float((x * y).sum() / (x * x).sum()) if (x * x).sum() > 0 else 0.0
