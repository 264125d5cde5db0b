"""What a caller gives, as the format stores it: cast where no value changes, refused otherwise."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pyarrow as pa

from polyseme.errors import InputError
from polyseme.store.format import OPTIONAL_COLUMNS, SAFETENSORS_DTYPES, TABLES, table_file


def storable(where: str, name: str, value: np.ndarray) -> np.ndarray:
    """An array as safetensors takes it: contiguous, little-endian, of a dtype that it has."""
    if not isinstance(name, str) or name == "__metadata__":
        raise InputError(f"An array of {where} cannot be named {name!r}.")
    array = np.asarray(value, order="C")
    if array.dtype.name not in SAFETENSORS_DTYPES.values():
        raise InputError(
            f"{name!r} of {where} is {array.dtype}; only booleans, integers and floats are stored."
        )
    return array.astype(array.dtype.newbyteorder("<"), copy=False)


def cast(what: str, array: np.ndarray, dtypes: tuple[str, ...]) -> np.ndarray:
    """Cast to the last of the format's dtypes, if it is of a kind that keeps the values.

    A float may lose precision; nothing may wrap round, overflow or lose a fraction.
    """
    wanted = np.dtype(dtypes[-1])
    whole = wanted.kind == "i"
    if array.dtype.kind not in ("iu" if whole else "iuf"):
        raise InputError(f"{what} is {array.dtype}, not {' or '.join(dtypes)}.")
    with np.errstate(over="ignore"):
        result = array.astype(wanted)
    if whole:
        bounds = np.iinfo(wanted)
        if array.size and (int(array.min()) < bounds.min or int(array.max()) > bounds.max):
            raise InputError(f"{what} has values that {wanted} cannot hold.")
    elif array.dtype.kind == "f" and not np.array_equal(np.isinf(result), np.isinf(array)):
        raise InputError(f"{what} has values that {wanted} cannot hold.")
    return result


def arrow_table(name: str, frame: pd.DataFrame) -> pa.Table:
    """A DataFrame in the format's columns and dtypes, other columns after them."""
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
                # Strings that pandas keeps as Arrow does need not become Python's in between.
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
            # Not from_pandas: a NaN stays one, it does not become a null.
            columns[column] = pa.array(values, from_pandas=False)
    return pa.table(columns)
