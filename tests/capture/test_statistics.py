"""Statistics of activations, gathered in a stream."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from polyseme.capture.statistics import Statistics
from reference import oracles

from .test_select import pieces

N_NEURONS = 6


def activations(seed: int, n: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    values = rng.normal(0, 1, (n, N_NEURONS)) * 2.0 ** rng.integers(-20, 20, (n, 1))
    values[:, 1] = rng.integers(-1, 5, n)  # powers of two, at the edges of bins
    values[:, 2] = -1
    values[:, 3] = np.where(rng.uniform(size=n) < 0.1, 2.0 ** rng.integers(-140, 127, n), 0)
    values[:, 4] = 1.0
    return values.astype(np.float32)


def take_in(statistics: Statistics, values: np.ndarray) -> None:
    statistics.update(torch.from_numpy(values))
    statistics.update_positions(torch.from_numpy((values > 0).sum(axis=0)), 2 * len(values))


def gather(values: np.ndarray, parts: list[slice]) -> Statistics:
    statistics = Statistics(values.shape[1])
    for part in parts:
        take_in(statistics, values[part])
    return statistics


@given(st.integers(0, 100_000), st.one_of(st.integers(1, 12), st.integers(50, 300)))
@settings(max_examples=40)
def test_equals_the_oracle_for_any_batching(seed: int, n: int) -> None:
    values = activations(seed, n)
    found = gather(values, pieces(seed, n)).result()
    for j in range(N_NEURONS):
        expected = oracles.statistics(values[:, j].tolist())
        assert found["density"][j] == expected["density"]
        assert found["position_density"][j] == expected["density"] / 2
        assert found["max_activation"][j] == expected["max_activation"]
        assert found["mean_activation"][j] == pytest.approx(expected["mean_activation"], rel=1e-12)
        assert found["histogram"][j].tolist() == expected["histogram"]
        assert found["histogram_upper"][j] == expected["histogram_upper"]


@given(st.integers(0, 100_000))
@settings(max_examples=20)
def test_goes_on_from_any_state(seed: int) -> None:
    values = activations(seed, 120)
    parts = pieces(seed, 120)
    stop = seed % (len(parts) + 1)
    first = gather(values, parts[:stop])
    state = first.state()
    kept = {name: array.copy() for name, array in state.items()}
    for part in parts[stop:]:
        take_in(first, values[part])
    assert all(np.array_equal(state[name], array) for name, array in kept.items())
    second = Statistics(N_NEURONS)
    second.restore(state)
    for part in parts[stop:]:
        take_in(second, values[part])
    for name, array in first.result().items():
        assert array.tobytes() == second.result()[name].tobytes(), name


def test_bins_count_every_positive_activation_once() -> None:
    found = gather(np.array([[0.5], [1.0], [3.9], [4.0], [-2.0]], np.float32), [slice(0, 5)])
    result = found.result()
    # Just below 4 belongs to a bin below that of 4 itself.
    assert result["histogram_upper"].tolist() == [8.0]
    assert np.flatnonzero(result["histogram"][0]).tolist() == [4, 8, 31, 32]
    assert result["density"].tolist() == [0.8]


def test_nothing_seen_yet() -> None:
    result = Statistics(2).result()
    assert result["density"].tolist() == [0, 0]
    assert np.isnan(result["position_density"]).all()
    assert result["histogram_upper"].tolist() == [0, 0]
    assert not result["histogram"].any()


@given(st.integers(0, 100_000), st.integers(0, 700))
@settings(max_examples=40)
def test_parts_merged_in_any_order_and_grouping_are_the_whole_to_the_last_bit(
    seed: int, n: int
) -> None:
    values = activations(seed, n)
    rng = np.random.default_rng(seed)
    # Shards begin at multiples of 64; one may be empty.
    cuts = [0, *np.sort(rng.integers(0, n // 64 + 1, 4) * 64).tolist(), n]
    parts = [gather(values[a:b], [slice(0, b - a)]) for a, b in itertools.pairwise(cuts)]
    while len(parts) > 1:
        a, b = rng.choice(len(parts), 2, replace=False)
        parts[a].merge(parts[b].state())
        del parts[b]
    whole, merged = gather(values, pieces(seed, max(n, 1))).result(), parts[0].result()
    for name, array in whole.items():
        assert np.array_equal(merged[name], array, equal_nan=True), name
