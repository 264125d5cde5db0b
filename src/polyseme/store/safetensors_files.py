"""The arrays of a safetensors file: writing them, and reading untrusted files whole or in part."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from polyseme.errors import InputError, RunError
from polyseme.store.files import OVERWRITE, decoding, plain_json, reporting, whole, writing
from polyseme.store.format import JSON, SAFETENSORS_DTYPES, Array, Problem

_METADATA = "metadata.json"  # stored as an array, as a safetensors header has a limited size


class Arrays(Mapping[str, np.ndarray]):
    """Arrays by name. Each is read on first access, and then cached.

    `between` and `take` read only some rows of an array. Made by `RunFolder`.

    Parameters
    ----------
    folder : Path
        The run, for messages.
    locate : callable
        Returns the path of a file of the run, checked on each call.
    file : str
        Name of the file.
    schema, sizes
        As for `check_headers`.
    checks : mapping of str to callable
        Check of the values of an array; raises `Problem`.
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
        """Names of the arrays with rules beyond dtype and shape."""
        return [name for name in self if name in self._checks]

    def load(self, name: str) -> np.ndarray:
        """Read one array and check it, without caching it."""
        # The file is not kept open between reads: truncating a memory-mapped file kills the
        # process.
        path = self._locate(self.file)
        with decoding(self.file), safe_open(path, framework="numpy") as opened:
            array: np.ndarray = opened.get_tensor(name)
        if name in self._checks:
            self._checks[name](array)
        return array

    def between(self, name: str, start: int, stop: int) -> np.ndarray:
        """Rows ``start`` to ``stop - 1`` of one array; their values are not checked.

        Raises
        ------
        KeyError
            There is no such array.
        InputError
            It has fewer rows.
        """
        length = self._length(name)
        if not 0 <= start <= stop <= length:
            raise InputError(f"Rows {start} to {stop} of {name!r} were requested; it has {length}.")
        if name in self._loaded:
            return self._loaded[name][start:stop]
        return self._read(name, [(start, stop)])

    def take(self, name: str, rows: Any) -> np.ndarray:
        """Some rows of one array, in the order requested; their values are not checked.

        Parameters
        ----------
        name : str
        rows : array of int, shape (n,)
            In any order; may repeat.

        Returns
        -------
        ndarray, shape (n, ...)

        Raises
        ------
        KeyError
            There is no such array.
        InputError
            A row is out of range.
        """
        length = self._length(name)
        wanted = np.asarray(rows, dtype=np.int64)
        if wanted.size and not 0 <= int(wanted.min()) <= int(wanted.max()) < length:
            raise InputError(
                f"Rows {wanted.min()} to {wanted.max()} of {name!r} were requested; it has "
                f"{length}."
            )
        if name in self._loaded:
            return np.asarray(self._loaded[name][wanted])
        unique, back = np.unique(wanted, return_inverse=True)
        stretches = np.split(unique, np.flatnonzero(np.diff(unique) > 1) + 1)
        array = self._read(name, [(int(s[0]), int(s[-1]) + 1) for s in stretches if len(s)])
        return np.asarray(array[back])

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
    """Replace the values of some arrays in a file that this process wrote.

    Raises
    ------
    InputError
        There is no such array, or it has another dtype or shape.
    """
    with safe_open(file, framework="numpy") as opened:
        for name, array in arrays.items():
            new = array.dtype.name, list(array.shape)
            header = opened.get_slice(name) if name in opened.keys() else None  # noqa: SIM118
            old = header and (SAFETENSORS_DTYPES.get(header.get_dtype()), header.get_shape())
            if new != old:
                raise InputError(
                    f"{name!r} is {new}, but in {file.name} it is {old}; it can be replaced only "
                    f"by the same dtype and shape."
                )
    with file.open("r+b") as raw:
        length = int.from_bytes(raw.read(8), "little")
        offsets = json.loads(raw.read(length))
        for name, array in arrays.items():
            raw.seek(8 + length + offsets[name]["data_offsets"][0])
            raw.write(np.ascontiguousarray(array).tobytes())


def check_headers(
    file: str,
    headers: Mapping[str, tuple[str, tuple[int, ...]]],
    schema: Mapping[str, Array],
    sizes: Mapping[str, int],
) -> None:
    """Check the dtype and shape of each of the format's arrays in a file.

    Parameters
    ----------
    file : str
        Name of the file, for the message.
    headers : mapping of str to (dtype name, shape)
        What the file has; arrays that the format does not name are accepted.
    schema : mapping of str to Array
        What the format requires.
    sizes : mapping of str to int
        The known named dimensions; the others take the first size seen.

    Raises
    ------
    Problem
        An array is missing, or has another dtype or shape.
    """
    known = dict(sizes)
    for name, array in schema.items():
        if name not in headers:
            if array.required:
                raise Problem(file, f"the array {name!r} is missing")
            continue
        dtype, shape = headers[name]
        if dtype not in array.dtypes:
            raise Problem(file, f"{name!r} is {dtype}, not {' or '.join(array.dtypes)}")
        free = array.shape[-1] == "..."
        wanted = array.shape[:-1] if free else array.shape
        fits = len(shape) > len(wanted) if free else len(shape) == len(wanted)
        if fits:
            for want, length in zip(wanted, shape, strict=False):
                size = want if isinstance(want, int) else known.setdefault(want, length)
                fits = fits and size == length
        if not fits:
            spelled = ", ".join(
                str(want) if isinstance(want, int) or want not in known else f"{want}={known[want]}"
                for want in array.shape
            )
            raise Problem(file, f"{name!r} has shape {shape}, not ({spelled})")


def storable(where: str, name: str, value: np.ndarray) -> np.ndarray:
    """An array as safetensors requires: contiguous, little-endian, of a supported dtype."""
    if not isinstance(name, str) or name == "__metadata__":
        raise InputError(f"An array of {where} cannot be named {name!r}.")
    array = np.asarray(value, order="C")
    if array.dtype.name not in SAFETENSORS_DTYPES.values():
        raise InputError(
            f"{name!r} of {where} is {array.dtype}; only booleans, integers and floats are stored."
        )
    return array.astype(array.dtype.newbyteorder("<"), copy=False)


def cast(what: str, array: np.ndarray, dtypes: tuple[str, ...]) -> np.ndarray:
    """Cast to the last of the format's dtypes, unless that would change values.

    A float may lose precision, but nothing may wrap around, overflow or lose a fraction.
    """
    wanted = np.dtype(dtypes[-1])
    whole = wanted.kind == "i"
    if array.dtype.kind not in ("iu" if whole else "iuf"):
        raise InputError(f"{what} is {array.dtype}, not {' or '.join(dtypes)}.")
    with np.errstate(over="ignore"):
        result = array.astype(wanted)
    if whole:
        bounds = np.iinfo(wanted)
        if array.size and (int(array.min()) < bounds.min or int(array.max()) > bounds.max):
            raise InputError(f"{what} has values that {wanted} cannot hold.")
    elif array.dtype.kind == "f" and not np.array_equal(np.isinf(result), np.isinf(array)):
        raise InputError(f"{what} has values that {wanted} cannot hold.")
    return result


def write_arrays(file: Path, arrays: Mapping[str, np.ndarray]) -> None:
    with writing(file):
        file.parent.mkdir(exist_ok=True)
        with whole(file) as aside:
            try:
                save_file(dict(sorted(arrays.items())), aside)
            except SafetensorError as error:
                raise OSError(str(error)) from error


def save_state(file: Path, arrays: Mapping[str, np.ndarray], metadata: Mapping[str, JSON]) -> None:
    """Save arrays and plain JSON in one file, replacing it atomically.

    Raises
    ------
    InputError
        An array that safetensors cannot hold, or metadata that is not JSON.
    """
    state = f"state {file.stem!r}"
    stored = {name: storable(state, name, array) for name, array in arrays.items()}
    if _METADATA in stored:
        raise InputError(f"An array of a state cannot be named {_METADATA!r}.")
    text = json.dumps(plain_json(f"metadata of {state}", metadata))
    stored[_METADATA] = np.frombuffer(text.encode(), dtype=np.uint8)
    write_arrays(file, stored)


def load_state(
    file: Path, beginnings: Sequence[str] = ("",)
) -> tuple[dict[str, np.ndarray], dict[str, JSON]] | None:
    """Load what `save_state` saved; None if there is no such file.

    Parameters
    ----------
    file : Path
    beginnings : sequence of str
        Read only the arrays whose names begin with one of these.

    Raises
    ------
    RunError
        The file is damaged.
    """
    if not file.exists():
        return None
    try:
        with safe_open(file, framework="numpy") as opened:
            arrays = {
                name: opened.get_tensor(name)
                for name in sorted(opened.keys())
                if name.startswith((*beginnings, _METADATA))
            }
        metadata = json.loads(arrays.pop(_METADATA).tobytes())
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise RunError(f"{file} is damaged ({error}). Start over with {OVERWRITE}.") from error
    return arrays, metadata
