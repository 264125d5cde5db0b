"""The options of an analysis: checks, defaults, and their form in a run's metadata."""

from __future__ import annotations

import operator
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from polyseme.analysis.describe import describe_selector, digest, plain
from polyseme.capture import AboveFraction, FirstActive, Selector, Stratified, TopK
from polyseme.core.arrays import check_linkage, check_threshold, to_numpy
from polyseme.errors import InputError, one_of
from polyseme.options import AnalysisSettings

# Options for one kind of data only.
_OPTIONS = {
    "images": ["labels", "class_names", "image_shape", "panel_examples", "baseline", "panels"],
    "texts": ["window", "importances"],
}
_DESCRIBED = {
    "images": "select threshold linkage random_examples seed batch_size "
    "panels panel_examples baseline",
    "texts": "select threshold linkage window importances mask_id random_examples seed batch_size",
}
_IMPORTANCES = ("none", "exact")
_SELECTORS = {kind.__name__: kind for kind in (TopK, AboveFraction, FirstActive, Stratified)}
_DEFAULTS: dict[str, Any] = {field.name: field.default for field in fields(AnalysisSettings)}
_WIDEST = 1024
_UNITS = {"": 1, "K": 1000, "M": 1000**2, "G": 1000**3, "T": 1000**4}
_UNITS |= {f"{unit}I": 1024**n for n, unit in enumerate("KMGT", 1)}


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Settings(AnalysisSettings):
    """The options of an analysis, checked, with their defaults for a kind of data."""

    kind: str  # of data: "images" or "texts"
    select: Selector
    panels: bool
    baseline: float | NDArray[Any]
    memory_budget: int | None
    batch_size: int
    mask_id: int | None = None  # the mask token, for importances

    @classmethod
    def checked(cls, kind: str, options: AnalysisSettings) -> Settings:
        """Check the given options, and replace None by defaults.

        Refuses options that are out of range, or not for this kind of data.
        """
        asked = {name: getattr(options, name) for name in _DEFAULTS}
        values = {
            name: _DEFAULTS[name] if value is None else value for name, value in asked.items()
        }
        _check_kind(kind, values)
        panels, baseline = values["panels"], values["baseline"]
        values |= {
            "select": _checked_selector(TopK() if values["select"] is None else values["select"]),
            "seed": plain(values["seed"]),
            "memory_budget": memory_bytes(values["memory_budget"]),
            "image_shape": _checked_image_shape(values["image_shape"]),
            "panels": kind == "images" if panels is None else bool(panels),
            "baseline": _checked_baseline(0.0 if baseline is None else baseline),
            "window": _checked_window(values["window"]) if kind == "texts" else None,
        }
        for name in ("random_examples", "batch_size", "panel_examples"):
            values[name] = _checked_count(name, values[name])
        if values["threshold"] is not None:
            values["threshold"] = check_threshold(values["threshold"])
        if values["class_names"] is not None:
            values["class_names"] = [*values["class_names"]]
        check_linkage(values["linkage"])
        if values["importances"] not in _IMPORTANCES:
            raise InputError(
                one_of("kind of importances", str(values["importances"]), _IMPORTANCES)
            )
        return cls(kind=kind, **values)

    def recorded(self) -> dict[str, Any]:
        """As JSON that `restored` reads; labels are part of the data."""
        if not isinstance(self.baseline, float):
            raise InputError(
                "baseline is an array, which a shard cannot record; give a number or panels=False."
            )
        names = [name for name in _DEFAULTS if name not in ("labels", "memory_budget", "select")]
        values = {name: getattr(self, name) for name in names}
        other = _OPTIONS["images" if self.kind == "texts" else "texts"]
        return {
            "kind": self.kind,
            "select": describe_selector(self.select),
            **{name: value for name, value in values.items() if name not in other},
        }

    @classmethod
    def restored(cls, recorded: Mapping[str, Any], labels: Any = None) -> Settings:
        """Restore settings from `recorded`."""
        options = dict(recorded)
        kind, select = str(options.pop("kind", None)), dict(options["select"])
        name = str(select.pop("name", None))
        if kind not in _OPTIONS or name not in _SELECTORS:
            raise InputError(f"Settings of {kind!r} with {name!r} are not from polyseme.")
        options["select"] = _SELECTORS[name](**select)
        return cls.checked(kind, AnalysisSettings(**options, labels=labels))

    def described(self) -> dict[str, Any]:
        """As stored in a run's metadata."""
        values = {name: getattr(self, name) for name in _DESCRIBED[self.kind].split()}
        if not isinstance(self.baseline, float):
            values["baseline"] = digest([self.baseline])
        return {**values, "select": describe_selector(self.select)}


def _check_kind(kind: str, options: Mapping[str, Any]) -> None:
    """Refuse options that do not apply to this kind of data, "images" or "texts"."""
    (other,) = _OPTIONS.keys() - {kind}
    for name in _OPTIONS[other]:
        value = options[name]
        # None and False ask for nothing, and so does a default.
        is_default = isinstance(value, str | int | tuple) and value == _DEFAULTS[name]
        if value is not None and value is not False and not is_default:
            shown = repr(value) if isinstance(value, str | int | float | tuple) else "given"
            raise InputError(
                f"{name} is {shown}, but the data is {kind}, and {name} is an option for {other} "
                f"only; leave it out. Options for {kind} only are: {', '.join(_OPTIONS[kind])}."
            )


def _checked_selector(select: Any) -> Selector:
    if not isinstance(select, Selector):
        raise InputError(
            f"select is {select!r}; a selector is expected: TopK(k), AboveFraction(fraction, "
            "max_examples), FirstActive(n, minimum) or Stratified(k, bins)."
        )
    return select


def _checked_count(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 1:
        raise InputError(f"{name} is {value!r}; a whole number of at least 1 is expected.")
    return int(value)


def _checked_image_shape(shape: Any) -> tuple[int, ...] | None:
    if shape is None:
        return None
    try:
        return tuple(operator.index(n) for n in shape)
    except TypeError as error:
        raise InputError(
            f"image_shape is {shape!r}; (height, width) or (channels, height, width) is expected."
        ) from error


def _checked_baseline(baseline: Any) -> float | NDArray[Any]:
    try:
        values = to_numpy(baseline).astype(np.float32)
    except (TypeError, ValueError):
        values = np.array(np.nan)
    if not np.isfinite(values).all():
        raise InputError(
            f"baseline is {baseline!r}; expected a finite number, or an array of finite numbers "
            f"with the shape of one input."
        )
    return values if values.ndim else float(baseline)


def _checked_window(window: Any) -> tuple[int, int]:
    try:
        before, after = (int(n) for n in window)
    except (TypeError, ValueError):
        before = after = -1
    if min(before, after) < 0 or max(before, after) > _WIDEST:
        raise InputError(
            f"window is {window!r}; expected the numbers of tokens before and after an example, "
            f"each from 0 to {_WIDEST}, such as (20, 10)."
        )
    return before, after


def memory_bytes(budget: int | str | None) -> int | None:
    """Parse a memory budget to bytes: a number, or a string such as "4GB" or "512 MiB".

    Raises
    ------
    InputError
        If it is neither.
    """
    if budget is None:
        return None
    parts = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?I?)B?\s*", str(budget).upper())
    if isinstance(budget, bool) or not parts or parts[2] not in _UNITS or float(parts[1]) <= 0:
        raise InputError(
            f"memory_budget is {budget!r}; expected a number of bytes, or a number with a unit, "
            f"such as '4GB' or '512MB'."
        )
    return int(float(parts[1]) * _UNITS[parts[2]])
