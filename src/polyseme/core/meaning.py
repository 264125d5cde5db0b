"""Meanings: how many distinct things activate a neuron, and which examples belong to each."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from polyseme.core.arrays import Floats, as_floats
from polyseme.core.clustering import Clusterings, by_size, cluster_many
from polyseme.core.distances import cosine_matrices
from polyseme.core.metrics import rand_index
from polyseme.core.space import Space
from polyseme.errors import InputError

Ints = NDArray[np.int64]

#: Two groups of examples that overlap by less than this are different meanings.
OVERLAP = 0.57
#: Fewest examples of a meaning.
MIN_SIZE = 5
# Mean cosine below which a group's examples have almost nothing in common.
_COHERENT = 0.1
_DRAWS = 39
_HALVES = 20


@dataclass(frozen=True)
class Meanings:
    """The meanings of one neuron."""

    labels: Ints
    """(n,): the meaning of each example, numbered by size: 0 is the largest. Of equally large
    meanings, the one with the earliest example comes first."""
    tree: NDArray[np.float64]
    """(n - 1, 4): the tree of the centred and whitened examples, as a SciPy linkage matrix (average
    linkage on cosine distance)."""
    overlaps: NDArray[np.float64]
    """(n - 1,): the overlap of the two sides of each merge: about 1 for two halves of one meaning,
    0 for unrelated meanings. NaN if a side is a single example."""
    threshold: float
    """Groups that overlap by less than this are different meanings."""
    cosines: Floats
    """(n, n): the cosines between the centred and whitened examples."""
    drives: Floats
    """(n,): the cosine of each example with the direction along which the neuron reads; zeros if
    that is unknown."""

    @property
    def number(self) -> int:
        """Number of meanings; 0 without examples."""
        return int(self.labels.max(initial=-1)) + 1

    @property
    def shares(self) -> NDArray[np.float64]:
        """Each meaning's share of the examples, the largest first."""
        return np.bincount(self.labels, minlength=self.number) / max(1, len(self.labels))

    @property
    def effective_number(self) -> float:
        """Exponential of the entropy of the shares: 1 for one meaning, k for k equal meanings."""
        return effective_number(self.shares)

    @cached_property
    def separation(self) -> float:
        """Difference between the two sides of the first split: 1 minus their overlap.

        The first split is the highest merge of the tree with at least 5 examples on both sides,
        whether or not it is made; NaN if there is none. Near 0 for two halves of one meaning,
        about 1 for unrelated meanings, more for opposite meanings.
        """
        return float(1 - _at_top(self.tree[None], self.overlaps[None])[0])

    def cut(self, threshold: float) -> Meanings:
        """The meanings at another overlap threshold; a higher one gives more meanings."""
        limit = _checked_threshold(threshold)
        labels = _labels(self.tree[None], self.overlaps[None], self.cosines[None], limit)[0]
        # A tree without merges has one example or none.
        return dataclasses.replace(self, labels=labels[: len(self.labels)], threshold=limit)

    def cuts(self) -> list[Meanings]:
        """All results of `cut`, the fewest meanings first, each at its highest threshold."""
        limits = _split_limits(self.tree, self.overlaps)
        thresholds = np.append(np.unique(limits[(limits > 0) & (limits < 1)]), 1.0)
        m = len(thresholds)
        labels = _labels(
            np.broadcast_to(self.tree, (m, *self.tree.shape)),
            np.broadcast_to(self.overlaps, (m, *self.overlaps.shape)),
            np.broadcast_to(self.cosines, (m, *self.cosines.shape)),
            thresholds,
        )[:, : len(self.labels)]
        return [
            dataclasses.replace(self, labels=row, threshold=float(threshold))
            for row, threshold in zip(labels, thresholds, strict=True)
        ]

    @cached_property
    def stability(self) -> float:
        """Agreement of the meanings found in half of the examples with those found in all.

        Mean adjusted Rand index over 20 random halves: 1 if every half finds the same groups. NaN
        for fewer than 20 examples.
        """
        n, rng = len(self.labels), np.random.default_rng(0)
        if n < 4 * MIN_SIZE:
            return float("nan")
        halves = np.sort([rng.permutation(n)[: n // 2] for _ in range(_HALVES)], axis=1)
        rows = self.cosines[halves[:, :, None], halves[:, None, :]]
        of_halves = meanings_many(rows, self.drives[halves], threshold=self.threshold)
        return float(
            np.mean(
                [
                    rand_index(self.labels[half], labels)
                    for half, labels in zip(halves, of_halves.labels, strict=True)
                ]
            )
        )

    @cached_property
    def chance(self) -> float:
        """Probability that examples without groups would separate as clearly: a p-value.

        The null distribution is normal, with the mean and covariance of the examples, so it has no
        groups; its trees are cut into the same number of groups. The statistic is the share of
        scatter between groups. From 39 draws, so at least 0.025. NaN for one meaning.
        """
        n = len(self.labels)
        if self.number < 2:
            return float("nan")
        apart = _scatter_between(self.cosines[None], self.labels[None])
        rng, exceeding = np.random.default_rng(0), 0
        for part in _parts(np.arange(_DRAWS), n):
            noise = rng.standard_normal((len(part), n, n)) / np.sqrt(n)
            # Rows C X have these moments, so their inner products are C G Cᵀ, without X.
            combine = 1 / n + noise - noise.mean(axis=2, keepdims=True)
            products = combine @ self.cosines @ combine.transpose(0, 2, 1)
            # Not scaled to unit length: that pushes even normal data apart to opposite sides.
            products /= np.abs(products).max(axis=(1, 2), keepdims=True)
            trees = _trees(products).trees
            any_split = np.full(trees.shape[:2], -np.inf)
            labels = _labels(trees, any_split, products, 1.0, most=self.number)
            exceeding += int((_scatter_between(products, labels) >= apart).sum())
        return (1 + exceeding) / (1 + _DRAWS)

    @property
    def verdict(self) -> str:
        """ "several", "one", or "no clear groups".

        "no clear groups" if groups are found but could be due to `chance` (p > 0.05), or if none
        are found and the examples have almost nothing in common (mean cosine below 0.1).
        """
        if self.number > 1:
            return "several" if self.chance <= 0.05 else "no clear groups"
        n = len(self.labels)
        alike = (self.cosines.sum() - np.trace(self.cosines)) / max(1, n * (n - 1))
        return "one" if n == 1 or alike >= _COHERENT else "no clear groups"

    def __repr__(self) -> str:
        shares = ", ".join(f"{share:.0%}" for share in self.shares)
        return f"Meanings({self.number}: {shares})"


@dataclass(frozen=True)
class ManyMeanings:
    """The meanings of many neurons, padded to the same number of examples.

    Attributes
    ----------
    labels : ndarray of int64, shape (n_neurons, n)
        As in `Meanings`; -1 past a neuron's examples.
    trees : ndarray of float64, shape (n_neurons, n - 1, 4)
    overlaps : ndarray of float64, shape (n_neurons, n - 1)
        Both zero past a neuron's merges.
    counts : ndarray of int64, shape (n_neurons,)
        Number of examples of each.
    separations : ndarray of float64, shape (n_neurons,)
        See `Meanings.separation`.
    drives : ndarray, shape (n_neurons, n)
        As given.
    """

    labels: Ints
    trees: NDArray[np.float64]
    overlaps: NDArray[np.float64]
    counts: Ints
    separations: NDArray[np.float64]
    drives: Floats


def meanings(
    h: Any,
    *,
    mean: Any,
    covariance: Any = None,
    direction: Any = None,
    threshold: float = OVERLAP,
) -> Meanings:
    """Find a neuron's meanings: the groups that its strongest examples fall into.

    The neuron's inputs are centred and partly whitened by the statistics of all inputs of its site,
    and clustered by average linkage on cosine distance. From the top of the tree down, two sides of
    at least 5 examples are different meanings if they overlap by less than the threshold. Examples
    in no such group join the group they are most similar to.

    The overlap of two groups is ``(2 r + q) / 3``. ``r`` is the mean cosine between them over the
    geometric mean of those within each; ``q`` is that mean cosine over the product of their mean
    cosines with the direction along which the neuron reads: what they have in common, relative to
    what they must have in common to activate the neuron. Without a direction, q is 1.

    Parameters
    ----------
    h : array or tensor, shape (n, d)
        Pre-neuron embeddings of the neuron's examples: the strongest 100 to several hundred.
    mean : array or tensor, shape (d,)
        Mean of all inputs of the site. Do not use the mean of the examples.
    covariance : array or tensor, shape (d, d), optional
        Their covariance, estimated from at least 3 d inputs. Without it, nothing is whitened.
    direction : array or tensor, shape (d,), optional
        The neuron's input weights, or its mean gradient ∂a/∂h at the examples.
    threshold : float
        Overlap in (0, 1]; the default was chosen on neurons with known meanings.

    Returns
    -------
    Meanings

    Raises
    ------
    InputError
        For NaN or infinite values, shapes that do not match, or a threshold out of range.

    Examples
    --------
    >>> import numpy as np
    >>> rng = np.random.default_rng(0)
    >>> ships, months = 4 * np.eye(64)[:2]
    >>> h = np.concatenate([rng.normal(ships, size=(60, 64)), rng.normal(months, size=(40, 64))])
    >>> meanings(h, mean=np.zeros(64), direction=ships + months).number
    2
    """
    rows = as_floats(h, "h", 2)
    space = Space.of(mean, covariance)
    limit = _checked_threshold(threshold)
    if rows.shape[1] != len(space.mean):
        raise InputError(
            f"h has shape {rows.shape} and mean has shape {space.mean.shape}; "
            f"expected h of shape ({len(rows)}, {len(space.mean)})."
        )
    units = space.inputs(rows)
    drives = np.zeros(len(rows), np.float32)
    if direction is not None:
        gradient = as_floats(direction, "direction", 1)
        if gradient.shape != rows.shape[1:]:
            raise InputError(f"direction has shape {gradient.shape}; expected ({rows.shape[1]},).")
        drives = units @ space.directions(gradient)
    cosines = cosine_matrices(units[None], np.ones((1, len(rows)), bool))
    return group(cosines[0], drives, limit)


def group(cosines: Floats, drives: Floats, threshold: float = OVERLAP) -> Meanings:
    """Find one neuron's meanings from the cosines between its examples, (n, n)."""
    many = meanings_many(cosines[None], drives[None], threshold=threshold)
    merges = slice(max(len(cosines) - 1, 0))
    return Meanings(
        many.labels[0], many.trees[0, merges], many.overlaps[0, merges], threshold, cosines, drives
    )


def meanings_many(
    cosines: Floats,
    drives: Floats,
    counts: Any = None,
    *,
    threshold: float = OVERLAP,
    threads: int | None = None,
) -> ManyMeanings:
    """Find many neurons' meanings from the cosines between their examples; see `meanings`.

    Parameters
    ----------
    cosines : ndarray, shape (n_neurons, n, n)
        Cosines between the `Space.inputs` of each neuron's examples.
    drives : ndarray, shape (n_neurons, n)
        Their cosines with the neuron's direction; zeros if that is unknown.
    counts : array of int, shape (n_neurons,), optional
        Number of examples of each neuron, if some have fewer than n: the first ``counts[j]`` rows.
    threshold : float
    threads : int, optional
        Number of worker threads; by default one per core.

    Returns
    -------
    ManyMeanings
    """
    n_neurons, n = cosines.shape[:2]
    clusterings = _trees(cosines, counts, threads)
    sizes, trees = clusterings.n_examples, clusterings.trees
    labels = np.where(np.arange(n) < sizes[:, None], 0, -1)
    overlaps = np.zeros(trees.shape[:2])
    separations = np.full(n_neurons, np.nan)
    for size in np.unique(sizes[sizes > 1]):
        for part in _parts(np.flatnonzero(sizes == size), int(size)):
            tree = trees[part, : size - 1]
            between = _overlaps(tree, drives[part, :size])
            overlaps[part, : size - 1] = between
            separations[part] = 1 - _at_top(tree, between)
            inner = cosines[part, :size, :size]
            labels[part, :size] = _labels(tree, between, inner, threshold)
    return ManyMeanings(labels, trees, overlaps, sizes, separations, drives)


def _trees(cosines: Floats, counts: Any = None, threads: int | None = None) -> Clusterings:
    """Trees from cosines alone, without embeddings."""
    rows = np.broadcast_to(np.float32(0), (*cosines.shape[:2], 0))
    return cluster_many(rows, counts, threshold=2.0, cosines=cosines, threads=threads)


def effective_number(shares: NDArray[np.float64]) -> float:
    """Exponential of the entropy of shares that sum to 1; 0 for no shares."""
    present = shares[shares > 0]
    return float(np.exp(-(present * np.log(present)).sum())) if len(present) else 0.0


def _checked_threshold(threshold: Any) -> float:
    try:
        value = float(threshold)
    except (TypeError, ValueError):
        value = np.nan
    if not 0 < value <= 1:
        raise InputError(f"threshold is {threshold!r}; an overlap in (0, 1] is expected.")
    return value


def _parts(neurons: Ints, size: int) -> Iterator[Ints]:
    step = max(1, 2_000_000 // size**2)
    return (neurons[at : at + step] for at in range(0, len(neurons), step))


def _overlaps(trees: NDArray[np.float64], drives: Floats) -> NDArray[np.float64]:
    """Overlap of the two sides of each merge, for trees of equal size: (m, n - 1)."""
    m, n = drives.shape
    rows = np.arange(m)
    sizes, drive, within = (np.zeros((m, 2 * n - 1)) for _ in range(3))
    sizes[:, :n], drive[:, :n] = 1, drives
    known = (drives != 0).any(axis=1)
    overlaps = np.full((m, n - 1), np.nan)
    for merge in range(n - 1):
        a, b = trees[:, merge, :2].astype(np.int64).T
        size_a, size_b = sizes[rows, a], sizes[rows, b]
        # Average linkage: a merge's height is the mean distance between its sides.
        between = 1 - trees[:, merge, 2]
        node = n + merge
        sizes[:, node] = size_a + size_b
        drive[:, node] = drive[rows, a] + drive[rows, b]
        within[:, node] = within[rows, a] + within[rows, b] + size_a * size_b * between
        several = (size_a > 1) & (size_b > 1)
        if not several.any():
            continue
        with np.errstate(divide="ignore", invalid="ignore"):
            inner = [
                np.maximum(within[rows, side] / (size * (size - 1) / 2), 1e-6)
                for side, size in ((a, size_a), (b, size_b))
            ]
            alike = np.clip(between / np.sqrt(inner[0] * inner[1]), -1, 3)
            driven = [
                np.maximum(drive[rows, side] / size, 1e-3)
                for side, size in ((a, size_a), (b, size_b))
            ]
            shared = np.where(known, between / (driven[0] * driven[1]), 1.0)
        overlaps[several, merge] = ((2 * alike + np.clip(shared, -1, 3)) / 3)[several]
    return overlaps


def _sides(trees: NDArray[np.float64], merge: int) -> tuple[Ints, Ints, NDArray[np.bool_]]:
    """Larger and smaller side of each tree's merge, and whether both have enough examples."""
    n = trees.shape[1] + 1
    children = trees[:, merge, :2].astype(np.int64)
    inner = np.maximum(children - n, 0)
    sizes = np.where(children < n, 1, trees[np.arange(len(trees))[:, None], inner, 3])
    first = sizes[:, 0] >= sizes[:, 1]
    larger = np.where(first, children[:, 0], children[:, 1])
    smaller = np.where(first, children[:, 1], children[:, 0])
    return larger, smaller, sizes.min(axis=1) >= MIN_SIZE


def _at_top(trees: NDArray[np.float64], values: NDArray[np.float64]) -> NDArray[np.float64]:
    """The value at the highest merge with enough examples on both sides; NaN if there is none."""
    m, n = len(trees), trees.shape[1] + 1
    at_top = np.full(m, np.nan)
    node = np.full(m, 2 * n - 2)
    for merge in range(n - 2, -1, -1):
        larger, _, enough = _sides(trees, merge)
        here = node == n + merge
        at_top[here & enough] = values[here & enough, merge]
        node = np.where(here, np.where(enough, -1, larger), node)
    return at_top


def _split_limits(tree: NDArray[np.float64], overlaps: NDArray[np.float64]) -> NDArray[np.float64]:
    """Thresholds above which each merge of a tree is a split, (n - 1,); infinite if it never is.

    A group is split only if every larger group that contains it is split.
    """
    n = len(tree) + 1
    limits = np.full(2 * n - 1, np.inf)  # of the group that each node is in
    limits[-1] = -np.inf
    splits = np.full(n - 1, np.inf)
    for merge in range(n - 2, -1, -1):
        (larger,), (smaller,), (enough,) = _sides(tree[None], merge)
        limit = limits[n + merge]
        if enough:
            limit = splits[merge] = limits[smaller] = np.maximum(limit, overlaps[merge])
        limits[larger] = limit
    return splits


def _labels(
    trees: NDArray[np.float64],
    overlaps: NDArray[np.float64],
    cosines: Floats,
    threshold: float | NDArray[np.float64],
    most: int | None = None,
) -> Ints:
    """Meanings of the examples of trees of equal size, (m, n), at most a given number.

    The threshold is one for all trees, or one per tree (m,).
    """
    m, n = len(trees), trees.shape[1] + 1
    rows = np.arange(m)
    # Each node's group, identified by its top node, and whether the group may still be split.
    top = np.full((m, 2 * n - 1), 2 * n - 2)
    whole = np.ones((m, 2 * n - 1), bool)
    is_open = np.zeros((m, 2 * n - 1), bool)
    is_open[:, -1] = True
    room = np.full(m, n if most is None else most - 1)
    for merge in range(n - 2, -1, -1):
        node = n + merge
        larger, smaller, enough = _sides(trees, merge)
        split = is_open[:, node] & enough & (overlaps[:, merge] < threshold) & (room > 0)
        room -= split
        # A few examples that split off are not a meaning; the real split may be further down.
        peeled = is_open[:, node] & ~enough
        whole[rows[split], top[split, node]] = False
        for side, goes_on in ((larger, split | peeled), (smaller, split)):
            top[rows, side] = np.where(split, side, top[:, node])
            is_open[rows, side] = goes_on
    groups = top[:, :n]
    loose = ~whole[rows[:, None], groups]
    labels = by_size(np.where(loose, -1, groups))
    # One by one, as `cosines` may be one large matrix for many cuts.
    for row in np.flatnonzero(loose.any(axis=1)):
        member = labels[row][:, None] == np.arange(labels[row].max() + 1)
        similar = cosines[row][loose[row]] @ (member / member.sum(axis=0))
        labels[row, loose[row]] = similar.argmax(axis=1)
    return by_size(labels)


def _scatter_between(products: Floats, labels: Ints) -> NDArray[np.float64]:
    """Share of the scatter of rows that is between groups, from inner products (m, n, n)."""
    member = (labels[:, :, None] == np.arange(labels.max() + 1)).astype(float)
    sums = np.einsum("mik,mij,mjk->mk", member, products, member, optimize=True)
    of_all = products.sum(axis=(1, 2)) / products.shape[1]
    between = (sums / np.maximum(member.sum(axis=1), 1)).sum(axis=1) - of_all
    return np.asarray(between / (np.einsum("mii->m", products) - of_all))
