"""The words of features: their labels, and an index from tokens to features."""

from __future__ import annotations

from threading import Lock
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from polyseme.core.labels import count_tokens, no_tokens, rank_tokens, token_rarity
from polyseme.core.parallel import in_threads
from polyseme.data.token_texts import pieces
from polyseme.errors import InputError

Array = NDArray[Any]

LABEL_WORDS = 5
# A feature is indexed by a token that is the max-activating token of at least this share, and this
# number, of its examples.
INDEXED_SHARE, INDEXED_EXAMPLES = 0.25, 2
# Examples processed at a time, so that their tokens fit in a core's cache.
_TOGETHER = 64
_NONE = np.empty((0, 3), np.int64)


class FeatureWords(NamedTuple):
    """The words of a site's features.

    Attributes
    ----------
    labels : pyarrow.StringArray
        The words that distinguish each feature from the site's others.
    found_by : ndarray of int64, shape (n, 3)
        Rows of the vocabulary, rows of the features, and the number of the feature's examples that
        have that max-activating token.
    """

    labels: pa.StringArray
    found_by: Array


class Wording:
    """The words of a run's texts, for labelling and indexing its features.

    Parameters
    ----------
    inputs : dict of str to ndarray
        The run's contexts and vocabulary.
    words : list of str
        Text of each token of the vocabulary.
    window : (int, int)
        Tokens before and after each example.
    """

    def __init__(self, inputs: dict[str, Array], words: list[str], window: tuple[int, int]) -> None:
        self._index = inputs["index"]
        self._before, after = window
        # The max-activating token says more than those around it.
        self._weights = np.ones(self._before + 1 + after)
        self._weights[self._before] = len(self._weights)
        vocabulary = inputs["vocabulary"]
        self._n_tokens = len(vocabulary)
        # A lookup table of all ids up to the largest is far faster than searching for each.
        row_of = np.zeros(int(vocabulary.max(initial=0)) + 1, np.int32)
        row_of[vocabulary] = np.arange(len(vocabulary))
        n_contexts, length = inputs["tokens"].shape
        # All windows, as a view of the contexts, with -1 where there is no token.
        rows = np.full((n_contexts, self._before + length + after), -1, np.int32)
        inside = np.arange(length) < inputs["lengths"][:, None]
        rows[:, self._before : self._before + length][inside] = row_of[inputs["tokens"][inside]]
        self._windows = sliding_window_view(rows, len(self._weights), axis=1)
        # Tokens may differ only in spaces; the last entry is for -1, where there is no token.
        names, texts = pd.factorize(np.array([*(word.strip() for word in words), ""], object))
        self._nothing = names[-1]
        self._names, self._texts = np.where(names == self._nothing, -1, names), pa.array(texts)

    def site(self, examples: pd.DataFrame, features: pd.DataFrame) -> FeatureWords:
        """Label a site's features, and find the tokens that index them.

        Parameters
        ----------
        examples, features : pandas.DataFrame
            The site's rows of the tables.
        """
        if not len(features):
            return FeatureWords(self._joined(np.empty((0, LABEL_WORDS), np.int64)), _NONE)
        contexts = np.searchsorted(self._index, examples["input"].to_numpy())
        position, cluster = examples["position"].to_numpy(), _rows_of(features, examples)
        kinds = np.arange(len(self._weights))
        parts = _neurons_together(examples["neuron"].to_numpy())
        frequency, adding = np.zeros(self._n_tokens), Lock()
        distinctive = no_tokens(len(features), LABEL_WORDS)

        def weigh(part: slice) -> None:
            tokens = self._windows[contexts[part], position[part]]
            central = np.bincount(tokens[:, self._before], minlength=self._n_tokens)
            anywhere = np.bincount(tokens[tokens >= 0], minlength=self._n_tokens)
            # Integers, so the sum does not depend on the order of threads.
            with adding:
                frequency[:] += anywhere + central * (self._weights[self._before] - 1)

        def rank(part: slice) -> None:
            # The windows are read again, as their counts would take many times more memory.
            tokens = self._windows[contexts[part], position[part]]
            numbers = np.arange(len(tokens))[:, None]
            counts = count_tokens(tokens, cluster[part, None], numbers, kinds[None], self._weights)
            rank_tokens(counts, rarity, distinctive)

        in_threads(weigh, parts)
        rarity = token_rarity(frequency, len(features))
        in_threads(rank, parts)
        central = self._windows[contexts, position, self._before]
        sizes = features["n_examples"].to_numpy(np.int64)
        index = _index(central, cluster, distinctive.tokens, sizes, self._n_tokens)
        return FeatureWords(self._joined(distinctive.tokens), index)

    def _joined(self, tokens: Array) -> pa.StringArray:
        """Join the distinct words of each row of tokens."""
        names = self._names[tokens]
        for column in range(1, names.shape[1]):
            again = (names[:, :column] == names[:, column, None]).any(axis=1)
            names[again, column] = -1
        # pyarrow omits a row with nothing to join.
        names[(names < 0).all(axis=1), 0] = self._nothing
        columns = [self._texts.take(pa.array(name, mask=name < 0)) for name in names.T]
        return pc.binary_join_element_wise(*columns, " ", null_handling="skip")


def _neurons_together(neurons: Array) -> list[slice]:
    """Slices of examples to process at a time, which never split a neuron."""
    first = np.flatnonzero(np.diff(neurons, prepend=-1))[::_TOGETHER]
    return [slice(*ends) for ends in zip(first, [*first[1:], len(neurons)], strict=True)]


def _rows_of(features: pd.DataFrame, examples: pd.DataFrame) -> Array:
    """Row of each example's feature. Features are ordered by neuron, then number."""
    n_features = np.bincount(features["neuron"].to_numpy())
    first = np.cumsum(n_features) - n_features
    return np.asarray(first[examples["neuron"].to_numpy()] + examples["feature"].to_numpy())


def _index(central: Array, cluster: Array, named: Array, sizes: Array, n_tokens: int) -> Array:
    pairs, counts = np.unique(cluster.astype(np.int64) * n_tokens + central, return_counts=True)
    often = (counts >= INDEXED_EXAMPLES) & (counts >= INDEXED_SHARE * sizes[pairs // n_tokens])
    # Words in a label find the feature too, unless it has only one example.
    several = np.flatnonzero(sizes > 1)
    owner = np.repeat(several, named.shape[1])
    token = named[several].ravel()
    labelled = owner[token >= 0] * n_tokens + token[token >= 0]
    chosen = np.union1d(pairs[often], labelled)
    place = np.minimum(np.searchsorted(pairs, chosen), max(len(pairs) - 1, 0))
    held = counts[place] * (pairs[place] == chosen)
    return np.stack([chosen % n_tokens, chosen // n_tokens, held], axis=1)


def token_index(parts: list[Array], n_tokens: int) -> dict[str, Array]:
    """The index from tokens to features, as arrays of ``inputs.safetensors``.

    Parameters
    ----------
    parts : list of ndarray of int64, shape (n, 3)
        `FeatureWords.found_by` of each site, with rows of the run's table of features.
    n_tokens : int
        Size of the vocabulary.
    """
    token, feature, count = np.concatenate([np.empty((0, 3), np.int64), *parts]).T
    order = np.lexsort((feature, -count, token))
    return {
        "token_features": feature[order],
        "token_features_ends": np.bincount(token, minlength=n_tokens).cumsum().astype(np.int64),
    }


def readings(tokenizer: Any, ids: list[int]) -> list[str]:
    """Like `pieces`, but allowing for the ids without a token that pad many vocabularies."""
    try:
        return pieces(tokenizer, ids)
    except InputError:
        if len(ids) == 1:
            return [f"<{ids[0]}>"]
        half = len(ids) // 2
        return readings(tokenizer, ids[:half]) + readings(tokenizer, ids[half:])
