"""The mean and covariance of a site's inputs, on which counts of meanings are based."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from polyseme.capture.select import priorities
from polyseme.capture.sums import Sum
from polyseme.sites.hooks import Gather
from polyseme.sites.reading import Reading
from polyseme.sites.site import Site

Array = NDArray[Any]

# Positions read per input, as neighbours in a context are much alike.
PLACES = 8
_SUMS = ("sum", "products")


class Moments:
    """Sums over a few random positions of every input of one site.

    The positions depend only on the input's number and the seed, so the sums do not depend on the
    batch size, up to rounding. Sums of parts of the data with the same batches add up exactly, see
    `Sum`.

    Parameters
    ----------
    site : Site
    seed : int

    Attributes
    ----------
    n : int
        Number of vectors so far, for each group of neurons.
    """

    def __init__(self, site: Site, seed: int) -> None:
        groups, d = site.n_groups, site.d_in
        self._site, self._seed = site, seed
        self.n = 0
        self._sum = Sum(np.zeros((groups, d)))
        self._products = Sum(np.zeros((groups, d, d)))

    def read(self, reading: Reading, gather: Gather, index: Tensor, start: int) -> Tensor:
        """Input vectors at some positions of a few inputs, float64 (n_groups, m, d_in).

        Parameters
        ----------
        reading, gather
            Of a batch.
        index : Tensor of int64, shape (b,)
            Numbers of some of its inputs.
        start : int
            Where in the batch these begin.
        """
        device = reading.activations.device
        n_positions = reading.everywhere.shape[1]
        order = priorities((index[:, None] << 24) + torch.arange(n_positions), self._seed)
        if reading.mask is not None:
            mask = reading.mask.values[start : start + len(index)].cpu()
            order = order.masked_fill(~mask, torch.iinfo(torch.int64).max)
        chosen = order.topk(min(PLACES, n_positions), dim=1, largest=False).indices
        rows = torch.arange(len(index))[:, None].expand_as(chosen)
        if reading.mask is not None:
            used = mask.gather(1, chosen)
            rows, chosen = rows[used], chosen[used]
        rows, positions = rows.flatten().to(device), chosen.flatten().to(device)
        groups = self._site.n_groups
        if not len(rows):
            return torch.empty((groups, 0, self._site.d_in), dtype=torch.float64)
        places = positions[:, None] * groups + torch.arange(groups, device=device)
        vectors = gather((rows + start).repeat_interleave(groups), places.flatten())
        return vectors.detach().cpu().double().view(len(rows), groups, -1).transpose(0, 1)

    def add(self, vectors: Tensor) -> None:
        """Add what was `read`."""
        self.n += vectors.shape[1]
        self._sum.add(vectors.sum(dim=1).numpy())
        self._products.add(torch.matmul(vectors.transpose(1, 2), vectors).numpy())

    def result(self) -> tuple[Array, Array]:
        """Mean (n_groups, d_in) and covariance (n_groups, d_in, d_in), float64; zeros if empty."""
        n = max(1, self.n)
        mean = self._sum.total / n
        return mean, self._products.total / n - mean[:, :, None] * mean[:, None, :]

    def state(self) -> dict[str, Array]:
        """The complete state, for `restore` or `merge`."""
        arrays = {"n": np.array([self.n])}
        for name in _SUMS:
            high, low = getattr(self, f"_{name}").parts
            arrays |= {name: high.copy(), f"{name}_low": low.copy()}
        return arrays

    def restore(self, state: Mapping[str, Array]) -> None:
        """Continue from a `state`."""
        self.n = int(state["n"][0])
        for name in _SUMS:
            parts = np.array(state[name]), np.array(state[f"{name}_low"])
            getattr(self, f"_{name}").parts = parts

    def merge(self, state: Mapping[str, Array]) -> None:
        """Merge the `state` of another part of the data."""
        self.n += int(state["n"][0])
        for name in _SUMS:
            getattr(self, f"_{name}").merge(state[name], state[f"{name}_low"])
