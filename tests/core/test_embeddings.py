"""Neuron embeddings, and the closed form of a gated neuron's gradient."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from polyseme.core import gated_gradient, neuron_embeddings
from polyseme.errors import InputError
from reference import oracles

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
        (H[0], W, r"h has shape \(3,\); \(n, d\) is expected"),
        (H[None], W, r"h has shape \(1, 2, 3\)"),
        (H, W[:2], r"w has shape \(2,\) and h has shape \(2, 3\); w of shape \(3,\), or one row"),
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
        InputError, match=r"w_up has shape \(2,\) and h has shape \(2, 3\); \(3,\) is expected"
    ):
        gated_gradient(H, W, W[:2])
    with pytest.raises(InputError, match=r"w_gate holds nan at index \(1,\)"):
        gated_gradient(H, [0.0, np.nan, 0.0], W)
    with pytest.raises(InputError, match="h holds complex128 values; real numbers"):
        gated_gradient(H * 1j, W, W)
