"""Nonlinearities of gated neurons: their values and slopes, and how to recognise them."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from scipy.special import erf, expit

from polyseme.core.arrays import Floats
from polyseme.errors import InputError, one_of


def _gelu_tanh(x: Floats) -> tuple[Floats, Floats]:
    c = np.sqrt(2 / np.pi)
    t = np.tanh(c * (x + 0.044715 * x**3))
    slope = 0.5 * (1 + t) + 0.5 * x * (1 - t**2) * c * (1 + 3 * 0.044715 * x**2)
    return 0.5 * x * (1 + t), slope


def _gelu(x: Floats) -> tuple[Floats, Floats]:
    cdf = 0.5 * (1 + erf(x / np.sqrt(2)))
    return x * cdf, cdf + x * np.exp(-0.5 * x**2) / np.sqrt(2 * np.pi)


def _silu(x: Floats) -> tuple[Floats, Floats]:
    s = expit(x)
    return x * s, s * (1 + x * (1 - s))


def _sigmoid(x: Floats) -> tuple[Floats, Floats]:
    s = expit(x)
    return s, s * (1 - s)


# Each returns f(g) and f'(g); ReLU's slope at 0 is 0, as in torch.
_GATES: dict[str, Callable[[Floats], tuple[Floats, Floats]]] = {
    "silu": _silu,
    "gelu": _gelu,
    "gelu_tanh": _gelu_tanh,
    "relu": lambda x: (np.maximum(x, 0), (x > 0).astype(x.dtype)),
    "sigmoid": _sigmoid,
}

GATES = tuple(_GATES)


def gate_factors(g: Floats, u: Floats, activation: str) -> tuple[Floats, Floats]:
    """Factors of ``w_gate`` and ``w_up`` in ∂a/∂h: ``f'(g)·u`` and ``f(g)``, of any shape."""
    if activation not in _GATES:
        raise InputError(one_of("gate activation", str(activation), _GATES))
    f, slope = _GATES[activation](g)
    return slope * u, f


def known_gate(function: Callable[[Floats], Floats]) -> str | None:
    """Name of a nonlinearity, identified by its values; None if it is not one of `GATES`.

    Parameters
    ----------
    function : callable
        Maps an array of float32 to one of the same shape, element by element.
    """
    # A wide range, as some variants are clipped at 6, 7 or 10.
    grid = np.linspace(-32, 32, 2561)
    values = function(grid.astype(np.float32))
    # By its values, as Transformers has several names for each.
    for name, gate in _GATES.items():
        if np.allclose(gate(grid)[0], values, atol=1e-5):
            return name
    return None
