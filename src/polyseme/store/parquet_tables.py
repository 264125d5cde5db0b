"""The Parquet tables of a run: written in small row groups, read whole or in part."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from polyseme.errors import InputError
from polyseme.parquet import Chunk, chunks, page_bytes
from polyseme.store.files import decoding
from polyseme.store.format import OPTIONAL_COLUMNS, TABLES, Problem, table_file
from polyseme.store.safetensors_files import cast

# The least that a reader of one neuron's rows has to read: 80 neurons of 100 examples.
ROWS_IN_GROUP = 2**13
# Limits on a table's memory, far above any real table, which has few columns and whose text
# compresses only a few times.
MOST_BYTES = 2**20
MOST_BYTES_PER_ROW = 512
MOST_BYTES_PER_BYTE = 16


def write_table(table: pa.Table, file: Path) -> None:
    """Write one table; equal tables give equal bytes."""
    pq.write_table(
        table,
        file,
        version="2.6",
        data_page_version="1.0",
        compression="zstd",
        compression_level=3,
        row_group_size=ROWS_IN_GROUP,
        use_dictionary=["site"],
        # Statistics on these columns let any Parquet reader skip row groups of other neurons.
        write_statistics=["site", "neuron"],
        write_page_checksum=True,
        store_schema=False,
    )


class Table:
    """One untrusted table of a run. Made by `RunFolder`.

    Parameters
    ----------
    name : str
        Name of the table, as in `TABLES`.
    locate : callable
        Returns the path of a file of the run, checked on each call.
    sites : collection of str
        Names allowed in the column ``site``.

    Attributes
    ----------
    n_rows : int

    Raises
    ------
    Problem
        From the constructor and `read`: it cannot be decoded, or its columns do not conform to the
        format.
    """

    def __init__(self, name: str, locate: Callable[[str], Path], sites: Collection[str]) -> None:
        self.file = table_file(name)
        self._columns = TABLES[name]
        self._optional = OPTIONAL_COLUMNS[name]
        self._locate = locate
        self._sites = frozenset(sites)
        # Neighbouring neurons are often read in turn, and share a row group.
        self._last: tuple[tuple[int, int], pd.DataFrame] | None = None
        self._chunks: list[list[Chunk]] | None = None
        path = locate(self.file)
        with decoding(self.file), pq.ParquetFile(path) as opened:
            self._footer = opened.metadata
            self.n_rows = self._footer.num_rows
            groups = range(self._footer.num_row_groups)
            sizes = [self._footer.row_group(group).num_rows for group in groups]
            self._schema = opened.schema_arrow
        if min(sizes, default=0) < 0 or sum(sizes) != self.n_rows:
            raise Problem(
                self.file,
                f"its row groups have {sum(sizes)} rows, but its footer says {self.n_rows}",
            )
        self._ends = np.cumsum(sizes, dtype=np.int64)

    @property
    def columns(self) -> list[str]:
        """Names of its columns."""
        return list(self._schema.names)

    def read(self, start: int = 0, stop: int | None = None) -> pd.DataFrame:
        """Rows ``start`` to ``stop - 1``, by default all, indexed from 0.

        Reads only the row groups that hold them.
        """
        stop = self.n_rows if stop is None else stop
        first = int(np.searchsorted(self._ends, start, side="right"))
        last = max(first, int(np.searchsorted(self._ends, stop, side="left")) + 1)
        last = min(last, len(self._ends))
        held = self._last
        if held is None or held[0] != (first, last):
            held = (first, last), self._groups(range(first, last))
            # Threads may overwrite each other's cached group; either is correct.
            self._last = None if start == 0 and stop == self.n_rows else held
        before = int(self._ends[first - 1]) if first else 0
        return held[1].iloc[start - before : stop - before].reset_index(drop=True)

    def column(self, name: str) -> pd.Series[Any]:
        """All rows of one column, without reading the others."""
        if name not in self._schema.names:
            raise Problem(self.file, f"the column {name!r} is missing")
        data = self._decoded(range(len(self._ends)), [name])
        values: pd.Series[Any] = self._plain(name, data.column(0))
        return values

    def _groups(self, groups: range) -> pd.DataFrame:
        data = self._decoded(groups, self._schema.names)
        known = [*self._columns, *(c for c in self._optional if c in data.column_names)]
        names = [*known, *(c for c in data.column_names if c not in known)]
        return pd.DataFrame({name: self._plain(name, data.column(name)) for name in names})

    def _decoded(self, groups: range, columns: Sequence[str]) -> pa.Table:
        """Some columns of some row groups; dictionary-encoded text, so that it is not repeated."""
        self._check_columns()
        path = self._locate(self.file)
        rows = int(self._ends[groups[-1]] if groups else 0)
        rows -= int(self._ends[groups[0] - 1]) if groups and groups[0] else 0
        text = [name for name in columns if _is_text(self._schema.field(name).type)]
        with decoding(self.file):
            most = self._most_bytes(path, rows)
            if self._bytes(path, groups, columns, text, most) > most:
                raise Problem(self.file, f"it would take over {most:,} bytes of memory")
            with pq.ParquetFile(
                path, metadata=self._footer, read_dictionary=text, page_checksum_verification=True
            ) as opened:
                data = opened.read_row_groups(
                    list(groups), columns=list(columns), use_threads=len(groups) > 2
                )
            data.validate(full=True)
            if sum(_length(data.column(name)) for name in text if name != "site") > most:
                raise Problem(self.file, f"its text would take over {most:,} bytes of memory")
        if data.num_rows != rows:
            raise Problem(self.file, f"it holds {data.num_rows} rows but claims {rows}")
        return data

    @staticmethod
    def _most_bytes(path: Path, rows: int) -> int:
        return MOST_BYTES + MOST_BYTES_PER_ROW * rows + MOST_BYTES_PER_BYTE * path.stat().st_size

    def _bytes(
        self, path: Path, groups: range, columns: Sequence[str], text: Collection[str], most: int
    ) -> int:
        """Size in bytes once decoded; once over `most`, only a lower bound."""
        names = self._schema.names
        file = os.open(path, os.O_RDONLY)
        try:
            if self._chunks is None:
                self._chunks = chunks(file)
            total: int = 0
            for number in groups:
                for name in columns:
                    chunk = self._chunks[number][names.index(name)]
                    total += 8 * chunk.rows + chunk.stop - chunk.start
                    for size in page_bytes(file, chunk, text=name in text):
                        total += size
                        if total > most:
                            return total
            return total
        finally:
            os.close(file)

    def _plain(self, name: str, values: pa.ChunkedArray) -> Any:
        known = name in self._columns or name in self._optional
        if known and values.null_count:
            raise Problem(self.file, f"the column {name!r} has nulls")
        with decoding(self.file):
            if name == "site":
                return self._site_names(values)
            return (values.cast(pa.large_string()) if _is_text(values.type) else values).to_pandas()

    def _check_columns(self) -> None:
        name, schema = self.file, self._schema
        if len(set(schema.names)) != len(schema.names):
            raise Problem(name, "it has two columns of the same name")
        for column, dtype in {**self._columns, **self._optional}.items():
            if column not in schema.names:
                if column in self._optional:
                    continue
                raise Problem(name, f"the column {column!r} is missing")
            kind = schema.field(column).type
            if not (_is_text(kind) if dtype == "str" else kind == pa.type_for_alias(dtype)):
                raise Problem(name, f"the column {column!r} is {kind}, not {dtype}")
        for column in schema.names:
            kind = schema.field(column).type
            plain = (
                pa.types.is_integer(kind)
                or pa.types.is_floating(kind)
                or pa.types.is_boolean(kind)
                or _is_text(kind)
            )
            if not plain:
                raise Problem(
                    name, f"the extra column {column!r} is {kind}, not numbers, booleans or text"
                )

    def _site_names(self, values: pa.ChunkedArray) -> pd.Series:
        for chunk in values.chunks:
            if not self._sites.issuperset(chunk.dictionary.to_pylist()):
                raise Problem(self.file, "it names a site that run.json does not have")
        # Explicit dtype, as pandas guesses another if there are no rows.
        names: pd.Series[Any] = values.cast(pa.large_string()).to_pandas().astype(str)
        return names


def _is_text(kind: pa.DataType) -> bool:
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


def _length(values: pa.ChunkedArray) -> int:
    """Size in bytes of a text column once dictionary-decoded."""
    return sum(
        int(pc.sum(pc.take(pc.binary_length(chunk.dictionary), chunk.indices)).as_py() or 0)
        for chunk in values.chunks
    )


def arrow_table(name: str, frame: pd.DataFrame) -> pa.Table:
    """Convert a DataFrame to the format's columns and dtypes, followed by any other columns."""
    required = TABLES[name]
    schema = {**required, **{c: d for c, d in OPTIONAL_COLUMNS[name].items() if c in frame}}
    file = table_file(name)
    if not frame.columns.is_unique or not all(isinstance(column, str) for column in frame.columns):
        raise InputError(f"The columns of {file} must be distinct strings: {list(frame.columns)}.")
    missing = [column for column in required if column not in frame.columns]
    if missing:
        raise InputError(
            f"{file} needs the column {missing[0]!r}; it must have {', '.join(required)}."
        )
    columns = {}
    for column in [*schema, *(c for c in frame.columns if c not in schema)]:
        series = frame[column]
        what = f"The column {column!r} of {file}"
        if schema.get(column) == "str" or (
            column not in schema and series.dtype.kind not in "biuf"
        ):
            try:
                # Arrow-backed pandas strings need no conversion to Python strings.
                text = series if isinstance(series.dtype, pd.StringDtype) else series.astype(object)
                columns[column] = pa.array(text, pa.string(), from_pandas=True)
            except pa.ArrowException as error:
                raise InputError(f"{what} must hold text only: {error}.") from None
        else:
            values = series.to_numpy()
            if column in schema:
                values = cast(what, values, (schema[column],))
            elif values.dtype.kind not in "biuf":
                raise InputError(f"{what} must be plain numbers, without missing values.")
            # Not from_pandas: NaN must stay NaN, not become null.
            columns[column] = pa.array(values, from_pandas=False)
    return pa.table(columns)
