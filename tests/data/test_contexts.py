"""Contexts equal those of a naive oracle that tokenizes everything at once."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from polyseme.data import Contexts, TokenBatch, read_text, text
from polyseme.errors import InputError

SPECIAL = {"pad": 90, "bos": 91, "eos": 92, "cls": 93, "sep": 94}
KINDS = [(), ("eos",), ("bos",), ("bos", "eos"), ("cls", "sep", "pad"), ("cls",), tuple(SPECIAL)]


class Tokenizer:
    """Interface of a transformers tokenizer: a token a letter, one for each run of white space.

    So the tokens depend on where a document is cut, as with a real one. "#" makes no token.
    """

    model_max_length = 10**30

    def __init__(self, *special: str) -> None:
        for name, token in SPECIAL.items():
            setattr(self, f"{name}_token_id", token if name in special else None)
        self.all_special_ids = [SPECIAL[name] for name in special] + [1]

    def __call__(self, document: str, *, add_special_tokens: bool, verbose: bool) -> Any:
        assert not add_special_tokens
        assert not verbose
        ids, before = [], ""
        for character in document:
            if character.isspace():
                ids += [] if before.isspace() else [2]
            elif character != "#":
                ids.append(1 if character == "?" else 3 + ord(character) % 80)
            before = character
        return {"input_ids": ids}


class NoSpace(Tokenizer):
    """As above, with no token for white space, as in WordPiece."""

    def __call__(self, document: str, **options: Any) -> Any:
        ids = super().__call__(document, **options)["input_ids"]
        return {"input_ids": [token for token in ids if token != 2]}


def oracle(
    documents: list[str],
    tokenizer: Any,
    length: int,
    max_tokens: int | None = None,
    leave_out: tuple[str, ...] = ("special", "first"),
) -> list[tuple[list[int], list[bool], list[bool]]]:
    """Every context as (ids, attention, mask), from all tokens in one list."""
    encoder = tokenizer.cls_token_id is not None and tokenizer.sep_token_id is not None
    begin = tokenizer.cls_token_id if encoder else tokenizer.bos_token_id
    if begin is None:
        begin = tokenizer.cls_token_id
    between = tokenizer.sep_token_id if encoder else tokenizer.eos_token_id
    if between is None:
        between = tokenizer.sep_token_id
    ends = {"begin": [] if begin is None else [begin]}
    ends["end"] = [tokenizer.sep_token_id] if encoder else []
    room = length - len(ends["begin"]) - len(ends["end"])

    tokens: list[Any] = []
    budget = max_tokens if max_tokens is not None else 10**9
    for document in documents:
        ids = []
        for part in text.cut([document]):
            ids += tokenizer(part, add_special_tokens=False, verbose=False)["input_ids"]
        ids = ids[:budget]
        budget -= len(ids)
        if ids:
            tokens += [*(["between"] if tokens else []), *ids]

    contexts = []
    while tokens:
        if tokens[0] == "between":
            tokens = tokens[1:]
        if between is None:
            body: list[int] = []
            while tokens and len(body) < room:
                if (token := tokens.pop(0)) != "between":
                    body.append(token)
        else:
            body = [between if token == "between" else token for token in tokens[:room]]
            tokens = tokens[room:]
        ids = ends["begin"] + body + ends["end"]
        missing = length - len(ids)
        padding = tokenizer.pad_token_id
        if padding is None:
            padding = tokenizer.eos_token_id or 0
        special = tokenizer.all_special_ids if "special" in leave_out else []
        mask = [token not in special for token in ids] + [False] * missing
        if "first" in leave_out:
            mask[0] = False
        attention = [True] * len(ids) + [False] * missing
        contexts.append((ids + [padding] * missing, attention, mask))
    return contexts


def rows(contexts: Contexts, size: int = 3, start: int = 0) -> list[Any]:
    """Every context as the oracle gives it; that each batch is in order is checked too."""
    found: list[Any] = []
    batches = list(contexts.batches(size, start))
    for batch in batches:
        assert isinstance(batch, TokenBatch)
        assert batch.ids.shape == batch.attention.shape == batch.mask.shape
        assert batch.ids.shape[1] == contexts.length
        assert batch.ids.dtype == np.int64
        assert batch.attention.dtype == batch.mask.dtype == np.bool_
        assert not (batch.mask & ~batch.attention).any()
        found += zip(batch.ids.tolist(), batch.attention.tolist(), batch.mask.tolist(), strict=True)
    assert all(len(batch.ids) == size for batch in batches[:-1])
    return found


DOCUMENT = st.text(alphabet="abc  \n\n#?", max_size=40)


@given(
    documents=st.lists(DOCUMENT, min_size=1, max_size=8),
    special=st.sampled_from(KINDS),
    length=st.integers(3, 9),
    size=st.integers(1, 7),
    max_tokens=st.none() | st.integers(1, 60),
    leave_out=st.sampled_from([(), ("special",), ("first",), ("special", "first")]),
    data=st.data(),
)
@settings(max_examples=400, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_contexts_are_those_of_the_oracle(
    monkeypatch: pytest.MonkeyPatch,
    documents: list[str],
    special: tuple[str, ...],
    length: int,
    size: int,
    max_tokens: int | None,
    leave_out: tuple[str, ...],
    data: st.DataObject,
) -> None:
    monkeypatch.setattr(text, "_PART", 5)
    monkeypatch.setattr(text, "_LONGEST_PART", 11)
    tokenizer = Tokenizer(*special)
    documents = ["a", *documents]
    expected = oracle(documents, tokenizer, length, max_tokens, leave_out)
    contexts = Contexts(
        read_text(documents), tokenizer, length=length, max_tokens=max_tokens, leave_out=leave_out
    )
    assert rows(contexts, size) == expected
    # To go on from anywhere gives the same contexts.
    start = data.draw(st.integers(0, len(expected)))
    assert rows(contexts, size, start) == expected[start:]
    # What there is of each context: its beginning, text, its end, padding.
    margins = (contexts.settings()["special_ids"]["begin"] is not None) + (
        contexts.settings()["special_ids"]["end"] is not None
    )
    for number, (ids, attention, _) in enumerate(expected):
        assert sum(attention) > margins
        assert any(token < 90 for token, real in zip(ids, attention, strict=True) if real)
        assert all(attention) or number == len(expected) - 1
        assert attention == sorted(attention, reverse=True)
    if max_tokens is not None:
        real = [
            t for ids, attention, _ in expected for t, a in zip(ids, attention, strict=True) if a
        ]
        assert sum(token < 90 for token in real) <= max_tokens


def test_files_give_the_same_contexts_as_their_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    documents = ["one a\n" * 30, "b two " * 9, "three\n\n c"]
    (tmp_path / "x.jsonl").write_text("\n".join(json.dumps({"text": d}) for d in documents))
    (tmp_path / "x.txt").write_text(documents[0])
    tokenizer = Tokenizer("bos", "eos")
    expected = rows(Contexts(read_text(documents), tokenizer, length=7))
    expected_of_one = rows(Contexts(read_text(documents[:1]), tokenizer, length=7))
    for size in (1, 10, 1000):
        monkeypatch.setattr("polyseme.data.text_files._CHUNK_BYTES", size)
        assert rows(Contexts(read_text(tmp_path / "x.jsonl"), tokenizer, length=7)) == expected
        assert rows(Contexts(read_text(tmp_path / "x.txt"), tokenizer, length=7)) == expected_of_one


def test_a_short_text_is_one_padded_context() -> None:
    for special, ids in (
        ((), [20, 21, 0, 0, 0]),
        (("eos",), [20, 21, 92, 92, 92]),
        (("bos", "eos"), [91, 20, 21, 92, 92]),
        (("cls", "sep", "pad"), [93, 20, 21, 94, 90]),
    ):
        contexts = Contexts(read_text(["ab"]), Tokenizer(*special), length=5)
        (batch,) = contexts.batches(8)
        assert batch.ids.tolist() == [ids]
        text_only = [token in (20, 21) for token in ids]
        text_only[0] = False
        assert batch.mask.tolist() == [text_only]


def test_documents_are_separated_except_where_a_context_begins() -> None:
    contexts = Contexts(read_text(["abc", "ab", "a"]), Tokenizer("bos", "eos"), length=4)
    assert [ids for ids, _, _ in rows(contexts)] == [
        [91, 20, 21, 22],
        [91, 20, 21, 92],
        [91, 20, 92, 92],
    ]


def test_a_part_without_tokens_does_not_hide_that_a_document_begins(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(text, "_PART", 2)
    contexts = Contexts(read_text(["a", "#\nb", "##\n#c", "#"]), Tokenizer("eos"), length=6)
    texts = [part.text for part in contexts.texts.parts()]
    assert texts == ["a", "#\n", "b", "##\n", "#c", "#"]
    assert [ids for ids, _, _ in rows(contexts)] == [[20, 92, 2, 21, 92, 2], [22, *[92] * 5]]
    contexts = Contexts(read_text(["a", "##\n##\nb"]), NoSpace("eos"), length=3)
    assert [ids for ids, _, _ in rows(contexts)] == [[20, 92, 21]]


def test_max_tokens_counts_the_tokens_of_documents() -> None:
    contexts = Contexts(read_text(["ab?", "cd"]), Tokenizer("bos", "eos"), length=5, max_tokens=4)
    assert [ids for ids, _, _ in rows(contexts)] == [[91, 20, 21, 1, 92], [91, 22, 92, 92, 92]]


def test_max_tokens_reads_no_further() -> None:
    def endless() -> Any:
        while True:
            yield "abc"

    contexts = Contexts(read_text(endless()), Tokenizer("eos"), length=8, max_tokens=100)
    attention = [sum(attention) for _, attention, _ in rows(contexts)]
    assert sum(attention) >= 100
    assert len(attention) < 20


def test_an_iterator_gives_its_contexts_once() -> None:
    documents = ["abc", "defg"]
    contexts = Contexts(read_text(iter(documents)), Tokenizer(), length=3)
    assert rows(contexts) == oracle(documents, Tokenizer(), 3)
    with pytest.raises(InputError, match=r"list_iterator is an iterator that was already read"):
        list(contexts.batches(2))


def test_settings_and_identity() -> None:
    contexts = Contexts(
        read_text(["abc"]), Tokenizer("cls", "sep"), length=9, max_tokens=5, leave_out=["first"]
    )
    assert contexts.settings() == {
        "length": 9,
        "max_tokens": 5,
        "leave_out": ["first"],
        "special_ids": {"begin": 93, "end": 94, "separator": 94, "padding": 0, "left_out": []},
    }
    identity = contexts.identity()
    assert json.loads(json.dumps(identity)) == identity
    assert identity["texts"] == contexts.texts.identity()
    assert identity["tokenizer"] == {"class": "Tokenizer", "vocabulary_sha256": None}
    assert {**identity, **contexts.settings()} == identity
    assert (contexts.name, contexts.length, contexts.leave_out) == ("list", 9, ("first",))
    assert repr(contexts) == "Contexts('list': 9 tokens each)"
    others = [
        Contexts(read_text(["abd"]), Tokenizer(), length=9),
        Contexts(read_text(["abc"]), Tokenizer(), length=9),
        Contexts(read_text(["abc"]), Tokenizer(), length=8),
        Contexts(read_text(["abc"]), Tokenizer("bos"), length=8),
        Contexts(read_text(["abc"]), Tokenizer("bos"), length=8, leave_out="first"),
    ]
    assert len({json.dumps(other.identity()) for other in others}) == len(others)


def test_negative_ids_are_none() -> None:
    tokenizer: Any = Tokenizer("eos")
    tokenizer.pad_token_id = -1
    assert Contexts(read_text(["a"]), tokenizer).settings()["special_ids"]["padding"] == 92


# Errors.


class Bare:
    """Makes tokens and tells nothing about them."""

    def __call__(self, document: str, **_: Any) -> Any:
        return {"input_ids": [1]}


class Processor:
    def __call__(self, document: str, **_: Any) -> Any:
        raise RuntimeError("an image is expected")


@pytest.mark.parametrize(
    ("tokenizer", "options", "message"),
    [
        (Tokenizer(), {"length": 2}, r"^length is 2; it must be a whole number, 3 or more\. It in"),
        (Tokenizer(), {"length": 128.0}, r"^length is 128\.0; it must be a whole number"),
        (Tokenizer(), {"length": True}, r"^length is True; it must be a whole number"),
        (Tokenizer(), {"max_tokens": 0}, r"^max_tokens is 0; it must be a whole number, 1 or mor"),
        (Tokenizer(), {"leave_out": ["frist"]}, r"'frist'. Did you mean 'first'\? Must be one of"),
        (Tokenizer(), {"leave_out": [None]}, r"^Unknown entry of leave_out: 'None'"),
        ("gpt2", {}, r"^tokenizer is a str; expected a transformers tokenizer, such as Auto"),
        (None, {}, r"^tokenizer is a NoneType; .* PreTrainedTokenizerFast\(tokenizer_object="),
        (Bare(), {}, r"^tokenizer is a Bare without special-token attributes \(.*bos_token_i"),
        (Processor(), {}, r"^tokenizer is a Processor .* \(RuntimeError: an image is expected\); "),
        (lambda text: {}, {}, r"^tokenizer is a function that could not tokenize a text \(TypeErr"),
    ],
)
def test_arguments_that_are_refused(tokenizer: Any, options: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        Contexts(read_text(["a"]), tokenizer, **options)


def test_a_length_over_the_limit_of_the_model() -> None:
    tokenizer = Tokenizer()
    tokenizer.model_max_length = 512
    assert Contexts(read_text(["a"]), tokenizer, length=512).length == 512
    message = r"^length is 1,024; .* at most 512 tokens\. Give length=512 or less\."
    with pytest.raises(InputError, match=message):
        Contexts(read_text(["a"]), tokenizer, length=1024)


def test_texts_have_to_be_read_first() -> None:
    with pytest.raises(InputError, match=r"^texts is a list; expected Texts. Give read_text"):
        Contexts(["a"], Tokenizer())  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda c: c.batches(0), r"^size is 0; it must be a whole number, 1 or more\."),
        (lambda c: c.batches(2, -1), r"^start is -1; it must be a whole number, 0 or more\."),
        (
            lambda c: list(c.batches(2, 2)),
            r"^start is 2, but list makes only 1 contexts of 5 tokens",
        ),
    ],
)
def test_batches_that_are_refused(call: Callable[[Contexts], Any], message: str) -> None:
    contexts = Contexts(read_text(["a"]), Tokenizer(), length=5)
    assert list(contexts.batches(2, 1)) == []
    with pytest.raises(InputError, match=message):
        call(contexts)


def test_texts_that_make_no_token() -> None:
    contexts = Contexts(read_text(["#", "###"]), Tokenizer("bos"))
    with pytest.raises(InputError, match=r"^The tokenizer found no tokens in list; .* the script"):
        list(contexts.batches(2))


# Real tokenizers.


def test_with_the_tokenizer_of_a_decoder(smollm2: Any, recwarn: pytest.WarningsRecorder) -> None:
    documents = [*list(read_text().documents())[:3], "Short.\n\n", "naïve 🦜"]
    contexts = Contexts(read_text(documents), smollm2, length=64)
    assert rows(contexts, 5) == oracle(documents, smollm2, 64)
    assert contexts.settings()["special_ids"] == {
        "begin": smollm2.bos_token_id,
        "end": None,
        "separator": smollm2.eos_token_id,
        "padding": smollm2.pad_token_id,
        "left_out": sorted(smollm2.all_special_ids),
    }
    assert len(contexts.identity()["tokenizer"]["vocabulary_sha256"]) == 64
    # What is neither special nor padding is the text again.
    real = [t for batch in contexts.batches(5) for t in batch.ids[batch.attention].tolist()]
    kept = [token for token in real if token not in smollm2.all_special_ids]
    assert smollm2.decode(kept) == "".join(documents)
    assert not recwarn.list


def test_with_the_tokenizer_of_an_encoder(minilm: Any, caplog: pytest.LogCaptureFixture) -> None:
    documents = ["Hello world. " * 300, "It is naïve."]
    contexts = Contexts(read_text(documents), minilm, length=16)
    found = rows(contexts)
    assert found == oracle(documents, minilm, 16)
    for ids, attention, mask in found:
        real = sum(attention)
        assert (ids[0], ids[real - 1]) == (minilm.cls_token_id, minilm.sep_token_id)
        assert mask[0] is mask[real - 1] is False
    with pytest.raises(InputError, match=r"^length is 513; .* at most 512 tokens"):
        Contexts(read_text(documents), minilm, length=513)
    assert not caplog.records


@pytest.mark.parametrize("document", ["one\n\ntwo three\nfour.\n", "x\n" * 9, " \n\n a"])
def test_a_cut_leaves_the_tokens_of_a_line_as_they_are(smollm2: Any, document: str) -> None:
    def tokens(part: str) -> list[int]:
        return list(smollm2(part, add_special_tokens=False)["input_ids"])

    first = "a line\n"
    assert tokens(first) + tokens("and" + document) == tokens(first + "and" + document)


def test_neither_torch_nor_transformers_is_needed() -> None:
    code = (
        "import sys; from polyseme.data import Contexts, read_text\n"
        "class Tokenizer:\n"
        "    bos_token_id = eos_token_id = cls_token_id = sep_token_id = pad_token_id = None\n"
        "    all_special_ids = []\n"
        "    def __call__(self, text, **_): return {'input_ids': list(text.encode())}\n"
        "assert len(list(Contexts(read_text(), Tokenizer()).batches(64))) > 50\n"
        "print({'torch', 'transformers', 'datasets', 'pyarrow'} & set(sys.modules))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout == "set()\n", result.stderr
