"""An index from words to the meanings and features of neurons, in small files."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from polyseme.errors import RunError
from polyseme.explorer.meaning_words import MeaningWords
from polyseme.store import RunFolder
from polyseme.store.format import neuron_offsets

Array = NDArray[Any]

MOST_LISTED = 100
"""Meanings, and features, listed per word. Features whose label begins with the word come first,
then those with most examples."""
_MOST_LABELS = 400
MOST_SHARDS = 128
_WORDS_IN_SHARD = 64


class WordIndex:
    """The words of a run on texts that have meanings or features.

    A word is the text of a token, trimmed and case-folded.

    Parameters
    ----------
    folder : RunFolder
    """

    def __init__(self, folder: RunFolder) -> None:
        self._folder = folder

    @property
    def exists(self) -> bool:
        """Whether the run has features by token, as runs of format 3 and later may have."""
        try:
            return "token_features" in self._folder.inputs and bool(self._columns)
        except RunError:
            return False

    @cached_property
    def _columns(self) -> list[str]:
        return self._folder.columns("features")

    @cached_property
    def _tokens(self) -> dict[str, list[int]]:
        """Rows of the vocabulary with features, by word, sorted by word."""
        inputs = self._folder.inputs
        ends = inputs["token_features_ends"]
        used = np.flatnonzero(np.diff(ends, prepend=0) > 0)
        texts = self._folder.token_texts.iloc[used]
        words: dict[str, list[int]] = {}
        for row, text in zip(used.tolist(), texts, strict=True):
            word = " ".join(text.split()).casefold()
            if word:
                words.setdefault(word, []).append(row)
        return dict(sorted(words.items()))

    @cached_property
    def _meanings(self) -> MeaningWords | None:
        """None if the run has no meanings, or its examples are damaged."""
        if "n_meanings" not in self._folder.neurons:
            return None
        try:
            return MeaningWords(self._folder)
        except (IndexError, KeyError, RunError, ValueError):
            # The run is not fully checked here, so its data may be inconsistent.
            return None

    @cached_property
    def _words(self) -> list[str]:
        return sorted({*self._tokens, *(self._meanings.words if self._meanings else [])})

    @cached_property
    def _bounds(self) -> list[int]:
        """Index of each shard's first word, then the number of words."""
        n = len(self._words)
        shards = min(MOST_SHARDS, -(-n // _WORDS_IN_SHARD)) if n else 0
        return np.linspace(0, n, shards + 1).astype(int).tolist() if shards else [0]

    @property
    def n_shards(self) -> int:
        """Number of files."""
        return len(self._bounds) - 1

    def words(self) -> dict[str, Any]:
        """All words, sorted, and the shard of each."""
        sizes = np.diff(self._bounds)
        shards = np.repeat(np.arange(len(sizes)), sizes)
        return {"words": self._words, "shards": shards.tolist()}

    def shard(self, number: int) -> dict[str, dict[str, list[list[Any]]]]:
        """The meanings and features of one shard's words.

        Returns
        -------
        dict of str to dict
            For each word, ``meanings`` as ``[site, neuron, meaning, examples, label]``, most
            frequent first; and ``features`` as ``[site, neuron, feature, examples, label]``: of
            the 400 with most examples, those whose label begins with the word first.
        """
        start, stop = self._bounds[number : number + 2]
        meanings = self._meanings
        return {
            word: {
                "meanings": meanings.meanings(word, MOST_LISTED) if meanings else [],
                "features": self._features(word) if word in self._tokens else [],
            }
            for word in self._words[start:stop]
        }

    def _features(self, word: str) -> list[list[Any]]:
        features = [self._folder.features_of_token(row) for row in self._tokens[word]]
        rows = np.unique(np.concatenate(features))
        sizes = self._sizes[rows]
        order = np.argsort(-sizes, kind="stable")[:_MOST_LABELS]
        rows = rows[order]
        labels = [""] * len(rows) if self._labels is None else self._labels.iloc[rows].tolist()
        # A label begins with the most distinctive word; large features contain almost any word.
        other = [label.partition(" ")[0].casefold() != word for label in labels]
        order = np.argsort(other, kind="stable")[:MOST_LISTED]
        rows, labels = rows[order], [labels[n] for n in order]
        sizes = self._sizes[rows]
        ends = self._folder.offsets("features")
        neuron = np.searchsorted(ends, rows, side="right") - 1
        first = neuron_offsets(self._folder.sites)
        site = np.searchsorted(first, neuron, side="right") - 1
        columns = (site, neuron - first[site], rows - ends[neuron], sizes)
        return [
            [*numbers, label]
            for *numbers, label in zip(*(c.tolist() for c in columns), labels, strict=True)
        ]

    @cached_property
    def _sizes(self) -> Array:
        return self._folder.column("features", "n_examples").to_numpy(np.int32)

    @cached_property
    def _labels(self) -> pd.Series[Any] | None:
        if "label" not in self._columns:
            return None
        return self._folder.column("features", "label")
