"""Labels of feature clusters without a language model: each cluster's distinctive tokens."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from polyseme.core.arrays import Floats, as_floats, to_numpy
from polyseme.errors import InputError

Integers = NDArray[np.integer[Any]]


class DistinctiveTokens(NamedTuple):
    """The most distinctive tokens of each cluster, the best first.

    Attributes
    ----------
    tokens : ndarray of int64, shape (n_clusters, k)
        Token ids; -1 if a cluster has fewer distinct tokens.
    scores : ndarray of float64, shape (n_clusters, k)
        Their class-based TF-IDF, above 0; NaN if there is no token.
    """

    tokens: NDArray[np.int64]
    scores: NDArray[np.float64]


class TokenCounts(NamedTuple):
    """Weight of each token in each cluster, in the order of clusters, then tokens.

    Attributes
    ----------
    clusters, tokens : ndarray of int64, shape (n,)
    amounts : ndarray of float64, shape (n,)
        Sums of the weights, above 0.
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

    where tf counts how often t occurs in c, and A is the mean number of tokens per cluster.
    Clusters without tokens do not count in that mean.

    Parameters
    ----------
    tokens : array of int, shape (n,)
        Token ids, less than ``vocabulary``.
    clusters : array of int, shape (n,)
        Cluster of each token, numbered from 0. If the clusters of many neurons are numbered
        consecutively, a token is weighed against all of them.
    n_clusters, vocabulary : int
    k : int
        Number of tokens to return per cluster.
    weights : array of float, shape (n,), optional
        Weight of each token, such as its importance, at least 0; 1 by default.
    examples : array of int, shape (n,), optional
        Example of each token, numbered from 0; an example belongs to one cluster. If given, tokens
        that occur in only one of a cluster's examples are left out: a token that is rare elsewhere
        because it is rare everywhere says nothing about the cluster. If no token occurs in two of a
        cluster's examples, none are left out.

    Returns
    -------
    DistinctiveTokens
        Ties are in the order of token ids.

    Raises
    ------
    InputError
        For a token, cluster or weight out of range, arrays of different lengths, or an example in
        two clusters.
    """
    if k < 1 or n_clusters < 0 or vocabulary < 0:
        raise InputError(
            f"k is {k}, n_clusters {n_clusters} and vocabulary {vocabulary}; expected at least 1, "
            f"0 and 0."
        )
    ids = _numbers(tokens, "tokens", vocabulary, "vocabulary")
    owner = _numbers(clusters, "clusters", n_clusters, "n_clusters")
    amount = np.ones(len(ids)) if weights is None else as_floats(weights, "weights", 1, np.float64)
    if not len(ids) == len(owner) == len(amount):
        raise InputError(
            f"tokens has {len(ids)} entries, clusters {len(owner)} and weights {len(amount)}; "
            f"expected one of each per token."
        )
    if (amount < 0).any():
        where = int(np.argmax(amount < 0))
        raise InputError(f"weights[{where}] is {amount[where]}; expected 0 or more.")

    numbers = None if examples is None else _example_numbers(examples, owner)
    values, kinds = np.unique(amount, return_inverse=True)
    counts = count_tokens(
        ids, owner, np.zeros_like(ids) if numbers is None else numbers, kinds, values
    )
    if numbers is None:
        counts = counts._replace(shared=np.ones_like(counts.shared))
    rarity = token_rarity(
        np.bincount(ids, amount, minlength=vocabulary).astype(np.float64),
        len(np.unique(counts.clusters)),
    )
    result = no_tokens(n_clusters, k)
    rank_tokens(counts, rarity, result)
    return result


def count_tokens(
    tokens: Integers, clusters: Integers, examples: Integers, kinds: Integers, weights: Floats
) -> TokenCounts:
    """Count the tokens of some clusters: the first half of `distinctive_tokens`, unchecked.

    Parameters
    ----------
    tokens, clusters, examples : ndarray of int
        As for `distinctive_tokens`, with shapes that broadcast to that of ``tokens``. A negative
        token means none.
    kinds : ndarray of int
        Index into ``weights`` for each token; broadcasts likewise.
    weights : ndarray of float64, shape (n_kinds,)
    """
    there = (tokens >= 0) & (weights > 0)[kinds]
    if not there.any():
        none = np.empty(0, np.int64)
        return TokenCounts(none, none, np.empty(0), np.empty(0, np.bool_))
    columns = [column.astype(np.int64) for column in (clusters, tokens, examples, kinds)]
    lowest = [max(int(column.min()), 0) for column in columns]
    bits = [
        (int(column.max()) - least).bit_length()
        for column, least in zip(columns, lowest, strict=True)
    ]
    if sum(bits) < 64:
        # All four packed into one number, which sorts far faster than four keys.
        packed = np.zeros_like(columns[0])
        for column, least, width in zip(columns, lowest, bits, strict=True):
            packed = (packed << width) + (column - least)
        packed = np.sort(packed[there])
        pair, kind = packed >> sum(bits[2:]), packed & ((1 << bits[3]) - 1)
        starts = _starts(pair)
        cluster, token = pair[starts] >> bits[1], pair[starts] & ((1 << bits[1]) - 1)
        cluster, token, kind = cluster + lowest[0], token + lowest[1], kind + lowest[3]
        of_example = packed >> bits[3]
    else:
        cluster, token, example, kind = (np.broadcast_to(c, there.shape)[there] for c in columns)
        order = np.lexsort((example, token, cluster))
        cluster, token, of_example, kind = (c[order] for c in (cluster, token, example, kind))
        starts = _starts(cluster, token)
        cluster, token = cluster[starts], token[starts]
    ends = np.append(starts[1:], len(kind)) - 1
    return TokenCounts(
        cluster,
        token,
        np.add.reduceat(weights[kind], starts, dtype=np.float64),
        of_example[starts] != of_example[ends],
    )


def _starts(*columns: NDArray[np.int64]) -> NDArray[np.int64]:
    """Where any column differs from the previous row."""
    new = np.ones(len(columns[0]), bool)
    np.not_equal(columns[0][1:], columns[0][:-1], out=new[1:])
    for column in columns[1:]:
        new[1:] |= column[1:] != column[:-1]
    return np.flatnonzero(new)


def token_rarity(frequency: Floats, n_clusters: int) -> NDArray[np.float64]:
    """Score of a token that makes up a whole cluster: ``log(1 + A / Σ_c tf(t, c))``.

    Parameters
    ----------
    frequency : ndarray of float64, shape (vocabulary,)
        Sum of each token's weights, over all clusters.
    n_clusters : int
        Number of clusters with tokens.
    """
    with np.errstate(divide="ignore", invalid="ignore"):  # for tokens that occur nowhere
        return np.asarray(np.log1p(frequency.sum() / max(n_clusters, 1) / frequency))


def rank_tokens(counts: TokenCounts, rarity: Floats, result: DistinctiveTokens) -> None:
    """Find the most distinctive tokens: the second half of `distinctive_tokens`.

    Parameters
    ----------
    counts : TokenCounts
        Counts of all tokens of some clusters.
    rarity : ndarray of float64, shape (vocabulary,)
        From `token_rarity`.
    result : DistinctiveTokens
        Filled in place, in the rows of these clusters; unused entries stay unchanged.
    """
    if not len(counts.tokens):
        return
    first = _starts(counts.clusters)
    row = np.repeat(np.arange(len(first)), np.diff(first, append=len(counts.clusters)))
    scores = counts.amounts / np.add.reduceat(counts.amounts, first)[row] * rarity[counts.tokens]
    # Rounding must not decide between equal scores, of which the first token is taken.
    remaining = np.round(scores, 12)
    remaining[~counts.shared & np.logical_or.reduceat(counts.shared, first)[row]] = -np.inf
    for rank in range(result.tokens.shape[1]):
        best = np.maximum.reduceat(remaining, first)
        winners = np.flatnonzero((remaining == best[row]) & (remaining > -np.inf))
        if not len(winners):
            break
        winners = winners[np.diff(row[winners], prepend=-1) > 0]
        result.tokens[counts.clusters[winners], rank] = counts.tokens[winners]
        result.scores[counts.clusters[winners], rank] = scores[winners]
        remaining[winners] = -np.inf


def no_tokens(n_clusters: int, k: int) -> DistinctiveTokens:
    """Result for clusters without tokens."""
    return DistinctiveTokens(
        np.full((n_clusters, k), -1, np.int64), np.full((n_clusters, k), np.nan)
    )


def _example_numbers(examples: Any, owner: NDArray[np.int64]) -> NDArray[np.int64]:
    numbers = _numbers(examples, "examples", np.iinfo(np.int32).max, "2³¹")
    if len(numbers) != len(owner):
        raise InputError(
            f"examples has {len(numbers)} entries, tokens {len(owner)}; expected one of each per "
            f"token."
        )
    cluster = np.zeros(int(numbers.max(initial=-1)) + 1, np.int64)
    cluster[numbers] = owner
    if (cluster[numbers] != owner).any():
        where = int(np.argmax(cluster[numbers] != owner))
        raise InputError(
            f"Example {numbers[where]} is in the clusters {owner[where]} and "
            f"{cluster[numbers[where]]}; an example belongs to one cluster."
        )
    return numbers


def _numbers(array: Any, name: str, limit: int, limit_name: str) -> NDArray[np.int64]:
    values = to_numpy(array)
    if values.ndim != 1 or (values.size and values.dtype.kind not in "iu"):
        raise InputError(
            f"{name} has shape {values.shape} and dtype {values.dtype}; expected one integer per "
            f"token."
        )
    bad = (values < 0) | (values >= limit)
    if bad.any():
        where = int(np.argmax(bad))
        raise InputError(
            f"{name}[{where}] is {values[where]}; expected numbers from 0 to {limit - 1}, below "
            f"{limit_name}."
        )
    return values.astype(np.int64)
