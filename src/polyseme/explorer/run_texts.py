"""The texts of a run for the pages: windows of tokens, each file with its own vocabulary."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from polyseme.errors import RunError
from polyseme.store import RunFolder

Array = NDArray[Any]

_MOST_KEPT_TOKENS = 2**23
BEYOND = -1
"""Stands for a token beyond the context."""


class RunTexts:
    """The contexts of a run and the texts of their tokens.

    Parameters
    ----------
    folder : RunFolder
        Of a run on texts.
    """

    def __init__(self, folder: RunFolder) -> None:
        self._folder = folder
        before, after = folder.metadata["settings"]["window"]
        self.window: tuple[int, int] = (before, after)

    def windows(
        self, contexts: Array, positions: Array, before: int | None = None, after: int | None = None
    ) -> NDArray[np.int64]:
        """The tokens around positions in contexts.

        Parameters
        ----------
        contexts : ndarray of int64, shape (n,)
            Rows of the inputs.
        positions : ndarray of int64, shape (n,)
        before, after : int, optional
            Number of tokens on each side; the run's own window by default.

        Returns
        -------
        ndarray of int64, shape (n, before + 1 + after)
            Token ids; `BEYOND` outside the context.
        """
        before = self.window[0] if before is None else before
        after = self.window[1] if after is None else after
        tokens, lengths, back = self._contexts(contexts)
        places = positions[:, None] + np.arange(-before, after + 1)
        inside = (places >= 0) & (places < lengths[back][:, None])
        ids = tokens[back[:, None], np.where(inside, places, 0)]
        return np.where(inside, ids, BEYOND)

    def _contexts(self, rows: Array) -> tuple[Array, Array, Array]:
        """Contexts and their lengths, and the index of each row among them."""
        if self._all is not None:
            return *self._all, rows
        unique, back = np.unique(rows, return_inverse=True)
        return *self._folder.contexts(unique), back

    @cached_property
    def _all(self) -> tuple[Array, Array] | None:
        """All contexts, unless they are too many to keep in memory."""
        n, length = self._folder.inputs.headers["tokens"][1]
        return self._folder.contexts(np.arange(n)) if n * length <= _MOST_KEPT_TOKENS else None

    def samples(self, features: Array, before: int, after: int) -> NDArray[np.int64] | None:
        """Windows around the medoids of features anywhere in the run.

        Parameters
        ----------
        features : ndarray of int64, shape (n,)
            Rows of the table of features.
        before, after : int

        Returns
        -------
        ndarray of int64, shape (n, before + 1 + after), or None
            None if the run does not record the positions of the medoids.
        """
        if self._medoids is None:
            return None
        rows, positions = (of_all[features].astype(np.int64) for of_all in self._medoids)
        return self.windows(rows, positions, before, after)

    @cached_property
    def _medoids(self) -> tuple[Array, Array] | None:
        """Input row and position of every feature's medoid."""
        folder = self._folder
        if not {"input", "position"} <= set(folder.columns("features")):
            return None
        numbers = folder.column("features", "input").to_numpy(np.int64)
        index = folder.inputs["index"]
        rows = np.searchsorted(index, numbers).clip(max=len(index) - 1)
        if not np.array_equal(index[rows], numbers):
            raise RunError("features.parquet refers to inputs that inputs.safetensors lacks.")
        # int32, to halve the memory for two million features.
        positions = folder.column("features", "position").to_numpy(np.int64)
        return rows.astype(np.int32), positions.clip(-1, 2**31 - 1).astype(np.int32)

    def contexts(self, start: int, stop: int) -> tuple[dict[str, Array], list[str]]:
        """Whole contexts, with their own vocabulary.

        Returns
        -------
        arrays : dict of str to ndarray
            ``tokens`` (n, L), ``lengths`` (n,), ``number`` (n,): index in the user's data.
        vocabulary : list of str
        """
        tokens, lengths = self._folder.contexts(np.arange(start, stop))
        inside = np.arange(tokens.shape[1]) < lengths[:, None]
        local, vocabulary = self.local({"tokens": np.where(inside, tokens, BEYOND)})
        return {
            **local,
            "lengths": lengths,
            "number": self._folder.inputs["index"][start:stop],
        }, vocabulary

    def local(self, arrays: dict[str, Array]) -> tuple[dict[str, Array], list[str]]:
        """Renumber tokens, so that a file needs only the texts of its own tokens.

        Parameters
        ----------
        arrays : dict of str to ndarray of int

        Returns
        -------
        arrays : dict of str to ndarray of int64
            Indices in the vocabulary; `BEYOND` is unchanged.
        vocabulary : list of str
            The text of each.
        """
        largest = max((int(array.max(initial=-1)) for array in arrays.values()), default=-1)
        # Marking is ten times as fast as sorting. The last element is for `BEYOND`, -1.
        used = np.zeros(largest + 2, dtype=bool)
        for array in arrays.values():
            used[array] = True
        used[BEYOND] = False
        place = np.cumsum(used, dtype=np.int32) - 1
        place[BEYOND] = BEYOND
        local = {name: place[array] for name, array in arrays.items()}
        # A token that a neuron promotes may not occur in the run's texts.
        words = [self._words.get(number, f"<{number}>") for number in np.flatnonzero(used).tolist()]
        return local, words

    @cached_property
    def _words(self) -> dict[int, str]:
        texts = self._folder.token_texts
        return dict(zip(texts.index.tolist(), texts.tolist(), strict=True))
