"""The files in examples/ run, and are as short as they promise."""

import subprocess
import sys

import pytest

from documents import ROOT


@pytest.mark.parametrize("file", sorted((ROOT / "examples").glob("*.py")), ids=lambda file: file.stem)
def test_an_example_runs(file):
    assert len(file.read_text().splitlines()) <= 80
    assert subprocess.run([sys.executable, str(file)], capture_output=True, check=True).stdout
