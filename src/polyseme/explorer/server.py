"""The explorer's server: on this machine alone, unless it is told otherwise."""

from __future__ import annotations

import hashlib
import ipaddress
import socket
import threading
import warnings
import webbrowser
from collections import OrderedDict
from collections.abc import Callable, Mapping
from http.server import ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from polyseme.errors import InputError
from polyseme.explorer.requests import Handler, Service
from polyseme.explorer.root import WebRoot

if TYPE_CHECKING:
    from polyseme.views import Run

_CACHE_BYTES = 64 * 2**20


def explore(
    run: Run | str | Path,
    *more: Run | str | Path,
    port: int = 0,
    host: str = "127.0.0.1",
    open_browser: bool = True,
    probe: Callable[..., Any] | None = None,
    classify: Callable[..., Any] | None = None,
    importances: Callable[..., Any] | None = None,
) -> Explorer:
    """Look at runs in the browser.

    Parameters
    ----------
    run : Run, str or Path
        A run, or its folder.
    *more : Run, str or Path
        Runs to set beside it, such as the same analysis of another model.
    port : int
        0 takes one that is free.
    host : str
        The address to listen on. Any but this machine's own loopback address lets other
        machines see the runs, and is warned about.
    open_browser : bool
        Open the page at once.
    probe : callable, optional
        ``probe(run, text)``: what a text activates, as JSON. Without it there is no such page.
    classify : callable, optional
        ``classify(run, pixels=..., index=...)``: what an image activates, as JSON.
    importances : callable, optional
        ``importances(run, site, neuron, examples)``: token importances, computed on demand.

    Returns
    -------
    Explorer
        Serving, in threads of its own, until it is closed.

    Raises
    ------
    InputError
        The port is taken, or the host is not this machine's.
    RunError
        A run cannot be opened at all. One that is damaged in part is shown as far as it goes.
    """
    given = {"probe": probe, "classify": classify, "importances": importances}
    live = {name: function for name, function in given.items() if function is not None}

    def open_runs() -> list[Any]:
        # Here, not above: pandas takes longer to load than a server to start.
        from polyseme.explorer.opening import open_all

        return open_all((run, *more))

    explorer = Explorer(WebRoot(open_runs, live), live, host, port)
    if explorer.exposed:
        warnings.warn(explorer.exposed, stacklevel=2)
    try:
        explorer.root.runs  # noqa: B018 - raises what there is to raise
    except BaseException:
        explorer.close()
        raise
    if open_browser:
        webbrowser.open(explorer.url)
    return explorer


class Explorer:
    """A server of the explorer's pages; `explore` makes one.

    Parameters
    ----------
    root : WebRoot
    live : mapping of str to callable
        Live functions by name.
    host : str
    port : int

    Attributes
    ----------
    url : str
        Where the pages are.
    """

    def __init__(
        self, root: WebRoot, live: Mapping[str, Callable[..., Any]], host: str, port: int
    ) -> None:
        self.root = root
        self.live = live
        self.live_lock = threading.Lock()  # a model answers one question at a time
        self._host = host
        self._cache: OrderedDict[str, tuple[str, bytes]] = OrderedDict()
        self._cached_bytes = 0
        self._cache_lock = threading.Lock()
        self._server = _listen(self, host, port)
        shown = f"[{host}]" if ":" in host else host
        self.url = f"http://{shown}:{self._server.server_address[1]}/"
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()

    @property
    def exposed(self) -> str | None:
        """A warning, where other machines can reach it."""
        if _is_loopback(self._host):
            return None
        where = "every address of this machine" if _is_everywhere(self._host) else self._host
        return (
            f"The explorer listens on {where}: whoever reaches this machine over the network "
            "can read the runs, without a password. For this machine alone leave the host out."
        )

    def accepts_host(self, header: str | None) -> bool:
        """Whether a Host header names this server.

        A page elsewhere can have a name of its own lead to this machine (DNS rebinding), but
        its requests then carry that name.
        """
        if header is None:
            return False
        name = header.rsplit(":", 1)[0] if not header.endswith("]") else header
        name = name.strip("[]").lower().rstrip(".")
        if name == "localhost" or _is_loopback(name) or name == self._host.lower():
            return True
        if not _is_everywhere(self._host):
            return False
        # Any address of this machine will do, or its name; an address cannot be rebound.
        return _address(name) is not None or name == socket.gethostname().lower()

    def file(self, path: str) -> tuple[str, bytes]:
        """The entity tag and contents of a file, from the cache if it is there.

        Raises
        ------
        KeyError
            There is no such file.
        RunError
            What it is made from is damaged.
        """
        with self._cache_lock:
            if path in self._cache:
                self._cache.move_to_end(path)
                return self._cache[path]
        body = self.root.file(path)
        found = f'"{hashlib.sha256(body).hexdigest()[:32]}"', body
        with self._cache_lock:
            if path not in self._cache and not self.root.changes(path):
                self._cache[path] = found
                self._cached_bytes += len(body)
            while self._cached_bytes > _CACHE_BYTES:
                _, (_, dropped) = self._cache.popitem(last=False)
                self._cached_bytes -= len(dropped)
        return found

    def wait(self) -> None:
        """Serve until an interrupt, then close."""
        try:
            while self._thread.is_alive():
                self._thread.join(3600)
        except KeyboardInterrupt:
            pass
        finally:
            self.close()

    def close(self) -> None:
        """Stop serving and let go of the port; a second time does nothing."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def __enter__(self) -> Explorer:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"Explorer({self.url!r})"


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 128
    service: Service

    def server_bind(self) -> None:
        # The library's asks the network for the host's full name, which can take seconds.
        if self.allow_reuse_address:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.socket.bind(self.server_address)
        self.server_address = self.socket.getsockname()
        self.server_name, self.server_port = str(self.server_address[0]), self.server_address[1]

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A browser that hangs up is nothing to report; the rest is answered by the handler."""


class _Server6(_Server):
    address_family = socket.AF_INET6


def _listen(explorer: Explorer, host: str, port: int) -> _Server:
    if not 0 <= port < 65536:
        raise InputError(f"port is {port}; 0 to 65535 is expected, 0 for any that is free.")
    kind = _Server6 if ":" in host else _Server
    try:
        server = kind((host, port), Handler)
    except OSError as error:
        raise InputError(
            f"Cannot listen on {host}, port {port}: {error.strerror or error}. Give another port "
            "(--port), 0 for any that is free, and as host an address of this machine."
        ) from error
    server.service = explorer
    return server


def _address(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        return None


def _is_loopback(host: str) -> bool:
    address = _address(host)
    return host.lower() == "localhost" or (address is not None and address.is_loopback)


def _is_everywhere(host: str) -> bool:
    address = _address(host)
    return host == "" or (address is not None and address.is_unspecified)
