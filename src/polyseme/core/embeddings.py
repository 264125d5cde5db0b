"""Neuron embeddings: how an input met a neuron's weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from scipy.special import erf, expit

from polyseme.core.arrays import Floats, as_floats, to_numpy
from polyseme.errors import InputError, one_of


def neuron_embeddings(h: Any, w: Any) -> Any:
    """Neuron embeddings ``e = h ⊙ w`` of a neuron's examples.

    Parameters
    ----------
    h : array or tensor, shape (n, d)
        Pre-neuron embeddings: what the neuron's layer multiplies by its weights.
    w : array or tensor, shape (d,) or (n, d)
        The weights of a linear neuron; or, for any other neuron, its gradient ∂a/∂h at each
        example (see `gated_gradient` for gated neurons). For a linear neuron ``a = f(w·h + b)``
        the two point the same way wherever f' > 0.

    Returns
    -------
    array or tensor, shape (n, d)
        A tensor where both arguments are tensors (differentiable), else a NumPy array.

    Raises
    ------
    InputError
        If the shapes do not fit.

    References
    ----------
    A. Foote, *Tackling Polysemanticity with Neuron Embeddings*, arXiv 2411.08166 (2024).
    With a gradient for ``w`` this is gradient × input of one layer, as in one-layer PURE:
    M. Dreyer et al., arXiv 2404.06453 (2024).

    Examples
    --------
    >>> neuron_embeddings([[1.0, 2.0], [3.0, 0.0]], [0.5, -1.0])
    array([[ 0.5, -2. ],
           [ 1.5, -0. ]])
    """
    if not (hasattr(h, "detach") and hasattr(w, "detach")):
        h, w = to_numpy(h), to_numpy(w)
    if h.ndim != 2:
        raise InputError(
            f"h has shape {tuple(h.shape)}; (n, d) is expected: one row for each example."
        )
    if tuple(w.shape) not in {(h.shape[1],), tuple(h.shape)}:
        raise InputError(
            f"w has shape {tuple(w.shape)} and h has shape {tuple(h.shape)}; w of shape "
            f"({h.shape[1]},), or one row for each example, is expected."
        )
    return h * w


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


GATES = ("silu", "gelu", "gelu_tanh", "relu", "sigmoid")

# Each gives f(g) and f'(g); ReLU's slope at 0 is 0, as in torch.
_GATES: dict[str, Callable[[Floats], tuple[Floats, Floats]]] = {
    "silu": _silu,
    "gelu": _gelu,
    "gelu_tanh": _gelu_tanh,
    "relu": lambda x: (np.maximum(x, 0), (x > 0).astype(x.dtype)),
    "sigmoid": _sigmoid,
}


def gated_gradient(
    h: Any,
    w_gate: Any,
    w_up: Any,
    b_gate: float = 0.0,
    b_up: float = 0.0,
    *,
    activation: str = "silu",
) -> Floats:
    """Gradient ∂a/∂h of a gated neuron ``a = f(g)·u`` at each example, in closed form.

    With ``g = w_gate·h + b_gate`` and ``u = w_up·h + b_up`` the gradient is
    ``f'(g)·u·w_gate + f(g)·w_up``. ``neuron_embeddings(h, gated_gradient(h, ...))`` are the
    neuron's embeddings.

    Parameters
    ----------
    h : array or tensor, shape (n, d)
        Pre-neuron embeddings.
    w_gate, w_up : array or tensor, shape (d,)
        The neuron's row of the gate and of the up projection.
    b_gate, b_up : float
        Their biases.
    activation : {"silu", "gelu", "gelu_tanh", "relu", "sigmoid"}
        The gate's nonlinearity f: SwiGLU, GEGLU (exact or tanh form), ReGLU, GLU.

    Returns
    -------
    ndarray, shape (n, d)
        float32 for float32 or half-precision ``h``, else float64.
    """
    if activation not in _GATES:
        raise InputError(one_of("gate activation", str(activation), _GATES))
    x = as_floats(h, "h", 2)
    gate = as_floats(w_gate, "w_gate", 1, x.dtype)
    up = as_floats(w_up, "w_up", 1, x.dtype)
    for name, w in (("w_gate", gate), ("w_up", up)):
        if w.shape != x.shape[1:]:
            raise InputError(
                f"{name} has shape {w.shape} and h has shape {x.shape}; "
                f"({x.shape[1]},) is expected."
            )
    g, u = x @ gate + x.dtype.type(b_gate), x @ up + x.dtype.type(b_up)
    of_gate, of_up = gate_factors(g, u, activation)
    return np.asarray(of_gate[:, None] * gate + of_up[:, None] * up, dtype=x.dtype)


def gate_factors(g: Floats, u: Floats, activation: str) -> tuple[Floats, Floats]:
    """Factors of ``w_gate`` and ``w_up`` in ∂a/∂h: ``f'(g)·u`` and ``f(g)``, of any shape."""
    if activation not in _GATES:
        raise InputError(one_of("gate activation", str(activation), _GATES))
    f, slope = _GATES[activation](g)
    return slope * u, f
