"""Padded batches, of models that are only asked: sampling, and judging."""

from collections.abc import Iterator, Sequence


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
