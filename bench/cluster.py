"""Clustering 2,000 neurons at once, against the loop over neurons that a user would write.

Both sides take the same embeddings (2,000 neurons × 100 examples × 768 dimensions, float32)
and compute the same results: each neuron's tree, feature clusters and metrics. The loop runs
on an evenly spaced subset of the neurons, and its time is scaled up. Two loops are timed: one
passes the embeddings to scikit-learn's AgglomerativeClustering and calls pairwise_distances
for the metrics (`ratio`); a tuned one computes the distances once and passes them to it
(`ratio_precomputed`).

    python bench/cluster.py [--neurons 2000] [--loop 200]
"""

from __future__ import annotations

import argparse
import json
import time

import numpy as np
from sklearn.cluster import AgglomerativeClustering
from sklearn.metrics import pairwise_distances

from polyseme.core import cluster_many

GPT2_SMALL_NEURONS = 12 * 3072
THRESHOLD = 0.3


def make_embeddings(neurons: int, examples: int, d: int, behaviours: int = 5) -> np.ndarray:
    """Neurons that each respond to a few behaviours, as directions with noise around them."""
    rng = np.random.default_rng(0)
    out = np.empty((neurons, examples, d), np.float32)
    for row in out:
        centres = rng.normal(size=(behaviours, d))
        row[:] = centres[rng.integers(behaviours, size=examples)]
        row += 0.5 * rng.normal(size=row.shape)
    return out


def plain(embeddings: np.ndarray, *, precomputed: bool) -> dict[str, object]:
    """Cluster one neuron, as scikit-learn's documentation shows."""
    distances = pairwise_distances(embeddings, metric="cosine")
    model = AgglomerativeClustering(
        n_clusters=None,
        distance_threshold=THRESHOLD,
        metric="precomputed" if precomputed else "cosine",
        linkage="average",
    ).fit(distances if precomputed else embeddings)
    labels = model.labels_
    counts = np.zeros(len(model.children_))
    for merge, children in enumerate(model.children_):
        counts[merge] = sum(1 if c < len(labels) else counts[c - len(labels)] for c in children)
    i, j = np.triu_indices(len(labels), 1)
    pairs, same = distances[i, j], labels[i] == labels[j]
    return {
        "tree": np.column_stack([model.children_, model.distances_, counts]),
        "labels": labels,
        "max_distance": pairs.max(),
        "mean_distance": pairs.mean(),
        "intra_cluster_distance": pairs[same].mean(),
        "inter_cluster_distance": pairs[~same].mean(),
        "n_examples": len(labels),
        "n_clusters": model.n_clusters_,
    }


def rest() -> None:
    """Let the previous section's BLAS threads stop busy-waiting, which occupies a core."""
    time.sleep(0.3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--neurons", type=int, default=2000)
    parser.add_argument("--examples", type=int, default=100)
    parser.add_argument("--dimensions", type=int, default=768)
    parser.add_argument("--loop", type=int, default=200, help="neurons that the loops run on")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()

    embeddings = make_embeddings(args.neurons, args.examples, args.dimensions)
    part = embeddings[:: max(1, args.neurons // args.loop)]
    cluster_many(embeddings[:64], threshold=THRESHOLD)
    plain(part[0], precomputed=True)

    seconds: dict[str, list[float]] = {"ours": [], "plain": [], "precomputed": []}
    for _ in range(args.rounds):
        rest()
        start = time.perf_counter()
        ours = cluster_many(embeddings, threshold=THRESHOLD)
        seconds["ours"].append(time.perf_counter() - start)
        for name in ("plain", "precomputed"):
            rest()
            start = time.perf_counter()
            loop = [plain(e, precomputed=name == "precomputed") for e in part]
            elapsed = time.perf_counter() - start
            seconds[name].append(elapsed * args.neurons / len(part))
    for index, theirs in enumerate(loop):
        # A fast answer counts only if it is the same answer.
        neuron = index * max(1, args.neurons // args.loop)
        mine = ours.metrics(neuron).as_dict()
        np.testing.assert_allclose(
            [mine[name] for name in mine], [theirs[name] for name in mine], atol=1e-5
        )

    time_of = {name: float(np.median(values)) for name, values in seconds.items()}
    for name, value in time_of.items():
        print(f"{name:>12}: {value:7.2f} s for {args.neurons} neurons, median of {args.rounds}")
    gpt2 = time_of["ours"] * GPT2_SMALL_NEURONS / args.neurons
    print(f"GPT2-small's {GPT2_SMALL_NEURONS:,} neurons would take {gpt2:.1f} s at this rate")
    print(
        json.dumps(
            {
                "name": "cluster",
                "ratio": round(time_of["plain"] / time_of["ours"], 2),
                "ratio_of": "time of a scikit-learn loop over neurons (pairwise_distances + "
                "AgglomerativeClustering on the embeddings) over cluster_many's",
                "ratio_precomputed": round(time_of["precomputed"] / time_of["ours"], 2),
                "ratio_precomputed_of": "the same, where the loop passes its distances to "
                "AgglomerativeClustering instead of computing them twice",
                "neurons": args.neurons,
                "examples": args.examples,
                "dimensions": args.dimensions,
                "ours_seconds": round(time_of["ours"], 3),
                "gpt2_small_seconds": round(gpt2, 1),
            }
        )
    )


if __name__ == "__main__":
    main()
