"""Settings for every test: few threads, no progress bars, random seeds fixed."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # two workers share the cores

import gc
import itertools

import hypothesis
import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import flex_attention as torch_flex

from prefix_sharing.attention import flex, varlen

hypothesis.settings.register_profile("default", deadline=None, derandomize=True, print_blob=True)
hypothesis.settings.load_profile("default")
torch.set_num_threads(1)


def pytest_collection_modifyitems(items):
    # The longest runs are in the files at the top. They come first, so that no worker waits for one at the end.
    items.sort(key=lambda item: len(item.path.parts))


def pytest_runtest_setup(item):
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a GPU")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def pictures():
    """Lets a test draw its pictures."""


@pytest.fixture(autouse=True)
def _no_pictures(request, monkeypatch):
    # Drawing takes as long as a short run. Figures are laid out all the same.
    if "pictures" not in request.fixturenames:
        monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda *args, **kwargs: None)


@pytest.fixture(autouse=True, scope="module")
def _little_to_collect():
    # What has been imported and compiled so far stays. torchtune and torch collect garbage in every run, which would
    # go through all of it and take a third of the time.
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True, scope="module")
def _datasets_cache_of_module(tmp_path_factory):
    # of fixtures that several tests share
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("module") / "datasets_cache")
        yield


@pytest.fixture(autouse=True)
def _own_datasets_cache(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets_cache")


def plain_varlen(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale, window_size, enable_gqa):
    """What FlashAttention computes, a sequence at a time: causal, aligned at the lower right."""
    before, after = window_size
    assert after == 0
    assert enable_gqa
    assert query.shape[2] == key.shape[2] == value.shape[2]
    outputs, sizes = [], []
    for (a, b), (c, d) in zip(
        itertools.pairwise(cu_seq_q.tolist()), itertools.pairwise(cu_seq_k.tolist()), strict=True
    ):
        shift = (d - c) - (b - a)
        visible = torch.ones(b - a, d - c, dtype=torch.bool).tril(shift)
        if before >= 0:
            visible = visible.triu(shift - before)
        q, k, v = (x.transpose(0, 1)[None] for x in (query[a:b], key[c:d], value[c:d]))
        output = F.scaled_dot_product_attention(q, k, v, attn_mask=visible, scale=scale, enable_gqa=True)
        outputs.append(output[0].transpose(0, 1))
        sizes.append((b - a, d - c))
    assert (max_q, max_k) == tuple(map(max, zip(*sizes, strict=True)))
    assert (b, d) == (len(query), len(key))
    return torch.cat(outputs)


@pytest.fixture
def on_cpu(monkeypatch):
    """What stands in for kernels that CPUs lack.

    FlexAttention's eager operator, whose backward works once the device check is out of the way, and one SDPA a
    sequence for FlashAttention.
    """
    # The eager operator goes through dynamo, which would give up after so many masks of other tests.
    torch._dynamo.reset()
    monkeypatch.setattr(varlen, "varlen_attn", plain_varlen)
    monkeypatch.setattr(torch_flex, "_validate_device", lambda *args: None)
    monkeypatch.setattr(flex, "_compiled_flex_attention", lambda dynamic: torch_flex.flex_attention)
    with torch._dynamo.config.patch(recompile_limit=1000, accumulated_recompile_limit=1000):
        yield
