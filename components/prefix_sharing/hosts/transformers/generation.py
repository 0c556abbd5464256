"""Generation from transformers' own model, a token at a time, with its KV cache."""

from typing import Any, cast

import torch
from transformers import DynamicCache, PreTrainedModel

from prefix_sharing.checkpoint import Checkpoint
from prefix_sharing.hosts.transformers.model import materialize
from prefix_sharing.hosts.transformers.weights import load_weights


class AnswerModel:
    """A model as transformers builds it, on one device.

    Args:
        model (PreTrainedModel): without weights, on the meta device.
        device (torch.device): where it runs.
        dtype (torch.dtype): of its weights.

    Attributes:
        model (PreTrainedModel): the model.
        device (torch.device): where it runs.
        max_seq_len (int): maximum number of tokens in prompt and answer.
    """

    def __init__(self, model: PreTrainedModel, device: torch.device, dtype: torch.dtype) -> None:
        self.model = model
        materialize(model, device)
        model.eval()
        self.max_seq_len: int = model.config.max_position_embeddings
        self.device, self._dtype = device, dtype

    def load_weights(self, checkpoint: Checkpoint, seed: int) -> None:
        """See ``TreeModel.load_weights``."""
        load_weights(self.model, checkpoint, seed)

    def prefill(self, tokens: torch.Tensor, is_token: torch.Tensor, max_new_tokens: int) -> torch.Tensor:
        """See ``hosts.answer_model.AnswerModel``."""
        self._cache = DynamicCache(config=self.model.config)
        self._is_token = is_token
        return self._forward(tokens, (is_token.cumsum(1) - 1).clamp(min=0))

    def repeat(self, times: int) -> None:
        """See ``hosts.answer_model.AnswerModel``."""
        self._cache.batch_repeat_interleave(times)
        self._is_token = self._is_token.repeat_interleave(times, dim=0)

    def step(self, tokens: torch.Tensor) -> torch.Tensor:
        """See ``hosts.answer_model.AnswerModel``."""
        position = self._is_token.sum(1, keepdim=True)
        self._is_token = torch.cat([self._is_token, torch.ones_like(self._is_token[:, :1])], dim=1)
        return self._forward(tokens[:, None], position)

    @torch.no_grad()
    def _forward(self, tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        model = cast(Any, self.model)
        with torch.autocast(self.device.type, self._dtype, enabled=self._dtype != torch.float32):
            output = model(
                input_ids=tokens,
                attention_mask=self._is_token.long(),
                position_ids=positions,
                cache=self._cache,
                use_cache=True,
                logits_to_keep=1,
            )
        return output.logits[:, -1].float()
