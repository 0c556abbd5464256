"""Decoders of transformers over trees: log-probs and gradients of the plain computation, or a refusal."""

import copy
import inspect

import numpy as np
import pytest
import torch

transformers = pytest.importorskip("transformers", minversion="5.24")

from prefix_sharing.errors import ConfigError  # noqa: E402
from prefix_sharing.hosts.transformers import check_arithmetic, model, to_tree_model  # noqa: E402
from prefix_sharing.trees import Response, Row, bucket_length  # noqa: E402
from prefix_sharing.trees.row import RowOptions  # noqa: E402

DIMS = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
WITH_HEAD_DIM = DIMS | {"head_dim": 16}  # more in all than hidden_size
WINDOW = {"sliding_window": 24}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
MLA = {
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 12,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "num_key_value_heads": 4,
}
DENSE = {
    "llama": WITH_HEAD_DIM,
    "qwen2": DIMS | WINDOW | {"use_sliding_window": True, "max_window_layers": 1},
    "qwen3": WITH_HEAD_DIM,
    "gemma": WITH_HEAD_DIM,
    "gemma2": WITH_HEAD_DIM | WINDOW,
    "gemma3_text": WITH_HEAD_DIM | WINDOW,
    "smollm3": DIMS,
    "olmo": DIMS,
    "olmo2": DIMS,
    "olmo3": DIMS | WINDOW,
    "mistral": WITH_HEAD_DIM | WINDOW,
    "ministral": WITH_HEAD_DIM | WINDOW,
    "phi": DIMS,
    "phi3": DIMS,
    "granite": DIMS | {"logits_scaling": 4.0, "residual_multiplier": 0.5},
    "glm": WITH_HEAD_DIM,
    "glm4": WITH_HEAD_DIM,
    "cohere": DIMS,
    "cohere2": WITH_HEAD_DIM | WINDOW,
    "exaone4": WITH_HEAD_DIM | WINDOW,
    "starcoder2": DIMS,
    "helium": DIMS | {"head_dim": 12},
    "ernie4_5": DIMS,
    "hunyuan_v1_dense": WITH_HEAD_DIM,
    "gpt_neox": DIMS,
}
SPARSE = {
    "qwen3_moe": WITH_HEAD_DIM | EXPERTS,
    "mixtral": DIMS | {"num_local_experts": 4},
    "deepseek_v3": DIMS | MLA,
    "olmoe": DIMS | EXPERTS,
}


def build(name, **kwargs):
    config = transformers.AutoConfig.for_model(name, **(DENSE | SPARSE)[name] | kwargs)
    torch.manual_seed(0)
    plain = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    for parameter in plain.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.1)
    return plain if name in SPARSE else plain.double()


def make_examples():
    rng = np.random.default_rng(0)
    examples = []
    for num_responses in (2, 4, 3):
        prefix = rng.integers(3, 97, rng.integers(20, 50))
        examples.append([])
        for _ in range(num_responses):
            tokens = np.concatenate([prefix, rng.integers(3, 97, rng.integers(3, 20))])
            examples[-1].append(Response(tokens, np.arange(len(tokens)) >= len(prefix)))
    return examples


def plain_log_probs(plain, examples):
    found = torch.zeros(len(examples), max(map(len, examples)), dtype=next(plain.parameters()).dtype)
    for e, example in enumerate(examples):
        for k, response in enumerate(example):
            tokens = torch.from_numpy(response.tokens)[None]
            log_probs = plain(input_ids=tokens, use_cache=False).logits[0, :-1].log_softmax(-1)
            of_targets = log_probs.gather(1, tokens[0, 1:, None])[:, 0]
            found[e, k] = of_targets[torch.from_numpy(response.scored[1:])].sum()
    return found


PADDED = ("llama", "gemma2", "deepseek_v3")


@pytest.mark.parametrize(
    ("name", "round_length"), [(name, None) for name in (*DENSE, *SPARSE)] + [(name, bucket_length) for name in PADDED]
)
def test_log_probs_and_gradients_are_those_of_separate_sequences(name, round_length):
    plain = build(name)
    tree = to_tree_model(copy.deepcopy(plain), "chains")
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


REFUSED = {
    "gpt_oss": ({**WITH_HEAD_DIM, "num_local_experts": 4, "num_experts_per_tok": 2}, "attention sinks"),
    "qwen3_next": (WITH_HEAD_DIM | EXPERTS, "linear attention"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_known_families_that_a_tree_does_not_cover_are_refused_by_name(name):
    keys, what = REFUSED[name]
    config = transformers.AutoConfig.for_model(name, **keys)
    with torch.device("meta"):
        built = transformers.AutoModelForCausalLM.from_config(config)
    with pytest.raises(ConfigError, match=f"{name} models have {what}"):
        to_tree_model(built, "chains")


@pytest.mark.parametrize("name", REFUSED)
def test_the_self_check_alone_finds_them_too(name, monkeypatch):
    monkeypatch.setattr(model, "_REFUSED", {})
    with pytest.raises(ConfigError, match="compute something else over a tree|cannot be given a tree"):
        check_arithmetic(transformers.AutoConfig.for_model(name, **REFUSED[name][0]))


@pytest.mark.parametrize("name", ["qwen3", "gemma2", "mixtral"])
def test_the_self_check_lets_others_pass(name):
    config = transformers.AutoConfig.for_model(name, **(DENSE | SPARSE)[name])
    assert check_arithmetic(config) < 2e-5


def test_a_model_that_does_not_look_at_positions_is_found(monkeypatch):
    config = transformers.AutoConfig.for_model("llama", **DENSE["llama"])
    forward = transformers.models.llama.modeling_llama.LlamaRotaryEmbedding.forward

    def by_place(self, x, position_ids):
        return forward(self, x, torch.arange(x.shape[1])[None])

    monkeypatch.setattr(transformers.models.llama.modeling_llama.LlamaRotaryEmbedding, "forward", by_place)
    with pytest.raises(ConfigError, match="llama models compute something else over a tree"):
        check_arithmetic(config)


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
