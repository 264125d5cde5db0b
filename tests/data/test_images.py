"""Images: what they accept, and the model's input that they give."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from polyseme.data import Images, images
from polyseme.data.input_arrays import as_pixels
from polyseme.errors import InputError

RNG = np.random.default_rng(7)
GREY = RNG.integers(0, 256, (6, 4, 5), dtype=np.uint8)
COLOUR = RNG.integers(0, 256, (6, 3, 4, 5), dtype=np.uint8)


def test_inputs_are_pixels_scaled_as_documented() -> None:
    given = Images(GREY, mean=0.1307, std=0.3081)
    expected = (GREY.astype(np.float64) / 255 - 0.1307) / 0.3081
    actual = given.inputs(slice(1, 4))
    assert actual.dtype == np.float32
    np.testing.assert_allclose(actual, expected[1:4], atol=1e-6)


def test_a_tuple_scales_each_channel() -> None:
    mean, std = (0.1, 0.2, 0.3), (0.5, 0.6, 0.7)
    actual = Images(COLOUR, mean=mean, std=std).inputs(slice(None))
    for c in range(3):
        expected = (COLOUR[:, c] / 255 - mean[c]) / std[c]
        np.testing.assert_allclose(actual[:, c], expected, atol=1e-6)


def test_inputs_equal_those_of_torchvision_to_the_bit() -> None:
    torch = pytest.importorskip("torch")
    # What ToTensor and Normalize compute, operation by operation.
    expected = torch.from_numpy(COLOUR).to(torch.float32).div(255)
    mean = torch.tensor([0.485, 0.456, 0.406]).view(-1, 1, 1)
    std = torch.tensor([0.229, 0.224, 0.225]).view(-1, 1, 1)
    expected = expected.sub(mean).div(std).numpy()
    given = Images(COLOUR, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
    np.testing.assert_array_equal(given.inputs(slice(None)), expected)


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", ">f4", "longdouble"])
def test_floats_are_inputs_already(dtype: str) -> None:
    pixels = RNG.normal(size=(5, 7)).astype(dtype)
    given = Images(pixels)
    actual = given.inputs(slice(None))
    assert given.pixels is pixels
    assert actual.dtype == np.dtype(np.float32)
    np.testing.assert_array_equal(actual, pixels.astype(np.float32))


def test_rows_may_be_a_slice_indices_or_a_mask() -> None:
    given = Images(GREY)
    mask = np.arange(6) % 2 == 0
    np.testing.assert_array_equal(given.inputs([4, 0]), given.inputs(slice(None))[[4, 0]])
    np.testing.assert_array_equal(given.inputs(mask), given.inputs(slice(0, None, 2)))
    assert given.inputs(slice(0, 0)).shape == (0, 4, 5)


def test_inputs_are_a_copy() -> None:
    pixels = np.zeros((2, 3), dtype=np.float32)
    Images(pixels).inputs(slice(None))[:] = 1
    assert not pixels.any()


def test_to_input_takes_one_image_or_a_batch() -> None:
    given = Images(COLOUR, mean=(0.1, 0.2, 0.3), std=0.5)
    np.testing.assert_array_equal(given.to_input(COLOUR[2]), given.inputs([2])[0])
    np.testing.assert_array_equal(
        given.to_input(COLOUR.reshape(2, 3, 3, 4, 5)),
        given.inputs(slice(None)).reshape(2, 3, 3, 4, 5),
    )


def test_a_float_that_float32_cannot_hold_becomes_inf_without_a_warning() -> None:
    given = Images(np.array([[1e300, -1e300]]))
    np.testing.assert_array_equal(given.inputs([0]), [[np.inf, -np.inf]])
    assert float(given.value_range[1]) == np.inf


def test_value_range_of_uint8_is_that_of_0_and_255() -> None:
    low, high = Images(GREY, mean=0.1307, std=0.3081).value_range
    assert low.dtype == high.dtype == np.float32
    assert low.shape == high.shape == ()
    assert float(low) == pytest.approx(-0.1307 / 0.3081, abs=1e-6)
    assert float(high) == pytest.approx((1 - 0.1307) / 0.3081, abs=1e-6)


def test_value_range_of_channels_broadcasts_against_an_image() -> None:
    low, high = Images(COLOUR, mean=(0.1, 0.2, 0.3), std=(1.0, 2.0, 4.0)).value_range
    assert low.shape == high.shape == (3, 1, 1)
    np.testing.assert_allclose(high[:, 0, 0], [0.9, 0.4, 0.175], rtol=1e-6)


def test_value_range_of_floats_is_that_of_the_data(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("polyseme.data.input_arrays._BLOCK_BYTES", 64)
    pixels = RNG.normal(size=(100, 7)).astype(np.float32)
    low, high = Images(pixels).value_range
    assert (low, high) == (pixels.min(), pixels.max())


@pytest.mark.parametrize("row", [0, 50, 99])
def test_value_range_hands_nan_on_from_any_block(row: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("polyseme.data.input_arrays._BLOCK_BYTES", 64)
    pixels = RNG.normal(size=(100, 7))
    pixels[row, 3] = np.nan
    low, high = Images(pixels).value_range
    assert np.isnan(low)
    assert np.isnan(high)


def test_length_shape_and_repr() -> None:
    given = Images(COLOUR, np.arange(6), name="things")
    assert len(given) == 6
    assert given.shape == (3, 4, 5)
    assert repr(given) == "Images('things': 6 of (3, 4, 5) uint8, labelled)"


@pytest.mark.parametrize("labels", [np.arange(6)[:, None], np.arange(6) > 2, range(6)])
def test_labels_of_one_column_and_booleans(labels: Any) -> None:
    found = Images(GREY, labels).labels
    assert found is not None
    assert found.tolist() == np.asarray(labels).ravel().astype(int).tolist()


def test_labels_become_int64_and_one_number_tuples_numbers() -> None:
    given = Images(GREY, [0, 1, 2, 0, 1, 2], mean=(0.5,), std=[0.25], class_names=["a", "b", "c"])  # type: ignore[arg-type]
    assert given.labels is not None
    assert given.labels.dtype == np.int64
    assert (given.mean, given.std) == (0.5, 0.25)
    assert given.class_names == ("a", "b", "c")


def test_digest_is_that_of_the_contents() -> None:
    digest = Images(GREY, mean=0.5).digest()
    assert len(digest) == 64
    assert digest == Images(GREY.copy(order="F"), np.arange(6), mean=0.5, name="other").digest()
    changed = GREY.copy()
    changed[3, 2, 1] ^= 1
    others = [
        Images(changed, mean=0.5),
        Images(GREY, mean=0.25),
        Images(GREY, mean=0.5, std=2.0),
        Images(GREY.reshape(6, 20), mean=0.5),
        Images(GREY[:5], mean=0.5),
        Images(GREY.astype(np.float32)),
    ]
    assert len({digest, *(other.digest() for other in others)}) == len(others) + 1


def test_digest_does_not_depend_on_the_size_of_a_block(monkeypatch: pytest.MonkeyPatch) -> None:
    digest = Images(GREY).digest()
    monkeypatch.setattr("polyseme.data.input_arrays._BLOCK_BYTES", 41)
    assert Images(GREY).digest() == digest


def test_digest_of_large_data_reads_evenly_spaced_images(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "_DIGEST_BYTES", 4 * 20)
    pixels = np.zeros((10, 4, 5), dtype=np.uint8)
    digest = Images(pixels).digest()
    seen = []
    for row in range(10):
        changed = pixels.copy()
        changed[row] = 1
        if Images(changed).digest() != digest:
            seen.append(row)
    assert seen == [0, 3, 6, 9]


def test_a_memory_map_stays_one(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", GREY)
    mapped = np.load(tmp_path / "x.npy", mmap_mode="r")
    given = Images(mapped)
    assert given.pixels is mapped
    assert given.digest() == Images(GREY).digest()
    actual = given.inputs(slice(0, 2))
    assert type(actual) is np.ndarray
    assert actual.flags.writeable


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"pixels": np.zeros((0, 4, 5), np.uint8)}, r"shape \(0, 4, 5\), which is empty"),
        ({"pixels": np.zeros((3, 0), np.uint8)}, r"expected at least one input"),
        (
            {"pixels": np.uint8(3)},
            r"the values are a single uint8; expected an array with an axis",
        ),
        ({"pixels": np.zeros(5, np.uint8)}, r"Give a single input x as x\[np.newaxis\]"),
        ({"pixels": np.array([["a"]])}, r"dtype <U1; expected uint8"),
        ({"pixels": np.array([[None]])}, r"dtype object; .* np\.stack\(list\(arrays\)\)"),
        ({"pixels": GREY.astype(np.int64)}, r"dtype int64, .*\.astype\(np.uint8\)"),
        ({"pixels": GREY.astype(complex)}, r"dtype complex128"),
        ({"pixels": [[1.0], [1.0, 2.0]]}, r"a list does not convert to one array"),
        ({"pixels": np.ma.array(GREY, mask=GREY > 9)}, r"the array is masked, .* array\.filled"),
        ({"labels": np.arange(5)}, r"labels have shape \(5,\) for 6 inputs; .* shape \(6,\)"),
        ({"labels": np.eye(6)}, r"shape \(6, 6\) for 6 inputs; .*one-hot, give labels\.argmax"),
        ({"labels": np.zeros(6)}, r"dtype float64; expected integers.* labels\.astype\(int\)"),
        ({"labels": np.r_[np.zeros(5), np.nan]}, r"float64; .* nan is not a class: leave the lab"),
        ({"labels": list("abcdef")}, r"class_names, labels = np\.unique\(labels, return_inverse=T"),
        ({"labels": np.arange(6) - 1}, r"range from -1 to 4; classes are numbered from 0"),
        ({"labels": np.full(6, 2**64 - 1, np.uint64)}, r"range from 1844674407370955161\d to"),
        ({"class_names": "cat"}, r"class_names is 'cat'; expected a name for each class"),
        (
            {"labels": np.arange(6), "class_names": ("a", "b")},
            r"highest label is 5, but there are 2 class_names",
        ),
        ({"std": 0.0}, r"std is 0.0; pixels are divided by it, so it must be greater than 0"),
        ({"std": -1}, r"std is -1; .* Use 1.0 to leave"),
        ({"std": 1e-60}, r"std is 1e-60; .* greater than 0"),
        ({"std": float("nan")}, r"std is nan; it must be a finite number, or a tuple of one"),
        ({"mean": float("inf")}, r"mean is inf; .* Give it in units of pixel / 255"),
        ({"mean": "grey"}, r"mean is 'grey'; it must be a finite number"),
        ({"mean": ()}, r"mean is \(\); it must be"),
        ({"mean": (0.1, 0.2, 0.3)}, r"mean has 3 numbers, but an image has shape \(4, 5\)"),
        ({"std": (0.1, 0.2)}, r"std has 2 numbers.* or move the channels to the front"),
        (
            {"pixels": np.zeros((2, 3), np.float32), "mean": 0.5},
            r"mean=0.5 and std=1.0 were given for float32 pixels; they apply only to uint8 pixels",
        ),
    ],
)
def test_images_reject_invalid_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Images(**{"pixels": GREY, **arguments})


def test_errors_name_the_images() -> None:
    with pytest.raises(InputError, match=r"^things: std is 0; "):
        Images(GREY, std=0, name="things")


@pytest.mark.parametrize(
    ("pixels", "message"),
    [
        (
            GREY.astype(np.float32),
            r"have dtype float32, but these images have uint8, so their scale",
        ),
        (GREY.astype(np.int64), r"have dtype int64, but these images have uint8"),
        (GREY[:, :3], r"have shape \(6, 3, 5\); expected \(4, 5\), or batches of it"),
        (GREY[0, 0], r"have shape \(5,\); expected \(4, 5\)"),
    ],
)
def test_to_input_refuses_other_pixels(pixels: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        Images(GREY).to_input(pixels)


def test_to_input_of_float_images_refuses_uint8() -> None:
    with pytest.raises(InputError, match=r"have dtype uint8, but these images have float32"):
        Images(GREY.astype(np.float32)).to_input(GREY)


@pytest.mark.parametrize("dtype", ["int8", "int16", ">i4", "int64", "uint16", "uint64"])
def test_as_pixels_refuses_other_integers(dtype: str) -> None:
    message = (
        r"x: the values have dtype \S+, which leaves open how the model reads them\. .*"
        r"astype\(np\.uint8\): the model gets them divided by 255\. .*astype\(np\.float32\)"
    )
    with pytest.raises(InputError, match=message):
        as_pixels((GREY // 2).astype(dtype), "x")


def test_as_pixels_scales_booleans_and_leaves_the_rest() -> None:
    np.testing.assert_array_equal(as_pixels(GREY > 9, "x"), np.where(GREY > 9, 255, 0))
    assert as_pixels(GREY, "x") is GREY
    floats = GREY.astype(np.float16)
    assert as_pixels(floats, "x") is floats
