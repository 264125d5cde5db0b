"""Arrays as the pages read them: safetensors, small, and the same bytes each time."""

from __future__ import annotations

import gzip
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from polyseme.explorer.strict_json import compact_json

_NAMES = {
    np.dtype(dtype): name
    for dtype, name in {
        "u1": "U8",
        "i1": "I8",
        "u2": "U16",
        "i2": "I16",
        "i4": "I32",
        "f2": "F16",
        "f4": "F32",
        "f8": "F64",
    }.items()
}
_INTEGERS = tuple(np.dtype(name) for name in ("u1", "i1", "u2", "i2", "i4"))


def encode(arrays: Mapping[str, NDArray[Any]], metadata: Mapping[str, Any] | None = None) -> bytes:
    """A gzipped safetensors file.

    Integers are stored in the smallest dtype that holds them, and as float64, which JavaScript
    reads as a number, where int32 does not. Arrays are in the order of their items' sizes, so that
    each is aligned. Equal arrays give equal bytes, as the library's own writer, whose metadata has
    no fixed order, does not promise.

    Parameters
    ----------
    arrays : mapping of str to ndarray
    metadata : mapping of str to JSON, optional
        A text is stored as it is, any other value as its JSON text.
    """
    small = {name: _shrunk(np.asarray(array)) for name, array in arrays.items()}
    header: dict[str, Any] = {}
    if metadata:
        header["__metadata__"] = {
            key: value if isinstance(value, str) else compact_json(value)
            for key, value in metadata.items()
        }
    order = sorted(small, key=lambda name: (-small[name].dtype.itemsize, name))
    offset = 0
    for name in order:
        array = small[name]
        header[name] = {
            "dtype": _NAMES[array.dtype],
            "shape": list(array.shape),
            "data_offsets": [offset, offset + array.nbytes],
        }
        offset += array.nbytes
    text = compact_json(header).encode()
    text += b" " * (-len(text) % 8)
    parts = [len(text).to_bytes(8, "little"), text]
    parts += [np.ascontiguousarray(small[name]).tobytes() for name in order]
    # Level 1 halves a pack in a few milliseconds; higher levels gain little and cost much.
    return gzip.compress(b"".join(parts), compresslevel=1, mtime=0)


def _shrunk(array: NDArray[Any]) -> NDArray[Any]:
    if array.dtype.kind not in "iub":
        little: NDArray[Any] = array.astype(array.dtype.newbyteorder("<"), copy=False)
        return little
    low, high = (int(array.min()), int(array.max())) if array.size else (0, 0)
    for dtype in _INTEGERS:
        limits = np.iinfo(dtype)
        if limits.min <= low and high <= limits.max:
            return array.astype(dtype.newbyteorder("<"), copy=False)
    return array.astype("<f8")
