"""What a request may ask: its headers, and the arguments of live functions."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import Request

MOST_BODY = 2**20
"""Most bytes in a request to a live function."""
LONGEST_TEXT = 10_000
"""Most characters in a text to probe."""
MOST_EXAMPLES = 100


def check(request: Request, accepts_host: Callable[[str | None], bool]) -> None:
    """Check the headers of a request, before its body is read.

    Parameters
    ----------
    request : Request
    accepts_host : callable
        Whether a Host header names this server.

    Raises
    ------
    HTTPException
        It has another method or a body that it must not have, or it is not from one of the
        explorer's own pages.
    """
    method, headers = request.method, request.headers
    if method not in ("GET", "HEAD", "POST"):
        raise HTTPException(501, "Unknown method; expected GET, HEAD or POST.")
    if "transfer-encoding" in headers:
        raise HTTPException(400, "Transfer-Encoding is not accepted; give a Content-Length.")
    length = int(headers.get("content-length", -1))  # h11 has checked that it is a number
    if method == "POST" and not 0 <= length <= MOST_BODY:
        raise HTTPException(
            413, f"Content-Length is missing or too large; the limit is {MOST_BODY} bytes."
        )
    if method != "POST" and length > 0:
        raise HTTPException(400, f"A {method} request must have no body.")
    host = headers.get("host")
    if not accepts_host(host):
        raise HTTPException(421, "The Host header does not name this server.")
    if method == "POST":
        # Another site can submit a form here, but not with our origin or this header.
        if headers.get("origin") != f"http://{host}":
            raise HTTPException(403, "Only the explorer's own pages may call live functions.")
        if headers.get("x-polyseme") != "1":
            raise HTTPException(403, "Calling a live function requires the header X-Polyseme: 1.")


def question(body: bytes) -> dict[str, Any]:
    """Parse the body of a request to a live function."""
    try:
        read = json.loads(body)
    except (ValueError, RecursionError):
        read = None
    if not isinstance(read, dict):
        raise HTTPException(400, "The request body must be a JSON object.")
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
        raise HTTPException(400, "text must be a non-empty string.")
    if len(text) > LONGEST_TEXT:
        raise HTTPException(
            413, f"The text has {len(text):,} characters; the limit is {LONGEST_TEXT:,}."
        )
    return {"text": text, "k": _whole(question, "k")} if "k" in question else {"text": text}


def _classify_arguments(question: Mapping[str, Any]) -> dict[str, Any]:
    index, pixels = question.get("index"), question.get("pixels")
    if (index is None) == (pixels is None):
        raise HTTPException(400, "Give either pixels or index.")
    if index is not None:
        return {"index": _whole(question, "index")}
    return {"pixels": pixels}


def _importances_arguments(question: Mapping[str, Any]) -> dict[str, Any]:
    examples = question.get("examples")
    fine = isinstance(examples, list) and 0 < len(examples) <= MOST_EXAMPLES
    if not fine or not all(type(number) is int and number >= 0 for number in examples or []):
        raise HTTPException(
            400, f"examples must be a list of 1 to {MOST_EXAMPLES} example numbers."
        )
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
        raise HTTPException(400, f"{key} must be a non-negative integer.")
    return value
