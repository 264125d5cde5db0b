"""Connections, byte by byte: where a request ends, who waits for whom, and who is hung up on."""

from __future__ import annotations

import http.client
import json
import socket
import threading
import time
from collections import Counter
from contextlib import suppress

import pytest

import polyseme as ps
from polyseme.explorer import connections, requests
from polyseme.explorer.runfiles import RunFiles

END = "\r\n\r\n"


def probe(run, text):
    return {"text": text}


@pytest.fixture(scope="module")
def explorer(text_run):
    with ps.explore(text_run, open_browser=False, probe=probe) as made:
        yield made


def address(explorer) -> tuple[str, int]:
    return "127.0.0.1", int(explorer.url.rstrip("/").rpartition(":")[2])


@pytest.fixture
def own(explorer) -> str:
    """The host that the explorer answers to."""
    return "{}:{}".format(*address(explorer))


def all_of(connection: socket.socket) -> bytes:
    """Whatever comes until the other side hangs up."""
    parts = []
    while part := connection.recv(65_536):
        parts.append(part)
    return b"".join(parts)


@pytest.fixture
def send(explorer):
    """``send(text)``: all that is answered to these bytes, up to the end of the connection."""

    def send(text: str | bytes) -> bytes:
        raw = text if isinstance(text, bytes) else text.encode("latin-1")
        with socket.create_connection(address(explorer), timeout=10) as connection:
            connection.sendall(raw)
            return all_of(connection)

    return send


def get(own: str, path: str = "/data/runs.json", *lines: str) -> str:
    return "\r\n".join([f"GET {path} HTTP/1.1", f"Host: {own}", *lines]) + END


def question(own: str, body: str, *lines: str) -> str:
    given = [f"Host: {own}", f"Origin: http://{own}", "X-Polyseme: 1", *lines]
    if not any(line.startswith("Content-Length:") for line in lines):
        given.append(f"Content-Length: {len(body)}")
    return "\r\n".join(["POST /api/probe HTTP/1.1", *given]) + END + body


# ------------------------------------------------------------------------------- smuggling


# Each is a request whose end may be read in two ways, or that is refused before its end: after
# HEAD comes what may be a body, or else the next request.
SMUGGLING = {
    "another host": (421, "POST / HTTP/1.1|Host: evil.example|Content-Length: LENGTH"),
    "no host": (400, "POST / HTTP/1.1|Content-Length: LENGTH"),
    "no host, of HTTP/1.0": (421, "POST / HTTP/1.0|Content-Length: LENGTH"),
    "two hosts": (400, "POST / HTTP/1.1|Host: OWN|Host: evil.example|Content-Length: LENGTH"),
    "another origin": (
        403,
        "POST /api/probe HTTP/1.1|Host: OWN|Origin: http://evil.example|Content-Length: LENGTH",
    ),
    "no origin": (403, "POST /api/probe HTTP/1.1|Host: OWN|Content-Length: LENGTH"),
    "no header": (
        403,
        "POST /api/probe HTTP/1.1|Host: OWN|Origin: http://OWN|Content-Length: LENGTH",
    ),
    "a body of GET": (400, "GET / HTTP/1.1|Host: OWN|Content-Length: LENGTH"),
    "a body of HEAD": (400, "HEAD / HTTP/1.1|Host: OWN|Content-Length: LENGTH"),
    "a chunked GET": (400, "GET / HTTP/1.1|Host: OWN|Transfer-Encoding: chunked"),
    "chunked": (400, "POST / HTTP/1.1|Host: OWN|Transfer-Encoding: chunked"),
    "chunked, of HTTP/1.0": (400, "POST / HTTP/1.0|Host: OWN|Transfer-Encoding: chunked"),
    "chunked and a length": (
        400,
        "POST / HTTP/1.1|Host: OWN|Content-Length: LENGTH|Transfer-Encoding: chunked",
    ),
    "identity and a length": (
        400,
        "POST / HTTP/1.1|Host: OWN|Transfer-Encoding: identity|Content-Length: 0",
    ),
    "two lengths": (400, "POST / HTTP/1.1|Host: OWN|Content-Length: 0|Content-Length: LENGTH"),
    "a list of lengths": (400, "POST / HTTP/1.1|Host: OWN|Content-Length: 0, LENGTH"),
    "no length": (413, "POST / HTTP/1.1|Host: OWN"),
    "an empty length": (400, "POST / HTTP/1.1|Host: OWN|Content-Length:"),
    "a length below 0": (400, "POST / HTTP/1.1|Host: OWN|Content-Length: -1"),
    "a length with a sign": (400, "POST / HTTP/1.1|Host: OWN|Content-Length: +0"),
    "a length of Python": (400, "POST / HTTP/1.1|Host: OWN|Content-Length: 0_0"),
    "a length in other digits": (400, "POST / HTTP/1.1|Host: OWN|Content-Length: \xb2"),
    "a length that is too long": (413, "POST / HTTP/1.1|Host: OWN|Content-Length: 1048577"),
    "a folded header": (400, "POST / HTTP/1.1|Host: OWN|Content-Length: LENGTH|\t0"),
    "a blank before a colon": (400, "GET / HTTP/1.1|Host: OWN|Content-Length : LENGTH"),
    "a header without a colon": (400, "GET / HTTP/1.1|nothing|Host: OWN"),
    "a header without a name": (400, "GET / HTTP/1.1|: nothing|Host: OWN"),
    "a carriage return": (400, "GET / HTTP/1.1|X: a\rContent-Length: LENGTH|Host: OWN"),
    "a line feed": (400, "GET / HTTP/1.1|X: a\nContent-Length: LENGTH|Host: OWN"),
    "a null": (400, "GET / HTTP/1.1|X: a\x00|Host: OWN"),
    "an earlier HTTP": (400, "GET /data/0/run.json|Host: OWN"),
    "three blanks": (400, "GET  / HTTP/1.1|Host: OWN"),
    "an unknown method": (501, "BREW / HTTP/1.1|Host: OWN|Content-Length: LENGTH"),
    "a preflight": (501, "OPTIONS / HTTP/1.1|Host: OWN|Content-Length: LENGTH"),
    "a tunnel": (501, "CONNECT evil.example:80 HTTP/1.1|Host: OWN"),
    "an address of another host": (404, "GET http://evil.example/ HTTP/1.1|Host: OWN"),
}
# uvicorn's answer to what is no HTTP. It quotes nothing.
MALFORMED = b"Invalid HTTP request received."


@pytest.mark.parametrize("name", SMUGGLING)
def test_what_follows_a_refusal_is_never_a_request(send, own, name):
    status, head = SMUGGLING[name]
    body = get(own)
    head = head.replace("OWN", own).replace("LENGTH", str(len(body))).replace("|", "\r\n")
    answer = send(head + END + body)
    assert answer.startswith(b"HTTP/1.1 %d " % status)
    assert answer.count(b"HTTP/1.1 ") == 1
    assert b'"runs"' not in answer
    headers, _, sentence = answer.partition(END.encode())
    assert b"\r\nconnection: close" in headers.lower()
    if status != 400 or MALFORMED not in sentence:
        assert b"\r\ncontent-security-policy: default-src 'none'" in headers.lower()
        assert name == "a body of HEAD" or len(json.loads(sentence)["error"]) > 10
    assert b'"runs"' in send(get(own, "/data/runs.json", "Connection: close"))


@pytest.mark.parametrize(
    ("head", "sentence"),
    [
        (
            "POST / HTTP/1.1|Host: evil.example",
            "Content-Length is missing or too large; the limit is 1048576",
        ),
        ("GET / HTTP/1.1|Host: OWN|Content-Length: 5", "A GET request must have no body."),
        ("BREW / HTTP/1.1|Host: OWN", "Unknown method; expected GET, HEAD or POST."),
        (
            "POST / HTTP/1.1|Host: OWN|Transfer-Encoding: chunked",
            "Transfer-Encoding is not accepted; give a Content-Length.",
        ),
    ],
)
def test_a_refusal_says_why(send, own, head, sentence):
    assert sentence in send(head.replace("OWN", own).replace("|", "\r\n") + END).decode()


def test_a_head_that_does_not_end_is_refused(send, own):
    answer = send(f"GET / HTTP/1.1\r\nHost: {own}\r\nX: " + 70_000 * "x")
    assert answer.startswith(b"HTTP/1.1 400 ")
    assert answer.endswith(END.encode() + MALFORMED)


def test_one_length_given_twice_is_one(send, own):
    lengths = ("Content-Length: 0", "content-length: 0")
    answer = send(get(own, "/", *lengths) + get(own, "/data/runs.json", "Connection: close"))
    assert answer.count(b"HTTP/1.1 200 ") == answer.count(b"HTTP/1.1 ") == 2


def test_an_upgrade_is_declined(send, own):
    """The server speaks nothing but HTTP/1.1."""
    upgrade = ("Connection: Upgrade, close", "Upgrade: websocket", "Sec-WebSocket-Version: 13")
    assert send(get(own, "/data/runs.json", *upgrade)).startswith(b"HTTP/1.1 200 ")


def test_a_refusal_arrives_though_its_body_is_not_read(send, own):
    """A connection that is closed on what was sent may take the answer with it."""
    for length in (requests.MOST_BODY, 8 * requests.MOST_BODY):
        head = f"POST / HTTP/1.1\r\nHost: evil.example\r\nContent-Length: {length}"
        answer = send(head.encode() + END.encode() + bytes(length))
        assert answer.startswith(b"HTTP/1.1 4")
        assert answer.count(b"HTTP/1.1 ") == 1


def test_a_body_of_the_largest_size_is_read(send, own):
    body = json.dumps({"text": "x", "more": ""})
    body = body[:-2] + "y" * (requests.MOST_BODY - len(body)) + body[-2:]
    answer = send(question(own, body) + get(own, "/", "Connection: close"))
    assert answer.startswith(b"HTTP/1.1 200 ")
    assert b'{"text":"x"}HTTP/1.1 200 OK' in answer


def test_nothing_sent_comes_back_in_a_header(send, own):
    given = "/%0d%0aX-Evil:%201?%0d%0aX-Evil: 1".replace(" ", "+")
    answer = send(get(own, given, "If-None-Match: X-Evil", 'X-Polyseme: "X-Evil"'))
    assert answer.startswith(b"HTTP/1.1 404 ")
    assert b"X-Evil" not in answer


# ------------------------------------------------------------------------------- requests


def test_requests_in_one_go_are_answered_in_order(send, own):
    first = json.dumps({"text": "one"})
    text = (
        get(own, "/data/0/run.json")
        + question(own, first)
        + f"HEAD /data/runs.json HTTP/1.1\r\nHost: {own}{END}"
        + question(own, json.dumps({"text": "two"}))
        + get(own, "/data/runs.json", "Connection: close")
        + get(own, "/")
    )
    answers = send(text).split(b"HTTP/1.1 200 OK\r\n")[1:]
    bodies = [answer.partition(END.encode())[2] for answer in answers]
    assert [bodies[1], bodies[2], bodies[3]] == [b'{"text":"one"}', b"", b'{"text":"two"}']
    assert json.loads(bodies[0])["kind"] == "text"
    assert json.loads(bodies[4])["runs"]
    assert len(bodies) == 5  # the last one is said to be the last


def test_a_request_may_come_in_pieces(explorer, own):
    with socket.create_connection(address(explorer), timeout=10) as connection:
        for byte in question(own, '{"text": "slow"}', "Connection: close"):
            connection.sendall(byte.encode())
        assert all_of(connection).endswith(b'{"text":"slow"}')


def test_an_answer_does_not_wait_for_an_acknowledgement(explorer, own):
    with socket.create_connection(address(explorer), timeout=10) as connection:
        connection.sendall(get(own).encode())
        assert connection.recv(12) == b"HTTP/1.1 200"
        for each in explorer._server.server_state.connections:
            accepted = each.transport.get_extra_info("socket")
            assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


def test_an_old_browser_gets_one_answer(send, own):
    answer = send(f"GET / HTTP/1.0\r\nHost: {own}{END}" + get(own))
    assert answer.startswith(b"HTTP/1.1 200 ")
    assert answer.count(b"HTTP/1.1 ") == 1


# ---------------------------------------------------------------------------------- crowds


def test_the_slow_are_hung_up_on(explorer, own, monkeypatch, capfd):
    """Also those who send a byte now and then, which is no sign of a request to come."""
    monkeypatch.setattr(connections, "_SECONDS", 0.3)
    for beginning in ("", "GET / HT", question(own, "{}", "Content-Length: 1000")):
        with socket.create_connection(address(explorer), timeout=10) as connection:
            connection.sendall(beginning.encode())
            start = time.monotonic()
            with pytest.raises(OSError, match=r"reset|[Bb]roken|aborted"):  # noqa: PT012
                while time.monotonic() < start + 10:
                    connection.sendall(b"x")
                    time.sleep(0.05)
    assert capfd.readouterr() == ("", "")


def test_who_does_not_read_is_hung_up_on(text_run, monkeypatch):
    monkeypatch.setattr(connections, "_SECONDS", 0.3)
    size = 2**24  # more than what lies between two sockets
    answers = {"long": "x" * size, "short": ""}
    with ps.explore(
        text_run, open_browser=False, probe=lambda run, text: {"is": answers[text]}
    ) as explorer:
        own = "{}:{}".format(*address(explorer))
        with socket.create_connection(address(explorer), timeout=10) as connection:
            connection.sendall(question(own, '{"text": "long"}').encode())
            assert connection.recv(12) == b"HTTP/1.1 200"
            time.sleep(1)
            with socket.create_connection(address(explorer), timeout=10) as other:
                other.sendall(question(own, '{"text": "short"}', "Connection: close").encode())
                assert all_of(other).endswith(b'{"is":""}')
            assert len(all_of(connection)) < size


def test_closing_does_not_wait_for_an_answer(text_run, capfd):
    begun, go_on = threading.Event(), threading.Event()

    def slow(run, text):
        begun.set()
        assert go_on.wait(10)
        return {}

    with ps.explore(text_run, open_browser=False, probe=slow) as explorer:
        own = "{}:{}".format(*address(explorer))
        connection = socket.create_connection(address(explorer), timeout=10)
        connection.sendall(question(own, '{"text": "x"}').encode())
        assert begun.wait(10)
    with connection:
        assert connection.recv(1) == b""
    go_on.set()
    explorer._app._model._thread.join(10)
    assert not explorer._app._model._thread.is_alive()
    assert capfd.readouterr().err == ""


def test_the_silent_make_room(text_run, monkeypatch):
    """Of few connections, all silent or with half a request, the oldest gives way."""
    monkeypatch.setattr(connections, "_most_connections", lambda: 8)
    with ps.explore(text_run, open_browser=False) as explorer:
        silent = [socket.create_connection(address(explorer), timeout=10) for _ in range(30)]
        for connection in silent[::2]:
            connection.sendall(b"GET / HTTP/1.1\r\n")
        for _ in range(20):
            asked = http.client.HTTPConnection(*address(explorer), timeout=10)
            asked.request("GET", "/data/runs.json")
            assert asked.getresponse().status == 200
            silent.append(asked.sock)
        with suppress(ConnectionResetError):  # what it sent may have come too late
            assert silent[0].recv(1) == b""
        for connection in silent:
            connection.close()


def test_those_who_are_answered_do_not_make_room(text_run, monkeypatch):
    """A browser that waits for its answer gets it, however many come after it."""
    monkeypatch.setattr(connections, "_most_connections", lambda: 8)
    go_on = threading.Event()

    def slow(run, text):
        assert go_on.wait(10)
        return {"text": text}

    with ps.explore(text_run, open_browser=False, probe=slow) as explorer:
        own = "{}:{}".format(*address(explorer))
        with socket.create_connection(address(explorer), timeout=10) as asking:
            asking.sendall(question(own, '{"text": "x"}', "Connection: close").encode())
            silent = [socket.create_connection(address(explorer), timeout=10) for _ in range(20)]
            # And a question does not keep files waiting.
            with socket.create_connection(address(explorer), timeout=10) as other:
                other.sendall(get(own, "/data/0/run.json", "Connection: close").encode())
                assert all_of(other).startswith(b"HTTP/1.1 200 ")
            go_on.set()
            assert all_of(asking).endswith(b'{"text":"x"}')
        for connection in silent:
            connection.close()


def test_a_crowd_shares_each_file(text_run, monkeypatch):
    """Each is made once, by one thread, however many ask for it at once."""
    built, makers, build = Counter(), set(), RunFiles.file

    def counted(self, path):
        built[path] += 1
        makers.add(threading.get_ident())
        return build(self, path)

    monkeypatch.setattr(RunFiles, "file", counted)
    with ps.explore(text_run, open_browser=False) as explorer:
        paths = list(explorer.root.paths())
        before, start = threading.active_count(), threading.Barrier(40)
        wrong = []

        def asks():
            connection = http.client.HTTPConnection(*address(explorer), timeout=30)
            start.wait()
            for path in paths:
                connection.request("GET", f"/{path}")
                answer = connection.getresponse()
                if answer.status != 200 or not answer.read():
                    wrong.append(path)
            connection.close()

        threads = [threading.Thread(target=asks) for _ in range(40)]
        for thread in threads:
            thread.start()
        most = 0
        for thread in threads:
            while thread.is_alive():
                most = max(most, threading.active_count() - before - len(threads))
                thread.join(0.01)
    assert wrong == []
    del built["verified.json"]  # which changes, and is never kept
    assert set(built.values()) == {1}
    assert len(makers) == 1
    assert most <= 2  # the maker of files, and a helper of its own


def test_a_failed_index_is_read_again(text_run, copied):
    folder = copied(text_run)
    with ps.explore(folder, open_browser=False) as explorer:
        connection = http.client.HTTPConnection(*address(explorer), timeout=10)
        (folder / "features.parquet").rename(folder / "away")
        statuses = []
        for name in ("away", "away", "features.parquet"):
            if name != "away":
                (folder / "away").rename(folder / name)
            connection.request("GET", "/data/0/search/0.json")
            answer = connection.getresponse()
            answer.read()
            statuses.append(answer.status)
        connection.close()
    assert statuses == [500, 500, 200]
