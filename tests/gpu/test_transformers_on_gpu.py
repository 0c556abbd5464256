"""Decoders of transformers in every mode a GPU has, against their own eager attention on the CPU, a sequence at a time.

What a CPU can compute runs there, too.
"""

import copy
import functools

import pytest
import torch

pytest.importorskip("transformers", minversion="5.24")

from decoders import build, make_examples, plain_log_probs
from prefix_sharing.attention import rounding_of
from prefix_sharing.hosts import checkpoint_activations, compile_layers
from prefix_sharing.hosts.transformers import to_tree_model
from prefix_sharing.trees import Row, RowOptions

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
BF16, FP32 = torch.bfloat16, torch.float32
HEADS = {"hidden_size": 256, "head_dim": 64}
# Keys of 96 and values of 64, which no kernel of FlashAttention takes as they are.
LATENT = {"hidden_size": 256, "qk_nope_head_dim": 64, "qk_rope_head_dim": 32, "v_head_dim": 64}
MODELS = {"llama": HEADS, "gemma2": HEADS, "gemma3_text": HEADS, "qwen3_moe": HEADS, "deepseek_v3": LATENT}


@functools.cache
def expected(name):
    """A model, and the log-probs and gradients of plain sequences."""
    plain, examples = build(name, **MODELS[name]).float(), make_examples()
    for parameter in plain.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.05)
    log_probs = plain_log_probs(plain, examples)
    log_probs.sum().backward()
    gradients = [p.grad if p.grad is not None else torch.zeros_like(p) for p in plain.parameters()]
    return plain, log_probs.detach(), torch.cat([gradient.flatten() for gradient in gradients])


def relative(actual, wanted):
    return ((actual.cpu() - wanted).norm() / wanted.norm()).item()


GPU_MODES = {
    "flex/fp32": ("flex", FP32, {}),
    "flex/bf16": ("flex", BF16, {}),
    "flex/bf16/compile": ("flex", BF16, {"compile": True}),
    "flex/bf16/offload": ("flex", BF16, {"offload": True}),
    "varlen/bf16": ("varlen", BF16, {}),
}
CASES = [(name, "chains/fp32", "chains", FP32, {}) for name in MODELS]
CASES += [
    pytest.param(name, mode, *what, marks=pytest.mark.gpu)
    for name in MODELS
    for mode, what in GPU_MODES.items()
    if not (name == "gemma2" and mode.startswith("varlen"))
]


@pytest.mark.parametrize(("name", "mode", "backend", "dtype", "keys"), CASES)
def test_every_mode_is_near_plain_sequences(measure, name, mode, backend, dtype, keys):
    plain, log_probs, gradients = expected(name)
    model = to_tree_model(copy.deepcopy(plain), backend).to(DEVICE)
    model.zero_grad()
    if keys.get("compile"):
        compile_layers(model)
    if keys.get("offload"):
        checkpoint_activations(model, "full")
    row = Row.from_examples(make_examples(), options=RowOptions(round_length=rounding_of(backend))).to(DEVICE)
    offloading = model.offload_activations(keys.get("offload", False))
    with offloading, torch.autocast(DEVICE.type, BF16, enabled=dtype == BF16):
        found = model(row).log_probs
    found.sum().backward()
    of_log_probs = relative(found.detach(), log_probs)
    grads = [p.grad if p.grad is not None else torch.zeros_like(p) for p in model.parameters()]
    of_gradients = relative(torch.cat([gradient.flatten() for gradient in grads]), gradients)
    measure(f"error_log_probs {name}/{mode}", of_log_probs)
    measure(f"error_gradients {name}/{mode}", of_gradients)
    # A token that bf16 sends to another expert changes more than rounding does.
    sparse = name in ("qwen3_moe", "deepseek_v3")
    most = (1e-5, 1e-4) if dtype == FP32 else (5e-2, 0.5) if sparse else (1e-2, 5e-2)
    assert of_log_probs <= most[0]
    assert of_gradients <= most[1]
