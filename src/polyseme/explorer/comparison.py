"""Compares runs: the measures of each, and the most similar neurons of two of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from polyseme.core.distances import unit_rows
from polyseme.store import RunFolder, SiteInfo
from polyseme.views import MEASURES, Run, measured

Array = NDArray[Any]
# Number of similarities in memory at once.
_BLOCK = 2**24


def _measures(run: Run) -> dict[str, Any]:
    """Measures of a run's neurons, and those of the evaluation of an SAE that its metadata hold."""
    neurons, evaluation = run.folder.neurons, run.metadata.get("evaluation")
    recorded = evaluation if isinstance(evaluation, dict) else {}
    # Nothing else in it: it may come from a stranger.
    measures = {measure.key: recorded.get(measure.key) for measure in MEASURES}
    measures |= measured(neurons)
    # The share of contexts in which a neuron is active anywhere says nothing about L0.
    is_text = run.metadata["data"].get("kind") == "text"
    density = "token_density" if is_text else "density"
    measures["l0"] = float(neurons[density].sum()) if density in neurons else None
    return measures


def comparison(runs: Sequence[Run], titles: Sequence[str]) -> dict[str, Any]:
    """Every measure of each run.

    Parameters
    ----------
    runs : sequence of Run
    titles : sequence of str

    Returns
    -------
    dict
        ``titles``; ``unlike``: what the runs differ in that affects their measures; ``rows``,
        each with ``group``, ``key``, ``name``, ``kind`` (``integer``, ``percent``, ``number`` or
        ``signed``), ``digits``, ``reading``, ``values``: one per run, None where undefined, and
        ``counts``: the number of neurons in each mean, or None.
    """
    records, rows = [_measures(run) for run in runs], []
    for measure in MEASURES:
        values = [_finite(record.get(measure.key)) for record in records]
        if any(value is not None for value in values):
            counts = [record.get(f"{measure.key}_n") for record in records]
            row = {**measure._asdict(), "name": measure.name.format(neuron="neuron")}
            rows.append({**row, "values": values, "counts": None if None in counts else counts})
    return {"titles": list(titles), "unlike": _unlike(runs), "rows": rows}


def _unlike(runs: Sequence[Run]) -> list[str]:
    """What the runs differ in, in words, that affects their measures."""

    def made(run: Run) -> dict[str, Any]:
        data, settings = run.metadata["data"], run.metadata["settings"]
        return {
            "the data": [data.get(key) for key in ("kind", "name", "n_inputs", "length")],
            "the selection of examples": settings.get("select"),
            "the linkage": settings.get("linkage"),
            "the threshold": {site.extra.get("threshold") for site in run.folder.sites},
        }

    first, *others = map(made, runs)
    return [words for words in first if any(other[words] != first[words] for other in others)]


def best_matches(base: RunFolder, other: RunFolder) -> tuple[dict[str, Array], dict[str, str]]:
    """For each neuron of one run, the neuron of another with the most similar direction.

    The direction of an SAE latent is its decoder vector. If a run has no decoders, and for other
    neurons, it is the weight vector. Sites with the same name are compared or, if the runs share
    no names, all sites whose vectors have the same length.

    Returns
    -------
    arrays : dict of str to ndarray
        ``row`` int64 (n_neurons,): row in the other run's table of neurons, -1 for none;
        ``similarity`` float32: cosine.
    metadata : dict of str to str
        ``by``: ``decoder`` or ``weights``; ``reason``, if no neuron has a match.
    """
    by = "decoder" if all(_has_decoders(folder) for folder in (base, other)) else "weights"
    row = np.full(len(base.neurons), -1, dtype=np.int64)
    similarity = np.full(len(base.neurons), np.nan, dtype=np.float32)
    lengths: list[set[int]] = [set(), set()]
    shared = {site.name for site in base.sites} & {site.name for site in other.sites}
    for site in base.sites:
        first = base.first_neuron(site.number)
        here = _directions(base, site, by)
        for match in other.sites:
            if shared and match.name != site.name:
                continue
            there = _directions(other, match, by)
            lengths[0].add(here.shape[1])
            lengths[1].add(there.shape[1])
            if there.shape[1] != here.shape[1]:
                continue
            offset = other.first_neuron(match.number)
            step = max(1, _BLOCK // len(there))
            for start in range(0, len(here), step):
                products = here[start : start + step] @ there.T
                nearest = products.argmax(axis=1)
                largest = products[np.arange(len(nearest)), nearest]
                rows = first + start + np.arange(len(nearest))
                better = ~(largest <= similarity[rows])  # a NaN is not yet compared
                row[rows[better]] = offset + nearest[better]
                similarity[rows[better]] = largest[better]
    metadata = {"by": by}
    if not (row >= 0).any():
        ours, theirs = (" or ".join(map(str, sorted(sizes))) for sizes in lengths)
        where = "in sites of the same name" if shared else "in the two runs"
        metadata["reason"] = (
            "No neuron has a match, because only vectors of the same length can be compared: "
            f"{where}, the lengths are {ours} and {theirs}."
        )
    return {"row": row, "similarity": similarity}, metadata


def _has_decoders(folder: RunFolder) -> bool:
    return all("decoder" in folder.site(site.number) for site in folder.sites)


def _directions(folder: RunFolder, site: SiteInfo, by: str) -> NDArray[np.float32]:
    rows = folder.site_rows(site.number, by, 0, site.n_neurons).astype(np.float32)
    return np.asarray(unit_rows(rows), dtype=np.float32)


def _finite(value: Any) -> float | None:
    fine = isinstance(value, int | float) and not isinstance(value, bool) and np.isfinite(value)
    return float(value) if fine else None
