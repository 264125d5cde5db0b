"""The arrays of one safetensors file of a run, read whole or in parts, with no trust in it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open

from polyseme.errors import InputError
from polyseme.store.damage import decoding, reporting
from polyseme.store.format import SAFETENSORS_DTYPES, Array, check_headers


class Arrays(Mapping[str, np.ndarray]):
    """Arrays by name. Each is read when it is first asked for, and then kept.

    `between` and `take` read, and keep, no more than some rows of one. Made by `RunFolder`.

    Parameters
    ----------
    folder : Path
        The run, for messages.
    locate : callable
        Path of a file of the run, checked anew.
    file : str
        Which one.
    schema, sizes
        As for `check_headers`.
    checks : mapping of str to callable
        What is asked of the values of an array.
    """

    def __init__(
        self,
        folder: Path,
        locate: Callable[[str], Path],
        file: str,
        schema: Mapping[str, Array],
        sizes: Mapping[str, int],
        checks: Mapping[str, Callable[[np.ndarray], None]],
    ) -> None:
        self.file = file
        self._folder = folder
        self._locate = locate
        self._checks = checks
        self._loaded: dict[str, np.ndarray] = {}
        with decoding(file), safe_open(locate(file), framework="numpy") as opened:
            headers = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118
            self.headers = {
                name: (
                    SAFETENSORS_DTYPES.get(header.get_dtype(), header.get_dtype()),
                    tuple(header.get_shape()),
                )
                for name, header in sorted(headers.items())
            }
        check_headers(file, self.headers, schema, sizes)

    @property
    def checked(self) -> list[str]:
        """Names of the arrays of which more is asked than a dtype and a shape."""
        return [name for name in self if name in self._checks]

    def load(self, name: str) -> np.ndarray:
        """Read one array and check it, without keeping it."""
        # The file is not held open between reads: it is memory-mapped, and one that is cut
        # short under a map kills the process.
        path = self._locate(self.file)
        with decoding(self.file), safe_open(path, framework="numpy") as opened:
            array: np.ndarray = opened.get_tensor(name)
        if name in self._checks:
            self._checks[name](array)
        return array

    def between(self, name: str, start: int, stop: int) -> np.ndarray:
        """Rows ``start`` to ``stop - 1`` of one array; what they hold is not checked.

        Raises
        ------
        KeyError
            There is no such array.
        InputError
            It has not so many rows.
        """
        length = self._length(name)
        if not 0 <= start <= stop <= length:
            raise InputError(f"Rows {start} to {stop} of {name!r} are asked for; it has {length}.")
        if name in self._loaded:
            return self._loaded[name][start:stop]
        return self._read(name, [(start, stop)])

    def take(self, name: str, rows: Any) -> np.ndarray:
        """Some rows of one array, in the order asked for; what they hold is not checked.

        Parameters
        ----------
        name : str
        rows : array of int, shape (n,)
            In any order, repeated or not.

        Returns
        -------
        ndarray, shape (n, ...)

        Raises
        ------
        KeyError
            There is no such array.
        InputError
            A row is beyond its end.
        """
        length = self._length(name)
        wanted = np.asarray(rows, dtype=np.int64)
        if wanted.size and not 0 <= int(wanted.min()) <= int(wanted.max()) < length:
            raise InputError(
                f"Rows {wanted.min()} to {wanted.max()} of {name!r} are asked for; it has {length}."
            )
        if name in self._loaded:
            return np.asarray(self._loaded[name][wanted])
        unique, back = np.unique(wanted, return_inverse=True)
        stretches = np.split(unique, np.flatnonzero(np.diff(unique) > 1) + 1)
        found = self._read(name, [(int(s[0]), int(s[-1]) + 1) for s in stretches if len(s)])
        return np.asarray(found[back])

    def _length(self, name: str) -> int:
        shape = self.headers[name][1]
        if not shape:
            raise InputError(f"{name!r} of {self.file} is a single number, without rows.")
        return int(shape[0])

    def _read(self, name: str, stretches: list[tuple[int, int]]) -> np.ndarray:
        dtype, shape = self.headers[name]
        with reporting(self._folder):
            path = self._locate(self.file)
            with decoding(self.file), safe_open(path, framework="numpy") as opened:
                part = opened.get_slice(name)
                parts = [part[start:stop] for start, stop in stretches if stop > start]
        if not parts:
            return np.empty((0, *shape[1:]), dtype)
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def __getitem__(self, name: str) -> np.ndarray:
        if name not in self.headers:
            raise KeyError(name)
        if name not in self._loaded:
            with reporting(self._folder):
                self._loaded[name] = self.load(name)
        return self._loaded[name]

    def __contains__(self, name: object) -> bool:
        return name in self.headers  # the Mapping default would load the array

    def __iter__(self) -> Iterator[str]:
        return iter(self.headers)

    def __len__(self) -> int:
        return len(self.headers)

    def __repr__(self) -> str:
        arrays = ", ".join(
            f"{name}: {dtype}{shape}" for name, (dtype, shape) in self.headers.items()
        )
        return f"<{self.file} with {arrays}>"


def overwrite(file: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Put other values in the place of some arrays of a file that this process wrote.

    Raises
    ------
    InputError
        There is no such array, or it is of another dtype or shape.
    """
    with safe_open(file, framework="numpy") as opened:
        for name, array in arrays.items():
            given = array.dtype.name, list(array.shape)
            header = opened.get_slice(name) if name in opened.keys() else None  # noqa: SIM118
            there = header and (SAFETENSORS_DTYPES.get(header.get_dtype()), header.get_shape())
            if given != there:
                raise InputError(
                    f"{name!r} is {given} and stands in {file.name} as {there}; the same is "
                    "expected, to put it in its place."
                )
    with file.open("r+b") as raw:
        length = int.from_bytes(raw.read(8), "little")
        offsets = json.loads(raw.read(length))
        for name, array in arrays.items():
            raw.seek(8 + length + offsets[name]["data_offsets"][0])
            raw.write(np.ascontiguousarray(array).tobytes())
