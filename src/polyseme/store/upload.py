"""Uploading a finished result to a URL, its manifest last, so that it appears whole or not at all.

Object storage has no rename. So the work is done in a local folder, as usual, and its files are
then uploaded one by one. A record of uploaded files lets an interrupted upload continue, and
identifies what it left behind as ours.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from polyseme.errors import InputError, RunError
from polyseme.remote import RemotePath, StorageError, cache_folder, key_of, safe_name, showing
from polyseme.store.files import OVERWRITE, RESUME, sha256, writing
from polyseme.store.format import JSON, LONGEST_RUN_JSON, RUN_JSON
from polyseme.store.kind import Kind
from polyseme.store.remote_runs import copy_of

_SENT = "sent.jsonl"


class Upload:
    """Upload of a result from the local folder where it is made to a URL.

    Parameters
    ----------
    url : str
    kind : Kind

    Attributes
    ----------
    folder : Path
        Where the finished result goes. While it exists, the upload is not complete.
    """

    def __init__(self, url: str, kind: Kind) -> None:
        self.kind = kind
        self._remote = RemotePath(url)
        bucket, _, path = str(self._remote).partition("://")[2].partition("/")
        if not bucket or not path or {*path} & {*"*?["}:
            raise InputError(
                f"The output {url!r} is not a folder in a bucket. Give one such as "
                f"s3://bucket/runs/new."
            )
        work = cache_folder() / "outputs" / key_of(self._remote)
        self.folder, self._log = work / self._remote.name, work / _SENT

    @contextmanager
    def standing(self, *, overwrite: bool, resume: bool) -> Iterator[Path]:
        """A folder that mirrors what is at the URL; most files by name only.

        If a finished result is still to be sent and the work is resumed, it is that result.
        Leftovers of our own interrupted upload do not count.

        Raises
        ------
        RunError
            A finished result is still to be sent, and the call neither resumes nor discards it.
        """
        there, sent = self._remote.files(), self._sent()
        pending = self.folder.is_dir()
        free = self.kind.manifest not in there
        if pending and resume and (free or "" in sent or self._is_there(there)):
            yield self.folder
            return
        if pending and free and self.kind.resumable and not overwrite:
            raise RunError(
                f"{self.folder} is finished but not yet sent to {self._remote}. Send it with "
                f"{RESUME}, or discard it and start again with {OVERWRITE}."
            )
        if free and there.keys() <= sent.keys():
            there = {}
        with self._outline(there) as folder:
            yield folder

    def discard(self) -> None:
        """Remove the finished result that is still to be sent."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def send(self, refuse: Callable[[Path], None], *, overwrite: bool) -> None:
        """Send whatever has not been sent.

        Parameters
        ----------
        refuse : callable (Path)
            Raises if what a folder mirrors may not be replaced.
        overwrite : bool
            Whether anything may be.

        Raises
        ------
        RunError
            Something has appeared at the URL, or the storage failed for too long. The result stays
            in its folder, for a resume.
        """
        if not self.folder.is_dir():
            return
        try:
            with writing(self._log):
                self._send(refuse, overwrite)
        except StorageError as error:
            how = f"send it with {RESUME}" if self.kind.resumable else "try again"
            raise RunError(
                f"{error} Nothing is lost: the result is in {self.folder}; then {how}."
            ) from None

    def _send(self, refuse: Callable[[Path], None], overwrite: bool) -> None:
        there = self._remote.files()
        if not self._is_there(there):
            sent = self._sent()
            if unknown := there.keys() - sent.keys():
                if not (overwrite or "" in sent):
                    raise RunError(
                        f"{self._remote} appeared while the {self.kind.work} ran. Move it away, "
                        f"then send the result with {RESUME}."
                    )
                with self._outline(there) as folder:
                    refuse(folder)
                # From here on the old result is gone: the empty name records that it may be
                # replaced.
                for name in ("", *unknown):
                    self._write_down(name)
            self._replace(there, sent)
        self._keep()

    def _replace(self, there: Mapping[str, RemotePath], sent: Mapping[str, list[JSON]]) -> None:
        """Remove the manifest, then send the files, then the manifest."""
        files = [file for file in sorted(self.folder.rglob("*")) if file.is_file()]
        names = {file.relative_to(self.folder).as_posix(): file for file in files}
        manifest = self.kind.manifest
        if manifest in there:
            there[manifest].remove()
        for name in sorted(there.keys() - names.keys() - {manifest}):
            there[name].remove()
        total = sum(file.stat().st_size for file in files)
        with showing(f"Sending {self._remote.name}", total) as show:
            for name in sorted(names, key=lambda name: name == manifest):
                file, remote = names[name], self._remote / name
                digest = sha256(file)
                if name not in there or sent.get(name) != [digest, there[name].stamp]:
                    remote.put(file)
                    self._write_down(name, digest, remote.stamp)
                show(file.stat().st_size)

    def _is_there(self, there: Mapping[str, RemotePath]) -> bool:
        """Whether the result to be sent is already there, complete."""
        manifest = self.folder / self.kind.manifest
        if self.kind.manifest not in there or not manifest.is_file():
            return False
        raw = manifest.read_bytes()
        return there[self.kind.manifest].read(len(raw) + 1) == raw

    def _keep(self) -> None:
        """Make the result that was sent the cached copy that the run is read from."""
        if self.kind.manifest == RUN_JSON:
            copy = copy_of(self._remote, (self.folder / RUN_JSON).read_bytes())
            if not copy.is_dir():
                copy.parent.mkdir(parents=True, exist_ok=True)
                self.folder.rename(copy)
        self.discard()
        self._log.unlink(missing_ok=True)

    @contextmanager
    def _outline(self, there: Mapping[str, RemotePath]) -> Iterator[Path]:
        """A folder with the names of all files, and the contents of those that describe others."""
        with tempfile.TemporaryDirectory() as above:
            folder = Path(above)
            for name, remote in there.items():
                file = folder / safe_name(remote, name)
                file.parent.mkdir(parents=True, exist_ok=True)
                about = self.kind.manifest in there and name.endswith(".json") and "/" not in name
                file.write_bytes(remote.read(LONGEST_RUN_JSON) if about else b"")
            yield folder

    def _sent(self) -> dict[str, list[JSON]]:
        """SHA-256 and stamp of each of our files at the URL, by name."""
        if not self._log.is_file():
            return {}
        sent = {}
        for line in self._log.read_text("utf-8").splitlines():
            try:
                name, *about = json.loads(line)
                sent[name] = about
            except ValueError:  # half a line, from a process that was killed
                continue
        return sent

    def _write_down(self, name: str, *about: JSON) -> None:
        with self._log.open("a", encoding="utf-8") as log:
            log.write(json.dumps([name, *about]) + "\n")
