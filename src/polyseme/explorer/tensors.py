"""Arrays for the pages: small, deterministic safetensors files."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
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
# Deflate, no name, no time, fastest method, unknown system.
_GZIP_HEADER = bytes([0x1F, 0x8B, 8, 0, 0, 0, 0, 0, 4, 255])
_INTEGERS = tuple(np.dtype(name) for name in ("u1", "i1", "u2", "i2", "i4"))


def encode(arrays: Mapping[str, NDArray[Any]], metadata: Mapping[str, Any] | None = None) -> bytes:
    """A gzipped safetensors file.

    Integers are stored in the smallest dtype that holds them, or as float64, which JavaScript
    reads as a number, if int32 does not. Arrays are ordered by item size, so that each is aligned.
    Equal arrays give equal bytes, which the safetensors library does not guarantee, because the
    order of its metadata varies.

    Parameters
    ----------
    arrays : mapping of str to ndarray
    metadata : mapping of str to JSON, optional
        Strings are stored as they are, other values as JSON.
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
    return _gzipped(b"".join(parts))


def _gzipped(plain: bytes) -> bytes:
    """One gzip member, compressed by two threads, because this is half the work of a pack.

    Level 1 halves a pack in a few milliseconds; higher levels gain little and cost much.
    """

    def deflated(part: bytes, flush: int) -> bytes:
        packer = zlib.compressobj(1, zlib.DEFLATED, -zlib.MAX_WBITS)
        return packer.compress(part) + packer.flush(flush)

    middle = len(plain) // 2
    with ThreadPoolExecutor(1) as beside:
        # A flushed stream ends on a whole byte, so another can follow it.
        first = beside.submit(deflated, plain[:middle], zlib.Z_SYNC_FLUSH)
        second = deflated(plain[middle:], zlib.Z_FINISH)
        checks = struct.pack("<II", zlib.crc32(plain), len(plain) % 2**32)
        return _GZIP_HEADER + first.result() + second + checks


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
