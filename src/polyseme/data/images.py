"""Stored images, and how they become a model's input."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from polyseme.data.input_arrays import as_array, as_labels, as_names, as_pixels, blocks, check_names
from polyseme.errors import InputError

_DIGEST_BYTES = 1 << 30


def _scaling(value: Any, what: str, name: str) -> float | tuple[float, ...]:
    """A mean or std as a float, or as a tuple of one float per channel."""
    try:
        values = np.asarray(value, dtype=np.float64)
    except (TypeError, ValueError):
        values = np.empty((0, 0))
    if values.ndim > 1 or values.size == 0 or not np.isfinite(values).all():
        raise InputError(
            f"{name}: {what} is {value!r}; it must be a finite number, or a tuple of one number "
            f"per channel. Give it in units of pixel / 255, such as 0.5."
        )
    # Compared in float32, the precision of the model's input, where 1e-60 is zero.
    if what == "std" and not (values >= np.finfo(np.float32).tiny).all():
        raise InputError(
            f"{name}: std is {value!r}; pixels are divided by it, so it must be greater than 0. "
            f"Use 1.0 to leave the scale as it is."
        )
    numbers = tuple(float(number) for number in values.ravel())
    # torchvision normalises greyscale with (0.1307,): one channel, but no channel axis here.
    return numbers[0] if len(numbers) == 1 else numbers


@dataclass(frozen=True, eq=False, repr=False)
class Images:
    """Stored images, and how they become a model's input.

    Parameters
    ----------
    pixels : ndarray, (n, ...)
        uint8; floating point, used as the model's input unchanged; or booleans, stored as 0 and
        255. A memory map is not loaded. Values are not checked for finiteness, which would require
        reading all of them.
    labels : ndarray of integers, (n,), optional
        The class of each image, numbered from 0. Kept as int64.
    mean, std : float or tuple of float, default 0 and 1
        A model's input is ``(pixel / 255 - mean) / std`` for uint8 pixels. A tuple has one number
        per channel, along the first axis of an image (C, H, W). Floating-point pixels are used
        unchanged, so both must keep their defaults.
    name : str, default "images"
        What a run's metadata calls these images.
    class_names : tuple of str, optional
        The name of each label.

    Raises
    ------
    InputError
        If there are no images, or an argument does not have the form above.
    """

    pixels: NDArray[Any]
    labels: NDArray[np.int64] | None = None
    mean: float | tuple[float, ...] = 0.0
    std: float | tuple[float, ...] = 1.0
    name: str = "images"
    class_names: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "pixels", self._checked_pixels())
        object.__setattr__(self, "mean", _scaling(self.mean, "mean", self.name))
        object.__setattr__(self, "std", _scaling(self.std, "std", self.name))
        self._check_scaling()
        object.__setattr__(self, "class_names", as_names(self.class_names))
        if self.labels is not None:
            labels = as_labels(self.labels, len(self), self.name)
            check_names(self.class_names, labels, self.name)
            object.__setattr__(self, "labels", labels)

    def _checked_pixels(self) -> NDArray[Any]:
        pixels = as_pixels(as_array(self.pixels, self.name), self.name)
        if pixels.ndim < 2:
            raise InputError(
                f"{self.name}: the values have shape {pixels.shape}; expected an axis of inputs "
                f"followed by the axes of one input, (n, ...). Give a single input x as "
                f"x[np.newaxis]."
            )
        if pixels.size == 0:
            raise InputError(
                f"{self.name}: the values have shape {pixels.shape}, which is empty; expected at "
                f"least one input. Check where they were read from."
            )
        return pixels

    def _check_scaling(self) -> None:
        if self.pixels.dtype != np.uint8:
            if self.mean != 0.0 or self.std != 1.0:
                raise InputError(
                    f"{self.name}: mean={self.mean} and std={self.std} were given for "
                    f"{self.pixels.dtype} pixels; they apply only to uint8 pixels, as floats are "
                    f"already the model's input. Leave them out, or give uint8 pixels."
                )
            return
        for what, value in (("mean", self.mean), ("std", self.std)):
            if isinstance(value, tuple) and len(value) != self.shape[0]:
                raise InputError(
                    f"{self.name}: {what} has {len(value)} numbers, but an image has shape "
                    f"{self.shape}; a tuple needs one number per channel, along the first axis of "
                    f"an image (C, H, W). Give one number, or move the channels to the front."
                )

    def __len__(self) -> int:
        return len(self.pixels)

    def __repr__(self) -> str:
        labelled = "" if self.labels is None else ", labelled"
        return f"Images({self.name!r}: {len(self):,} of {self.shape} {self.pixels.dtype}{labelled})"

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one image."""
        return self.pixels.shape[1:]

    def inputs(self, rows: slice | ArrayLike) -> NDArray[np.float32]:
        """Model inputs of some images, in a new array.

        Parameters
        ----------
        rows : slice, integers (m,) or booleans (n,)
            Which images.

        Returns
        -------
        ndarray of float32, (m, ...)
            In model units.
        """
        index = rows if isinstance(rows, slice) else np.asarray(rows)
        return self.to_input(self.pixels[index])

    def to_input(self, pixels: NDArray[Any]) -> NDArray[np.float32]:
        """Model inputs of pixels stored like these, such as an edited image.

        Parameters
        ----------
        pixels : ndarray, (..., *shape)
            One or more images: uint8 if these images are, otherwise floating point.

        Returns
        -------
        ndarray of float32, (..., *shape)
            In model units, in a new array. A float too large for float32 becomes inf.

        Raises
        ------
        InputError
            If the pixels differ in kind of dtype or in image shape.
        """
        pixels = np.asarray(pixels)
        integers = self.pixels.dtype == np.uint8
        if (pixels.dtype == np.uint8) != integers or pixels.dtype.kind not in "uf":
            raise InputError(
                f"{self.name}: the pixels to convert have dtype {pixels.dtype}, but these images "
                f"have {self.pixels.dtype}, so their scales differ. Give {self.pixels.dtype} "
                f"pixels."
            )
        if pixels.shape[-len(self.shape) :] != self.shape:
            raise InputError(
                f"{self.name}: the pixels to convert have shape {pixels.shape}; expected "
                f"{self.shape}, or batches of it. Reshape them first."
            )
        if integers:
            return self._scaled(pixels)
        with np.errstate(over="ignore"):  # the caller checks for inf
            return np.array(pixels, dtype=np.float32)

    def _scaled(self, pixels: NDArray[Any] | np.uint8) -> NDArray[np.float32]:
        # One operation at a time, each rounded to float32, as torchvision's ToTensor and Normalize
        # do: a model trained with them gets bit-identical inputs.
        scaled = np.array(pixels, dtype=np.float32)
        scaled /= np.float32(255)
        scaled = (scaled - self._per_channel(self.mean)) / self._per_channel(self.std)
        return np.asarray(scaled, dtype=np.float32)

    def _per_channel(self, value: float | tuple[float, ...]) -> NDArray[np.float32]:
        """Shape (), or (C, 1, ...) to broadcast along the first axis of an image."""
        array = np.asarray(value, dtype=np.float32)
        return array.reshape(array.shape + (1,) * (len(self.shape) - 1)) if array.ndim else array

    @cached_property
    def value_range(self) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Lowest and highest value of a single pixel in model units.

        Returns
        -------
        low, high : ndarray of float32, () or (C, 1, ...)
            They broadcast against an image. For uint8, the inputs for 0 and 255. For floating
            point, the minimum and maximum of the data (NaN if it contains one), computed once, in
            blocks.
        """
        if self.pixels.dtype == np.uint8:
            return self._scaled(np.uint8(0)), self._scaled(np.uint8(255))
        low, high = math.inf, -math.inf
        with np.errstate(invalid="ignore", over="ignore"):
            for block in blocks(self.pixels):
                # np.minimum, not min(): it propagates NaN from either argument.
                low, high = np.minimum(low, block.min()), np.maximum(high, block.max())
            return np.asarray(low, dtype=np.float32), np.asarray(high, dtype=np.float32)

    def digest(self) -> str:
        """SHA-256 of the stored inputs, in hexadecimal.

        It covers dtype, shape, pixels, mean and std; not labels or names. Beyond 1 GiB of pixels,
        only as many evenly spaced images as fit in 1 GiB are read, including the first and the
        last; changes elsewhere go unnoticed.
        """
        pixels, n = self.pixels, len(self)
        kept = min(n, max(2, _DIGEST_BYTES // pixels[:1].nbytes))
        header = [pixels.dtype.str, pixels.shape, self.mean, self.std, kept]
        sha = hashlib.sha256(json.dumps(header).encode())
        if kept == n:
            for block in blocks(pixels):
                sha.update(np.ascontiguousarray(block).data)
        else:
            for row in range(kept):
                sha.update(np.ascontiguousarray(pixels[row * (n - 1) // (kept - 1)]).data)
        return sha.hexdigest()
