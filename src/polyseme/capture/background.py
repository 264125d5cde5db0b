"""What neurons read in inputs drawn at random, against which their examples are held."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from polyseme.capture.hooks import Gather
from polyseme.capture.layers import Site
from polyseme.capture.reading import Reading

Array = NDArray[Any]


class Background:
    """Pre-neuron embeddings of a seeded random sample of the inputs of one site.

    Parameters
    ----------
    site : Site
    size : int
        Inputs in the sample.
    """

    def __init__(self, site: Site, size: int) -> None:
        self._site = site
        self._size = size
        self._keys = np.empty(0, np.int64)
        self._rows = np.empty((0, site.n_groups, site.d_in), np.float32)

    def wanted(
        self, reading: Reading, gather: Gather, order: Tensor, start: int
    ) -> tuple[Array, Array]:
        """Those of a few inputs that belong to the sample so far; nothing is added yet.

        Parameters
        ----------
        reading, gather
            Of a batch.
        order : Tensor of int64, shape (b,)
            Priorities of some of its inputs; the lowest make the sample.
        start : int
            Where in the batch these begin.
        """
        wanted = np.ones(len(order), bool)
        if len(self._keys) >= self._size:
            wanted = order.numpy() < self._keys[-1]
        if wanted.any() and reading.counted is not None:
            wanted &= reading.counted[start : start + len(order)].cpu().numpy()
        few = order[torch.from_numpy(wanted)]
        groups = self._site.n_groups
        if not len(few):
            return np.empty(0, np.int64), self._rows[:0]
        device = reading.activations.device
        rows = torch.from_numpy(np.flatnonzero(wanted) + start).to(device)
        # The place is one at which some neuron fired most: anywhere else may be padding.
        at = reading.locate(rows, few.to(device) % self._site.n_neurons)
        places = (at[:, None] * groups + torch.arange(groups, device=device)).flatten()
        found = gather(rows.repeat_interleave(groups), places).detach().float().cpu().numpy()
        return few.numpy(), found.reshape(len(few), groups, -1)

    def add(self, keys: Array, rows: Array) -> None:
        """Take in what was `wanted`."""
        if not len(keys):
            return
        keys = np.concatenate([self._keys, keys])
        order = np.argsort(keys, kind="stable")[: self._size]
        self._keys = keys[order]
        self._rows = np.concatenate([self._rows, rows])[order]

    def result(self) -> Array:
        """Float32 of shape (n_groups, m, d_in)."""
        return np.ascontiguousarray(self._rows.transpose(1, 0, 2))

    def state(self) -> dict[str, Array]:
        """Everything, to go on later from here."""
        return {"keys": self._keys, "rows": self._rows}

    def restore(self, state: Mapping[str, Array]) -> None:
        """Go on from a `state`."""
        self._keys, self._rows = np.array(state["keys"]), np.array(state["rows"])
