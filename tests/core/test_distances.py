"""Cosine distances, for vectors with a direction and without one."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from polyseme.core import cosine_distances
from polyseme.core.distances import cosine_matrices, unit_rows
from polyseme.errors import InputError
from reference import oracles


def some_vectors(seed: int, n: int, d: int) -> np.ndarray:
    """Vectors of very different lengths; among them zeros, copies and opposites."""
    rng = np.random.default_rng(seed)
    vectors = rng.standard_normal((n, d)) * 10.0 ** rng.integers(-3, 4, (n, 1))
    kind = rng.integers(0, 6, n)
    vectors[kind == 0] = 0
    vectors[kind == 1] = vectors[:1]
    vectors[kind == 2] = -vectors[:1]
    return vectors


@given(st.integers(0, 10_000), st.integers(0, 9), st.integers(1, 6))
@settings(max_examples=40)
def test_equals_the_oracle(seed: int, n: int, d: int) -> None:
    vectors = some_vectors(seed, n, d)
    found = cosine_distances(vectors)
    np.testing.assert_allclose(found, oracles.cosine_distances(vectors), atol=1e-14)
    assert np.array_equal(found, found.T)
    assert np.array_equal(found.diagonal(), np.zeros(n))
    assert ((found >= 0) & (found <= 2)).all()


@given(st.integers(0, 10_000), st.sampled_from([np.float32, np.float64]))
@settings(max_examples=40)
def test_cosines_of_many_equal_the_oracle(seed: int, dtype: type) -> None:
    vectors = np.stack([some_vectors(seed + j, 6, 4) for j in range(3)]).astype(dtype)
    used = np.arange(6) < np.array([6, 4, 0])[:, None]
    vectors[~used] = 0
    found = cosine_matrices(vectors, used)
    for cosines, rows in zip(found, vectors, strict=True):
        expected = 1 - oracles.cosine_distances(rows)
        np.fill_diagonal(expected, rows.any(axis=1))
        np.testing.assert_allclose(cosines, expected, atol=1e-6 if dtype == np.float32 else 1e-14)


@given(st.integers(0, 10_000), st.integers(-300, 300))
@settings(max_examples=25)
def test_lengths_do_not_matter(seed: int, exponent: int) -> None:
    vectors = np.random.default_rng(seed).standard_normal((5, 3))
    # Far beyond where squares overflow or vanish.
    scaled = vectors * 10.0**exponent
    np.testing.assert_allclose(
        cosine_distances(scaled), cosine_distances(vectors), atol=1e-13, rtol=0
    )


def test_known_angles() -> None:
    found = cosine_distances([[1, 0], [0, 3], [-2, 0], [0, 0], [0, 0]])
    expected = [
        [0, 1, 2, 1, 1],
        [1, 0, 1, 1, 1],
        [2, 1, 0, 1, 1],
        [1, 1, 1, 0, 1],
        [1, 1, 1, 1, 0],
    ]
    assert np.array_equal(found, expected)


def test_tensors_of_any_precision() -> None:
    vectors = torch.tensor([[1.0, 0.0], [1.0, 1.0]])
    expected = 1 - np.sqrt(0.5)
    for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
        found = cosine_distances(vectors.to(dtype).requires_grad_())
        assert found.dtype == np.float64
        assert found[0, 1] == pytest.approx(expected, abs=1e-15)


def test_unit_rows_keep_zero_rows_and_precision() -> None:
    rows = np.array([[3e30, 4e30], [0, 0], [3e-30, -4e-30]], dtype=np.float32)
    found = unit_rows(rows)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, [[0.6, 0.8], [0, 0], [0.6, -0.8]], rtol=1e-6)


def test_says_what_is_wrong() -> None:
    with pytest.raises(InputError, match=r"vectors has shape \(3,\); an array of 2 dimensions is"):
        cosine_distances([1.0, 2.0, 3.0])
    with pytest.raises(InputError, match=r"vectors holds inf at index \(1, 0\); every value must"):
        cosine_distances([[1.0, 2.0], [np.inf, 0.0]])
    with pytest.raises(InputError, match="vectors holds <U1 values; expected real numbers"):
        cosine_distances([["a", "b"]])


def test_large_finite_values_whose_sum_overflows_are_taken() -> None:
    found = cosine_distances(np.full((4, 4), 1.7e308))
    np.testing.assert_allclose(found, np.zeros((4, 4)), atol=1e-15)
