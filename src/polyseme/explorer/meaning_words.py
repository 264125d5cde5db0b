"""Finds meanings by the words in their labels, for all neurons of a run."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from polyseme.store import RunFolder
from polyseme.store.format import neuron_offsets
from polyseme.views.meanings import NAMED, are_spaced, joined, label_of

Ints = NDArray[np.int64]

_EXAMPLES = 200_000  # per batch


class MeaningWords:
    """The words that name the meanings of a run on texts.

    These are the words at the maxima of a meaning's examples, with which its label begins, see
    `polyseme.views.meanings.Meaning.label`. Words near the examples are not included, because they
    would need a test for each neuron.

    Parameters
    ----------
    folder : RunFolder
        Of a run on texts with meanings.
    """

    def __init__(self, folder: RunFolder) -> None:
        self._folder = folder
        self._reader = _WordReader(folder)
        self._first = np.concatenate([[0], folder.neurons["n_meanings"].cumsum()]).astype(np.int64)
        n = int(self._first[-1])
        self._sizes = np.zeros(n, np.int64)
        self._names = np.full((n, NAMED), -1, np.int64)
        self._times = np.zeros((n, NAMED), np.int64)
        self._name_all()
        spelled = [""] * len(self._reader.words)
        for name in np.unique(self._names[self._names >= 0]).tolist():
            spelled[name] = " ".join(self._reader.words[name].split()).casefold()
        self.words = sorted(set(filter(None, spelled)))
        number = {word: n for n, word in enumerate(self.words)}
        folded = np.array([number.get(word, -1) for word in spelled], np.int64)
        meaning, rank = np.nonzero(self._names >= 0)
        called = folded[self._names[meaning, rank]]
        times = self._times[meaning, rank]
        order = np.lexsort((meaning, -self._sizes[meaning], -times, called))
        self._meanings = meaning[order]
        self._ends = np.searchsorted(called[order], np.arange(len(self.words) + 1))
        self._number = number

    def meanings(self, word: str, most: int) -> list[list[Any]]:
        """The meanings that a word names, most frequent first.

        Returns
        -------
        list
            Each as ``[site, neuron, meaning, examples, label]``.
        """
        if word not in self._number:
            return []
        start, stop = self._ends[self._number[word] :][:2]
        rows = np.array(list(dict.fromkeys(self._meanings[start:stop].tolist()))[:most], np.int64)
        neuron = np.searchsorted(self._first, rows, side="right") - 1
        first = neuron_offsets(self._folder.sites)
        site = np.searchsorted(first, neuron, side="right") - 1
        columns = (site, neuron - first[site], rows - self._first[neuron], self._sizes[rows])
        return [
            [*numbers, self._label(row)]
            for *numbers, row in zip(*(c.tolist() for c in columns), rows.tolist(), strict=True)
        ]

    def _label(self, row: int) -> str:
        named = zip(self._names[row].tolist(), self._times[row].tolist(), strict=True)
        return label_of({self._reader.words[name]: n for name, n in named if name >= 0})

    def _name_all(self) -> None:
        columns = [
            self._folder.column("examples", name).to_numpy(np.int64)
            for name in ("input", "position", "meaning")
        ]
        ends = self._folder.offsets("examples")
        neuron = np.repeat(np.arange(len(ends) - 1), np.diff(ends))
        stop = 0
        while stop < ends[-1]:
            start = stop
            # Whole neurons, at least one.
            last = int(np.searchsorted(ends, start + _EXAMPLES, side="right")) - 1
            stop = int(ends[last]) if ends[last] > start else int(ends[ends > start][0])
            inputs, positions, meanings = (column[start:stop] for column in columns)
            self._name(self._first[neuron[start:stop]] + meanings, inputs, positions)

    def _name(self, meaning: Ints, inputs: Ints, positions: Ints) -> None:
        """Name the meanings of some neurons by their examples."""
        size = np.bincount(meaning)
        self._sizes[: len(size)] += size
        word = self._reader.read(inputs, positions)
        known = np.flatnonzero(word >= 0)
        pairs = np.stack([meaning[known], word[known]])
        key = pairs[0] * (len(self._reader.words) + 1) + pairs[1]
        _, first, times = np.unique(key, return_index=True, return_counts=True)
        first, times = first[times > 1], times[times > 1]
        order = np.lexsort((first, -times, pairs[0, first]))
        owner, names = pairs[:, first[order]]
        rank = np.arange(len(owner)) - np.searchsorted(owner, owner)
        kept = rank < NAMED
        self._names[owner[kept], rank[kept]] = names[kept]
        self._times[owner[kept], rank[kept]] = times[order][kept]


class _WordReader:
    """The words of a run's contexts.

    A page joins only the tokens of an example's window, so a word cut by the window's end differs.
    """

    def __init__(self, folder: RunFolder) -> None:
        inputs = folder.inputs
        texts = folder.token_texts
        spaced = are_spaced(texts)
        spelled = dict(zip(texts.index.tolist(), texts, strict=True))
        self._index = np.asarray(inputs["index"])
        self._word = np.full(np.shape(inputs["tokens"]), -1, np.int64)
        number: dict[str, int] = {}
        for row, (tokens, length) in enumerate(
            zip(inputs["tokens"], inputs["lengths"].tolist(), strict=True)
        ):
            words, word_of = joined(
                [spelled[token] for token in tokens[:length].tolist()], spaced=spaced
            )
            if words:
                numbers = [number.setdefault(word, len(number)) for word in words]
                self._word[row, :length] = np.array(numbers)[word_of]
        self.words = list(number)

    def read(self, inputs: Ints, positions: Ints) -> Ints:
        """Indices in ``words`` of the words at some positions, -1 where there is none."""
        return self._word[np.searchsorted(self._index, inputs), positions]
