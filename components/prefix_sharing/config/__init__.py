"""Configs: the keys there are, how a YAML file becomes a checked config, and how its components are built."""

from prefix_sharing.config.checks import check_config
from prefix_sharing.config.components import component_name, explained, instantiate, one_line
from prefix_sharing.config.defaults import default_cache_dir
from prefix_sharing.config.files import config_names, find_config
from prefix_sharing.config.parsing import parse, readable_errors
from prefix_sharing.config.schema import DistributedConfig, ReferenceConfig, TrainingConfig, above, at_least

__all__ = [
    "DistributedConfig",
    "ReferenceConfig",
    "TrainingConfig",
    "above",
    "at_least",
    "check_config",
    "component_name",
    "config_names",
    "default_cache_dir",
    "explained",
    "find_config",
    "instantiate",
    "one_line",
    "parse",
    "readable_errors",
]
