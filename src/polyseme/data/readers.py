"""Images from wherever they are stored."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from polyseme.data.binary_files import is_hub_name, missing_path
from polyseme.data.folders import SUFFIXES, read_folder
from polyseme.data.hub import read_hub
from polyseme.data.idx import IdxName, idx_files, is_idx, read_idx_folder, read_idx_images
from polyseme.data.images import Images
from polyseme.data.numpy_files import read_npy, read_npz
from polyseme.errors import InputError
from polyseme.remote import RemotePath, fetched, is_url

_ACCEPTED = (
    "Accepted are a folder of MNIST-style IDX files or of image files, a single IDX file, a .npy "
    "or .npz file, and a Hub data set as 'owner/name'."
)


def read_images(
    source: str | Path,
    *,
    split: str = "train",
    mean: float | tuple[float, ...] | None = None,
    std: float | tuple[float, ...] | None = None,
    images_key: str | None = None,
    labels_key: str | None = None,
    limit: int | None = None,
) -> Images:
    """Read images, and their labels if there are any.

    uint8 and floating-point values are kept unchanged, the latter as the model's input; booleans
    become 0 and 255; other integers are refused. The layout is kept, and a .npy file is
    memory-mapped. Nothing is ever unpickled. Image files become 8-bit greyscale or RGB with EXIF
    orientation applied; transparency is dropped, and an animation gives its first frame.

    Parameters
    ----------
    source : str or Path
        - A folder of MNIST-style IDX files (``train-images-idx3-ubyte.gz``, ``t10k-...``), or one
          such file of images, with its labels from the same folder. Gzipped or not.
        - A ``.npy`` file, or a ``.npz`` file with arrays such as ``images`` and ``labels``, or
          ``x_train`` and ``y_train``.
        - A folder of image files (needs Pillow): flat, or with one subfolder per class.
        - The URL of such a file or folder, which is copied to the cache.
        - A Hugging Face Hub data set (needs datasets): ``owner/name``.
    split : str, default "train"
        Which split, if the source has any: "train" or "test", or for the Hub its own names.
    mean, std : float or tuple of float, optional
        For uint8 images, the model's input is ``(pixel / 255 - mean) / std``: a number each, or one
        per channel; 0 and 1 by default.
    images_key : str, optional
        Which array of a .npz file, or column of a Hub data set, holds the images.
    labels_key : str, optional
        Which array of a .npz file, or column of a Hub data set, holds the labels.
    limit : int, optional
        Read only this many images, from the first. What follows them in an IDX file is not checked.

    Returns
    -------
    Images

    Raises
    ------
    InputError
        If the source does not exist, is damaged or is ambiguous.
    MissingDependencyError
        If Pillow or datasets is needed and not installed.
    """
    if not isinstance(source, str | Path) or not str(source):
        raise InputError(
            f"read_images was given {_short(source)}; it reads a path or the name of a Hub data "
            f"set. Turn arrays into images with Images(pixels, labels)."
        )
    if limit is not None and (isinstance(limit, bool) or not isinstance(limit, int) or limit < 1):
        raise InputError(
            f"limit is {limit!r}; it must be a whole number of images, 1 or more. Leave it out to "
            f"read all."
        )
    try:
        images = _read(source, split, images_key, labels_key, limit)
    except OSError as error:
        raise InputError(
            f"{str(source)!r} could not be read ({error.strerror or error}). Check the path and "
            f"your permission to read it."
        ) from error
    return replace(
        images,
        mean=images.mean if mean is None else mean,
        std=images.std if std is None else std,
    )


def _short(value: Any) -> str:
    return repr(value) if isinstance(value, str) else f"a {type(value).__name__}"


def _fetched_idx(url: str) -> Path | None:
    """A local copy of an IDX file of images, with its labels beside it; None for anything else."""
    above, _, last = url.rstrip("/").rpartition("/")
    name = IdxName.parse(Path(last))
    if name is None or name.what != "images":
        return None
    wanted = (name, replace(name, what="labels"))
    return RemotePath(above).fetch(lambda file: IdxName.parse(Path(file)) in wanted) / last


def _read(
    source: str | Path,
    split: str,
    images_key: str | None,
    labels_key: str | None,
    limit: int | None,
) -> Images:
    path = _fetched_idx(str(source)) if is_url(source) else None
    path = path or fetched(source)
    suffix = path.suffix.lower()
    if not path.exists():
        if is_hub_name(source):
            return read_hub(str(source), split, images_key, labels_key, limit)
        raise missing_path(path, _ACCEPTED)
    if not path.is_file() and not path.is_dir():
        raise InputError(f"{path}: a pipe, a socket or a device, which may never end. {_ACCEPTED}")
    if path.is_file() and suffix == ".npz":
        return read_npz(path, path.name, split, images_key, labels_key, limit)
    if images_key is not None or labels_key is not None:
        option = "images_key" if images_key is not None else "labels_key"
        raise InputError(
            f"{path}: {option} was given; it selects an array of a .npz file or a column of a Hub "
            f"data set. Leave it out for this source."
        )
    if path.is_dir():
        files = idx_files(path)
        if any(name.what == "images" for name in files):
            return read_idx_folder(path, files, split, limit)
        return read_folder(path, split, limit)
    idx_name = IdxName.parse(path)
    if split != "train" and (idx_name is None or idx_name.split != split):
        raise InputError(
            f"{path}: split={split!r} was given for a single file, which has no splits. Give the "
            f"file of that split, or leave split out."
        )
    if suffix == ".npy":
        return read_npy(path, path.name, limit)
    if suffix in SUFFIXES:
        raise InputError(
            f"{path}: a single image was given, but several are needed. Give its folder: "
            f"{path.parent}"
        )
    if not is_idx(path):
        raise InputError(f"{path}: polyseme cannot read this as a file of images. {_ACCEPTED}")
    labels = None
    if idx_name is not None and idx_name.what == "images":
        labels = idx_files(path.parent).get(IdxName(idx_name.prefix, idx_name.split, "labels"))
    return read_idx_images(path, labels, path.name, limit)
