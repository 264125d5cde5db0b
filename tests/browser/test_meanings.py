"""The page of a neuron opens with its meanings, in a browser: what it shows equals the run."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
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


def overlap_field(page):
    """Once the page knows all cuts."""
    field = page.get_by_label("Exact overlap")
    page.wait_for_function("field => !field.disabled", arg=field.element_handle())
    return field


def shown_labels(page, n: int) -> list[int]:
    """The meaning of each example, by the cards."""
    labels = [-1] * n
    for card in cards(page).all():
        number = int(card.get_attribute("data-meaning"))
        if card.locator("details").get_attribute("open") is None:
            card.locator("summary").click()
            card.locator(".meaning-part").first.wait_for()
        for part in card.locator(".meaning-part").all():
            for example in examples_in(part):
                labels[example] = number
    return labels


@pytest.mark.parametrize("rank", range(2))
def test_every_cut_of_the_tree_is_pythons(page, image_site, image_run, rank):
    """By number, shares, members and labels."""
    table = image_run.neurons()
    number = int(table.sort_values("n_meanings", ascending=False)["neuron"].iloc[5 * rank])
    neuron = image_run.neuron("layers.0", number)
    visit(page, image_site, f"#/neuron/0/{number}")
    field = overlap_field(page)
    assert field.input_value() == "0.57"
    stored = neuron.examples["meaning"].tolist()
    assert shown_labels(page, len(stored)) == stored
    splits = [cut.threshold for cut in neuron.meanings.groups.cuts()[:-1]]
    seen = set()
    for overlap in [0.05, 0.4, 0.7, 0.9, 1, *splits]:
        field.fill(repr(overlap))
        page.keyboard.press("Enter")
        arrive(page, f"location.hash.includes('overlap={overlap!r}')")
        truth = neuron.meanings.cut(overlap)
        seen.add(len(truth))
        tile = page.locator(".neuron-figures > div").filter(has_text=re.compile("^Meanings"))
        assert tile.locator("dd").inner_text() == str(len(truth))
        assert page.locator(".cutter:visible output").inner_text().startswith(f"{len(truth)} mean")
        for meaning, card in zip(truth, cards(page).all(), strict=True):
            assert f"{meaning.n_examples} of {len(stored)} examples" in card.inner_text()
            assert card.locator(".meaning-label").inner_text() == (
                meaning.label or "nothing distinctive"
            )
            first = card.locator(".tiles [data-e]").first
            assert first.get_attribute("data-e") == str(meaning.medoid)
        assert shown_labels(page, len(stored)) == truth.groups.labels.tolist()
        assert "stability" not in page.locator(".meaning-figures").inner_text()
    assert len(seen) > 1
    page.get_by_text("Back to the run’s own cut, 0.57").click()
    arrive(page, "!location.hash.includes('overlap')")
    assert shown_labels(page, len(stored)) == stored


def test_a_tree_of_meanings_is_drawn_and_dragged(page, image_site, neuron):
    """Splits lie at their overlaps; what is above the line is split."""
    visit(page, image_site, f"{IMAGE_ADDRESS}?overlap=0.9")
    cuts = neuron.meanings.groups.cuts()
    # The address is shown from the start, and not the run's own cut before it.
    assert cards(page).count() == len(neuron.meanings.cut(0.9))
    overlap_field(page)
    tree = page.locator(".cutter:visible .dendrogram")
    heights = tree.locator(".branch").evaluate_all(
        """all => all.flatMap(path => [...(path.getAttribute("d") ?? "").matchAll(
             /M([\\d.]+) ([\\d.]+)L([\\d.]+) ([\\d.]+)/g)])
             .filter(([, , y0, , y1]) => y0 === y1).map(([, , y]) => Number(y))"""
    )
    box = tree.bounding_box()
    top, bottom = 10, box["height"] - 30
    splits = np.array([0, *(cut.threshold for cut in cuts[:-1])])  # 0: those at any overlap
    drawn = np.array([(y - top) / (bottom - top) for y in heights])
    apart = abs(splits[:, None] - drawn)
    assert apart.min(axis=0).max() < 0.002
    assert apart[1:].min(axis=1).max() < 0.002
    grip = tree.locator(".grip-knob").bounding_box()
    page.mouse.move(grip["x"] + 5, grip["y"] + grip["height"] / 2)
    page.mouse.down()
    page.mouse.move(grip["x"] + 5, box["y"] + top + 0.3 * (bottom - top), steps=4)
    page.mouse.up()
    arrive(page, "location.hash.includes('overlap=0.3')")
    assert cards(page).count() == len(neuron.meanings.cut(0.3))
    page.keyboard.press("ArrowRight")
    arrive(page, "location.hash.includes('/12')")
    assert query(page)["overlap"] == "0.3"


@pytest.mark.parametrize("asked", ["0", "1.01", "-1", "x", "NaN"])
def test_an_overlap_that_there_is_not_is_told(page, image_site, neuron, asked):
    visit(page, image_site, f"{IMAGE_ADDRESS}?overlap={asked}")
    said = page.locator(".neuron-head [role=status]").inner_text()
    assert said == (
        f"The address has overlap={asked}, but the overlap must be above 0 and at most 1; meanings "
        "are shown at the run's own overlap, 0.57."
    )
    assert cards(page).count() == len(neuron.meanings)


def test_examples_are_saved_as_they_are_grouped(page, image_site, neuron):
    visit(page, image_site, f"{IMAGE_ADDRESS}?overlap=0.9")
    with page.expect_download() as download:
        page.get_by_role("button", name="Save examples").click()
    saved = json.loads(Path(download.value.path()).read_text())
    assert saved["overlap"] == 0.9
    truth = neuron.meanings.cut(0.9).groups.labels.tolist()
    assert [example["meaning"] for example in saved["examples"]] == truth


def test_texts_too(page, serve, text_run):
    neuron = text_run.neuron(*TEXT)
    visit(page, serve("live", text_run), f"{TEXT_ADDRESS}?meaning=0")
    page.get_by_text(HEADINGS[neuron.meanings.verdict]).wait_for()
    assert cards(page).count() == len(neuron.meanings)
    card = page.locator(".meaning[data-meaning='0']")
    assert card.locator("details").get_attribute("open") is not None
    card.locator(".meaning-part .line").first.wait_for()
    assert "The statistics come from" in page.locator(".meaning-head .notice").inner_text()
    # The parts follow the cut into features.
    visit(page, serve("live", text_run), f"{TEXT_ADDRESS}?meaning=0&threshold=2&level=meanings")
    card.locator(".meaning-part").first.wait_for()
    assert card.locator(".meaning-part").count() == 1
    assert card.locator(".meaning-part").get_attribute("data-part") == "0"
    page.locator("h1").click()
    page.keyboard.press("j")
    arrive(page, "location.hash.includes('feature=0')")
    assert page.locator(".feature[data-feature='0']").count() == 1


def test_an_export_of_a_large_run_says_what_it_lacks(page, serve, text_run):
    visit(page, serve("exported", text_run), TEXT_ADDRESS)
    assert cards(page).count() == len(text_run.neuron(*TEXT).meanings)
    page.get_by_text("whether chance explains the groups, aren’t in this export").wait_for()
    page.get_by_text("Meanings at other thresholds aren’t in this export.").wait_for()
    assert page.get_by_label("Exact overlap").is_disabled()
    visit(page, serve("exported", text_run), f"{TEXT_ADDRESS}?overlap=0.9")
    said = page.locator(".neuron-head [role=status]").inner_text()
    assert said.endswith("meanings at other overlaps aren't in this export.")


def test_examples_are_coloured_by_meaning(page, serve, image_run, neuron):
    visit(page, serve("live", image_run), IMAGE_ADDRESS)
    marks = page.locator(".example-map").first.locator(".mark")
    colours = "all => all.map(mark => mark.getAttribute('class').match(/f\\d+|f-rest/)[0])"
    truth = [f"f{meaning}" for meaning in neuron.examples["meaning"]]
    assert marks.evaluate_all(colours)[::-1] == truth
    page.get_by_text("By feature", exact=True).click()
    arrive(page, "location.hash.includes('colour=feature')")
    assert marks.evaluate_all(colours)[::-1] != truth


def test_labels_are_text(page, serve, image_run):
    def hostile(route):
        told = route.fetch().json()
        for group in told["groups"]:
            group["label"] = "<img src=x onerror='window.bad = 1'>\u202e"
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
def test_meanings_are_accessible_and_fit(open_page, axe, serve, image_run, scheme, width):
    page = open_page(color_scheme=scheme, viewport={"width": width, "height": 900})
    visit(page, serve("live", image_run), IMAGE_ADDRESS)
    page.locator(".meaning-verdict strong").wait_for()
    opened(page, 0)
    assert axe(page) == []
    assert page.evaluate("document.documentElement.scrollWidth") == width
