"""Connections from browsers, some of them slow, silent or hostile."""

from __future__ import annotations

import asyncio
import os
import socket
from typing import TYPE_CHECKING

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from polyseme.errors import InputError
from polyseme.explorer.root import POLICY

if TYPE_CHECKING:
    from starlette.types import ASGIApp

_MOST_CONNECTIONS = 512
_QUEUE = 1024
"""Most connections that wait to be accepted."""
_KEPT_FREE = 32
"""Open files reserved for the rest of the process, if its limit is low."""
_SECONDS = 60
"""Timeout for a request to arrive, and for the browser to receive part of an answer."""
_LONGEST_HEAD = 2**16
"""Most bytes of an unfinished request head; no browser sends more, whatever its cookies."""
_SAFETY = {
    "Content-Security-Policy": f"{POLICY}; frame-ancestors 'none'",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


class Connection(H11Protocol):
    """A connection from a browser, which ends if the browser stalls.

    uvicorn limits the time between requests, but not the time that a request or the receipt of an
    answer takes, and it does not make room for new connections.
    """

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Start to wait for a request."""
        super().connection_made(transport)
        self._waits_since = self.loop.time()
        self._watch()
        # Not before the requests that have already arrived are read.
        self.loop.call_soon(self.loop.call_soon, self._make_room)

    def on_response_complete(self) -> None:
        """Start to wait for another request."""
        self._waits_since = self.loop.time()
        super().on_response_complete()

    def shutdown(self) -> None:
        """Close without waiting for an answer."""
        self.transport.abort()

    @property
    def _waits(self) -> bool:
        """Whether the browser has yet to send a request, or the rest of one."""
        return not self.cycle or self.cycle.response_complete or self.cycle.more_body

    def _make_room(self) -> None:
        """If there are too many connections, close the one that has been silent longest."""
        connections = [
            each
            for each in self.connections
            if isinstance(each, Connection) and not each.transport.is_closing()
        ]
        if len(connections) > _most_connections():
            silent = (each for each in connections if each._waits)
            # It can reconnect.
            min(silent, key=lambda each: each._waits_since, default=self).transport.abort()

    def _watch(self, before: object = None) -> None:
        """Close the connection if nothing has happened since `before` that the browser owes."""
        unsent = self.transport.get_write_buffer_size()
        now = self.cycle, unsent  # each request has a cycle of its own
        if now == before and (unsent or self._waits):
            self.transport.abort()
        elif self in self.connections:
            self.loop.call_later(_SECONDS, self._watch, now)


class _Server(uvicorn.Server):
    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        for each in sockets or []:
            each.listen(_QUEUE)  # a backlog for the system, but not for asyncio


def server(app: ASGIApp) -> uvicorn.Server:
    """A server that prints nothing and, on exit, waits for nobody.

    Parameters
    ----------
    app : ASGI application
    """
    config = uvicorn.Config(
        app,
        loop="asyncio",
        http=Connection,
        ws="none",
        lifespan="off",
        log_config=None,
        log_level="critical",
        access_log=False,
        proxy_headers=False,
        server_header=False,
        headers=list(_SAFETY.items()),
        h11_max_incomplete_event_size=_LONGEST_HEAD,
        timeout_keep_alive=_SECONDS,
        timeout_graceful_shutdown=0,
        # asyncio accepts as many connections at once, before any of them can make room.
        backlog=1,
    )
    return _Server(config)


def listening(host: str, port: int) -> socket.socket:
    """A socket that listens.

    Parameters
    ----------
    host : str
    port : int
        0 chooses a free port.

    Raises
    ------
    InputError
        The port is in use, or the host is empty or not an address of this machine.
    """
    if not host:  # a socket would listen on every address
        raise InputError(
            "host is empty; expected an address of this machine, such as 127.0.0.1, which no other "
            "machine can reach."
        )
    if not 0 <= port < 65536:
        raise InputError(f"port is {port}; expected 0 to 65535, where 0 chooses a free port.")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # asyncio sends small packets at once only if the protocol is named.
    made = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        if os.name == "posix":  # on Windows it would let two servers share a port
            made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind((host, port))
        made.listen(_QUEUE)
    except OSError as error:
        made.close()
        raise InputError(
            f"Cannot listen on {host}, port {port}: {error.strerror or error}. Give another port "
            "(--port), or 0 for any free port, and a host that is an address of this machine."
        ) from error
    return made


def _most_connections() -> int:
    try:
        import resource
    except ImportError:  # Windows
        return _MOST_CONNECTIONS
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if files == resource.RLIM_INFINITY:
        return _MOST_CONNECTIONS
    return max(8, min(_MOST_CONNECTIONS, files - _KEPT_FREE))
