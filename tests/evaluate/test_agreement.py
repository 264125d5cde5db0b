"""Features against what is known of the examples: each number again, pair by pair."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import polyseme as ps
from polyseme import cli
from polyseme.errors import InputError
from polyseme.evaluate.agreement import agreement

from .models import Classifier, data


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> ps.Run:
    torch.manual_seed(3)
    x, y = data(120)
    return ps.analyse(
        Classifier(),
        (x.numpy(), y.numpy()),
        sites="hidden",
        out=tmp_path_factory.mktemp("runs") / "run",
        select=ps.TopK(14),
        progress=False,
    )


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return 1 - float(a @ b) / float(np.linalg.norm(a) * np.linalg.norm(b))


def test_every_number_equals_its_definition_pair_by_pair(run: ps.Run) -> None:
    found = agreement(run, thresholds=[0.1, 0.4], n_neurons=2, seed=1)
    assert found["threshold"].tolist() == [0.1, 0.4, 0.1, 0.4]
    assert found["space"].tolist() == ["neuron", "neuron", "pre-neuron", "pre-neuron"]
    assert found["neurons"].tolist() == [2] * 4
    live = run.neurons().query("n_examples >= 10")["neuron"].to_numpy()
    chosen = np.sort(np.random.default_rng(1).choice(live, 2, replace=False))
    arrays = run.folder.site(0)
    for _, row in found.iterrows():
        expected: dict[str, list[float]] = {}
        for number in chosen:
            neuron = run.neuron("hidden", int(number))
            rows = neuron.embeddings if row["space"] == "neuron" else neuron.vectors
            labels = ps.cluster(rows, row["threshold"]).labels
            classes = neuron.examples["label"].to_numpy()
            counts = {(s, t): 0 for s in (True, False) for t in (True, False)}
            for i, j in combinations(range(len(labels)), 2):
                counts[bool(classes[i] == classes[j]), bool(labels[i] == labels[j])] += 1
            tt, tf, ft, ff = (
                counts[key] for key in [(True, True), (True, False), (False, True), (False, False)]
            )
            # Hubert and Arabie, from the sums over pairs.
            total, joined, equal = tt + tf + ft + ff, tt + ft, tt + tf
            chance = joined * equal / total
            drawn = arrays["background"][0]
            drawn = drawn * arrays["weights"][number] if row["space"] == "neuron" else drawn
            near = [cosine(a, b) < row["threshold"] for a, b in combinations(drawn, 2)]
            sizes = np.bincount(labels)
            for name, value in {
                "features": len(sizes),
                "repeated": (sizes > 1).sum(),
                "largest": sizes.max() / len(labels),
                "same_together": tt / (tt + tf),
                "others_together": ft / (ft + ff),
                "rand_index": (tt - chance) / ((joined + equal) / 2 - chance),
                "random_near": np.mean(near),
            }.items():
                expected.setdefault(name, []).append(float(value))
        for name, values in expected.items():
            assert row[name] == pytest.approx(np.mean(values), abs=2e-4), name


def test_agreement_rejects_invalid_input(run: ps.Run, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"n_neurons is 0; a whole number of at least 1"):
        agreement(run, n_neurons=0)
    with pytest.raises(InputError, match=r"seed is -1; a whole number of at least 0"):
        agreement(run, seed=-1)
    with pytest.raises(InputError, match="thresholds is empty"):
        agreement(run, thresholds=[])
    x, _ = data(40)
    options = {"sites": "0", "progress": False}
    model = nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 3))
    unlabelled = ps.analyse(model, x.numpy(), out=tmp_path / "unlabelled", **options)
    with pytest.raises(InputError, match="no labels to compare features with"):
        agreement(unlabelled)
    few = ps.analyse(model, x[:5].numpy(), out=tmp_path / "few", **options)
    with pytest.raises(InputError, match="No neuron of the run has the 10 examples"):
        agreement(few)


def test_the_command_prints_the_means_and_writes_the_table(
    run: ps.Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "table.csv"
    assert (
        cli.main(["benchmark", "features", str(run.path), "--neurons", "2", "--csv", str(file)])
        == 0
    )
    printed = capsys.readouterr().out
    assert "Means over 1 site, 2 neurons" in printed
    frame = agreement(run, n_neurons=2)
    assert len(file.read_text().splitlines()) == len(frame) + 1
    for row in frame.itertuples():
        assert f"{row.rand_index:.3f}" in printed
    assert cli.main(["benchmark", "features", str(run.path), "--site", "hiden"]) == 1
    assert "hidden" in capsys.readouterr().err
