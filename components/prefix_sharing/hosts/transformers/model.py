"""Gives a causal language model of transformers tree attention and log-probs of responses as its output.

The model's own code runs: its layers, its norms, its head. Attention is a function that transformers lets one register
by name; it receives what the model computed for queries, keys and values, and the Row's masks as a keyword argument
that the model hands on untouched. Classes are changed in place, so parameters and state-dict keys stay what they were.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any, cast

import numpy as np
import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.modeling_outputs import MoeModelOutputWithPast
from typing_extensions import override

from prefix_sharing.attention import AttentionBackend, TreeMask, mask_builder
from prefix_sharing.checkpoint import Checkpoint, set_full_weights
from prefix_sharing.distributed import is_rank_zero
from prefix_sharing.errors import ConfigError, UserError
from prefix_sharing.hosts.fitting import check_tensors_fit
from prefix_sharing.hosts.tree_model import TreeModel
from prefix_sharing.scoring import ResponseLogProbs, response_log_probs
from prefix_sharing.torch_private import unset_fake_temporarily
from prefix_sharing.trees import Row, TreeSizes

ATTENTION = "prefix_tree"
"""The name under which transformers knows tree attention."""


class RowMasks:
    """The masks of one Row, each made when a layer first asks for it.

    Args:
        row (Row): the Row.
        mask_of (Callable[..., TreeMask]): makes a mask.
    """

    def __init__(self, row: Row, mask_of: Callable[..., TreeMask]) -> None:
        self.row = row
        self._mask_of = mask_of
        self._masks: dict[int | None, TreeMask] = {}

    def __call__(self, window: int | None) -> TreeMask:
        """The mask for layers with a window of that many positions, or without one."""
        if window not in self._masks:
            self._masks[window] = self._mask_of(self.row, window=window)
        return self._masks[window]


@torch.compiler.disable(recursive=False)
def _attend(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    row_masks: RowMasks | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """What transformers' attention modules call; shapes as for ``TreeMask.attend``, but heads and tokens exchanged."""
    if row_masks is None:
        raise UserError(f"{type(module).__name__} does not hand on what tree attention needs.")
    if s_aux is not None or dropout > 0:
        what = "attention sinks" if s_aux is not None else "dropout of attention"
        raise UserError(f"{type(module).__name__} has {what}, which prefix sharing does not support.")
    if torch.is_autocast_enabled(query.device.type):
        # Rotary embeddings leave queries and keys in fp32, and FlexAttention is no operator that autocast knows.
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    output = row_masks(sliding_window).attend(query, key, value, scale=scaling, softcap=softcap)
    return output.transpose(1, 2), None


AttentionInterface.register(ATTENTION, _attend)
AttentionMaskInterface.register(ATTENTION, lambda *args, **kwargs: None)  # the masks are in row_masks


class _DecoderOrHidden:
    """A model's decoder, which hands on hidden states that it is given in place of computing them."""

    def forward(self, *args: Any, given_hidden: torch.Tensor | None = None, **kwargs: Any) -> Any:
        if given_hidden is not None:
            return MoeModelOutputWithPast(last_hidden_state=given_hidden)  # has every field that heads look at
        return super().forward(*args, **kwargs)  # type: ignore[misc]


class _MLPAtPredictors:
    """The MLP of the last layer, computed only for tokens whose hidden state is read: nothing attends to the others.

    Queries and attention of that layer are computed for all tokens: leaving them out would take a copy of its code.
    """

    predictor_index: torch.Tensor | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        plain = super().forward  # type: ignore[misc]
        return plain(x) if self.predictor_index is None else compute_at(self.predictor_index, plain, x)


def compute_at(index: torch.Tensor, function: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """A function of tokens, computed only for some of them; it is zero for the others.

    Args:
        index (torch.Tensor): indices of those tokens, ascending; padding repeats the last.
        function (Callable[[torch.Tensor], torch.Tensor]): the function.
        x (torch.Tensor): what it is computed of, shape ``[1, s, dim]``.

    Returns:
        torch.Tensor: shape ``[1, s, dim]``.
    """
    # Padding must be added once.
    is_first = torch.ones_like(index, dtype=torch.bool)
    is_first[1:] = index[1:] != index[:-1]
    return torch.zeros_like(x).index_add(1, index, function(x.index_select(1, index)) * is_first[:, None].to(x.dtype))


class TreeCausalLM(TreeModel):
    """A causal language model of transformers, from a Row to the log-probs of its responses."""

    mask_of: Callable[..., TreeMask]
    host_class: type[PreTrainedModel]
    # What transformers' models have.
    config: Any
    get_decoder: Callable[[], Any]
    get_input_embeddings: Callable[[], nn.Embedding]
    tie_weights: Callable[[], None]
    initialize_weights: Callable[[], None]

    @override
    def forward(self, row: Row) -> ResponseLogProbs:
        last_mlp = _mlp_of(self.layers[-1])
        if isinstance(last_mlp, _MLPAtPredictors):
            last_mlp.predictor_index = row.predictor_index
        output = self.get_decoder()(
            input_ids=row.tokens,
            position_ids=row.input_pos,
            use_cache=False,
            row_masks=RowMasks(row, self.mask_of),
        )
        hidden = output.last_hidden_state[0].index_select(0, row.predictor_index)
        return response_log_probs(self._project, hidden, row, self.vocab_size)

    def _project(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits of hidden states, ``[n, dim] -> [n, vocab]``, by the model's own code: its caps, scales and biases."""
        return self.host_class.forward(self, input_ids=None, given_hidden=hidden[None], use_cache=False).logits[0]

    @property
    def layers(self) -> nn.ModuleList:  # type: ignore[override]
        """The decoder's layers."""
        return self.get_decoder().layers

    @property
    def max_seq_len(self) -> int:  # type: ignore[override]
        """The positions that the model was made for."""
        return self.config.max_position_embeddings

    @override
    def new_mask(self, row: Row, *, at_predictors: bool = False, window: int | None = None) -> TreeMask:
        return self.mask_of(row, at_predictors=at_predictors, window=window)

    @property
    @override
    def vocab_size(self) -> int:
        return self.get_input_embeddings().num_embeddings

    @override
    def forward_flops(self, sizes: TreeSizes) -> np.ndarray:
        *layers, last = self.layers
        weights = sum(p.numel() for layer in layers for p in layer.parameters() if p.dim() > 1)
        of_last = sum(p.numel() for p in last.parameters() if p.dim() > 1)
        mlp = _mlp_of(last)
        of_mlp = 0
        if isinstance(mlp, _MLPAtPredictors):
            of_mlp = sum(p.numel() for p in cast(nn.Module, mlp).parameters() if p.dim() > 1)
        config = self.config
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        width = config.num_attention_heads * head_dim * len(self.layers)
        at_predictors = of_mlp + self.get_input_embeddings().weight.numel()
        return (
            2.0 * (weights + of_last - of_mlp) * sizes.num_tokens
            + 4.0 * width * sizes.num_visible
            + 2.0 * at_predictors * sizes.num_predictors
        )

    @property
    @override
    def has_adapter(self) -> bool:
        return False

    @property
    @override
    def is_quantized(self) -> bool:
        return False

    @override
    def freeze_base(self, dtype: torch.dtype) -> None:
        """Nothing: there is no adapter."""

    @override
    def without_adapter(self) -> AbstractContextManager[None]:
        return contextlib.nullcontext()

    @override
    def offload_activations(self, enabled: bool) -> AbstractContextManager[None]:
        if enabled:
            raise ConfigError("enable_activation_offloading", "not supported for transformers' models; remove it")
        return contextlib.nullcontext()

    @override
    def materialize(self, device: torch.device, parameter_device: torch.device | None = None) -> None:
        materialize(self, device, parameter_device)

    @override
    def load_weights(self, checkpoint: Checkpoint, seed: int) -> None:
        load_weights(self, checkpoint)


def materialize(model: Any, device: torch.device, parameter_device: torch.device | None = None) -> None:
    """See ``TreeModel.materialize``; of transformers' own model as well.

    Args:
        model (Any): on the meta device, sharded or not.
        device (torch.device): where it runs.
        parameter_device (torch.device | None): where its parameters are kept. Default: None, on ``device``.
    """
    model.to_empty(device=parameter_device or device)
    model.tie_weights()
    # What is in no checkpoint, such as the frequencies of rotary embeddings, has to be computed anew.
    with unset_fake_temporarily(), _only_what_no_checkpoint_holds(model):
        model.initialize_weights()
    if parameter_device is not None:
        for module in model.modules():
            for name, buffer in module.named_buffers(recurse=False):
                setattr(module, name, buffer.to(device))


def load_weights(model: Any, checkpoint: Checkpoint) -> None:
    """See ``TreeModel.load_weights``; into transformers' own model as well.

    Args:
        model (Any): the model.
        checkpoint (Checkpoint): the checkpoint.

    Raises:
        ConfigError: if a tensor is missing, left over, or of another shape.
    """
    if is_rank_zero():
        check_tensors_fit(model.state_dict(), checkpoint.weights, "path and checkpoint_dir")
    set_full_weights(model, dict(checkpoint.weights))  # a copy, which distributing tensors changes


def to_tree_model(
    model: PreTrainedModel, attention_backend: AttentionBackend, kernel_options: Mapping[str, Any] | None = None
) -> TreeCausalLM:
    """Turns a causal language model, in place, into one that takes a Row and returns its responses' log-probs.

    Call it before compilation, activation checkpointing and sharding.

    Args:
        model (PreTrainedModel): one of transformers' ``...ForCausalLM``.
        attention_backend (AttentionBackend): see ``prefix_sharing.attention.choose_attention_backend``.
        kernel_options (Mapping[str, Any] | None): handed to FlexAttention. Default: None.

    Returns:
        TreeCausalLM: the same object.

    Raises:
        ConfigError: if the model has parts whose arithmetic tree attention does not cover.
    """
    refuse_unsupported(model)
    softcap = getattr(model.config, "attn_logit_softcapping", None)
    if attention_backend == "varlen" and softcap is not None:
        raise ConfigError("attention_backend", "varlen cannot cap attention scores as this model does; use flex")
    model.set_attn_implementation(ATTENTION)
    model.config.use_cache = False
    decoder = model.get_decoder()
    decoder.__class__ = _mixed_with(_DecoderOrHidden, type(decoder))
    mlp = mlp_without_experts(decoder.layers[-1])
    if mlp is not None:
        mlp.__class__ = _mixed_with(_MLPAtPredictors, type(mlp))
    model.__class__ = _mixed_with(TreeCausalLM, type(model))
    tree_model = cast(TreeCausalLM, model)
    tree_model.attention_backend = attention_backend
    tree_model.mask_of = mask_builder(attention_backend, kernel_options)
    return tree_model


def _mixed_with(mixin: type, cls: type) -> type:
    return type(f"Tree{cls.__name__}", (mixin, cls), {"__module__": cls.__module__, "host_class": cls})


def _mlp_of(layer: nn.Module) -> nn.Module | None:
    mlp = getattr(layer, "mlp", None)
    return mlp if isinstance(mlp, nn.Module) else None


def mlp_without_experts(layer: nn.Module) -> nn.Module | None:
    """The MLP of a layer, or None if it has experts: they take all tokens."""
    mlp = _mlp_of(layer)
    has_experts = mlp is None or any("expert" in name or "router" in name for name, _ in mlp.named_modules())
    return None if has_experts else mlp


@contextlib.contextmanager
def _only_what_no_checkpoint_holds(model: nn.Module) -> Iterator[None]:
    """Has transformers' initialization leave alone what a checkpoint will bring."""
    held = {id(value): value for value in model.state_dict(keep_vars=True).values()}.values()  # tied ones once
    for value in held:
        value._is_hf_initialized = True
    yield
    for value in held:
        del value._is_hf_initialized


_REFUSED = {
    "gpt_oss": "attention sinks",
    "bloom": "ALiBi",
    "mpt": "ALiBi",
    "falcon": "ALiBi",
    "mamba": "state-space layers",
    "mamba2": "state-space layers",
    "falcon_mamba": "state-space layers",
    "falcon_h1": "state-space layers",
    "bamba": "state-space layers",
    "jamba": "state-space layers",
    "nemotron_h": "state-space layers",
    "granitemoehybrid": "state-space layers",
    "zamba": "state-space layers",
    "zamba2": "state-space layers",
    "rwkv": "a recurrence",
    "recurrent_gemma": "a recurrence",
    "qwen3_next": "linear attention",
    "qwen3_5_text": "linear attention",
    "minimax": "linear attention",
    "lfm2": "convolutions over tokens",
    "lfm2_moe": "convolutions over tokens",
    "llama4_text": "attention in chunks",
}
"""Types of models whose arithmetic a tree does not cover, with what they have."""


def refuse_unsupported(model: PreTrainedModel) -> None:
    """Raises a ``ConfigError`` if the model has parts whose arithmetic a tree does not cover, as far as is known."""
    kind = model.config.model_type
    if kind in _REFUSED and not (kind == "falcon" and not model.config.alibi):
        raise ConfigError("model", f"{kind} models have {_REFUSED[kind]}, which prefix sharing does not support")
    if model.config.is_encoder_decoder or "ForCausalLM" not in type(model).__name__:
        problem = f"{type(model).__name__} is not a decoder of text (...ForCausalLM), which prefix sharing supports"
        raise ConfigError("model", problem)
    decoder = model.get_decoder()
    if not isinstance(getattr(decoder, "layers", None), nn.ModuleList):
        problem = f"{type(model).__name__} has no list of decoder layers, so prefix sharing does not support it"
        raise ConfigError("model", problem)
    if getattr(model.config, "attention_dropout", 0.0) > 0:
        raise ConfigError("model", "attention_dropout above 0 is not supported; set it to 0 in config.json")
