"""A model of any library, as the rest of the package knows it."""

from contextlib import AbstractContextManager

import numpy as np
import torch
from torch import nn

from prefix_sharing.attention import AttentionBackend, TreeMask
from prefix_sharing.checkpoint import Checkpoint
from prefix_sharing.scoring import ResponseLogProbs
from prefix_sharing.trees import Row, TreeSizes


class TreeModel(nn.Module):
    """From a Row to the log-probs of its responses. A host adds a subclass for the models of its library.

    Attributes:
        attention_backend (AttentionBackend): what computes attention.
        layers (nn.ModuleList): the layers in the order of the forward pass: what is compiled, checkpointed and sharded.
        max_seq_len (int): maximum number of tokens in a response sequence.
    """

    attention_backend: AttentionBackend
    layers: nn.ModuleList
    max_seq_len: int

    def forward(self, row: Row) -> ResponseLogProbs:
        """Computes every shared prefix once, and logits only where they predict a scored token.

        Args:
            row (Row): the Row, on the model's device.

        Returns:
            ResponseLogProbs: of the Row's examples.
        """
        raise NotImplementedError

    def new_mask(self, row: Row, *, at_predictors: bool = False, window: int | None = None) -> TreeMask:
        """The mask of a Row for this model's backend; arguments as for ``TreeMask``."""
        raise NotImplementedError

    @property
    def vocab_size(self) -> int:
        """Size of the vocabulary; token ids are from 0 to one less."""
        raise NotImplementedError

    def forward_flops(self, sizes: TreeSizes) -> np.ndarray:
        """Floating-point operations of a forward pass, by which work is shared out; may be called on the meta device.

        Args:
            sizes (TreeSizes): sizes of trees, shape ``[N]``.

        Returns:
            np.ndarray: shape ``[N]``; additive over the trees of a Row.
        """
        raise NotImplementedError

    @property
    def has_adapter(self) -> bool:
        """Whether the model was built with LoRA or one of its relatives."""
        raise NotImplementedError

    @property
    def is_quantized(self) -> bool:
        """Whether some of its weights are quantized, as the base of QLoRA is."""
        raise NotImplementedError

    def freeze_base(self, dtype: torch.dtype) -> None:
        """Leaves nothing but the adapter to be trained, where there is one.

        Args:
            dtype (torch.dtype): of the frozen weights of linear layers, which are never updated. Quantized ones stay
                so.
        """
        raise NotImplementedError

    def without_adapter(self) -> AbstractContextManager[None]:
        """A context in which the model is its base alone."""
        raise NotImplementedError

    def offload_activations(self, enabled: bool) -> AbstractContextManager[None]:
        """A context for forward passes that keeps activations in CPU memory, if enabled."""
        raise NotImplementedError

    def materialize(self, device: torch.device, parameter_device: torch.device | None = None) -> None:
        """Gives a model on the meta device memory, but no weights; sharded or not.

        Args:
            device (torch.device): where it runs.
            parameter_device (torch.device | None): where its parameters are kept. Default: None, on ``device``.
        """
        raise NotImplementedError

    def load_weights(self, checkpoint: Checkpoint, seed: int) -> None:
        """Copies a checkpoint's weights into the model, sharded or not, after checking that they fit; a collective.

        Args:
            checkpoint (Checkpoint): the checkpoint.
            seed (int): decides the adapter, if the model has one and the checkpoint none.

        Raises:
            UserError: if a tensor is missing, left over, or of another shape.
        """
        raise NotImplementedError

    def trainable_parameters(self) -> list[nn.Parameter]:
        """What the optimizer gets: all parameters, or those of the adapter."""
        return [parameter for parameter in self.parameters() if parameter.requires_grad]
