"""Each token is shown as the text that it stands for."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest

from polyseme.data import pieces
from polyseme.errors import InputError


class Vocabulary:
    """Interface of a transformers tokenizer with a vocabulary by number and no backend."""

    def __init__(self, *tokens: str, special: tuple[int, ...] = ()) -> None:
        self.tokens = tokens
        self.all_special_ids = list(special)

    def __len__(self) -> int:
        return len(self.tokens)

    def convert_ids_to_tokens(self, ids: list[int]) -> list[str]:
        return [self.tokens[number] for number in ids]


class ByteLevel(Vocabulary):
    byte_decoder = None  # as those written in Python have one


def shown(tokenizer: Vocabulary) -> list[str]:
    return pieces(tokenizer, range(len(tokenizer)))


def undone(texts: list[str]) -> str:
    """The text again, with bytes that are shown put together."""
    joined = "".join(texts).encode()
    whole = re.sub(rb"<0x([0-9A-F]{2})>", lambda found: bytes([int(found[1], 16)]), joined)
    return whole.decode()


def test_byte_level_tokens() -> None:
    tokens = ("Hello", "Ġworld", "ĊĊĠ", "ĠcafÃ©", "ĠðŁ", "¦", "ľ", "<s>", "ł", "Ã©Ã", "ĉ")
    assert shown(ByteLevel(*tokens, special=(7,))) == [
        *("Hello", " world", "\n\n ", " café", " <0xF0><0x9F>", "<0xA6>", "<0x9C>", "<s>"),
        *("<0xA0>", "é<0xC3>", "\t"),
    ]


def test_a_special_token_goes_by_its_name() -> None:
    assert shown(ByteLevel("<｜begin▁of▁sentence｜>", "Ġa", special=(0,)))[0] == (
        "<｜begin▁of▁sentence｜>"
    )
    assert shown(Vocabulary("<begin▁of>", "▁a", special=(0,))) == ["<begin▁of>", " a"]
    # An added token that is not special is stored as it is too.
    tokenizer: Any = ByteLevel("Ġdé", "Ġdé")
    tokenizer.added_tokens_decoder = {0: "Ġdé"}
    assert pieces(tokenizer, [0, 1])[0] == "Ġdé"


def test_sentence_piece_and_word_piece_tokens() -> None:
    tokens = ("▁Hello", "▁▁", "ing", "<0x0A>", "<0xE2>", "##ing", "Ġ", "[CLS]")
    assert shown(Vocabulary(*tokens)) == [
        *(" Hello", "  ", "ing", "\n", "<0xE2>", "##ing", "Ġ", "[CLS]")
    ]


def test_every_byte_is_shown_and_can_be_told() -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    tokenizers = pytest.importorskip("tokenizers", reason="tokenizers is not installed")
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    backend = tokenizers.Tokenizer(
        tokenizers.models.BPE({token: number for number, token in enumerate(alphabet)}, [])
    )
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    sentence = "naïve café 🦜\n\t\x00 ▁ ł"
    for decoder in (
        tokenizers.decoders.ByteLevel(),
        tokenizers.decoders.Sequence([tokenizers.decoders.ByteLevel()]),
    ):
        backend.decoder = decoder
        tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=backend)
        texts = pieces(tokenizer, range(256))
        by_rule = [f"<0x{b:02X}>" if b >= 0x80 else chr(b) for b in range(256)]
        assert sorted(texts) == sorted(by_rule)
        assert undone(pieces(tokenizer, tokenizer(sentence)["input_ids"])) == sentence


def test_with_the_tokenizer_of_a_decoder(smollm2: Any) -> None:
    sentence = "Hello world, naïve café 🦜<|im_end|>\n\n  def f(x):\n\treturn '中文'"
    ids = smollm2(sentence, add_special_tokens=False)["input_ids"]
    texts = pieces(smollm2, ids)
    assert undone(texts) == sentence
    assert texts[:2] == ["Hello", " world"]
    assert "<|im_end|>" in texts
    assert [t for t in texts if t.startswith(" <0xF0>")]
    every = pieces(smollm2, np.arange(len(smollm2)))
    assert len(every) == len(smollm2)
    assert all(every)


def test_with_the_tokenizer_of_an_encoder(minilm: Any) -> None:
    ids = minilm("Embeddings of text")["input_ids"]
    assert pieces(minilm, ids) == [
        *("[CLS]", "em", "##bed", "##ding", "##s", "of", "text", "[SEP]"),
    ]


def test_no_tokens_are_no_pieces() -> None:
    assert pieces(Vocabulary("a"), []) == []


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([[0]], r"^ids has shape \(1, 1\) and dtype int64; expected integers of shape \(n,\)"),
        ([0.5], r"^ids has shape \(1,\) and dtype float64"),
        (0, r"^ids has shape \(\)"),
        ([0, 7], r"^ids holds 7, .* \(its vocabulary size is 2\)\. Give ids from this tok"),
    ],
)
def test_ids_that_are_refused(ids: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        pieces(Vocabulary("a", "b"), ids)


@pytest.mark.parametrize("token", [10**6, 10**12, -1])
def test_ids_that_a_real_tokenizer_does_not_have(smollm2: Any, token: int) -> None:
    with pytest.raises(InputError, match=rf"^ids holds {token}, but the tokenizer has no such"):
        pieces(smollm2, [5, token])


def test_pieces_rejects_a_string_as_tokenizer() -> None:
    with pytest.raises(InputError, match=r"^tokenizer is a str that cannot convert ids to tokens"):
        pieces("gpt2", [1])
