"""What the pass found at a site, as the tables and arrays of a run."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from torch import nn

from polyseme.capture import Collected
from polyseme.core import (
    Clusterings,
    background_distance,
    cluster_many,
    medoids,
    participation_ratio,
)
from polyseme.data.sources import Source

Array = NDArray[Any]

_BLOCK_BYTES = 256 << 20


def cluster_site(one: Collected, threshold: float, linkage: str) -> Clusterings:
    """Trees of all neurons of a site, in blocks of neurons that fit in memory."""
    counts = one.examples.counts
    offsets = np.concatenate([[0], counts.cumsum()])
    width = int(counts.max(initial=0))
    size = max(1, _BLOCK_BYTES // max(1, 4 * width * one.site.d_in))
    blocks = []
    for at in range(0, len(counts), size):
        part = counts[at : at + size]
        embeddings = np.zeros((len(part), width, one.site.d_in), np.float32)
        for row, weights in enumerate(one.weights[at : at + size]):
            mine = slice(offsets[at + row], offsets[at + row + 1])
            np.multiply(
                one.vectors[one.vector[mine]], weights, out=embeddings[row, : counts[at + row]]
            )
        blocks.append(cluster_many(embeddings, part, threshold=threshold, linkage=linkage))
    return Clusterings(
        **{
            field.name: np.concatenate([getattr(block, field.name) for block in blocks])
            for field in dataclasses.fields(Clusterings)
            if field.name not in ("threshold", "linkage")
        },
        threshold=threshold,
        linkage=linkage,
    )


def site_tables(one: Collected, clusterings: Clusterings) -> dict[str, pd.DataFrame]:
    """The rows that one site adds to each table of the run."""
    site, chosen, statistics = one.site, one.examples, one.statistics
    counts = chosen.counts
    labels = clusterings.labels[np.arange(clusterings.labels.shape[1]) < counts[:, None]]
    neurons = pd.DataFrame(
        {
            "site": site.name,
            "neuron": np.arange(site.n_neurons),
            "n_examples": counts,
            "n_clusters": clusterings.n_clusters,
            "max_distance": clusterings.max_distance,
            "mean_distance": clusterings.mean_distance,
            "intra_cluster_distance": clusterings.intra_cluster_distance,
            "inter_cluster_distance": clusterings.inter_cluster_distance,
            "density": statistics["density"],
            "max_activation": statistics["max_activation"],
            "mean_activation": statistics["mean_activation"],
            "participation_ratio": participation_ratio(one.weights),
            "background_distance": _background(one),
        }
    )
    neurons["calibrated_distance"] = neurons["mean_distance"] - neurons["background_distance"]
    first = np.concatenate([[0], counts.cumsum()])
    examples = pd.DataFrame(
        {
            "site": site.name,
            "neuron": chosen.neuron,
            "example": np.arange(len(labels)) - first[chosen.neuron],
            "input": chosen.index,
            "position": chosen.position,
            "activation": chosen.activation,
            "feature": labels,
            "vector": one.vector,
        }
    )
    central = [
        medoids(
            one.vectors[one.vector[first[j] : first[j + 1]]] * one.weights[j],
            clusterings.labels[j, : counts[j]],
        )
        for j in range(site.n_neurons)
    ]
    features = (
        examples.groupby(["neuron", "feature"], sort=True)
        .agg(
            n_examples=("activation", "size"),
            mean_activation=("activation", "mean"),
            max_activation=("activation", "max"),
        )
        .reset_index()
    )
    features.insert(0, "site", site.name)
    features["medoid"] = np.concatenate([np.empty(0, np.int64), *central])
    random = pd.DataFrame(
        {
            "site": site.name,
            "neuron": one.random.neuron,
            "input": one.random.index,
            "position": one.random.position,
            "activation": one.random.activation,
        }
    )
    return {"neurons": neurons, "examples": examples, "features": features, "random": random}


def _background(one: Collected) -> NDArray[np.float64]:
    groups = one.background
    per_group = one.site.n_neurons // len(groups)
    if groups.shape[1] < 2:
        return np.full(one.site.n_neurons, np.nan)
    return np.concatenate(
        [
            background_distance(rows, one.weights[g * per_group : (g + 1) * per_group])
            for g, rows in enumerate(groups)
        ]
    ).astype(np.float64)


def site_arrays(one: Collected, clusterings: Clusterings) -> dict[str, Array]:
    merges = np.arange(clusterings.trees.shape[1]) < one.examples.counts[:, None] - 1
    return {
        "weights": one.weights,
        "vectors": one.vectors,
        "tree": clusterings.trees[merges],
        "histogram": one.statistics["histogram"],
        "histogram_upper": one.statistics["histogram_upper"],
        "background": one.background,
    }


def site_info(
    one: Collected,
    threshold: float,
    shape: tuple[int, ...],
    inputs: dict[str, Array],
    source: Source,
) -> dict[str, Any]:
    site = one.site
    kernel = None
    if isinstance(site.module, nn.Conv2d):
        kernel = [site.module.in_channels // site.n_groups, *site.module.kernel_size]
    reads_inputs = False
    if site.d_in == int(np.prod(shape)) and len(one.vectors):
        # Same length is not enough: a deeper layer may be as wide as the input.
        sample = np.searchsorted(inputs["index"], one.examples.index[:8])
        given = source.to_input(inputs["pixels"][sample]).reshape(len(sample), -1)
        reads_inputs = bool(np.allclose(given, one.vectors[one.vector[:8]], atol=1e-5))
    return {
        "name": site.name,
        "kind": site.kind,
        "n_neurons": site.n_neurons,
        "d_in": site.d_in,
        "activation": site.activation.name,
        "threshold": threshold,
        "n_groups": site.n_groups,
        "kernel_shape": kernel,
        "reads_inputs": reads_inputs,
    }
