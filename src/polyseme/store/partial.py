"""The folder of unfinished work: recognising, locking, resuming, discarding and publishing it.

``<out>.partial`` holds::

    lock            held by the one process that writes
    partial.json    the fingerprint of the work; marks the folder as ours
    state/          checkpoints
    result/         the result as written so far; renamed to <out> once complete
    old/            briefly, the result being replaced

The result has its own folder, so that one rename publishes it without the other files, and a failed
rename leaves everything that a resume needs. While ``result/`` exists, the work is unpublished. If
partial.json has a fingerprint and there is no ``result/``, the work is published and the rest is
left over.
"""

from __future__ import annotations

import json
import os
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, nullcontext, suppress
from importlib import metadata as installed
from pathlib import Path
from typing import Any

from polyseme.errors import InputError, RunError
from polyseme.remote import is_url
from polyseme.store.files import (
    ASIDE,
    LITTER,
    LOCK,
    OVERWRITE,
    RESUME,
    encode_json,
    locked,
    plain_json,
    read_json,
    replace_bytes,
    to_disk,
    writing,
)
from polyseme.store.format import JSON, LONGEST_RUN_JSON
from polyseme.store.kind import Kind
from polyseme.store.upload import Upload

PARTIAL_FORMAT = "polyseme-partial"
ENDING = ".partial"
PARTIAL_JSON = "partial.json"
STATE = "state"
RESULT = "result"
OLD = "old"

# In a fingerprint, lists of numbers under the first key are computed, to the relative precision
# under the second key beside it. Their last digits depend on the machine.
_COMPUTED, _PRECISION = "outputs", "precision"
# Relative to the largest value. float32 sums in another order differ by about 1e-6, implementations
# of GELU by 1e-4.
_LEAST, _ROUNDINGS = 2e-5, 4

_LONGEST_NAME = 255  # bytes, in nearly every file system


class Partial(AbstractContextManager["Partial"]):
    """Work on one output, in its ``.partial`` folder, locked until `release`.

    Parameters
    ----------
    out : str or Path
        The folder to create, with its parents. It may already exist if empty. A result at a URL is
        made in a local folder and sent once complete.
    kind : Kind
    fingerprint : mapping
        Plain JSON that identifies the work. Work with equal fingerprints is taken to be the same.
    overwrite : bool
        Replace an existing result once the new one is complete, and discard unfinished work.
    resume : bool
        Continue unfinished work with the same fingerprint, if there is any.

    Attributes
    ----------
    out, path, state, result : Path
        The local folder to create, and where the work is until it is moved there.
    finished : bool
        `out` is already the finished result with this fingerprint: nothing is left to do.
    resumed : bool
        Unfinished work is being continued.
    versions : list of dict
        Versions of polyseme and torch used so far, the current ones last.

    Raises
    ------
    InputError
        Both flags were given, the output has no name or too long a name, or the fingerprint is not
        JSON.
    RunError
        The output or its ``.partial`` folder is in the way, belongs to other work, or is in use.
    """

    def __init__(
        self,
        out: str | Path,
        kind: Kind,
        fingerprint: Mapping[str, JSON],
        *,
        overwrite: bool = False,
        resume: bool = False,
    ) -> None:
        if overwrite and resume:
            raise InputError(
                f"{OVERWRITE} and {RESUME} are mutually exclusive: the first starts over, the "
                f"second continues. Give only one of them."
            )
        self.kind = kind
        self.upload = Upload(str(out), kind) if is_url(out) else None
        self.shown: str | Path = out if self.upload else Path(out)
        self.out = _checked(self.upload.folder if self.upload else Path(out))
        self.path = self.out.with_name(self.out.name + ENDING)
        self.state, self.result = self.path / STATE, self.path / RESULT
        content = {"format": kind.format, **fingerprint}
        # run.json will hold most of it twice, and more: better refused now than at the end.
        self.fingerprint = plain_json("fingerprint", content, LONGEST_RUN_JSON // 3)
        self.finished = self.resumed = False
        self.versions: list[dict[str, str]] = [_versions()]
        self._overwrite = overwrite
        self._lock = ExitStack()
        # What checks look at: the output itself, or a local outline of the output at a URL.
        standing: AbstractContextManager[Path] = nullcontext(self.out)
        if self.upload:
            standing = self.upload.standing(overwrite=overwrite, resume=resume)
        with standing as self._standing:
            self._open(resume)
        if self.finished and self.upload:
            if self._standing == self.out:
                self.upload.send(self._refuse_to_replace, overwrite=False)
            else:
                self.upload.discard()

    def _open(self, resume: bool) -> None:
        with writing(self.path, resumable=self.kind.resumable):
            if not os.path.lexists(self.path):
                self._check_output(resume=resume)
                if resume and self._stands():
                    # There is nothing to remove, so nothing may be written.
                    self._check_result(begun=False)
                    self.finished = True
                    return
            self._refuse_foreign()
            self.path.mkdir(parents=True, exist_ok=True)
            with ExitStack() as lock:
                lock.enter_context(locked(self.path))
                self._settle()
                self._begin(resume=resume)
                if not self.finished:
                    self._lock = lock.pop_all()

    def _refuse_foreign(self) -> None:
        """Refuse a folder that is not recognisably ours, before touching anything in it."""
        if not os.path.lexists(self.path):
            return
        ours = self.path.is_dir() and not self.path.is_symlink()
        if ours:
            # A process killed at its start leaves at most the lock and half a file.
            entries = {entry.name for entry in self.path.iterdir()} - LITTER
            ours = entries <= {LOCK, PARTIAL_JSON + ASIDE} or (
                entries <= {LOCK, PARTIAL_JSON, PARTIAL_JSON + ASIDE, STATE, RESULT, OLD}
                and read_json(self.path / PARTIAL_JSON).get("format") == PARTIAL_FORMAT
            )
        if not ours:
            raise RunError(
                f"{self.path} is in the way: polyseme keeps unfinished work there, but this folder "
                f"is not from this version of polyseme. Move it away, or choose another output."
            )

    def _settle(self) -> None:
        """Clean up after a process that was killed while moving folders."""
        if not self._begun:
            self._forget()
        elif (self.path / OLD).is_dir() and not self._stands():
            # A replacement was killed between its two renames: restore the old result.
            os.rename(self.path / OLD, self.out)

    def _begin(self, *, resume: bool) -> None:
        before = read_json(self.path / PARTIAL_JSON)
        begun = self._begun
        known: JSON = before.get("fingerprint")
        same = begun and not changes(known, self.fingerprint)
        # An interrupted overwrite=True resumes with the permission it was given.
        replacing = resume and same and before.get("overwrite") is True
        self._overwrite |= replacing
        self._check_output(resume=resume and not replacing)
        if self._stands() and resume and not replacing:
            self._check_result(begun=same)
            if same or not begun:
                self._forget()
            self.finished = True
        elif begun and resume:
            if not same:
                raise RunError(
                    f"{self.path} holds a different unfinished {self.kind.work}: "
                    f"{differences(known, self.fingerprint)}. Resume with the same settings, model "
                    f"and data, or discard it and start over with {OVERWRITE}."
                )
            self._go_on(before)
        elif begun and self.saved and self.kind.resumable and not self._overwrite:
            raise RunError(
                f"{self.path} holds an unfinished {self.kind.work}. Continue it with {RESUME}, or "
                f"discard it and start over with {OVERWRITE}."
            )
        else:
            self._start()

    def _check_output(self, *, resume: bool) -> None:
        """Refuse an existing output, unless it may be replaced and is to be."""
        if not self._stands():
            return
        if self._overwrite:
            self._refuse_to_replace(self._standing)
        elif not resume:
            go_on = f" continue an unfinished {self.kind.work} with {RESUME},"
            raise RunError(
                f"{self.shown} already exists. Replace it with {OVERWRITE},"
                f"{go_on if self.kind.resumable else ''} or choose another output."
            )

    def _check_result(self, *, begun: bool) -> None:
        """Refuse an existing result unless it is complete and has this fingerprint."""
        finished = self.kind.fingerprint(self._standing)
        if finished is None:
            raise RunError(
                f"{self.shown} is not {self.kind.result}, so it cannot be resumed. Choose "
                "another output, or move it away."
            )
        if not changes(finished, self.fingerprint):
            self.kind.check(self._standing if self._standing == self.out else self.shown)
            return
        if begun:
            raise RunError(
                f"{self.shown} already exists, and so does an unfinished {self.kind.work} for it. "
                f"Move the first away and continue with {RESUME}, or replace both with {OVERWRITE}."
            )
        raise RunError(
            f"{self.shown} is the result of a different {self.kind.work}, so it cannot be resumed: "
            f"{differences(finished, self.fingerprint)}. Choose another output, or replace it with "
            f"{OVERWRITE}."
        )

    def _refuse_to_replace(self, standing: Path) -> None:
        """Refuse to replace anything that is not a result of this kind written by polyseme."""
        if self.kind.fingerprint(standing) is None:
            raise RunError(
                f"{self.shown} is not {self.kind.result}, so it will not be replaced. Choose "
                f"another output, or move it away yourself."
            )
        if foreign := self.kind.foreign(standing) - LITTER:
            raise RunError(
                f"{self.shown} holds {min(foreign)!r}, which is not part of {self.kind.result}, so "
                f"the folder will not be replaced. Move that away, or choose another output."
            )

    def _stands(self) -> bool:
        """Whether the output exists; an empty folder does not count."""
        standing = self._standing
        if standing.is_dir() and not standing.is_symlink():
            return any(standing.iterdir())
        return os.path.lexists(standing)

    @property
    def _begun(self) -> bool:
        """Whether there is work that was begun but not yet published."""
        known = read_json(self.path / PARTIAL_JSON).get("fingerprint")
        return isinstance(known, dict) and self.result.is_dir()

    @property
    def saved(self) -> bool:
        """Whether there is anything that a resume could use."""
        folders = (self.state, self.result)
        return any(entry.is_file() for folder in folders for entry in folder.rglob("*"))

    def _start(self) -> None:
        """Discard earlier work and start over."""
        # Without a fingerprint, the folder is ours but cannot be resumed. It stays so until the old
        # work is gone, in case the process is killed here.
        self._write()
        for folder in self._inner:
            if folder.exists():
                shutil.rmtree(folder)
        if self.upload:
            self.upload.discard()
        self.state.mkdir()
        self.result.mkdir()
        self._write(begun=True)

    def _go_on(self, before: Mapping[str, JSON]) -> None:
        self.state.mkdir(exist_ok=True)
        self.resumed = True
        earlier = list(before.get("versions") or [])
        changed = earlier[-1:] != self.versions
        self.versions = earlier + self.versions if changed else earlier
        if changed:
            was, now = (_named(used[-1] if used else {}) for used in (earlier, self.versions))
            warnings.warn(
                f"{self.path} was started with {was} and continues with {now}: their results may "
                f"differ. {OVERWRITE} starts over.",
                stacklevel=5,
            )
            self._write(begun=True)

    def _write(self, *, begun: bool = False) -> None:
        content: dict[str, JSON] = {"format": PARTIAL_FORMAT}
        if begun:
            content["overwrite"] = self._overwrite
            content["versions"] = self.versions
            content["fingerprint"] = self.fingerprint
        replace_bytes(self.path / PARTIAL_JSON, encode_json(content))

    def publish(self) -> None:
        """Rename the complete result into place, replacing an old one if allowed.

        Raises
        ------
        RunError
            Something that may not be replaced is in the way, or a rename failed: the old result is
            then still in place, and the new one can be resumed.
        """
        old = self.path / OLD
        with writing(self.out, resumable=self.kind.resumable):
            mode = (self.path / PARTIAL_JSON).stat().st_mode & 0o777
            for entry in [self.result, *self.result.rglob("*")]:
                to_disk(entry, None if entry.is_dir() else mode)
            if self._stands():
                if not self._overwrite:
                    then = f"finish with {RESUME}" if self.kind.resumable else "try again"
                    raise RunError(
                        f"{self.out} appeared while the {self.kind.work} ran. Move it away, then "
                        f"{then}."
                    )
                self._refuse_to_replace(self.out)
                shutil.rmtree(old, ignore_errors=True)
                os.rename(self.out, old)
            try:
                os.rename(self.result, self.out)
            except BaseException:
                if old.exists() and not os.path.lexists(self.out):
                    os.rename(old, self.out)
                raise
            to_disk(self.out.parent)
        if self.upload:
            self.upload.send(self._refuse_to_replace, overwrite=self._overwrite)
        self.finished = True
        self._forget()

    @property
    def _inner(self) -> list[Path]:
        return [self.path / OLD, self.result, self.state]

    def _forget(self) -> None:
        """Delete the folder's contents. What cannot be deleted stays, for a person to remove."""
        # The old result first: it must not be restored once the new one has its name.
        for folder in self._inner:
            shutil.rmtree(folder, ignore_errors=True)
        # partial.json last: it marks the rest as ours.
        if not any(folder.exists() for folder in self._inner):
            for name in (PARTIAL_JSON + ASIDE, PARTIAL_JSON):
                with suppress(OSError):
                    (self.path / name).unlink(missing_ok=True)

    def release(self) -> None:
        """Unlock the folder. Its contents stay; an empty folder is removed."""
        self._lock.close()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, *trace: Any
    ) -> None:
        if error is not None and not self.finished:
            # A mistake refused at the start must not block its correction.
            refused = isinstance(error, Exception) and not (self.resumed or self._overwrite)
            if (refused and not self.saved) or not self.kind.resumable:
                self._forget()
        self.release()


def _checked(out: Path) -> Path:
    """Path of an output, with links resolved, as replacing means renaming."""
    if out.name in ("", ".."):
        raise InputError(f"The output {str(out)!r} has no name. Give a folder such as runs/new.")
    target = Path(os.path.realpath(out)) if os.path.islink(out) else out.absolute()
    parts = [*target.parent.parts, target.name + ENDING]
    longest = max(parts, key=lambda part: len(os.fsencode(part)))
    if (n := len(os.fsencode(longest))) > _LONGEST_NAME:
        raise InputError(
            f"The output's name {longest.removesuffix(ENDING)[:40]}… is too long: with {ENDING} "
            f"after it, it has {n} bytes, but file systems allow {_LONGEST_NAME}. Choose a shorter "
            f"one."
        )
    if os.path.ismount(target):
        raise InputError(
            f"{out} is a mount point, so it cannot be replaced. Give a folder inside it, such as "
            f"{out / 'new'}."
        )
    return target


def _versions() -> dict[str, str]:
    versions = {}
    for name in ("polyseme", "torch"):
        with suppress(installed.PackageNotFoundError):  # run from a source tree
            versions[name] = installed.version(name)
    return versions


def _named(versions: Mapping[str, str]) -> str:
    return " and ".join(f"{name} {used}" for name, used in versions.items()) or "unknown versions"


# --------------------------------------------------------------------------- fingerprints


def changes(before: JSON, now: JSON) -> list[str]:
    """Differences between two fingerprints, with both values; empty if they are the same.

    Lists under a key "outputs" may differ in their last digits: by 2e-5 of the largest value, or by
    four times the number under "precision" beside it.
    """
    old, new = dict(_leaves(before, "")), dict(_leaves(now, ""))
    return [change for name in old | new if (change := _change(name, old, new))]


def differences(before: JSON, now: JSON, *, limit: int = 5) -> str:
    """The first `changes`, in one line."""
    all_changes = changes(before, now)
    n_others = len(all_changes) - limit
    return "; ".join(all_changes[:limit] + ([f"and {n_others} more"] if n_others > 0 else []))


def _change(name: str, old: Mapping[str, JSON], new: Mapping[str, JSON]) -> str | None:
    if name in old and name in new:
        before, now = old[name], new[name]
        if before == now and _text(before) == _text(now):
            return None
        *above, last = name.split(".")
        if last == _COMPUTED and _comparable(before, now):
            precision = ".".join([*above, _PRECISION])
            allowed = max(_LEAST, *(_ROUNDINGS * leaves.get(precision, 0) for leaves in (old, new)))
            largest = max(map(abs, before + now), default=0.0) or 1.0
            gap = max(abs(a - b) for a, b in zip(before, now, strict=True)) / largest
            return f"{name} differ by up to {gap:.1g} of the largest" if gap > allowed else None
    was, is_now = (_shown(leaves, name) for leaves in (old, new))
    return f"{name} was {was} and is now {is_now}"


def _comparable(*values: JSON) -> bool:
    numbers = all(isinstance(v, list) and all(isinstance(x, float) for x in v) for v in values)
    return numbers and len({len(value) for value in values}) == 1 and bool(values[0])


def _leaves(value: JSON, name: str) -> Iterator[tuple[str, JSON]]:
    if isinstance(value, dict) and (value or not name):
        for key, child in value.items():
            yield from _leaves(child, f"{name}.{key}" if name else key)
    else:
        yield name, value


def _text(value: JSON) -> str:
    return json.dumps(value, ensure_ascii=False)


def _shown(leaves: Mapping[str, JSON], name: str, limit: int = 100) -> str:
    text = _text(leaves[name]) if name in leaves else "not set"
    return text if len(text) <= limit else text[: limit - 1] + "…"
