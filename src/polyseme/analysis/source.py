"""Chooses the kind of data of an analysis, and checks its options."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from polyseme.analysis.describe import check_model
from polyseme.analysis.image_data import ImageData
from polyseme.analysis.settings import Settings
from polyseme.analysis.text_data import TextData
from polyseme.data.contexts import Contexts


def source_of(model: nn.Module, data: Any, options: Mapping[str, Any]) -> ImageData | TextData:
    """Create the data of an analysis; options that are None or missing take their defaults."""
    kind: type[ImageData | TextData] = TextData if isinstance(data, Contexts) else ImageData
    batch_size = options.get("batch_size")
    if batch_size is None:
        batch_size = kind.default_batch_size(data)
    settings = Settings.checked(kind.kind, **{**options, "batch_size": batch_size})
    check_model(model)
    return kind(model, data, settings)
