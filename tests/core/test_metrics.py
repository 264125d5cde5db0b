"""Metrics over pairs, against sums over explicit pairs."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from polyseme.core import (
    Polysemanticity,
    cosine_distances,
    participation_ratio,
    polysemanticity,
)
from polyseme.errors import InputError
from reference import oracles

from .test_distances import some_vectors

SEEDS = st.integers(0, 10_000)


def some_labels(seed: int, n: int) -> np.ndarray:
    rng = np.random.default_rng(seed + 1)
    return rng.integers(0, rng.integers(1, 5), n)


@given(SEEDS, st.integers(0, 12), st.integers(1, 5))
@settings(max_examples=40)
def test_equals_the_oracle(seed: int, n: int, d: int) -> None:
    vectors, labels = some_vectors(seed, n, d), some_labels(seed, n)
    found = polysemanticity(vectors, labels)
    expected = oracles.metrics(vectors, labels.tolist())
    assert found.as_dict() == pytest.approx(expected, abs=1e-12, nan_ok=True)


def test_fields_are_named() -> None:
    found = polysemanticity([[1, 0], [0, 1], [1, 0]], [0, 1, 0])
    assert found == Polysemanticity(
        max_distance=1.0,
        mean_distance=pytest.approx(2 / 3),
        intra_cluster_distance=0.0,
        inter_cluster_distance=1.0,
        n_examples=3,
        n_clusters=2,
    )
    assert list(found.as_dict()) == [
        *("max_distance", "mean_distance", "intra_cluster_distance", "inter_cluster_distance"),
        *("n_examples", "n_clusters"),
    ]


@pytest.mark.parametrize(
    ("vectors", "labels", "nan"),
    [
        (np.empty((0, 2)), [], {"max", "mean", "intra", "inter"}),
        ([[1, 2]], [0], {"max", "mean", "intra", "inter"}),
        ([[1, 0], [0, 1]], [0, 1], {"intra"}),
        ([[1, 0], [0, 1]], [0, 0], {"inter"}),
        ([[1, 0], [0, 1], [1, 1]], [0, 0, 1], set()),
    ],
)
def test_not_a_number_where_there_is_no_pair(
    vectors: object, labels: list[int], nan: set[str]
) -> None:
    found = polysemanticity(vectors, np.array(labels, dtype=np.int64)).as_dict()
    missing = {name.split("_")[0] for name, value in found.items() if np.isnan(value)}
    assert missing == nan
    assert found["n_examples"] == len(labels)
    assert found["n_clusters"] == len(set(labels))


@given(SEEDS, st.integers(2, 12))
@settings(max_examples=25)
def test_neither_order_nor_length_nor_names_matter(seed: int, n: int) -> None:
    rng = np.random.default_rng(seed)
    vectors, labels = some_vectors(seed, n, 4), some_labels(seed, n)
    expected = polysemanticity(vectors, labels).as_dict()
    order = rng.permutation(n)
    lengths = 10.0 ** rng.integers(-20, 20, (n, 1))
    names = np.array([7, -3, 40, 0])[labels]
    turned = np.linalg.qr(rng.standard_normal((4, 4)))[0]
    for v, k in (
        (vectors[order], labels[order]),
        (vectors * lengths, labels),
        (vectors, names),
        (vectors @ turned, labels),
    ):
        assert polysemanticity(v, k).as_dict() == pytest.approx(expected, abs=1e-12, nan_ok=True)


@given(SEEDS, st.integers(2, 20))
@settings(max_examples=20)
def test_mean_distance_has_a_closed_form(seed: int, n: int) -> None:
    vectors = np.random.default_rng(seed).standard_normal((n, 5))
    total = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).sum(axis=0)
    closed = 1 - (total @ total - n) / (n * (n - 1))
    found = polysemanticity(vectors, np.zeros(n, int)).mean_distance
    assert found == pytest.approx(closed, abs=1e-13)
    assert found == pytest.approx(cosine_distances(vectors)[np.triu_indices(n, 1)].mean())


@given(SEEDS, st.integers(2, 12))
@settings(max_examples=25)
def test_the_mean_lies_between_its_parts(seed: int, n: int) -> None:
    found = polysemanticity(some_vectors(seed, n, 3), some_labels(seed, n))
    parts = [found.intra_cluster_distance, found.inter_cluster_distance]
    assert np.nanmin(parts) - 1e-12 <= found.mean_distance <= np.nanmax(parts) + 1e-12
    assert found.mean_distance <= found.max_distance + 1e-12


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (
            [0],
            r"labels has shape \(1,\) and dtype int64; expected one integer for each of the 2",
        ),
        ([0.0, 1.0], r"labels has shape \(2,\) and dtype float64; expected one integer for each"),
        (["a", "b"], r"dtype <U1; expected one integer for each of the 2 examples"),
    ],
)
def test_labels_that_do_not_fit(labels: list[object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        polysemanticity([[1, 0], [0, 1]], labels)


def test_embeddings_that_are_not_finite() -> None:
    with pytest.raises(InputError, match=r"embeddings holds nan at index \(0, 1\)"):
        polysemanticity([[1, np.nan], [0, 1]], [0, 1])


# --- participation ratio -------------------------------------------------------------------


@given(SEEDS, st.integers(1, 8), st.integers(-200, 200))
@settings(max_examples=30)
def test_participation_ratio_equals_the_oracle(seed: int, d: int, exponent: int) -> None:
    w = some_vectors(seed, 5, d)
    expected = [oracles.participation_ratio(row) for row in w]
    # Fourth powers of such weights are out of any range.
    found = participation_ratio(w * 10.0**exponent)
    np.testing.assert_allclose(found, expected, rtol=1e-9)
    np.testing.assert_allclose(participation_ratio(w.reshape(5, 1, d))[:, 0], expected, rtol=1e-9)


def test_participation_ratio_counts_inputs() -> None:
    assert participation_ratio([0, -3, 0, 0]) == 1
    assert participation_ratio([2, -2, 2, 2]) == 4
    assert participation_ratio(torch.tensor([[1.0, 1.0, 0.0, 0.0]])).tolist() == [2.0]
    assert np.isnan(participation_ratio([0.0, 0.0]))
