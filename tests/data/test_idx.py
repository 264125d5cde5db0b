"""IDX files: what is written is read back; what is damaged is refused with its reason."""

from __future__ import annotations

import gzip
import struct
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from polyseme.data import read_images
from polyseme.data.idx import read_idx
from polyseme.errors import InputError

RNG = np.random.default_rng(3)
PIXELS = RNG.integers(0, 256, (9, 5, 4), dtype=np.uint8)
LABELS = RNG.integers(0, 10, 9, dtype=np.uint8)
CODES = {"u1": 8, "i1": 9, "i2": 11, "i4": 12, "f4": 13, "f8": 14}


def idx(array: NDArray[Any]) -> bytes:
    """The format's definition: two zeros, type, number of axes, their lengths, the numbers."""
    kind = array.dtype.str[1:]
    head = bytes([0, 0, CODES[kind], array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
    return head + array.astype(">" + kind).tobytes()


def write(path: Path, array: NDArray[Any]) -> Path:
    data = idx(array)
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


SPELLINGS = ["-idx{}-ubyte", "-idx{}-ubyte.gz", ".idx{}-ubyte", ".idx{}-ubyte.gz"]


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize(
    ("split", "stem"), [("train", "train"), ("test", "t10k"), ("test", "test")]
)
def test_a_folder_is_read_back(tmp_path: Path, spelling: str, split: str, stem: str) -> None:
    write(tmp_path / f"{stem}-images{spelling.format(3)}", PIXELS)
    write(tmp_path / f"{stem}-labels{spelling.format(1)}", LABELS)
    images = read_images(tmp_path, split=split)
    assert images.pixels.dtype == np.uint8
    assert images.labels is not None
    np.testing.assert_array_equal(images.pixels, PIXELS)
    np.testing.assert_array_equal(images.labels, LABELS)
    assert images.name == f"{tmp_path.name} ({split})"
    assert (images.mean, images.std) == (0.0, 1.0)


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_a_single_file_finds_its_labels(tmp_path: Path, spelling: str) -> None:
    path = write(tmp_path / f"t10k-images{spelling.format(3)}", PIXELS)
    assert read_images(path).labels is None
    write(tmp_path / f"t10k-labels{spelling.format(1)}", LABELS)
    images = read_images(str(path), split="test", mean=0.1307, std=0.3081)
    assert images.labels is not None
    np.testing.assert_array_equal(images.pixels, PIXELS)
    np.testing.assert_array_equal(images.labels, LABELS)
    assert (images.mean, images.std, images.name) == (0.1307, 0.3081, path.name)


def test_any_name_will_do_for_a_single_file(tmp_path: Path) -> None:
    for name in ("digits.bin", "digits.gz"):
        images = read_images(write(tmp_path / name, PIXELS))
        np.testing.assert_array_equal(images.pixels, PIXELS)


def test_gzip_is_told_by_the_contents_not_by_the_name(tmp_path: Path) -> None:
    (tmp_path / "train-images-idx3-ubyte").write_bytes(gzip.compress(idx(PIXELS)))
    np.testing.assert_array_equal(read_images(tmp_path).pixels, PIXELS)


def test_of_two_spellings_the_uncompressed_one_is_read(tmp_path: Path) -> None:
    write(tmp_path / "train-images-idx3-ubyte", PIXELS)
    (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(b"junk")
    np.testing.assert_array_equal(read_images(tmp_path).pixels, PIXELS)


def test_limit_takes_the_first_images(tmp_path: Path) -> None:
    write(tmp_path / "train-images-idx3-ubyte.gz", PIXELS)
    write(tmp_path / "train-labels-idx1-ubyte", LABELS)
    for limit in (1, 4, 9, 100):
        images = read_images(tmp_path, limit=limit)
        assert images.labels is not None
        np.testing.assert_array_equal(images.pixels, PIXELS[:limit])
        np.testing.assert_array_equal(images.labels, LABELS[:limit])


def test_other_integers_are_refused_and_floats_stay(tmp_path: Path) -> None:
    for kind in ("i2", "i4"):
        with pytest.raises(InputError, match=r"x-idx3-int: the values have dtype int(16|32), "):
            read_images(write(tmp_path / "x-idx3-int", PIXELS.astype(kind)))
    for kind in ("f4", "f8"):
        floats = RNG.normal(size=(3, 2)).astype(kind)
        images = read_images(write(tmp_path / "x-idx2-float", floats))
        assert images.pixels.dtype == np.dtype(kind)
        np.testing.assert_array_equal(images.pixels, floats)


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    array=st.sampled_from(sorted(CODES)).flatmap(
        lambda kind: hnp.arrays(kind, hnp.array_shapes(max_dims=4, max_side=5))
    ),
    packed=st.booleans(),
    limit=st.none() | st.integers(1, 6),
)
def test_round_trip(tmp_path: Path, array: NDArray[Any], packed: bool, limit: int | None) -> None:
    path = write(tmp_path / ("x.gz" if packed else "x"), array)
    read, n = read_idx(path, limit)
    assert n == len(array)
    assert read.dtype == array.dtype
    np.testing.assert_array_equal(read, array[:limit])


@pytest.mark.parametrize("packed", [False, True])
def test_truncation_anywhere_is_an_error(tmp_path: Path, packed: bool) -> None:
    data = gzip.compress(idx(PIXELS), mtime=0) if packed else idx(PIXELS)
    path = tmp_path / "train-images-idx3-ubyte"
    for length in range(len(data)):
        path.write_bytes(data[:length])
        with pytest.raises(InputError, match=r"train-images-idx3-ubyte: .*truncated"):
            read_images(path)


def test_a_flipped_byte_in_gzip_is_an_error_or_harmless(tmp_path: Path) -> None:
    data = gzip.compress(idx(PIXELS), mtime=0)
    path = tmp_path / "train-images-idx3-ubyte.gz"
    refused = []
    for at in range(len(data)):
        path.write_bytes(data[:at] + bytes([data[at] ^ 0x55]) + data[at + 1 :])
        try:
            np.testing.assert_array_equal(read_images(path).pixels, PIXELS)
        except InputError as error:
            refused.append(str(error))
    assert len(refused) > 0.9 * len(data)
    assert all(message.startswith(f"{path}: ") for message in refused)


def test_truncation_says_how_much_is_there(tmp_path: Path) -> None:
    path = tmp_path / "train-images-idx3-ubyte"
    path.write_bytes(idx(PIXELS)[:-30])
    message = r"ends after 150 of the 180 bytes that its header promises.* Download or write"
    with pytest.raises(InputError, match=message):
        read_images(path)


@pytest.mark.parametrize("packed", [False, True])
def test_bytes_after_the_end_are_an_error(tmp_path: Path, packed: bool) -> None:
    data = idx(PIXELS) + b"\0"
    path = tmp_path / "train-images-idx3-ubyte"
    path.write_bytes(gzip.compress(data) if packed else data)
    with pytest.raises(InputError, match=r"continues past the 180 bytes that its header promises"):
        read_images(path)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("n", [2**20, 2**32 - 1])
def test_a_header_that_promises_too_much_takes_no_memory(
    tmp_path: Path, packed: bool, n: int
) -> None:
    data = bytes([0, 0, 8, 3]) + struct.pack(">3I", n, 2**16, 2**16) + bytes(50)
    path = tmp_path / "train-images-idx3-ubyte"
    path.write_bytes(gzip.compress(data) if packed else data)
    tracemalloc.start()
    try:
        with pytest.raises(InputError, match=r"ends after 50 of the [\d,]+ bytes"):
            read_images(path)
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
    finally:
        tracemalloc.stop()


def test_a_bomb_is_read_no_further_than_promised(tmp_path: Path) -> None:
    path = tmp_path / "train-images-idx3-ubyte.gz"
    path.write_bytes(gzip.compress(idx(PIXELS) + bytes(64 << 20), 1))
    tracemalloc.start()
    try:
        with pytest.raises(InputError, match=r"continues past the 180 bytes"):
            read_images(path)
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
    finally:
        tracemalloc.stop()


def test_files_that_are_not_idx_are_rejected(tmp_path: Path) -> None:
    path = tmp_path / "train-images-idx3-ubyte"
    path.write_bytes(b"<html>not found</html>")
    with pytest.raises(InputError, match=r"not an IDX file: it starts with the bytes 3c 68 74 6d"):
        read_images(tmp_path)
    path.write_bytes(idx(np.zeros((0, 28, 28), np.uint8)))
    with pytest.raises(InputError, match=r"shape \(0, 28, 28\), which is empty"):
        read_images(tmp_path)
    write(path, np.full((2, 3), 300, np.int16))
    with pytest.raises(InputError, match=r"the values have dtype int16"):
        read_images(tmp_path)


def test_labels_must_belong_to_the_images(tmp_path: Path) -> None:
    images = write(tmp_path / "train-images-idx3-ubyte", PIXELS)
    labels = write(tmp_path / "train-labels-idx1-ubyte", LABELS[:8])
    for limit in (None, 3):
        with pytest.raises(InputError, match=r"holds 8 labels for the 9 images of train-images"):
            read_images(tmp_path, limit=limit)
    write(labels, PIXELS)
    with pytest.raises(InputError, match=r"labels-idx1-ubyte: the file has 3 axes, but labels"):
        read_images(images)
    write(labels, LABELS)
    with pytest.raises(InputError, match=r"one axis of 9 values, so it holds labels"):
        read_images(labels)


def test_a_folder_without_the_split_or_with_two_data_sets(tmp_path: Path) -> None:
    write(tmp_path / "train-images-idx3-ubyte", PIXELS)
    with pytest.raises(InputError, match=r"Unknown split: 'test'. Must be one of: train"):
        read_images(tmp_path, split="test")
    write(tmp_path / "emnist-letters-train-images-idx3-ubyte", PIXELS)
    message = r"several files of train images: emnist-letters-train-images.*Give the path of one"
    with pytest.raises(InputError, match=message):
        read_images(tmp_path)


def test_a_prefix_keeps_data_sets_apart(tmp_path: Path) -> None:
    path = write(tmp_path / "emnist-letters-train-images-idx3-ubyte", PIXELS)
    write(tmp_path / "train-labels-idx1-ubyte", LABELS)
    assert read_images(path).labels is None
    write(tmp_path / "emnist-letters-train-labels-idx1-ubyte", LABELS)
    assert read_images(path).labels is not None


@pytest.mark.parametrize(("split", "n"), [("train", 60_000), ("test", 10_000)])
def test_real_mnist(shared_data: Path, split: str, n: int) -> None:
    images = read_images(shared_data / "mnist", split=split, mean=0.1307, std=0.3081)
    assert images.pixels.shape == (n, 28, 28)
    assert images.labels is not None
    np.testing.assert_array_equal(
        images.labels[:5], [5, 0, 4, 1, 9] if split == "train" else [7, 2, 1, 0, 4]
    )
    if split == "train":
        # The scaling that is customary was computed on these images.
        inputs = images.inputs(slice(None))
        assert float(inputs.mean(dtype=np.float64)) == pytest.approx(0, abs=5e-4)
        assert float(inputs.std(dtype=np.float64)) == pytest.approx(1, abs=5e-4)
