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
# A compressed file that is larger in memory than the first is a bomb if it grows more than this.
_NO_BOMB_BYTES = 1 << 28
_MOST_GROWTH = 200
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(:[\w.-]+)?")


def is_hub_name(source: str | Path) -> bool:
    """Whether a source that is no existing path can be meant as a data set of the hub."""
    # 'data/mnist' may be a path or a data set: it is a path if there is a folder 'data'.
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
    """Turn whatever goes wrong while `path` is read into an InputError that names it.

    Parameters
    ----------
    path : Path or RemotePath
        The file that is read inside the block.
    kind : str
        What the file should be, with its article: "an IDX file".

    Raises
    ------
    InputError
        In place of any exception but an InputError.
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
                f"is a file and that you may read it."
            ) from error
        raise InputError(
            f"{path}: not {kind} that can be read: it is truncated or damaged ({detail}). Fetch "
            f"or write it again."
        ) from error


def read_promised(
    stream: BinaryIO, promised: int, path: Path, what: str, *, more_follows: bool = False
) -> bytearray:
    """Read the bytes that a header promises, and make sure that no more follow.

    Memory grows with what is there, not with what is promised, and of a compressed stream
    only one byte more than promised is taken, and not many times what is on disk: neither a
    false header nor a decompression bomb can exhaust memory.

    Parameters
    ----------
    stream : binary file
        Stands after the header.
    promised : int
        Number of bytes that the header promises.
    path : Path
        Named in an error.
    what : str
        What the bytes are, for an error: "the array 'x'".
    more_follows : bool, default False
        The caller wants only the first bytes: do not look at what follows them.

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
                f"{path}: {what} takes {promised:,} bytes in memory, by its header, and that is "
                f"over {_MOST_GROWTH} times the size of the file, so that a small one could fill "
                f"the memory. Store it uncompressed, as a .npy file."
            )
    if len(data) < promised:
        raise InputError(
            f"{path}: {what} ends after {len(data):,} of the {promised:,} bytes that its header "
            f"promises: it is truncated or damaged. Fetch or write the file again."
        )
    if len(data) > promised:
        raise InputError(
            f"{path}: {what} goes on after the {promised:,} bytes that its header promises: it is "
            f"damaged, or something was appended. Fetch or write the file again."
        )
    return data
