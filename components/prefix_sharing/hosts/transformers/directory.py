"""A model by its directory alone, for the key ``model`` of a config: all of it is trained, or an adapter."""

from collections.abc import Sequence

import torch
from peft import LoraConfig
from transformers import AutoModelForCausalLM, PreTrainedModel

from prefix_sharing.errors import ConfigError
from prefix_sharing.hosts.transformers.adapters import add_adapter, has_experts, linear_layers_of_attention
from prefix_sharing.hosts.transformers.files import read_config


def causal_lm(path: str, router_aux_loss_coef: float | None = None) -> PreTrainedModel:
    """Builds a decoder of transformers from its directory, without weights, for a config.

    Args:
        path (str): directory with ``config.json``, or a name on the hub.
        router_aux_loss_coef (float | None): what to multiply the loss with that keeps a mixture's experts evenly used
            (Fedus et al. 2021), 0 for none. Default: None, as ``config.json`` says by ``output_router_logits``.

    Returns:
        PreTrainedModel: with fp32 weights, on the device that is torch's default just now.

    Raises:
        UserError: if there is no such model.

    Example:
        .. code-block:: yaml

            model:
              _component_: prefix_sharing.hosts.transformers.causal_lm
              path: /tmp/Qwen3-0.6B
    """
    config = read_config(path)
    if router_aux_loss_coef is not None:
        if not hasattr(config, "router_aux_loss_coef"):
            problem = f"{config.model_type} models have no loss of routers in transformers; remove it"
            raise ConfigError("model.router_aux_loss_coef", problem)
        config.router_aux_loss_coef, config.output_router_logits = router_aux_loss_coef, router_aux_loss_coef > 0
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def lora_causal_lm(
    path: str,
    *,
    router_aux_loss_coef: float | None = None,
    lora_rank: int = 8,
    lora_alpha: int = 16,
    lora_dropout: float = 0.0,
    target_modules: str | Sequence[str] = "all-linear",
    use_dora: bool = False,
) -> PreTrainedModel:
    """Builds a decoder of transformers with an adapter of PEFT: LoRA (Hu et al. 2021), or DoRA (Liu et al. 2024).

    Args:
        path (str): as for ``causal_lm``.
        router_aux_loss_coef (float | None): as for ``causal_lm``. Default: None.
        lora_rank (int): rank of the adapter, PEFT's ``r``. Default: 8.
        lora_alpha (int): the adapter's output is scaled by ``lora_alpha / lora_rank``. Default: 16.
        lora_dropout (float): dropout before the adapter. Default: 0.0.
        target_modules (str | Sequence[str]): linear layers that get one, by the ends of their names, such as
            ``[q_proj, v_proj]``. Default: "all-linear", all but the output projection; of a mixture of experts, those
            of attention.
        use_dora (bool): whether it is DoRA. Default: False.

    Returns:
        PreTrainedModel: as for ``causal_lm``.

    Raises:
        UserError: as for ``causal_lm``, and if there is no such layer, or it is one of experts or a router.

    Example:
        .. code-block:: yaml

            model:
              _component_: prefix_sharing.hosts.transformers.lora_causal_lm
              path: /tmp/Qwen3-8B
              lora_rank: 16
              lora_alpha: 32
    """
    model = causal_lm(path, router_aux_loss_coef)
    if target_modules == "all-linear" and has_experts(model):
        targets: str | list[str] = linear_layers_of_attention(model)
    else:
        targets = target_modules if isinstance(target_modules, str) else list(target_modules)
    add_adapter(
        model,
        LoraConfig(
            task_type="CAUSAL_LM",
            r=lora_rank,
            lora_alpha=lora_alpha,
            lora_dropout=lora_dropout,
            target_modules=targets,
            use_dora=use_dora,
        ),
    )
    return model
