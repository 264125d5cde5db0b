"""Centres, medoids and the feature that a new input belongs to."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from polyseme.core import assign, cluster, feature_centres, medoids, medoids_many
from polyseme.core.distances import cosine_matrices
from polyseme.errors import InputError
from reference import oracles

from .test_distances import some_vectors

SEEDS = st.integers(0, 10_000)


def labelled(seed: int, n: int, d: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    _, labels = np.unique(rng.integers(0, 4, n), return_inverse=True)
    return some_vectors(seed, n, d), labels


@given(SEEDS, st.integers(1, 12), st.integers(1, 4))
@settings(max_examples=40)
def test_medoids_equal_the_oracle(seed: int, n: int, d: int) -> None:
    vectors, labels = labelled(seed, n, d)
    assert medoids(vectors, labels).tolist() == oracles.medoids(vectors, labels.tolist())


@given(SEEDS, st.lists(st.integers(0, 30), max_size=8))
@settings(max_examples=30)
def test_medoids_of_many_neurons_are_those_of_each(seed: int, counts: list[int]) -> None:
    width = max(counts, default=0)
    vectors = np.zeros((len(counts), width, 3), np.float32)
    labels = np.full((len(counts), width), -1)
    expected = []
    for neuron, n in enumerate(counts):
        own, numbers = labelled(seed + neuron, n, 3) if n else (np.empty((0, 3)), [])
        vectors[neuron, :n], labels[neuron, :n] = own, numbers
        expected += medoids(vectors[neuron, :n], labels[neuron, :n]).tolist()
    assert medoids_many(vectors, labels).tolist() == expected
    cosines = cosine_matrices(vectors, labels >= 0)
    assert medoids_many(vectors, labels, cosines=cosines).tolist() == expected


def test_medoid_ties_go_to_the_earlier_example() -> None:
    assert medoids([[1, 0], [0, 1]], [0, 0]).tolist() == [0]
    assert medoids([[0, 1], [5, 5], [1, 0], [1, 1]], [0, 0, 0, 0]).tolist() == [1]
    # Copies of one direction are all equally central, whatever rounding says.
    rng = np.random.default_rng(0)
    copies = rng.standard_normal(7) * rng.uniform(0.1, 9, (6, 1))
    assert medoids(copies, np.zeros(6, int)).tolist() == [0]


@given(SEEDS, st.integers(1, 12), st.integers(1, 4))
@settings(max_examples=40)
def test_centres_equal_the_oracle(seed: int, n: int, d: int) -> None:
    rng = np.random.default_rng(seed)
    vectors, (_, labels) = rng.standard_normal((n, d)), labelled(seed, n, d)
    expected = [oracles.feature_centre(vectors[labels == k]) for k in range(labels.max() + 1)]
    np.testing.assert_allclose(feature_centres(vectors, labels), expected, atol=1e-9)


def test_centres_give_every_example_one_voice() -> None:
    # A long embedding counts as much as a short one.
    found = feature_centres([[100.0, 0.0], [0.0, 0.1]], [0, 0])
    np.testing.assert_allclose(found, [[np.sqrt(0.5), np.sqrt(0.5)]])
    assert feature_centres([[1.0, 0.0], [-1.0, 0.0]], [0, 0]).tolist() == [[0, 0]]
    assert feature_centres(np.ones((2, 3), np.float32), [0, 1]).dtype == np.float32
    assert feature_centres(np.empty((0, 3)), np.empty(0, int)).shape == (0, 3)


@given(SEEDS, st.sampled_from([0.01, 0.3, 0.99, 1.5, 2.0]))
@settings(max_examples=40)
def test_assign_equals_the_oracle(seed: int, threshold: float) -> None:
    rng = np.random.default_rng(seed)
    vectors, centres = rng.standard_normal((8, 3)), rng.standard_normal((4, 3))
    vectors[0] = 0
    assert assign(vectors, centres, threshold).tolist() == oracles.assign(
        vectors, centres, threshold
    )


def test_assign_takes_the_lower_number_of_equal_distances() -> None:
    centres = [[0, 1], [1, 0], [1, 0]]
    assert assign([[1, 0], [1, 1], [0, 5]], centres, 0.5).tolist() == [1, 0, 0]


def test_assign_needs_less_than_the_threshold() -> None:
    assert assign([[1, 0]], [[0, 1]], 1.0).tolist() == [-1]
    assert assign([[1, 0]], [[0, 1]], 1.001).tolist() == [0]
    assert assign([[0, 0]], [[0, 1]], 0.999).tolist() == [-1]


def test_assign_to_no_centres() -> None:
    assert assign([[1, 0], [0, 1]], np.empty((0, 2)), 0.5).tolist() == [-1, -1]
    assert assign(np.empty((0, 2)), [[1, 0]], 0.5).tolist() == []


def test_far_apart_features_take_back_their_own_examples() -> None:
    rng = np.random.default_rng(0)
    vectors = np.repeat(np.eye(5), [6, 5, 4, 3, 2], axis=0)
    vectors = vectors + 0.02 * rng.standard_normal(vectors.shape)
    found = cluster(vectors, 0.2)
    assert found.n_clusters == 5
    centres = feature_centres(vectors, found.labels)
    assert np.array_equal(assign(vectors, centres, 0.2), found.labels)
    assert np.array_equal(found.labels[medoids(vectors, found.labels)], np.arange(5))


def test_says_what_is_wrong() -> None:
    with pytest.raises(
        InputError,
        match=r"embeddings has shape \(2, 3\) and centres has shape \(1, 2\); rows of equal",
    ):
        assign(np.ones((2, 3)), np.ones((1, 2)), 0.5)
    with pytest.raises(
        InputError, match="threshold is 0; expected a cosine distance greater than 0"
    ):
        assign(np.ones((2, 3)), np.ones((1, 3)), 0)
    with pytest.raises(
        InputError, match=r"labels has shape \(3,\) and dtype int64; expected one integer"
    ):
        medoids(np.ones((2, 3)), [0, 1, 1])
    with pytest.raises(InputError, match=r"centres holds nan at index \(0, 0\)"):
        assign(np.ones((2, 1)), [[np.nan]], 0.5)
