"""JSON for browsers, without importing numpy, which loads slower than the server starts."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any


def compact_json(value: Any) -> str:
    """Compact ASCII JSON: escaping makes lone surrogates in untrusted texts harmless."""
    return json.dumps(value, separators=(",", ":"), allow_nan=False)


def finite(value: Any) -> Any:
    """A value that `compact_json` can write: arrays as lists, NaN and infinities as None."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, Mapping):
        return {str(key): finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [finite(entry) for entry in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
