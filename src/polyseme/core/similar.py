"""Similar features: nearest neighbours among the vectors that represent features."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from polyseme.core.arrays import Floats, to_numpy
from polyseme.core.parallel import in_threads, multiplies_bfloat16
from polyseme.errors import InputError, MissingDependencyError

# Features with fewer examples are not compared: as many as make a meaning, since fewer hardly show
# what they have in common, and most features have fewer.
MIN_EXAMPLES = 5
# Up to this many vectors, every pair is compared, which takes seconds.
MOST_EXACT = 30_000
# There are about as many cells as vectors per cell. Each vector visits enough cells to be compared
# with _COMPARED others, and at least _LEAST_VISITS: bench/similar.py measures recall and time.
_COMPARED, _LEAST_VISITS, _MOST_CELLS = 7_200, 12, 2**15 - 1
# k-means only divides the vectors into cells, so a sample, a few iterations and the dimensions of
# most variance suffice.
_SAMPLED, _ITERATIONS, _DIMENSIONS = 40, 4, 64
# Candidates, found in lower precision, whose similarity is measured.
_LINKS = 8
# Parts of a cell; a visitor takes the best of each.
_PARTS = 4
# Numbers of rows and columns are padded to multiples of these.
_VISITORS, _MEMBERS = 256, 64
# Numbers of values: in the matrices of all threads, in the vectors that one thread measures at
# once, and in the vectors that are otherwise read at once.
_PRODUCTS, _MEASURED, _READ = 1 << 25, 1 << 18, 1 << 23
_DEPTH = 16
# -_OUT is less than any cosine; _SLACK is how far one of low precision may exceed its bounds.
_OUT, _SLACK = 3.0, 0.5
# Cells or blocks between reports of progress.
_AT_ONCE = 64
_ROWS, _COLUMNS = 1024, 8192

Progress = Callable[[float], None]


class NearestFeatures(NamedTuple):
    """The nearest neighbours of each vector, the most similar first.

    Attributes
    ----------
    neighbours : ndarray of int64, shape (n, k)
        Rows of the vectors; -1 where there are fewer than k.
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
    folder: Path | None = None,
    progress: Progress | None = None,
) -> NearestFeatures:
    """Find the vectors of other owners that are most similar to each vector.

    More than `MOST_EXACT` vectors are divided into cells by spherical k-means, and each is compared
    with the vectors of its nearest cells (an inverted file), in bfloat16 if the processor has
    units for it. The best are then measured in float32, so the similarities are exact. Near
    neighbours are rarely missed; those that are hardly nearer than the rest, as is usual among
    random vectors of many dimensions, are missed more often.

    Parameters
    ----------
    vectors : array, shape (n, d)
        Unit vectors in float32 or float16. They may be memory-mapped, as they are read in blocks.
        A zero vector has similarity 0 to every other.
    owners : array of int, shape (n,)
        The neuron that each vector belongs to, in ascending order: features of one neuron are
        never neighbours.
    k : int
        Number of neighbours to find, at least 1.
    exact : bool, optional
        Whether to compare all pairs; by default, only up to `MOST_EXACT` vectors.
    folder : Path, optional
        Folder for a temporary copy of the vectors, if cells are searched; by default, that of
        temporary files.
    progress : callable, optional
        Called occasionally with the fraction completed.

    Returns
    -------
    NearestFeatures
        Identical, byte for byte, on every call in the same environment.

    Raises
    ------
    InputError
        If shapes do not match, ``k`` is out of range, or the owners are not in ascending order.
    MissingDependencyError
        If cells are needed and faiss is not installed.
    """
    array = vectors if isinstance(vectors, np.ndarray) else to_numpy(vectors)
    if array.ndim != 2 or array.dtype.kind != "f":
        raise InputError(
            f"vectors has shape {array.shape} and dtype {array.dtype}; expected "
            "floats of shape (n, d), a unit vector for each feature."
        )
    group = to_numpy(owners)
    if group.shape != (len(array),) or (group.size and group.dtype.kind not in "iu"):
        raise InputError(
            f"owners has shape {group.shape} and dtype {group.dtype}; expected one integer "
            f"for each of the {len(array)} vectors."
        )
    if (np.diff(group) < 0).any():
        where = int(np.argmax(np.diff(group) < 0))
        raise InputError(
            f"owners[{where + 1}] is {group[where + 1]}, after {group[where]}; expected "
            "ascending order, so that the vectors of each owner are contiguous."
        )
    if isinstance(k, bool) or not isinstance(k, int | np.integer) or k < 1:
        raise InputError(f"k is {k!r}; a whole number of at least 1 is expected.")
    best = _Best(len(array), int(k))
    compare_all = len(array) <= MOST_EXACT if exact is None else exact
    group = group.astype(np.int64)
    search = (
        _all_pairs(array, group, best) if compare_all else _within_cells(array, group, best, folder)
    )
    for done in search:
        if progress is not None:
            progress(done)
    return best.result()


class _Best:
    """The best neighbours of each vector so far."""

    def __init__(self, n: int, k: int) -> None:
        self.k = k
        self.rows = np.full((n, k), -1, np.int64)
        self.similarity = np.full((n, k), -np.inf, np.float32)

    def merge(self, numbers: Any, rows: NDArray[np.int64], similarity: Floats) -> None:
        """Add candidates for some vectors, (m, c) each; row -1 or similarity -inf means none."""
        rows = np.concatenate([self.rows[numbers], rows], axis=1)
        similarity = np.concatenate([self.similarity[numbers], similarity], axis=1)
        similarity[rows < 0] = -np.inf
        order = np.argsort(rows, axis=1)
        rows = np.take_along_axis(rows, order, axis=1)
        similarity = np.take_along_axis(similarity, order, axis=1)
        # A pair that is found twice may differ in the last bit; it counts once.
        similarity[:, 1:][rows[:, 1:] == rows[:, :-1]] = -np.inf
        # Ties in the order of their rows.
        order = np.argsort(-similarity, axis=1, kind="stable")[:, : self.k]
        self.rows[numbers] = np.take_along_axis(rows, order, axis=1)
        self.similarity[numbers] = np.take_along_axis(similarity, order, axis=1)

    def result(self) -> NearestFeatures:
        none = ~np.isfinite(self.similarity)
        return NearestFeatures(
            np.where(none, -1, self.rows), np.where(none, np.float32(np.nan), self.similarity)
        )


def _all_pairs(vectors: Floats, owners: NDArray[np.int64], best: _Best) -> Iterator[float]:
    n = len(vectors)
    for first in range(0, n, _ROWS):
        mine = np.asarray(vectors[first : first + _ROWS], np.float32)
        here = slice(first, first + len(mine))
        for start in range(0, n, _COLUMNS):
            theirs = np.asarray(vectors[start : start + _COLUMNS], np.float32)
            similarity = mine @ theirs.T
            others = owners[start : start + len(theirs)]
            # Owners ascend, so most blocks share none.
            if owners[here][0] <= others[-1] and others[0] <= owners[here][-1]:
                similarity[owners[here][:, None] == others] = -np.inf
            columns = np.argpartition(-similarity, min(best.k, len(theirs)) - 1, axis=1)
            columns = columns[:, : best.k]
            best.merge(here, columns + start, np.take_along_axis(similarity, columns, axis=1))
        yield (first + len(mine)) / n


def _within_cells(
    vectors: Floats, owners: NDArray[np.int64], best: _Best, folder: Path | None
) -> Iterator[float]:
    near = _nearest_cells(vectors)
    yield 0.2
    order = np.argsort(near[:, 0], kind="stable")
    links = _Best(len(vectors), max(best.k, _LINKS))
    for done in _visit(vectors, owners, near, order, links, folder):
        yield 0.2 + 0.7 * done
    for done in _measure(vectors, order, links, best):
        yield 0.9 + 0.1 * done


def _nearest_cells(vectors: Floats) -> NDArray[np.int16]:
    """The cells nearest to each vector, its own first: shape (n, n_visits)."""
    faiss = _faiss()
    n = len(vectors)
    n_cells = min(round(n**0.5), _MOST_CELLS)
    n_visits = min(max(round(_COMPARED * n_cells / n), _LEAST_VISITS), n_cells)
    sample = np.random.default_rng(0).choice(n, min(n, _SAMPLED * n_cells), replace=False)
    some = np.sort(sample[:_COLUMNS])
    step = _rows_at_once(vectors)
    gram = np.zeros((vectors.shape[1], vectors.shape[1]), np.float32)
    for start in range(0, len(some), step):
        rows = _single(vectors[some[start : start + step]])
        gram += rows.T @ rows
    basis = np.linalg.eigh(gram)[1][:, -_DIMENSIONS:]
    flat = np.empty((n, basis.shape[1]), np.float32)
    for start in range(0, n, step):
        # A copy, as torch warns about read-only arrays.
        flat[start : start + step] = _single(np.array(vectors[start : start + step])) @ basis
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
    near = np.empty((n, n_visits), np.int16)  # which sorts quickly
    for start in range(0, n, _COLUMNS):
        block = slice(start, start + _COLUMNS)
        near[block] = faiss.knn(
            flat[block], kmeans.centroids, near.shape[1], metric=faiss.METRIC_INNER_PRODUCT
        )[1]
    return near


def _rows_at_once(vectors: Floats) -> int:
    return min(_COLUMNS, max(1, _READ // int(vectors.shape[1])))


def _visit(
    vectors: Floats,
    owners: NDArray[np.int64],
    near: NDArray[np.int16],
    order: NDArray[np.int64],
    links: _Best,
    folder: Path | None,
) -> Iterator[float]:
    """Compare the members of each cell, its hosts, with its visitors, for the neighbours of both.

    A host sees all visitors of its cell together, and takes the best of them. A visitor sees its
    cells one by one: it takes the best of each quarter of each cell, and finally the best of
    these.
    """
    import torch

    n, n_visits = near.shape
    data = _laid_out(vectors, order, folder)
    # From here on, vectors are numbered by their places in that order.
    place = np.empty(n, np.int64)
    place[order] = np.arange(n)
    named = np.append(order, -1)
    to = near[order]
    cells = np.arange(to.max() + 2)
    homes = np.searchsorted(to[:, 0], cells)
    visits = np.argsort(to.ravel(), kind="stable")
    visited = np.searchsorted(to.ravel()[visits], cells)
    sizes = np.diff(homes)
    # The best of each visit and quarter: its similarity, and its number within the cell.
    similar = np.full((n, n_visits, _PARTS), -np.inf, np.float16)
    member = np.zeros(similar.shape, np.min_scalar_type(_padded(int(sizes.max()), _MEMBERS)))

    rooms: list[_Room] = []

    def compare(cell: int) -> None:
        first, size = int(homes[cell]), int(sizes[cell])
        width = _padded(size, _MEMBERS)
        hosts = data[first : first + width]
        visitors, slots = np.divmod(visits[visited[cell] : visited[cell + 1]], n_visits)
        visitor, host = _of_the_same(owners, order, place, visitors, slice(first, first + size))
        share = _PRODUCTS // (os.cpu_count() or 1) // max(width, data.shape[1])
        step = max(_VISITORS, share // _VISITORS * _VISITORS)
        try:
            room = rooms.pop()
        except IndexError:
            room = _Room(data.dtype)
        for start in range(0, len(visitors), step):
            here, slot = visitors[start : start + step], slots[start : start + step]
            rows = np.full(_padded(len(here), _VISITORS), n)
            rows[: len(here)] = here
            guests = room.matrix("guests", len(rows), data.shape[1])
            products = room.matrix("products", len(rows), width)
            torch.index_select(data, 0, torch.from_numpy(rows), out=guests)
            torch.mm(guests, hosts.T, out=products)
            products[len(here) :] = -_OUT
            products[:, size:] = -_OUT
            mine = (visitor >= start) & (visitor < start + step)
            products[torch.from_numpy(visitor[mine] - start), torch.from_numpy(host[mine])] = -_OUT
            part = width // _PARTS
            most, winner = products.view(len(rows), _PARTS, part).max(dim=2)
            similar[here, slot] = most[: len(here)].half().numpy()
            winner += torch.arange(_PARTS) * part
            member[here, slot] = winner[: len(here)].numpy()
            rank, most = _best_of_columns(products, links.k)
            best = rows[rank[:size].numpy()]
            best[(most[:size] < -1 - _SLACK).numpy()] = n
            links.merge(order[first : first + size], named[best], most[:size].float().numpy())
        rooms.append(room)

    work = sizes * np.diff(visited)
    done = np.cumsum(work) / work.sum()
    worked = np.flatnonzero(work).tolist()
    for start in range(0, len(worked), _AT_ONCE):
        together = worked[start : start + _AT_ONCE]
        in_threads(compare, together)
        yield float(done[together[-1]])
    for start in range(0, n, _COLUMNS):
        block = slice(start, start + _COLUMNS)
        rows = (homes[to[block]][:, :, None] + member[block]).reshape(-1, n_visits * _PARTS)
        values = similar[block].reshape(rows.shape).astype(np.float32)
        some = np.argpartition(-values, min(links.k, rows.shape[1]) - 1, axis=1)[:, : links.k]
        values = np.take_along_axis(values, some, axis=1)
        rows = np.where(values < -1 - _SLACK, n, np.take_along_axis(rows, some, axis=1))
        links.merge(order[block], named[rows], values)
    yield 1.0


def _laid_out(vectors: Floats, order: NDArray[np.int64], folder: Path | None) -> Any:
    """A tensor of the vectors in this order, one cell after another, followed by zeros.

    It has the precision in which comparison is fastest, and lies in an unnamed file, as it may
    not fit in memory.
    """
    import torch

    shape = (len(vectors) + _MEMBERS, vectors.shape[1])
    dtype, held = torch.float32, "f4"
    if multiplies_bfloat16():
        dtype, held = torch.bfloat16, "i2"
    with tempfile.TemporaryFile(dir=folder) as file:
        if hasattr(os, "posix_fallocate"):
            # A full disk is an error here; later, it would end the process.
            os.posix_fallocate(file.fileno(), 0, shape[0] * shape[1] * dtype.itemsize)
        array = np.memmap(file, held, "r+", shape=shape)
    data = torch.from_numpy(array).view(dtype)

    step = _rows_at_once(vectors)

    def copy(start: int) -> None:
        some = np.asarray(vectors[order[start : start + step]])
        data[start : start + len(some)] = torch.from_numpy(some)

    in_threads(copy, range(0, len(vectors), step))
    return data


class _Room:
    """Memory for reuse: writing to it is several times faster than to new memory."""

    def __init__(self, dtype: Any) -> None:
        self._dtype = dtype
        self._held: dict[str, Any] = {}

    def matrix(self, name: str, rows: int, columns: int) -> Any:
        """A tensor of this shape, in the memory of the previous one of this name."""
        import torch

        held = self._held.get(name)
        if held is None or len(held) < rows * columns:
            self._held[name] = held = torch.empty(rows * columns, dtype=self._dtype)
        return held[: rows * columns].view(rows, columns)


def _of_the_same(
    owners: NDArray[np.int64],
    order: NDArray[np.int64],
    place: NDArray[np.int64],
    visitors: NDArray[np.int64],
    hosts: slice,
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Pairs of a visitor and a host of the same owner, as numbers within the cell."""
    owner = owners[order[hosts]]
    first = np.searchsorted(owners, owner)
    count = np.searchsorted(owners, owner, "right") - first
    host = np.repeat(np.arange(len(owner)), count)
    nth = np.arange(count.sum()) - np.repeat(np.cumsum(count) - count, count)
    wanted = place[first[host] + nth]
    visitor = np.minimum(np.searchsorted(visitors, wanted), len(visitors) - 1)
    there = visitors[visitor] == wanted
    return visitor[there], host[there]


def _best_of_columns(values: Any, k: int) -> tuple[Any, Any]:
    """Rows and values of the k largest of each column, both of shape (columns, k).

    The k blocks with the largest maxima contain them. Which of equal values are taken is
    arbitrary.
    """
    import torch

    blocks = values.view(_DEPTH, len(values) // _DEPTH, values.shape[1])
    k_blocks = min(k, blocks.shape[1])
    peaks = blocks.amax(dim=0).T.contiguous().float().neg_().numpy()
    # NumPy's argpartition is several times faster than torch's topk.
    block = torch.from_numpy(np.argpartition(peaks, k_blocks - 1, axis=1)[:, :k_blocks])
    inside = blocks.permute(2, 1, 0).gather(1, block[:, :, None].expand(-1, -1, _DEPTH))
    most, index = inside.flatten(1).topk(min(k, k_blocks * _DEPTH), dim=1)
    return index % _DEPTH * blocks.shape[1] + block.gather(1, index // _DEPTH), most


def _padded(n: int, to: int) -> int:
    # Few distinct shapes, as each new one of a matrix has a setup cost.
    return -(-n // to) * to


def _measure(
    vectors: Floats, order: NDArray[np.int64], links: _Best, best: _Best
) -> Iterator[float]:
    """Compute the similarity of the candidates in single precision."""

    def compare(numbers: NDArray[np.int64]) -> None:
        rows = links.rows[numbers]
        mine, theirs = (_single(vectors[some]) for some in (numbers, rows))
        best.merge(numbers, rows, np.matmul(theirs, mine[:, :, None])[:, :, 0])

    # Neighbours in this order have many candidates in common.
    step = max(1, _MEASURED // vectors.shape[1])
    blocks = [order[first : first + step] for first in range(0, len(order), step)]
    for start in range(0, len(blocks), _AT_ONCE):
        in_threads(compare, blocks[start : start + _AT_ONCE])
        yield min(1.0, (start + _AT_ONCE) / len(blocks))


def _single(values: Any) -> Floats:
    """Convert to single precision, which torch does several times faster than NumPy."""
    import torch

    return np.asarray(torch.from_numpy(np.ascontiguousarray(values)).float())


def _faiss() -> Any:
    try:
        import faiss
    except ImportError as error:
        raise MissingDependencyError(
            f"A search for similar features among more than {MOST_EXACT:,}", "faiss-cpu", "torch"
        ) from error
    return faiss
