"""The formats that are compared: each turns pairs into micro-batches, and a micro-batch into log-probs.

============== =====================================================================================================
format         a micro-batch
============== =====================================================================================================
trl            ``batch_size`` pairs, by TRL's DPOTrainer (``hosts/trl.py``)
torchtune      ``batch_size`` pairs, chosen above rejected, padded: torchtune's collate, forward and log-prob function
transformers   the same with the forward of a model of transformers
paired_packed  every response on its own, packed into Rows of ``pack_len`` tokens: Algorithm 2 of arXiv 2410.20305
prefix         ``batch_size`` prefix trees per Row
prefix_packed  prefix trees packed into Rows of ``pack_len`` tokens
============== =====================================================================================================

``paired_packed_varlen`` is ``paired_packed`` on FlashAttention over sequences of different lengths, whatever backend
the others have: what there is to choose on a GPU without trees.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from prefix_sharing.attention import rounding_of
from prefix_sharing.hosts import TreeModel
from prefix_sharing.hosts.torchtune import PairedModel
from prefix_sharing.losses import DPOLoss, take_pairs
from prefix_sharing.planning import ByLength, ExampleSizes, Fixed, Packing, Plan
from prefix_sharing.trees import PrefixTree, Response, Row, RowOptions, TreeSizes

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


def row_formats(
    plain: nn.Module, tree: TreeModel, device: torch.device, *, batch_size: int, pack_len: int, beta: float
) -> dict[str, Format]:
    """This project's formats.

    Args:
        plain (nn.Module): the model whose parameters ``tree`` shares.
        tree (TreeModel): the model with tree attention.
        device (torch.device): where it runs.
        batch_size (int): pairs per micro-batch where there is a fixed number.
        pack_len (int): maximum number of tokens in a packed Row.
        beta (float): of the DPO loss.

    Returns:
        dict[str, Format]: by name.
    """
    dpo = DPOLoss(beta=beta)

    def log_probs(batch: MicroBatch) -> torch.Tensor:
        return take_pairs(batch.inputs.pairs, tree(batch.inputs).log_probs)[0]

    def loss(batch: MicroBatch, reference: torch.Tensor) -> torch.Tensor:
        return dpo(tree(batch.inputs), reference[batch.pairs], batch.inputs.pairs).losses.sum()

    found = {}
    for name, share_prefix, packing in (
        ("paired_packed", False, ByLength(pack_len)),
        ("prefix", True, Fixed(batch_size)),
        ("prefix_packed", True, ByLength(pack_len)),
    ):
        options = RowOptions(share_prefix=share_prefix, round_length=rounding_of(tree.attention_backend))

        def micro_batches(pairs: Pairs, options: RowOptions = options, packing: Packing = packing) -> list[MicroBatch]:
            return _rows(pairs, tree, device, options, packing)

        found[name] = Format(name, plain, micro_batches, log_probs, loss)
    return found


def _rows(
    pairs: Pairs, tree: TreeModel, device: torch.device, options: RowOptions, packing: Packing
) -> list[MicroBatch]:
    trees = [PrefixTree.from_responses(pair, share_prefix=options.share_prefix) for pair in pairs]
    sizes = TreeSizes.of([each.size for each in trees])
    flops = 3 * tree.forward_flops(sizes)
    if isinstance(packing, ByLength):
        packing = ByLength(max(packing.pack_len, int(sizes.num_tokens.max())))
    plan = Plan(sizes=ExampleSizes(sizes.num_tokens, flops, np.ones(len(pairs), dtype=np.int64)), packing=packing)
    made = []
    for examples in plan.epoch()[0].rows:
        row = Row.from_examples([pairs[i] for i in examples], options=options).to(device)
        made.append(MicroBatch(examples, row, row.num_tokens, row.tokens.shape[1], float(flops[examples].sum())))
    return made


def paired_format(paired: PairedModel, device: torch.device, *, batch_size: int) -> Format:
    """The format of the model's own library.

    Args:
        paired (PairedModel): the model as its library builds it.
        device (torch.device): where it runs.
        batch_size (int): pairs per micro-batch.

    Returns:
        Format: the format.
    """

    def micro_batches(pairs: Pairs) -> list[MicroBatch]:
        made = []
        for indices in _in_batches(len(pairs), batch_size):
            some = [pairs[i] for i in indices]
            input_ids, labels = paired.batch(some)
            num_tokens = sum(len(response.tokens) for pair in some for response in pair)
            inputs = (input_ids.to(device), labels.to(device))
            made.append(MicroBatch(indices, inputs, num_tokens, input_ids.numel(), paired.flops(*input_ids.shape)))
        return made

    def log_probs(batch: MicroBatch) -> torch.Tensor:
        return paired.log_probs(*batch.inputs)

    def loss(batch: MicroBatch, reference: torch.Tensor) -> torch.Tensor:
        return paired.loss(log_probs(batch), reference[batch.pairs])

    return Format(paired.name, paired.model, micro_batches, log_probs, loss)


def trl_format(paired: PairedModel, device: torch.device, *, batch_size: int, beta: float) -> Format:
    """TRL's format, over a model of its own with the same weights.

    Args:
        paired (PairedModel): the model as its library builds it.
        device (torch.device): where it runs.
        batch_size (int): pairs per micro-batch.
        beta (float): of the DPO loss.

    Returns:
        Format: the format.

    Raises:
        ImportError: if TRL is not installed.
    """
    from prefix_sharing.hosts.trl import TRLModel

    trl = TRLModel(paired.model, device, beta)

    def micro_batches(pairs: Pairs) -> list[MicroBatch]:
        made = []
        for indices in _in_batches(len(pairs), batch_size):
            inputs = {name: tensor.to(device) for name, tensor in trl.batch([pairs[i] for i in indices]).items()}
            sequences, length = inputs["input_ids"].shape
            # Its output projection is computed for the tokens of responses only.
            flops = paired.flops(sequences, length, num_logits=int(inputs["completion_mask"].sum()))
            num_tokens = int(inputs["attention_mask"].sum())
            made.append(MicroBatch(indices, inputs, num_tokens, sequences * length, flops))
        return made

    def log_probs(batch: MicroBatch) -> torch.Tensor:
        return trl.log_probs(batch.inputs)

    def loss(batch: MicroBatch, reference: torch.Tensor) -> torch.Tensor:
        return trl.loss(batch.inputs, reference[batch.pairs])

    return Format("trl", trl.model, micro_batches, log_probs, loss)


def _in_batches(num_pairs: int, batch_size: int) -> list[list[int]]:
    """Indices of pairs, ``batch_size`` at a time."""
    return [list(range(first, min(first + batch_size, num_pairs))) for first in range(0, num_pairs, batch_size)]
