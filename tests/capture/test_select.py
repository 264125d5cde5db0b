"""Selectors: a stream in bounded memory equals a choice from everything at once."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from polyseme.capture import (
    AboveFraction,
    FirstActive,
    RandomActive,
    Selection,
    Selector,
    Stratified,
    Stream,
    TopK,
)
from polyseme.capture.select import priorities
from polyseme.errors import InputError
from reference import oracles

Oracle = Callable[[Sequence[float], int], list[int]]
N_NEURONS = 5

CASES: dict[str, tuple[Selector, Oracle]] = {
    "top 1": (TopK(1), lambda v, _: oracles.top_k(v, 1)),
    "top 7": (TopK(7), lambda v, _: oracles.top_k(v, 7)),
    "above 0.75": (AboveFraction(0.75, 9), lambda v, _: oracles.above_fraction(v, 0.75, 9)),
    "above 0.1": (AboveFraction(0.1, 5), lambda v, _: oracles.above_fraction(v, 0.1, 5)),
    "above 1": (AboveFraction(1.0, 100), lambda v, _: oracles.above_fraction(v, 1.0, 100)),
    "first": (FirstActive(6), lambda v, _: oracles.first_active(v, 6, 0.0)),
    "first, minimum": (FirstActive(8, 0.3), lambda v, _: oracles.first_active(v, 8, 0.3)),
    "stratified": (Stratified(6, 3), lambda v, _: oracles.stratified(v, 6, 3, 0)),
    "stratified, rest": (Stratified(7, 3, 9), lambda v, _: oracles.stratified(v, 7, 3, 9)),
    "stratified, one": (Stratified(2, 1, 1), lambda v, _: oracles.stratified(v, 2, 1, 1)),
    "random": (RandomActive(5, 3), lambda v, j: oracles.random_active(v, 5, 3, j)),
}


def activations(seed: int, n: int, kind: str) -> np.ndarray:
    """Activations of neurons that behave differently; the last one is dead."""
    rng = np.random.default_rng(seed)
    if kind == "ties":
        values = rng.integers(-2, 5, (n, N_NEURONS)) * 0.25
    elif kind == "growing":
        # The maximum grows all the time, over many powers of two.
        grown = np.linspace(-8, 8, n)[:, None] + rng.normal(0, 2, (n, N_NEURONS))
        values = 2.0**grown * rng.integers(-1, 2, (n, N_NEURONS))
    elif kind == "close":
        # Apart by a few units in the last place.
        values = 1 + rng.integers(-20, 20, (n, N_NEURONS)) * 2.0**-22
    else:
        values = rng.normal(-0.2, 1, (n, N_NEURONS))
        values[:, 1] *= rng.uniform(size=n) < 0.03
    values[:, -1] = -np.abs(values[:, -1])
    return values.astype(np.float32)


def pieces(seed: int, n: int) -> list[slice]:
    """Batches of very different sizes."""
    rng = np.random.default_rng(seed)
    cuts = np.unique(rng.integers(0, n + 1, rng.integers(0, 12)))
    edges = [0, *cuts.tolist(), n]
    return [slice(a, b) for a, b in itertools.pairwise(edges) if b > a]


def feed(stream: Stream, values: np.ndarray, part: slice, first: int = 0) -> torch.Tensor:
    index = torch.arange(len(values))[part] + first
    # A position that is a function of neuron and input, to be recognised later.
    position = index[:, None] * 10 + torch.arange(values.shape[1])
    return stream.update(torch.from_numpy(values[part]), index, position)


def assert_is(selection: Selection, values: np.ndarray, oracle: Oracle) -> None:
    expected = [oracle(values[:, j].tolist(), j) for j in range(values.shape[1])]
    assert selection.counts.tolist() == [len(chosen) for chosen in expected]
    neuron = np.repeat(np.arange(values.shape[1]), selection.counts)
    assert np.array_equal(selection.neuron, neuron)
    assert selection.index.tolist() == [i for chosen in expected for i in chosen]
    assert np.array_equal(selection.position, selection.index * 10 + selection.neuron)
    assert np.array_equal(selection.activation, values[selection.index, selection.neuron])


def assert_same(a: Selection, b: Selection) -> None:
    for name in ("neuron", "index", "position", "activation", "counts"):
        assert np.array_equal(getattr(a, name), getattr(b, name)), name


@pytest.mark.parametrize("name", CASES)
@given(
    seed=st.integers(0, 100_000),
    n=st.one_of(st.integers(1, 20), st.integers(100, 600)),
    kind=st.sampled_from(["ties", "close", "growing", "normal"]),
)
@settings(max_examples=60)
def test_a_stream_equals_sorting_everything(name: str, seed: int, n: int, kind: str) -> None:
    selector, oracle = CASES[name]
    values = activations(seed, n, kind)
    stream = Stream(selector, N_NEURONS)
    for part in pieces(seed, n):
        feed(stream, values, part)
    assert_is(stream.result(), values, oracle)


@pytest.mark.parametrize("name", CASES)
def test_much_is_dropped_on_the_way_in_these_tests(name: str) -> None:
    # Else the property above would say nothing about it.
    selector, oracle = CASES[name]
    values = np.abs(activations(0, 700, "growing"))
    values[:, -1] = 0
    stream = Stream(selector, N_NEURONS)
    reductions = 0
    inner = stream._reduce

    def counted() -> None:
        nonlocal reductions
        reductions += 1
        inner()

    stream._reduce = counted  # type: ignore[method-assign]
    taken = sum(int(feed(stream, values, slice(at, at + 50)).sum()) for at in range(0, 700, 50))
    # Once a neuron's buffer has overflowed, or the threshold keeps out what comes too late.
    assert reductions >= 1 or taken < (values > 0).sum() / 3
    assert_is(stream.result(), values, oracle)


@pytest.mark.parametrize("name", CASES)
@given(
    seed=st.integers(0, 100_000),
    n=st.one_of(st.integers(1, 20), st.integers(100, 600)),
    kind=st.sampled_from(["ties", "close", "growing", "normal"]),
)
@settings(max_examples=40)
def test_parts_merged_in_any_order_and_grouping_equal_sorting_everything(
    name: str, seed: int, n: int, kind: str
) -> None:
    selector, oracle = CASES[name]
    values = activations(seed, n, kind)
    parts = [Stream(selector, N_NEURONS)]  # one of a shard without inputs
    for part in pieces(seed, n):
        parts.append(Stream(selector, N_NEURONS))
        feed(parts[-1], values, part)
    rng = np.random.default_rng(seed)
    while len(parts) > 1:
        a, b = rng.choice(len(parts), 2, replace=False)
        parts[a].merge(parts[b].state())
        del parts[b]
    assert_is(parts[0].result(), values, oracle)


@pytest.mark.parametrize("name", CASES)
@given(seed=st.integers(0, 100_000), kind=st.sampled_from(["ties", "close", "growing", "normal"]))
@settings(max_examples=30)
def test_a_stream_goes_on_from_any_state(name: str, seed: int, kind: str) -> None:
    selector, oracle = CASES[name]
    n = 300
    values = activations(seed, n, kind)
    stream = Stream(selector, N_NEURONS)
    parts = pieces(seed, n)
    stop = seed % (len(parts) + 1)
    for part in parts[:stop]:
        feed(stream, values, part)
    state = stream.state()
    kept = {key: array.copy() for key, array in state.items()}
    # The first stream goes on after its state was taken, and the state stays what it was.
    for part in parts[stop:]:
        feed(stream, values, part)
    assert_is(stream.result(), values, oracle)
    assert all(np.array_equal(state[key], array) for key, array in kept.items())
    second = Stream(selector, N_NEURONS)
    second.restore(state)
    for part in parts[stop:]:
        feed(second, values, part)
    assert_same(second.result(), stream.result())
    # What the second did to its buffers is its own affair.
    assert all(np.array_equal(state[key], array) for key, array in kept.items())


@pytest.mark.parametrize("name", CASES)
def test_a_result_may_be_asked_for_at_any_time(name: str) -> None:
    selector, oracle = CASES[name]
    values = activations(1, 400, "normal")
    stream = Stream(selector, N_NEURONS)
    assert stream.result().counts.tolist() == [0] * N_NEURONS
    for start in range(0, 400, 50):
        feed(stream, values, slice(start, start + 50))
        assert_is(stream.result(), values[: start + 50], oracle)


@pytest.mark.parametrize("name", CASES)
def test_memory_does_not_grow_with_the_data(name: str) -> None:
    selector, _ = CASES[name]
    stream = Stream(selector, N_NEURONS)

    def held_bytes() -> int:
        tensors = [v for v in vars(stream).values() if torch.is_tensor(v)]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    sizes = set()
    for start in range(0, 6000, 1500):
        values = activations(start, 1500, "normal")
        taken = feed(stream, values, slice(0, 1500), first=start)
        assert taken.shape == values.shape
        neurons = stream.held()[0]
        most = selector.capacity + max(selector.capacity, 64)
        assert np.bincount(neurons.numpy(), minlength=1).max() <= most
        # The threshold itself comes with the first reduction.
        sizes.add(held_bytes() - (0 if stream._bar is None else stream._bar.nbytes))
    assert len(sizes) == 1


def test_everything_held_was_reported_as_taken() -> None:
    for selector, _ in CASES.values():
        stream = Stream(selector, N_NEURONS)
        taken: set[tuple[int, int]] = set()
        values = activations(2, 500, "growing")
        for part in pieces(2, 500):
            rows, neurons = feed(stream, values, part).nonzero(as_tuple=True)
            taken |= set(zip(neurons.tolist(), (rows + part.start).tolist(), strict=True))
            held = stream.held()
            assert set(zip(held[0].tolist(), held[1].tolist(), strict=True)) <= taken


def test_double_precision_is_taken_as_single() -> None:
    # Two numbers that differ in double precision only are a tie, which the first one wins.
    stream = Stream(TopK(1), 1)
    stream.update(torch.tensor([[1.0], [1.0 + 1e-12]], dtype=torch.float64), torch.arange(2))
    assert stream.result().index.tolist() == [0]


# --- what each selector is for ---------------------------------------------------------------


def choose(selector: Selector, values: Sequence[float]) -> list[int]:
    stream = Stream(selector, 1)
    stream.update(torch.tensor(values)[:, None], torch.arange(len(values)))
    return stream.result().index.tolist()


def test_examples_of_each_selector() -> None:
    values = [0.0, 2.0, -3.0, 4.0, 1.0, 4.0, 3.0]
    assert choose(TopK(3), values) == [3, 5, 6]
    assert choose(TopK(100), values) == [3, 5, 6, 1, 4]
    assert choose(AboveFraction(0.75, 10), values) == [3, 5, 6]
    assert choose(AboveFraction(0.75, 2), values) == [3, 5]
    assert choose(FirstActive(3), values) == [1, 3, 4]
    assert choose(FirstActive(3, 2.0), values) == [1, 3, 5]
    assert sorted(choose(RandomActive(5), values)) == [1, 3, 4, 5, 6]
    assert sorted(choose(Stratified(4, 4), values)) in ([1, 3, 4, 6], [1, 4, 5, 6])


def test_an_earlier_peak_is_dropped_once_a_later_one_dwarfs_it() -> None:
    assert choose(AboveFraction(0.5, 10), [1.0] * 300 + [10.0, 4.0, 6.0]) == [300, 302]


@pytest.mark.parametrize(("k", "bins"), [(20, 5), (23, 5), (100, 10), (7, 7), (3, 1)])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_bands_give_their_quota_at_their_exact_edges(k: int, bins: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    values = rng.uniform(-0.2, 3.3, (6000, 2)).astype(np.float32)
    # One band with fewer than its quota, both of them away from the band's edges.
    edge = values[:, 1].max() / bins
    scarce = (values[:, 1] > edge) & (values[:, 1] <= 2 * edge)
    if bins > 1:
        values[scarce, 1] = 0
        values[[100, 4000], 1] = 1.5 * edge
    stream = Stream(Stratified(k, bins, seed), 2)
    for part in pieces(seed, 6000):
        stream.update(torch.from_numpy(values[part]), torch.arange(6000)[part])
    found = stream.result()
    for j in range(2):
        maximum = float(values[:, j].max())
        positive = values[values[:, j] > 0, j].tolist()
        available = np.bincount([oracles.band(v, maximum, bins) for v in positive], minlength=bins)
        taken = np.bincount(
            [oracles.band(v, maximum, bins) for v in found.activation[found.neuron == j].tolist()],
            minlength=bins,
        )
        quota = oracles.quotas(k, bins)
        assert sum(quota) == k
        assert taken.tolist() == np.minimum(quota, available).tolist()


def test_the_random_sample_is_fair_and_seeded() -> None:
    values = torch.ones(1000, 1)
    hits = np.zeros(1000)
    samples = set()
    for seed in range(200):
        stream = Stream(RandomActive(50, seed), 1)
        stream.update(values, torch.arange(1000))
        chosen = stream.result().index
        samples.add(tuple(chosen.tolist()))
        hits[chosen] += 1
    assert len(samples) == 200
    # Binomial with a mean of 10 and a deviation of 3.
    assert hits.mean() == 10
    assert 2.5 < hits.std() < 3.7
    assert abs(hits[:500].sum() - 5000) < 300


def test_neurons_show_different_random_inputs() -> None:
    stream = Stream(RandomActive(10), 4)
    stream.update(torch.ones(1000, 4), torch.arange(1000))
    chosen = stream.result()
    samples = {tuple(chosen.index[chosen.neuron == j].tolist()) for j in range(4)}
    assert len(samples) == 4


def test_priorities_equal_the_oracle_and_differ() -> None:
    index = torch.tensor([0, 1, 2, 77, 2**31, 2**32 - 1])
    for seed in (0, 1, 12345, 2**40):
        found = priorities(index, seed).tolist()
        assert found == [oracles.priority(i, seed) for i in index.tolist()]
    many = priorities(torch.arange(200_000), 0)
    assert len(torch.unique(many)) == 200_000
    assert int(many.min()) >= 0


# --- bad arguments -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TopK(0), r"k is 0; a whole number of at least 1 is expected\."),
        (lambda: TopK(2.0), r"k is 2\.0; a whole number"),  # type: ignore[arg-type]
        (lambda: TopK(True), r"k is True; a whole number of at least 1"),
        (lambda: AboveFraction(0), r"fraction is 0; a number greater than 0 and at most 1 is"),
        (lambda: AboveFraction(1.01), r"fraction is 1\.01; a number greater than 0"),
        (lambda: AboveFraction(float("nan")), "fraction is nan; a number greater than 0"),
        (lambda: AboveFraction("x"), "fraction is 'x'; a number"),  # type: ignore[arg-type]
        (lambda: AboveFraction(0.5, 0), "max_examples is 0; a whole number of at least 1"),
        (lambda: FirstActive(-1), "n is -1; a whole number of at least 1"),
        (lambda: FirstActive(5, -0.1), r"minimum is -0\.1; a number at least 0 is expected"),
        (lambda: FirstActive(5, float("inf")), "minimum is inf; a number at least 0"),
        (lambda: FirstActive(5, None), "minimum is None; a number"),  # type: ignore[arg-type]
        (lambda: Stratified(5, 0), "bins is 0; a whole number of at least 1"),
        (lambda: Stratified(5, 6), "bins is 6 and k is 5; expected at most one bin per example"),
        (lambda: Stratified(5, 5, -1), "seed is -1; a whole number of at least 0"),
        (lambda: RandomActive(5, "a"), "seed is 'a'; a whole number"),  # type: ignore[arg-type]
        (lambda: RandomActive(0), "k is 0; a whole number of at least 1"),
    ],
)
def test_bad_arguments(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(InputError, match=f"^{message}"):
        make()


def test_numpy_integers_are_whole_numbers() -> None:
    assert choose(TopK(np.int64(2)), [1.0, 2.0, 3.0]) == [2, 1]
