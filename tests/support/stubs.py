"""Components for configs in tests."""

from pathlib import Path

import torch
import torch.nn.functional as F
from omegaconf import OmegaConf
from torchtune import config, training
from torchtune.models.llama3 import llama3


class StubCheckpointer:
    """The weights of a small model, and an empty directory written."""

    def __init__(self, model, output_dir, **kwargs):
        self._output_dir = Path(output_dir)
        self._weights = config.instantiate(OmegaConf.create(model)).state_dict()

    def load_checkpoint(self):
        return {training.MODEL_KEY: dict(self._weights)}

    def save_checkpoint(self, *args, epoch, **kwargs):
        (self._output_dir / f"epoch_{epoch}").mkdir()


def alibi_llama3(**kwargs):
    """A model of torchtune's parts, with a bias of its own on attention scores: Press et al. 2021."""
    model = llama3(**kwargs)
    for layer in model.layers:
        layer.attn._attention_call = attend_with_alibi
    return model


def attend_with_alibi(q, k, v, **kwargs):
    position = torch.arange(q.shape[-2], dtype=torch.float32)
    slopes = 2.0 ** -torch.arange(1, 1 + q.shape[1])
    bias = slopes[:, None, None] * (position[None, :] - position[:, None])
    bias = bias.masked_fill(position[None, :] > position[:, None], float("-inf"))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)


class LossOfAnotherKind:
    """Not a ``prefix_sharing.losses.Loss``."""


def annotated_for_type_checkers(size: "OnlyForTypeCheckers"):  # noqa: F821
    pass
