"""Connections from browsers: many at once, some of them slow, silent or hostile."""

from __future__ import annotations

import asyncio
import os
import socket
import threading
from contextlib import suppress
from typing import Any, Protocol

from polyseme.errors import InputError
from polyseme.explorer.requests import LONGEST_HEAD, Answer, Refused, Request

_MOST_CONNECTIONS = 512
_KEPT_FREE = 32
"""Open files reserved for the rest of the process, if its limit is low."""
_SECONDS = 60
"""Timeout for a request to arrive, and for the client to receive part of an answer."""
_LAST_SECONDS = 1
_PART = 2**16
_END = b"\r\n\r\n"


class Service(Protocol):
    """Answers requests."""

    def admit(self, head: bytes) -> Request:
        """Check the head of a request, before its body is read."""

    async def answer(self, request: Request, body: bytes) -> Answer:
        """Answer an admitted request; never raises."""


class Connections:
    """The connections to a port, all in one thread.

    Parameters
    ----------
    host : str
    port : int
        0 chooses a free port.
    service : Service

    Attributes
    ----------
    port : int

    Raises
    ------
    InputError
        The port is in use, or the host is empty or not an address of this machine.
    """

    def __init__(self, host: str, port: int, service: Service) -> None:
        self._service = service
        self._socket = _listening(host, port)
        self.port: int = self._socket.getsockname()[1]
        # Connections that have yet to send a request, or the rest of one: oldest first.
        self._waiting: dict[asyncio.Task[Any], None] = {}
        self._changed = asyncio.Event()  # a connection has started to wait, or has ended
        self._loop = asyncio.new_event_loop()
        self._serving = self._loop.create_task(self._serve())
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def wait(self, seconds: float) -> bool:
        """Wait until serving ends; returns whether it has."""
        self._thread.join(seconds)
        return not self._thread.is_alive()

    def close(self) -> None:
        """Close all connections and release the port; calling it again does nothing."""
        with suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._serving.cancel)
        self._thread.join()

    def _run(self) -> None:
        with suppress(asyncio.CancelledError):
            self._loop.run_until_complete(self._serving)
        self._loop.close()

    async def _serve(self) -> None:
        most = _most_connections()
        open_: set[asyncio.Task[None]] = set()
        try:
            while True:
                try:
                    connection, _ = await self._loop.sock_accept(self._socket)
                except OSError:  # the process has no free file descriptors
                    self._hang_up()
                    await asyncio.sleep(0.05)
                    continue
                task = asyncio.create_task(self._converse(connection))
                open_.add(task)
                task.add_done_callback(open_.discard)
                task.add_done_callback(lambda _: self._changed.set())
                while len(open_) >= most:
                    self._changed.clear()
                    self._hang_up()
                    await self._changed.wait()
        finally:
            self._socket.close()
            rest = asyncio.all_tasks() - {self._serving}
            for each in rest:
                each.cancel()
            await asyncio.gather(*rest, return_exceptions=True)

    def _hang_up(self) -> None:
        """Make room: close the connection that has been silent longest; it can reconnect."""
        if self._waiting:
            next(iter(self._waiting)).cancel()

    async def _converse(self, connection: socket.socket) -> None:
        """Answer requests one by one, until one is refused or is the last."""
        received = bytearray()
        # A browser that disconnects or falls silent is not an error.
        with connection, suppress(OSError):
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            closes = False
            while not closes:
                try:
                    request, body = await self._next(connection, received)
                    answer = await self._service.answer(request, body)
                    closes = request.closes or answer.status >= 400
                    bodiless = request.method == "HEAD"
                except Refused as refused:
                    # Its body is never read, so what follows cannot be trusted to be a request.
                    answer, closes = refused.answer, True
                    bodiless = received.startswith(b"HEAD ")
                body = b"" if bodiless else answer.body
                await self._send(connection, answer.head(closes=closes), body)
            # Closing with unread data would cut the answer short.
            connection.shutdown(socket.SHUT_WR)
            async with asyncio.timeout(_LAST_SECONDS):
                while await self._loop.sock_recv(connection, _PART):
                    pass

    async def _next(self, connection: socket.socket, received: bytearray) -> tuple[Request, bytes]:
        """Wait for the next request and its body, and remove them from what was received."""
        task = asyncio.current_task()
        assert task is not None
        self._waiting[task] = None
        self._changed.set()
        try:
            async with asyncio.timeout(_SECONDS):
                while (end := received.find(_END)) < 0 and len(received) <= LONGEST_HEAD:
                    received += await self._part(connection)
                request = self._service.admit(bytes(received if end < 0 else received[:end]))
                start, stop = end + len(_END), end + len(_END) + request.length
                while len(received) < stop:
                    received += await self._part(connection)
        finally:
            del self._waiting[task]
        body = bytes(received[start:stop])
        del received[:stop]
        return request, body

    async def _part(self, connection: socket.socket) -> bytes:
        part = await self._loop.sock_recv(connection, _PART)
        if not part:
            raise ConnectionAbortedError
        return part

    async def _send(self, connection: socket.socket, head: bytes, body: bytes) -> None:
        for start in range(0, len(body) or 1, _PART):
            async with asyncio.timeout(_SECONDS):
                await self._loop.sock_sendall(connection, head + body[start : start + _PART])
            head = b""  # sent with the first part


def _listening(host: str, port: int) -> socket.socket:
    if not host:  # a socket would listen on every address
        raise InputError(
            "host is empty; expected an address of this machine, such as 127.0.0.1, which no other "
            "machine can reach."
        )
    if not 0 <= port < 65536:
        raise InputError(f"port is {port}; expected 0 to 65535, where 0 chooses a free port.")
    made = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    try:
        if os.name == "posix":  # on Windows it would let two servers share a port
            made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind((host, port))
        made.listen(1024)
        made.setblocking(False)
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
