"""The formats that are compared: each turns pairs into micro-batches, and a micro-batch into log-probs.

============== =====================================================================================================
format         a micro-batch
============== =====================================================================================================
torchtune      ``batch_size`` pairs, chosen above rejected, padded: torchtune's collate, forward and log-prob function
paired_packed  every response on its own, packed into rows of ``pack_len`` tokens: Algorithm 2 of arXiv 2410.20305
prefix         ``batch_size`` prefix trees in a row
prefix_packed  prefix trees packed into rows of ``pack_len`` tokens
============== =====================================================================================================
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from torchtune import rlhf
from torchtune.data import CROSS_ENTROPY_IGNORE_IDX, padded_collate_dpo

from prefix_sharing.attention import rounding_of
from prefix_sharing.losses import take_pairs
from prefix_sharing.model import TreeTransformerDecoder, forward_flops
from prefix_sharing.rows import ExampleSizes, Plan, PrefixTree, Response, Row, TreeSize

Pairs = Sequence[Sequence[Response]]


@dataclass(frozen=True)
class MicroBatch:
    """What one forward pass takes.

    Attributes:
        pairs (list[int]): the pairs in it, by their index.
        inputs (Any): a ``Row``, or token ids and labels.
        num_tokens (int): tokens that are not padding.
        num_computed (int): tokens, with padding.
    """

    pairs: list[int]
    inputs: Any
    num_tokens: int
    num_computed: int


@dataclass(frozen=True)
class Format:
    """One way of computing a step.

    Attributes:
        name (str): see the table above.
        micro_batches (Callable[[Pairs], list[MicroBatch]]): of a step's pairs, on the device.
        log_probs (Callable[[MicroBatch], torch.Tensor]): of chosen and rejected, shape ``[P, 2]``.
    """

    name: str
    micro_batches: Callable[[Pairs], list[MicroBatch]]
    log_probs: Callable[[MicroBatch], torch.Tensor]


def build_formats(
    plain: nn.Module, tree: TreeTransformerDecoder, device: torch.device, *, batch_size: int, pack_len: int
) -> dict[str, Format]:
    """The formats, over models with the same parameters.

    Args:
        plain (nn.Module): the model as torchtune builds it.
        tree (TreeTransformerDecoder): the same with tree attention.
        device (torch.device): where they run.
        batch_size (int): pairs a micro-batch where there is a fixed number.
        pack_len (int): most tokens in a packed row.

    Returns:
        dict[str, Format]: by name.
    """
    round_length = rounding_of(tree.attention_backend)

    def rows(share_prefix: bool, packed: bool) -> Callable[[Pairs], list[MicroBatch]]:
        def micro_batches(pairs: Pairs) -> list[MicroBatch]:
            trees = [PrefixTree.from_responses(pair, share_prefix=share_prefix).size for pair in pairs]
            sizes = TreeSize(*(np.array(field) for field in zip(*trees, strict=True)))
            plan = Plan(
                sizes=ExampleSizes(sizes.num_tokens, forward_flops(tree, sizes), np.ones(len(pairs), dtype=np.int64)),
                examples_per_step=len(pairs),
                batch_size=None if packed else batch_size,
                pack_len=max(pack_len, int(sizes.num_tokens.max())) if packed else None,
            )
            made = []
            for examples in plan.epoch()[0].rows:
                row = Row.from_examples(
                    [pairs[i] for i in examples], share_prefix=share_prefix, round_length=round_length
                ).to(device)
                made.append(MicroBatch(examples, row, row.num_tokens, row.tokens.shape[1]))
            return made

        return micro_batches

    def log_probs_of_row(batch: MicroBatch) -> torch.Tensor:
        return take_pairs(batch.inputs.pairs, tree(batch.inputs).log_probs)[0]

    def padded(pairs: Pairs) -> list[MicroBatch]:
        made = []
        for first in range(0, len(pairs), batch_size):
            some = pairs[first : first + batch_size]
            input_ids, labels = padded_collate_dpo([as_torchtunes_sample(pair) for pair in some])
            num_tokens = sum(len(response.tokens) for pair in some for response in pair)
            inputs = (input_ids.to(device), labels.to(device))
            made.append(MicroBatch(list(range(first, first + len(some))), inputs, num_tokens, input_ids.numel()))
        return made

    def log_probs_of_padded(batch: MicroBatch) -> torch.Tensor:
        input_ids, labels = batch.inputs
        return rlhf.get_batch_log_probs(plain(input_ids), labels).view(2, -1).T

    formats = [
        Format("torchtune", padded, log_probs_of_padded),
        Format("paired_packed", rows(share_prefix=False, packed=True), log_probs_of_row),
        Format("prefix", rows(share_prefix=True, packed=False), log_probs_of_row),
        Format("prefix_packed", rows(share_prefix=True, packed=True), log_probs_of_row),
    ]
    return {each.name: each for each in formats}


def as_torchtunes_sample(pair: Sequence[Response]) -> dict[str, list[int]]:
    """A pair as torchtune's preference data sets give it: ids and labels of chosen and rejected."""
    sample = {}
    for name, response in zip(("chosen", "rejected"), pair, strict=True):
        sample[f"{name}_input_ids"] = response.tokens.tolist()
        sample[f"{name}_labels"] = np.where(response.scored, response.tokens, CROSS_ENTROPY_IGNORE_IDX).tolist()
    return sample
