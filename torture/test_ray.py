"""Many workers of a real Ray that are killed during one analysis."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import polyseme as ps

pytest.importorskip("transformers")
pytest.importorskip("ray")

from tests.analysis.test_ray import (
    IMAGE_OPTIONS,
    Slow,
    _cluster,  # noqa: F401
    assert_kills_change_nothing,
    assert_same_run,
    images,
)

pytestmark = pytest.mark.filterwarnings("ignore")  # of Ray's own


def test_workers_killed_ten_times_change_nothing(tmp_path: Path) -> None:
    assert_kills_change_nothing(tmp_path, fewest=10, most=12)


DRIVER = """
import sys
import torch
import polyseme as ps
from tests.analysis.test_ray import IMAGE_OPTIONS, Slow, images
torch.manual_seed(0)
resume = len(sys.argv) > 2
options = IMAGE_OPTIONS | {"progress": resume}
ps.analyse(
    Slow(0.2), images(), out=sys.argv[1], engine="ray", workers=2, resume=resume, **options
)
"""


def test_a_killed_driver_resumes_with_the_shards_that_were_read(tmp_path: Path) -> None:
    torch.manual_seed(0)
    ps.analyse(Slow(0), images(), out=tmp_path / "whole", **IMAGE_OPTIONS)
    out, root = tmp_path / "run", Path(__file__).resolve().parents[1]
    environment = {**os.environ, "PYTHONPATH": f"{root}{os.pathsep}{root / 'tests'}"}
    command = [sys.executable, "-W", "ignore", "-c", DRIVER, str(out)]
    driver = subprocess.Popen(command, env=environment)
    kept = tmp_path / "run.partial" / "state" / "shards"
    while not any(kept.glob("*/shard.json")):
        assert driver.poll() is None, "The driver ended before a shard was read."
        time.sleep(0.05)
    os.kill(driver.pid, signal.SIGKILL)
    driver.wait()
    assert not out.exists()
    resumed = subprocess.run(
        [*command, "resume"], env=environment, check=True, capture_output=True, text=True
    )
    assert_same_run(out, tmp_path / "whole")
    (n,) = re.findall(r"Ray: (\d+) shards to read", resumed.stderr)
    assert int(n) < 8
