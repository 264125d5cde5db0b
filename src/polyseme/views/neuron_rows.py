"""Reads the rows of single neurons from the tables and arrays of a run."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from polyseme.core import Neurons, stored_neurons
from polyseme.core.distances import unit_rows
from polyseme.core.gates import GATES
from polyseme.core.similar import MIN_EXAMPLES
from polyseme.errors import RunError
from polyseme.store import RunFolder, SiteInfo
from polyseme.views.meanings import are_spaced, word_shares


def neurons_of(info: SiteInfo, arrays: Mapping[str, NDArray[Any]]) -> Neurons:
    """How the neurons of a site read their input, as stored in a run.

    Parameters
    ----------
    info : SiteInfo
    arrays : mapping of str to ndarray
        Arrays of the site's file, or the rows of some of its neurons.

    Raises
    ------
    RunError
        Their embeddings come from a gradient, which needs the model, or arrays are missing.
    """
    gate = info.extra.get("gate")
    general = info.extra.get("general") or (info.kind == "gated" and gate is None)
    if general or (gate is not None and "up_weights" not in arrays):
        raise RunError(
            f"The run cannot compute embeddings of the neurons of {info.name!r}, because polyseme "
            "has no closed form for them. It has one for linear neurons, and for gated neurons "
            f"with {', '.join(GATES[:-1])} or {GATES[-1]}."
        )
    return stored_neurons(arrays, gate)


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
        """The rows of one neuron in the table of examples, features or random examples."""
        row = self.folder.first_neuron(info.number) + neuron
        return self.folder.rows(table, row, row + 1)

    def tree(self, info: SiteInfo, neuron: int) -> NDArray[np.float64]:
        """Linkage matrix of one neuron, shape (n_examples - 1, 4)."""
        return self.folder.site_rows(info.number, "tree", neuron, neuron + 1)

    @cached_property
    def word_shares(self) -> dict[str, float]:
        """Share of each word in the run's texts; see `polyseme.views.meanings`."""
        inputs = self.folder.inputs
        tokens, lengths = inputs["tokens"], inputs["lengths"]
        ids, counts = np.unique(
            tokens[np.arange(tokens.shape[1]) < lengths[:, None]], return_counts=True
        )
        return word_shares(self.folder.token_texts.loc[ids], counts)

    @cached_property
    def are_spaced(self) -> bool:
        """Whether tokens of the run begin with spaces; see `polyseme.views.meanings.are_spaced`."""
        return are_spaced(self.folder.token_texts)

    def medoid_embeddings(self, info: SiteInfo) -> tuple[pd.DataFrame, NDArray[np.floating[Any]]]:
        """The medoids' neuron embeddings of a site's features, as unit vectors.

        Returns
        -------
        features : pandas.DataFrame
            The site's features with at least `MIN_EXAMPLES` examples.
        embeddings : ndarray of float32, shape (n_features, d_in)
        """
        if info.number not in self._medoids:
            first = self.folder.first_neuron(info.number)
            features = self.folder.rows("features", first, first + info.n_neurons)
            features = features[features["n_examples"] >= MIN_EXAMPLES].reset_index(drop=True)
            starts = self.folder.offsets("examples")[first:]
            starts = starts - starts[0]
            neuron = features["neuron"].to_numpy(np.int64)
            central = starts[neuron] + features["medoid"].to_numpy(np.int64)
            examples = self.folder.rows("examples", first, first + info.n_neurons)
            vector = examples["vector"].to_numpy()[central]
            arrays = self.folder.site(info.number)
            embeddings = neurons_of(info, arrays).embed(arrays["vectors"][vector], neuron)
            self._medoids[info.number] = (features, unit_rows(embeddings))
        return self._medoids[info.number]
