"""Many workers of a real Ray that are killed during one analysis."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("transformers")
pytest.importorskip("ray")

from tests.analysis.test_ray import _cluster, assert_kills_change_nothing  # noqa: F401

pytestmark = pytest.mark.filterwarnings("ignore")  # of Ray's own


def test_workers_killed_ten_times_change_nothing(tmp_path: Path) -> None:
    assert_kills_change_nothing(tmp_path, fewest=10, most=12)
