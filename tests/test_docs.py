"""What docs/ promises: keys, components and snippets are those of the code."""

import re
from dataclasses import fields
from pathlib import Path
from pkgutil import resolve_name

import pytest
import yaml
from omegaconf import OmegaConf
from prefix_sharing.training import DistributedConfig
from prefix_sharing.training.config import ReferenceConfig, _check_component

from prefix_dpo_answers import AnswersConfig
from prefix_dpo_memory import MemoryConfig
from prefix_dpo_stats import StatsConfig
from prefix_sharing.attention import show
from prefix_sharing.losses import CPOLoss, DPOLoss, ORPOLoss, PlackettLuceLoss, SimPOLoss

DOCS = {file.name: file.read_text() for file in (Path(__file__).parents[1] / "docs").glob("*.md")}
SNIPPETS = re.findall(r"```yaml\n(.*?)```", DOCS["data.md"], re.DOTALL)


def test_every_key_is_documented_once_with_its_default():
    table = re.findall(r"^\| `(\w+)` \| (.*?) \|", DOCS["settings.md"], re.MULTILINE)
    known = [*fields(DistributedConfig), *fields(ReferenceConfig)]
    for config_class in (StatsConfig, MemoryConfig, AnswersConfig):
        known += [field for field in fields(config_class) if field.name not in DistributedConfig.__dataclass_fields__]
    assert sorted(name for name, _ in table) == sorted(field.name for field in known)
    defaults = {field.name: field.default for field in known}
    for name, default in table:
        if default not in ("", "required", "null"):
            assert default == f"`{defaults[name]}`"


def test_the_mask_shown_is_the_one_that_is_drawn(capsys, monkeypatch):
    (command,) = re.findall(r"`python -m prefix_sharing.attention.show (.*?)`", DOCS["how_it_works.md"])
    monkeypatch.setattr("sys.argv", ["show", *command.split()])
    show.main()
    drawn = capsys.readouterr().out.splitlines()[:-1]
    (picture,) = re.findall(r"```\n(█.*?)\n```", DOCS["how_it_works.md"], re.DOTALL)
    assert picture.splitlines() == drawn


def test_every_part_that_is_named_is_there():
    package = Path(show.__file__).parents[1]
    parts = re.findall(r"`(\w+(?:/|\.py))`", DOCS["how_it_works.md"])
    assert len(parts) >= 9
    assert all((package / part).exists() for part in parts)


def test_every_component_named_exists():
    for text in DOCS.values():
        for path in set(re.findall(r"(?:prefix_sharing|torchtune)(?:\.\w+)+", text)):
            resolve_name(path.removesuffix(".reference.cache"))


@pytest.mark.parametrize("snippet", SNIPPETS)
def test_snippets_give_the_builder_what_it_takes(snippet):
    node = OmegaConf.create(yaml.safe_load(snippet)).dataset
    _check_component("dataset", node)


def test_keys_that_migration_and_troubleshooting_name_exist():
    known = {field.name for field in (*fields(DistributedConfig), *fields(ReferenceConfig))}
    for loss in (DPOLoss, SimPOLoss, ORPOLoss, CPOLoss, PlackettLuceLoss):
        known |= {field.name for field in fields(loss)}
    text = DOCS["migration.md"] + DOCS["troubleshooting.md"]
    for key in re.findall(r"`(?:loss|reference)\.(\w+)", text):
        assert key in known | {"_component_"}, key
    for key in re.findall(r"`((?:fsdp|enable|run_val|global|pack)_\w+)", text):
        assert key in known, key
