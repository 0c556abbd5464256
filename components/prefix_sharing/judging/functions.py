"""Rules as judges."""

from collections.abc import Sequence
from dataclasses import dataclass
from pkgutil import resolve_name
from typing import Any

import numpy as np

from prefix_sharing.errors import ConfigError, UserError
from prefix_sharing.judging.judge import Judge
from prefix_sharing.tokenizers import Turn


def function_judge(function: str, **kwargs: Any) -> Judge:
    """A judge that asks a Python function, for a config.

    Args:
        function (str): dotted path of a function that takes the prompt's turns and an answer's text, and returns the
            answer's score.
        **kwargs (Any): handed to it, too.

    Returns:
        Judge: the judge.

    Raises:
        ConfigError: if there is no such function.

    Example:
        .. code-block:: yaml

            judge:
              _component_: prefix_sharing.judging.function_judge
              function: my_rules.politeness
    """
    try:
        found = resolve_name(function)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError("function", f"'{function}' cannot be imported: {error}") from error
    if not callable(found):
        raise ConfigError("function", f"'{function}' is no function")
    return _FunctionJudge(function, found, kwargs)


def length_judge() -> Judge:
    """A judge that takes the longer answer for the better one: a baseline that a model should not be trained on."""
    return _FunctionJudge("length", lambda turns, answer: len(answer), {})


@dataclass
class _FunctionJudge:
    name: str
    function: Any
    kwargs: dict[str, Any]

    def __call__(self, prompts: Sequence[Sequence[Turn]], answers: Sequence[Sequence[str]]) -> list[np.ndarray]:
        """See ``Judge``."""
        return [
            np.array([self._score(turns, answer) for answer in some], dtype=np.float64)
            for turns, some in zip(prompts, answers, strict=True)
        ]

    def _score(self, turns: Sequence[Turn], answer: str) -> float:
        try:
            return float(self.function(list(turns), answer, **self.kwargs))
        except Exception as error:  # the user's own code
            problem = f"judge {self.name} fails with {type(error).__name__}: {error}"
            raise UserError(f"{problem} (answer: {answer[:80]!r}).") from error
