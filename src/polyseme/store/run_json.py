"""run.json: it makes a folder a run, says what the run holds, and records its files."""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TypeAlias

from polyseme.errors import InputError, RunError
from polyseme.store.files import (
    decode_json,
    encode_json,
    kind_of,
    locate,
    plain_json,
    replace_bytes,
    reporting,
    sha256,
    short_json,
    writing,
)
from polyseme.store.format import (
    FORMAT,
    FORMAT_VERSION,
    JSON,
    LARGEST,
    LONGEST_NAME,
    LONGEST_RUN_JSON,
    RUN_JSON,
    Problem,
    SiteInfo,
    data_files,
    is_text,
)

# Keys that the writer itself adds to run.json, and the others that describe the analysis.
WRITTEN = (
    "format",
    "format_version",
    "polyseme_version",
    "created",
    "fingerprint",
    "versions",
    "files",
    "sha256",
)
_OF_THE_ANALYSIS = frozenset({*WRITTEN, "sites", "settings", "model", "data", "seconds"})


def read_run_json(path: Path) -> dict[str, JSON]:
    """Read the metadata of a finished run in a supported version.

    Raises
    ------
    RunError
        There is no such run, or its run.json is damaged or of another version.
    """
    unfinished = (
        "continue it with resume=True (--resume), or start over with overwrite=True (--overwrite)"
    )
    aside = path.with_name(path.name + ".partial") if path.name else path
    if (path / "partial.json").is_file():
        raise RunError(f"{path} is an unfinished analysis: {unfinished}.")
    if not os.path.lexists(path):
        if (aside / "partial.json").is_file():
            raise RunError(f"{path} is not finished; {aside} holds the work so far: {unfinished}.")
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
            f"only version {FORMAT_VERSION}. Read the run with the polyseme that wrote it (for a "
            "newer one: pip install --upgrade polyseme), or analyse again."
        )
    return metadata


# ------------------------------------------------------------------- what readers rely on

Rule: TypeAlias = tuple[str, Callable[[JSON], bool]]


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
    return _is_whole(value, 1, LARGEST)


_STRING: Rule = ("a string", _is_string)
_NAME: Rule = (
    f"a string of 1 to {LONGEST_NAME} characters",
    lambda v: _is_string(v) and 0 < len(v) <= LONGEST_NAME,
)
_SIZE: Rule = (f"a whole number from 1 to {LARGEST}", _is_size)
_STRINGS: Rule = ("a list of strings", lambda v: _are(v, _is_string))
_OBJECT: Rule = ("an object", lambda v: isinstance(v, dict))
_BOOLEAN: Rule = ("true or false", lambda v: isinstance(v, bool))
_WHOLE: Rule = ("a whole number from 0", _is_whole)
_NUMBER: Rule = ("a number", _is_number)
_SCALE: Rule = (
    "a number, or a list of numbers",
    lambda v: _is_number(v) or (_are(v, _is_number) and len(v) > 0),
)
_SHAPE: Rule = (
    "a list of 1 to 8 whole numbers from 1",
    lambda v: _are(v, _is_size, tuple(range(1, 9))),
)
_PAIR: Rule = ("two whole numbers from 1", lambda v: _are(v, _is_size, (2,)))
_TRIPLE: Rule = ("three whole numbers from 1", lambda v: _are(v, _is_size, (3,)))
_IMAGE: Rule = ("two or three whole numbers from 1", lambda v: _are(v, _is_size, (2, 3)))
_WINDOW: Rule = (
    "two whole numbers of tokens, before and after, from 0 to 1000",
    lambda v: _are(v, lambda n: _is_whole(n, 0, 1000), (2,)),
)
_LINKAGE: Rule = ('"average" or "single"', lambda v: v in ("average", "single"))
_THRESHOLD: Rule = ("a number from 0 to 2", lambda v: _is_number(v) and 0 <= v <= 2)
_BASELINE: Rule = ("a number or a string", lambda v: _is_number(v) or _is_string(v))

#: object of run.json -> key -> what it must be, in every run
_REQUIRED: Mapping[str, Mapping[str, Rule]] = {
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
    "site": {
        "name": _NAME,
        "kind": _NAME,
        "n_neurons": _SIZE,
        "d_in": _SIZE,
        "threshold": _THRESHOLD,
    },
}
_REQUIRED_OF_TEXTS: Mapping[str, Mapping[str, Rule]] = {
    "settings": {"window": _WINDOW},
    "data": {"length": _WHOLE, "leave_out": _STRINGS, "tokenizer": _OBJECT},
}
_REQUIRED_OF_IMAGES: Mapping[str, Mapping[str, Rule]] = {
    "data": {"shape": _SHAPE, "mean": _SCALE, "std": _SCALE, "low": _NUMBER, "high": _NUMBER},
}
#: likewise, keys that may be missing or null
_OPTIONAL: Mapping[str, Mapping[str, Rule]] = {
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
    """Check the presence and types of the keys of run.json that readers rely on.

    Assumes that `parse_sites` has checked ``sites``.

    Raises
    ------
    Problem
        A key is missing, a value has the wrong type, or two values contradict each other.
    """
    _check_object(metadata, "", "", False)
    text = is_text(metadata)
    for name in ("settings", "model", "data"):
        _check_object(metadata[name], name, f"{name}.", text)
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
    """Check that the entries on the shapes of inputs agree."""
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


# ------------------------------------------------------------------------ sites and files


def parse_sites(metadata: Mapping[str, JSON]) -> tuple[SiteInfo, ...]:
    """The sites of a run.json.

    Raises
    ------
    Problem
        ``sites`` is missing, empty, or describes an impossible site.
    """
    listed = require(metadata, "sites", list)
    if not listed:
        raise Problem(RUN_JSON, "'sites' is empty; a run has at least one site")
    sites: list[SiteInfo] = []
    seen: set[str] = set()
    for number, entry in enumerate(listed):
        where = f"sites[{number}]"
        if not isinstance(entry, dict):
            raise Problem(RUN_JSON, f"{where!r} must be an object, not {kind_of(entry)}")
        _check_object(entry, "site", f"{where}.", False)
        name = entry["name"]
        if name in seen:
            raise Problem(RUN_JSON, f"'sites' has the name {name!r} twice")
        seen.add(name)
        known = ("name", "kind", "n_neurons", "d_in")
        sites.append(
            SiteInfo(
                number=number,
                name=name,
                kind=entry["kind"],
                n_neurons=entry["n_neurons"],
                d_in=entry["d_in"],
                extra={key: value for key, value in entry.items() if key not in known},
            )
        )
    return tuple(sites)


def parse_files(metadata: Mapping[str, JSON], names: Sequence[str]) -> dict[str, tuple[int, str]]:
    """Size and SHA-256 of each named file, as run.json records them.

    Only the format's own names are looked up; other names in run.json are ignored.

    Raises
    ------
    Problem
        A file has no entry, or the entry is malformed.
    """
    listed = require(metadata, "files", dict)
    recorded: dict[str, tuple[int, str]] = {}
    for name in names:
        entry = listed.get(name)
        if entry is None:
            raise Problem(RUN_JSON, f"'files' does not list {name}")
        size = entry.get("bytes") if isinstance(entry, dict) else None
        digest = entry.get("sha256") if isinstance(entry, dict) else None
        if type(size) is not int or size < 0 or not isinstance(digest, str):
            raise Problem(
                RUN_JSON, f"the entry of {name} in 'files' must be {{'bytes': int, 'sha256': str}}"
            )
        recorded[name] = (size, digest)
    return recorded


def require(metadata: Mapping[str, JSON], key: str, kind: type) -> JSON:
    """A required value of run.json, of the given type."""
    words = {dict: "an object", list: "a list", str: "a string", int: "a whole number"}
    if key not in metadata:
        raise Problem(RUN_JSON, f"{key!r} is missing")
    value = metadata[key]
    if type(value) is not kind:  # not isinstance: true is not a whole number here
        raise Problem(RUN_JSON, f"{key!r} must be {words[kind]}, not {kind_of(value)}")
    return value


# -------------------------------------------------------------------------------- digests


def digest_of(metadata: Mapping[str, JSON]) -> str:
    """SHA-256, in hex, of run.json without its own ``sha256``."""
    return hashlib.sha256(encode_json(_without_digest(metadata))).hexdigest()


def write_run_json(folder: Path, metadata: Mapping[str, JSON], *, resumable: bool) -> None:
    """Write run.json atomically, with its own digest at the end."""
    signed = {**_without_digest(metadata), "sha256": digest_of(metadata)}
    with writing(folder / RUN_JSON, resumable=resumable):
        replace_bytes(folder / RUN_JSON, short_json(RUN_JSON, signed))


def _without_digest(metadata: Mapping[str, JSON]) -> dict[str, JSON]:
    return {key: value for key, value in metadata.items() if key != "sha256"}


def altered_files(path: str | Path, metadata: dict[str, JSON] | None = None) -> list[str]:
    """Names of the files of a run that have changed since they were written.

    This reads every byte once and compares digests. It does not detect forgery: anyone who can
    change a file can change its digest too.

    Parameters
    ----------
    path : str or Path
        The run folder. Only its run.json has to be readable.
    metadata : dict, optional
        run.json, if already read.

    Returns
    -------
    list of str
        Relative to the folder. Includes missing and unreadable files, and run.json if it does not
        match its own digest.

    Raises
    ------
    RunError
        It is not a run, or its run.json cannot be read.
    """
    path = Path(path)
    metadata = read_run_json(path) if metadata is None else metadata
    with reporting(path):
        files = parse_files(metadata, data_files(len(parse_sites(metadata))))
    altered = [] if metadata.get("sha256") == digest_of(metadata) else [RUN_JSON]
    for name, (_, digest) in files.items():
        try:
            same = sha256(locate(path, name)) == digest
        except (OSError, Problem):
            same = False
        if not same:
            altered.append(name)
    return altered


def refuse_altered(path: Path) -> None:
    """Refuse a run with files that have changed since they were written.

    Raises
    ------
    RunError
        The message names all such files.
    """
    if altered := altered_files(path):
        *others, last = altered
        names = f"{', '.join(others)} and {last}" if others else last
        raise RunError(
            f"{path}: {names} {'are' if others else 'is'} not as written: the SHA-256 is not the "
            f"one that run.json records. Copy the run again from its source, or analyse again with "
            f"overwrite=True (--overwrite)."
        )


def add_metadata(path: str | Path, metadata: Mapping[str, JSON]) -> None:
    """Add later findings to the run.json of a finished run, atomically.

    Parameters
    ----------
    path : str or Path
    metadata : mapping
        JSON by top-level key; a key added before is replaced.

    Raises
    ------
    InputError
        The metadata is not JSON, or has a key that describes the analysis itself.
    RunError
        There is no such run, or its run.json is damaged or cannot be written.
    """
    path = Path(path)
    content = read_run_json(path)
    with reporting(path):
        if content.get("sha256") != digest_of(content):
            raise Problem(RUN_JSON, "it does not match its own SHA-256")
    taken = [key for key in metadata if key in _OF_THE_ANALYSIS]
    if taken:
        raise InputError(f"{taken[0]!r} describes the analysis itself, so cannot be added later.")
    added = {**content, **plain_json("metadata", metadata)}
    if added != content:
        write_run_json(path, added, resumable=False)
