"""Whether a tree gives what separate sequences give, tried on a small random model of the user's own architecture.

What is known not to be covered is refused by name. This finds the rest before any work is done: models that do not look
at positions, or whose attention is none of queries and keys alone. A host makes the small model: of its layers as many
as it takes to have one of each kind, but little else.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from prefix_sharing.config import explained
from prefix_sharing.errors import ConfigError
from prefix_sharing.hosts.tree_model import TreeModel
from prefix_sharing.trees import Response, Row

SMALL_VOCAB = 512
NARROW_MLP = 64
"""No more than time depends on the two."""

SHORT_WINDOW = 6
"""Windows are made as short, so that the small tree is longer."""

_TOLERANCE = 1e-5
"""Of log-probs in fp32, relative: what ``docs/exactness.md`` promises. Rounding was seen to be a tenth of it."""

_GRADIENT_TOLERANCE = 1e-4
"""Of a parameter's gradient, relative to its norm: a sum over all tokens, of terms that cancel in part."""

_SMALL_GRADIENT = 1e-2
"""Of all gradients' norm. Below it a gradient has terms that cancel, in whole for a bias of keys, and with them digits.
"""


class Differences(NamedTuple):
    """By how much a tree and separate sequences differ.

    Attributes:
        log_probs (float): the largest difference of a response's log-prob, relative to it.
        gradients (float | None): the largest of a parameter's gradient, relative to its norm; None if not asked for.
    """

    log_probs: float
    gradients: float | None

    def __str__(self) -> str:
        text = f"log-probs differ by a relative {self.log_probs:.0e} (up to {_TOLERANCE:.0e} is rounding)"
        if self.gradients is None:
            return text
        return f"{text}, their gradients by {self.gradients:.0e} (up to {_GRADIENT_TOLERANCE:.0e})"


def compare(
    name: str,
    build_small: Callable[[], nn.Module],
    plain_logits: Callable[[nn.Module, torch.Tensor], torch.Tensor],
    to_tree_model: Callable[[nn.Module], TreeModel],
    *,
    vocab_size: int,
    gradients: bool,
) -> Differences:
    """Compares a small random tree with its sequences one by one.

    Args:
        name (str): what the model is called, for messages.
        build_small (Callable[[], nn.Module]): builds a small model like it on the CPU, in fp32, without weights.
        plain_logits (Callable[[nn.Module, torch.Tensor], torch.Tensor]): the model's own forward, ``[1, s] -> [1, s,
            vocab]``.
        to_tree_model (Callable[[nn.Module], TreeModel]): turns the model, in place, into one that takes a Row.
        vocab_size (int): of the small model.
        gradients (bool): whether gradients are compared, too.

    Returns:
        Differences: what is found, if it is no more than rounding.

    Raises:
        ConfigError: if it is more, or one of the two cannot be computed.
    """
    examples = _examples(vocab_size)
    row = Row.from_examples(examples)
    with torch.set_grad_enabled(gradients):
        with explained("self_check", f"set it to False, since {name} models cannot be tried on a small random one"):
            model = build_small().eval()
            _randomize(model)
            logits_of = functools.partial(plain_logits, model)
            plain = torch.stack([_log_prob(logits_of, response) for example in examples for response in example])
            expected = _gradients(plain, model) if gradients else {}
        with explained("model", f"{name} models cannot be given a tree"):
            tree_model = to_tree_model(model)
            of_tree = tree_model(row).log_probs[row.num_scored > 0]
            found = _gradients(of_tree, tree_model) if gradients else {}

    problem = f"{name} models compute something else over a tree than over separate sequences: "
    differences = (of_tree - plain).detach().abs()
    of_log_probs = float(differences.max())
    if not bool((differences <= _TOLERANCE * plain.detach().abs()).all()):  # not a number, too
        raise ConfigError("model", f"{problem}log-probs of a small random one differ by {of_log_probs:.1e}")
    relative_log_probs = float((differences / plain.detach().abs()).max())
    if not gradients:
        return Differences(relative_log_probs, None)
    norms = torch.stack([gradient.norm() for gradient in expected.values()])
    errors = torch.stack([(found[parameter] - gradient).norm() for parameter, gradient in expected.items()])
    relative = errors / norms.clamp(min=_SMALL_GRADIENT * float(norms.norm()))
    of_gradients = float(relative.max())
    if not of_gradients <= _GRADIENT_TOLERANCE:
        worst = [*expected][int(relative.argmax())]
        differ = f"gradients of {worst} in a small random one differ by {of_gradients:.1e} of their norm"
        raise ConfigError("model", f"{problem}{differ}, although log-probs agree")
    return Differences(relative_log_probs, of_gradients)


def num_layers_to_try(layers: Sequence[nn.Module]) -> int:
    """How many of a model's first layers have one of each kind; two at least, since the last is computed in part only.

    Args:
        layers (Sequence[nn.Module]): all of them.

    Returns:
        int: the number.
    """
    kinds = [_kind_of(layer) for layer in layers]
    return min(len(kinds), max(2, 1 + max(map(kinds.index, kinds))))


def _kind_of(layer: nn.Module) -> Any:
    """What tells layers apart: their modules, and the whole numbers, flags, names and functions these go by."""

    def told_by(value: object) -> object:
        return value if isinstance(value, (bool, int, str)) else getattr(value, "__qualname__", None)

    return [
        (name, type(module), [(key, told_by(value)) for key, value in vars(module).items() if key != "layer_idx"])
        for name, module in layer.named_modules()
    ]


def _randomize(model: nn.Module) -> None:
    """Gives a model weights so large that what is where makes a difference, adapters and biases among them."""
    # The same million numbers for each tensor, from another place on: to draw them all takes longer than all the rest.
    # A prime number of them falls in step with the rows of no matrix.
    numbers = 2 * torch.rand(1_000_003, generator=torch.Generator().manual_seed(0)) - 1
    for i, tensor in enumerate(model.state_dict().values()):
        if tensor.is_floating_point():
            values = numbers.roll(7919 * i)
            values = 1.7 * tensor.shape[-1] ** -0.5 * values if tensor.dim() > 1 else 1 + values / 2
            for part in tensor.view(-1).split(len(values)):
                part.copy_(values[: len(part)])


def _examples(vocab_size: int) -> list[list[Response]]:
    rng = np.random.default_rng(0)
    examples: list[list[Response]] = []
    for length in (9, 5):
        prompt = rng.integers(0, vocab_size, length)
        examples.append([])
        for answer_length in (4, 7, 3):
            tokens = np.concatenate([prompt, rng.integers(0, vocab_size, answer_length)])
            examples[-1].append(Response(tokens, np.arange(len(tokens)) >= length))
    return examples


def _log_prob(logits_of: Callable[[torch.Tensor], torch.Tensor], response: Response) -> torch.Tensor:
    tokens = torch.from_numpy(response.tokens)
    log_probs = logits_of(tokens[None])[0].log_softmax(-1)
    of_targets = log_probs[:-1].gather(1, tokens[1:, None])[:, 0]
    return of_targets[torch.from_numpy(response.scored[1:])].sum()


def _gradients(log_probs: torch.Tensor, model: nn.Module) -> dict[str, torch.Tensor]:
    """Of each parameter, with another weight for each response."""
    parameters = dict(model.named_parameters())
    weights = torch.linspace(1, 2, len(log_probs))
    found = torch.autograd.grad(weights @ log_probs, [*parameters.values()], allow_unused=True, materialize_grads=True)
    return dict(zip(parameters, found, strict=True))
