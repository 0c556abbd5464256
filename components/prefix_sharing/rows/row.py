"""Rows: one or many prefix trees in one token sequence, as the tensors the model reads.

A micro-batch is always one row; there is no batch dimension to pad.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch

from prefix_sharing.rows.tree import Chain, PrefixTree, Response, Span


@dataclass(frozen=True)
class Row:
    """The input of one forward pass: ``[prefix, chosen, rejected] [prefix, ...] ... padding``.

    Shape notation: s row length, E examples, K responses an example, P pairs, p rows that predict something,
    m scored tokens (a token in a shared prefix counted once for each response).

    Attributes:
        tokens (torch.Tensor): token ids, shape ``[1, s]``.
        input_pos (torch.Tensor): position of each token in its response, shape ``[1, s]``.
        subtree_end (torch.Tensor): row index just past the subtree of each token, shape ``[s]``; padding sees itself
            alone.
        predictors (torch.Tensor): rows whose hidden state predicts a scored token, ascending, shape ``[p]``; the first
            row if nothing is scored, so that every parameter has a gradient, if a zero one. Padded like the row, by
            repeating the last.
        scored_predictor (torch.Tensor): for each scored token the index of its row in ``predictors``, ascending, shape
            ``[m]``.
        scored_target (torch.Tensor): id of each scored token, shape ``[m]``.
        scored_response (torch.Tensor): ``example * K + response`` that each scored token counts for, shape ``[m]``.
        scored_weight (torch.Tensor): what the log-prob of each scored token is multiplied with, shape ``[m]``; 1 unless
            long responses are discounted.
        num_scored (torch.Tensor): scored tokens of each response, shape ``[E, K]``; 0 where an example has fewer than K
            responses.
        examples (torch.Tensor): index of each example in its data set, shape ``[E]``.
        pairs (torch.Tensor): ``example * K + response`` of the chosen and the rejected response of each pair, shape
            ``[P, 2]``.
        predictor_offsets (list[int]): the scored tokens of predictor ``i`` are
            ``predictor_offsets[i]:predictor_offsets[i + 1]``, length p + 1.
        chains (list[Chain]): the attention as chains, in row order.
        predictor_spans (list[list[Span]]): the predictors of each chain, as spans of rows in row order.
        num_tokens (int): tokens that are not padding.
        paired_tokens (int): tokens the same examples need if nothing is shared.
    """

    tokens: torch.Tensor
    input_pos: torch.Tensor
    subtree_end: torch.Tensor
    predictors: torch.Tensor
    scored_predictor: torch.Tensor
    scored_target: torch.Tensor
    scored_response: torch.Tensor
    scored_weight: torch.Tensor
    num_scored: torch.Tensor
    examples: torch.Tensor
    pairs: torch.Tensor
    predictor_offsets: list[int]
    chains: list[Chain]
    predictor_spans: list[list[Span]]
    num_tokens: int
    paired_tokens: int

    @classmethod
    def from_examples(
        cls,
        examples: Sequence[Sequence[Response]],
        *,
        pairs: Sequence[np.ndarray] | None = None,
        indices: Sequence[int] | None = None,
        share_prefix: bool = True,
        ld_alpha: float = 1.0,
        score_whole: bool = False,
        num_responses: int | None = None,
        round_length: Callable[[int], int] | None = None,
    ) -> "Row":
        """Lays examples out one after the other.

        Args:
            examples (Sequence[Sequence[Response]]): the responses of each example. No example at all gives a row of
                padding, which costs a forward pass and contributes nothing.
            pairs (Sequence[np.ndarray] | None): the pairs of each example, chosen then rejected response, shape
                ``[pairs, 2]`` each. Default: None, the first response with each of the others.
            indices (Sequence[int] | None): index of each example in its data set. Default: None, 0, 1, and so on.
            share_prefix (bool): False computes every response on its own. Default: True.
            ld_alpha (float): weight of the scored tokens by which a response is longer than the shortest of its
                example. Default: 1.0.
            score_whole (bool): whether each example, all of K responses, gets one more: its first response with every
                token scored, the prompt's, too. It is the same path of the tree. Default: False.
            num_responses (int | None): K. Default: None, the most that an example of this row has.
            round_length (Callable[[int], int] | None): the row length for a number of tokens, and the number of
                predictors to compute, such as ``bucket_length``. Default: None, no padding.

        Returns:
            Row: on the CPU.
        """
        if pairs is None:
            pairs = [np.array([(0, k) for k in range(1, len(e))]).reshape(-1, 2) for e in examples]
        if num_responses is None:
            num_responses = max((len(e) for e in examples), default=0)
        if score_whole:
            examples = [[*e, _with_all_scored(e[0])] for e in examples]
            num_responses += 1
        trees = [PrefixTree.from_responses(example, share_prefix=share_prefix) for example in examples]
        num_tokens = sum(len(tree) for tree in trees)
        length = max(num_tokens, 1) if round_length is None else round_length(num_tokens)
        tokens = np.zeros(length, dtype=np.int64)
        input_pos = np.zeros(length, dtype=np.int64)
        subtree_end = np.arange(1, length + 1)
        num_scored = np.zeros((len(trees), num_responses), dtype=np.int64)
        predictors, targets, owners, weights, chains = [], [], [], [], []
        offset = 0
        for e, tree in enumerate(trees):
            rows = slice(offset, offset + len(tree))
            tokens[rows] = tree.tokens
            input_pos[rows] = tree.input_pos
            subtree_end[rows] = tree.subtree_end + offset
            num_scored[e, : len(tree.num_scored)] = tree.num_scored
            predictors.append(tree.predictors + offset)
            targets.append(tree.targets)
            owners.append(tree.responses + e * num_responses)
            shortest = min(tree.num_scored)
            weights += [np.where(np.arange(n) < shortest, 1.0, ld_alpha) for n in tree.num_scored]
            chains += [chain.shifted(offset) for chain in tree.chains]
            offset += len(tree)

        none = np.empty(0, dtype=np.int64)
        all_predictors = np.concatenate([none, *predictors])
        order = np.argsort(all_predictors, kind="stable")
        unique_predictors, scored_predictor, counts = np.unique(
            all_predictors[order], return_inverse=True, return_counts=True
        )
        if len(unique_predictors) == 0:
            unique_predictors, counts = np.zeros(1, dtype=np.int64), np.zeros(1, dtype=np.int64)
        if round_length is not None:
            padding = round_length(len(unique_predictors)) - len(unique_predictors)
            unique_predictors, counts = (
                np.pad(unique_predictors, (0, padding), mode="edge"),
                np.pad(counts, (0, padding)),
            )
        # With no example, the first padding token is a chain: ranks that reduce gradients together all need some.
        chains = chains or [Chain((0, 1), [])]
        bounds = np.searchsorted(unique_predictors, [chain.span[1] for chain in chains])
        return cls(
            tokens=torch.from_numpy(tokens)[None],
            input_pos=torch.from_numpy(input_pos)[None],
            subtree_end=torch.from_numpy(subtree_end),
            predictors=torch.from_numpy(unique_predictors),
            scored_predictor=torch.from_numpy(scored_predictor),
            scored_target=torch.from_numpy(np.concatenate([none, *targets])[order]),
            scored_response=torch.from_numpy(np.concatenate([none, *owners])[order]),
            scored_weight=torch.from_numpy(np.concatenate([np.empty(0), *weights])[order]),
            num_scored=torch.from_numpy(num_scored),
            examples=torch.arange(len(trees)) if indices is None else torch.tensor(indices, dtype=torch.int64),
            pairs=torch.from_numpy(
                np.concatenate(
                    [none.reshape(0, 2), *(of_one + e * num_responses for e, of_one in enumerate(pairs))]
                ).astype(np.int64)
            ),
            predictor_offsets=[0, *np.cumsum(counts).tolist()],
            chains=chains,
            predictor_spans=[_spans(of_chain) for of_chain in np.split(unique_predictors, bounds)[: len(chains)]],
            num_tokens=num_tokens,
            # The paired format has no sequence for what is scored once more.
            paired_tokens=sum(tree.paired_tokens for tree in trees)
            - sum(len(e[-1].inputs) for e in examples if score_whole),
        )

    def num_terms(self, mean_over: str) -> int:
        """How many ``pairs``, ``examples`` or scored ``tokens`` there are, whichever a loss is the mean over."""
        return {"pairs": len(self.pairs), "examples": len(self.examples), "tokens": len(self.scored_target)}[mean_over]

    def to(self, device: torch.device) -> "Row":
        """The same row with its tensors on ``device``."""
        return self.map_tensors(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> "Row":
        """The same row with its tensors in pinned memory, from which copies to a GPU do not wait."""
        return self.map_tensors(torch.Tensor.pin_memory)

    def map_tensors(self, change: Callable[[torch.Tensor], torch.Tensor]) -> "Row":
        """The same row with each of its tensors changed."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(self, **{n: change(v) for n, v in values.items() if isinstance(v, torch.Tensor)})

    # Between processes a row travels as arrays: torch would open a file for each of its tensors.
    def __getstate__(self) -> dict[str, Any]:
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: value.numpy() if isinstance(value, torch.Tensor) else value for name, value in values.items()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        for name, value in state.items():
            object.__setattr__(self, name, torch.from_numpy(value) if isinstance(value, np.ndarray) else value)


def _with_all_scored(response: Response) -> Response:
    tokens = response.tokens[: len(response.inputs) + 1]
    return Response(tokens, np.ones(len(tokens), dtype=bool))


def _spans(rows: np.ndarray) -> list[Span]:
    """Ascending rows as runs of rows that follow one another."""
    cuts = np.flatnonzero(np.diff(rows) != 1) + 1
    return [(int(run[0]), int(run[-1]) + 1) for run in np.split(rows, cuts) if len(run)]


def bucket_length(num_tokens: int, multiple: int = 128) -> int:
    """Rounds a row length up so that compiled attention sees few shapes.

    Up to ``32 * multiple`` tokens every multiple is a bucket; beyond, there are sixteen buckets to a doubling, so that
    padding stays below a sixteenth.

    Args:
        num_tokens (int): tokens in the row.
        multiple (int): what every length is a multiple of. Default: 128, FlexAttention's block size.

    Returns:
        int: the row length.
    """
    step = multiple
    while num_tokens > 32 * step:
        step *= 2
    return max(1, -(-num_tokens // step)) * step
