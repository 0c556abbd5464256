"""The formats that are compared: each turns pairs into micro-batches, and a micro-batch into log-probs.

============== =====================================================================================================
format         a micro-batch
============== =====================================================================================================
trl            ``batch_size`` pairs, by TRL's DPOTrainer (``benchmark/trl.py``)
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
from torchtune.rlhf.loss import DPOLoss as TorchtunesDPOLoss

from prefix_sharing.attention import rounding_of
from prefix_sharing.losses import DPOLoss, take_pairs
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
        flops (float): floating-point operations, by formula: forward and backward, padding included.
    """

    pairs: list[int]
    inputs: Any
    num_tokens: int
    num_computed: int
    flops: float


@dataclass(frozen=True)
class Format:
    """One way of computing a step.

    Attributes:
        name (str): see the table above.
        model (nn.Module): whose parameters a step changes; one for all of these formats.
        micro_batches (Callable[[Pairs], list[MicroBatch]]): of a step's pairs, on the device.
        log_probs (Callable[[MicroBatch], torch.Tensor]): of chosen and rejected, shape ``[P, 2]``.
        loss (Callable[[MicroBatch, torch.Tensor], torch.Tensor]): the sum over the pairs of a micro-batch, given the
            reference log-probs of all pairs, shape ``[N, 2]``.
    """

    name: str
    model: nn.Module
    micro_batches: Callable[[Pairs], list[MicroBatch]]
    log_probs: Callable[[MicroBatch], torch.Tensor]
    loss: Callable[[MicroBatch, torch.Tensor], torch.Tensor]


def build_formats(
    plain: nn.Module,
    tree: TreeTransformerDecoder,
    device: torch.device,
    *,
    batch_size: int,
    pack_len: int,
    beta: float,
) -> dict[str, Format]:
    """All formats but TRL's, over models with the same parameters.

    Args:
        plain (nn.Module): the model as torchtune builds it.
        tree (TreeTransformerDecoder): the same with tree attention.
        device (torch.device): where they run.
        batch_size (int): pairs a micro-batch where there is a fixed number.
        pack_len (int): most tokens in a packed row.
        beta (float): of the DPO loss.

    Returns:
        dict[str, Format]: by name.
    """
    round_length = rounding_of(tree.attention_backend)

    def rows(share_prefix: bool, packed: bool) -> Callable[[Pairs], list[MicroBatch]]:
        def micro_batches(pairs: Pairs) -> list[MicroBatch]:
            trees = [PrefixTree.from_responses(pair, share_prefix=share_prefix).size for pair in pairs]
            sizes = TreeSize(*(np.array(field) for field in zip(*trees, strict=True)))
            flops = 3 * forward_flops(tree, sizes)
            plan = Plan(
                sizes=ExampleSizes(sizes.num_tokens, flops, np.ones(len(pairs), dtype=np.int64)),
                examples_per_step=len(pairs),
                batch_size=None if packed else batch_size,
                pack_len=max(pack_len, int(sizes.num_tokens.max())) if packed else None,
            )
            made = []
            for examples in plan.epoch()[0].rows:
                row = Row.from_examples(
                    [pairs[i] for i in examples], share_prefix=share_prefix, round_length=round_length
                ).to(device)
                made.append(
                    MicroBatch(examples, row, row.num_tokens, row.tokens.shape[1], float(flops[examples].sum()))
                )
            return made

        return micro_batches

    def log_probs_of_row(batch: MicroBatch) -> torch.Tensor:
        return take_pairs(batch.inputs.pairs, tree(batch.inputs).log_probs)[0]

    def padded(pairs: Pairs) -> list[MicroBatch]:
        made = []
        for indices in in_batches(len(pairs), batch_size):
            some = [pairs[i] for i in indices]
            input_ids, labels = padded_collate_dpo([as_torchtunes_sample(pair) for pair in some])
            num_tokens = sum(len(response.tokens) for pair in some for response in pair)
            inputs = (input_ids.to(device), labels.to(device))
            flops = flops_of_padded(plain, *input_ids.shape)
            made.append(MicroBatch(indices, inputs, num_tokens, input_ids.numel(), flops))
        return made

    def log_probs_of_padded(batch: MicroBatch) -> torch.Tensor:
        input_ids, labels = batch.inputs
        return rlhf.get_batch_log_probs(plain(input_ids), labels).view(2, -1).T

    dpo = DPOLoss(beta=beta)
    torchtunes_dpo = TorchtunesDPOLoss(beta=beta)

    def loss_of_row(batch: MicroBatch, reference: torch.Tensor) -> torch.Tensor:
        return dpo(log_probs_of_row(batch), None, reference[batch.pairs]).losses.sum()

    def loss_of_padded(batch: MicroBatch, reference: torch.Tensor) -> torch.Tensor:
        log_probs = log_probs_of_padded(batch).unbind(1)
        return torchtunes_dpo(*log_probs, *reference[batch.pairs].unbind(1))[0].sum()

    formats = [
        Format("torchtune", plain, padded, log_probs_of_padded, loss_of_padded),
        Format("paired_packed", plain, rows(share_prefix=False, packed=True), log_probs_of_row, loss_of_row),
        Format("prefix", plain, rows(share_prefix=True, packed=False), log_probs_of_row, loss_of_row),
        Format("prefix_packed", plain, rows(share_prefix=True, packed=True), log_probs_of_row, loss_of_row),
    ]
    return {each.name: each for each in formats}


def in_batches(num_pairs: int, batch_size: int) -> list[list[int]]:
    """Indices of pairs, ``batch_size`` at a time."""
    return [list(range(first, min(first + batch_size, num_pairs))) for first in range(0, num_pairs, batch_size)]


def flops_of_padded(plain: nn.Module, num_sequences: int, length: int) -> float:
    """Floating-point operations of padded sequences, forward and backward, all of their logits included."""
    every_token = TreeSize(length, length * (length + 1) / 2, length)
    return 3 * num_sequences * float(forward_flops(plain, every_token))


def as_torchtunes_sample(pair: Sequence[Response]) -> dict[str, list[int]]:
    """A pair as torchtune's preference data sets give it: ids and labels of chosen and rejected."""
    sample = {}
    for name, response in zip(("chosen", "rejected"), pair, strict=True):
        sample[f"{name}_input_ids"] = response.tokens.tolist()
        sample[f"{name}_labels"] = np.where(response.scored, response.tokens, CROSS_ENTROPY_IGNORE_IDX).tolist()
    return sample
