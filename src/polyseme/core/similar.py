"""Similar features: nearest neighbours between the vectors that stand for features."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from polyseme.core.arrays import Floats, to_numpy
from polyseme.core.parallel import in_threads
from polyseme.errors import InputError, MissingDependencyError

# Features of fewer examples are compared with none: they are most of all features, and one or
# two examples do not say what they have in common.
MIN_EXAMPLES = 3
# Up to here every pair is compared, which takes seconds.
MOST_EXACT = 30_000
# How many cells there are, and how many each vector visits: see bench/similar.py for what
# that finds and costs. Fewer cells, or fewer visits, cost less and find less.
_PER_CELL, _MOST_CELLS, _VISITED = 100, 2048, 16
# k-means for a division, not for its own sake, can do with a sample, a few rounds, and the
# dimensions that vary most.
_SAMPLED, _ITERATIONS, _DIMENSIONS = 40, 6, 64
# How many neighbours of each are followed to theirs, and of how many vectors at once: their
# neighbours' neighbours are in memory together.
_LINKS, _FOLLOWED = 8, 512
# Cells or blocks between two reports of progress.
_AT_ONCE = 32
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
    file), then with the neighbours of the neighbours it found. The similarities found are
    exact, and hardly a neighbour that is near is missed; of those that are merely less far
    than the rest, as is usual among random vectors of many dimensions, more are.

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
        """Take in candidates for some vectors: (m, c) each; a row of -1 or -inf stands for none."""
        rows = np.concatenate([self.rows[of], rows], axis=1)
        similarity = np.concatenate([self.similarity[of], similarity], axis=1)
        similarity[rows < 0] = -np.inf
        order = np.argsort(rows, axis=1)
        rows = np.take_along_axis(rows, order, axis=1)
        similarity = np.take_along_axis(similarity, order, axis=1)
        # Found by two ways, it may differ in the last bit, and counts once.
        similarity[:, 1:][rows[:, 1:] == rows[:, :-1]] = -np.inf
        # Equal ones in the order of their numbers.
        order = np.argsort(-similarity, axis=1, kind="stable")[:, : self.k]
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
    links = _Best(len(vectors), max(best.k, _LINKS))
    for done in _visit(vectors, owners, near, links):
        yield 0.1 + 0.7 * done
    order = np.argsort(near[:, 0], kind="stable")
    del near
    for done in _follow(vectors, owners, order, links, best):
        yield 0.8 + 0.2 * done


def _nearest_cells(vectors: Floats) -> NDArray[np.int32]:
    """The cells that are nearest to each vector, its own first: shape (n, a few)."""
    faiss = _faiss()
    n = len(vectors)
    n_cells = min(max(n // _PER_CELL, 1), _MOST_CELLS)
    sample = np.random.default_rng(0).choice(n, min(n, _SAMPLED * n_cells), replace=False)
    some = np.asarray(vectors[np.sort(sample[:_COLUMNS])], np.float32)
    basis = np.linalg.eigh(some.T @ some)[1][:, -_DIMENSIONS:]
    flat = np.empty((n, basis.shape[1]), np.float32)
    for at in range(0, n, _COLUMNS):
        flat[at : at + _COLUMNS] = np.asarray(vectors[at : at + _COLUMNS], np.float32) @ basis
    kmeans = faiss.Kmeans(
        flat.shape[1],
        n_cells,
        niter=_ITERATIONS,
        seed=0,
        spherical=True,
        # The sample is taken above; without this faiss warns that it is small.
        min_points_per_centroid=1,
        max_points_per_centroid=2 * _SAMPLED,
    )
    kmeans.train(flat[np.sort(sample)])
    near = np.empty((n, min(_VISITED, n_cells)), np.int32)
    for at in range(0, n, _COLUMNS):
        block = slice(at, at + _COLUMNS)
        near[block] = faiss.knn(
            flat[block], kmeans.centroids, near.shape[1], metric=faiss.METRIC_INNER_PRODUCT
        )[1]
    return near


def _visit(
    vectors: Floats, owners: NDArray[np.int64], near: NDArray[np.int32], links: _Best
) -> Iterator[float]:
    """Compare those who live in a cell with those who visit it, for the good of both."""
    faiss = _faiss()
    # Both in the order of the vectors, so that those of an owner stand together.
    cells = np.arange(near.max() + 2)
    home = np.argsort(near[:, 0], kind="stable")
    homes = np.searchsorted(near[home, 0], cells)
    visits = np.argsort(near.ravel(), kind="stable")
    visited = np.searchsorted(near.ravel()[visits], cells)
    guests = faiss.ResultHeap(len(vectors), links.k, keep_max=True)
    found: dict[int, list[tuple[Any, ...]]] = {}

    def compare(cell: int) -> None:
        members = home[homes[cell] : homes[cell + 1]]
        visitors = visits[visited[cell] : visited[cell + 1]] // near.shape[1]
        theirs = np.asarray(vectors[members], np.float32)
        hosts = faiss.ResultHeap(len(members), links.k, keep_max=True)
        everyone = np.arange(len(members))
        found[cell] = [(members, hosts)]
        with _one_thread():
            for at in range(0, len(visitors), _ROWS):
                of = visitors[at : at + _ROWS]
                similarity = np.asarray(vectors[of], np.float32) @ theirs.T
                first = np.searchsorted(owners[members], owners[of])
                stop = np.searchsorted(owners[members], owners[of], "right")
                for step in range((stop - first).max()):
                    own = np.flatnonzero(first + step < stop)
                    similarity[own, first[own] + step] = -np.inf
                # One may visit cells that others are at work on: into the common heap later.
                few = faiss.ResultHeap(len(of), links.k, keep_max=True)
                few.add_result_subset(np.arange(len(of)), similarity, members)
                hosts.add_result_subset(everyone, similarity.T, of)
                found[cell].append((of, few))

    # The largest first, beside others that take as long.
    work = np.diff(homes) * np.diff(visited)
    order = np.argsort(-work, kind="stable")[: np.count_nonzero(work)]
    for start in range(0, len(order), _AT_ONCE):
        batch = order[start : start + _AT_ONCE].tolist()
        in_threads(compare, batch)
        for cell in batch:
            (members, hosts), *others = found.pop(cell)
            links.merge(members, hosts.I, hosts.D)
            for of, few in others:
                guests.add_result_subset(of, few.D, few.I)
        yield work[order[: start + _AT_ONCE]].sum() / work.sum()
    for at in range(0, len(vectors), _COLUMNS):
        block = slice(at, at + _COLUMNS)
        links.merge(block, guests.I[block], guests.D[block])


def _follow(
    vectors: Floats,
    owners: NDArray[np.int64],
    order: NDArray[np.int64],
    links: _Best,
    best: _Best,
) -> Iterator[float]:
    """Compare each vector with its neighbours' neighbours as well.

    Most of the near ones that no visit found are among these. In ``order``, one after the
    other have many in common, so that each is read for many.
    """
    faiss = _faiss()
    n, d = vectors.shape

    def compare(of: NDArray[np.int64]) -> None:
        rows = links.rows[of]
        best.merge(of, rows, links.similarity[of])
        beyond = np.where(rows[:, :, None] < 0, -1, links.rows[rows]).reshape(len(of), -1)
        beyond.sort(axis=1)
        # Once each, and none of the same owner; faiss passes over those below zero.
        beyond[:, 1:][beyond[:, 1:] == beyond[:, :-1]] = -1
        beyond[owners[beyond] == owners[of][:, None]] = -1
        wanted = np.zeros(n, bool)
        wanted[beyond[beyond >= 0]] = True
        read = np.flatnonzero(wanted)
        place = np.cumsum(wanted) - 1
        mine, theirs = (np.asarray(vectors[which], np.float32) for which in (of, read))
        ids = np.where(beyond < 0, -1, place[beyond])
        similarity = np.empty(ids.shape, np.float32)
        pointers = [faiss.swig_ptr(array) for array in (similarity, mine, theirs, ids)]
        with _one_thread():
            faiss.fvec_inner_products_by_idx(*pointers, d, *ids.shape)
        best.merge(of, beyond, similarity)

    blocks = [order[at : at + _FOLLOWED] for at in range(0, n, _FOLLOWED)]
    for start in range(0, len(blocks), _AT_ONCE):
        in_threads(compare, blocks[start : start + _AT_ONCE])
        yield min(1.0, (start + _AT_ONCE) / len(blocks))


@contextmanager
def _one_thread() -> Iterator[None]:
    """Keep faiss from starting threads of its own in this one."""
    faiss = _faiss()
    threads = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)
    try:
        yield
    finally:
        faiss.omp_set_num_threads(threads)


def _faiss() -> Any:
    try:
        import faiss
    except ImportError as error:
        raise MissingDependencyError(
            f"A search for similar features among more than {MOST_EXACT:,}", "faiss-cpu", "torch"
        ) from error
    return faiss
