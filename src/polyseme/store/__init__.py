"""The run on disk: what one analysis found, in JSON, Parquet and safetensors.

The format is specified in ``docs/run-format.md``.
"""

from polyseme.store.format import FORMAT_VERSION, SiteInfo
from polyseme.store.reader import RunFolder
from polyseme.store.texts import vocabulary_arrays
from polyseme.store.writer import RunWriter

__all__ = ["FORMAT_VERSION", "RunFolder", "RunWriter", "SiteInfo", "vocabulary_arrays"]
