"""Decoders of transformers over trees: log-probs and gradients of the plain computation, or a refusal."""

import copy
import inspect

import pytest
import torch

transformers = pytest.importorskip("transformers", minversion="5.24")

from decoders import (  # noqa: E402
    DENSE,
    DIMS,
    EXPERTS,
    SPARSE,
    WITH_HEAD_DIM,
    build,
    make_examples,
    plain_log_probs,
)
from prefix_sharing.attention import ChainsMask  # noqa: E402
from prefix_sharing.errors import ConfigError  # noqa: E402
from prefix_sharing.hosts.transformers import check_arithmetic, model, self_check, to_tree_model  # noqa: E402
from prefix_sharing.trees import Row, bucket_length  # noqa: E402
from prefix_sharing.trees.row import RowOptions  # noqa: E402

PADDED = ("llama", "gemma2", "deepseek_v3")
# Grouped keys, windows by layer, capped scores, values smaller than keys, experts, norms of queries and keys, rotary
# embeddings of a part of a head.
ON_OTHER_BACKENDS = ("llama", "gemma3_text", "gemma2", "deepseek_v3", "qwen3_moe", "qwen3", "phi")
CASES = [
    *((name, "chains", None) for name in (*DENSE, *SPARSE)),
    *((name, "chains", bucket_length) for name in PADDED),
    *((name, "flex", bucket_length) for name in ON_OTHER_BACKENDS),
    *((name, "varlen", None) for name in ON_OTHER_BACKENDS if name != "gemma2"),
]


@pytest.mark.parametrize(("name", "backend", "round_length"), CASES)
def test_log_probs_and_gradients_are_those_of_separate_sequences(on_cpu, name, backend, round_length):
    plain = build(name)
    tree = to_tree_model(copy.deepcopy(plain), backend)
    examples = make_examples()
    found = tree(Row.from_examples(examples, options=RowOptions(round_length=round_length))).log_probs
    expected = plain_log_probs(plain, examples)
    # Norms and softmax of these models are in fp32 whatever the rest is.
    torch.testing.assert_close(found.to(expected.dtype), expected, rtol=1e-6, atol=5e-6)
    weights = torch.randn_like(expected)
    (found * weights).sum().backward()
    (expected * weights).sum().backward()
    for (key, ours), theirs in zip(tree.named_parameters(), plain.parameters(), strict=True):
        if theirs.grad is None:
            assert ours.grad is None or not ours.grad.any(), key
        else:
            difference = (ours.grad - theirs.grad).norm()
            # A bias of keys has no effect: its gradient is rounding alone.
            assert difference <= 1e-5 * theirs.grad.norm() + 1e-6, key


@pytest.mark.parametrize("name", [*DENSE, *SPARSE])
def test_keys_and_values_reach_attention_in_their_own_heads_and_under_autocast_in_bf16(name, monkeypatch):
    seen, attend = set(), ChainsMask.attend

    def recorded(self, q, k, v, **kwargs):
        seen.update((x.shape[1], x.dtype) for x in (k, v))
        return attend(self, q, k, v, **kwargs)

    monkeypatch.setattr(ChainsMask, "attend", recorded)
    tree = to_tree_model(build(name).float(), "chains")
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        tree(Row.from_examples(make_examples()))
    assert seen == {(tree.config.num_key_value_heads, torch.bfloat16)}


def test_a_backend_that_cannot_cap_scores_is_refused():
    with pytest.raises(ConfigError, match="varlen cannot cap attention scores as this model does; use flex"):
        to_tree_model(build("gemma2"), "varlen")


def test_state_dict_keys_are_the_models_own():
    plain = build("qwen3")
    assert list(to_tree_model(copy.deepcopy(plain), "chains").state_dict()) == list(plain.state_dict())


@pytest.mark.parametrize("name", ["qwen3", "gemma3_text", "llama", "phi3"])
def test_a_model_on_the_meta_device_computes_the_same_once_it_has_its_weights(name):
    plain = build(name).float()
    config = copy.deepcopy(plain.config)
    with torch.device("meta"):
        tree = to_tree_model(transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32), "chains")
    tree.materialize(torch.device("cpu"))
    tree.load_state_dict(plain.state_dict())
    examples = make_examples()
    torch.testing.assert_close(
        tree(Row.from_examples(examples)).log_probs, plain_log_probs(plain, examples), rtol=1e-5, atol=1e-5
    )


MAMBA = DIMS | {"mamba_n_heads": 4, "mamba_d_head": 24, "mamba_n_groups": 1, "mamba_d_state": 8, "mamba_chunk_size": 8}
CONVOLUTIONS = {"layer_types": ["conv", "full_attention", "conv"]}
REFUSED = {
    "gpt_oss": WITH_HEAD_DIM | {"num_local_experts": 4, "num_experts_per_tok": 2},
    "bloom": DIMS,
    "mpt": DIMS,
    "falcon": DIMS | {"alibi": True},
    "mamba": DIMS,
    "mamba2": DIMS | {"num_heads": 4, "head_dim": 24, "state_size": 8, "n_groups": 1, "chunk_size": 8},
    "falcon_mamba": DIMS,
    "falcon_h1": MAMBA | {"mamba_d_ssm": 96},
    "bamba": MAMBA,
    "jamba": DIMS | {"num_experts": 2, "attn_layer_period": 2, "attn_layer_offset": 1},
    "nemotron_h": DIMS
    | {"layers_block_type": ["linear_attention", "mlp", "full_attention"], "ssm_state_size": 8}
    | {"mamba_num_heads": 4, "mamba_head_dim": 24, "n_groups": 1, "chunk_size": 8},
    "granitemoehybrid": MAMBA | {"layer_types": ["mamba", "attention", "mamba"]},
    "zamba": DIMS
    | {"num_hidden_layers": 6, "attn_layer_period": 2, "attn_layer_offset": 1}
    | {"attention_head_dim": 24, "mamba_dt_rank": 4, "mamba_d_state": 8},
    "zamba2": DIMS
    | {"layer_types": ["mamba", "hybrid", "mamba"], "hybrid_layer_ids": [1], "attention_head_dim": 24}
    | {"n_mamba_heads": 4, "mamba_headdim": 24, "mamba_d_state": 8, "chunk_size": 8},
    "rwkv": DIMS,
    "recurrent_gemma": DIMS,
    "qwen3_next": WITH_HEAD_DIM | EXPERTS,
    "qwen3_5_text": WITH_HEAD_DIM,
    "minimax": DIMS | {"num_local_experts": 2},
    "lfm2": DIMS | CONVOLUTIONS,
    "lfm2_moe": DIMS | EXPERTS | CONVOLUTIONS | {"num_dense_layers": 1},
    "llama4_text": DIMS,
}
WITHOUT_A_TREE = {
    **dict.fromkeys(("bloom", "mpt", "falcon", "rwkv", "llama4_text"), "has no list of decoder layers"),
    **dict.fromkeys(("mamba", "mamba2", "falcon_mamba"), "cannot be given a tree"),
    "gpt_oss": "has attention sinks",
    "zamba": "cannot be tried on a small random one",
}
"""Refused by the self-check before there is anything to measure."""


def on_meta(name, keys):
    with torch.device("meta"):
        return transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(name, **keys))


def test_every_known_family_that_a_tree_does_not_cover_is_tried():
    assert list(REFUSED) == list(model._REFUSED)


@pytest.mark.parametrize("name", REFUSED)
def test_known_families_that_a_tree_does_not_cover_are_refused_by_name(name):
    with pytest.raises(ConfigError, match=f"{name} models have {model._REFUSED[name]}"):
        to_tree_model(on_meta(name, REFUSED[name]), "chains")


@pytest.mark.parametrize("name", REFUSED)
def test_the_self_check_alone_finds_them_too(name, monkeypatch):
    built = on_meta(name, REFUSED[name])
    monkeypatch.setattr(model, "_REFUSED", {})
    measured = f"{name} models compute something else over a tree than over separate sequences: log-probs of a small"
    with pytest.raises(ConfigError, match=WITHOUT_A_TREE.get(name, measured)):
        check_arithmetic(built)


@pytest.mark.parametrize("name", [*DENSE, *SPARSE])
def test_the_self_check_lets_others_pass(name):
    differences = check_arithmetic(on_meta(name, (DENSE | SPARSE)[name]), gradients=True)
    assert differences.log_probs < 1e-5
    assert differences.gradients < 2e-5


def by_place(rope, x, position_ids):
    return ROPE_OF_LLAMA(rope, x, torch.arange(x.shape[1])[None])


def with_alibi(module, query, key, value, attention_mask, **kwargs):
    position = torch.arange(query.shape[2])
    bias = (position[None, :] - position[:, None]) / 2
    return EAGER_OF_LLAMA(module, query, key, value, attention_mask + bias, **kwargs)


LLAMA = transformers.models.llama.modeling_llama
ROPE_OF_LLAMA, EAGER_OF_LLAMA = LLAMA.LlamaRotaryEmbedding.forward, LLAMA.eager_attention_forward


@pytest.mark.parametrize(
    ("part", "name", "changed"),
    [(LLAMA.LlamaRotaryEmbedding, "forward", by_place), (LLAMA, "eager_attention_forward", with_alibi)],
    ids=["positions", "alibi"],
)
def test_a_model_with_other_positions_is_found(monkeypatch, part, name, changed):
    monkeypatch.setattr(part, name, changed)
    with pytest.raises(ConfigError, match="llama models compute something else over a tree"):
        check_arithmetic(on_meta("llama", DENSE["llama"]))


def test_a_layer_unlike_those_before_it_is_tried(monkeypatch):
    tried = []
    monkeypatch.setattr(self_check, "compare", lambda name, build_small, *args, **kwargs: tried.append(build_small()))
    check_arithmetic(
        on_meta("deepseek_v3", SPARSE["deepseek_v3"] | {"num_hidden_layers": 9, "first_k_dense_replace": 3})
    )
    check_arithmetic(on_meta("smollm3", DIMS | {"num_hidden_layers": 9}))  # every fourth layer has no positions
    check_arithmetic(on_meta("llama", DIMS | {"num_hidden_layers": 9}))
    assert [len(small.get_decoder().layers) for small in tried] == [4, 4, 2]


def test_gradients_are_compared_if_asked_for(monkeypatch):
    forward = LLAMA.LlamaMLP.forward

    def of_last_rows(mlp, x):
        return forward(mlp, torch.cat([x[:, :-8].detach(), x[:, -8:]], dim=1))

    monkeypatch.setattr(LLAMA.LlamaMLP, "forward", of_last_rows)
    built = on_meta("llama", DENSE["llama"])
    assert check_arithmetic(built).gradients is None
    with pytest.raises(
        ConfigError, match="llama models .*: gradients of model.* differ by .*, although log-probs agree"
    ):
        check_arithmetic(built, gradients=True)


def test_other_models_than_decoders_are_refused():
    with torch.device("meta"):
        built = transformers.AutoModelForCausalLM.from_config(transformers.GPT2Config(n_layer=1, n_embd=8, n_head=2))
    with pytest.raises(ConfigError, match="GPT2LMHeadModel is not a decoder of text"):
        to_tree_model(built, "chains")


@pytest.mark.parametrize("round_length", [None, bucket_length], ids=["tight", "padded"])
@pytest.mark.parametrize("name", ["qwen3_moe", "mixtral", "olmoe"])
def test_the_loss_of_routers_is_transformers_own_over_each_token_of_the_tree_once(name, round_length):
    plain = build(name, output_router_logits=True, router_aux_loss_coef=0.5)
    examples = make_examples()
    row = Row.from_examples(examples, options=RowOptions(round_length=round_length))
    logits: list[list[torch.Tensor]] = [[] for _ in range(plain.config.num_hidden_layers)]
    for example in examples:
        shared = 0
        for response in example:
            tokens = torch.from_numpy(response.tokens[:-1])[None]  # a tree has no use for the last one
            of_sequence = plain(input_ids=tokens, use_cache=False, output_router_logits=True).router_logits
            for of_layer, found in zip(logits, of_sequence, strict=True):
                of_layer.append(found[shared:])
            shared = int(response.scored.argmax())  # the prefix counts with the first response
    loss_of = vars(inspect.getmodule(type(plain)))["load_balancing_loss_func"]
    whole = tuple(torch.cat(of_layer) for of_layer in logits)
    assert whole[0].shape[0] == row.num_tokens
    num_experts = plain.config.num_experts if name != "mixtral" else plain.config.num_local_experts
    expected = 0.5 * loss_of(whole, num_experts, plain.config.num_experts_per_tok)
    tree = to_tree_model(copy.deepcopy(plain), "chains")
    found = tree(row)
    assert found.aux_loss.item() == pytest.approx(expected.item(), rel=1e-5)
    found.aux_loss.backward()
    expected.backward()
    for (key, ours), theirs in zip(tree.named_parameters(), plain.parameters(), strict=True):
        if theirs.grad is not None:
            assert (ours.grad - theirs.grad).norm() <= 1e-4 * theirs.grad.norm() + 1e-6, key


def test_there_is_no_loss_of_routers_unless_it_is_asked_for():
    row = Row.from_examples(make_examples())
    assert to_tree_model(build("qwen3_moe"), "chains")(row).aux_loss is None
    assert to_tree_model(build("llama"), "chains")(row).aux_loss is None


@pytest.mark.parametrize(
    ("rope", "expected"),
    [
        ({"rope_type": "default"}, 256),
        ({"rope_type": "dynamic", "factor": 4.0, "original_max_position_embeddings": 64}, 64),
        (
            {
                "rope_type": "longrope",
                "short_factor": [1.0] * 8,
                "long_factor": [2.0] * 8,
                "original_max_position_embeddings": 64,
            },
            64,
        ),
    ],
    ids=lambda value: value["rope_type"] if isinstance(value, dict) else "",
)
def test_no_sequence_is_so_long_that_the_others_of_its_row_get_other_frequencies(rope, expected):
    tree = to_tree_model(build("llama", rope_parameters=rope | {"rope_theta": 10_000.0}), "chains")
    assert tree.max_seq_len == expected
