"""What every test gets: the same seeds, a fixed number of threads, and the shared data."""

from __future__ import annotations

import importlib.util
import os
import random
from pathlib import Path
from typing import Any

import hypothesis
import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[1]
SHARED_DATA = (ROOT.parent / "shared" / "data", ROOT / "shared" / "data")
HAS_TORCH = importlib.util.find_spec("torch") is not None

# The same examples on every run, and no failure because a machine is slow.
hypothesis.settings.register_profile("polyseme", derandomize=True, deadline=None)
hypothesis.settings.load_profile("polyseme")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: Any, log: Any) -> Any:
    """Tests of one file run in one process, and so do all of the pages, which share runs."""
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            return "browser" if file.startswith("tests/browser/") else file

    return ByFile(config, log)


@pytest.fixture(scope="session", autouse=True)
def _threads() -> None:
    if HAS_TORCH:
        import torch

        torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else 2)


@pytest.fixture(autouse=True)
def _no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test's files need survive a power failure."""
    monkeypatch.setattr("os.fsync", lambda file: None)


@pytest.fixture(autouse=True)
def _seeds(_threads: None) -> None:
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002 (libraries draw from the global state)
    if HAS_TORCH:
        import torch

        torch.manual_seed(0)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of published and real data, which not every checkout has."""
    for folder in SHARED_DATA:
        if folder.is_dir():
            return folder
    reason = "there is no shared data here; looked in ../shared/data and shared/data"
    print(reason)
    pytest.skip(reason)


@pytest.fixture
def docs_namespace() -> dict[str, Any]:
    """The names that the first Python block of a documentation page starts with."""
    return {"__name__": "__main__"}
