"""The space in which meanings are separated, from the statistics of a site's inputs."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from polyseme.core.arrays import Floats, as_floats
from polyseme.core.distances import unit_rows
from polyseme.errors import InputError

#: Exponent of the covariance: 0 leaves the input unchanged, ½ whitens it.
WHITENING = 0.25
#: Inputs needed per dimension to estimate the covariance: with fewer, counts of meanings of planted
#: neurons were less accurate.
ENOUGH = 3
# Share of the mean variance added to every direction, so that directions in which the input hardly
# varies are not amplified.
_RIDGE = 0.01


@dataclass(frozen=True)
class Space:
    """The space in which meanings are separated: inputs centred and partly whitened.

    Attributes
    ----------
    mean : ndarray of float32, shape (d,)
        Mean of the site's inputs.
    matrix : ndarray of float32, shape (d, d)
        Symmetric power of their covariance Σ: ``(0.99 Σ + 0.01 tr(Σ)/d)^-¼``.
    """

    mean: NDArray[np.float32]
    matrix: NDArray[np.float32]

    @classmethod
    def of(cls, mean: Any, covariance: Any = None) -> Space:
        """The space of a site whose inputs have this mean (d,) and covariance (d, d).

        Without a covariance, inputs are only centred.

        Raises
        ------
        InputError
            If the shapes do not match, or the covariance is not symmetric and positive
            semi-definite.
        """
        centre = as_floats(mean, "mean", 1, np.float64)
        d = len(centre)
        if covariance is None:
            return cls(centre.astype(np.float32), np.eye(d, dtype=np.float32))
        sigma = as_floats(covariance, "covariance", 2, np.float64)
        if sigma.shape != (d, d):
            raise InputError(
                f"covariance has shape {sigma.shape} and mean has shape {centre.shape}; expected a "
                f"covariance of shape ({d}, {d})."
            )
        variances, axes = np.linalg.eigh((sigma + sigma.T) / 2)
        scale = float(variances.sum()) / max(d, 1)
        # Variance below the rounding error of subtracting the squared mean is noise.
        rounding = 1e-12 * float(centre @ centre)
        slack = 1e-3 * abs(scale) + rounding
        if d and (abs(sigma - sigma.T).max() > slack or variances[0] < -slack):
            raise InputError(
                "covariance is not symmetric and positive semi-definite; give one such as "
                "numpy.cov(inputs.T)."
            )
        if scale <= rounding:
            return cls(centre.astype(np.float32), np.eye(d, dtype=np.float32))
        mixed = (1 - _RIDGE) * np.maximum(variances, 0) / scale + _RIDGE
        power = (axes * mixed**-WHITENING) @ axes.T
        return cls(centre.astype(np.float32), power.astype(np.float32))

    def inputs(self, h: Floats) -> NDArray[np.float32]:
        """Map input vectors to unit vectors in this space: (..., d) to (..., d)."""
        return unit_rows((np.asarray(h, np.float32) - self.mean) @ self.matrix)

    def directions(self, gradients: Floats) -> NDArray[np.float32]:
        """Map gradients ∂a/∂h to unit directions along which neurons read: (..., d)."""
        # To preserve inner products with inputs, directions get the inverse of the inputs' map.
        return unit_rows(np.asarray(gradients, np.float32) @ self._inverse)

    @cached_property
    def _inverse(self) -> NDArray[np.float32]:
        return np.linalg.inv(self.matrix.astype(np.float64)).astype(np.float32)
