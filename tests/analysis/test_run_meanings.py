"""The meanings that a run holds are those of the definition, on what the model really reads."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import polyseme as ps
from polyseme.errors import InputError


def planted_images(n: int = 600) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Images of noise, a third with each of two patterns, and both patterns."""
    rng = np.random.default_rng(0)
    patterns = np.linalg.qr(rng.standard_normal((36, 2)))[0].T
    truth = rng.integers(0, 3, n)
    images = rng.standard_normal((n, 36))
    for number in range(2):
        images[truth == number] += 6 * patterns[number]
    return images.astype(np.float32).reshape(n, 6, 6), truth, patterns


class TwoPatterns(nn.Module):
    """Neuron 0 reads both patterns, 1 the first alone, the others anything."""

    def __init__(self, patterns: np.ndarray) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.hidden, self.out = nn.Linear(36, 5), nn.Linear(5, 2)
        with torch.no_grad():
            self.hidden.weight[0] = torch.from_numpy(patterns.sum(axis=0)).float()
            self.hidden.weight[1] = torch.from_numpy(patterns[0]).float()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(torch.relu(self.hidden(x.flatten(1))))


@pytest.fixture(scope="module")
def analysed(tmp_path_factory: pytest.TempPathFactory):
    images, truth, patterns = planted_images()
    model = TwoPatterns(patterns)
    out = tmp_path_factory.mktemp("meanings") / "run"
    run = ps.analyse(model, images, sites="hidden", out=out, progress=False, batch_size=64)
    return run, model, images.reshape(len(images), -1), truth


def test_they_are_those_of_all_that_the_site_reads(analysed) -> None:
    run, model, h, _ = analysed
    covariance = np.cov(h.T.astype(float), bias=True)
    weights = model.hidden.weight.detach().numpy()
    table = run.neurons()
    for number in range(5):
        neuron = run.neuron("hidden", number)
        rows = h[neuron.examples["input"]]
        found = ps.meanings(rows, mean=h.mean(0), covariance=covariance, direction=weights[number])
        assert neuron.examples["meaning"].tolist() == found.labels.tolist()
        row = table.iloc[number]
        assert row["n_meanings"] == found.number == neuron.meanings.number
        assert row["effective_meanings"] == pytest.approx(found.effective_number)
        assert row["separation"] == pytest.approx(found.separation, abs=1e-3)
        assert neuron.meanings.stability == pytest.approx(found.stability, abs=0.05)
        assert neuron.meanings.verdict == found.verdict


def test_planted_meanings_are_found_and_told_apart(analysed) -> None:
    run, _, _, truth = analysed
    both = run.neuron("hidden", 0)
    assert both.meanings.number == 2
    assert both.meanings.verdict == "several"
    for meaning in both.meanings:
        assert np.bincount(truth[meaning.examples["input"]]).max() > 0.95 * meaning.n_examples
        assert sum(meaning.features.values()) == meaning.n_examples
        assert meaning.examples["example"].isin([meaning.medoid]).any()
    assert sum(meaning.share for meaning in both.meanings) == pytest.approx(1)
    assert run.neuron("hidden", 1).meanings.number == 1


def test_new_inputs_are_assigned(analysed) -> None:
    run, _, h, truth = analysed
    neuron = run.neuron("hidden", 0)
    names = [truth[m.examples["input"].iloc[0]] for m in neuron.meanings]
    assigned = neuron.assign_meaning(h[truth < 2])
    known = assigned >= 0
    assert known.mean() > 0.8
    assert (np.array(names)[assigned[known]] == truth[truth < 2][known]).mean() > 0.97
    # What has neither pattern is of no meaning.
    assert (neuron.assign_meaning(h[truth == 2]) == -1).mean() > 0.8
    with pytest.raises(InputError, match=r"h has shape \(3,\)"):
        neuron.assign_meaning(np.zeros(3))


@pytest.mark.parametrize("batch_size", [1, 7, 600])
def test_batching_changes_nothing(analysed, tmp_path: Path, batch_size: int) -> None:
    run, model, h, _ = analysed
    images = h.reshape(-1, 6, 6)
    again = ps.analyse(
        model, images, sites="hidden", out=tmp_path / "run", progress=False, batch_size=batch_size
    )
    assert again.neurons()["n_meanings"].tolist() == run.neurons()["n_meanings"].tolist()
    np.testing.assert_allclose(
        again.folder.site(0)["space_matrix"], run.folder.site(0)["space_matrix"], atol=1e-4
    )


class TwoGroups(nn.Module):
    """A convolution of two groups, each with two neurons of its own channel."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(2, 4, 3, groups=2)
        self.out = nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(torch.relu(self.conv(x)).mean(dim=(2, 3)))


def test_each_group_of_a_convolution_has_statistics_of_its_own(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    images = rng.standard_normal((400, 2, 8, 8)).astype(np.float32)
    images[:, 1] = 5 + 3 * images[:, 1]
    run = ps.analyse(TwoGroups(), images, sites="conv", out=tmp_path / "run", progress=False)
    mean, matrix = (run.folder.site(0)[f"space_{name}"] for name in ("mean", "matrix"))
    assert mean.shape == (2, 9)
    assert matrix.shape == (2, 9, 9)
    assert abs(mean[0]).max() < 0.2
    assert abs(mean[1] - 5).max() < 0.6
    for number in range(4):
        neuron = run.neuron("conv", number)
        assert (neuron.assign_meaning(neuron.vectors) == neuron.examples["meaning"]).mean() > 0.6
        near = neuron.meaning_cosines(neuron.vectors)
        cosines = neuron.meanings.groups.cosines
        for meaning in neuron.meanings:
            truth = cosines[:, meaning.examples["example"]].mean(axis=1)
            np.testing.assert_allclose(near[:, meaning.number], truth, atol=1e-6)


def test_a_site_with_too_little_data_is_named(tmp_path: Path, capsys) -> None:
    images, _, patterns = planted_images(60)
    model = TwoPatterns(patterns)
    ps.analyse(model, images, sites="hidden", out=tmp_path / "run", progress=True)
    shown = " ".join("".join(capsys.readouterr()).split())
    assert "its statistics come from 60 vectors of 36 values" in shown
    assert "reliable from about 108 vectors. Give more inputs." in shown


@pytest.mark.parametrize("value", [0.0, 1e4])
def test_inputs_that_never_vary_have_no_groups(tmp_path: Path, value: float) -> None:
    _, _, patterns = planted_images(10)
    model = TwoPatterns(patterns)
    images = np.full((60, 6, 6), value, np.float32)
    run = ps.analyse(model, images, sites="hidden", out=tmp_path / "run", progress=False)
    np.testing.assert_array_equal(run.folder.site(0)["space_matrix"][0], np.eye(36))
    table = run.neurons()
    assert set(table.loc[table["n_examples"] > 0, "n_meanings"]) <= {1}
