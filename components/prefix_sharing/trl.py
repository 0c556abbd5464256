"""TRL's DPOTrainer, which computes every prompt once: ``pip install 'torchtune-prefix-sharing[trl]'``.

.. code-block:: python

    from prefix_sharing.trl import PrefixSharingDPOTrainer as DPOTrainer

TRL prepares the data, pads the batch and computes loss and metrics from what its "fused LM head" returns: log-probs and
more of every scored token. Here the collator adds to the padded batch the Row of the same pairs, and the model's
forward, when it is given a Row, reads that in place of the padded tokens, hands TRL's head the hidden states that
predict a scored token, and spreads what the head returns to where the padded batch has those tokens. So TRL's code sees
what it would have computed itself. Without a Row (generation, a plain evaluation) the model is what it was.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from typing_extensions import override

from prefix_sharing.attention import TreeMask, choose_attention_backend, mask_builder, rounding_of
from prefix_sharing.errors import ConfigError, UserError
from prefix_sharing.trees import Response, Row
from prefix_sharing.trees.row import RowOptions

try:
    import trl
    from transformers import PreTrainedModel
    from trl import DPOTrainer

    from prefix_sharing.hosts.transformers import check_arithmetic
    from prefix_sharing.hosts.transformers.adapters import have_peft_overlook_torchao
    from prefix_sharing.hosts.transformers.model import ATTENTION, RowMasks, compute_at, mlp_without_experts
except ImportError as error:
    problem = (
        "PrefixSharingDPOTrainer needs TRL 1.16 and transformers 5.24: pip install 'torchtune-prefix-sharing[trl]'."
    )
    raise ImportError(problem) from error

if trl.__version__.split(".")[:2] != ["1", "16"]:
    problem = f"PrefixSharingDPOTrainer is made for TRL 1.16, not {trl.__version__}: pip install 'trl>=1.16,<1.17'."
    raise ImportError(problem)


have_peft_overlook_torchao()

_PER_TOKEN = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1", "label_mask")
"""What TRL's head returns for every scored token."""

_UNSCORED = -100
"""The label of a token whose log-prob TRL does not ask for."""


class PrefixSharingDPOTrainer(DPOTrainer):
    """TRL's ``DPOTrainer``, with its arguments, losses and metrics; a micro-batch is one Row of prefix trees.

    Raises:
        UserError: if the model, or an option, is one that prefix sharing does not support.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._share_prefixes()

    functools.update_wrapper(__init__, DPOTrainer.__init__)  # whose arguments are the ones to show

    @override
    def _precompute_ref_logps(self, dataset: Any, name: str, batch_size: int) -> Any:
        self._share_prefixes()  # TRL's __init__ comes here before it returns
        return super()._precompute_ref_logps(dataset, name, batch_size)

    def _share_prefixes(self) -> None:
        if isinstance(self.data_collator, _RowCollator):
            return
        self._refuse_unsupported()
        device = self.accelerator.device
        backend = choose_attention_backend(None, device, torch.float32)
        for wrapped in filter(None, (self.model, self.ref_model)):
            model = self.accelerator.unwrap_model(wrapped)
            _share_prefixes_of(_without_adapter(model), mask_builder(backend))
        options = RowOptions(round_length=rounding_of(backend))
        self.data_collator = _RowCollator(self.data_collator, options, to_the_end=self.aux_loss_enabled)

    def _refuse_unsupported(self) -> None:
        parallelism = self.args.parallelism_config
        adapter = getattr(self.model, "active_peft_config", None)
        batches: Any = self.args.accelerator_config
        refused = {
            "images (a processor in place of a tokenizer)": self._is_vlm,
            "use_liger_kernel": self.args.use_liger_kernel,
            "torch_compile": self.args.torch_compile,
            "dispatch_batches": batches.dispatch_batches,
            "prompt learning (an adapter of virtual tokens)": getattr(adapter, "is_prompt_learning", False),
            "context or sequence parallelism": parallelism is not None
            and (parallelism.cp_size > 1 or parallelism.sp_size > 1),
            "a model spread over devices (device_map)": len(set(getattr(self.model, "hf_device_map", {}).values())) > 1,
            "neftune_noise_alpha": self.args.neftune_noise_alpha,
        }
        for what, is_used in refused.items():
            if is_used:
                problem = f"{type(self).__name__} does not support {what}; leave it out, or use TRL's own DPOTrainer."
                raise UserError(problem)


class _RowCollator:
    """TRL's collator, or the user's, and the Row of the pairs that it has padded.

    Args:
        collator (Callable[[Any], dict[str, Any]]): the collator.
        options (RowOptions): of the Row.
        to_the_end (bool): whether the Row has the last token of each response, too, which predicts nothing: the
            auxiliary loss of experts looks at it.
    """

    def __init__(self, collator: Callable[[Any], dict[str, Any]], options: RowOptions, *, to_the_end: bool) -> None:
        self._collator = collator
        self._options = options
        self._to_the_end = to_the_end

    def __call__(self, examples: Any) -> dict[str, Any]:
        batch = self._collator(examples)
        is_token = batch["attention_mask"].bool().numpy()
        if (is_token[:, 1:] > is_token[:, :-1]).any():
            raise UserError("The data collator must pad sequences on the right, as TRL's does.")
        columns = batch["input_ids"].numpy(), batch["completion_mask"].bool().numpy(), is_token
        responses = [Response(ids[kept], scored[kept]) for ids, scored, kept in zip(*columns, strict=True)]
        if self._to_the_end:  # where it predicts a token without a label
            responses = [Response(np.append(r.tokens, _UNSCORED), np.append(r.scored, True)) for r in responses]
        num_pairs = len(responses) // 2
        pairs: Sequence[Sequence[Response]] = list(zip(responses[:num_pairs], responses[num_pairs:], strict=True))
        return {**batch, "row": Row.from_examples(pairs, options=self._options)}


def _without_adapter(model: Any) -> PreTrainedModel:
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _share_prefixes_of(model: PreTrainedModel, mask_of: Callable[..., TreeMask]) -> None:
    """Has a model with TRL's head take the keyword ``row``, in place; classes and parameters stay what they are."""
    try:
        with torch.device("cpu"):
            check_arithmetic(model)
    except ConfigError as error:
        raise UserError(f"PrefixSharingDPOTrainer cannot train this model: {error.problem}.") from error
    decoder = model.base_model
    if not hasattr(decoder.forward, "takes_rows"):  # else by a trainer before this one
        for module in decoder.modules():
            # The decoder, which makes masks, and whatever calls attention: checkpointing runs it again in the backward.
            if hasattr(module, "config"):
                module.forward = _with_tree_attention(module)
        _compute_mlp_at_predictors(model.get_decoder().layers[-1])
        decoder.forward = _only_predictors(decoder.forward)
    model.forward = _taking_rows(model, mask_of)


def _with_tree_attention(module: nn.Module) -> Callable[..., Any]:
    """The module's forward, with tree attention where it is given masks of a Row, and its own attention elsewhere."""
    plain = module.forward

    @functools.wraps(plain)
    def forward(*args: Any, row_masks: RowMasks | None = None, **kwargs: Any) -> Any:
        if row_masks is None:
            return plain(*args, **kwargs)
        config: Any = module.config
        its_own = config._attn_implementation
        config._attn_implementation = ATTENTION
        try:
            return plain(*args, row_masks=row_masks, **kwargs)
        finally:
            config._attn_implementation = its_own

    return forward


def _compute_mlp_at_predictors(last_layer: nn.Module) -> None:
    """Has the last layer's MLP leave out tokens whose hidden state nothing reads."""
    mlp = mlp_without_experts(last_layer)
    if mlp is None:
        return
    plain_layer, plain_mlp = last_layer.forward, mlp.forward
    index: torch.Tensor | None = None

    @functools.wraps(plain_layer)
    def layer_forward(*args: Any, **kwargs: Any) -> Any:
        nonlocal index  # set here, for checkpointing runs the layer again, perhaps after another Row
        masks = kwargs.get("row_masks")
        index = None if masks is None else masks.row.predictor_index
        return plain_layer(*args, **kwargs)

    @functools.wraps(plain_mlp)
    def mlp_forward(x: torch.Tensor) -> torch.Tensor:
        return plain_mlp(x) if index is None else compute_at(index, plain_mlp, x)

    last_layer.forward, mlp.forward = layer_forward, mlp_forward


def _only_predictors(plain: Callable[..., Any]) -> Callable[..., Any]:
    """Of a Row, the hidden states that predict its scored tokens, in their order."""

    @functools.wraps(plain)
    def forward(*args: Any, **kwargs: Any) -> Any:
        output = plain(*args, **kwargs)
        if kwargs.get("row_masks") is not None:
            output.last_hidden_state = output.last_hidden_state[:, _predictor_of_scored(kwargs["row_masks"].row)]
        return output

    forward.takes_rows = True  # type: ignore[attr-defined]
    return forward


def _taking_rows(model: PreTrainedModel, mask_of: Callable[..., TreeMask]) -> Callable[..., Any]:
    plain = model.forward

    @functools.wraps(plain)  # whose signature ``generate`` looks at
    def forward(*args: Any, row: Row | None = None, fused_lm_head: bool = False, **kwargs: Any) -> Any:
        if row is None or not fused_lm_head:
            return plain(*args, fused_lm_head=fused_lm_head, **kwargs)
        labels = kwargs["labels"]
        row = row.to(labels.device)
        of_experts: dict[str, Any] = {}
        if kwargs.get("output_router_logits"):
            # Their auxiliary loss weighs tokens with the mask, which nothing else reads: with how often TRL has them.
            of_experts = {"output_router_logits": True, "attention_mask": _num_responses_with(row)[None]}
        output = plain(
            input_ids=row.tokens,
            position_ids=row.input_pos,
            row_masks=RowMasks(row, mask_of),
            shift_labels=row.scored_target[None],
            fused_lm_head=True,
            **of_experts,
        )
        return _spread(output, row, labels.shape)

    return forward


def _predictor_of_scored(row: Row) -> torch.Tensor:
    return row.predictor_index[row.scored_predictor]


def _num_responses_with(row: Row) -> torch.Tensor:
    """For each token of a Row how many responses have it, told by where in its subtree responses end, shape ``[s]``."""
    ends = _predictor_of_scored(row)[row.scored_target == _UNSCORED]
    num_ends_before = F.pad(torch.bincount(ends, minlength=len(row.subtree_end)).cumsum(0), (1, 0))
    return num_ends_before[row.subtree_end] - num_ends_before[:-1]


def _spread(output: Any, row: Row, shape: torch.Size) -> Any:
    """Values of the Row's scored tokens as those of the padded batch, all chosen responses before all rejected ones.

    As in TRL, none is for the last token of the padded batch: it predicts nothing.
    """
    pair, is_rejected = row.scored_response // 2, row.scored_response % 2
    place = (is_rejected * (shape[0] // 2) + pair) * shape[1] + row.input_pos[0, _predictor_of_scored(row)]
    for name in _PER_TOKEN:
        values = getattr(output, name)
        if values is not None:
            spread = values.new_zeros(shape.numel()).index_put((place,), values[0]).view(shape)[:, :-1]
            setattr(output, name, spread)
    return output
