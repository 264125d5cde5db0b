"""Layout of a neuron's examples: where each lies in the plane that shows them best."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from polyseme.core.arrays import Floats, as_floats
from polyseme.core.distances import cosine_matrices
from polyseme.core.parallel import in_threads
from polyseme.errors import InputError

# Neurons processed together: enough to hide call overhead.
_TOGETHER = 128
# Directions that the iteration follows: more than the two required, as it converges faster the
# smaller the first omitted eigenvalue is.
_FOLLOWED = 8
_MOST_STEPS, _SETTLED = 48, 1e-2


def principal_coordinates(
    embeddings: Any, counts: Any = None, *, cosines: Floats | None = None
) -> NDArray[np.float32]:
    """The two leading principal coordinates of each neuron's examples, by their directions.

    They are the first two principal components of the rows scaled to length 1: the plane that
    best preserves squared distances, which for unit vectors are twice the cosine distances. A
    zero row, which has no direction, counts as the origin.

    Parameters
    ----------
    embeddings : array or tensor, shape (n_neurons, n, d)
        Embeddings of the examples.
    counts : array of int, shape (n_neurons,), optional
        Number of examples of each neuron, its first ``counts[j]`` rows; by default n.
    cosines : ndarray, shape (n_neurons, n, n), optional
        Cosines between each neuron's embeddings, if already known; 0 beyond its examples.

    Returns
    -------
    ndarray of float32, shape (n_neurons, n, 2)
        Zero beyond a neuron's examples, and along axes in which they do not differ. The
        sign of each axis makes the first of the outermost examples positive.

    Raises
    ------
    InputError
        If a value is not finite, or the counts do not match the embeddings.

    Notes
    -----
    Computed by subspace iteration, until the residual of the axes is at most a hundredth of the
    first eigenvalue. If the second and third eigenvalues are nearly equal, which of their axes is
    returned is arbitrary, but the same input always gives the same layout.
    """
    values = as_floats(embeddings, "embeddings", 3, finite=False)
    n_neurons, n = values.shape[:2]
    sizes = np.full(n_neurons, n) if counts is None else np.asarray(counts, dtype=np.int64)
    if sizes.shape != (n_neurons,) or ((sizes < 0) | (sizes > n)).any():
        raise InputError(
            f"counts is {np.asarray(counts)!r}; {n_neurons} integers from 0 to {n} are "
            "expected, one for each neuron."
        )
    coordinates = np.zeros((n_neurons, n, 2), np.float32)

    def work(chunk: slice) -> None:
        used = np.arange(n) < sizes[chunk, None]
        if not used.any():
            return
        if cosines is None:
            rows = values[chunk] if used.all() else np.where(used[:, :, None], values[chunk], 0)
            gram = cosine_matrices(rows, used, np.arange(n_neurons)[chunk])
        else:
            gram = cosines[chunk].copy()
        coordinates[chunk] = _coordinates(gram, used)

    in_threads(work, [slice(start, start + _TOGETHER) for start in range(0, n_neurons, _TOGETHER)])
    return coordinates


def _coordinates(gram: Floats, used: NDArray[np.bool_]) -> Floats:
    """Coordinates of a few neurons, from the cosines between their examples."""
    # Centre: from products of rows to products of their differences from the mean.
    number = np.maximum(used.sum(axis=1), 1)[:, None].astype(gram.dtype)
    means = gram.sum(axis=2) / number
    means -= means.sum(axis=1, keepdims=True) / number / 2
    gram -= means[:, :, None]
    gram -= means[:, None, :]
    if not used.all():
        gram *= used[:, :, None] & used[:, None, :]
    return _signed(_leading(gram.astype(np.float32, copy=False)), used)


def _leading(gram: Floats) -> Floats:
    """Two leading eigenvectors of each matrix times the roots of their eigenvalues."""
    n_neurons, n = gram.shape[:2]
    k = min(_FOLLOWED, n)
    if k < 2:
        return np.zeros((n_neurons, n, 2), np.float32)
    start = np.random.default_rng(0).standard_normal((n, k))
    basis = np.broadcast_to(np.linalg.qr(start)[0].astype(np.float32), (n_neurons, n, k))
    coordinates = np.empty((n_neurons, n, 2), np.float32)
    pending = np.arange(n_neurons)
    # An orthogonalisation costs more than a product, so there are four products between two.
    square = np.matmul(gram, gram)
    for step in range(1, _MOST_STEPS + 1):
        basis, _ = np.linalg.qr(np.matmul(square, np.matmul(square, basis)))
        image = np.matmul(gram, basis)
        values, vectors = np.linalg.eigh(np.matmul(basis.transpose(0, 2, 1), image))
        values, vectors = values[:, None, :-3:-1], vectors[:, :, :-3:-1]
        plane = np.matmul(basis, vectors)
        beside = np.matmul(image, vectors) - plane * values
        settled = (beside**2).sum(axis=(1, 2)) <= (_SETTLED * values[:, 0, 0]) ** 2
        settled |= step == _MOST_STEPS
        plane *= np.sqrt(np.maximum(values, 0))
        coordinates[pending[settled]] = plane[settled]
        if settled.all():
            break
        pending, gram, square, basis = (array[~settled] for array in (pending, gram, square, basis))
    return coordinates


def _signed(plane: Floats, used: NDArray[np.bool_]) -> Floats:
    """Flip each axis so that the first of the outermost examples is positive."""
    size = np.abs(plane)
    largest = size.max(axis=1, keepdims=True)
    # An axis along which nothing differs holds only rounding errors.
    plane = np.where((largest > 1e-3) & used[:, :, None], plane, 0)
    # Rounding must not decide between examples that are equally far out.
    outermost = np.argmax(size >= largest * (1 - 1e-3), axis=1)
    sign = np.sign(np.take_along_axis(plane, outermost[:, None], axis=1))
    return plane * np.where(sign == 0, 1, sign)
