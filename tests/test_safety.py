"""No file that a user could have been sent runs code: the package loads no pickle, and no model's own code."""

import ast
from pathlib import Path

import pytest

from documents import ROOT

FILES = [file for room in ("components", "recipes", "examples") for file in sorted((ROOT / room).rglob("*.py"))]
RUN_WHAT_THEY_READ = {"pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}


def faults(tree):
    for node in ast.walk(tree):
        modules = [alias.name for alias in getattr(node, "names", [])] if isinstance(node, ast.Import) else []
        modules += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        yield from (name for name in modules if name.partition(".")[0] in RUN_WHAT_THEY_READ)
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        if called in ("torch.load", "load_state_dict_from_url") and given.get("weights_only") != "True":
            yield called
        if called in ("eval", "exec", "yaml.load", "yaml.unsafe_load", "yaml.full_load"):
            yield called
        yield from (name for name in ("trust_remote_code", "allow_pickle") if given.get(name, "False") != "False")


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_nothing_that_is_read_is_run(file):
    assert list(faults(ast.parse(Path(file).read_text(encoding="utf-8")))) == []


def test_the_search_finds_what_it_looks_for():
    bad = "import pickle\nfrom joblib import load\ntorch.load(f)\ntorch.load(f, weights_only=False)\neval(x)\n"
    bad += "f(trust_remote_code=True)\nf(allow_pickle=x)"
    assert len(list(faults(ast.parse(bad)))) == 7
