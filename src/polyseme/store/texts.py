"""Texts in a run: tokens by number, and how each of them reads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

from polyseme.errors import InputError
from polyseme.store.format import INPUTS_FILE, LARGEST_IMPORTANCE, NO_IMPORTANCE, Problem


def vocabulary_arrays(
    ids: Sequence[int] | np.ndarray, texts: Sequence[str]
) -> dict[str, np.ndarray]:
    """The part of a vocabulary that occurs in a run, as arrays of ``inputs.safetensors``.

    Parameters
    ----------
    ids : array of int, shape (V,)
        Strictly increasing.
    texts : sequence of str
        How each of them reads.
    """
    if len(ids) != len(texts):
        raise InputError(f"{len(ids)} tokens have {len(texts)} texts; one for each is expected.")
    encoded = [text.encode("utf-8", "surrogatepass") for text in texts]
    return {
        "vocabulary": np.asarray(ids, dtype=np.int32),
        "vocabulary_ends": np.cumsum([len(word) for word in encoded], dtype=np.int64),
        "vocabulary_text": np.frombuffer(b"".join(encoded), dtype=np.uint8),
    }


def token_texts(inputs: Mapping[str, np.ndarray]) -> pd.Series[str]:
    """How each token of a run reads, by its number.

    Parameters
    ----------
    inputs : mapping of str to ndarray
        The arrays of ``inputs.safetensors``.

    Returns
    -------
    pandas.Series of str, index int

    Raises
    ------
    Problem
        The arrays contradict one another.
    """
    ids, ends = inputs["vocabulary"], inputs["vocabulary_ends"]
    raw = inputs["vocabulary_text"].tobytes()
    starts = np.concatenate([[0], ends])[:-1]
    if np.any(ends < starts) or (len(ends) and (ends[0] < 0 or ends[-1] != len(raw))):
        raise Problem(INPUTS_FILE, "'vocabulary_ends' do not fit 'vocabulary_text'")
    try:
        words = [raw[a:b].decode("utf-8") for a, b in zip(starts, ends, strict=True)]
    except UnicodeDecodeError as error:
        raise Problem(INPUTS_FILE, f"'vocabulary_text' is not UTF-8 ({error.reason})") from error
    return pd.Series(words, index=ids, dtype=object)


def encode_importances(importances: np.ndarray) -> np.ndarray:
    """Token importances from 0 to 1, NaN where there are none, as bytes of a run."""
    known = np.rint(np.nan_to_num(importances) * LARGEST_IMPORTANCE)
    return np.where(np.isnan(importances), NO_IMPORTANCE, known).astype(np.uint8)


def decode_importances(stored: np.ndarray) -> np.ndarray:
    """The inverse of `encode_importances`, float32, but for rounding."""
    known = stored.astype(np.float32) / np.float32(LARGEST_IMPORTANCE)
    return np.where(stored == NO_IMPORTANCE, np.float32(np.nan), known)


def check_texts(inputs: Mapping[str, np.ndarray]) -> None:
    """Check what the arrays of texts say of one another.

    Raises
    ------
    Problem
        A length is beyond the tokens, or a token has no text.
    """
    check_contexts(inputs["tokens"], inputs["lengths"], inputs["vocabulary"])
    token_texts(inputs)


def check_contexts(tokens: np.ndarray, lengths: np.ndarray, vocabulary: np.ndarray) -> None:
    """Check contexts, all or some, as `check_texts` does."""
    check_lengths(lengths, tokens.shape[1])
    at = np.minimum(np.searchsorted(vocabulary, tokens), max(len(vocabulary) - 1, 0))
    known = vocabulary[at] == tokens if len(vocabulary) else np.zeros(tokens.shape, bool)
    used = np.arange(tokens.shape[1]) < lengths[:, None]
    if not known[used].all():
        raise Problem(INPUTS_FILE, "'tokens' holds a token that 'vocabulary' does not have")


def check_lengths(lengths: np.ndarray, most: int) -> None:
    """Check that no context is longer than there is room for."""
    if np.any((lengths < 0) | (lengths > most)):
        raise Problem(INPUTS_FILE, f"'lengths' must be from 0 to {most}")
