"""Centres and medoids of feature clusters, and assignment of new inputs to them."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from polyseme.core.arrays import Floats, as_floats, as_labels, check_threshold
from polyseme.core.distances import unit_rows
from polyseme.core.parallel import in_threads
from polyseme.errors import InputError

# Rows processed together: few enough for a core's cache.
_MEDOID_ROWS = 256
# More than the rounding error of a cosine in single precision.
_ROUNDING = 1e-5


def cluster_sums(unit: Floats, labels: NDArray[np.int64]) -> Floats:
    """Sum of the unit embeddings of each cluster, shape (n_clusters, d)."""
    n_clusters = int(labels.max(initial=-1)) + 1
    membership = (labels == np.arange(n_clusters)[:, None]).astype(unit.dtype)
    return np.asarray(membership @ unit)


def feature_centres(embeddings: Any, labels: Any) -> Floats:
    """Centre of each feature cluster: the direction of the mean of its unit embeddings.

    Parameters
    ----------
    embeddings : array or tensor, shape (n, d)
        Neuron embeddings of one neuron's examples.
    labels : array of int, shape (n,)
        Cluster of each example, numbered from 0.

    Returns
    -------
    ndarray, shape (n_clusters, d)
        Unit vectors; a zero vector where a cluster's embeddings cancel.
    """
    unit = unit_rows(as_floats(embeddings, "embeddings", 2))
    return unit_rows(cluster_sums(unit, as_labels(labels, len(unit))))


def medoids(embeddings: Any, labels: Any) -> NDArray[np.int64]:
    """Medoid of each feature cluster: the example nearest, on average, to all of its cluster.

    Ties go to the earlier example.

    Parameters
    ----------
    embeddings : array or tensor, shape (n, d)
        Neuron embeddings of one neuron's examples.
    labels : array of int, shape (n,)
        Cluster of each example, numbered from 0 without gaps.

    Returns
    -------
    ndarray of int64, shape (n_clusters,)
        Indices of examples.
    """
    values = as_floats(embeddings, "embeddings", 2, np.float64)
    return medoids_many(values[None], as_labels(labels, len(values))[None])


def medoids_many(
    embeddings: Floats, labels: NDArray[np.int64], *, cosines: Floats | None = None
) -> NDArray[np.int64]:
    """Medoids of many neurons' feature clusters, as `medoids` finds them.

    Parameters
    ----------
    embeddings : ndarray, shape (n_neurons, n, d)
    labels : ndarray of int64, shape (n_neurons, n)
        -1 beyond a neuron's number of examples.
    cosines : ndarray, shape (n_neurons, n, n), optional
        Cosines between each neuron's embeddings, if already known: they settle most medoids, and
        only the others are computed in double precision.

    Returns
    -------
    ndarray of int64, shape (n_features,)
        For each cluster of each neuron in turn, the number of its medoid among the neuron's
        examples.
    """
    n_neurons = len(labels)
    neuron, example = np.nonzero(labels >= 0)
    width = int(labels.max(initial=-1)) + 1
    feature, sizes = np.unique(neuron * width + labels[neuron, example], return_counts=True)
    offsets = np.searchsorted(feature, np.arange(n_neurons) * width)
    # Rows grouped by cluster, in the order of examples.
    cluster = offsets[neuron] + labels[neuron, example]
    order = np.argsort(cluster, kind="stable")
    neuron, example, cluster = neuron[order], example[order], cluster[order]
    starts = np.cumsum(sizes) - sizes
    central: NDArray[np.int64] = example[starts]
    # With one or two examples, the first is as central as any.
    pending = sizes > 2
    if cosines is not None and pending.any():
        same = (labels[:, :, None] == labels[:, None, :]).astype(cosines.dtype)
        # Without an example's similarity to itself, which is 0 for a zero vector.
        sums = np.einsum("gij,gij->gi", cosines, same) - np.einsum("gii->gi", cosines)
        rough = sums[neuron, example]
        near = np.repeat(np.maximum.reduceat(rough, starts) - _ROUNDING * sizes, sizes) < rough
        plain = pending & (np.add.reduceat(near, starts, dtype=np.int64) == 1)
        chosen = near & plain[cluster]
        central[cluster[chosen]] = example[chosen]
        pending &= ~plain
    chunks = _stretches(np.flatnonzero(pending), sizes, _MEDOID_ROWS)

    def work(clusters: NDArray[np.int64]) -> None:
        length = sizes[clusters]
        first = np.cumsum(length) - length
        rows = np.repeat(starts[clusters] - first, length) + np.arange(length.sum())
        unit = _unit(embeddings[neuron[rows], example[rows]])
        sums = np.add.reduceat(unit, first, axis=0)
        # The mean distance to the others falls as the similarity to their sum rises, so no
        # matrix of pairs is needed. An example's own similarity is 1, or 0 for a zero vector.
        similarity = np.einsum("nd,nd->n", unit, np.repeat(sums, length, axis=0))
        similarity -= np.einsum("nd,nd->n", unit, unit)
        # Rounding must not decide between examples that are equally central.
        similarity = np.round(similarity, 9)
        best = np.maximum.reduceat(similarity, first)
        places = np.where(similarity == np.repeat(best, length), np.arange(len(rows)), len(rows))
        central[clusters] = example[rows[np.minimum.reduceat(places, first)]]

    in_threads(work, chunks)
    return central


def _unit(rows: Floats) -> Floats:
    """Rows in float64, scaled to length 1; a zero row stays zero."""
    if rows.dtype != np.float32:
        return unit_rows(rows.astype(np.float64))
    # Squares of float32 values are well within the range of float64, so no rescaling is needed.
    wide = rows.astype(np.float64)
    norms = np.sqrt(np.einsum("nd,nd->n", wide, wide))
    wide /= np.where(norms > 0, norms, 1)[:, None]
    return wide


def _stretches(
    clusters: NDArray[np.int64], sizes: NDArray[np.int64], rows: int
) -> list[NDArray[np.int64]]:
    """Split clusters into stretches of about ``rows`` rows."""
    if not len(clusters):
        return []
    piece = np.cumsum(sizes[clusters]) // rows
    pieces: list[NDArray[np.int64]] = np.split(clusters, np.flatnonzero(np.diff(piece)) + 1)
    return pieces


def assign(embeddings: Any, centres: Any, threshold: float) -> NDArray[np.int64]:
    """Assign each new input to the feature with the nearest centre.

    An input belongs to the feature whose centre (see `feature_centres`) has the smallest
    cosine distance to the input's neuron embedding, if that distance is less than
    ``threshold``, the height at which the tree was cut; otherwise to none. Ties go to the
    lower feature number, which is the larger feature. A zero embedding is at distance 1
    from everything.

    Parameters
    ----------
    embeddings : array or tensor, shape (n, d)
        Neuron embeddings of the new inputs.
    centres : array or tensor, shape (n_clusters, d)
    threshold : float
        In (0, 2].

    Returns
    -------
    ndarray of int64, shape (n,)
        Feature numbers; -1 where no centre is nearer than the threshold.
    """
    limit = check_threshold(threshold)
    unit = unit_rows(as_floats(embeddings, "embeddings", 2, np.float64))
    targets = unit_rows(as_floats(centres, "centres", 2, np.float64))
    if not len(targets):
        return np.full(len(unit), -1, dtype=np.int64)
    if unit.shape[1] != targets.shape[1]:
        raise InputError(
            f"embeddings has shape {unit.shape} and centres has shape {targets.shape}; "
            "rows of equal length are expected."
        )
    distances = 1 - unit @ targets.T
    nearest = distances.argmin(axis=1)
    near = distances[np.arange(len(unit)), nearest] < limit
    return np.where(near, nearest, -1).astype(np.int64)
