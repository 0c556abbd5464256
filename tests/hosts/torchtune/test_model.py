"""The invariant: log-probs, counts and gradients are those of each response computed as its own full sequence."""

import functools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchtune.models.llama3_2 import llama3_2
from torchtune.modules.layer_dropout import prepare_layer_dropout
from torchtune.modules.model_fusion import DeepFusionModel

from plain import (
    DIMS,
    FAMILIES,
    VOCAB,
    examples,
    in_double,
    plain_log_probs,
    plain_num_scored,
    response,
    rows_of_examples,
)
from prefix_sharing import scoring
from prefix_sharing.errors import UserError
from prefix_sharing.hosts import to_tree_model
from prefix_sharing.trees import Row, RowOptions

PRECISIONS = {"fp64": (torch.float64, 1e-10), "fp32": (torch.float32, 1e-5)}


@functools.cache
def models(family, backend, precision):
    """A plain model and a tree model with the same weights."""
    torch.manual_seed(1)
    plain = FAMILIES[family]()
    for parameter in plain.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    tree = FAMILIES[family]()
    tree.load_state_dict(plain.state_dict())
    tree = to_tree_model(tree, backend)
    return (in_double(plain), in_double(tree)) if precision == "fp64" else (plain, tree)


def relative_error(actual, expected):
    return ((actual - expected).norm() / expected.norm().clamp(min=1e-30)).item()


def assert_equals_plain(family, backend, precision, row_examples, *, share_prefix, padding):
    _, tolerance = PRECISIONS[precision]
    plain, tree = models(family, backend, precision)
    row = Row.from_examples(
        row_examples, options=RowOptions(share_prefix=share_prefix, round_length=lambda n: n + padding)
    )
    output = tree(row)

    expected = [plain_log_probs(plain, example) for example in row_examples]
    for e, example in enumerate(row_examples):
        assert relative_error(output.log_probs[e, : len(example)], expected[e]) <= tolerance
        assert output.num_scored[e, : len(example)].tolist() == plain_num_scored(example)
        assert (output.log_probs[e, len(example) :] == 0).all()

    weights = [torch.randn_like(e) for e in expected]
    plain.zero_grad()
    sum((w * e).sum() for w, e in zip(weights, expected, strict=True)).backward()
    tree.zero_grad()
    sum((w * output.log_probs[i, : len(w)]).sum() for i, w in enumerate(weights)).backward()
    # An error is relative to the gradient as a whole: a parameter whose own gradient cancels has only rounding left.
    scale = torch.stack([p.grad.norm() for p in plain.parameters()]).norm()
    for (name, p), (tree_name, q) in zip(plain.named_parameters(), tree.named_parameters(), strict=True):
        assert name == tree_name
        assert (p.grad - q.grad).norm() <= tolerance * scale, name


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("backend", ["chains", "flex", "varlen"])
def test_random_trees_equal_plain_sequences(on_cpu, backend, precision):
    @settings(max_examples=40)
    @given(rows_of_examples(), st.booleans(), st.integers(0, 3))
    def check(row_examples, share_prefix, padding):
        assert_equals_plain(
            "llama3_2_tied", backend, precision, row_examples, share_prefix=share_prefix, padding=padding
        )

    check()


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_equals_its_plain_forward(family, precision):
    @settings(max_examples=8)
    @given(rows_of_examples())
    def check(row_examples):
        assert_equals_plain(family, "chains", precision, row_examples, share_prefix=True, padding=1)

    check()


@pytest.mark.parametrize("precision", PRECISIONS)
def test_gemma2_with_flex_equals_its_plain_forward(on_cpu, precision):
    @settings(max_examples=8)
    @given(rows_of_examples())
    def check(row_examples):
        assert_equals_plain("gemma2", "flex", precision, row_examples, share_prefix=True, padding=1)

    check()


def test_gemma2_is_refused_by_a_backend_that_cannot_cap_scores():
    with pytest.raises(UserError, match="varlen cannot cap attention scores as Gemma 2 does; use flex or chains"):
        to_tree_model(FAMILIES["gemma2"](), "varlen")


def test_chunked_projection_changes_nothing(monkeypatch):
    monkeypatch.setattr(scoring, "chunk_size", lambda vocab_size: 3)
    tokens = torch.randint(0, VOCAB, (3, 12)).tolist()
    row_examples = [[response([5, 6, *t], [0, 1, *[1] * 12]) for t in tokens]]
    assert_equals_plain("llama3", "chains", "fp64", row_examples, share_prefix=True, padding=0)


def test_chunked_projection_keeps_the_logits_of_the_last_chunk_only(monkeypatch):
    monkeypatch.setattr(scoring, "chunk_size", lambda vocab_size: 4)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
        _, tree = models("llama3", "chains", "fp32")
        tree(Row.from_examples([[response(range(20), [1] * 20)]]))
    # 19 tokens predict one: four chunks of four, and three. The weights are kept, too.
    weights = (DIMS["embed_dim"], VOCAB)
    assert [shape for shape in kept if shape[-1:] == (VOCAB,) and shape != weights] == [(3, VOCAB)]


def test_a_row_of_padding_has_zero_gradients_everywhere():
    _, tree = models("llama3_2_tied", "chains", "fp32")
    output = tree(Row.from_examples([], options=RowOptions(round_length=lambda n: 4)))
    assert output.log_probs.shape == (0, 0)
    tree.zero_grad()
    output.log_probs.sum().backward()
    assert all((p.grad == 0).all() for p in tree.parameters())


def test_state_dict_keys_stay():
    plain, tree = models("llama3_2_tied", "chains", "fp32")
    assert list(plain.state_dict()) == list(tree.state_dict())


def test_log_probs_are_reduced_in_fp32_under_bf16_autocast():
    _, tree = models("llama3", "chains", "fp32")
    row = Row.from_examples([[response([1, 2, 3, 4], [0, 1, 1, 1])]])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = tree(row)
    assert output.log_probs.dtype == torch.float32
    torch.testing.assert_close(output.log_probs, tree(row).log_probs, rtol=0.05, atol=0.05)


def with_layer_dropout(model):
    """As torchtune's early exit recipes have it."""
    prepare_layer_dropout(model.layers, prob_max=0.1)
    return model


@pytest.mark.parametrize(
    ("build", "part"),
    [
        (
            lambda d: DeepFusionModel(decoder=llama3_2(**d), encoder=torch.nn.Identity()),
            "the model is a DeepFusionModel",
        ),
        (lambda d: with_layer_dropout(llama3_2(**d)), "layers.0 is a ModuleLayerDropoutWrapper"),
        (lambda d: llama3_2(**d, attn_dropout=0.1), "attn_dropout above 0"),
    ],
)
def test_other_families_are_refused_by_name(build, part):
    dims = {"vocab_size": 9, "num_layers": 1, "num_heads": 4, "num_kv_heads": 2, "embed_dim": 16, "max_seq_len": 8}
    with pytest.raises(UserError, match=part):
        to_tree_model(build(dims), "chains")


def cut_scored(of_one, count):
    """The same response with its first scored tokens only."""
    scored = of_one.scored & (np.cumsum(of_one.scored & (np.arange(len(of_one.scored)) > 0)) <= count)
    return response(of_one.tokens, scored)


@settings(max_examples=15)
@given(st.lists(examples(min_responses=2, max_responses=2), min_size=1, max_size=3), st.floats(0, 1))
def test_what_makes_a_response_longer_is_weighed_by_ld_alpha(row_examples, ld_alpha):
    plain, tree = models("llama3", "chains", "fp64")
    output = tree(Row.from_examples(row_examples, options=RowOptions(tail_weight=ld_alpha)))
    for e, example in enumerate(row_examples):
        shortest = min(plain_num_scored(example))
        whole = plain_log_probs(plain, example)
        shared = plain_log_probs(plain, [cut_scored(of_one, shortest) for of_one in example])
        assert relative_error(output.log_probs[e], shared + ld_alpha * (whole - shared)) <= 1e-10
        assert output.num_scored[e].tolist() == plain_num_scored(example)


@settings(max_examples=15)
@given(rows_of_examples())
def test_confidence_is_that_of_wpo(row_examples):
    plain, tree = models("llama3", "chains", "fp64")
    output = tree(Row.from_examples(row_examples, options=RowOptions(confidence=True)))
    assert tree(Row.from_examples(row_examples)).confidence is None
    assert not output.confidence.requires_grad
    for e, example in enumerate(row_examples):
        for k, of_one in enumerate(example):
            tokens = torch.from_numpy(of_one.tokens)
            probs = plain(tokens[None])[0, :-1].softmax(-1)
            picked = probs.gather(1, tokens[1:, None])[:, 0]
            aligned = torch.log(picked / probs.square().sum(-1))[torch.from_numpy(of_one.scored[1:])]
            assert output.confidence[e, k].item() == pytest.approx(aligned.mean().item(), rel=1e-9, abs=1e-9)


@settings(max_examples=15)
@given(st.lists(examples(min_responses=2, max_responses=2), min_size=1, max_size=3))
def test_prompt_and_chosen_response_are_scored_together(row_examples):
    plain, tree = models("llama3", "chains", "fp64")
    row = Row.from_examples(row_examples, options=RowOptions(whole_sequence=True))
    without = Row.from_examples(row_examples)
    assert (row.num_tokens, row.paired_tokens) == (without.num_tokens, without.paired_tokens)
    assert torch.equal(row.tokens, without.tokens)
    assert torch.equal(row.pairs, without.pairs)
    output = tree(row)
    assert len(tree(without).whole_log_probs) == 0
    for e, example in enumerate(row_examples):
        end = len(example[0].inputs) + 1
        whole = response(example[0].tokens[:end], np.ones(end, dtype=bool))
        *expected, expected_whole = plain_log_probs(plain, [*example, whole])
        assert relative_error(output.log_probs[e], torch.stack(expected)) <= 1e-10
        assert relative_error(output.whole_log_probs[e], expected_whole) <= 1e-10
        assert output.num_scored[e].tolist() == plain_num_scored(example)
        assert output.whole_num_scored[e].item() == end - 1
        assert row.pairs[e].tolist() == [2 * e, 2 * e + 1]
