"""The table of measures: unique keys, and values written as their kind says."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from polyseme.views import MEASURES, Measure


def test_each_key_stands_once_and_groups_are_together() -> None:
    keys = [measure.key for measure in MEASURES]
    assert len(set(keys)) == len(keys)
    groups = [measure.group for measure in MEASURES]
    changes = sum(a != b for a, b in itertools.pairwise(groups))
    assert changes == len(set(groups)) - 1


@pytest.mark.parametrize(
    ("kind", "digits", "value", "text"),
    [
        ("integer", 0, 46080, "46,080"),
        ("percent", 1, 0.125, "12.5%"),
        ("number", 3, 0.12345, "0.123"),
        ("signed", 3, 0.5, "+0.500"),
        ("signed", 3, -0.5, "-0.500"),
        ("number", 3, np.nan, "–"),
    ],
)
def test_values_are_written_as_their_kind_says(
    kind: str, digits: int, value: float, text: str
) -> None:
    assert Measure("cost", "key", "name", kind, digits).write(value) == text
