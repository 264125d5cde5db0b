"""The folder of an unfinished run: recognised, locked, discarded and moved into place.

``<out>.partial`` holds::

    lock            held by the one process that writes
    partial.json    the fingerprint of the analysis; makes the folder recognisably ours
    state/          checkpoints
    run/            the run as far as it is written; renamed to <out> when it is complete
    old/            for a moment: the run that is being replaced

The run proper is in a folder of its own, so that one rename publishes it with nothing of the
machinery in it, and a failed rename leaves everything that a resume needs.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import ModuleType

from polyseme.errors import InputError, RunError
from polyseme.store.format import (
    DEEPEST_JSON,
    FORMAT,
    FORMAT_VERSION,
    INPUTS_FILE,
    JSON,
    LONGEST_RUN_JSON,
    RUN_JSON,
    SITES_FOLDER,
    TABLES,
    Problem,
    decode_json,
    encode_json,
    table_file,
    too_deep,
)

fcntl: ModuleType | None
try:
    import fcntl
except ImportError:  # Windows: two writers are not kept apart there
    fcntl = None

PARTIAL_FORMAT = "polyseme-partial"
PARTIAL_JSON = "partial.json"
LOCK = "lock"
STATE = "state"
RUN = "run"
OLD = "old"
ASIDE = ".new"  # the ending of a file that is being written

OVERWRITE = "overwrite=True (--overwrite)"
RESUME = "resume=True (--resume)"

# Left behind in any folder by file managers; no reason to refuse one.
LITTER = frozenset({".DS_Store", "Thumbs.db", "desktop.ini"})


class Partial:
    """The ``.partial`` folder of an output, locked from construction to `release`.

    Raises
    ------
    RunError
        Something else has the name, or another process holds the lock.
    """

    def __init__(self, out: Path) -> None:
        self.out = out
        self.path = out.with_name(out.name + ".partial")
        self.run = self.path / RUN
        self._lock: int | None = None
        with writing(self.path):
            self._refuse_foreign()
            self.path.mkdir(parents=True, exist_ok=True)
            self._take_lock()
            try:
                if (self.path / OLD).is_dir() and not os.path.lexists(out):
                    # A replacement was killed between its two renames: the old run goes back.
                    os.rename(self.path / OLD, out)
            except BaseException:
                self.release()
                raise

    def _refuse_foreign(self) -> None:
        """Refuse a folder that is not recognisably ours, before anything in it is touched."""
        if not os.path.lexists(self.path):
            return
        ours = self.path.is_dir() and not self.path.is_symlink()
        if ours:
            # A process killed at its start leaves no more than the lock and half a file.
            entries = {entry.name for entry in self.path.iterdir()} - LITTER
            ours = entries <= {LOCK, PARTIAL_JSON + ASIDE} or (
                entries <= {LOCK, PARTIAL_JSON, PARTIAL_JSON + ASIDE, STATE, RUN, OLD}
                and is_json_of(self.path / PARTIAL_JSON, PARTIAL_FORMAT)
            )
        if not ours:
            raise RunError(
                f"{self.path} is in the way: an analysis keeps its unfinished work there, and "
                "what is there is not from polyseme. Move it away, or choose another output."
            )

    def _take_lock(self) -> None:
        busy = RunError(
            f"{self.path} is in use by another process. Wait until it ends, or choose another "
            "output."
        )
        lock = os.open(self.path / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            if fcntl is not None:
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    raise busy from None
            try:
                same = os.path.samestat(os.fstat(lock), os.stat(self.path / LOCK))
            except FileNotFoundError:
                same = False
            if not same:  # the other process finished, and removed the folder, in between
                raise busy
        except BaseException:
            os.close(lock)
            raise
        self._lock = lock

    def release(self) -> None:
        """Let another process in. What was written stays; a folder with nothing in it goes."""
        if self._lock is None:
            return
        lock, self._lock = self._lock, None
        with suppress(OSError):
            if {entry.name for entry in self.path.iterdir()} == {LOCK}:
                (self.path / LOCK).unlink()
                self.path.rmdir()
        if fcntl is not None:
            # Forked workers share the lock and may outlive us: closing would not release it.
            fcntl.flock(lock, fcntl.LOCK_UN)
        os.close(lock)

    def read(self) -> dict[str, JSON] | None:
        """What partial.json says; None where there is no analysis to go on with."""
        content = read_json(self.path / PARTIAL_JSON) or {}
        return content if isinstance(content.get("fingerprint"), dict) else None

    def start(self, fingerprint: Mapping[str, JSON], *, overwrite: bool) -> None:
        """Discard what an earlier analysis left and begin afresh."""
        with writing(self.path):
            content: dict[str, JSON] = {"format": PARTIAL_FORMAT, "format_version": FORMAT_VERSION}
            # Without a fingerprint the folder is ours but cannot be resumed: so it is until the
            # old work is gone, should the process be killed here.
            replace_bytes(self.path / PARTIAL_JSON, encode_json(content))
            for name in (STATE, RUN, OLD):
                if (self.path / name).exists():
                    shutil.rmtree(self.path / name)
            for folder in (self.path / STATE, self.run / SITES_FOLDER):
                folder.mkdir(parents=True)
            content |= {"overwrite": overwrite, "fingerprint": dict(fingerprint)}
            replace_bytes(self.path / PARTIAL_JSON, encode_json(content))

    def go_on(self) -> None:
        """Make sure of the folders that a resumed analysis writes into."""
        with writing(self.path):
            for folder in (self.path / STATE, self.run / SITES_FOLDER):
                folder.mkdir(parents=True, exist_ok=True)

    def publish(self, *, overwrite: bool) -> None:
        """Rename the complete run into place, replacing an old one if that is allowed.

        Raises
        ------
        RunError
            Something that may not be replaced is in the way, or a rename fails: the old run is
            then where it was, and the new one can be resumed.
        """
        old = self.path / OLD
        with writing(self.out):
            if os.path.lexists(self.out):
                if not overwrite:
                    raise RunError(
                        f"{self.out} appeared while the analysis ran. Move it away, then finish "
                        f"with {RESUME}."
                    )
                refuse_to_replace(self.out)
                os.rename(self.out, old)
            try:
                os.rename(self.run, self.out)
            except BaseException:
                if old.exists():
                    os.rename(old, self.out)
                raise
        self.discard()

    def discard_if_empty(self) -> None:
        """Delete the folder if there is nothing in it to go on with."""
        if not any(
            entry.is_file() for name in (OLD, RUN, STATE) for entry in (self.path / name).rglob("*")
        ):
            self.discard()

    def discard(self) -> None:
        """Delete the folder. What cannot be deleted stays, for `start` or a person to remove."""
        inner = [self.path / name for name in (OLD, RUN, STATE)]
        for folder in inner:
            shutil.rmtree(folder, ignore_errors=True)
        # partial.json goes last: it is what makes the rest recognisable.
        if not any(folder.exists() for folder in inner):
            shutil.rmtree(self.path, ignore_errors=True)


def refuse_to_replace(out: Path) -> None:
    """Refuse an existing output that is no run, or a run that holds a user's own files.

    Raises
    ------
    RunError
        Replacing `out` could lose something that polyseme did not write.
    """
    if not is_run(out):
        raise RunError(
            f"{out} is not a polyseme run, so it is not replaced. Choose another output, or move "
            "it away yourself."
        )
    ours = {RUN_JSON, INPUTS_FILE, SITES_FOLDER, *(table_file(table) for table in TABLES)}
    foreign = {entry.name for entry in out.iterdir()} - ours - LITTER
    sites = out / SITES_FOLDER
    if sites.is_dir():
        foreign |= {
            f"{SITES_FOLDER}/{entry.name}"
            for entry in sites.iterdir()
            if not (entry.suffix == ".safetensors" and entry.stem.isdecimal())
            and entry.name not in LITTER
        }
    if foreign:
        raise RunError(
            f"{out} holds {sorted(foreign)[0]!r}, which is not part of a run, so it is not "
            "replaced. Move that away, or choose another output."
        )


def is_run(path: Path) -> bool:
    """Whether a folder says that it is a polyseme run, of any version and in any state."""
    return path.is_dir() and is_json_of(path / RUN_JSON, FORMAT)


def is_json_of(file: Path, kind: str) -> bool:
    """Whether a file is a JSON object that says it is of a format."""
    content = read_json(file)
    return content is not None and content.get("format") == kind


def read_json(file: Path) -> dict[str, JSON] | None:
    """A JSON object from a small file; None where there is none."""
    try:
        if not file.is_file() or file.stat().st_size > LONGEST_RUN_JSON:
            return None
        return decode_json(file.read_bytes(), file.name)
    except (OSError, Problem):
        return None


def replace_bytes(file: Path, content: bytes) -> None:
    """Write a file aside and move it into place, so that it is never seen half written."""
    aside = file.with_name(file.name + ASIDE)
    aside.write_bytes(content)
    os.replace(aside, file)


def plain_json(what: str, value: Mapping[str, JSON]) -> dict[str, JSON]:
    """A copy of JSON-able data as a reader will see it (tuples are lists, keys are strings).

    Raises
    ------
    InputError
        It is not strict JSON.
    """
    try:
        raw = encode_json(dict(value))
    except RecursionError:
        raise InputError(f"The {what} is nested too deeply for JSON, or holds itself.") from None
    except (TypeError, ValueError) as error:
        raise InputError(
            f"The {what} must be plain JSON (dict, list, str, int, float, bool, None; no NaN, no "
            f"NumPy scalars): {error}."
        ) from None
    content: dict[str, JSON] = json.loads(raw)
    if too_deep(content):
        raise InputError(f"The {what} is nested more than {DEEPEST_JSON} deep; flatten it.")
    return content


def differences(before: JSON, now: JSON, *, limit: int = 5) -> str:
    """The settings that differ between two fingerprints, with both values, in one line."""
    old, new = dict(_leaves(before, "")), dict(_leaves(now, ""))
    names = [name for name in old | new if name not in old or name not in new]
    names = [name for name in old | new if name in names or old[name] != new[name]]
    shown = [
        f"{name} was {_value(old, name)} and is now {_value(new, name)}" for name in names[:limit]
    ]
    more = f"; and {len(names) - limit} more" if len(names) > limit else ""
    return "; ".join(shown) + more


def _leaves(value: JSON, name: str) -> Iterator[tuple[str, str]]:
    if isinstance(value, dict) and (value or not name):
        for key, child in value.items():
            yield from _leaves(child, f"{name}.{key}" if name else key)
    else:
        yield name, json.dumps(value, ensure_ascii=False)


def _value(leaves: Mapping[str, str], name: str, limit: int = 60) -> str:
    text = leaves.get(name, "not set")
    return text if len(text) <= limit else text[: limit - 1] + "…"


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn an error of the file system into one that says what to do."""
    try:
        yield
    except OSError as error:
        raise RunError(
            f"Cannot write {error.filename or path}: {error.strerror or error}. Put that right; "
            f"what was written before stays, and {RESUME} goes on from it."
        ) from error
