"""The explorer's server, which listens only on this machine by default."""

from __future__ import annotations

import ipaddress
import re
import socket
import threading
import warnings
import webbrowser
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from polyseme.errors import MissingDependencyError
from polyseme.explorer.root import WebRoot

if TYPE_CHECKING:
    from polyseme.views import Run

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
    MissingDependencyError
        Starlette or uvicorn is not installed; the extra ``explore`` installs both.
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
        try:
            from polyseme.explorer.app import App
            from polyseme.explorer.connections import listening, server
        except ModuleNotFoundError as error:
            missing = str(error.name).partition(".")[0]
            raise MissingDependencyError("The explorer's server", missing, "explore") from error
        self.root = root
        self._host = host
        self._socket = listening(host, port)
        self._app = App(root, live, self.accepts_host)
        self._server = server(self._app)
        self._thread = threading.Thread(
            target=self._server.run, args=([self._socket],), daemon=True
        )
        self._thread.start()
        shown = f"[{host}]" if ":" in host else host
        self.url = f"http://{shown}:{self._socket.getsockname()[1]}/"

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
        """Stop serving and release the port; calling it again does nothing."""
        self._server.should_exit = True
        self._thread.join()
        self._socket.close()  # open if the server had not started yet
        self._app.close()

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
