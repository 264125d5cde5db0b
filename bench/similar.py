"""The search for similar features: time of comparing all pairs over that of cells, and recall.

By default, the features are synthetic: behaviours that some features of many neurons share, among
others that share nothing. With --run, they are a run's features that are compared.
Both methods search the same vectors in the same process. Recall is over all five neighbours of
each feature, and over those above a given similarity: neighbours that are hardly nearer than the
rest are found less reliably, and mean little.

With --sample, only that many features are compared with all, and the time is scaled up.

    python bench/similar.py [--features 40000] [--rounds 3] [--run runs/smollm2] [--sample 4000]
"""

from __future__ import annotations

import argparse
import json
import time

import numpy as np

from polyseme.core.similar import nearest_features
from polyseme.opening import open_run
from polyseme.views.neuron_rows import Tables

BANDS = (0.3, 0.4, 0.5)


def make_features(n: int, d: int) -> tuple[np.ndarray, np.ndarray]:
    """Features, about seven per neuron: half are one of n / 40 behaviours, plus noise."""
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(n, d)).astype(np.float32)
    shared = rng.random(n) < 0.5
    centres = rng.normal(size=(n // 40, d)).astype(np.float32)
    noise = rng.uniform(0.5, 2, size=(int(shared.sum()), 1)).astype(np.float32)
    vectors[shared] = centres[rng.integers(len(centres), size=len(noise))] + noise * vectors[shared]
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors.astype(np.float16), np.sort(rng.integers(0, max(2, n // 7), n))


def read_features(path: str) -> tuple[np.ndarray, np.ndarray]:
    """The medoids of a run's features at the sites that read vectors as long as the first's."""
    run = open_run(path)
    vectors, owners = [], []
    for info in run.folder.sites:
        if info.d_in == run.folder.sites[0].d_in:
            features, unit = Tables(run.folder).medoid_embeddings(info)
            vectors.append(unit.astype(np.float16))
            owners.append(run.folder.first_neuron(info.number) + features["neuron"].to_numpy())
    return np.concatenate(vectors), np.concatenate(owners).astype(np.int64)


def compare_some(
    vectors: np.ndarray, owners: np.ndarray, some: np.ndarray, k: int = 5
) -> tuple[np.ndarray, np.ndarray]:
    """Neighbours of some features among all, and their similarity, in any order: (n, k) each."""
    mine = vectors[some].astype(np.float32)
    rows = np.empty((len(some), 0), np.int64)
    similarity = np.empty((len(some), 0), np.float32)
    for at in range(0, len(vectors), 8192):
        block = mine @ vectors[at : at + 8192].astype(np.float32).T
        block[owners[some][:, None] == owners[at : at + 8192]] = -np.inf
        near = np.argpartition(-block, min(k, block.shape[1] - 1), axis=1)[:, :k]
        rows = np.concatenate([rows, near + at], axis=1)
        similarity = np.concatenate([similarity, np.take_along_axis(block, near, axis=1)], axis=1)
        best = np.argsort(-similarity, axis=1)[:, :k]
        rows = np.take_along_axis(rows, best, axis=1)
        similarity = np.take_along_axis(similarity, best, axis=1)
    return rows, similarity


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--features", type=int, help="default: 40,000, or all those of a run")
    parser.add_argument("--dimensions", type=int, default=576)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--run", help="a run whose features are searched")
    parser.add_argument("--sample", type=int, help="compare only this many with all others")
    args = parser.parse_args()

    vectors, owners = (
        read_features(args.run)
        if args.run
        else make_features(args.features or 40_000, args.dimensions)
    )
    if args.features and len(vectors) > args.features:
        chosen = np.random.default_rng(0).choice(len(vectors), args.features, replace=False)
        chosen.sort()
        vectors, owners = vectors[chosen], owners[chosen]
    # Warm up: the first call also loads faiss and starts threads.
    nearest_features(vectors[:2000], owners[:2000], exact=False)
    n = len(vectors)
    some = np.arange(n)
    if args.sample and args.sample < n:
        some = np.sort(np.random.default_rng(0).choice(n, args.sample, replace=False))
    seconds: dict[str, list[float]] = {"cells": [], "exact": []}
    for _ in range(args.rounds):
        for name in seconds:
            # Let the previous section's BLAS threads stop busy-waiting, which occupies a core.
            time.sleep(0.3)
            start = time.perf_counter()
            if name == "cells":
                cells = nearest_features(vectors, owners, exact=False)
            elif len(some) < n:
                rows, similarity = compare_some(vectors, owners, some)
            else:
                rows, similarity = nearest_features(vectors, owners, exact=True)
            took = time.perf_counter() - start
            seconds[name].append(took * (n / len(some) if name == "exact" else 1))
    time_of = {name: float(np.median(values)) for name, values in seconds.items()}
    for name, value in time_of.items():
        print(f"{name:>6}: {value:6.1f} s for {len(vectors):,} features, median of {args.rounds}")
    hit = (rows[:, :, None] == cells.neighbours[some][:, None, :]).any(axis=2)
    print(
        json.dumps(
            {
                "name": "similar",
                "ratio": round(time_of["exact"] / time_of["cells"], 2),
                "ratio_of": "time of comparing all pairs over that of the search in cells",
                "recall": round(float(hit.mean()), 3),
                "recall_at_least": {
                    str(band): round(float(hit[similarity >= band].mean()), 3) for band in BANDS
                },
                "share_at_least": {
                    str(band): round(float((similarity >= band).mean()), 3) for band in BANDS
                },
                "features": len(vectors),
                "dimensions": vectors.shape[1],
                "seconds": round(time_of["cells"], 1),
            }
        )
    )


if __name__ == "__main__":
    main()
