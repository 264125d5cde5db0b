"""The text of single tokens, for display."""

from __future__ import annotations

import re
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from polyseme.errors import InputError

_BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")
_UNDECODED = re.compile("[\udc80-\udcff]")


@cache
def _byte_characters() -> dict[str, int]:
    """The byte that each character of a byte-level token represents, as in GPT-2.

    Printable Latin-1 characters represent their own bytes; the other bytes are assigned the
    characters from U+0100, in order.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {
        **{chr(byte): byte for byte in printable},
        **{chr(0x100 + place): byte for place, byte in enumerate(others)},
    }


def pieces(tokenizer: Any, ids: ArrayLike) -> list[str]:
    """The text of each token, for display.

    Parameters
    ----------
    tokenizer : transformers.PreTrainedTokenizerBase
    ids : array of int, (n,)

    Returns
    -------
    list of str, length n
        A space is shown as a space. Bytes of an incomplete character are each shown as "<0xE2>".
        WordPiece continuations keep their "##", since any other token there starts a new word.
        Special and added tokens are shown by name.

    Raises
    ------
    InputError
        If ``ids`` is not a 1-D array of integers, or the tokenizer has no such token.
    """
    array = np.asarray(ids)
    if array.ndim != 1 or (array.size and array.dtype.kind not in "iu"):
        raise InputError(
            f"ids has shape {array.shape} and dtype {array.dtype}; expected integers of shape "
            f"(n,). Give the tokens of one context."
        )
    numbers = [int(number) for number in array]
    try:
        tokens = tokenizer.convert_ids_to_tokens(numbers)
        named = set(tokenizer.all_special_ids) | set(getattr(tokenizer, "added_tokens_decoder", ()))
    except (AttributeError, TypeError) as error:
        raise InputError(
            f"tokenizer is a {type(tokenizer).__name__} that cannot convert ids to tokens "
            f"({error}); expected a transformers tokenizer."
        ) from error
    except (IndexError, KeyError, OverflowError, ValueError) as error:
        raise _unknown(numbers, tokenizer) from error
    if None in tokens:
        raise _unknown([numbers[tokens.index(None)]], tokenizer)
    text_of = _byte_level_text if _is_byte_level(tokenizer) else _sentence_piece_text
    return [
        token if number in named else text_of(token)
        for number, token in zip(numbers, tokens, strict=True)
    ]


def _unknown(numbers: list[int], tokenizer: Any) -> InputError:
    size = len(tokenizer) if hasattr(tokenizer, "__len__") else "unknown"
    return InputError(
        f"ids holds {min(numbers) if min(numbers) < 0 else max(numbers)}, but the tokenizer has no "
        f"such token (its vocabulary size is {size}). Give ids from this tokenizer."
    )


def _is_byte_level(tokenizer: Any) -> bool:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        # transformers tokenizers written in Python have the table themselves.
        return hasattr(tokenizer, "byte_decoder")
    # Its decoder is a ByteLevel, or a sequence with one in it.
    return "ByteLevel" in repr(getattr(backend, "decoder", None))


def _byte_level_text(token: str) -> str:
    table = _byte_characters()
    if not all(character in table for character in token):
        return token
    text = bytes(table[character] for character in token).decode("utf-8", "surrogateescape")
    return _UNDECODED.sub(lambda match: f"<0x{ord(match[0]) - 0xDC00:02X}>", text)


def _sentence_piece_text(token: str) -> str:
    byte = _BYTE_TOKEN.fullmatch(token)
    if byte and int(byte[1], 16) < 0x80:
        return chr(int(byte[1], 16))
    return token.replace("▁", " ")
