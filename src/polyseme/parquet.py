"""What the pages of a Parquet file take once decompressed, told before that is done.

What the footer says of it is the word of whoever made the file, and it is not what memory is set
aside by: that is the header of each page. Both are in Thrift's compact protocol, of which this is
as much as they need. pyarrow tells where columns are too, but ends the process over a footer that
contradicts itself.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias

Struct: TypeAlias = dict[int, Any]

_LONGEST_FOOTER = 2**25
_LONGEST_HEADER = 2**16
_DEEPEST = 8
_DATA, _DICTIONARY, _DATA_V2 = 0, 2, 3
# Of the encodings of text these store every character, once a row or once a dictionary. Another
# stores what a text shares with the one before it as a number, and so without limit.
_STORING = frozenset({0, 2, 6, 8})


@dataclass(frozen=True)
class Chunk:
    """One column of one row group: its bytes in the file, its values, and the group's rows."""

    start: int
    stop: int
    values: int
    rows: int


def chunks(file: int) -> list[list[Chunk]]:
    """Where each column is, group by group, in the order of the schema.

    Parameters
    ----------
    file : int
        Descriptor of the open file.

    Raises
    ------
    ValueError
        The footer is none, or does not fit the file.
    """
    end = os.fstat(file).st_size - 8
    length = int.from_bytes(os.pread(file, 4, max(end, 0)), "little")
    if not 0 <= length <= min(end, _LONGEST_FOOTER):
        raise ValueError("the footer is damaged")
    footer, _ = _parsed(os.pread(file, length, end - length))
    return [
        [_chunk(column, _whole(group, 3), end) for column in _listed(group, 1)]
        for group in _listed(footer, 4)
    ]


def _chunk(column: Any, rows: int, end: int) -> Chunk:
    about: Any = column.get(3) if isinstance(column, dict) else None
    start, stored = _whole(about, 9), _whole(about, 7)
    if 11 in about and 0 < (dictionary := _whole(about, 11)) < start:
        start = dictionary
    if start + stored > end:
        raise ValueError("a column is not where the footer says")
    return Chunk(start, start + stored, _whole(about, 5), rows)


def page_bytes(file: int, chunk: Chunk, *, text: bool) -> Iterator[int]:
    """What each page of one column of one row group takes when it is decompressed, in bytes.

    Parameters
    ----------
    file : int
        Descriptor of the open file.
    chunk : Chunk
        Of a column that is not nested, and so has a value a row.
    text : bool
        Whether the column holds text, of which no encoding may be longer than what it stores.

    Raises
    ------
    ValueError
        A header is none, or promises what its row group rules out.
    """
    start, end, rows = chunk.start, chunk.stop, chunk.rows
    if chunk.values != rows:
        raise ValueError("a column has another number of values than its row group has rows")
    values, offset = 0, start
    while values < rows and offset < end:
        header, length = _parsed(os.pread(file, _LONGEST_HEADER, offset))
        kind, size, stored = (_whole(header, number) for number in (1, 2, 3))
        if kind == _DICTIONARY and offset == start:
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
        offset += length + stored


def _whole(struct: Any, number: int) -> int:
    value = struct.get(number) if isinstance(struct, dict) else None
    if type(value) is not int or value < 0:
        raise ValueError("a header is damaged")
    return value


def _listed(struct: Any, number: int) -> list[Any]:
    value = struct.get(number) if isinstance(struct, dict) else None
    if not isinstance(value, list):
        raise ValueError("a header is damaged")
    return value


def _parsed(raw: bytes) -> tuple[Struct, int]:
    """The struct that some bytes begin with, and how long it is."""
    try:
        return _struct(raw, 0, _DEEPEST)
    except IndexError:
        raise ValueError("a header is cut short") from None


def _struct(raw: bytes, offset: int, depth: int) -> tuple[Struct, int]:
    fields: Struct = {}
    number = 0
    while kind := raw[offset] & 15:
        step, offset = raw[offset] >> 4, offset + 1
        if step:
            number += step
        else:
            number, offset = _zigzag(raw, offset)
        fields[number], offset = _value(raw, offset, kind, depth)
    return fields, offset + 1


def _value(raw: bytes, offset: int, kind: int, depth: int) -> tuple[Any, int]:
    """One value of a kind: a number, a struct, a list, or None for what is not asked for."""
    if kind in (1, 2):  # a boolean lies in its kind
        return None, offset
    if kind == 3:
        return None, offset + 1
    if kind in (4, 5, 6):
        return _zigzag(raw, offset)
    if kind == 7:
        return None, offset + 8
    if kind == 8:
        length, offset = _varint(raw, offset)
        return None, offset + length
    if kind in (9, 10):
        size, element, offset = raw[offset] >> 4, raw[offset] & 15, offset + 1
        if size == 15:
            size, offset = _varint(raw, offset)
        if element in (1, 2):  # but a byte each in a list
            return None, offset + size
        values = []
        for _ in range(size):
            if offset >= len(raw):
                raise IndexError
            value, offset = _value(raw, offset, element, depth)
            values.append(value)
        return values, offset
    if kind == 12 and depth:
        return _struct(raw, offset, depth - 1)
    raise ValueError("a header is damaged")


def _varint(raw: bytes, offset: int) -> tuple[int, int]:
    value = shift = 0
    while raw[offset] & 128:
        value |= (raw[offset] & 127) << shift
        shift, offset = shift + 7, offset + 1
    return value | raw[offset] << shift, offset + 1


def _zigzag(raw: bytes, offset: int) -> tuple[int, int]:
    value, offset = _varint(raw, offset)
    return (value >> 1) ^ -(value & 1), offset
