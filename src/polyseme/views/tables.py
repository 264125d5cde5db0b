"""Where one neuron's rows lie in the tables and arrays of a run."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from polyseme.core.distances import unit_rows
from polyseme.store import RunFolder, SiteInfo
from polyseme.views.embed import embeddings_of


class Tables:
    """A run folder, read neuron by neuron.

    Parameters
    ----------
    folder : RunFolder
    """

    def __init__(self, folder: RunFolder) -> None:
        self.folder = folder
        self._medoids: dict[int, tuple[pd.DataFrame, NDArray[np.floating[Any]]]] = {}

    def of_neuron(self, table: str, info: SiteInfo, neuron: int) -> pd.DataFrame:
        """What the table of examples, features or random examples says of one neuron."""
        at = self.folder.first_neuron(info.number) + neuron
        return self.folder.rows(table, at, at + 1)

    def tree(self, info: SiteInfo, neuron: int) -> NDArray[np.float64]:
        """Linkage matrix of one neuron, shape (n_examples - 1, 4)."""
        return self.folder.site_rows(info.number, "tree", neuron, neuron + 1)

    def medoid_embeddings(self, info: SiteInfo) -> tuple[pd.DataFrame, NDArray[np.floating[Any]]]:
        """The most central neuron embedding of each feature of a site, as unit vectors.

        Returns
        -------
        features : pandas.DataFrame
            The site's rows of the table of features.
        embeddings : ndarray of float32, shape (n_features, d_in)
        """
        if info.number not in self._medoids:
            first = self.folder.first_neuron(info.number)
            features = self.folder.rows("features", first, first + info.n_neurons)
            starts = self.folder.offsets("examples")[first:]
            starts = starts - starts[0]
            neuron = features["neuron"].to_numpy(np.int64)
            central = starts[neuron] + features["medoid"].to_numpy(np.int64)
            examples = self.folder.rows("examples", first, first + info.n_neurons)
            vector = examples["vector"].to_numpy()[central]
            arrays = self.folder.site(info.number)
            embeddings = embeddings_of(info, arrays, arrays["vectors"][vector], neuron)
            self._medoids[info.number] = (features, unit_rows(embeddings))
        return self._medoids[info.number]
