"""The words that features stand for: their labels, and an index from a token to features."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from polyseme.core.labels import TokenCounts, count_tokens, rank_tokens
from polyseme.core.parallel import in_threads

Array = NDArray[Any]

LABEL_WORDS = 5
# Share of a feature's examples, and number of them, whose max-activating token has to be the
# same for the feature to be found by it.
INDEXED_SHARE, INDEXED_EXAMPLES = 0.25, 2
# Neurons whose examples are read at a time: their tokens fit into a core's cache.
_TOGETHER = 64


class FeatureWords(NamedTuple):
    """What the features of a site stand for.

    Attributes
    ----------
    labels : list of str
        The words that set each feature apart from the site's others.
    found_by : ndarray of int64, shape (n, 3)
        Rows of the vocabulary, of the features, and how many of the feature's examples have
        that token where they activate the neuron most.
    """

    labels: list[str]
    found_by: Array


def feature_words(
    examples: pd.DataFrame,
    features: pd.DataFrame,
    inputs: dict[str, Array],
    words: list[str],
    window: tuple[int, int],
) -> FeatureWords:
    """Labels of a site's features, and the tokens by which they are found.

    Parameters
    ----------
    examples, features : pandas.DataFrame
        The site's rows of the tables.
    inputs : dict of str to ndarray
        The run's contexts and vocabulary.
    words : list of str
        How each token of the vocabulary reads.
    window : (int, int)
        Tokens before and after each example.
    """
    if not len(features):
        return FeatureWords([], np.empty((0, 3), np.int64))
    before, after = window
    offsets = np.arange(-before, after + 1)
    # The token that activates the neuron says more than those around it.
    weights = np.where(offsets == 0, before + after + 1.0, 1.0)
    vocabulary = inputs["vocabulary"]
    # A table of all numbers up to the largest: a search for each would take far longer.
    row_of = np.zeros(int(vocabulary.max(initial=0)) + 1, np.int64)
    row_of[vocabulary] = np.arange(len(vocabulary))
    contexts = np.searchsorted(inputs["index"], examples["input"].to_numpy())
    position, cluster = examples["position"].to_numpy(), _rows_of(features, examples)

    def read(rows: slice) -> TokenCounts:
        at = position[rows, None] + offsets
        context = contexts[rows, None]
        inside = (at >= 0) & (at < inputs["lengths"][context])
        ids = inputs["tokens"][context, np.clip(at, 0, inputs["tokens"].shape[1] - 1)]
        numbers = np.arange(len(at))[:, None]
        return count_tokens(
            row_of[ids[inside]],
            np.broadcast_to(cluster[rows, None], at.shape)[inside],
            np.broadcast_to(weights, at.shape)[inside],
            np.broadcast_to(numbers, at.shape)[inside],
        )

    counts: dict[int, TokenCounts] = {}

    def work(rows: slice) -> None:
        counts[rows.start] = read(rows)

    in_threads(work, _neurons_together(examples["neuron"].to_numpy()))
    found = rank_tokens(
        [counts[start] for start in sorted(counts)],
        n_clusters=len(features),
        vocabulary=len(vocabulary),
        k=LABEL_WORDS,
    )
    central = row_of[inputs["tokens"][contexts, position]]
    names = [*(word.strip() for word in words), ""]  # the last for -1, where there is no token
    labels = [
        " ".join(dict.fromkeys(filter(None, map(names.__getitem__, row))))
        for row in found.tokens.tolist()
    ]
    sizes = features["n_examples"].to_numpy(np.int64)
    return FeatureWords(labels, _index(central, cluster, found.tokens, sizes, len(vocabulary)))


def _neurons_together(neurons: Array) -> list[slice]:
    """Rows of examples to work on at a time, none of a neuron apart from its others."""
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
    # What is said in a label finds the feature too; but a lone example's words say little.
    several = np.flatnonzero(sizes > 1)
    owner = np.repeat(several, named.shape[1])
    token = named[several].ravel()
    labelled = owner[token >= 0] * n_tokens + token[token >= 0]
    chosen = np.union1d(pairs[often], labelled)
    at = np.minimum(np.searchsorted(pairs, chosen), max(len(pairs) - 1, 0))
    held = counts[at] * (pairs[at] == chosen)
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
