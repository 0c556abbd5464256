r"""Conversations: messages in OpenAI's and ShareGPT's words, and Anthropic's transcripts.

A turn keeps every key of its message but those that hold nothing, so that a chat template is given what transformers'
``apply_chat_template`` would be given: ``tool_calls``, ``name``, ``reasoning_content`` and whatever else it may use.
"""

import json
import re
from collections.abc import Sequence
from typing import Any

from prefix_sharing.datasets.forms.record import RecordError, as_text, kind
from prefix_sharing.tokenizers import REASONING_KEYS, Turn

_ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "function_call": "assistant",
    "tool_call": "assistant",
    "tool": "tool",
    "ipython": "tool",
    "function": "tool",
    "observation": "tool",
    "tool_response": "tool",
}

_TRANSCRIPT_TURN = re.compile(r"\n\n(Human|Assistant):")


def parse_messages(value: Any, key: str) -> list[Turn]:
    """Reads messages.

    Args:
        value (Any): a message or a list of them.
        key (str): where they are, for messages.

    Returns:
        list[Turn]: a turn for each.

    Raises:
        RecordError: if they are malformed.
    """
    if isinstance(value, dict):
        return [_parse_message(value, key)]
    if not isinstance(value, list):
        raise RecordError(key, f"must be a list of messages, but is {kind(value)}")
    if not value:
        raise RecordError(key, "is an empty list")
    return [_parse_message(message, f"{key}[{i}]") for i, message in enumerate(value)]


def _parse_message(message: Any, where: str) -> Turn:
    if not isinstance(message, dict):
        raise RecordError(where, f"must be a message, but is {kind(message)}")
    role_key, content_key = ("from", "value") if message.get("from") is not None else ("role", "content")
    role, content = message.get(role_key), message.get(content_key)
    if role is None:
        raise RecordError(where, "has no 'role' (or 'from')")
    if not isinstance(role, str) or role not in _ROLES:
        shown = repr(role) if isinstance(role, str) else kind(role)
        raise RecordError(f"{where}.{role_key}", f"is {shown}; choose from {', '.join(_ROLES)}")
    others = {name: value for name, value in message.items() if name not in (role_key, content_key)}
    others = {name: value for name, value in others.items() if value is not None}
    for name in REASONING_KEYS:
        if name in others:
            as_text(others[name], f"{where}.{name}")
    if role in ("function_call", "tool_call"):
        others["tool_calls"], content = _parse_calls(content, f"{where}.{content_key}"), None
    elif "function_call" in others:  # OpenAI's first form of a call
        others["tool_calls"] = _parse_calls(others.pop("function_call"), f"{where}.function_call")
    calls = others.get("tool_calls")
    if calls is not None and not isinstance(calls, list):
        raise RecordError(f"{where}.tool_calls", f"must be a list of calls, but is {kind(calls)}")
    if calls == []:
        del others["tool_calls"]
    elif calls and _ROLES[role] != "assistant":
        raise RecordError(f"{where}.tool_calls", f"must be the assistant's, but the role is {role!r}")
    turn = {"role": _ROLES[role], **others}
    if content is None and calls:
        return turn
    if isinstance(content, list):
        content = _join_parts(content, f"{where}.{content_key}")
    return {**turn, "content": as_text(content, f"{where}.{content_key}")}


def _join_parts(parts: list, key: str) -> str:
    """The text of OpenAI's content parts."""
    for i, part in enumerate(parts):
        if not isinstance(part, dict) or part.get("type", "text") != "text":
            what = part.get("type") if isinstance(part, dict) else kind(part)
            raise RecordError(f"{key}[{i}]", f"must be a part of type text, but is {what}; only text is taken")
    return "".join(as_text(part.get("text"), f"{key}[{i}].text") for i, part in enumerate(parts))


def _parse_calls(value: Any, key: str) -> list[dict[str, Any]]:
    """Calls as ShareGPT writes them, one or a list of ``{"name": ..., "arguments": ...}`` in JSON, in OpenAI's form."""
    if isinstance(value, str):
        value = parse_json(as_text(value, key), key)
    calls = value if isinstance(value, list) else [value]
    if not all(isinstance(call, dict) and isinstance(call.get("name"), str) for call in calls):
        raise RecordError(key, "must be a call, an object with 'name' and 'arguments'")
    return [{"type": "function", "function": call} for call in calls]


def parse_json(text: str, key: str) -> Any:
    """Reads JSON within a record.

    Args:
        text (str): the JSON.
        key (str): where it is, for messages.

    Returns:
        Any: its value.

    Raises:
        RecordError: if it is not JSON.
    """
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RecordError(key, f"must be JSON, but is not: {error}") from None


def is_transcript(value: Any) -> bool:
    r"""Whether a value is text that begins with ``\n\nHuman:``."""
    return isinstance(value, str) and value.startswith("\n\nHuman:")


def parse_transcript(transcript: Any, key: str) -> list[Turn]:
    """Splits a transcript; turns in a row by the same speaker are one turn, with the blank line between them.

    Args:
        transcript (Any): the transcript.
        key (str): where it is, for messages.

    Returns:
        list[Turn]: its turns, without the whitespace around each.

    Raises:
        RecordError: if it is none.
    """
    before, *speakers_and_texts = _TRANSCRIPT_TURN.split(as_text(transcript, key))
    if before.strip() or not speakers_and_texts:
        raise RecordError(key, "must begin with '\\n\\nHuman:'")
    turns: list[Turn] = []
    for speaker, text in zip(speakers_and_texts[::2], speakers_and_texts[1::2], strict=True):
        role = "user" if speaker == "Human" else "assistant"
        if turns and turns[-1]["role"] == role:
            turns[-1]["content"] = f"{turns[-1]['content']}\n\n{text.strip()}".strip()
        else:
            turns.append({"role": role, "content": text.strip()})
    return turns


def check_order(turns: Sequence[Turn], key: str) -> None:
    """Checks that roles come as a model is trained on them.

    Args:
        turns (Sequence[Turn]): a conversation.
        key (str): where it is, for the message.

    Raises:
        RecordError: unless there is perhaps a system turn, then user and assistant in turn, with results of tools
            between an assistant's call and its answer, and the assistant last.
    """
    roles = [turn["role"] for turn in turns]
    if not re.fullmatch(r"(system )?(user (assistant (tool )+)*assistant ?)+", " ".join(roles)):
        shown = ", ".join(roles) if len(roles) <= 12 else ", ".join([*roles[:6], "...", *roles[-5:]])
        raise RecordError(
            key,
            f"has roles out of order ({shown}): a system turn may come first, then user and assistant alternate, and "
            "the assistant comes last",
        )
