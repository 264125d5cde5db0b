"""Tables and arrays of a run, from what the pass found at a site."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

from polyseme.capture import Collected
from polyseme.core import (
    Clusterings,
    cluster_many,
    meanings_many,
    medoids_many,
    participation_ratio,
    principal_coordinates,
)
from polyseme.core.distances import cosine_matrices, unit_rows
from polyseme.core.meaning import ManyMeanings, effective_number
from polyseme.core.parallel import in_threads
from polyseme.core.similar import MIN_EXAMPLES
from polyseme.core.space import Space
from polyseme.data.sources import Source

Array = NDArray[Any]

# Bytes of embeddings that one thread works on at a time.
BLOCK_BYTES = 8 << 20
# Neurons whose meanings are found together, across blocks if necessary.
_TOGETHER = 256
# Vectors that one thread gathers at a time.
_ROWS = 4096


def _rows_of(held: Array, rows: NDArray[np.int64]) -> Array:
    """Rows of a site's stored vectors, as float32."""
    vectors = np.empty((len(rows), held.shape[1]), np.float32)

    def work(chunk: slice) -> None:
        part = rows[chunk]
        if held.dtype == np.float16:
            # torch converts to float32 several times faster than NumPy.
            halves = torch.from_numpy(held.take(part, axis=0))
            torch.from_numpy(vectors[chunk]).copy_(halves)
        else:
            # No index is out of range, and clipping is faster than checking.
            held.take(part, axis=0, out=vectors[chunk], mode="clip")

    in_threads(work, [slice(start, start + _ROWS) for start in range(0, len(rows), _ROWS)])
    return vectors


class SiteClusters(NamedTuple):
    """Clusters, layouts and meanings of the examples of a site's neurons.

    Attributes
    ----------
    clusterings : Clusterings
    medoids : ndarray of int64
        Medoid of each feature, neuron by neuron.
    layouts : dict of str to ndarray of float32, shape (n_examples, 2)
        Coordinates of each neuron's examples in the plane: ``layout`` by neuron embedding,
        ``layout_input`` by input vector.
    directions : ndarray of float16, shape (n, d_in)
        Unit embeddings of the medoids of the features that can be compared with others: those
        with at least `MIN_EXAMPLES` examples.
    meanings : ManyMeanings
    spaces : list of Space
        Where meanings are distinguished, one for each group of neurons.
    """

    clusterings: Clusterings
    medoids: Array
    layouts: dict[str, Array]
    directions: Array
    meanings: ManyMeanings
    spaces: list[Space]


@dataclasses.dataclass(frozen=True)
class _Spaces:
    """The spaces in which the meanings of a site are distinguished.

    Attributes
    ----------
    of_groups : list of Space
        One for each group of neurons.
    group : ndarray of int64, shape (n_neurons,)
        The group of each neuron.
    units : ndarray of float16, shape (n_vectors, d_in)
        Each of the site's vectors in its space.
    """

    of_groups: list[Space]
    group: Array
    units: Array

    @classmethod
    def of(cls, collected: Collected) -> _Spaces:
        spaces = [
            Space.of(mean, covariance)
            for mean, covariance in zip(collected.mean, collected.covariance, strict=True)
        ]
        n_neurons = len(collected.examples.counts)
        group = np.arange(n_neurons) * len(spaces) // max(1, n_neurons)
        read_by = np.zeros(len(collected.vectors), np.int64)
        read_by[collected.vector] = group[collected.examples.neuron]
        units = np.empty(collected.vectors.shape, np.float16)

        def work(chunk: tuple[int, NDArray[np.int64]]) -> None:
            number, rows = chunk
            units[rows] = spaces[number].inputs(collected.vectors[rows])

        in_threads(
            work,
            [
                (number, rows[at : at + _ROWS])
                for number in range(len(spaces))
                for rows in [np.flatnonzero(read_by == number)]
                for at in range(0, len(rows), _ROWS)
            ],
        )
        return cls(spaces, group, units)

    def drives(self, gradients: Array, neurons: NDArray[np.int64], units: Array) -> Array:
        """Cosines (n, width) of neurons' directions with their examples, units (n, width, d)."""
        directions = np.empty_like(gradients)
        for number in np.unique(self.group[neurons]):
            here = self.group[neurons] == number
            directions[here] = self.of_groups[number].directions(gradients[here])
        return np.asarray(np.einsum("gnd,gd->gn", units, directions))


def cluster_site(collected: Collected, threshold: float, linkage: str) -> SiteClusters:
    """Trees and layouts of all neurons of a site, in blocks that fit in memory.

    It uses only the arrays, not the site, which a process without the model does not have.
    """
    parts, spaces = list(_blocks(collected)), _Spaces.of(collected)
    done: list[SiteClusters | None] = [None] * len(parts)

    together = max(1, _TOGETHER // max(1, len(parts[0].counts))) if parts else 1

    def work(first: int) -> None:
        some = parts[first : first + together]
        blocks = [_cluster_block(collected, spaces, part, threshold, linkage) for part in some]
        make, cosines, drives = zip(*blocks, strict=True)
        counts = np.concatenate([part.counts for part in some])
        # Many blocks at once, as each step of the trees has a fixed cost.
        meanings = meanings_many(np.concatenate(cosines), np.concatenate(drives), counts)
        ends = np.cumsum([len(part.counts) for part in some])
        for place, end in enumerate(ends):
            rows = slice(end - len(some[place].counts), end)
            done[first + place] = make[place](meanings=_some_of(meanings, rows))

    in_threads(work, range(0, len(parts), together))
    return _joined([block for block in done if block is not None])


def _some_of(meanings: ManyMeanings, rows: slice) -> ManyMeanings:
    return ManyMeanings(
        *(getattr(meanings, field.name)[rows] for field in dataclasses.fields(ManyMeanings))
    )


def _cluster_block(
    collected: Collected, spaces: _Spaces, part: _NeuronBlock, threshold: float, linkage: str
) -> tuple[Callable[..., SiteClusters], Array, Array]:
    """The clusters of a block without its meanings, and the cosines that these are found from."""
    # Gathering the vectors takes longer than using them, so all their uses are here.
    rows = collected.vector[part.examples]
    vectors = _rows_of(collected.vectors, rows)
    drawn = principal_coordinates(part.padded(vectors), part.counts)[part.filled]
    neurons = collected.examples.neuron[part.examples]
    between, drives = _read_in_space(collected, spaces, part, rows, vectors)
    embeddings = part.padded(collected.neurons.embed(vectors, neurons, in_place=True))
    cosines = cosine_matrices(embeddings, part.filled, part.neurons)
    layouts = {
        "layout": principal_coordinates(embeddings, part.counts, cosines=cosines)[part.filled],
        "layout_input": drawn,
    }
    clusterings = cluster_many(
        embeddings, part.counts, threshold=threshold, linkage=linkage, cosines=cosines
    )
    central = medoids_many(embeddings, clusterings.labels, cosines=cosines)
    directions = _directions(embeddings, clusterings, central)
    make = partial(SiteClusters, clusterings, central, layouts, directions, spaces=spaces.of_groups)
    return make, between, drives


def _read_in_space(
    collected: Collected, spaces: _Spaces, part: _NeuronBlock, rows: Array, vectors: Array
) -> tuple[Array, Array]:
    """Cosines between the examples in their spaces, and with the neurons' directions."""
    units = part.padded(_rows_of(spaces.units, rows))
    gradients = np.zeros((len(part.neurons), units.shape[2]), np.float32)
    gradients[part.counts > 0] = collected.neurons.mean_gradients(
        vectors, collected.examples.neuron[part.examples]
    )
    drives = spaces.drives(gradients, part.neurons, units)
    return cosine_matrices(units, part.filled, part.neurons), drives


def _directions(embeddings: Array, clusterings: Clusterings, central: Array) -> Array:
    neuron, example = np.nonzero(clusterings.labels >= 0)
    first = np.cumsum(clusterings.n_clusters) - clusterings.n_clusters
    sizes = np.bincount(first[neuron] + clusterings.labels[neuron, example], minlength=len(central))
    large = sizes >= MIN_EXAMPLES
    neuron_of = np.repeat(np.arange(len(clusterings)), clusterings.n_clusters)
    return unit_rows(embeddings[neuron_of[large], central[large]]).astype(np.float16)


def _joined(blocks: list[SiteClusters]) -> SiteClusters:
    each = [block.clusterings for block in blocks]
    clusterings = Clusterings(
        **{
            field.name: np.concatenate([getattr(block, field.name) for block in each])
            for field in dataclasses.fields(Clusterings)
            if field.name not in ("threshold", "linkage")
        },
        threshold=each[0].threshold,
        linkage=each[0].linkage,
    )
    spaces = blocks[0].spaces
    meanings = ManyMeanings(
        *(
            np.concatenate([getattr(block.meanings, field.name) for block in blocks])
            for field in dataclasses.fields(ManyMeanings)
        )
    )
    layouts = {
        name: np.concatenate([block.layouts[name] for block in blocks])
        for name in blocks[0].layouts
    }
    central, directions = (
        np.concatenate([getattr(block, name) for block in blocks])
        for name in ("medoids", "directions")
    )
    return SiteClusters(clusterings, central, layouts, directions, meanings, spaces)


@dataclasses.dataclass(frozen=True)
class _NeuronBlock:
    """Neurons that are processed together.

    Attributes
    ----------
    neurons : ndarray of int64, shape (n,)
    counts : ndarray of int64, shape (n,)
        Number of examples of each.
    examples : slice
        Their examples among the site's.
    filled : ndarray of bool, shape (n, width)
        Which entries of an array by neuron and example number hold an example.
    """

    neurons: Array
    counts: Array
    examples: slice
    filled: Array

    def padded(self, rows: Array) -> Array:
        """Rows of the examples as an array by neuron and example number: (n, width, d)."""
        if self.filled.all():
            return rows.reshape(*self.filled.shape, rows.shape[1])
        padded = np.zeros((*self.filled.shape, rows.shape[1]), np.float32)
        padded[self.filled] = rows
        return padded


def _blocks(collected: Collected) -> Iterator[_NeuronBlock]:
    counts = collected.examples.counts
    offsets = np.concatenate([[0], counts.cumsum()])
    width = int(counts.max(initial=0))
    # Limited by whichever is larger: a neuron's embeddings or the cosines between them.
    size = max(1, BLOCK_BYTES // max(1, 4 * width * max(width, collected.vectors.shape[1])))
    for start in range(0, len(counts), size):
        part = counts[start : start + size]
        examples = slice(int(offsets[start]), int(offsets[start + len(part)]))
        neurons = np.arange(start, start + len(part))
        yield _NeuronBlock(neurons, part, examples, np.arange(width) < part[:, None])


def site_tables(collected: Collected, clusters: SiteClusters) -> dict[str, pd.DataFrame]:
    """The rows that one site adds to each table of the run."""
    clusterings, central, meanings = clusters.clusterings, clusters.medoids, clusters.meanings
    site, chosen, statistics = collected.site, collected.examples, collected.statistics
    counts = chosen.counts
    filled = np.arange(clusterings.labels.shape[1]) < counts[:, None]
    labels = clusterings.labels[filled]
    sizes = (meanings.labels[:, :, None] == np.arange(meanings.labels.max(initial=0) + 1)).sum(1)
    neurons = pd.DataFrame(
        {
            "site": site.name,
            "neuron": np.arange(site.n_neurons),
            "n_examples": counts,
            "n_clusters": clusterings.n_clusters,
            "n_meanings": meanings.labels.max(axis=1, initial=-1) + 1,
            "effective_meanings": [
                effective_number(row / max(1, row.sum())) if row.any() else np.nan for row in sizes
            ],
            "separation": meanings.separations,
            "max_distance": clusterings.max_distance,
            "mean_distance": clusterings.mean_distance,
            "intra_cluster_distance": clusterings.intra_cluster_distance,
            "inter_cluster_distance": clusterings.inter_cluster_distance,
            "density": statistics["density"],
            "max_activation": statistics["max_activation"],
            "mean_activation": statistics["mean_activation"],
            "participation_ratio": participation_ratio(collected.neurons.weights),
            "background_distance": _background(collected),
        }
    )
    if collected.windows is not None:
        neurons["token_density"] = statistics["position_density"]
    of_first = labels == 0  # the largest feature
    size = np.bincount(chosen.neuron[of_first], minlength=site.n_neurons)
    neurons["largest_share"] = np.where(counts > 0, size / np.maximum(counts, 1), np.nan)
    neurons["n_random"] = np.bincount(collected.random.neuron, minlength=site.n_neurons)
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
            "meaning": meanings.labels[filled],
            "vector": collected.vector,
        }
    )
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
    features["medoid"] = central
    for column in ("input", "position"):
        row = first[features["neuron"]] + central
        features[column] = examples[column].to_numpy()[row]
    random = pd.DataFrame(
        {
            "site": site.name,
            "neuron": collected.random.neuron,
            "input": collected.random.index,
            "position": collected.random.position,
            "activation": collected.random.activation,
        }
    )
    return {"neurons": neurons, "examples": examples, "features": features, "random": random}


def _background(collected: Collected) -> NDArray[np.float64]:
    if collected.background.shape[1] < 2:
        return np.full(collected.site.n_neurons, np.nan)
    return collected.neurons.background_distance(collected.background)


def site_arrays(collected: Collected, clusters: SiteClusters) -> dict[str, Array]:
    clusterings, meanings = clusters.clusterings, clusters.meanings
    extra = {} if collected.windows is None else {"windows": collected.windows}
    merges = np.arange(clusterings.trees.shape[1]) < collected.examples.counts[:, None] - 1
    return {
        **collected.neurons.arrays(),
        "vectors": collected.vectors,
        "tree": clusterings.trees[merges],
        "meaning_tree": meanings.trees[merges],
        "meaning_overlap": meanings.overlaps[merges].astype(np.float32),
        "meaning_drive": meanings.drives[
            np.arange(meanings.drives.shape[1]) < collected.examples.counts[:, None]
        ].astype(np.float16),
        "space_mean": np.stack([space.mean for space in clusters.spaces]),
        "space_matrix": np.stack([space.matrix for space in clusters.spaces]),
        **clusters.layouts,
        "histogram": collected.statistics["histogram"],
        "histogram_upper": collected.statistics["histogram_upper"],
        "background": collected.background,
        **collected.site.arrays(),
        **extra,
    }


def site_info(
    collected: Collected,
    threshold: float,
    shape: tuple[int, ...],
    inputs: dict[str, Array],
    source: Source,
) -> dict[str, Any]:
    site = collected.site
    gate = collected.neurons.gate
    reads_inputs = False
    if site.d_in == int(np.prod(shape)) and len(collected.vectors):
        # Equal length is not enough: a deeper layer may be as wide as the input.
        sample = np.searchsorted(inputs["index"], collected.examples.index[:8])
        pixels = source.to_input(inputs["pixels"][sample]).reshape(len(sample), -1)
        reads_inputs = bool(np.allclose(pixels, collected.vectors[collected.vector[:8]], atol=1e-5))
    return {
        "name": site.name,
        "kind": site.kind,
        "n_neurons": site.n_neurons,
        "d_in": site.d_in,
        "activation": site.activation.name,
        **({} if gate is None else {"gate": gate}),
        "threshold": threshold,
        "n_moments": collected.n_moments,
        "n_groups": site.n_groups,
        "kernel_shape": None,
        **site.metadata(collected.neurons),
        "reads_inputs": reads_inputs,
    }
