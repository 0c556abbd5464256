"""Chat templates: rendering a conversation in jinja's sandbox, and finding each turn in what was rendered."""

import json
from datetime import datetime
from typing import Any

import jinja2
from jinja2.ext import Extension
from jinja2.sandbox import ImmutableSandboxedEnvironment

from prefix_sharing.errors import UserError
from prefix_sharing.tokenizers.chat_tokenizer import Turn

_PLACEHOLDER = "\ue000prefix-sharing\ue001"
"""Takes the place of a turn's content to find where the template puts it: private-use characters, which no template
treats in a way of its own."""


class ChatTemplate:
    """A model's chat template, with what transformers lets templates use.

    Args:
        source (str): the jinja template.
        special_tokens (dict[str, str]): names such as ``bos_token`` and their texts.
        name (str): what to call the template in messages.

    Raises:
        UserError: if the template is not valid jinja.
    """

    def __init__(self, source: str, special_tokens: dict[str, str], name: str) -> None:
        self._special_tokens = special_tokens
        self._name = name
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, "jinja2.ext.loopcontrols"]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateError as error:
            raise UserError(f"the chat template of {name} is not valid jinja: {error}.") from error

    def render(self, turns: list[Turn], *, add_generation_prompt: bool = False) -> str:
        """Renders a conversation.

        Args:
            turns (list[Turn]): the conversation.
            add_generation_prompt (bool): whether to end with what asks for the assistant's turn. Default: False.

        Returns:
            str: the text the model reads.

        Raises:
            UserError: if the template refuses the conversation.
        """
        try:
            return self._template.render(
                messages=turns, add_generation_prompt=add_generation_prompt, tools=None, **self._special_tokens
            )
        except jinja2.TemplateError as error:
            roles = ", ".join(turn["role"] for turn in turns)
            raise UserError(f"the chat template of {self._name} refuses turns of {roles}: {error}") from error

    def find_turn(self, turns: list[Turn], i: int, text: str) -> tuple[int, int]:
        """Finds turn ``i`` in the rendered conversation, from behind its generation prompt to the end of its content.

        Works on the conversation as a whole, so that templates which render a turn differently once others follow are
        found as they were rendered.

        Args:
            turns (list[Turn]): the conversation.
            i (int): which turn.
            text (str): ``render(turns)``.

        Returns:
            tuple[int, int]: the turn is ``text[start:end]``.

        Raises:
            UserError: if the turn cannot be found with certainty.
        """
        rendered = self.render([*turns[:i], {**turns[i], "content": _PLACEHOLDER}, *turns[i + 1 :]])
        before, found, after = rendered.rpartition(_PLACEHOLDER)
        end = len(text) - len(after)
        start = self._end_of_generation_prompt(turns, i, text)
        if start is None and text.startswith(before):
            start = len(before)
        # Nothing but the end of the turn follows the last one, so what precedes its content may depend on the content.
        surrounded = text.endswith(after) and (text.startswith(before) or i == len(turns) - 1)
        if not found or not surrounded or start is None or start > end:
            way_out = "set masking_strategy: train_on_last, or " if i < len(turns) - 1 else ""
            raise UserError(
                f"the chat template of {self._name} renders turn {i + 1} ({turns[i]['role']}) of {len(turns)} in a way "
                f"that hides where the turn begins or ends, so it cannot be scored; {way_out}use another chat template."
            )
        return start, end

    def _end_of_generation_prompt(self, turns: list[Turn], i: int, text: str) -> int | None:
        """Where turn i begins, if it follows a generation prompt and the turns before it render as they do alone."""
        if turns[i]["role"] != "assistant" or i == 0:
            return None
        try:
            prompt = self.render(turns[:i], add_generation_prompt=True)
            has_generation_prompt = prompt != self.render(turns[:i])
        except UserError:
            return None
        return len(prompt) if has_generation_prompt and text.startswith(prompt) else None


class _GenerationTag(Extension):
    """``{% generation %} ... {% endgeneration %}`` marks what the model writes; it renders as what it encloses."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Any) -> Any:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None, **kwargs: Any) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **kwargs)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)
