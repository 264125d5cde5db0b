"""Labels of feature clusters without a language model: the tokens that set a cluster apart."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from polyseme.core.arrays import as_floats, to_numpy
from polyseme.errors import InputError


class DistinctiveTokens(NamedTuple):
    """The tokens that set each cluster apart, the most distinctive first.

    Attributes
    ----------
    tokens : ndarray of int64, shape (n_clusters, k)
        Token ids; -1 where a cluster has fewer different tokens.
    scores : ndarray of float64, shape (n_clusters, k)
        Their class-based TF-IDF, greater than 0; NaN where there is no token.
    """

    tokens: NDArray[np.int64]
    scores: NDArray[np.float64]


def distinctive_tokens(
    tokens: Any,
    clusters: Any,
    *,
    n_clusters: int,
    vocabulary: int,
    k: int = 5,
    weights: Any = None,
    examples: Any = None,
) -> DistinctiveTokens:
    """Tokens that are frequent in a cluster and rare elsewhere, by class-based TF-IDF.

    The score of token t in cluster c is (Grootendorst, arXiv 2203.05794)::

        tf(t, c) / Σ_t tf(t, c) · log(1 + A / Σ_c tf(t, c))

    where tf counts how often t stands in c, and A is the mean number of tokens of a cluster.
    Clusters without tokens are not counted in that mean.

    Parameters
    ----------
    tokens : array of int, shape (n,)
        Token ids, less than ``vocabulary``.
    clusters : array of int, shape (n,)
        Which cluster each token stands in, numbered from 0. With the clusters of many neurons
        numbered one after the other, a token is weighed against all of them.
    n_clusters, vocabulary : int
    k : int
        How many tokens of each cluster to return.
    weights : array of float, shape (n,), optional
        What each token counts, such as its importance; 0 or more. 1 by default.
    examples : array of int, shape (n,), optional
        Which example each token stands in, numbered from 0; an example is of one cluster. If
        given, a token that only one of a cluster's examples has is left out: what is rare
        elsewhere because it is rare everywhere says nothing of the cluster. Where no token of
        a cluster is in two of its examples, none is left out.

    Returns
    -------
    DistinctiveTokens
        Equal scores are in the order of token ids.

    Raises
    ------
    InputError
        For a token, a cluster or a weight out of range, arrays of different lengths, or an
        example of two clusters.
    """
    if k < 1 or n_clusters < 0 or vocabulary < 0:
        raise InputError(
            f"k is {k}, n_clusters {n_clusters} and vocabulary {vocabulary}; at least 1, 0 and 0 "
            "are expected."
        )
    ids = _numbers(tokens, "tokens", vocabulary, "vocabulary")
    owner = _numbers(clusters, "clusters", n_clusters, "n_clusters")
    amount = np.ones(len(ids)) if weights is None else as_floats(weights, "weights", 1, np.float64)
    if not len(ids) == len(owner) == len(amount):
        raise InputError(
            f"tokens has {len(ids)} entries, clusters {len(owner)} and weights {len(amount)}; "
            "one of each for every token is expected."
        )
    if (amount < 0).any():
        where = int(np.argmax(amount < 0))
        raise InputError(f"weights[{where}] is {amount[where]}; 0 or more is expected.")

    # Adds up what stands in the same place, and sorts each row by token.
    counts = sparse.coo_array((amount, (owner, ids)), shape=(n_clusters, vocabulary)).tocsr()
    counts.sum_duplicates()
    counts.eliminate_zeros()
    row = np.repeat(np.arange(n_clusters), np.diff(counts.indptr))
    sizes = np.bincount(row, counts.data, minlength=n_clusters)
    frequency = np.bincount(counts.indices, counts.data, minlength=vocabulary)
    mean_size = sizes.sum() / max(int(np.count_nonzero(sizes)), 1)
    rarity = np.log1p(mean_size / frequency[counts.indices])
    scores = counts.data / sizes[row] * rarity
    if examples is not None:
        used = amount > 0
        held = _held_by(
            _example_numbers(examples, owner)[used], owner[used], ids[used], counts.shape
        )
        shared = held > 1
        scores[~shared & (np.bincount(row, shared, minlength=n_clusters)[row] > 0)] = -np.inf

    found = DistinctiveTokens(
        np.full((n_clusters, k), -1, np.int64), np.full((n_clusters, k), np.nan)
    )
    # Rounding must not decide between equal scores: of these the first token is taken.
    left = np.round(scores, 12)
    filled = np.flatnonzero(np.diff(counts.indptr))
    for rank in range(k if len(filled) else 0):
        best = np.full(n_clusters, -np.inf)
        best[filled] = np.maximum.reduceat(left, counts.indptr[filled])
        at = np.flatnonzero((left == best[row]) & np.isfinite(left))
        at = at[np.diff(row[at], prepend=-1) > 0]
        found.tokens[row[at], rank] = counts.indices[at]
        found.scores[row[at], rank] = scores[at]
        left[at] = -np.inf
    return found


def _example_numbers(examples: Any, owner: NDArray[np.int64]) -> NDArray[np.int64]:
    numbers = _numbers(examples, "examples", np.iinfo(np.int32).max, "2³¹")
    if len(numbers) != len(owner):
        raise InputError(
            f"examples has {len(numbers)} entries, tokens {len(owner)}; one of each for every "
            "token is expected."
        )
    cluster = np.zeros(int(numbers.max(initial=-1)) + 1, np.int64)
    cluster[numbers] = owner
    if (cluster[numbers] != owner).any():
        where = int(np.argmax(cluster[numbers] != owner))
        raise InputError(
            f"Example {numbers[where]} is in the clusters {owner[where]} and "
            f"{cluster[numbers[where]]}; an example is of one cluster."
        )
    return numbers


def _held_by(
    examples: NDArray[np.int64],
    owner: NDArray[np.int64],
    ids: NDArray[np.int64],
    shape: tuple[int, int],
) -> NDArray[np.int64]:
    """How many examples of each cluster have each token: in the order of the counts of tokens."""
    n_examples = int(examples.max(initial=-1)) + 1
    has = sparse.coo_array(
        (np.ones(len(ids), np.int64), (examples, ids)), shape=(n_examples, shape[1])
    ).tocsr()
    has.sum_duplicates()
    cluster = np.zeros(n_examples, np.int64)
    cluster[examples] = owner
    each = np.repeat(cluster, np.diff(has.indptr))
    held = sparse.coo_array((np.ones(len(each), np.int64), (each, has.indices)), shape=shape)
    held = held.tocsr()
    held.sum_duplicates()
    return np.asarray(held.data)


def _numbers(array: Any, name: str, limit: int, of: str) -> NDArray[np.int64]:
    values = to_numpy(array)
    if values.ndim != 1 or (values.size and values.dtype.kind not in "iu"):
        raise InputError(
            f"{name} has shape {values.shape} and dtype {values.dtype}; one integer for each "
            "token is expected."
        )
    bad = (values < 0) | (values >= limit)
    if bad.any():
        where = int(np.argmax(bad))
        raise InputError(
            f"{name}[{where}] is {values[where]}; numbers from 0 to {limit - 1}, less than "
            f"{of}, are expected."
        )
    return values.astype(np.int64)
