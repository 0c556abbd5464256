"""The self-check: models that a tree covers pass, others are refused by what was measured, before any work."""

import functools
import math
import pickle
import re

import pytest
import torch
from omegaconf import OmegaConf
from torch import nn
from torchtune.models.gemma2 import gemma2_2b
from torchtune.models.llama3_2 import llama3_2, llama3_2_1b, lora_llama3_2
from torchtune.models.qwen2 import lora_qwen2
from torchtune.modules import MultiHeadAttention, RotaryPositionalEmbeddings

import prefix_sharing.run.setup
from plain import DIMS, FAMILIES, LORA
from prefix_sharing.errors import ConfigError
from prefix_sharing.hosts.torchtune import check_arithmetic, model, self_check
from prefix_sharing.run.setup import self_check as check_of_run
from runs import MODEL, make_config, make_recipe
from stubs import attend_with_alibi

LARGE = {**DIMS, "vocab_size": 700, "embed_dim": 256}
"""Large enough to be made smaller."""

COVERED = FAMILIES | {
    "large": lambda: llama3_2(**LARGE, intermediate_dim=320),
    "mlp as wide as hidden states": lambda: llama3_2(**LARGE, intermediate_dim=256),
    "qlora": lambda: lora_llama3_2(**LORA, **LARGE, intermediate_dim=320, quantize_base=True, use_dora=True),
    "qlora of attention": lambda: lora_llama3_2(
        **{**LORA, "apply_lora_to_mlp": False}, **LARGE, intermediate_dim=320, quantize_base=True
    ),
    "dora with biases": lambda: lora_qwen2(**LORA, **LARGE, intermediate_dim=320, use_dora=True),
}


def check(build, gradients=False):
    with torch.device("meta"):
        built = build()
    return check_arithmetic("some", built, gradients=gradients)


@pytest.mark.parametrize("name", COVERED)
def test_models_that_a_tree_covers_pass(name):
    differences = check(COVERED[name], gradients=True)
    assert differences.log_probs < 1e-5
    assert differences.gradients < 2e-5


@pytest.mark.parametrize("build", [llama3_2_1b, gemma2_2b])
def test_models_of_billions_of_parameters_are_made_small(build, monkeypatch):
    sizes = []
    make_small = self_check._made_small

    def made_small(built):
        small = make_small(built)
        sizes.append((len(small.layers), sum(p.numel() for p in small.parameters())))
        return small

    monkeypatch.setattr(self_check, "_made_small", made_small)
    assert check(build).log_probs < 1e-4
    ((num_layers, num_parameters),) = sizes
    assert num_layers == 2
    assert num_parameters < 4e7


def add_positions_by_row(module, args, output):
    """Absolute positions that are indices in the row."""
    angles = torch.arange(output.shape[1])[:, None] / torch.arange(1, 1 + output.shape[2])
    return output + angles.sin()


def shift_tokens(module, args, output):
    """Half of each hidden state is that of the token before, as RWKV mixes them."""
    return (output + nn.functional.pad(output, (0, 0, 1, 0))[:, :-1]) / 2


def attend_to_sink(q, k, v, **kwargs):
    """One more term in the denominator, as gpt-oss has it."""
    scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
    scores = scores.masked_fill(torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1), float("-inf"))
    return torch.cat([scores, torch.zeros_like(scores[..., :1])], -1).softmax(-1)[..., :-1] @ v


def rope_by_row(rope, x, *, input_pos=None):
    return RotaryPositionalEmbeddings.forward(rope, x)


def llama_with(change, **dims):
    """A model of supported parts, of which something is changed that is no part."""
    built = llama3_2(**DIMS | dims, intermediate_dim=24)
    change(built)
    return built


def of_attention(name, value, layers=slice(None)):
    def change(built):
        for layer in built.layers[layers]:
            setattr(layer.attn, name, value)

    return change


def ropes_by_row(built):
    for layer in built.layers:
        layer.attn.pos_embeddings.forward = functools.partial(rope_by_row, layer.attn.pos_embeddings)


CHANGES = {
    "ALiBi": of_attention("_attention_call", attend_with_alibi),
    "attention sinks": of_attention("_attention_call", attend_to_sink),
    "not causal": of_attention("is_causal", False),
    "rope by row": ropes_by_row,
    "absolute positions by row": lambda built: built.tok_embeddings.register_forward_hook(add_positions_by_row),
    "token shift": lambda built: built.layers[0].sa_norm.register_forward_hook(shift_tokens),
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_a_tree_does_not_cover_is_refused_by_what_was_measured(name):
    found = r"some models compute something else over a tree than .*: log-probs of a small random one differ by \d"
    with pytest.raises(ConfigError, match=found):
        check(lambda: llama_with(CHANGES[name]))


def test_a_layer_unlike_those_before_it_is_tried():
    with pytest.raises(ConfigError, match="log-probs of a small random one differ"):
        check(lambda: llama_with(of_attention("_attention_call", attend_with_alibi, slice(3, 4)), num_layers=6))


class AlibiAttention(MultiHeadAttention):
    def forward(self, x, y=None, *, mask=None, input_pos=None):
        self._attention_call = attend_with_alibi
        return super().forward(x, y, mask=mask, input_pos=input_pos)


class RopeByRow(RotaryPositionalEmbeddings):
    def forward(self, x, *, input_pos=None):
        return super().forward(x)


def with_class(part, cls):
    def change(built):
        for layer in built.layers:
            layer.get_submodule(part).__class__ = cls

    return change


@pytest.mark.parametrize(("part", "cls"), [("attn", AlibiAttention), ("attn.pos_embeddings", RopeByRow)])
def test_the_self_check_alone_finds_parts_of_other_types_too(part, cls, monkeypatch):
    def build():
        return llama_with(with_class(part, cls))

    with pytest.raises(ConfigError, match=f"layers.0.{part} is a {cls.__name__}, which prefix sharing does not supp"):
        check(build)
    for module in (model, self_check):
        monkeypatch.setattr(module, "refuse_unsupported", lambda built: None)
    with pytest.raises(ConfigError, match="log-probs of a small random one differ"):
        check(build)


def truncate_backpropagation(module, args, output):
    """Gradients reach the last rows only."""
    return torch.cat([output[:, :-8].detach(), output[:, -8:]], dim=1)


def test_gradients_are_compared_if_asked_for():
    def build():
        return llama_with(lambda built: built.layers[0].register_forward_hook(truncate_backpropagation))

    assert check(build).gradients is None
    found = r"gradients of [a-z_.0-9]+ in a small random one differ by \d.* of their norm, although log-probs agree"
    with pytest.raises(ConfigError, match=found):
        check(build, gradients=True)


def refuse_rows(module, args, output, *, longer_than):
    if output.shape[1] > longer_than:
        raise ValueError("too long")


@pytest.mark.parametrize(
    ("longer_than", "message"),
    [
        (0, "'self_check': set it to False, since some models cannot be tried on a small random one: too long."),
        (16, "'model': some models cannot be given a tree: too long."),
    ],
)
def test_a_model_that_fails_is_one_sentence(longer_than, message):
    hook = functools.partial(refuse_rows, longer_than=longer_than)
    with pytest.raises(ConfigError) as caught:
        check(lambda: llama_with(lambda built: built.layers[0].register_forward_hook(hook)))
    assert message in str(caught.value)


def config_of(tmp_path, builder, **keys):
    return make_config(tmp_path, model={**MODEL, "_component_": builder}, **keys)


def test_a_run_says_what_was_found(tmp_path, caplog):
    with caplog.at_level("INFO", logger="prefix_sharing"):
        check_of_run(make_config(tmp_path))
        check_of_run(make_config(tmp_path, self_check="gradients"))
    first, second = caplog.messages
    number = r"\de[+-]\d\d"
    found = "passed: over a tree and over separate sequences log-probs differ by a relative"
    of_log_probs = rf"Self-check of llama3 {found} {number} \(up to 1e-05 is rounding\)"
    assert re.fullmatch(of_log_probs, first)
    assert re.fullmatch(rf"{of_log_probs}, their gradients by {number} \(up to 1e-04\)", second)


def test_it_can_be_turned_off(tmp_path):
    with pytest.raises(ConfigError, match="alibi_llama3 models compute something else"):
        check_of_run(config_of(tmp_path, "stubs.alibi_llama3"))
    check_of_run(config_of(tmp_path, "stubs.alibi_llama3", self_check=False))


def test_a_run_checks_its_model_once_not_the_references(tmp_path, monkeypatch):
    checked = []
    monkeypatch.setattr(
        prefix_sharing.run.setup, "check_arithmetic", lambda node, *, gradients: checked.append((node, gradients))
    )
    recipe = make_recipe(tmp_path, **{"reference.precompute": False, "self_check": "gradients"})
    recipe.setup()
    recipe.cleanup()
    assert checked == [(OmegaConf.create(MODEL), True)]


def test_rank_zero_checks_and_all_ranks_learn_what_it_found(tmp_path, monkeypatch):
    cfg = config_of(tmp_path, "stubs.alibi_llama3")
    sent = []
    setup = prefix_sharing.run.setup
    monkeypatch.setattr(setup, "broadcast_object", lambda value: sent.append(pickle.dumps(value)) or value)
    with pytest.raises(ConfigError) as on_rank_zero:
        check_of_run(cfg)
    monkeypatch.setattr(setup, "is_rank_zero", lambda: False)
    monkeypatch.setattr(setup, "check_arithmetic", None)
    monkeypatch.setattr(setup, "broadcast_object", lambda value: pickle.loads(sent[0]))
    with pytest.raises(ConfigError) as on_another_rank:
        check_of_run(cfg)
    assert str(on_another_rank.value) == str(on_rank_zero.value)


def test_random_numbers_of_the_run_stay_what_they_were(tmp_path):
    before = torch.get_rng_state()
    check_of_run(make_config(tmp_path))
    assert torch.equal(torch.get_rng_state(), before)
