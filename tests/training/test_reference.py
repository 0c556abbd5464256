import functools

import pytest
import torch
from torchtune.models.llama3 import llama3

from plain import plain_log_probs
from prefix_sharing.model import to_tree_model
from prefix_sharing.quickstart import preference_pairs, tokenizer
from prefix_sharing.reference import reference_log_probs
from prefix_sharing.training import RowBuilder

DIMS = {"vocab_size": 2048, "num_layers": 1, "num_heads": 2, "num_kv_heads": 1, "embed_dim": 16, "max_seq_len": 256}


@pytest.fixture
def dataset():
    return preference_pairs(tokenizer(), num_pairs=10)


@pytest.fixture
def models():
    plain, tree = llama3(**DIMS, intermediate_dim=24), llama3(**DIMS, intermediate_dim=24)
    tree.load_state_dict(plain.state_dict())
    return plain, to_tree_model(tree, "chains")


@pytest.mark.parametrize("share_prefix", [True, False])
@pytest.mark.parametrize("batch_size", [1, 3, 20])
def test_values_are_those_of_plain_sequences_by_example(dataset, models, share_prefix, batch_size):
    plain, tree = models
    make_row = RowBuilder(torch.device("cpu"), share_prefix, in_buckets=False)
    examples = [7, 2, 9, 0]
    log_probs = reference_log_probs(tree, dataset, make_row, batch_size, examples)
    assert log_probs.shape == (10, 2)
    assert not log_probs.requires_grad
    with torch.no_grad():
        expected = torch.stack([plain_log_probs(plain, dataset[i]) for i in examples])
    torch.testing.assert_close(log_probs[examples], expected, rtol=1e-5, atol=1e-5)
    others = [i for i in range(10) if i not in examples]
    assert log_probs[others].isnan().all()


def test_padding_to_buckets_changes_nothing(dataset, models):
    _, tree = models
    compute = functools.partial(reference_log_probs, tree, dataset, batch_size=4)
    padded, unpadded = (
        compute(make_row=RowBuilder(torch.device("cpu"), True, in_buckets=in_buckets)) for in_buckets in (True, False)
    )
    torch.testing.assert_close(padded, unpadded, rtol=1e-5, atol=1e-5)


def test_no_data_set_has_no_reference():
    assert reference_log_probs(None, None, None, 1) is None
