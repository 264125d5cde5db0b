"""Prints and plots how many features the neurons of each layer of a run have.

python tools/features_by_layer.py runs/smollm2 docs/images/features-by-layer.png
"""

from __future__ import annotations

import sys

import matplotlib as mpl
import numpy as np
import pandas as pd

import polyseme as ps

LEAST = 5
BANDS = ("none", "one", "two", "three", "four or more")


def features_by_layer(run: ps.Run) -> pd.DataFrame:
    """Neurons of each site by their number of features with at least five examples."""
    neurons = run.neurons().query("n_examples > 0")
    large = run.folder.features.query("n_examples >= @LEAST").groupby(["site", "neuron"]).size()
    counted = neurons.set_index(["site", "neuron"]).assign(large=large)
    counted = counted.fillna({"large": 0})
    rows = []
    for name in run.sites:
        here = counted.loc[name]
        shares = np.bincount(here["large"].astype(int).clip(upper=len(BANDS) - 1), minlength=5)
        of_all = np.bincount(here["n_clusters"].clip(upper=3), minlength=4)[1:]
        rows.append([name, *shares, *of_all, here["n_clusters"].mean(), here["large"].mean()])
    columns = ["site", *BANDS, "all: one", "all: two", "all: three or more", "mean", "mean large"]
    return pd.DataFrame(rows, columns=columns)


def main() -> None:
    mpl.use("Agg")
    from matplotlib import pyplot as plt

    table = features_by_layer(ps.open_run(sys.argv[1]))
    print(table.round(1).to_string(index=False))
    print("all", table.sum(numeric_only=True)[: len(BANDS) + 3].astype(int).to_dict())
    shares = table[list(BANDS)].div(table[list(BANDS)].sum(axis=1), axis=0) * 100
    figure, axes = plt.subplots(figsize=(8, 3.2), layout="constrained")
    base = np.zeros(len(table))
    for name, shade in zip(BANDS, plt.get_cmap("cividis")(np.linspace(0.95, 0.05, 5)), strict=True):
        axes.bar(table.index, shares[name], bottom=base, color=shade, label=name, width=0.85)
        base += shares[name].to_numpy()
    axes.set(xlabel="layer", ylabel="% of neurons", ylim=(0, 100))
    axes.legend(
        title=f"features of {LEAST} examples or more", ncols=5, loc="lower center",
        bbox_to_anchor=(0.5, 1), frameon=False,
    )  # fmt: skip
    figure.savefig(sys.argv[2], dpi=120)


if __name__ == "__main__":
    main()
