"""The run format, version 1: its files, columns, arrays and metadata.

Everything else takes them from here: the writer casts to this format and the reader checks against
it. ``docs/run-format.md`` specifies it in prose.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, TypeAlias

import numpy as np
import pandas as pd

from polyseme.errors import InputError

FORMAT = "polyseme-run"
FORMAT_VERSION = 1

RUN_JSON = "run.json"
INPUTS_FILE = "inputs.safetensors"
SITES_FOLDER = "sites"

# The format stores some sizes as int32, so no size can be larger.
LARGEST = 2**31 - 1
# Both are far above any real run; they keep hostile metadata from exhausting memory or the stack.
LONGEST_RUN_JSON = 64 * 2**20
LONGEST_NAME = 1024
DEEPEST_JSON = 64

JSON: TypeAlias = Any  # what json.dumps writes: dict, list, str, int, float, bool, None


class Problem(Exception):
    """What is wrong with one file of a run; the reader adds the path and the remedy."""

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
        Kind of neurons, as named by the writer.
    n_neurons : int
        Number of neurons, dead ones included.
    d_in : int
        Length of the input vector that the neurons read.
    extra : dict
        The site's other entries in run.json.
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

#: likewise, optional columns
OPTIONAL_COLUMNS: Mapping[str, Mapping[str, str]] = MappingProxyType(
    {
        "neurons": {
            "n_meanings": "int32",
            "effective_meanings": "float64",
            "separation": "float64",
        },
        "examples": {"meaning": "int32"},
        "features": {"input": "int64", "position": "int64", "label": "str"},
        "random": {},
    }
)


def table_file(table: str) -> str:
    """Name of a table's file, relative to the run folder."""
    return f"{table}.parquet"


# ---------------------------------------------------------------------------------- arrays


@dataclass(frozen=True)
class Array:
    """What the format requires of one array.

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
        "meaning_tree": Array(("float64",), ("merges", 4), required=False),
        "meaning_overlap": Array(("float32",), ("merges",), required=False),
        "meaning_drive": Array(("float16",), ("n_examples",), required=False),
        "space_mean": Array(("float32",), ("n_groups", "d_in"), required=False),
        "space_matrix": Array(("float32",), ("n_groups", "d_in", "d_in"), required=False),
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
#: arrays of which a site has all or none
GO_TOGETHER = (
    ("up_weights", "gate_bias", "up_bias"),
    ("similar_features", "similar_similarity"),
    ("meaning_tree", "meaning_overlap", "meaning_drive", "space_mean", "space_matrix"),
    ("promoted_tokens", "promoted_logits", "suppressed_tokens", "suppressed_logits"),
    ("logit_gradient", "logit_ablation"),
)
# Token importances, from 0 to 1, are stored as bytes: the first value is 1, the second NaN.
LARGEST_IMPORTANCE, NO_IMPORTANCE = 254, 255

#: units that rows of a site's arrays can belong to, each of which belongs to a neuron
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

#: dtype names as spelled in a safetensors header
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


# Which of these groups is present says what the inputs are; a group is present whole or not at all.
INPUT_KINDS: tuple[tuple[str, ...], ...] = (
    ("pixels",),
    ("tokens", "lengths", "vocabulary", "vocabulary_ends", "vocabulary_text"),
)


def missing_inputs(names: Collection[str]) -> list[str]:
    """Arrays that inputs need but lack: those of texts if they have tokens, otherwise of images."""
    images, texts = INPUT_KINDS
    return [name for name in (texts if "tokens" in names else images) if name not in names]


def is_text(metadata: Mapping[str, JSON]) -> bool:
    """Whether run.json says that the run's inputs are texts."""
    return bool(metadata["data"].get("kind") == "text")


def site_file(number: int) -> str:
    """Name of the file of a site's arrays, relative to the run folder."""
    return f"{SITES_FOLDER}/{number}.safetensors"


def data_files(n_sites: int) -> list[str]:
    """Names of all files of a run except run.json, in a fixed order."""
    tables = [table_file(table) for table in TABLES]
    return [*tables, INPUTS_FILE, *(site_file(number) for number in range(n_sites))]


def neuron_offsets(sites: Sequence[SiteInfo]) -> np.ndarray:
    """First row of each site in the neurons table, and one past the last: (sites + 1,) int64."""
    return np.concatenate([[0], np.cumsum([site.n_neurons for site in sites], dtype=np.int64)])


# ------------------------------------------------------------------- texts and importances


def vocabulary_arrays(
    ids: Sequence[int] | np.ndarray, texts: Sequence[str]
) -> dict[str, np.ndarray]:
    """The part of a vocabulary that occurs in a run, as arrays of ``inputs.safetensors``.

    Parameters
    ----------
    ids : array of int, shape (V,)
        Strictly increasing.
    texts : sequence of str
        Text of each of them.
    """
    if len(ids) != len(texts):
        raise InputError(f"{len(ids)} tokens have {len(texts)} texts; expected one for each.")
    encoded = [text.encode("utf-8", "surrogatepass") for text in texts]
    return {
        "vocabulary": np.asarray(ids, dtype=np.int32),
        "vocabulary_ends": np.cumsum([len(word) for word in encoded], dtype=np.int64),
        "vocabulary_text": np.frombuffer(b"".join(encoded), dtype=np.uint8),
    }


def token_texts(inputs: Mapping[str, np.ndarray]) -> pd.Series[str]:
    """Text of each token of a run, by token id.

    Parameters
    ----------
    inputs : mapping of str to ndarray
        The arrays of ``inputs.safetensors``.

    Returns
    -------
    pandas.Series of str, index int

    Raises
    ------
    Problem
        The arrays contradict one another.
    """
    ids, ends = inputs["vocabulary"], inputs["vocabulary_ends"]
    raw = inputs["vocabulary_text"].tobytes()
    starts = np.concatenate([[0], ends])[:-1]
    if np.any(ends < starts) or (len(ends) and (ends[0] < 0 or ends[-1] != len(raw))):
        raise Problem(INPUTS_FILE, "'vocabulary_ends' do not fit 'vocabulary_text'")
    try:
        words = [raw[a:b].decode("utf-8") for a, b in zip(starts, ends, strict=True)]
    except UnicodeDecodeError as error:
        raise Problem(INPUTS_FILE, f"'vocabulary_text' is not UTF-8 ({error.reason})") from error
    return pd.Series(words, index=ids, dtype=object)


def encode_importances(importances: np.ndarray) -> np.ndarray:
    """Encode token importances from 0 to 1, NaN where missing, as bytes."""
    known = np.rint(np.nan_to_num(importances) * LARGEST_IMPORTANCE)
    return np.where(np.isnan(importances), NO_IMPORTANCE, known).astype(np.uint8)


def decode_importances(stored: np.ndarray) -> np.ndarray:
    """Decode what `encode_importances` encoded, to float32, up to rounding."""
    known = stored.astype(np.float32) / np.float32(LARGEST_IMPORTANCE)
    return np.where(stored == NO_IMPORTANCE, np.float32(np.nan), known)
