"""One pass over data: streaming selectors, statistics, and the collector that feeds them."""

from polyseme.capture.accumulate import Collected
from polyseme.capture.collect import Batch, Collector
from polyseme.capture.select import (
    AboveFraction,
    FirstActive,
    RandomActive,
    Selector,
    Stratified,
    TopK,
)
from polyseme.capture.stream import Selection, Stream

__all__ = [
    "AboveFraction",
    "Batch",
    "Collected",
    "Collector",
    "FirstActive",
    "RandomActive",
    "Selection",
    "Selector",
    "Stratified",
    "Stream",
    "TopK",
]
