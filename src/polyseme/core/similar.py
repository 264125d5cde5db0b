"""Similar features: nearest neighbours between the vectors that stand for features."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from polyseme.core.arrays import Floats, to_numpy
from polyseme.errors import InputError, MissingDependencyError

# Features of fewer examples are compared with none: they are most of all features, and one or
# two examples do not say what they have in common.
MIN_EXAMPLES = 3
# Up to here every pair is compared, which takes seconds.
MOST_EXACT = 30_000
# How many cells there are, and how many each vector visits: see bench/similar.py for what
# that finds and costs. More cells than this cost more to make than they save.
_PER_CELL, _MOST_CELLS, _VISITED = 100, 2048, 8
# k-means for a division, not for its own sake, can do with a sample and a few rounds.
_SAMPLED, _ITERATIONS = 40, 6
# Vectors of the same owner are often nearer than those that are looked for; these many more
# are asked for in each cell, then dropped.
_SPARE = 8
_ROWS, _COLUMNS = 1024, 8192

Progress = Callable[[float], None]


class NearestFeatures(NamedTuple):
    """The nearest neighbours of each vector, the most similar first.

    Attributes
    ----------
    neighbours : ndarray of int64, shape (n, k)
        Rows of the vectors; -1 where there are fewer.
    similarity : ndarray of float32, shape (n, k)
        Cosine similarity; NaN where there is no neighbour.
    """

    neighbours: NDArray[np.int64]
    similarity: NDArray[np.float32]


def nearest_features(
    vectors: Any,
    owners: Any,
    k: int = 5,
    *,
    exact: bool | None = None,
    progress: Progress | None = None,
) -> NearestFeatures:
    """The vectors of other owners that are most similar to each vector.

    Where there are more than `MOST_EXACT` vectors, they are divided into cells by spherical
    k-means, and each is compared with the vectors of the cells nearest to it (an inverted
    file). The similarities found are exact, and hardly a neighbour that is near is missed; of
    those that are merely less far than the rest, as is usual among random vectors of many
    dimensions, more are.

    Parameters
    ----------
    vectors : array, shape (n, d)
        Unit vectors, of float32 or float16; they may lie in a memory-mapped file, as only
        blocks of them are read at a time. Zero vectors are similar to none, 0.
    owners : array of int, shape (n,)
        The neuron that each vector belongs to, in ascending order: one neuron's features are
        no neighbours of each other.
    k : int
        How many neighbours to find, at least 1.
    exact : bool, optional
        Whether to compare all pairs; by default only if they are few.
    progress : callable, optional
        Is told the share that is done, now and then.

    Returns
    -------
    NearestFeatures
        The same, byte for byte, whenever it is computed in the same environment.

    Raises
    ------
    InputError
        If shapes or ``k`` are out of range, or the owners are out of order.
    MissingDependencyError
        If cells are needed and faiss is not installed.
    """
    given = vectors if isinstance(vectors, np.ndarray) else to_numpy(vectors)
    if given.ndim != 2 or given.dtype.kind != "f":
        raise InputError(
            f"vectors has shape {given.shape} and dtype {given.dtype}; (n, d) of floats is "
            "expected: a unit vector for each feature."
        )
    group = to_numpy(owners)
    if group.shape != (len(given),) or (group.size and group.dtype.kind not in "iu"):
        raise InputError(
            f"owners has shape {group.shape} and dtype {group.dtype}; one integer for each of "
            f"the {len(given)} vectors is expected."
        )
    if (np.diff(group) < 0).any():
        where = int(np.argmax(np.diff(group) < 0))
        raise InputError(
            f"owners[{where + 1}] is {group[where + 1]}, after {group[where]}; ascending order "
            "is expected, so that the vectors of an owner stand together."
        )
    if isinstance(k, bool) or not isinstance(k, int | np.integer) or k < 1:
        raise InputError(f"k is {k!r}; a whole number of at least 1 is expected.")
    best = _Best(len(given), int(k))
    compare_all = len(given) <= MOST_EXACT if exact is None else exact
    search = _all_pairs if compare_all else _within_cells
    for done in search(given, group.astype(np.int64), best):
        if progress is not None:
            progress(done)
    return best.result()


class _Best:
    """The best neighbours of each vector so far."""

    def __init__(self, n: int, k: int) -> None:
        self.k = k
        self.rows = np.full((n, k), -1, np.int64)
        self.similarity = np.full((n, k), -np.inf, np.float32)

    def merge(self, of: Any, rows: NDArray[np.int64], similarity: Floats) -> None:
        """Take in candidates for some vectors: (m, c) each; -inf stands for none."""
        rows = np.concatenate([self.rows[of], rows], axis=1)
        similarity = np.concatenate([self.similarity[of], similarity], axis=1)
        # Equal ones in the order of their numbers.
        order = np.lexsort((rows, -similarity), axis=1)[:, : self.k]
        self.rows[of] = np.take_along_axis(rows, order, axis=1)
        self.similarity[of] = np.take_along_axis(similarity, order, axis=1)

    def result(self) -> NearestFeatures:
        none = ~np.isfinite(self.similarity)
        return NearestFeatures(
            np.where(none, -1, self.rows), np.where(none, np.float32(np.nan), self.similarity)
        )


def _all_pairs(vectors: Floats, owners: NDArray[np.int64], best: _Best) -> Iterator[float]:
    n = len(vectors)
    for at in range(0, n, _ROWS):
        mine = np.asarray(vectors[at : at + _ROWS], np.float32)
        here = slice(at, at + len(mine))
        for start in range(0, n, _COLUMNS):
            theirs = np.asarray(vectors[start : start + _COLUMNS], np.float32)
            similarity = mine @ theirs.T
            others = owners[start : start + len(theirs)]
            # Owners ascend, so most blocks have none in common.
            if owners[here][0] <= others[-1] and others[0] <= owners[here][-1]:
                similarity[owners[here][:, None] == others] = -np.inf
            columns = np.argpartition(-similarity, min(best.k, len(theirs)) - 1, axis=1)
            columns = columns[:, : best.k]
            best.merge(here, columns + start, np.take_along_axis(similarity, columns, axis=1))
        yield (at + len(mine)) / n


def _within_cells(vectors: Floats, owners: NDArray[np.int64], best: _Best) -> Iterator[float]:
    near = _nearest_cells(vectors)
    yield 0.1
    # Who lives in each cell, and who visits it: both in the order of the vectors.
    cells = np.arange(near.max() + 2)
    home = np.argsort(near[:, 0], kind="stable")
    homes = np.searchsorted(near[home, 0], cells)
    visits = np.argsort(near.ravel(), kind="stable")
    visited = np.searchsorted(near.ravel()[visits], cells)
    total, done = int((np.diff(homes) * np.diff(visited)).sum()), 0
    for cell in cells[:-1]:
        members = home[homes[cell] : homes[cell + 1]]
        if not len(members):
            continue
        theirs = np.asarray(vectors[members], np.float32)
        visitors = visits[visited[cell] : visited[cell + 1]] // near.shape[1]
        for at in range(0, len(visitors), _COLUMNS):
            of = visitors[at : at + _COLUMNS]
            mine = np.asarray(vectors[of], np.float32)
            similarity, columns = _knn(mine, theirs, min(best.k + _SPARE, len(members)))
            rows = members[columns]
            similarity[owners[rows] == owners[of][:, None]] = -np.inf
            best.merge(of, rows, similarity)
        done += len(members) * len(visitors)
        yield 0.1 + 0.9 * done / total


def _nearest_cells(vectors: Floats) -> NDArray[np.int32]:
    """The cells that are nearest to each vector, its own first: shape (n, at most 8)."""
    n, d = vectors.shape
    n_cells = min(max(n // _PER_CELL, 1), _MOST_CELLS)
    sample = np.random.default_rng(0).choice(n, min(n, _SAMPLED * n_cells), replace=False)
    kmeans = _faiss().Kmeans(
        d,
        n_cells,
        niter=_ITERATIONS,
        seed=0,
        spherical=True,
        # The sample is taken above; without this faiss warns that it is small.
        min_points_per_centroid=1,
        max_points_per_centroid=2 * _SAMPLED,
    )
    kmeans.train(np.asarray(vectors[np.sort(sample)], np.float32))
    near = np.empty((n, min(_VISITED, n_cells)), np.int32)
    for at in range(0, n, _COLUMNS):
        block = np.asarray(vectors[at : at + _COLUMNS], np.float32)
        near[at : at + len(block)] = _knn(block, kmeans.centroids, near.shape[1])[1]
    return near


def _knn(mine: Floats, theirs: Floats, k: int) -> tuple[Floats, NDArray[np.int64]]:
    """Similarity to, and rows of, the k of ``theirs`` that are most similar to each."""
    faiss = _faiss()
    similarity, rows = faiss.knn(mine, theirs, k, metric=faiss.METRIC_INNER_PRODUCT)
    return similarity, rows


def _faiss() -> Any:
    try:
        import faiss
    except ImportError as error:
        raise MissingDependencyError(
            f"A search for similar features among more than {MOST_EXACT:,}", "faiss-cpu", "torch"
        ) from error
    return faiss
