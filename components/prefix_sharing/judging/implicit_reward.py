"""The reward that a policy trained by DPO implies: how much likelier than under its reference an answer is."""

import functools
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from prefix_sharing.attention import choose_attention_backend, rounding_of
from prefix_sharing.checkpoint import Checkpoint
from prefix_sharing.errors import ConfigError, UserError
from prefix_sharing.hosts import TreeModel
from prefix_sharing.judging.judge import Judge
from prefix_sharing.judging.models import check_placement, placement
from prefix_sharing.tokenizers import HFChatTokenizer, Turn, tokenize_turns
from prefix_sharing.trees import NO_RESPONSE, Response, Row, RowOptions

log = logging.getLogger(__name__)


def implicit_reward_judge(
    policy: str, reference: str, *, beta: float = 0.1, device: str | None = None, dtype: str | None = None
) -> Judge:
    """A judge that is a policy and its reference, for a config.

    The score is that of Rafailov et al. 2023 (https://arxiv.org/abs/2305.18290),
    ``beta * (log pi(answer | prompt) - log pi_ref(answer | prompt))``, summed over the answer's tokens and the one that
    ends its turn, as the chat template in the policy's directory makes them. A prompt is computed once for all its
    answers.

    Args:
        policy (str): directory of a decoder as transformers saves it, with its tokenizer, or a name on the hub; an
            adapter must have been merged into it.
        reference (str): likewise, of what the policy was trained from.
        beta (float): as in training, which leaves the order of answers as it is. Default: 0.1.
        device (str | None): where both run. Default: None, this process's GPU, or the CPU where there is none.
        dtype (str | None): ``fp32``, ``bf16`` or ``fp16``. Default: None, bf16 on a GPU and fp32 on a CPU.

    Returns:
        Judge: the judge. An answer that makes the sequence longer than the models' positions has no verdict.

    Raises:
        UserError: if there is no such device or dtype, or transformers is not installed.

    Example:
        .. code-block:: yaml

            judge:
              _component_: prefix_sharing.judging.implicit_reward_judge
              policy: /tmp/prefix_dpo_qwen3/epoch_0
              reference: /tmp/Qwen3-0.6B
    """
    check_placement(device, dtype, tokens_at_once=1)
    return _ImplicitReward(policy, reference, beta, device, dtype)


@dataclass
class _ImplicitReward:
    policy: str
    reference: str
    beta: float
    device: str | None
    dtype: str | None

    def __call__(self, prompts: Sequence[Sequence[Turn]], answers: Sequence[Sequence[str]]) -> list[np.ndarray]:
        """See ``Judge``."""
        return [self._scores(turns, some) for turns, some in zip(prompts, answers, strict=True)]

    @torch.no_grad()
    def _scores(self, turns: Sequence[Turn], answers: Sequence[str]) -> np.ndarray:
        """Scores of the answers to a prompt, shape ``[n]``."""
        if not answers:
            return np.empty(0)
        models = self._models
        most = min(model.max_seq_len for model in models)
        responses = [self._response(turns, answer) for answer in answers]
        is_too_long = [len(response.tokens) > most for response in responses]
        if any(is_too_long):
            log.warning("%s: %d answers are too long to be judged", self.policy, sum(is_too_long))
        fitting = [NO_RESPONSE if skip else response for skip, response in zip(is_too_long, responses, strict=True)]
        device = next(models[0].parameters()).device
        backend = models[0].attention_backend
        row = Row.from_examples([fitting], options=RowOptions(round_length=rounding_of(backend))).to(device)
        of_policy, of_reference = (model(row).log_probs[0].double() for model in models)
        scores = (self.beta * (of_policy - of_reference)).cpu().numpy()
        return np.where(row.num_scored[0].cpu().numpy() > 0, scores, np.nan)

    def _response(self, turns: Sequence[Turn], answer: str) -> Response:
        chat = tokenize_turns(
            self._tokenizer, [*turns, {"role": "assistant", "content": answer}], [*[False] * len(turns), True]
        )
        return Response(np.array(chat.tokens, dtype=np.int64), np.array(chat.scored, dtype=bool))

    @functools.cached_property
    def _tokenizer(self) -> HFChatTokenizer:
        from prefix_sharing.hosts.transformers.files import local_directory

        ours, theirs = (HFChatTokenizer(str(local_directory(path))) for path in (self.policy, self.reference))
        if ours.vocab != theirs.vocab:
            problem = f"{self.policy} and {self.reference} have different vocabularies"
            raise UserError(f"{problem}; reference must be the model that the policy was trained from.")
        return ours

    @functools.cached_property
    def _models(self) -> tuple[TreeModel, TreeModel]:
        return self._load(self.policy), self._load(self.reference)

    def _load(self, path: str) -> Any:
        from prefix_sharing.hosts.transformers import causal_lm, to_tree_model
        from prefix_sharing.hosts.transformers.files import WeightFiles, local_directory

        device, dtype = placement(self.device, self.dtype)
        files = WeightFiles(local_directory(path))
        with torch.device("meta"):
            model = to_tree_model(causal_lm(path), choose_attention_backend(None, device, dtype))
        if model.vocab_size < self._tokenizer.vocab_size:
            problem = (
                f"{path} has a model of {model.vocab_size} tokens, but {self._tokenizer.vocab_size} in its tokenizer"
            )
            raise UserError(f"{problem}; they do not belong together.")
        for parameter in model.parameters():  # and not buffers: those of rotary embeddings are to stay exact
            parameter.data = parameter.data.to(dtype)
        model.materialize(device)
        try:
            model.load_weights(Checkpoint(files), seed=0)
        except ConfigError as error:  # which names a key of a checkpointer
            raise UserError(f"{path} cannot be read: {error.problem}.") from error
        return model.eval().requires_grad_(False)
