"""The text of single tokens, as a reader wants to see it."""

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
    """The byte that each character of a byte-level token stands for, as in GPT-2.

    Bytes that are printable characters of Latin-1 stand for themselves; the others are given
    the characters from U+0100 on, in order.
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
    list of str, n of them
        A space is a space. Bytes that are only part of a character are shown as "<0xE2>" each.
        What continues a word in WordPiece keeps its "##", as elsewhere a space comes before
        each token there. Special and added tokens are shown by their own name.

    Raises
    ------
    InputError
        If ``ids`` is not one axis of whole numbers, or the tokenizer has no such token.
    """
    array = np.asarray(ids)
    if array.ndim != 1 or (array.size and array.dtype.kind not in "iu"):
        raise InputError(
            f"ids has shape {array.shape} and dtype {array.dtype}; one axis of whole numbers, "
            f"(n,), is expected. Give the tokens of one context."
        )
    numbers = [int(number) for number in array]
    try:
        tokens = tokenizer.convert_ids_to_tokens(numbers)
        named = set(tokenizer.all_special_ids) | set(getattr(tokenizer, "added_tokens_decoder", ()))
    except (AttributeError, TypeError) as error:
        raise InputError(
            f"tokenizer is a {type(tokenizer).__name__} that cannot tell tokens from ids "
            f"({error}); a tokenizer of transformers is expected."
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
        f"ids holds {min(numbers) if min(numbers) < 0 else max(numbers)}, and the tokenizer has no "
        f"such token (the size of its vocabulary is {size}). Give ids that this tokenizer made."
    )


def _is_byte_level(tokenizer: Any) -> bool:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        # Tokenizers of transformers that are written in Python have the table themselves.
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
