"""What is accepted of a request, up to the last byte that is, and not one more."""

from __future__ import annotations

import pytest
from starlette.exceptions import HTTPException
from starlette.requests import Request

from polyseme.explorer.requests import (
    LONGEST_TEXT,
    MOST_BODY,
    MOST_EXAMPLES,
    arguments,
    check,
)


def status(ask, *given):
    with pytest.raises(HTTPException) as caught:
        ask(*given)
    return caught.value.status_code


def test_lengths_of_bodies():
    def checked(method, **headers):
        headers |= {"Host": "here", "Origin": "http://here", "X-Polyseme": "1"}
        encoded = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
        check(
            Request({"type": "http", "method": method, "headers": encoded}),
            lambda host: host == "here",
        )

    def refused(method, length):
        return status(lambda: checked(method, **{"Content-Length": str(length)}))

    for length in (0, 1, MOST_BODY):
        checked("POST", **{"Content-Length": str(length)})
    for length in (MOST_BODY + 1, 10**19):
        assert refused("POST", length) == 413
    assert status(checked, "POST") == 413
    for method in ("GET", "HEAD"):
        checked(method)
        checked(method, **{"Content-Length": "0"})
        assert refused(method, 1) == 400


def test_texts_up_to_the_longest():
    text = "x" * LONGEST_TEXT
    assert arguments("probe", {"text": text}) == {"text": text}
    assert status(arguments, "probe", {"text": text + "x"}) == 413
    assert status(arguments, "probe", {"text": " \n"}) == 400


@pytest.mark.parametrize("examples", [[0], list(range(MOST_EXAMPLES))])
def test_numbers_of_examples(examples):
    asked = {"site": 0, "neuron": 2**53 - 1, "examples": examples}
    assert arguments("importances", asked) == asked
    for wrong in ([], [*range(MOST_EXAMPLES + 1)], [*examples[1:], -1], [True], "1", None):
        assert status(arguments, "importances", asked | {"examples": wrong}) == 400
    for wrong in (-1, 2**53, 1.0, True, None):
        assert status(arguments, "importances", asked | {"site": wrong}) == 400


def test_pixels_or_an_index():
    assert arguments("classify", {"index": 0}) == {"index": 0}
    assert arguments("classify", {"pixels": []}) == {"pixels": []}
    for wrong in ({}, {"index": 0, "pixels": []}, {"index": -1}):
        assert status(arguments, "classify", wrong) == 400
