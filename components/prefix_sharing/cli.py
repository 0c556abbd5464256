"""``prefix-tune``: torchtune's ``tune`` command, which also lists, copies and runs this package's recipes and configs.

    prefix-tune ls
    prefix-tune cp prefix_dpo_distributed my_recipe.py
    prefix-tune cat quickstart/single_device
    prefix-tune run prefix_dpo_single_device --config quickstart/single_device

Plain ``tune run`` runs them as well.
"""

import re
from importlib.util import find_spec

from torchtune import _recipe_registry as registry
from torchtune._cli.tune import main as tune

from prefix_sharing.config import config_names, find_config

RECIPES = {
    "prefix_dpo_single_device": False,
    "prefix_dpo_distributed": True,
    "prefix_dpo_stats": False,
    "prefix_dpo_memory": False,
    "prefix_dpo_answers": False,
    "prefix_dpo_benchmark": False,
}
"""This package's recipes, and whether they run on several processes."""


def register() -> None:
    """Adds this package's recipes and configs to those that torchtune's commands know."""
    configs: dict[str, list[registry.Config]] = {recipe: [] for recipe in RECIPES}
    for name in config_names():
        file = find_config(name)
        configs[recipe_of(file)].append(registry.Config(name=name, file_path=file))
    registry._ALL_RECIPES.extend(
        registry.Recipe(name=recipe, file_path=_path_of(recipe), configs=configs[recipe], supports_distributed=several)
        for recipe, several in RECIPES.items()
    )


def recipe_of(file: str) -> str:
    """The recipe that a config of this package is for, which its first line names.

    Args:
        file (str): the config's path.

    Returns:
        str: the recipe's name.
    """
    with open(file) as lines:
        (recipe,) = re.findall(r"^# Config for (\w+)\.py", lines.readline())
    return recipe


def _path_of(recipe: str) -> str:
    spec = find_spec(recipe)
    assert spec is not None
    assert spec.origin is not None
    return spec.origin


def main() -> None:
    """Runs ``tune`` with more recipes."""
    register()
    tune()
