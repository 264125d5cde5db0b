"""Chooses the kind of data of an analysis, and checks its options."""

from __future__ import annotations

from dataclasses import replace

from polyseme.analysis.describe import check_model
from polyseme.analysis.image_data import ImageData
from polyseme.analysis.settings import Settings
from polyseme.analysis.text_data import TextData
from polyseme.data.contexts import Contexts
from polyseme.options import ReadingOptions


def source_of(options: ReadingOptions) -> ImageData | TextData:
    """Create the data of an analysis; options that are None take their defaults."""
    data = options.data
    kind: type[ImageData | TextData] = TextData if isinstance(data, Contexts) else ImageData
    if options.batch_size is None:
        options = replace(options, batch_size=kind.default_batch_size(data))
    settings = Settings.checked(kind.kind, options)
    check_model(options.model)
    return kind(options.model, data, settings)
