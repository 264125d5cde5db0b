"""Checks on the arrays that come in, shared by the whole of core."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from polyseme.errors import InputError, one_of

Floats = NDArray[np.floating[Any]]

LINKAGES = ("average", "single")


def to_numpy(array: Any) -> NDArray[Any]:
    """NumPy view (or copy) of an array or of a torch tensor on any device."""
    # Duck-typed, so that core needs no torch.
    if not hasattr(array, "detach"):
        return np.asarray(array)
    try:
        if str(array.dtype).startswith(("torch.bfloat16", "torch.float8")):
            array = array.float()  # which holds each of these, and which NumPy has
        return np.asarray(array.numpy(force=True))
    except (TypeError, RuntimeError) as error:
        raise InputError(
            f"A tensor of layout {array.layout} and dtype {array.dtype} on {array.device} does not make "
            "an array; a dense one of real numbers in memory is expected. Convert it first, for "
            "example with to_dense(), dequantize() or to_padded_tensor(0)."
        ) from error


def as_floats(
    array: Any, name: str, ndim: int, dtype: Any = None, *, finite: bool = True
) -> Floats:
    """Floating-point array of ``ndim`` dimensions, or an `InputError` naming ``name``.

    Half precision becomes float32. Values must be finite, unless the caller looks itself.
    """
    values = to_numpy(array)
    if values.dtype.kind not in "fiub":
        raise InputError(f"{name} holds {values.dtype} values; real numbers are expected.")
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
    # A sum is one pass without a temporary: it is finite unless some value is not, or the
    # sum overflows, so only then is every value looked at.
    with np.errstate(over="ignore", invalid="ignore"):
        suspicious = not np.isfinite(floats.sum())
    if suspicious and not (good := np.isfinite(floats)).all():
        where = np.unravel_index(int(np.argmin(good)), floats.shape)
        raise InputError(
            f"{name} holds {floats[where]} at index {tuple(int(i) for i in where)}; "
            "every value must be finite: leave such examples out, or find where they come from."
        )
    return floats


def as_labels(labels: Any, n: int) -> NDArray[np.int64]:
    """Integer labels of ``n`` examples."""
    values = to_numpy(labels)
    if values.shape != (n,) or (n and values.dtype.kind not in "iu"):
        raise InputError(
            f"labels has shape {values.shape} and dtype {values.dtype}; "
            f"one integer for each of the {n} examples is expected."
        )
    return values.astype(np.int64)


def check_threshold(threshold: float) -> float:
    """A distance at which a tree can be cut: in (0, 2], the range of cosine distances."""
    try:
        value = float(threshold)
    except (TypeError, ValueError):
        value = float("nan")
    if not 0 < value <= 2:
        raise InputError(
            f"threshold is {threshold!r}; a cosine distance greater than 0 and at most 2 is "
            "expected: the published results use 0.05 for SAE neurons and 0.2 for neurons "
            "that read pixels."
        )
    return value


def check_linkage(linkage: str) -> str:
    """Name of a linkage that polyseme knows."""
    if linkage not in LINKAGES:
        raise InputError(one_of("linkage", str(linkage), LINKAGES))
    return linkage
