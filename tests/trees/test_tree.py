import numpy as np
from hypothesis import given

from plain import examples, response
from prefix_sharing.trees import PrefixTree


def test_layout_of_the_worked_example():
    a, b, c, d, e, f, x = range(7)
    tree = PrefixTree.from_responses(
        [
            response([a, b, c, d, x], [0, 0, 0, 1, 1]),
            response([a, b, c, e, x], [0, 0, 0, 1, 1]),
            response([a, b, f, x], [0, 0, 1, 1]),
        ]
    )
    assert tree.tokens.tolist() == [a, b, c, d, e, f]
    assert tree.input_pos.tolist() == [0, 1, 2, 3, 3, 2]
    assert tree.subtree_end.tolist() == [6, 6, 5, 4, 5, 6]
    assert [(chain.span, chain.ancestors) for chain in tree.chains] == [
        ((0, 4), []),
        ((4, 5), [(0, 3)]),
        ((5, 6), [(0, 2)]),
    ]
    assert tree.predictor_index.tolist() == [2, 3, 2, 4, 1, 5]
    assert tree.targets.tolist() == [d, x, e, x, f, x]
    assert tree.responses.tolist() == [0, 0, 1, 1, 2, 2]


def test_one_token_answers_need_the_prompt_only():
    tree = PrefixTree.from_responses([response([1, 2, 3], [0, 0, 1]), response([1, 2, 4], [0, 0, 1])])
    assert tree.tokens.tolist() == [1, 2]
    assert tree.predictor_index.tolist() == [1, 1]
    assert tree.targets.tolist() == [3, 4]


@given(examples())
def test_every_response_reads_its_own_tokens_at_its_own_positions(responses):
    for share_prefix in (True, False):
        tree = PrefixTree.from_responses(responses, share_prefix=share_prefix)
        i, j = np.indices((len(tree), len(tree)))
        visible = (j <= i) & (i < tree.subtree_end[None, :])
        for predictor, target, k in zip(tree.predictor_index, tree.targets, tree.responses, strict=True):
            seen = np.flatnonzero(visible[predictor])
            n = len(seen)
            assert tree.tokens[seen].tolist() == responses[k].tokens[:n].tolist()
            assert tree.input_pos[seen].tolist() == list(range(n))
            assert responses[k].tokens[n] == target
            assert responses[k].scored[n]


@given(examples())
def test_every_scored_token_counts_once_for_each_response_through_it(responses):
    tree = PrefixTree.from_responses(responses)
    assert tree.num_scored.tolist() == [int(r.scored[1:].sum()) for r in responses]
    counted = set(zip(tree.predictor_index.tolist(), tree.targets.tolist(), tree.responses.tolist(), strict=True))
    assert len(counted) == len(tree.targets) == tree.num_scored.sum()


@given(examples())
def test_no_token_is_computed_twice_where_prefixes_are_shared(responses):
    tree = PrefixTree.from_responses(responses)
    distinct_prefixes = {tuple(r.inputs[: n + 1].tolist()) for r in responses for n in range(len(r.inputs))}
    assert len(tree) == len(distinct_prefixes)
    apart = PrefixTree.from_responses(responses, share_prefix=False)
    assert len(apart) == sum(len(r.inputs) for r in responses)


@given(examples())
def test_chains_cover_exactly_the_mask(responses):
    tree = PrefixTree.from_responses(responses)
    i, j = np.indices((len(tree), len(tree)))
    visible = (j <= i) & (i < tree.subtree_end[None, :])
    covered = np.zeros_like(visible)
    for chain in tree.chains:
        start, end = chain.span
        for ancestor in chain.ancestors:
            covered[start:end, slice(*ancestor)] = True
        covered[start:end, start:end] = np.tri(end - start, dtype=bool)
    assert (covered == visible).all()
    assert [chain.span[0] for chain in tree.chains] == [0, *[chain.span[1] for chain in tree.chains]][
        : len(tree.chains)
    ]
