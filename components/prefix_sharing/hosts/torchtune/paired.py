"""torchtune's own paired computation of DPO, with which the benchmark compares."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import nn
from torchtune.data import CROSS_ENTROPY_IGNORE_IDX, padded_collate_dpo
from torchtune.rlhf import get_batch_log_probs
from torchtune.rlhf.loss import DPOLoss

from prefix_sharing.hosts.torchtune.model import forward_flops
from prefix_sharing.trees import Response, TreeSizes


class PairedModel:
    """A model as torchtune builds it: pairs as a padded batch, chosen above rejected, and logits of every token.

    Args:
        model (Any): torchtune's ``TransformerDecoder``.
        beta (float): of the DPO loss.

    Attributes:
        name (str): of the library.
        model (Any): as given.
    """

    name = "torchtune"

    def __init__(self, model: Any, beta: float) -> None:
        self.model = model
        self._loss = DPOLoss(beta=beta)

    def batch(self, pairs: Sequence[Sequence[Response]]) -> tuple[torch.Tensor, torch.Tensor]:
        """Token ids and labels of pairs, by torchtune's collate function, each of shape ``[2 * P, s]``."""
        return padded_collate_dpo([as_torchtunes_sample(pair) for pair in pairs])

    def log_probs(self, input_ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Log-probs of chosen and rejected by torchtune's own function, shape ``[P, 2]``."""
        return get_batch_log_probs(self.logits(input_ids), labels).view(2, -1).T

    def logits(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Logits of every token, shape ``[2 * P, s, vocab]``."""
        return self.model(input_ids)

    @property
    def layers(self) -> nn.ModuleList:
        """The model's layers."""
        return self.model.layers

    @property
    def num_output_weights(self) -> int:
        """Weights of the output projection."""
        return self.model.tok_embeddings.weight.numel()

    def forward_flops(self, sizes: TreeSizes) -> np.ndarray:
        """See ``TreeModel.forward_flops``."""
        return forward_flops(self.model, sizes)

    def loss(self, log_probs: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
        """The sum of torchtune's DPO loss over pairs, given log-probs of shape ``[P, 2]``."""
        return self._loss(*log_probs.unbind(1), *reference.unbind(1))[0].sum()

    def flops(self, num_sequences: int, length: int, num_logits: int | None = None) -> float:
        """Floating-point operations of padded sequences, forward and backward.

        Args:
            num_sequences (int): sequences.
            length (int): tokens in each.
            num_logits (int | None): tokens whose logits are computed. Default: None, all.

        Returns:
            float: the operations.
        """
        size = TreeSizes(np.array([length]), np.array([length * (length + 1) / 2]), np.array([length]))
        total = 3 * num_sequences * float(self.forward_flops(size)[0])
        if num_logits is None:
            return total
        return total - 6.0 * self.num_output_weights * (num_sequences * length - num_logits)


def as_torchtunes_sample(pair: Sequence[Response]) -> dict[str, Any]:
    """A pair as torchtune's preference data sets give it: ids and labels of chosen and rejected."""
    sample = {}
    for name, response in zip(("chosen", "rejected"), pair, strict=True):
        sample[f"{name}_input_ids"] = response.tokens.tolist()
        sample[f"{name}_labels"] = np.where(response.scored, response.tokens, CROSS_ENTROPY_IGNORE_IDX).tolist()
    return sample
