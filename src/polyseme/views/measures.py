"""The measures of a layer of neurons, and how to write and read them, in one table."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import pandas as pd

Kind = Literal["integer", "percent", "number", "signed"]


class Measure(NamedTuple):
    """One measure of a layer.

    Attributes
    ----------
    group : str
    key : str
        Its name in `measured`, in a report on an SAE, and in a run's ``evaluation``.
    name : str
        Its name in tables; ``{neuron}`` stands for "neuron" or "latent".
    kind : str
        How its values are written: "integer", "percent", "number" or "signed".
    digits : int
        Decimal places.
    reading : str
        How to read it, in a sentence.
    """

    group: str
    key: str
    name: str
    kind: Kind
    digits: int = 0
    reading: str = ""

    def write(self, value: float) -> str:
        """A value as text; a dash for NaN."""
        if np.isnan(value):
            return "–"
        codes = {"integer": ",.0f", "percent": f".{self.digits}%", "number": f".{self.digits}f"}
        return format(value, codes.get(self.kind, f"+.{self.digits}f"))


_SPLICED = "With the reconstruction in place of the activations."
# The columns of the table of neurons that the explorer knows: how to name, write and read them.
COLUMNS: dict[str, dict[str, str]] = json.loads(
    Path(__file__).with_name("columns.json").read_text("utf-8")
)

MEASURES = (
    Measure(
        "meanings",
        "mean_meanings",
        "meanings per {neuron}",
        "number",
        2,
        "Groups that the examples fall into, whatever the threshold of the features.",
    ),
    Measure(
        "published metrics",
        "neurons",
        "{neuron}s",
        "integer",
        reading="All of them, including dead ones.",
    ),
    Measure(
        "published metrics",
        "dead_share",
        "dead {neuron}s (no input activates them)",
        "percent",
        1,
        "Dead neurons have no metrics: means are over neurons with examples.",
    ),
    Measure(
        "published metrics",
        "without_examples_share",
        "active {neuron}s without examples",
        "percent",
        1,
        "No input that activates them was selected, so they have no metrics either.",
    ),
    Measure(
        "published metrics",
        "max_distance",
        "max distance",
        "number",
        3,
        COLUMNS["max_distance"]["reading"],
    ),
    Measure(
        "published metrics",
        "mean_distance",
        "mean distance",
        "number",
        3,
        COLUMNS["mean_distance"]["reading"],
    ),
    Measure(
        "published metrics",
        "intra_cluster_distance",
        "intra-cluster distance",
        "number",
        3,
        COLUMNS["intra_cluster_distance"]["reading"],
    ),
    Measure(
        "published metrics",
        "inter_cluster_distance",
        "inter-cluster distance",
        "number",
        3,
        COLUMNS["inter_cluster_distance"]["reading"],
    ),
    Measure(
        "published metrics",
        "mean_examples",
        "examples per {neuron}",
        "number",
        1,
        "Fewer if too few inputs activate a neuron.",
    ),
    Measure(
        "published metrics",
        "mean_clusters",
        "features per {neuron}",
        "number",
        1,
        COLUMNS["n_clusters"]["reading"],
    ),
    Measure(
        "cost",
        "l0",
        "L0",
        "number",
        1,
        "Mean number of active neurons per input or token; the more, the easier reconstruction is.",
    ),
    Measure(
        "cost",
        "fvu",
        "FVU",
        "number",
        4,
        "Fraction of the variance that the reconstruction misses: 0 is perfect, 1 is no better "
        "than the mean.",
    ),
    Measure("cost", "mse", "MSE", "number", 4, "Mean squared error of the reconstruction."),
    Measure("cost", "accuracy", "accuracy of the model", "percent", 2),
    Measure("cost", "spliced_accuracy", "accuracy with the SAE", "percent", 2, _SPLICED),
    Measure("cost", "cross_entropy", "cross-entropy of the model", "number", 4),
    Measure("cost", "spliced_cross_entropy", "cross-entropy with the SAE", "number", 4, _SPLICED),
    Measure(
        "cost",
        "recovered",
        "cross-entropy recovered",
        "percent",
        2,
        "As a share of what is lost when the activations are set to 0.",
    ),
    Measure(
        "caveats",
        "median_participation_ratio",
        "participation ratio (median)",
        "number",
        1,
        COLUMNS["participation_ratio"]["reading"],
    ),
    Measure(
        "caveats",
        "calibrated_distance",
        "calibrated distance",
        "signed",
        3,
        COLUMNS["calibrated_distance"]["reading"],
    ),
    Measure(
        "caveats",
        "purity",
        "label purity",
        "number",
        3,
        "Share of a neuron’s examples with its most common label.",
    ),
    Measure(
        "caveats",
        "purity_null",
        "label purity, labels shuffled",
        "number",
        3,
        "The same with randomly shuffled labels.",
    ),
)

# Columns of the table of neurons, by the key of their mean.
_MEANS = {
    "mean_meanings": "n_meanings",
    "mean_clusters": "n_clusters",
    "mean_examples": "n_examples",
    "max_distance": "max_distance",
    "mean_distance": "mean_distance",
    "intra_cluster_distance": "intra_cluster_distance",
    "inter_cluster_distance": "inter_cluster_distance",
    "calibrated_distance": "calibrated_distance",
}


def is_dead(neurons: pd.DataFrame) -> pd.Series[bool]:
    """Which rows of `Run.neurons` are dead: no input activates them."""
    return neurons["density"] == 0


def is_without_examples(neurons: pd.DataFrame) -> pd.Series[bool]:
    """Which rows of `Run.neurons` are active but have no examples under the run's selection."""
    return (neurons["n_examples"] == 0) & ~is_dead(neurons)


def measured(neurons: pd.DataFrame) -> dict[str, float]:
    """Measures of some neurons, by the keys of `MEASURES`.

    Parameters
    ----------
    neurons : pandas.DataFrame
        Rows of `Run.neurons`.

    Returns
    -------
    dict of str to float
        ``neurons``; ``dead``, ``without_examples``, and their shares; means over the neurons for
        which each is defined, with the number of these in ``<key>_n``; and
        ``median_participation_ratio``. A column that the run lacks is left out.
    """
    dead, unlisted = is_dead(neurons), is_without_examples(neurons)
    record: dict[str, float] = {
        "neurons": len(neurons),
        "dead": int(dead.sum()),
        "dead_share": float(dead.mean()),
        "without_examples": int(unlisted.sum()),
        "without_examples_share": float(unlisted.mean()),
    }
    live = neurons[neurons["n_examples"] > 0]
    for key, column in _MEANS.items():
        if column in live:
            record[key] = float(live[column].mean())
            record[f"{key}_n"] = int(live[column].notna().sum())
    record["median_participation_ratio"] = float(live["participation_ratio"].median())
    return record
