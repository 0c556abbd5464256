"""What docs/ promises: commands, keys, components and snippets are those of the code."""

import re
import runpy
import sys
from dataclasses import fields
from pkgutil import resolve_name

import pytest
import torch
import yaml
from omegaconf import OmegaConf

from documents import PAGES, README, ROOT, blocks, commands, runs, runs_of, table
from prefix_sharing.benchmark.layers import one_pair
from prefix_sharing.cli import recipe_of
from prefix_sharing.config import DistributedConfig, config_names, find_config
from prefix_sharing.config.checks import check_component
from prefix_sharing.config.schema import ReferenceConfig
from prefix_sharing.datasets import prefix_preference_dataset
from prefix_sharing.datasets.forms import FORMS
from prefix_sharing.hosts import to_tree_model
from prefix_sharing.losses import CPOLoss, DPOLoss, KTOLoss, ORPOLoss, PlackettLuceLoss, SimPOLoss
from prefix_sharing.quickstart import tokenizer
from prefix_sharing.reports import mask
from prefix_sharing.scoring import ResponseLogProbs
from prefix_sharing.trees import PrefixTree, TreeSizes
from runs import SHORT, as_overrides, make_config, tune_run

RECIPES, GUIDE = PAGES["recipes.md"], "\n".join(text for name, text in PAGES.items() if not name.startswith("api/"))
SNIPPETS = blocks(PAGES["data.md"], "yaml")
SHORT_OVERRIDES = as_overrides(SHORT)


@pytest.mark.slow
def test_commands_around_a_run_work(tmp_path):
    train, *_ = runs_of("prefix_dpo_single_device", RECIPES)
    stats, *_ = runs_of("prefix_dpo_stats", RECIPES)
    answers, *_ = runs_of("prefix_dpo_answers", RECIPES)
    for command, more in ((stats, []), (train, []), (answers, ["max_new_tokens=8"])):
        done = tune_run(*command, *SHORT_OVERRIDES, *more, cwd=tmp_path)
        assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "quickstart_output" / "stats" / "lengths.png").exists()
    assert "**after training**" in (tmp_path / "quickstart_output" / "answers.md").read_text()


@pytest.mark.slow
def test_the_memory_command_works(tmp_path):
    command = next(run for run in runs(RECIPES) if "prefix_dpo_memory" in run)
    dims = {"vocab_size": 128256, "num_layers": 2, "num_heads": 32, "num_kv_heads": 8, "embed_dim": 2048}
    model = dims | {"_component_": "torchtune.models.llama3.llama3", "max_seq_len": 4096, "intermediate_dim": 8192}
    smaller = [f"model.{key}={value}" for key, value in model.items()] + ["pack_len=512", "device_memory=10GiB"]
    done = tune_run(*command, *smaller, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert re.search(r"It fits into 9.00 GiB.*\nThe longest pack_len that fits", done.stdout)


def test_masks_are_drawn_as_shown(tmp_path, capsys, monkeypatch, pictures):
    monkeypatch.chdir(tmp_path)
    in_recipes = [line for line in commands(RECIPES) if "reports.mask" in line]
    in_text = re.findall(r"`python -m (prefix_sharing.reports.mask .*?)`", PAGES["how_it_works.md"])
    drawn = []
    for command in [*in_recipes, *in_text]:
        monkeypatch.setattr("sys.argv", command[command.index("prefix_sharing.reports.mask") :].split())
        mask.main()
        drawn.append([line for line in capsys.readouterr().out.splitlines() if line and set(line) <= {"█", "·"}])
    assert (tmp_path / "mask.png").read_bytes().startswith(b"\x89PNG")
    for text, picture in ((README, drawn[0]), (PAGES["how_it_works.md"], drawn[-1])):
        shown = next(block for block in blocks(text) if "█" in block)
        assert [line.split()[0] for line in shown.strip().splitlines()] == picture


def test_the_reference_cache_is_listed(monkeypatch, capsys):
    command = next(line for line in commands(PAGES["reference.md"]) if "--clear" not in line)
    python, option, module, *arguments = command.split()
    assert (python, option) == ("python", "-m")
    monkeypatch.setattr(sys, "argv", [module, *arguments])
    monkeypatch.delitem(sys.modules, module)  # run as a script
    runpy.run_module(module, run_name="__main__")
    assert capsys.readouterr().out


def test_every_config_is_listed_and_exists():
    assert sorted(cells[0].strip("`") for cells in table(PAGES["configs.md"], "config")) == config_names()
    for cells in table(PAGES["configs.md"], "config"):
        assert cells[1].strip("`") == recipe_of(find_config(cells[0].strip("`")))
        assert ("distributed" in cells[1]) == ("nproc_per_node" in cells[2])
    for run in runs(GUIDE):
        name = run[run.index("--config") + 1]
        assert name.endswith(".yaml") or name == "..." or find_config(name)


def test_where_time_goes_is_what_is_counted(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "docs")
    table = resolve_name("make_performance:tables")("llama3_2/1B_prefix_dpo_single_device", 5, 2048, 512)
    page = " ".join(PAGES["performance.md"].split())
    assert " ".join(table.split()) in page, "run python docs/make_performance.py"


def test_counted_products_are_those_of_the_formula(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "docs")
    count_step = resolve_name("make_performance:count_step")
    small = {"vocab_size": 512, "num_layers": 3, "num_heads": 8, "num_kv_heads": 2, "embed_dim": 64, "max_seq_len": 512}
    model = small | {"_component_": "torchtune.models.llama3.llama3", "intermediate_dim": 96}
    cfg = make_config("unused", **{"model": model, "compile": False})
    count = count_step(cfg, 3, 40, 10, share_prefix=True)
    tree = PrefixTree.from_responses(one_pair(40, 10)).size
    forward = to_tree_model(resolve_name(model.pop("_component_"))(**model), "chains").forward_flops(
        TreeSizes.of([tree] * 3)
    )
    scores = 4 * 64 * tree.num_visible * 2 * 3  # of two layers; the last one's are not in the formula
    assert count.costs["matrix products"].flops == 3 * (forward.sum() - scores)
    assert count.costs["attention"].flops > 3.5 * scores


def test_settings_are_up_to_date():
    sys.path.insert(0, str(ROOT / "docs"))
    assert resolve_name("make_settings:settings")() == PAGES["settings.md"], "run python docs/make_settings.py"


def test_every_setting_is_explained():
    for name, *_, meaning in re.findall(r"^\| `(\w+)` \|(.*)\|(.*)\|(.*)\|$", PAGES["settings.md"], re.MULTILINE):
        assert len(meaning) > 10, name


def test_every_form_of_data_is_read(tmp_path):
    forms = [(cells[0].split("`")[1], cells[1].split("`")[1]) for cells in table(PAGES["data.md"], "`format`")]
    assert {name for name, _ in forms} == set(FORMS)
    for i, (name, record) in enumerate(forms):
        # The table writes the second response as "[...]" where it is like the first.
        chosen = re.search(r'"chosen": (\[.*?\])', record)
        if chosen:
            record = record.replace('"rejected": [...]', '"rejected": ' + chosen.group(1).replace('"A"', '"B"'))
        file = tmp_path / f"{i}.jsonl"
        others = {"helpsteer2": record.replace('"A"', '"B"').replace("4", "1")}
        file.write_text(f"{record}\n{others.get(name, '')}\n")
        dataset = prefix_preference_dataset(tokenizer(), data_files=str(file))
        assert len(dataset) == 1
        assert dataset.num_responses == {"chat": 1, "completion": 1, "unpaired": 1, "ranked": 3}.get(name, 2)
        forced = prefix_preference_dataset(tokenizer(), data_files=str(file), format=name)
        assert [r.tokens.tolist() for r in forced[0]] == [r.tokens.tolist() for r in dataset[0]]
        if dataset.num_responses > 1:  # A is always the better one
            text = tokenizer().decode(dataset[0][0].tokens.tolist())
            assert text.endswith(("A", " blue."))


def test_the_first_data_set_shown_is_read(tmp_path):
    node = yaml.safe_load(SNIPPETS[0])["dataset"]
    assert resolve_name(node.pop("_component_")) is prefix_preference_dataset
    file = tmp_path / node.pop("data_files")
    file.write_text('{"prompt": "Q", "chosen": "A", "rejected": "B"}\n' * 101)
    assert len(prefix_preference_dataset(tokenizer(), data_files=str(file), **node)) == 1


@pytest.mark.parametrize("snippet", SNIPPETS)
def test_snippets_give_the_builder_what_it_takes(snippet):
    check_component("dataset", OmegaConf.create(yaml.safe_load(snippet)).dataset)


def test_the_loss_shown_works():
    shown = next(block for block in blocks(PAGES["losses.md"], "python") if "class MarginLoss" in block)
    names = {}
    exec(shown, names)
    loss = names["MarginLoss"](margin=2.0)
    log_probs = torch.tensor([[-1.0, -2.5], [-3.0, -1.0]])
    policy = ResponseLogProbs(log_probs=log_probs, num_scored=torch.ones(2, 2))
    assert loss.needs.reference
    assert loss(policy, torch.zeros(2, 2)).losses.tolist() == [0.5, 4.0]


def test_losses_have_the_keys_listed():
    for cells in table(PAGES["losses.md"], "loss"):
        known = {field.name for field in fields(resolve_name(cells[0].strip("`")))}
        keys = set(re.findall(r"`(\w+)`", cells[2])) & {*known, "beta", "label_smoothing"}
        assert keys <= known
        if "fine-tuning" not in cells[2]:
            assert keys == known, cells[0]


def test_every_part_that_is_named_is_there():
    package = ROOT / "components" / "prefix_sharing"
    parts = [cells[1].strip("`") for cells in table(PAGES["how_it_works.md"], "what")]
    assert len(parts) >= 9
    assert all((package / part).exists() for part in parts)
    rooms = {part.name for part in package.iterdir() if (part / "__init__.py").exists()}
    assert rooms - {part.strip("/") for part in parts} == {"quickstart"}
    assert {file.stem for file in (ROOT / "docs" / "api").iterdir()} <= {*rooms, "scoring"}


def test_every_component_named_exists():
    for text in PAGES.values():
        for path in set(re.findall(r"(?:prefix_sharing|torchtune)(?:\.\w+)+", text)):
            resolve_name(path)


def test_keys_that_migration_and_troubleshooting_name_exist():
    known = {field.name for field in (*fields(DistributedConfig), *fields(ReferenceConfig))}
    for loss in (DPOLoss, SimPOLoss, ORPOLoss, CPOLoss, PlackettLuceLoss, KTOLoss):
        known |= {field.name for field in fields(loss)}
    text = PAGES["migration.md"] + PAGES["troubleshooting.md"]
    for key in re.findall(r"`(?:loss|reference)\.(\w+)", text):
        assert key in known | {"_component_"}, key
    for key in re.findall(r"`((?:fsdp|enable|run_val|global|pack)_\w+)", text):
        assert key in known, key
