"""Checks of input arrays, shared by all of core."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from polyseme.errors import InputError, one_of

Floats = NDArray[np.floating[Any]]

LINKAGES = ("average", "single")


def to_numpy(array: Any) -> NDArray[Any]:
    """NumPy view or copy of an array, or of a torch tensor on any device."""
    # Duck-typed, so that core needs no torch.
    if not hasattr(array, "detach"):
        return np.asarray(array)
    try:
        if str(array.dtype).startswith(("torch.bfloat16", "torch.float8")):
            array = array.float()  # lossless, and NumPy has it
        return np.asarray(array.numpy(force=True))
    except (TypeError, RuntimeError) as error:
        raise InputError(
            f"A tensor of layout {array.layout} and dtype {array.dtype} on {array.device} does not "
            f"convert to an array; expected a dense tensor of real numbers. Convert it first, for "
            f"example with to_dense(), dequantize() or to_padded_tensor(0)."
        ) from error


def as_floats(
    array: Any, name: str, ndim: int, dtype: Any = None, *, finite: bool = True
) -> Floats:
    """Convert to a floating-point array of ``ndim`` dimensions, or raise an `InputError`.

    Half precision becomes float32. Values must be finite unless ``finite`` is False.
    """
    values = to_numpy(array)
    if values.dtype.kind not in "fiub":
        raise InputError(f"{name} holds {values.dtype} values; expected real numbers.")
    if values.ndim != ndim:
        raise InputError(
            f"{name} has shape {values.shape}; an array of {ndim} dimension"
            f"{'' if ndim == 1 else 's'} is expected."
        )
    if dtype is None:
        dtype = np.float32 if values.dtype in (np.float16, np.float32) else np.float64
    floats = values.astype(dtype, copy=False)
    if not finite:
        return floats
    # A sum is one pass without a temporary. It is finite unless a value is not or it overflows;
    # only then is every value checked.
    with np.errstate(over="ignore", invalid="ignore"):
        suspicious = not np.isfinite(floats.sum())
    if suspicious and not (good := np.isfinite(floats)).all():
        where = np.unravel_index(int(np.argmin(good)), floats.shape)
        raise InputError(
            f"{name} holds {floats[where]} at index {tuple(int(i) for i in where)}; every value "
            f"must be finite: leave such examples out, or find where they come from."
        )
    return floats


def as_labels(labels: Any, n: int) -> NDArray[np.int64]:
    """Check the integer labels of ``n`` examples."""
    values = to_numpy(labels)
    if values.shape != (n,) or (n and values.dtype.kind not in "iu"):
        raise InputError(
            f"labels has shape {values.shape} and dtype {values.dtype}; expected one integer for "
            f"each of the {n} examples."
        )
    return values.astype(np.int64)


def check_threshold(threshold: float) -> float:
    """Check a distance at which to cut a tree: in (0, 2], the range of cosine distances."""
    try:
        value = float(threshold)
    except (TypeError, ValueError):
        value = float("nan")
    if not 0 < value <= 2:
        raise InputError(
            f"threshold is {threshold!r}; expected a cosine distance greater than 0 and at most 2. "
            f"The published results use 0.05 for SAE neurons and 0.2 for neurons that read pixels."
        )
    return value


def check_linkage(linkage: str) -> str:
    """Check the name of a linkage."""
    if linkage not in LINKAGES:
        raise InputError(one_of("linkage", str(linkage), LINKAGES))
    return linkage
