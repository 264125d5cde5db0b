"""What the pages of a Parquet file take once decompressed, told before that is done.

What the footer says of it is the word of whoever made the file, and it is not what memory is set
aside by: that is the header of each page. They are in Thrift's compact protocol, of which this is
as much as they need.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any, TypeAlias

import pyarrow.parquet as pq

Struct: TypeAlias = dict[int, Any]

_LONGEST_HEADER = 2**16
_DEEPEST = 8
_DATA, _DICTIONARY, _DATA_V2 = 0, 2, 3
# Of the encodings of text these store every character, once a row or once a dictionary. Another
# stores what a text shares with the one before it as a number, and so without limit.
_STORING = frozenset({0, 2, 6, 8})


def page_bytes(
    file: int, chunk: pq.ColumnChunkMetaData, rows: int, *, text: bool
) -> Iterator[int]:
    """What each page of one column of one row group takes when it is decompressed, in bytes.

    Parameters
    ----------
    file : int
        Descriptor of the open file.
    chunk : pyarrow.parquet.ColumnChunkMetaData
        Of a column that is not nested.
    rows : int
        Of the row group.
    text : bool
        Whether the column holds text, of which no encoding may be longer than what it stores.

    Raises
    ------
    ValueError
        A header is none, or promises what its row group rules out.
    """
    start, dictionary = chunk.data_page_offset, chunk.dictionary_page_offset
    if dictionary is not None and 0 < dictionary < start:
        start = dictionary
    end = start + chunk.total_compressed_size
    if chunk.num_values != rows or not 0 <= start <= end <= os.fstat(file).st_size:
        raise ValueError("a column is not where its footer says, or not as long")
    values, at = 0, start
    while values < rows and at < end:
        header, length = _header(os.pread(file, _LONGEST_HEADER, at))
        kind, size, stored = (_whole(header, number) for number in (1, 2, 3))
        if kind == _DICTIONARY and at == start:
            # Each entry takes 4 bytes or more, if only to say how long it is.
            if 4 * _whole(header.get(7), 1) > size:
                raise ValueError("a dictionary claims more entries than it has room for")
        elif kind in (_DATA, _DATA_V2):
            page = header.get(5 if kind == _DATA else 8)
            values += (n := _whole(page, 1))
            if not n or values > rows:
                raise ValueError("a page claims more values than its row group has rows")
            if text and _whole(page, 2 if kind == _DATA else 4) not in _STORING:
                raise ValueError("text is in an encoding that can take any amount of memory")
        else:
            raise ValueError(f"a page is of kind {kind}")
        yield size
        at += length + stored


def _whole(struct: Any, number: int) -> int:
    value = struct.get(number) if isinstance(struct, dict) else None
    if type(value) is not int or value < 0:
        raise ValueError("the header of a page is damaged")
    return value


def _header(raw: bytes) -> tuple[Struct, int]:
    """The header that some bytes begin with, and how long it is."""
    try:
        return _struct(raw, 0, _DEEPEST)
    except IndexError:
        raise ValueError("the header of a page is cut short") from None


def _struct(raw: bytes, at: int, depth: int) -> tuple[Struct, int]:
    found: Struct = {}
    number = 0
    while kind := raw[at] & 15:
        step, at = raw[at] >> 4, at + 1
        if step:
            number += step
        else:
            number, at = _zigzag(raw, at)
        found[number], at = _value(raw, at, kind, depth)
    return found, at + 1


def _value(raw: bytes, at: int, kind: int, depth: int) -> tuple[Any, int]:
    """One value of a kind: a number, a struct, or None for what no header of a page is asked."""
    if kind in (1, 2):  # a boolean lies in its kind
        return None, at
    if kind == 3:
        return None, at + 1
    if kind in (4, 5, 6):
        return _zigzag(raw, at)
    if kind == 7:
        return None, at + 8
    if kind == 8:
        length, at = _varint(raw, at)
        return None, at + length
    if kind == 12 and depth:
        return _struct(raw, at, depth - 1)
    raise ValueError("the header of a page is damaged")


def _varint(raw: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while raw[at] & 128:
        value |= (raw[at] & 127) << shift
        shift, at = shift + 7, at + 1
    return value | raw[at] << shift, at + 1


def _zigzag(raw: bytes, at: int) -> tuple[int, int]:
    value, at = _varint(raw, at)
    return (value >> 1) ^ -(value & 1), at
