"""The images of a run as the pages draw them: height, width, channels, and of modest size."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from polyseme.errors import RunError
from polyseme.store import RunFolder, SiteInfo

Array = NDArray[Any]

LARGEST_SIDE = 64
"""Larger images are averaged over squares until they fit."""


class Pictures:
    """How arrays of the run's inputs become pictures.

    Parameters
    ----------
    folder : RunFolder
        Of a run of images.

    Attributes
    ----------
    shape : tuple of int or None
        Of an image as stored: (height, width), (channels, height, width) or (height, width,
        channels); None where the inputs are no images.
    """

    def __init__(self, folder: RunFolder) -> None:
        data = folder.metadata["data"]
        dtype, stored = folder.inputs.headers["pixels"]
        self.floats = dtype != "uint8"
        self.low, self.high = (_number(data.get(key)) for key in ("low", "high"))
        self.shape: tuple[int, ...] | None = None
        shape = _sizes(data.get("image_shape"))
        if len(shape) in (2, 3) and math.prod(shape) == math.prod(stored[1:]):
            self.shape = shape
        self._folder = folder

    @property
    def thumb(self) -> tuple[int, int, int]:
        """Height, width and channels of a picture."""
        assert self.shape is not None
        height, width, channels = _as_hwc(self.shape)
        step = self._step
        return -(-height // step), -(-width // step), channels

    @property
    def _step(self) -> int:
        assert self.shape is not None
        height, width, _ = _as_hwc(self.shape)
        return -(-max(height, width) // LARGEST_SIDE)

    def arrays(self, values: Array) -> NDArray[np.float32]:
        """Arrays of the shape of an image as pictures of floats, shape (n, h, w, c)."""
        assert self.shape is not None
        if values[0:1].size not in (0, math.prod(self.shape)):
            raise RunError(
                f"An array of shape {values.shape} should have that of an image, {self.shape}, in "
                "each row."
            )
        images = values.reshape(len(values), *self.shape).astype(np.float32)
        if len(self.shape) == 2:
            images = images[..., None]
        elif _channels_first(self.shape):
            images = np.moveaxis(images, 1, 3)
        return _averaged(images, self._step)

    def thumbs(self, rows: Array) -> NDArray[np.uint8]:
        """Inputs, by row, as pictures of bytes, shape (n, h, w, c)."""
        pictures = self.arrays(self._folder.inputs.take("pixels", rows))
        if self.floats:
            pictures = (pictures - self.low) / max(self.high - self.low, 1e-12) * 255
        return np.clip(np.rint(pictures), 0, 255).astype(np.uint8)

    def describe(self) -> dict[str, Any] | None:
        """What a page needs to know to turn pictures back into the model's inputs."""
        if self.shape is None:
            return None
        data = self._folder.metadata["data"]
        names = data.get("class_names")
        return {
            "thumb": self.thumb,
            "shape": self.shape,
            "class_names": names if _are(names, str) else None,
            "mean": _scale(data.get("mean"), 0.0),
            "std": _scale(data.get("std"), 1.0),
            "low": self.low,
            "high": self.high,
            "float": self.floats,
        }


def kernel_shape(site: SiteInfo) -> tuple[int, int, int] | None:
    """Channels, height and width of what a convolution's neurons read; None for other sites."""
    shape = _sizes(site.extra.get("kernel_shape"))
    if len(shape) != 3 or math.prod(shape) != site.d_in:
        return None
    return shape[0], shape[1], shape[2]


def convolution(site: SiteInfo) -> dict[str, Any] | None:
    """Where in the input a convolution's positions lie; None where that is not known.

    Returns
    -------
    dict
        ``grid``: rows and columns of positions; ``covers``: the share of the rows, and of the
        columns, that the kernel covers in what the layer reads.
    """
    kernel = kernel_shape(site)
    grid, stride = (_sizes(site.extra.get(key)) for key in ("grid", "stride"))
    if kernel is None or not len(grid) == len(stride) == 2:
        return None
    covers = [min(1.0, k / (step * n)) for k, step, n in zip(kernel[1:], stride, grid, strict=True)]
    return {"grid": list(grid), "covers": covers}


def kernels(values: Array, shape: tuple[int, int, int]) -> Array:
    """Weights of convolutions, (n, channels × height × width), as pictures (n, h, w, c)."""
    return np.moveaxis(values.reshape(len(values), *shape), 1, 3)


def _as_hwc(shape: tuple[int, ...]) -> tuple[int, int, int]:
    if len(shape) == 2:
        return shape[0], shape[1], 1
    if _channels_first(shape):
        return shape[1], shape[2], shape[0]
    return shape[0], shape[1], shape[2]


def _channels_first(shape: tuple[int, ...]) -> bool:
    return shape[0] in (1, 3, 4) or shape[2] not in (1, 3, 4)


def _averaged(images: NDArray[np.float32], step: int) -> NDArray[np.float32]:
    if step == 1:
        return images
    # An edge that is no multiple of the step is averaged over what there is of it.
    padding = [(0, 0), *((0, -side % step) for side in images.shape[1:3]), (0, 0)]
    padded = np.pad(images, padding, constant_values=np.nan)
    n, height, width, channels = padded.shape
    blocks = padded.reshape(n, height // step, step, width // step, step, channels)
    means: NDArray[np.float32] = np.nanmean(blocks, axis=(2, 4))
    return means


# What run.json says is a stranger's: each value is taken only if it is of the right kind.


def _number(value: Any) -> float:
    fine = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if fine else 0.0


def _scale(value: Any, otherwise: float) -> Any:
    several = isinstance(value, list) and all(_number(entry) or entry == 0 for entry in value)
    return value if several or (_number(value) or value == 0) else otherwise


def _are(values: Any, kind: type) -> bool:
    return isinstance(values, list) and all(type(value) is kind for value in values)


def _sizes(values: Any) -> tuple[int, ...]:
    """A shape; the empty one if it is none."""
    fine = _are(values, int) and all(0 < value < 2**31 for value in values)
    return tuple(values) if fine else ()
