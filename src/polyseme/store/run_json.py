"""Reading run.json, which says whether a folder is a finished run, and of which version."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeAlias

from polyseme.errors import RunError
from polyseme.store.damage import locate, reporting
from polyseme.store.format import (
    FORMAT,
    FORMAT_VERSION,
    JSON,
    LONGEST_RUN_JSON,
    RUN_JSON,
    Problem,
    decode_json,
    is_text,
    kind_of,
    require,
)


def read_run_json(path: Path) -> dict[str, JSON]:
    """The metadata of a finished run of a version that this reader knows.

    Raises
    ------
    RunError
        There is no such run, or its run.json is damaged or newer.
    """
    unfinished = (
        "go on with it by resume=True (--resume), or start again with overwrite=True (--overwrite)"
    )
    aside = path.with_name(path.name + ".partial") if path.name else path
    if (path / "partial.json").is_file():
        raise RunError(f"{path} is an unfinished analysis: {unfinished}.")
    if not os.path.lexists(path):
        if (aside / "partial.json").is_file():
            raise RunError(f"{path} is not finished, {aside} holds what there is: {unfinished}.")
        raise RunError(
            f"{path} does not exist. Give the folder that polyseme analyse wrote "
            "(its --out, or out= in Python)."
        )
    if not path.is_dir():
        raise RunError(f"{path} is not a folder. A run is a folder with a run.json: give that.")
    if not os.path.lexists(path / RUN_JSON):
        raise RunError(
            f"{path} is not a run: it has no {RUN_JSON}. A run is a folder with a {RUN_JSON}, "
            "as polyseme analyse writes it."
        )
    with reporting(path):
        file = locate(path, RUN_JSON)
        if file.stat().st_size > LONGEST_RUN_JSON:
            raise Problem(RUN_JSON, f"it is longer than {LONGEST_RUN_JSON} bytes")
        metadata = decode_json(file.read_bytes(), RUN_JSON)
        if metadata.get("format") != FORMAT:
            raise Problem(RUN_JSON, f'it does not say "format": "{FORMAT}"')
        version = require(metadata, "format_version", int)
    if version != FORMAT_VERSION:
        raise RunError(
            f"{path / RUN_JSON} has format version {kind_of(version)}, and this polyseme reads "
            f"version {FORMAT_VERSION} alone. Read the run with the polyseme that wrote it (for a "
            "newer one: pip install --upgrade polyseme), or analyse again."
        )
    return metadata


# ------------------------------------------------------------------- what readers rely on

Kind: TypeAlias = tuple[str, Callable[[JSON], bool]]


def _is_number(value: JSON) -> bool:
    return type(value) in (int, float) and abs(value) <= 1e300


def _is_whole(value: JSON, low: int = 0, high: int = 2**53) -> bool:
    return type(value) is int and low <= value <= high


def _are(values: JSON, each: Callable[[JSON], bool], lengths: tuple[int, ...] = ()) -> bool:
    fine = isinstance(values, list) and (not lengths or len(values) in lengths)
    return fine and all(map(each, values))


def _is_string(value: JSON) -> bool:
    return isinstance(value, str)


def _is_size(value: JSON) -> bool:
    return _is_whole(value, 1, 2**31 - 1)


_STRING: Kind = ("a string", _is_string)
_STRINGS: Kind = ("a list of strings", lambda v: _are(v, _is_string))
_OBJECT: Kind = ("an object", lambda v: isinstance(v, dict))
_BOOLEAN: Kind = ("true or false", lambda v: isinstance(v, bool))
_WHOLE: Kind = ("a whole number from 0", _is_whole)
_NUMBER: Kind = ("a number", _is_number)
_SCALE: Kind = (
    "a number, or a list of numbers",
    lambda v: _is_number(v) or (_are(v, _is_number) and len(v) > 0),
)
_SHAPE: Kind = (
    "a list of 1 to 8 whole numbers from 1",
    lambda v: _are(v, _is_size, tuple(range(1, 9))),
)
_PAIR: Kind = ("two whole numbers from 1", lambda v: _are(v, _is_size, (2,)))
_TRIPLE: Kind = ("three whole numbers from 1", lambda v: _are(v, _is_size, (3,)))
_IMAGE: Kind = ("two or three whole numbers from 1", lambda v: _are(v, _is_size, (2, 3)))
_WINDOW: Kind = (
    "two whole numbers of tokens, before and after, from 0 to 1000",
    lambda v: _are(v, lambda n: _is_whole(n, 0, 1000), (2,)),
)
_LINKAGE: Kind = ('"average" or "single"', lambda v: v in ("average", "single"))
_THRESHOLD: Kind = ("a number from 0 to 2", lambda v: _is_number(v) and 0 <= v <= 2)
_BASELINE: Kind = ("a number or a string", lambda v: _is_number(v) or _is_string(v))

#: object of run.json -> key -> what it must be, of every run
_REQUIRED: Mapping[str, Mapping[str, Kind]] = {
    "": {
        "polyseme_version": _STRING,
        "created": _STRING,
        "settings": _OBJECT,
        "model": _OBJECT,
        "data": _OBJECT,
    },
    "settings": {"linkage": _LINKAGE},
    "model": {"class": _STRING},
    "data": {"n_inputs": _WHOLE},
    "site": {"threshold": _THRESHOLD},
}
_REQUIRED_OF_TEXTS: Mapping[str, Mapping[str, Kind]] = {
    "settings": {"window": _WINDOW},
    "data": {"length": _WHOLE, "leave_out": _STRINGS, "tokenizer": _OBJECT},
}
_REQUIRED_OF_IMAGES: Mapping[str, Mapping[str, Kind]] = {
    "data": {"shape": _SHAPE, "mean": _SCALE, "std": _SCALE, "low": _NUMBER, "high": _NUMBER},
}
#: likewise, what may be missing or null
_OPTIONAL: Mapping[str, Mapping[str, Kind]] = {
    "": {"fingerprint": _OBJECT, "evaluation": _OBJECT},
    "settings": {"baseline": _BASELINE},
    "model": {"name": _STRING},
    "data": {"kind": _STRING, "name": _STRING, "image_shape": _IMAGE, "class_names": _STRINGS},
    "site": {
        "activation": _STRING,
        "gate": _STRING,
        "hook": _STRING,
        "folded": _BOOLEAN,
        "general": _BOOLEAN,
        "reads_inputs": _BOOLEAN,
        "kernel_shape": _TRIPLE,
        "grid": _PAIR,
        "stride": _PAIR,
    },
}


def check_metadata(metadata: Mapping[str, JSON]) -> None:
    """Check that run.json has what readers rely on, of the right kind.

    Its ``sites`` are those of `parse_sites`, which has been called.

    Raises
    ------
    Problem
        Something is missing or of another kind, or two values contradict each other.
    """
    _check_object(metadata, "", "", False)
    text = is_text(metadata)
    for name in ("settings", "model", "data"):
        _check_object(metadata[name], name, f"{name}.", text)
    for number, site in enumerate(metadata["sites"]):
        _check_object(site, "site", f"sites[{number}].", text)
    if not text:
        _check_sizes(metadata["data"], metadata["sites"])


def _check_object(entry: Mapping[str, JSON], name: str, where: str, text: bool) -> None:
    of_kind = _REQUIRED_OF_TEXTS if text else _REQUIRED_OF_IMAGES
    required = {**_REQUIRED[name], **of_kind.get(name, {})}
    for key, (words, holds) in {**required, **_OPTIONAL[name]}.items():
        value = entry.get(key)
        if key in required and key not in entry:
            raise Problem(RUN_JSON, f"'{where}{key}' is missing")
        if not (holds(value) or (value is None and key not in required)):
            raise Problem(RUN_JSON, f"'{where}{key}' must be {words}, not {kind_of(value)}")


def _check_sizes(data: Mapping[str, JSON], sites: list[Mapping[str, JSON]]) -> None:
    """Check that what says how inputs are shaped agrees."""
    size = math.prod(data["shape"])
    if data.get("image_shape") and math.prod(data["image_shape"]) != size:
        raise Problem(
            RUN_JSON, f"'data.image_shape' is {data['image_shape']}, 'data.shape' {data['shape']}"
        )
    for key in ("mean", "std"):
        if isinstance(data[key], list) and len(data[key]) != data["shape"][0]:
            raise Problem(
                RUN_JSON,
                f"'data.{key}' has {len(data[key])} numbers, but 'data.shape' begins with "
                f"{data['shape'][0]}",
            )
    for number, site in enumerate(sites):
        kernel = site.get("kernel_shape")
        for read, what in ((kernel and math.prod(kernel), "kernel_shape"), (size, "reads_inputs")):
            if site.get(what) and read != site["d_in"]:
                raise Problem(
                    RUN_JSON,
                    f"'sites[{number}].d_in' is {site['d_in']}, but its '{what}' makes {read}",
                )
