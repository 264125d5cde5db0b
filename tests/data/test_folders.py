"""Folders of image files: read back equal, in a fixed order, and refused with a reason."""

from __future__ import annotations

import struct
import sys
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from polyseme.data import read_images
from polyseme.errors import InputError, MissingDependencyError

pil = pytest.importorskip("PIL.Image", reason="Pillow is not installed")

RNG = np.random.default_rng(11)
GREY = RNG.integers(0, 256, (6, 4, 5), dtype=np.uint8)
COLOUR = RNG.integers(0, 256, (6, 4, 5, 3), dtype=np.uint8)


def write(path: Path, pixels: NDArray[Any], **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pil.fromarray(pixels).save(path, **options)
    return path


@pytest.mark.parametrize("suffix", ["png", "PNG", "bmp", "webp"])
def test_colour_is_read_back_channels_first(tmp_path: Path, suffix: str) -> None:
    options = {"lossless": True} if suffix == "webp" else {}
    for i, pixels in enumerate(COLOUR):
        write(tmp_path / f"{i}.{suffix}", pixels, **options)
    images = read_images(tmp_path)
    np.testing.assert_array_equal(images.pixels, COLOUR.transpose(0, 3, 1, 2))
    assert images.labels is None
    assert images.class_names is None
    assert images.name == tmp_path.name


@pytest.mark.parametrize("suffix", ["png", "bmp"])
def test_greyscale_has_no_channel_axis(tmp_path: Path, suffix: str) -> None:
    for i, pixels in enumerate(GREY):
        write(tmp_path / f"{i}.{suffix}", pixels)
    np.testing.assert_array_equal(read_images(tmp_path).pixels, GREY)


@pytest.mark.parametrize("suffix", ["jpg", "jpeg"])
def test_jpeg_is_close(tmp_path: Path, suffix: str) -> None:
    smooth = np.add.outer(np.arange(0, 160, 10), np.arange(16)).astype(np.uint8)
    write(tmp_path / f"grey/0.{suffix}", smooth, quality=95)
    write(tmp_path / f"colour/0.{suffix}", np.stack([smooth] * 3, axis=-1), quality=95)
    grey = read_images(tmp_path / "grey").pixels[0]
    np.testing.assert_allclose(grey.astype(int), smooth.astype(int), atol=4)
    assert read_images(tmp_path / "colour").shape == (3, 16, 16)


def test_palettes_become_colour_and_transparency_is_dropped(tmp_path: Path) -> None:
    image = pil.fromarray(COLOUR[0]).quantize(16)
    image.save(tmp_path / "0.gif")
    image.save(tmp_path / "1.png", transparency=bytes(range(16)))
    alpha = np.dstack([np.array(image.convert("RGB")), np.full((4, 5), 7, np.uint8)])
    write(tmp_path / "2.png", alpha)
    expected = np.array(image.convert("RGB")).transpose(2, 0, 1)
    np.testing.assert_array_equal(read_images(tmp_path).pixels, [expected] * 3)


def test_black_and_white_and_grey_with_alpha_are_greyscale(tmp_path: Path) -> None:
    bits = GREY[0] > 99
    pil.fromarray(bits).save(tmp_path / "0.png")
    pil.fromarray(np.where(bits, 255, 0).astype(np.uint8)).convert("LA").save(tmp_path / "1.png")
    np.testing.assert_array_equal(read_images(tmp_path).pixels, [np.where(bits, 255, 0)] * 2)


def test_subfolders_are_classes_in_the_order_of_their_names(tmp_path: Path) -> None:
    names = ["zebra/b.png", "ape/2.png", "zebra/a.png", "ape/10.png", "bee/x.png"]
    for name, pixels in zip(names, GREY, strict=False):
        write(tmp_path / name, pixels)
    (tmp_path / "ape" / "notes.txt").write_text("not an image")
    (tmp_path / "ape" / "._2.png").write_text("hidden")
    (tmp_path / "empty").mkdir()
    images = read_images(tmp_path)
    assert images.class_names == ("ape", "bee", "zebra")
    assert images.labels is not None
    assert images.labels.tolist() == [0, 0, 1, 2, 2]
    np.testing.assert_array_equal(images.pixels, GREY[[3, 1, 4, 2, 0]])
    limited = read_images(tmp_path, limit=3)
    assert limited.labels is not None
    assert limited.labels.tolist() == [0, 0, 1]
    np.testing.assert_array_equal(limited.pixels, GREY[[3, 1, 4]])


def test_subfolders_may_be_splits(tmp_path: Path) -> None:
    write(tmp_path / "train" / "ape" / "0.png", GREY[0])
    write(tmp_path / "train" / "bee" / "0.png", GREY[1])
    write(tmp_path / "test" / "ape" / "0.png", GREY[2])
    train, test = read_images(tmp_path), read_images(tmp_path, split="test")
    assert (train.class_names, len(train)) == (("ape", "bee"), 2)
    assert train.name == f"{tmp_path.name} (train)"
    np.testing.assert_array_equal(test.pixels, GREY[2:3])
    with pytest.raises(InputError, match=r"Unknown split: 'val'. Must be one of: test, train"):
        read_images(tmp_path, split="val")


def test_a_split_of_a_folder_without_splits(tmp_path: Path) -> None:
    write(tmp_path / "0.png", GREY[0])
    with pytest.raises(InputError, match=r"split='test' was given, but the folder has no subfold"):
        read_images(tmp_path, split="test")


def test_sizes_must_agree(tmp_path: Path) -> None:
    write(tmp_path / "a.png", GREY[0])
    write(tmp_path / "b.png", GREY[1].T)
    message = (
        r"b.png: the image is 4 x 5 greyscale, but \S*a.png is 5 x 4 greyscale; .* Resize or conv"
    )
    with pytest.raises(InputError, match=message):
        read_images(tmp_path)


def test_kinds_must_agree(tmp_path: Path) -> None:
    write(tmp_path / "a.png", COLOUR[0])
    write(tmp_path / "b.png", GREY[1])
    message = r"b.png: the image is 5 x 4 greyscale, but \S*a.png is 5 x 4 colour; all must have"
    with pytest.raises(InputError, match=message):
        read_images(tmp_path)


def test_images_are_turned_as_exif_says(tmp_path: Path) -> None:
    upright = np.zeros((16, 8), np.uint8)
    upright[:, 4:] = 255
    for orientation, stored in ((1, upright), (6, np.rot90(upright)), (3, np.rot90(upright, 2))):
        exif = pil.Exif()
        exif[0x0112] = orientation
        pil.fromarray(np.ascontiguousarray(stored)).save(tmp_path / "a.jpg", exif=exif)
        np.testing.assert_allclose(read_images(tmp_path).pixels[0], upright, atol=3)


def test_more_than_8_bits_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "a.png", GREY[0].astype(np.uint16) * 257)
    with pytest.raises(InputError, match=r"a.png: .* more than 8 bits per channel; .* in a .npy"):
        read_images(tmp_path)


def test_loose_images_beside_classes(tmp_path: Path) -> None:
    write(tmp_path / "ape" / "0.png", GREY[0])
    write(tmp_path / "loose.png", GREY[1])
    message = r"1 images beside the subfolders 'ape'; .* Move the loose images, such as loose.png"
    with pytest.raises(InputError, match=message):
        read_images(tmp_path)


def test_a_folder_without_images(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no images\. Expected MNIST-style .* it holds nothing"):
        read_images(tmp_path)
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(InputError, match=r"\.webp\), flat or in .* it holds notes.txt"):
        read_images(tmp_path)


@pytest.mark.parametrize("suffix", ["png", "bmp", "gif", "webp", "jpg"])
def test_truncation_anywhere_is_an_error_or_harmless(tmp_path: Path, suffix: str) -> None:
    whole = write(tmp_path / "whole" / f"0.{suffix}", COLOUR[0])
    pixels = read_images(whole.parent).pixels
    data = whole.read_bytes()
    path = tmp_path / "cut" / f"0.{suffix}"
    path.parent.mkdir()
    refused = []
    for length in range(0, len(data), 7):
        path.write_bytes(data[:length])
        try:
            np.testing.assert_array_equal(read_images(path.parent).pixels, pixels)
        except InputError as error:
            refused.append(str(error))
    assert len(refused) > len(data) // 7 * 0.7
    sentence = f"{path}: cannot be read as an image"
    assert all(message.startswith(sentence) for message in refused)


def png(width: int, height: int) -> bytes:
    """A PNG that claims a size and holds next to nothing."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        crc = zlib.crc32(kind + data)
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", crc)

    head = struct.pack(">2I5B", width, height, 8, 0, 0, 0, 0)
    data = zlib.compress(bytes(100))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


@pytest.mark.parametrize("side", [10_000, 60_000])
def test_decompression_bombs(tmp_path: Path, side: int) -> None:
    (tmp_path / "a.png").write_bytes(png(side, side))
    message = rf"a.png: the image is too large to be decoded safely \(.*{side * side} pixels"
    with pytest.raises(InputError, match=message):
        read_images(tmp_path)


def test_a_single_image_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "a.png", GREY[0])
    with pytest.raises(InputError, match=r"a.png: a single image was given, but several"):
        read_images(path)


def test_without_pillow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "a.png", GREY[0])
    monkeypatch.setitem(sys.modules, "PIL", None)
    message = r"Reading image files needs Pillow, .* pip install 'polyseme\[images\]'"
    with pytest.raises(MissingDependencyError, match=message):
        read_images(tmp_path)
