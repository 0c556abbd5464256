"""What judges that are models of transformers have in common: where they run, batches, and conversations as text."""

from collections.abc import Iterator, Sequence
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
        tokens_at_once (int): as for ``in_batches``.

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


def in_batches(lengths: Sequence[int], tokens_at_once: int) -> Iterator[list[int]]:
    """Batches of sequences that are alike in length, the longest first, so that memory runs out at once or never.

    Args:
        lengths (Sequence[int]): tokens of each.
        tokens_at_once (int): tokens of a batch, padding included; a sequence that is longer is one of its own.

    Yields:
        list[int]: indices of sequences, the longest first.
    """
    batch: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if batch and (len(batch) + 1) * lengths[batch[0]] > tokens_at_once:
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


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
