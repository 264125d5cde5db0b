"""Features of other neurons similar to a neuron's: stored in the run, or computed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from polyseme.core.distances import unit_rows
from polyseme.store import RunFolder, SiteInfo
from polyseme.store.format import neuron_offsets
from polyseme.views.neuron_rows import Tables


def stored_similar(folder: RunFolder, info: SiteInfo, neuron: int, k: int) -> pd.DataFrame | None:
    """The k features most similar to each of a neuron's, or None if the run stores fewer than k.

    Parameters
    ----------
    folder : RunFolder
    info : SiteInfo
    neuron : int
    k : int

    Returns
    -------
    pandas.DataFrame
        See `Neuron.similar`.
    """
    arrays = folder.site(info.number)
    if "similar_features" not in arrays or "similar_similarity" not in arrays:
        return None
    rows, similarity = (
        folder.site_rows(info.number, name, neuron, neuron + 1)
        for name in ("similar_features", "similar_similarity")
    )
    if rows.shape[1] < k:
        return None
    feature, rank = np.nonzero(rows[:, :k] >= 0)
    neighbours = rows[feature, rank]
    # A feature's row number identifies its neuron, so the table itself is not needed.
    starts = folder.offsets("features")
    owner = np.searchsorted(starts, neighbours, side="right") - 1
    first = neuron_offsets(folder.sites)
    site = np.searchsorted(first, owner, side="right") - 1
    names = np.array([other.name for other in folder.sites], dtype=object)
    return pd.DataFrame(
        {
            "feature": feature,
            "site": names[site],
            "neuron": owner - first[site],
            "other_feature": neighbours - starts[owner],
            "similarity": similarity[feature, rank].astype(np.float64),
        }
    )


def compared(
    tables: Tables,
    info: SiteInfo,
    neuron: int,
    numbers: Sequence[int],
    embeddings: NDArray[np.floating[Any]],
    k: int,
) -> pd.DataFrame:
    """The k most similar features of other neurons, compared exhaustively.

    Parameters
    ----------
    tables : Tables
    info : SiteInfo
    neuron : int
        The neuron, whose own features are left out.
    numbers : sequence of int
        The neuron's features.
    embeddings : ndarray, shape (len(numbers), d_in)
        The neuron embeddings of their medoids.
    k : int

    Returns
    -------
    pandas.DataFrame
        See `Neuron.similar`.
    """
    mine = unit_rows(embeddings)
    frames = []
    for other in tables.folder.sites:
        if other.d_in != info.d_in:
            continue
        features, theirs = tables.medoid_embeddings(other)
        similarity = mine @ theirs.T
        if other.number == info.number:
            similarity[:, (features["neuron"] == neuron).to_numpy()] = -np.inf
        best = np.argsort(-similarity, axis=1, kind="stable")[:, :k]
        chosen = features.iloc[best.ravel()]
        frames.append(
            pd.DataFrame(
                {
                    "feature": np.repeat(np.asarray(numbers, np.int64), best.shape[1]),
                    "site": other.name,
                    "neuron": chosen["neuron"].to_numpy(np.int64),
                    "other_feature": chosen["feature"].to_numpy(np.int64),
                    "similarity": np.take_along_axis(similarity, best, axis=1)
                    .ravel()
                    .astype(np.float64),
                }
            )
        )
    frame = pd.concat(frames, ignore_index=True)
    frame = frame[np.isfinite(frame["similarity"])].sort_values(
        ["feature", "similarity"], ascending=[True, False], kind="stable"
    )
    nearest: pd.DataFrame = frame.groupby("feature").head(k).reset_index(drop=True)
    return nearest
