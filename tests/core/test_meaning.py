"""Meanings against a slow oracle, planted neurons with known ones, and what is refused."""

from __future__ import annotations

import itertools
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.cluster.hierarchy import linkage
from sklearn.metrics import adjusted_rand_score

import polyseme as ps
from polyseme.core.meaning import MIN_SIZE, OVERLAP, meanings_many
from polyseme.core.metrics import rand_index
from polyseme.core.space import Space
from polyseme.errors import InputError


def overlap(cosines: np.ndarray, drives: np.ndarray, a: list[int], b: list[int]) -> float:
    """The definition, pair by pair."""

    def within(group: list[int]) -> float:
        pairs = [cosines[i, j] for i, j in itertools.combinations(group, 2)]
        return max(float(np.mean(pairs)), 1e-6)

    between = float(np.mean([cosines[i, j] for i in a for j in b]))
    alike = float(np.clip(between / np.sqrt(within(a) * within(b)), -1, 3))
    shared = 1.0
    if (drives != 0).any():
        driven = [max(float(np.mean(drives[group])), 1e-3) for group in (a, b)]
        shared = float(np.clip(between / (driven[0] * driven[1]), -1, 3))
    return (2 * alike + shared) / 3


def slow_meanings(
    cosines: np.ndarray, drives: np.ndarray, threshold: float
) -> tuple[np.ndarray, float]:
    """Labels without names, and the separation, by recursion over SciPy's tree."""
    n = len(cosines)
    if n < 2:
        return np.zeros(n, int), np.nan
    distances = np.clip(1 - cosines[np.triu_indices(n, 1)], 0, 2)
    tree = linkage(distances, "average")
    members: list[list[int]] = [[i] for i in range(n)]
    for a, b, _, _ in tree:
        members.append(members[int(a)] + members[int(b)])
    separations: list[float] = []

    def groups(node: int) -> list[list[int]]:
        inner = node
        while inner >= n:
            a, b = (int(child) for child in tree[inner - n, :2])
            if min(len(members[a]), len(members[b])) >= MIN_SIZE:
                apart = overlap(cosines, drives, members[a], members[b])
                separations.append(1 - apart)
                return groups(a) + groups(b) if apart < threshold else [members[node]]
            inner = a if len(members[a]) >= len(members[b]) else b
        return [members[node]]

    found = groups(2 * n - 2)
    labels = np.full(n, -1)
    for number, group in enumerate(found):
        labels[group] = number
    for loose in np.flatnonzero(labels < 0):
        labels[loose] = int(np.argmax([cosines[loose, group].mean() for group in found]))
    return labels, separations[0] if separations else np.nan


def clouds(rng: np.random.Generator, sizes: list[int], d: int = 12) -> np.ndarray:
    centres = 2.0 * rng.standard_normal((len(sizes), d))
    return np.concatenate([rng.normal(c, 1, (n, d)) for c, n in zip(centres, sizes, strict=True)])


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(1, 25), min_size=1, max_size=4),
    st.integers(0, 10_000),
    st.floats(0.2, 0.9),
    st.booleans(),
)
def test_labels_and_separation_are_those_of_the_definition(
    sizes: list[int], seed: int, threshold: float, driven: bool
) -> None:
    rng = np.random.default_rng(seed)
    units = Space.of(np.zeros(12)).inputs(clouds(rng, sizes)).astype(float)
    drives = units @ rng.standard_normal(12) / 4 if driven else np.zeros(len(units))
    cosines = units @ units.T
    found = meanings_many(cosines[None], drives[None], threshold=threshold)
    labels, separation = slow_meanings(cosines, drives, threshold)
    assert rand_index(found.labels[0], labels) == pytest.approx(1)
    assert found.labels[0].max() == labels.max()
    assert found.separations[0] == pytest.approx(separation, abs=1e-6, nan_ok=True)


def test_many_neurons_of_different_sizes_are_as_each_alone() -> None:
    rng = np.random.default_rng(1)
    counts = np.array([0, 1, 2, 9, 30, 60, 60, 41])
    cosines, drives = np.zeros((len(counts), 60, 60)), np.zeros((len(counts), 60))
    for row, n in enumerate(counts):
        h = clouds(rng, [n - n // 2, n // 2]) if n > 1 else rng.standard_normal((n, 12))
        units = Space.of(np.zeros(12)).inputs(h).astype(float)
        cosines[row, :n, :n], drives[row, :n] = units @ units.T, units @ np.ones(12)
    found = meanings_many(cosines, drives, counts)
    for row, n in enumerate(counts):
        alone = meanings_many(cosines[row : row + 1, :n, :n], drives[row : row + 1, :n])
        assert found.labels[row, :n].tolist() == alone.labels[0].tolist()
        assert (found.labels[row, n:] == -1).all()


def planted(meanings: int, *, seed: int = 0, n: int = 100, d: int = 64) -> tuple[np.ndarray, ...]:
    """Inputs of noise and one of some directions each, truth, and the weights that read them."""
    rng = np.random.default_rng(seed)
    directions = np.linalg.qr(rng.standard_normal((d, d)))[0][:meanings]
    truth = np.sort(rng.integers(0, meanings, n))
    return 6 * directions[truth] + rng.standard_normal((n, d)), truth, directions.sum(axis=0)


@pytest.mark.parametrize("meanings", [1, 2, 3, 4])
def test_planted_meanings_are_found(meanings: int) -> None:
    for seed in range(5):
        h, truth, weights = planted(meanings, seed=seed)
        found = ps.meanings(h, mean=np.zeros(64), covariance=np.eye(64), direction=weights)
        assert found.number == meanings
        assert meanings == 1 or adjusted_rand_score(truth, found.labels) > 0.95
        assert found.effective_number == pytest.approx(meanings, abs=0.2)
        assert found.verdict == ("one" if meanings == 1 else "several")
        if meanings > 1:
            assert found.stability > 0.8
            assert found.chance <= 0.05


def test_noise_has_no_clear_groups() -> None:
    rng = np.random.default_rng(3)
    for _ in range(5):
        found = ps.meanings(rng.standard_normal((100, 64)), mean=np.zeros(64))
        assert found.verdict == "no clear groups"


def test_whitening_undoes_what_all_inputs_share() -> None:
    h, truth, weights = planted(2, seed=4)
    rng = np.random.default_rng(4)
    loud = rng.standard_normal(64)
    loud /= np.linalg.norm(loud)
    # One direction varies far more than the others, whatever the neuron means.
    noise = 60 * rng.standard_normal((100, 1)) * loud
    covariance = np.eye(64) + 3600 * np.outer(loud, loud)
    white = ps.meanings(h + noise, mean=np.zeros(64), covariance=covariance, direction=weights)
    plain = ps.meanings(h + noise, mean=np.zeros(64), direction=weights)
    whitened = adjusted_rand_score(truth, white.labels)
    assert whitened > adjusted_rand_score(truth, plain.labels)


def test_a_cut_at_a_higher_overlap_has_more_meanings() -> None:
    h, _, weights = planted(4, seed=5)
    found = ps.meanings(h, mean=np.zeros(64), direction=weights)
    numbers = [found.cut(threshold).number for threshold in (0.05, 0.3, OVERLAP, 0.95)]
    assert numbers == sorted(numbers)
    assert found.cut(OVERLAP).labels.tolist() == found.labels.tolist()


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.integers(0, 25), min_size=1, max_size=6),
    st.integers(0, 10_000),
    st.lists(st.floats(0.01, 1), min_size=1, max_size=20),
)
def test_all_cuts_are_those_at_any_threshold(
    sizes: list[int], seed: int, thresholds: list[float]
) -> None:
    rng = np.random.default_rng(seed)
    found = ps.meanings(clouds(rng, sizes), mean=np.zeros(12), direction=rng.standard_normal(12))
    cuts = found.cuts()
    assert [cut.threshold for cut in cuts] == sorted({cut.threshold for cut in cuts})
    assert cuts[-1].threshold == 1
    # At the ends of the ranges and beyond them too, where a mistake of one would show.
    ends = [cut.threshold for cut in cuts]
    for threshold in [*thresholds, *ends, *np.nextafter(ends[:-1], 1)]:
        cut = next(cut for cut in cuts if threshold <= cut.threshold)
        assert cut.labels.tolist() == found.cut(threshold).labels.tolist()
    numbers = [cut.number for cut in cuts]
    assert numbers == sorted(set(numbers))


def test_labels_are_numbered_by_size() -> None:
    h, _, weights = planted(3, seed=6)
    found = ps.meanings(h, mean=np.zeros(64), direction=weights)
    assert (np.diff(np.bincount(found.labels)) <= 0).all()
    assert found.shares.sum() == pytest.approx(1)


def test_directions_keep_inner_products() -> None:
    rng = np.random.default_rng(7)
    covariance = np.cov(rng.standard_normal((5, 300)) * np.arange(1, 6)[:, None])
    space = Space.of(np.zeros(5), covariance)
    h, gradient = rng.standard_normal(5), rng.standard_normal(5)
    in_space = (h @ space.matrix) @ (gradient @ np.linalg.inv(space.matrix))
    assert in_space == pytest.approx(h @ gradient, rel=1e-4)
    assert np.linalg.norm(space.directions(gradient)) == pytest.approx(1)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=2, max_size=40))
def test_rand_index_is_scikit_learns(pairs: list[tuple[int, int]]) -> None:
    first, second = np.array(pairs).T
    assert rand_index(first, second) == pytest.approx(adjusted_rand_score(first, second))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"h": np.zeros(3)}, r"h has shape \(3,\)"),
        ({"h": np.full((4, 3), np.nan)}, "h"),
        ({"mean": np.zeros(4)}, r"h has shape \(20, 3\) and mean has shape \(4,\)"),
        ({"covariance": np.eye(4)}, r"covariance has shape \(4, 4\) and mean has shape \(3,\)"),
        ({"covariance": -np.eye(3)}, "covariance is not symmetric and positive semi-definite"),
        ({"covariance": np.triu(np.ones((3, 3)))}, "covariance is not symmetric"),
        ({"direction": np.zeros(2)}, r"direction has shape \(2,\); expected \(3,\)"),
        ({"threshold": 0}, r"threshold is 0; an overlap in \(0, 1\] is expected"),
        ({"threshold": "high"}, "threshold is 'high'"),
    ],
)
def test_bad_input_is_refused_in_a_sentence(change: dict[str, object], message: str) -> None:
    arguments = {"h": np.random.default_rng(0).standard_normal((20, 3)), "mean": np.zeros(3)}
    h, *_ = [{**arguments, **change}.pop("h")]
    rest = {k: v for k, v in {**arguments, **change}.items() if k != "h"}
    with pytest.raises(InputError, match=message):
        ps.meanings(h, **rest)  # type: ignore[arg-type]


@pytest.mark.parametrize("n", [0, 1, 2, 4])
def test_few_examples_are_at_most_one_meaning(n: int) -> None:
    h = np.random.default_rng(0).standard_normal((n, 3))
    found = ps.meanings(h, mean=np.zeros(3))
    assert found.number == min(n, 1)
    assert found.cut(0.9).labels.tolist() == found.cuts()[0].labels.tolist() == [0] * n
    assert np.isnan(found.separation)
    assert np.isnan(found.stability)


def test_a_thousand_examples_are_judged_in_little_memory() -> None:
    rng = np.random.default_rng(8)
    h = np.concatenate([rng.normal(5 * np.eye(20)[k], 1, (500, 20)) for k in range(2)])
    found = ps.meanings(h, mean=np.zeros(20), direction=np.ones(20))
    one = ps.meanings(rng.normal(2, 1, (1000, 20)), mean=np.zeros(20), direction=np.ones(20))
    tracemalloc.start()
    assert found.verdict == "several"
    assert len(one.cuts()) > 20
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    # A few matrices of 1,000 x 1,000, not 39 of each, nor one for each cut.
    assert peak < 39 * 8 * 1000**2 / 2
