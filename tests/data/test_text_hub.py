"""Texts of the hub, with a stand-in for the datasets library that has its interface."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from polyseme.data import read_text
from polyseme.errors import InputError, MissingDependencyError


class IterableDataset:
    """Stand-in for datasets.IterableDataset; an exception among the rows is raised there."""

    def __init__(self, rows: list[Any]) -> None:
        self.rows = rows

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for row in self.rows:
            if isinstance(row, Exception):
                raise row
            yield row


Hub = Callable[..., list[dict[str, Any]]]


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Hub:
    """Give a function that says what load_dataset returns or raises, and returns its calls."""
    monkeypatch.chdir(tmp_path)

    def install(outcome: list[Any] | Exception) -> list[dict[str, Any]]:
        calls: list[dict[str, Any]] = []

        def load_dataset(path: str, *name: str, **options: Any) -> IterableDataset:
            calls.append({"path": path, **({"name": name[0]} if name else {}), **options})
            if isinstance(outcome, Exception):
                raise outcome
            return IterableDataset(outcome)

        module: Any = ModuleType("datasets")
        module.load_dataset = load_dataset
        monkeypatch.setitem(sys.modules, "datasets", module)
        return calls

    return install


ROWS = [{"text": "one", "id": 0}, {"text": "", "id": 1}, {"text": "two", "id": 2}]


def test_rows_are_streamed_without_trusting_code(hub: Hub) -> None:
    calls = hub(ROWS)
    texts = read_text("owner/some.texts", split="test")
    assert calls == [
        {
            "path": "owner/some.texts",
            "split": "test",
            "trust_remote_code": False,
            "streaming": True,
        }
    ]
    assert list(texts.documents()) == list(texts.documents()) == ["one", "two"]
    assert len(calls) == 1
    assert texts.reiterable
    assert texts.name == "owner/some.texts (test)"
    assert texts.identity() == {"name": texts.name, "split": "test", "field": "text"}


def test_a_configuration_is_named_after_the_data_set(hub: Hub) -> None:
    calls = hub(ROWS)
    texts = read_text("owner/some.texts:wiki-2.raw-v1", split="test")
    assert (calls[0]["path"], calls[0]["name"]) == ("owner/some.texts", "wiki-2.raw-v1")
    assert texts.name == "owner/some.texts:wiki-2.raw-v1 (test)"
    hub(ValueError("Config name is missing.\nPlease pick one among: a, b"))
    with pytest.raises(
        InputError,
        match=r"could not load the split .* \(Config name is missing\.\)\. Check the names of the "
        r"split and of the configuration \('owner/name:configuration'\), or download",
    ):
        read_text("owner/some.texts")
    for wrong in ("owner/texts:", "owner/texts:a:b", "owner/texts:a/b"):
        with pytest.raises(InputError, match="does not exist"):
            read_text(wrong)


def test_the_field_is_named(hub: Hub) -> None:
    hub([{"content": "one"}])
    assert list(read_text("owner/texts", field="content").documents()) == ["one"]
    message = r"'owner/texts' \(train\), row 0: Unknown field: 'text'. .*: content. Name the text"
    with pytest.raises(InputError, match=message):
        read_text("owner/texts")


def test_rows_that_are_no_texts(hub: Hub) -> None:
    hub([{"text": "a"}, {"text": None}])
    with pytest.raises(
        InputError, match=r"\(train\), row 1: the field 'text' is null; expected text"
    ):
        list(read_text("owner/texts").documents())
    hub([])
    with pytest.raises(InputError, match=r"^owner/texts \(train\) holds no text"):
        read_text("owner/texts")


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (ConnectionError("gone\nfor good"), r"the Hugging Face Hub could not be reached \(gone\)"),
        (FileNotFoundError("none"), r"no Hub data set of that name was found \(none\)"),
        (ValueError("Bad split"), r"could not load the split 'train' of this Hub data set"),
    ],
)
def test_failures_of_the_hub(hub: Hub, error: Exception, message: str) -> None:
    for outcome in (error, [{"text": "a"}, error]):
        hub(outcome)
        with pytest.raises(InputError, match=rf"^'owner/texts': .*{message}"):
            list(read_text("owner/texts").documents())


def test_without_datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(MissingDependencyError, match=r"'owner/texts' is not an .* 'polyseme\[hub"):
        read_text("owner/texts")


def test_possible_paths_are_not_looked_up(hub: Hub, tmp_path: Path) -> None:
    calls = hub(ROWS)
    (tmp_path / "owner").mkdir()
    (tmp_path / "owner" / "texts.txt").write_text("a")
    with pytest.raises(InputError, match=r"does not exist. Did you mean 'owner/texts.txt'"):
        read_text("owner/texts")
    for source in (Path("else/texts"), "./else/texts", "a/b/c", "texts"):
        with pytest.raises(InputError, match="does not exist"):
            read_text(source)
    assert not calls


def test_encoding_does_not_apply(hub: Hub) -> None:
    hub(ROWS)
    with pytest.raises(InputError, match="encoding was given for the Hub data set 'owner/texts'"):
        read_text("owner/texts", encoding="latin-1")


def test_with_the_library_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets", reason="datasets is not installed")
    rows = datasets.Dataset.from_dict({"text": ["a", "b"]}).to_iterable_dataset()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: rows)
    texts = read_text("owner/texts")
    assert list(texts.documents()) == list(texts.documents()) == ["a", "b"]
