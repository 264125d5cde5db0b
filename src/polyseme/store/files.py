"""Files of a run: written atomically, and read as untrusted."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from polyseme.errors import InputError, RunError
from polyseme.store.format import DEEPEST_JSON, JSON, LONGEST_RUN_JSON, RUN_JSON, Problem

ASIDE = ".new"  # suffix of a file being written
LOCK = "lock"  # held by the one process that writes to a folder

# File managers leave these behind in any folder; they are no reason to refuse it.
LITTER = frozenset({".DS_Store", "Thumbs.db", "desktop.ini"})

OVERWRITE = "overwrite=True (--overwrite)"
RESUME = "resume=True (--resume)"


@contextmanager
def whole(file: Path) -> Iterator[Path]:
    """Yield a temporary name to write a file under; then sync it to disk and rename it."""
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
    """Write a file atomically."""
    with whole(file) as aside:
        aside.write_bytes(content)


def to_disk(path: Path, mode: int | None = None) -> None:
    """Sync a file, or a folder's directory entries, to disk.

    Parameters
    ----------
    path : Path
    mode : int, optional
        Permissions to give the file; safetensors makes files private to their owner, whatever the
        umask.
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
    """Convert file system errors to errors that say what to do."""
    try:
        yield
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            raise InputError(
                f"The name {path.name[:40]}… is too long for the file system. Choose a shorter one."
            ) from error
        remedy = f"resume with {RESUME}: nothing is lost" if resumable else "try again"
        raise RunError(
            f"Cannot write {error.filename or path}: {error.strerror or error}. Fix this, then "
            f"{remedy}."
        ) from error


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Lock an existing folder for this process.

    The lock file is removed at the end, and so is the folder if it is empty.

    Raises
    ------
    RunError
        Another process has locked it, or has just removed it.
    """
    # A writer may be closed in a different thread from the one that opened it.
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
            names = {entry.name for entry in folder.iterdir()}
            (folder / LOCK).unlink()
            if names - LITTER == {LOCK}:
                for name in names - {LOCK}:
                    (folder / name).unlink()
                folder.rmdir()  # not rmtree: another process may have locked it by now
        lock.release()


# ---------------------------------------------------------------------------------- JSON


def encode_json(value: Mapping[str, JSON]) -> bytes:
    """Encode JSON as the format does: UTF-8, indented, ending in ``}`` and a line feed.

    Raises
    ------
    TypeError, ValueError, RecursionError
        The value is not strict JSON (NaN is not).
    """
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    return text.encode()


def decode_json(raw: bytes, file: str) -> dict[str, JSON]:
    """Strict inverse of `encode_json` that survives hostile bytes.

    Raises
    ------
    Problem
        The bytes are not one complete, strict and shallow JSON object.
    """
    if not raw.endswith(b"}\n"):
        # Without this rule, a file missing only its last byte would still be valid JSON.
        raise Problem(file, "the end is missing (it must end with '}' and a line feed)")
    try:
        value = json.loads(raw.decode(), parse_constant=_refuse_constant)
    except RecursionError:
        raise Problem(file, "it is nested too deeply") from None
    except ValueError as error:  # covers bad UTF-8, bad JSON and integers of absurd length
        raise Problem(file, f"it is not valid JSON ({_short(str(error))})") from None
    if not isinstance(value, dict):
        raise Problem(file, f"it must hold a JSON object, not {kind_of(value)}")
    if too_deep(value):
        raise Problem(file, "it is nested too deeply")
    try:
        encode_json(value)  # 1e999 and a lone surrogate can be decoded but not encoded
    except ValueError as error:
        raise Problem(file, f"it is not valid JSON ({_short(str(error))})") from None
    return value


def _refuse_constant(name: str) -> JSON:
    raise ValueError(f"{name} is not a JSON number")


def too_deep(value: JSON) -> bool:
    """Whether JSON nests deeper than the format allows; needs no recursion itself."""
    level: list[JSON] = [value]
    for _ in range(DEEPEST_JSON):
        level = [
            child
            for node in level
            if isinstance(node, (dict, list))
            for child in (node.values() if isinstance(node, dict) else node)
            if isinstance(child, (dict, list))
        ]
        if not level:
            return False
    return True


def kind_of(value: JSON) -> str:
    """A short description of any JSON value."""
    if isinstance(value, dict):
        return "an object"
    if isinstance(value, list):
        return "a list"
    if type(value) is int and abs(value) > 10**18:
        return "a whole number of more than 18 digits"
    return _short(json.dumps(value, ensure_ascii=False))


def _short(text: str, limit: int = 80) -> str:
    return text if len(text) <= limit else text[: limit - 1] + "…"


def read_json(file: Path) -> dict[str, JSON]:
    """Read a JSON object from a small file; an empty object if the file does not exist."""
    try:
        if not file.is_file() or file.stat().st_size > LONGEST_RUN_JSON:
            return {}
        return decode_json(file.read_bytes(), file.name)
    except (OSError, Problem):
        return {}


def short_json(what: str, value: Mapping[str, JSON], longest: int = LONGEST_RUN_JSON) -> bytes:
    """Encode JSON, refusing more than a reader accepts (`longest` bytes).

    Raises
    ------
    InputError
        It is longer than a reader accepts.
    """
    raw = encode_json(value)
    if len(raw) > longest:
        long = max(value, key=lambda key: len(json.dumps(value[key])))
        raise InputError(
            f"The {what} takes {len(raw):,} bytes of JSON, most of them for {long!r}; the limit is "
            f"{longest:,}. Shorten it."
        )
    return raw


def plain_json(
    what: str, value: Mapping[str, JSON], longest: int = LONGEST_RUN_JSON
) -> dict[str, JSON]:
    """A copy of JSON-serialisable data as read back (tuples become lists, keys strings).

    Raises
    ------
    InputError
        It is not strict JSON, is nested too deeply, or is too long to be read back.
    """
    try:
        raw = short_json(what, dict(value), longest)
    except RecursionError:
        raise InputError(f"The {what} is nested too deeply for JSON, or contains itself.") from None
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


# ------------------------------------------------------------------------------- reading


def locate(folder: Path, name: str) -> Path:
    """Path of a regular file that is really inside a folder.

    Raises
    ------
    Problem
        It is missing, not a regular file (a pipe would block for ever), or a link out of the
        folder.
    """
    try:
        file = Path(os.path.realpath(folder / name, strict=True))
        if not file.is_relative_to(os.path.realpath(folder)):
            raise Problem(name, "it is a link out of the run folder, which is not safe")
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


class DamagedRunError(RunError):
    """A run folder with a file that does not conform to the format."""

    def __init__(self, path: Path, problem: Problem) -> None:
        # A folder whose run.json cannot be read is never replaced: it may not be a run at all.
        remedy = (
            "move it away and analyse again"
            if problem.file == RUN_JSON
            else "analyse again with overwrite=True (--overwrite)"
        )
        super().__init__(
            f"{path / problem.file}: {problem.what}. The run is damaged, or was not written by "
            f"polyseme: copy it again from its source, or {remedy}."
        )
        self.path = path
        self.problem = problem


@contextmanager
def reporting(path: Path) -> Iterator[None]:
    """Convert a problem with one file to the error that a caller sees."""
    try:
        yield
    except Problem as problem:
        raise DamagedRunError(path, problem) from problem.__cause__
    except OSError as error:
        raise RunError(
            f"Cannot read {error.filename or path}: {error.strerror or error}."
        ) from error


@contextmanager
def decoding(name: str) -> Iterator[None]:
    """Convert anything a decoder raises to a problem with the file.

    On hostile bytes, pyarrow and safetensors raise many undocumented types of error; this is the
    one place that catches them all.
    """
    try:
        yield
    except Problem:
        raise
    except Exception as error:
        text = " ".join(str(error).split()) or type(error).__name__
        text = text if len(text) <= 200 else text[:199] + "…"
        raise Problem(name, f"it cannot be decoded ({text.rstrip('.')})") from error
