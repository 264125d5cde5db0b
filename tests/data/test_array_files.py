"""The .npy and .npz files: read back equal, never unpickled, damaged ones refused."""

from __future__ import annotations

import io
import tracemalloc
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from polyseme.data import read_images
from polyseme.errors import InputError

RNG = np.random.default_rng(5)
PIXELS = RNG.integers(0, 256, (8, 4, 5), dtype=np.uint8)
LABELS = RNG.integers(0, 3, 8)


class Boom:
    """Raises when it is unpickled."""

    def __reduce__(self) -> Any:
        return exec, ("raise SystemExit('unpickled')",)


def objects() -> NDArray[Any]:
    array = np.empty((1, 1), dtype=object)
    array[0, 0] = Boom()
    return array


@pytest.mark.parametrize(
    "pixels",
    [
        PIXELS,
        np.asfortranarray(PIXELS),
        RNG.normal(size=(8, 7)).astype(np.float16),
        RNG.normal(size=(8, 3, 2, 2)),
        RNG.integers(0, 256, (8, 4, 5, 3), dtype=np.uint8),
    ],
    ids=["uint8", "fortran", "float16", "float64", "channels-last"],
)
def test_arrays_are_kept_as_stored(tmp_path: Path, pixels: NDArray[Any]) -> None:
    np.save(tmp_path / "x.npy", pixels)
    np.savez(tmp_path / "x.npz", images=pixels)
    np.savez_compressed(tmp_path / "y.npz", images=pixels)
    for name in ("x.npy", "x.npz", "y.npz"):
        images = read_images(tmp_path / name)
        assert images.pixels.dtype == pixels.dtype
        np.testing.assert_array_equal(images.pixels, pixels)
        assert images.name == name
        assert images.labels is None
        limited = read_images(tmp_path / name, limit=3)
        np.testing.assert_array_equal(limited.pixels, pixels[:3])


def test_npy_is_mapped_not_loaded(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", PIXELS)
    for limit in (None, 2):
        pixels = read_images(tmp_path / "x.npy", limit=limit).pixels
        assert isinstance(pixels, np.memmap)
        assert not pixels.flags.writeable


def test_version_2_of_the_format(tmp_path: Path) -> None:
    with (tmp_path / "x.npy").open("wb") as stream:
        np.lib.format.write_array(stream, PIXELS, version=(2, 0))
    np.testing.assert_array_equal(read_images(tmp_path / "x.npy").pixels, PIXELS)


@pytest.mark.parametrize("suffix", ["npy", "npz"])
def test_other_integers_and_booleans(tmp_path: Path, suffix: str) -> None:
    save: Any = np.save if suffix == "npy" else np.savez
    path = tmp_path / f"x.{suffix}"
    save(path, PIXELS > 99)
    np.testing.assert_array_equal(read_images(path).pixels, np.where(PIXELS > 99, 255, 0))
    save(path, PIXELS.astype(np.int64))
    with pytest.raises(InputError, match=r"x\.np[yz].*: the values have dtype int64.*\(np\.uint8"):
        read_images(path)


@pytest.mark.parametrize("images", ["images", "x", "X", "data", "pixels", "x_train", "whatever"])
@pytest.mark.parametrize("labels", ["labels", "label", "y", "targets", "y_train"])
def test_usual_names_are_found(tmp_path: Path, images: str, labels: str) -> None:
    arrays: dict[str, Any] = {labels: LABELS, images: PIXELS}
    np.savez(tmp_path / "x.npz", **arrays)
    read = read_images(tmp_path / "x.npz")
    assert read.labels is not None
    np.testing.assert_array_equal(read.pixels, PIXELS)
    np.testing.assert_array_equal(read.labels, LABELS)


def test_splits_of_one_file(tmp_path: Path) -> None:
    path = tmp_path / "mnist.npz"
    np.savez(path, x_train=PIXELS, y_train=LABELS, x_test=PIXELS[:2], y_test=LABELS[:2, np.newaxis])
    assert len(read_images(path)) == 8
    test = read_images(path, split="test")
    assert test.labels is not None
    assert len(test) == 2
    np.testing.assert_array_equal(test.labels, LABELS[:2])
    message = r"no array of val images, such as 'x_val', among 'x_train', 'y_train', 'x_test'"
    with pytest.raises(InputError, match=message):
        read_images(path, split="val")


def test_keys_choose(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", a=PIXELS, b=PIXELS + 1, c=LABELS, d=LABELS + 1)
    path = tmp_path / "x.npz"
    read = read_images(path, images_key="b", labels_key="d", limit=5)
    assert read.labels is not None
    np.testing.assert_array_equal(read.pixels, (PIXELS + 1)[:5])
    np.testing.assert_array_equal(read.labels, (LABELS + 1)[:5])
    message = r"cannot tell which array holds the images: 'a' \(8, 4, 5\) uint8, 'b' .*images_key="
    with pytest.raises(InputError, match=message):
        read_images(path)
    with pytest.raises(InputError, match=r"Unknown images_key: 'e'.* Must be one of: a, b, c, d"):
        read_images(path, images_key="e")
    with pytest.raises(InputError, match=r"Unknown labels_key: 'e'"):
        read_images(path, images_key="a", labels_key="e")


def test_ambiguity(tmp_path: Path) -> None:
    path = tmp_path / "x.npz"
    np.savez(path, images=PIXELS, data=PIXELS)
    with pytest.raises(InputError, match=r"the images: 'images' .*, 'data' .* with images_key="):
        read_images(path)
    np.savez(path, images=PIXELS, y=LABELS, labels=LABELS)
    with pytest.raises(InputError, match=r"the labels: 'labels' .*, 'y' .* with labels_key="):
        read_images(path)
    np.savez(path, a=LABELS)
    with pytest.raises(InputError, match=r"which array holds the images: 'a' \(8,\) int64"):
        read_images(path)
    np.savez(path)
    with pytest.raises(InputError, match=r"which array holds the images: none"):
        read_images(path)


def test_labels_of_another_length_or_kind(tmp_path: Path) -> None:
    path = tmp_path / "x.npz"
    np.savez(path, images=PIXELS, labels=LABELS[:7])
    for limit in (None, 3):
        message = r"labels 'labels' are \(7,\) int64 and the images 'images' are \(8, 4, 5\) uint8"
        with pytest.raises(InputError, match=message):
            read_images(path, limit=limit)
    np.savez(path, images=PIXELS, labels=LABELS.astype(float))
    with pytest.raises(
        InputError, match=r"x.npz: the labels have dtype float64; expected integers"
    ):
        read_images(path)


def test_pickles_are_refused(tmp_path: Path) -> None:
    message = (
        r"stored as a pickle; polyseme never unpickles, since that can run arbitrary code. Save"
    )
    np.save(tmp_path / "x.npy", objects(), allow_pickle=True)
    with pytest.raises(InputError, match=rf"x.npy: the array holds Python objects.* {message}"):
        read_images(tmp_path / "x.npy")
    np.savez(tmp_path / "x.npz", images=objects())
    with pytest.raises(InputError, match=rf"the array 'images' holds Python objects.* {message}"):
        read_images(tmp_path / "x.npz")


def test_a_pickle_beside_the_images_does_no_harm(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", images=PIXELS, extra=objects())
    np.testing.assert_array_equal(read_images(tmp_path / "x.npz").pixels, PIXELS)


@pytest.mark.parametrize(
    "array", [np.array([["a"]]), np.zeros((2, 2), complex), np.zeros((2, 2), [("a", "u1")])]
)
@pytest.mark.parametrize("suffix", ["npy", "npz"])
def test_arrays_that_are_not_numeric_are_rejected(
    tmp_path: Path, suffix: str, array: NDArray[Any]
) -> None:
    save: Any = np.save if suffix == "npy" else np.savez
    path = tmp_path / f"x.{suffix}"
    save(path, array)
    with pytest.raises(InputError, match=r"the values have dtype .*; expected uint8"):
        read_images(path)


@pytest.mark.parametrize("shape", [(), (0, 4), (5,)])
def test_npy_without_images(tmp_path: Path, shape: tuple[int, ...]) -> None:
    np.save(tmp_path / "x.npy", np.zeros(shape, np.uint8))
    with pytest.raises(InputError, match=r"x.npy: the values (have shape|are a single uint8)"):
        read_images(tmp_path / "x.npy")


def test_truncated_npy(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", PIXELS)
    data = (tmp_path / "x.npy").read_bytes()
    path = tmp_path / "cut.npy"
    for length in range(len(data)):
        path.write_bytes(data[:length])
        with pytest.raises(
            InputError, match=r"cut.npy: .*truncated or damaged.* Download or write"
        ):
            read_images(path)
    path.write_bytes(data + b"\0")
    message = r"holds 161 bytes after its header, which promises 160 for \(8, 4, 5\) uint8"
    with pytest.raises(InputError, match=message):
        read_images(path)


@pytest.mark.parametrize("compressed", [False, True])
def test_truncated_npz(tmp_path: Path, compressed: bool) -> None:
    save: Any = np.savez_compressed if compressed else np.savez
    save(tmp_path / "x.npz", images=PIXELS, labels=LABELS)
    data = (tmp_path / "x.npz").read_bytes()
    path = tmp_path / "cut.npz"
    for length in range(0, len(data), 3):
        path.write_bytes(data[:length])
        with pytest.raises(
            InputError, match=r"cut.npz: cannot be read as a .npz file.*truncated or damaged"
        ):
            read_images(path)


def test_a_flipped_byte_in_npz_is_an_error_or_harmless(tmp_path: Path) -> None:
    np.savez_compressed(tmp_path / "x.npz", images=PIXELS, labels=LABELS)
    data = (tmp_path / "x.npz").read_bytes()
    path = tmp_path / "bad.npz"
    refused = []
    for at in range(len(data)):
        path.write_bytes(data[:at] + bytes([data[at] ^ 0x55]) + data[at + 1 :])
        try:
            np.testing.assert_array_equal(read_images(path).pixels, PIXELS)
        except InputError as error:
            refused.append(str(error))
    assert len(refused) > 0.5 * len(data)
    assert all(message.startswith(str(path)) for message in refused)


def with_shape(shape: str, body: bytes) -> bytes:
    """A .npy file whose header claims a shape."""
    head = f"{{'descr': '|u1', 'fortran_order': False, 'shape': {shape}, }}"
    head += " " * (117 - len(head)) + "\n"
    return b"\x93NUMPY\x01\x00" + len(head).to_bytes(2, "little") + head.encode() + body


@pytest.mark.parametrize("suffix", ["npy", "npz"])
def test_a_header_that_promises_too_much_takes_no_memory(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"x.{suffix}"
    data = with_shape("(1048576, 1048576, 1024)", bytes(50))
    if suffix == "npy":
        path.write_bytes(data)
    else:
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("images.npy", data)
    tracemalloc.start()
    try:
        with pytest.raises(InputError, match=r"50 .*1,125,899,906,842,624.*truncated or damaged"):
            read_images(path)
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
    finally:
        tracemalloc.stop()


def test_a_bomb_is_read_no_further_than_promised(tmp_path: Path) -> None:
    path = tmp_path / "x.npz"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("images.npy", with_shape("(5, 10)", bytes(64 << 20)))
    tracemalloc.start()
    try:
        message = r"the array 'images' continues past the 50 bytes that its header promises"
        with pytest.raises(InputError, match=message):
            read_images(path)
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ("(-5, -10)", r"has the impossible shape \(-5, -10\) in its header"),
        ("(5, 'a')", r"cannot be read as a .npy file"),
        ("__import__('os').getpid()", r"cannot be read as a .npy file"),
    ],
)
def test_odd_headers(tmp_path: Path, shape: str, message: str) -> None:
    (tmp_path / "x.npy").write_bytes(with_shape(shape, bytes(50)))
    with pytest.raises(InputError, match=message):
        read_images(tmp_path / "x.npy")


def test_version_3_of_the_format(tmp_path: Path) -> None:
    stream = io.BytesIO()
    np.lib.format.write_array(stream, PIXELS, version=(1, 0))
    data = bytearray(stream.getvalue())
    data[6] = 3
    (tmp_path / "x.npy").write_bytes(data)
    with pytest.raises(InputError, match=r"version 3.0 of NumPy's format; numeric arrays are in"):
        read_images(tmp_path / "x.npy")


@pytest.mark.parametrize("value", [5, 5.0, True])
def test_a_single_number_is_no_images(tmp_path: Path, value: object) -> None:
    np.savez(tmp_path / "x.npz", images=value)
    np.save(tmp_path / "x.npy", value)
    for name in ("x.npz", "x.npy"):
        for limit in (None, 1):
            with pytest.raises(InputError, match=r"the values are a single \w+; expected an array"):
                read_images(tmp_path / name, limit=limit)


def test_a_bomb_that_tells_what_it_is_is_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "x.npz"
    np.savez_compressed(path, images=np.zeros((1000, 4000), np.uint8))
    assert len(read_images(path)) == 1000  # small enough in memory
    monkeypatch.setattr("polyseme.data.binary_files._NO_BOMB_BYTES", 1 << 20)
    with pytest.raises(
        InputError, match=r"by its header, the array 'images' takes 4,000,000 bytes in memory"
    ):
        read_images(path)
    np.savez_compressed(path, images=np.random.default_rng(0).integers(0, 2, (1000, 4000)) > 0)
    assert len(read_images(path)) == 1000  # packed well, but no bomb
