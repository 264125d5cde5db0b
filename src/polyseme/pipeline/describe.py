"""What an analysis was asked to do and of which model, as JSON holds it."""

from __future__ import annotations

import dataclasses
import hashlib
import operator
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from polyseme.capture import Selector
from polyseme.core.arrays import to_numpy
from polyseme.errors import InputError

# Options that one kind of data alone has, each with what may be given for the other kind too:
# None, or the value that asks for nothing.
_OPTIONS: dict[str, dict[str, Any]] = {
    "images": {
        **dict.fromkeys(["labels", "class_names", "image_shape", "panel_examples", "baseline"]),
        "panels": False,
    },
    "texts": {"window": None, "importances": "none", "memory_budget": None},
}


def check_kind(kind: str, **given: Any) -> dict[str, Any]:
    """Refuse options that the kind of data, "images" or "texts", has no use for.

    Returns those of its own that are given, that is, not None.
    """
    (other,) = _OPTIONS.keys() - {kind}
    for name, nothing in _OPTIONS[other].items():
        value = given[name]
        if value is not None and not (isinstance(value, str | bool) and value == nothing):
            shown = repr(value) if isinstance(value, str | int | float | tuple) else "given"
            raise InputError(
                f"{name} is {shown}, but the data is {kind}, and {name} is an option for {other} "
                f"alone; leave it out. Options for {kind} alone are: {', '.join(_OPTIONS[kind])}."
            )
    return {name: given[name] for name in _OPTIONS[kind] if given[name] is not None}


def check_options(model: Any, select: Any, **counts: Any) -> None:
    """Refuse a model or a selector that is none, and counts below 1."""
    if not isinstance(model, nn.Module):
        raise InputError(
            f"model is a {type(model).__name__}; a torch.nn.Module is expected: if it is a "
            "function that makes one, call it."
        )
    if not isinstance(select, Selector):
        raise InputError(
            f"select is {select!r}; a selector is expected: TopK(k), AboveFraction(fraction, "
            "max_examples), FirstActive(n, minimum) or Stratified(k, bins)."
        )
    for name, value in counts.items():
        if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 1:
            raise InputError(f"{name} is {value!r}; a whole number of at least 1 is expected.")


def check_baseline(baseline: Any) -> float | NDArray[Any]:
    """A number or an array that activation maps may start from."""
    try:
        values = to_numpy(baseline).astype(np.float32)
    except (TypeError, ValueError):
        values = np.array(np.nan)
    if not np.isfinite(values).all():
        raise InputError(
            f"baseline is {baseline!r}; a finite number, or an array of them of the shape of one "
            "input, is expected."
        )
    return values if values.ndim else float(baseline)


def check_image_shape(shape: Any) -> tuple[int, ...] | None:
    """How to show an input, as whole numbers."""
    if shape is None:
        return None
    try:
        return tuple(operator.index(n) for n in shape)
    except TypeError as error:
        raise InputError(
            f"image_shape is {shape!r}; (height, width) or (channels, height, width) is expected."
        ) from error


def describe_selector(select: Selector) -> dict[str, Any]:
    """A selector by name and settings."""
    fields: dict[str, Any] = dataclasses.asdict(select) if dataclasses.is_dataclass(select) else {}
    return {"name": type(select).__name__, **{k: plain(v) for k, v in fields.items()}}


def plain(value: Any) -> Any:
    """A number of NumPy as one of Python."""
    return value.item() if isinstance(value, np.generic) else value


def digest(arrays: Iterable[Any]) -> str:
    """SHA-256 of arrays."""
    sha = hashlib.sha256()
    for array in arrays:
        sha.update(np.ascontiguousarray(array).tobytes())
    return sha.hexdigest()


def describe_model(model: nn.Module) -> dict[str, Any]:
    """A model by its class, its size and its weights."""
    sha = hashlib.sha256()
    count = 0
    for name, tensor in model.state_dict().items():
        if not isinstance(tensor, torch.Tensor):
            continue
        count += tensor.numel()
        sha.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        flat = tensor.detach().contiguous().reshape(-1)
        sha.update(flat.view(torch.uint8).cpu().numpy().data if flat.numel() else b"")
    return {"class": type(model).__name__, "n_parameters": count, "sha256": sha.hexdigest()}
