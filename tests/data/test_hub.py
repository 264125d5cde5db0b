"""Data sets of the hub, with a stand-in for the datasets library that has its interface."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from polyseme.data import read_images
from polyseme.errors import InputError, MissingDependencyError

pil = pytest.importorskip("PIL.Image", reason="Pillow is not installed")

RNG = np.random.default_rng(2)
GREY = RNG.integers(0, 256, (5, 4, 3), dtype=np.uint8)
LABELS = [2, 0, 1, 1, 0]


class Image:
    """Stand-in for datasets.Image."""


class Value:
    """Stand-in for datasets.Value."""


class ClassLabel:
    """Stand-in for datasets.ClassLabel."""

    def __init__(self, names: list[str]) -> None:
        self.names = names


class DatasetNotFoundError(FileNotFoundError):
    """Stand-in for datasets.exceptions.DatasetNotFoundError."""


class ConnectError(Exception):
    """What httpx raises: no OSError."""


ConnectError.__module__ = "httpx._exceptions"


class Dataset:
    """Stand-in for datasets.Dataset: rows are dicts, a column is asked for by name."""

    def __init__(self, features: dict[str, Any], columns: dict[str, list[Any]]) -> None:
        self.features = features
        self.columns = columns

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))

    def __getitem__(self, key: int | str) -> Any:
        if isinstance(key, str):
            return self.columns[key]
        return {name: column[key] for name, column in self.columns.items()}

    def select(self, rows: range) -> Dataset:
        columns = {name: [column[i] for i in rows] for name, column in self.columns.items()}
        return Dataset(self.features, columns)


Hub = Callable[..., list[dict[str, Any]]]


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Hub:
    """Give a function that says what load_dataset returns or raises, and returns its calls."""
    monkeypatch.chdir(tmp_path)

    def install(outcome: Dataset | Exception) -> list[dict[str, Any]]:
        calls: list[dict[str, Any]] = []

        def load_dataset(path: str, *, split: str, trust_remote_code: bool) -> Dataset:
            calls.append({"path": path, "split": split, "trust_remote_code": trust_remote_code})
            if isinstance(outcome, Exception):
                raise outcome
            return outcome

        module: Any = ModuleType("datasets")
        module.Image, module.ClassLabel, module.Value = Image, ClassLabel, Value
        module.load_dataset = load_dataset
        monkeypatch.setitem(sys.modules, "datasets", module)
        return calls

    return install


def digits(**columns: tuple[Any, list[Any]]) -> Dataset:
    named = {
        "id": (Value(), list(range(5))),
        "picture": (Image(), [pil.fromarray(pixels) for pixels in GREY]),
        "digit": (ClassLabel(["zero", "one", "two"]), LABELS),
        **columns,
    }
    return Dataset(
        {name: feature for name, (feature, _) in named.items()},
        {name: column for name, (_, column) in named.items()},
    )


def test_columns_are_found_by_their_type(hub: Hub) -> None:
    calls = hub(digits())
    images = read_images("owner/some.digits", split="test", mean=0.1307, std=0.3081)
    assert calls == [{"path": "owner/some.digits", "split": "test", "trust_remote_code": False}]
    np.testing.assert_array_equal(images.pixels, GREY)
    assert images.labels is not None
    assert images.labels.tolist() == LABELS
    assert images.class_names == ("zero", "one", "two")
    assert images.name == "owner/some.digits (test)"
    assert (images.mean, images.std) == (0.1307, 0.3081)


def test_limit_takes_the_first_rows(hub: Hub) -> None:
    hub(digits())
    for limit in (2, 50):
        images = read_images("owner/digits", limit=limit)
        assert images.labels is not None
        np.testing.assert_array_equal(images.pixels, GREY[:limit])
        assert images.labels.tolist() == LABELS[:limit]


def test_columns_can_be_named(hub: Hub) -> None:
    flipped = [pil.fromarray(255 - pixels) for pixels in GREY]
    hub(digits(other=(Image(), flipped), fine=(ClassLabel(["a"] * 9), [8] * 5)))
    with pytest.raises(InputError, match=r"type Image: 'picture', 'other'. Name one with images_"):
        read_images("owner/digits")
    with pytest.raises(InputError, match=r"type ClassLabel: 'digit', 'fine'. Name one with label"):
        read_images("owner/digits", images_key="other")
    images = read_images("owner/digits", images_key="other", labels_key="id")
    assert images.labels is not None
    np.testing.assert_array_equal(images.pixels, 255 - GREY)
    assert images.labels.tolist() == [0, 1, 2, 3, 4]
    assert images.class_names is None
    with pytest.raises(InputError, match=r"Unknown images_key: 'othr'. Did you mean 'other'\?"):
        read_images("owner/digits", images_key="othr")


def test_a_data_set_without_images_or_labels(hub: Hub) -> None:
    dataset = digits()
    del dataset.features["digit"]
    hub(dataset)
    assert read_images("owner/digits").labels is None
    with pytest.raises(InputError, match=r"expected a column of type Image; .* id \(Value\)"):
        read_images("owner/digits", images_key="id")
    del dataset.features["picture"]
    with pytest.raises(InputError, match=r"the columns are id \(Value\). Name one with images_key"):
        read_images("owner/digits")


def test_a_split_whose_labels_are_kept_secret_has_none(hub: Hub) -> None:
    hub(digits(digit=(ClassLabel(["zero"]), [-1] * 5)))
    assert read_images("owner/digits").labels is None
    hub(digits(digit=(ClassLabel(["zero"]), [0, 0, -1, 0, 0])))
    with pytest.raises(InputError, match=r"labels range from -1 to 0; classes are numbered from 0"):
        read_images("owner/digits")


def test_rows_that_cannot_be_read(hub: Hub) -> None:
    dataset = digits()
    hub(dataset)
    dataset.columns["picture"][3] = None
    with pytest.raises(InputError, match=r"'owner/digits', row 3: the image cannot be read"):
        read_images("owner/digits")
    dataset.columns["picture"][3] = pil.fromarray(GREY[3].T)
    message = r"row 3: the image is 4 x 3 greyscale, but 'owner/digits', row 0 is 3 x 4 greyscale"
    with pytest.raises(InputError, match=message):
        read_images("owner/digits")


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (ConnectionError("Couldn't reach it"), r"Hub could not be reached \(Couldn't reach it\)"),
        (TimeoutError(), r"Hub could not be reached \(TimeoutError\)\. Check the connection, or"),
        (ConnectError("no route\nhost"), r"could not be reached \(no route\)\. .* a local path"),
        (DatasetNotFoundError("gone"), r"no Hub data set of that name was found \(gon"),
        (ValueError("Unknown split"), r"the split 'train' of this .* \(Unknown split\)\. Check"),
        (
            RuntimeError("scripts are no longer"),
            r"could not load the split .* \(scripts are no longer\)",
        ),
    ],
)
def test_failures_of_the_hub(hub: Hub, error: Exception, message: str) -> None:
    hub(error)
    with pytest.raises(InputError, match=rf"^'owner/digits': .*{message}"):
        read_images("owner/digits")


def test_without_datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "datasets", None)
    message = (
        r"'owner/digits' is not an existing path, so it is taken to be a Hugging "
        r"Face Hub data set; reading that needs datasets, .* pip install 'polyseme\[hub\]'"
    )
    with pytest.raises(MissingDependencyError, match=message):
        read_images("owner/digits")


def test_possible_paths_are_not_looked_up(hub: Hub, tmp_path: Path) -> None:
    calls = hub(digits())
    (tmp_path / "owner").mkdir()
    (tmp_path / "owner" / "digits.npy").touch()
    with pytest.raises(InputError, match=r"does not exist. Did you mean 'owner/digits.npy'"):
        read_images("owner/digits")
    for source in (Path("else/digits"), "./else/digits", "a/b/c", "digits"):
        with pytest.raises(InputError, match="does not exist"):
            read_images(source)
    assert not calls
