"""Planted neurons: what is known of them is right, seeded, and other in the two halves."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.sparse import csr_matrix

from polyseme.errors import InputError
from polyseme.evaluate.planted import (
    CONCEPTS,
    Positions,
    by_contribution,
    by_label,
    class_directions,
    concept_labels,
    half_of,
    number_of,
    random_directions,
    shuffled,
    sums,
    synthetic,
    usable_concepts,
)


def classes(n: int = 3000, d: int = 20) -> tuple[Positions, np.ndarray]:
    """Six classes, 0 to 5, each along its own axis, and inputs of none (-1)."""
    rng = np.random.default_rng(0)
    labels = rng.integers(-1, 6, n)
    inputs = rng.normal(size=(n, d)).astype(np.float32) / 2 + 2
    inputs[np.arange(n), labels] += 4 * (labels >= 0)
    return Positions(inputs, np.arange(n) // 3), labels


def test_the_strongest_are_one_of_each_group_by_brute_force() -> None:
    positions, _ = classes(600)
    a = np.random.default_rng(1).normal(size=600)
    best = {g: max(range(3 * g, 3 * g + 3), key=lambda i: a[i]) for g in range(200)}
    expected = sorted(best.values(), key=lambda i: -a[i])[:100]
    assert positions.strongest(a).tolist() == expected


def test_moments_are_those_of_all_inputs() -> None:
    positions, _ = classes()
    assert positions.mean == pytest.approx(positions.inputs.mean(axis=0), abs=1e-5)
    assert positions.covariance == pytest.approx(np.cov(positions.inputs.T, bias=True), abs=1e-4)


@pytest.mark.parametrize("whitened", [False, True])
def test_the_truth_of_sums_of_classes_is_the_label_of_what_is_shown(whitened: bool) -> None:
    positions, labels = classes()
    chosen = [4, 1, 3]
    directions = class_directions(positions, labels, chosen, whitened=whitened)
    for direction, number in zip(directions, chosen, strict=True):
        along = positions.inputs @ direction
        reach = np.sort(along[labels == number])[-30] - np.median(along[labels != number])
        assert reach == pytest.approx(1, abs=1e-3)
        assert np.argmax(direction) == number
    truth_of = by_label(labels, chosen)
    made = sums(positions, directions, truth_of, (1, 2, 3), 6, np.random.default_rng(0))
    numbers = [number_of(neuron.truth) for neuron in made]
    assert (np.array(numbers) <= [1, 2, 3] * 2).all()
    assert 3 in numbers
    for neuron in made:
        activations = positions.inputs @ neuron.gradient
        assert (np.diff(activations[neuron.shown]) <= 1e-5).all()
        for at, meaning in zip(neuron.shown, neuron.truth, strict=True):
            assert meaning == -1 or chosen[meaning] == labels[at]
        # Of a class that it is not made of nothing is known.
        made_of = np.unique(neuron.truth[neuron.truth >= 0])
        others = ~np.isin(labels[neuron.shown], np.array(chosen)[made_of])
        assert (neuron.truth[others] == -1).all()
    again = sums(positions, directions, truth_of, (1, 2, 3), 6, np.random.default_rng(0))
    assert all((a.gradient == b.gradient).all() for a, b in zip(made, again, strict=True))


def test_the_truth_by_contribution_is_what_adds_most() -> None:
    activations = np.array([[1.0, 3, 0], [2, 3, 0], [0, 0, 9], [0, 0, 0]])
    chosen, scales = np.array([0, 1]), np.array([1.0, 0.6])
    for form in (activations, csr_matrix(activations)):
        assert by_contribution(form)(np.arange(4), chosen, scales).tolist() == [1, 0, -1, -1]


def test_the_gradient_of_a_gated_neuron_is_that_of_its_activation() -> None:
    positions, labels = classes()
    directions = class_directions(positions, labels, [0, 1])
    up = np.random.default_rng(2).normal(size=20).astype(np.float32)
    (neuron,) = sums(
        positions, directions, by_label(labels, [0, 1]), (2,), 1, np.random.default_rng(0), up=up
    )
    plain = sums(positions, directions, by_label(labels, [0, 1]), (2,), 1, np.random.default_rng(0))
    weights = plain[0].gradient
    x = positions.inputs.astype(np.float64)

    def activation(h: np.ndarray) -> np.ndarray:
        g = 4 * (h - x.mean(axis=0)) @ weights
        side = (h - x.mean(axis=0)) @ up / (3 * (x @ up).std())
        return g / (1 + np.exp(-g)) * (1 + side)

    at = x[neuron.shown[:5]]
    for axis in range(20):
        step = 1e-5 * np.eye(20)[axis]
        slope = (activation(at + step) - activation(at - step)) / 2e-5
        assert neuron.gradient[:5, axis] == pytest.approx(slope, abs=1e-3)
    assert (np.diff(activation(x[neuron.shown])) <= 1e-3).all()


def test_random_directions_mean_one_thing_and_a_shuffle_keeps_the_numbers() -> None:
    positions, labels = classes()
    rng = np.random.default_rng(0)
    assert {number_of(n.truth) for n in random_directions(positions, 3, rng)} == {1}
    directions = class_directions(positions, labels, [0, 1])
    made = sums(positions, directions, by_label(labels, [0, 1]), (1, 2), 12, rng)
    several = [neuron for neuron in made if number_of(neuron.truth) > 1]
    assert 0 < len(several) < 12
    for neuron, mixed in zip(several, shuffled(made, rng), strict=True):
        assert (np.bincount(neuron.truth + 1) == np.bincount(mixed.truth + 1)).all()
        assert (neuron.truth != mixed.truth).any()


def test_concepts_are_whole_words() -> None:
    concepts = list(CONCEPTS)
    the, ships = concepts.index("the"), concepts.index("ships")
    pieces = ["Ġthe", "the", "ĠShip", "ping", "Ġblue", ",", "Ġo"]
    tokens = np.array([0, 2, 3, 2, 5, 6, 1, 0, 2])
    groups = np.array([0, 0, 0, 0, 0, 0, 0, 0, 1])
    # "The shipping ship, othe the | ship"
    expected = [the, -1, -1, ships, -1, -1, -1, the, ships]
    assert concept_labels(tokens, groups, pieces).tolist() == expected
    pieces = ["the", "##the", "ship", "##ping", "blue", ",", "o"]
    tokens = np.array([0, 2, 3, 2, 5, 6, 1, 0, 2])
    assert concept_labels(tokens, groups, pieces).tolist() == expected


def test_no_word_is_of_two_concepts() -> None:
    words = [word for words in CONCEPTS.values() for word in words.split()]
    assert len(words) == len(set(words))


def test_halves_are_disjoint_and_seeded() -> None:
    one, other = half_of(67, "development", 3), half_of(67, "test", 3)
    assert sorted([*one, *other]) == list(range(67))
    assert (half_of(67, "test", 3) == other).all()
    assert (half_of(67, "test", 4) != other).any()


def test_rare_concepts_are_left_out_and_too_few_are_refused() -> None:
    labels = np.repeat(np.arange(len(CONCEPTS)), 80)
    for half in ("development", "test"):
        assert usable_concepts(labels, half, 0, "a") == half_of(len(CONCEPTS), half, 0).tolist()
    match = r"Only 3 concepts of the test half occur at least 80 times in the .*; .*a longer text"
    some = half_of(len(CONCEPTS), "test", 0)[:3]
    with pytest.raises(InputError, match=match):
        usable_concepts(np.repeat(some, 90), "test", 0, "a.txt")


def test_synthetic_inputs_are_sums_of_their_features() -> None:
    pytest.importorskip("sae_lens")
    options = {"d": 32, "features": 40, "probability": 0.05, "noise": 0.0, "n": 500}
    positions, directions, activations = synthetic(0, **options)
    assert positions.inputs == pytest.approx(activations @ directions, abs=1e-4)
    assert 0.02 < (activations > 0).mean() < 0.12
    again = synthetic(0, **options)
    assert (again[2] == activations).all()
    assert (synthetic(1, **options)[2] != activations).any()
