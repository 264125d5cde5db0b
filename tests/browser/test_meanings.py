"""The page of a neuron opens with its meanings, in a browser: what it shows equals the run."""

from __future__ import annotations

import re

import pytest
from visiting import arrive, query, visit

import polyseme as ps
from store.run_builder import write

TEXT = ("model.layers.8.mlp", 345)
TEXT_ADDRESS = "#/neuron/8/345"
IMAGE = ("layers.0", 11)
IMAGE_ADDRESS = "#/neuron/0/11"
HEADINGS = {
    "several": "Several meanings.",
    "one": "One meaning.",
    "no clear groups": "No clear groups.",
}


@pytest.fixture
def neuron(image_run):
    return image_run.neuron(*IMAGE)


def cards(page):
    return page.locator(".meaning")


def opened(page, number: int):
    card = page.locator(f".meaning[data-meaning='{number}']")
    card.locator("summary").click()
    card.locator(".meaning-part").first.wait_for()
    return card


def examples_in(part) -> list[int]:
    if (more := part.locator(".link")).count() and more.is_visible():
        more.click()
    return part.locator("[data-e]").evaluate_all("all => all.map(e => Number(e.dataset.e))")


def test_a_page_opens_on_meanings_and_a_card_on_its_features(page, image_site, neuron):
    """Live and exported alike."""
    visit(page, image_site, IMAGE_ADDRESS)
    meanings = neuron.meanings
    assert cards(page).count() == len(meanings) > 1
    assert page.locator(".feature[data-feature]").count() == 0
    page.get_by_text(HEADINGS[meanings.verdict]).wait_for()
    assert page.locator(".meaning-figures").inner_text() == (
        f"{len(meanings)} meanings · separation {meanings.separation:.2f} "
        f"· stability {meanings.stability:.2f}"
    )
    for meaning, card in zip(meanings, cards(page).all(), strict=True):
        assert f"{meaning.n_examples} of {len(neuron.examples)} examples" in card.inner_text()
        assert card.locator(".meaning-label").inner_text() == (
            meaning.label or "nothing distinctive"
        )
        first = card.locator(".tiles [data-e]").first
        assert first.get_attribute("data-e") == str(meaning.medoid)
    sizes = neuron.examples["feature"].value_counts()
    for meaning in meanings:
        card = opened(page, meaning.number)
        shared = {k: n for k, n in meaning.features.items() if sizes[k] > 1}
        found: list[int] = []
        for part in card.locator(".meaning-part").all():
            name = part.get_attribute("data-part")
            members = examples_in(part)
            found += members
            if name is not None:
                assert len(members) == shared.pop(int(name))
        assert shared == {}
        assert sorted(found) == sorted(meaning.examples["example"])
    page.locator(".meaning-part [data-e] button").first.click()
    page.locator(".example-detail").wait_for()
    page.locator(".features-bar").get_by_text("Features", exact=True).last.click()
    arrive(page, "location.hash.includes('level=features')")
    assert cards(page).count() == 0
    assert query(page)["level"] == "features"
    page.go_back()
    cards(page).first.wait_for()


def test_texts_too(page, serve, text_run):
    neuron = text_run.neuron(*TEXT)
    visit(page, serve("live", text_run), f"{TEXT_ADDRESS}?meaning=0")
    page.get_by_text(HEADINGS[neuron.meanings.verdict]).wait_for()
    assert cards(page).count() == len(neuron.meanings)
    card = page.locator(".meaning[data-meaning='0']")
    assert card.locator("details").get_attribute("open") is not None
    card.locator(".meaning-part .line").first.wait_for()
    assert "Statistics of" in page.locator(".meaning-head .notice").inner_text()
    # The parts follow the cut, and the page stays with the meanings.
    page.get_by_label("Threshold, exactly").fill("2")
    page.keyboard.press("Enter")
    arrive(page, "location.hash.includes('threshold=2')")
    assert query(page)["level"] == "meanings"
    assert card.locator(".meaning-part").count() == 1
    assert card.locator(".meaning-part").get_attribute("data-part") == "0"
    page.locator("h1").click()
    page.keyboard.press("j")
    arrive(page, "location.hash.includes('feature=0')")
    assert page.locator(".feature[data-feature='0']").count() == 1


def test_an_export_of_a_large_run_says_what_it_lacks(page, serve, text_run):
    visit(page, serve("exported", text_run), TEXT_ADDRESS)
    assert cards(page).count() == len(text_run.neuron(*TEXT).meanings)
    page.get_by_text("isn’t in these pages").wait_for()


def test_examples_are_coloured_by_meaning(page, serve, image_run, neuron):
    visit(page, serve("live", image_run), IMAGE_ADDRESS)
    marks = page.locator(".example-map").first.locator(".mark")
    colours = (
        'all => all.map(mark => (mark.getAttribute("class").match(/f\\d+|f-rest/) ?? [""])[0])'
    )
    truth = [f"f{meaning}" for meaning in neuron.examples["meaning"]]
    assert marks.evaluate_all(colours)[::-1] == truth
    page.get_by_text("By feature", exact=True).click()
    arrive(page, "location.hash.includes('colour=feature')")
    assert marks.evaluate_all(colours)[::-1] != truth


def test_labels_are_text(page, serve, image_run):
    def hostile(route):
        told = route.fetch().json()
        for meaning in told["meanings"]:
            meaning["label"] = "<img src=x onerror='window.bad = 1'>\u202e"
        told |= {"verdict": "<b>", "stability": 1e300, "separation": None}
        route.fulfill(json=told)

    page.route(re.compile(r"/meanings/\d+\.json$"), hostile)
    visit(page, serve("live", image_run), IMAGE_ADDRESS)
    page.get_by_text("<img src=x").first.wait_for()
    assert page.evaluate("window.bad") is None
    assert page.locator("#main img").count() == 0


def test_a_run_without_meanings_is_as_it_was(page, tmp_path):
    with ps.explore(write(tmp_path / "run"), open_browser=False) as explorer:
        visit(page, explorer.url, "#/")
        assert "Meanings" not in page.locator("main").inner_text()
        visit(page, explorer.url, "#/neuron/0/0")
        page.locator(".feature").first.wait_for()
        assert page.locator(".features-bar .choice, .map-colour, .meaning-head").count() == 0
        assert "Meanings" not in page.locator("main").inner_text()
        visit(page, explorer.url, "#/neuron/0/0?level=meanings&colour=meaning&meaning=0")
        page.locator(".feature").first.wait_for()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1280])
def test_it_is_accessible_and_fits(open_page, axe, serve, image_run, scheme, width):
    page = open_page(color_scheme=scheme, viewport={"width": width, "height": 900})
    visit(page, serve("live", image_run), IMAGE_ADDRESS)
    page.locator(".meaning-verdict strong").wait_for()
    opened(page, 0)
    assert axe(page) == []
    assert page.evaluate("document.documentElement.scrollWidth") == width
