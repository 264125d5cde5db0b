"""One request of a browser: what is checked, and what is sent back."""

from __future__ import annotations

import json
import sys
import threading
import traceback
from collections.abc import Callable, Mapping
from http.server import BaseHTTPRequestHandler
from pathlib import PurePosixPath
from typing import Any, Protocol

from polyseme.errors import PolysemeError, RunError
from polyseme.explorer.root import POLICY, WebRoot
from polyseme.explorer.strict_json import compact_json, finite

_TYPES = {
    ".css": "text/css; charset=utf-8",
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".json": "application/json",
    ".png": "image/png",
    ".safetensors": "application/octet-stream",
    ".svg": "image/svg+xml",
    ".txt": "text/plain; charset=utf-8",
}
_SAFETY = {
    "Content-Security-Policy": f"{POLICY}; frame-ancestors 'none'",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}
MOST_BODY = 2**20
"""Bytes that a question to a live function may have."""
LONGEST_TEXT = 10_000
"""Characters that a text to probe may have."""
MOST_EXAMPLES = 100
_IDLE_SECONDS = 60


class _Refused(Exception):
    """An answer other than 200, with a sentence."""

    def __init__(self, status: int, sentence: str, **headers: str) -> None:
        super().__init__(sentence)
        self.status = status
        self.headers = headers


class Service(Protocol):
    """What requests are answered from.

    Attributes
    ----------
    root : WebRoot
    live : mapping of str to callable
        Live functions by name.
    live_lock : lock
        Held while one of them answers.
    """

    root: WebRoot
    live: Mapping[str, Callable[..., Any]]
    live_lock: threading.Lock

    def accepts_host(self, header: str | None) -> bool:
        """Whether a Host header names this server."""

    def file(self, path: str) -> tuple[str, bytes]:
        """The entity tag and contents of a file."""


class Handler(BaseHTTPRequestHandler):
    """Answers one connection, which a browser keeps open for more requests."""

    protocol_version = "HTTP/1.1"
    server_version = "polyseme"
    sys_version = ""
    timeout = _IDLE_SECONDS
    disable_nagle_algorithm = True
    wbufsize = -1  # headers and body leave together

    @property
    def _service(self) -> Service:
        service: Service = self.server.service  # type: ignore[attr-defined]
        return service

    def do_GET(self) -> None:
        self._answer(self._get)

    def do_HEAD(self) -> None:
        self._answer(self._get)

    def do_POST(self) -> None:
        self._answer(self._post)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: a page makes hundreds of requests."""

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """What the library refuses by itself, such as a method that it does not know."""
        self.close_connection = True
        self._send(int(code), _sentence(message or "The request cannot be answered."), ".json")

    # -------------------------------------------------------------------------- answers

    def _answer(self, method: Any) -> None:
        try:
            if not self._service.accepts_host(self.headers.get("Host")):
                raise _Refused(421, "This server is not the host that was asked for.")
            method()
        except _Refused as refused:
            self._send(refused.status, _sentence(str(refused)), ".json", refused.headers)
        except RunError as error:
            self._send(500, _sentence(str(error)), ".json")
        except PolysemeError as error:
            self._send(400, _sentence(str(error)), ".json")
        except ConnectionError:
            self.close_connection = True
        except Exception:
            traceback.print_exc(file=sys.stderr)
            self._send(500, _sentence("The server has an error; its terminal tells more."), ".json")

    def _get(self) -> None:
        path = self.path.partition("?")[0]
        name = "index.html" if path == "/" else path.removeprefix("/")
        try:
            tag, body = self._service.file(name)
        except KeyError:
            raise _Refused(404, "There is no such file.") from None
        headers = {"ETag": tag, "Cache-Control": "no-cache"}
        if tag in self.headers.get("If-None-Match", ""):
            self._send(304, b"", "", headers)
        else:
            self._send(200, body, PurePosixPath(name).suffix, headers)

    def _post(self) -> None:
        question = self._question()
        name = self.path.removeprefix("/api/")
        function = self._service.live.get(name) if self.path.startswith("/api/") else None
        if function is None:
            raise _Refused(404, "There is no such function; it needs a model that is at hand.")
        runs = self._service.root.runs
        number = question.get("run", 0)
        if type(number) is not int or not 0 <= number < len(runs):
            raise _Refused(400, f"run must be a number from 0 to {len(runs) - 1}.")
        arguments = _ARGUMENTS[name](question)
        with self._service.live_lock:
            answer = finite(function(runs[number].run, **arguments))
        # Importances are an array, the others say what they answer.
        answer = answer if isinstance(answer, dict) else {name: answer}
        self._send(200, compact_json(answer).encode(), ".json")

    def _question(self) -> dict[str, Any]:
        """The body of a POST, after the checks that it comes from our own page."""
        try:
            length = int(self.headers.get("Content-Length", ""))
        except ValueError:
            length = -1
        if not 0 <= length <= MOST_BODY:
            self.close_connection = True  # what follows is not read
            raise _Refused(413, f"A question has a length, of {MOST_BODY} bytes at most.")
        body = self.rfile.read(length)
        # A page elsewhere can send a form here, but not with this header or our origin.
        if self.headers.get("Origin") != f"http://{self.headers.get('Host')}":
            raise _Refused(403, "Questions are answered to the explorer's own pages alone.")
        if self.headers.get("X-Polyseme") != "1":
            raise _Refused(403, "A question needs the header X-Polyseme: 1.")
        try:
            question = json.loads(body)
        except (ValueError, RecursionError):
            raise _Refused(400, "A question is a JSON object.") from None
        if not isinstance(question, dict):
            raise _Refused(400, "A question is a JSON object.")
        return question

    def _send(
        self, status: int, body: bytes, suffix: str, headers: Mapping[str, str] | None = None
    ) -> None:
        self.send_response(status)
        for name, value in (_SAFETY | dict(headers or {})).items():
            self.send_header(name, value)
        if status != 304:
            self.send_header("Content-Type", _TYPES.get(suffix, "application/octet-stream"))
            self.send_header("Content-Length", str(len(body)))
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)
        self.wfile.flush()


# ------------------------------------------------------------------------------ questions


def _probe_arguments(question: Mapping[str, Any]) -> dict[str, Any]:
    text = question.get("text")
    if not isinstance(text, str) or not text.strip():
        raise _Refused(400, "text must be a text that is not empty.")
    if len(text) > LONGEST_TEXT:
        raise _Refused(
            413, f"The text has {len(text):,} characters; {LONGEST_TEXT:,} at most can be probed."
        )
    return {"text": text, "k": _whole(question, "k")} if "k" in question else {"text": text}


def _classify_arguments(question: Mapping[str, Any]) -> dict[str, Any]:
    index, pixels = question.get("index"), question.get("pixels")
    if (index is None) == (pixels is None):
        raise _Refused(400, "Give pixels or index, one of them.")
    if index is not None:
        return {"index": _whole(question, "index")}
    return {"pixels": pixels}


def _importances_arguments(question: Mapping[str, Any]) -> dict[str, Any]:
    examples = question.get("examples")
    fine = isinstance(examples, list) and 0 < len(examples) <= MOST_EXAMPLES
    if not fine or not all(type(number) is int and number >= 0 for number in examples or []):
        raise _Refused(400, f"examples must be a list of 1 to {MOST_EXAMPLES} numbers of examples.")
    return {
        "site": _whole(question, "site"),
        "neuron": _whole(question, "neuron"),
        "examples": examples,
    }


_ARGUMENTS = {
    "probe": _probe_arguments,
    "classify": _classify_arguments,
    "importances": _importances_arguments,
}


def _whole(question: Mapping[str, Any], key: str) -> int:
    value = question.get(key)
    if type(value) is not int or not 0 <= value < 2**53:
        raise _Refused(400, f"{key} must be a whole number, 0 or more.")
    return value


def _sentence(text: str) -> bytes:
    return compact_json({"error": text}).encode()
