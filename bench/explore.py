"""The explorer on a run of SmolLM2's size: 46,080 neurons with 100 examples each.

The run is synthetic (see `_synthetic.py`), unless --run names a real one. This times the server, in
its own process; data requests on the loopback interface, for packs not requested before; and pages
in headless Chromium, if it is installed. With --export, the static files are written and measured
too.

    python bench/explore.py [--run RUN] [--sites 30] [--requests 200] [--export]
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import re
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np

import polyseme as ps
from _synthetic import synthetic_run

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
READY = "#main > .page:not(.pending) h1"


@contextmanager
def server(run: Path, found: dict[str, object]):
    """A server process; records the time until its page is served, and until its run is open."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "polyseme.cli", "explore", str(run), "--no-browser"]
    start = time.perf_counter()
    process = subprocess.Popen([*command, "--port", str(port)], stdout=subprocess.PIPE, text=True)
    try:
        while True:
            try:
                get(http.client.HTTPConnection("127.0.0.1", port), "index.html")
                break
            except OSError:
                time.sleep(0.005)
        found["ready_seconds"] = round(time.perf_counter() - start, 3)
        process.stdout.readline()
        found["open_seconds"] = round(time.perf_counter() - start, 3)
        yield port
        status = Path(f"/proc/{process.pid}/status")
        if status.exists():
            peak = re.search(r"VmHWM:\s+(\d+)", status.read_text())
            found["server_mb"] = round(int(peak[1]) / 1000)
    finally:
        process.terminate()
        process.wait()


def get(connection: http.client.HTTPConnection, path: str) -> tuple[float, bytes]:
    """Milliseconds taken, and the body."""
    start = time.perf_counter()
    connection.request("GET", f"/{path}")
    answer = connection.getresponse()
    body = answer.read()
    assert answer.status == 200, (path, answer.status)
    return 1000 * (time.perf_counter() - start), body


def data_requests(port: int, n: int, found: dict[str, object]) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", port)
    first = ["runs.json", "0/run.json", "0/neurons.safetensors", "0/packs/0.safetensors"]
    found["first_ms"] = {path: round(get(connection, f"data/{path}")[0], 1) for path in first}
    run = json.loads(get(connection, "data/0/run.json")[1])
    rng = np.random.default_rng(0)
    packs = rng.permutation(np.arange(1, run["n_packs"]))[:n]
    paths = [f"data/0/packs/{number}.safetensors" for number in packs]
    if run["has"]["search"]:
        shards = json.loads(get(connection, "data/0/search/words.json")[1])["shards"][-1]
        paths += [f"data/0/search/{number}.json" for number in range(shards)][: n // 10]
    if run["contexts_per_file"]:
        files = -(-run["n_contexts"] // run["contexts_per_file"])
        paths += [f"data/0/contexts/{number}.safetensors" for number in range(files)][: n // 10]
    times, sizes = [], []
    for path in rng.permutation(paths).tolist():
        taken, body = get(connection, path)
        times.append(taken)
        sizes.append(len(body))
    found["data_p50_ms"] = round(float(np.percentile(times, 50)), 1)
    found["data_p95_ms"] = round(float(np.percentile(times, 95)), 1)
    found["data_mean_kb"] = round(statistics.mean(sizes) / 1000)


def pages(port: int, found: dict[str, object]) -> None:
    """Time pages as a reader sees them: loaded, drawn and responsive."""
    from playwright.sync_api import sync_playwright

    program = next(filter(None, map(shutil.which, BROWSERS)))
    root = f"http://127.0.0.1:{port}/"
    with sync_playwright() as started:
        browser = started.chromium.launch(executable_path=program, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        start = time.perf_counter()
        page.goto(root, wait_until="commit")
        page.wait_for_selector(READY)
        page.evaluate(SETTLED)
        found["overview_seconds"] = round(time.perf_counter() - start, 3)
        page.evaluate(NEXT, "#/neuron/0/1")
        page.wait_for_timeout(1000)
        # Neurons of other packs, which neither the server nor the browser has loaded.
        times = [page.evaluate(NEXT, f"#/neuron/{site}/{700 + 33 * site}") for site in range(1, 9)]
        found["neuron_ms"] = round(statistics.median(times), 1)
        times = [page.evaluate(NEXT, f"#/neuron/8/{965 + n}") for n in range(5)]
        found["neighbour_ms"] = round(statistics.median(times), 1)
        times = page.evaluate(RECUT)
        if times:
            found["recut_ms"] = round(statistics.median(times), 2)
            found["recut_p95_ms"] = round(float(np.percentile(times, 95)), 2)
        browser.close()


# Resolves once the browser has drawn a frame and is idle.
SETTLED = "() => new Promise(done => requestAnimationFrame(() => setTimeout(done)))"
# Milliseconds from a change of address until the next page is drawn.
NEXT = """(hash) => new Promise((done) => {
  const main = document.querySelector("#main");
  const old = main.firstElementChild;
  const start = performance.now();
  const watch = new MutationObserver(() => {
    const page = main.querySelector(".page:not(.pending)");
    if (!page || page === old || old.isConnected) return;
    watch.disconnect();
    requestAnimationFrame(() => setTimeout(() => done(performance.now() - start)));
  });
  watch.observe(main, { childList: true, subtree: true, attributes: true });
  location.hash = hash;
})"""
# Milliseconds that each move of the threshold takes: its handling and the next frame, with layout.
# Of the two callbacks, one runs before the page's own, and one after.
RECUT = """async () => {
  const slider = document.querySelector("#main input[type=range]");
  if (!slider) return null;
  const times = [];
  for (let step = 1; step <= 60; step++) {
    const share = (step * 37 % 60) / 60;
    times.push(await new Promise((done) => {
      let start;
      requestAnimationFrame(() => (start = performance.now()));
      const asked = performance.now();
      slider.value = Number(slider.min) + share * (Number(slider.max) - Number(slider.min));
      slider.dispatchEvent(new Event("input", { bubbles: true }));
      const handled = performance.now() - asked;
      requestAnimationFrame(() => {
        document.body.getBoundingClientRect();
        done(handled + performance.now() - start);
      });
    }));
  }
  return times;
}"""


def exported(run: Path, found: dict[str, object]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        out = ps.export(run, Path(folder) / "site", progress=False)
        found["export_seconds"] = round(time.perf_counter() - start, 1)
        files = {path.relative_to(out).as_posix(): path for path in out.rglob("*")}
        files = {name: path.stat().st_size for name, path in files.items() if path.is_file()}
        size = sum(path.stat().st_size for path in run.rglob("*") if path.is_file())
        found["export_files"] = len(files)
        found["export_ratio"] = round(sum(files.values()) / size, 3)
        found["first_neuron_kb"] = first_neuron(out)


def first_neuron(out: Path) -> int:
    """Kilobytes that a browser fetches from a plain web host to show a neuron."""
    from playwright.sync_api import sync_playwright

    program = next(filter(None, map(shutil.which, BROWSERS)))
    command = [sys.executable, "-m", "http.server", "0", "--bind", "127.0.0.1", "--directory"]
    host = subprocess.Popen(
        [*command, str(out)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )
    try:
        url = re.search(r"http://[\d.:]+/", host.stdout.readline())[0]
        with sync_playwright() as started:
            browser = started.chromium.launch(executable_path=program, args=["--no-sandbox"])
            page = browser.new_page()
            sizes: list[int] = []
            page.on("response", lambda answer: sizes.append(int(answer.headers["content-length"])))
            page.goto(f"{url}#/neuron/0/5")
            page.wait_for_selector(READY)
            page.wait_for_timeout(500)
            browser.close()
    finally:
        host.terminate()
        host.wait()
    return round(sum(sizes) / 1000)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path, help="a real run, instead of a synthetic one")
    parser.add_argument("--sites", type=int, default=30, help="sites of the synthetic run")
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--export", action="store_true", help="write the static files too")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        run = options.run or synthetic_run(Path(folder) / "run", options.sites)
        found: dict[str, object] = {"neurons": len(ps.open_run(run).neurons())}
        with server(run, found) as port:
            data_requests(port, options.requests, found)
            if any(map(shutil.which, BROWSERS)):
                pages(port, found)
        if options.export:
            exported(run, found)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
