"""Pages of other origins, in a browser on the same machine: they read nothing, and ask nothing."""

from __future__ import annotations

from urllib.parse import urlsplit

import pytest

import polyseme as ps

# What a page can try on a server that it may not read: every kind of request that a browser
# sends for it, with another request in the body.
ATTACK = """async ([victim, smuggled]) => {
  const read = [];
  const attempt = async (how, options) => {
    try {
      const answer = await fetch(victim + how, options);
      read.push(`${how}: ${answer.type} ${await answer.text()}`);
    } catch (error) {
      read.push(`${how}: ${error.name}`);
    }
  };
  const bodies = [smuggled, "x".repeat(100) + smuggled, new Blob([smuggled])];
  for (let round = 0; round < 3; round++) {
    for (const body of bodies) {
      for (const mode of ["cors", "no-cors", "same-origin"]) {
        await attempt("api/probe", {method: "POST", mode, body});
        await attempt("", {method: "POST", mode, body, credentials: "include"});
        await attempt("data/runs.json", {mode});
      }
    }
    await attempt("api/probe", {
      method: "POST",
      headers: {"X-Polyseme": "1", "Content-Type": "application/json"},
      body: JSON.stringify({run: 0, text: "asked"}),
    });
    await attempt("api/probe", {method: "PUT", body: smuggled});
  }
  for (const kind of ["script", "iframe", "img", "link", "object"]) {
    await new Promise((done) => {
      const made = document.createElement(kind);
      const address = victim + "data/runs.json";
      if (kind === "link") Object.assign(made, {rel: "stylesheet", href: address});
      else if (kind === "object") made.data = address;
      else made.src = address;
      made.onload = made.onerror = done;
      setTimeout(done, 1000);
      document.body.append(made);
      try { read.push(`${kind}: ${made.contentDocument?.body?.textContent}`); } catch {}
    });
    if (kind === "iframe" || kind === "object") {
      const made = document.querySelector(kind);
      try { read.push(`${kind}: ${made.contentDocument?.body?.textContent}`); } catch {}
    }
  }
  return read;
}"""


@pytest.fixture
def asked() -> list[str]:
    return []


@pytest.fixture
def explorer(image_run, asked):
    def probe(run, text):
        asked.append(text)
        return {"secret": "the answer of a model"}

    with ps.explore(image_run.path, open_browser=False, probe=probe) as made:
        yield made


def smuggled(explorer) -> str:
    """Two requests that would be answered, if they were read as requests."""
    own = urlsplit(explorer.url).netloc
    question = '{"run": 0, "text": "smuggled"}'
    return (
        f"GET /data/runs.json HTTP/1.1\r\nHost: {own}\r\n\r\n"
        f"POST /api/probe HTTP/1.1\r\nHost: {own}\r\nOrigin: http://{own}\r\nX-Polyseme: 1\r\n"
        f"Content-Length: {len(question)}\r\n\r\n{question}"
    )


@pytest.fixture
def attack(browser, explorer, asked):
    """``attack(page address, victim)``: all that a page there got to read of the explorer."""
    contexts = []

    def attack(address: str, victim: str, page_itself: str | None = None) -> list[str]:
        contexts.append(browser.new_context())
        page = contexts[-1].new_page()
        if page_itself is not None:
            # As it came before the name was made to lead here.
            page.route(
                address, lambda route: route.fulfill(body=page_itself, content_type="text/html")
            )
        page.goto(address)
        return page.evaluate(ATTACK, [victim, smuggled(explorer)])

    yield attack
    for context in contexts:
        context.close()


def test_a_page_at_another_port_reads_nothing(attack, explorer, asked, hosted, tmp_path):
    (tmp_path / "index.html").write_text("<!doctype html><title>x</title><body>hello")
    with hosted(tmp_path) as other:
        read = attack(other, explorer.url)
    assert len(read) > 60
    assert not any('"runs"' in entry or "n_neurons" in entry for entry in read)
    assert asked == []


def test_a_name_made_to_lead_here_reads_nothing(attack, explorer, asked):
    """DNS rebinding: to the browser, page and server are of one origin, so it reads all answers."""
    port = urlsplit(explorer.url).port
    address = f"http://evil.localhost:{port}/"
    read = attack(f"{address}page", address, "<!doctype html><title>x</title><body>hello")
    assert any("The Host header does not name this server." in entry for entry in read)
    assert not any('"runs"' in entry or "n_neurons" in entry for entry in read)
    assert asked == []
