"""The plain paired computation of DPO by a model of transformers, with which the benchmark compares."""

import numpy as np
import torch
from torch import nn
from typing_extensions import override

from prefix_sharing.hosts import torchtune
from prefix_sharing.hosts.transformers.model import forward_flops
from prefix_sharing.trees import TreeSizes


class PairedModel(torchtune.PairedModel):
    """A model as transformers builds it, between torchtune's collate, log-prob and loss functions."""

    name = "transformers"

    @override
    def logits(self, input_ids: torch.Tensor) -> torch.Tensor:
        # No attention mask: padding comes behind all that is scored, and attention is faster without one.
        return self.model(input_ids=input_ids, use_cache=False).logits

    @property
    @override
    def layers(self) -> nn.ModuleList:
        return self.model.get_decoder().layers

    @property
    @override
    def num_output_weights(self) -> int:
        return self.model.get_input_embeddings().weight.numel()

    @override
    def forward_flops(self, sizes: TreeSizes) -> np.ndarray:
        return forward_flops(self.model, sizes)
