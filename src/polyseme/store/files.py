"""Files of a run: written whole or not at all, and read with no trust in them."""

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
                f"The name {path.name[:40]}… is too long for the file system. Choose a shorter one."
            ) from error
        remedy = f"resume with {RESUME}: nothing is lost" if resumable else "try again"
        raise RunError(
            f"Cannot write {error.filename or path}: {error.strerror or error}. Fix this, then "
            f"{remedy}."
        ) from error


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a folder that exists, for this process alone.

    The lock file is removed at the end, and so is the folder if nothing else is in it.

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
            names = {entry.name for entry in folder.iterdir()}
            (folder / LOCK).unlink()
            if names - LITTER == {LOCK}:
                for name in names - {LOCK}:
                    (folder / name).unlink()
                folder.rmdir()  # not rmtree: another process may have locked it by now
        lock.release()


# ---------------------------------------------------------------------------------- JSON


def encode_json(value: Mapping[str, JSON]) -> bytes:
    """JSON as the format writes it: UTF-8, indented, and ending in ``}`` and a line feed.

    Raises
    ------
    TypeError, ValueError, RecursionError
        The value is not strict JSON (a NaN is not).
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
        # Without the rule a cut that takes only the last byte would still be valid JSON.
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
        encode_json(value)  # 1e999 and half of a surrogate pair can be read, but not written
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
    """A value in a few characters, whatever it is."""
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
            f"{longest:,} are read back. Shorten it."
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


# ------------------------------------------------------------------------------- reading


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


class DamagedRunError(RunError):
    """A run folder with a file that is not what the format asks."""

    def __init__(self, path: Path, problem: Problem) -> None:
        # A folder whose run.json cannot be read is never replaced: it may not be a run at all.
        remedy = (
            "move it away and analyse again"
            if problem.file == RUN_JSON
            else "analyse again with overwrite=True (--overwrite)"
        )
        super().__init__(
            f"{path / problem.file}: {problem.what}. The run is damaged, or was not written by "
            f"polyseme: copy it again from where it came, or {remedy}."
        )
        self.path = path
        self.problem = problem


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
