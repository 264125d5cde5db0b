"""Labels of feature clusters without a language model: the tokens that set a cluster apart."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from polyseme.core.arrays import Floats, as_floats, to_numpy
from polyseme.core.parallel import in_threads
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


class TokenCounts(NamedTuple):
    """How much of each token stands in each cluster, in the order of clusters, then tokens.

    Attributes
    ----------
    clusters, tokens : ndarray of int64, shape (n,)
    amounts : ndarray of float64, shape (n,)
        Sums of the weights, greater than 0.
    shared : ndarray of bool, shape (n,)
        Whether more than one example of the cluster has the token.
    """

    clusters: NDArray[np.int64]
    tokens: NDArray[np.int64]
    amounts: NDArray[np.float64]
    shared: NDArray[np.bool_]


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

    numbers = None if examples is None else _example_numbers(examples, owner)
    counts = count_tokens(ids, owner, amount, np.zeros_like(ids) if numbers is None else numbers)
    if numbers is None:
        counts = counts._replace(shared=np.ones_like(counts.shared))
    return rank_tokens([counts], n_clusters=n_clusters, vocabulary=vocabulary, k=k)


def count_tokens(
    tokens: NDArray[np.int64],
    clusters: NDArray[np.int64],
    weights: Floats,
    examples: NDArray[np.int64],
) -> TokenCounts:
    """Count the tokens of some clusters: the first half of `distinctive_tokens`, unchecked.

    Parameters
    ----------
    tokens, clusters, weights, examples : ndarray, shape (n,)
        As for `distinctive_tokens`.
    """
    used = weights > 0
    columns = clusters[used], tokens[used], examples[used]
    if not len(columns[0]):
        none = np.empty(0, np.int64)
        return TokenCounts(none, none, np.empty(0), np.empty(0, np.bool_))
    cluster, token, example = (values - values.min() for values in columns)
    n_tokens, n_examples = int(token.max()) + 1, int(example.max()) + 1
    if (int(cluster.max()) + 1) * n_tokens * n_examples < 2**63:
        # One number for all three, as one sort takes far less than three.
        order = np.argsort((cluster * n_tokens + token) * n_examples + example)
    else:
        order = np.lexsort((example, token, cluster))
    cluster, token, example = (values[order] for values in columns)
    first = np.flatnonzero((np.diff(cluster, prepend=-1) != 0) | (np.diff(token, prepend=-1) != 0))
    last = np.append(first[1:], len(order)) - 1
    return TokenCounts(
        cluster[first],
        token[first],
        np.add.reduceat(weights[used][order], first, dtype=np.float64),
        example[first] != example[last],
    )


def rank_tokens(
    parts: Sequence[TokenCounts], *, n_clusters: int, vocabulary: int, k: int
) -> DistinctiveTokens:
    """Find the most distinctive tokens: the second half of `distinctive_tokens`.

    Parameters
    ----------
    parts : sequence of TokenCounts
        No cluster is in two of them.
    n_clusters, vocabulary, k : int
        As for `distinctive_tokens`.
    """
    frequency = np.zeros(vocabulary)
    n_filled = 0
    for part in parts:
        frequency += np.bincount(part.tokens, part.amounts, minlength=vocabulary)
        n_filled += int(np.count_nonzero(np.diff(part.clusters, prepend=-1)))
    with np.errstate(divide="ignore", invalid="ignore"):  # of tokens that are nowhere
        rarity = np.log1p(frequency.sum() / max(n_filled, 1) / frequency)
    found = DistinctiveTokens(
        np.full((n_clusters, k), -1, np.int64), np.full((n_clusters, k), np.nan)
    )

    def work(part: TokenCounts) -> None:
        _rank(part, rarity, found)

    in_threads(work, [part for part in parts if len(part.tokens)])
    return found


def _rank(part: TokenCounts, rarity: Floats, found: DistinctiveTokens) -> None:
    """Fill in the rows of a part's clusters."""
    first = np.flatnonzero(np.diff(part.clusters, prepend=-1))
    lengths = np.diff(first, append=len(part.clusters))
    row = np.repeat(np.arange(len(first)), lengths)
    scores = part.amounts / np.add.reduceat(part.amounts, first)[row] * rarity[part.tokens]
    # Rounding must not decide between equal scores: of these the first token is taken.
    left = np.round(scores, 12)
    left[~part.shared & np.logical_or.reduceat(part.shared, first)[row]] = -np.inf
    for rank in range(found.tokens.shape[1]):
        best = np.maximum.reduceat(left, first)
        at = np.flatnonzero((left == best[row]) & (left > -np.inf))
        if not len(at):
            break
        at = at[np.diff(row[at], prepend=-1) > 0]
        found.tokens[part.clusters[at], rank] = part.tokens[at]
        found.scores[part.clusters[at], rank] = scores[at]
        left[at] = -np.inf


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
