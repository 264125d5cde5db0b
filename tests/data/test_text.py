"""Texts from files and from memory: all of them, in order, streamed; damaged ones are refused."""

from __future__ import annotations

import gzip
import json
import re
import tracemalloc
from collections.abc import Iterable, Iterator
from hashlib import sha256
from itertools import pairwise
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from polyseme.data import Part, Texts, read_text, text, text_files
from polyseme.errors import InputError

DOCUMENTS = ["One.\n\nTwo, naïve 🦜\n", "three\u2028still three", " four "]


def write(path: Path, documents: list[str], field: str = "text") -> Path:
    """A file of the documents, in the format that its suffixes name."""
    if path.suffix == ".parquet":
        pq.write_table(pa.table({"n": range(len(documents)), field: documents}), path)
        return path
    if ".jsonl" in path.name:
        rows = [json.dumps({"n": 1, field: d}, ensure_ascii=False) for d in documents]
        data = "\n\n".join(rows).encode()
    else:
        data = "".join(documents).encode()
    path.write_bytes(gzip.compress(data, mtime=0) if path.suffix == ".gz" else data)
    return path


def documents(source: Any, **options: Any) -> list[str]:
    return list(read_text(source, **options).documents())


# Every source.


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".JSONL", ".parquet"])
def test_documents_are_read_back(tmp_path: Path, suffix: str) -> None:
    path = write(tmp_path / f"x{suffix.lower()}", DOCUMENTS).rename(tmp_path / f"x{suffix}")
    texts = read_text(path)
    assert list(texts.documents()) == DOCUMENTS
    assert list(texts.documents()) == DOCUMENTS
    assert texts.reiterable
    assert texts.name == path.name
    assert documents(str(write(tmp_path / f"y{suffix.lower()}", DOCUMENTS, "b")), field="b") == (
        DOCUMENTS
    )


@pytest.mark.parametrize("suffix", [".txt", ".txt.gz"])
def test_a_text_file_is_one_document(tmp_path: Path, suffix: str) -> None:
    texts = read_text(write(tmp_path / f"x{suffix}", DOCUMENTS))
    assert list(texts.documents()) == ["".join(DOCUMENTS)]
    assert list(texts.parts()) == [Part("".join(DOCUMENTS), True)]


def test_gzip_is_told_by_the_contents_not_by_the_name(tmp_path: Path) -> None:
    write(tmp_path / "x.txt.gz", ["a"]).rename(tmp_path / "x.txt")
    assert documents(tmp_path / "x.txt") == ["a"]
    write(tmp_path / "y.txt", ["b"]).rename(tmp_path / "y.txt.gz")
    assert documents(tmp_path / "y.txt.gz") == ["b"]


def test_a_folder_is_read_in_order_of_paths(tmp_path: Path) -> None:
    for name in ("b.txt", "a.jsonl", "c/d.parquet", "c/a.txt.gz", ".hidden/x.txt", "c/.x.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write(tmp_path / name, [name])
    (tmp_path / "README.md").write_text("not read")
    (tmp_path / "empty.txt").touch()
    texts = read_text(tmp_path)
    assert list(texts.documents()) == ["a.jsonl", "b.txt", "c/a.txt.gz", "c/d.parquet"]
    names = [file["name"] for file in texts.identity()["files"]]
    assert names == ["a.jsonl", "b.txt", "c/a.txt.gz", "c/d.parquet", "empty.txt"]
    assert texts.name == tmp_path.name


class Starting:
    """An iterable that starts over, without a length."""

    def __iter__(self) -> Iterator[str]:
        return iter(DOCUMENTS)


@pytest.mark.parametrize("source", [DOCUMENTS, tuple(DOCUMENTS), Starting()])
def test_iterables_are_read_again_and_again(source: Iterable[str]) -> None:
    texts = read_text(source)
    assert texts.reiterable
    assert list(texts.documents()) == list(texts.documents()) == DOCUMENTS
    assert texts.name == type(source).__name__


def test_an_iterator_is_read_once() -> None:
    texts = read_text(d for d in ["", " ", *DOCUMENTS])
    assert not texts.reiterable
    assert list(texts.documents()) == [" ", *DOCUMENTS]
    with pytest.raises(InputError, match=r"^generator is an iterator that was already read.*again"):
        texts.parts()


def test_an_iterator_is_not_read_ahead() -> None:
    taken = []

    def endless() -> Iterator[str]:
        while True:
            taken.append(1)
            yield f"document {len(taken)}"

    texts = read_text(endless())
    assert len(taken) == 1
    found = texts.documents()
    assert [next(found), next(found)] == ["document 1", "document 2"]
    assert len(taken) <= 3


def test_documents_without_a_character_are_passed_over(tmp_path: Path) -> None:
    path = write(tmp_path / "x.jsonl", ["", "a", "", "", "\n", "b", ""])
    assert documents(path) == ["a", "\n", "b"]
    assert [part.first for part in read_text(path).parts()] == [True] * 3


def test_without_a_source_it_is_the_documentation_of_python() -> None:
    texts = read_text()
    assert list(texts.documents()) == [topics[topic] for topic in sorted(topics)]
    assert texts.name == "pydoc_data.topics"
    assert texts.identity()["n"] == len(topics)


def test_byte_order_marks_line_ends_and_encodings(tmp_path: Path) -> None:
    path = tmp_path / "x.txt"
    path.write_bytes(b"\xef\xbb\xbfone\r\ntwo\rthree\n\r\n")
    assert documents(path) == ["one\ntwo\nthree\n\n"]
    path.write_bytes(b"one\r")
    assert documents(path) == ["one\n"]
    for encoding in ("latin-1", "utf-16", "cp1252"):
        path.write_bytes("naïve\r\n".encode(encoding))
        assert documents(path, encoding=encoding) == ["naïve\n"]
    rows = tmp_path / "x.jsonl"
    rows.write_bytes(b'\xef\xbb\xbf{"text": "a\\r\\nb"}\r\n{"text": "c"}')
    assert documents(rows) == ["a\r\nb", "c"]
    rows.write_bytes('{"text": "ï"}\n'.encode("utf-16"))
    assert documents(rows, encoding="UTF-16") == ["ï"]


def test_parquet_of_several_row_groups_and_kinds_of_text(tmp_path: Path) -> None:
    rows = [f"row {n}" for n in range(1000)]
    for kind in (pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())):
        table = pa.table({"text": pa.array(rows).cast(kind)})
        pq.write_table(table, tmp_path / "x.parquet", row_group_size=300)
        assert documents(tmp_path / "x.parquet") == rows


# Identity.


def test_identity_tells_data_apart(tmp_path: Path) -> None:
    path = write(tmp_path / "x.jsonl", DOCUMENTS)
    data = path.read_bytes()
    identity = read_text(path).identity()
    assert identity == {
        "name": "x.jsonl",
        "files": [{"name": "x.jsonl", "bytes": len(data), "sha256": sha256(data).hexdigest()}],
        "field": "text",
        "encoding": "utf-8",
    }
    assert json.loads(json.dumps(identity)) == identity
    others = [["ab", "c"], ["a", "bc"], ["abc"], ("abc",), ["abc", ""]]
    found = [json.dumps(read_text(source).identity()) for source in others]
    assert len(set(found)) == len(others)
    assert read_text(iter("ab")).identity() == {"name": "str_ascii_iterator"}
    assert read_text(Starting()).identity() == {"name": "Starting"}


def test_many_files_have_one_digest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("polyseme.data.text._LISTED", 2)
    for name in "abc":
        (tmp_path / f"{name}.txt").write_text(name * 3)
    identity = read_text(tmp_path).identity()
    listed = [
        {"name": f"{name}.txt", "bytes": 3, "sha256": sha256(name.encode() * 3).hexdigest()}
        for name in "abc"
    ]
    assert identity == {
        "name": tmp_path.name,
        "n_files": 3,
        "bytes": 9,
        "sha256": sha256(json.dumps(listed).encode()).hexdigest(),
        "encoding": "utf-8",
    }
    (tmp_path / "b.txt").write_text("bbd")
    assert read_text(tmp_path).identity() != identity
    (tmp_path / "b.txt").unlink()
    assert len(read_text(tmp_path).identity()["files"]) == 2


# Parts.


def in_lines(line: str, characters: int) -> str:
    return line * (characters // len(line) + 1)


def test_short_documents_are_one_part() -> None:
    line = "a line of a page\n"
    page = in_lines(line, text._PART)[: text._PART]
    (part,) = text.cut([page])
    assert part == page


def test_long_documents_are_cut_where_a_line_begins() -> None:
    page = in_lines("first\n  second\n\n", 300_000)
    parts = list(text.cut([page]))
    assert "".join(parts) == page
    assert all(part.startswith("first") and part.endswith("second\n\n") for part in parts)
    assert all(text._PART <= len(part) < text._PART + 20 for part in parts[:-1])


def test_lines_that_all_begin_with_white_space_are_not_cut() -> None:
    page = in_lines("  indented\n", 2_500_000)
    parts = list(text.cut([page]))
    assert "".join(parts) == page
    assert len(parts) == 3
    assert all(part.startswith("  indented") and part.endswith("\n") for part in parts)


def test_a_line_of_under_1_mib_is_not_cut() -> None:
    short, long = "short\n", "x y " * ((text._LONGEST_PART - 2) // 4) + "\n"
    page = short + long + short + long
    assert "".join(text.cut([page])) == page
    for part in text.cut([page]):
        assert part.endswith("\n")
        assert part.startswith(("short\n", "x y "))


def test_a_longer_line_is_cut_before_white_space_if_there_is_any() -> None:
    line = "seven w" * 400_000
    parts = list(text.cut([line]))
    assert "".join(parts) == line
    assert [part[0] for part in parts[1:]] == [" "] * (len(parts) - 1)
    assert all(text._LONGEST_PART - 7 < len(part) <= text._LONGEST_PART for part in parts[:-1])
    lengths = [len(part) for part in text.cut(["x" * 2_500_000])]
    assert lengths == [text._LONGEST_PART, text._LONGEST_PART, 2_500_000 - 2 * text._LONGEST_PART]


def oracle_of_cuts(document: str, enough: int, longest: int) -> list[str]:
    """The rule in its plainest form: every place where a part may end, and the one taken."""
    parts = []
    while document:
        here = document[: longest + 1]
        lines = [i for i in range(1, len(here)) if here[i - 1] == "\n"]
        spaces = [i for i in range(1, len(here)) if here[i].isspace() and not here[i - 1].isspace()]
        good = [i for i in lines if i >= enough and not here[i].isspace()]
        if good:
            end = good[0]
        elif len(document) <= longest:
            end = len(document)
        else:
            end = (lines or spaces or [longest])[-1]
        parts.append(document[:end])
        document = document[end:]
    return parts


@given(
    st.text(alphabet="ab\n 🦜", max_size=80) | st.text(alphabet="abcdefgh\n ", max_size=80),
    st.lists(st.integers(0, 80), max_size=9),
)
@settings(max_examples=1000, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_parts_do_not_depend_on_how_a_document_comes_in(
    monkeypatch: pytest.MonkeyPatch, document: str, cuts: list[int]
) -> None:
    monkeypatch.setattr(text, "_PART", 4)
    monkeypatch.setattr(text, "_LONGEST_PART", 7)
    whole = list(text.cut([document]))
    assert whole == oracle_of_cuts(document, 4, 7)
    places = [0, *sorted(cuts), len(document)]
    assert list(text.cut(document[a:b] for a, b in pairwise(places))) == whole
    assert list(text.cut(document)) == whole


@given(st.text(max_size=60), st.integers(1, 9))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_files_do_not_depend_on_how_they_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, document: str, size: int
) -> None:
    monkeypatch.setattr(text_files, "_CHUNK_BYTES", size)
    document = document.removeprefix("\ufeff") + "."
    path = write(tmp_path / "x.jsonl", [document, document])
    assert documents(path) == [document, document]
    path = write(tmp_path / "x.txt.gz", [document])
    assert documents(path) == [document.replace("\r\n", "\n").replace("\r", "\n")]


def test_memory_is_bounded(tmp_path: Path) -> None:
    path = tmp_path / "x.txt.gz"
    with gzip.open(path, "wb", compresslevel=1) as file:
        for _ in range(60):
            file.write(b"a line of text\n" * 70_000)
    tracemalloc.start()
    try:
        total = sum(len(part.text) for part in read_text(path).parts())
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert total == 60 * 70_000 * 15
    assert peak < total / 4


# Errors.


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        (
            "x.csv",
            b"a,b",
            r"x\.csv: polyseme cannot read this as text\. .* ends in \.txt, \.txt\.gz, \.jsonl",
        ),
        ("x.gz", b"a,b", r"x\.gz: polyseme cannot read this as text"),
        ("x.txt", b"", r"^x\.txt holds no text; .* Check that it is the s"),
        ("x.txt", b" \n\t\n", r"^x\.txt holds no text"),
        ("x.jsonl", b'\n{"text": ""}\n\n', r"^x\.jsonl holds no text"),
        (
            "x.jsonl",
            b'{"text": "a',
            r"x\.jsonl, line 1: not JSON \(Untermin.*found '\{\"text\": \"a'",
        ),
        ("x.jsonl", b"\n\nhello\n", r"x\.jsonl, line 3: not JSON \(.*found 'hello', expected one"),
        ("x.jsonl", b"[" * 100_000, r"x\.jsonl, line 1: not JSON \(.*found '\[+…'"),
        ("x.jsonl", b'["a"]', r"line 1: the JSON is a list; expected one object per line"),
        ("x.jsonl", b'{"txt": "a"}', r"Unknown field: 'text'. Did you mean 'txt'\? Must be one of"),
        ("x.jsonl", b'{"body": 1, "id": 2}', r"one of: body, id\. Name the text"),
        ("x.jsonl", b"{}", r"Must be one of: \(there are none\)"),
        ("x.jsonl", b'{"text": null}', r"line 1: the field 'text' is null; expected text"),
        ("x.jsonl", b'{"text": 12}', r"the field 'text' is '12' of type int; expected text. N"),
        ("x.jsonl", b'{"text": ["a"]}', r"the field 'text' is a list; expected text"),
        (
            "x.txt",
            b"ab\xff",
            r"x\.txt: byte 2 is not utf-8 text \(invalid start byte, 0xFF\); .*encod",
        ),
        ("x.txt", b"ab\xe2\x82", r"byte 2 is not utf-8 text \(unexpected end of data, 0xE2\)"),
        ("x.txt", b"\xef\xbb\xbfab\xff", r"x\.txt: byte 5 is not utf-8 text"),
        (
            "x.jsonl",
            b'{"text": "\xe9"}',
            r"x\.jsonl: byte 10 is not utf-8 text .*, or convert the f",
        ),
        (
            "x.txt.gz",
            gzip.compress(b"abc" * 99, mtime=0)[:-9],
            r"x\.txt\.gz: cannot be read .* truncated or damaged",
        ),
        (
            "x.jsonl.gz",
            gzip.compress(b"a", mtime=0)[:-4] + b"0000",
            r"x\.jsonl\.gz: cannot be read as a text file",
        ),
        ("x.parquet", b"PAR1", r"x\.parquet: cannot be read as a Parquet file: it is truncated"),
        ("x.parquet", b"", r"x\.parquet: cannot be read as a Parquet file"),
    ],
)
def test_files_that_cannot_be_read(tmp_path: Path, name: str, data: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(InputError, match=message):
        read_text(tmp_path / name)


def test_later_errors_are_raised_when_they_are_read(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text('{"text": "a"}\n{"text": "b"}\n{"test": "c"}\n')
    found = read_text(path).documents()
    assert next(found) == "a"
    with pytest.raises(InputError, match=r"x\.jsonl, line 3: Unknown field: 'text'. .*: test\."):
        list(found)
    path = tmp_path / "x.txt"
    path.write_bytes(b"a\n" * 3_000_000 + b"\xff" + b"a\n" * 9)
    with pytest.raises(InputError, match=r"x\.txt: byte 6,000,000 is not utf-8 text"):
        list(read_text(path).documents())


def test_a_line_without_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_files, "_LONGEST_LINE", 100)
    (tmp_path / "x.jsonl").write_text('{"text": "' + "a" * 100)
    with pytest.raises(
        InputError, match=r"x\.jsonl: a line has over 100 characters; expected JSON Lines"
    ):
        read_text(tmp_path / "x.jsonl")


def test_columns_of_parquet(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    pq.write_table(pa.table({"texts": ["a"], "n": [1]}), path)
    with pytest.raises(InputError, match=r"'text'. Did you mean 'texts'\? .*: texts, n\. Name the"):
        read_text(path)
    with pytest.raises(InputError, match=r"column 'n' is of type int64; .*one of: texts, n\."):
        read_text(path, field="n")
    pq.write_table(pa.table({"text": ["a", "b", None]}), path)
    with pytest.raises(
        InputError, match=r"x\.parquet, row 2: the field 'text' is null; expected text"
    ):
        list(read_text(path).documents())
    pq.write_table(pa.table({"text": pa.array([], pa.string())}), path)
    with pytest.raises(InputError, match=r"^x\.parquet holds no text"):
        read_text(path)


def test_paths_that_do_not_exist(tmp_path: Path) -> None:
    write(tmp_path / "corpus.txt", DOCUMENTS)
    near = re.escape(repr(str(tmp_path / "corpus.txt")))
    with pytest.raises(InputError, match=rf"does not exist\. Did you mean {near}\? Accepted are"):
        read_text(tmp_path / "corpse.txt")
    with pytest.raises(InputError, match=r"does not exist\. There is no folder"):
        read_text(tmp_path / "a" / "b")
    with pytest.raises(
        InputError, match=r"could not be read .*; to give a text itself, put it in a list"
    ):
        read_text("Once upon a time " * 400)
    (tmp_path / "none").mkdir()
    with pytest.raises(InputError, match=r"the folder holds no text files\. Accepted are"):
        read_text(tmp_path / "none")


def test_arguments_that_do_not_apply_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "x.txt", ["a"])
    with pytest.raises(InputError, match=r"field was given for .*x\.txt, to which it does not app"):
        read_text(path, field="body")
    with pytest.raises(InputError, match=r"split was given for .*x\.txt, to which it does not app"):
        read_text(path, split="test")
    with pytest.raises(InputError, match=r"encoding was given for .*x\.parquet"):
        read_text(write(tmp_path / "x.parquet", ["a"]), encoding="latin-1")
    with pytest.raises(InputError, match=r"field was given for a list, to which it does not apply"):
        read_text(["a"], field="body")
    with pytest.raises(InputError, match=r"split was given for the texts that come with Python"):
        read_text(split="test")
    for encoding in ("utf-9", "rot13", "", 3):
        with pytest.raises(InputError, match=f"encoding is {encoding!r}; expected a text enc"):
            read_text(path, encoding=encoding)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ([], "^list holds no text"),
        ((d for d in ["", " "]), "^The generator holds no text"),
        (["a", 3], r"^Item 1 of the list is a int; expected a str\. Remove or"),
        ([b"a"], "^Item 0 of the list is a bytes"),
        ([{"text": "a"}], r"^Item 0 of the list is a dict; .*: \(row\['text'\] for row in data\)"),
        (iter([None]), "^Item 0 of the list_iterator is a NoneType"),
        ({"a": "b"}, "^source is a dict, which cannot be read as texts. Accepted are"),
        ({"a"}, "^source is a set"),
        (b"abc", "^source is a bytes"),
        (12, "^source is a int"),
        ("", "^source is '', an empty path. Accepted are"),
        (["a\ud800"], r"^list: document 0 holds U\+D800, half of a surrogate pair, .*Repair the"),
    ],
)
def test_read_text_rejects_invalid_sources(source: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        list(read_text(source).documents())


def test_texts_are_not_read_twice_over() -> None:
    with pytest.raises(InputError, match=r"^source is a Texts"):
        read_text(read_text(DOCUMENTS))  # type: ignore[arg-type]
    assert repr(read_text(DOCUMENTS)) == "Texts('list')"
    assert isinstance(read_text(DOCUMENTS), Texts)


def test_parquet_beside_a_nested_column(tmp_path: Path) -> None:
    rows = pa.array([{"a": 1, "b": [2, 3]}] * 2)
    pq.write_table(pa.table({"about": rows, "text": ["one", "two"]}), tmp_path / "x.parquet")
    assert list(read_text(tmp_path / "x.parquet").documents()) == ["one", "two"]


def test_parquet_of_long_texts_is_no_bomb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, long = tmp_path / "x.parquet", "x" * 2**20
    # A dictionary of one text, which 500 rows repeat: one is in memory at a time.
    pq.write_table(pa.table({"text": [long] * 500}), path)
    tracemalloc.start()
    try:
        assert sum(len(text) for text in read_text(path).documents()) == 500 * 2**20
        assert tracemalloc.get_traced_memory()[1] < 30 * 2**20
    finally:
        tracemalloc.stop()
    monkeypatch.setattr(text_files, "_LONGEST_PAGE", 2**20)
    with pytest.raises(
        InputError, match=r"a page takes 1,048,\d+ bytes when decompressed; expected at most 1,0"
    ):
        read_text(path)
    encoding = {"text": "DELTA_BYTE_ARRAY"}
    table = pa.table({"text": [long] * 3})
    pq.write_table(table, path, use_dictionary=False, column_encoding=encoding)
    with pytest.raises(InputError, match="text is in an encoding that can take any amount of"):
        read_text(path)
