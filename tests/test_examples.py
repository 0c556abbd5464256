"""The files in examples/ run, and are as short as they promise."""

import json
import os
import subprocess
import sys
from pkgutil import resolve_name

import pytest
from omegaconf import OmegaConf

from documents import ROOT
from prefix_sharing.config import check_config, find_config

EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


@pytest.mark.parametrize("file", EXAMPLES, ids=lambda file: file.stem)
def test_an_example_is_short(file):
    assert len(file.read_text().splitlines()) <= 80


# The other one takes long, and has its test in test_trl_trainer.py.
@pytest.mark.parametrize("file", [file for file in EXAMPLES if file.stem != "trl_speed"], ids=lambda file: file.stem)
def test_an_example_runs(file):
    assert subprocess.run([sys.executable, str(file)], capture_output=True, check=True).stdout


WRITES_DOWN_ITS_ARGUMENTS = """#!{python}
import json, sys
with open("{calls}", "a") as calls:
    calls.write(json.dumps(sys.argv[1:]) + "\\n")
"""


def test_the_script_of_lions_is_ten_lines_of_commands_that_recipes_take(tmp_path):
    """Without running them, which takes half an hour; the stages themselves run in test_lions_configs.py."""
    script = ROOT / "examples" / "lions_smollm2.sh"
    assert sum(not line.startswith("#") for line in script.read_text().splitlines()) <= 10
    (tmp_path / "bin").mkdir()
    for name in ("tune", "lm_eval"):
        program = tmp_path / "bin" / name
        program.write_text(WRITES_DOWN_ITS_ARGUMENTS.format(python=sys.executable, calls=tmp_path / name))
        program.chmod(0o755)
    (tmp_path / "my model").mkdir()
    path = f"{tmp_path / 'bin'}:{os.environ['PATH']}"
    command = ["bash", str(script), "my model", "my pairs.jsonl"]
    subprocess.run(command, cwd=tmp_path, env=os.environ | {"PATH": path}, check=True)
    called = [json.loads(line) for line in (tmp_path / "tune").read_text().splitlines()]
    assert [call[1].removeprefix("prefix_dpo_") for call in called] == [
        *["single_device", "single_device", "online", "harness_task"],
        *["sample"] * 4,
        "judge",
    ]
    for _, recipe, _, name, *overrides in called:
        cfg = OmegaConf.load(find_config(name))
        cfg.merge_with_dotlist(overrides)
        cfg = check_config(cfg, resolve_name(f"{recipe}:recipe_main").config_class)
        data = cfg.prompts if "online" in name else cfg.dataset
        assert data.data_files == "my pairs.jsonl"
    models = [call[call.index("--model_args") + 1] for call in map(json.loads, (tmp_path / "lm_eval").open())]
    assert [model.split("/")[1] for model in models] == ["base", "sft", "dpo", "online"]
