"""Compares runs: the measures of each, and the most similar neurons of two of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from polyseme.core.distances import unit_rows
from polyseme.store import RunFolder, SiteInfo
from polyseme.views import Run, is_dead, is_without_examples

Array = NDArray[Any]
Measure = Callable[[Run], tuple[float, int | None]]

# Number of similarities in memory at once.
_BLOCK = 2**24


def _mean_of(column: str) -> Measure:
    def measure(run: Run) -> tuple[float, int | None]:
        neurons = run.folder.neurons
        if column not in neurons:
            return np.nan, 0
        values = neurons.loc[neurons["n_examples"] > 0, column].dropna()
        return float(values.mean()), len(values)

    return measure


def _share_of(condition: Callable[[pd.DataFrame], pd.Series[bool]]) -> Measure:
    return lambda run: (float(condition(run.folder.neurons).mean()), None)


def _l0(run: Run) -> tuple[float, int | None]:
    neurons = run.folder.neurons
    if "token_density" in neurons:
        return float(neurons["token_density"].sum()), None
    # The share of contexts in which a neuron is active anywhere says nothing about L0.
    is_text = run.metadata["data"].get("kind") == "text"
    return np.nan if is_text else float(neurons["density"].sum()), None


def _median_ratio(run: Run) -> tuple[float, int | None]:
    neurons = run.folder.neurons
    values = neurons.loc[neurons["n_examples"] > 0, "participation_ratio"].dropna()
    return float(values.median()), len(values)


#: group, key, name, format and measure
_MEASURES: tuple[tuple[str, str, str, str, Measure], ...] = (
    (
        "published metrics",
        "neurons",
        "neurons",
        "integer",
        lambda run: (float(len(run.folder.neurons)), None),
    ),
    (
        "published metrics",
        "dead_share",
        "dead neurons (no input activates them)",
        "percent",
        _share_of(is_dead),
    ),
    (
        "published metrics",
        "without_examples_share",
        "active neurons without examples",
        "percent",
        _share_of(is_without_examples),
    ),
    *(
        ("published metrics", column, name, "distance", _mean_of(column))
        for column, name in (
            ("max_distance", "max distance"),
            ("mean_distance", "mean distance"),
            ("intra_cluster_distance", "intra-cluster distance"),
            ("inter_cluster_distance", "inter-cluster distance"),
        )
    ),
    ("published metrics", "mean_examples", "examples per neuron", "number", _mean_of("n_examples")),
    ("published metrics", "mean_clusters", "features per neuron", "number", _mean_of("n_clusters")),
    ("cost", "l0", "L0 (active neurons per input or token)", "number", _l0),
    (
        "caveats",
        "median_participation_ratio",
        "participation ratio (median)",
        "number",
        _median_ratio,
    ),
    (
        "caveats",
        "calibrated_distance",
        "calibrated distance",
        "signed",
        _mean_of("calibrated_distance"),
    ),
)
#: measures from the evaluation of an SAE, if a run's metadata have them under ``evaluation``
_EVALUATED = (
    ("cost", "fvu", "FVU (variance unexplained)", "distance"),
    ("cost", "mse", "MSE", "distance"),
    ("cost", "accuracy", "accuracy of the model", "percent"),
    ("cost", "spliced_accuracy", "accuracy with the SAE", "percent"),
    ("cost", "cross_entropy", "cross-entropy of the model", "distance"),
    ("cost", "spliced_cross_entropy", "cross-entropy with the SAE", "distance"),
    ("cost", "recovered", "cross-entropy recovered", "percent"),
    ("caveats", "purity", "label purity", "distance"),
    ("caveats", "purity_null", "label purity, labels shuffled", "distance"),
)


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
        each with ``group``, ``key``, ``name``, ``format`` (``integer``, ``percent``,
        ``distance``, ``number`` or ``signed``), ``values``: one per run, None where undefined,
        and ``counts``: the number of neurons in each mean, or None.
    """
    rows = []
    for group, key, name, form, measure in _MEASURES:
        measured = [measure(run) for run in runs]
        counts = [count for _, count in measured]
        rows.append(
            {
                "group": group,
                "key": key,
                "name": name,
                "format": form,
                "values": [_finite(value) for value, _ in measured],
                "counts": None if None in counts else counts,
            }
        )
    evaluations = [run.metadata.get("evaluation") for run in runs]
    for group, key, name, form in _EVALUATED:
        values = [_finite(e.get(key)) if isinstance(e, dict) else None for e in evaluations]
        if any(value is not None for value in values):
            row = {"group": group, "key": key, "name": name, "format": form}
            rows.append({**row, "values": values, "counts": None})
    groups = [group for group, *_ in _MEASURES]
    rows.sort(key=lambda row: groups.index(str(row["group"])))  # stable
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
