"""Folders of image files, read with Pillow."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from polyseme.data.images import Images
from polyseme.errors import InputError, MissingDependencyError, one_of

if TYPE_CHECKING:
    from PIL import Image

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp")
_SPLITS = {"train", "test", "val", "valid", "validation"}
# Modes with more than 8 bits per channel: Pillow would silently clip them to 255.
_DEEP = {"I", "F", "I;16", "I;16L", "I;16B", "I;16N"}


def pixels_of(image: Image.Image, name: str) -> NDArray[np.uint8]:
    """Pixels of one decoded image: greyscale (H, W), anything else RGB (3, H, W).

    EXIF orientation is applied. Transparency is dropped, not blended; an animation gives its first
    frame.
    """
    from PIL import ImageOps

    image = ImageOps.exif_transpose(image)
    mode = image.mode
    if mode in _DEEP:
        raise InputError(
            f"{name}: the image has mode {mode!r}, more than 8 bits per channel; expected 8 bits. "
            f"Convert it to 8 bits, or store all images as floats in a .npy file."
        )
    if mode in ("1", "L", "LA"):
        return np.array(image.convert("L"))
    if mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return np.array(image.convert("RGB")).transpose(2, 0, 1)


def stack_images(images: Iterable[tuple[str, NDArray[np.uint8]]], n: int) -> NDArray[np.uint8]:
    """Stack images of the same size and kind into one array.

    Parameters
    ----------
    images : iterable of (name, ndarray of uint8)
        Each (H, W) or (3, H, W), in order; the names are for errors.
    n : int
        How many there are.

    Returns
    -------
    ndarray of uint8, (n, H, W) or (n, 3, H, W)

    Raises
    ------
    InputError
        If two differ in size, or in whether they have colour.
    """
    stacked: NDArray[np.uint8] | None = None
    first = ""
    for row, (name, pixels) in enumerate(images):
        if stacked is None:
            stacked, first = np.empty((n, *pixels.shape), dtype=np.uint8), name
        if pixels.shape != stacked.shape[1:]:
            raise InputError(
                f"{name}: the image is {_describe(pixels.shape)}, but {first} is "
                f"{_describe(stacked.shape[1:])}; all must have the same size, and be all "
                f"greyscale or all colour. Resize or convert them first."
            )
        stacked[row] = pixels
    if stacked is None:
        raise InputError("There are no images to read; expected at least one.")
    return stacked


def _describe(shape: tuple[int, ...]) -> str:
    return f"{shape[-1]} x {shape[-2]} {'greyscale' if len(shape) == 2 else 'colour'}"


def _decoded(paths: Iterable[Path]) -> Iterator[tuple[str, NDArray[np.uint8]]]:
    try:
        from PIL import Image
    except ModuleNotFoundError as error:
        raise MissingDependencyError("Reading image files", "Pillow", "images") from error
    for path in paths:
        try:
            with warnings.catch_warnings():
                # Below twice its limit of 89 million pixels, Pillow only warns of a decompression
                # bomb.
                warnings.simplefilter("error", Image.DecompressionBombWarning)
                with Image.open(path) as image:
                    pixels = pixels_of(image, str(path))
        except InputError:
            raise
        except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
            raise InputError(
                f"{path}: the image is too large to be decoded safely ({error}). Resize or remove "
                f"it."
            ) from error
        # Every exception: each of Pillow's decoders raises its own kinds on malformed bytes.
        except Exception as error:
            raise InputError(
                f"{path}: cannot be read as an image: it is truncated, damaged or in another "
                f"format ({error}). Replace or remove it."
            ) from error
        yield str(path), pixels


def _entries(folder: Path) -> tuple[list[Path], list[Path]]:
    """Image files and subfolders, each sorted by name; hidden ones are left out."""
    entries = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    files = [path for path in entries if path.suffix.lower() in SUFFIXES and path.is_file()]
    return files, [path for path in entries if path.is_dir()]


def read_folder(folder: Path, split: str, limit: int | None) -> Images:
    """Read a folder of image files: flat, or with one subfolder per class.

    A folder with the subfolders ``train`` and ``test`` (or ``val``) is read from the one that
    `split` names. Images are ordered by class, then by name, the same on every machine.

    Parameters
    ----------
    folder : Path
        The folder.
    split : str
        Which subfolder, where they are splits.
    limit : int, optional
        Read only this many images, from the first.

    Returns
    -------
    Images
        Pixels (n, H, W) if all are greyscale, (n, 3, H, W) if all are colour; labels and
        class_names if there are subfolders.

    Raises
    ------
    InputError
        If there are no images, one cannot be read, or two differ in size or kind.
    """
    name = folder.resolve().name
    flat, subfolders = _entries(folder)
    splits = {path.name.lower(): path for path in subfolders}
    if not flat and splits and splits.keys() <= _SPLITS:
        if split not in splits:
            raise InputError(f"{folder}: " + one_of("split", split, splits))
        folder, name = splits[split], f"{name} ({split})"
        flat, subfolders = _entries(folder)
    elif split != "train":
        raise InputError(
            f"{folder}: split={split!r} was given, but the folder has no subfolders for splits "
            f"(train, test). Give the folder of that split, or leave split out."
        )
    classes = {path.name: files for path in subfolders if (files := _entries(path)[0])}
    if flat and classes:
        raise InputError(
            f"{folder}: there are {len(flat)} images beside the subfolders "
            f"{', '.join(map(repr, list(classes)[:5]))}; a folder is either flat or has one "
            f"subfolder per class. Move the loose images, such as {flat[0].name}."
        )
    labelled = [(path, label) for label, files in enumerate(classes.values()) for path in files]
    paths = (flat or [path for path, _ in labelled])[:limit]
    if not paths:
        held = ", ".join(sorted(path.name for path in folder.iterdir())[:5]) or "nothing"
        raise InputError(
            f"{folder}: the folder has no images. Expected MNIST-style IDX files, or image files "
            f"({', '.join(SUFFIXES)}), flat or in one subfolder a class; it holds {held}."
        )
    pixels = stack_images(_decoded(paths), len(paths))
    labels: Any = np.array([label for _, label in labelled[:limit]]) if classes else None
    return Images(pixels, labels, name=name, class_names=tuple(classes) if classes else None)
