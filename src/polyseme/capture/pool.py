"""Rows that examples refer to, stored once however many neurons share them."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from polyseme.errors import RunError

Array = NDArray[Any]

_BLOCK_BYTES = 4 << 20
# Maximum bytes of a file in memory that are not yet on disk.
_BEHIND_BYTES = 1 << 20
_behind = ThreadPoolExecutor(1, thread_name_prefix="polyseme-rows")


class Pool:
    """Rows by key, from which unused ones are dropped from time to time.

    Keys are added in ascending order, each once, as inputs come in order.

    Parameters
    ----------
    file : Path, optional
        Store the rows in files of this name, with a number appended, instead of in memory. A
        `state` stays valid until `forget`: the files that it needs change only past its rows.
    expected : int
        Number of rows that may be live at the end: with fewer than twice as many, none are dropped.
    """

    def __init__(self, file: Path | None = None, expected: int = 0) -> None:
        self._keys = np.empty(0, dtype=np.int64)
        self._n = 0
        self._n_live = self._expected = expected
        self._rows: _InMemory | _InFile = _InMemory() if file is None else _InFile(file)

    def __len__(self) -> int:
        return self._n

    @property
    def keys(self) -> NDArray[np.int64]:
        """Keys of all rows, ascending, of shape (len,)."""
        return self._keys[: self._n]

    def add(self, keys: Array, rows: Array) -> None:
        """Add rows under new keys above all others: int64 (m,), and (m, ...).

        Adding float32 rows to a float16 pool converts it to float32.
        """
        if not len(keys):
            return
        if self._n + len(keys) > len(self._keys):
            grown = np.empty((self._n + len(keys)) * 5 // 4 + 1024, np.int64)
            grown[: self._n] = self.keys
            self._keys = grown
        held = self._rows.dtype
        if held is not None and held != rows.dtype:
            if rows.dtype.itemsize > held.itemsize:
                self._rows = self._rows.replaced(chunk.astype(rows.dtype) for chunk in self._rows)
            else:
                rows = rows.astype(held)
        self._rows.append(np.ascontiguousarray(rows))
        self._keys[self._n : self._n + len(keys)] = keys
        self._n += len(keys)

    @property
    def is_bloated(self) -> bool:
        """Whether it may hold twice the rows that were last live, so that dropping pays off."""
        return self._n > 2 * self._n_live + 256

    def keep(self, live: Array) -> None:
        """Drop every row whose key is not among the live ones, which may be in any order."""
        kept = np.zeros(self._n, bool)
        if self._n:
            # Lookups of sorted keys are several times faster.
            ordered = np.sort(live)
            place = np.searchsorted(self.keys, ordered).clip(max=self._n - 1)
            kept[place[self.keys[place] == ordered]] = True
        if not kept.all():
            self._rows = self._rows.replaced(self._picked(kept))
            self._keys = self.keys[kept]
            self._n = len(self._keys)
        self._n_live = max(self._n, self._expected)

    def _picked(self, kept: Array) -> Iterator[Array]:
        start = 0
        for chunk in self._rows:
            # Several times faster than indexing with a mask.
            yield chunk.take(np.flatnonzero(kept[start : start + len(chunk)]), axis=0)
            start += len(chunk)

    def take(self, keys: Array) -> Array | None:
        """Rows of these keys, (m, ...), in order; None if there never were any rows."""
        if self._rows.dtype is None or self._rows.shape is None:
            return None
        order = np.argsort(keys, kind="stable")
        places = np.searchsorted(self.keys, keys[order])
        if len(keys) and not np.array_equal(self.keys.take(places, mode="clip"), keys[order]):
            raise RunError("Rows that examples refer to are missing; run the analysis again.")
        result = np.empty((len(keys), *self._rows.shape), self._rows.dtype)
        sorted_already = bool((order[1:] > order[:-1]).all())
        start = 0
        for chunk in self._rows:
            low, high = np.searchsorted(places, (start, start + len(chunk)))
            rows = slice(low, high) if sorted_already else order[low:high]
            result[rows] = chunk.take(places[low:high] - start, axis=0)
            start += len(chunk)
        return result

    def state(self) -> dict[str, Array]:
        """The complete state, for `restore`; rows in a file are stored by reference."""
        return {"keys": self.keys.copy(), **self._rows.state()}

    def restore(self, state: Mapping[str, Array]) -> None:
        """Continue from a `state`."""
        self._keys = np.array(state["keys"])
        self._n = len(self._keys)
        self._n_live = max(self._n, self._expected)
        self._rows = self._rows.restored(state, self._n)

    def part(self) -> dict[str, Array]:
        """All keys and rows, wherever they are stored, for `merge`."""
        rows = self.take(self.keys)
        return {"keys": self.keys.copy()} | ({} if rows is None else {"rows": rows})

    def merge(self, part: Mapping[str, Array]) -> None:
        """Merge the `part` of another pool with disjoint keys."""
        if "rows" not in part or not len(part["keys"]):
            return
        keys, rows = part["keys"], part["rows"]
        if self._n and keys[0] < self.keys[-1]:
            mine = self.take(self.keys)
            keys = np.concatenate([self.keys, keys])
            order = keys.argsort()
            keys, rows = keys[order], np.concatenate([mine, rows])[order]
            self.keep(np.empty(0, np.int64))
        self.add(keys, rows)

    def forget(self) -> None:
        """Remove files that only earlier states need, once the last `state` is safely stored."""
        self._rows.forget()


class _InMemory:
    """Rows in blocks, so that neither growing nor dropping copies all of them at once."""

    def __init__(self) -> None:
        self._blocks: list[Array] = []
        self._last = 0  # number of rows in the last block
        self.dtype: np.dtype[Any] | None = None
        self.shape: tuple[int, ...] | None = None

    def __iter__(self) -> Iterator[Array]:
        # By index, as blocks may be freed once read.
        for number in range(len(self._blocks)):
            last = number == len(self._blocks) - 1
            yield self._blocks[number][: self._last] if last else self._blocks[number]

    def append(self, rows: Array) -> None:
        self.dtype, self.shape = rows.dtype, rows.shape[1:]
        while len(rows):
            if not self._blocks or self._last == len(self._blocks[-1]):
                self._blocks.append(np.empty((_rows_at_once(rows), *self.shape), self.dtype))
                self._last = 0
            room = len(self._blocks[-1]) - self._last
            part, rows = rows[:room], rows[room:]
            self._blocks[-1][self._last : self._last + len(part)] = part
            self._last += len(part)

    def replaced(self, chunks: Iterator[Array]) -> _InMemory:
        """A copy with other rows, derived from these."""
        new = _InMemory()
        new.dtype, new.shape = self.dtype, self.shape
        for number, rows in enumerate(chunks):
            new.append(rows)
            if number < len(self._blocks) - 1:
                self._blocks[number] = np.empty(0)  # no longer needed
        return new

    def state(self) -> dict[str, Array]:
        if self.dtype is None or self.shape is None:
            return {}
        blocks = list(self)
        rows = np.concatenate(blocks) if blocks else np.empty((0, *self.shape), self.dtype)
        return {"rows": rows}

    def restored(self, state: Mapping[str, Array], _: int) -> _InMemory:
        new = _InMemory()
        if "rows" in state:
            new.append(state["rows"])
        return new

    def forget(self) -> None:
        """There are no files."""


class _InFile:
    """Rows stored consecutively in a file.

    Parts that a state needs never change: dropping rows then writes a new file. If no state needs
    the file, rows move up in place, since overwriting a file's existing pages is several times
    faster than writing new ones.
    """

    def __init__(self, file: Path, number: int = 0) -> None:
        self._file = file
        self._number = number
        self._n = 0
        self._new_bytes = 0
        self._settled: Future[None] | None = None
        self._needed: set[int] = set()  # by the last state
        self.dtype: np.dtype[Any] | None = None
        self.shape: tuple[int, ...] | None = None

    def _path(self, number: int) -> Path:
        return self._file.with_name(f"{self._file.name}.{number}")

    def __iter__(self) -> Iterator[Array]:
        if self.dtype is None or self.shape is None:
            return
        together = max(1, _BLOCK_BYTES // max(1, self._row_bytes))
        with _explained(self._path(self._number)), self._path(self._number).open("rb") as file:
            for start in range(0, self._n, together):
                n = min(together, self._n - start)
                rows = np.empty((n, *self.shape), self.dtype)
                if start:
                    _forget(file.fileno(), start * self._row_bytes)
                if file.readinto(_bytes_of(rows)) != rows.nbytes:
                    raise RunError(
                        f"{self._path(self._number)} is shorter than when it was written; start "
                        f"over with overwrite=True (--overwrite)."
                    )
                yield rows

    def append(self, rows: Array) -> None:
        path = self._path(self._number)
        if self.dtype is None:
            with _explained(path):
                path.parent.mkdir(parents=True, exist_ok=True)
                path.touch()
        self.dtype, self.shape = rows.dtype, rows.shape[1:]
        with _explained(path), path.open("r+b", buffering=0) as file:
            # It may be longer, from before rows were dropped.
            file.seek(self._n * self._row_bytes)
            unwritten = _bytes_of(rows)
            while unwritten:
                unwritten = unwritten[file.write(unwritten) :]
        self._n += len(rows)
        self._new_bytes += rows.nbytes
        if self._new_bytes > _BEHIND_BYTES and (self._settled is None or self._settled.done()):
            self._new_bytes = 0
            self._settled = _behind.submit(_settle, path)

    @property
    def _row_bytes(self) -> int:
        assert self.dtype is not None
        assert self.shape is not None
        return self.dtype.itemsize * int(np.prod(self.shape, dtype=np.int64))

    def replaced(self, chunks: Iterator[Array]) -> _InFile:
        first = next(chunks, np.empty((0, *(self.shape or ())), self.dtype))
        # No row is wider than before, so writing stays behind reading.
        in_place = self._number not in self._needed and first.dtype == self.dtype
        new = _InFile(self._file, self._number + (not in_place))
        new._needed = self._needed
        for rows in chain([first], chunks):
            new.append(np.ascontiguousarray(rows))
        if not in_place and self._number not in self._needed:
            self._path(self._number).unlink(missing_ok=True)
        return new

    def state(self) -> dict[str, Array]:
        self._needed = self._needed | {self._number}
        if self.dtype is None or self.shape is None:
            return {}
        with _explained(self._path(self._number)), self._path(self._number).open("rb") as file:
            os.fsync(file.fileno())
        return {
            "file": np.array([self._number], np.int64),
            "shape": np.array(self.shape, np.int64),
            "dtype": np.frombuffer(self.dtype.str.encode(), np.uint8),
        }

    def restored(self, state: Mapping[str, Array], n: int) -> _InFile:
        if "file" not in state:
            return _InFile(self._file)
        new = _InFile(self._file, int(state["file"][0]))
        new.dtype = np.dtype(state["dtype"].tobytes().decode())
        new.shape = tuple(int(size) for size in state["shape"])
        new._n, new._needed = n, {new._number}
        path = new._path(new._number)
        size = n * new._row_bytes
        with _explained(path):
            if path.stat().st_size < size:
                raise RunError(
                    f"{path} is shorter than when it was written; start over with overwrite=True "
                    f"(--overwrite)."
                )
            # Rows appended after the state will come again.
            os.truncate(path, size)
        new.forget()
        return new

    def forget(self) -> None:
        self._needed = {self._number}
        for path in self._file.parent.glob(f"{self._file.name}.*"):
            if path != self._path(self._number):
                path.unlink(missing_ok=True)


def _settle(path: Path) -> None:
    """Flush a file's new data to disk and free its memory.

    Rows are not read before the end of the pass. Until then they would occupy memory that is needed
    for other things, and recently used memory is several times faster to write.
    """
    if hasattr(os, "posix_fadvise"):
        with suppress(OSError), path.open("rb") as file:
            os.fdatasync(file.fileno())
            _forget(file.fileno(), 0)


def _forget(file: int, end: int) -> None:
    """Free a file's cached memory up to here (0: all), as far as it is on disk."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(file, 0, end, os.POSIX_FADV_DONTNEED)


def _bytes_of(rows: Array) -> memoryview:
    # Via NumPy, as an empty memoryview with several axes cannot be cast.
    return memoryview(rows.reshape(-1).view(np.uint8).data)


def _rows_at_once(rows: Array) -> int:
    return max(1, _BLOCK_BYTES // max(1, rows[:1].nbytes))


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise RunError(
            f"{path} cannot be read or written: {error.strerror or error}. Fix this, "
            "then resume with resume=True (--resume)."
        ) from error
