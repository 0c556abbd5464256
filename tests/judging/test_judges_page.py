"""The configs in docs/judges.md can be checked and built without a model."""

import sys
import types

import pytest
import torch
import yaml
from omegaconf import OmegaConf

from documents import PAGES, blocks
from prefix_sharing import judging, sampling
from prefix_sharing.checkpoint import Checkpoint
from prefix_sharing.config import instantiate
from prefix_sharing.config.checks import check_component
from prefix_sharing.errors import UserError
from prefix_sharing.judging import served_judge
from prefix_sharing.sampling import Policy
from servers import says, serve

SNIPPETS = [yaml.safe_load(block) for block in blocks(PAGES["judges.md"], "yaml")]


@pytest.fixture(autouse=True)
def _rules(monkeypatch):
    rules = types.ModuleType("my_rules")
    rules.politeness = lambda turns, answer: 0.0
    monkeypatch.setitem(sys.modules, "my_rules", rules)


@pytest.mark.parametrize("snippet", SNIPPETS, ids=lambda snippet: next(iter(snippet.values()))["_component_"])
def test_configs_can_be_built(snippet):
    if next(iter(snippet.values()))["_component_"].endswith(("model_judge", "ranker_judge", "reward_judge")):
        pytest.importorskip("transformers", minversion="5.24")
    ((key, node),) = OmegaConf.create(snippet).items()
    check_component(key, node)
    policy = Policy(None, Checkpoint(), None, None, torch.device("cpu"), torch.float32, 0)
    built = instantiate(key, node) if key == "judge" else instantiate(key, node, policy)
    assert callable(built)


def test_each_judge_is_on_the_page():
    judges = {name for name in judging.__all__ if name.endswith("_judge")}
    assert len(judges) == 6
    assert all(f"`{name}`" in PAGES["judges.md"] for name in judges)
    shown = {node["_component_"].rsplit(".", 1)[-1] for snippet in SNIPPETS for node in snippet.values()}
    assert shown == judges - {"length_judge"} | {sampling.served_sampler.__name__}


def test_fields_of_a_request_come_from_a_config():
    node = OmegaConf.create(
        {
            "_component_": f"{served_judge.__module__}.served_judge",
            "model": "big",
            "request": {"stop": ["a"], "options": {"deep": None}, "temperature": None},
        }
    )
    with serve(lambda path, body, number: says("[[3]]")) as stub:
        node.base_url = stub.base_url
        assert instantiate("judge", node)([[{"role": "user", "content": "q"}]], [["a"]])[0].tolist() == [3.0]
        assert stub.bodies[0]["options"] == {"deep": None}
        assert stub.bodies[0]["stop"] == ["a"]
        assert "temperature" not in stub.bodies[0]


@pytest.mark.parametrize("name", ["reward_model_judge", "pair_ranker_judge"])
def test_without_transformers_it_is_said_what_to_install(name, monkeypatch):
    monkeypatch.setattr("prefix_sharing.judging.models.find_spec", lambda module: None)
    with pytest.raises(UserError, match=r"pip install 'torchtune-prefix-sharing\[transformers\]'"):
        getattr(judging, name)("somewhere")


def test_a_fault_names_its_key_once():
    node = OmegaConf.create({"_component_": "prefix_sharing.judging.served_judge", "base_url": "x", "model": "m"})
    with pytest.raises(Exception, match=r"^Config key 'judge.base_url': 'x' is no URL"):
        instantiate("judge", node)
