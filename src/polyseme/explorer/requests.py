"""A request from a browser and its answer: parsing, checks and response headers."""

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
"""Most bytes before the body of a request; no browser sends more, whatever its cookies."""
MOST_BODY = 2**20
"""Most bytes in a request to a live function."""
LONGEST_TEXT = 10_000
"""Most characters in a text to probe."""
MOST_EXAMPLES = 100

_FIRST_LINE = re.compile(rb"([A-Z]{1,20}) ([!-~]+) HTTP/1\.([01])")
_HEADER = re.compile(rb"([!#$%&'*+.^_`|~0-9A-Za-z-]+):[ \t]*([\t -~\x80-\xff]*)")
# Headers that are read; a duplicate would be ambiguous.
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
    """A response.

    Attributes
    ----------
    status : int
    body : bytes
    suffix : str
        File name suffix, which determines the content type.
    tag : str
        The entity tag, if it has one.
    """

    status: int
    body: bytes = b""
    suffix: str = ".json"
    tag: str = ""

    def head(self, *, closes: bool) -> bytes:
        """The response up to the body.

        Parameters
        ----------
        closes : bool
            Whether the connection closes after this response.
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
    """A request that is answered with an error message."""

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
        As sent, without the query.
    headers : dict of str to str
        The headers that are read, by lower-case name.
    length : int
        Of the body.
    closes : bool
        Whether the browser sends no further request on this connection.
    """

    method: str
    path: str
    headers: Mapping[str, str]
    length: int
    closes: bool

    @classmethod
    def parse(cls, head: bytes) -> Request:
        """Parse the head of a request.

        The end of a request must be unambiguous, because the next one follows: an attacker who
        could make the end of one request look like another could send requests as someone else.

        Parameters
        ----------
        head : bytes
            Without the empty line at its end.

        Raises
        ------
        Refused
            It is malformed, has another method, or has a body that it must not have.
        """
        if len(head) > LONGEST_HEAD:
            raise Refused(431, f"The headers are too long; the limit is {LONGEST_HEAD} bytes.")
        first, *lines = head.split(b"\r\n")
        asked = _FIRST_LINE.fullmatch(first)
        matches = [_HEADER.fullmatch(line) for line in lines]
        if not asked or not all(matches):
            raise Refused(400, "The request is not valid HTTP/1.1.")
        headers: dict[str, str] = {}
        for header in filter(None, matches):
            name = header[1].decode().lower()
            if name in _READ and name in headers:
                raise Refused(400, f"The header {name} is given twice; give it once.")
            if name in _READ:
                headers[name] = header[2].decode("latin-1").strip(" \t")
        method, target = asked[1].decode(), asked[2].decode()
        if method not in ("GET", "HEAD", "POST"):
            raise Refused(501, "Unknown method; expected GET, HEAD or POST.")
        return cls(
            method,
            target.partition("?")[0],
            headers,
            _length(method, headers),
            asked[3] == b"0" or "close" in headers.get("connection", "").lower(),
        )


def _length(method: str, headers: Mapping[str, str]) -> int:
    if "transfer-encoding" in headers:
        raise Refused(400, "Transfer-Encoding is not accepted; give a Content-Length.")
    content_length = headers.get("content-length")
    if method != "POST":
        if content_length not in (None, "0"):
            raise Refused(400, f"A {method} request must have no body.")
        return 0
    length = (
        int(content_length) if content_length and re.fullmatch("[0-9]{1,9}", content_length) else -1
    )
    if not 0 <= length <= MOST_BODY:
        raise Refused(
            413, f"Content-Length is missing or too large; the limit is {MOST_BODY} bytes."
        )
    return length


# ------------------------------------------------------------------------ live functions


def question(body: bytes) -> dict[str, Any]:
    """Parse the body of a request to a live function."""
    try:
        read = json.loads(body)
    except (ValueError, RecursionError):
        read = None
    if not isinstance(read, dict):
        raise Refused(400, "The request body must be a JSON object.")
    return read


def arguments(name: str, question: Mapping[str, Any]) -> dict[str, Any]:
    """Check the arguments of a live function, except for the run.

    Parameters
    ----------
    name : {"probe", "classify", "importances"}
    question : mapping
    """
    return _ARGUMENTS[name](question)


def _probe_arguments(question: Mapping[str, Any]) -> dict[str, Any]:
    text = question.get("text")
    if not isinstance(text, str) or not text.strip():
        raise Refused(400, "text must be a non-empty string.")
    if len(text) > LONGEST_TEXT:
        raise Refused(413, f"The text has {len(text):,} characters; the limit is {LONGEST_TEXT:,}.")
    return {"text": text, "k": _whole(question, "k")} if "k" in question else {"text": text}


def _classify_arguments(question: Mapping[str, Any]) -> dict[str, Any]:
    index, pixels = question.get("index"), question.get("pixels")
    if (index is None) == (pixels is None):
        raise Refused(400, "Give either pixels or index.")
    if index is not None:
        return {"index": _whole(question, "index")}
    return {"pixels": pixels}


def _importances_arguments(question: Mapping[str, Any]) -> dict[str, Any]:
    examples = question.get("examples")
    fine = isinstance(examples, list) and 0 < len(examples) <= MOST_EXAMPLES
    if not fine or not all(type(number) is int and number >= 0 for number in examples or []):
        raise Refused(400, f"examples must be a list of 1 to {MOST_EXAMPLES} example numbers.")
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
        raise Refused(400, f"{key} must be a non-negative integer.")
    return value
