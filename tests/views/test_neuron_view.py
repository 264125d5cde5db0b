"""One neuron: its examples, its features at any cut, and which inputs belong to them."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.metrics import adjusted_rand_score

import polyseme as ps
from analysis import small
from polyseme.errors import InputError, RunError
from polyseme.store import SiteInfo
from polyseme.views.neuron_rows import neurons_of
from views import runs


def first_layer():
    """Inputs (n, 20) and activations (n, 10) of the layer that reads pixels."""
    model = runs.model()
    x = torch.from_numpy(runs.grey().inputs(slice(None))).flatten(1)
    with torch.no_grad():
        return x.numpy(), torch.relu(model.first(x)).numpy(), model.first.weight.numpy()


def busy(run, site="first"):
    """A neuron with several features, one of which has several examples."""
    table = run.neurons().query("site == @site and n_clusters > 2")
    table = table[table["intra_cluster_distance"].notna()]
    return run.neuron(site, int(table["neuron"].iloc[0]))


def test_examples_with_their_inputs_and_labels(grey_run):
    x, activations, weights = first_layer()
    for number in range(10):
        neuron = grey_run.neuron("first", number)
        chosen = small.strongest(activations[:, number], 25)
        frame = neuron.examples
        assert list(frame.columns) == [
            "example",
            "input",
            "position",
            "activation",
            "feature",
            "meaning",
            "label",
        ]
        assert frame["example"].tolist() == list(range(len(chosen)))
        assert frame["input"].tolist() == chosen.tolist()
        assert frame["label"].tolist() == [runs.CLASSES[i % 3] for i in chosen]
        np.testing.assert_array_equal(neuron.inputs(), runs.pixels()[chosen])
        np.testing.assert_array_equal(neuron.inputs(frame[2:4]), runs.pixels()[chosen[2:4]])
        np.testing.assert_allclose(neuron.embeddings, x[chosen] * weights[number], rtol=1e-6)
    assert [len(grey_run.neuron("first", n).examples) for n in (3, 5)] == [0, 1]


def test_random_examples(grey_run):
    _, activations, _ = first_layer()
    for number in range(10):
        frame = grey_run.neuron("first", number).random_examples
        active = np.flatnonzero(activations[:, number] > 0)
        assert len(frame) == min(5, len(active))
        assert set(frame["input"]) <= set(active.tolist())
        assert frame["input"].is_unique
        np.testing.assert_allclose(
            frame["activation"], activations[frame["input"], number], rtol=1e-5
        )
        assert frame["label"].tolist() == [runs.CLASSES[i % 3] for i in frame["input"]]


def test_random_examples_follow_the_seed(grey_run, tmp_path):
    other = runs.analyse_grey(tmp_path / "run", sites="first", seed=1, panels=False)
    mine = [set(grey_run.neuron("first", n).random_examples["input"]) for n in range(10)]
    theirs = [set(other.neuron(n).random_examples["input"]) for n in range(10)]
    assert mine != theirs
    for n in range(10):
        assert grey_run.neuron("first", n).examples.equals(other.neuron(n).examples)


def test_labels_that_have_no_name_are_numbers(tmp_path):
    labels = np.where(np.arange(70) % 2, 1, 4)
    run = ps.analyse(
        runs.model(), runs.pixels(), labels=labels, sites="first",
        out=tmp_path / "run", panels=False, progress=False,
    )  # fmt: skip
    frame = run.neuron(0).examples
    assert frame["label"].tolist() == labels[frame["input"]].tolist()
    without = ps.analyse(
        runs.model(), runs.pixels(), sites="first", out=tmp_path / "b", panels=False, progress=False
    )
    assert "label" not in without.neuron(0).examples
    assert without.neuron(0).features[0].label_counts() == {}


def test_features(grey_run):
    neuron = busy(grey_run)
    labels = neuron.examples["feature"].to_numpy()
    embeddings = neuron.embeddings.astype(np.float64)
    unit = embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True)
    sizes = [feature.n_examples for feature in neuron.features]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes == np.bincount(labels).tolist()
    stored = grey_run.folder.features.query("site == 'first' and neuron == @neuron.number")
    for feature, row in zip(neuron.features, stored.itertuples(), strict=True):
        members = np.flatnonzero(labels == feature.number)
        assert feature.examples["example"].tolist() == members.tolist()
        centre = unit[members].sum(axis=0)
        np.testing.assert_allclose(feature.centre, centre / np.linalg.norm(centre), atol=1e-5)
        apart = 1 - unit[members] @ unit[members].T
        assert feature.medoid in members
        assert apart[members.tolist().index(feature.medoid)].sum() <= apart.sum(1).min() + 1e-6
        activations = neuron.examples["activation"].to_numpy()[members]
        assert feature.mean_activation == pytest.approx(activations.mean(), rel=1e-6)
        counts = pd.Series([runs.CLASSES[i % 3] for i in feature.examples["input"]])
        assert feature.label_counts() == counts.value_counts().to_dict()
        assert (row.n_examples, row.medoid) == (feature.n_examples, feature.medoid)
        assert row.mean_activation == pytest.approx(feature.mean_activation)
        assert row.max_activation == pytest.approx(activations.max())
        assert f": {feature.n_examples} example{'s' * (feature.n_examples > 1)}" in repr(feature)


def test_features_are_printed_one_a_line(grey_run):
    features = busy(grey_run).recut(0.01).features
    lines = repr(features).splitlines()
    assert len(features) > 20
    assert len(lines) == 21
    assert lines[0] == f"[{features[0]!r},"
    assert lines[19] == f" {features[19]!r},"
    assert lines[20] == f" … {len(features) - 20} more]"
    few = type(features)(features[:2])
    assert repr(few) == f"[{few[0]!r},\n {few[1]!r}]"
    assert repr(type(features)()) == "[]"


def test_inputs_by_rows_and_by_numbers(grey_run):
    neuron = busy(grey_run)
    pixels, frame = runs.pixels(), neuron.examples
    for given in ([1, 0], np.array([1, 0]), frame.iloc[[1, 0]], frame["example"].iloc[[1, 0]]):
        found = neuron.inputs(given)
        np.testing.assert_array_equal(found, pixels[frame["input"].to_numpy()[[1, 0]]])
    assert neuron.inputs([]).shape == (0, *pixels.shape[1:])
    np.testing.assert_array_equal(neuron.inputs(range(len(frame))), neuron.inputs())
    for bad in ([len(frame)], [-1]):
        with pytest.raises(
            InputError, match=rf"the neuron has {len(frame)} examples, numbered from 0"
        ):
            neuron.inputs(bad)
    for bad in (0, [0.5], frame["input"], neuron.similar()):
        with pytest.raises(
            InputError, match=r"expected rows of .* or their numbers, such as \[0, 1\]"
        ):
            neuron.inputs(bad)
    with pytest.raises(
        InputError, match=r"does not have input 999: it stores only the \d+ inputs that are"
    ):
        neuron.inputs(frame.assign(input=999))


@pytest.mark.parametrize("threshold", [0.05, 0.2, 0.35, 0.6, 0.9, 2.0])
def test_recut_is_a_new_clustering_at_that_threshold(grey_run, threshold):
    moved = 0
    for number in range(10):
        neuron = grey_run.neuron("first", number)
        before = neuron.examples["feature"].tolist()
        cut = neuron.recut(threshold)
        fresh = ps.cluster(neuron.embeddings, threshold)
        assert cut.threshold == threshold
        assert cut.examples["feature"].tolist() == fresh.labels.tolist()
        assert [f.n_examples for f in cut.features] == np.bincount(fresh.labels).tolist()
        expected = small.metrics(neuron.embeddings, fresh.labels)
        assert cut.metrics.as_dict() == pytest.approx(expected, abs=1e-6, nan_ok=True)
        truth = small.cluster(neuron.embeddings, threshold, "average")
        if len(truth):
            assert adjusted_rand_score(truth, fresh.labels) == 1
        assert neuron.examples["feature"].tolist() == before, "the neuron stays as it was"
        moved += fresh.labels.tolist() != before
    assert moved or threshold == 0.35


def test_recut_of_a_cut_starts_from_the_whole_tree(grey_run):
    neuron = busy(grey_run)
    there_and_back = neuron.recut(2.0).recut(neuron.threshold)
    assert there_and_back.examples.equals(neuron.examples)
    assert there_and_back.metrics.as_dict() == pytest.approx(
        neuron.metrics.as_dict(), abs=1e-6, nan_ok=True
    )


@pytest.mark.parametrize("threshold", [0, -1, 2.01, float("nan"), "wide", None])
def test_recut_where_there_is_no_distance(grey_run, threshold):
    with pytest.raises(
        InputError, match=r"threshold is .*; expected a cosine distance greater than 0"
    ):
        grey_run.neuron("first", 0).recut(threshold)


def brute_assign(neuron, h):
    """The nearest centre if it is nearer than the cut, by loops."""
    found = []
    for row in np.asarray(h, np.float64):
        e = row * neuron.weights
        e /= np.linalg.norm(e) or 1
        distances = [1 - float(e @ feature.centre) for feature in neuron.features]
        best = int(np.argmin(distances))
        found.append(best if distances[best] < neuron.threshold else -1)
    return found


@pytest.mark.parametrize("threshold", [0.2, 0.35, 0.8])
def test_assign(grey_run, threshold):
    x, _, _ = first_layer()
    neuron = busy(grey_run).recut(threshold)
    new = np.concatenate([x, -x, np.random.default_rng(0).normal(size=(50, 20))])
    found = neuron.assign(new)
    assert found.dtype == np.int64
    assert found.tolist() == brute_assign(neuron, new)
    assert -1 in found
    assert set(found) > {-1}
    assert neuron.assign(torch.from_numpy(new)).tolist() == found.tolist()
    assert neuron.assign(7 * new).tolist() == found.tolist(), "only directions count"
    assert neuron.assign(np.zeros((2, 20))).tolist() == [-1, -1]
    assert neuron.assign(np.empty((0, 20))).tolist() == []


@pytest.mark.parametrize("n_names", [2, 3])
def test_labels_without_a_name_are_numbers(grey_run, tmp_path, n_names):
    copy = shutil.copytree(grey_run.path, tmp_path / "run")
    content = json.loads((copy / "run.json").read_text())
    content["data"]["class_names"] = runs.CLASSES[:n_names]
    (copy / "run.json").write_text(json.dumps(content) + "\n")
    found = busy(ps.open_run(copy)).examples
    labels = runs.LABELS[found["input"]]
    assert 2 in labels
    named = [runs.CLASSES[label] for label in labels]
    assert found["label"].tolist() == (named if n_names == 3 else labels.tolist())


def test_assign_gives_tight_members_back(grey_run):
    neuron = busy(grey_run)
    labels = neuron.examples["feature"].to_numpy()
    own = [feature.medoid for feature in neuron.features if feature.n_examples == 1]
    assert own
    assert neuron.assign(neuron.vectors[own]).tolist() == labels[own].tolist()


@pytest.mark.parametrize("shape", [(20,), (3, 19), (2, 3, 20), ()])
def test_assign_to_the_wrong_shape(grey_run, shape):
    with pytest.raises(
        InputError, match=r"h has shape .*; expected \(n, 20\): the input of site 'fi"
    ):
        grey_run.neuron("first", 0).assign(np.zeros(shape))


def brute_similar(run, neuron, k):
    """Medoid against medoid, one pair at a time; features of five examples or more."""

    def medoids(other):
        for feature in other.features:
            if feature.n_examples >= 5:
                e = (other.vectors[feature.medoid] * other.weights).astype(np.float64)
                yield feature.number, e / np.linalg.norm(e)

    rows = []
    for feature, mine in medoids(neuron):
        pairs = [
            (float(mine @ theirs), site.name, number, other)
            for site in run.folder.sites
            if site.d_in == neuron.info.d_in
            for number in range(site.n_neurons)
            if (site.name, number) != (neuron.site, neuron.number)
            for other, theirs in medoids(run.neuron(site.name, number))
        ]
        pairs.sort(key=lambda pair: -pair[0])
        rows += [(feature, *pair[1:], pair[0]) for pair in pairs[:k]]
    return rows


def check_similar(run, neuron, k, atol):
    frame = neuron.similar(k)
    expected = brute_similar(run, neuron, k)
    assert list(frame.columns) == ["feature", "site", "neuron", "other_feature", "similarity"]
    assert [tuple(row[:4]) for row in frame.itertuples(index=False)] == [
        row[:4] for row in expected
    ]
    np.testing.assert_allclose(frame["similarity"], [row[4] for row in expected], atol=atol)
    return frame


@pytest.fixture(scope="module")
def coarse_run(tmp_path_factory):
    """Features of many examples, as the threshold is high."""
    return runs.analyse_grey(tmp_path_factory.mktemp("coarse") / "run", threshold=0.8)


@pytest.mark.parametrize("k", [1, 5])
def test_similar_as_the_run_holds_it(coarse_run, k, monkeypatch):
    monkeypatch.setattr("polyseme.views.neuron.compared", None)
    sites = set()
    for number in range(3):
        neuron = coarse_run.neuron("first", number)
        sites |= set(check_similar(coarse_run, neuron, k, atol=5e-4)["site"])
    assert k == 1 or sites == {"first", "last"}, "those that read as many values"


def test_similar_by_comparing_all(coarse_run):
    neuron = busy(coarse_run)
    frame = check_similar(coarse_run, neuron, 9, atol=1e-5)
    assert len(frame) == 9 * frame["feature"].nunique(), "more than the run holds"
    again = neuron.recut(1.0)
    assert len(again.features) < len(neuron.features)
    check_similar(coarse_run, again, 2, atol=1e-5)


def test_nothing_is_similar_to_a_dead_neuron(coarse_run):
    assert coarse_run.neuron("first", 3).similar().empty
    assert coarse_run.neuron("first", 3).similar(40).empty


@pytest.mark.parametrize("k", [0, -1, 1.5, True, None])
def test_similar_to_how_many(grey_run, k):
    with pytest.raises(InputError, match=r"k is .*; a whole number of at least 1 is expected"):
        grey_run.neuron("first", 0).similar(k)


def test_repr(grey_run):
    neuron = busy(grey_run)
    m, n = neuron.metrics, neuron.meanings.number
    assert repr(neuron) == (
        f"Neuron('first', {neuron.number}: {m.n_examples} examples, {n} "
        f"meaning{'s' * (n > 1)}, {m.n_clusters} features at 0.35, "
        f"mean distance {m.mean_distance:.3f})"
    )


@pytest.mark.parametrize(
    ("kind", "extra"),
    [
        ("gated", {}),
        ("gated", {"gate": None}),
        ("gated", {"gate": "silu"}),
        ("x", {"general": True}),
    ],
)
def test_neurons_of_which_a_run_holds_too_little_to_embed(kind: str, extra: dict) -> None:
    info = SiteInfo(number=0, name="a", kind=kind, n_neurons=2, d_in=3, extra=extra)
    with pytest.raises(
        RunError,
        match=r"^The run cannot compute embeddings of the neurons of 'a', because",
    ):
        neurons_of(info, {"weights": np.ones((2, 3))})
