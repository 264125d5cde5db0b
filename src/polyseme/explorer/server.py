"""The explorer's server, which listens only on this machine by default."""

from __future__ import annotations

import asyncio
import hashlib
import ipaddress
import re
import socket
import sys
import traceback
import warnings
import webbrowser
from collections import OrderedDict
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from polyseme.errors import PolysemeError, RunError
from polyseme.explorer.connections import Connections
from polyseme.explorer.page_errors import NoSuchFileError, page_message
from polyseme.explorer.requests import Answer, Refused, Request, arguments, question
from polyseme.explorer.root import WebRoot
from polyseme.explorer.strict_json import compact_json, finite
from polyseme.explorer.worker import Worker

if TYPE_CHECKING:
    from polyseme.views import Run

_CACHE_BYTES = 128 * 2**20
# A name or an address, and a port.
_HOST = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[^:\[\]]+)(:[0-9]{1,5})?", re.ASCII)


def explore(
    run: Run | str | Path,
    *others: Run | str | Path,
    port: int = 0,
    host: str = "127.0.0.1",
    open_browser: bool = True,
    probe: Callable[..., Any] | None = None,
    classify: Callable[..., Any] | None = None,
    importances: Callable[..., Any] | None = None,
) -> Explorer:
    """View runs in the browser.

    Parameters
    ----------
    run : Run, str or Path
        A run, or its folder.
    *others : Run, str or Path
        Runs to compare it with, such as the same analysis of another model.
    port : int
        0 chooses a free port.
    host : str
        The address to listen on. Anything but a loopback address lets other machines see the
        runs, and causes a warning.
    open_browser : bool
        Open the page in the browser.
    probe : callable, optional
        ``probe(run, text)``: what a text activates, as JSON. Without it, there is no Probe page.
    classify : callable, optional
        ``classify(run, pixels=..., index=...)``: what an image activates, as JSON.
    importances : callable, optional
        ``importances(run, site, neuron, examples)``: token importances, computed on demand.

    Returns
    -------
    Explorer
        A server that runs in its own threads until it is closed.

    Raises
    ------
    InputError
        The port is in use, or the host is not an address of this machine.
    RunError
        A run cannot be opened at all. A partly damaged run is shown as far as possible.
    """
    functions = {"probe": probe, "classify": classify, "importances": importances}
    live = {name: function for name, function in functions.items() if function is not None}

    def open_runs() -> list[Any]:
        # Imported here because pandas takes longer to load than the server takes to start.
        from polyseme.explorer.open_runs import open_all

        return open_all((run, *others))

    explorer = Explorer(WebRoot(open_runs, live), live, host, port)
    if explorer.exposed:
        warnings.warn(explorer.exposed, stacklevel=2)
    try:
        explorer.root.runs  # noqa: B018 - raises if a run cannot be opened
    except BaseException:
        explorer.close()
        raise
    if open_browser:
        webbrowser.open(explorer.url)
    return explorer


class Explorer(AbstractContextManager["Explorer"]):
    """A server of the explorer's pages, created by `explore`.

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
        The address of the pages.
    """

    def __init__(
        self, root: WebRoot, live: Mapping[str, Callable[..., Any]], host: str, port: int
    ) -> None:
        self.root = root
        self._live = live
        self._host = host
        # Only the connections' thread uses these, so they need no lock.
        self._cache: OrderedDict[str, tuple[str, bytes]] = OrderedDict()
        self._cached_bytes = 0
        self._building: dict[str, asyncio.Task[tuple[str, bytes]]] = {}
        self._builder = Worker()  # one file at a time bounds the memory
        self._model = Worker()  # a model answers one request at a time
        self._connections = Connections(host, port, self)
        shown = f"[{host}]" if ":" in host else host
        self.url = f"http://{shown}:{self._connections.port}/"

    @property
    def exposed(self) -> str | None:
        """A warning, if other machines can reach the server."""
        if _is_loopback(self._host):
            return None
        where = "every address of this machine" if _is_everywhere(self._host) else self._host
        return (
            f"The explorer listens on {where}: anyone who can reach this machine over the network "
            "can read the runs, without a password. To listen only on this machine, omit the host."
        )

    def accepts_host(self, header: str | None) -> bool:
        """Whether a Host header names this server.

        Another site can point its own domain name to this machine (DNS rebinding), but its
        requests then carry that name.
        """
        match = _HOST.fullmatch(header or "")
        if not match:
            return False
        name = match[1].strip("[]").lower().removesuffix(".")
        if name == "localhost" or _is_loopback(name) or name == self._host.lower():
            return True
        if not _is_everywhere(self._host):
            return False
        # Accept any IP address, which cannot be rebound, or this machine's name.
        return _address(name) is not None or name == socket.gethostname().lower()

    # -------------------------------------------------------------------------- answers

    def admit(self, head: bytes) -> Request:
        """Check the head of a request.

        Raises
        ------
        Refused
            It is malformed, or not from one of the explorer's own pages.
        """
        request = Request.parse(head)
        host = request.headers.get("host")
        if not self.accepts_host(host):
            raise Refused(421, "The Host header does not name this server.")
        if request.method == "POST":
            # Another site can submit a form here, but not with our origin or this header.
            if request.headers.get("origin") != f"http://{host}":
                raise Refused(403, "Only the explorer's own pages may call live functions.")
            if request.headers.get("x-polyseme") != "1":
                raise Refused(403, "Calling a live function requires the header X-Polyseme: 1.")
        return request

    async def answer(self, request: Request, body: bytes) -> Answer:
        """Answer an admitted request; errors of any kind become answers too."""
        try:
            if request.method == "POST":
                return await self._model.do(lambda: self._ask(request.path, body))
            return await self._get(request)
        except Refused as refused:
            return refused.answer
        except RunError as error:
            return Refused(500, page_message(error)).answer
        except PolysemeError as error:
            return Refused(400, page_message(error)).answer
        except Exception:
            traceback.print_exc(file=sys.stderr)
            return Refused(500, "Internal server error; see the terminal for details.").answer

    async def _get(self, request: Request) -> Answer:
        path = "index.html" if request.path == "/" else request.path.removeprefix("/")
        try:
            tag, body = await self._file(path)
        except NoSuchFileError:
            raise Refused(404, "There is no such file.") from None
        if tag in request.headers.get("if-none-match", ""):
            return Answer(304, tag=tag)
        return Answer(200, body, PurePosixPath(path).suffix, tag)

    def _ask(self, path: str, body: bytes) -> Answer:
        asked = question(body)
        name = path.removeprefix("/api/")
        function = self._live.get(name) if path.startswith("/api/") else None
        if function is None:
            raise Refused(
                404,
                "There is no such function. Live functions need a model; start with --model.",
            )
        runs = self.root.runs
        number = asked.get("run", 0)
        if type(number) is not int or not 0 <= number < len(runs):
            raise Refused(400, f"run must be a number from 0 to {len(runs) - 1}.")
        answer = finite(function(runs[number].run, **arguments(name, asked)))
        # Importances are an array; the other answers are objects.
        answer = answer if isinstance(answer, dict) else {name: answer}
        return Answer(200, compact_json(answer).encode())

    async def _file(self, path: str) -> tuple[str, bytes]:
        """The entity tag and contents of a file; concurrent requests share the work."""
        if path in self._cache:
            self._cache.move_to_end(path)
            return self._cache[path]
        if not path.startswith("data/"):
            return self._made(path)  # in memory, so it must not wait for a run
        if path not in self._building:
            self._building[path] = asyncio.create_task(self._build(path))
        return await asyncio.shield(self._building[path])

    async def _build(self, path: str) -> tuple[str, bytes]:
        try:
            built = await self._builder.do(lambda: self._made(path))
        finally:
            del self._building[path]
        if self.root.changes(path):
            return built
        self._cache[path] = built
        self._cached_bytes += len(built[1])
        while self._cached_bytes > _CACHE_BYTES:
            _, (_, dropped) = self._cache.popitem(last=False)
            self._cached_bytes -= len(dropped)
        return built

    def _made(self, path: str) -> tuple[str, bytes]:
        body = self.root.file(path)
        return f'"{hashlib.sha256(body).hexdigest()[:32]}"', body

    # ----------------------------------------------------------------------- life cycle

    def wait(self) -> None:
        """Serve until an interrupt, then close."""
        try:
            while not self._connections.wait(3600):
                pass
        except KeyboardInterrupt:
            pass
        finally:
            self.close()

    def close(self) -> None:
        """Stop serving and release the port; calling it again does nothing."""
        self._connections.close()
        self._builder.close()
        self._model.close()

    def __exit__(self, *raised: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"Explorer({self.url!r})"


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
    return address is not None and address.is_unspecified
