"""The zoo needs packages of its own (`pip install -e ".[test,zoo]"`), with a torch that its torchvision fits."""

from __future__ import annotations

import importlib.util

import pytest

MISSING = [name for name in ("torchvision", "timm", "transformers", "peft") if importlib.util.find_spec(name) is None]

# Neither file can even be imported without them; the report says that the zoo is not there, and why.
collect_ignore = ["test_zoo.py", "zoo_models.py"] if MISSING else []


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if MISSING:
        terminalreporter.write_line(f"tests/zoo left out: {', '.join(MISSING)} not installed (extra: zoo)")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--write-zoo", action="store_true", help="write recipes/results/zoo.md from what this run finds")
