"""Run directories that several tests read. They are made once, and no test may change them for good."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import run_directory


@pytest.fixture(scope="session")
def made_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A self-rewarding run of two iterations."""
    return run_directory.make_run(tmp_path_factory.mktemp("made") / "run")


@pytest.fixture(scope="session")
def made_comparison(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A comparison of two models and a file of answers."""
    return run_directory.make_comparison(tmp_path_factory.mktemp("made") / "comparison")
