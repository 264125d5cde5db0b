"""Whatever a user has at hand, as a stream of batches: arrays, files, data sets, loaders."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from hashlib import sha256
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from polyseme.data.images import Images
from polyseme.data.pixels import as_array
from polyseme.data.readers import read_images
from polyseme.errors import InputError

Batch = tuple[NDArray[Any], NDArray[Any] | None]

_ACCEPTED = (
    "an array or tensor (n, ...), a pair (inputs, labels), a path, polyseme.data.Images, a "
    "data set with a length, or an iterable of batches"
)


class Source:
    """Inputs in a fixed order, read once, batch by batch.

    Attributes
    ----------
    name : str
        What a run's metadata calls the data.
    images : Images or None
        The images where they lie in one array; None for data sets and iterables.
    length : int or None
        Number of inputs, if it is known.
    """

    def __init__(self, name: str, images: Images | None, items: Any = None) -> None:
        self.name = name
        self.images = images
        self._items = items
        known = images if images is not None else items
        self.length = len(known) if images is not None or _is_indexed(items) else None

    def batches(self, size: int, start: int = 0) -> Iterator[Batch]:
        """Stored inputs (B, ...) with their labels (B,) or None, from input ``start`` on."""
        if self.images is not None:
            for at in range(start, len(self.images), size):
                rows = slice(at, at + size)
                labels = self.images.labels
                yield np.asarray(self.images.pixels[rows]), None if labels is None else labels[rows]
        elif _is_indexed(self._items):
            for at in range(start, self.length or 0, size):
                yield _stack([self._item(i) for i in range(at, min(at + size, self.length or 0))])
        else:
            yield from _skip(self._items, start)

    def peek(self, size: int) -> NDArray[Any] | None:
        """Stored inputs of the first batch, which an iterator still gives; None if it is empty."""
        if self.images is not None or _is_indexed(self._items):
            return next((stored for stored, _ in self.batches(size)), None)
        items, taken = iter(self._items), []
        found = None
        for item in items:
            taken.append(item)
            if (found := next((stored for stored, _ in _skip([item], 0)), None)) is not None:
                break
        self._items = chain(taken, items)
        return found

    def _item(self, number: int) -> Any:
        try:
            return self._items[number]
        except KeyError as error:
            raise InputError(
                f"The {self.name} has no item {number}; items numbered from 0 are expected, each "
                "an input or a pair (input, label). A table can be given as an array, by its "
                "to_numpy()."
            ) from error

    def to_input(self, stored: NDArray[Any]) -> NDArray[np.float32]:
        """Model inputs of float32 from stored ones."""
        if self.images is not None:
            return self.images.to_input(stored)
        return stored.astype(np.float32, copy=False)

    def identity(self) -> dict[str, Any]:
        """What tells this data from other data, as far as it can be known without reading it."""
        if self.images is not None:
            labels = self.images.labels
            return {
                "name": self.name,
                "n": len(self.images),
                "sha256": self.images.digest(),
                "labels_sha256": None if labels is None else sha256(labels.tobytes()).hexdigest(),
            }
        return {"name": self.name, "n": self.length}


def as_source(data: Any, labels: Any = None) -> Source:
    """Stream of inputs from whatever holds them.

    Parameters
    ----------
    data : array, tensor, pair, str, Path, Images, data set or iterable
        An array or tensor (n, ...): uint8 is scaled to [0, 1], floating point is used as it
        is. A pair (inputs, labels). A path as in `read_images`. A data set with a length and
        numbered items, each an input or a pair (input, label), such as torch's. An iterable of
        batches, each inputs (B, ...) or a pair with labels, such as torch's DataLoader.
    labels : array of int, shape (n,), optional
        Class of each input, for arrays.

    Raises
    ------
    InputError
        For anything else, and for data without a single input.
    """
    if isinstance(data, str | Path):
        data = read_images(data)
    if isinstance(data, Images):
        if labels is not None:
            data = Images(
                data.pixels, as_array(labels), data.mean, data.std, data.name, data.class_names
            )
        return Source(data.name, data)
    if isinstance(data, tuple | list) and len(data) == 2 and _is_array(data[0]):
        if labels is not None:
            raise InputError("labels were given beside a pair (inputs, labels); give them once.")
        data, labels = data
    if _is_array(data):
        return Source("array", Images(as_array(data), None if labels is None else as_array(labels)))
    if labels is not None:
        raise InputError(
            f"labels were given beside a {type(data).__name__}; with anything but an array they "
            "come from the data itself, as pairs (input, label)."
        )
    name = type(data).__name__
    if isinstance(data, dict | set | bytes):
        raise InputError(f"data is a {name}; expected is {_ACCEPTED}.")
    if _is_indexed(data):
        if not len(data):
            raise InputError(f"The data set {name} is empty; at least one input is expected.")
        return Source(name, None, data)
    if isinstance(data, Iterable):
        return Source(name, None, data)
    raise InputError(f"data is a {name}; expected is {_ACCEPTED}.")


def _is_array(value: Any) -> bool:
    return isinstance(value, np.ndarray) or hasattr(value, "detach")


def _is_indexed(value: Any) -> bool:
    # A DataLoader has a length too, but its items cannot be had by number.
    return hasattr(value, "__len__") and hasattr(value, "__getitem__")


def _inputs(value: Any) -> NDArray[Any]:
    try:
        array = as_array(value)
    except InputError:
        raise
    except ValueError as error:
        raise InputError(
            f"The data holds a {type(value).__name__} that does not make one array ({error}); an "
            "input, or a pair (input, label), is expected."
        ) from error
    if array.dtype.kind not in "fiub":
        raise InputError(
            f"The data holds {array.dtype} values ({type(value).__name__}); inputs must be arrays "
            "or tensors of numbers: give the data set a transform that makes them so."
        )
    if array.dtype == np.uint8:
        return array.astype(np.float32) / np.float32(255)
    return array.astype(np.float32, copy=False)


def _is_pair(item: Any) -> bool:
    return isinstance(item, tuple | list) and len(item) == 2


def _parts(item: Any) -> tuple[Any, Any]:
    """The input and the label, if there is one, of an item or of a batch."""
    if _is_pair(item):
        return item[0], item[1]
    if isinstance(item, tuple | list) and len(item) == 1 and _is_array(item[0]):
        # What torch's TensorDataset and DataLoader make of inputs alone.
        return item[0], None
    return item, None


def _labels(value: Any) -> NDArray[np.int64]:
    try:
        labels = as_array(value)
    except ValueError:
        labels = np.empty(0, dtype=object)
    if labels.dtype.kind not in "iub":
        raise InputError(
            f"The data gives labels of dtype {labels.dtype}; a whole number, the class, is "
            "expected for each input: give pairs (input, number), or the inputs alone."
        )
    return labels.astype(np.int64)


def _stack(items: list[Any]) -> Batch:
    parts = [_parts(item) for item in items]
    inputs = [_inputs(item) for item, _ in parts]
    shapes = sorted({array.shape for array in inputs})
    if len(shapes) > 1:
        raise InputError(
            f"The data set's inputs have different shapes, {shapes[0]} and {shapes[1]}; one "
            "shape is expected: resize or crop them in the data set."
        )
    if parts[0][1] is None:
        return np.stack(inputs), None
    labels = _labels([as_array(label) for _, label in parts])
    if labels.shape != (len(inputs),):
        raise InputError(
            f"The data set's labels have shape {labels.shape[1:]} each; one whole number for each "
            "input is expected: give pairs (input, number), or the inputs alone."
        )
    return np.stack(inputs), labels


def _skip(batches: Iterable[Any], start: int) -> Iterator[Batch]:
    for batch in batches:
        first, second = _parts(batch)
        inputs = _inputs(first)
        labels = None if second is None else _labels(second)
        if labels is not None and labels.shape != inputs.shape[:1]:
            raise InputError(
                f"A batch has {len(inputs)} inputs and labels of shape {labels.shape}; one label "
                "for each input is expected."
            )
        if start >= len(inputs):
            start -= len(inputs)
            continue
        yield inputs[start:], None if labels is None else labels[start:]
        start = 0
    if start:
        raise InputError(
            f"The data ended {start} inputs before the place where the analysis was interrupted; "
            "the same data from its beginning is expected to go on: make the iterator anew."
        )
