"""Rows: one or many prefix trees in one token sequence, as the tensors the model reads.

A micro-batch is always one Row; there is no batch dimension to pad.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple

import numpy as np
import torch

from prefix_sharing.trees.tree import Chain, PrefixTree, Response, Span

_NO_INDICES = np.empty(0, dtype=np.int64)


@dataclass(frozen=True)
class RowOptions:
    """How Rows are laid out, and which values of a response are computed from them.

    Attributes:
        share_prefix (bool): False computes every response on its own. Default: True.
        round_length (Callable[[int], int] | None): the Row length for a number of tokens, and the number of predictors
            to compute, such as ``bucket_length``. Default: None, no padding.
        tail_weight (float): weight of the scored tokens by which a response is longer than the shortest of its example.
            Default: 1.0.
        whole_sequence (bool): whether the first response of each example is also scored as a whole, prompt included.
            It is the same path of the tree. Default: False.
        confidence (bool): whether the model's confidence in each response is computed, too. Default: False.
    """

    share_prefix: bool = True
    round_length: Callable[[int], int] | None = None
    tail_weight: float = 1.0
    whole_sequence: bool = False
    confidence: bool = False

    def rounded(self, length: int) -> int:
        """A length with padding, at least 1."""
        return max(length, 1) if self.round_length is None else self.round_length(length)


@dataclass(frozen=True, eq=False)
class Row:
    """The input of one forward pass: ``[prefix, chosen, rejected] [prefix, ...] ... padding``.

    Shape notation: s Row length, E examples, K responses per example, P pairs, p tokens that predict something,
    m scored tokens (a token in a shared prefix counted once for each response).

    Attributes:
        tokens (torch.Tensor): token ids, shape ``[1, s]``.
        input_pos (torch.Tensor): position of each token in its response, shape ``[1, s]``.
        subtree_end (torch.Tensor): index just past the subtree of each token, shape ``[s]``; padding sees itself alone.
        predictor_index (torch.Tensor): indices of the tokens whose hidden state predicts a scored token, ascending,
            shape ``[p]``; 0 if nothing is scored, so that every parameter has a gradient, if a zero one. Padded like
            the Row, by repeating the last.
        scored_predictor (torch.Tensor): for each scored token the place of its predictor in ``predictor_index``,
            ascending, shape ``[m]``.
        scored_target (torch.Tensor): id of each scored token, shape ``[m]``.
        scored_response (torch.Tensor): ``example * K + response`` that each scored token counts for, shape ``[m]``;
            ``E * K + example`` where it counts for the whole sequence.
        scored_weight (torch.Tensor): what the log-prob of each scored token is multiplied with, shape ``[m]``; 1 unless
            long responses are discounted.
        num_scored (torch.Tensor): scored tokens of each response, shape ``[E, K]``; 0 where an example has fewer than K
            responses.
        whole_num_scored (torch.Tensor): tokens of each example's first response, all but the first, shape ``[E]``;
            ``[0]`` unless ``RowOptions.whole_sequence``.
        example_index (torch.Tensor): index of each example in its data set, shape ``[E]``.
        pairs (torch.Tensor): ``example * K + response`` of the chosen and the rejected response of each pair, shape
            ``[P, 2]``.
        labels (torch.Tensor): 1 for a desirable response, -1 for an undesirable one, 0 for one without a label, shape
            ``[E, K]``.
        predictor_offsets (list[int]): the scored tokens of predictor ``i`` are
            ``predictor_offsets[i]:predictor_offsets[i + 1]``, length p + 1.
        chains (list[Chain]): the attention as chains, ascending.
        predictor_spans (list[list[Span]]): the predictors of each chain, as spans of indices, ascending.
        num_tokens (int): tokens that are not padding.
        paired_tokens (int): tokens the same examples need if nothing is shared.
        num_labels (int): responses with a label.
        confidence (bool): whether the model is to compute its confidence.
    """

    tokens: torch.Tensor
    input_pos: torch.Tensor
    subtree_end: torch.Tensor
    predictor_index: torch.Tensor
    scored_predictor: torch.Tensor
    scored_target: torch.Tensor
    scored_response: torch.Tensor
    scored_weight: torch.Tensor
    num_scored: torch.Tensor
    whole_num_scored: torch.Tensor
    example_index: torch.Tensor
    pairs: torch.Tensor
    labels: torch.Tensor
    predictor_offsets: list[int]
    chains: list[Chain]
    predictor_spans: list[list[Span]]
    num_tokens: int
    paired_tokens: int
    num_labels: int
    confidence: bool

    @classmethod
    def from_examples(
        cls,
        examples: Sequence[Sequence[Response]],
        *,
        pairs: Sequence[np.ndarray] | None = None,
        labels: Sequence[np.ndarray] | None = None,
        example_index: Sequence[int] | None = None,
        num_responses: int | None = None,
        options: RowOptions = RowOptions(),
    ) -> "Row":
        """Lays examples out one after the other.

        Args:
            examples (Sequence[Sequence[Response]]): the responses of each example. No example at all gives a Row of
                padding, which costs a forward pass and contributes nothing.
            pairs (Sequence[np.ndarray] | None): the pairs of each example, chosen then rejected response, shape
                ``[pairs, 2]`` each. Default: None, the first response with each of the others.
            labels (Sequence[np.ndarray] | None): for each example the label of each response, see ``labels`` above.
                Default: None, no response has one.
            example_index (Sequence[int] | None): index of each example in its data set. Default: None, 0, 1, and so on.
            num_responses (int | None): K. Default: None, the most that an example of this Row has.
            options (RowOptions): layout and what is computed. Default: a shared prefix, no padding.

        Returns:
            Row: on the CPU.
        """
        if num_responses is None:
            num_responses = max((len(example) for example in examples), default=0)
        if pairs is None:
            pairs = [np.array([(0, k) for k in range(1, len(example))]).reshape(-1, 2) for example in examples]
        trees = [_tree_of(example, options) for example in examples]
        all_labels = np.zeros((len(examples), num_responses), dtype=np.int64)
        for e, of_example in enumerate(labels or []):
            all_labels[e, : len(of_example)] = of_example
        starts = np.cumsum([0, *(len(tree) for tree in trees)])
        num_tokens = int(starts[-1])
        scored = _ScoredTokens.of(trees, starts, num_responses, options)
        predictors = _Predictors.of(scored.predictor_index, options)
        # With no example, the first padding token is a chain: ranks that reduce gradients together all need some.
        chains = [c.shifted(start) for tree, start in zip(trees, starts.tolist(), strict=False) for c in tree.chains]
        chains = chains or [Chain((0, 1), [])]
        return cls(
            **_lay_out(trees, starts, options.rounded(num_tokens)),
            predictor_index=torch.from_numpy(predictors.indices),
            scored_predictor=torch.from_numpy(predictors.of_scored),
            scored_target=torch.from_numpy(scored.target),
            scored_response=torch.from_numpy(scored.response),
            scored_weight=torch.from_numpy(scored.weight),
            num_scored=torch.from_numpy(_num_scored(examples, trees, num_responses)),
            whole_num_scored=torch.tensor(
                [tree.num_scored[-1] for tree in trees if options.whole_sequence], dtype=torch.long
            ),
            example_index=torch.tensor(range(len(trees)) if example_index is None else example_index, dtype=torch.long),
            pairs=torch.from_numpy(_number_responses(pairs, num_responses)),
            labels=torch.from_numpy(all_labels),
            predictor_offsets=predictors.offsets,
            chains=chains,
            predictor_spans=_spans_of_chains(predictors.indices, chains),
            num_tokens=num_tokens,
            paired_tokens=sum(len(response.inputs) for example in examples for response in example),
            num_labels=int(np.count_nonzero(all_labels)),
            confidence=options.confidence,
        )

    def num_terms(self, mean_over: str) -> int:
        """How many terms there are of what a loss is the mean over, see ``Loss.mean_over``."""
        counts = {
            "pairs": len(self.pairs),
            "examples": len(self.example_index),
            "tokens": len(self.scored_target),
            "responses": self.num_labels,
        }
        return counts[mean_over]

    def to(self, device: torch.device) -> "Row":
        """The same Row with its tensors on ``device``."""
        return self.map_tensors(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> "Row":
        """The same Row with its tensors in pinned memory, from which copies to a GPU do not wait."""
        return self.map_tensors(torch.Tensor.pin_memory)

    def map_tensors(self, change: Callable[[torch.Tensor], torch.Tensor]) -> "Row":
        """The same Row with each of its tensors changed."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        changed: dict[str, Any] = {name: change(v) for name, v in values.items() if isinstance(v, torch.Tensor)}
        return replace(self, **changed)

    # Between processes a Row travels as arrays: torch would open a file for each of its tensors.
    def __getstate__(self) -> dict[str, Any]:
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: value.numpy() if isinstance(value, torch.Tensor) else value for name, value in values.items()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        for name, value in state.items():
            object.__setattr__(self, name, torch.from_numpy(value) if isinstance(value, np.ndarray) else value)


class _ScoredTokens(NamedTuple):
    """Every scored token of a Row by ascending predictor, see the attributes of ``Row``."""

    predictor_index: np.ndarray
    target: np.ndarray
    response: np.ndarray
    weight: np.ndarray

    @classmethod
    def of(
        cls, trees: Sequence[PrefixTree], starts: np.ndarray, num_responses: int, options: RowOptions
    ) -> "_ScoredTokens":
        indices, targets, responses, weights = [_NO_INDICES], [_NO_INDICES], [_NO_INDICES], [np.empty(0)]
        for e, (tree, start) in enumerate(zip(trees, starts, strict=False)):
            number = np.arange(len(tree.num_scored)) + e * num_responses
            if options.whole_sequence:  # the last of the tree's responses, which has no column among the K
                number[-1] = len(trees) * num_responses + e
            indices.append(tree.predictor_index + start)
            targets.append(tree.targets)
            responses.append(number[tree.responses])
            shortest = tree.num_scored.min()
            weights += [np.where(np.arange(n) < shortest, 1.0, options.tail_weight) for n in tree.num_scored]
        all_indices = np.concatenate(indices)
        order = np.argsort(all_indices, kind="stable")
        return cls(all_indices[order], *(np.concatenate(parts)[order] for parts in (targets, responses, weights)))


class _Predictors(NamedTuple):
    """The distinct predictors of a Row, padded, with where the scored tokens of each begin."""

    indices: np.ndarray
    of_scored: np.ndarray
    offsets: list[int]

    @classmethod
    def of(cls, predictor_index: np.ndarray, options: RowOptions) -> "_Predictors":
        index, of_scored, counts = np.unique(predictor_index, return_inverse=True, return_counts=True)
        if len(index) == 0:
            index, counts = np.zeros(1, dtype=np.int64), np.zeros(1, dtype=np.int64)
        padding = options.rounded(len(index)) - len(index)
        index, counts = np.pad(index, (0, padding), mode="edge"), np.pad(counts, (0, padding))
        return cls(index, of_scored, [0, *np.cumsum(counts).tolist()])


def _tree_of(example: Sequence[Response], options: RowOptions) -> PrefixTree:
    if options.whole_sequence:
        first = example[0]
        tokens = first.tokens[: len(first.inputs) + 1]
        example = [*example, Response(tokens, np.ones(len(tokens), dtype=bool))]
    return PrefixTree.from_responses(example, share_prefix=options.share_prefix)


def _lay_out(trees: Sequence[PrefixTree], starts: np.ndarray, length: int) -> dict[str, torch.Tensor]:
    tokens, input_pos = np.zeros(length, dtype=np.int64), np.zeros(length, dtype=np.int64)
    subtree_end = np.arange(1, length + 1)
    for tree, start in zip(trees, starts, strict=False):
        place = slice(start, start + len(tree))
        tokens[place] = tree.tokens
        input_pos[place] = tree.input_pos
        subtree_end[place] = tree.subtree_end + start
    return {
        "tokens": torch.from_numpy(tokens)[None],
        "input_pos": torch.from_numpy(input_pos)[None],
        "subtree_end": torch.from_numpy(subtree_end),
    }


def _num_scored(examples: Sequence[Sequence[Response]], trees: Sequence[PrefixTree], num_responses: int) -> np.ndarray:
    num_scored = np.zeros((len(trees), num_responses), dtype=np.int64)
    for e, (example, tree) in enumerate(zip(examples, trees, strict=True)):
        num_scored[e, : len(example)] = tree.num_scored[: len(example)]
    return num_scored


def _number_responses(pairs: Sequence[np.ndarray], num_responses: int) -> np.ndarray:
    """Pairs of each example as pairs of the Row, its responses numbered ``example * K + response``."""
    numbered = [of_one + e * num_responses for e, of_one in enumerate(pairs)]
    return np.concatenate([_NO_INDICES.reshape(0, 2), *numbered]).astype(np.int64)


def _spans_of_chains(predictor_index: np.ndarray, chains: Sequence[Chain]) -> list[list[Span]]:
    bounds = np.searchsorted(predictor_index, [chain.span[1] for chain in chains])
    return [_spans(of_chain) for of_chain in np.split(predictor_index, bounds)[: len(chains)]]


def _spans(indices: np.ndarray) -> list[Span]:
    """Ascending indices as runs of indices that follow one another."""
    cuts = np.flatnonzero(np.diff(indices) != 1) + 1
    return [(int(run[0]), int(run[-1]) + 1) for run in np.split(indices, cuts) if len(run)]


def bucket_length(num_tokens: int, multiple: int = 128) -> int:
    """Rounds a Row length up so that compiled attention sees few shapes.

    Up to ``32 * multiple`` tokens every multiple is a bucket; beyond, there are sixteen buckets to a doubling, so that
    padding stays below a sixteenth.

    Args:
        num_tokens (int): tokens in the Row.
        multiple (int): what every length is a multiple of. Default: 128, FlexAttention's block size.

    Returns:
        int: the Row length.
    """
    step = multiple
    while num_tokens > 32 * step:
        step *= 2
    return max(1, -(-num_tokens // step)) * step
