"""Run directories that several tests read. They are made once, and no test may change them for good."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import run_directory
from tests.tiny_loop import start, tiny_settings


@pytest.fixture(scope="session")
def made_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A self-rewarding run of two iterations."""
    return run_directory.make_run(tmp_path_factory.mktemp("made") / "run")


@pytest.fixture(scope="session")
def made_comparison(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A comparison of two models and a file of answers."""
    return run_directory.make_comparison(tmp_path_factory.mktemp("made") / "comparison")


@pytest.fixture(scope="session")
def tiny_overrides(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The arguments of a run of recipes/iterate.py that takes a minute."""
    return [f"{key}={value}" for key, value in tiny_settings(tmp_path_factory.mktemp("tiny")).items()]


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory: pytest.TempPathFactory, tiny_overrides: list[str]) -> Path:
    """The directory of such a run, in `run`, and of its output, in `log`."""
    base = tmp_path_factory.mktemp("undisturbed")
    process = start(base / "run", tiny_overrides, base / "log")
    assert process.wait(600) == 0, (base / "log").read_text()[-4000:]
    return base
