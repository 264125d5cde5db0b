"""Texts and images at URLs are the same as local ones."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pandas as pd
import pytest

from polyseme.data import read_images, read_text
from polyseme.errors import InputError
from polyseme.remote import RemotePath


def put_all(folder: Path, url: str) -> None:
    for file in folder.rglob("*"):
        if file.is_file():
            (RemotePath(url) / file.relative_to(folder).as_posix()).put(file)


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    folder = tmp_path / "corpus"
    (folder / "more").mkdir(parents=True)
    (folder / "a.txt").write_text("One document.\r\nOf two lines.", newline="")
    (folder / "b.txt.gz").write_bytes(gzip.compress("Zweites, größer. ".encode() * 90_000))
    (folder / "c.jsonl").write_text(json.dumps({"text": "three"}) + '\n{"text": "four"}\n')
    pd.DataFrame({"text": ["five", "six"]}).to_parquet(folder / "more" / "d.parquet")
    (folder / ".hidden.txt").write_text("not this")
    (folder / "notes.md").write_text("nor this")
    return folder


@pytest.mark.parametrize("storage", ["memory", "s3"])
def test_texts(storage: str, corpus: Path, request: Any, cache: Path) -> None:
    url = f"{request.getfixturevalue(storage)}/corpus"
    put_all(corpus, url)
    ours, theirs = read_text(url), read_text(corpus)
    assert list(ours.documents()) == list(theirs.documents())
    assert list(ours.documents()) == list(theirs.documents())
    assert ours.name == theirs.name == "corpus"
    for name in ("a.txt", "b.txt.gz", "c.jsonl", "more/d.parquet"):
        file = read_text(f"{url}/{name}")
        assert list(file.documents()) == list(read_text(corpus / name).documents())
    assert list(read_text(f"{url}/*.txt").documents()) == ["One document.\nOf two lines."]
    # Only what needs a local file was copied.
    assert {path.name for path in cache.rglob("*") if path.is_file()} == {"d.parquet"}
    one, other = ours.identity(), theirs.identity()
    stamps = [file.pop("stamp") for file in one["files"]]
    assert len(set(stamps)) == 4
    for file in other["files"]:
        del file["sha256"]
    assert one == other
    assert read_text(url).identity() == ours.identity()
    with fsspec.open(f"{url}/a.txt", "wb") as file:
        file.write(b"Two documents.\r\nOf one line.")
    again = read_text(url).identity()
    assert [a["bytes"] for a in again["files"]] == [b["bytes"] for b in other["files"]]
    assert again != ours.identity()


def test_a_text_without_a_stamp_is_read_for_its_identity(
    memory: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    file = tmp_path / "a.txt"
    file.write_text("One document.")
    (RemotePath(memory) / "a.txt").put(file)
    monkeypatch.setattr("polyseme.remote._STAMPS", ())
    assert read_text(f"{memory}/a.txt").identity() == read_text(file).identity()


def test_texts_that_are_not_there(s3: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nothing at s3://none/corpus \(The specified bucket"):
        read_text("s3://none/corpus")
    with pytest.raises(InputError, match=r"nothing at s3://bucket/\*\.txt\. Check the bucket"):
        read_text(f"{s3}/*.txt")
    (tmp_path / "notes.md").write_text("no text")
    (RemotePath(s3) / "docs/notes.md").put(tmp_path / "notes.md")
    with pytest.raises(InputError, match=r"s3://bucket/docs: the folder holds no text files"):
        read_text(f"{s3}/docs")
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe\xfd")
    (RemotePath(s3) / "docs/a.txt").put(tmp_path / "a.txt")
    with pytest.raises(InputError, match=r"s3://bucket/docs/a.txt: byte 0 is not utf-8 text"):
        read_text(f"{s3}/docs")
    with pytest.raises(InputError, match=r"'s3:/bucket/docs' was a URL before pathlib"):
        read_text(Path(f"{s3}/docs"))


def test_images(memory: str, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (6, 4, 5), dtype=np.uint8)
    labels = np.arange(6, dtype=np.uint8)
    folder = tmp_path / "images"
    folder.mkdir()
    np.savez(folder / "set.npz", images=pixels, labels=labels)
    np.save(folder / "set.npy", pixels)
    idx = {"images-idx3": (b"\0\0\x08\x03", pixels), "labels-idx1": (b"\0\0\x08\x01", labels)}
    for name, (magic, array) in idx.items():
        sizes = b"".join(n.to_bytes(4, "big") for n in array.shape)
        (folder / f"train-{name}-ubyte").write_bytes(magic + sizes + array.tobytes())
    put_all(folder, f"{memory}/images")
    for name in ("set.npz", "set.npy", "train-images-idx3-ubyte", ""):
        ours = read_images(f"{memory}/images/{name}")
        theirs = read_images(folder / name)
        assert ours.name == theirs.name
        assert ours.digest() == theirs.digest()
        assert (ours.labels is None) == (theirs.labels is None)
        if ours.labels is not None:
            assert ours.labels.tolist() == theirs.labels.tolist()
    with pytest.raises(InputError, match=r"nothing at memory://tests/none\. Check"):
        read_images(f"{memory}/none")
