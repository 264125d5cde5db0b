"""Distinctive tokens, against class-based TF-IDF written with dictionaries."""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from polyseme.core import labels
from polyseme.core.labels import (
    count_tokens,
    distinctive_tokens,
    no_tokens,
    rank_tokens,
    token_rarity,
)
from polyseme.errors import InputError


def oracle(
    tokens: list[int],
    clusters: list[int],
    weights: list[float],
    n_clusters: int,
    k: int,
    examples: list[int] | None = None,
) -> tuple[list[list[int]], list[list[float]]]:
    counts: dict[int, dict[int, float]] = defaultdict(lambda: defaultdict(float))
    frequency: dict[int, float] = defaultdict(float)
    having: dict[tuple[int, int], set[int]] = defaultdict(set)
    for place, (token, cluster, weight) in enumerate(zip(tokens, clusters, weights, strict=True)):
        if weight > 0:
            having[cluster, token].add(place if examples is None else examples[place])
            counts[cluster][token] += weight
            frequency[token] += weight
    sizes = {cluster: math.fsum(count.values()) for cluster, count in counts.items()}
    mean_size = math.fsum(sizes.values()) / len(sizes) if sizes else 0.0
    ids, scores = [], []
    for cluster in range(n_clusters):
        scored = [
            (count / sizes[cluster] * math.log(1 + mean_size / frequency[token]), token)
            for token, count in counts[cluster].items()
        ]
        shared = [pair for pair in scored if len(having[cluster, pair[1]]) > 1]
        scored = shared if shared and examples is not None else scored
        scored.sort(key=lambda pair: (-round(pair[0], 12), pair[1]))
        best = scored[:k]
        ids.append([token for _, token in best] + [-1] * (k - len(best)))
        scores.append([score for score, _ in best] + [math.nan] * (k - len(best)))
    return ids, scores


@given(
    st.lists(
        st.tuples(st.integers(0, 6), st.integers(0, 3), st.sampled_from([0.0, 0.25, 1.0, 1.5])),
        max_size=40,
    ),
    st.integers(1, 9),
    st.booleans(),
    st.integers(0, 3),
)
def test_scores_equal_the_oracle(
    entries: list[tuple[int, int, float]], k: int, weighted: bool, n_examples: int
) -> None:
    tokens, clusters, weights = (
        (list(x) for x in zip(*entries, strict=True)) if entries else [[]] * 3
    )
    if not weighted:
        weights = [1.0] * len(tokens)
    # Each cluster's tokens are dealt out to as many examples; to none, if there are 0.
    examples = [c * n_examples + i % n_examples for i, c in enumerate(clusters) if n_examples]
    found = distinctive_tokens(
        np.array(tokens, np.int64),
        np.array(clusters, np.int64),
        n_clusters=5,
        vocabulary=7,
        k=k,
        weights=np.array(weights) if weighted else None,
        examples=np.array(examples, np.int64) if n_examples else None,
    )
    ids, scores = oracle(tokens, clusters, weights, 5, k, examples if n_examples else None)
    assert found.tokens.tolist() == ids
    np.testing.assert_allclose(found.scores, scores, rtol=1e-12)
    assert found.tokens.dtype == np.int64


def test_by_hand() -> None:
    # Token 0 is everywhere; 1 is only in cluster 0, 2 only in cluster 1.
    found = distinctive_tokens(
        [0, 0, 1, 1, 0, 0, 2], [0, 0, 0, 0, 1, 1, 1], n_clusters=2, vocabulary=3
    )
    assert found.tokens.tolist() == [[1, 0, -1, -1, -1], [2, 0, -1, -1, -1]]
    # Seven tokens in two clusters: 3.5 each.
    assert found.scores[0, 0] == pytest.approx(2 / 4 * math.log(1 + 3.5 / 2))
    assert found.scores[1, 1] == pytest.approx(2 / 3 * math.log(1 + 3.5 / 4))


def test_a_token_of_one_example_says_nothing_of_its_cluster() -> None:
    # Cluster 0: token 1 is in both examples; 2 is in one, twice. Cluster 1 shares nothing.
    tokens, clusters = [1, 2, 2, 1, 0, 3, 0, 4], [0, 0, 0, 0, 0, 1, 1, 1]
    given_examples = [0, 0, 0, 1, 1, 2, 3, 2]
    alone = distinctive_tokens(tokens, clusters, n_clusters=2, vocabulary=5, k=3)
    found = distinctive_tokens(
        tokens, clusters, n_clusters=2, vocabulary=5, k=3, examples=given_examples
    )
    assert alone.tokens[0].tolist() == [1, 2, 0]
    assert found.tokens[0].tolist() == [1, -1, -1]
    assert found.scores[0, 0] == alone.scores[0, 0]
    assert np.isnan(found.scores[0, 1:]).all()
    assert found.tokens[1].tolist() == alone.tokens[1].tolist()


def test_ties_are_in_the_order_of_ids_and_not_of_the_text() -> None:
    found = distinctive_tokens([6, 2, 4, 0], [0, 0, 0, 0], n_clusters=1, vocabulary=7, k=3)
    assert found.tokens.tolist() == [[0, 2, 4]]
    # Sums that only rounding tells apart.
    weights = [0.1, 0.2, 0.3, 0.3, 0.2, 0.1]
    assert sum(weights[:3]) != sum(weights[3:])
    found = distinctive_tokens(
        [5, 5, 5, 3, 3, 3], [0] * 6, n_clusters=1, vocabulary=7, k=2, weights=weights
    )
    assert found.tokens.tolist() == [[3, 5]]


def test_empty_clusters_do_not_change_the_others() -> None:
    few = distinctive_tokens([0, 1, 1], [0, 0, 1], n_clusters=2, vocabulary=2, k=2)
    many = distinctive_tokens([0, 1, 1], [0, 0, 3], n_clusters=6, vocabulary=2, k=2)
    np.testing.assert_array_equal(many.tokens[[0, 3]], few.tokens)
    np.testing.assert_array_equal(many.scores[[0, 3]], few.scores)
    assert (many.tokens[[1, 2, 4, 5]] == -1).all()


def test_numbers_too_large_for_one_are_sorted_by_each() -> None:
    rng = np.random.default_rng(0)
    clusters, tokens, examples = rng.integers(0, 5, (3, 200))
    kinds, weights = rng.integers(0, 3, 200), np.array([0.0, 1.5, 2.0])
    few = count_tokens(tokens, clusters, examples, kinds, weights)
    # 5 · 2²² of each: together they take 73 bits.
    many = count_tokens(*(x << 22 for x in (tokens, clusters, examples)), kinds, weights)
    assert (many.clusters == few.clusters << 22).all()
    assert (many.tokens == few.tokens << 22).all()
    assert (many.amounts == few.amounts).all()
    assert (many.shared == few.shared).all()
    assert 0 < few.shared.sum() < len(few.shared)


def test_parts_are_ranked_as_all_of_it() -> None:
    rng = np.random.default_rng(1)
    clusters = np.sort(rng.integers(0, 12, 400))
    tokens, weights = rng.integers(0, 9, 400), rng.integers(0, 3, 400).astype(float)
    examples = clusters * 4 + rng.integers(0, 4, 400)
    columns = (tokens, clusters, examples, weights.astype(int))
    whole = distinctive_tokens(
        tokens, clusters, weights=weights, examples=examples, n_clusters=13, vocabulary=9, k=3
    )
    found = no_tokens(13, 3)
    rarity = token_rarity(np.bincount(tokens, weights), len(set(clusters[weights > 0])))
    for a, b in itertools.pairwise(np.searchsorted(clusters, [0, 3, 4, 9, 12])):
        counts = count_tokens(*(column[a:b] for column in columns), np.arange(3.0))
        rank_tokens(counts, rarity, found)
    assert (found.tokens == whole.tokens).all()
    np.testing.assert_array_equal(found.scores, whole.scores)


def test_nothing_at_all() -> None:
    for n_clusters in (0, 2):
        none = np.empty(0, int)
        found = distinctive_tokens(none, none, n_clusters=n_clusters, vocabulary=0, k=2)
        assert found.tokens.tolist() == [[-1, -1]] * n_clusters
    found = distinctive_tokens([1], [0], n_clusters=1, vocabulary=2, k=1, weights=[0.0])
    assert found.tokens.tolist() == [[-1]]


def test_a_whole_site_takes_no_dense_matrix() -> None:
    # As a dense matrix, the counts would be 40 GB.
    rng = np.random.default_rng(0)
    n = 1_000_000
    tokens, clusters = rng.integers(0, 50_000, n), np.sort(rng.integers(0, 100_000, n))
    found = distinctive_tokens(tokens, clusters, n_clusters=100_000, vocabulary=50_000)
    assert found.tokens.shape == (100_000, 5)
    mine = tokens[clusters == 77]
    assert set(found.tokens[77]) - {-1} <= set(mine)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokens": [0, 9]}, r"tokens\[1\] is 9; expected numbers from 0 to 3, below vocabulary"),
        (
            {"clusters": [-1, 0]},
            r"clusters\[0\] is -1; expected numbers from 0 to 1, below n_clusters",
        ),
        ({"tokens": [0.5, 1]}, r"tokens has shape \(2,\) and dtype float64; expected one integer"),
        (
            {"clusters": [0]},
            r"tokens has 2 entries, clusters 1 and weights 2; expected one of each",
        ),
        ({"weights": [1]}, r"tokens has 2 entries, clusters 2 and weights 1; expected one of each"),
        ({"examples": [0]}, r"examples has 1 entries, tokens 2; expected one of each"),
        ({"examples": [7, 7]}, r"Example 7 is in the clusters 0 and 1; an example belongs to one"),
        ({"weights": [1, -2]}, r"weights\[1\] is -2\.0; expected 0 or more"),
        ({"weights": [1, np.nan]}, r"weights holds nan at index \(1,\); every value must be fini"),
        ({"k": 0}, r"k is 0, n_clusters 2 and vocabulary 4; expected at least 1, 0 and 0"),
    ],
)
def test_bad_input(change: dict[str, Any], message: str) -> None:
    given = {"tokens": [0, 1], "clusters": [0, 1], "n_clusters": 2, "vocabulary": 4, **change}
    with pytest.raises(InputError, match=message):
        distinctive_tokens(given.pop("tokens"), given.pop("clusters"), **given)


def test_the_order_of_additions_decides_no_tie() -> None:
    amounts = np.array([0.3 + 0.2 + 0.1, 0.1 + 0.2 + 0.3])
    assert amounts[0] < amounts[1]
    counts = labels.TokenCounts(np.zeros(2, int), np.array([3, 5]), amounts, np.ones(2, bool))
    found = labels.no_tokens(1, 2)
    labels.rank_tokens(counts, np.ones(6), found)
    assert found.tokens.tolist() == [[3, 5]]
