"""The run format, version 1: its files, columns, arrays and metadata.

This is the one place that knows them; the writer casts to it and the reader checks against
it. The prose is ``docs/run-format.md``.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, TypeAlias

import numpy as np

FORMAT = "polyseme-run"
FORMAT_VERSION = 1

RUN_JSON = "run.json"
INPUTS_FILE = "inputs.safetensors"
SITES_FOLDER = "sites"

# A size is stored as int32 somewhere in the format, so nothing larger can be meant.
LARGEST = 2**31 - 1
# Both are far above any real run; they keep hostile metadata from costing memory or the stack.
LONGEST_RUN_JSON = 64 * 2**20
LONGEST_NAME = 1024
DEEPEST_JSON = 64

JSON: TypeAlias = Any  # what json.dumps writes: dict, list, str, int, float, bool, None


class Problem(Exception):
    """What is wrong with one file of a run: the reader adds the path and the remedy."""

    def __init__(self, file: str, what: str) -> None:
        super().__init__(f"{file}: {what}")
        self.file = file
        self.what = what


@dataclass(frozen=True)
class SiteInfo:
    """One layer of neurons in a run.

    Attributes
    ----------
    number : int
        Position in run.json's ``sites``; names the site's file.
    name : str
        Name of the site in the model, unique in the run.
    kind : str
        What sort of neurons it has, in the words of the writer.
    n_neurons : int
        Number of neurons, dead ones included.
    d_in : int
        Length of the input vector that the neurons read.
    extra : dict
        What else run.json says about the site.
    """

    number: int
    name: str
    kind: str
    n_neurons: int
    d_in: int
    extra: dict[str, JSON] = field(default_factory=dict)


# ---------------------------------------------------------------------------------- tables

#: table -> column -> dtype; "str" stands for UTF-8 text
TABLES: Mapping[str, Mapping[str, str]] = MappingProxyType(
    {
        "neurons": {
            "site": "str",
            "neuron": "int32",
            "n_examples": "int32",
            "n_clusters": "int32",
            "max_distance": "float64",
            "mean_distance": "float64",
            "intra_cluster_distance": "float64",
            "inter_cluster_distance": "float64",
            "density": "float64",
            "max_activation": "float64",
            "mean_activation": "float64",
            "participation_ratio": "float64",
            "n_random": "int32",
        },
        "examples": {
            "site": "str",
            "neuron": "int32",
            "example": "int32",
            "input": "int64",
            "position": "int64",
            "activation": "float32",
            "feature": "int32",
            "vector": "int64",
        },
        "features": {
            "site": "str",
            "neuron": "int32",
            "feature": "int32",
            "n_examples": "int32",
            "medoid": "int32",
            "mean_activation": "float64",
            "max_activation": "float64",
        },
        "random": {
            "site": "str",
            "neuron": "int32",
            "input": "int64",
            "position": "int64",
            "activation": "float32",
        },
    }
)

#: likewise, columns that a table may have
OPTIONAL_COLUMNS: Mapping[str, Mapping[str, str]] = MappingProxyType(
    {
        "neurons": {},
        "examples": {},
        "features": {"input": "int64", "position": "int64", "label": "str"},
        "random": {},
    }
)


def table_file(table: str) -> str:
    """Name of the file that holds a table, relative to the run folder."""
    return f"{table}.parquet"


# ---------------------------------------------------------------------------------- arrays


@dataclass(frozen=True)
class Array:
    """What the format asks of one array.

    A dimension is a number, or a name that stands for the same number in every array of the
    file; a final ``...`` stands for one or more dimensions of any size. An array whose first
    dimension is one of `UNITS` has rows that belong to neurons.
    """

    dtypes: tuple[str, ...]
    shape: tuple[str | int, ...]
    required: bool = True


SITE_ARRAYS: Mapping[str, Array] = MappingProxyType(
    {
        "weights": Array(("float32",), ("n_neurons", "d_in")),
        "vectors": Array(("float16", "float32"), ("R", "d_in")),
        "tree": Array(("float64",), ("merges", 4)),
        "histogram": Array(("int64",), ("n_neurons", "bins")),
        "histogram_upper": Array(("float64",), ("n_neurons",)),
        "up_weights": Array(("float32",), ("n_neurons", "d_in"), required=False),
        "gate_bias": Array(("float32",), ("n_neurons",), required=False),
        "up_bias": Array(("float32",), ("n_neurons",), required=False),
        "windows": Array(("float16",), ("n_examples", "window"), required=False),
        "importances": Array(("uint8",), ("n_examples", "window"), required=False),
        "layout": Array(("float32",), ("n_examples", 2), required=False),
        "layout_input": Array(("float32",), ("n_examples", 2), required=False),
        "decoder": Array(("float32",), ("n_neurons", "d_out"), required=False),
        "similar_features": Array(("int64",), ("n_features", "k_similar"), required=False),
        "similar_similarity": Array(("float16",), ("n_features", "k_similar"), required=False),
        "promoted_tokens": Array(("int32",), ("n_neurons", "k"), required=False),
        "promoted_logits": Array(("float32",), ("n_neurons", "k"), required=False),
        "suppressed_tokens": Array(("int32",), ("n_neurons", "k"), required=False),
        "suppressed_logits": Array(("float32",), ("n_neurons", "k"), required=False),
        "activation_map": Array(("float32",), ("n_neurons", "..."), required=False),
        "logit_gradient": Array(("float32",), ("n_neurons", "n_classes"), required=False),
        "logit_ablation": Array(("float32",), ("n_neurons", "n_classes"), required=False),
    }
)
#: arrays of a site of which it has all or none
GO_TOGETHER = (
    ("up_weights", "gate_bias", "up_bias"),
    ("similar_features", "similar_similarity"),
    ("promoted_tokens", "promoted_logits", "suppressed_tokens", "suppressed_logits"),
    ("logit_gradient", "logit_ablation"),
)
# Token importances, from 0 to 1, are stored as bytes: so many are 1, and this one is none.
LARGEST_IMPORTANCE, NO_IMPORTANCE = 254, 255

#: what rows of a site's arrays stand for, where they stand for what a neuron has
UNITS = ("n_neurons", "n_examples", "n_features", "merges")

INPUT_ARRAYS: Mapping[str, Array] = MappingProxyType(
    {
        "index": Array(("int64",), ("M",)),
        "pixels": Array(("uint8", "float32"), ("M", "..."), required=False),
        "labels": Array(("int64",), ("M",), required=False),
        "tokens": Array(("int32",), ("M", "L"), required=False),
        "lengths": Array(("int32",), ("M",), required=False),
        "vocabulary": Array(("int32",), ("V",), required=False),
        "vocabulary_ends": Array(("int64",), ("V",), required=False),
        "vocabulary_text": Array(("uint8",), ("T",), required=False),
        "token_features": Array(("int64",), ("N",), required=False),
        "token_features_ends": Array(("int64",), ("V",), required=False),
    }
)

#: dtype names as a safetensors header spells them
SAFETENSORS_DTYPES: Mapping[str, str] = MappingProxyType(
    {
        "BOOL": "bool",
        "U8": "uint8",
        "I8": "int8",
        "U16": "uint16",
        "I16": "int16",
        "U32": "uint32",
        "I32": "int32",
        "U64": "uint64",
        "I64": "int64",
        "F16": "float16",
        "F32": "float32",
        "F64": "float64",
    }
)


# What inputs are is said by which of these they have; all of a group, or none of it.
INPUT_KINDS: tuple[tuple[str, ...], ...] = (
    ("pixels",),
    ("tokens", "lengths", "vocabulary", "vocabulary_ends", "vocabulary_text"),
)


def missing_inputs(names: Collection[str]) -> list[str]:
    """What arrays of inputs lack to be images, or texts if they have tokens."""
    images, texts = INPUT_KINDS
    return [name for name in (texts if "tokens" in names else images) if name not in names]


def is_text(metadata: Mapping[str, JSON]) -> bool:
    """Whether run.json says that the run's inputs are texts."""
    return bool(metadata["data"].get("kind") == "text")


def site_file(number: int) -> str:
    """Name of the file that holds a site's arrays, relative to the run folder."""
    return f"{SITES_FOLDER}/{number}.safetensors"


def data_files(n_sites: int) -> list[str]:
    """Names of every file of a run but run.json, in a fixed order."""
    tables = [table_file(table) for table in TABLES]
    return [*tables, INPUTS_FILE, *(site_file(number) for number in range(n_sites))]


def check_headers(
    file: str,
    headers: Mapping[str, tuple[str, tuple[int, ...]]],
    schema: Mapping[str, Array],
    sizes: Mapping[str, int],
) -> None:
    """Check the dtype and shape of each array of a file that the format names.

    Parameters
    ----------
    file : str
        Name of the file, for the message.
    headers : mapping of str to (dtype name, shape)
        What the file has; arrays that the format does not name pass.
    schema : mapping of str to Array
        What the format asks.
    sizes : mapping of str to int
        The named dimensions that are known already; the others take the size seen first.

    Raises
    ------
    Problem
        An array is missing, or has another dtype or shape.
    """
    known = dict(sizes)
    for name, array in schema.items():
        if name not in headers:
            if array.required:
                raise Problem(file, f"the array {name!r} is missing")
            continue
        dtype, shape = headers[name]
        if dtype not in array.dtypes:
            raise Problem(file, f"{name!r} is {dtype}, not {' or '.join(array.dtypes)}")
        free = array.shape[-1] == "..."
        wanted = array.shape[:-1] if free else array.shape
        fits = len(shape) > len(wanted) if free else len(shape) == len(wanted)
        if fits:
            for want, given in zip(wanted, shape, strict=False):
                size = want if isinstance(want, int) else known.setdefault(want, given)
                fits = fits and size == given
        if not fits:
            spelled = ", ".join(
                str(want) if isinstance(want, int) or want not in known else f"{want}={known[want]}"
                for want in array.shape
            )
            raise Problem(file, f"{name!r} has shape {shape}, not ({spelled})")


# -------------------------------------------------------------------------------- metadata


def encode_json(value: Mapping[str, JSON]) -> bytes:
    """JSON as the format writes it: UTF-8, indented, and ending in ``}`` and a line feed.

    Raises
    ------
    TypeError, ValueError, RecursionError
        The value is not strict JSON (a NaN is not).
    """
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    return text.encode()


def digest_of(metadata: Mapping[str, JSON]) -> str:
    """SHA-256, in hex, of run.json as it would be without its own ``sha256``."""
    return hashlib.sha256(encode_json(_without_digest(metadata))).hexdigest()


def encode_run_json(metadata: Mapping[str, JSON]) -> bytes:
    """run.json as it is written: `encode_json`, with its own digest at the end."""
    return encode_json({**_without_digest(metadata), "sha256": digest_of(metadata)})


def _without_digest(metadata: Mapping[str, JSON]) -> dict[str, JSON]:
    return {key: value for key, value in metadata.items() if key != "sha256"}


def decode_json(raw: bytes, file: str) -> dict[str, JSON]:
    """Strict inverse of `encode_json` that survives hostile bytes.

    Raises
    ------
    Problem
        The bytes are not one complete, strict and shallow JSON object.
    """
    if not raw.endswith(b"}\n"):
        # Without the rule a cut that takes only the last byte would still be valid JSON.
        raise Problem(file, "the end is missing (it must end with '}' and a line feed)")
    try:
        value = json.loads(raw.decode(), parse_constant=_refuse_constant)
    except RecursionError:
        raise Problem(file, "it is nested too deeply") from None
    except ValueError as error:  # covers bad UTF-8, bad JSON and integers of absurd length
        raise Problem(file, f"it is not valid JSON ({_short(str(error))})") from None
    if not isinstance(value, dict):
        raise Problem(file, f"it must hold a JSON object, not {kind_of(value)}")
    if too_deep(value):
        raise Problem(file, "it is nested too deeply")
    try:
        encode_json(value)  # 1e999 and half of a surrogate pair can be read, but not written
    except ValueError as error:
        raise Problem(file, f"it is not valid JSON ({_short(str(error))})") from None
    return value


def _refuse_constant(name: str) -> JSON:
    raise ValueError(f"{name} is not a JSON number")


def too_deep(value: JSON) -> bool:
    """Whether JSON nests deeper than the format allows; needs no recursion itself."""
    level: list[JSON] = [value]
    for _ in range(DEEPEST_JSON):
        level = [
            child
            for node in level
            if isinstance(node, (dict, list))
            for child in (node.values() if isinstance(node, dict) else node)
            if isinstance(child, (dict, list))
        ]
        if not level:
            return False
    return True


def parse_sites(metadata: Mapping[str, JSON]) -> tuple[SiteInfo, ...]:
    """The sites of a run.json.

    Raises
    ------
    Problem
        ``sites`` is missing, empty, or says something that no site can be.
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
        name = _text(entry, "name", where)
        if name in seen:
            raise Problem(RUN_JSON, f"'sites' has the name {name!r} twice")
        seen.add(name)
        known = ("name", "kind", "n_neurons", "d_in")
        sites.append(
            SiteInfo(
                number=number,
                name=name,
                kind=_text(entry, "kind", where),
                n_neurons=_count(entry, "n_neurons", where),
                d_in=_count(entry, "d_in", where),
                extra={key: value for key, value in entry.items() if key not in known},
            )
        )
    return tuple(sites)


def parse_files(metadata: Mapping[str, JSON], names: Sequence[str]) -> dict[str, tuple[int, str]]:
    """Size and SHA-256 of each named file, as run.json records them.

    Only the names that the format fixes are looked up: a name that run.json makes up is never
    followed.

    Raises
    ------
    Problem
        A file has no entry, or the entry is malformed.
    """
    listed = require(metadata, "files", dict)
    found: dict[str, tuple[int, str]] = {}
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
        found[name] = (size, digest)
    return found


def require(metadata: Mapping[str, JSON], key: str, kind: type) -> JSON:
    """A value of run.json that must be there and be of the given type."""
    words = {dict: "an object", list: "a list", str: "a string", int: "a whole number"}
    if key not in metadata:
        raise Problem(RUN_JSON, f"{key!r} is missing")
    value = metadata[key]
    if type(value) is not kind:  # not isinstance: true is no whole number here
        raise Problem(RUN_JSON, f"{key!r} must be {words[kind]}, not {kind_of(value)}")
    return value


def _text(entry: Mapping[str, JSON], key: str, where: str) -> str:
    value = entry.get(key)
    if not isinstance(value, str) or not 0 < len(value) <= LONGEST_NAME:
        raise Problem(
            RUN_JSON,
            f"'{where}.{key}' must be a string of 1 to {LONGEST_NAME} characters, "
            f"not {kind_of(value)}",
        )
    return value


def _count(entry: Mapping[str, JSON], key: str, where: str) -> int:
    value = entry.get(key)
    if type(value) is not int or not 1 <= value <= LARGEST:
        raise Problem(
            RUN_JSON,
            f"'{where}.{key}' must be a whole number from 1 to {LARGEST}, not {kind_of(value)}",
        )
    return value


def kind_of(value: JSON) -> str:
    """A value in a few characters, whatever it is."""
    if isinstance(value, dict):
        return "an object"
    if isinstance(value, list):
        return "a list"
    if type(value) is int and abs(value) > 10**18:
        return "a whole number of more than 18 digits"
    return _short(json.dumps(value, ensure_ascii=False))


def _short(text: str, limit: int = 80) -> str:
    return text if len(text) <= limit else text[: limit - 1] + "…"


def neuron_offsets(sites: Sequence[SiteInfo]) -> np.ndarray:
    """First row of each site in the neurons table, and one past the last: (sites + 1,) int64."""
    return np.concatenate([[0], np.cumsum([site.n_neurons for site in sites], dtype=np.int64)])
