"""A finished run to read, damage and repair."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from run_builder import write


@pytest.fixture(scope="session")
def pristine(tmp_path_factory) -> Path:
    """A run that no test may change."""
    return write(tmp_path_factory.mktemp("pristine") / "run")


@pytest.fixture
def folder(pristine, tmp_path) -> Path:
    """A run of the test's own."""
    return shutil.copytree(pristine, tmp_path / "run")
