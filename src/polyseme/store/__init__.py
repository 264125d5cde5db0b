"""The run on disk: what one analysis found, in JSON, Parquet and safetensors.

The format is specified in ``docs/run-format.md``.
"""

from polyseme.store.format import FORMAT_VERSION, NO_IMPORTANCE, SiteInfo
from polyseme.store.metadata import add_metadata
from polyseme.store.reader import RunFolder
from polyseme.store.texts import decode_importances, encode_importances, vocabulary_arrays
from polyseme.store.writer import RunWriter

__all__ = [
    "FORMAT_VERSION",
    "NO_IMPORTANCE",
    "RunFolder",
    "RunWriter",
    "SiteInfo",
    "add_metadata",
    "decode_importances",
    "encode_importances",
    "vocabulary_arrays",
]
