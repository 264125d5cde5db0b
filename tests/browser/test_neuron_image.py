"""The page of a neuron of an image model, in a browser: its pictures equal the run's arrays."""

from __future__ import annotations

import re

import numpy as np
import pytest
from visiting import visit

import polyseme as ps

NUMBER = 11
ADDRESS = f"#/neuron/0/{NUMBER}"
FEATURES = f"{ADDRESS}?level=features"


def pixels(canvas) -> np.ndarray:
    """What a canvas shows, (height, width, 4)."""
    found = canvas.evaluate(
        """canvas => {
            const { width, height } = canvas;
            // A copy, as reading a canvas several times makes the browser warn.
            const copy = new OffscreenCanvas(width, height).getContext("2d");
            copy.drawImage(canvas, 0, 0);
            const { data } = copy.getImageData(0, 0, width, height);
            return { width, height, data: Array.from(data) };
        }"""
    )
    return np.array(found["data"]).reshape(found["height"], found["width"], 4)


def signs(canvas) -> np.ndarray:
    """Of what a signed picture shows: warm colours are positive, cold ones negative."""
    shown = pixels(canvas)
    return np.sign(shown[..., 0] - shown[..., 2])


def agree(drawn: np.ndarray, values: np.ndarray) -> None:
    """That signs are those of values, where these are not too near 0 to have a colour."""
    clear = np.abs(values) > 0.1 * np.abs(values).max()
    assert (drawn[clear] == np.sign(values)[clear]).all()


def fraction(page) -> str:
    return page.locator(".neuron-figures dd").first.inner_text()


@pytest.fixture
def neuron(image_run):
    return image_run.neuron("layers.0", NUMBER)


@pytest.fixture
def panel(neuron):
    return neuron.panel(n_shown=200)


def two_features(neuron) -> float:
    """A threshold with several features of several examples."""
    return next(
        float(t)
        for t in np.linspace(0.2, 0.6, 41).round(2)
        if sum(feature.n_examples > 1 for feature in neuron.recut(t).features) in (3, 4, 5, 6, 7)
    )


def test_the_figures_are_the_runs(page, image_site, neuron, panel):
    visit(page, image_site, ADDRESS)
    assert page.locator("h1").inner_text() == f"layers.0 / {NUMBER}"
    active = int(panel.histogram.sum())
    assert fraction(page) == f"{len(neuron.examples)} of {active:,}"
    assert f"{len(neuron.examples)} of the {active:,} inputs" in page.locator(".reads").inner_text()
    assert f"Activated by {active:,} inputs" in page.locator(".neuron-side").inner_text()
    assert (
        f"{len(neuron.random_examples)} of the {active:,}"
        in page.locator(".neuron-rest").inner_text()
    )


def test_images_of_what_the_neuron_reads(page, image_site, panel):
    visit(page, image_site, ADDRESS)
    titles = page.locator(".reads strong").all_inner_texts()
    assert titles == ["Input weights", "Activation map", "Average example", "Importance map"]
    canvases = page.locator(".reads canvas")
    weights = panel.input_weights
    # Small ones are near the middle of the scale, where rounding decides.
    clear = np.abs(weights) > 0.2 * np.abs(weights).max()
    assert (signs(canvases.nth(0))[clear] == np.sign(weights[clear])).all()
    limit = page.locator(".reads .signed-legend").first.inner_text()
    assert float(limit.split()[-1]) == pytest.approx(np.abs(weights).max(), rel=0.05)
    importance = panel.importance_map
    clear = np.abs(importance) > 0.3 * np.abs(importance).max()
    assert (signs(canvases.nth(3))[clear] == np.sign(importance[clear])).all()


@pytest.mark.parametrize("own", [True, False], ids=["own", "recut"])
def test_each_feature_has_its_average_and_its_feature(page, image_site, neuron, own):
    threshold = neuron.threshold if own else two_features(neuron)
    visit(page, image_site, FEATURES if own else f"{ADDRESS}?threshold={threshold}")
    panel = neuron.recut(threshold).panel(n_shown=200)
    shared = [feature for feature in panel.features if feature.n_examples > 1]
    page.wait_for_function(
        "n => document.querySelectorAll('.feature[data-feature]').length === n", arg=len(shared)
    )
    scale = neuron._tables.folder.metadata["data"]
    for feature in shared:
        card = page.locator(f".feature[data-feature='{feature.number}']")
        assert f"{feature.n_examples} of {len(neuron.examples)} examples" in card.inner_text()
        average, product = (card.locator(".feature-pictures canvas").nth(i) for i in (0, 1))
        stored = (feature.average * scale["std"] + scale["mean"]) * 255
        assert np.abs(pixels(average)[..., 0] - stored).max() <= 1
        clear = np.abs(feature.feature) > 0.3 * np.abs(feature.feature).max()
        assert (signs(product)[clear] == np.sign(feature.feature[clear])).all()
        name, n = max(feature.label_counts.items(), key=lambda item: item[1])
        chips = card.locator(".chip").all_inner_texts()
        assert str(n) in [chip.split("×")[1].strip() for chip in chips if chip.startswith(name)]
        assert card.locator(".tiles canvas").count() == min(feature.n_examples, 12)


def test_pictures_follow_the_slider(page, image_site, neuron):
    visit(page, image_site, FEATURES)
    page.get_by_label("Exact threshold").fill("2")
    page.keyboard.press("Enter")
    page.wait_for_function("() => document.querySelectorAll('.feature').length === 1")
    everything = neuron.inputs().mean(axis=0)
    shown = pixels(page.locator(".feature-pictures canvas").first)[..., 0]
    assert np.abs(shown - everything).max() <= 1
    page.get_by_role("button", name=f"Show all {len(neuron.examples)}").click()
    assert page.locator(".feature .tiles canvas").count() == len(neuron.examples)


def test_an_example_enlarged(page, image_site, neuron):
    visit(page, image_site, f"{ADDRESS}?threshold=2")
    best = int(neuron.examples["activation"].to_numpy().argmax())
    tile = page.locator(f".tiles [data-e='{best}'] button")
    tile.click()
    detail = page.locator(".example-detail")
    row = neuron.examples.iloc[best]
    assert f"{row['activation']:.3g}" in detail.inner_text()
    assert f"Input\n{row['input']:,}" in detail.inner_text()
    assert np.array_equal(pixels(detail.locator("canvas").first)[..., 0], neuron.inputs()[best])
    assert tile.get_attribute("aria-expanded") == "true"
    assert f"example={best}" in page.evaluate("location.hash")
    page.keyboard.press("Escape")
    assert detail.count() == 0
    # The address alone opens it again.
    page.go_back()
    visit(page, image_site, f"{ADDRESS}?example={best}")
    detail.wait_for()


def test_effects_on_the_logits(page, image_site, panel):
    visit(page, image_site, ADDRESS)
    rows = page.locator(".class-logits tbody tr")
    assert rows.count() == len(panel.logit_effects)
    for row, truth in zip(rows.all(), panel.logit_effects.itertuples(), strict=True):
        name, ablation, gradient = (
            row.locator(cell).inner_text().replace("−", "-")
            for cell in ("th", "td:nth-child(3)", "td:nth-child(4)")
        )
        assert name == str(truth[1])
        assert float(ablation) == pytest.approx(truth.ablation, rel=0.01, abs=1e-3)
        assert float(gradient) == pytest.approx(truth.gradient, rel=0.01, abs=1e-3)


def test_random_examples(page, image_site, neuron):
    visit(page, image_site, ADDRESS)
    shown = page.locator(".neuron-rest .tiles canvas")
    assert shown.count() == len(neuron.random_examples)
    first = neuron.inputs(neuron.random_examples)[0]
    assert np.array_equal(pixels(shown.first)[..., 0], first)


def test_examples_in_two_spaces(page, image_site, neuron):
    visit(page, image_site, ADDRESS)
    maps = page.locator(".example-map")
    assert maps.count() == 2
    assert maps.first.locator(".mark").count() == len(neuron.examples)
    maps.first.locator(".mark").last.click(force=True)
    page.locator(".example-detail").wait_for()


def test_signed_pictures_follow_the_theme(open_page, image_site):
    """Zero has the colour of the page in both themes."""
    page = open_page(color_scheme="dark")
    visit(page, image_site, f"{ADDRESS}?threshold=2")
    before = pixels(page.locator(".reads canvas").first)
    page.get_by_role("button", name=re.compile("theme", re.IGNORECASE)).click()
    page.wait_for_function("() => document.documentElement.dataset.theme === 'light'")
    after = pixels(page.locator(".reads canvas").first)
    assert after.mean() > before.mean() + 20


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1280])
def test_the_image_page_is_accessible_and_fits(open_page, axe, image_site, scheme, width):
    page = open_page(color_scheme=scheme, viewport={"width": width, "height": 900})
    visit(page, image_site, f"{ADDRESS}?threshold=0.5")
    page.locator(".tiles button").first.click()
    assert axe(page) == []
    assert page.evaluate("document.documentElement.scrollWidth") == width


@pytest.fixture(scope="module")
def convolution_run(tmp_path_factory):
    """A convolution on real digits, every other row and column of positions."""
    import torch
    from torch import nn

    from polyseme.data import digits

    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Unflatten(1, (1, 28)), nn.Conv2d(1, 4, 5, stride=2, padding=2), nn.ReLU()
    )
    images = digits()
    return ps.analyse(
        model,
        images.inputs(slice(0, 400)),
        sites="1",
        select=ps.TopK(30),
        image_shape=(28, 28),
        out=tmp_path_factory.mktemp("runs") / "convolution",
        progress=False,
    )


def test_a_convolution_shows_where_it_fires(page, axe, serve, convolution_run):
    neuron = next(n for n in map(convolution_run.neuron, range(4)) if n.features)
    visit(page, serve("live", convolution_run), f"#/neuron/1/{neuron.number}?level=features")
    reads = page.locator(".reads")
    assert reads.locator("strong").all_inner_texts() == [
        "Kernel",
        "Average patch",
        "Where it fires",
    ]
    agree(signs(reads.locator("canvas").first), neuron.weights.reshape(5, 5))
    positions = neuron.examples["position"].to_numpy()
    fires = np.bincount(positions, minlength=14 * 14).reshape(14, 14) > 0
    shown = pixels(reads.locator("canvas").nth(2))[..., :3].astype(int)
    assert ((shown != shown[~fires][0]).any(axis=2) == fires).all()
    # A frame has the size of the kernel, about the place, as far as it is in the image.
    feature = neuron.features[0]
    example = feature.examples.sort_values("activation", ascending=False).iloc[0]
    row, column = divmod(int(example["position"]), 14)
    frame = page.locator(f".tiles [data-e='{int(example['example'])}'] .place")
    size = 5 / 28
    for side, length, place in (("top", "height", row), ("left", "width", column)):
        start, end = (place + 0.5) / 14 - size / 2, (place + 0.5) / 14 + size / 2
        got = [float(frame.evaluate(f"f => parseFloat(f.style.{name})")) for name in (side, length)]
        start, end = max(0, start), min(1, end)
        np.testing.assert_allclose(got, [100 * start, 100 * (end - start)], atol=0.06)
    # What sets a feature off is the mean of its examples' embeddings.
    card = page.locator(".card.feature").first
    mean = (neuron.vectors[feature.examples["example"]] * neuron.weights).mean(axis=0)
    agree(signs(card.locator(".feature-pictures canvas").nth(1)), mean.reshape(5, 5))
    assert axe(page) == []
