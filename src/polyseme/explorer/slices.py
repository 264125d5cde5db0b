"""What a few consecutive neurons of one site have in the tables and arrays of a run."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from polyseme.store import RunFolder, SiteInfo
from polyseme.store.format import neuron_offsets

Array = NDArray[Any]
Offsets = NDArray[np.int64]


class Slices:
    """A run folder with the offsets of every neuron's rows.

    Parameters
    ----------
    folder : RunFolder

    Attributes
    ----------
    folder : RunFolder
    first : ndarray of int64, shape (n_sites + 1,)
        Row of each site's neuron 0 in the table of neurons, and the number of rows.
    """

    def __init__(self, folder: RunFolder) -> None:
        self.folder = folder
        self.first = neuron_offsets(folder.sites)

    @cached_property
    def examples(self) -> Offsets:
        """Where each neuron's examples begin, shape (n_neurons + 1,)."""
        return _ends(self.folder.neurons["n_examples"].to_numpy())

    @cached_property
    def features(self) -> Offsets:
        """Where each neuron's features begin, shape (n_neurons + 1,)."""
        return _ends(self.folder.neurons["n_clusters"].to_numpy())

    @cached_property
    def merges(self) -> Offsets:
        """Where each neuron's rows of the trees begin, shape (n_neurons + 1,)."""
        return _ends(np.maximum(self.folder.neurons["n_examples"].to_numpy(np.int64) - 1, 0))

    @cached_property
    def random(self) -> Offsets:
        """Where each neuron's random examples begin, shape (n_neurons + 1,)."""
        table = self.folder.random
        first = {site.name: int(self.first[site.number]) for site in self.folder.sites}
        rows = table["site"].map(first).to_numpy(np.int64) + table["neuron"].to_numpy(np.int64)
        return _ends(np.bincount(rows, minlength=int(self.first[-1])))

    def table(self, name: str, start: int, stop: int) -> pd.DataFrame:
        """Rows of the examples, features or random examples of neurons, by row of `neurons`."""
        offsets: Offsets = getattr(self, name)
        return getattr(self.folder, name).iloc[offsets[start] : offsets[stop]]

    def array(
        self, site: SiteInfo, name: str, start: int, stop: int, of: Offsets | None = None
    ) -> Array | None:
        """Part of a site's array.

        Parameters
        ----------
        site : SiteInfo
        name : str
        start, stop : int
            Rows of the table of neurons, all of the site's.
        of : ndarray of int64, optional
            One of the offsets, for an array with a row for each of those things; by default it
            has a row a neuron.

        Returns
        -------
        ndarray, or None where the site has no such array
        """
        arrays = self.folder.site(site.number)
        if name not in arrays:
            return None
        first = int(self.first[site.number])
        if of is None:
            return arrays[name][start - first : stop - first]
        return arrays[name][of[start] - of[first] : of[stop] - of[first]]


def _ends(counts: Array) -> Offsets:
    return np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])
