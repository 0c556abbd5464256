"""Figures that the checks on a GPU are to leave behind."""

import pytest


@pytest.fixture
def measure(record_property):
    """Remembers a figure for the end of the run."""

    def remember(name, value):
        record_property(name, f"{value:.4g}" if isinstance(value, float) else value)

    return remember


def pytest_terminal_summary(terminalreporter):
    reports = [report for found in terminalreporter.stats.values() for report in found]
    for report in reports:
        if getattr(report, "when", None) == "call":
            for name, value in report.user_properties:
                terminalreporter.write_line(f"MEASURE {name} {value}")
