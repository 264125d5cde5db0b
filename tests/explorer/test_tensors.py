"""Arrays for the pages: what comes back is what went in, small, aligned, and the same each time."""

from __future__ import annotations

import gzip
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from explorer.conftest import decoded
from polyseme.explorer.strict_json import compact_json, finite
from polyseme.explorer.tensors import encode

LIMITS = {"u1": 255, "u2": 65_535, "i4": 2**31 - 1}
numbers = st.sampled_from(["<i8", "<i4", "u1", "?", "<f4", "<f8", "<f2"])


@given(
    st.dictionaries(
        st.text(min_size=1, max_size=5).filter(lambda name: name != "__metadata__"),
        numbers.flatmap(lambda d: arrays.arrays(d, arrays.array_shapes(min_side=0, max_side=4))),
        max_size=4,
    )
)
def test_encoded_arrays_are_decoded(given_arrays):
    raw = encode(given_arrays)
    assert raw == encode(dict(reversed(given_arrays.items())))
    found, _ = decoded(raw)
    assert found.keys() == given_arrays.keys()
    for name, array in given_arrays.items():
        assert found[name].shape == array.shape
        # As JavaScript reads them: float64 holds no more than 53 bits of an integer.
        wanted = array.astype(np.float64) if array.dtype == np.int64 else array
        np.testing.assert_array_equal(found[name], wanted.astype(found[name].dtype))
        if array.dtype == np.int64:
            np.testing.assert_array_equal(found[name].astype(np.float64), wanted)


@pytest.mark.parametrize(
    ("low", "high", "dtype"),
    [
        (0, 255, np.uint8),
        (0, 256, np.uint16),
        (-1, 100, np.int8),
        (-1, 200, np.int16),
        (0, 70_000, np.int32),
        (-1, 2**31 - 1, np.int32),
        (0, 2**31, np.float64),
    ],
)
def test_integers_take_the_least_room(low, high, dtype):
    found, _ = decoded(encode({"x": np.array([low, high])}))
    assert found["x"].dtype == dtype
    assert found["x"].tolist() == [low, high]


def test_arrays_are_aligned():
    plain = gzip.decompress(
        encode({"a": np.arange(3, dtype="u1"), "b": np.ones(1), "c": np.ones(3, "f2")}, {"k": "x"})
    )
    start = 8 + int.from_bytes(plain[:8], "little")
    header = json.loads(plain[8:start])
    assert start % 8 == 0
    for name, size in (("a", 1), ("b", 8), ("c", 2)):
        assert header[name]["data_offsets"][0] % size == 0


def test_metadata_are_text_or_json():
    _, metadata = decoded(encode({}, {"by": "decoder", "words": ["a", "\ud800", "</script>"]}))
    assert metadata == {"by": "decoder", "words": ["a", "\ud800", "</script>"]}


def test_json_holds_no_nan():
    value = {"a": np.array([1.0, np.nan]), "b": (float("inf"), [None, "x"]), 3: True}
    assert finite(value) == {"a": [1.0, None], "b": [None, [None, "x"]], "3": True}
    with pytest.raises(ValueError, match="not JSON compliant"):
        compact_json(float("nan"))
