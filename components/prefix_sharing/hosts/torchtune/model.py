"""Gives a built torchtune model tree attention and log-probs of responses as its output.

It changes the class of the model and of its attention layers in place, so parameters, state-dict keys and submodules
stay what they were, and compilation, activation checkpointing and FSDP2 apply as to any torchtune model, afterwards.
"""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any, cast

import numpy as np
import torch
from torch import nn
from torchtune.models.gemma.gemma_norm_embedding import GemmaNormEmbeddings
from torchtune.models.gemma.rms_norm import GemmaRMSNorm
from torchtune.models.gemma2._attention import Gemma2Attention
from torchtune.models.gemma2._component_builders import Gemma2FinalNorm
from torchtune.models.llama3_1._position_embeddings import Llama3ScaledRoPE
from torchtune.models.phi3 import Phi3RotaryPositionalEmbeddings
from torchtune.models.qwen2._positional_embeddings import Qwen2RotaryPositionalEmbeddings
from torchtune.modules import (
    FeedForward,
    MultiHeadAttention,
    RMSNorm,
    RotaryPositionalEmbeddings,
    TiedLinear,
    TransformerDecoder,
    TransformerSelfAttentionLayer,
)
from torchtune.modules.low_precision import FrozenNF4Linear
from torchtune.modules.peft import DoRALinear, LoRALinear, disable_adapter
from torchtune.training import get_act_offloading_ctx_manager
from typing_extensions import override

from prefix_sharing.attention import AttentionBackend, TreeMask, mask_builder
from prefix_sharing.checkpoint import Checkpoint
from prefix_sharing.errors import ConfigError
from prefix_sharing.hosts.torchtune.adapters import freeze_base, has_adapter
from prefix_sharing.hosts.torchtune.dora import BiasedDoRALinear, leave_biases_alone
from prefix_sharing.hosts.torchtune.quantization import is_quantized, materialize_quantized
from prefix_sharing.hosts.torchtune.weights import load_weights
from prefix_sharing.hosts.tree_model import TreeModel
from prefix_sharing.scoring import ResponseLogProbs, response_log_probs
from prefix_sharing.torch_private import unset_fake_temporarily
from prefix_sharing.trees import Row, TreeSizes

SUPPORTED_FAMILIES = (
    "llama2, code_llama2, llama3, llama3_1, llama3_2, llama3_3, mistral, phi3, phi4, gemma, gemma2, qwen2 and qwen2_5"
)


class _AttentionOverTree:
    """Attention with a tree mask; K and V are never expanded."""

    # What torchtune's attention has.
    num_heads: int
    num_kv_heads: int
    head_dim: int
    q_proj: Callable[[torch.Tensor], torch.Tensor]
    k_proj: Callable[[torch.Tensor], torch.Tensor]
    v_proj: Callable[[torch.Tensor], torch.Tensor]
    output_proj: Callable[[torch.Tensor], torch.Tensor]
    pos_embeddings: Callable[..., torch.Tensor]

    @property
    def window(self) -> int | None:
        """How many positions a token may see; None for all."""
        return None

    @property
    def scale(self) -> float | None:
        """What scores are multiplied with; None for ``head_dim ** -0.5``."""
        return None

    @property
    def softcap(self) -> float | None:
        """What scores are bounded to; None for nothing."""
        return None

    def forward(
        self,
        x: torch.Tensor,
        y: torch.Tensor,
        *,
        mask: TreeMask,
        input_pos: torch.Tensor,
        query_pos: torch.Tensor,
    ) -> torch.Tensor:
        """Self-attention over one Row.

        Args:
            x (torch.Tensor): hidden states of the queries, shape ``[1, q, dim]``.
            y (torch.Tensor): hidden states of the Row, shape ``[1, s, dim]``.
            mask (TreeMask): the Row's mask.
            input_pos (torch.Tensor): positions of the Row, shape ``[1, s]``.
            query_pos (torch.Tensor): positions of the queries, shape ``[1, q]``.

        Returns:
            torch.Tensor: shape ``[1, q, dim]``.
        """
        q = self.q_proj(x).view(1, -1, self.num_heads, self.head_dim)
        k = self.k_proj(y).view(1, -1, self.num_kv_heads, self.head_dim)
        v = self.v_proj(y).view(1, -1, self.num_kv_heads, self.head_dim)
        q = self.pos_embeddings(q, input_pos=query_pos).transpose(1, 2)
        k = self.pos_embeddings(k, input_pos=input_pos).transpose(1, 2)
        output = _attend(mask, q, k, v.transpose(1, 2), self.scale, self.softcap)
        return self.output_proj(output.transpose(1, 2).flatten(2))


class TreeAttention(_AttentionOverTree, MultiHeadAttention):
    """torchtune's attention over a tree."""


class TreeGemma2Attention(_AttentionOverTree, Gemma2Attention):
    """torchtune's attention of Gemma 2 over a tree, its window over positions instead of row indices."""

    sliding_window_size: int | None
    scaling: float
    softcapping: float | None

    @property
    @override
    def window(self) -> int | None:
        return self.sliding_window_size

    @property
    @override
    def scale(self) -> float:
        return self.scaling

    @property
    @override
    def softcap(self) -> float | None:
        return self.softcapping


class TreeTransformerLayer(TransformerSelfAttentionLayer):
    """torchtune's layer, which may compute its output for some tokens only."""

    attn: TreeAttention | TreeGemma2Attention
    mlp: nn.Module
    sa_norm: Callable[[torch.Tensor], torch.Tensor]
    mlp_norm: Callable[[torch.Tensor], torch.Tensor]
    sa_scale: Callable[[torch.Tensor], torch.Tensor]
    mlp_scale: Callable[[torch.Tensor], torch.Tensor]

    def forward(
        self, x: torch.Tensor, *, mask: TreeMask, input_pos: torch.Tensor, query_index: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Attention and MLP, with residuals.

        Args:
            x (torch.Tensor): hidden states, shape ``[1, s, dim]``.
            mask (TreeMask): the Row's mask, for queries at ``query_index``.
            input_pos (torch.Tensor): positions, shape ``[1, s]``.
            query_index (torch.Tensor | None): indices of the tokens whose output is needed, shape ``[p]``; the others
                are keys and values only. Default: None, all.

        Returns:
            torch.Tensor: shape ``[1, s, dim]`` or ``[1, p, dim]``.
        """
        keys = queries = self.sa_norm(x)
        query_pos = input_pos
        if query_index is not None:
            queries, x, query_pos = (t.index_select(1, query_index) for t in (keys, x, input_pos))
        x = x + self.sa_scale(self.attn(queries, keys, mask=mask, input_pos=input_pos, query_pos=query_pos))
        return x + self.mlp_scale(self.mlp(self.mlp_norm(x)))


@torch.compiler.disable
def _attend(
    mask: TreeMask, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float | None, softcap: float | None
) -> torch.Tensor:
    # A layer that is compiled must not be compiled anew for the chains of every Row; FlexAttention is compiled anyway.
    return mask.attend(q, k, v, scale=scale, softcap=softcap)


class TreeTransformerDecoder(TreeModel, TransformerDecoder):
    """torchtune's decoder, from a Row to the log-probs of its responses."""

    mask_of: Callable[..., TreeMask]
    # What torchtune's decoder has.
    tok_embeddings: nn.Embedding
    norm: Callable[[torch.Tensor], torch.Tensor]
    output: Callable[[torch.Tensor], torch.Tensor]

    @override
    def forward(self, row: Row) -> ResponseLogProbs:
        h = self.tok_embeddings(row.tokens)
        *layers, last_layer = cast(list[TreeTransformerLayer], list(self.layers))
        masks = {window: self.new_mask(row, window=window) for window in {layer.attn.window for layer in layers}}
        for layer in layers:
            h = layer(h, mask=masks[layer.attn.window], input_pos=row.input_pos)
        # Nothing attends to the output of the last layer, so it is computed only where it predicts something.
        mask = self.new_mask(row, at_predictors=True, window=last_layer.attn.window)
        h = last_layer(h, mask=mask, input_pos=row.input_pos, query_index=row.predictor_index)
        return response_log_probs(self.output, self.norm(h[0]), row, self.vocab_size)

    @override
    def new_mask(self, row: Row, *, at_predictors: bool = False, window: int | None = None) -> TreeMask:
        return self.mask_of(row, at_predictors=at_predictors, window=window)

    @property
    @override
    def vocab_size(self) -> int:
        return self.tok_embeddings.num_embeddings

    @override
    def forward_flops(self, sizes: TreeSizes) -> np.ndarray:
        return forward_flops(self, sizes)

    @property
    @override
    def has_adapter(self) -> bool:
        return has_adapter(self)

    @property
    @override
    def is_quantized(self) -> bool:
        return any(map(is_quantized, self.parameters()))

    @override
    def freeze_base(self, dtype: torch.dtype) -> None:
        freeze_base(self, dtype)

    @override
    def without_adapter(self) -> AbstractContextManager[None]:
        return disable_adapter(self)

    @override
    def offload_activations(self, enabled: bool) -> AbstractContextManager[None]:
        return get_act_offloading_ctx_manager(self, enabled)

    @override
    def materialize(self, device: torch.device, parameter_device: torch.device | None = None) -> None:
        materialize(self, device, parameter_device)

    @override
    def load_weights(self, checkpoint: Checkpoint, seed: int) -> None:
        load_weights(self, checkpoint, seed)


def to_tree_model(
    model: TransformerDecoder, attention_backend: AttentionBackend, kernel_options: Mapping[str, Any] | None = None
) -> TreeTransformerDecoder:
    """Turns a built torchtune model, in place, into one that takes a Row and returns its responses' log-probs.

    Call it before compilation, activation checkpointing and sharding.

    Args:
        model (TransformerDecoder): as torchtune's builders return it.
        attention_backend (AttentionBackend): see ``prefix_sharing.attention.choose_attention_backend``.
        kernel_options (Mapping[str, Any] | None): handed to FlexAttention. Default: None.

    Returns:
        TreeTransformerDecoder: the same object.

    Raises:
        ConfigError: if the model has parts whose arithmetic tree attention does not cover.
    """
    refuse_unsupported(model)
    leave_biases_alone(model)
    if attention_backend == "varlen" and any(isinstance(layer.attn, Gemma2Attention) for layer in model.layers):
        raise ConfigError("attention_backend", "varlen cannot cap attention scores as Gemma 2 does; use flex or chains")
    for layer in model.layers:
        layer.__class__ = TreeTransformerLayer
        layer.attn.__class__ = TreeGemma2Attention if isinstance(layer.attn, Gemma2Attention) else TreeAttention
    model.__class__ = TreeTransformerDecoder
    model.attention_backend = attention_backend
    model.mask_of = mask_builder(attention_backend, kernel_options)
    return model


def forward_flops(model: TransformerDecoder, sizes: TreeSizes) -> np.ndarray:
    """See ``TreeModel.forward_flops``; of torchtune's own model as well.

    Args:
        model (TransformerDecoder): the model.
        sizes (TreeSizes): sizes of trees, shape ``[N]``.

    Returns:
        np.ndarray: shape ``[N]``.
    """
    *layers, last = model.layers
    weights = sum(p.numel() for layer in layers for p in layer.parameters() if p.dim() > 1)
    width = sum(layer.attn.num_heads * layer.attn.head_dim for layer in layers)
    # The last layer computes keys and values everywhere, the rest where it predicts something.
    keys_and_values = sum(proj.weight.numel() for proj in (last.attn.k_proj, last.attn.v_proj))
    at_predictors = sum(p.numel() for p in last.parameters() if p.dim() > 1) - keys_and_values
    at_predictors += model.tok_embeddings.weight.numel()  # as large as the output projection
    return (
        2.0 * (weights + keys_and_values) * sizes.num_tokens
        + 4.0 * width * sizes.num_visible
        + 2.0 * at_predictors * sizes.num_predictors
    )


def materialize(model: nn.Module, device: torch.device, parameter_device: torch.device | None = None) -> None:
    """See ``TreeModel.materialize``; of torchtune's own model as well.

    Args:
        model (nn.Module): on the meta device, sharded or not.
        device (torch.device): where it runs.
        parameter_device (torch.device | None): where its parameters are kept. Default: None, on ``device``.
    """
    model.to_empty(device=parameter_device or device)
    materialize_quantized(model, device)
    # The tables of rotary embeddings are no parameters: nothing loads them. They are real even in a model without
    # values, that of the memory estimate, because making them looks at some.
    with unset_fake_temporarily(), device:
        for module in model.modules():
            if hasattr(module, "rope_init"):
                cast(Any, module).rope_init()


def refuse_unsupported(model: TransformerDecoder) -> None:
    """Raises a ``ConfigError`` if the model has parts whose arithmetic a tree does not cover, as far as is known."""

    def require(name: str, part: object, *types: type) -> None:
        if type(part) not in types:
            problem = f"{name} is a {type(part).__name__}, which prefix sharing does not support; "
            raise ConfigError("model", f"{problem}supported families are {SUPPORTED_FAMILIES}")

    require("the model", model, TransformerDecoder)
    norms = (RMSNorm, GemmaRMSNorm)
    linears = (nn.Linear, LoRALinear, DoRALinear, BiasedDoRALinear, FrozenNF4Linear)
    require("tok_embeddings", model.tok_embeddings, nn.Embedding, GemmaNormEmbeddings)
    require("norm", model.norm, *norms, Gemma2FinalNorm)
    require("output", model.output, TiedLinear, *linears)
    for i, layer in enumerate(model.layers):
        prefix = f"layers.{i}"
        require(prefix, layer, TransformerSelfAttentionLayer)
        require(f"{prefix}.sa_norm", layer.sa_norm, *norms)
        require(f"{prefix}.mlp_norm", layer.mlp_norm, *norms)
        require(f"{prefix}.sa_scale", layer.sa_scale, nn.Identity, *norms)
        require(f"{prefix}.mlp_scale", layer.mlp_scale, nn.Identity, *norms)
        require(f"{prefix}.mlp", layer.mlp, FeedForward)
        require(f"{prefix}.attn", layer.attn, MultiHeadAttention, Gemma2Attention)
        require(
            f"{prefix}.attn.pos_embeddings",
            layer.attn.pos_embeddings,
            RotaryPositionalEmbeddings,
            Llama3ScaledRoPE,
            Phi3RotaryPositionalEmbeddings,
            Qwen2RotaryPositionalEmbeddings,
        )
        for projection in ("q_proj", "k_proj", "v_proj", "output_proj"):
            require(f"{prefix}.attn.{projection}", getattr(layer.attn, projection), *linears)
        if layer.attn.q_norm is not None or layer.attn.attn_dropout > 0:
            what = "attn_dropout above 0" if layer.attn.attn_dropout > 0 else "q_norm"
            raise ConfigError("model", f"{prefix}.attn has {what}, which prefix sharing does not support; remove it")
