"""What is accepted of a request, up to the last byte that is, and not one more."""

from __future__ import annotations

import pytest

from polyseme.explorer.requests import (
    LONGEST_HEAD,
    LONGEST_TEXT,
    MOST_BODY,
    MOST_EXAMPLES,
    Refused,
    Request,
    arguments,
)


def parsed(*lines):
    return Request.parse("\r\n".join(lines).encode("latin-1"))


def status(ask, *given):
    with pytest.raises(Refused) as caught:
        ask(*given)
    return caught.value.answer.status


def test_heads_up_to_the_longest():
    line = "GET / HTTP/1.1\r\nX: "
    head = line + "x" * (LONGEST_HEAD - len(line))
    assert parsed(head).path == "/"
    assert status(parsed, head + "x") == 431


def test_lengths_of_bodies():
    post = "POST /probe HTTP/1.1"
    for length in (0, 1, MOST_BODY):
        assert parsed(post, f"Content-Length: {length}").length == length
    for length in (MOST_BODY + 1, 10**9, ""):
        assert status(parsed, post, f"Content-Length: {length}") == 413
    for method in ("GET", "HEAD"):
        assert parsed(f"{method} / HTTP/1.1", "Content-Length: 0").length == 0
        assert status(parsed, f"{method} / HTTP/1.1", "Content-Length: 1") == 400


def test_a_request_head_is_parsed():
    found = parsed(
        "GET /a?b?c HTTP/1.1", "HOST:\t here \t", "X: 1", "x: 2", "Connection: Keep-Alive"
    )
    assert (found.method, found.path, found.closes) == ("GET", "/a", False)
    assert found.headers == {"host": "here", "connection": "Keep-Alive"}
    assert parsed("GET / HTTP/1.1", "Connection: te, Close").closes
    assert parsed("GET / HTTP/1.0").closes
    assert not parsed("GET / HTTP/1.1").closes
    assert status(parsed, "A" * 20 + " / HTTP/1.1") == 501
    assert status(parsed, "A" * 21 + " / HTTP/1.1") == 400


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
