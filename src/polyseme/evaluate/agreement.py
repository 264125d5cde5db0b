"""Agreement of a run's features with known properties of its examples: tokens or classes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from polyseme.core import Clustering, cluster
from polyseme.core.distances import cosine_distances
from polyseme.errors import InputError
from polyseme.store import SiteInfo
from polyseme.views import Neuron, Run
from polyseme.views.neuron_rows import neurons_of

Floats = NDArray[np.floating[Any]]

THRESHOLDS = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
SPACES = ("neuron", "pre-neuron")
_FEW = 10


def agreement(
    run: Run,
    *,
    sites: Iterable[str] | None = None,
    thresholds: Iterable[float] = THRESHOLDS,
    n_neurons: int = 100,
    seed: int = 0,
) -> pd.DataFrame:
    """Agreement of features with tokens or classes, at several thresholds and in two spaces.

    A random sample of each site's neurons is clustered by neuron embeddings and, as a baseline, by
    the plain pre-neuron embeddings of the same examples. The clusters are compared with something
    that geometry does not know: each example's token in a run of texts, or its class in a run of
    images. Examples of one token may differ in meaning, and examples of different tokens may share
    one, so do not expect perfect agreement; but a threshold that splits a token's examples apart is
    too low, and one that merges random inputs is too high.

    Parameters
    ----------
    run : Run
        A run of texts or of labelled images.
    sites : list of str, optional
        All by default.
    thresholds : list of float
        Cosine distances in (0, 2].
    n_neurons : int
        Maximum number of neurons per site, drawn from those with at least ten examples.
    seed : int
        Seed of the draw.

    Returns
    -------
    pandas.DataFrame
        One row for each site, ``space`` ("neuron" or "pre-neuron") and ``threshold``, with means
        over ``neurons`` neurons of: ``features``; ``repeated``, features of at least two
        examples; ``largest``, the share of the largest; ``same_together`` and
        ``others_together``, the shares of pairs of equal and of different tokens (or classes)
        in one feature; ``rand_index``, the adjusted Rand index between features and tokens (L.
        Hubert, P. Arabie, *Comparing partitions*, 1985); and ``random_near``, the share of pairs of
        inputs drawn at random whose distance is below the threshold. A mean leaves out neurons for
        which it is undefined.

    Raises
    ------
    InputError
        The run is of images without labels, or no neuron has ten examples.
    """
    if isinstance(n_neurons, bool) or not isinstance(n_neurons, int) or n_neurons < 1:
        raise InputError(f"n_neurons is {n_neurons!r}; a whole number of at least 1 is expected.")
    if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
        raise InputError(f"seed is {seed!r}; a whole number of at least 0 is expected.")
    cuts = list(thresholds)
    if not cuts:
        raise InputError("thresholds is empty; expected cosine distances in (0, 2].")
    rng = np.random.default_rng(seed)
    rows = []
    for name in run.sites if sites is None else sites:
        info = run.site(name)
        table = run.neurons()
        counts = table.loc[table["site"] == name, "n_examples"].to_numpy()
        eligible = np.flatnonzero(counts >= _FEW)
        chosen = rng.choice(eligible, min(n_neurons, len(eligible)), replace=False)
        for number in np.sort(chosen):
            neuron = run.neuron(name, int(number))
            rows += list(_of_neuron(run, info, neuron, cuts))
    if not rows:
        raise InputError(
            f"No neuron of the run has the {_FEW} examples needed to judge a clustering; analyse "
            f"more data, or use a selector that keeps more."
        )
    frame = pd.DataFrame(rows)
    means = frame.groupby(["site", "space", "threshold"], sort=False, as_index=False).mean()
    sizes = frame.groupby(["site", "space", "threshold"], sort=False).size()
    means.insert(3, "neurons", sizes.to_numpy())
    return means


def _of_neuron(
    run: Run, info: SiteInfo, neuron: Neuron, cuts: list[float]
) -> Iterator[dict[str, Any]]:
    truth = _truth(run, neuron)
    pairs = np.triu_indices(len(truth), 1)
    same = truth[pairs[0]] == truth[pairs[1]]
    arrays = run.folder.site(info.number)
    groups = arrays["background"] if "background" in arrays else np.empty((1, 0, info.d_in))
    random = groups[neuron.number // (info.n_neurons // len(groups))].astype(np.float32)
    numbers = np.full(len(random), neuron.number)
    trees = {
        "neuron": (neuron.clustering, neurons_of(info, arrays).embed(random, numbers)),
        "pre-neuron": (
            cluster(neuron.vectors, neuron.threshold, neuron.clustering.linkage),
            random,
        ),
    }
    for space, (tree, drawn) in trees.items():
        apart = cosine_distances(drawn)[np.triu_indices(len(drawn), 1)]
        for cut in cuts:
            yield {
                "site": info.name,
                "space": space,
                **_compare(tree.cut(cut), pairs, same),
                "threshold": cut,
                "random_near": float((apart < cut).mean()) if len(apart) else np.nan,
            }


def _truth(run: Run, neuron: Neuron) -> NDArray[np.int64]:
    inputs = run.folder.inputs
    rows = np.searchsorted(inputs["index"], neuron.examples["input"].to_numpy(np.int64))
    if "tokens" in inputs:
        return np.asarray(inputs["tokens"][rows, neuron.examples["position"]], np.int64)
    if "labels" in inputs:
        return np.asarray(inputs["labels"][rows], np.int64)
    raise InputError(
        "The run's data has no labels to compare features with; expected a run of texts or of "
        "labelled images."
    )


def _compare(
    clustering: Clustering, pairs: tuple[NDArray[Any], NDArray[Any]], same: NDArray[np.bool_]
) -> dict[str, float]:
    labels = clustering.labels
    together = labels[pairs[0]] == labels[pairs[1]]
    sizes = np.bincount(labels)
    # Pairs joined by both partitions, by only one, and by neither.
    both, only = int((together & same).sum()), int((together & ~same).sum())
    apart = int((same & ~together).sum())
    neither = len(same) - both - only - apart
    below = (both + only) * (only + neither) + (both + apart) * (apart + neither)
    return {
        "features": float(len(sizes)),
        "repeated": float((sizes >= 2).sum()),
        "largest": float(sizes.max() / len(labels)),
        "same_together": both / (both + apart) if both + apart else np.nan,
        "others_together": only / (only + neither) if only + neither else np.nan,
        "rand_index": 2 * (both * neither - only * apart) / below if below else 1.0,
    }
