"""NumPy's .npy and .npz files, without ever unpickling."""

from __future__ import annotations

import math
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal, cast

import numpy as np
from numpy.typing import NDArray

from polyseme.data.binary_files import file_errors, read_promised
from polyseme.data.images import Images
from polyseme.data.input_arrays import as_pixels
from polyseme.errors import InputError, one_of

_IMAGE_KEYS = ("images", "x", "X", "data", "pixels")
_LABEL_KEYS = ("labels", "label", "y", "targets", "target")


@dataclass(frozen=True)
class _Header:
    """Header of an array in NumPy's format."""

    shape: tuple[int, ...]
    fortran: bool
    dtype: np.dtype[Any]
    offset: int

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def __str__(self) -> str:
        return f"{self.shape} {self.dtype}"


def _read_header(stream: BinaryIO, path: Path, what: str) -> _Header:
    version = np.lib.format.read_magic(stream)
    if version == (1, 0):
        shape, fortran, dtype = np.lib.format.read_array_header_1_0(stream)
    elif version == (2, 0):
        shape, fortran, dtype = np.lib.format.read_array_header_2_0(stream)
    else:
        # 3.0 is only for structured arrays whose fields have non-ASCII names.
        raise InputError(
            f"{path}: {what} is in version {version[0]}.{version[1]} of NumPy's format; numeric "
            f"arrays are in 1.0 or 2.0. Save it again as a plain numeric array."
        )
    if any(length < 0 for length in shape):
        raise InputError(
            f"{path}: {what} has the impossible shape {shape} in its header: the file is damaged. "
            f"Download or write it again."
        )
    return _Header(shape, fortran, dtype, stream.tell())


def _check_plain(header: _Header, path: Path, what: str) -> None:
    if header.dtype.hasobject:
        raise InputError(
            f"{path}: {what} holds Python objects, stored as a pickle; polyseme never unpickles, "
            f"since that can run arbitrary code. Save it again as a plain numeric array, for "
            f"example with array.astype(np.uint8)."
        )


def read_npy(path: Path, name: str, limit: int | None) -> Images:
    """Read a .npy file; uint8 and floating point are memory-mapped, not loaded.

    Parameters
    ----------
    path : Path
        The file.
    name : str
        What the images are called.
    limit : int, optional
        Take only the first images.

    Returns
    -------
    Images
        Without labels, in the layout of the file.

    Raises
    ------
    InputError
        If the file is damaged or holds no numeric array (n, ...).
    """
    with file_errors(path, "a .npy file"):
        with path.open("rb") as stream:
            header = _read_header(stream, path, "the array")
        _check_plain(header, path, "the array")
        held = path.stat().st_size - header.offset
        if held != header.nbytes:
            raise InputError(
                f"{path}: the file holds {held:,} bytes after its header, which promises "
                f"{header.nbytes:,} for {header}: it is truncated or damaged. Download or write it "
                f"again."
            )
        order: Literal["F", "C"] = "F" if header.fortran else "C"
        pixels: NDArray[Any]
        if header.nbytes and header.shape:
            pixels = np.memmap(path, header.dtype, "r", header.offset, header.shape, order)
        else:  # empty, which Images refuses
            pixels = np.empty(header.shape, header.dtype)
    if limit is not None and pixels.ndim:
        pixels = pixels[:limit]
    return Images(pixels, name=name)


def _choose(
    path: Path, key: str | None, names: Iterable[str], arrays: dict[str, _Header], argument: str
) -> str | None:
    """The caller's key; otherwise the only usual name present; otherwise None."""
    if key is not None:
        if key not in arrays:
            raise InputError(f"{path}: " + one_of(argument, key, arrays))
        return key
    present = [name for name in names if name in arrays]
    if len(present) > 1:
        raise _ambiguous(path, present, arrays, argument)
    return present[0] if present else None


def _ambiguous(
    path: Path, names: list[str], arrays: dict[str, _Header], argument: str
) -> InputError:
    what = argument.removesuffix("_key")
    listed = ", ".join(f"{name!r} {arrays[name]}" for name in names) or "none"
    return InputError(
        f"{path}: cannot tell which array holds the {what}: {listed}. Name one with {argument}=..."
    )


def _names(keys: tuple[str, ...], split: str) -> list[str]:
    """Usual names of an array of one split: x_train, train_x; for training, also plain names."""
    plain = list(keys) if split == "train" else []
    return plain + [f"{key}_{split}" for key in keys] + [f"{split}_{key}" for key in keys]


def read_npz(
    path: Path,
    name: str,
    split: str,
    images_key: str | None,
    labels_key: str | None,
    limit: int | None,
) -> Images:
    """Read a .npz file.

    Parameters
    ----------
    path : Path
        The file.
    name : str
        What the images are called.
    split : str
        Selects among arrays such as ``x_train`` and ``x_test``.
    images_key, labels_key : str, optional
        Names of the arrays, if not the usual ones.
    limit : int, optional
        Take only the first images.

    Returns
    -------
    Images
        In the layout of the file.

    Raises
    ------
    InputError
        If the file is damaged, holds pickled objects, or does not make clear which array to use.
    """
    with file_errors(path, "a .npz file"), zipfile.ZipFile(path) as archive:
        arrays = {}
        members = {}
        for info in archive.infolist():
            if info.filename.endswith(".npy"):
                key = info.filename.removesuffix(".npy")
                with archive.open(info) as stream:
                    arrays[key] = _read_header(cast(BinaryIO, stream), path, f"the array {key!r}")
                members[key] = info

        def load(key: str) -> NDArray[Any]:
            header, what = arrays[key], f"the array {key!r}"
            _check_plain(header, path, what)
            with archive.open(members[key]) as stream:
                stream.read(header.offset)
                data = read_promised(cast(BinaryIO, stream), header.nbytes, path, what)
            array = np.frombuffer(data, header.dtype)
            array = array.reshape(header.shape, order="F" if header.fortran else "C")
            # A copy of the requested rows frees the rest.
            return array if limit is None or not array.ndim else array[:limit].copy()

        image_names = _names(_IMAGE_KEYS, split)
        chosen = _choose(path, images_key, image_names, arrays, "images_key")
        if chosen is None:
            if split != "train":
                raise InputError(
                    f"{path}: there is no array of {split} images, such as {image_names[1]!r}, "
                    f"among {', '.join(map(repr, arrays)) or 'its 0 arrays'}. Name one with "
                    f"images_key=..., or leave out split={split!r}."
                )
            candidates = [key for key, header in arrays.items() if len(header.shape) >= 2]
            if len(candidates) != 1:
                raise _ambiguous(path, candidates or list(arrays), arrays, "images_key")
            chosen = candidates[0]
        pixels = load(chosen)
        chosen_labels = _choose(path, labels_key, _names(_LABEL_KEYS, split), arrays, "labels_key")
        labels = None if chosen_labels in (None, chosen) else load(str(chosen_labels))
        # Compare whole arrays, not only the rows up to the limit.
        of_labels, of_images = arrays[str(chosen_labels or chosen)], arrays[chosen]
        if of_labels.shape[:1] != of_images.shape[:1]:
            raise InputError(
                f"{path}: the labels {chosen_labels!r} are {of_labels} and the images {chosen!r} "
                f"are {of_images}; expected one label per image. Name matching arrays with "
                f"images_key and labels_key."
            )
    return Images(as_pixels(pixels, f"{path}, {chosen!r}"), labels, name=name)
