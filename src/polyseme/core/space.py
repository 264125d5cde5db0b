"""The space in which meanings are told apart, by the statistics of what a site reads."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from polyseme.core.arrays import Floats, as_floats
from polyseme.core.distances import unit_rows
from polyseme.errors import InputError

#: Exponent of the covariance: 0 leaves the input as it is, ½ whitens it.
WHITENING = 0.25
#: Vectors per dimension of the input that its covariance takes: with fewer, counts of meanings of
#: planted neurons were further off.
ENOUGH = 3
# Share of the mean variance that is mixed into every direction, so that directions in which the
# input hardly varies are not blown up.
_RIDGE = 0.01


@dataclass(frozen=True)
class Space:
    """The space in which meanings are told apart: inputs centred and partly whitened.

    Attributes
    ----------
    mean : ndarray of float32, shape (d,)
        Of the site's input.
    matrix : ndarray of float32, shape (d, d)
        A power of its covariance, symmetric: ``(0.99 Σ + 0.01 tr(Σ)/d)^-¼``.
    """

    mean: NDArray[np.float32]
    matrix: NDArray[np.float32]

    @classmethod
    def of(cls, mean: Any, covariance: Any = None) -> Space:
        """The space of a site whose input has this mean (d,) and covariance (d, d).

        Without a covariance the input is centred alone.

        Raises
        ------
        InputError
            If the shapes do not fit, or the covariance is not symmetric and positive.
        """
        centre = as_floats(mean, "mean", 1, np.float64)
        d = len(centre)
        if covariance is None:
            return cls(centre.astype(np.float32), np.eye(d, dtype=np.float32))
        sigma = as_floats(covariance, "covariance", 2, np.float64)
        if sigma.shape != (d, d):
            raise InputError(
                f"covariance has shape {sigma.shape} and mean has shape {centre.shape}; "
                f"({d}, {d}) is expected."
            )
        variances, axes = np.linalg.eigh((sigma + sigma.T) / 2)
        scale = float(variances.sum()) / max(d, 1)
        # As little as is lost in subtracting the squared mean says nothing.
        rounding = 1e-12 * float(centre @ centre)
        slack = 1e-3 * abs(scale) + rounding
        if d and (abs(sigma - sigma.T).max() > slack or variances[0] < -slack):
            raise InputError(
                "covariance is not symmetric and positive semi-definite; give numpy.cov(inputs.T) "
                "or the like."
            )
        if scale <= rounding:
            return cls(centre.astype(np.float32), np.eye(d, dtype=np.float32))
        mixed = (1 - _RIDGE) * np.maximum(variances, 0) / scale + _RIDGE
        power = (axes * mixed**-WHITENING) @ axes.T
        return cls(centre.astype(np.float32), power.astype(np.float32))

    def inputs(self, h: Floats) -> NDArray[np.float32]:
        """Unit vectors of input vectors: (..., d) to (..., d)."""
        return unit_rows((np.asarray(h, np.float32) - self.mean) @ self.matrix)

    def directions(self, gradients: Floats) -> NDArray[np.float32]:
        """Unit directions along which neurons read, by their gradients ∂a/∂h: (..., d)."""
        # Inner products with inputs stay what they are, so what inputs are divided by these
        # are multiplied by.
        return unit_rows(np.asarray(gradients, np.float32) @ self._inverse)

    @cached_property
    def _inverse(self) -> NDArray[np.float32]:
        return np.linalg.inv(self.matrix.astype(np.float64)).astype(np.float32)
