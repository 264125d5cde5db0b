"""The folder of an SAE and of its unfinished training: locked, resumed, moved into place.

While a training runs, ``<out>.partial`` holds::

    lock               held by the one process that writes
    training.json      the fingerprint of the training; makes the folder recognisably ours
    checkpoint-<step>/ state.safetensors and state.json: the last checkpoint
    sae/               the finished SAE, for the moment before it is renamed to <out>
    old/               for a moment: the SAE that is being replaced

Checkpoints are safetensors and JSON: nothing is ever unpickled.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from polyseme.errors import InputError, RunError

fcntl: ModuleType | None
try:
    import fcntl
except ImportError:  # Windows: two trainings are not kept apart there
    fcntl = None

FORMAT = "polyseme-sae-training"
FORMAT_VERSION = 1

# The files of an SAE: the first two are SAELens's, the others tell of the training.
SAE_CONFIG = "cfg.json"
SAE_WEIGHTS = "sae_weights.safetensors"
RECORD_JSON = "polyseme-training.json"
RECORD_TENSORS = "polyseme-training.safetensors"
_SAE_FILES = {SAE_CONFIG, SAE_WEIGHTS, "sparsity.safetensors", RECORD_JSON, RECORD_TENSORS}

_LOCK = "lock"
_PARTIAL_JSON = "training.json"
_SAE = "sae"
_OLD = "old"
_ASIDE = ".new"
_CHECKPOINT = re.compile(r"checkpoint-(\d+)")
_STATE_JSON, _STATE_TENSORS = "state.json", "state.safetensors"
# Left behind in any folder by file managers; no reason to refuse one.
_LITTER = frozenset({".DS_Store", "Thumbs.db", "desktop.ini"})

OVERWRITE = "overwrite=True (--overwrite)"
RESUME = "resume=True (--resume)"

Content = dict[str, Any]


class TrainingFolder:
    """The output of one training, locked while the context lasts.

    Parameters
    ----------
    out : str or Path
        The folder of the SAE to make; its parents are made too.
    fingerprint : mapping
        Plain JSON that identifies the training: settings and data.
    overwrite : bool
        Replace an SAE that is there, once the new one is complete, and discard an unfinished
        training.
    resume : bool
        Go on with an unfinished training of the same fingerprint, if there is one.

    Attributes
    ----------
    finished : bool
        `out` is the finished SAE of this fingerprint: there is nothing to do.

    Raises
    ------
    InputError
        Both flags at once, or an output without a name.
    RunError
        Something is in the way, belongs to another training, or is in use.
    """

    def __init__(
        self,
        out: str | Path,
        fingerprint: Mapping[str, Any],
        *,
        overwrite: bool = False,
        resume: bool = False,
    ) -> None:
        if overwrite and resume:
            raise InputError(
                f"{OVERWRITE} and {RESUME} exclude each other: the first starts again, the second "
                "goes on. Give one."
            )
        self.path = Path(out)
        if self.path.name in ("", ".."):
            raise InputError(f"The output {str(out)!r} has no name. Give one such as saes/ne.")
        self._out = Path(os.path.realpath(out)) if self.path.is_symlink() else self.path.absolute()
        self._partial = self._out.with_name(self._out.name + ".partial")
        self._fingerprint: Content = json.loads(json.dumps(fingerprint))
        self._overwrite = overwrite
        self._lock: int | None = None
        with _writing(self._partial):
            self._refuse_foreign()
            self._partial.mkdir(parents=True, exist_ok=True)
            self._take_lock()
            try:
                if (self._partial / _OLD).is_dir() and not os.path.lexists(self._out):
                    # A replacement was killed between its two renames: the old SAE goes back.
                    os.rename(self._partial / _OLD, self._out)
                self.finished = self._begin(overwrite=overwrite, resume=resume)
            except BaseException:
                self.release()
                raise

    def __enter__(self) -> TrainingFolder:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.release()

    def _begin(self, *, overwrite: bool, resume: bool) -> bool:
        exists = os.path.lexists(self._out)
        if exists and overwrite:
            refuse_to_replace(self._out)
        elif exists and not resume:
            raise RunError(
                f"{self.path} exists already. Replace it by {OVERWRITE}, go on with an unfinished "
                f"training by {RESUME}, or choose another output."
            )
        before = _read_json(self._partial / _PARTIAL_JSON) or {}
        # Without a checkpoint there is nothing to go on with, and nothing to lose.
        unfinished = isinstance(before.get("fingerprint"), dict) and self.checkpoint is not None
        same = unfinished and before["fingerprint"] == self._fingerprint
        replacing = same and before.get("overwrite") is True
        if exists and resume and not replacing:
            record = _read_json(self._out / RECORD_JSON) or {}
            if record.get("fingerprint") == self._fingerprint:
                if same:  # a process was killed right after it moved this SAE in place
                    self._discard()
                return True
            told = differences(record.get("fingerprint") or {}, self._fingerprint)
            raise RunError(
                f"{self.path} is not the SAE of this training, so it cannot be resumed: {told}. "
                f"Choose another output, or replace it by {OVERWRITE}."
            )
        if unfinished and resume:
            if not same:
                raise RunError(
                    f"{self._partial} holds an unfinished training that is not this one: "
                    f"{differences(before['fingerprint'], self._fingerprint)}. Give the same "
                    f"settings, or discard it and start again by {OVERWRITE}."
                )
            # An interrupted overwrite=True goes on as one: the permission was given then.
            self._overwrite = replacing
        elif unfinished and not overwrite:
            raise RunError(
                f"{self._partial} holds an unfinished training. Go on with it by {RESUME}, or "
                f"discard it and start again by {OVERWRITE}."
            )
        else:
            self._start()
        return False

    def _discard(self) -> None:
        for entry in self._partial.iterdir():
            if entry.is_dir():
                shutil.rmtree(entry, ignore_errors=True)

    def _start(self) -> None:
        content: Content = {"format": FORMAT, "format_version": FORMAT_VERSION}
        # Without a fingerprint the folder is ours but cannot be resumed: so it is until the old
        # work is gone, should the process be killed here.
        _replace_json(self._partial / _PARTIAL_JSON, content)
        for entry in self._partial.iterdir():
            if entry.is_dir():
                shutil.rmtree(entry)
        content |= {"overwrite": self._overwrite, "fingerprint": self._fingerprint}
        _replace_json(self._partial / _PARTIAL_JSON, content)

    def _refuse_foreign(self) -> None:
        """Refuse a folder that is not recognisably ours, before anything in it is touched."""
        if not os.path.lexists(self._partial):
            return
        ours = self._partial.is_dir() and not self._partial.is_symlink()
        if ours:
            entries = {entry.name for entry in self._partial.iterdir()} - _LITTER
            begun = {_LOCK, _PARTIAL_JSON + _ASIDE}
            content = _read_json(self._partial / _PARTIAL_JSON) or {}
            ours = entries <= begun or (
                content.get("format") == FORMAT
                and all(
                    name in begun | {_PARTIAL_JSON, _SAE, _OLD}
                    or _CHECKPOINT.fullmatch(name.removesuffix(_ASIDE))
                    for name in entries
                )
            )
        if not ours:
            raise RunError(
                f"{self._partial} is in the way: a training keeps its unfinished work there, and "
                "what is there is not from polyseme. Move it away, or choose another output."
            )

    def _take_lock(self) -> None:
        busy = RunError(
            f"{self._partial} is in use by another process. Wait until it ends, or choose another "
            "output."
        )
        lock = os.open(self._partial / _LOCK, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            if fcntl is not None:
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    raise busy from None
            try:
                same = os.path.samestat(os.fstat(lock), os.stat(self._partial / _LOCK))
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
            if self.checkpoint is None and not (self._partial / _OLD).exists():
                shutil.rmtree(self._partial)
        if fcntl is not None:
            # Forked workers share the lock and may outlive us: closing would not release it.
            fcntl.flock(lock, fcntl.LOCK_UN)
        os.close(lock)

    @property
    def checkpoint(self) -> Path | None:
        """Folder of the last checkpoint, where there is one."""
        found = [
            (int(match[1]), entry)
            for entry in self._partial.iterdir()
            if (match := _CHECKPOINT.fullmatch(entry.name))
        ]
        return max(found)[1] if found else None

    def load(self) -> tuple[dict[str, Tensor], Content] | None:
        """Tensors and JSON of the last checkpoint; None where there is none."""
        path = self.checkpoint
        if path is None:
            return None
        content = _read_json(path / _STATE_JSON)
        try:
            tensors = load_file(path / _STATE_TENSORS)
        except (OSError, SafetensorError):
            content = None
        if content is None:
            raise RunError(
                f"The checkpoint {path} is damaged. Start again by {OVERWRITE}; it cannot be gone "
                "on with."
            )
        return tensors, content

    def save(self, step: int, tensors: Mapping[str, Tensor], content: Content) -> None:
        """Write a checkpoint aside, move it into place, and delete the one before."""
        path = self._partial / f"checkpoint-{step}"
        aside = path.with_name(path.name + _ASIDE)
        with _writing(path):
            before = [e for e in self._partial.iterdir() if _CHECKPOINT.fullmatch(e.name)]
            if path in before:
                return
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir()
            save_tensors(aside / _STATE_TENSORS, tensors)
            (aside / _STATE_JSON).write_bytes(encode_json(content))
            os.rename(aside, path)
            for entry in before:
                shutil.rmtree(entry, ignore_errors=True)

    def publish(self, write: Callable[[Path, Content], None]) -> None:
        """Have the SAE written aside, and rename it into place.

        Parameters
        ----------
        write : callable (folder, fingerprint)
            Writes the files of the SAE into an empty folder.

        Raises
        ------
        RunError
            Something that may not be replaced is in the way, or a rename fails: what was there
            is then where it was, and the training can be resumed.
        """
        new, old = self._partial / _SAE, self._partial / _OLD
        with _writing(self._out):
            shutil.rmtree(new, ignore_errors=True)
            new.mkdir()
            write(new, self._fingerprint)
            if os.path.lexists(self._out):
                if not self._overwrite:
                    raise RunError(
                        f"{self._out} appeared while the training ran. Move it away, then finish "
                        f"with {RESUME}."
                    )
                refuse_to_replace(self._out)
                os.rename(self._out, old)
            try:
                os.rename(new, self._out)
            except BaseException:
                if old.exists():
                    os.rename(old, self._out)
                raise
            self._discard()


def refuse_to_replace(out: Path) -> None:
    """Refuse an existing output that is no SAE, or an SAE that holds a user's own files.

    Raises
    ------
    RunError
        Replacing `out` could lose something that neither polyseme nor SAELens wrote.
    """
    config = _read_json(out / SAE_CONFIG) if out.is_dir() and not out.is_symlink() else None
    if config is None or "d_sae" not in config:
        raise RunError(
            f"{out} is not an SAE, so it is not replaced. Choose another output, or move it away "
            "yourself."
        )
    foreign = {entry.name for entry in out.iterdir()} - _SAE_FILES - _LITTER
    if foreign:
        raise RunError(
            f"{out} holds {sorted(foreign)[0]!r}, which is not part of an SAE, so it is not "
            "replaced. Move that away, or choose another output."
        )


def differences(before: Mapping[str, Any], now: Mapping[str, Any], *, limit: int = 5) -> str:
    """The settings that differ between two fingerprints, with both values, in one line."""
    old, new = dict(_leaves(before, "")), dict(_leaves(now, ""))
    names = [name for name in old | new if old.get(name) != new.get(name)]
    shown = [
        f"{name} was {old.get(name, 'not set')} and is now {new.get(name, 'not set')}"
        for name in names[:limit]
    ]
    return "; ".join(shown) + (f"; and {len(names) - limit} more" if len(names) > limit else "")


def _leaves(value: Any, name: str) -> Iterator[tuple[str, str]]:
    if isinstance(value, Mapping) and (value or not name):
        for key, child in value.items():
            yield from _leaves(child, f"{name}.{key}" if name else key)
    else:
        yield name, json.dumps(value, ensure_ascii=False)


def encode_json(content: Mapping[str, Any]) -> bytes:
    """Strict JSON: NaN and infinity are an error, and floats keep every bit."""
    return json.dumps(content, allow_nan=False, ensure_ascii=False, indent=1).encode()


def save_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors, wherever they are, to a safetensors file."""
    save_file({name: t.detach().cpu().contiguous().clone() for name, t in tensors.items()}, path)


def _read_json(file: Path) -> Content | None:
    """A JSON object from a file; None where there is none."""
    try:
        content = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    return content if isinstance(content, dict) else None


def _replace_json(file: Path, content: Mapping[str, Any]) -> None:
    aside = file.with_name(file.name + _ASIDE)
    aside.write_bytes(encode_json(content))
    os.replace(aside, file)


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Turn an error of the file system into one that says what to do."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise RunError(
            f"Cannot write {getattr(error, 'filename', None) or path}: {reason}. Put that right; "
            f"the last checkpoint stays, and {RESUME} goes on from it."
        ) from error
