"""PairRM: two answers are read side by side, and each pair of a prompt's answers is compared."""

import functools
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from prefix_sharing.errors import ConfigError, UserError
from prefix_sharing.judging.judge import Judge
from prefix_sharing.judging.models import as_text, check_placement, ordered_pairs, padded, placement
from prefix_sharing.planning.batches import in_batches
from prefix_sharing.tokenizers import Turn

log = logging.getLogger(__name__)

_PREFIXES = ("<|source|>", "<|candidate1|>", "<|candidate2|>")

_ENCODER, _HEAD = "pretrained_model.", {"head_layer.1.": "0.", "head_layer.4.": "2."}
"""Beginnings of the names in the files, and of the head's layers here, where dropout is left out."""


def pair_ranker_judge(
    path: str,
    *,
    source_length: int = 1224,
    max_length: int = 2048,
    tokens_at_once: int = 16384,
    device: str | None = None,
    dtype: str | None = None,
) -> Judge:
    """A judge that is PairRM (Jiang et al. 2023, https://arxiv.org/abs/2306.02561), for a config.

    It reads directories in the format of ``llm-blender/PairRM-hf``: a DeBERTa-v3 encoder, with names that begin with
    ``pretrained_model.``, and a head of two layers, ``head_layer.1`` and ``head_layer.4``, with a tanh between them.
    What is read is ``<|source|>prompt``, ``<|candidate1|>A`` and ``<|candidate2|>B``, each with the tokenizer's own
    tokens around it. The head makes a score of each answer from the encoder's last hidden states at ``<|source|>`` and
    at the answer's token, one behind the other; the logit of the pair is the difference of both scores. The model's
    code in the directory is not run: both layers are built here, on ``DebertaV2Model`` of transformers.

    Every pair is read in both orders. A beats B if logit(A, B) - logit(B, A) > 0. An answer's score is the number of
    others it beats, ties counting half.

    Tried with small random checkpoints in that format, against the formula. The published weights were not at hand.

    Args:
        path (str): directory, or a name on the hub.
        source_length (int): tokens of the prompt at most; more are cut from its end. Default: 1224.
        max_length (int): tokens in all; each answer gets half of what the prompt leaves, and is cut at its end.
            Default: 2048.
        tokens_at_once (int): tokens of a batch, padding included. Default: 16384.
        device (str | None): as for ``reward_model_judge``. Default: None.
        dtype (str | None): as for ``reward_model_judge``. Default: None.

    Returns:
        Judge: the judge.

    Raises:
        UserError: if there is no such device or dtype, no room for answers, or transformers is not installed.

    Example:
        .. code-block:: yaml

            judge:
              _component_: prefix_sharing.judging.pair_ranker_judge
              path: /tmp/PairRM-hf
    """
    check_placement(device, dtype, tokens_at_once)
    if max_length - source_length < 32:
        problem = f"{max_length} leaves no room for two answers behind a prompt of source_length {source_length} tokens"
        raise ConfigError("max_length", problem)
    return PairRanker(path, source_length, max_length, tokens_at_once, device, dtype)


@dataclass
class PairRanker:
    """See ``pair_ranker_judge``."""

    path: str
    source_length: int
    max_length: int
    tokens_at_once: int
    device: str | None
    dtype: str | None

    def __call__(self, prompts: Sequence[Sequence[Turn]], answers: Sequence[Sequence[str]]) -> list[np.ndarray]:
        """See ``Judge``."""
        return [(0.5 + 0.5 * np.sign(margins)).sum(1) - 0.5 for margins in self.margins(prompts, answers)]

    def margins(self, prompts: Sequence[Sequence[Turn]], answers: Sequence[Sequence[str]]) -> list[np.ndarray]:
        """By how much an answer beats another.

        Args:
            prompts (Sequence[Sequence[Turn]]): the conversation up to the answer.
            answers (Sequence[Sequence[str]]): the n answers to each.

        Returns:
            list[np.ndarray]: logit(i, j) - logit(j, i) of each two answers to a prompt, shape ``[n, n]``.
        """
        places = ordered_pairs(answers)
        texts = [as_text(turns) for turns in prompts]
        read = self._logits([self._tokens(texts[p], answers[p][i], answers[p][j]) for p, i, j in places])
        logits = [np.zeros((len(some), len(some))) for some in answers]
        for (p, i, j), logit in zip(places, read, strict=True):
            logits[p][i, j] = logit
        return [of_prompt - of_prompt.T for of_prompt in logits]

    def _tokens(self, source: str, one: str, other: str) -> tuple[list[int], list[int]]:
        """Token ids of a pair, and the indices of the three tokens whose hidden states are read."""
        tokens: list[int] = []
        places: list[int] = []
        left = self.source_length
        for prefix, text in zip(_PREFIXES, (source, one, other), strict=True):
            part = self._tokenizer.encode(prefix + text, max_length=left, truncation=True)
            # The first: the text itself may hold the like of it.
            places.append(len(tokens) + part.index(self._prefix_ids[prefix]))
            tokens += part
            if prefix == _PREFIXES[0]:
                left = (self.max_length - len(tokens)) // 2
        return tokens, places

    @torch.no_grad()
    def _logits(self, pairs: Sequence[tuple[list[int], list[int]]]) -> np.ndarray:
        """The model's logit of each pair, shape ``[number of them]``; above 0 if the first is better."""
        logits = np.empty(len(pairs))
        encoder, head = self._model
        for batch in in_batches([len(tokens) for tokens, _ in pairs], self.tokens_at_once):
            tokens, mask = padded([pairs[i][0] for i in batch], encoder.config.pad_token_id or 0)
            hidden = encoder(tokens.to(encoder.device), attention_mask=mask.to(encoder.device)).last_hidden_state
            places = torch.tensor([pairs[i][1] for i in batch], device=hidden.device)
            source, one, other = hidden[torch.arange(len(batch), device=hidden.device)[:, None], places].unbind(1)
            scores = [head(torch.cat([source, candidate], dim=-1)).double().mean(-1) for candidate in (one, other)]
            logits[batch] = (scores[0] - scores[1]).cpu().numpy()
        return logits

    @functools.cached_property
    def _tokenizer(self) -> Any:
        from transformers import AutoTokenizer

        from prefix_sharing.hosts.transformers.files import local_directory

        try:
            return AutoTokenizer.from_pretrained(local_directory(self.path))
        except (OSError, ValueError, KeyError) as error:
            problem = f"{self.path} has no tokenizer that transformers can read"
            raise UserError(f"{problem}: {' '.join(str(error).split())[:200]}") from error

    @functools.cached_property
    def _prefix_ids(self) -> dict[str, int]:
        ids = {prefix: self._tokenizer.get_added_vocab().get(prefix) for prefix in _PREFIXES}
        for prefix, i in ids.items():
            if i is None:
                raise UserError(f"{self.path} has a tokenizer without {prefix}; give a directory like PairRM-hf.")
        return ids

    @functools.cached_property
    def _model(self) -> tuple[Any, nn.Module]:
        """Its encoder and its head."""
        from transformers import DebertaV2Config, DebertaV2Model

        from prefix_sharing.hosts.transformers.files import WeightFiles, local_directory

        directory = local_directory(self.path)
        try:
            config = DebertaV2Config.from_pretrained(directory)
        except (OSError, ValueError) as error:
            problem = f"{self.path} is no DeBERTa-v2 model"
            raise UserError(f"{problem}: {' '.join(str(error).split())[:200]}") from error
        files = WeightFiles(directory)
        weights = {name.removeprefix(_ENCODER): files[name] for name in files if name.startswith(_ENCODER)}
        weights.pop("embeddings.position_ids", None)  # older versions of transformers save it
        of_head = {
            new + name.removeprefix(old): files[name]
            for old, new in _HEAD.items()
            for name in files
            if name.startswith(old)
        }
        hidden_size, outputs = config.hidden_size, len(of_head.get("2.bias", [0]))
        with torch.device("meta"):
            head = nn.Sequential(nn.Linear(2 * hidden_size, hidden_size), nn.Tanh(), nn.Linear(hidden_size, outputs))
        encoder: Any = DebertaV2Model(config)
        try:
            encoder.load_state_dict(weights)
            head.load_state_dict(of_head, assign=True)
        except RuntimeError as error:
            problem = f"the weights in {self.path} are not those of a PairRM in the format of llm-blender/PairRM-hf"
            raise UserError(f"{problem}: {' '.join(str(error).split())[:300]}") from error
        device, dtype = placement(self.device, self.dtype)
        return encoder.to(device, dtype).eval(), head.to(device, dtype).eval()
