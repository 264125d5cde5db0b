"""Data sets of images or texts from the Hugging Face Hub, read with the datasets library."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from polyseme.data.folders import pixels_of, stack_images
from polyseme.data.images import Images
from polyseme.errors import InputError, MissingDependencyError, one_of


def _load(name: str, split: str, **options: Any) -> tuple[Any, Any]:
    """Return the datasets module and one split of a data set, "owner/name[:configuration]"."""
    try:
        import datasets
    except ModuleNotFoundError as error:
        raise MissingDependencyError(
            f"{name!r} is not an existing path, so it is taken to be a Hugging Face Hub data set; "
            f"reading that",
            "datasets",
            "hub",
        ) from error
    repository, _, configuration = name.partition(":")
    chosen = (repository, configuration) if configuration else (repository,)
    logger = logging.getLogger("huggingface_hub")
    talks = logger.level
    try:
        # It logs every failed attempt to reach the Hub.
        logger.setLevel(logging.CRITICAL)
        # Never run a data set's own code; this is the default since datasets 2.16.
        return datasets, datasets.load_dataset(
            *chosen, split=split, trust_remote_code=False, **options
        )
    # Every exception: what a failed connection raises depends on the HTTP library.
    except Exception as error:
        raise _failure(name, split, error) from error
    finally:
        logger.setLevel(talks)


def _failure(name: str, split: str, error: Exception) -> InputError:
    detail = (str(error).strip().splitlines() or [type(error).__name__])[0]
    if isinstance(error, FileNotFoundError):
        return InputError(
            f"{name!r}: no such path, and no Hub data set of that name was found ({detail}). Check "
            f"the spelling and your access, or give a local path."
        )
    from_http = type(error).__module__.startswith(("http", "requests", "urllib3"))
    if isinstance(error, OSError) or from_http:
        return InputError(
            f"{name!r}: no such path, and the Hugging Face Hub could not be reached ({detail}). "
            f"Check the connection, or give a local path."
        )
    return InputError(
        f"{name!r}: could not load the split {split!r} of this Hub data set ({detail}). Check the "
        f"names of the split and of the configuration ('owner/name:configuration'), or download "
        f"the data and give a local path."
    )


def hub_rows(name: str, split: str) -> Callable[[], Iterator[dict[str, Any]]]:
    """Find one split of a Hub data set, whose rows are then streamed.

    Parameters
    ----------
    name : str
        "owner/name", or "owner/name:configuration" of a data set that has several.
    split : str
        As the hub names it.

    Returns
    -------
    function
        Each call iterates over the rows from the first, each {column: value}. It raises an
        InputError if the connection is lost.

    Raises
    ------
    InputError
        If the Hub cannot be reached, or has no such data set or split.
    MissingDependencyError
        If the datasets library is not installed.
    """
    _, dataset = _load(name, split, streaming=True)

    def rows() -> Iterator[dict[str, Any]]:
        iterator = iter(dataset)
        while True:
            try:
                row = dict(next(iterator))
            except StopIteration:
                return
            # As in _load.
            except Exception as error:
                raise _failure(name, split, error) from error
            yield row

    return rows


def _column(
    name: str, key: str | None, features: dict[str, Any], kind: type, argument: str
) -> str | None:
    if key is not None:
        if key not in features:
            raise InputError(f"{name!r}: " + one_of(argument, key, features))
        return key
    candidates = [column for column, feature in features.items() if isinstance(feature, kind)]
    if len(candidates) > 1:
        raise InputError(
            f"{name!r}: several columns are of type {kind.__name__}: "
            f"{', '.join(map(repr, candidates))}. Name one with {argument}=..."
        )
    return candidates[0] if candidates else None


def read_hub(
    name: str, split: str, images_key: str | None, labels_key: str | None, limit: int | None
) -> Images:
    """Read one split of a Hugging Face Hub image data set.

    Parameters
    ----------
    name : str
        "owner/name", or "owner/name:configuration" of a data set that has several.
    split : str
        As the hub names it.
    images_key, labels_key : str, optional
        Names of the columns; needed if several are of type Image or ClassLabel.
    limit : int, optional
        Read only this many images, from the first.

    Returns
    -------
    Images
        Pixels (n, H, W) if all are greyscale, (n, 3, H, W) if all are colour.

    Raises
    ------
    InputError
        If the Hub cannot be reached, or the data set does not hold images of one size.
    MissingDependencyError
        If the datasets library is not installed.
    """
    datasets, rows = _load(name, split)
    features = dict(rows.features)
    image = _column(name, images_key, features, datasets.Image, "images_key")
    if image is None or not isinstance(features[image], datasets.Image):
        raise InputError(
            f"{name!r}: expected a column of type Image; the columns are "
            f"{', '.join(f'{key} ({type(kind).__name__})' for key, kind in features.items())}. "
            f"Name one with images_key=..., or choose an image data set."
        )
    label = _column(name, labels_key, features, datasets.ClassLabel, "labels_key")
    if limit is not None:
        rows = rows.select(range(min(limit, len(rows))))

    def decoded() -> Iterator[tuple[str, NDArray[np.uint8]]]:
        for row in range(len(rows)):
            where = f"{name!r}, row {row}"
            try:
                pixels = pixels_of(rows[row][image], where)
            except InputError:
                raise
            # Every exception: from datasets, from Pillow's decoders, or from a missing image.
            except Exception as error:
                raise InputError(
                    f"{where}: the image cannot be read ({error}). Choose other rows with limit, "
                    f"or another data set."
                ) from error
            yield where, pixels

    pixels = stack_images(decoded(), len(rows))
    labels = None if label is None else np.array(list(rows[label]))
    class_names = getattr(features[label], "names", None) if label is not None else None
    if labels is not None and labels.dtype.kind == "i" and (labels == -1).all():
        # How the Hub marks a test split whose classes are withheld.
        labels = None
    return Images(
        pixels,
        labels,
        name=f"{name} ({split})",
        class_names=None if class_names is None else tuple(class_names),
    )
