"""``prefix-tune``: torchtune's ``tune`` command, which also knows this package's recipes and configs.

    prefix-tune ls
    prefix-tune cp prefix_dpo_distributed my_recipe.py
    prefix-tune cat quickstart/single_device
    prefix-tune validate quickstart/single_device
    prefix-tune verify quickstart_output
    prefix-tune run prefix_dpo_single_device --config quickstart/single_device

Plain ``tune run`` runs them as well.
"""

import argparse
import os
import sys
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from torchtune import _recipe_registry as registry
from torchtune._cli import tune
from torchtune._cli.run import ROOT
from torchtune._cli.validate import Validate

from prefix_sharing.config import check_config, config_names, find_config, one_line, readable_errors
from prefix_sharing.config.checks import leave_to_the_command_line
from prefix_sharing.config.files import recipe_of
from prefix_sharing.errors import UserError

RECIPES = {
    "prefix_dpo_single_device": False,
    "prefix_dpo_distributed": True,
    "prefix_dpo_stats": False,
    "prefix_dpo_online": False,
    "prefix_dpo_online_distributed": True,
    "prefix_dpo_sample": False,
    "prefix_dpo_judge": False,
    "prefix_dpo_memory": False,
    "prefix_dpo_sweep": False,
    "prefix_dpo_answers": False,
    "prefix_dpo_harness_task": False,
    "prefix_dpo_benchmark": False,
}
"""This package's recipes, and whether they run on several processes."""


def register() -> None:
    """Adds this package's recipes and configs to those that torchtune's commands know."""
    configs: dict[str, list[registry.Config]] = {recipe: [] for recipe in RECIPES}
    for name in config_names():
        file = find_config(name)
        recipe = recipe_of(file)
        assert recipe is not None, f"{file} must begin with # Config for RECIPE.py"
        configs[recipe].append(registry.Config(name=name, file_path=file))
    registry._ALL_RECIPES.extend(
        registry.Recipe(name=recipe, file_path=_path_of(recipe), configs=configs[recipe], supports_distributed=several)
        for recipe, several in RECIPES.items()
    )


class ValidateAsRecipesDo(Validate):
    """``validate`` by name or path: this package's configs as their recipes check them, others as torchtune does."""

    def _validate_cmd(self, args: argparse.Namespace) -> None:
        with readable_errors():
            file = _find_any_config(str(args.config))
            cfg = _load(file)
            config_class = _config_class(file, cfg)
            if config_class is None:
                super()._validate_cmd(argparse.Namespace(config=file))
                return
            to_set = leave_to_the_command_line(cfg)
            check_config(cfg, config_class)
            still = f" Still to be set on the command line: {', '.join(to_set)}." if to_set else ""
            print(f"Config is well-formed!{still}")


class ValidateAndVerify(ValidateAsRecipesDo):
    """``validate``, and with it ``verify``: whether the training checkpoints of a run are what was written."""

    def __init__(self, subparsers: Any) -> None:
        super().__init__(subparsers)
        parser = subparsers.add_parser("verify", help="Check every training checkpoint of a run against its checksums.")
        parser.add_argument("output_dir", type=Path, help="the output_dir of a run")
        parser.set_defaults(func=verify)


def verify(args: argparse.Namespace) -> None:
    """Prints a line for each training checkpoint of a run; the exit status is 1 if one is damaged.

    Args:
        args (argparse.Namespace): with ``output_dir``.
    """
    from prefix_sharing.checkpoint import find_checkpoints, read_checkpoint  # which takes seconds to import
    from prefix_sharing.run.directory import CHECKPOINTS

    damaged = False
    with readable_errors():
        found = find_checkpoints(args.output_dir / CHECKPOINTS)
        if not found:
            raise UserError(f"There is no training checkpoint in {args.output_dir / CHECKPOINTS}.")
        for directory in found:
            try:
                files = read_checkpoint(directory).content["files"].values()
                size = sum(file["size"] for file in files)
                print(f"{directory}: whole ({len(files)} files, {size / 1e6:,.1f} MB)")
            except UserError as error:
                damaged = True
                print(error)
    sys.exit(int(damaged))


def _find_any_config(name: str) -> str:
    """The file of a config of this package or of torchtune."""
    files = {config.name: config.file_path for recipe in registry.get_all_recipes() for config in recipe.configs}
    if name in files and not Path(name).is_file():
        return str(ROOT / "recipes" / "configs" / files[name])
    return find_config(name)


def _load(file: str) -> DictConfig:
    try:
        cfg = OmegaConf.load(file)
    except Exception as error:
        raise UserError(f"Config '{file}' cannot be read: {one_line(error)}.") from error
    if not isinstance(cfg, DictConfig):
        raise UserError(f"Config '{file}' cannot be read: it is a list, not keys and values.")
    return cfg


def _config_class(file: str, cfg: DictConfig) -> type | None:
    """The keys of the recipe that a config is for; None if the recipe is not of this package's kind."""
    recipe = recipe_of(file)
    if recipe is None:
        # Without such a line, a config with components of this package is for training, and the distributed recipe
        # knows every key of the other one.
        nodes: Any = OmegaConf.to_container(cfg)
        components = [str(node.get("_component_")) for node in nodes.values() if isinstance(node, dict)]
        if not any(component.startswith("prefix_sharing.") for component in components):
            return None
        recipe = "prefix_dpo_distributed"
    if os.getcwd() not in sys.path:  # a recipe of the user's own, where tune run finds it
        sys.path.append(os.getcwd())
    if find_spec(recipe) is None:
        raise UserError(f"Config '{file}' is for {recipe}.py, which was not found; run this where that file is.")
    return getattr(getattr(import_module(recipe), "recipe_main", None), "config_class", None)


def _path_of(recipe: str) -> str:
    spec = find_spec(recipe)
    assert spec is not None
    assert spec.origin is not None
    return spec.origin


def main() -> None:
    """Runs ``tune`` with more recipes."""
    register()
    tune.Validate = ValidateAndVerify
    tune.main()
