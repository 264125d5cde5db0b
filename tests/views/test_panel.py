"""The image panel, number by number, and the figure that it becomes."""

from __future__ import annotations

import io
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

import polyseme as ps
from analysis import small
from polyseme.errors import InputError
from polyseme.views.figure import draw_panel
from reference import oracles
from views import runs
from views.test_neuron_view import busy


@pytest.fixture(scope="module")
def inputs():
    return runs.grey().inputs(slice(None))


def alive(run, site, at_least=3):
    table = run.neurons().query("site == @site and n_examples >= @at_least")
    return [int(number) for number in table["neuron"]]


def test_a_neuron_that_reads_pixels(grey_run, inputs):
    model = runs.model()
    low, high = (0 - 0.4) / 0.3, (1 - 0.4) / 0.3
    for number in range(10):
        neuron = grey_run.neuron("first", number)
        panel = neuron.panel()
        weights = model.first.weight[number].detach().numpy().reshape(5, 4)
        np.testing.assert_array_equal(panel.input_weights, weights)
        # The far end of the range is the upper one: 2.0 against -1.33.
        assert abs(high) > abs(low)
        np.testing.assert_allclose(panel.activation_map, weights * high, atol=1e-5)
        assert (panel.site, panel.neuron, panel.threshold) == ("first", number, 0.35)
        assert (panel.n_inputs, panel.baseline, panel.activation) == (70, 0.0, "relu")
        chosen = neuron.examples["input"].to_numpy()
        if not len(chosen):
            assert panel.average_example is None
            assert panel.importance_map is None
            assert panel.features == []
            continue
        average = inputs[chosen].mean(axis=0)
        np.testing.assert_allclose(panel.average_example, average, atol=1e-5)
        np.testing.assert_allclose(panel.importance_map, weights * high * average, atol=1e-5)
        labels = neuron.examples["feature"].to_numpy()
        assert len(panel.features) == len(neuron.features)
        for feature in panel.features:
            mine = inputs[chosen[labels == feature.number]].mean(axis=0)
            np.testing.assert_allclose(feature.average, mine, atol=1e-5)
            np.testing.assert_allclose(feature.feature, mine * weights, atol=1e-5)


def nearest_first(vectors, members):
    """The medoid of some examples, then the others by their distance from it."""
    distances = oracles.cosine_distances(vectors[members])
    (medoid,) = oracles.medoids(vectors[members], [0] * len(members))
    others = sorted(set(range(len(members))) - {medoid}, key=lambda n: distances[medoid, n])
    return [int(members[n]) for n in [medoid, *others]]


def test_a_panel_shows_examples_of_each_feature(grey_run, inputs):
    neuron = busy(grey_run).recut(0.8)
    weights = runs.model().first.weight[neuron.number].detach().numpy()
    embeddings = inputs[neuron.examples["input"]].reshape(-1, 20) * weights
    panel = neuron.panel(n_shown=4)
    shown, weaker = 0, 0
    for feature, mine in zip(panel.features, neuron.features, strict=True):
        frame = mine.examples.set_index("example")
        weaker += mine.medoid != frame["activation"].idxmax()
        order = nearest_first(embeddings, frame.index.to_numpy())[:4]
        np.testing.assert_array_equal(
            feature.examples, runs.pixels()[frame.loc[order, "input"].to_numpy()]
        )
        assert feature.activations.tolist() == frame.loc[order, "activation"].tolist()
        assert feature.n_examples == mine.n_examples
        assert feature.label_counts == mine.label_counts()
        shown = max(shown, len(feature.examples))
    assert weaker, "a medoid that is not the strongest comes first all the same"
    assert shown == 4
    random = neuron.random_examples
    np.testing.assert_array_equal(panel.random_examples, runs.pixels()[random["input"]])
    assert panel.random_activations.tolist() == random["activation"].tolist()


def test_histogram_and_statistics(grey_run, inputs):
    with torch.no_grad():
        a = torch.relu(runs.model().first(torch.from_numpy(inputs).flatten(1))).numpy()
    for number in range(10):
        panel = grey_run.neuron("first", number).panel()
        positive = a[a[:, number] > 0, number].astype(np.float64)
        assert panel.histogram.sum() == len(positive)
        assert panel.statistics["density"] == pytest.approx(len(positive) / 70)
        if len(positive):
            upper = panel.histogram_upper
            assert upper / 2 <= positive.max() < upper
            expected, _ = np.histogram(positive, bins=64, range=(0, upper))
            assert np.abs(panel.histogram - expected).sum() <= 2, "but for rounding at an edge"
            assert panel.statistics["max_activation"] == pytest.approx(positive.max(), rel=1e-6)


def test_a_deeper_neuron(grey_run, inputs):
    model = runs.model()

    def drive(x):
        with torch.no_grad():
            return model.second(torch.relu(model.first(torch.from_numpy(x).flatten(1)))).numpy()

    low, high = np.float32(-0.4 / 0.3), np.float32(0.6 / 0.3)
    start = drive(np.zeros((1, 5, 4), np.float32))[0]
    expected = np.zeros((20, 5, 4))
    for y in range(5):
        for x in range(4):
            moved = np.zeros((5, 5, 4), np.float32)
            moved[:, y, x] = np.linspace(low, high, 5)
            change = drive(moved) - start
            best = np.abs(change).argmax(axis=0)
            expected[:, y, x] = change[best, np.arange(20)]
    for number in alive(grey_run, "second"):
        neuron = grey_run.neuron("second", number)
        panel = neuron.panel()
        assert panel.input_weights is None
        np.testing.assert_allclose(panel.activation_map, expected[number], atol=1e-5)
        chosen = neuron.examples["input"].to_numpy()
        average = inputs[chosen].mean(axis=0)
        np.testing.assert_allclose(panel.importance_map, expected[number] * average, atol=1e-4)
        for feature in panel.features:
            np.testing.assert_allclose(
                feature.feature, feature.average * expected[number], atol=1e-4
            )


def test_a_layer_as_wide_as_the_input_reads_no_pixels(grey_run):
    info = {site.name: site for site in grey_run.folder.sites}
    assert info["last"].d_in == info["first"].d_in == 20
    reads = {name: site.extra["reads_inputs"] for name, site in info.items()}
    assert reads == {"first": True, "second": False, "last": False}
    assert grey_run.neuron("last", alive(grey_run, "last", 1)[0]).panel().input_weights is None


@pytest.mark.parametrize("site", ["first", "second", "last"])
def test_logit_effects(grey_run, inputs, site):
    model = runs.model()

    def later(h):
        if site == "first":
            h = torch.relu(model.second(h))
        return h if site == "last" else model.last(h)

    x = torch.from_numpy(inputs).flatten(1)
    with torch.no_grad():
        h = torch.relu(model.first(x))
        h = h if site == "first" else torch.relu(model.second(h))
        h = model.last(h) if site == "last" else h
    for number in alive(grey_run, site, 1):
        neuron = grey_run.neuron(site, number)
        effects = neuron.panel().logit_effects
        assert effects["class"].tolist() == runs.CLASSES
        gradients, ablations = [], []
        for example in neuron.examples["input"][:6]:
            leaf = h[example].clone().requires_grad_()
            logits = later(leaf[None])[0]
            slopes = [
                torch.autograd.grad(logits[c], leaf, retain_graph=True)[0][number].item()
                for c in range(3)
            ]
            gradients.append(np.array(slopes) * leaf[number].item())
            without = leaf.detach().clone()
            without[number] = 0
            with torch.no_grad():
                ablations.append((logits - later(without[None])[0]).numpy())
        np.testing.assert_allclose(effects["gradient"], np.mean(gradients, axis=0), atol=1e-5)
        np.testing.assert_allclose(effects["ablation"], np.mean(ablations, axis=0), atol=1e-5)
    dead = set(range(len(grey_run.neurons().query("site == @site")))) - set(
        alive(grey_run, site, 1)
    )
    for number in dead:
        effects = grey_run.neuron(site, number).panel().logit_effects
        assert effects[["gradient", "ablation"]].isna().all(axis=None)


def test_a_convolution(rgb_run):
    model = small.make(small.ConvNet)
    inputs = runs.rgb().inputs(slice(None))
    truths = small.truths(model, inputs)
    for site, layer in (("conv", model.conv), ("grouped", model.grouped)):
        for number in alive(rgb_run, site):
            neuron = rgb_run.neuron(site, number)
            panel = neuron.panel()
            kernel = layer.weight[number].detach().numpy()
            np.testing.assert_array_equal(panel.input_weights, kernel)
            chosen = neuron.examples["input"].to_numpy()
            average = inputs[chosen].mean(axis=0)
            np.testing.assert_allclose(panel.average_example, average, atol=1e-5)
            assert panel.activation_map.shape == panel.importance_map.shape == (3, 8, 8)
            np.testing.assert_allclose(
                panel.importance_map, panel.activation_map * average, atol=1e-4
            )
            labels = neuron.examples["feature"].to_numpy()
            h = truths[site].h(number, chosen)
            for feature in panel.features:
                patch = h[labels == feature.number].mean(axis=0).reshape(kernel.shape)
                np.testing.assert_allclose(feature.feature, patch * kernel, atol=1e-5)
                mine = inputs[chosen[labels == feature.number]].mean(axis=0)
                np.testing.assert_allclose(feature.average, mine, atol=1e-5)


def test_the_map_of_a_convolution(rgb_run):
    """One pixel over its own channel's range, the channel's strongest place each time."""
    conv = small.make(small.ConvNet).conv
    low, high = runs.rgb().value_range
    at = (1, 3, 5)
    moved = np.zeros((5, 3, 8, 8), np.float32)
    moved[(slice(None), *at)] = np.linspace(low[1, 0, 0], high[1, 0, 0], 5)
    with torch.no_grad():
        drives = conv(torch.from_numpy(moved)).flatten(2).amax(dim=2)
        start = conv(torch.zeros(1, 3, 8, 8)).flatten(2).amax(dim=2)
    change = (drives - start).numpy()
    for number in range(4):
        expected = change[np.abs(change[:, number]).argmax(), number]
        found = rgb_run.neuron("conv", number).panel().activation_map[at]
        assert found == pytest.approx(expected, abs=1e-5)


# --- the figure ------------------------------------------------------------------------------


def picture(figure) -> np.ndarray:
    """The figure as pixels."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=60)
    return np.asarray(Image.open(buffer).convert("RGB"))


def words(figure) -> str:
    from matplotlib.text import Text

    return "\n".join(text.get_text() for text in figure.findobj(Text))


def colours(image) -> int:
    return len(np.unique(image.reshape(-1, 3), axis=0))


def test_figure_of_a_neuron_that_reads_pixels(grey_run, tmp_path):
    neuron = busy(grey_run)
    path = tmp_path / "new" / "folder" / "figure.png"
    figure = neuron.figure(path)
    with Image.open(path) as saved:
        assert saved.format == "PNG"
        assert min(saved.size) > 400
    image = picture(figure)
    assert colours(image) > 200
    text = words(figure)
    m = neuron.metrics
    meanings = neuron.meanings
    many = f"{len(meanings)} meaning{'s' * (len(meanings) > 1)} (verdict: {meanings.verdict})"
    assert (
        f"first / {neuron.number}: {many}, {m.n_clusters} features in {m.n_examples} examples"
        in text
    )
    assert f"mean {m.mean_distance:.3f}, max {m.max_distance:.3f}" in text
    assert "(cut at 0.35)" in text
    assert "activation map\nrelative to an input of 0" in text
    assert "average ⊙ weights" in text
    assert "$\\bad{$" in text
    assert "Each row: the most central example, then those nearest to it" in text
    rows = [line for line in text.split("\n") if re.fullmatch(r"(meaning|feature) \d+", line)]
    expected = []
    for meaning in meanings:
        assert f"{meaning.n_examples} of {m.n_examples} examples" in text
        inside = meaning.examples["feature"].value_counts()
        most = list(meaning.features)[: 8 // len(meanings)]
        assert [inside[feature] for feature in most] == sorted(inside, reverse=True)[: len(most)]
        for feature in most:
            size = neuron.features[feature].n_examples
            assert f"{inside[feature]} of {size} example" in text
        expected += [f"meaning {meaning.number}", *(f"feature {feature}" for feature in most)]
    assert rows == expected


def test_figure_of_a_run_without_meanings(grey_run):
    neuron = busy(grey_run)
    text = words(draw_panel(replace(neuron.panel(), meanings=[], verdict="")))
    m = neuron.metrics
    assert f"first / {neuron.number}: {m.n_clusters} features in {m.n_examples} examples" in text
    shown = min(8, m.n_clusters)
    assert f"feature {shown - 1}\n" in text
    assert f"feature {shown}\n" not in text
    rest = sum(f.n_examples for f in neuron.features[8:])
    if rest:
        assert f"smaller features hold the other {rest} examples" in text
    for feature in neuron.features[:shown]:
        assert f"{feature.n_examples} of {m.n_examples} examples" in text


def test_meanings_of_a_panel(grey_run, inputs):
    neuron = busy(grey_run)
    weights = runs.model().first.weight[neuron.number].detach().numpy()
    h = inputs[neuron.examples["input"]].reshape(-1, 20)
    site = grey_run.folder.site(neuron.info.number)
    whitened = (h - site["space_mean"][0]) @ site["space_matrix"][0]
    panel = neuron.panel(n_shown=4)
    assert panel.verdict == neuron.meanings.verdict
    for shown, meaning in zip(panel.meanings, neuron.meanings, strict=True):
        frame = meaning.examples.set_index("example")
        order = nearest_first(whitened, frame.index.to_numpy())[:4]
        pictures = runs.pixels()[frame.loc[order, "input"].to_numpy()]
        np.testing.assert_array_equal(shown.examples, pictures)
        average = inputs[frame["input"].to_numpy()].mean(axis=0)
        np.testing.assert_allclose(shown.average, average, atol=1e-5)
        assert (shown.number, shown.label) == (meaning.number, meaning.label)
        parts = {part.number: part.n_examples for part in shown.features}
        assert parts == meaning.features
        assert list(parts) == list(meaning.features)
        for part in shown.features:
            inside = frame.index[frame["feature"] == part.number].to_numpy()
            order = nearest_first(h * weights, inside)[:4]
            assert part.activations.tolist() == frame.loc[order, "activation"].tolist()


def test_the_images_are_the_examples(grey_run):
    neuron = busy(grey_run)
    panel = neuron.panel()
    drawn = [np.asarray(i.get_array()) for axes in neuron.figure().axes for i in axes.images]

    def is_drawn(image):
        return any(a.shape == image.shape and np.allclose(a, image, atol=1e-5) for a in drawn)

    assert is_drawn(panel.input_weights)
    assert is_drawn(panel.activation_map)
    assert is_drawn(panel.average_example)
    assert is_drawn(panel.importance_map)
    assert all(is_drawn(image) for image in panel.random_examples)
    parts = [part for meaning in panel.meanings for part in meaning.features[:1]]
    for feature in (*panel.meanings, *parts):
        assert is_drawn(feature.average)
        assert is_drawn(feature.feature)
        assert all(is_drawn(image) for image in feature.examples)


@pytest.mark.parametrize(("number", "title"), [(3, "dead: no input"), (5, "1 feature in 1 exa")])
def test_figure_of_a_dead_neuron_and_of_a_lone_example(grey_run, number, title):
    figure = grey_run.neuron("first", number).figure()
    assert title in words(figure)
    assert "nan" not in words(figure)
    assert colours(picture(figure)) > 50


def test_figure_of_a_deeper_neuron(grey_run):
    text = words(grey_run.neuron("second", alive(grey_run, "second")[0]).figure())
    assert "no pixels at this depth" in text
    assert "average ⊙ map" in text


def test_figure_of_a_convolution_in_colour(rgb_run):
    for site in ("conv", "grouped"):
        neuron = rgb_run.neuron(site, alive(rgb_run, site)[0])
        figure = neuron.figure()
        assert "patch ⊙ kernel" in words(figure)
        example = np.moveaxis(neuron.panel().features[0].examples[0], 0, -1)
        images = [image.get_array() for axes in figure.axes for image in axes.images]
        assert any(i.shape == (8, 8, 3) and np.array_equal(i, example) for i in images)
        assert colours(picture(figure)) > 500


@pytest.mark.parametrize("without", [False, True])
def test_names_of_classes_overprint_nothing(grey_run, without):
    """By the boxes that matplotlib draws: they lie on no picture, and on no scale beside one."""
    name = "whatever looks like a golden retriever $"
    panel = busy(grey_run).panel(n_shown=1)
    effects = panel.logit_effects
    names = [f"{number} {name}" for number in range(len(effects))]
    features = [
        replace(feature, label_counts=dict.fromkeys(names, 1)) for feature in panel.features[:2]
    ]
    meanings = [
        replace(meaning, label_counts=dict.fromkeys(names, 1), features=features[:1])
        for meaning in panel.meanings
    ]
    if without:
        meanings = []
    named = replace(
        panel,
        logit_effects=effects.assign(**{"class": names}),
        features=features,
        meanings=meanings,
    )
    n_labelled = 2 * len(meanings) or len(features)
    figure = draw_panel(named)
    figure.draw_without_rendering()
    boxes = {axes: axes.get_tightbbox() for axes in figure.axes if axes.axison}
    boxes |= {i: i.get_window_extent() for axes in figure.axes for i in axes.images}
    (logits,) = (axes for axes in figure.axes if axes.get_title().startswith("logit effects"))
    labels = [(logits, text) for text in logits.get_yticklabels()]
    labels += [
        (axes, text) for axes in figure.axes for text in axes.texts if name[:9] in text.get_text()
    ]
    assert len(labels) == len(names) + n_labelled
    for own, text in labels:
        assert name[:9] in text.get_text()
        extent = text.get_window_extent()
        for axes, box in boxes.items():
            assert axes is own or box is None or not extent.overlaps(box), (text, axes)


def test_figure_of_a_recut(grey_run):
    text = words(busy(grey_run).recut(2.0).figure())
    assert "1 feature in" in text
    assert "(cut at 2)" in text


def test_without_maps(tmp_path):
    run = runs.analyse_grey(tmp_path / "run", panels=False)
    neuron = run.neuron("second", alive(run, "second")[0])
    panel = neuron.panel()
    assert panel.activation_map is None
    assert panel.logit_effects is None
    assert panel.features[0].feature is None
    text = words(neuron.figure())
    assert "not computed" in text
    assert "no logits" in text


def test_a_baseline_that_was_given(tmp_path):
    baseline = np.random.default_rng(2).normal(size=(5, 4)).astype(np.float32)
    run = runs.analyse_grey(tmp_path / "run", sites="first", baseline=baseline)
    neuron = run.neuron(0)
    weights = neuron.weights.reshape(5, 4)
    low, high = -0.4 / 0.3, 0.6 / 0.3
    far = np.where(np.abs(high - baseline) > np.abs(low - baseline), high, low)
    np.testing.assert_allclose(neuron.panel().activation_map, weights * (far - baseline), atol=1e-5)
    assert "relative to a given baseline" in words(neuron.figure())


def test_flat_inputs_need_a_shape(tmp_path):
    model = small.make(small.MLP)
    run = ps.analyse(model, small.flat_inputs(), sites="first", out=tmp_path / "a", progress=False)
    with pytest.raises(
        InputError, match=r"shape \(12,\), which is not an image; analyse with image_s"
    ):
        run.neuron(0).figure()
    shaped = ps.analyse(
        model,
        small.flat_inputs(),
        sites="first",
        out=tmp_path / "b",
        image_shape=(3, 4),
        progress=False,
    )
    panel = shaped.neuron(0).panel()
    assert panel.input_weights.shape == panel.average_example.shape == (3, 4)
    assert "label" not in shaped.neuron(0).examples
    shaped.neuron(0).figure(tmp_path / "figure.svg")
    assert "<svg" in (tmp_path / "figure.svg").read_text()
