"""What keeps the rooms of the package apart, beside the contracts of import-linter in ``pyproject.toml``."""

import ast
import importlib
import pkgutil
import re
from pathlib import Path

import pytest

import prefix_sharing

PACKAGE = Path(prefix_sharing.__file__).parent
SOURCES = sorted([*PACKAGE.rglob("*.py"), *(Path(__file__).parents[1] / "recipes").glob("*.py")])
ROOMS = [module.name for module in pkgutil.walk_packages(prefix_sharing.__path__, "prefix_sharing.") if module.ispkg]


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_shows_no_more_than_one_can_read(room):
    face = importlib.import_module(room)
    names = getattr(face, "__all__", [])
    assert face.__doc__
    assert len(names) <= 15
    assert sorted(names) == sorted(set(names))
    assert all(hasattr(face, name) for name in names)


def private_torch_names(source):
    """Modules and attributes of torch whose name begins with an underscore, as ``torch._dynamo`` does."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "torch":
            found += [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            found += [alias.name for alias in node.names if alias.name.split(".")[0] == "torch"]
        elif isinstance(node, ast.Attribute) and re.fullmatch(r"torch(\.\w+)+", ast.unparse(node)):
            found.append(ast.unparse(node))
    return [name for name in found if re.search(r"\._(?!_)", name)]


def test_private_names_of_torch_are_in_one_file():
    private = {source.name: private_torch_names(source.read_text()) for source in SOURCES}
    assert private.pop("torch_private.py")
    assert {name: found for name, found in private.items() if found} == {}
