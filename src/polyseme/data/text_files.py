"""Text files, streamed: plain text, JSON Lines and Parquet."""

from __future__ import annotations

import codecs
import gzip
import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from hashlib import sha256
from io import IncrementalNewlineDecoder
from pathlib import Path
from typing import Any, BinaryIO, cast

from polyseme.data.binary_files import file_errors
from polyseme.errors import InputError, one_of
from polyseme.remote import RemotePath

SUFFIXES = (".txt", ".txt.gz", ".jsonl", ".jsonl.gz", ".parquet")
_CHUNK_BYTES = 1 << 20
_ROWS = 256
# A document must fit in memory, but a file without line ends need not be one document.
_LONGEST_LINE = 1 << 26
_LONGEST_PAGE = 1 << 27  # in bytes; about a megabyte is usual


File = Path | RemotePath


def suffix_of(path: File) -> str | None:
    """The suffix of a text file, without ``.gz``; None for any other file."""
    name = path.name.lower()
    return next((s.removesuffix(".gz") for s in SUFFIXES if name.endswith(s)), None)


def files_below(folder: File) -> dict[str, File]:
    """Text files in a folder and its subfolders, sorted, by path relative to the folder.

    Hidden files are ignored.
    """
    files: Mapping[str, File]
    if isinstance(folder, RemotePath):
        files = folder.files()
        if not files:
            raise folder.nothing()
    else:
        paths = (path for path in folder.rglob("*") if path.is_file())
        files = {path.relative_to(folder).as_posix(): path for path in paths}
    return {
        name: files[name]
        for name in sorted(files, key=lambda name: name.split("/"))
        if suffix_of(files[name]) is not None
        and not any(part.startswith(".") for part in name.split("/"))
    }


def checked_encoding(encoding: str) -> str:
    """The canonical name of an encoding; an InputError if Python has no such text encoding."""
    try:
        "".encode(encoding)
        return codecs.lookup(encoding).name
    except (LookupError, TypeError, ValueError) as error:
        raise InputError(
            f"encoding is {encoding!r}; expected a text encoding that Python knows, such as "
            f"'utf-8', 'latin-1' or 'utf-16'."
        ) from error


def read_file(path: File, field: str, encoding: str) -> Iterator[Iterable[str]]:
    """The documents of one file, in order.

    Parameters
    ----------
    path : Path or RemotePath
        A file with one of the suffixes above. Gzipped text is recognised by its content.
    field : str
        Which field of a JSON object, or which column, is the text.
    encoding : str
        Encoding of text and JSON Lines files.

    Yields
    ------
    iterable of str
        One document, in arbitrary chunks. A text file is one document.

    Raises
    ------
    InputError
        If the file is damaged, is not text in that encoding, or does not have the field.
    """
    suffix = suffix_of(path)
    if suffix == ".txt":
        yield _lines_of_any_system(_decoded(path, encoding))
    elif suffix == ".jsonl":
        yield from ((text,) for text in _read_jsonl(path, field, encoding))
    else:
        # No progress bar here: the analysis shows its own.
        local = path.fetch(shown=False) if isinstance(path, RemotePath) else path
        yield from ((text,) for text in _read_parquet(local, field))


def digest(path: File) -> tuple[int, str]:
    """A file's size in bytes and SHA-256 in hexadecimal, read once in bounded memory."""
    sha, size = sha256(), 0
    with file_errors(path, "a file"), path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            sha.update(chunk)
            size += len(chunk)
    return size, sha.hexdigest()


@contextmanager
def _opened(path: File) -> Iterator[BinaryIO]:
    with path.open("rb") as file:
        gzipped = file.read(2) == b"\x1f\x8b"
        file.seek(0)
        if not gzipped:
            yield file
            return
        with gzip.GzipFile(fileobj=file) as unzipped:
            yield cast(BinaryIO, unzipped)


def _decoded(path: File, encoding: str) -> Iterator[str]:
    """A file's text in chunks, without a UTF-8 byte order mark."""
    decoder = codecs.getincrementaldecoder("utf-8-sig" if encoding == "utf-8" else encoding)()
    n_read = 0
    with file_errors(path, "a text file"), _opened(path) as file:
        while True:
            chunk = file.read(_CHUNK_BYTES)
            n_read += len(chunk)
            try:
                text = decoder.decode(chunk, final=not chunk)
            except UnicodeDecodeError as error:
                # The bytes the decoder was working on end where the bytes read so far end.
                offset = n_read - len(error.object) + error.start
                raise InputError(
                    f"{path}: byte {offset:,} is not {encoding} text ({error.reason}, "
                    f"0x{error.object[error.start] if error.object else 0:02X}); expected text in "
                    f"{encoding}. Give the file's encoding with encoding=... (--encoding), such as "
                    f"'latin-1', or convert the file."
                ) from error
            if text:
                yield text
            if not chunk:
                return


def _lines_of_any_system(chunks: Iterable[str]) -> Iterator[str]:
    """Convert every line end to a line feed, as Python's open does."""
    newlines = IncrementalNewlineDecoder(None, translate=True)
    for chunk in chunks:
        yield newlines.decode(chunk)
    yield newlines.decode("", final=True)


def _lines(path: File, encoding: str) -> Iterator[str]:
    # Only line feeds end a line: JSON may contain the other characters that splitlines splits at.
    held: list[str] = []
    length = 0
    for chunk in _decoded(path, encoding):
        *ended, rest = chunk.split("\n")
        for line in ended:
            yield "".join([*held, line])
            held, length = [], 0
        held.append(rest)
        length += len(rest)
        if length > _LONGEST_LINE:
            raise InputError(
                f"{path}: a line has over {_LONGEST_LINE:,} characters; expected JSON Lines, one "
                f"object per line. Write each document on its own line."
            )
    yield "".join(held)


def _read_jsonl(path: File, field: str, encoding: str) -> Iterator[str]:
    for number, line in enumerate(_lines(path, encoding), 1):
        if not line.strip():
            continue
        where = f"{path}, line {number:,}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise InputError(
                f"{where}: not JSON ({error}); found {_shortened(line)}, expected one object "
                f'per line, such as {{{json.dumps(field)}: "..."}}. Write the file again as '
                f"JSON Lines."
            ) from error
        if not isinstance(row, dict):
            raise InputError(
                f"{where}: the JSON is {_kind(row)}; expected one object per line, such as "
                f'{{{json.dumps(field)}: "..."}}. Write the file again as JSON Lines.'
            )
        yield text_of(row, field, where)


def text_of(row: dict[str, Any], field: str, where: str) -> str:
    """The text of one row of a data set; an InputError if it has none."""
    if field not in row:
        raise InputError(
            f"{where}: {one_of('field', field, map(str, row))} Name the text field with field=... "
            f"(--field)."
        )
    text = row[field]
    if not isinstance(text, str):
        raise InputError(
            f"{where}: the field {field!r} is {_kind(text)}; expected text. Name the text field "
            f"with field=..., or leave such rows out of the data."
        )
    return text


def _kind(value: Any) -> str:
    names = {"NoneType": "null", "dict": "an object", "list": "a list", "bool": "a boolean"}
    kind = type(value).__name__
    return names.get(kind, f"{_shortened(str(value))} of type {kind}")


def _shortened(text: str) -> str:
    text = text.strip()
    return repr(text if len(text) <= 40 else text[:39] + "…")


def _read_parquet(path: Path, field: str) -> Iterator[str]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    with file_errors(path, "a Parquet file"), pq.ParquetFile(path) as file:
        schema = file.schema_arrow
        if field not in schema.names:
            raise InputError(
                f"{path}: {one_of('field', field, schema.names)} Name the text column with "
                f"field=... (--field)."
            )
        kind = schema.field(field).type
        stored = kind.value_type if pa.types.is_dictionary(kind) else kind
        if not (pa.types.is_string(stored) or pa.types.is_large_string(stored)):
            raise InputError(
                f"{path}: the column {field!r} is of type {kind}; expected text (string). Name the "
                f"text column with field=..., one of: {', '.join(schema.names)}."
            )
        _check_pages(path, file, field)
    row = 0
    with (
        file_errors(path, "a Parquet file"),
        pq.ParquetFile(path, metadata=file.metadata, read_dictionary=[field]) as file,
    ):
        for batch in file.iter_batches(_ROWS, columns=[field], use_threads=False):
            texts = batch.column(0).dictionary_encode()
            texts.validate(full=True)
            # One row at a time: many rows may repeat one long text of the dictionary.
            for index in texts.indices.to_pylist():
                text = None if index is None else texts.dictionary[index].as_py()
                yield text_of({field: text}, field, f"{path}, row {row:,}")
                row += 1


def _check_pages(path: Path, file: Any, field: str) -> None:
    """Refuse pages that would not fit in memory, before decompressing them."""
    from polyseme.parquet import chunks, page_bytes

    paths = [file.schema.column(number).path for number in range(len(file.schema))]
    column = paths.index(field)  # not its position in the schema, as other columns may be nested
    with path.open("rb") as raw:
        for group in chunks(raw.fileno()):
            for size in page_bytes(raw.fileno(), group[column], text=True):
                if size > _LONGEST_PAGE:
                    raise InputError(
                        f"{path}: a page takes {size:,} bytes when decompressed; expected at most "
                        f"{_LONGEST_PAGE:,}. Write it with smaller pages."
                    )
