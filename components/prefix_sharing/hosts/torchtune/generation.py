"""Generation from torchtune's own model, a token at a time, with its KV cache."""

import torch
from torchtune.generation import get_causal_mask_from_padding_mask
from torchtune.modules import KVCache, TransformerDecoder, delete_kv_caches

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
        device (torch.device): where it runs.
        max_seq_len (int): maximum number of tokens in prompt and answer.
    """

    def __init__(self, model: TransformerDecoder, device: torch.device, dtype: torch.dtype) -> None:
        self.model = model
        leave_biases_alone(self.model)
        materialize(self.model, device)
        self.model.eval()
        # With a cache, torchtune's Gemma 2 counts windows by places in the cache: right up to their size only.
        windows = [getattr(layer.attn, "sliding_window_size", None) for layer in self.model.layers]
        self.max_seq_len: int = min([self.model.max_seq_len, *filter(None, windows)])
        self.device, self._dtype = device, dtype

    def load_weights(self, checkpoint: Checkpoint, seed: int) -> None:
        """See ``TreeModel.load_weights``."""
        load_weights(self.model, checkpoint, seed)

    def prefill(self, tokens: torch.Tensor, is_token: torch.Tensor, max_new_tokens: int) -> torch.Tensor:
        """See ``hosts.answer_model.AnswerModel``."""
        if self.model.caches_are_setup():
            delete_kv_caches(self.model)
        num_prompts, length = tokens.shape
        self._is_token = torch.nn.functional.pad(is_token, (0, max_new_tokens), value=True)
        self._length = length
        with self.device:
            self.model.setup_caches(num_prompts, self._dtype, decoder_max_seq_len=length + max_new_tokens)
        mask = get_causal_mask_from_padding_mask(is_token, target_seq_len=length + max_new_tokens)
        return self._forward(tokens, mask, (is_token.cumsum(1) - 1).clamp(min=0))

    def repeat(self, times: int) -> None:
        """See ``hosts.answer_model.AnswerModel``."""
        for cache in self.model.modules():
            if isinstance(cache, KVCache):
                cache.k_cache, cache.v_cache = (x.repeat_interleave(times, 0) for x in (cache.k_cache, cache.v_cache))
                cache.batch_size *= times
        self._is_token = self._is_token.repeat_interleave(times, dim=0)

    def step(self, tokens: torch.Tensor) -> torch.Tensor:
        """See ``hosts.answer_model.AnswerModel``."""
        self._length += 1
        position = self._is_token[:, : self._length].sum(1, keepdim=True) - 1
        mask = self._is_token.clone()
        mask[:, self._length :] = False
        return self._forward(tokens[:, None], mask[:, None], position)

    @torch.no_grad()
    def _forward(self, tokens: torch.Tensor, mask: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        return self.model(tokens, mask=mask, input_pos=positions)[:, -1].float()
