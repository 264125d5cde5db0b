"""Arrays of pixels: the dtypes that are stored, and reading them block by block."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from polyseme.errors import InputError

_BLOCK_BYTES = 1 << 24


def blocks(array: NDArray[Any]) -> Iterator[NDArray[Any]]:
    """Consecutive rows, about 16 MiB at a time, so that a memory map is never loaded whole."""
    rows = max(1, _BLOCK_BYTES // max(1, array[:1].nbytes))
    for start in range(0, len(array), rows):
        yield array[start : start + rows]


def as_array(value: Any) -> NDArray[Any]:
    """NumPy array of whatever makes one, torch tensors on any device among it.

    Raises
    ------
    InputError
        For a tensor without plain numbers in memory: sparse, nested, meta, quantised.
    TypeError, ValueError
        From NumPy, for anything else that makes no array.
    """
    # Duck-typed, so that reading images needs no torch.
    if not hasattr(value, "detach"):
        return value if isinstance(value, np.ndarray) else np.asarray(value)
    try:
        if str(value.dtype).startswith(("torch.bfloat16", "torch.float8")):
            value = value.float()  # which holds each of these, and which NumPy has
        return np.asarray(value.numpy(force=True))
    except (TypeError, RuntimeError) as error:
        raise InputError(
            f"A tensor of layout {value.layout} and dtype {value.dtype} on {value.device} does not make "
            "an array; a dense one of real numbers in memory is expected. Convert it first, for "
            "example with to_dense(), dequantize() or to_padded_tensor(0)."
        ) from error


def as_pixels(array: NDArray[Any], name: str) -> NDArray[Any]:
    """Bring an array of any numeric dtype to one that `Images` stores.

    Parameters
    ----------
    array : ndarray, (n, ...)
        uint8 and floating-point arrays are returned as they are, memory maps too. Booleans
        become 0 and 255. Other integers become uint8.
    name : str
        What the array is called in an error.

    Returns
    -------
    ndarray, (n, ...)
        uint8 or floating point.

    Raises
    ------
    InputError
        If it is a single number, the dtype is not numeric, or an integer lies outside 0 to 255.
    """
    kind = array.dtype.kind
    if not array.ndim:
        raise InputError(
            f"{name}: the pixels are a single {array.dtype}; an array with an axis of images and "
            f"then the axes of an image, (n, ...), is expected."
        )
    if array.dtype == np.uint8 or kind == "f":
        return array
    if kind == "b":
        return array.astype(np.uint8) * np.uint8(255)
    if kind not in "iu":
        raise InputError(
            f"{name}: the pixels have dtype {array.dtype}; they must be uint8 (0 to 255) or "
            f"floating point (already the model's input). Convert them to one of the two first."
        )
    pixels = np.empty(array.shape, dtype=np.uint8)
    done = 0
    for block in blocks(array):
        if block.size and (block.min() < 0 or block.max() > 255):
            raise InputError(
                f"{name}: the pixels are {array.dtype} and reach from {block.min()} to "
                f"{block.max()}; integer pixels must lie in 0 to 255. Scale them to 0 to 255, or "
                f"give floats that are the model's input already."
            )
        pixels[done : done + len(block)] = block
        done += len(block)
    return pixels
