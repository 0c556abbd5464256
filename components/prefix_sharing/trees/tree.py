"""Prefix trees: the K response sequences of an example, laid out depth first with every shared prefix once.

A worked example. Three responses share ``a b``; two of them go on with ``c``::

    a b c d        index        0 1 2 3 4 5
    a b c e   ->   tokens       a b c d e f
    a b f          input_pos    0 1 2 3 3 2
                   subtree_end  6 6 5 4 5 6

Token ``i`` may see token ``j`` exactly if ``j <= i < subtree_end[j]``: the tokens that see ``j`` are ``j`` itself and
the subtree that hangs from it. That one integer per token is the whole attention mask.

An *index* is a place in that sequence, a *position* the depth of a token in its response.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

Span = tuple[int, int]
"""A half-open range of indices, ``(start, end)``."""


@dataclass(frozen=True, eq=False)
class Response:
    """One response sequence: prompt, template and answer, exactly as the tokenizer makes it for a plain run.

    Args:
        tokens (np.ndarray): token ids, shape ``[length]``.
        scored (np.ndarray): True where the token counts towards the response's log-prob, shape ``[length]``. The first
            token of a sequence is never scored, whatever this says: nothing predicts it.
    """

    tokens: np.ndarray
    scored: np.ndarray

    @property
    def scored_positions(self) -> np.ndarray:
        """Positions of the scored tokens, ascending."""
        return np.flatnonzero(self.scored[1:]) + 1

    @property
    def inputs(self) -> np.ndarray:
        """The tokens the model has to read: those before the last scored one."""
        scored_positions = self.scored_positions
        return self.tokens[: scored_positions[-1]] if len(scored_positions) else self.tokens[:0]


NO_RESPONSE = Response(np.empty(0, dtype=np.int64), np.empty(0, dtype=bool))
"""Takes the place of a response that is left out, so that the others keep their numbers."""


@dataclass
class Chain:
    """A maximal run of indices that go root, first child, first child, and so on; one for each leaf.

    Its queries are the tokens of ``span``; its keys are the tokens of ``ancestors``, then its own, causal and aligned
    at the lower right. The chains of a tree cover exactly its mask.
    """

    span: Span
    ancestors: list[Span]

    def shifted(self, offset: int) -> "Chain":
        """The same chain in a Row in which its tree begins at index ``offset``."""
        return Chain(
            (self.span[0] + offset, self.span[1] + offset),
            [(start + offset, end + offset) for start, end in self.ancestors],
        )


class TreeSize(NamedTuple):
    """What decides what a tree costs the model.

    Attributes:
        num_tokens (int): tokens the model reads.
        num_visible (int): token pairs (one sees the other or itself), that is, attention scores per head.
        num_predictors (int): tokens whose hidden state is projected to the vocabulary.
    """

    num_tokens: int
    num_visible: int
    num_predictors: int


@dataclass(frozen=True, eq=False)
class TreeSizes:
    """``TreeSize`` of many trees.

    Attributes:
        num_tokens (np.ndarray): shape ``[N]``.
        num_visible (np.ndarray): shape ``[N]``.
        num_predictors (np.ndarray): shape ``[N]``.
    """

    num_tokens: np.ndarray
    num_visible: np.ndarray
    num_predictors: np.ndarray

    @classmethod
    def of(cls, sizes: Sequence[TreeSize]) -> "TreeSizes":
        """The sizes of some trees as arrays."""
        columns = np.array(sizes, dtype=np.int64).reshape(-1, len(TreeSize._fields)).T
        return cls(*columns)


@dataclass(eq=False)
class PrefixTree:
    """The radix tree of K response sequences, laid out depth first.

    Sharing is a matter of tokens alone, so it is right whatever the tokenizer merges at the end of the prompt, whatever
    the template does, and even if the prompts differ. Tokens that no scored token looks back at are left out: the last
    scored token of a response is a target, never an input.

    Attributes:
        tokens (np.ndarray): token ids, depth first, shape ``[n]``.
        input_pos (np.ndarray): position of each token in its response, shape ``[n]``.
        subtree_end (np.ndarray): index just past the subtree that hangs from each token, shape ``[n]``.
        chains (list[Chain]): the attention as chains, ascending.
        predictor_index (np.ndarray): index of the token whose hidden state predicts each scored token, shape ``[m]``.
        targets (np.ndarray): id of each scored token, shape ``[m]``.
        responses (np.ndarray): response each scored token counts for, shape ``[m]``. A scored token inside a shared
            prefix is listed once for every response through it.
        num_scored (np.ndarray): number of scored tokens of each response, shape ``[K]``.
    """

    tokens: np.ndarray
    input_pos: np.ndarray
    subtree_end: np.ndarray
    chains: list[Chain]
    predictor_index: np.ndarray
    targets: np.ndarray
    responses: np.ndarray
    num_scored: np.ndarray

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def size(self) -> TreeSize:
        """What decides its cost: a token sees as many as its position says, and itself."""
        return TreeSize(len(self), int((self.input_pos + 1).sum()), len(np.unique(self.predictor_index)))

    @classmethod
    def from_responses(cls, responses: Sequence[Response], *, share_prefix: bool = True) -> "PrefixTree":
        """Lays out the responses of one example.

        Args:
            responses (Sequence[Response]): K >= 1 response sequences; the first child of every branching is the one
                with the earliest response.
            share_prefix (bool): False lays every response out as a tree of its own: the paired format, Algorithm 2 of
                https://arxiv.org/abs/2410.20305. Default: True.

        Returns:
            PrefixTree: the tree (or, where the responses share no first token, the forest), depth first.
        """
        inputs = [response.inputs for response in responses]
        layout = _Layout(inputs)
        everyone = list(range(len(responses)))
        for members in [everyone] if share_prefix else [[k] for k in everyone]:
            layout.add_subtree(members, depth=0)

        predictors, targets, owners = [], [], []
        for k, response in enumerate(responses):
            positions = response.scored_positions
            predictors.append(layout.index_of[k][positions - 1])
            targets.append(response.tokens[positions])
            owners.append(np.full(len(positions), k))
        num_scored = np.array([len(t) for t in targets])
        return cls(
            tokens=_concatenate(layout.tokens),
            input_pos=_concatenate(layout.positions),
            subtree_end=_concatenate(layout.subtree_end),
            chains=layout.chains,
            predictor_index=_concatenate(predictors),
            targets=_concatenate(targets),
            responses=_concatenate(owners),
            num_scored=num_scored,
        )


@dataclass
class _Layout:
    """What the depth-first walk writes down as it goes; ``index_of[k]`` are the indices of response k's inputs."""

    inputs: list[np.ndarray]
    length: int = 0
    tokens: list[np.ndarray] = field(default_factory=list)
    positions: list[np.ndarray] = field(default_factory=list)
    subtree_end: list[np.ndarray] = field(default_factory=list)
    chains: list[Chain] = field(default_factory=list)
    index_of: list[np.ndarray] = field(init=False)

    def __post_init__(self) -> None:
        self.index_of = [np.empty(len(tokens), dtype=np.int64) for tokens in self.inputs]

    def add_subtree(self, members: list[int], depth: int, ancestors: tuple[Span, ...] = ()) -> None:
        """Lays out everything below ``depth`` for responses that agree on their first ``depth`` tokens."""
        children: dict[int, list[int]] = {}
        for k in members:
            if len(self.inputs[k]) > depth:
                children.setdefault(int(self.inputs[k][depth]), []).append(k)

        for i, siblings in enumerate(children.values()):
            shared = common_prefix_length([self.inputs[k][depth:] for k in siblings])
            span = (self.length, self.length + shared)
            self.tokens.append(self.inputs[siblings[0]][depth : depth + shared])
            self.positions.append(np.arange(depth, depth + shared))
            subtree_end = np.empty(shared, dtype=np.int64)
            self.subtree_end.append(subtree_end)
            self.length = span[1]
            for k in siblings:
                self.index_of[k][depth : depth + shared] = np.arange(*span)

            if i == 0 and ancestors:
                self.chains[-1].span = (self.chains[-1].span[0], span[1])
            else:
                self.chains.append(Chain(span, list(ancestors)))
            self.add_subtree(siblings, depth + shared, _append_span(ancestors, span))
            subtree_end[:] = self.length


def common_prefix_length(sequences: Sequence[np.ndarray]) -> int:
    """How many tokens all sequences begin with."""
    first = sequences[0]
    length = min(len(s) for s in sequences)
    for other in sequences[1:]:
        differs = first[:length] != other[:length]
        if differs.any():
            length = int(differs.argmax())
    return length


def _append_span(spans: tuple[Span, ...], span: Span) -> tuple[Span, ...]:
    """Adds a span, joined to the last one where they touch."""
    if spans and spans[-1][1] == span[0]:
        return (*spans[:-1], (spans[-1][0], span[1]))
    return (*spans, span)


def _concatenate(parts: list[np.ndarray]) -> np.ndarray:
    return np.concatenate([np.empty(0, dtype=np.int64), *parts]).astype(np.int64)
