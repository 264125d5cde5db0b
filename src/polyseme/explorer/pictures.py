"""The images of a run as the pages draw them: (height, width, channels), reduced in size."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from polyseme.errors import RunError
from polyseme.store import RunFolder, SiteInfo

Array = NDArray[Any]

LARGEST_SIDE = 64
"""Larger images are reduced by averaging over squares."""


class Pictures:
    """Converts arrays of the run's inputs to pictures.

    Parameters
    ----------
    folder : RunFolder
        Of a run on images.

    Attributes
    ----------
    shape : tuple of int or None
        Of an image as stored: (height, width), (channels, height, width) or (height, width,
        channels); None if the inputs are not images.
    """

    def __init__(self, folder: RunFolder) -> None:
        data = folder.metadata["data"]
        dtype, _ = folder.inputs.headers["pixels"]
        self.floats = dtype != "uint8"
        self.low, self.high = float(data["low"]), float(data["high"])
        shape = data.get("image_shape")
        self.shape: tuple[int, ...] | None = tuple(shape) if shape else None
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
        """Arrays with the shape of an image, as float pictures of shape (n, h, w, c)."""
        assert self.shape is not None
        if values[0:1].size not in (0, math.prod(self.shape)):
            raise RunError(
                f"An array has shape {values.shape}; expected rows with the shape of an image, "
                f"{self.shape}."
            )
        images = values.reshape(len(values), *self.shape).astype(np.float32)
        if len(self.shape) == 2:
            images = images[..., None]
        elif _channels_first(self.shape):
            images = np.moveaxis(images, 1, 3)
        return _averaged(images, self._step)

    def thumbs(self, rows: Array) -> NDArray[np.uint8]:
        """Inputs, by row, as uint8 pictures of shape (n, h, w, c)."""
        pictures = self.arrays(self._folder.inputs.take("pixels", rows))
        if self.floats:
            pictures = (pictures - self.low) / max(self.high - self.low, 1e-12) * 255
        return np.clip(np.rint(pictures), 0, 255).astype(np.uint8)

    def describe(self) -> dict[str, Any] | None:
        """What a page needs to know to turn pictures back into the model's inputs."""
        if self.shape is None:
            return None
        data = self._folder.metadata["data"]
        return {
            "thumb": self.thumb,
            "shape": self.shape,
            "class_names": data.get("class_names"),
            "mean": data["mean"],
            "std": data["std"],
            "low": self.low,
            "high": self.high,
            "float": self.floats,
        }


def kernel_shape(site: SiteInfo) -> tuple[int, int, int] | None:
    """Channels, height and width of a convolution's kernel; None for other sites."""
    kernel = site.extra.get("kernel_shape")
    return (kernel[0], kernel[1], kernel[2]) if kernel else None


def convolution(site: SiteInfo) -> dict[str, Any] | None:
    """The positions of a convolution in its input; None if unknown.

    Returns
    -------
    dict
        ``grid``: rows and columns of positions; ``covers``: the shares of the height and width
        of the layer's input that the kernel covers.
    """
    kernel = kernel_shape(site)
    grid, stride = site.extra.get("grid"), site.extra.get("stride")
    if kernel is None or grid is None or stride is None:
        return None
    covers = [min(1.0, k / (step * n)) for k, step, n in zip(kernel[1:], stride, grid, strict=True)]
    return {"grid": grid, "covers": covers}


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
    # Incomplete squares at the edges are averaged over the pixels that they have.
    padding = [(0, 0), *((0, -side % step) for side in images.shape[1:3]), (0, 0)]
    padded = np.pad(images, padding, constant_values=np.nan)
    n, height, width, channels = padded.shape
    blocks = padded.reshape(n, height // step, step, width // step, step, channels)
    means: NDArray[np.float32] = np.nanmean(blocks, axis=(2, 4))
    return means
