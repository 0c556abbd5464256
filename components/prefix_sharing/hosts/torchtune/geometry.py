"""Whether a built model is the one that a checkpoint's ``config.json`` describes.

Tensors that fit prove little: rope base and scaling, eps, number of heads and window are in no tensor's shape. All is
read off the built modules, so that it holds for every builder, those without arguments included.
"""

import json
import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from torchtune.models.gemma.rms_norm import GemmaRMSNorm
from torchtune.models.gemma2._attention import Gemma2Attention
from torchtune.models.llama3_1._position_embeddings import Llama3ScaledRoPE
from torchtune.models.phi3 import Phi3RotaryPositionalEmbeddings
from torchtune.models.qwen2._positional_embeddings import Qwen2RotaryPositionalEmbeddings
from torchtune.modules import RMSNorm, TiedLinear, TransformerDecoder
from torchtune.training import FullModelHFCheckpointer

from prefix_sharing.errors import ConfigError

log = logging.getLogger(__name__)

_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {"rms_norm_eps": 1e-6, "tie_word_embeddings": False, "attention_bias": False},
    "mistral": {"rms_norm_eps": 1e-6, "tie_word_embeddings": False, "sliding_window": 4096},
    "phi3": {"rms_norm_eps": 1e-5, "tie_word_embeddings": False},
    "gemma": {"rms_norm_eps": 1e-6, "tie_word_embeddings": True, "attention_bias": False, "head_dim": 256},
    "gemma2": {
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": True,
        "attention_bias": False,
        "head_dim": 256,
        "query_pre_attn_scalar": 256,
        "attn_logit_softcapping": 50.0,
        "sliding_window": 4096,
    },
    "qwen2": {"rms_norm_eps": 1e-6, "tie_word_embeddings": False},
}
"""What transformers takes for a key that ``config.json`` lacks, by ``model_type``; all have a rope base of 10,000."""

_ROPE_THETA = 10_000

_LLAMA3_SCALING = {
    "factor": "scale_factor",
    "low_freq_factor": "low_freq_factor",
    "high_freq_factor": "high_freq_factor",
    "original_max_position_embeddings": "old_context_len",
}
"""Keys of Llama 3.1's rope scaling, with torchtune's names."""

_EXCHANGED_CAPS = (30.0, 50.0)
"""The cap of attention scores in torchtune 0.6.1's Gemma 2 builders without dimensions, and the published one."""


@dataclass(frozen=True)
class _Fact:
    """One thing that model and ``config.json`` both say.

    Attributes:
        argument (str): what torchtune's builders call it.
        built (Any): its value in the model.
        key (str): what ``config.json`` calls it.
        described (Any): its value there.
        remedy (str | None): what to do. Default: None, to set the argument.
    """

    argument: str
    built: Any
    key: str
    described: Any
    remedy: str | None = None

    @property
    def agrees(self) -> bool:
        """Whether both say the same."""
        if _is_number(self.built) and _is_number(self.described):
            return math.isclose(self.built, self.described, rel_tol=1e-6)
        return self.built == self.described

    def problem(self, file: Path) -> str:
        """What is wrong and what to do."""
        remedy = self.remedy or (
            f"set model.{self.argument}: {_shown(self.described)}, or name the builder of this checkpoint if "
            f"model._component_ does not take {self.argument}"
        )
        described = "not there" if self.described is None else _shown(self.described)
        return f"{self.argument} is {_shown(self.built)}, but {self.key} in {file} is {described}; {remedy}"


def config_file_of(checkpointer: Any) -> Path | None:
    """The ``config.json`` that describes the weights a checkpointer reads.

    Args:
        checkpointer (Any): one of torchtune's.

    Returns:
        Path | None: None if the checkpointer reads another format than Hugging Face's.
    """
    if not isinstance(checkpointer, FullModelHFCheckpointer):
        return None
    return Path(checkpointer._checkpoint_dir) / "config.json"


def check_geometry(model: TransformerDecoder, config_file: Path) -> None:
    """Refuses a model whose arithmetic is another than that of the checkpoint's ``config.json``.

    Args:
        model (TransformerDecoder): as one of torchtune's builders returned it, sharded or not.
        config_file (Path): the checkpoint's ``config.json``.

    Raises:
        ConfigError: if the two disagree.
    """
    config = _read(config_file)
    if config is None:
        return
    for fact in _facts(model, config):
        if not fact.agrees:
            raise ConfigError("model", fact.problem(config_file))
    _warn_of_exchanged_caps(model, config, config_file)


def missing_window(model: Any, checkpointer: DictConfig | None) -> tuple[int, Path] | None:
    """The sliding window that ``config.json`` wants and the model has not: up to its length, it makes no difference.

    Args:
        model (Any): as one of torchtune's builders returned it.
        checkpointer (DictConfig | None): the config's ``checkpointer``.

    Returns:
        tuple[int, Path] | None: its length in tokens and the ``config.json``; None if nothing is missing.
    """
    directory = None if checkpointer is None else checkpointer.get("checkpoint_dir")
    if directory is None or _family(model) == "gemma2":
        return None
    file = Path(directory) / "config.json"
    config = _read(file)
    if config is None:
        return None
    if config.get("model_type") == "qwen2":
        some = config.get("use_sliding_window", False) and config.get("max_window_layers", 28) < len(model.layers)
        window = config.get("sliding_window", 4096) if some else None
    else:
        window = _value(config, "sliding_window")
    return None if window is None else (window, file)


def _read(config_file: Path) -> dict[str, Any] | None:
    """A ``config.json`` of a text model; None for none, and for any other layout."""
    if not config_file.is_file():
        return None
    config = json.loads(config_file.read_text(encoding="utf-8"))
    return config if isinstance(config, dict) and "hidden_size" in config and "text_config" not in config else None


def _facts(model: TransformerDecoder, config: dict[str, Any]) -> Iterator[_Fact]:
    """What can be compared, beginning with what would explain the rest."""
    yield from _family_facts(model, config)
    layer = model.layers[0]
    attn = layer.attn
    num_heads = config.get("num_attention_heads")
    derived = {}
    if num_heads is not None:
        derived = {"num_key_value_heads": num_heads, "head_dim": config["hidden_size"] // num_heads}
    known = _DEFAULTS.get(config.get("model_type", ""), {})
    for argument, built, key in (
        ("num_layers", len(model.layers), "num_hidden_layers"),
        ("embed_dim", model.tok_embeddings.embedding_dim, "hidden_size"),
        ("num_heads", attn.num_heads, "num_attention_heads"),
        ("num_kv_heads", attn.num_kv_heads, "num_key_value_heads"),
        ("head_dim", attn.head_dim, "head_dim"),
        ("intermediate_dim", layer.mlp.w1.weight.shape[0], "intermediate_size"),
        ("vocab_size", model.tok_embeddings.num_embeddings, "vocab_size"),
        *(("norm_eps", eps, "rms_norm_eps") for eps in _norm_eps(model)),
        ("tie_word_embeddings", isinstance(model.output, TiedLinear), "tie_word_embeddings"),
    ):
        described = config.get(key)
        if described is None:
            described = known.get(key, derived.get(key) if known else None)
        if described is not None:
            yield _Fact(argument, built, key, described)
    yield from _rope_facts(attn, config, known=bool(known))
    yield from _attention_facts(attn, config)


def _family_facts(model: TransformerDecoder, config: dict[str, Any]) -> Iterator[_Fact]:
    model_type = config.get("model_type")
    if model_type not in _DEFAULTS:
        return
    built = _family(model)
    of = {"mistral": "llama"}.get(model_type, model_type)
    remedy = f"name a builder of torchtune's {model_type} models in model._component_, or another checkpoint"
    yield _Fact("the family of model._component_", built, "model_type", built if built == of else model_type, remedy)
    if "gemma" not in model_type and config.get("hidden_act") is not None:
        described = {"silu": "SiLU", "swish": "SiLU"}.get(config["hidden_act"], config["hidden_act"])
        remedy = "torchtune has no builder for it, so choose another checkpoint"
        yield _Fact("the activation", type(model.layers[0].mlp.activation).__name__, "hidden_act", described, remedy)


def _rope_facts(attn: Any, config: dict[str, Any], *, known: bool) -> Iterator[_Fact]:
    rope = attn.pos_embeddings
    # transformers 5 keeps in rope_parameters what used to be in rope_theta and rope_scaling.
    name = "rope_scaling" if config.get("rope_scaling") else "rope_parameters"
    parameters = config.get(name) or {}
    if any(isinstance(value, dict) for value in parameters.values()):  # one for each type of layer
        return
    in_parameters = f"{name}.rope_theta" if "rope_theta" in parameters else "rope_theta"
    theta = parameters.get("rope_theta", config.get("rope_theta", _ROPE_THETA if known else None))
    if theta is not None:
        yield _Fact("rope_base", rope.base, in_parameters, theta)
    part = parameters.get("partial_rotary_factor", config.get("partial_rotary_factor"))
    if part is not None:
        remedy = "torchtune has no builder for it, so choose another checkpoint"
        yield _Fact("the rotated part of head_dim", rope.dim / attn.head_dim, "partial_rotary_factor", part, remedy)

    # A factor of 1 scales nothing: so a builder with scaling serves a checkpoint without.
    scaled = isinstance(rope, Llama3ScaledRoPE) and rope.scale_factor != 1
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    if kind == "llama3":
        remedy = "use a builder of torchtune's llama3_1, llama3_2 or llama3_3, which scale"
        if not isinstance(rope, Llama3ScaledRoPE):
            yield _Fact("the scaling of positions", "none", f"{name}.rope_type", kind, remedy)
            return
        for key, argument in _LLAMA3_SCALING.items():
            described = parameters.get(key)
            if described is not None:
                yield _Fact(argument, getattr(rope, argument), f"{name}.{key}", described)
    elif kind == "default":
        if scaled:
            remedy = "set model.scale_factor: 1, or use a builder of torchtune's llama2, llama3 or mistral"
            yield _Fact("scale_factor", rope.scale_factor, "rope_scaling", None, remedy)
    else:
        remedy = "torchtune has no builder for it, so take it out of config.json or choose another checkpoint"
        yield _Fact("the scaling of positions", "llama3" if scaled else "none", f"{name}.rope_type", kind, remedy)


def _attention_facts(attn: Any, config: dict[str, Any]) -> Iterator[_Fact]:
    bias = _value(config, "attention_bias")
    if config.get("model_type") in ("llama", "gemma", "gemma2") and bias is not None:
        remedy = "torchtune has no builder for it, so choose another checkpoint"
        yield _Fact("the bias of attention", attn.q_proj.bias is not None, "attention_bias", bias, remedy)
    if config.get("model_type") == "gemma2" and isinstance(attn, Gemma2Attention):
        window, scalar = _value(config, "sliding_window"), _value(config, "query_pre_attn_scalar")
        yield _Fact("sliding_window_size", attn.sliding_window_size, "sliding_window", window)
        yield _Fact("query_pre_attn_scalar", attn.scaling**-2, "query_pre_attn_scalar", scalar)
        # Not the cap of logits, which torchtune applies to something else.
        cap = _value(config, "attn_logit_softcapping")
        if (attn.softcapping, cap) != _EXCHANGED_CAPS:
            yield _Fact("hidden_capping_value", attn.softcapping, "attn_logit_softcapping", cap)


def _warn_of_exchanged_caps(model: TransformerDecoder, config: dict[str, Any], config_file: Path) -> None:
    """Gemma 2's fixed builders cannot be refused: there would be none left for its published checkpoints."""
    attn = model.layers[0].attn
    if isinstance(attn, Gemma2Attention) and config.get("model_type") == "gemma2":
        cap = _value(config, "attn_logit_softcapping")
        if (attn.softcapping, cap) == _EXCHANGED_CAPS:
            log.warning(
                "torchtune's builder caps attention scores at 30, but attn_logit_softcapping in %s is 50; for the "
                "checkpoint's own arithmetic, use torchtune.models.gemma2.gemma2 or lora_gemma2 with its dimensions.",
                config_file,
            )


def _family(model: TransformerDecoder) -> str:
    """Which ``model_type`` of transformers a model's modules compute; "llama" also stands for Mistral."""
    attn = model.layers[0].attn
    if isinstance(attn, Gemma2Attention):
        return "gemma2"
    if isinstance(model.layers[0].sa_norm, GemmaRMSNorm):
        return "gemma"
    if isinstance(attn.pos_embeddings, Qwen2RotaryPositionalEmbeddings):
        return "qwen2"
    return "phi3" if isinstance(attn.pos_embeddings, Phi3RotaryPositionalEmbeddings) else "llama"


def _norm_eps(model: TransformerDecoder) -> set[float]:
    """The eps of every norm, where they differ more than one."""
    return {module.eps for module in model.modules() if isinstance(module, (RMSNorm, GemmaRMSNorm))}


def _value(config: dict[str, Any], key: str) -> Any:
    """The value of a key where null is one: the default of the family only where the key is absent."""
    return config.get(key, _DEFAULTS.get(config.get("model_type", ""), {}).get(key))


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _shown(value: Any) -> str:
    """A value as YAML has it, whole numbers without a point."""
    if value is None:
        return "null"
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)
