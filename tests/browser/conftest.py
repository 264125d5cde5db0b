"""Real runs in a real browser: what the tests of the pages share.

A test takes `page` and one of `text_site`, `image_site` and `two_site`, which give the address of
the pages. A live server answers for `image_site`, static files for the other two: both send the
same files, byte for byte (`tests/explorer/test_export.py`), and `test_overview.py` compares what
they show. A page fails its test when it logs an error, or asks any other host for anything.
"""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from visiting import COUNT_REQUESTS, static_files

import polyseme as ps
from polyseme.data import Contexts, digits, read_text

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
NO_BROWSER = (
    "there is no Chromium, so the pages are not tested; on Debian and Ubuntu it is installed "
    "with: apt-get install chromium"
)


# ---------------------------------------------------------------------------------- runs


@pytest.fixture(scope="session")
def language_model(smollm2_folder):
    """SmolLM2 with its tokenizer."""
    from polyseme.sites.language import load_language_model

    return load_language_model(smollm2_folder)


@pytest.fixture(scope="session")
def text_run(language_model, tmp_path_factory):
    """Two of SmolLM2's layers on some English."""
    model, tokenizer = language_model
    return ps.analyse(
        model,
        Contexts(read_text(None), tokenizer, length=64, max_tokens=1200),
        sites=["model.layers.8.mlp", "model.layers.20.mlp"],
        select=ps.TopK(20),
        out=tmp_path_factory.mktemp("runs") / "smollm2",
        progress=False,
    )


@pytest.fixture(scope="session")
def classifier():
    """A classifier of real digits."""
    from polyseme.demo import train_classifier

    return train_classifier(digits(), steps=200, progress=False)


@pytest.fixture(scope="session")
def image_run(classifier, tmp_path_factory):
    """Its hidden neurons."""
    return ps.analyse(
        classifier,
        digits(),
        sites="layers.0",
        select=ps.FirstActive(60, minimum=1.0),
        out=tmp_path_factory.mktemp("runs") / "digits",
        progress=False,
    )


@pytest.fixture(scope="session")
def two_runs(classifier, tmp_path_factory):
    """The latents of two sparse autoencoders of that layer, one trained with the NE loss."""
    pytest.importorskip("sae_lens")
    import torch

    from polyseme.sites.attach import WithSAE, find_site, site_activations

    images = digits()
    site = find_site(classifier, "layers.0")
    activations = torch.cat(list(site_activations(classifier, site, [images.inputs(slice(None))])))
    folder = tmp_path_factory.mktemp("runs")
    runs = []
    for name, coefficient in (("standard", 0.0), ("ne", 20.0)):
        sae = ps.train_sae(
            activations,
            96,
            ne_coefficient=coefficient,
            steps=200,
            batch_size=256,
            l1_coefficient=1.0,
            progress=False,
        )
        runs.append(
            ps.analyse(
                WithSAE(classifier, "layers.0", sae, images.inputs(slice(4))),
                images,
                sites="sae",
                select=ps.FirstActive(40, minimum=0.005),
                out=folder / name,
                progress=False,
            )
        )
    return runs


# ------------------------------------------------------------------------------- servers


@pytest.fixture(scope="session")
def hosted() -> Callable[[Path], Any]:
    """``with hosted(folder) as address``: a plain web host of a folder, of an origin of its own."""
    return static_files


@pytest.fixture(scope="session")
def serve(tmp_path_factory) -> Iterator[Callable[..., str]]:
    """``serve(mode, *runs)``: the address of runs, live or exported; each is made once."""
    from contextlib import ExitStack

    with ExitStack() as stack:

        @functools.cache
        def serve(mode: str, *paths: Path) -> str:
            if mode == "live":
                return stack.enter_context(ps.explore(*paths, open_browser=False)).url
            out = tmp_path_factory.mktemp("export") / "site"
            ps.export(paths, out, progress=False)
            return stack.enter_context(static_files(out))

        yield lambda mode, *runs: serve(mode, *(run.path for run in runs))


@pytest.fixture(scope="session")
def text_site(serve, text_run) -> str:
    return serve("exported", text_run)


@pytest.fixture(scope="session")
def image_site(serve, image_run) -> str:
    return serve("live", image_run)


@pytest.fixture(scope="session")
def two_site(serve, two_runs) -> str:
    return serve("exported", *two_runs)


# ------------------------------------------------------------------------------- browser


@pytest.fixture(scope="session")
def browser():
    """Headless Chromium, one for all tests."""
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is None:
        pytest.skip(NO_BROWSER)
    with playwright.sync_playwright() as started:
        # Tests in a container often run as root, for whom Chromium has no sandbox.
        browser = started.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield browser
        browser.close()


class Watched:
    """Contexts of the browser, and what their pages complain of."""

    def __init__(self, browser: Any) -> None:
        self.browser = browser
        self.contexts: list[Any] = []
        self.complaints: list[str] = []

    def open(self, **options: Any) -> Any:
        context = self.browser.new_context(
            **{"viewport": {"width": 1280, "height": 900}, **options}
        )
        self.contexts.append(context)
        context.add_init_script(COUNT_REQUESTS)
        page = context.new_page()
        page.set_default_timeout(30_000)
        page.on("pageerror", lambda error: self.complaints.append(f"uncaught: {error}"))
        page.on("console", self.hear)
        page.on("request", lambda request: self.complaints.extend(off_host(request.url)))
        return page

    def hear(self, message: Any) -> None:
        if message.type in ("error", "warning"):
            self.complaints.append(f"{message.type}: {message.text} at {message.location}")

    def close(self) -> None:
        for context in self.contexts:
            context.close()
        self.contexts = []

    def check(self) -> None:
        complaints, self.complaints = self.complaints, []
        assert complaints == []


@pytest.fixture
def open_page(browser):
    """``open_page(**options)``: a page of a context of its own, watched."""
    watched = Watched(browser)
    yield watched.open
    watched.close()
    watched.check()


@pytest.fixture(scope="session")
def shared(browser):
    """One page for all tests that want no context of their own, as opening one takes long."""
    watched = Watched(browser)
    yield watched
    watched.close()


def off_host(url: str) -> list[str]:
    """A complaint about a request that leaves this machine."""
    parts = urlsplit(url)
    if parts.scheme in ("data", "blob", "about") or parts.hostname == "127.0.0.1":
        return []
    return [f"a request off the host: {url}"]


@pytest.fixture
def page(shared):
    """A watched page of 1280 × 900, that remembers nothing of the test before."""
    page = shared.contexts[0].pages[0] if shared.contexts else shared.open()
    yield page
    try:
        if page.url.startswith("http"):
            page.evaluate("() => { localStorage.clear(); sessionStorage.clear(); }")
        page.unroute_all()
        page.context.set_offline(False)
        page.emulate_media(media="null", color_scheme="null")
        page.goto("about:blank")
    except playwright.Error:
        shared.close()  # the next test gets a new one
    shared.check()


@pytest.fixture
def axe():
    """``axe(page)``: what axe-core finds serious or worse, one sentence each."""
    bundled = pytest.importorskip("axe_playwright_python.base")

    def violations(page) -> list[str]:
        page.evaluate(bundled.AXE_SCRIPT)
        found = page.evaluate("axe.run({resultTypes: ['violations']})")["violations"]
        return [
            f"{rule['id']}: {rule['help']}: {[node['html'] for node in rule['nodes'][:3]]}"
            for rule in found
            if rule["impact"] in ("serious", "critical")
        ]

    return violations
