"""Gives a built torchtune model tree attention and log-probs of responses as its output.

This is the one module that knows the inside of torchtune's models. It changes the class of the model and of its
attention layers in place, so parameters, state-dict keys and submodules stay what they were, and compilation,
activation checkpointing and FSDP2 apply as to any torchtune model, afterwards.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

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
from torchtune.modules.peft import DoRALinear, LoRALinear

from prefix_sharing.attention import AttentionBackend, TreeMask, mask_builder
from prefix_sharing.errors import UserError
from prefix_sharing.rows import Row, TreeSize
from prefix_sharing.scoring import response_log_probs

SUPPORTED_FAMILIES = (
    "llama2, code_llama2, llama3, llama3_1, llama3_2, llama3_3, mistral, phi3, phi4, gemma, gemma2, qwen2 and qwen2_5"
)


class ResponseLogProbs(NamedTuple):
    """What the model returns for a row.

    Attributes:
        log_probs (torch.Tensor): summed log-prob of each response's scored tokens, shape ``[E, K]``, fp32 or wider.
        num_scored (torch.Tensor): number of those tokens, shape ``[E, K]``.
        confidence (torch.Tensor | None): see ``response_log_probs``, shape ``[E, K]``; None unless the model
            ``computes_confidence``.
    """

    log_probs: torch.Tensor
    num_scored: torch.Tensor
    confidence: torch.Tensor | None = None


class _AttentionOverTree:
    """Attention with a tree mask; K and V are never expanded."""

    window: int | None = None
    scale: float | None = None
    softcap: float | None = None

    def forward(
        self,
        x: torch.Tensor,
        y: torch.Tensor,
        *,
        mask: TreeMask,
        input_pos: torch.Tensor,
        query_pos: torch.Tensor,
    ) -> torch.Tensor:
        """Self-attention over one row.

        Args:
            x (torch.Tensor): hidden states of the queries, shape ``[1, q, dim]``.
            y (torch.Tensor): hidden states of the row, shape ``[1, s, dim]``.
            mask (TreeMask): the row's mask.
            input_pos (torch.Tensor): positions of the row, shape ``[1, s]``.
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

    @property
    def window(self) -> int | None:
        """How many positions a token may see."""
        return self.sliding_window_size

    @property
    def scale(self) -> float:
        """What scores are multiplied with."""
        return self.scaling

    @property
    def softcap(self) -> float | None:
        """What scores are bounded to."""
        return self.softcapping


class TreeTransformerLayer(TransformerSelfAttentionLayer):
    """torchtune's layer, which may compute its output at some rows only."""

    def forward(
        self, x: torch.Tensor, *, mask: TreeMask, input_pos: torch.Tensor, rows: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Attention and MLP, with residuals.

        Args:
            x (torch.Tensor): hidden states, shape ``[1, s, dim]``.
            mask (TreeMask): the row's mask, for queries at ``rows``.
            input_pos (torch.Tensor): positions, shape ``[1, s]``.
            rows (torch.Tensor | None): where the output is needed, shape ``[p]``; the others are keys and values only.
                Default: None, everywhere.

        Returns:
            torch.Tensor: shape ``[1, s, dim]`` or ``[1, p, dim]``.
        """
        keys = queries = self.sa_norm(x)
        query_pos = input_pos
        if rows is not None:
            queries, x, query_pos = (t.index_select(1, rows) for t in (keys, x, input_pos))
        x = x + self.sa_scale(self.attn(queries, keys, mask=mask, input_pos=input_pos, query_pos=query_pos))
        return x + self.mlp_scale(self.mlp(self.mlp_norm(x)))


@torch.compiler.disable(recursive=False)
def _attend(
    mask: TreeMask, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float | None, softcap: float | None
) -> torch.Tensor:
    # A layer that is compiled must not be compiled anew for the chains of every row; FlexAttention is compiled anyway.
    return mask.attend(q, k, v, scale=scale, softcap=softcap)


class TreeTransformerDecoder(TransformerDecoder):
    """torchtune's decoder, from a row to the log-probs of its responses."""

    attention_backend: AttentionBackend
    new_mask: Callable[..., TreeMask]
    computes_confidence: bool = False

    def forward(self, row: Row) -> ResponseLogProbs:
        """Computes every shared prefix once and, past the last layer's keys and values, only what predicts a token.

        Args:
            row (Row): the row, on the model's device.

        Returns:
            ResponseLogProbs: log-probs and numbers of scored tokens, each of shape ``[E, K]``.
        """
        h = self.tok_embeddings(row.tokens)
        *layers, last_layer = self.layers
        masks = {window: self.new_mask(row, window=window) for window in {layer.attn.window for layer in layers}}
        for layer in layers:
            h = layer(h, mask=masks[layer.attn.window], input_pos=row.input_pos)
        # Nothing attends to what the last layer makes of a row, so it is computed only where it predicts something.
        mask = self.new_mask(row, at_predictors=True, window=last_layer.attn.window)
        h = last_layer(h, mask=mask, input_pos=row.input_pos, rows=row.predictors)
        h = self.norm(h[0])
        log_probs, confidence = response_log_probs(
            self.output, h, row, self.tok_embeddings.num_embeddings, with_confidence=self.computes_confidence
        )
        return ResponseLogProbs(log_probs, row.num_scored, confidence)


def to_tree_model(
    model: TransformerDecoder, attention_backend: AttentionBackend, kernel_options: Mapping[str, Any] | None = None
) -> TreeTransformerDecoder:
    """Turns a built torchtune model, in place, into one that takes a row and returns its responses' log-probs.

    Call it before compilation, activation checkpointing and sharding.

    Args:
        model (TransformerDecoder): as torchtune's builders return it.
        attention_backend (AttentionBackend): see ``prefix_sharing.attention.choose_attention_backend``.
        kernel_options (Mapping[str, Any] | None): handed to FlexAttention. Default: None.

    Returns:
        TreeTransformerDecoder: the same object.

    Raises:
        UserError: if the model has parts whose arithmetic tree attention does not cover.
    """
    _refuse_unsupported(model)
    if attention_backend == "varlen" and any(isinstance(layer.attn, Gemma2Attention) for layer in model.layers):
        raise UserError("attention_backend: varlen cannot cap attention scores as Gemma 2 does; use flex or chains.")
    for layer in model.layers:
        layer.__class__ = TreeTransformerLayer
        layer.attn.__class__ = TreeGemma2Attention if isinstance(layer.attn, Gemma2Attention) else TreeAttention
    model.__class__ = TreeTransformerDecoder
    model.attention_backend = attention_backend
    model.new_mask = mask_builder(attention_backend, kernel_options)
    return model


def forward_flops(model: TreeTransformerDecoder, sizes: TreeSize) -> np.ndarray:
    """Floating-point operations of a forward pass, by which work is shared out.

    Args:
        model (TreeTransformerDecoder): the model; it may be on the meta device.
        sizes (TreeSize): sizes of trees, each an array of shape ``[N]``.

    Returns:
        np.ndarray: shape ``[N]``; additive over the trees of a row.
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


def _refuse_unsupported(model: nn.Module) -> None:
    def require(name: str, part: object, *types: type) -> None:
        if type(part) not in types:
            raise UserError(
                f"model: {name} is a {type(part).__name__}, which prefix sharing does not cover; "
                f"the families it covers are {SUPPORTED_FAMILIES}."
            )

    require("the model", model, TransformerDecoder)
    norms = (RMSNorm, GemmaRMSNorm)
    linears = (nn.Linear, LoRALinear, DoRALinear, FrozenNF4Linear)
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
            raise UserError(f"model: {prefix}.attn has {what}, which prefix sharing does not cover; leave it out.")
