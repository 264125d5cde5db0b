"""Cosine distances, and the rule for vectors that have no direction."""

from __future__ import annotations

from typing import Any

import numpy as np

from polyseme.core.arrays import Floats, as_floats


def unit_rows(vectors: Floats) -> Floats:
    """Rows scaled to length 1; a zero row stays zero. Shape (..., n, d), the dtype is kept."""
    # Scaling by the largest entry first keeps the squares of tiny and huge values in range.
    peak = np.abs(vectors).max(axis=-1, keepdims=True, initial=0)
    scaled = vectors / np.where(peak > 0, peak, 1)
    norms = np.sqrt(np.einsum("...d,...d->...", scaled, scaled))[..., None]
    return np.asarray(scaled / np.where(norms > 0, norms, 1), dtype=vectors.dtype)


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
