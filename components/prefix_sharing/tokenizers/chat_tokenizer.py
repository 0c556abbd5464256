"""What this package asks of a tokenizer: torchtune's own interface, conversations in, tokens and masks out."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
from torchtune.data import Message

from prefix_sharing.errors import UserError

Turn = dict[str, Any]
"""A ``role`` (system, user, assistant or tool), a ``content`` unless it is a call, and what else a message has."""


@dataclass(frozen=True)
class TokenizedChat:
    """What a tokenizer makes of a conversation.

    Attributes:
        tokens (list[int]): token ids.
        scored (list[bool]): for each whether it is scored.
        has_end (bool): whether the last scored token is one that ends an answer.
        lost_text (bool): whether text of scored turns is not in the tokens.
        unused (tuple[str, ...]): keys of turns that nothing was made of.
        unused_tools (bool): whether nothing was made of the tools.
    """

    tokens: list[int]
    scored: list[bool]
    has_end: bool = True
    lost_text: bool = False
    unused: tuple[str, ...] = ()
    unused_tools: bool = False


class ChatTokenizer(Protocol):
    """torchtune's model tokenizers, and ``HFChatTokenizer``."""

    max_seq_len: int | None

    def tokenize_messages(self, messages: list[Message]) -> tuple[list[int], list[bool]]:
        """Token ids of a conversation, and for each whether it is masked, that is, not scored."""

    @property
    def decode(self) -> Callable[..., str]:
        """Text of token ids; tokenizers differ in their options."""


@runtime_checkable
class TemplateTokenizer(Protocol):
    """A tokenizer that follows a chat template, which may know more than torchtune's messages hold."""

    def tokenize_chat(
        self,
        turns: Sequence[Turn],
        scored: Sequence[bool],
        tools: Sequence[Mapping[str, Any]] | None,
        template_kwargs: Mapping[str, Any],
    ) -> TokenizedChat:
        """See ``tokenize_turns``."""


def tokenize_turns(
    tokenizer: ChatTokenizer,
    turns: Sequence[Turn],
    scored: Sequence[bool],
    tools: Sequence[Mapping[str, Any]] | None = None,
    template_kwargs: Mapping[str, Any] | None = None,
) -> TokenizedChat:
    """Tokenizes a conversation.

    Args:
        tokenizer (ChatTokenizer): the tokenizer.
        turns (Sequence[Turn]): the conversation.
        scored (Sequence[bool]): which turns count towards the log-prob.
        tools (Sequence[Mapping[str, Any]] | None): the tools there are, for a chat template. Default: None.
        template_kwargs (Mapping[str, Any] | None): what else the chat template is given. Default: None.

    Returns:
        TokenizedChat: its tokens.

    Raises:
        UserError: if the tokenizer cannot take it.
    """
    if isinstance(tokenizer, TemplateTokenizer):
        return tokenizer.tokenize_chat(turns, scored, tools, template_kwargs or {})
    for name, value in (
        ("tools", tools),
        ("tool_calls", any("tool_calls" in turn for turn in turns)),
        ("chat_template_kwargs", template_kwargs),
    ):
        if value:
            raise UserError(f"{name} need a chat template: use prefix_sharing.tokenizers.hf_chat_tokenizer.")
    messages = [
        Message(
            role="ipython" if turn["role"] == "tool" else turn["role"], content=turn["content"], masked=not is_scored
        )
        for turn, is_scored in zip(turns, scored, strict=True)
    ]
    tokens, masked = tokenizer.tokenize_messages(messages)
    ends = _ends_of_answers(tokenizer)
    last = next((token for token, is_masked in zip(tokens[::-1], masked[::-1], strict=True) if not is_masked), None)
    others = dict.fromkeys(key for turn in turns for key in turn if key not in ("role", "content"))
    return TokenizedChat(
        tokens,
        [not is_masked for is_masked in masked],
        has_end=not ends or last in ends,
        lost_text=any(key in turn for turn in turns for key in REASONING_KEYS),
        unused=tuple(others),
    )


REASONING_KEYS = ("reasoning_content", "thinking", "reasoning")
"""Keys of a message in which data sets and templates keep what a model thinks before it answers."""


def _ends_of_answers(tokenizer: ChatTokenizer) -> set[int]:
    """What a torchtune tokenizer may end an answer with."""
    special = getattr(tokenizer, "special_tokens", None) or {}
    ends = {getattr(tokenizer, "eos_id", None), *(getattr(tokenizer, "stop_tokens", None) or ()), *special.values()}
    return {end for end in ends if end is not None}


def decode_all(tokenizer: ChatTokenizer, tokens: np.ndarray) -> str:
    """Text of tokens, special ones included.

    Args:
        tokenizer (ChatTokenizer): torchtune's or ours.
        tokens (np.ndarray): token ids, shape ``[n]``.

    Returns:
        str: the text.
    """
    parameters = inspect.signature(tokenizer.decode).parameters
    options = {"skip_special_tokens": False, "truncate_at_eos": False}
    return tokenizer.decode(tokens.tolist(), **{name: value for name, value in options.items() if name in parameters})
