"""The measures of the benchmark of meanings, each against another way to compute it."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pandas as pd
import pytest

import polyseme as ps
from polyseme.core.metrics import rand_index
from polyseme.evaluate.planted import Planted, Positions
from polyseme.evaluate.rivals import MEASURES, _cuts, dendrogram_purity, judge

metrics = pytest.importorskip("sklearn.metrics")


def groups(n: int = 60, d: int = 12) -> tuple[Positions, Planted]:
    rng = np.random.default_rng(0)
    truth = rng.integers(-1, 3, n)
    inputs = rng.normal(size=(400, d)).astype(np.float32)
    inputs[np.arange(n), truth] += 3 * (truth >= 0)
    return Positions(inputs, np.arange(400)), Planted(
        np.arange(n), truth, np.float32(np.arange(d) < 3)
    )


@pytest.mark.parametrize("seed", range(5))
def test_the_rand_index_is_that_of_scikit_learn(seed: int) -> None:
    rng = np.random.default_rng(seed)
    a, b = rng.integers(0, 4, 50), rng.integers(0, 1 + seed, 50)
    assert rand_index(a, b) == pytest.approx(metrics.adjusted_rand_score(a, b))


def leaves(tree: np.ndarray, node: int) -> list[int]:
    n = len(tree) + 1
    if node < n:
        return [node]
    return leaves(tree, int(tree[node - n, 0])) + leaves(tree, int(tree[node - n, 1]))


@pytest.mark.parametrize("seed", range(3))
def test_dendrogram_purity_pair_by_pair(seed: int) -> None:
    rng = np.random.default_rng(seed)
    truth = rng.integers(-1, 3, 30)
    tree = ps.cluster(rng.normal(size=(30, 5))).tree
    below = [set(leaves(tree, 30 + merge)) for merge in range(29)]
    shares = []
    for i, j in combinations(range(30), 2):
        if truth[i] >= 0 and truth[i] == truth[j]:
            smallest = min((s for s in below if {i, j} <= s), key=len)
            known = [k for k in smallest if truth[k] >= 0]
            shares.append(np.mean([truth[k] == truth[i] for k in known]))
    assert dendrogram_purity(tree, truth) == pytest.approx(np.mean(shares))


def test_the_cuts_are_all_of_them() -> None:
    c = ps.cluster(np.random.default_rng(0).normal(size=(20, 5)))
    cuts = list(_cuts(c.tree))
    assert [cut.max() + 1 for cut in cuts] == list(range(20, 0, -1))
    for height, cut in zip(c.tree[:, 2], cuts[1:], strict=True):
        assert rand_index(cut, c.cut(min(2, height + 1e-9)).labels) == 1


def test_every_measure_of_the_judge() -> None:
    positions, neuron = groups()
    known = neuron.truth >= 0
    frame = pd.DataFrame(judge(positions, [neuron])).set_index("method")
    h = positions.inputs[:60]
    found = ps.meanings(
        h, mean=positions.mean, covariance=positions.covariance, direction=neuron.gradient
    )
    ours = frame.loc["ours"]
    truth = neuron.truth[known]
    assert ours["ari"] == pytest.approx(metrics.adjusted_rand_score(truth, found.labels[known]))
    ami = metrics.adjusted_mutual_info_score(truth, found.labels[known])
    assert ours["ami"] == pytest.approx(ami)
    assert ours["verdict"] == found.verdict
    assert ours["score"] == pytest.approx(found.separation, abs=1e-5)
    sizes = np.bincount(found.labels[known])
    assert (ours["wanted"], ours["found"]) == (3, (sizes >= 5).sum())
    assert ours["error"] == abs(ours["found"] - 3)

    features = ps.cluster(h * neuron.gradient, 0.5)
    cut = frame.loc["h ⊙ w, cut at 0.5"]
    assert cut["ari"] == pytest.approx(metrics.adjusted_rand_score(truth, features.labels[known]))
    assert cut["best_cut"] == max(
        metrics.adjusted_rand_score(truth, features.cut(height).labels[known])
        for height in np.minimum(features.tree[:, 2] + 1e-9, 2)
    )
    unit = h / np.linalg.norm(h, axis=1, keepdims=True)
    pairs = list(combinations(np.flatnonzero(known), 2))
    same = [neuron.truth[i] == neuron.truth[j] for i, j in pairs]
    auroc = metrics.roc_auc_score(same, [unit[i] @ unit[j] for i, j in pairs])
    assert frame.loc["h, cut at 0.5", "auroc"] == pytest.approx(auroc, abs=1e-4)


def test_clear_groups_are_found_by_the_good_rivals_and_text_is_asked_where_it_is() -> None:
    positions, neuron = groups()
    positions.inputs[:60] *= np.float32(1) + 2 * (np.arange(12) < 3)
    asked = []

    def windows(at: np.ndarray) -> np.ndarray:
        asked.append(at)
        return np.eye(4)[neuron.truth + 1] + 0.01 * np.random.default_rng(0).normal(size=(60, 4))

    done: list[int] = []
    frame = pd.DataFrame(
        judge(
            positions,
            [neuron, neuron],
            windows=windows,
            n_windows=1,
            advance=lambda: done.append(1),
        )
    )
    assert len(asked) == 1
    assert len(done) == 2
    rows = frame[frame["neuron"] == 0].set_index("method")
    assert set(frame.loc[frame["neuron"] == 1, "method"]) == {
        method for method in rows.index if not method.startswith("text")
    }
    assert rows.loc["text, silhouette", "ari"] == 1
    assert rows.loc["text, 2-means", "found"] == 2
    assert rows["ari"].le(1).all()
    assert rows.loc["ours", "ari"] > 0.8


def test_one_meaning_leaves_measures_of_pairs_undefined() -> None:
    positions, neuron = groups()
    one = Planted(neuron.shown, np.zeros(60, np.int64), neuron.gradient)
    frame = pd.DataFrame(judge(positions, [one])).set_index("method")
    assert frame[list(MEASURES[3:])].isna().all(axis=None)
    assert set(frame["wanted"]) == {1}
    # Groups of fewer than five are none.
    assert frame.loc["h ⊙ w, cut at 0.05", "error"] == abs(
        frame.loc["h ⊙ w, cut at 0.05", "found"] - 1
    )
