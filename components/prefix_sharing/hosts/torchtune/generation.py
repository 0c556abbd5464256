"""Answers by torchtune's own generation, from torchtune's own model."""

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torchtune.generation import generate
from torchtune.modules import TransformerDecoder

from prefix_sharing.checkpoint import Checkpoint
from prefix_sharing.hosts.torchtune.dora import leave_biases_alone
from prefix_sharing.hosts.torchtune.model import materialize
from prefix_sharing.hosts.torchtune.weights import load_weights


class AnswerModel:
    """A model as torchtune builds it, on one device.

    Args:
        model (TransformerDecoder): without weights, on the meta device.
        device (torch.device): where it runs.
        dtype (torch.dtype): of its weights.

    Attributes:
        model (torch.nn.Module): torchtune's model.
        max_seq_len (int): maximum number of tokens in prompt and answer.
    """

    def __init__(self, model: TransformerDecoder, device: torch.device, dtype: torch.dtype) -> None:
        self.model = model
        leave_biases_alone(self.model)
        materialize(self.model, device)
        self.model.eval()
        self.max_seq_len: int = self.model.max_seq_len
        self._device, self._dtype = device, dtype

    def load_weights(self, checkpoint: Checkpoint, seed: int) -> None:
        """See ``TreeModel.load_weights``."""
        load_weights(self.model, checkpoint, seed)

    def answers(
        self,
        prompts: Iterable[np.ndarray],
        *,
        longest_prompt: int,
        max_new_tokens: int,
        temperature: float,
        stop_tokens: Sequence[int],
    ) -> list[np.ndarray]:
        """Answers prompts one after the other, with a KV cache.

        Args:
            prompts (Iterable[np.ndarray]): token ids of each, shape ``[n]``.
            longest_prompt (int): tokens in the longest.
            max_new_tokens (int): maximum number of tokens in an answer.
            temperature (float): of sampling; 0 takes the most likely token each time.
            stop_tokens (Sequence[int]): tokens that end an answer.

        Returns:
            list[np.ndarray]: token ids of each answer.
        """
        if not self.model.caches_are_setup():
            with self._device:
                self.model.setup_caches(1, self._dtype, decoder_max_seq_len=longest_prompt + max_new_tokens)
        found = []
        for prompt in prompts:
            self.model.reset_caches()
            tokens, _ = generate(
                self.model,
                torch.from_numpy(prompt).to(self._device),
                max_generated_tokens=max_new_tokens,
                pad_id=-1,  # there is no padding to be left out
                temperature=temperature,
                top_k=1 if temperature == 0 else None,
                stop_tokens=list(stop_tokens),
            )
            found.append(tokens[0, len(prompt) :].cpu().numpy())
        return found
