"""Answers by transformers' own generation, from transformers' own model."""

from collections.abc import Iterable, Sequence
from typing import Any, cast

import numpy as np
import torch
from transformers import PreTrainedModel

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
        max_seq_len (int): maximum number of tokens in prompt and answer.
    """

    def __init__(self, model: PreTrainedModel, device: torch.device, dtype: torch.dtype) -> None:
        self.model = model
        materialize(model, device)
        model.eval()
        self.max_seq_len: int = model.config.max_position_embeddings
        self._device, self._dtype = device, dtype

    def load_weights(self, checkpoint: Checkpoint, seed: int) -> None:
        """See ``TreeModel.load_weights``."""
        load_weights(self.model, checkpoint, seed)

    @torch.no_grad()
    def answers(
        self,
        prompts: Iterable[np.ndarray],
        *,
        longest_prompt: int,
        max_new_tokens: int,
        temperature: float,
        stop_tokens: Sequence[int],
    ) -> list[np.ndarray]:
        """Answers prompts one after the other, with a KV cache; arguments as for torchtune's models.

        Args:
            prompts (Iterable[np.ndarray]): token ids of each, shape ``[n]``.
            longest_prompt (int): not used: the cache grows.
            max_new_tokens (int): maximum number of tokens in an answer.
            temperature (float): of sampling; 0 takes the most likely token each time.
            stop_tokens (Sequence[int]): tokens that end an answer.

        Returns:
            list[np.ndarray]: token ids of each answer.
        """
        how = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature > 0 else {"do_sample": False}
        found = []
        for prompt in prompts:
            tokens = torch.from_numpy(prompt).to(self._device)[None]
            with torch.autocast(self._device.type, self._dtype, enabled=self._dtype != torch.float32):
                output = cast(Any, self.model).generate(
                    tokens,
                    attention_mask=torch.ones_like(tokens),
                    max_new_tokens=max_new_tokens,
                    eos_token_id=list(stop_tokens) or None,
                    pad_token_id=0,
                    **how,
                )
            found.append(output[0, len(prompt) :].cpu().numpy())
        return found
