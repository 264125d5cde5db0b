"""Opening a file of a run safely, and telling what is wrong with one in a clear sentence."""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from polyseme.errors import RunError
from polyseme.store.format import RUN_JSON, Problem


def locate(folder: Path, name: str) -> Path:
    """Path of a regular file that really lies in a folder.

    Raises
    ------
    Problem
        It is missing, no regular file (a pipe would block for ever), or a link that leads out
        of the folder.
    """
    try:
        file = Path(os.path.realpath(folder / name, strict=True))
        if not file.is_relative_to(os.path.realpath(folder)):
            raise Problem(name, "it is a link that leads out of the run folder, which is not safe")
        if not stat.S_ISREG(file.stat().st_mode):
            raise Problem(name, "it is not a regular file")
    except FileNotFoundError:
        raise Problem(name, "the file is missing") from None
    except OSError as error:
        raise Problem(name, f"it cannot be read ({error.strerror})") from None
    return file


def sha256(file: Path) -> str:
    """SHA-256 of a file, in hex."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


@contextmanager
def reporting(path: Path) -> Iterator[None]:
    """Turn a problem with one file into the error that a caller sees."""
    try:
        yield
    except Problem as problem:
        raise DamagedRunError(path, problem) from problem.__cause__
    except OSError as error:
        raise RunError(
            f"Cannot read {error.filename or path}: {error.strerror or error}."
        ) from error


class DamagedRunError(RunError):
    """A run folder with a file that is not what the format asks."""

    def __init__(self, path: Path, problem: Problem) -> None:
        # A folder whose run.json cannot be read is never replaced: it may not be a run at all.
        again = (
            "move it away and analyse again"
            if problem.file == RUN_JSON
            else "analyse again with overwrite=True (--overwrite)"
        )
        super().__init__(
            f"{path / problem.file}: {problem.what}. The run is damaged, or was not written by "
            f"polyseme: copy it again from where it came, or {again}."
        )
        self.path = path
        self.problem = problem


@contextmanager
def decoding(name: str) -> Iterator[None]:
    """Turn whatever a decoder raises into a problem with the file.

    Fed with hostile bytes, pyarrow and safetensors raise errors of many families, none of them
    promised; so this is the one place that catches them all.
    """
    try:
        yield
    except Problem:
        raise
    except Exception as error:
        text = " ".join(str(error).split()) or type(error).__name__
        text = text if len(text) <= 200 else text[:199] + "…"
        raise Problem(name, f"it cannot be decoded ({text.rstrip('.')})") from error
