"""Finding files, and reading binary ones that may be truncated, damaged or hostile."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from polyseme.errors import InputError
from polyseme.remote import RemotePath

_CHUNK_BYTES = 1 << 20
# A file that decompresses to more than _NO_BOMB_BYTES is a bomb if it grows by more than this
# factor.
_NO_BOMB_BYTES = 1 << 28
_MOST_GROWTH = 200
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(:[\w.-]+)?")


def is_hub_name(source: str | Path) -> bool:
    """Whether a source that is not an existing path could name a Hub data set."""
    # 'data/mnist' could be either; it is a path if the folder 'data' exists.
    return (
        isinstance(source, str)
        and _HUB_NAME.fullmatch(source) is not None
        and not Path(source).parent.is_dir()
    )


def missing_path(path: Path, accepted: str) -> InputError:
    """Error for a path that does not exist, with near matches in its parent."""
    hint = ""
    if not path.parent.is_dir():
        hint = f" There is no folder {str(path.parent)!r} either."
    else:
        names = sorted(entry.name for entry in path.parent.iterdir())
        near = difflib.get_close_matches(path.name, names, n=3, cutoff=0.5)
        if near:
            hint = f" Did you mean {' or '.join(repr(str(path.parent / name)) for name in near)}?"
    return InputError(f"The path {str(path)!r} does not exist.{hint} {accepted}")


@contextmanager
def file_errors(path: Path | RemotePath, kind: str) -> Iterator[None]:
    """Convert any error raised while reading `path` into an InputError that names it.

    Parameters
    ----------
    path : Path or RemotePath
        The file read inside the block.
    kind : str
        What the file should be, with an article: "an IDX file".

    Raises
    ------
    InputError
        In place of any other exception.
    """
    try:
        yield
    except InputError:
        raise
    # Every exception: gzip, zlib, zipfile, struct, NumPy's header parser and Pillow's plug-ins
    # each raise their own on malformed bytes, and none of them documents the whole list.
    except Exception as error:
        detail = " ".join(str(error).split()) or type(error).__name__
        if isinstance(error, OSError) and error.errno is not None:
            raise InputError(
                f"{path}: the file could not be read ({error.strerror or detail}). Check that it "
                f"is a file and that you have permission to read it."
            ) from error
        raise InputError(
            f"{path}: cannot be read as {kind}: it is truncated or damaged ({detail}). Download or "
            f"write it again."
        ) from error


def read_promised(
    stream: BinaryIO, promised: int, path: Path, what: str, *, more_follows: bool = False
) -> bytearray:
    """Read the bytes that a header promises, and check that nothing follows them.

    Memory use follows the bytes present, not the bytes promised. Decompression stops one byte past
    the promised size, and is refused if that size is many times the file's. So neither a false
    header nor a decompression bomb can exhaust memory.

    Parameters
    ----------
    stream : binary file
        Positioned after the header.
    promised : int
        Number of bytes that the header promises.
    path : Path
        Named in an error.
    what : str
        What the bytes are, for an error: "the array 'x'".
    more_follows : bool, default False
        The caller wants only the first bytes: do not check what follows.

    Returns
    -------
    bytearray, of length `promised`
    """
    data = bytearray()
    wanted = promised if more_follows else promised + 1
    while len(data) < wanted:
        chunk = stream.read(min(_CHUNK_BYTES, wanted - len(data)))
        if not chunk:
            break
        data += chunk
        if len(data) > max(_NO_BOMB_BYTES, _MOST_GROWTH * path.stat().st_size):
            raise InputError(
                f"{path}: by its header, {what} takes {promised:,} bytes in memory, over "
                f"{_MOST_GROWTH} times the size of the file, which may be a decompression bomb. "
                f"Store it uncompressed, as a .npy file."
            )
    if len(data) < promised:
        raise InputError(
            f"{path}: {what} ends after {len(data):,} of the {promised:,} bytes that its header "
            f"promises: it is truncated or damaged. Download or write the file again."
        )
    if len(data) > promised:
        raise InputError(
            f"{path}: {what} continues past the {promised:,} bytes that its header promises: it is "
            f"damaged, or something was appended. Download or write the file again."
        )
    return data
