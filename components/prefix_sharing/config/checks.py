"""Everything about a config that is checked before work begins."""

from collections.abc import Collection
from dataclasses import fields, is_dataclass
from typing import Any, Literal, get_args, get_origin, get_type_hints

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException, ValidationError

from prefix_sharing.config.annotations import in_words
from prefix_sharing.config.components import check_component, default_of, find_component, one_line
from prefix_sharing.config.files import did_you_mean
from prefix_sharing.config.foreign import called_here
from prefix_sharing.config.numbers import check_numbers, check_sizes
from prefix_sharing.config.schema import COMPONENTS, ReferenceConfig, TrainingConfig
from prefix_sharing.errors import ConfigError

_NOT_USED_WITH = {
    "none": ("pack_len", "pack_rows_per_step"),
    "step": ("batch_size", "gradient_accumulation_steps", "pack_rows_per_step"),
    "dataset": ("batch_size", "gradient_accumulation_steps", "global_batch_size"),
}
"""For each ``packing`` the keys that it makes no use of."""

_REQUIRED_WITH = {"step": "global_batch_size", "dataset": "pack_rows_per_step"}


def check_config(cfg: DictConfig, config_class: type, meant_for: str | None = None) -> DictConfig:
    """Checks a config and fills in defaults.

    Args:
        cfg (DictConfig): as read.
        config_class (type): a dataclass of the keys there are.
        meant_for (str | None): another recipe, which the config's file is for. Default: None.

    Returns:
        DictConfig: the config with every key of ``config_class``.

    Raises:
        ConfigError: if a key is unknown, missing, not used, of the wrong type or out of range, or a component does not
            exist or does not take an argument given to it.
    """
    cfg = cfg.copy()
    _check_known("", cfg, config_class, meant_for)
    if OmegaConf.is_dict(cfg.get("reference")):
        _check_known("reference.", cfg.reference, ReferenceConfig)
    for key in COMPONENTS:
        # What torchtune's parser makes of ``key=null`` on the command line.
        if OmegaConf.is_dict(cfg.get(key)) and cfg[key].get("_component_", key) is None:
            cfg[key] = None
    values = dict(cfg.items_ex(resolve=False))
    for key in map(str, cfg):
        if OmegaConf.is_missing(cfg, key):  # also where there is a default, which is not what the config means
            raise ConfigError(key, "required, but not set")
    for key in OmegaConf.missing_keys(OmegaConf.structured(config_class)):
        if values.get(key, key) is None:  # null sets a required key as little as leaving it out does
            del cfg[key]
    is_training = issubclass(config_class, TrainingConfig)
    given = {str(key) for key, value in cfg.items_ex(resolve=False) if value is not None}
    if is_training:
        _resolve_packing(cfg)
    cfg = _fill_in(cfg, config_class)
    plain: Any = OmegaConf.to_container(cfg, resolve=True)
    check_numbers("", plain)
    if is_training:
        _check_training(cfg, given)
    hints = get_type_hints(config_class)
    for key in COMPONENTS:
        if cfg.get(key) is not None and hints[key] is Any:  # a recipe may have text under the name of a component
            check_component(key, cfg[key])
    for key in ("model", "tokenizer"):
        check_sizes(key, plain.get(key) or {})
    return cfg


def leave_to_the_command_line(cfg: DictConfig, components: Collection[str] | None = None) -> list[str]:
    """Makes null of what a config leaves to be set on the command line as ``???``.

    Args:
        cfg (DictConfig): a config as read; changed in place.
        components (Collection[str] | None): whose arguments are meant. Default: None, every key and those of every
            component.

    Returns:
        list[str]: which they were.
    """
    keys: Any = OmegaConf.to_container(cfg)
    nodes = {key: node for key, node in keys.items() if isinstance(node, dict)}
    found = [key for key, value in keys.items() if value == "???" and components is None]
    for key in nodes if components is None else [key for key in nodes if key in components]:
        found += [f"{key}.{argument}" for argument, value in nodes[key].items() if value == "???"]
    for key in found:
        OmegaConf.update(cfg, key, None)
    return found


def _check_known(prefix: str, cfg: DictConfig, config_class: type, meant_for: str | None = None) -> None:
    known = [field.name for field in fields(config_class)]
    for key in map(str, cfg):
        if key not in known:
            suggestion = called_here(f"{prefix}{key}", known) or did_you_mean(key, known)
            if not suggestion and meant_for is not None:
                suggestion = f" The config is for {meant_for}."
            raise ConfigError(f"{prefix}{key}", f"unknown key.{suggestion}")


def _fill_in(cfg: DictConfig, config_class: type) -> DictConfig:
    """The config with defaults, its values of the right types and within their ranges."""
    _check_choices(cfg, config_class)
    try:
        filled = OmegaConf.structured(config_class)
        filled.merge_with(cfg)
        known = [field.name for field in fields(config_class)]
        missing = [key for key in known if OmegaConf.is_missing(filled, key)] or sorted(OmegaConf.missing_keys(filled))
        if missing:
            # What refers to another key, such as ``${dataset.data_files}``, is set with that.
            first, *others = [key for key in missing if not _is_reference(filled, key)] or missing
            are = "are" if len(others) > 1 else "is"
            too = f", and so {are} {', '.join(others)}" if others else ""
            raise ConfigError(first, f"required, but not set{too}")
        OmegaConf.to_container(filled, resolve=True)
    except OmegaConfBaseException as error:
        raise _explained(error, cfg, config_class) from error
    _check_ranges(filled, config_class)
    if filled.get("reference") is not None and filled.reference.cache_dir == "":
        raise ConfigError("reference.cache_dir", "must not be empty; null turns the cache off")
    return filled


def _is_reference(cfg: DictConfig, key: str) -> bool:
    """Whether a key, or one above it, refers to another."""
    parts = key.split(".")
    parents = (OmegaConf.select(cfg, ".".join(parts[:i])) if i else cfg for i in range(len(parts)))
    return any(map(OmegaConf.is_interpolation, parents, parts))


def _explained(error: OmegaConfBaseException, cfg: DictConfig, config_class: type) -> ConfigError:
    """What OmegaConf says of a value, without its own terms."""
    key = getattr(error, "full_key", None) or "?"
    hint: Any = config_class
    for name in key.split("."):
        hint = get_type_hints(hint).get(name) if is_dataclass(hint) else None
    if not isinstance(error, ValidationError) or hint is None:
        return ConfigError(key, one_line(error).partition(" full_key: ")[0])
    return ConfigError(key, f"must be {in_words(hint)}, but is {OmegaConf.select(cfg, key)!r}")


def _check_choices(cfg: DictConfig, config_class: type, prefix: str = "") -> None:
    for name, hint in get_type_hints(config_class).items():
        if name not in cfg or OmegaConf.is_interpolation(cfg, name):
            continue
        key, value = f"{prefix}{name}", cfg.get(name)
        if isinstance(hint, type) and is_dataclass(hint) and value is not None:
            if not OmegaConf.is_dict(value):
                raise ConfigError(key, f"must be a mapping, but is {value}")
            _check_choices(value, hint, f"{key}.")
        if hint is bool and isinstance(value, (int, float)) and value not in (0, 1):  # OmegaConf would take it for True
            raise ConfigError(key, f"must be True or False, but is {value}")
        if isinstance(value, bool) and hint in (str, str | None):  # it would be taken for the text "True"
            remedy = "give auto, or the directory of a training checkpoint" if key == "resume" else "quote it"
            raise ConfigError(key, f"must be text, but is {value}; {remedy}")
        literals = [part for part in (hint, *get_args(hint)) if get_origin(part) is Literal]
        choices = [choice for literal in literals for choice in get_args(literal)]
        if choices and value not in choices and not (value is None and type(None) in get_args(hint)):
            raise ConfigError(key, f"must be {_either(choices)}, but is {value}")


def _check_ranges(cfg: DictConfig, config_class: type) -> None:
    for field in fields(config_class):
        value = cfg[field.name]
        if value is None:
            continue
        if value == "":
            raise ConfigError(field.name, "must not be empty; null stands for nothing")
        if "at_least" in field.metadata and not value >= field.metadata["at_least"]:
            raise ConfigError(field.name, f"must be at least {field.metadata['at_least']}, but is {value}")
        if "above" in field.metadata and not value > field.metadata["above"]:
            raise ConfigError(field.name, f"must be above {field.metadata['above']}, but is {value}")


def _resolve_packing(cfg: DictConfig) -> None:
    """Turns torchtune's ``dataset.packed`` into ``packing``, which is a matter of the run, not of the data."""
    node = cfg.get("dataset_val")
    if OmegaConf.is_dict(node) and "packed" in node:
        raise ConfigError("dataset_val.packed", "not used: held-out examples are packed as the training examples are")
    node = cfg.get("dataset")
    if not OmegaConf.is_dict(node) or "_component_" not in node:
        return
    packed = node.pop("packed", None)
    if packed is None:
        packed = default_of(find_component("dataset", node._component_), "packed")
    if packed is None:
        return
    packing = cfg.get("packing")
    if packing is None:
        cfg.packing = "step" if packed else "none"
    elif packed != (packing != "none"):
        raise ConfigError("packing", f"is {packing}, but dataset.packed is {packed}; keep one of the two keys")


def _check_training(cfg: DictConfig, given: set[str]) -> None:
    """The rules that take more than one key to state."""
    for key in _NOT_USED_WITH[cfg.packing]:
        if key in given:
            raise ConfigError(key, f"not used with packing: {cfg.packing}; remove it (~{key} on the command line)")
    required = _REQUIRED_WITH.get(cfg.packing)
    if required is not None and cfg[required] is None:
        raise ConfigError(required, f"required with packing: {cfg.packing}")
    if {"global_batch_size", "gradient_accumulation_steps"} <= given:
        problem = "not used with global_batch_size; remove one of the two (~KEY on the command line)"
        raise ConfigError("gradient_accumulation_steps", problem)
    if cfg.pack_len not in (None, "auto") and not (type(cfg.pack_len) is int and cfg.pack_len >= 1):
        raise ConfigError("pack_len", f"must be auto or a number of tokens, but is {cfg.pack_len}")
    if cfg.run_val_every_n_steps is not None and cfg.dataset_val is None:
        raise ConfigError("run_val_every_n_steps", "not used without dataset_val; set dataset_val or remove it")
    if cfg.device is not None and cfg.device.partition(":")[0] not in ("cpu", "cuda"):
        raise ConfigError("device", f"must be cuda or cpu, but is {cfg.device}")
    if cfg.ac_mode == "selective" and not cfg.enable_activation_checkpointing:
        raise ConfigError("ac_mode", "selective needs enable_activation_checkpointing: True")
    if cfg.enable_activation_offloading and not cfg.enable_activation_checkpointing:
        raise ConfigError("enable_activation_offloading", "needs enable_activation_checkpointing: True")


def _either(choices: list[Any]) -> str:
    *others, last = map(str, choices)
    return f"{', '.join(others)} or {last}" if others else last
