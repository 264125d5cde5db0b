"""Conversion to arrays, and the dtypes of inputs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from polyseme.errors import InputError

_BLOCK_BYTES = 1 << 24


def blocks(array: NDArray[Any]) -> Iterator[NDArray[Any]]:
    """Iterate over blocks of rows of about 16 MiB, so that a memory map is never loaded whole."""
    rows = max(1, _BLOCK_BYTES // max(1, array[:1].nbytes))
    for start in range(0, len(array), rows):
        yield array[start : start + rows]


def as_array(value: Any, name: str) -> NDArray[Any]:
    """Convert an array, a tensor on any device, a table or nested lists to a NumPy array.

    Parameters
    ----------
    value : array, tensor, pandas.DataFrame, list, ...
        An array is returned unchanged.
    name : str
        Name used in errors.

    Raises
    ------
    InputError
        If it does not convert to one array, or is a masked array.
    """
    # Duck-typed, so that reading images needs no torch.
    try:
        if not hasattr(value, "detach"):
            array = value if isinstance(value, np.ndarray) else np.asarray(value)
        else:
            if str(value.dtype).startswith(("torch.bfloat16", "torch.float8")):
                value = value.float()  # lossless, and NumPy has it
            array = np.asarray(value.numpy(force=True))
    except (TypeError, ValueError, RuntimeError) as error:
        if hasattr(value, "detach"):
            raise InputError(
                f"A tensor of layout {value.layout} and dtype {value.dtype} on {value.device} does "
                f"not convert to an array; expected a dense tensor of real numbers. Convert it "
                f"first, for example with to_dense(), dequantize() or to_padded_tensor(0)."
            ) from error
        raise InputError(
            f"{name}: a {type(value).__name__} does not convert to one array ({error}); expected "
            f"an array of numbers. Bring all inputs to one size first."
        ) from error
    if isinstance(array, np.ma.MaskedArray):
        raise InputError(
            f"{name}: the array is masked, and a model cannot take masked values; expected a plain "
            f"array. Replace them with array.filled(value)."
        )
    return array


def as_pixels(array: NDArray[Any], name: str) -> NDArray[Any]:
    """Convert an array of inputs to a dtype that `Images` stores.

    Parameters
    ----------
    array : ndarray, (n, ...)
        uint8 and floating-point arrays, memory maps included, are returned unchanged. Booleans
        become 0 and 255, so that the model gets 0 and 1. Other integers could be pixels,
        measurements or tokens, so they are refused.
    name : str
        Name of the array in errors.

    Returns
    -------
    ndarray, (n, ...)
        uint8 or floating point.

    Raises
    ------
    InputError
        If it is a single number, or has any other dtype.
    """
    kind = array.dtype.kind
    if kind not in "fiub":
        raise InputError(
            f"{name}: the values have dtype {array.dtype}; expected uint8 (pixels of 0 to 255) or "
            f"floating point (the model's input). Convert them first; combine several arrays of "
            f"one shape with np.stack(list(arrays))."
        )
    if not array.ndim:
        raise InputError(
            f"{name}: the values are a single {array.dtype}; expected an array with an axis of "
            f"inputs followed by the axes of one input, (n, ...)."
        )
    if kind == "b":
        return array.astype(np.uint8) * np.uint8(255)
    if kind in "iu" and array.dtype != np.uint8:
        raise InputError(
            f"{name}: the values have dtype {array.dtype}, which leaves open how the model reads "
            f"them. Convert pixels of 0 to 255 with .astype(np.uint8): the model gets them divided "
            f"by 255. Convert values that the model reads unchanged with .astype(np.float32). For "
            f"a language model, give Contexts(texts, tokenizer); wrap any other model of tokens in "
            f"a module that calls x.long() on floats."
        )
    return array


def as_labels(labels: Any, n: int, name: str) -> NDArray[np.int64]:
    """Check the class labels of ``n`` inputs and return them with shape (n,).

    Parameters
    ----------
    labels : array of integers, (n,) or (n, 1)
        Numbered from 0.
    n : int
    name : str
        Name of the inputs in errors.

    Raises
    ------
    InputError
        If they are anything else.
    """
    array = as_array(labels, f"{name}: the labels")
    if array.shape == (n, 1):
        array = array[:, 0]
    if array.shape != (n,):
        remedy = "Check that labels and inputs match."
        if array.ndim == 2 and len(array) == n:
            remedy = "If they are one-hot, give labels.argmax(axis=1)."
        raise InputError(
            f"{name}: the labels have shape {array.shape} for {n:,} input{'s' * (n != 1)}; "
            f"expected shape ({n},), one integer per input. {remedy}"
        )
    if array.dtype.kind not in "iub":
        remedy = (
            "Number the classes and name them: class_names, labels = np.unique(labels, "
            "return_inverse=True)."
        )
        if array.dtype.kind == "f":
            whole = array == np.floor(array)
            remedy = "Convert them with labels.astype(int)."
            if not whole.all():
                remedy = f"{array[np.argmin(whole)]} is not a class: leave the labels out."
        raise InputError(
            f"{name}: the labels have dtype {array.dtype}; expected integers, one per input. "
            f"{remedy}"
        )
    lowest, highest = (int(array.min()), int(array.max())) if n else (0, 0)
    if lowest < 0 or highest > np.iinfo(np.int64).max:
        raise InputError(
            f"{name}: the labels range from {lowest} to {highest}; classes are numbered from 0. "
            f"Renumber them with np.unique(labels, return_inverse=True)[1], or leave out the "
            f"inputs whose class is unknown."
        )
    return array.astype(np.int64, copy=False)


def as_names(names: Iterable[str] | None) -> tuple[str, ...] | None:
    """Names of the classes, as a tuple of str."""
    if isinstance(names, str):
        raise InputError(
            f"class_names is {names!r}; expected a name for each class, such as ('cat', 'dog')."
        )
    return None if names is None else tuple(str(name) for name in names)


def check_names(names: tuple[str, ...] | None, labels: NDArray[np.int64], name: str) -> None:
    """Raise an error if `names` does not name every label."""
    highest = int(labels.max(initial=0))
    if names is not None and highest >= len(names):
        raise InputError(
            f"{name}: the highest label is {highest}, but there are {len(names)} class_names; "
            f"class_names[k] names label k. Name every class, numbered from 0, or leave "
            f"class_names out."
        )
