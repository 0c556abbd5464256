"""What judges that are models of transformers have in common: where they run, padding, and conversations as text."""

import itertools
from collections.abc import Sequence
from importlib.util import find_spec

import torch

from prefix_sharing.errors import ConfigError, UserError
from prefix_sharing.tokenizers import Turn

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def check_placement(device: str | None, dtype: str | None, tokens_at_once: int) -> None:
    """Checks what a config says about where a judge runs, without taking the device or importing transformers.

    Args:
        device (str | None): as for ``placement``.
        dtype (str | None): as for ``placement``.
        tokens_at_once (int): as for ``prefix_sharing.planning.batches.in_batches``.

    Raises:
        UserError: if there is no such device or dtype, or transformers is not installed.
    """
    if find_spec("transformers") is None or find_spec("peft") is None:
        problem = "this judge needs models of transformers; pip install 'torchtune-prefix-sharing[transformers]'"
        raise UserError(f"{problem} (Python 3.11 or newer).")
    if dtype is not None and dtype not in DTYPES:
        raise ConfigError("dtype", f"must be one of {', '.join(DTYPES)}, not {dtype}")
    if tokens_at_once < 1:
        raise ConfigError("tokens_at_once", f"must be 1 or more, not {tokens_at_once}")
    if device is not None:
        try:
            kind = torch.device(device).type
        except RuntimeError as error:
            raise ConfigError("device", f"'{device}' is no device; give cpu or cuda, or remove the key") from error
        if kind == "cuda" and not torch.cuda.is_available():
            raise ConfigError("device", f"{device} is not available; set device: cpu or remove the key")


def placement(device: str | None, dtype: str | None) -> tuple[torch.device, torch.dtype]:
    """Where a judge runs, and in what.

    Args:
        device (str | None): None for this process's GPU, or the CPU where there is none.
        dtype (str | None): ``fp32``, ``bf16`` or ``fp16``; None for bf16 on a GPU and fp32 on a CPU.

    Returns:
        tuple[torch.device, torch.dtype]: the device and the dtype of the weights.
    """
    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    return where, DTYPES[dtype or ("fp32" if where.type == "cpu" else "bf16")]


def padded(sequences: Sequence[Sequence[int]], pad_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Sequences side by side, padded at the right.

    Args:
        sequences (Sequence[Sequence[int]]): token ids.
        pad_id (int): what they are padded with.

    Returns:
        tuple[torch.Tensor, torch.Tensor]: token ids and the mask of those that are no padding, shape ``[B, L]``.
    """
    longest = max(map(len, sequences))
    tokens = torch.full((len(sequences), longest), pad_id)
    mask = torch.zeros_like(tokens)
    for i, sequence in enumerate(sequences):
        tokens[i, : len(sequence)] = torch.tensor(sequence)
        mask[i, : len(sequence)] = 1
    return tokens, mask


def ordered_pairs(answers: Sequence[Sequence[str]]) -> list[tuple[int, int, int]]:
    """Each two answers to a prompt, in both orders; not equal ones, which are a tie whatever a model says.

    Args:
        answers (Sequence[Sequence[str]]): the n answers to each prompt.

    Returns:
        list[tuple[int, int, int]]: indices of the prompt, of the first answer and of the second.
    """
    return [
        (p, i, j)
        for p, some in enumerate(answers)
        for i, j in itertools.permutations(range(len(some)), 2)
        if some[i] != some[j]
    ]


def as_text(turns: Sequence[Turn]) -> str:
    """A conversation as plain text, for judges that have no chat template.

    Args:
        turns (Sequence[Turn]): the conversation up to the answer.

    Returns:
        str: what the user says; if there are other turns, each with its role before it.
    """
    if len(turns) == 1:
        return turns[0].get("content") or ""
    return "\n\n".join(f"{turn['role'].capitalize()}: {turn.get('content') or ''}" for turn in turns)
