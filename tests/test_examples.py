"""The files in examples/ run, and are as short as they promise."""

import subprocess
import sys

import pytest

from documents import ROOT

EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


@pytest.mark.parametrize("file", EXAMPLES, ids=lambda file: file.stem)
def test_an_example_is_short(file):
    assert len(file.read_text().splitlines()) <= 80


# The other one takes long, and has its test in test_trl_trainer.py.
@pytest.mark.parametrize("file", [file for file in EXAMPLES if file.stem != "trl_speed"], ids=lambda file: file.stem)
def test_an_example_runs(file):
    assert subprocess.run([sys.executable, str(file)], capture_output=True, check=True).stdout
