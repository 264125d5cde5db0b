"""Files of text, streamed: plain text, JSON Lines and Parquet."""

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
# One document has to fit in memory; a file without a single line end need not be one.
_LONGEST_LINE = 1 << 26
_LONGEST_PAGE = 1 << 27  # in bytes; one is of about a megabyte


File = Path | RemotePath


def suffix_of(path: File) -> str | None:
    """The suffix of a file of text, without ``.gz``; None for any other file."""
    name = path.name.lower()
    return next((s.removesuffix(".gz") for s in SUFFIXES if name.endswith(s)), None)


def files_below(folder: File) -> dict[str, File]:
    """The files of text in a folder and its subfolders, by their names in it, sorted.

    Hidden ones are passed over.
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
    """The encoding's own name; an InputError if Python has no such encoding of text."""
    try:
        "".encode(encoding)
        return codecs.lookup(encoding).name
    except (LookupError, TypeError, ValueError) as error:
        raise InputError(
            f"encoding is {encoding!r}; the name of a text encoding that Python knows is expected, "
            f"such as 'utf-8', 'latin-1' or 'utf-16'."
        ) from error


def read_file(path: File, field: str, encoding: str) -> Iterator[Iterable[str]]:
    """The documents of one file, in order.

    Parameters
    ----------
    path : Path or RemotePath
        A file with one of the suffixes above. Whether text is gzipped is told by its contents.
    field : str
        Which field of a JSON object, or which column, is the text.
    encoding : str
        Of text and JSON Lines.

    Yields
    ------
    iterable of str
        One document, in chunks that do not have to mean anything. A text file is one document.

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
        # Without a bar, as there is one of the analysis already.
        local = path.fetch(shown=False) if isinstance(path, RemotePath) else path
        yield from ((text,) for text in _read_parquet(local, field))


def digest(path: File) -> tuple[int, str]:
    """Size in bytes and sha256 in hexadecimal of a file, read once in bounded memory."""
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
    """The text of a file in chunks; a UTF-8 byte order mark is dropped."""
    decoder = codecs.getincrementaldecoder("utf-8-sig" if encoding == "utf-8" else encoding)()
    n_read = 0
    with file_errors(path, "a file of text"), _opened(path) as file:
        while True:
            chunk = file.read(_CHUNK_BYTES)
            n_read += len(chunk)
            try:
                text = decoder.decode(chunk, final=not chunk)
            except UnicodeDecodeError as error:
                # What the decoder was looking at ends where the bytes given so far end.
                offset = n_read - len(error.object) + error.start
                raise InputError(
                    f"{path}: byte {offset:,} is no {encoding} text ({error.reason}, "
                    f"0x{error.object[error.start] if error.object else 0:02X}); text in "
                    f"{encoding} is expected. Give the file's own with encoding=... (--encoding), "
                    f"such as 'latin-1', or convert the file."
                ) from error
            if text:
                yield text
            if not chunk:
                return


def _lines_of_any_system(chunks: Iterable[str]) -> Iterator[str]:
    """The same text with every line end as a line feed, as Python's own open does."""
    newlines = IncrementalNewlineDecoder(None, translate=True)
    for chunk in chunks:
        yield newlines.decode(chunk)
    yield newlines.decode("", final=True)


def _lines(path: File, encoding: str) -> Iterator[str]:
    # Only line feeds end a line: JSON may hold the other characters that splitlines cuts at.
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
                f"{path}: a line has over {_LONGEST_LINE:,} characters; JSON Lines, one object a "
                f"line, is expected. Write each document on a line of its own."
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
                f"{where}: not JSON ({error}); {_shortened(line)} was found and one object a line "
                f'is expected, such as {{{json.dumps(field)}: "..."}}. Write the file again as '
                f"JSON Lines."
            ) from error
        if not isinstance(row, dict):
            raise InputError(
                f"{where}: the JSON is {_kind(row)}; one object a line is expected, such as "
                f'{{{json.dumps(field)}: "..."}}. Write the file again as JSON Lines.'
            )
        yield text_of(row, field, where)


def text_of(row: dict[str, Any], field: str, where: str) -> str:
    """The text of one row of a data set, or an InputError that says what is there instead."""
    if field not in row:
        raise InputError(
            f"{where}: {one_of('field', field, map(str, row))} Name the one with the text by "
            f"field=... (--field)."
        )
    text = row[field]
    if not isinstance(text, str):
        raise InputError(
            f"{where}: the field {field!r} is {_kind(text)}; text is expected. Name the field with "
            f"the text by field=..., or leave such rows out of the data."
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
                f"{path}: {one_of('field', field, schema.names)} Name the one with the text by "
                f"field=... (--field)."
            )
        kind = schema.field(field).type
        stored = kind.value_type if pa.types.is_dictionary(kind) else kind
        if not (pa.types.is_string(stored) or pa.types.is_large_string(stored)):
            raise InputError(
                f"{path}: the column {field!r} is of type {kind}; text (string) is expected. Name "
                f"the column with the text by field=..., out of: {', '.join(schema.names)}."
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
            # One at a time: a dictionary may hold a long text that many rows repeat.
            for index in texts.indices.to_pylist():
                text = None if index is None else texts.dictionary[index].as_py()
                yield text_of({field: text}, field, f"{path}, row {row:,}")
                row += 1


def _check_pages(path: Path, file: Any, field: str) -> None:
    """Refuse what would not fit in memory, before it is decompressed."""
    from polyseme.parquet import chunks, page_bytes

    paths = [file.schema.column(number).path for number in range(len(file.schema))]
    column = paths.index(field)  # not its place in the schema: another may be nested
    with path.open("rb") as raw:
        for group in chunks(raw.fileno()):
            for size in page_bytes(raw.fileno(), group[column], text=True):
                if size > _LONGEST_PAGE:
                    raise InputError(
                        f"{path}: a page takes {size:,} bytes once it is decompressed; "
                        f"{_LONGEST_PAGE:,} at most are expected. Write it with smaller pages."
                    )
