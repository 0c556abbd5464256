"""Writes ``docs/settings.md`` from the configs' declarations: ``python docs/make_settings.py``."""

import types
from collections.abc import Iterable
from dataclasses import MISSING as NO_DEFAULT
from dataclasses import Field, fields
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from omegaconf import MISSING

from prefix_dpo_answers import AnswersConfig
from prefix_dpo_benchmark import BenchmarkConfig
from prefix_dpo_harness_task import HarnessTaskConfig
from prefix_dpo_judge import JudgeConfig
from prefix_dpo_memory import MemoryConfig
from prefix_dpo_online import OnlineConfig, RoundConfig
from prefix_dpo_stats import StatsConfig
from prefix_dpo_sweep import SweepConfig
from prefix_sharing.config import DistributedConfig, TrainingConfig
from prefix_sharing.config.schema import COMPONENTS, ReferenceConfig, field_docs

FILE = Path(__file__).with_name("settings.md")

HEAD = """\
# Settings

Every key of a config. Keys below the name of a component, such as `optimizer.lr`, are that component's arguments.
`key=value` on the command line overrides a config, `~key` removes a key from it. An unknown key is an error that names
the nearest known one, and so is a key that would not be used.

This page is generated: change the docstring under the field, then run `python docs/make_settings.py`."""


def values_of(field: Field, hint: Any) -> str:
    """What a key may be, such as ``int ≥ 1`` or its choices."""
    options = [option for option in get_args(hint) if option is not type(None)] if is_union(hint) else [hint]
    named = []
    for option in options:
        if get_origin(option) is Literal:
            named += [f"`{choice}`" for choice in get_args(option)]
        elif field.name in COMPONENTS and option is Any:
            named.append("component")
        elif option is not ReferenceConfig:
            named.append(str(option) if get_origin(option) else option.__name__)
    limits = [f" ≥ {field.metadata['at_least']}"] if "at_least" in field.metadata else []
    limits += [f" > {field.metadata['above']}"] if "above" in field.metadata else []
    return ", ".join(named).replace("typing.", "") + "".join(limits)


def is_union(hint: Any) -> bool:
    """Whether a type is ``X | Y`` or ``Optional[X]``."""
    return get_origin(hint) in (Union, types.UnionType)


def default_of(field: Field) -> str:
    """A key's default as YAML; nothing where its description says it."""
    if field.default is MISSING:
        return "required"
    if field.default is NO_DEFAULT:
        default = field.default_factory() if callable(field.default_factory) else None
        return f"`[{', '.join(map(str, default))}]`" if isinstance(default, list) else ""
    return "`null`" if field.default is None else f"`{field.default}`"


def section(title: str, config_class: type, inherited: type = object) -> str:
    """A table of the keys of a config that those of ``inherited`` lack."""
    docs, hints = field_docs(config_class), get_type_hints(config_class)
    known = {field.name for field in fields(inherited)} if inherited is not object else set()
    lines = [f"## {title}\n", "| key | values | default | meaning |", "| --- | --- | --- | --- |"]
    for field in fields(config_class):
        if field.name not in known:
            cells = [f"`{field.name}`", values_of(field, hints[field.name]), default_of(field)]
            lines.append(f"| {' | '.join(cells)} | {docs[field.name].replace('``', '`')} |")
    return "\n".join(lines)


def settings() -> str:
    """The page."""
    sections: Iterable[str] = (
        HEAD,
        section("`prefix_dpo_single_device` and `prefix_dpo_distributed`", TrainingConfig),
        section("`reference`", ReferenceConfig),
        section("`prefix_dpo_distributed` only", DistributedConfig, TrainingConfig),
        section("`prefix_dpo_stats`, in addition to those of training", StatsConfig, DistributedConfig),
        section("`prefix_dpo_memory`, in addition to those of training", MemoryConfig, DistributedConfig),
        section("`prefix_dpo_sweep`, in addition to those of training", SweepConfig, TrainingConfig),
        section("`prefix_dpo_answers`, in addition to those of training", AnswersConfig, DistributedConfig),
        section("`prefix_dpo_harness_task`, in addition to those of training", HarnessTaskConfig, DistributedConfig),
        section("`prefix_dpo_online`, in addition to those of training", OnlineConfig, TrainingConfig),
        section(
            "`prefix_dpo_sample` and `prefix_dpo_judge`, in addition to those of online", RoundConfig, OnlineConfig
        ),
        section("`prefix_dpo_judge` only", JudgeConfig, RoundConfig),
        section("`prefix_dpo_benchmark`", BenchmarkConfig),
    )
    return "\n\n".join(sections) + "\n"


if __name__ == "__main__":
    FILE.write_text(settings())
