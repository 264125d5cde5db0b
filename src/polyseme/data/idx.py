"""The IDX format of MNIST and its successors."""

from __future__ import annotations

import gzip
import math
import re
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np
from numpy.typing import NDArray

from polyseme.data.binary_files import file_errors, read_promised
from polyseme.data.images import Images
from polyseme.errors import InputError, one_of

_DTYPES = {0x08: ">u1", 0x09: ">i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}
_GZIP = b"\x1f\x8b"
_NAME = re.compile(
    r"(?P<prefix>.*?)(?P<split>train|t10k|test)-(?P<what>images|labels)[-.]idx\d-\w+(\.gz)?",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class IdxName:
    """The parts of an IDX file's name."""

    prefix: str
    split: str
    what: str

    @classmethod
    def parse(cls, path: Path) -> IdxName | None:
        """Parse a name such as ``t10k-images.idx3-ubyte.gz``; None if it has another form."""
        match = _NAME.fullmatch(path.name)
        if match is None:
            return None
        split = match["split"].lower()
        return cls(
            prefix=match["prefix"],
            split="test" if split == "t10k" else split,
            what=match["what"].lower(),
        )


def idx_files(folder: Path) -> dict[IdxName, Path]:
    """IDX files in a folder, by parsed name; of two that parse alike, the uncompressed one."""
    files: dict[IdxName, Path] = {}
    for path in sorted(folder.iterdir(), key=lambda path: (path.suffix.lower() == ".gz", path)):
        name = IdxName.parse(path)
        if name is not None and path.is_file():
            files.setdefault(name, path)
    return files


def is_idx(path: Path) -> bool:
    """Whether a file is IDX, by its name or first bytes."""
    if re.search(r"[-.]idx\d", path.name, re.IGNORECASE):
        return True
    # The only gzipped files that polyseme reads are IDX files.
    with path.open("rb") as stream:
        start = stream.read(4)
    return start[:2] == _GZIP or (
        len(start) == 4 and start[:2] == b"\0\0" and start[2] in _DTYPES and start[3] > 0
    )


def _open(path: Path) -> BinaryIO:
    """Open a file, unzipping it if its content is gzipped, whatever its name."""
    stream = path.open("rb")
    start = stream.read(2)
    if start == _GZIP:
        stream.close()
        return cast(BinaryIO, gzip.open(path, "rb"))
    stream.seek(0)
    return stream


def read_idx(path: Path, limit: int | None = None) -> tuple[NDArray[Any], int]:
    """Read one IDX file, gzipped or not.

    Parameters
    ----------
    path : Path
        The file.
    limit : int, optional
        Read only this many rows, from the first; what follows is then not checked.

    Returns
    -------
    array : ndarray, (min(n, limit), ...)
        In the file's dtype and native byte order.
    n : int
        Number of rows in the file.

    Raises
    ------
    InputError
        If the file is not IDX, or holds fewer or more bytes than its header promises.
    """
    with file_errors(path, "an IDX file"), _open(path) as stream:
        magic = stream.read(4)
        if len(magic) == 4 and (
            magic[:2] != b"\0\0" or magic[2] not in _DTYPES or not 1 <= magic[3] <= 8
        ):
            raise InputError(
                f"{path}: not an IDX file: it starts with the bytes {magic.hex(' ')}; an IDX file "
                f"of images starts with 00 00 08 03. Check that it is the right file."
            )
        head = magic + stream.read(4 * magic[3] if len(magic) == 4 else 0)
        wanted = 4 + 4 * magic[3] if len(magic) == 4 else 4
        if len(head) < wanted:
            raise InputError(
                f"{path}: the file ends after {len(head)} bytes, within the IDX header: it is "
                f"truncated or empty. Download or write it again."
            )
        shape = struct.unpack(f">{magic[3]}I", head[4:])
        dtype = np.dtype(_DTYPES[magic[2]])
        n = shape[0]
        cut = limit is not None and limit < n
        if limit is not None and cut:
            shape = (limit, *shape[1:])
        promised = math.prod(shape) * dtype.itemsize
        data = read_promised(stream, promised, path, "the file", more_follows=cut)
        array = np.frombuffer(data, dtype=dtype).reshape(shape)
        return array.astype(dtype.newbyteorder("="), copy=False), n


def read_idx_images(path: Path, labels_path: Path | None, name: str, limit: int | None) -> Images:
    """Read a file of images and its file of labels, if there is one.

    Parameters
    ----------
    path, labels_path : Path
        IDX files, gzipped or not.
    name : str
        Name of the images.
    limit : int, optional
        Read only this many images, from the first.

    Returns
    -------
    Images
        Pixels (n, ...) in the layout of the file.

    Raises
    ------
    InputError
        If a file is damaged or holds something else, or if the two do not belong together.
    """
    pixels, n = read_idx(path, limit)
    if pixels.ndim < 2:
        raise InputError(
            f"{path}: the file has one axis of {n:,} values, so it holds labels; a file of images "
            f"has two axes or more. Give the file of images, usually in the same folder."
        )
    labels = None
    if labels_path is not None:
        labels, n_labels = read_idx(labels_path, limit)
        if labels.ndim != 1:
            raise InputError(
                f"{labels_path}: the file has {labels.ndim} axes, but labels have one. Check that "
                f"it is not a file of images."
            )
        if n_labels != n:
            raise InputError(
                f"{labels_path}: the file holds {n_labels:,} labels for the {n:,} images of "
                f"{path.name}; expected one per image. Put files that belong together in one "
                f"folder."
            )
    return Images(pixels, labels, name=name)


def read_idx_folder(
    folder: Path, files: dict[IdxName, Path], split: str, limit: int | None
) -> Images:
    """Read one split of a folder of IDX files.

    Parameters
    ----------
    folder : Path
        The folder.
    files : dict
        Its IDX files, from `idx_files`.
    split : str
        "train" or "test".
    limit : int, optional
        Read only this many images, from the first.

    Returns
    -------
    Images
        With labels if the folder has them.

    Raises
    ------
    InputError
        If the folder has no images of that split, or has those of several data sets.
    """
    images = {name: path for name, path in files.items() if name.what == "images"}
    if split not in {name.split for name in images}:
        raise InputError(f"{folder}: " + one_of("split", split, sorted({i.split for i in images})))
    chosen = [name for name in images if name.split == split]
    if len(chosen) > 1:
        listed = ", ".join(images[name].name for name in chosen)
        raise InputError(
            f"{folder}: the folder holds several files of {split} images: {listed}. Give the path "
            f"of one of them."
        )
    name = chosen[0]
    labels = files.get(IdxName(name.prefix, name.split, "labels"))
    return read_idx_images(images[name], labels, f"{folder.resolve().name} ({split})", limit)
