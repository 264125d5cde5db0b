"""Arrays from whatever holds one, and the dtypes of inputs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
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


def as_array(value: Any, name: str) -> NDArray[Any]:
    """NumPy array of an array, a tensor on any device, a table, or nested lists.

    Parameters
    ----------
    value : array, tensor, pandas.DataFrame, list, ...
        An array is returned as it is.
    name : str
        What it is called in an error.

    Raises
    ------
    InputError
        If it does not make one array, or hides some of its values.
    """
    # Duck-typed, so that reading images needs no torch.
    try:
        if not hasattr(value, "detach"):
            array = value if isinstance(value, np.ndarray) else np.asarray(value)
        else:
            if str(value.dtype).startswith(("torch.bfloat16", "torch.float8")):
                value = value.float()  # which holds each of these, and which NumPy has
            array = np.asarray(value.numpy(force=True))
    except (TypeError, ValueError, RuntimeError) as error:
        if hasattr(value, "detach"):
            raise InputError(
                f"A tensor of layout {value.layout} and dtype {value.dtype} on {value.device} does "
                "not make an array; a dense one of real numbers in memory is expected. Convert it "
                "first, for example with to_dense(), dequantize() or to_padded_tensor(0)."
            ) from error
        raise InputError(
            f"{name}: a {type(value).__name__} does not make one array ({error}); an array of "
            f"numbers is expected. Bring all inputs to one size first."
        ) from error
    if isinstance(array, np.ma.MaskedArray):
        raise InputError(
            f"{name}: the array is masked, and a model has no masked values; a plain array is "
            f"expected. Say what stands in their place with array.filled(value)."
        )
    return array


def as_pixels(array: NDArray[Any], name: str) -> NDArray[Any]:
    """Bring an array of inputs to a dtype that `Images` stores.

    Parameters
    ----------
    array : ndarray, (n, ...)
        uint8 and floating-point arrays are returned as they are, memory maps too. Booleans
        become 0 and 255, so that the model gets 0 and 1. Other whole numbers may be pixels,
        measurements or tokens, and are refused.
    name : str
        What the array is called in an error.

    Returns
    -------
    ndarray, (n, ...)
        uint8 or floating point.

    Raises
    ------
    InputError
        If it is a single number, or the dtype is another one.
    """
    kind = array.dtype.kind
    if kind not in "fiub":
        raise InputError(
            f"{name}: the values have dtype {array.dtype}; they must be numbers, uint8 (pixels of "
            f"0 to 255) or floating point (the model's input as it is). Convert them first; "
            f"several arrays of one shape become one with np.stack(list(arrays))."
        )
    if not array.ndim:
        raise InputError(
            f"{name}: the values are a single {array.dtype}; an array with an axis of inputs and "
            f"then the axes of one input, (n, ...), is expected."
        )
    if kind == "b":
        return array.astype(np.uint8) * np.uint8(255)
    if kind in "iu" and array.dtype != np.uint8:
        raise InputError(
            f"{name}: the values have dtype {array.dtype}, which does not tell how the model takes "
            f"them. Convert pixels of 0 to 255 with .astype(np.uint8): the model gets them divided "
            f"by 255. Convert numbers that the model takes as they are with .astype(np.float32). "
            f"Tokens of a language model are given as Contexts(texts, tokenizer); wrap another "
            f"model that takes tokens in a module that calls x.long() on floats."
        )
    return array


def as_labels(labels: Any, n: int, name: str) -> NDArray[np.int64]:
    """The class of each of ``n`` inputs, shape (n,).

    Parameters
    ----------
    labels : array of integers, (n,) or (n, 1)
        Numbered from 0.
    n : int
    name : str
        What the inputs are called in an error.

    Raises
    ------
    InputError
        If they are anything else.
    """
    array = as_array(labels, f"{name}: the labels")
    if array.shape == (n, 1):
        array = array[:, 0]
    if array.shape != (n,):
        remedy = "Check that labels and inputs belong together."
        if array.ndim == 2 and len(array) == n:
            remedy = "If they are one-hot, give labels.argmax(axis=1)."
        raise InputError(
            f"{name}: the labels have shape {array.shape} for {n:,} input{'s' * (n != 1)}; they "
            f"must have shape ({n},), one whole number an input. {remedy}"
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
            f"{name}: the labels have dtype {array.dtype}; they must be whole numbers, one an "
            f"input. {remedy}"
        )
    lowest, highest = (int(array.min()), int(array.max())) if n else (0, 0)
    if lowest < 0 or highest > np.iinfo(np.int64).max:
        raise InputError(
            f"{name}: the labels reach from {lowest} to {highest}; classes are numbered from 0. "
            f"Number them anew with np.unique(labels, return_inverse=True)[1], or leave out the "
            f"inputs whose class is not known."
        )
    return array.astype(np.int64, copy=False)


def as_names(names: Iterable[str] | None) -> tuple[str, ...] | None:
    """The name of each class, as text."""
    if isinstance(names, str):
        raise InputError(
            f"class_names is {names!r}; a name for each class is expected, such as ('cat', 'dog')."
        )
    return None if names is None else tuple(str(name) for name in names)


def check_names(names: tuple[str, ...] | None, labels: NDArray[np.int64], name: str) -> None:
    """Refuse labels that have no name, where the others have one."""
    highest = int(labels.max(initial=0))
    if names is not None and highest >= len(names):
        raise InputError(
            f"{name}: the highest label is {highest} and there are {len(names)} class_names; label "
            f"k is named by class_names[k]. Name every class, numbered from 0, or leave "
            f"class_names out."
        )
