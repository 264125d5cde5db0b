"""A user's data as a stream of batches: arrays, files, data sets, loaders."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from hashlib import sha256
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from polyseme.data.images import Images
from polyseme.data.input_arrays import as_array, as_labels, as_names, as_pixels, check_names
from polyseme.data.readers import read_images
from polyseme.errors import InputError

Batch = tuple[NDArray[Any], NDArray[Any] | None]

_ACCEPTED = (
    "an array, tensor or table (n, ...), a pair (inputs, labels), a path, polyseme.data.Images, a "
    "data set with a length, or an iterable of batches"
)
_MIXED = (
    "Only some of the inputs have a label; give pairs (input, label) for all of them, or inputs "
    "alone."
)
# Inputs read twice, to check that the order is fixed.
_LOOK = 16


class Source:
    """Inputs in a fixed order, read once, batch by batch.

    Attributes
    ----------
    name : str
        What a run's metadata calls the data.
    images : Images or None
        The images, if they are one array; None for data sets and iterables.
    class_names : tuple of str or None
        The name of each label, if any.
    length : int or None
        Number of inputs, if known.
    """

    def __init__(
        self,
        name: str,
        images: Images | None,
        items: Any = None,
        class_names: Iterable[str] | None = None,
    ) -> None:
        self.name = name
        self.class_names = as_names(class_names)
        if images is not None and self.class_names is not None:
            images = replace(images, class_names=self.class_names)
        elif images is not None:
            self.class_names = images.class_names
        self.images = images
        self._items = items
        known = images if images is not None else items
        self.length = len(known) if images is not None or _is_indexed(items) else None

    def batches(self, size: int, start: int = 0) -> Iterator[Batch]:
        """Stored inputs (B, ...) with their labels (B,) or None, from input ``start`` on."""
        if self.images is not None:
            for first in range(start, len(self.images), size):
                rows = slice(first, first + size)
                labels = self.images.labels
                yield np.asarray(self.images.pixels[rows]), None if labels is None else labels[rows]
            return
        batches = _skip(self._items, start)
        if self.length is not None:
            rows_of = range(self.length)
            batches = (
                _stack([self._items[row] for row in rows_of[first : first + size]])
                for first in rows_of[start::size]
            )
        for inputs, labels in batches:
            if labels is not None:
                check_names(self.class_names, labels, self.name)
            yield inputs, labels

    @property
    def is_read_once(self) -> bool:
        """Whether it is an iterator, which yields each input only once."""
        return self.images is None and isinstance(self._items, Iterator)

    def peek(self, size: int) -> NDArray[Any] | None:
        """Stored inputs of the first batch, not consumed even from an iterator; None if empty."""
        if not self.is_read_once:
            return next((stored for stored, _ in self.batches(size)), None)
        taken = []
        first = None
        for item in self._items:
            taken.append(item)
            if (first := next((stored for stored, _ in _skip([item], 0)), None)) is not None:
                break
        self._items = chain(taken, self._items)
        return first

    def to_input(self, stored: NDArray[Any]) -> NDArray[np.float32]:
        """Convert stored inputs to model inputs in float32."""
        if self.images is not None:
            return self.images.to_input(stored)
        return stored.astype(np.float32, copy=False)

    def identity(self) -> dict[str, Any]:
        """What identifies this data, as far as its beginning shows.

        Raises
        ------
        InputError
            If the data is empty, or a second reading gives other inputs.
        """
        if self.images is not None:
            labels = self.images.labels
            return {
                "name": self.name,
                "n": len(self.images),
                "sha256": self.images.digest(),
                "labels_sha256": None if labels is None else sha256(labels.tobytes()).hexdigest(),
            }
        first, again = self.peek(_LOOK), self.peek(_LOOK)
        if first is None or again is None:
            raise InputError(f"The data {self.name} is empty; expected at least one input.")
        if first.shape != again.shape or first.tobytes() != again.tobytes():
            raise InputError(
                f"The {self.name} yields different inputs each time it is read, so the numbers of "
                f"its examples would mean nothing, and an interrupted analysis could not be "
                f"resumed. Give it a fixed order, such as DataLoader(..., shuffle=False), and no "
                f"random augmentation."
            )
        return {"name": self.name, "n": self.length}


def as_source(data: Any, labels: Any = None, class_names: Iterable[str] | None = None) -> Source:
    """Convert a user's data to a stream of inputs.

    Parameters
    ----------
    data : array, tensor, table, pair, str, Path, Images, data set or iterable
        An array, tensor or table (n, ...): uint8 is scaled to [0, 1], booleans become 0 and 1,
        floating point is used unchanged. A pair (inputs, labels). A path as in `read_images`. A
        data set with a length and indexed items, each an input or a pair (input, label), such as a
        torch Dataset. An iterable of batches, each inputs (B, ...) or a pair with labels, such as a
        torch DataLoader.
    labels : array of int, shape (n,), optional
        Class of each input, for arrays.
    class_names : iterable of str, optional
        Name of each class.

    Raises
    ------
    InputError
        For anything else, and for empty data.
    """
    if isinstance(data, str | Path):
        data = read_images(data)
    if isinstance(data, Images):
        images = data if labels is None else replace(data, labels=labels)
        return Source(data.name, images, class_names=class_names)
    if isinstance(data, tuple | list) and len(data) == 2 and _is_array(data[0]):
        if labels is not None:
            raise InputError(
                "labels were given with a pair (inputs, labels), which has its own; give them once."
            )
        data, labels = data
    if _is_array(data):
        return Source("array", Images(data, labels, name="array"), class_names=class_names)
    name = type(data).__name__
    if labels is not None:
        raise InputError(
            f"labels were given with a {name}; for anything but an array, put them in the data "
            f"itself, as pairs (input, label)."
        )
    if isinstance(data, Mapping):
        keys = ", ".join(f"data[{key!r}]" for key in list(data)[:4])
        raise InputError(
            f"data is a {name}; give one of its values ({keys or 'it is empty'}): {_ACCEPTED}."
        )
    if any(kind.__name__ == "IterableDataset" for kind in type(data).__mro__):
        raise InputError(
            f"data ({name}) is an IterableDataset, which may yield either inputs or batches. If it "
            f"yields single inputs, give torch.utils.data.DataLoader(data, batch_size=256); if it "
            f"yields batches, DataLoader(data, batch_size=None)."
        )
    if isinstance(data, set | bytes):
        raise InputError(f"data is a {name}; expected {_ACCEPTED}.")
    if _is_indexed(data):
        try:
            length = len(data)
        except TypeError as error:
            raise InputError(
                f"data is a {name} without a length ({error}); expected {_ACCEPTED}. For a sparse "
                f"array, give data.toarray()."
            ) from error
        if not length:
            raise InputError(f"The data set {name} is empty; expected at least one input.")
        return Source(name, None, data, class_names)
    if isinstance(data, Iterable):
        return Source(name, None, data, class_names)
    raise InputError(f"data is a {name}; expected {_ACCEPTED}.")


def _is_array(value: Any) -> bool:
    # A tensor, or a pandas or polars table.
    return isinstance(value, np.ndarray) or hasattr(value, "detach") or hasattr(value, "to_numpy")


def _is_indexed(value: Any) -> bool:
    # A DataLoader has a length too, but cannot be indexed.
    return hasattr(value, "__len__") and hasattr(value, "__getitem__")


def _inputs(value: Any) -> NDArray[Any]:
    name = f"The data yields a {type(value).__name__}"
    array = as_array(value, name)
    if not array.ndim and array.dtype.kind in "fiub":
        raise InputError(
            f"{name}, a single number; expected an input or a batch of inputs, with at least one "
            f"axis. Give a single input x as [x]."
        )
    pixels = as_pixels(array, name)
    if pixels.dtype == np.uint8:
        return pixels.astype(np.float32) / np.float32(255)
    return pixels.astype(np.float32, copy=False)


def _parts(item: Any, unit: str) -> tuple[Any, Any]:
    """The input and the label, or None, of an item or a batch."""
    if isinstance(item, Mapping):
        keys = [repr(key) for key in item]
        first = f"{unit}[{keys[0] if keys else '...'}]"
        pair = f"({first}, {unit}[{keys[1]}])" if len(keys) > 1 else first
        all_of = f"({pair} for batch in data)" if unit == "batch" else f"[{pair} for item in data]"
        raise InputError(
            f"The data yields a {type(item).__name__} with the keys {', '.join(keys) or '(none)'} "
            f"for each {unit}; expected an array of inputs, or a pair (input, label). Give, for "
            f"example, {all_of}."
        )
    if not isinstance(item, tuple | list) or not item or np.isscalar(item[0]):
        return item, None
    if len(item) == 1 and _is_array(item[0]):
        # What torch's TensorDataset and DataLoader yield for inputs without labels.
        return item[0], None
    if len(item) == 2:
        return item[0], item[1]
    if isinstance(item, tuple) or _is_array(item[0]):
        raise InputError(
            f"The data yields {len(item)} values for each {unit}; expected an array of inputs, or "
            f"a pair (input, label). Give, for example, "
            + (
                "((batch[0], batch[1]) for batch in data)."
                if unit == "batch"
                else "[item[:2] for item in data]."
            )
        )
    return item, None


def _stack(items: list[Any]) -> Batch:
    parts = [_parts(item, "item") for item in items]
    inputs = [_inputs(item) for item, _ in parts]
    shapes = sorted({array.shape for array in inputs})
    if len(shapes) > 1:
        raise InputError(
            f"The data set's inputs have different shapes, {shapes[0]} and {shapes[1]}; expected "
            f"one shape. Resize or crop them in the data set."
        )
    labelled = sum(label is not None for _, label in parts)
    if not labelled:
        return np.stack(inputs), None
    if labelled < len(parts):
        raise InputError(_MIXED)
    labels = [as_array(label, "The data's label") for _, label in parts]
    return np.stack(inputs), as_labels(labels, len(inputs), "The data")


def _skip(batches: Iterable[Any], start: int) -> Iterator[Batch]:
    labelled = None
    for batch in batches:
        first, second = _parts(batch, "batch")
        inputs = _inputs(first)
        if inputs.ndim < 2:
            raise InputError(
                f"The data yields an array of shape {inputs.shape}; expected batches of inputs, "
                f"(B, ...). If it yields single inputs, give list(data)."
            )
        labels = None if second is None else as_labels(second, len(inputs), "A batch of the data")
        if labelled not in (None, labels is not None):
            raise InputError(_MIXED)
        labelled = labels is not None
        if start >= len(inputs):
            start -= len(inputs)
            continue
        yield inputs[start:], None if labels is None else labels[start:]
        start = 0
    if start:
        raise InputError(
            f"The data ended {start} inputs before the point where the analysis was interrupted. "
            f"To resume, give the same data from the beginning: create a new iterator."
        )
