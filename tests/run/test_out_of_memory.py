"""What a run says when memory is not enough."""

import pytest
import torch

from plain import response
from prefix_sharing.errors import UserError
from prefix_sharing.run.out_of_memory import out_of_memory_explained
from prefix_sharing.run.signals import StopRequest
from prefix_sharing.trees import Row
from runs import make_config, make_recipe

PAIR = [response([1, 2, 3, 4], [0, 0, 1, 1]), response([1, 2, 5, 4], [0, 0, 1, 1])]
ERRORS = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    MemoryError(),
    RuntimeError(
        "[enforce fail at alloc_cpu.cpp:127] . DefaultCPUAllocator: not enough memory: you tried to allocate 9"
    ),
]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_step_row_and_keys_are_named(tmp_path, error):
    row = Row.from_examples([PAIR] * 3, num_responses=2)
    expected = (
        rf"^Out of memory at step 7, in a Row of {row.tokens.shape[1]} tokens with 3 examples: lower batch_size or "
        "tokenizer.max_seq_len, set enable_activation_checkpointing: True, train an adapter"
    )
    with pytest.raises(UserError, match=expected), out_of_memory_explained(make_config(tmp_path), 7, row):
        raise error


def test_of_a_packed_run_it_is_pack_len(tmp_path):
    packed = {"packing": "step", "global_batch_size": 4, "batch_size": None, "gradient_accumulation_steps": None}
    cfg = make_config(tmp_path, **packed, enable_activation_checkpointing=True)
    row = Row.from_examples([PAIR], num_responses=2)
    with (
        pytest.raises(UserError, match="lower pack_len or tokenizer.max_seq_len, train an"),
        out_of_memory_explained(cfg, 1, row),
    ):
        raise ERRORS[0]


def test_other_errors_stay_what_they_are(tmp_path):
    with pytest.raises(RuntimeError, match="^another$"), out_of_memory_explained(make_config(tmp_path), 1):
        raise RuntimeError("another")


def test_the_recipe_says_so(tmp_path):
    recipe = make_recipe(tmp_path, dataset_val=None)
    recipe.setup()
    forward, recipe.optimizer.step = recipe.forward, None

    def out_of_memory(model, row):
        raise ERRORS[0]

    recipe.forward = out_of_memory
    with pytest.raises(UserError, match=r"Out of memory at step 1, in a Row of [\d,]+ tokens with 4 examples: lower"):
        recipe.train(StopRequest())
    recipe.forward = forward

    def no_room():
        raise ERRORS[0]

    recipe.optimizer.step = no_room
    with pytest.raises(UserError, match="Out of memory at step 1, in the optimizer: train an adapter"):
        recipe.train(StopRequest())
    recipe.cleanup()
