"""Statistics of every neuron's activations, gathered in the same pass."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from polyseme.capture.sums import Sum

N_BINS = 64
# Inputs counted at a time, as each step has a fixed cost. Sums are grouped the same way for any
# batching, so they are bit-identical.
TOGETHER = 64
_NAMES = ("waiting", "active", "active_positions", "maximum", "exponent", "histogram")
_COUNTS = ("n_inputs", "n_positions", "n_waiting")


class Statistics:
    """Density, maximum, mean and histogram of the activations of one site's neurons.

    The histogram covers [0, upper) with equal bins, where upper is the next power of two above the
    neuron's maximum. When the maximum outgrows it, bins merge in pairs: the result is the same for
    any batching.

    Parameters
    ----------
    n_neurons : int
    device : torch.device or str
    """

    def __init__(self, n_neurons: int, device: torch.device | str = "cpu") -> None:
        self._n_inputs = 0
        self._n_positions = 0
        self._n_waiting = 0
        self._waiting = torch.zeros((TOGETHER, n_neurons), device=device)
        self._active = torch.zeros(n_neurons, dtype=torch.int64, device=device)
        self._active_positions = torch.zeros_like(self._active)
        self._sum = Sum(torch.zeros(n_neurons, dtype=torch.float64, device=device))
        self._maximum = torch.zeros(n_neurons, device=device)
        self._exponent = torch.full((n_neurons,), -(1 << 20), dtype=torch.int64, device=device)
        self._histogram = torch.zeros((n_neurons, N_BINS), dtype=torch.int64, device=device)

    @staticmethod
    def bytes_a_neuron() -> int:
        """Memory per neuron, in bytes."""
        return 8 * N_BINS + 4 * TOGETHER + 4 * 8 + 4

    def update(self, values: Tensor) -> None:
        """Add activations of shape (B, n_neurons); non-positive ones count as zero."""
        start = 0
        while start < len(values):
            part = values[start : start + TOGETHER - self._n_waiting]
            self._waiting[self._n_waiting : self._n_waiting + len(part)] = part
            self._n_waiting += len(part)
            start += len(part)
            if self._n_waiting == TOGETHER:
                self._count(self._waiting)
                self._n_waiting = 0
        self._n_inputs += len(values)

    def update_positions(self, active: Tensor, n_positions: int) -> None:
        """Add counts of positions where each neuron is active, (n_neurons,), of `n_positions`."""
        self._active_positions += active.to(self._active.device)
        self._n_positions += n_positions

    def _count(self, values: Tensor) -> None:
        values = values.clamp(min=0)
        active = values > 0
        self._active += active.sum(dim=0)
        self._sum.add(values.sum(dim=0, dtype=torch.float64))
        self._maximum = torch.maximum(self._maximum, values.amax(dim=0))
        self._grow()
        # Exact, as the upper edge is a power of two; in double precision, as it may be tiny.
        bins_in_all = torch.full_like(self._exponent, N_BINS, dtype=torch.float64)
        scale = torch.ldexp(bins_in_all, -self._exponent.double())
        scale = scale.masked_fill(self._maximum <= 0, 0)
        bins = (values.double() * scale).long()
        bins += N_BINS * torch.arange(values.shape[1], device=values.device)
        self._histogram.view(-1).scatter_add_(0, bins.view(-1), active.long().view(-1))

    def _grow(self) -> None:
        needed = torch.frexp(self._maximum).exponent.long()
        needed = torch.where(self._maximum > 0, needed, self._exponent)
        shift = (needed - self._exponent).clamp(0, N_BINS.bit_length())
        if bool((shift > 0).any()):
            bins = torch.arange(N_BINS, device=shift.device)
            target = bins >> shift[:, None]
            merged = torch.zeros_like(self._histogram)
            self._histogram = merged.scatter_add_(1, target, self._histogram)
            self._exponent = torch.maximum(needed, self._exponent)

    def result(self) -> dict[str, np.ndarray[Any, Any]]:
        """Compute arrays by name, each with one row per neuron.

        Returns
        -------
        dict
            ``density``: share of inputs that activate the neuron; ``position_density``: share of
            positions, NaN if none were counted; ``max_activation``; ``mean_activation``: over all
            inputs, inactive ones as 0; ``histogram`` (n_neurons, 64): counts of positive
            activations; ``histogram_upper``: its upper edge, 0 for a neuron that was never active.
        """
        if self._n_waiting:
            # On a copy, so that later sums keep their grouping of inputs.
            whole = Statistics(len(self._maximum), self._maximum.device)
            whole.restore(self.state())
            whole._count(self._waiting[: self._n_waiting])
            return whole._as_arrays()
        return self._as_arrays()

    def _as_arrays(self) -> dict[str, np.ndarray[Any, Any]]:
        n = max(self._n_inputs, 1)
        alive = self._maximum > 0
        upper = torch.ldexp(torch.ones_like(self._sum.total), self._exponent.clamp(min=-1000))
        return {
            "density": (self._active.double() / n).cpu().numpy(),
            "position_density": np.divide(
                self._active_positions.cpu().numpy(), self._n_positions or np.nan
            ),
            "max_activation": self._maximum.double().cpu().numpy(),
            "mean_activation": (self._sum.total / n).cpu().numpy(),
            "histogram": self._histogram.cpu().numpy(),
            "histogram_upper": torch.where(alive, upper, 0).cpu().numpy(),
        }

    def state(self) -> dict[str, np.ndarray[Any, Any]]:
        """The complete state, for `restore` or `merge`."""
        tensors = {name: getattr(self, f"_{name}") for name in _NAMES}
        tensors["sum"], tensors["sum_low"] = self._sum.parts
        arrays = {name: tensor.cpu().numpy().copy() for name, tensor in tensors.items()}
        return arrays | {name: np.array([getattr(self, f"_{name}")]) for name in _COUNTS}

    def restore(self, state: Mapping[str, np.ndarray[Any, Any]]) -> None:
        """Continue from a `state`."""

        def tensor(name: str) -> Tensor:
            return torch.from_numpy(np.array(state[name])).to(self._active.device)

        for name in _COUNTS:
            setattr(self, f"_{name}", int(state[name][0]))
        for name in _NAMES:
            setattr(self, f"_{name}", tensor(name))
        self._sum.parts = tensor("sum"), tensor("sum_low")

    def merge(self, state: Mapping[str, np.ndarray[Any, Any]]) -> None:
        """Merge the `state` of another part of the data.

        The sums equal those of a single pass if every part but the last has a multiple of 64
        inputs.
        """
        other = Statistics(len(self._maximum), self._maximum.device)
        other.restore(state)
        if other._n_waiting:
            other._count(other._waiting[: other._n_waiting])
        self._maximum = other._maximum = torch.maximum(self._maximum, other._maximum)
        self._grow()
        other._grow()
        for name in ("active", "active_positions", "histogram", "n_inputs", "n_positions"):
            setattr(self, f"_{name}", getattr(self, f"_{name}") + getattr(other, f"_{name}"))
        self._sum.merge(*other._sum.parts)
