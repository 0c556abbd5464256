"""Chat templates: rendering a conversation in jinja's sandbox, and finding each turn in what was rendered."""

import copy
import functools
import json
import re
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Any

import jinja2
from jinja2.ext import Extension
from jinja2.sandbox import ImmutableSandboxedEnvironment

from prefix_sharing.errors import UserError
from prefix_sharing.tokenizers.chat_tokenizer import REASONING_KEYS, Turn

_PLACEHOLDER = "\ue000prefix-sharing\ue001"
"""Takes the place of a turn's content to find where the template puts it: private-use characters, which no template
treats in a way of its own."""

_MOST_STEPS = 1_000_000
"""Steps of ``range`` in a rendering, after which a template is taken to be one that never ends."""

_LONGEST_BEGINNING = 64
"""Characters that a generation prompt may take of an answer, such as ``<think>``."""


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
        self._source = source
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

    def uses(self, key: str) -> bool:
        """Whether the template mentions a key of messages, or a variable."""
        return re.search(rf"\b{re.escape(key)}\b", self._source) is not None

    def chat(
        self,
        turns: Sequence[Turn],
        tools: Sequence[Mapping[str, Any]] | None = None,
        kwargs: Mapping[str, Any] | None = None,
    ) -> "RenderedChat":
        """Renders a conversation in which turns can then be found.

        Args:
            turns (Sequence[Turn]): the conversation.
            tools (Sequence[Mapping[str, Any]] | None): the tools there are. Default: None.
            kwargs (Mapping[str, Any] | None): what else the template is given. Default: None.

        Returns:
            RenderedChat: the conversation as the model reads it.

        Raises:
            UserError: if the template refuses the conversation.
        """
        return RenderedChat(self, list(turns), tools, kwargs or {})

    def render(
        self,
        turns: Sequence[Turn],
        tools: Sequence[Mapping[str, Any]] | None = None,
        kwargs: Mapping[str, Any] | None = None,
        *,
        add_generation_prompt: bool = False,
    ) -> str:
        """Renders a conversation as transformers' ``apply_chat_template`` does.

        Args:
            turns (Sequence[Turn]): the conversation.
            tools (Sequence[Mapping[str, Any]] | None): the tools there are. Default: None.
            kwargs (Mapping[str, Any] | None): what else the template is given. Default: None.
            add_generation_prompt (bool): whether to end with what asks for the assistant's turn. Default: False.

        Returns:
            str: the text the model reads.

        Raises:
            UserError: if the template refuses the conversation.
        """
        reserved = {"messages", "tools", "documents", "add_generation_prompt"} & set(kwargs or {})
        if reserved:
            raise UserError(f"chat_template_kwargs must not hold {', '.join(sorted(reserved))}: they are set already.")
        given = {
            "messages": [_with_thoughts_by_each_name(turn) for turn in turns],
            "tools": tools,
            "documents": None,
            "range": _limited_range(),
            "add_generation_prompt": add_generation_prompt,
            **self._special_tokens,
            **(kwargs or {}),
        }
        try:
            return self._template.render(given)
        # A template is a program: it may fail with any error that its expressions may.
        except (jinja2.TemplateError, TypeError, ValueError, LookupError, AttributeError, RecursionError) as error:
            roles = ", ".join(turn["role"] for turn in turns)
            raise UserError(f"the chat template of {self._name} refuses turns of {roles}: {error}") from error

    def cannot_find(self, turns: Sequence[Turn], i: int) -> UserError:
        """The error that says that a turn cannot be found in the rendered conversation."""
        way_out = "set masking_strategy: train_on_last, or " if i < len(turns) - 1 else ""
        return UserError(
            f"the chat template of {self._name} renders turn {i + 1} ({turns[i]['role']}) of {len(turns)} in a way "
            f"that hides where the turn begins or ends, so it cannot be scored; {way_out}use another chat template."
        )


class RenderedChat:
    """A conversation as a template renders it, in which turns can be found.

    Works on the conversation as a whole, so that templates which render a turn differently once others follow are found
    as they were rendered.

    Args:
        template (ChatTemplate): the template.
        turns (list[Turn]): the conversation.
        tools (Sequence[Mapping[str, Any]] | None): the tools there are.
        kwargs (Mapping[str, Any]): what else the template is given.

    Attributes:
        text (str): what the model reads.
    """

    def __init__(
        self,
        template: ChatTemplate,
        turns: list[Turn],
        tools: Sequence[Mapping[str, Any]] | None,
        kwargs: Mapping[str, Any],
    ) -> None:
        self._template, self._turns, self._tools, self._kwargs = template, turns, tools, kwargs
        self.text = self._render(turns)

    def find_turn(self, i: int) -> tuple[int, int]:
        """Finds turn ``i``, from behind its generation prompt to the end of its content.

        Args:
            i (int): which turn.

        Returns:
            tuple[int, int]: the turn is ``text[start:end]``.

        Raises:
            UserError: if the turn cannot be found with certainty.
        """
        turns, text = self._turns, self.text
        without = {"role": turns[i]["role"]} if "tool_calls" in turns[i] else turns[i]
        rendered = self._render([*turns[:i], {**without, "content": _PLACEHOLDER}, *turns[i + 1 :]])
        before, found, after = rendered.rpartition(_PLACEHOLDER)
        end = len(text) - len(after)
        start = self._start_of_thoughts(i)
        if start is None:
            start = self._end_of_generation_prompt(i)
        if start is None and text.startswith(before):
            start = len(before)
        # Nothing but the end of the turn follows the last one, so what precedes its content may depend on the content.
        surrounded = text.endswith(after) and (text.startswith(before) or i == len(turns) - 1)
        if not found or not surrounded or start is None or start > end:
            raise self._template.cannot_find(turns, i)
        return start, end

    def find_call(self, i: int) -> tuple[int, int] | None:
        """Finds a turn with tool calls, from behind its generation prompt to the end of all that it adds to the text.

        Args:
            i (int): which turn.

        Returns:
            tuple[int, int] | None: the turn and what ends it are ``text[start:end]``; None unless it is rendered within
                the conversation as it is at the end of one.
        """
        before, through = (self._render(self._turns[:end]) for end in (i, i + 1))
        added = through.removeprefix(before)
        if added == through or not added:
            return None
        same = [k for k, turn in enumerate(self._turns) if turn == self._turns[i]]
        if self.text.startswith(through):
            start = len(before)
        elif self.text.count(added) == len(same):
            start = [match.start() for match in re.finditer(re.escape(added), self.text)][same.index(i)]
        else:
            return None
        # What is asked for may be more than the turn begins with, such as an empty block of thoughts.
        prompt = self._render(self._turns[:i], add_generation_prompt=True).removeprefix(before)
        return start + _shared_length(prompt, added), start + len(added)

    def shows_call(self, i: int) -> bool:
        """Whether a turn's tool calls are in the text: with other names in them, the text is another."""
        calls = copy.deepcopy(self._turns[i]["tool_calls"])
        for call in calls:
            function = call.get("function", call) if isinstance(call, dict) else None
            if not isinstance(function, dict) or not isinstance(function.get("name"), str):
                return True
            function["name"] += _PLACEHOLDER
        other = self._render([*self._turns[:i], {**self._turns[i], "tool_calls": calls}, *self._turns[i + 1 :]])
        return other.count(_PLACEHOLDER) >= len(calls)

    def find_content(self, i: int) -> int | None:
        """Where the content of a turn that is not scored begins; None if that cannot be told."""
        turn = {**self._turns[i], "content": _PLACEHOLDER}
        before, found, _ = self._render([*self._turns[:i], turn, *self._turns[i + 1 :]]).partition(_PLACEHOLDER)
        return len(before) if found and self.text.startswith(before) else None

    def shows_content(self, i: int) -> bool:
        """Whether the content of a turn that is not scored is somewhere in the text, as it is or as JSON."""
        content = self._turns[i].get("content") or ""
        forms = (content, json.dumps(content, ensure_ascii=False)[1:-1])
        return any(_squeezed(form) in self._squeezed_text for form in forms)

    @functools.cached_property
    def _squeezed_text(self) -> str:
        return _squeezed(self.text)

    def keeps_text(self, i: int, start: int, end: int) -> bool:
        """Whether the text of a turn is in ``text[start:end]``, whitespace aside; a generation prompt may begin it."""
        turn = self._turns[i]
        shown = _squeezed(self.text[max(0, start - _LONGEST_BEGINNING) : end])
        content = _squeezed(turn.get("content") or "")
        kept = content in shown if "tool_calls" in turn else shown.endswith(content)
        scored = _squeezed(self.text[start:end])
        return kept and all(_squeezed(turn[key]) in scored for key in REASONING_KEYS if key in turn)

    def _render(self, turns: Sequence[Turn], add_generation_prompt: bool = False) -> str:
        return self._template.render(turns, self._tools, self._kwargs, add_generation_prompt=add_generation_prompt)

    def _start_of_thoughts(self, i: int) -> int | None:
        """Where a turn begins that has thoughts apart from its content: where it leaves what asks for it."""
        if i == 0 or not any(self._turns[i].get(key) for key in REASONING_KEYS):
            return None
        try:
            before, prompt = (self._render(self._turns[:i], add_generation_prompt=asks) for asks in (False, True))
        except UserError:
            return None
        if prompt == before or not (prompt.startswith(before) and self.text.startswith(before)):
            return None
        return _shared_length(prompt, self.text)

    def _end_of_generation_prompt(self, i: int) -> int | None:
        """Where turn i begins, if it follows a generation prompt and the turns before it render as they do alone."""
        if self._turns[i]["role"] != "assistant" or i == 0:
            return None
        try:
            prompt = self._render(self._turns[:i], add_generation_prompt=True)
            has_generation_prompt = prompt != self._render(self._turns[:i])
        except UserError:
            return None
        return len(prompt) if has_generation_prompt and self.text.startswith(prompt) else None


def _with_thoughts_by_each_name(turn: Turn) -> Turn:
    """Templates read thoughts under one name or the other; as transformers, has them under both."""
    thoughts = next((turn[key] for key in REASONING_KEYS if turn.get(key) is not None), None)
    return turn if thoughts is None else {"thinking": thoughts, **turn, "reasoning_content": thoughts}


def _shared_length(one: str, other: str) -> int:
    """How many characters both begin with."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(one), len(other)))


def _squeezed(text: str) -> str:
    return "".join(text.split())


class _GenerationTag(Extension):
    """``{% generation %} ... {% endgeneration %}`` marks what the model writes; it renders as what it encloses."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Any) -> Any:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None, **kwargs: Any) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **kwargs)


def _limited_range() -> Callable[..., range]:
    """``range`` for one rendering."""
    left = _MOST_STEPS

    def limited(*bounds: int) -> range:
        nonlocal left
        steps = range(*bounds)
        left -= len(steps)
        if left < 0:
            raise jinja2.TemplateRuntimeError(f"its loops take more than {_MOST_STEPS:,} steps")
        return steps

    return limited


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)
