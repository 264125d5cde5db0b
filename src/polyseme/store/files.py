"""Files that appear whole or not at all, and are on the disk before they have their name."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from polyseme.errors import InputError, RunError
from polyseme.store.format import (
    DEEPEST_JSON,
    JSON,
    LONGEST_RUN_JSON,
    Problem,
    decode_json,
    encode_json,
    too_deep,
)

ASIDE = ".new"  # the ending of a file that is being written
LOCK = "lock"  # held by the one process that writes in a folder

# Left behind in any folder by file managers; no reason to refuse one.
LITTER = frozenset({".DS_Store", "Thumbs.db", "desktop.ini"})

OVERWRITE = "overwrite=True (--overwrite)"
RESUME = "resume=True (--resume)"


@contextmanager
def whole(file: Path) -> Iterator[Path]:
    """A name to write a file under, which then gets its own: with all of it on the disk."""
    aside = file.with_name(file.name + ASIDE)
    with aside.open("wb") as made:
        mode = os.fstat(made.fileno()).st_mode & 0o777
    try:
        yield aside
        to_disk(aside, mode)
        os.replace(aside, file)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise


def replace_bytes(file: Path, content: bytes) -> None:
    """Write a file so that it is never seen half written."""
    with whole(file) as aside:
        aside.write_bytes(content)


def to_disk(path: Path, mode: int | None = None) -> None:
    """Have the disk take a file, or the names in a folder.

    Parameters
    ----------
    path : Path
    mode : int, optional
        Permissions that the file is to have: safetensors leaves out everybody but its owner,
        whatever the umask says.
    """
    if mode is not None:
        path.chmod(mode)
    elif os.name == "nt":  # folders cannot be opened there
        return
    opened = os.open(path, os.O_RDWR if mode is not None else os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


@contextmanager
def writing(path: Path, *, resumable: bool = True) -> Iterator[None]:
    """Turn an error of the file system into one that says what to do."""
    try:
        yield
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            raise InputError(
                f"The name {path.name[:40]}… is too long for the file system. Give a shorter one."
            ) from error
        kept = f"; what was written before stays, and {RESUME} goes on from it."
        raise RunError(
            f"Cannot write {error.filename or path}: {error.strerror or error}. Put that right"
            f"{kept if resumable else ', and try again.'}"
        ) from error


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a folder that exists, for this process alone.

    What is left of it at the end has no lock in it; where nothing is left, it goes too.

    Raises
    ------
    RunError
        Another process holds it, or has just removed it.
    """
    # A writer may be closed in another thread than it was opened in.
    lock = FileLock(folder / LOCK, thread_local=False)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        raise RunError(
            f"{folder} is in use by another process. Wait until it ends, or choose another output."
        ) from None
    try:
        yield
    finally:
        with suppress(OSError):
            (folder / LOCK).unlink()
            if not {entry.name for entry in folder.iterdir()} - LITTER:
                shutil.rmtree(folder)
        lock.release()


def read_json(file: Path) -> dict[str, JSON]:
    """A JSON object from a small file; an empty one where there is none."""
    try:
        if not file.is_file() or file.stat().st_size > LONGEST_RUN_JSON:
            return {}
        return decode_json(file.read_bytes(), file.name)
    except (OSError, Problem):
        return {}


def short_json(what: str, value: Mapping[str, JSON], longest: int = LONGEST_RUN_JSON) -> bytes:
    """JSON that a reader of a run takes, or of so many bytes.

    Raises
    ------
    InputError
        It is longer than a reader takes.
    """
    raw = encode_json(value)
    if len(raw) > longest:
        long = max(value, key=lambda key: len(json.dumps(value[key])))
        raise InputError(
            f"The {what} takes {len(raw):,} bytes of JSON, most of them for {long!r}; at most "
            f"{longest:,} are read back. Give less of that."
        )
    return raw


def plain_json(
    what: str, value: Mapping[str, JSON], longest: int = LONGEST_RUN_JSON
) -> dict[str, JSON]:
    """A copy of JSON-able data as a reader will see it (tuples are lists, keys are strings).

    Raises
    ------
    InputError
        It is not strict JSON, is nested too deeply, or is too long to be read back.
    """
    try:
        raw = short_json(what, dict(value), longest)
    except RecursionError:
        raise InputError(f"The {what} is nested too deeply for JSON, or holds itself.") from None
    except InputError:
        raise
    except (TypeError, ValueError) as error:
        raise InputError(
            f"The {what} must be plain JSON (dict, list, str, int, float, bool, None; no NaN, no "
            f"NumPy scalars): {error}."
        ) from None
    content: dict[str, JSON] = json.loads(raw)
    if too_deep(content):
        raise InputError(f"The {what} is nested more than {DEEPEST_JSON} deep; flatten it.")
    return content
