"""One image through a run's model: what neurons add to each logit, and in which feature."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from torch import nn

import polyseme as ps
from polyseme.analysis.classifying import MAX_CLASSES, ImageClassifier
from polyseme.analysis.live import live_classify
from polyseme.errors import InputError
from views import runs

from . import small


@pytest.fixture(scope="module")
def grey(tmp_path_factory):
    return runs.analyse_grey(tmp_path_factory.mktemp("grey") / "run", panels=False)


def by_hand(model, x):
    """Activations and contributions of the two hidden layers of the grey model, and logits."""
    found = {}
    h1 = torch.relu(model.first(x.flatten(1))).detach().requires_grad_()
    h2 = torch.relu(model.second(h1))
    logits = model.last(h2)
    for name, h in (("first", h1), ("second", h2)):
        rows = []
        for c in range(3):
            (slope,) = torch.autograd.grad(logits[0, c], h, retain_graph=True)
            rows.append((slope * h)[0].detach())
        found[name] = (h[0].detach().numpy(), torch.stack(rows, dim=1).numpy())
    return found, logits[0].detach().numpy()


def test_contributions_and_features(grey):
    model = runs.model()
    classifier = ImageClassifier(grey, model)
    image = runs.pixels()[4]
    found = classifier.classify(image)
    x = torch.from_numpy(runs.grey().inputs(slice(4, 5)))
    expected, logits = by_hand(model, x)
    assert found.logits == pytest.approx(logits, abs=1e-5)
    assert found.probabilities == pytest.approx(torch.tensor(logits).softmax(0).numpy(), abs=1e-5)
    assert found.predicted == logits.argmax()
    frame = found.neurons
    reads = {"first": x.flatten(1).numpy()[0], "second": expected["first"][0]}
    for site in ("first", "second"):
        activations, added = expected[site]
        mine = (frame["site"] == site).to_numpy()
        assert frame["neuron"][mine].tolist() == np.flatnonzero(activations > 0).tolist()
        assert frame["activation"][mine].to_numpy() == pytest.approx(
            activations[activations > 0], rel=1e-4
        )
        assert found.contributions[mine] == pytest.approx(added[activations > 0], abs=1e-5)
        for row in frame[mine].itertuples():
            neuron = grey.neuron(site, row.neuron)
            assert row.share == pytest.approx(row.activation / neuron.row["max_activation"])
            assert row.feature == neuron.assign(reads[site][None])[0]
            if row.feature < 0:
                assert (row.label, row.n_examples) == ("", 0)
                continue
            feature = neuron.features[row.feature]
            [(name, n), *_] = feature.label_counts().items()
            assert row.n_examples == feature.n_examples
            assert row.label.endswith(f"({n} of {feature.n_examples})")
            if list(feature.label_counts().values()).count(n) == 1:
                assert row.label.startswith(name)
    # After the second layer all is linear: its contributions are what the logits are made of.
    second = found.contributions[(frame["site"] == "second").to_numpy()].sum(axis=0)
    assert second + model.last.bias.detach().numpy() == pytest.approx(found.logits, abs=1e-5)


def test_the_important_neurons(grey):
    found = ImageClassifier(grey, runs.model()).classify(runs.pixels()[7])
    size = np.abs(found.contributions)
    for k in (1, 3):
        wanted = {int(row) for c in range(3) for row in np.argsort(-size[:, c])[:k]}
        rows = found.important(k)
        assert set(rows.tolist()) == wanted
        assert (np.diff(size[rows, found.predicted]) <= 0).all()


def test_the_explorer_gets_json(grey):
    classify = live_classify(runs.model())
    number = int(grey.folder.inputs["index"][3])
    found = classify(grey, index=number)
    assert json.loads(json.dumps(found)) == found
    assert found["label"] == runs.LABELS[number]
    stored = runs.pixels()[number]
    assert found["pixels"] == pytest.approx(stored.ravel() / 255, abs=1e-4)
    drawn = classify(grey, pixels=found["pixels"])
    assert drawn["label"] is None
    assert drawn["logits"] == pytest.approx(found["logits"], abs=1e-5)
    assert drawn["neurons"][0]["neuron"] == found["neurons"][0]["neuron"]
    exact = ImageClassifier(grey, runs.model()).classify(stored)
    for total in found["totals"]:
        mine = (exact.neurons["site"] == grey.sites[total["site"]]).to_numpy()
        assert total["active"] == mine.sum()
        assert total["contributions"] == pytest.approx(
            exact.contributions[mine].sum(axis=0), abs=1e-5
        )
    assert found["method"].startswith("A contribution is the neuron's activation times")


def test_channels_and_patches(tmp_path):
    run = runs.analyse_rgb(tmp_path / "run")
    model = small.make(small.ConvNet)
    found = ImageClassifier(run, model).classify(small.rgb_inputs()[2])
    x = torch.from_numpy(runs.rgb().inputs(slice(2, 3)))
    with torch.no_grad():
        conv = torch.relu(model.conv(x))
        best, at = torch.relu(model.grouped(conv)).flatten(2).max(dim=2)
        assert found.logits == pytest.approx(model(x)[0].numpy(), abs=1e-5)
    mine = found.neurons[found.neurons["site"] == "grouped"].set_index("neuron")
    assert mine["activation"].to_numpy() == pytest.approx(best[0][best[0] > 0].numpy(), rel=1e-4)
    reads = nn.functional.unfold(conv, 3, stride=2)[0].T.unflatten(1, (2, -1))
    for number, row in mine.iterrows():
        patch = reads[at[0, number], number * 2 // 6].numpy()
        assert row["feature"] == run.neuron("grouped", number).assign(patch[None])[0]
    rows = (found.neurons["site"] == "grouped").to_numpy()
    added = found.contributions[rows].sum(axis=0) + model.last.bias.detach().numpy()
    assert added == pytest.approx(found.logits, abs=1e-4)
    # Pixels come with their channels last.
    classify = live_classify(model)
    shown = classify(run, index=int(run.folder.inputs["index"][0]))
    first = small.rgb_inputs()[run.folder.inputs["index"][0]]
    assert shown["pixels"] == pytest.approx(np.moveaxis(first, 0, -1).ravel() / 255, abs=1e-4)
    again = classify(run, pixels=shown["pixels"])
    assert again["logits"] == pytest.approx(shown["logits"], abs=1e-4)


def test_many_classes(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 5), nn.ReLU(), nn.Linear(5, 40)).eval()
    run = ps.analyse(
        model, small.flat_inputs(), sites="0", out=tmp_path / "run", panels=False, progress=False
    )
    found = ImageClassifier(run, model).classify(small.flat_inputs()[0])
    known = np.isfinite(found.contributions)
    assert (known == known[0]).all()
    assert known[0].sum() == MAX_CLASSES
    assert set(np.flatnonzero(known[0])) == set(np.argsort(-found.logits)[:MAX_CLASSES])
    assert len(found.important(2))


def test_classify_rejects_invalid_input(grey, tmp_path):
    model = runs.model()
    classifier, classify = ImageClassifier(grey, model), live_classify(model)
    with pytest.raises(
        InputError, match=r"^The input has shape \(4, 5\) and dtype uint8; expected nu"
    ):
        classifier.classify(np.zeros((4, 5), np.uint8))
    with pytest.raises(
        InputError, match=r"^The input holds NaN or infinite values; expected finite"
    ):
        classifier.classify(np.full((5, 4), np.nan, np.float32))
    with pytest.raises(InputError, match=r"^The run does not hold input 1000000: it keeps the \d+"):
        classify(grey, index=1_000_000)
    with pytest.raises(InputError, match=r"^index is -1; the number of an input, from 0, is exp"):
        classify(grey, index=-1)
    with pytest.raises(InputError, match=r"^Give either pixels or index"):
        classify(grey)
    for pixels in ([0.0] * 19, ["x"] * 20, {"a": 1}, 5):
        with pytest.raises(InputError, match=r"^pixels are \d+ values; 20 numbers from 0 to 1 are"):
            classify(grey, pixels=pixels)
    for bad in (2.0, float("nan"), -0.5):
        said = rf"^pixels hold {bad} at place 19; 20 numbers from 0 to 1 are expected, those of"
        with pytest.raises(InputError, match=said):
            classify(grey, pixels=[0.5] * 19 + [bad])
    other = runs.model()
    with torch.no_grad():
        other.first.weight.mul_(-1)
    with pytest.raises(
        InputError, match=r"has different weights in the model and in the run; give th"
    ):
        ImageClassifier(grey, other).classify(runs.pixels()[0])
    with pytest.raises(
        InputError, match=r"^The model is not the one of the run, which was a OnPix"
    ):
        ImageClassifier(grey, nn.Linear(20, 3))
    headless = nn.Sequential()
    headless.add_module("first", nn.Linear(20, 10))
    flat = ps.analyse(
        headless,
        np.zeros((4, 20), np.float32) + 1,
        sites="first",
        out=tmp_path / "flat",
        panels=False,
        progress=False,
    )
    with pytest.raises(
        InputError, match=r"^The run's inputs are not images; analyse with image_sha"
    ):
        live_classify(headless)(flat, pixels=[0.0] * 20)
