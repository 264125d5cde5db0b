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
    """A run folder with offsets into it, worked out once for all neurons.

    Parameters
    ----------
    folder : RunFolder
    """

    def __init__(self, folder: RunFolder) -> None:
        self.folder = folder
        self._offsets: dict[str, NDArray[np.int64]] = {}
        self._medoids: dict[int, tuple[pd.DataFrame, NDArray[np.floating[Any]]]] = {}

    def rows(self, table: str, info: SiteInfo, neuron: int) -> slice:
        """Rows of one neuron in the table of examples, features or random examples."""
        if table not in self._offsets:
            frame = self.folder.neurons
            if table == "random":
                counts = self._random_counts()
            else:
                column = "n_examples" if table == "examples" else "n_clusters"
                counts = frame[column].to_numpy(np.int64)
            self._offsets[table] = np.concatenate([[0], counts.cumsum()])
        offsets = self._offsets[table]
        at = self.first_neuron(info) + neuron
        return slice(int(offsets[at]), int(offsets[at + 1]))

    def _random_counts(self) -> NDArray[np.int64]:
        random = self.folder.random
        numbers = (
            random["site"]
            .map({site.name: self.first_neuron(site) for site in self.folder.sites})
            .to_numpy(np.int64)
        )
        rows = numbers + random["neuron"].to_numpy(np.int64)
        return np.bincount(rows, minlength=len(self.folder.neurons)).astype(np.int64)

    def first_neuron(self, info: SiteInfo) -> int:
        """Row of a site's neuron 0 in the table of neurons."""
        return sum(site.n_neurons for site in self.folder.sites[: info.number])

    def tree(self, info: SiteInfo, neuron: int) -> NDArray[np.float64]:
        """Linkage matrix of one neuron, shape (n_examples - 1, 4)."""
        counts = self.folder.neurons["n_examples"].to_numpy(np.int64)
        first = self.first_neuron(info)
        merges = np.maximum(counts[first : first + neuron + 1] - 1, 0)
        stop = int(merges.sum())
        return np.asarray(self.folder.site(info.number)["tree"][stop - int(merges[-1]) : stop])

    def medoid_embeddings(self, info: SiteInfo) -> tuple[pd.DataFrame, NDArray[np.floating[Any]]]:
        """The most central neuron embedding of each feature of a site, as unit vectors.

        Returns
        -------
        features : pandas.DataFrame
            The site's rows of the table of features.
        embeddings : ndarray of float32, shape (n_features, d_in)
        """
        if info.number not in self._medoids:
            first = self.rows("features", info, 0).start
            last = self.rows("features", info, info.n_neurons - 1).stop
            features = self.folder.features.iloc[first:last].reset_index(drop=True)
            starts = self._example_starts(info)
            neuron = features["neuron"].to_numpy(np.int64)
            examples = starts[neuron] + features["medoid"].to_numpy(np.int64)
            vector = self.folder.examples["vector"].to_numpy()[examples]
            arrays = self.folder.site(info.number)
            embeddings = embeddings_of(info, arrays, arrays["vectors"][vector], neuron)
            self._medoids[info.number] = (features, unit_rows(embeddings))
        return self._medoids[info.number]

    def _example_starts(self, info: SiteInfo) -> NDArray[np.int64]:
        self.rows("examples", info, 0)
        first = self.first_neuron(info)
        return self._offsets["examples"][first : first + info.n_neurons]
