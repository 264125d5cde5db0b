"""The explorer under load: many clients, few file descriptors, and sockets that stay silent."""

from __future__ import annotations

import asyncio
import json
import re
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

sys.path.append(str(Path(__file__).parents[1] / "bench"))
from _synthetic import synthetic_run

CLIENTS, SECONDS, RAMP, TIMEOUT = 200, 60, 20, 30
MOST_MB = 600
# Serves a run until its input ends, and then tells how often each file was built. It may open
# so many files from the start, or once it serves.
SERVER = """
import json, resource, sys
from collections import Counter
import polyseme as ps
from polyseme.explorer.runfiles import RunFiles
built, build = Counter(), RunFiles.file
def counted(self, path):
    built[path] += 1
    return build(self, path)
RunFiles.file = counted
def limit(files):
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(int(files), most), most))
limit(sys.argv[2])
with ps.explore(sys.argv[1], open_browser=False) as explorer:
    limit(sys.argv[3])
    print(explorer.url, flush=True)
    sys.stdin.read()
print(json.dumps(built))
"""


class Client:
    """A browser's connection, opened again when it has ended."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def get(self, path: str) -> bytes:
        async with asyncio.timeout(TIMEOUT):
            if self._streams is None:
                self._streams = await asyncio.open_connection("127.0.0.1", self._port)
            reader, writer = self._streams
            writer.write(f"GET /{path} HTTP/1.1\r\nHost: 127.0.0.1:{self._port}\r\n\r\n".encode())
            head = await reader.readuntil(b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 200 "), (path, head)
            length = int(re.search(rb"(?i)content-length: ([0-9]+)", head)[1])
            return await reader.readexactly(length)

    def close(self) -> None:
        if self._streams is not None:
            self._streams[1].close()


async def load(port: int) -> dict[str, float]:
    clients = [Client(port) for _ in range(CLIENTS)]
    try:
        return await under_load(clients)
    finally:
        for client in clients:
            client.close()


async def under_load(clients: list[Client]) -> dict[str, float]:
    run = json.loads(await clients[0].get("data/0/run.json"))
    # All at once ask for one pack that nobody asked for before.
    for pack in range(3):
        packs = await asyncio.gather(*(c.get(f"data/0/packs/{pack}.safetensors") for c in clients))
        assert len(set(packs)) == 1
    files = -(-run["n_contexts"] // run["contexts_per_file"])
    # Few enough to be built within the time that a client waits, also on a busy machine.
    paths = [
        "",
        "data/runs.json",
        "data/0/neurons.safetensors",
        "data/0/search/words.json",
        *(f"data/0/packs/{number}.safetensors" for number in range(3, 40)),
        *(f"data/0/contexts/{number}.safetensors" for number in range(files)),
        *(f"data/0/search/{number}.json" for number in range(10)),
    ]
    times: list[float] = []
    end = time.monotonic() + SECONDS

    async def look_around(client: Client, number: int) -> None:
        rng = np.random.default_rng(number)
        await asyncio.sleep(RAMP * number / CLIENTS)
        while time.monotonic() < end:
            start = time.monotonic()
            await client.get(paths[rng.integers(len(paths))])
            times.append(time.monotonic() - start)

    await asyncio.gather(*(look_around(client, n) for n, client in enumerate(clients)))
    return {
        "requests": len(times),
        "median_ms": round(1000 * float(np.median(times))),
        "slowest_ms": round(1000 * max(times)),
    }


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """3,072 neurons with 100 examples each."""
    return synthetic_run(tmp_path_factory.mktemp("load") / "run", sites=2)


@contextmanager
def server(
    run: Path, files: int = 1024, later: int = 1024
) -> Iterator[tuple[subprocess.Popen, int]]:
    """A server's process, and its port."""
    process = subprocess.Popen(
        [sys.executable, "-c", SERVER, str(run), str(files), str(later)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        yield process, int(process.stdout.readline().strip().rstrip("/").rpartition(":")[2])
    finally:
        process.kill()
        process.communicate()


def test_two_hundred_clients(run):
    """None waits for ever or gets an error, memory is bounded, and what all want is built once."""
    with server(run) as (process, port):
        found = asyncio.run(load(port))
        status = Path(f"/proc/{process.pid}/status").read_text()
        found["peak_mb"] = round(int(re.search(r"VmHWM:\s+(\d+)", status)[1]) / 1000)
        built = Counter(json.loads(process.communicate(timeout=30)[0]))
    print(json.dumps(found))
    assert found["peak_mb"] < MOST_MB
    assert set(built.values()) == {1}


@pytest.mark.parametrize(("files", "later"), [(64, 64), (1024, 40)], ids=["known", "unknown"])
def test_few_files_and_silent_sockets(run, files, later):
    """300 sockets stay silent; others are served, whether or not the limit was known."""
    with server(run, files, later) as (_, port):
        silent = [socket.create_connection(("127.0.0.1", port), timeout=10) for _ in range(300)]
        for connection in silent[::2]:
            connection.sendall(b"GET / HTTP/1.1\r\nHost:")

        async def ask() -> None:
            for pack in range(20):
                client = Client(port)
                assert await client.get("data/runs.json")
                assert await client.get(f"data/0/packs/{pack}.safetensors")
                client.close()

        asyncio.run(ask())
        for connection in silent:
            connection.close()
