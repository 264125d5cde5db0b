"""The Parquet tables of a run: written in small groups of rows, read whole or in parts."""

from __future__ import annotations

from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from polyseme.store.damage import decoding
from polyseme.store.format import OPTIONAL_COLUMNS, TABLES, Problem, table_file

# What is read where one neuron's rows are wanted: 80 neurons of 100 examples.
ROWS_IN_GROUP = 2**13


def write_table(table: pa.Table, file: Path) -> None:
    """Write one table, so that equal tables are equal bytes."""
    pq.write_table(
        table,
        file,
        version="2.6",
        data_page_version="1.0",
        compression="zstd",
        compression_level=3,
        row_group_size=ROWS_IN_GROUP,
        use_dictionary=["site"],
        # Whose rows a group holds: any reader of Parquet can then skip the others.
        write_statistics=["site", "neuron"],
        write_page_checksum=True,
        store_schema=False,
    )


class Table:
    """One table of a run, with no trust in it. Made by `RunFolder`.

    Parameters
    ----------
    name : str
        Which one, as in `TABLES`.
    locate : callable
        Path of a file of the run, checked anew.
    sites : collection of str
        The names that the column ``site`` may hold.

    Attributes
    ----------
    n_rows : int

    Raises
    ------
    Problem
        From the constructor and from `read`: it cannot be decoded, or its columns are not
        what the format asks.
    """

    def __init__(self, name: str, locate: Callable[[str], Path], sites: Collection[str]) -> None:
        self.file = table_file(name)
        self._columns = TABLES[name]
        self._optional = OPTIONAL_COLUMNS[name]
        self._locate = locate
        self._sites = frozenset(sites)
        # Neighbours are often asked for one after the other, and share a row group.
        self._last: tuple[tuple[int, int], pd.DataFrame] | None = None
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
                f"its row groups have {sum(sizes)} rows, its footer says {self.n_rows}",
            )
        self._ends = np.cumsum(sizes, dtype=np.int64)

    @property
    def columns(self) -> list[str]:
        """The names of its columns."""
        return list(self._schema.names)

    def read(self, start: int = 0, stop: int | None = None) -> pd.DataFrame:
        """Rows ``start`` to ``stop - 1``, by default all; numbered from 0.

        Only the row groups that hold them are read.
        """
        stop = self.n_rows if stop is None else stop
        first = int(np.searchsorted(self._ends, start, side="right"))
        last = max(first, int(np.searchsorted(self._ends, stop, side="left")) + 1)
        last = min(last, len(self._ends))
        held = self._last
        if held is None or held[0] != (first, last):
            held = (first, last), self._groups(range(first, last))
            # One thread's group may replace another's: both are right.
            self._last = None if start == 0 and stop == self.n_rows else held
        before = int(self._ends[first - 1]) if first else 0
        return held[1].iloc[start - before : stop - before].reset_index(drop=True)

    def column(self, name: str) -> pd.Series[Any]:
        """All rows of one column, without reading the others."""
        self._check_columns()
        if name not in self._schema.names:
            raise Problem(self.file, f"the column {name!r} is missing")
        path = self._locate(self.file)
        with (
            decoding(self.file),
            pq.ParquetFile(path, metadata=self._footer, page_checksum_verification=True) as opened,
        ):
            data = opened.read(columns=[name]).column(0)
            data.validate(full=True)
            values: pd.Series[Any] = data.to_pandas()
        if len(values) != self.n_rows or data.null_count:
            raise Problem(self.file, f"the column {name!r} has nulls, or is cut short")
        return values

    def _groups(self, groups: range) -> pd.DataFrame:
        path = self._locate(self.file)
        self._check_columns()
        with (
            decoding(self.file),
            # The dictionary keeps a site's name from being repeated in memory for each row.
            pq.ParquetFile(
                path,
                metadata=self._footer,
                read_dictionary=["site"],
                page_checksum_verification=True,
            ) as opened,
        ):
            data = opened.read_row_groups(list(groups), use_threads=len(groups) > 2)
            data.validate(full=True)
        expected = int(self._ends[groups[-1]] if groups else 0)
        expected -= int(self._ends[groups[0] - 1]) if groups and groups[0] else 0
        if data.num_rows != expected:
            raise Problem(self.file, f"it holds {data.num_rows} rows where it says {expected}")
        known = [*self._columns, *(c for c in self._optional if c in data.column_names)]
        columns: dict[str, Any] = {}
        for column in [*known, *(c for c in data.column_names if c not in known)]:
            values = data.column(column)
            if column in known and values.null_count:
                raise Problem(self.file, f"the column {column!r} has nulls")
            with decoding(self.file):
                columns[column] = (
                    self._site_names(values) if column == "site" else values.to_pandas()
                )
        return pd.DataFrame(columns)

    def _check_columns(self) -> None:
        name, schema = self.file, self._schema
        if len(set(schema.names)) != len(schema.names):
            raise Problem(name, "it has two columns of the same name")
        for column, dtype in {**self._columns, **self._optional}.items():
            if column not in schema.names:
                if column in self._optional:
                    continue
                raise Problem(name, f"the column {column!r} is missing")
            given = schema.field(column).type
            if pa.types.is_dictionary(given):
                given = given.value_type
            text = pa.types.is_string(given) or pa.types.is_large_string(given)
            if not (text if dtype == "str" else given == pa.type_for_alias(dtype)):
                raise Problem(name, f"the column {column!r} is {given}, not {dtype}")
        for column in schema.names:
            given = schema.field(column).type
            plain = (
                pa.types.is_integer(given)
                or pa.types.is_floating(given)
                or pa.types.is_boolean(given)
                or pa.types.is_string(given)
                or pa.types.is_large_string(given)
            )
            if column not in self._columns and not plain:
                raise Problem(
                    name, f"the extra column {column!r} is {given}, not numbers, booleans or text"
                )

    def _site_names(self, values: pa.ChunkedArray) -> pd.Series:
        for chunk in values.chunks:
            if not self._sites.issuperset(chunk.dictionary.to_pylist()):
                raise Problem(self.file, "it names a site that run.json does not have")
        # The dtype is named, as pandas guesses another one where there are no rows.
        names: pd.Series[Any] = values.cast(pa.large_string()).to_pandas().astype(str)
        return names
