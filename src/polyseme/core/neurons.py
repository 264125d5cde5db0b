"""How a layer of neurons reads its input, and the resulting neuron embeddings."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from polyseme.core.arrays import Floats, as_floats, to_numpy
from polyseme.core.gates import gate_factors
from polyseme.core.parallel import in_threads
from polyseme.errors import InputError

# Number of neurons, or of examples, that one thread embeds at a time.
_NEURONS, _ROWS = 64, 4096

#: Arrays of a run's site that define how its neurons read.
STORED = ("weights", "up_weights", "gate_bias", "up_bias")


def neuron_embeddings(h: Any, w: Any) -> Any:
    """Neuron embeddings ``e = h ⊙ w`` of a neuron's examples.

    Parameters
    ----------
    h : array or tensor, shape (n, d)
        Pre-neuron embeddings: what the neuron's layer multiplies by its weights.
    w : array or tensor, shape (d,) or (n, d)
        The weights of a linear neuron, or any other neuron's gradient ∂a/∂h at each example (see
        `gated_gradient` for gated neurons). For a linear neuron ``a = f(w·h + b)`` the two point
        the same way wherever f' > 0.

    Returns
    -------
    array or tensor, shape (n, d)
        A differentiable tensor if both arguments are tensors, otherwise a NumPy array.

    Raises
    ------
    InputError
        If the shapes do not match.

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
        raise InputError(f"h has shape {tuple(h.shape)}; expected (n, d), one row per example.")
    if tuple(w.shape) not in {(h.shape[1],), tuple(h.shape)}:
        raise InputError(
            f"w has shape {tuple(w.shape)} and h has shape {tuple(h.shape)}; expected w of shape "
            f"({h.shape[1]},), or with one row per example."
        )
    return _embedded(h, w)


def _embedded(h: Any, gradient: Any, out: Any = None) -> Any:
    """The formula of all neuron embeddings: ``e = h ⊙ ∂a/∂h``."""
    return h * gradient if out is None else np.multiply(h, gradient, out=out)


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
    ``f'(g)·u·w_gate + f(g)·w_up``. ``neuron_embeddings(h, gated_gradient(h, ...))`` gives the
    neuron's embeddings.

    Parameters
    ----------
    h : array or tensor, shape (n, d)
        Pre-neuron embeddings.
    w_gate, w_up : array or tensor, shape (d,)
        The neuron's rows of the gate and the up projection.
    b_gate, b_up : float
        Their biases.
    activation : {"silu", "gelu", "gelu_tanh", "relu", "sigmoid"}
        The gate's nonlinearity f: SwiGLU, GEGLU (exact or tanh form), ReGLU, GLU.

    Returns
    -------
    ndarray, shape (n, d)
        float32 for float32 or half-precision ``h``, otherwise float64.
    """
    x = as_floats(h, "h", 2)
    rows = {}
    for name, w in (("w_gate", w_gate), ("w_up", w_up)):
        rows[name] = as_floats(w, name, 1, x.dtype)
        if rows[name].shape != x.shape[1:]:
            raise InputError(
                f"{name} has shape {rows[name].shape} and h has shape {x.shape}; expected {name} "
                f"of shape ({x.shape[1]},)."
            )
    biases = np.array([float(b_gate), float(b_up)], x.dtype)
    neurons = Gated(rows["w_gate"][None], rows["w_up"][None], biases[:1], biases[1:], activation)
    return neurons.gradient(x, 0).astype(x.dtype, copy=False)


class Neurons(ABC):
    """How a layer of neurons reads its input.

    Made by a site (`Site.neurons`), or from a site's arrays in a run (`stored_neurons`).

    Parameters
    ----------
    weights : ndarray of float, shape (n_neurons, d_in)
        Input weights; for gated neurons, those of the gate.
    """

    #: The nonlinearity of gated neurons.
    gate: str | None = None
    #: Whether embeddings need a gradient that a run cannot store.
    is_general = False

    def __init__(self, weights: Floats) -> None:
        self.weights = weights

    def embed(
        self, h: NDArray[Any], neurons: NDArray[np.integer[Any]], *, in_place: bool = False
    ) -> Floats:
        """Compute the neuron embedding of each input vector.

        Parameters
        ----------
        h : ndarray, shape (m, d_in)
            Pre-neuron embeddings.
        neurons : ndarray of int, shape (m,)
            The neuron that read each of them; fastest if each neuron's rows are consecutive.
        in_place : bool
            Whether to overwrite ``h``, which must be floating-point and writable.

        Returns
        -------
        ndarray, shape (m, d_in)
            In the precision of ``h``, but at least float32.

        Raises
        ------
        InputError
            If the shapes do not match.
        """
        d_in = self.weights.shape[1]
        if neurons.ndim != 1 or h.shape != (len(neurons), d_in):
            raise InputError(
                f"h has shape {h.shape} and neurons {neurons.shape}; expected (m, {d_in}) and "
                f"(m,), one row of h per entry of neurons."
            )
        if not in_place:
            h = h.astype(np.result_type(h, np.float32))
        self._embed(h, neurons)
        return h

    @abstractmethod
    def _embed(self, h: Floats, neurons: NDArray[np.integer[Any]]) -> None:
        """Overwrite ``h`` with embeddings."""

    @abstractmethod
    def gradient(self, h: Floats, neuron: int) -> Floats:
        """Gradient ∂a/∂h of a neuron at its examples, up to a positive factor: (d,) or (n, d)."""

    def mean_gradients(self, h: Floats, neurons: NDArray[np.integer[Any]]) -> Floats:
        """Mean gradient of each neuron over its inputs, in the order of neurons.

        Parameters
        ----------
        h : ndarray, shape (m, d_in)
            Pre-neuron embeddings.
        neurons : ndarray of int, shape (m,)
            The neuron that read each of them, in ascending order.

        Returns
        -------
        ndarray, shape (n, d_in)
            One row for each of the n distinct neurons.
        """
        starts = np.flatnonzero(np.diff(neurons, prepend=-1))
        ends = np.append(starts, len(neurons))[1:]
        means = np.empty((len(starts), self.weights.shape[1]), np.float32)
        for row, (start, end) in enumerate(zip(starts, ends, strict=True)):
            gradient = self.gradient(h[start:end], int(neurons[start]))
            means[row] = gradient if gradient.ndim == 1 else gradient.mean(axis=0)
        return means

    def background_distance(self, background: Any) -> NDArray[np.float64]:
        """Mean distance between embeddings of inputs chosen independently of each neuron.

        Subtracting it from a neuron's ``mean_distance`` gives a calibrated metric: how much closer
        together the neuron's examples are than random inputs under the same weights. A one-hot
        neuron gains nothing from it.

        Parameters
        ----------
        background : array or tensor, shape (m, d_in) or (n_groups, m, d_in)
            Pre-neuron embeddings of at least two inputs drawn at random; with groups of neurons,
            which have equal size, those that each group reads.

        Returns
        -------
        ndarray of float64, shape (n_neurons,)
            NaN for neurons without a closed form.
        """
        h = to_numpy(background)
        groups = as_floats(h[None] if h.ndim == 2 else h, "background", 3, np.float64)
        n_groups, m, d = groups.shape
        if m < 2 or d != self.weights.shape[1]:
            raise InputError(
                f"background has shape {h.shape} and weights has shape {self.weights.shape}; "
                f"expected at least two rows of {self.weights.shape[1]} values."
            )
        size = len(self.weights) // n_groups
        return np.concatenate(
            [
                self._background_distance(rows, slice(group * size, (group + 1) * size))
                for group, rows in enumerate(groups)
            ]
        )

    @abstractmethod
    def _background_distance(self, h: Floats, neurons: slice) -> NDArray[np.float64]: ...

    def arrays(self) -> dict[str, Floats]:
        """The arrays that a run stores, by the names in `STORED`."""
        return {"weights": self.weights}


class _ByNeuron(Neurons):
    """Neurons whose gradients are computed from a few matrix products, neuron by neuron."""

    def _embed(self, h: Floats, neurons: NDArray[np.integer[Any]]) -> None:
        # A neuron's rows are consecutive and fit in a core's cache.
        starts = np.flatnonzero(np.diff(neurons, prepend=-1))
        ends = np.append(starts[1:], len(neurons))

        def work(chunk: slice) -> None:
            for start, end in zip(starts[chunk], ends[chunk], strict=True):
                rows = h[start:end]
                _embedded(rows, self.gradient(rows, neurons[start]), out=rows)

        in_threads(
            work, [slice(first, first + _NEURONS) for first in range(0, len(starts), _NEURONS)]
        )


class Linear(_ByNeuron):
    """Linear neurons, ``a = f(w·h + b)``: ``e = h ⊙ w``."""

    def gradient(self, h: Floats, neuron: int) -> Floats:
        weights: Floats = self.weights[neuron]
        return weights

    def _background_distance(self, h: Floats, neurons: slice) -> NDArray[np.float64]:
        # No pair is formed: with N = √(H² W²ᵀ) the sum of neuron j's unit embeddings is
        # w_j ⊙ Hᵀ(1/N_j), so all neurons together cost two matrix products.
        w = as_floats(self.weights[neurons], "weights", 2, np.float64)
        inverse, alive = _inverse_norms((h**2) @ (w**2).T)
        return _mean_distance(w * (inverse.T @ h), alive, len(h))


class Gated(_ByNeuron):
    """Gated neurons, ``a = f(w·h + b) (v·h + c)``: ``e = h ⊙ (f'(g) u w + f(g) v)``.

    Parameters
    ----------
    weights, up_weights : ndarray of float, shape (n_neurons, d_in)
        Weights w of the gate and v of the up projection.
    gate_bias, up_bias : ndarray of float, shape (n_neurons,)
    gate : str
        The nonlinearity f, see `polyseme.core.gates.GATES`.
    """

    gate: str

    def __init__(
        self, weights: Floats, up_weights: Floats, gate_bias: Floats, up_bias: Floats, gate: str
    ) -> None:
        if up_weights.shape != weights.shape:
            raise InputError(
                f"up_weights has shape {up_weights.shape} and weights {weights.shape}; expected "
                f"the same shape, one row per neuron."
            )
        super().__init__(weights)
        self.up_weights = up_weights
        self.gate_bias, self.up_bias = gate_bias, up_bias
        self.gate = gate

    def gradient(self, h: Floats, neuron: int) -> Floats:
        # Both in one product: with so few columns, it costs hardly more than one of them.
        both = np.stack([self.weights[neuron], self.up_weights[neuron]])
        drives = h @ both.T
        factors = gate_factors(
            drives[:, 0] + self.gate_bias[neuron], drives[:, 1] + self.up_bias[neuron], self.gate
        )
        gradient: Floats = np.stack(factors, axis=1) @ both
        return gradient

    def _background_distance(self, h: Floats, neurons: slice) -> NDArray[np.float64]:
        # With ∂a/∂h = p w + q v, the squared norm of h ⊙ ∂a/∂h is p² h²·w² + 2pq h²·(w ⊙ v) +
        # q² h²·v², so all neurons together cost seven matrix products.
        w, v = (
            as_floats(array[neurons], "weights", 2, np.float64)
            for array in (self.weights, self.up_weights)
        )
        p, q = gate_factors(
            h @ w.T + self.gate_bias[neurons], h @ v.T + self.up_bias[neurons], self.gate
        )
        h2 = h**2
        squares = p**2 * (h2 @ (w**2).T) + 2 * p * q * (h2 @ (w * v).T) + q**2 * (h2 @ (v**2).T)
        inverse, alive = _inverse_norms(squares)
        return _mean_distance(w * ((p * inverse).T @ h) + v * ((q * inverse).T @ h), alive, len(h))

    def arrays(self) -> dict[str, Floats]:
        return {
            "weights": self.weights,
            "up_weights": self.up_weights,
            "gate_bias": self.gate_bias,
            "up_bias": self.up_bias,
        }


class General(Neurons):
    """Neurons without a closed form: ``e = h ⊙ ∂a/∂h``, with a given gradient function.

    Parameters
    ----------
    weights : ndarray of float, shape (n_neurons, d_in)
        The weights that represent each neuron in metrics and figures.
    gradient : callable
        Maps pre-neuron embeddings (m, d_in) and their neurons (m,) to ∂a/∂h, (m, d_in).
    """

    is_general = True

    def __init__(
        self,
        weights: Floats,
        gradient: Callable[[Floats, NDArray[np.integer[Any]]], Floats],
    ) -> None:
        super().__init__(weights)
        self._gradient = gradient

    def gradient(self, h: Floats, neuron: int) -> Floats:
        return self._gradient(h, np.full(len(h), neuron))

    def _embed(self, h: Floats, neurons: NDArray[np.integer[Any]]) -> None:
        # Few rows at a time, so that intermediate arrays of the gradient stay small.
        for start in range(0, len(h), _ROWS):
            rows = h[start : start + _ROWS]
            _embedded(rows, self._gradient(rows, neurons[start : start + _ROWS]), out=rows)

    def _background_distance(self, h: Floats, neurons: slice) -> NDArray[np.float64]:
        return np.full(len(self.weights[neurons]), np.nan)


def stored_neurons(arrays: Mapping[str, NDArray[Any]], gate: str | None) -> Linear | Gated:
    """Restore neurons from a run's arrays.

    Parameters
    ----------
    arrays : mapping of str to ndarray
        As returned by `Neurons.arrays`.
    gate : str, optional
        Nonlinearity of gated neurons.
    """
    if gate is None:
        return Linear(arrays["weights"])
    weights, up_weights, gate_bias, up_bias = (arrays[name] for name in STORED)
    return Gated(weights, up_weights, gate_bias, up_bias, gate)


def _inverse_norms(squares: Floats) -> tuple[Floats, NDArray[np.int64]]:
    """Inverse norms (m, n_neurons) from squares, 0 for 0; counts of non-zero norms."""
    norms = np.sqrt(np.maximum(squares, 0))
    inverse = np.divide(1.0, norms, out=np.zeros_like(norms), where=norms > 0)
    return inverse, (norms > 0).sum(axis=0)


def _mean_distance(sums: Floats, alive: NDArray[np.int64], m: int) -> NDArray[np.float64]:
    """Mean distance over pairs of m embeddings, from sums of unit embeddings, (n_neurons, d)."""
    cos = (np.einsum("jd,jd->j", sums, sums) - alive) / (m * (m - 1))
    return np.asarray(np.clip(1 - cos, 0, 2), np.float64)
