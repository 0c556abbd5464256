"""What comes before an answer, from wherever a record has it, and putting the two together."""

from collections.abc import Sequence
from typing import Any

from prefix_sharing.datasets.forms.messages import is_transcript, parse_messages, parse_transcript
from prefix_sharing.datasets.forms.record import Record, RecordError, as_text, kind
from prefix_sharing.tokenizers import Turn

SOURCES = ("prompt", "conversations", "question", "query", "instruction", "context", "messages", "input")
"""Columns that hold a prompt, the first that a record has: ``input`` is one only where there is no ``instruction``."""


def prompt_of(record: Record) -> list[Turn]:
    """The turns before the answers: system, history and question, each where the record has one.

    Args:
        record (Record): the record.

    Returns:
        list[Turn]: the turns; none where the answers are whole conversations.

    Raises:
        RecordError: if they are malformed, or a system prompt is given twice.
    """
    there = [name for name in SOURCES if name in record]
    name = next((name for name in there if record.peek(name) not in ("", [])), there[0] if there else None)
    if name == "instruction" and record.get("input"):
        question = "\n".join(filter(None, (record.text("instruction"), record.text("input"))))
        turns = parse_prompt(question, record.key(name))
    else:
        turns = [] if name is None else parse_prompt(record.get(name), record.key(name))
    turns = _history_of(record) + turns
    return with_system(record, turns)


def parse_prompt(prompt: Any, key: str) -> list[Turn]:
    """Reads a prompt.

    Args:
        prompt (Any): a user's question, a transcript, or messages.
        key (str): where it is, for messages.

    Returns:
        list[Turn]: its turns.

    Raises:
        RecordError: if it is malformed.
    """
    if is_transcript(prompt):
        turns = parse_transcript(prompt, key)
        return turns[:-1] if turns[-1] == {"role": "assistant", "content": ""} else turns
    if isinstance(prompt, str):
        return [{"role": "user", "content": as_text(prompt, key)}]
    if isinstance(prompt, (list, dict)):
        return parse_messages(prompt, key) if prompt else []
    raise RecordError(key, f"must be a string or a list of messages, but is {kind(prompt)}")


def _history_of(record: Record) -> list[Turn]:
    """Alpaca's earlier rounds, ``[[question, answer], ...]``."""
    history, key = record.get("history"), record.key("history")
    if history in (None, "", []):
        return []
    if not isinstance(history, list):
        raise RecordError(key, f"must be a list of pairs, question and answer, but is {kind(history)}")
    turns: list[Turn] = []
    for i, exchange in enumerate(history):
        if not isinstance(exchange, list) or len(exchange) != 2:
            raise RecordError(f"{key}[{i}]", "must be a pair, question and answer")
        for role, text in zip(("user", "assistant"), exchange, strict=True):
            turns.append({"role": role, "content": as_text(text, f"{key}[{i}]")})
    return turns


def with_system(record: Record, turns: list[Turn]) -> list[Turn]:
    """Puts the system prompt that a record has in a column of its own before the turns.

    Args:
        record (Record): the record.
        turns (list[Turn]): what it goes before.

    Returns:
        list[Turn]: the turns with a system turn first, if there is one.

    Raises:
        RecordError: if the turns have another one.
    """
    name = next((name for name in ("system", "system_prompt") if record.get(name)), None)
    if name is None:
        return turns
    system: Turn = {"role": "system", "content": record.text(name)}
    if not turns or turns[0]["role"] != "system":
        return [system, *turns]
    if turns[0] != system:
        raise RecordError(record.key(name), "is not the system prompt that the messages begin with; keep one of them")
    return turns


def join(prompt: Sequence[Turn], answer: Sequence[Turn], key: str) -> tuple[list[Turn], str]:
    """The conversation that a prompt and an answer make, whatever the answer repeats of the prompt.

    Args:
        prompt (Sequence[Turn]): the turns before the answer.
        answer (Sequence[Turn]): the answer, perhaps with the prompt or its end before it. One that begins with an
            assistant's turn after a prompt that ends with one goes on with that.
        key (str): where the answer is, for messages.

    Returns:
        tuple[list[Turn], str]: the conversation, and what the prompt holds of its last turn: the answer is the rest.

    Raises:
        RecordError: if the two do not fit.
    """
    prompt, answer = list(prompt), list(answer)
    if not prompt or _same(answer[: len(prompt)], prompt):
        return answer, ""
    for overlap in range(min(len(prompt), len(answer) - 1), 0, -1):
        if _same(prompt[-overlap:], answer[:overlap]):
            return [*prompt, *answer[overlap:]], ""
    if any(_same(answer[i : i + len(prompt)], prompt) for i in range(len(answer))):
        return answer, ""
    begun, first = prompt[-1], answer[0]["role"]
    can_go_on = begun["role"] == "assistant" and "tool_calls" not in begun
    if can_go_on and len(prompt) == len(answer) > 1 and _same(prompt[:-1], answer[:-1]):
        if answer[-1].get("content", "").startswith(begun["content"]):
            return answer, begun["content"]
    elif can_go_on and first == "assistant":
        goes_on, *after = answer
        whole = {**begun, **goes_on, "content": begun["content"] + goes_on.get("content", "")}
        return [*prompt[:-1], whole, *after], "" if after else begun["content"]
    elif first == "assistant" or (first == "user" and begun["role"] in ("assistant", "system")):
        return [*prompt, *answer], ""
    problem = "neither begins with an assistant's turn nor repeats the end of the prompt, so the two do not fit"
    raise RecordError(key, f"{problem}; column_map: {{prompt: null}} reads the answers alone")


def _same(turns: Sequence[Turn], others: Sequence[Turn]) -> bool:
    """Whether turns are equal, whitespace around them aside."""
    return [_stripped(turn) for turn in turns] == [_stripped(turn) for turn in others]


def _stripped(turn: Turn) -> Turn:
    return {name: value.strip() if isinstance(value, str) else value for name, value in turn.items()}
