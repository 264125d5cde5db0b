"""Files at URLs: which URLs are taken, what failures say, what is copied."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import fsspec
import pytest

from polyseme.errors import InputError, RunError
from polyseme.remote import NothingThereError, RemotePath, StorageError, fetched, is_url, local_path


def write(url: str, content: bytes) -> None:
    with fsspec.open(url, "wb") as file:
        file.write(content)


class Flaky:
    """Has a method of a storage fail a number of times before it works."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, storage: Any, name: str, n: int) -> None:
        self.n, self.calls, true = n, 0, getattr(storage, name)

        def method(*arguments: Any, **named: Any) -> Any:
            self.calls += 1
            if self.calls <= self.n:
                raise OSError("Please reduce your request rate")
            return true(*arguments, **named)

        monkeypatch.setattr(storage, name, method)


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("s3://bucket/run", True),
        ("memory://a", True),
        ("runs/new", False),
        ("C:\\runs", False),
        ("owner/name", False),
        (Path("runs"), False),
        (3, False),
    ],
)
def test_is_url(path: object, expected: bool) -> None:
    assert is_url(path) is expected


def test_a_url_that_pathlib_has_changed_is_refused() -> None:
    with pytest.raises(
        InputError, match=r"'s3:/bucket/run' was a URL before pathlib removed a slash"
    ):
        is_url(Path("s3://bucket/run"))


@pytest.mark.parametrize(
    "url",
    [
        "s3://AKIAKEY:hunter2@bucket/run",
        "s3://AKIAKEY:hunter2/with/slash@bucket/run",
        "s3://hunter2@bucket/run",
        "sftp://me:hunter2@host/run",
        "https://host/a.txt?X-Amz-Signature=hunter2",
        "S3://AKIAKEY:hunter2@bucket",
    ],
)
def test_credentials_in_a_url_are_refused_and_not_shown(url: str) -> None:
    with pytest.raises(StorageError, match=r"contains credentials.*environment") as caught:
        RemotePath(url)
    assert "hunter2" not in str(caught.value)
    assert "AKIAKEY" not in str(caught.value)
    with pytest.raises(InputError, match=r"A figure must be local, but .{2,5}://… is a URL") as no:
        local_path(url, "A figure")
    assert "hunter2" not in str(no.value)


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("gs://bucket/run", r"gs://bucket/run requires a package .* pip install gcsfs"),
        ("nonsense://a/b", r"unknown scheme 'nonsense'; expected one such as s3, "),
        ("file:///a/b", r"'file:///a/b' is not supported\. Give a local file by its path"),
        ("simplecache::s3://a/b", r"no chained URLs"),
    ],
)
def test_urls_that_cannot_be_read(url: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(StorageError, match=message):
        RemotePath(url)


def test_files_of_a_folder_a_file_and_a_pattern(memory: str) -> None:
    for name in ("b.txt", "a.txt", "sub/c.txt", "sub.d/e"):
        write(f"{memory}/{name}", name.encode())
    assert list(RemotePath(memory).files()) == ["a.txt", "b.txt", "sub/c.txt", "sub.d/e"]
    assert {str(file) for file in RemotePath(f"{memory}/").files().values()} == {
        f"{memory}/{name}" for name in ("a.txt", "b.txt", "sub/c.txt", "sub.d/e")
    }
    one = RemotePath(f"{memory}/a.txt")
    assert one.files() == {"a.txt": one}
    matching = RemotePath(f"{memory}/*.txt").files()
    assert {name: str(file) for name, file in matching.items()} == {
        "a.txt": f"{memory}/a.txt",
        "b.txt": f"{memory}/b.txt",
    }
    assert matching["b.txt"].read(99) == b"b.txt"
    assert RemotePath(f"{memory}/none").files() == {}


@pytest.mark.parametrize("storage", ["memory", "s3"])
def test_put_read_and_remove(storage: str, request: Any, tmp_path: Path) -> None:
    folder = RemotePath(request.getfixturevalue(storage) + "/folder")
    file, content = tmp_path / "file", bytes(range(256)) * 9000
    file.write_bytes(content)
    remote = folder / "sub/file"
    remote.put(file)
    before = remote.stamp
    assert {name: path.size for name, path in folder.files().items()} == {"sub/file": len(content)}
    with remote.open() as opened:
        assert opened.read(3) == content[:3]
        opened.seek(1000)
        assert opened.read() == content[1000:]
    assert folder.files()["sub/file"].stamp == before
    file.write_bytes(content[::-1])
    remote.put(file)
    assert folder.files()["sub/file"].stamp != before
    remote.remove()
    remote.remove()
    assert folder.files() == {}


def test_a_bucket_that_is_not_there(s3: str) -> None:
    message = r"nothing at s3://none/run \(The specified bucket does not exist\)\. Check the bucket"
    with pytest.raises(NothingThereError, match=message):
        RemotePath("s3://none/run").files()
    with pytest.raises(NothingThereError, match=r"nothing at s3://bucket/none\. Check"):
        RemotePath(f"{s3}/none").fetch()


def test_refused_credentials(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    remote = RemotePath(f"{s3}/file")
    monkeypatch.setattr("moto.settings.INITIAL_NO_AUTH_ACTION_COUNT", 0)
    with pytest.raises(
        StorageError, match=r"s3://bucket/file: access was refused \(The AWS Access"
    ):
        remote.files()
    with pytest.raises(StorageError, match=r"AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY") as error:
        remote.read(1)
    assert "a-secret" not in str(error.value)


def test_no_credentials(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import s3fs

    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    s3fs.S3FileSystem.clear_instance_cache()
    with pytest.raises(StorageError, match=r"refused \(Unable to locate credentials\)"):
        RemotePath(f"{s3}/file").files()


def test_a_secret_in_an_error_is_not_shown(memory: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise PermissionError("the key hunter2hunter2 is not known")

    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hunter2hunter2")
    remote = RemotePath(memory)
    monkeypatch.setattr(remote._storage, "find", refuse)
    with pytest.raises(
        StorageError, match=r"access was refused \(the key … is not known\)"
    ) as error:
        remote.files()
    assert error.value.__cause__ is None
    assert error.value.__suppress_context__


def test_a_storage_that_fails_for_a_while(memory: str, monkeypatch: pytest.MonkeyPatch) -> None:
    write(f"{memory}/file", b"content")
    remote = RemotePath(f"{memory}/file")
    flaky = Flaky(monkeypatch, remote._storage, "open", 2)
    said = r"memory://tests/file could not be read \(Please reduce your request rate\)\. Trying"
    with pytest.warns(UserWarning, match=said) as warned:
        assert remote.read(99) == b"content"
    assert len(warned) == 2
    assert flaky.calls == 3


def test_a_storage_that_fails_for_long(memory: str, monkeypatch: pytest.MonkeyPatch) -> None:
    remote = RemotePath(f"{memory}/file")
    Flaky(monkeypatch, remote._storage, "find", 99)
    said = r"could not be read after 3 attempts \(Please reduce your request rate\)\. Check"
    with pytest.warns(UserWarning, match="Trying again"), pytest.raises(StorageError, match=said):
        remote.files()


def test_a_read_goes_on_where_it_failed(memory: str, monkeypatch: pytest.MonkeyPatch) -> None:
    content = bytes(range(256)) * 20_000
    write(f"{memory}/file", content)
    remote = RemotePath(f"{memory}/file")
    opened = remote.open()
    start = opened.read(2_000_000)
    stream = opened.raw  # type: ignore[attr-defined]

    class Broken:
        def tell(self) -> int:
            raise ConnectionError("reset by peer")

        def close(self) -> None: ...

    stream._file = Broken()
    with pytest.warns(UserWarning, match="reset by peer"):
        assert start + opened.read() == content
    opened.close()


def test_a_folder_is_copied_once_and_again_when_it_changes(memory: str, cache: Path) -> None:
    write(f"{memory}/set/train/0.txt", b"zero")
    write(f"{memory}/set/1.txt", b"one")
    folder = fetched(f"{memory}/set")
    assert folder.name == "set"
    assert folder.is_relative_to(cache)
    assert (folder / "train" / "0.txt").read_bytes() == b"zero"
    (folder / "1.txt").write_bytes(b"touched")
    assert fetched(f"{memory}/set") == folder
    assert (folder / "1.txt").read_bytes() == b"touched"
    write(f"{memory}/set/1.txt", b"new")
    assert (fetched(f"{memory}/set") / "1.txt").read_bytes() == b"new"
    assert fetched(f"{memory}/set/1.txt").read_bytes() == b"new"
    assert fetched("a/b") == Path("a/b")


@pytest.mark.parametrize("name", ["../out", "a/../../out", "a\\b", "./a"])
def test_a_hostile_name_is_refused(
    name: str, memory: str, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    remote = RemotePath(memory)
    listed = {f"/tests/{name}": {"type": "file", "size": 1, "name": f"/tests/{name}"}}
    monkeypatch.setattr(remote._storage, "find", lambda *_, **__: listed)
    with pytest.raises(StorageError, match="cannot be copied safely"):
        remote.fetch()
    assert [path for path in cache.rglob("*") if path.is_file()] == []


def test_a_full_disk(memory: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(f"{memory}/file", b"content")
    (tmp_path / "cache").write_bytes(b"no folder")
    with pytest.raises(
        RunError, match=r"Cannot write .*cache.*set POLYSEME_CACHE to another folder"
    ):
        fetched(f"{memory}/file")
