"""Metrics of polysemanticity, over unordered pairs of a neuron's examples."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from polyseme.core.arrays import as_floats, as_labels
from polyseme.core.distances import cosine_distances, unit_rows
from polyseme.core.features import cluster_sums


@dataclass(frozen=True)
class Polysemanticity:
    """How far apart one neuron's behaviours are, in cosine distances in [0, 2].

    None of these alone shows that a neuron is monosemantic: with nearly one-hot weights, every
    embedding points the same way. Read them together with `participation_ratio`.
    """

    max_distance: float
    """Largest distance between two examples; NaN with fewer than two."""
    mean_distance: float
    """Mean distance over all pairs; NaN with fewer than two examples."""
    intra_cluster_distance: float
    """Mean over pairs within a feature cluster; NaN if there is no such pair."""
    inter_cluster_distance: float
    """Mean over pairs across feature clusters; NaN if there is no such pair."""
    n_examples: int
    """Number of examples."""
    n_clusters: int
    """Number of feature clusters."""

    def as_dict(self) -> dict[str, float]:
        """The metrics by name."""
        return asdict(self)


def polysemanticity(embeddings: Any, labels: Any) -> Polysemanticity:
    """Compute the polysemanticity metrics of one neuron.

    Parameters
    ----------
    embeddings : array or tensor, shape (n, d)
        Neuron embeddings of the neuron's examples, or pre-neuron embeddings for comparison.
    labels : array of int, shape (n,)
        Feature cluster of each example.

    Returns
    -------
    Polysemanticity

    Notes
    -----
    A zero embedding is at distance 1 from every other. Sums over pairs are computed from sums of
    vectors: over the pairs of a set, Σ cos = (‖Σê‖² − n) / 2 for unit vectors ê.

    References
    ----------
    A. Foote, *Tackling Polysemanticity with Neuron Embeddings*, arXiv 2411.08166 (2024).
    """
    values = as_floats(embeddings, "embeddings", 2, np.float64)
    n = len(values)
    names, clusters = np.unique(as_labels(labels, n), return_inverse=True)
    if n < 2:
        nan = float("nan")
        return Polysemanticity(nan, nan, nan, nan, n, len(names))
    unit = unit_rows(values)
    sums = cluster_sums(unit, clusters)
    squares = np.einsum("nd,nd->n", unit, unit)
    total = unit.sum(axis=0)
    all_cos = (total @ total - squares.sum()) / 2
    intra_cos = (np.einsum("kd,kd->", sums, sums) - squares.sum()) / 2
    sizes = np.bincount(clusters, minlength=len(names))
    n_pairs = n * (n - 1) // 2
    n_intra = int((sizes * (sizes - 1) // 2).sum())

    def mean(cos: float, count: int) -> float:
        return float(np.clip(1 - cos / count, 0, 2)) if count else float("nan")

    return Polysemanticity(
        max_distance=float(cosine_distances(values).max()),
        mean_distance=mean(all_cos, n_pairs),
        intra_cluster_distance=mean(intra_cos, n_intra),
        inter_cluster_distance=mean(all_cos - intra_cos, n_pairs - n_intra),
        n_examples=n,
        n_clusters=len(names),
    )


def participation_ratio(weights: Any) -> NDArray[np.float64]:
    """Participation ratio ``(Σw²)² / Σw⁴`` of weight vectors.

    The effective number of inputs a neuron reads: 1 for a one-hot vector, d for a flat one. If it
    is near 1, all of the neuron's embeddings point the same way whatever its examples are, so small
    distances mean nothing.

    Parameters
    ----------
    weights : array or tensor, shape (..., d)

    Returns
    -------
    ndarray of float64, shape (...)
        In [1, d]; NaN for a zero vector.
    """
    values = as_floats(weights, "weights", np.ndim(weights) or 1, np.float64)
    squares = unit_rows(values) ** 2
    with np.errstate(invalid="ignore", divide="ignore"):
        ratio = squares.sum(axis=-1) ** 2 / (squares**2).sum(axis=-1)
    return np.asarray(ratio)


def rand_index(first: NDArray[Any], second: NDArray[Any]) -> float:
    """Adjusted Rand index of two groupings of the same things; 1 if both make one group.

    L. Hubert and P. Arabie, *Comparing partitions* (1985).
    """

    def pairs(sizes: NDArray[Any]) -> float:
        return float((sizes * (sizes - 1) / 2).sum())

    _, rows = np.unique(first, return_inverse=True)
    _, columns = np.unique(second, return_inverse=True)
    table = np.zeros((rows.max(initial=0) + 1, columns.max(initial=0) + 1))
    np.add.at(table, (rows, columns), 1)
    both = pairs(table)
    of_first, of_second = pairs(table.sum(axis=1)), pairs(table.sum(axis=0))
    n_pairs = len(rows) * (len(rows) - 1) / 2
    expected = of_first * of_second / n_pairs if n_pairs else 0.0
    largest = (of_first + of_second) / 2
    return 1.0 if largest == expected else (both - expected) / (largest - expected)
