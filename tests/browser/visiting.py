"""Going to a view of the explorer, and where the browser is."""

from __future__ import annotations

import functools
import http.server
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

READY = ".page:not(.pending) h1"
# An address changes first, and what is on screen follows.
_SHOWN = "() => document.querySelector('main').dataset.at === location.hash"
# Counts the requests whose answers are not yet on screen: parts of a view may follow the view.
COUNT_REQUESTS = """
window.underWay = 0;
const plain = window.fetch;
window.fetch = async (...request) => {
  window.underWay += 1;
  try {
    const answer = await plain(...request);
    await answer.clone().arrayBuffer();
    return answer;
  } finally {
    setTimeout(() => requestAnimationFrame(() => (window.underWay -= 1)), 0);
  }
};
"""
_LOADED = "() => window.underWay === 0"


def visit(page, site: str, address: str) -> None:
    """Load a view anew, and wait until it is there, with all its parts."""
    page.goto("about:blank")  # or else another hash of the same page would be no new page
    page.goto(f"{site}{address}")
    page.wait_for_selector(READY)
    page.wait_for_function(_LOADED)


def arrive(page, condition: str) -> None:
    """Wait until an expression of the address holds, and what it leads to is on screen."""
    page.wait_for_function(f"() => {condition}")
    page.wait_for_function(_SHOWN)
    page.wait_for_function(_LOADED)


def query(page) -> dict[str, str]:
    """What the address says of the view, once it is on screen."""
    page.wait_for_function(_SHOWN)
    return page.evaluate(
        "Object.fromEntries(new URLSearchParams(location.hash.split('?')[1] ?? ''))"
    )


@contextmanager
def static_files(folder: Path) -> Iterator[str]:
    """The plainest web host there is, and its address."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, format, *args):
            pass

    handler = functools.partial(Quiet, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}/"
        finally:
            server.shutdown()
            thread.join()
