"""The run on disk: what one analysis found, in JSON, Parquet and safetensors.

The format is specified in ``docs/run-format.md``.
"""

from polyseme.store.format import (
    FORMAT_VERSION,
    NO_IMPORTANCE,
    SiteInfo,
    decode_importances,
    encode_importances,
    vocabulary_arrays,
)
from polyseme.store.reader import RunFolder
from polyseme.store.remote_runs import local_run
from polyseme.store.run_json import add_metadata, altered_files, refuse_altered
from polyseme.store.writer import RunWriter

__all__ = [
    "FORMAT_VERSION",
    "NO_IMPORTANCE",
    "RunFolder",
    "RunWriter",
    "SiteInfo",
    "add_metadata",
    "altered_files",
    "decode_importances",
    "encode_importances",
    "local_run",
    "refuse_altered",
    "vocabulary_arrays",
]
