"""Cosine distances, and the rule for vectors that have no direction."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from polyseme.core.arrays import Floats, as_floats


def unit_rows(vectors: Floats) -> Floats:
    """Rows scaled to length 1; a zero row stays zero. Shape (..., n, d); the dtype is kept."""
    # Scaling by the largest entry first keeps the squares of tiny and huge values in range.
    peak = np.abs(vectors).max(axis=-1, keepdims=True, initial=0)
    scaled = vectors / np.where(peak > 0, peak, 1)
    norms = np.sqrt(np.einsum("...d,...d->...", scaled, scaled))[..., None]
    return np.asarray(scaled / np.where(norms > 0, norms, 1), dtype=vectors.dtype)


def cosine_matrices(
    vectors: Floats, used: NDArray[np.bool_], neurons: NDArray[np.int64] | None = None
) -> Floats:
    """Cosines between the rows of each matrix of a stack.

    Parameters
    ----------
    vectors : ndarray of float32 or float64, shape (m, n, d)
    used : ndarray of bool, shape (m, n)
        Rows that count; all others must be zeros.
    neurons : ndarray of int64, shape (m,), optional
        Numbers of the matrices, for error messages.

    Returns
    -------
    ndarray, shape (m, n, n)
        In the dtype of ``vectors``, or in float64 if some vectors are too small or too large for
        it. The cosine of a zero row with every row, itself included, is 0.

    Raises
    ------
    InputError
        If a value is not finite.
    """
    # Overflows are recomputed below.
    with np.errstate(over="ignore", invalid="ignore"):
        cosines = np.matmul(vectors, vectors.transpose(0, 2, 1))
    squares = np.einsum("gii->gi", cosines)
    low, high = (1e-28, 1e36) if cosines.dtype == np.float32 else (1e-290, 1e300)
    if not ((squares > low) & (squares < high) | ~used).all():
        # Values that are not finite are detected only here: checking every value first would
        # cost as much as all the trees.
        for number, (rows, those) in enumerate(zip(vectors, used, strict=True)):
            if not np.isfinite(rows).all():
                as_floats(
                    rows[those], f"embeddings[{number if neurons is None else neurons[number]}]", 2
                )
        unit = unit_rows(vectors.astype(np.float64))
        cosines = np.matmul(unit, unit.transpose(0, 2, 1))
        squares = np.einsum("gii->gi", cosines)
    inverse = np.divide(1, np.sqrt(squares), out=np.zeros_like(squares), where=squares > 0)
    cosines *= inverse[:, :, None]
    cosines *= inverse[:, None, :]
    return np.asarray(cosines)


def cosine_distances(vectors: Any) -> Floats:
    """Pairwise cosine distances ``1 - cos`` between rows.

    A zero vector has no direction: its distance to every other vector, zero or not, is 1.

    Parameters
    ----------
    vectors : array or tensor, shape (n, d)

    Returns
    -------
    ndarray of float64, shape (n, n)
        Symmetric, in [0, 2], with a diagonal of 0.
    """
    unit = unit_rows(as_floats(vectors, "vectors", 2, np.float64))
    distances = np.clip(1 - unit @ unit.T, 0, 2)
    np.fill_diagonal(distances, 0)
    return distances
