"""The pass over the data by workers of a real Ray, some of which are killed."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import polyseme as ps
from analysis.test_shards import OPTIONS, Setting, assert_same_run
from polyseme.analysis import kinds, ray_engine
from polyseme.analysis.ray_engine import RayEngine
from polyseme.analysis.source import source_of
from polyseme.errors import InputError, RunError
from polyseme.options import AnalysisOptions

pytest.importorskip("transformers")
ray = pytest.importorskip("ray")
Cluster = pytest.importorskip("ray.cluster_utils").Cluster

pytestmark = pytest.mark.filterwarnings("ignore")  # of Ray's own

TEXT_OPTIONS = OPTIONS | {"importances": "exact"}


@pytest.fixture(scope="module")
def setting() -> Setting:
    return Setting()


@pytest.fixture(scope="module")
def whole(setting: Setting, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("whole") / "run"
    ps.analyse(setting.model, setting.contexts(), out=out, **TEXT_OPTIONS)
    return out


@pytest.fixture(scope="module", autouse=True)
def _cluster() -> Iterator[None]:
    """One cluster of two machines for all tests, as it takes seconds to start."""
    before = signal.getsignal(signal.SIGTERM)
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    cluster.add_node(num_cpus=1)
    ray.init(address=cluster.address, log_to_driver=False)
    signal.signal(signal.SIGTERM, before)
    yield
    ray.shutdown()
    cluster.shutdown()


def workers() -> list[int]:
    """Processes of the actors that read, of this Ray alone: tests elsewhere have theirs."""

    def children(of: str, *pattern: str) -> list[str]:
        found = subprocess.run(["pgrep", "-P", of, *pattern], capture_output=True, text=True)
        return found.stdout.split()

    raylets = children(str(os.getpid()), "raylet")
    return [int(pid) for raylet in raylets for pid in children(raylet, "-f", "ray::_Worker")]


class Slow(nn.Module):
    """A classifier that takes its time, so that its workers can be killed in the middle."""

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.hidden = nn.Linear(36, 5)
        self.seconds = seconds

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        time.sleep(self.seconds)
        return torch.relu(self.hidden(images.flatten(1)))


def images(n: int = 64 * 8) -> np.ndarray:
    return np.random.default_rng(0).random((n, 6, 6), np.float32)


IMAGE_OPTIONS: dict[str, Any] = {
    "sites": "hidden",
    "batch_size": 16,
    "panels": False,
    "progress": False,
}


def test_the_run_of_two_workers_is_that_of_one_process(
    setting: Setting, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def here(*_: Any) -> None:
        raise AssertionError("This process did the workers' work.")

    def fails(*_: Any) -> None:
        raise MemoryError("18 GiB are too many")

    for name in ("cluster_site", "context_importances"):
        monkeypatch.setattr(kinds, name, here)
    options = {**TEXT_OPTIONS, "out": tmp_path / "run", "engine": "ray", "workers": 2}
    with monkeypatch.context() as patch:
        patch.setattr(ray_engine, "cluster_site", fails)
        with pytest.raises(RunError, match=r"could not be clustered: MemoryError: 18 GiB are too"):
            ps.analyse(setting.model, setting.contexts(), **options)
    # What was read and masked is kept.
    monkeypatch.setattr(RayEngine, "_on_workers", lambda self, method, rest, _: iter(rest))
    ps.analyse(setting.model, setting.contexts(), **options | {"resume": True})
    assert_same_run(tmp_path / "run", whole)
    for _ in range(100):  # Workers are killed, and gone some time after.
        if not workers():
            return
        time.sleep(0.1)
    raise AssertionError("Workers are still there.")


def assert_kills_change_nothing(tmp_path: Path, fewest: int, most: int) -> None:
    """The run is the same although workers are killed at random moments of it."""
    torch.manual_seed(0)
    model = Slow(0.02)
    ps.analyse(model, images(), out=tmp_path / "whole", **IMAGE_OPTIONS)
    done, killed = threading.Event(), []

    def kill() -> None:
        rng = random.Random(0)
        while not done.wait(rng.uniform(0.05, 0.4)) and len(killed) < most:
            if running := workers():
                os.kill(rng.choice(running), signal.SIGKILL)
                killed.append(1)

    killer = threading.Thread(target=kill)
    killer.start()
    model.seconds = 0.15
    try:
        ps.analyse(model, images(), out=tmp_path / "run", engine="ray", workers=2, **IMAGE_OPTIONS)
    finally:
        done.set()
        killer.join()
    assert len(killed) >= fewest
    assert_same_run(tmp_path / "run", tmp_path / "whole")


def test_workers_killed_at_random_moments_change_nothing(tmp_path: Path) -> None:
    assert_kills_change_nothing(tmp_path, fewest=2, most=3)


class Fails(Slow):
    """Raises on one input as long as a file is there."""

    def __init__(self, file: Path) -> None:
        super().__init__(0)
        self.file = str(file)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        if os.path.exists(self.file) and bool((images.flatten(1)[:, 0] == 7).any()):
            with open(self.file, "a") as log:
                log.write("failed\n")
            raise OSError("the disk of the third machine is gone")
        return super().forward(images)


def test_a_shard_that_fails_three_times_is_named_and_the_others_are_kept(tmp_path: Path) -> None:
    file = tmp_path / "broken"
    torch.manual_seed(0)
    model, data = Fails(file), images()
    data[300, 0, 0] = 7
    ps.analyse(model, data, out=tmp_path / "whole", **IMAGE_OPTIONS)
    file.touch()
    options = {**IMAGE_OPTIONS, "out": tmp_path / "run", "engine": "ray", "workers": 2}
    with pytest.raises(RunError, match=r"shard of inputs 256 to 320 failed 3 times: OSError: the "):
        ps.analyse(model, data, **options)
    assert file.read_text().count("failed") == 3
    kept = tmp_path / "run.partial" / "state" / "shards"
    assert len([shard for shard in kept.iterdir() if shard.is_dir()]) == 7
    file.unlink()
    with pytest.raises(RunError, match=r"holds an unfinished analysis\. Continue it with resume"):
        ps.analyse(model, data, **options)
    # With another number of workers.
    ps.analyse(model, data, **options | {"workers": 1, "resume": True})
    assert_same_run(tmp_path / "run", tmp_path / "whole")


def test_importances_that_fail_three_times_are_named(setting: Setting) -> None:
    options = AnalysisOptions(setting.model, setting.contexts(), **OPTIONS, out="run")
    engine = RayEngine(options, source_of(options))
    ids = np.zeros((20, 12), np.int64)
    message = (
        r"^The token importances of the run's contexts 16 to 20 failed 3 times: There are 2 sites, "
        r"but places for 0\. What is finished is kept; fix this, then resume with resume=True"
    )
    with engine.at_work(), pytest.raises(RunError, match=message):
        [*engine.importances(setting.model, [], ids, ids >= 0, [], start=16, mask_id=0)]


def test_a_second_driver_is_refused(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Slow(0.3)
    options = {**IMAGE_OPTIONS, "out": tmp_path / "run", "engine": "ray"}
    first = threading.Thread(target=lambda: ps.analyse(model, images(128), **options))
    first.start()
    while not workers():
        time.sleep(0.05)
    with pytest.raises(RunError, match="is in use by another process"):
        ps.analyse(model, images(128), **options)
    first.join()
    assert (tmp_path / "run" / "run.json").exists()


def test_analyse_rejects_invalid_engine_options(setting: Setting, tmp_path: Path) -> None:
    def analyse(**options: Any) -> None:
        ps.analyse(setting.model, setting.contexts(), out=tmp_path / "run", **OPTIONS | options)

    with pytest.raises(InputError, match=r"Unknown engine: 'rya'\. Did you mean 'ray'"):
        analyse(engine="rya")
    with pytest.raises(InputError, match="address and workers apply only to engine='ray'"):
        analyse(workers=2)
    with pytest.raises(InputError, match=r"workers is 0; a whole number of at least 1"):
        analyse(engine="ray", workers=0)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("address", ["127.0.0.1:1", "ray://127.0.0.1:1", "here:there"])
def test_an_address_without_a_ray(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU())
    options = AnalysisOptions(model, None, sites="0", out="run", address=address)
    engine = RayEngine(options, None)  # type: ignore[arg-type]
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    with pytest.raises(InputError, match=f"Cannot connect to Ray at address '{address}'") as raised:
        engine.at_work().__enter__()
    assert "ray start --head" in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_signal_during_the_work_is_not_rays(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray's own handler of SIGTERM ends the process, and it stays when Ray does not."""
    set_by_ray = []

    def init(**_: Any) -> None:
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(15))
        set_by_ray.append(signal.getsignal(signal.SIGTERM))

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", init)
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU())
    options = AnalysisOptions(model, None, sites="0", out="run")
    before = signal.getsignal(signal.SIGTERM)
    with RayEngine(options, None).at_work():  # type: ignore[arg-type]
        assert set_by_ray
        assert signal.getsignal(signal.SIGTERM) is before
    assert signal.getsignal(signal.SIGTERM) is before
