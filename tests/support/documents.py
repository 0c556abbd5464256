"""Reading what the README and the pages of the documentation promise: code blocks, commands and tables."""

import re
import shlex
from pathlib import Path

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
PAGES = {str(file.relative_to(ROOT / "docs")): file.read_text() for file in sorted((ROOT / "docs").rglob("*.md"))}


def blocks(text, kind=""):
    """Code blocks of a language."""
    return [block for found, block in re.findall(r"```(\w*)\n(.*?)```", text, re.DOTALL) if found == kind]


def commands(text):
    """Lines of shell blocks, without comments."""
    lines = [line.split(" #")[0].strip() for block in blocks(text, "bash") for line in block.splitlines()]
    return [line for line in lines if line]


def runs(text):
    """The arguments of every ``tune run``."""
    return [shlex.split(line.split("&&")[-1])[2:] for line in commands(text) if "tune run" in line]


def runs_of(recipe, text):
    """The arguments of ``tune run`` where it runs a recipe on the quickstart."""
    return [run for run in runs(text) if recipe in run and any(arg.startswith("quickstart/") for arg in run)]


def table(text, heading):
    """Cells of a table's lines, of the table whose first column has a heading."""
    lines = text.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith(f"| {heading} |"))
    rows = []
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in re.split(r"(?<!\\)\| ", line.strip("|") + " ")])
    return rows
