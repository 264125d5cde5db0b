"""Feature clusters: linkage trees over neuron embeddings, for one neuron or a whole site."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import fastcluster
import numpy as np
from numpy.typing import NDArray

from polyseme.core.arrays import Floats, as_floats, check_linkage, check_threshold
from polyseme.core.distances import cosine_matrices
from polyseme.core.metrics import Polysemanticity
from polyseme.core.parallel import in_threads
from polyseme.errors import InputError

# Pairs of examples per task: enough to hide call overhead, few enough that distances roughly fit in
# a core's cache.
_PAIRS = 250_000


@dataclass(frozen=True)
class Clustering:
    """Feature clusters of one neuron's examples, and the tree for cutting again."""

    labels: NDArray[np.int64]
    """(n,): the cluster of each example, numbered by size: 0 is the largest. Of equally large
    clusters, the one with the earliest example comes first."""
    tree: NDArray[np.float64]
    """(n - 1, 4): the whole tree, as a SciPy linkage matrix: the two nodes that merge, the distance
    between them, and the number of examples below."""
    threshold: float
    """Distance at which the tree was cut: merges at smaller distances were made."""
    linkage: str = "average"
    """How clusters merge: "average" (UPGMA) or "single"."""

    @property
    def n_clusters(self) -> int:
        """Number of clusters."""
        return int(self.labels.max(initial=-1)) + 1

    def cut(self, threshold: float) -> Clustering:
        """The clusters at another threshold in (0, 2], from the same tree."""
        limit = check_threshold(threshold)
        labels = cut_trees(self.tree[None], limit)[0] if len(self.labels) else self.labels
        return Clustering(labels, self.tree, limit, self.linkage)


@dataclass(frozen=True)
class Clusterings:
    """Feature clusters and metrics of many neurons, padded to the same number of examples.

    Attributes
    ----------
    labels : ndarray of int64, shape (n_neurons, n)
        Cluster of each example; -1 past a neuron's examples.
    trees : ndarray of float64, shape (n_neurons, n - 1, 4)
        As in `Clustering`; zero past a neuron's merges.
    n_examples, n_clusters : ndarray of int64, shape (n_neurons,)
    max_distance, mean_distance, intra_cluster_distance, inter_cluster_distance : ndarray
        float64, shape (n_neurons,); see `Polysemanticity`.
    threshold : float
    linkage : str
    """

    labels: NDArray[np.int64]
    trees: NDArray[np.float64]
    n_examples: NDArray[np.int64]
    n_clusters: NDArray[np.int64]
    max_distance: NDArray[np.float64]
    mean_distance: NDArray[np.float64]
    intra_cluster_distance: NDArray[np.float64]
    inter_cluster_distance: NDArray[np.float64]
    threshold: float
    linkage: str

    def __len__(self) -> int:
        return len(self.n_examples)

    def __iter__(self) -> Iterator[Clustering]:
        return (self[index] for index in range(len(self)))

    def __getitem__(self, neuron: int) -> Clustering:
        n = int(self.n_examples[neuron])
        return Clustering(
            self.labels[neuron, :n],
            self.trees[neuron, : max(n - 1, 0)],
            self.threshold,
            self.linkage,
        )

    def metrics(self, neuron: int) -> Polysemanticity:
        """Metrics of one neuron."""
        return Polysemanticity(
            max_distance=float(self.max_distance[neuron]),
            mean_distance=float(self.mean_distance[neuron]),
            intra_cluster_distance=float(self.intra_cluster_distance[neuron]),
            inter_cluster_distance=float(self.inter_cluster_distance[neuron]),
            n_examples=int(self.n_examples[neuron]),
            n_clusters=int(self.n_clusters[neuron]),
        )


def cluster(embeddings: Any, threshold: float = 0.05, linkage: str = "average") -> Clustering:
    """Cluster one neuron's embeddings into features.

    Parameters
    ----------
    embeddings : array or tensor, shape (n, d)
        Neuron embeddings. No rows give no clusters; one row gives one. A zero vector is at distance
        1 from every other. Equal rows have distance 0.
    threshold : float
        Cosine distance in (0, 2] below which clusters merge. The published results use 0.05
        for SAE neurons and 0.2 for neurons that read pixels.
    linkage : {"average", "single"}
        Average linkage (UPGMA), or single linkage: connected components at a similarity of
        ``1 - threshold``, the second published recipe.

    Returns
    -------
    Clustering

    Raises
    ------
    InputError
        For NaN or infinite values, a threshold out of range, or an unknown linkage.

    References
    ----------
    A. Foote, *Tackling Polysemanticity with Neuron Embeddings*, arXiv 2411.08166 (2024).
    """
    values = as_floats(embeddings, "embeddings", 2, np.float64)
    return cluster_many(values[None], threshold=threshold, linkage=linkage)[0]


def cluster_many(
    embeddings: Any,
    counts: Any = None,
    *,
    threshold: float = 0.05,
    linkage: str = "average",
    cosines: Floats | None = None,
    threads: int | None = None,
) -> Clusterings:
    """Compute trees, feature clusters and metrics of many neurons at once.

    Parameters
    ----------
    embeddings : array or tensor, shape (n_neurons, n, d)
        Neuron embeddings; float32 is computed in float32, with metrics accurate to 1e-6.
    counts : array of int, shape (n_neurons,), optional
        Number of examples of each neuron, if some have fewer than n: the first ``counts[j]`` rows.
    threshold, linkage
        As for `cluster`.
    cosines : ndarray, shape (n_neurons, n, n), optional
        Cosines between each neuron's embeddings, if already known.
    threads : int, optional
        Number of worker threads; by default one per core.

    Returns
    -------
    Clusterings
    """
    limit, linkage = check_threshold(threshold), check_linkage(linkage)
    values = as_floats(embeddings, "embeddings", 3, finite=False)
    n_neurons, n = values.shape[:2]
    if counts is None:
        sizes = np.full(n_neurons, n, dtype=np.int64)
    else:
        sizes = np.asarray(counts, dtype=np.int64)
        if sizes.shape != (n_neurons,) or ((sizes < 0) | (sizes > n)).any():
            raise InputError(
                f"counts is {np.asarray(counts)!r}; {n_neurons} integers from 0 to {n} are "
                "expected, one for each neuron."
            )
    # Lone examples have no distances, so nothing later checks them.
    _check_finite(values, np.flatnonzero(sizes == 1), 1)
    work = _Work(values, sizes, limit, linkage, cosines)
    # Neurons with equally many examples share a chunk, so that every step is one array call.
    order = np.argsort(sizes, kind="stable")
    runs = np.split(order, np.flatnonzero(np.diff(sizes[order])) + 1) if n_neurons else []
    chunks = [
        run[start : start + step]
        for run in runs
        if sizes[run[0]] > 1
        for step in [int(np.clip(_PAIRS // sizes[run[0]] ** 2, 1, 256))]
        for start in range(0, len(run), step)
    ]
    in_threads(work.chunk, chunks, threads)
    return work.result


class _Work:
    """Results of one `cluster_many`, filled in chunk by chunk."""

    def __init__(
        self,
        values: Floats,
        sizes: NDArray[np.int64],
        threshold: float,
        linkage: str,
        cosines: Floats | None,
    ) -> None:
        n_neurons, n = values.shape[:2]
        self.values = values
        self.cosines = cosines
        # Positions of the condensed distances in a flattened matrix, by number of examples.
        self.pairs: dict[int, NDArray[Any]] = {}
        self.result = Clusterings(
            # A lone example is one cluster; the chunks fill in the rest.
            labels=np.where((sizes[:, None] == 1) & (np.arange(n) == 0), 0, -1),
            trees=np.zeros((n_neurons, max(n - 1, 0), 4)),
            n_examples=sizes,
            n_clusters=np.minimum(sizes, 1),
            max_distance=np.full(n_neurons, np.nan),
            mean_distance=np.full(n_neurons, np.nan),
            intra_cluster_distance=np.full(n_neurons, np.nan),
            inter_cluster_distance=np.full(n_neurons, np.nan),
            threshold=threshold,
            linkage=linkage,
        )

    def chunk(self, neurons: NDArray[np.int64]) -> None:
        """Trees, clusters and metrics of a few neurons with equally many examples, at least 2."""
        result, linkage = self.result, self.result.linkage
        n = int(result.n_examples[neurons[0]])
        distances = self._condensed(neurons, n)
        result.max_distance[neurons] = distances.max(axis=1)
        trees = np.empty((len(neurons), n - 1, 4))
        # Sum of the distances between the two sides of each merge.
        sums = np.empty((len(neurons), n - 1))
        for tree, summed, row in zip(trees, sums, distances, strict=True):
            tree[:] = fastcluster.linkage(row, linkage, preserve_input=linkage == "single")
            if linkage == "single":
                summed[:] = _sums_of_merges(tree, row)
        n_pairs, heights = _pairs_of_merges(trees), trees[:, :, 2]
        if linkage == "average":
            # Each height is a mean over the pairs that its merge joins.
            np.multiply(heights, n_pairs, out=sums)
        merged = heights < result.threshold
        labels = cut_trees(trees, result.threshold)
        result.trees[neurons, : n - 1] = trees
        result.labels[neurons, :n] = labels
        result.n_clusters[neurons] = labels.max(axis=1) + 1
        result.mean_distance[neurons] = sums.sum(axis=1) / n_pairs.sum(axis=1)
        result.intra_cluster_distance[neurons] = _mean_of(sums, n_pairs, merged)
        result.inter_cluster_distance[neurons] = _mean_of(sums, n_pairs, ~merged)

    def _condensed(self, neurons: NDArray[np.int64], n: int) -> NDArray[np.float64]:
        """Distances of all pairs i < j of each neuron, float64, shape (n_neurons, pairs)."""
        if n not in self.pairs:
            i, j = np.triu_indices(n, 1)
            self.pairs[n] = i * n + j
        if self.cosines is not None:
            gram = _picked(self.cosines, neurons)[:, :n, :n]
        else:
            values = _picked(self.values, neurons)[:, :n]
            gram = cosine_matrices(values, np.ones(values.shape[:2], bool), neurons)
        cosines = np.take(gram.reshape(len(gram), n * n), self.pairs[n], axis=1)
        np.clip(cosines, -1, 1, out=cosines)
        distances = cosines.astype(np.float64)
        return np.subtract(1, distances, out=distances)


def _picked(values: Floats, neurons: NDArray[np.int64]) -> Floats:
    first, last = int(neurons[0]), int(neurons[-1])
    # A slice is a view; indexing rows by number would copy them.
    if last - first == len(neurons) - 1 and bool((np.diff(neurons) == 1).all()):
        return values[first : last + 1]
    return values[neurons]


def _check_finite(values: Floats, neurons: NDArray[np.int64], n: int) -> None:
    """Raise for the first of these neurons with a non-finite value."""
    for neuron in neurons:
        if not np.isfinite(values[neuron, :n]).all():
            as_floats(values[neuron, :n], f"embeddings[{neuron}]", 2)


def _pairs_of_merges(trees: NDArray[np.float64]) -> NDArray[np.float64]:
    """Number of pairs of examples that each merge joins, shape (n_neurons, n - 1)."""
    leaves = np.ones((len(trees), trees.shape[1] + 1))
    sizes = np.concatenate([leaves, trees[:, :, 3]], axis=1)
    sides = np.take_along_axis(
        sizes, trees[:, :, :2].reshape(len(trees), -1).astype(np.int64), axis=1
    )
    return np.asarray(sides[:, ::2] * sides[:, 1::2])


def _mean_of(
    sums: NDArray[np.float64], n_pairs: NDArray[np.float64], chosen: NDArray[np.bool_]
) -> NDArray[np.float64]:
    """Mean distance over the pairs of the chosen merges; NaN where there are none."""
    count = (n_pairs * chosen).sum(axis=1)
    out = np.full(len(count), np.nan)
    return np.asarray(np.divide((sums * chosen).sum(axis=1), count, out=out, where=count > 0))


def _sums_of_merges(
    tree: NDArray[np.float64], distances: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Sum of the distances that each merge of one tree joins, if heights are not means."""
    n = len(tree) + 1
    matrix = np.zeros((2 * n - 1, 2 * n - 1))
    i, j = np.triu_indices(n, 1)
    matrix[i, j] = matrix[j, i] = distances
    sums = np.zeros(n - 1)
    for merge, (a, b) in enumerate(tree[:, :2].astype(np.int64)):
        sums[merge] = matrix[a, b]
        matrix[n + merge] = matrix[a] + matrix[b]
        matrix[:, n + merge] = matrix[n + merge]
    return sums


def cut_trees(trees: NDArray[np.float64], threshold: float) -> NDArray[np.int64]:
    """Cut trees with the same number of examples.

    Parameters
    ----------
    trees : ndarray of float64, shape (n_neurons, n - 1, 4)
        Linkage matrices, with merges in order of distance.
    threshold : float
        Merges at smaller distances are made.

    Returns
    -------
    ndarray of int64, shape (n_neurons, n)
        Clusters, numbered as in `Clustering`.
    """
    n_neurons, n = len(trees), trees.shape[1] + 1
    root = np.broadcast_to(np.arange(2 * n - 1), (n_neurons, 2 * n - 1)).copy()
    children = trees[:, :, :2].astype(np.int64).reshape(n_neurons, -1)
    merged = np.repeat(trees[:, :, 2] < threshold, 2, axis=1)
    parents = np.repeat(np.arange(n, 2 * n - 1), 2)
    np.put_along_axis(root, children, np.where(merged, parents, children), axis=1)
    for _ in range(n.bit_length()):
        # Each node points to its parent's parent, which halves all paths.
        root = np.take_along_axis(root, root, axis=1)
    return by_size(root[:, :n])


def by_size(labels: NDArray[np.int64]) -> NDArray[np.int64]:
    """Renumber the labels of each row by size, then by first example; -1 is kept.

    Parameters
    ----------
    labels : ndarray of int64, shape (m, n)

    Returns
    -------
    ndarray of int64, shape (m, n)
    """
    if not labels.size:
        return labels
    span = int(labels.max()) + 2
    keys = labels + 1 + span * np.arange(len(labels))[:, None]
    names, first, inverse, sizes = np.unique(
        keys, return_index=True, return_inverse=True, return_counts=True
    )
    row, label = np.divmod(names, span)
    order = np.lexsort((first, -sizes, label == 0, row))
    rank = np.empty(len(names), np.int64)
    rank[order] = np.arange(len(names)) - np.searchsorted(row, row)
    rank[label == 0] = -1
    return rank[inverse].reshape(labels.shape)
