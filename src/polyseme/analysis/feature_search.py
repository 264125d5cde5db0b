"""The stage after clustering: finds similar features across all sites."""

from __future__ import annotations

import tempfile
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from rich.progress import Progress

from polyseme.core.similar import MIN_EXAMPLES, nearest_features
from polyseme.sites import Site
from polyseme.store import RunWriter

NEIGHBOURS = 5
_STATE = "similar_features"


class SimilarFeatures:
    """Collects the medoid of each feature, site by site, then finds its nearest neighbours.

    The medoids go to an unnamed file beside the run, in half precision, as there may be millions.
    Use as a context manager, which closes the file.

    Parameters
    ----------
    writer : RunWriter
    """

    def __init__(self, writer: RunWriter) -> None:
        self._writer = writer
        self._saved = writer.load_state(_STATE)
        self._files = ExitStack()
        self._spaces: dict[int, _Space] = {}
        self._sites: list[int] = []
        self._n_neurons = 0

    def __enter__(self) -> SimilarFeatures:
        return self

    def __exit__(self, *error: object) -> None:
        self._files.close()

    def add(self, site: Site, features: pd.DataFrame, directions: NDArray[np.float16]) -> None:
        """Add the next site of the run.

        Parameters
        ----------
        site : Site
        features : DataFrame
            The site's rows of the feature table.
        directions : ndarray of float16, shape (n, d_in)
            As in `SiteClusters`.
        """
        first_row, first_neuron = sum(self._sites), self._n_neurons
        self._sites.append(len(features))
        self._n_neurons += site.n_neurons
        if self._saved is not None:
            return
        rows = np.flatnonzero(features["n_examples"].to_numpy() >= MIN_EXAMPLES)
        neurons = features["neuron"].to_numpy(np.int64)[rows]
        if site.d_in not in self._spaces:
            with_room = tempfile.TemporaryFile(dir=self._writer.state_folder)  # noqa: SIM115
            file = self._files.enter_context(with_room)
            self._spaces[site.d_in] = _Space(site.d_in, file, [], [])
        space = self._spaces[site.d_in]
        space.file.write(directions.tobytes())
        space.rows.append(first_row + rows)
        space.owners.append(first_neuron + neurons)

    def write(self, bars: Progress) -> None:
        """Find the nearest neighbours of each feature, and fill them in at the sites written."""
        if self._saved is None:
            arrays = room_for_similar(sum(self._sites))
            for space in self._spaces.values():
                space.search(arrays, self._writer.state_folder, bars)
            self._writer.save_state(_STATE, arrays, {})
        else:
            arrays = self._saved[0]
        last = np.cumsum(self._sites)
        for number, stop in enumerate(last):
            rows = slice(stop - self._sites[number], stop)
            self._writer.overwrite_in_site(
                number, {name: array[rows] for name, array in arrays.items()}
            )


def room_for_similar(n: int) -> dict[str, NDArray[Any]]:
    """Placeholders for a site of ``n`` features, which `SimilarFeatures.write` fills in."""
    return {
        "similar_features": np.full((n, NEIGHBOURS), -1, np.int64),
        "similar_similarity": np.full((n, NEIGHBOURS), np.nan, np.float16),
    }


@dataclass(frozen=True)
class _Space:
    """Features of all sites that read vectors of one length, and so can be compared."""

    d_in: int
    file: IO[bytes]
    rows: list[NDArray[np.int64]]
    owners: list[NDArray[np.int64]]

    def search(self, arrays: dict[str, NDArray[Any]], folder: Path, bars: Progress) -> None:
        """Fill in the rows of this space's features."""
        rows, owners = np.concatenate(self.rows), np.concatenate(self.owners)
        if not len(rows):
            return
        self.file.flush()
        task = bars.add_task("Similar features", total=1.0)
        nearest = nearest_features(
            np.memmap(self.file, np.float16, "r", shape=(len(rows), self.d_in)),
            owners,
            NEIGHBOURS,
            folder=folder,
            progress=lambda done: bars.update(task, completed=done),
        )
        none = nearest.neighbours < 0
        arrays["similar_features"][rows] = np.where(none, -1, rows[nearest.neighbours])
        arrays["similar_similarity"][rows] = nearest.similarity
