"""The plain computation that everything is compared with: one full sequence at a time, by torchtune's own functions."""

import numpy as np
import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import nn
from torchtune.data import CROSS_ENTROPY_IGNORE_IDX
from torchtune.models.gemma import gemma
from torchtune.models.gemma.rms_norm import GemmaRMSNorm
from torchtune.models.gemma2 import gemma2
from torchtune.models.gemma2._attention import Gemma2Attention
from torchtune.models.llama2 import llama2
from torchtune.models.llama3 import llama3
from torchtune.models.llama3_1 import llama3_1
from torchtune.models.llama3_2 import llama3_2, lora_llama3_2
from torchtune.models.mistral import mistral
from torchtune.models.phi3 import phi3
from torchtune.models.qwen2 import qwen2
from torchtune.modules import RMSNorm
from torchtune.rlhf import get_batch_log_probs

from prefix_sharing.planning import ExampleSizes
from prefix_sharing.trees import Response

VOCAB = 23
DIMS = {"vocab_size": VOCAB, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "embed_dim": 16, "max_seq_len": 64}

LORA = {"lora_attn_modules": ["q_proj", "v_proj"], "apply_lora_to_mlp": True, "lora_rank": 2, "lora_alpha": 4}

FAMILIES = {
    "llama2": lambda: llama2(**DIMS, intermediate_dim=24),
    "llama3": lambda: llama3(**DIMS, intermediate_dim=24),
    "llama3_1": lambda: llama3_1(**DIMS, intermediate_dim=24),
    "llama3_2_tied": lambda: llama3_2(**DIMS, intermediate_dim=24),
    "lora": lambda: lora_llama3_2(**LORA, **DIMS, intermediate_dim=24),
    "dora": lambda: lora_llama3_2(**LORA, **DIMS, intermediate_dim=24, use_dora=True),
    "mistral": lambda: mistral(**DIMS, intermediate_dim=24),
    "phi3": lambda: phi3(**DIMS, intermediate_dim=24),
    "gemma": lambda: gemma(**DIMS, head_dim=6, intermediate_dim=24),
    # Sequences are longer than the window, and the caps low enough to matter.
    "gemma2": lambda: gemma2(
        **DIMS,
        head_dim=6,
        intermediate_dim=24,
        sliding_window_size=5,
        hidden_capping_value=2.0,
        final_capping_value=3.0,
        query_pre_attn_scalar=3,
    ),
    "qwen2": lambda: qwen2(**DIMS, intermediate_dim=24),
    "qwen2_tied": lambda: qwen2(**DIMS, intermediate_dim=24, tie_word_embeddings=True),
}


class _RMSNormInAnyPrecision(RMSNorm):
    """torchtune's norm without its cast to fp32, which would hide everything below 1e-7."""

    def forward(self, x):
        return F.rms_norm(x, self.normalized_shape, self.scale, self.eps)


class _GemmaRMSNormInAnyPrecision(GemmaRMSNorm):
    """The same for Gemma's."""

    def forward(self, x):
        return self._norm(x) * (1 + self.scale)


class _Gemma2AttentionInAnyPrecision(Gemma2Attention):
    """torchtune's attention of Gemma 2 without its cast of scores to fp32."""

    def forward(self, x, y, *, mask=None, input_pos=None):
        length = x.shape[1]
        q, k, v = (proj(x).view(1, length, -1, self.head_dim) for proj in (self.q_proj, self.k_proj, self.v_proj))
        q, k = (self.pos_embeddings(z, input_pos=input_pos) for z in (q, k))
        k, v = (z.repeat_interleave(self.num_heads // self.num_kv_heads, dim=2) for z in (k, v))
        scores = torch.einsum("bihd,bjhd->bhij", q, k) * self.scaling
        scores = self.softcapping * torch.tanh(scores / self.softcapping)
        i, j = torch.arange(length)[:, None], torch.arange(length)[None, :]
        visible = j <= i
        if self.sliding_window_size is not None:
            visible &= i - j < self.sliding_window_size
        weights = scores.masked_fill(~visible, float("-inf")).softmax(-1)
        return self.output_proj(torch.einsum("bhij,bjhd->bihd", weights, v).flatten(2))


class _RotationInAnyPrecision(nn.Module):
    """Another module's rotation in the precision of the input: a linear map of each position, read off the module."""

    def __init__(self, rope: nn.Module, head_dim: int, max_seq_len: int) -> None:
        super().__init__()
        # One basis vector a batch entry, at every position: [in, position, 1, out].
        unit = torch.eye(head_dim)[:, None, None, :].expand(head_dim, max_seq_len, 1, head_dim)
        # [position, in, out]
        self.rotation = rope(unit)[:, :, 0].transpose(0, 1).double()

    def forward(self, x, *, input_pos=None):
        input_pos = torch.arange(x.shape[1])[None] if input_pos is None else input_pos
        return torch.einsum("bshi,bsio->bsho", x, self.rotation[input_pos].to(x.dtype))


def in_double(model):
    """The model in fp64 throughout."""
    model = model.double()
    for module in model.modules():
        if isinstance(module, RMSNorm):
            module.__class__ = _RMSNormInAnyPrecision
        elif isinstance(module, GemmaRMSNorm):
            module.__class__ = _GemmaRMSNormInAnyPrecision
        elif type(module) is Gemma2Attention:
            module.__class__ = _Gemma2AttentionInAnyPrecision
    for layer in model.layers:
        layer.attn.pos_embeddings = _RotationInAnyPrecision(
            layer.attn.pos_embeddings.float(), layer.attn.head_dim, model.max_seq_len
        )
    return model


def plain_log_probs(model, responses):
    """Log-prob of each response: torchtune's forward on the full sequence, its labels, its log-prob function."""
    log_probs = []
    for response in responses:
        tokens = torch.from_numpy(response.tokens)[None]
        labels = tokens.masked_fill(~torch.from_numpy(response.scored)[None], CROSS_ENTROPY_IGNORE_IDX)
        # torchtune's unembed casts logits to fp32, which an fp64 comparison must not.
        model.unembed = lambda h: model.output(model.norm(h))
        log_probs.append(get_batch_log_probs(model(tokens), labels)[0])
    return torch.stack(log_probs)


def plain_num_scored(responses):
    return [int(response.scored[1:].sum()) for response in responses]


def response(tokens, scored) -> Response:
    return Response(np.array(tokens, dtype=np.int64), np.array(scored, dtype=bool))


@st.composite
def examples(draw, min_responses=1, max_responses=5):
    """An example: responses that share prefixes to any depth, or none, may be prefixes of one another, or equal."""
    num_responses = draw(st.integers(min_responses, max_responses))
    responses = []
    for _ in range(num_responses):
        tokens, scored = [], []
        if responses and draw(st.integers(0, 4)) > 0:
            parent = draw(st.sampled_from(responses))
            cut = draw(st.integers(0, len(parent.tokens)))
            tokens = parent.tokens[:cut].tolist()
            scored = parent.scored[:cut].tolist()
            if draw(st.integers(0, 4)) == 0:
                scored = draw(st.lists(st.booleans(), min_size=cut, max_size=cut))
        new = draw(st.integers(0 if len(tokens) > 1 else 2, 9))
        tokens += draw(st.lists(st.integers(0, VOCAB - 1), min_size=new, max_size=new))
        scored += draw(st.lists(st.booleans(), min_size=new, max_size=new))
        if not any(scored[1:]):
            scored[-1] = True
        responses.append(response(tokens, scored))
    return responses


def rows_of_examples(max_examples=3):
    return st.lists(examples(), min_size=1, max_size=max_examples)


def uniform_sizes(num_examples):
    """Examples that are all alike, for a plan."""
    ones = np.ones(num_examples, dtype=np.int64)
    return ExampleSizes(ones, ones.astype(np.float64), ones)
