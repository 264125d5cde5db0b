"""The explorer's web application: sends the files of the pages, and calls live functions."""

from __future__ import annotations

import asyncio
import hashlib
import sys
import traceback
from collections import OrderedDict
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import PurePosixPath
from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from polyseme.errors import PolysemeError, RunError
from polyseme.explorer.page_errors import NoSuchFileError, page_message
from polyseme.explorer.requests import arguments, check, question
from polyseme.explorer.root import WebRoot
from polyseme.explorer.strict_json import compact_json, finite
from polyseme.explorer.worker import Worker

_CACHE_BYTES = 128 * 2**20
_LAST_SECONDS = 1
"""Timeout for the rest of a request that is refused."""
_TYPES = {
    ".css": "text/css",
    ".html": "text/html",
    ".js": "text/javascript",
    ".json": "application/json",
    ".png": "image/png",
    ".svg": "image/svg+xml",
    ".txt": "text/plain",
}


class App:
    """An ASGI application.

    Parameters
    ----------
    root : WebRoot
    live : mapping of str to callable
        Live functions by name.
    accepts_host : callable
        Whether a Host header names this server.
    """

    def __init__(
        self,
        root: WebRoot,
        live: Mapping[str, Callable[..., Any]],
        accepts_host: Callable[[str | None], bool],
    ) -> None:
        self._root = root
        self._live = live
        self._accepts_host = accepts_host
        # Only the event loop's thread uses these, so they need no lock.
        self._cache: OrderedDict[str, tuple[str, bytes]] = OrderedDict()
        self._cached_bytes = 0
        self._building: dict[str, asyncio.Task[tuple[str, bytes]]] = {}
        self._builder = Worker()  # one file at a time bounds the memory
        self._model = Worker()  # a model answers one request at a time

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request; errors of any kind become answers too."""
        request = Request(scope, receive)
        try:
            response = await self._answer(request)
        except HTTPException as refused:
            response = _failure(refused.status_code, refused.detail)
            # Closing a connection with unread data would cut the answer short.
            with suppress(TimeoutError, ClientDisconnect):
                async with asyncio.timeout(_LAST_SECONDS):
                    async for _ in request.stream():
                        pass
        except RunError as error:
            response = _failure(500, page_message(error))
        except PolysemeError as error:
            response = _failure(400, page_message(error))
        except ClientDisconnect:
            return
        except Exception:
            traceback.print_exc(file=sys.stderr)
            response = _failure(500, "Internal server error; see the terminal for details.")
        await response(scope, receive, send)

    def close(self) -> None:
        """End the threads after their last jobs."""
        self._builder.close()
        self._model.close()

    async def _answer(self, request: Request) -> Response:
        check(request, self._accepts_host)
        # As sent: the path is looked up in a table, so nothing needs decoding.
        path = request.scope["raw_path"].decode("ascii")
        if request.method == "POST":
            body = await request.body()
            return await self._model.do(lambda: self._call(path, body))
        name = "index.html" if path == "/" else path.removeprefix("/")
        try:
            tag, content = await self._file(name)
        except NoSuchFileError:
            raise HTTPException(404, "There is no such file.") from None
        headers = {"ETag": tag, "Cache-Control": "no-cache"}
        if tag in request.headers.get("if-none-match", ""):
            return Response(status_code=304, headers=headers)
        kind = _TYPES.get(PurePosixPath(name).suffix, "application/octet-stream")
        return Response(content, headers=headers, media_type=kind)

    def _call(self, path: str, body: bytes) -> Response:
        asked = question(body)
        name = path.removeprefix("/api/")
        function = self._live.get(name) if path.startswith("/api/") else None
        if function is None:
            raise HTTPException(
                404,
                "There is no such function. Live functions need a model; start with --model.",
            )
        runs = self._root.runs
        number = asked.get("run", 0)
        if type(number) is not int or not 0 <= number < len(runs):
            raise HTTPException(400, f"run must be a number from 0 to {len(runs) - 1}.")
        answer = finite(function(runs[number].run, **arguments(name, asked)))
        # Importances are an array; the other answers are objects.
        answer = answer if isinstance(answer, dict) else {name: answer}
        return Response(compact_json(answer), media_type="application/json")

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
        if self._root.changes(path):
            return built
        self._cache[path] = built
        self._cached_bytes += len(built[1])
        while self._cached_bytes > _CACHE_BYTES:
            _, (_, dropped) = self._cache.popitem(last=False)
            self._cached_bytes -= len(dropped)
        return built

    def _made(self, path: str) -> tuple[str, bytes]:
        body = self._root.file(path)
        return f'"{hashlib.sha256(body).hexdigest()[:32]}"', body


def _failure(status: int, sentence: str) -> Response:
    body = compact_json({"error": sentence})
    return Response(body, status, {"Connection": "close"}, "application/json")
