"""Texts from any storage, streamed document by document."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Generator, Iterable, Iterator, Sized
from contextlib import closing
from dataclasses import dataclass
from hashlib import sha256
from itertools import chain
from pathlib import Path
from typing import Any

from polyseme.data.binary_files import is_hub_name, missing_path
from polyseme.data.hub import hub_rows
from polyseme.data.text_files import (
    SUFFIXES,
    File,
    checked_encoding,
    digest,
    files_below,
    read_file,
    suffix_of,
    text_of,
)
from polyseme.errors import InputError
from polyseme.remote import RemotePath, is_url

_ACCEPTED = (
    f"Accepted are a file that ends in {', '.join(SUFFIXES)}, a folder of such files, a URL of "
    f"either, a Hub data set as 'owner/name', and a list or iterable of texts."
)
# In characters. A part has at least the first number, unless the document ends earlier.
_PART = 1 << 16
_LONGEST_PART = 1 << 20
_LISTED = 100  # files
_LINE_START = re.compile(r"\n\S")
_TO_LAST_WORD_END = re.compile(r".*\S(?=\s)", re.DOTALL)

Documents = Iterator[Iterable[str]]


@dataclass(frozen=True)
class Part:
    """A stretch of one document."""

    text: str
    """From 1 to 1,048,576 characters."""
    first: bool
    """Whether a document begins here; if not, the text continues the previous part."""


def cut(chunks: Iterable[str]) -> Iterator[str]:
    """Cut one document into parts, at places that do not depend on how it is chunked.

    A document of up to 65,536 characters stays whole. A longer one is cut at the first line after
    that many characters that begins without white space. If there is none within 1,048,576
    characters, it is cut after the last line end; if there is no line end, before the last white
    space; failing that too, after 1,048,576 characters.

    Parameters
    ----------
    chunks : iterable of str
        The document, in chunks of any size.

    Yields
    ------
    str
        Not empty. Joined, the parts give the document.
    """
    held = ""
    for chunk in chunks:
        held += chunk
        start = 0
        while len(held) - start > _LONGEST_PART:
            end = _part_end(held, start)
            yield held[start:end]
            start = end
        held = held[start:]
    start = 0
    while start < len(held):
        end = _part_end(held, start)
        yield held[start:end]
        start = end


def _part_end(text: str, start: int) -> int:
    """End of the part that begins at ``start``."""
    limit = start + _LONGEST_PART
    if match := _LINE_START.search(text, start + _PART - 1, limit + 1):
        return match.start() + 1
    if len(text) <= limit:
        return len(text)
    if (line_end := text.rfind("\n", start, limit)) >= 0:
        return line_end + 1
    # Before the space, not after it: most tokenizers attach a space to the next word.
    match = _TO_LAST_WORD_END.match(text, start, limit + 1)
    return match.end() if match else limit


class Texts:
    """Documents in a fixed order, streamed. Made by `read_text`.

    Attributes
    ----------
    name : str
        What a run's metadata calls the data.
    reiterable : bool
        Whether it can be read more than once: true of everything but an iterator.
    """

    def __init__(
        self,
        name: str,
        read: Callable[[], Documents],
        identity: Callable[[], dict[str, Any]],
        *,
        reiterable: bool = True,
    ) -> None:
        self.name = name
        self.reiterable = reiterable
        self._read = read
        self._identity = identity
        self._begun = False

    def __repr__(self) -> str:
        return f"Texts({self.name!r})"

    def parts(self) -> Iterator[Part]:
        """Iterate over the documents in parts of bounded length, the same parts every time.

        Empty documents are skipped.

        Yields
        ------
        Part
            Cut as `cut` does: a document of up to 65,536 characters is one part.

        Raises
        ------
        InputError
            If the source is damaged or not text, or is an iterator that was already read.
        """
        if self._begun and not self.reiterable:
            raise InputError(
                f"{self.name} is an iterator that was already read, and it can be read only once. "
                f"Create it again, or give a list, a file or an object whose __iter__ starts over."
            )
        self._begun = True
        return self._parts()

    def _parts(self) -> Generator[Part, None, None]:
        for number, chunks in enumerate(self._read()):
            first = True
            for text in cut(chunks):
                if not text.isascii():
                    self._check_characters(text, number)
                yield Part(text, first)
                first = False

    def _check_characters(self, text: str, number: int) -> None:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InputError(
                f"{self.name}: document {number:,} holds U+{ord(text[error.start]):04X}, half of a "
                f"surrogate pair, which is not a character, so no tokenizer accepts it. Repair the "
                f"text, for example with text.encode('utf-8', 'replace').decode()."
            ) from error

    def documents(self) -> Iterator[str]:
        """Iterate over whole documents, in order.

        A .txt file is one document, so all of it is held in memory; `parts` avoids this.

        Yields
        ------
        str
            Not empty.

        Raises
        ------
        InputError
            As for `parts`.
        """
        return _joined(self.parts())

    def identity(self) -> dict[str, Any]:
        """What identifies this data, as JSON-serialisable values.

        Returns
        -------
        dict
            ``name``, and: for files, ``files``, each with its name, size in bytes and sha256 (for
            more than 100, their number and their total bytes and sha256), and how they are read;
            for files at a URL, the storage's own stamp, an ETag or a date, instead of the sha256,
            so that they need not be read; for texts in memory, their number and sha256; for a Hub
            data set, its split and field. Local files are read once for this.
        """
        return {"name": self.name, **self._identity()}


def _joined(parts: Iterator[Part]) -> Iterator[str]:
    held: list[str] = []
    for part in parts:
        if part.first and held:
            yield "".join(held)
            held = []
        held.append(part.text)
    if held:
        yield "".join(held)


def read_text(
    source: str | Path | Iterable[str] | None = None,
    *,
    field: str = "text",
    split: str = "train",
    encoding: str = "utf-8",
) -> Texts:
    """Read documents from files, the Hugging Face Hub or memory, streamed in a fixed order.

    This reads only enough to check that there is some text. The rest is read when needed, and
    raises its errors then.

    Parameters
    ----------
    source : str, Path or iterable of str, optional
        - A ``.txt`` file: one document. Line ends are converted to line feeds.
        - A ``.jsonl`` file: one object per line, with its text in ``field``. Blank lines are
          skipped.
        - A ``.parquet`` file with a column ``field``.
        - A gzipped ``.txt`` or ``.jsonl`` file, with ``.gz`` after its suffix.
        - A folder of such files, including subfolders, sorted by path. Other files and hidden ones
          are ignored.
        - The URL of such a file or folder, or a pattern: ``s3://bucket/corpus/*.txt``. Parquet
          files are copied to the cache; others are streamed.
        - A Hugging Face Hub data set (needs datasets): ``owner/name``, or
          ``owner/name:configuration`` if it has several. It is streamed.
        - A list of texts, or any iterable. An iterator can be read only once.
        - None for English text that comes with Python: the ``help()`` topics on the language, 79
          documents with 465,000 characters in total in Python 3.11.
    field : str, default "text"
        Name of the text field or column in JSON Lines, Parquet and Hub data sets.
    split : str, default "train"
        Which split of a Hub data set.
    encoding : str, default "utf-8"
        Encoding of text and JSON Lines files.

    Returns
    -------
    Texts

    Raises
    ------
    InputError
        If the source does not exist, is damaged or holds no text, or if an argument does not apply
        to it.
    MissingDependencyError
        If datasets is needed but not installed.
    """
    encoding = checked_encoding(encoding)
    changed = {"field": field != "text", "split": split != "train", "encoding": encoding != "utf-8"}
    if source is None:
        _refuse(changed, "the texts that come with Python", ())
        return _python_topics()
    if not isinstance(source, str | Path):
        _refuse(changed, f"a {type(source).__name__}", ())
        return _from_memory(source)
    if not str(source):
        raise InputError(f"source is {source!r}, an empty path. {_ACCEPTED}")
    if is_url(source):
        return _checked(_from_files(RemotePath(str(source)), field, encoding, changed))
    path = Path(source).expanduser()
    try:
        if is_hub_name(source) and not path.exists():
            _refuse(changed, f"the Hub data set {str(source)!r}", ("field", "split"))
            return _checked(_from_hub(str(source), split, field))
        texts = _from_files(path, field, encoding, changed)
    except OSError as error:
        raise InputError(
            f"{str(source)[:200]!r} could not be read ({error.strerror or error}). Check the path "
            f"and your permission to read it; to give a text itself, put it in a list, [text]."
        ) from error
    return _checked(texts)


def _refuse(changed: dict[str, bool], what: str, applying: tuple[str, ...]) -> None:
    """Refuse an argument that would have no effect."""
    for argument, is_given in changed.items():
        if is_given and argument not in applying:
            raise InputError(
                f"{argument} was given for {what}, to which it does not apply. Leave it out."
            )


def _checked(texts: Texts) -> Texts:
    with closing(texts._parts()) as parts:
        if not any(part.text.strip() for part in parts):
            raise _empty(texts.name)
    return texts


def _empty(name: str) -> InputError:
    return InputError(
        f"{name} holds no text; expected at least one document with a character other than white "
        f"space. Check that it is the source you meant."
    )


def _from_files(path: File, field: str, encoding: str, changed: dict[str, bool]) -> Texts:
    if isinstance(path, Path) and not path.exists():
        raise missing_path(path, _ACCEPTED)
    if isinstance(path, RemotePath) or path.is_dir():
        files = files_below(path)
        if not files:
            raise InputError(f"{path}: the folder holds no text files. {_ACCEPTED}")
    else:
        files = {path.name: path}
        if suffix_of(path) is None or not path.is_file():
            raise InputError(f"{path}: polyseme cannot read this as text. {_ACCEPTED}")
    suffixes = {suffix_of(file) for file in files.values()}
    fields, characters = suffixes - {".txt"}, suffixes - {".parquet"}
    applying = ("field",) * bool(fields) + ("encoding",) * bool(characters)
    _refuse(changed, str(path), applying)

    def identity() -> dict[str, Any]:
        listed = [{"name": name, **_identity_of_file(file)} for name, file in files.items()]
        known = {"field": field, "encoding": encoding}
        return {**_identity_of_files(listed), **{name: known[name] for name in applying}}

    return Texts(
        path.name if isinstance(path, RemotePath) else path.resolve().name,
        lambda: chain.from_iterable(read_file(file, field, encoding) for file in files.values()),
        identity,
    )


def _identity_of_file(file: File) -> dict[str, Any]:
    if isinstance(file, RemotePath) and (stamp := file.stamp) is not None:
        return {"bytes": file.size, "stamp": stamp}
    size, sha = digest(file)
    return {"bytes": size, "sha256": sha}


def _identity_of_files(listed: list[dict[str, Any]]) -> dict[str, Any]:
    """Identities of the files; beyond `_LISTED`, which would bloat run.json, one for all."""
    if len(listed) <= _LISTED:
        return {"files": listed}
    return {
        "n_files": len(listed),
        "bytes": sum(file["bytes"] for file in listed),
        "sha256": sha256(json.dumps(listed).encode()).hexdigest(),
    }


def _from_hub(name: str, split: str, field: str) -> Texts:
    rows = hub_rows(name, split)

    def read() -> Documents:
        for number, row in enumerate(rows()):
            yield (text_of(row, field, f"{name!r} ({split}), row {number:,}"),)

    return Texts(f"{name} ({split})", read, lambda: {"split": split, "field": field})


def _python_topics() -> Texts:
    from pydoc_data.topics import topics

    documents = [topics[topic] for topic in sorted(topics)]
    return Texts(
        "pydoc_data.topics",
        lambda: ((document,) for document in documents),
        lambda: _identity_in_memory(documents),
    )


def _from_memory(source: Any) -> Texts:
    kind = type(source).__name__
    # The order of a set differs from one process to the next.
    if isinstance(source, bytes | bytearray | dict | set | frozenset | Texts) or not isinstance(
        source, Iterable
    ):
        raise InputError(f"source is a {kind}, which cannot be read as texts. {_ACCEPTED}")
    if iter(source) is source:
        return _from_iterator(source, kind)
    listed = source if isinstance(source, list | tuple) else None
    size = {"n": len(source)} if isinstance(source, Sized) else {}
    return _checked(
        Texts(
            kind,
            lambda: ((text,) for text in _strings(source, kind)),
            lambda: dict(size) if listed is None else _identity_in_memory(listed),
        )
    )


def _from_iterator(source: Iterator[str], kind: str) -> Texts:
    texts, taken = _strings(source, kind), []
    for text in texts:
        taken.append(text)
        if text.strip():
            break
    else:
        raise _empty(f"The {kind}")
    return Texts(
        kind,
        lambda: ((text,) for text in chain(taken, texts)),
        dict,
        reiterable=False,
    )


def _strings(items: Iterable[Any], kind: str) -> Iterator[str]:
    for number, item in enumerate(items):
        if not isinstance(item, str):
            hint = " Extract it from each row first: (row['text'] for row in data)."
            raise InputError(
                f"Item {number:,} of the {kind} is a {type(item).__name__}; expected a "
                f"str.{hint if isinstance(item, dict) else ' Remove or convert it.'}"
            )
        yield item


def _identity_in_memory(documents: list[str] | tuple[str, ...]) -> dict[str, Any]:
    sha = sha256()
    for document in documents:
        encoded = document.encode("utf-8", "surrogatepass")
        # Each document is preceded by its length, so that the digest covers where documents end.
        sha.update(b"%d:" % len(encoded))
        sha.update(encoded)
    return {"n": len(documents), "sha256": sha.hexdigest()}
