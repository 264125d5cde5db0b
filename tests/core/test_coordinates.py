"""Principal coordinates of a neuron's examples, against a singular value decomposition."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from polyseme.core import principal_coordinates
from polyseme.core.distances import cosine_matrices
from polyseme.errors import InputError
from reference import oracles


def grouped(seed: int, n: int, d: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.normal(size=(n, d)) + 2 * rng.normal(size=(3, d))[rng.integers(0, 3, n)]


@given(st.integers(0, 10_000), st.integers(1, 30), st.integers(1, 12))
@settings(max_examples=40, deadline=None)
def test_coordinates_show_as_much_as_the_best_plane(seed: int, n: int, d: int) -> None:
    rows = grouped(seed, n, d)
    best, shown = oracles.principal_coordinates(rows)
    found = principal_coordinates(rows[None])[0].astype(float)
    assert found.shape == (n, 2)
    assert (found**2).sum() == pytest.approx(shown[:2].sum(), abs=2e-3)
    gaps = shown[:2] - shown[1:3]
    for axis in range(2):
        # An axis is a matter of rounding unless it shows clearly more than the next.
        if gaps[: axis + 1].min() > 0.2 * shown[0]:
            sign = np.sign(found[:, axis] @ best[:, axis])
            np.testing.assert_allclose(found[:, axis], sign * best[:, axis], atol=0.02)


def test_distances_are_kept_where_a_plane_can() -> None:
    angles = np.array([0.1, 0.2, 1.3, 1.4, 2.0])
    rows = np.stack([np.cos(angles), np.sin(angles)], axis=1) * [[3], [1], [0.1], [1], [2]]
    found = principal_coordinates(rows[None])[0]
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    for i in range(5):
        for j in range(5):
            cosine = unit[i] @ unit[j]
            square = ((found[i] - found[j]) ** 2).sum()
            assert square == pytest.approx(2 * (1 - cosine), abs=1e-4)


def test_many_neurons_and_one_give_the_same() -> None:
    counts = [7, 0, 1, 2, 12, 5]
    padded = np.random.default_rng(0).normal(size=(6, 12, 9)).astype(np.float32)
    found = principal_coordinates(padded, counts)
    assert found.dtype == np.float32
    for neuron, n in enumerate(counts):
        alone = principal_coordinates(padded[neuron : neuron + 1, :n])[0]
        np.testing.assert_allclose(found[neuron, :n], alone, atol=2e-3)
        assert (found[neuron, n:] == 0).all()
    assert (found == principal_coordinates(padded, counts)).all()
    used = np.arange(12) < np.array(counts)[:, None]
    rows = np.where(used[:, :, None], padded, 0)
    cosines = cosine_matrices(rows, used)
    assert (found == principal_coordinates(rows, counts, cosines=cosines)).all()


def test_signs_do_not_depend_on_chance() -> None:
    rows = grouped(1, 20, 6)
    found = principal_coordinates(rows[None])[0]
    for axis in range(2):
        assert found[np.abs(found[:, axis]).argmax(), axis] > 0
    # Two examples are equally far out; the first is on the positive side.
    pair = principal_coordinates(np.array([[[1.0, 0], [0, 1]]]))[0]
    np.testing.assert_allclose(pair, [[np.sqrt(0.5), 0], [-np.sqrt(0.5), 0]], atol=1e-6)


def test_examples_that_do_not_differ_are_at_the_origin() -> None:
    for rows in (np.ones((4, 3)), np.zeros((4, 3)), np.empty((0, 3)), np.ones((1, 3))):
        assert (principal_coordinates(rows[None]) == 0).all()
    assert principal_coordinates(np.empty((0, 4, 3))).shape == (0, 4, 2)


def test_tiny_and_huge_vectors_count_like_others() -> None:
    rows = grouped(2, 9, 5).astype(np.float32)
    expected = principal_coordinates(rows[None])[0]
    scales = 10.0 ** np.array([[-30, 30, 0, 1, -1, 25, -25, 3, 0]]).T
    found = principal_coordinates((rows * scales).astype(np.float32)[None])[0]
    np.testing.assert_allclose(found, expected, atol=1e-3)


def test_bad_input_is_explained() -> None:
    rows = np.ones((2, 3, 4))
    with pytest.raises(InputError, match=r"counts is .*2 integers from 0 to 3 are expected"):
        principal_coordinates(rows, [4, 1])
    rows[1, 2, 0] = np.nan
    with pytest.raises(InputError, match="embeddings"):
        principal_coordinates(rows)
    principal_coordinates(rows, [3, 2])  # what is no example is not looked at
