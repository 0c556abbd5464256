"""Whether a tree gives what separate sequences give, tried on a model of the user's own architecture before any work.

The list of refused architectures in ``model.py`` is what is known; this finds the rest: models that do not look at
positions, or whose attention is none of queries and keys alone.
"""

import copy
import logging
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from prefix_sharing.errors import ConfigError
from prefix_sharing.hosts.transformers.model import to_tree_model
from prefix_sharing.trees import Response, Row

log = logging.getLogger(__name__)

_SMALLEST_WINDOW = 6
"""Windows are made as short, so that the small tree is longer."""

_TOLERANCE = 1e-4
"""Of log-probs of a few tokens in fp32, whose rounding is a hundredth of it."""


def check_arithmetic(config: Any, seed: int = 0) -> float:
    """Compares a small random tree with its sequences one by one, by the model's own eager attention.

    Args:
        config (Any): transformers' config of the model; a copy with few layers is built with random weights.
        seed (int): of weights and tokens. Default: 0.

    Returns:
        float: the largest difference of log-probs.

    Raises:
        ConfigError: if it is more than rounding.
    """
    model = _small_model(config, seed)
    examples = _examples(model.config.vocab_size, seed)
    with torch.no_grad():
        expected = [_plain_log_prob(model, response) for example in examples for response in example]
        row = Row.from_examples(examples)
        try:
            found = to_tree_model(model, "chains")(row).log_probs[row.num_scored > 0]
        except ConfigError:
            raise
        except Exception as error:  # whatever a model does with arguments that are new to it
            problem = f"{config.model_type} models cannot be given a tree ({type(error).__name__}: {error})"
            raise ConfigError("model", problem) from error
    difference = float((found - torch.stack(expected)).abs().max())
    if not difference <= _TOLERANCE:
        problem = f"{config.model_type} models compute something else over a tree than over separate sequences: "
        raise ConfigError("model", f"{problem}log-probs of a small random one differ by {difference:.1e}")
    return difference


def _small_model(config: Any, seed: int) -> PreTrainedModel:
    config = copy.deepcopy(config)
    kinds = list(getattr(config, "layer_types", None) or [])
    num_layers = min(config.num_hidden_layers, max(2, 1 + max(map(kinds.index, kinds), default=0)))
    config.num_hidden_layers = num_layers
    if kinds:
        config.layer_types = kinds[:num_layers]
    if getattr(config, "sliding_window", None):
        config.sliding_window = _SMALLEST_WINDOW
    config.vocab_size = min(config.vocab_size, 512)
    config.intermediate_size = min(config.intermediate_size, 256)  # no more than time depends on it
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        setattr(config, name, None)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager").eval()
        for parameter in model.parameters():
            if parameter.dim() > 1:  # so large that what is where makes a difference
                parameter.data.uniform_(-1, 1).mul_(1.7 * parameter.shape[-1] ** -0.5)
    return model


def _examples(vocab_size: int, seed: int) -> list[list[Response]]:
    rng = np.random.default_rng(seed)
    examples: list[list[Response]] = []
    for length in (9, 5):
        prompt = rng.integers(0, vocab_size, length)
        examples.append([])
        for answer_length in (4, 7, 3):
            tokens = np.concatenate([prompt, rng.integers(0, vocab_size, answer_length)])
            examples[-1].append(Response(tokens, np.arange(len(tokens)) >= length))
    return examples


def _plain_log_prob(model: PreTrainedModel, response: Response) -> torch.Tensor:
    tokens = torch.from_numpy(response.tokens)[None]
    log_probs = model(input_ids=tokens, use_cache=False).logits[0].log_softmax(-1)
    of_targets = log_probs[:-1].gather(1, tokens[0, 1:, None])[:, 0]
    return of_targets[torch.from_numpy(response.scored[1:])].sum()
