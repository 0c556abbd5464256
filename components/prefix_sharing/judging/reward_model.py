"""Reward models: a score for each answer by itself."""

import functools
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from prefix_sharing.errors import UserError
from prefix_sharing.judging.judge import Judge
from prefix_sharing.judging.models import check_placement, padded, placement
from prefix_sharing.planning.batches import in_batches
from prefix_sharing.tokenizers import Turn

log = logging.getLogger(__name__)


def reward_model_judge(
    path: str, *, tokens_at_once: int = 16384, device: str | None = None, dtype: str | None = None
) -> Judge:
    """A judge that is a reward model, for a config: a ``...ForSequenceClassification`` of transformers with one output.

    It reads prompt and answer as its own chat template renders them. The score is what transformers computes of that
    sequence alone, whatever it is batched with.

    Args:
        path (str): directory with ``config.json``, safetensors files, a tokenizer and a chat template; or a name on the
            hub.
        tokens_at_once (int): tokens of a batch, padding included. Default: 16384.
        device (str | None): where it runs. Default: None, this process's GPU, or the CPU where there is none.
        dtype (str | None): ``fp32``, ``bf16`` or ``fp16``. Default: None, bf16 on a GPU and fp32 on a CPU.

    Returns:
        Judge: the judge. An answer that makes the sequence longer than the model's positions has no verdict.

    Raises:
        UserError: if there is no such device or dtype, or transformers is not installed.

    Example:
        .. code-block:: yaml

            judge:
              _component_: prefix_sharing.judging.reward_model_judge
              path: /tmp/Skywork-Reward-V2-Qwen3-0.6B
    """
    check_placement(device, dtype, tokens_at_once)
    return _RewardModel(path, tokens_at_once, device, dtype)


@dataclass
class _RewardModel:
    path: str
    tokens_at_once: int
    device: str | None
    dtype: str | None

    def __call__(self, prompts: Sequence[Sequence[Turn]], answers: Sequence[Sequence[str]]) -> list[np.ndarray]:
        """See ``Judge``."""
        sequences = [
            self._tokens([*turns, {"role": "assistant", "content": answer}])
            for turns, some in zip(prompts, answers, strict=True)
            for answer in some
        ]
        scores = self._scores(sequences)
        ends = np.cumsum([len(some) for some in answers])
        return np.split(scores, ends[:-1]) if len(ends) else []

    def _tokens(self, turns: Sequence[Turn]) -> list[int]:
        try:
            text = self._tokenizer.apply_chat_template(list(turns), tokenize=False)
        except Exception as error:  # a template is a program, which may fail with any error
            roles = ", ".join(turn["role"] for turn in turns)
            raise UserError(f"the chat template of {self.path} refuses turns of {roles}: {error}") from error
        return self._tokenizer(text, add_special_tokens=False)["input_ids"]

    @torch.no_grad()
    def _scores(self, sequences: Sequence[list[int]]) -> np.ndarray:
        """Scores of token sequences, shape ``[number of them]``."""
        model = self._model
        config = model.config.get_text_config()
        num_embeddings = model.get_input_embeddings().num_embeddings
        largest = max((max(tokens, default=0) for tokens in sequences), default=0)
        if largest >= num_embeddings:
            problem = f"{self.path} has a tokenizer that makes token {largest} and a model of {num_embeddings} tokens"
            raise UserError(f"{problem}; they do not belong together, so save the model's own tokenizer there.")
        pad_id = self._pad_id
        if pad_id is None or not 0 <= pad_id < num_embeddings:
            # The score is read at the last token that is no padding: padding may be any token that ends no sequence.
            ends = {tokens[-1] for tokens in sequences if tokens}
            pad_id = config.pad_token_id = next(i for i in range(len(ends) + 1) if i not in ends)
        scores = np.full(len(sequences), np.nan)
        most = getattr(config, "max_position_embeddings", None) or float("inf")
        fitting = [i for i, tokens in enumerate(sequences) if 0 < len(tokens) <= most]
        if len(fitting) < len(sequences):
            log.warning("%s: %d answers are too long to be judged", self.path, len(sequences) - len(fitting))
        for batch in in_batches([len(sequences[i]) for i in fitting], self.tokens_at_once):
            chosen = [fitting[i] for i in batch]
            tokens, mask = (x.to(model.device) for x in padded([sequences[i] for i in chosen], pad_id))
            logits = model(input_ids=tokens, attention_mask=mask).logits
            scores[chosen] = logits[:, 0].double().cpu().numpy()
        return scores

    @functools.cached_property
    def _tokenizer(self) -> Any:
        from transformers import AutoTokenizer

        from prefix_sharing.hosts.transformers.files import local_directory

        try:
            tokenizer = AutoTokenizer.from_pretrained(local_directory(self.path))
        except (OSError, ValueError, KeyError) as error:
            problem = f"{self.path} has no tokenizer that transformers can read"
            raise UserError(f"{problem}: {' '.join(str(error).split())[:200]}") from error
        if tokenizer.chat_template is None:
            raise UserError(f"{self.path} has no chat template; add the chat_template.jinja it was trained with.")
        return tokenizer

    @functools.cached_property
    def _pad_id(self) -> int | None:
        """What the model itself takes for padding."""
        return self._model.config.get_text_config().pad_token_id

    @functools.cached_property
    def _model(self) -> Any:
        from transformers import AutoConfig, AutoModelForSequenceClassification

        from prefix_sharing.hosts.transformers.files import local_directory

        directory = local_directory(self.path)
        device, dtype = placement(self.device, self.dtype)
        try:
            config = AutoConfig.from_pretrained(directory)
            if config.num_labels != 1:
                raise UserError(f"{self.path} has {config.num_labels} outputs; a reward model has one.")
            model, info = AutoModelForSequenceClassification.from_pretrained(
                directory, config=config, dtype=dtype, output_loading_info=True
            )
        except (OSError, ValueError, RuntimeError) as error:
            problem = f"{self.path} is no model that transformers can classify sequences with"
            raise UserError(f"{problem}: {' '.join(str(error).split())[:300]}") from error
        if info["missing_keys"]:  # transformers would make them up
            missing = min(info["missing_keys"])
            raise UserError(f"{self.path} has no weights for {missing}, so it is no trained reward model.")
        return model.to(device).eval()
