"""One request of a browser and its answer: what is accepted, what is checked, what is sent back."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from email.utils import formatdate
from http import HTTPStatus
from typing import Any

from polyseme.explorer.root import POLICY
from polyseme.explorer.strict_json import compact_json

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
LONGEST_HEAD = 2**16
"""Bytes before the body of a request; a browser sends no more, whatever its cookies."""
MOST_BODY = 2**20
"""Bytes that a question to a live function may have."""
LONGEST_TEXT = 10_000
"""Characters that a text to probe may have."""
MOST_EXAMPLES = 100

_FIRST_LINE = re.compile(rb"([A-Z]{1,20}) ([!-~]+) HTTP/1\.([01])")
_HEADER = re.compile(rb"([!#$%&'*+.^_`|~0-9A-Za-z-]+):[ \t]*([\t -~\x80-\xff]*)")
# Whatever decides anything; a second one would leave open which of them counts.
_READ = {
    "connection",
    "content-length",
    "host",
    "if-none-match",
    "origin",
    "transfer-encoding",
    "x-polyseme",
}


@dataclass(frozen=True)
class Answer:
    """What is sent back.

    Attributes
    ----------
    status : int
    body : bytes
    suffix : str
        Of a file of this kind; it says the type.
    tag : str
        The entity tag, if it has one.
    """

    status: int
    body: bytes = b""
    suffix: str = ".json"
    tag: str = ""

    def head(self, *, closes: bool) -> bytes:
        """All that comes before the body.

        Parameters
        ----------
        closes : bool
            No other request is answered on this connection.
        """
        headers = {"Date": formatdate(usegmt=True), **_SAFETY}
        if self.tag:
            headers |= {"ETag": self.tag, "Cache-Control": "no-cache"}
        if self.status != HTTPStatus.NOT_MODIFIED:
            headers["Content-Type"] = _TYPES.get(self.suffix, "application/octet-stream")
            headers["Content-Length"] = str(len(self.body))
        if closes:
            headers["Connection"] = "close"
        lines = [f"HTTP/1.1 {self.status} {HTTPStatus(self.status).phrase}"]
        lines += [f"{name}: {value}" for name, value in headers.items()]
        return "\r\n".join([*lines, "", ""]).encode()


class Refused(Exception):
    """A request that gets a sentence instead of what it asks for."""

    def __init__(self, status: int, sentence: str) -> None:
        super().__init__(sentence)
        self.answer = Answer(status, compact_json({"error": sentence}).encode())


@dataclass(frozen=True)
class Request:
    """A request without its body.

    Attributes
    ----------
    method : str
        ``GET``, ``HEAD`` or ``POST``.
    path : str
        Without what follows a question mark, and otherwise as it was sent.
    headers : dict of str to str
        Those that are looked at, by their names in small letters.
    length : int
        Of the body.
    closes : bool
        The browser sends no other on this connection.
    """

    method: str
    path: str
    headers: Mapping[str, str]
    length: int
    closes: bool

    @classmethod
    def parse(cls, head: bytes) -> Request:
        """Read what comes before the body.

        Where a request ends must be beyond doubt: what follows is the next one, and whoever
        can make the end of one look like another asks in somebody else's name.

        Parameters
        ----------
        head : bytes
            Without the empty line at its end.

        Raises
        ------
        Refused
            It is malformed, of another method, or it has a body that it cannot have.
        """
        if len(head) > LONGEST_HEAD:
            raise Refused(431, f"The headers are too long; {LONGEST_HEAD} bytes are the most.")
        first, *lines = head.split(b"\r\n")
        asked = _FIRST_LINE.fullmatch(first)
        matches = [_HEADER.fullmatch(line) for line in lines]
        if not asked or not all(matches):
            raise Refused(400, "This is not a request of HTTP/1.1.")
        headers: dict[str, str] = {}
        for header in filter(None, matches):
            name = header[1].decode().lower()
            if name in _READ and name in headers:
                raise Refused(400, f"The header {name} is there twice; it is expected once.")
            if name in _READ:
                headers[name] = header[2].decode("latin-1").strip(" \t")
        method, target = asked[1].decode(), asked[2].decode()
        if method not in ("GET", "HEAD", "POST"):
            raise Refused(501, "The method is none of those that are known: GET, HEAD, POST.")
        return cls(
            method,
            target.partition("?")[0],
            headers,
            _length(method, headers),
            asked[3] == b"0" or "close" in headers.get("connection", "").lower(),
        )


def _length(method: str, headers: Mapping[str, str]) -> int:
    if "transfer-encoding" in headers:
        raise Refused(400, "A body has a Content-Length here; Transfer-Encoding is not accepted.")
    content_length = headers.get("content-length")
    if method != "POST":
        if content_length not in (None, "0"):
            raise Refused(400, f"A {method} request has no body.")
        return 0
    length = (
        int(content_length) if content_length and re.fullmatch("[0-9]{1,9}", content_length) else -1
    )
    if not 0 <= length <= MOST_BODY:
        raise Refused(413, f"A question has a length, of {MOST_BODY} bytes at most.")
    return length


# ------------------------------------------------------------------------------ questions


def question(body: bytes) -> dict[str, Any]:
    """What is asked of a live function."""
    try:
        read = json.loads(body)
    except (ValueError, RecursionError):
        read = None
    if not isinstance(read, dict):
        raise Refused(400, "A question is a JSON object.")
    return read


def arguments(name: str, question: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a live function, but for the run.

    Parameters
    ----------
    name : {"probe", "classify", "importances"}
    question : mapping
    """
    return _ARGUMENTS[name](question)


def _probe_arguments(question: Mapping[str, Any]) -> dict[str, Any]:
    text = question.get("text")
    if not isinstance(text, str) or not text.strip():
        raise Refused(400, "text must be a text that is not empty.")
    if len(text) > LONGEST_TEXT:
        raise Refused(
            413, f"The text has {len(text):,} characters; {LONGEST_TEXT:,} at most can be probed."
        )
    return {"text": text, "k": _whole(question, "k")} if "k" in question else {"text": text}


def _classify_arguments(question: Mapping[str, Any]) -> dict[str, Any]:
    index, pixels = question.get("index"), question.get("pixels")
    if (index is None) == (pixels is None):
        raise Refused(400, "Give pixels or index, one of them.")
    if index is not None:
        return {"index": _whole(question, "index")}
    return {"pixels": pixels}


def _importances_arguments(question: Mapping[str, Any]) -> dict[str, Any]:
    examples = question.get("examples")
    fine = isinstance(examples, list) and 0 < len(examples) <= MOST_EXAMPLES
    if not fine or not all(type(number) is int and number >= 0 for number in examples or []):
        raise Refused(400, f"examples must be a list of 1 to {MOST_EXAMPLES} numbers of examples.")
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
        raise Refused(400, f"{key} must be a whole number, 0 or more.")
    return value
