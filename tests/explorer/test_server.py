"""The server, by its answers: what it gives, and what it refuses to whom."""

from __future__ import annotations

import http.client
import json
import os
import socket
import sys
import threading
import warnings

import numpy as np
import pytest

import polyseme as ps
from polyseme.errors import InputError, MissingDependencyError, RunError
from polyseme.explorer import app, server

SAFETY = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "img-src 'self' data: blob:; connect-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
}


def probe(run, text, **options):
    if text == "fail":
        raise ValueError("a secret of the traceback")
    if text == "refuse":
        raise InputError("The text is refused.")
    return {"run": run.path.name, "text": text, "value": np.float32("nan"), **options}


def importances(run, site, neuron, examples):
    return np.full((len(examples), 2), [0.5, np.nan])


@pytest.fixture(scope="module")
def explorer(text_run):
    with ps.explore(text_run, open_browser=False, probe=probe, importances=importances) as made:
        yield made


@pytest.fixture
def ask(explorer):
    """``ask(path, ...)``: status, headers, body, by a client that hides nothing."""
    port = int(explorer.url.rstrip("/").rpartition(":")[2])
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)

    def ask(path, method="GET", body=None, **headers):
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        connection.putrequest(method, path, skip_host="Host" in named, skip_accept_encoding=True)
        if body is not None and "Content-Length" not in named:
            named["Content-Length"] = str(len(body))
        for name, value in named.items():
            if value is not None:
                connection.putheader(name, value)
        connection.endheaders(body)
        answer = connection.getresponse()
        return answer.status, answer.headers, answer.read()

    yield ask
    connection.close()


@pytest.fixture
def post(ask, explorer):
    """``post(function, question, ...)``: as the pages ask it, but for what is given."""

    def post(name, question, **headers):
        body = question if isinstance(question, bytes) else json.dumps(question).encode()
        given = {"Origin": explorer.url.rstrip("/"), "X_Polyseme": "1", **headers}
        status, _, answer = ask(f"/api/{name}", "POST", body, **given)
        return status, json.loads(answer)

    return post


def error(answer):
    return answer["error"]


# --------------------------------------------------------------------------------- files


def test_the_page_comes_first(ask):
    status, headers, body = ask("/")
    assert status == 200
    assert headers["Content-Type"] == "text/html; charset=utf-8"
    assert int(headers["Content-Length"]) == len(body)
    assert b'<meta name="polyseme-live" content="importances probe">' in body
    assert ask("/index.html")[2] == body
    assert ask("/?anything=1")[2] == body


def test_every_file_is_served(explorer, ask):
    explorer.root.runs[0].check.join()  # else verified.json changes meanwhile
    for path in explorer.root.paths():
        status, headers, body = ask(f"/{path}")
        assert (status, body) == (200, explorer.root.file(path))
        for name, value in SAFETY.items():
            assert headers[name] == value
        kind = headers["Content-Type"].partition(";")[0]
        assert kind != "application/octet-stream" or path.endswith(".safetensors")


def test_cached_files_are_not_sent_again(ask):
    status, headers, body = ask("/data/0/run.json")
    tag = headers["ETag"]
    status, headers, body = ask("/data/0/run.json", If_None_Match=tag)
    assert (status, body, headers["ETag"]) == (304, b"", tag)
    assert headers["X-Content-Type-Options"] == "nosniff"
    assert ask("/data/0/run.json", If_None_Match='"other"')[0] == 200


def test_a_connection_is_kept_until_an_error(ask):
    for path, status, connection in (
        ("/", 200, None),
        ("/nothing", 404, "close"),
        ("/", 200, None),
    ):
        found, headers, _ = ask(path)
        assert (found, headers["Connection"]) == (status, connection)
    status, headers, body = ask("/", "HEAD")
    assert (status, headers["Connection"], body) == (200, None, b"")
    assert int(headers["Content-Length"]) == len(ask("/")[2])


def test_a_part_of_a_file_is_not_to_be_had(ask):
    """Whoever asks for a range gets all of it, which HTTP allows."""
    status, _, body = ask("/data/runs.json", Range="bytes=0-3")
    assert (status, body) == (200, ask("/data/runs.json")[2])


@pytest.mark.parametrize(
    "path",
    [
        "/../pyproject.toml",
        "/static/../../__init__.py",
        "/static/..%2f..%2f__init__.py",
        "/%2e%2e/%2e%2e/etc/passwd",
        "/..%5c..%5cetc",
        "//etc/passwd",
        "/etc/passwd",
        "/data/0/../../0/run.json",
        "/data/0/..%2frun.json",
        "/data/00/run.json",
        "/data/1/run.json",
        "/data/0/examples.parquet",
        "/data/0/sites/0.safetensors",
        "/static/",
        "/static",
        "/data/0/packs/0.safetensors%00",
        "http://127.0.0.1/index.html",
        "/%69ndex.html",
        "*",
        "/" + "a" * 5000,
    ],
)
def test_no_path_leads_out(ask, path):
    status, headers, body = ask(path)
    assert status == 404
    assert json.loads(body) == {"error": "There is no such file."}
    assert headers["Content-Security-Policy"] == SAFETY["Content-Security-Policy"]


def test_a_link_in_the_run_leads_nowhere(text_run, copied):
    folder = copied(text_run)
    (folder / "sites" / "0.safetensors").unlink()
    os.symlink("/etc/passwd", folder / "sites" / "0.safetensors")
    with ps.explore(folder, open_browser=False) as explorer:
        described = json.loads(explorer.root.file("data/0/run.json"))
        assert described["damage"] == [
            "sites/0.safetensors: it is a link out of the run folder, which is not safe"
        ]


# --------------------------------------------------------------------------------- hosts


@pytest.mark.parametrize(
    "host",
    ["localhost", "127.0.0.1:1", "[::1]:80", "[::1]", "LOCALHOST:8", "localhost.:8", "127.9.9.9"],
)
def test_own_names_are_answered(ask, host):
    assert ask("/", Host=host)[0] == 200


@pytest.mark.parametrize(
    "host",
    [
        "",
        "evil.example",
        "evil.example:80",
        "localhost.evil.example",
        "10.0.0.1",
        "127.0.0.1.x",
        "evil.localhost",
        "localhost:80:80",
        "localhost:port",
        "localhost..",
        "user@localhost",
        "[localhost",
        "::1",
        "127.1",
        "localhost, evil.example",
    ],
)
def test_other_names_are_not(ask, host):
    """A name that a page elsewhere made lead here (DNS rebinding) gets nothing, page or data."""
    for path in ("/", "/data/0/run.json"):
        status, _, body = ask(path, Host=host)
        assert status == 421
        assert json.loads(body)["error"] == "The Host header does not name this server."
    body = b'{"run": 0, "text": "x"}'
    assert ask("/api/probe", "POST", body, Host=host, X_Polyseme="1")[0] == 421


def test_a_request_without_a_host_is_refused(ask):
    assert ask("/", Host=None)[0] == 400


def test_a_given_host_is_answered_by_its_name(text_run, monkeypatch):
    monkeypatch.setattr(server.socket, "gethostname", lambda: "Workstation")
    with pytest.warns(
        UserWarning, match="anyone who can reach this machine over the network can read"
    ):
        explorer = ps.explore(text_run, host="0.0.0.0", open_browser=False)
    with explorer:
        for name in ("localhost:1", "192.168.1.7:1", "workstation:1", "[fe80::1]"):
            assert explorer.accepts_host(name)
        assert not explorer.accepts_host("evil.example")


def test_an_empty_host_is_refused(text_run):
    with pytest.raises(
        InputError, match=r"host is empty; expected an address of this machine, such as 127"
    ):
        ps.explore(text_run, host="", open_browser=False)


def test_this_machine_alone_is_no_reason_to_warn(text_run):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for host in ("127.0.0.1", "localhost"):
            ps.explore(text_run, host=host, open_browser=False).close()


def test_the_socket_is_this_machines_alone(explorer):
    assert explorer._socket.getsockname()[0] == "127.0.0.1"


# ----------------------------------------------------------------------------- questions


def test_a_question_is_answered(post, text_run):
    status, answer = post("probe", {"run": 0, "text": "the bank"})
    assert status == 200
    assert answer == {"run": text_run.path.name, "text": "the bank", "value": None}
    assert post("probe", {"text": "a", "k": 3})[1]["k"] == 3
    question = {"run": 0, "site": 0, "neuron": 1, "examples": [0, 2]}
    assert post("importances", question) == (200, {"importances": [[0.5, None], [0.5, None]]})


@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": None},
        {"Origin": "null"},
        {"Origin": "http://evil.example"},
        {"Origin": "https://127.0.0.1"},
        {"X_Polyseme": None},
        {"X_Polyseme": "0"},
    ],
)
def test_only_our_own_pages_may_ask(post, headers):
    status, answer = post("probe", {"run": 0, "text": "x"}, **headers)
    assert status == 403
    assert "X-Polyseme" in error(answer) or "Only the explorer's own pages" in error(answer)
    assert post("probe", {"run": 0, "text": "x"})[0] == 200


@pytest.mark.parametrize(
    ("question", "status", "message"),
    [
        (b"", 400, "The request body must be a JSON object"),
        (b"[]", 400, "The request body must be a JSON object"),
        (b"[" * 100_000, 400, "The request body must be a JSON object"),
        (b"\xff", 400, "The request body must be a JSON object"),
        ({"run": 0}, 400, "text must be a non-empty string"),
        ({"run": 0, "text": " \n"}, 400, "text must be a non-empty string"),
        ({"run": 0, "text": 3}, 400, "text must be a non-empty string"),
        ({"run": 1, "text": "x"}, 400, "run must be a number from 0 to 0"),
        ({"run": True, "text": "x"}, 400, "run must be a number from 0 to 0"),
        ({"run": 0, "text": "x" * 10_001}, 413, "10,001 characters; the limit is 10,000"),
        ({"run": 0, "text": "x", "k": "many"}, 400, "k must be a non-negative integer"),
        ({"run": 0, "text": "refuse"}, 400, "The text is refused."),
    ],
)
def test_questions_that_are_refused(post, question, status, message):
    found, answer = post("probe", question)
    assert (found, message in error(answer)) == (status, True)


def test_a_failure_is_told_at_the_terminal_alone(post, capsys):
    status, answer = post("probe", {"run": 0, "text": "fail"})
    assert (status, error(answer)) == (500, "Internal server error; see the terminal for details.")
    assert "a secret of the traceback" in capsys.readouterr().err


def test_an_error_while_a_file_is_made_is_not_a_missing_file(ask, explorer, monkeypatch, capsys):
    def fail():
        raise KeyError("a table's column")

    monkeypatch.setattr(explorer.root.runs[0], "describe", fail)
    explorer._app._cache.pop("data/0/run.json", None)
    status, _, answer = ask("/data/0/run.json")
    assert (status, b"see the terminal for details" in answer) == (500, True)
    assert "a table's column" in capsys.readouterr().err
    assert ask("/data/0/packs/999.safetensors")[0] == 404


@pytest.mark.parametrize("name", ["classify", "", "__class__", "../probe", "probe/"])
def test_functions_without_a_model_are_not_found(post, name):
    status, answer = post(name, {"run": 0, "text": "x"})
    assert status == 404
    assert "There is no such function" in error(answer)


@pytest.mark.parametrize("method", ["PUT", "DELETE", "OPTIONS", "TRACE", "BREW"])
def test_other_methods_are_refused(ask, method):
    status, headers, _ = ask("/", method)
    assert status == 501
    assert headers["Content-Security-Policy"] == SAFETY["Content-Security-Policy"]


@pytest.mark.parametrize(
    "question",
    [
        {"examples": []},
        {"examples": "0"},
        {"examples": [-1]},
        {"examples": [True]},
        {"examples": list(range(101))},
    ],
)
def test_examples_that_are_refused(post, question):
    status, answer = post("importances", {"site": 0, "neuron": 0, **question})
    assert status == 400
    assert "examples must be a list of 1 to 100 example numbers" in error(answer)


def test_one_question_at_a_time(text_run):
    """A model is not made for two at once."""
    busy, most, lock = [], [], threading.Lock()

    def slow(run, text):
        with lock:
            busy.append(text)
            most.append(len(busy))
        threading.Event().wait(0.02)
        busy.remove(text)
        return {}

    with ps.explore(text_run, open_browser=False, probe=slow) as explorer:
        address = explorer.url.removeprefix("http://").rstrip("/")

        def asks(text):
            connection = http.client.HTTPConnection(address)
            headers = {"Origin": f"http://{address}", "X-Polyseme": "1"}
            connection.request("POST", "/api/probe", json.dumps({"text": text}), headers)
            assert connection.getresponse().status == 200
            connection.close()

        threads = [threading.Thread(target=asks, args=[f"text {n}"]) for n in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert most == [1, 1, 1, 1]


# ------------------------------------------------------------------------------ life cycle


@pytest.mark.parametrize("library", ["starlette", "uvicorn", "h11"])
def test_the_server_needs_an_extra(text_run, tmp_path, monkeypatch, library):
    """And nothing else does."""
    for name in [*sys.modules]:
        if name.partition(".")[0] in ("starlette", "uvicorn") or name in (
            "polyseme.explorer.app",
            "polyseme.explorer.connections",
            "polyseme.explorer.requests",
        ):
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(
        MissingDependencyError,
        match=rf"^The explorer's server needs {library}, which is not installed\. "
        r"Install it with: pip install 'polyseme\[explore\]'$",
    ):
        ps.explore(text_run, open_browser=False)
    assert ps.export(text_run, tmp_path / "site", progress=False).is_dir()


def test_the_page_is_there_before_the_run(text_run, monkeypatch):
    """The browser starts on the pages while the run is still being opened."""
    from polyseme.explorer import open_runs as opening

    opened, asked = threading.Event(), threading.Event()
    real = opening.open_all

    def slow(given):
        asked.set()
        assert opened.wait(10)
        return real(given)

    monkeypatch.setattr(opening, "open_all", slow)
    made = []
    thread = threading.Thread(
        target=lambda: made.append(ps.explore(text_run, port=port, open_browser=False))
    )
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    thread.start()
    assert asked.wait(10)
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    other = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    other.request("GET", "/data/0/run.json")  # which has to wait, and nobody else with it
    for path, status in (("/", 200), ("/favicon.ico", 404), ("/static/app.js", 200)):
        connection.request("GET", path)
        answer = connection.getresponse()
        assert answer.status == status
        answer.read()
    opened.set()
    assert other.getresponse().status == 200
    other.close()
    connection.request("GET", "/data/runs.json")
    assert json.loads(connection.getresponse().read())["runs"][0]["kind"] == "text"
    connection.close()
    thread.join()
    made[0].close()


def test_a_run_that_cannot_be_opened_leaves_no_server(tmp_path):
    before = threading.active_count()
    with pytest.raises(RunError, match=r"does not exist\. Give the folder that polyseme analyse"):
        ps.explore(tmp_path / "nothing", open_browser=False)
    assert threading.active_count() == before


def test_closing_lets_go_of_the_port(text_run):
    explorer = ps.explore(text_run, open_browser=False)
    port = int(explorer.url.rstrip("/").rpartition(":")[2])
    assert repr(explorer) == f"Explorer('http://127.0.0.1:{port}/')"
    with pytest.raises(InputError, match=rf"Cannot listen on 127.0.0.1, port {port}: "):
        ps.explore(text_run, port=port, open_browser=False)
    explorer.close()
    explorer.close()
    ps.explore(text_run, port=port, open_browser=False).close()


@pytest.mark.parametrize("port", [-1, 65_536])
def test_a_port_is_a_port(text_run, port):
    with pytest.raises(InputError, match=f"port is {port}; expected 0 to 65535"):
        ps.explore(text_run, port=port, open_browser=False)


def test_the_browser_is_opened(text_run, monkeypatch):
    opened = []
    monkeypatch.setattr(server.webbrowser, "open", opened.append)
    with ps.explore(text_run) as explorer:
        assert opened == [explorer.url]


def test_the_cache_is_bounded(text_run, monkeypatch):
    monkeypatch.setattr(app, "_CACHE_BYTES", 3000)
    with ps.explore(text_run, open_browser=False) as explorer:
        connection = http.client.HTTPConnection(explorer.url.removeprefix("http://").rstrip("/"))
        explorer.root.runs[0].check.join()  # else verified.json changes meanwhile
        for _ in range(2):
            for path in explorer.root.paths():
                connection.request("GET", f"/{path}")
                assert connection.getresponse().read() == explorer.root.file(path)
                assert sum(len(body) for _, body in explorer._app._cache.values()) <= 3000
        connection.close()
