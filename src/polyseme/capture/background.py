"""Input vectors of random inputs, the baseline for a neuron's examples."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from polyseme.sites.hooks import Gather
from polyseme.sites.reading import Reading
from polyseme.sites.site import Site

Array = NDArray[Any]


@dataclass(frozen=True)
class Candidates:
    """Inputs that may belong to the sample.

    Attributes
    ----------
    rows : Tensor of int64, shape (m,)
    neurons : Tensor of int64, shape (m,)
        The input is read where this neuron fires most.
    keys : ndarray of int64, shape (m,)
        Priorities.
    """

    rows: Tensor
    neurons: Tensor
    keys: Array


class Background:
    """Pre-neuron embeddings of a seeded random sample of the inputs of one site.

    Parameters
    ----------
    site : Site
    size : int
        Number of inputs in the sample.
    """

    def __init__(self, site: Site, size: int) -> None:
        self._site = site
        self._size = size
        self._keys = np.empty(0, np.int64)
        self._rows = np.empty((0, site.n_groups, site.d_in), np.float32)

    def wanted(self, reading: Reading, order: Tensor, start: int) -> Candidates:
        """Which of a few inputs belong to the sample so far; adds nothing.

        Parameters
        ----------
        reading
            Of a batch.
        order : Tensor of int64, shape (b,)
            Priorities of some of its inputs; the lowest make the sample.
        start : int
            Where in the batch these begin.
        """
        wanted = torch.ones(len(order), dtype=torch.bool)
        if len(self._keys) >= self._size:
            wanted = order < int(self._keys.max())
        if reading.input_mask is not None:
            wanted &= reading.input_mask[start : start + len(order)].cpu()
        rows = wanted.nonzero()[:, 0]
        # A place where some neuron fired most, as any other may be padding.
        return Candidates(rows, order[rows] % self._site.n_neurons, order[rows].numpy())

    def read(self, gather: Gather, rows: Tensor, positions: Tensor) -> Array:
        """Input vectors at these places of a batch, (m, n_groups, d_in)."""
        groups = self._site.n_groups
        if not len(rows):
            return self._rows[:0]
        places = positions[:, None] * groups + torch.arange(groups, device=rows.device)
        vectors = gather(rows.repeat_interleave(groups), places.flatten())
        return vectors.detach().float().cpu().numpy().reshape(len(rows), groups, -1)

    def add(self, candidates: Candidates, rows: Array) -> None:
        """Add what was `wanted` and `read`."""
        if not len(rows):
            return
        n = len(self._keys)
        stays = np.zeros(n + len(rows), bool)
        stays[np.concatenate([self._keys, candidates.keys]).argsort()[: self._size]] = True
        new = np.flatnonzero(stays[n:])
        # Overwrites the rows that leave, as copying all rows for the sake of a few is slow.
        free = np.flatnonzero(~stays[:n])
        first, rest = new[: len(free)], new[len(free) :]
        self._keys[free], self._rows[free] = candidates.keys[first], rows[first]
        if len(rest):
            self._keys = np.concatenate([self._keys, candidates.keys[rest]])
            self._rows = np.concatenate([self._rows, rows[rest]])

    def result(self) -> Array:
        """float32 of shape (n_groups, m, d_in), by ascending priority."""
        return np.ascontiguousarray(self._rows[self._keys.argsort()].transpose(1, 0, 2))

    def state(self) -> dict[str, Array]:
        """The complete state, for `restore`."""
        return {"keys": self._keys.copy(), "rows": self._rows.copy()}

    def restore(self, state: Mapping[str, Array]) -> None:
        """Continue from a `state`."""
        self._keys, self._rows = np.array(state["keys"]), np.array(state["rows"])

    def merge(self, state: Mapping[str, Array]) -> None:
        """Merge the `state` of another part of the data."""
        keys = np.concatenate([self._keys, state["keys"]])
        stays = keys.argsort()[: self._size]
        self._keys, self._rows = keys[stays], np.concatenate([self._rows, state["rows"]])[stays]
