"""Neuron embeddings by each way of reading an input, one example at a time as an oracle."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from polyseme.core import (
    Gated,
    General,
    Linear,
    Neurons,
    gated_gradient,
    neuron_embeddings,
    neurons,
    stored_neurons,
)
from polyseme.core.gates import GATES as KNOWN
from polyseme.core.gates import known_gate
from polyseme.errors import InputError
from reference import oracles

from .test_distances import some_vectors

H = np.array([[1.0, -2.0, 0.5], [3.0, 0.0, -1.0]])
W = np.array([0.5, -1.0, 4.0])
E = np.array([[0.5, 2.0, 2.0], [1.5, 0.0, -4.0]])

GATES = {
    "silu": torch.nn.functional.silu,
    "gelu": torch.nn.functional.gelu,
    "gelu_tanh": lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
    "relu": torch.relu,
    "sigmoid": torch.sigmoid,
}


def test_numpy_and_lists() -> None:
    assert np.array_equal(neuron_embeddings(H, W), E)
    assert np.array_equal(neuron_embeddings(H.tolist(), W.tolist()), E)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_precision_of_the_input_is_kept(dtype: type) -> None:
    assert neuron_embeddings(H.astype(dtype), W.astype(dtype)).dtype == dtype


def test_mixed_kinds_give_numpy() -> None:
    for h, w in ((torch.tensor(H), W), (H, torch.tensor(W, requires_grad=True))):
        found = neuron_embeddings(h, w)
        assert isinstance(found, np.ndarray)
        assert np.array_equal(found, E)
    half = torch.tensor(H, dtype=torch.bfloat16)
    assert np.array_equal(neuron_embeddings(half, W), E)


def test_tensors_stay_tensors_and_differentiable() -> None:
    h = torch.tensor(H, requires_grad=True)
    w = torch.tensor(W, requires_grad=True)
    found = neuron_embeddings(h, w)
    assert torch.is_tensor(found)
    assert np.array_equal(found.detach().numpy(), E)
    found.sum().backward()
    assert np.array_equal(w.grad.numpy(), H.sum(axis=0))
    assert np.array_equal(h.grad.numpy(), np.tile(W, (2, 1)))


def test_a_gradient_row_for_each_example() -> None:
    rows = np.array([[1.0, 2.0, 3.0], [-1.0, 0.0, 2.0]])
    assert np.array_equal(neuron_embeddings(H, rows), H * rows)


@pytest.mark.parametrize(
    ("h", "w", "message"),
    [
        (H[0], W, r"h has shape \(3,\); expected \(n, d\)"),
        (H[None], W, r"h has shape \(1, 2, 3\)"),
        (
            H,
            W[:2],
            r"w has shape \(2,\) and h has shape \(2, 3\); expected w of shape \(3,\), or with",
        ),
        (H, np.ones((3, 3)), r"w has shape \(3, 3\) and h has shape \(2, 3\)"),
        (torch.tensor(H), torch.ones(1), r"w has shape \(1,\) and h has shape \(2, 3\)"),
    ],
)
def test_shapes_that_do_not_fit(h: object, w: object, message: str) -> None:
    with pytest.raises(InputError, match=message):
        neuron_embeddings(h, w)


@pytest.mark.parametrize("activation", GATES)
@given(seed=st.integers(0, 10_000), scale=st.sampled_from([0.3, 1.0, 6.0]))
@settings(max_examples=8)
def test_gated_gradient_is_that_of_autograd(activation: str, seed: int, scale: float) -> None:
    rng = np.random.default_rng(seed)
    h = scale * rng.standard_normal((6, 4))
    gate, up = rng.standard_normal((2, 4))
    b_gate, b_up = rng.standard_normal(2)
    x = torch.tensor(h, requires_grad=True)
    f = GATES[activation]
    a = f(x @ torch.tensor(gate) + b_gate) * (x @ torch.tensor(up) + b_up)
    (expected,) = torch.autograd.grad(a.sum(), x)
    found = gated_gradient(h, gate, up, b_gate, b_up, activation=activation)
    np.testing.assert_allclose(found, expected.numpy(), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("activation", GATES)
def test_gated_gradient_is_that_of_finite_differences(activation: str) -> None:
    rng = np.random.default_rng(1)
    h, (gate, up) = rng.standard_normal((5, 3)), rng.standard_normal((2, 3))

    def neuron(x: np.ndarray) -> float:
        g = torch.tensor(x @ gate + 0.3)
        return float(GATES[activation](g)) * float(x @ up - 0.2)

    expected = [oracles.finite_differences(neuron, row) for row in h]
    found = gated_gradient(h, gate, up, 0.3, -0.2, activation=activation)
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-8)


def test_gated_gradient_keeps_single_precision() -> None:
    rng = np.random.default_rng(2)
    h, (gate, up) = rng.standard_normal((5, 3)), rng.standard_normal((2, 3))
    exact = gated_gradient(h, gate, up, 0.1, 0.2)
    single = gated_gradient(torch.tensor(h).float(), gate, up, 0.1, 0.2)
    assert exact.dtype == np.float64
    assert single.dtype == np.float32
    np.testing.assert_allclose(single, exact, rtol=1e-5, atol=1e-6)


def test_a_linear_neurons_gradient_points_the_way_of_its_weights() -> None:
    # With a constant gate the gated neuron is linear, so h * w is its special case.
    found = gated_gradient(H, np.zeros(3), W, b_gate=2.0, activation="relu")
    assert np.array_equal(found, np.tile(2 * W, (2, 1)))


def test_gated_gradient_says_what_is_wrong() -> None:
    with pytest.raises(
        InputError,
        match=r"Unknown gate activation: 'tanh'. .*Must be one of: silu, gelu, gelu_tanh, relu",
    ):
        gated_gradient(H, W, W, activation="tanh")
    with pytest.raises(
        InputError,
        match=r"w_up has shape \(2,\) and h has shape \(2, 3\); expected w_up of shape \(3,\)",
    ):
        gated_gradient(H, W, W[:2])
    with pytest.raises(InputError, match=r"w_gate holds nan at index \(1,\)"):
        gated_gradient(H, [0.0, np.nan, 0.0], W)
    with pytest.raises(InputError, match="h holds complex128 values; expected real numbers"):
        gated_gradient(H * 1j, W, W)


# --- layers ------------------------------------------------------------------------------------


def some_gated(gate: str, n: int = 5, d: int = 4, seed: int = 0) -> Gated:
    rng = np.random.default_rng(seed)
    weights, up_weights = rng.standard_normal((2, n, d)).astype(np.float32)
    biases = rng.standard_normal((2, n)).astype(np.float32)
    return Gated(weights, up_weights, biases[0], biases[1], gate)


def some_layers() -> dict[str, Neurons]:
    linear = Linear(np.random.default_rng(1).standard_normal((5, 4)).astype(np.float32))
    gated = {gate: some_gated(gate) for gate in GATES}

    def of_gated(h: np.ndarray, neurons: np.ndarray) -> np.ndarray:
        return np.stack(
            [gated["silu"].gradient(row[None], j)[0] for row, j in zip(h, neurons, strict=True)]
        )

    return {"linear": linear, **gated, "general": General(linear.weights, of_gated)}


def one_by_one(name: str, layer: Neurons, h: np.ndarray, neurons: np.ndarray) -> list[np.ndarray]:
    """Each embedding by itself: from weights, or by autograd of the gated formula."""
    if name == "linear":
        return [row * layer.weights[j] for row, j in zip(h, neurons, strict=True)]
    gated = some_gated("silu" if name == "general" else name)
    embeddings = []
    for row, j in zip(h, neurons, strict=True):
        x = torch.tensor(row, dtype=torch.float64, requires_grad=True)
        gate, up = (torch.tensor(w[j]).double() for w in (gated.weights, gated.up_weights))
        g, u = x @ gate + float(gated.gate_bias[j]), x @ up + float(gated.up_bias[j])
        (gradient,) = torch.autograd.grad(GATES[gated.gate](g) * u, x)
        embeddings.append(row * gradient.numpy())
    return embeddings


@pytest.mark.parametrize("name", some_layers())
@pytest.mark.parametrize("in_order", [True, False])
def test_a_layers_embeddings_are_those_of_each_example(
    name: str, in_order: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(neurons, "_NEURONS", 2)
    monkeypatch.setattr(neurons, "_ROWS", 7)
    layer = some_layers()[name]
    rng = np.random.default_rng(2)
    h = rng.standard_normal((30, 4)).astype(np.float32)
    of = rng.integers(0, 5, 30)
    of = np.sort(of) if in_order else of
    expected = one_by_one(name, layer, h, of)
    before = h.copy()
    found = layer.embed(h, of)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    assert np.array_equal(h, before), "what is handed in stays as it is"
    assert layer.embed(h, of, in_place=True) is h
    assert np.array_equal(h, found)


@pytest.mark.parametrize("name", ["linear", "silu", "general"])
def test_precisions_and_no_example(name: str) -> None:
    layer = some_layers()[name]
    h = np.random.default_rng(3).standard_normal((6, 4))
    of = np.repeat([0, 3], 3)
    exact = layer.embed(h, of)
    assert exact.dtype == np.float64
    half = layer.embed(h.astype(np.float16), of)
    assert half.dtype == np.float32
    np.testing.assert_allclose(half, exact, rtol=0.02, atol=0.02)
    assert np.allclose(layer.embed(np.ones((6, 4), int), of), layer.embed(np.ones((6, 4)), of))
    assert layer.embed(h[:0], of[:0]).shape == (0, 4)


@pytest.mark.parametrize(
    ("h", "of"), [((6, 3), (6,)), ((6, 4), (5,)), ((6, 4), (6, 1)), ((4,), (1,))]
)
def test_vectors_and_neurons_that_do_not_fit(h: tuple[int, ...], of: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match=r"^h has shape .*; expected \(m, 4\) and \(m,\), one"):
        some_layers()["linear"].embed(np.ones(h), np.zeros(of, int))


@pytest.mark.parametrize("name", ["linear", *GATES])
def test_stored_neurons_embed_identically(name: str) -> None:
    layer = some_layers()[name]
    stored = stored_neurons(layer.arrays(), layer.gate)
    assert type(stored) is type(layer)
    assert set(layer.arrays()) <= set(neurons.STORED)
    h, of = np.ones((5, 4)), np.arange(5)
    assert np.array_equal(stored.embed(h, of), layer.embed(h, of))


@pytest.mark.parametrize("gate", GATES)
def test_a_gate_is_known_by_what_it_computes(gate: str) -> None:
    assert set(KNOWN) == set(GATES)
    assert known_gate(lambda x: GATES[gate](torch.from_numpy(x)).numpy()) == gate
    assert known_gate(lambda x: 1.001 * GATES[gate](torch.from_numpy(x)).numpy()) is None


def test_up_weights_of_another_shape() -> None:
    with pytest.raises(
        InputError, match=r"^up_weights has shape \(2, 3\) and weights \(3, 3\); expected the same"
    ):
        Gated(np.eye(3), np.ones((2, 3)), np.zeros(3), np.zeros(3), "silu")


# --- background --------------------------------------------------------------------------------

SEEDS = st.integers(0, 10_000)


@given(SEEDS, st.integers(2, 8), st.integers(1, 5))
@settings(max_examples=30)
def test_background_distance_equals_the_oracle(seed: int, m: int, d: int) -> None:
    background, weights = some_vectors(seed, m, d), some_vectors(seed + 1, 3, d)
    found = Linear(weights).background_distance(background)
    expected = oracles.background_distance(background, weights)
    np.testing.assert_allclose(found, expected, atol=1e-12)


def test_each_group_of_neurons_has_its_own_background() -> None:
    background, weights = some_vectors(0, 10, 3).reshape(2, 5, 3), some_vectors(1, 4, 3)
    found = Linear(weights).background_distance(background)
    expected = [
        *oracles.background_distance(background[0], weights[:2]),
        *oracles.background_distance(background[1], weights[2:]),
    ]
    np.testing.assert_allclose(found, expected, atol=1e-12)


def test_background_of_a_one_hot_neuron_is_nought() -> None:
    background = np.random.default_rng(0).uniform(1, 2, (20, 6))
    found = Linear(np.eye(6)[:2]).background_distance(background)
    np.testing.assert_allclose(found, 0, atol=1e-12)


def test_background_that_does_not_fit() -> None:
    with pytest.raises(
        InputError,
        match=r"background has shape \(1, 3\) and weights has shape \(2, 3\); "
        "expected at least two rows of 3 values",
    ):
        Linear(np.ones((2, 3))).background_distance(np.ones((1, 3)))
    with pytest.raises(InputError, match="expected at least two rows of 4 values"):
        some_gated("silu").background_distance(np.ones((5, 3)))


@pytest.mark.parametrize("activation", GATES)
def test_background_distance_of_gated_neurons_equals_the_oracle(activation: str) -> None:
    rng = np.random.default_rng(0)
    h, (gate, up) = rng.standard_normal((7, 4)), rng.standard_normal((2, 3, 4))
    b_gate, b_up = rng.standard_normal((2, 3)) + 1
    found = Gated(gate, up, b_gate, b_up, activation).background_distance(h)
    for neuron, value in enumerate(found):
        gradients = gated_gradient(
            h, gate[neuron], up[neuron], b_gate[neuron], b_up[neuron], activation=activation
        )
        expected = oracles.metrics(h * gradients, [0] * 7)["mean_distance"]
        assert value == pytest.approx(expected, abs=1e-12)


def test_background_of_a_constant_gate_and_of_a_gradient() -> None:
    h = np.random.default_rng(0).normal(size=(9, 16))
    constant = Gated(np.zeros((2, 16)), np.eye(16)[:2], np.ones(2), np.ones(2), "silu")
    linear = Linear(np.eye(16)[:2]).background_distance(h)
    assert constant.background_distance(h) == pytest.approx(linear, abs=1e-9)
    assert np.isnan(some_layers()["general"].background_distance(np.ones((3, 4)))).all()
