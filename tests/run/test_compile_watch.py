"""What is said of compilation in a run."""

import logging

import pytest

from prefix_sharing.run import compilation
from prefix_sharing.run.compilation import CompileWatch


@pytest.fixture
def compiled(monkeypatch):
    count = {"graphs": 0}
    monkeypatch.setattr(compilation, "num_graphs_compiled", lambda: count["graphs"])
    return count


def test_a_late_compilation_is_a_warning_that_names_the_step(compiled, caplog):
    caplog.set_level(logging.INFO, logger="prefix_sharing")
    watch = CompileWatch()
    for step in range(1, 21):
        if step in (1, 2, 15):
            compiled["graphs"] += 2
        watch.step(step)
    assert [record.getMessage() for record in caplog.records] == [
        "4 graphs compiled in the first 10 steps",
        "Step 15 compiled 2 more graphs (6 in all), which took its time.",
    ]


def test_nothing_is_said_where_nothing_compiles(compiled, caplog):
    caplog.set_level(logging.INFO, logger="prefix_sharing")
    watch = CompileWatch()
    for step in range(1, 21):
        watch.step(step)
    assert not caplog.records
