"""read_images: how a source is told, and what is said of one that is not."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from polyseme.data import read_images
from polyseme.errors import InputError


@pytest.fixture
def array_file(tmp_path: Path) -> Path:
    path = tmp_path / "images.npy"
    np.save(path, np.zeros((4, 3, 3), np.uint8))
    return path


def test_mean_and_std(array_file: Path) -> None:
    images = read_images(array_file, mean=0.5)
    assert (images.mean, images.std) == (0.5, 1.0)
    images = read_images(array_file, mean=(0.1, 0.2, 0.3), std=(1, 2, 3))
    assert (images.mean, images.std) == ((0.1, 0.2, 0.3), (1.0, 2.0, 3.0))
    with pytest.raises(InputError, match=r"images.npy: std is 0; "):
        read_images(array_file, std=0)


def test_home_is_expanded(array_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(array_file.parent))
    assert len(read_images("~/images.npy")) == 4


def test_a_missing_path_names_its_neighbours(array_file: Path) -> None:
    near = array_file.with_name("image.npy")
    message = rf"The path '{near}' does not exist. Did you mean '{array_file}'\? Accepted are a fol"
    with pytest.raises(InputError, match=message):
        read_images(near)
    far = array_file.parent / "nowhere" / "images.npy"
    with pytest.raises(InputError, match=rf"There is no folder '{far.parent}' either\. Accepted"):
        read_images(far)
    with pytest.raises(InputError, match=r"zzz' does not exist\. Accepted are a folder of MNIST"):
        read_images(array_file.with_name("zzz"))


@pytest.mark.parametrize("limit", [0, -3, 2.0, True, "7"])
def test_limit_is_a_whole_number(array_file: Path, limit: Any) -> None:
    with pytest.raises(InputError, match=rf"limit is {limit!r}; it must be a whole number of im"):
        read_images(array_file, limit=limit)


@pytest.mark.parametrize(
    ("source", "given"), [(np.zeros(3), "a ndarray"), (None, "a NoneType"), ("", "''")]
)
def test_sources_that_are_no_paths(source: Any, given: str) -> None:
    message = rf"read_images was given {given}; it reads a path .* with Images\(pixels, labels\)"
    with pytest.raises(InputError, match=message):
        read_images(source)


@pytest.mark.parametrize("argument", ["images_key", "labels_key"])
def test_keys_need_a_source_that_has_keys(array_file: Path, argument: str) -> None:
    message = rf"images.npy: {argument} was given; it selects an array of a .npz file"
    for source in (array_file, array_file.parent):
        with pytest.raises(InputError, match=message.removeprefix("images.npy")):
            read_images(source, **{argument: "x"})  # type: ignore[arg-type]


def test_a_split_needs_a_source_that_has_splits(array_file: Path) -> None:
    with pytest.raises(InputError, match=r"split='test' was given for a single file, which has no"):
        read_images(array_file, split="test")


@pytest.mark.parametrize("content", [b"", b"a,b\n1,2\n", b"\0\0\x07\x03rest"])
def test_other_files(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "table.csv"
    path.write_bytes(content)
    message = r"table.csv: polyseme cannot read this as a file of images. Accepted are"
    with pytest.raises(InputError, match=message):
        read_images(path)


def test_files_that_may_not_be_read(array_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    message = r"images.npy: the file could not be read \(Permission denied\). Check that it is a"
    with pytest.raises(InputError, match=message):
        read_images(array_file)
    monkeypatch.setattr(Path, "iterdir", refuse)
    with pytest.raises(
        InputError, match=r"could not be read \(Permission denied\). Check the path"
    ):
        read_images(array_file.parent)


def test_a_folder_with_the_name_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "x.npz").mkdir()
    with pytest.raises(InputError, match=r"x.npz: the folder has no images"):
        read_images(tmp_path / "x.npz")


def test_optional_libraries_are_imported_only_when_needed() -> None:
    code = (
        "import sys, polyseme.data\n"
        "optional = {'torch', 'PIL', 'mlxtend', 'datasets', 'pandas', 'scipy'}\n"
        "print(sorted(optional & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("name", ["x.npy", "x.npz", "x.idx", "x"])
def test_a_pipe_is_not_waited_for(tmp_path, name):
    os.mkfifo(tmp_path / name)
    with pytest.raises(InputError, match=f"{name}: a pipe, a socket or a device, which may never"):
        read_images(tmp_path / name)
