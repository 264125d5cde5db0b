"""Applying a selector to the activations of one site, batch by batch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from polyseme.capture.select import Kept, Selector


@dataclass(frozen=True)
class Selection:
    """The examples of every neuron of a site, ordered by neuron.

    Attributes
    ----------
    neuron, index, position : ndarray of int64, shape (n_examples,)
        The neuron, the input, and the position in the input where the neuron fired most.
    activation : ndarray of float32, shape (n_examples,)
    counts : ndarray of int64, shape (n_neurons,)
        Number of examples of each neuron; 0 for a dead neuron.
    """

    neuron: np.ndarray[Any, np.dtype[np.int64]]
    index: np.ndarray[Any, np.dtype[np.int64]]
    position: np.ndarray[Any, np.dtype[np.int64]]
    activation: np.ndarray[Any, np.dtype[np.float32]]
    counts: np.ndarray[Any, np.dtype[np.int64]]


@dataclass(frozen=True)
class Picked:
    """New activations that a stream keeps, and their slots in its buffers.

    Attributes
    ----------
    rows, neurons : Tensor of int64, shape (m,)
        In ascending order of rows, then neurons.
    places : Tensor of int64, shape (m,)
        Flat indices into the buffers.
    count : Tensor of int64, shape (n_neurons,)
        Number of activations of each neuron, including these.
    """

    rows: Tensor
    neurons: Tensor
    places: Tensor
    count: Tensor


# The threshold is raised once a quarter of the kept activations are new.
_RAISE = 4
_LEAST_ROOM = 64
_COLUMNS = ("values", "index", "position")


class Stream:
    """A selector applied to the neurons of one site.

    Parameters
    ----------
    selector : Selector
    n_neurons : int
    device : torch.device or str
        Device of the activations.

    Attributes
    ----------
    room : int
        Maximum number of inputs per `pick`.
    """

    def __init__(
        self, selector: Selector, n_neurons: int, device: torch.device | str = "cpu"
    ) -> None:
        self.selector = selector
        self.room = max(selector.capacity, _LEAST_ROOM)
        width = self.width(selector)
        self._values = torch.zeros((n_neurons, width), device=device)
        # Half the memory of int64; there are at most 2³¹ inputs, and positions per input.
        self._index = torch.zeros((n_neurons, width), dtype=torch.int32, device=device)
        self._position = torch.zeros_like(self._index)
        self._count = torch.zeros(n_neurons, dtype=torch.int64, device=device)
        self._maximum = torch.zeros(n_neurons, device=device)
        self._bar: Tensor | None = None
        # A lagging threshold admits many useless activations; raising it costs little.
        self._raise_after = max(1, n_neurons * selector.capacity // _RAISE)
        self._added = 0

    @staticmethod
    def width(selector: Selector) -> int:
        """Maximum number of activations that a neuron keeps at any time."""
        return selector.capacity + max(selector.capacity, _LEAST_ROOM)

    @staticmethod
    def bytes_a_neuron(selector: Selector) -> int:
        """Memory of the buffers per neuron, in bytes."""
        return 4 * len(_COLUMNS) * Stream.width(selector)

    def update(self, values: Tensor, index: Tensor, position: Tensor | None = None) -> Tensor:
        """Process a batch.

        Parameters
        ----------
        values : Tensor of float, shape (B, n_neurons)
            Each neuron's largest activation in each input.
        index : Tensor of int64, shape (B,)
            Numbers of the inputs, increasing from call to call.
        position : Tensor of int64, shape (B, n_neurons), optional
            The position of that activation.

        Returns
        -------
        Tensor of bool, shape (B, n_neurons)
            Which activations are kept for now.
        """
        taken = torch.zeros(values.shape, dtype=torch.bool, device=values.device)
        values = values.float()
        for start in range(0, len(values), self.room):
            part = slice(start, start + self.room)
            picked = self.pick(values[part], index[part])
            places = None if position is None else position[part][picked.rows, picked.neurons]
            self.add(picked, values[part], index[part], places)
            taken[part][picked.rows, picked.neurons] = True
        return taken

    def pick(self, values: Tensor, index: Tensor) -> Picked:
        """Pick activations of up to ``room`` new inputs, without adding them.

        Parameters
        ----------
        values : Tensor of float32, shape (b, n_neurons)
        index : Tensor of int64, shape (b,)
        """
        self._maximum = torch.maximum(self._maximum, values.amax(dim=0))
        wanted = self.selector.wanted(values, index, self._bar)
        count = self._count + wanted.sum(dim=0)
        width = self._values.shape[1]
        if bool((count > width).any()):
            self._reduce()
            wanted &= self.selector.wanted(values, index, self._bar)
            count = self._count + wanted.sum(dim=0)
        rows, neurons = wanted.nonzero(as_tuple=True)
        # Summing narrow integers is three times faster.
        narrow = torch.int16 if len(wanted) < 1 << 15 else torch.int64
        rank = wanted.cumsum(dim=0, dtype=narrow)[rows, neurons].long() - 1
        return Picked(rows, neurons, neurons * width + self._count[neurons] + rank, count)

    def add(
        self, picked: Picked, values: Tensor, index: Tensor, position: Tensor | None = None
    ) -> None:
        """Add what was picked from these inputs; ``position`` has shape (m,)."""
        self._values.view(-1)[picked.places] = values[picked.rows, picked.neurons]
        self._index.view(-1)[picked.places] = index[picked.rows].int()
        if position is not None:
            self._position.view(-1)[picked.places] = position.int()
        self._count = picked.count
        self._added += len(picked.rows)
        # Nothing can be below a threshold until some neuron has reached its capacity.
        if self._added >= self._raise_after and int(self._count.max()) >= self.selector.capacity:
            self._bar = self.selector.threshold(self._kept)
            self._added = 0

    @property
    def _valid(self) -> Tensor:
        places = torch.arange(self._values.shape[1], device=self._values.device)
        return places < self._count[:, None]

    @property
    def _kept(self) -> Kept:
        return Kept(self._values, self._index, self._valid, self._maximum)

    def _reduce(self) -> None:
        keep = self.selector.reduce(self._kept)
        self._count = keep.sum(dim=1)
        # Slots are in the order of the data, so each entry moves up to its new slot.
        neuron, place = keep.nonzero(as_tuple=True)
        width = self._values.shape[1]
        before = neuron * width + place
        after = neuron * width + (keep.cumsum(dim=1) - 1).view(-1)[before]
        for name in _COLUMNS:
            column = getattr(self, f"_{name}").view(-1)
            column[after] = column[before]
        self._values.masked_fill_(~self._valid, 0)
        self._bar = self.selector.threshold(self._kept)

    def held(self) -> tuple[Tensor, Tensor, Tensor]:
        """Neuron, input and position of all activations kept for now."""
        neuron, place = self._valid.nonzero(as_tuple=True)
        index, position = self._index[neuron, place], self._position[neuron, place]
        return neuron, index.long(), position.long()

    def result(self) -> Selection:
        """The choice from all activations processed."""
        kept = self._kept
        chosen = self.selector.choose(kept)
        key = -kept.values if self.selector.strongest_first else torch.zeros_like(kept.values)
        order = key.masked_fill(~chosen, torch.inf).argsort(dim=1, stable=True)
        counts = chosen.sum(dim=1)
        filled = torch.arange(order.shape[1], device=order.device) < counts[:, None]
        neuron, rank = filled.nonzero(as_tuple=True)
        place = order[neuron, rank]
        return Selection(
            neuron=neuron.cpu().numpy(),
            index=kept.index[neuron, place].long().cpu().numpy(),
            position=self._position[neuron, place].long().cpu().numpy(),
            activation=kept.values[neuron, place].cpu().numpy(),
            counts=counts.cpu().numpy(),
        )

    def state(self) -> dict[str, np.ndarray[Any, Any]]:
        """The complete state, for `restore` or `merge`."""
        self._reduce()
        for name in _COLUMNS:
            # So that the state does not depend on old contents.
            getattr(self, f"_{name}").masked_fill_(~self._valid, 0)
        return {
            name: getattr(self, f"_{name}").cpu().numpy().copy()
            for name in (*_COLUMNS, "count", "maximum")
        }

    def restore(self, state: Mapping[str, np.ndarray[Any, Any]]) -> None:
        """Continue from a `state`."""
        device = self._values.device
        for name in (*_COLUMNS, "count", "maximum"):
            setattr(self, f"_{name}", torch.from_numpy(np.array(state[name])).to(device))
        self._bar = self.selector.threshold(self._kept)

    def merge(self, state: Mapping[str, np.ndarray[Any, Any]]) -> None:
        """Merge the `state` of another part of the data, earlier or later."""
        other = Stream(self.selector, len(self._count), self._values.device)
        other.restore(state)
        self._reduce()
        valid = torch.cat([self._valid, other._valid], dim=1)
        both = {
            name: torch.cat([getattr(part, f"_{name}") for part in (self, other)], dim=1)
            for name in _COLUMNS
        }
        # In the order of the data; both are reduced, so there is room for all.
        last = torch.iinfo(torch.int32).max
        order = both["index"].masked_fill(~valid, last).argsort(dim=1, stable=True)
        for name, column in both.items():
            setattr(self, f"_{name}", column.gather(1, order[:, : self._values.shape[1]]))
        self._count = self._count + other._count
        self._maximum = torch.maximum(self._maximum, other._maximum)
        self._reduce()
