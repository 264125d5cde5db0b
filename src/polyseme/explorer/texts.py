"""The text of a run as the pages read it: windows of tokens, with a vocabulary of their own."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from polyseme.store import RunFolder

Array = NDArray[Any]

BEYOND = -1
"""Stands for a token where there is no context."""


class Texts:
    """The contexts of a run and how their tokens read.

    Parameters
    ----------
    folder : RunFolder
        Of a run of texts.
    """

    def __init__(self, folder: RunFolder) -> None:
        self._folder = folder
        self.window = tuple(int(n) for n in folder.metadata["settings"]["window"])

    def windows(
        self, contexts: Array, positions: Array, before: int | None = None, after: int | None = None
    ) -> NDArray[np.int64]:
        """The tokens around places in contexts.

        Parameters
        ----------
        contexts : ndarray of int64, shape (n,)
            Rows of the inputs.
        positions : ndarray of int64, shape (n,)
        before, after : int, optional
            How many tokens on either side; the run's own window by default.

        Returns
        -------
        ndarray of int64, shape (n, before + 1 + after)
            Numbers of tokens; `BEYOND` outside of the context.
        """
        inputs = self._folder.inputs
        before = self.window[0] if before is None else before
        after = self.window[1] if after is None else after
        places = positions[:, None] + np.arange(-before, after + 1)
        inside = (places >= 0) & (places < inputs["lengths"][contexts][:, None])
        tokens = inputs["tokens"][contexts[:, None], np.where(inside, places, 0)]
        return np.where(inside, tokens, BEYOND).astype(np.int64)

    def contexts(self, start: int, stop: int) -> tuple[dict[str, Array], list[str]]:
        """Whole contexts, with a vocabulary of their own.

        Returns
        -------
        arrays : dict of str to ndarray
            ``tokens`` (n, L), ``lengths`` (n,), ``number`` (n,): in the user's data.
        vocabulary : list of str
        """
        inputs = self._folder.inputs
        lengths = inputs["lengths"][start:stop]
        tokens = inputs["tokens"][start:stop]
        inside = np.arange(tokens.shape[1]) < lengths[:, None]
        local, vocabulary = self.local({"tokens": np.where(inside, tokens, BEYOND)})
        return {**local, "lengths": lengths, "number": inputs["index"][start:stop]}, vocabulary

    def local(self, arrays: dict[str, Array]) -> tuple[dict[str, Array], list[str]]:
        """Renumber tokens, so that a file needs to tell only how its own tokens read.

        Parameters
        ----------
        arrays : dict of str to ndarray of int

        Returns
        -------
        arrays : dict of str to ndarray of int64
            Places in the vocabulary; `BEYOND` stays.
        vocabulary : list of str
            How each reads.
        """
        used = np.unique(np.concatenate([array.ravel() for array in arrays.values()] or [[]]))
        used = used[used >= 0].astype(np.int64)
        local = {
            name: np.where(array < 0, BEYOND, np.searchsorted(used, array))
            for name, array in arrays.items()
        }
        known: pd.Series[str] = self._folder.token_texts.reindex(used)
        # A token that a neuron promotes need not occur in the run's texts.
        words = [
            word if isinstance(word, str) else f"<{number}>"
            for number, word in zip(used.tolist(), known.tolist(), strict=True)
        ]
        return local, words
