"""Files at URLs such as ``s3://bucket/run``, on any storage that fsspec supports.

Credentials come from the environment, where each storage's own package looks for them. They are
never part of a URL or a message.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Any, BinaryIO, TypeVar, cast

from polyseme.errors import InputError, RunError

WAITS = (1, 4, 16)  # seconds between retries
_CHUNK_BYTES = 1 << 20
_BLOCK_BYTES = 8 << 20  # per request, when a file is read sequentially

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
_FLATTENED = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:[/\\][^/\\]")
# A secret may contain a slash, so it need not end where the host of a URL does.
_CREDENTIALS = re.compile(r"(s3a?|gc?s)://[^/]*@|[^:]+://([^@]*:[^@]*@|.*\?.*=)", re.IGNORECASE)
_GLOB = re.compile(r"[*?\[]")

# The package for each scheme, and where it finds credentials.
_S3 = ("s3fs", "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE")
_GS = ("gcsfs", "GOOGLE_APPLICATION_CREDENTIALS, or gcloud's own login")
_ABFS = ("adlfs", "AZURE_STORAGE_CONNECTION_STRING, or AZURE_STORAGE_ACCOUNT_NAME and its key")
_STORAGES = {
    "s3": _S3,
    "s3a": _S3,
    "gs": _GS,
    "gcs": _GS,
    "abfs": _ABFS,
    "abfss": _ABFS,
    "az": _ABFS,
    "hf": ("huggingface_hub", "HF_TOKEN"),
    "oci": ("ocifs", "OCI's own configuration"),
    "oss": ("ossfs", "OSS_ACCESS_KEY_ID and OSS_ACCESS_KEY_SECRET"),
    "sftp": ("paramiko", "ssh's own configuration"),
    "http": ("aiohttp", "~/.netrc"),
    "https": ("aiohttp", "~/.netrc"),
    "memory": ("fsspec", ""),
}
# The fields that identify the contents of a file, in the terms of each storage.
_STAMPS = (
    *("ETag", "etag", "md5Hash", "content_md5", "blob_id", "oid"),
    *("LastModified", "last_modified", "updated", "mtime", "created"),
)
_SECRET = re.compile(r"KEY|SECRET|TOKEN|PASSWORD|CREDENTIAL|CONNECTION_STRING")

Result = TypeVar("Result")


class StorageError(InputError, RunError):
    """A URL that cannot be read or written."""


class NothingThereError(StorageError):
    """There is nothing at a URL."""


def is_url(path: object) -> bool:
    """Whether a path is a URL.

    Raises
    ------
    InputError
        It was a URL before it became a `pathlib.Path`.
    """
    if isinstance(path, Path) and _FLATTENED.match(str(path)):
        raise InputError(
            f"The path {str(path)!r} was a URL before pathlib removed a slash. Give the URL as a "
            "str."
        )
    return isinstance(path, str) and _SCHEME.match(path) is not None


def local_path(path: str | Path, what: str) -> Path:
    """A path where URLs are not accepted.

    Raises
    ------
    InputError
        The path is a URL.
    """
    if is_url(path):
        raise InputError(
            f"{what} must be local, but {str(path).partition(':')[0]}://… is a URL. Copy it to "
            "this machine and give the local path."
        )
    return Path(path)


def fetched(path: str | Path) -> Path:
    """A local path: the path itself, or for a URL a copy in the cache."""
    return RemotePath(str(path)).fetch() if is_url(path) else Path(path).expanduser()


def cache_folder() -> Path:
    """The folder for copies of remote files, and for files to upload."""
    if chosen := os.environ.get("POLYSEME_CACHE"):
        return Path(chosen).expanduser().absolute()
    caches = os.environ.get("XDG_CACHE_HOME")
    return (Path(caches) if caches else Path.home() / ".cache") / "polyseme"


def key_of(*parts: object) -> str:
    """A name for a folder in the cache."""
    return hashlib.sha256(json.dumps([str(part) for part in parts]).encode()).hexdigest()[:32]


class RemotePath:
    """A file at a URL, or a folder with the files below it.

    Failures that may be temporary are retried a few times, with a warning.

    Parameters
    ----------
    url : str
        The last part may be a pattern, for `files`.

    Attributes
    ----------
    name : str
        The last part of the URL.

    Raises
    ------
    StorageError
        From the constructor and every method: the URL contains credentials, its scheme is
        unknown, its package is missing, access is refused, or retries fail.
    NothingThereError
        There is no such file, folder or bucket.
    """

    def __init__(self, url: str) -> None:
        self._url = url.rstrip("/")
        self.name = self._url.rpartition("/")[2]
        self._info: Mapping[str, Any] | None = None
        self._storage, self._path = _storage(self._url)

    def __str__(self) -> str:
        return self._url

    def __truediv__(self, name: str) -> RemotePath:
        path = RemotePath.__new__(RemotePath)
        path._url, path.name = f"{self._url}/{name}", name.rpartition("/")[2]
        path._storage, path._path = self._storage, f"{self._path.rstrip('/')}/{name}"
        path._info = None
        return path

    @property
    def info(self) -> Mapping[str, Any]:
        """The storage's information about the file."""
        if self._info is None:
            self._info = cast(
                Mapping[str, Any], self._ask("read", lambda: self._fresh().info(self._path))
            )
        return self._info

    @property
    def size(self) -> int:
        """Size of the file in bytes."""
        return int(self.info.get("size") or 0)

    @property
    def stamp(self) -> str | None:
        """A value that changes with the file's contents: an ETag, or a date."""
        stamp = next((self.info[name] for name in _STAMPS if self.info.get(name)), None)
        if isinstance(stamp, datetime):
            stamp = stamp.timestamp()  # the form in which the same storage also reports it
        return None if stamp is None else str(stamp).strip('"')

    def files(self) -> dict[str, RemotePath]:
        """The files below a folder, by their names in it, sorted.

        A file gives only itself, and a pattern all files that match.
        """
        above = self
        if _GLOB.search(self._url):
            folder = _GLOB.split(self._path)[0].rpartition("/")[0]
            infos = self._ask("read", lambda: self._fresh().glob(self._path, detail=True))
            above = RemotePath(self._url[: len(self._url) - len(self._path) + len(folder)])
        else:
            infos = self._ask("read", self._find)
        start = above._path.rstrip("/") + "/"
        files = {}
        for path, info in infos.items():
            if info["type"] == "file" and not path.endswith("/"):
                name = path.removeprefix(start) if path.startswith(start) else self.name
                file = self if path == self._path else above / name
                file._info = info
                files[name] = file
        return dict(sorted(files.items(), key=lambda entry: entry[0].split("/")))

    def _find(self) -> dict[str, dict[str, Any]]:
        try:
            return cast(dict[str, dict[str, Any]], self._fresh().find(self._path, detail=True))
        except FileNotFoundError:
            # Some storages raise this for an empty folder, others only for a missing bucket.
            parts = self._path.split("/")
            if any(self._storage.exists("/".join(parts[:n])) for n in range(1, len(parts))):
                return {}
            raise

    def _fresh(self) -> Any:
        """The storage with its cache cleared: others may have changed the files."""
        self._storage.invalidate_cache()
        return self._storage

    def open(self, mode: str = "rb") -> BinaryIO:
        """Open the file for reading."""
        assert mode == "rb"
        return cast(BinaryIO, io.BufferedReader(_Stream(self), _CHUNK_BYTES))

    def read(self, most: int) -> bytes:
        """The first bytes of the file."""
        with self.open() as file:
            return file.read(most)

    def copy(self, file: Path, show: Callable[[int], None] = lambda n: None) -> str:
        """Copy the file to a local file; returns its SHA-256."""
        sha = hashlib.sha256()
        with self.open() as source, file.open("wb") as copy:
            while chunk := source.read(_CHUNK_BYTES):
                sha.update(chunk)
                copy.write(chunk)
                show(len(chunk))
        return sha.hexdigest()

    def put(self, file: Path) -> None:
        """Upload a local file, completely or not at all."""

        def put() -> None:
            self._storage.put_file(str(file), self._path)
            self._info = self._fresh().info(self._path)
            if self.size != file.stat().st_size:
                raise OSError(f"only {self.size:,} bytes arrived")

        self._ask("written", put)

    def remove(self) -> None:
        """Remove the file, if it still exists."""

        def remove() -> None:
            with suppress(FileNotFoundError):
                self._storage.rm_file(self._path)

        self._ask("removed", remove)

    def fetch(
        self, wanted: Callable[[str], bool] = lambda name: True, *, shown: bool = True
    ) -> Path:
        """A local copy of a file, or of the wanted files below a folder, with the same name.

        The copy is cached, and made again when anything at the URL has changed.
        """
        files = {name: file for name, file in self.files().items() if wanted(name)}
        if not files:
            raise self.nothing()
        stamps = [(name, file.size, file.stamp) for name, file in files.items()]
        folder = cache_folder() / "copies" / key_of(self, stamps)
        is_file = list(files.values()) == [self]
        if not folder.is_dir():
            with (
                placed(folder) as aside,
                showing(f"Fetching {self.name}", sum(n for _, n, _ in stamps), shown) as show,
            ):
                for name, file in files.items():
                    copy = (
                        aside / self.name if is_file else aside / self.name / safe_name(self, name)
                    )
                    copy.parent.mkdir(parents=True, exist_ok=True)
                    file.copy(copy, show)
                    if copy.stat().st_size != file.size:
                        raise StorageError(f"{file} changed while it was being read. Try again.")
        return folder / self.name

    # ------------------------------------------------------------------------- failures

    def _ask(self, done: str, action: Callable[[], Result]) -> Result:
        """The result of an action, which is retried while that may help."""
        for wait in (*WAITS, None):
            try:
                return action()
            # Every exception: storages also raise those of their own HTTP clients.
            except Exception as error:
                reason = _reason(error)
                if isinstance(error, FileNotFoundError):
                    raise self.nothing(reason) from None
                if _is_refusal(error):
                    raise self._refused(reason) from None
                if wait is None:
                    raise StorageError(
                        f"{self} could not be {done} after {len(WAITS) + 1} attempts ({reason}). "
                        "Check the connection, and try again later."
                    ) from None
                warnings.warn(
                    f"{self} could not be {done} ({reason}). Trying again in {wait} s.",
                    stacklevel=3,
                )
                time.sleep(wait)
        raise AssertionError

    def nothing(self, reason: str = "") -> NothingThereError:
        """The error for a URL with nothing there."""
        why = f" ({reason})" if reason and reason not in self._path else ""
        return NothingThereError(f"There is nothing at {self}{why}. Check the bucket and the path.")

    def _refused(self, reason: str) -> StorageError:
        _, where = _STORAGES.get(self._url.partition(":")[0].lower(), ("", ""))
        return StorageError(
            f"{self}: access was refused ({reason}). Credentials come from the environment"
            f"{f': {where}' * bool(where)}. Check them and their permissions."
        )


class _Stream(io.RawIOBase):
    """A file that is reopened at the same position when its storage fails temporarily."""

    def __init__(self, path: RemotePath) -> None:
        self._remote, self._file, self._at = path, cast(Any, None), 0
        self._size = -1

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._remote.size}[whence]
        self._at = base + offset
        return self._at

    def readinto(self, buffer: Any) -> int:
        data = self._remote._ask("read", lambda: self._read(len(buffer)))
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)

    def _read(self, n: int) -> bytes:
        try:
            if self._file is None:
                storage = self._remote._storage
                self._file = storage.open(self._remote._path, "rb", block_size=_BLOCK_BYTES)
            if self._file.tell() != self._at:
                self._file.seek(self._at)
            return cast(bytes, self._file.read(n))
        except Exception:
            self._forget()
            raise

    def _forget(self) -> None:
        file, self._file = self._file, None
        if file is not None:
            file.close()

    def close(self) -> None:
        self._forget()
        super().close()


def safe_name(folder: RemotePath, name: str) -> str:
    """The name of a file below a folder, refused if it would lead outside."""
    parts = name.split("/")
    if {"", ".", ".."} & {*parts} or "\\" in name or "\0" in name or Path(name).drive:
        raise StorageError(
            f"{folder} has a file named {name!r}, which cannot be copied safely. Rename or remove "
            "it."
        )
    return name


def _storage(url: str) -> tuple[Any, str]:
    """The storage of a URL, and the path within it."""
    scheme = url.partition(":")[0]
    if _CREDENTIALS.match(url):
        raise StorageError(
            f"The URL {scheme}://… contains credentials, which would end up in logs and runs. "
            "Remove them from the URL, and set them in the environment."
        )
    if scheme in ("file", "local") or "::" in url:
        raise StorageError(
            f"The URL {url!r} is not supported. Give a local file by its path, and no chained URLs."
        )
    package, _ = _STORAGES.get(scheme.lower(), ("", ""))
    try:
        import fsspec

        storage, path = fsspec.core.url_to_fs(url)
    except ImportError as error:
        raise StorageError(
            f"{url} requires a package that is not installed ({_reason(error)})."
            f"{f' Install it with: pip install {package}' * bool(package)}"
        ) from None
    except ValueError as error:
        if "Protocol not known" not in str(error):
            raise StorageError(f"{url} is not a valid storage URL ({_reason(error)}).") from None
        raise StorageError(
            f"The URL {url} has the unknown scheme {scheme!r}; expected one such as "
            f"{', '.join(_STORAGES)}."
        ) from None
    return storage, str(path)


def _is_refusal(error: Exception) -> bool:
    status = getattr(getattr(error, "response", None), "status_code", None)
    no_credentials = "Credentials" in type(error).__name__  # botocore's, google's
    return isinstance(error, PermissionError) or no_credentials or status in (401, 403)


def _reason(error: BaseException) -> str:
    """The message of a storage's error, as one line without secrets."""
    text = " ".join(str(error).split()).rstrip(".") or type(error).__name__
    for name, value in os.environ.items():
        if len(value) >= 8 and _SECRET.search(name.upper()):
            text = text.replace(value, "…")
    return text if len(text) <= 200 else text[:199] + "…"


@contextmanager
def placed(folder: Path) -> Iterator[Path]:
    """A folder to fill, then renamed into place unless another process has already made it."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".") as above:
            aside = Path(above, "made")
            aside.mkdir()
            yield aside
            try:
                aside.rename(folder)
            except OSError:
                if not folder.is_dir():
                    raise
    except OSError as error:
        raise StorageError(
            f"Cannot write {error.filename or folder}: {error.strerror or error}. Free some space, "
            "or set POLYSEME_CACHE to another folder, and try again."
        ) from error


@contextmanager
def showing(what: str, n_bytes: int, shown: bool = True) -> Iterator[Callable[[int], None]]:
    """A progress bar for a number of bytes, if there is a terminal."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    shown = shown and sys.stderr.isatty()
    with Progress(console=console, transient=True, disable=not shown) as bars:
        task = bars.add_task(what, total=n_bytes)
        yield lambda n: bars.update(task, advance=n)
