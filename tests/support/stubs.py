"""Components for configs in tests."""

from pathlib import Path

import torch
import torch.nn.functional as F
from omegaconf import OmegaConf
from torchtune import config, training
from torchtune.models.llama3 import llama3

from prefix_sharing.distributed import this_rank
from prefix_sharing.losses import DPOLoss


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


class DivergingLoss(DPOLoss):
    """DPO, whose first loss of a Row is not a number at some of its calls in training on one rank."""

    def __init__(self, *, at_calls, on_rank=0, **kwargs):
        super().__init__(**kwargs)
        self._at_calls = at_calls
        self._on_rank = on_rank
        self._calls = 0

    def __call__(self, policy, reference, pairs):
        found = super().__call__(policy, reference, pairs)
        self._calls += torch.is_grad_enabled()
        if not torch.is_grad_enabled() or self._calls not in self._at_calls or this_rank().rank != self._on_rank:
            return found
        factor = torch.ones_like(found.losses)
        factor[0] = torch.nan
        return found._replace(losses=found.losses * factor)


class LossOfAnotherKind:
    """Not a ``prefix_sharing.losses.Loss``."""


def annotated_for_type_checkers(size: "OnlyForTypeCheckers"):  # noqa: F821
    pass
