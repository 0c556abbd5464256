"""How time grows with the tokens of a Row and with the examples of a data set."""

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import datasets
import pyarrow as pa
import torch

from prefix_sharing.attention import mask_builder, rounding_of, tree_block_mask
from prefix_sharing.benchmark.layers import first_layer, one_pair, random_qkv, synchronize
from prefix_sharing.benchmark.workloads import draw_lengths, make_pairs
from prefix_sharing.datasets import PrefixPreferenceDataset, StepLoader
from prefix_sharing.datasets.table import FEATURES, tokenized_example
from prefix_sharing.hosts import TreeModel
from prefix_sharing.planning import ByLength, ExampleSizes, Plan
from prefix_sharing.trees import PrefixTree, Row, RowOptions, TreeSizes

_EXAMPLE = (256, 128)
"""Prompt and response of each example of a Row: 512 tokens."""

_STEPS_LOADED = 20
_EXAMPLES_PER_STEP = 64
_DIFFERENT_EXAMPLES = 1000
"""A larger data set repeats them: building a Row costs the same."""


def time_rows(
    model: TreeModel,
    device: torch.device,
    num_tokens: Sequence[int],
    autocast: torch.autocast,
    progress: Callable[[], None],
) -> Iterator[dict[str, Any]]:
    """Times masks, attention and a whole forward and backward pass at several Row lengths.

    Args:
        model (TreeModel): a model of torchtune; checkpointed, if long Rows are to fit into memory.
        device (torch.device): where it is.
        num_tokens (Sequence[int]): tokens per Row, multiples of 512.
        autocast (torch.autocast): the precision.
        progress (Callable[[], None]): called after each length.

    Yields:
        dict[str, Any]: ``tokens, chains_mask_s, block_mask_s, attention_s, step_s, attention_flops, step_flops``.
    """
    pair = one_pair(*_EXAMPLE)
    size = TreeSizes.of([PrefixTree.from_responses(pair).size])
    flops_of_one = 3 * float(model.forward_flops(size)[0])
    options = RowOptions(round_length=rounding_of(model.attention_backend))
    attn = first_layer(model).attn

    for length in num_tokens:
        num_examples = length // 512
        row = Row.from_examples([pair] * num_examples, options=options).to(device)
        yield {
            "tokens": length,
            **_seconds_of_row(model, row, device, autocast, warm_up=length == min(num_tokens)),
            "attention_flops": num_examples * 12.0 * attn.num_heads * attn.head_dim * float(size.num_visible[0]),
            "step_flops": num_examples * flops_of_one,
        }
        progress()


def _seconds_of_row(
    model: TreeModel, row: Row, device: torch.device, autocast: torch.autocast, *, warm_up: bool
) -> dict[str, float]:
    """The least of three times of masks and attention, after one that does not count, and one time of a step.

    The step of a long Row takes minutes, so ``warm_up`` says whether one of those goes before, too.
    """
    new_chains = mask_builder("chains")
    mask = model.new_mask(row)
    qkv = random_qkv(first_layer(model).attn, row.tokens.shape[1], device, autocast)

    def chains_mask() -> None:
        new_chains(row)
        new_chains(row, at_predictors=True)

    def block_mask() -> None:
        tree_block_mask(row.subtree_end)
        tree_block_mask(row.subtree_end, query_index=row.predictor_index)

    def attention() -> None:
        mask.attend(*qkv).sum().backward()

    def step() -> None:
        with autocast:
            loss = model(row).log_probs.sum()
        loss.backward()
        model.zero_grad(set_to_none=True)

    def timed(work: Callable[[], None]) -> float:
        synchronize(device)
        start = time.perf_counter()
        work()
        synchronize(device)
        return time.perf_counter() - start

    seconds = {}
    for work in (chains_mask, block_mask, attention):
        work()
        seconds[f"{work.__name__}_s"] = min(timed(work) for _ in range(3))
    if warm_up:
        step()
    return {**seconds, "step_s": timed(step)}


def time_examples(num_examples: Sequence[int], pack_len: int, progress: Callable[[], None]) -> Iterator[dict[str, Any]]:
    """Times planning an epoch, opening a tokenized data set, and building Rows.

    Args:
        num_examples (Sequence[int]): examples in the data set, multiples of 1,000.
        pack_len (int): maximum number of tokens in a Row.
        progress (Callable[[], None]): called after each number.

    Yields:
        dict[str, Any]: ``examples, plan_s, open_s, load_s``; the last is the time of a step's Rows.
    """
    lengths = draw_lengths("hh", _DIFFERENT_EXAMPLES, longest=pack_len // 2)
    lines = [
        tokenized_example(
            [response.tokens.tolist() for response in pair],
            [response.scored.tolist() for response in pair],
            [(0, 1)],
            "",
        )
        for pair in make_pairs(lengths, vocab_size=1000)
    ]
    table = pa.Table.from_pylist(lines, schema=FEATURES.arrow_schema)
    for count in num_examples:
        repeated = datasets.Dataset(pa.concat_tables([table] * (count // _DIFFERENT_EXAMPLES)))
        start = time.perf_counter()
        dataset = PrefixPreferenceDataset(repeated, "pairs of the benchmark")
        opened = time.perf_counter()
        sizes = dataset.sizes()
        plan = Plan(
            sizes=ExampleSizes(sizes.num_tokens, sizes.num_tokens.astype(float), dataset.num_pairs),
            packing=ByLength(pack_len),
            examples_per_step=_EXAMPLES_PER_STEP,
            shuffle=True,
        )
        epoch = plan.epoch()
        for _ in epoch:
            pass
        planned = time.perf_counter()
        steps = StepLoader(torch.device("cpu"))(dataset, epoch)
        num_steps = min(_STEPS_LOADED, len(epoch))
        for _ in range(num_steps):
            next(steps)
        yield {
            "examples": count,
            "open_s": opened - start,
            "plan_s": planned - opened,
            "load_s": (time.perf_counter() - planned) / num_steps,
        }
        progress()
