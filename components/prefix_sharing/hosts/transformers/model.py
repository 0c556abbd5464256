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
from prefix_sharing.checkpoint import Checkpoint
from prefix_sharing.errors import ConfigError, UserError
from prefix_sharing.hosts.transformers.adapters import freeze_base, has_adapter, without_adapter
from prefix_sharing.hosts.transformers.weights import load_weights
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


@torch.compiler.disable
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


class _DecoderOrGiven:
    """A model's decoder, which hands on what it is given in place of computing it."""

    def forward(self, *args: Any, given: Mapping[str, Any] | None = None, **kwargs: Any) -> Any:
        if given is not None:
            return MoeModelOutputWithPast(**given)  # has every field that heads look at
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


class _LastLayer:
    """The last layer, which says to its MLP whose hidden states are read: each time it is computed."""

    mlp: _MLPAtPredictors

    def forward(self, *args: Any, row_masks: RowMasks | None = None, **kwargs: Any) -> Any:
        self.mlp.predictor_index = None if row_masks is None else row_masks.row.predictor_index
        return super().forward(*args, row_masks=row_masks, **kwargs)  # type: ignore[misc]


class TreeCausalLM(TreeModel):
    """A causal language model of transformers, from a Row to the log-probs of its responses.

    Attributes:
        aux_loss_coef (float): what the loss of a mixture's routers is multiplied with; 0 for none.
    """

    aux_loss_coef: float
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
        output = self.get_decoder()(
            input_ids=row.tokens,
            position_ids=row.input_pos,
            use_cache=False,
            row_masks=RowMasks(row, self.mask_of),
            **{"output_router_logits": True} if self.aux_loss_coef > 0 else {},
        )
        hidden = output.last_hidden_state[0].index_select(0, row.predictor_index)
        # What the head saves is large and needed first in the backward pass, so it stays where it is.
        with torch.autograd.graph.saved_tensors_hooks(_unchanged, _unchanged):
            found = response_log_probs(self._project, hidden, row, self.vocab_size)
        if self.aux_loss_coef > 0:
            found = found._replace(aux_loss=self.aux_loss_coef * self._aux_loss(output, row))
        return found

    def _project(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits of hidden states, ``[n, dim] -> [n, vocab]``, by the model's own code: its caps, scales and biases."""
        given = {"last_hidden_state": hidden[None]}
        return self.host_class.forward(self, input_ids=None, given=given, use_cache=False).logits[0]

    def _aux_loss(self, output: Any, row: Row) -> torch.Tensor:
        """How unevenly tokens are shared out among experts, by the model's own code; each token of the Row once."""
        given = {"last_hidden_state": output.last_hidden_state[:, :1], "router_logits": output.router_logits}
        is_token = torch.arange(row.tokens.shape[1], device=row.tokens.device)[None] < row.num_tokens
        return self.host_class.forward(
            self, input_ids=None, attention_mask=is_token, given=given, output_router_logits=True, use_cache=False
        ).aux_loss

    @property
    def layers(self) -> nn.ModuleList:  # type: ignore[override]
        """The decoder's layers."""
        return self.get_decoder().layers

    @property
    def max_seq_len(self) -> int:  # type: ignore[override]
        """The positions that the model was made for, as far as their rotary embeddings are the same in every sequence.

        ``dynamic`` and ``longrope`` choose others once any position of a Row is beyond the original context.
        """
        config = self.config
        scaling = getattr(config, "rope_parameters", None) or {}
        if scaling.get("rope_type") in ("dynamic", "longrope"):
            original = scaling.get("original_max_position_embeddings")
            return original or getattr(config, "original_max_position_embeddings", config.max_position_embeddings)
        return config.max_position_embeddings

    @override
    def new_mask(self, row: Row, *, at_predictors: bool = False, window: int | None = None) -> TreeMask:
        return self.mask_of(row, at_predictors=at_predictors, window=window)

    @property
    @override
    def vocab_size(self) -> int:
        return self.get_input_embeddings().num_embeddings

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
        return False

    @override
    def freeze_base(self, dtype: torch.dtype) -> None:
        freeze_base(self, dtype)

    @override
    def without_adapter(self) -> AbstractContextManager[None]:
        return without_adapter(self)

    @override
    def offload_activations(self, enabled: bool) -> AbstractContextManager[None]:
        if not enabled:
            return contextlib.nullcontext()
        return torch.autograd.graph.save_on_cpu(pin_memory=torch.cuda.is_available())

    @override
    def materialize(self, device: torch.device, parameter_device: torch.device | None = None) -> None:
        materialize(self, device, parameter_device)

    @override
    def load_weights(self, checkpoint: Checkpoint, seed: int) -> None:
        load_weights(self, checkpoint, seed)


def forward_flops(model: Any, sizes: TreeSizes) -> np.ndarray:
    """See ``TreeModel.forward_flops``; of transformers' own model as well.

    Args:
        model (Any): the model.
        sizes (TreeSizes): sizes of trees, shape ``[N]``.

    Returns:
        np.ndarray: shape ``[N]``.
    """
    config, layers = model.config, model.get_decoder().layers
    last_mlp = _mlp_of(layers[-1])
    weights = _weights_of_a_token(layers, config)
    of_mlp = _weights_of_a_token(last_mlp, config) if isinstance(last_mlp, _MLPAtPredictors) else 0.0
    at_predictors = of_mlp + model.get_input_embeddings().weight.numel()
    if hasattr(config, "qk_nope_head_dim"):  # multi-head latent attention
        head_dim = (config.qk_nope_head_dim + config.qk_rope_head_dim + config.v_head_dim) / 2
    else:
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    width = config.num_attention_heads * head_dim * len(layers)
    return (
        2.0 * (weights - of_mlp) * sizes.num_tokens
        + 4.0 * width * sizes.num_visible
        + 2.0 * at_predictors * sizes.num_predictors
    )


def _weights_of_a_token(module: Any, config: Any) -> float:
    """How many weights a token is multiplied with; of experts, whose matrices lie in one tensor, those of its own."""
    matrices = [parameter for parameter in module.parameters() if parameter.dim() > 1]
    per_token = getattr(config, "num_experts_per_tok", 1)
    return sum(matrix.numel() * (per_token / len(matrix) if matrix.dim() == 3 else 1) for matrix in matrices)


def _unchanged(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


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
    decoder.__class__ = _mixed_with(_DecoderOrGiven, type(decoder))
    last_layer = decoder.layers[-1]
    mlp = mlp_without_experts(last_layer)
    if mlp is not None:
        mlp.__class__ = _mixed_with(_MLPAtPredictors, type(mlp))
        last_layer.__class__ = _mixed_with(_LastLayer, type(last_layer))
    model.__class__ = _mixed_with(TreeCausalLM, type(model))
    tree_model = cast(TreeCausalLM, model)
    # In the forward pass, not in that of the head for every chunk.
    tree_model.aux_loss_coef = model.config.router_aux_loss_coef if uses_aux_loss(model.config) else 0.0
    model.config.output_router_logits = False
    tree_model.attention_backend = attention_backend
    tree_model.mask_of = mask_builder(attention_backend, kernel_options)
    return tree_model


def uses_aux_loss(config: Any) -> bool:
    """Whether transformers adds a loss of the routers of a mixture of experts, as ``config.json`` says."""
    return bool(getattr(config, "output_router_logits", False)) and getattr(config, "router_aux_loss_coef", 0.0) > 0


def _mixed_with(mixin: type, cls: type) -> type:
    # With the name it had, by which transformers knows what a class of its can record.
    names = {"__module__": cls.__module__, "__qualname__": cls.__qualname__}
    return type(cls.__name__, (mixin, cls), {**names, "host_class": cls})


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
