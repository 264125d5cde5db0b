"""The search for similar features: time of comparing all pairs over that of the cells, and recall.

By default on made-up features: behaviours that some features of many neurons share, among
others that share nothing. With --run, on the features of a run, of three examples or more.
Both ways search the same vectors in the same process. Recall is over all five neighbours of
each feature, and over those that are at least so similar: neighbours that are hardly nearer
than the rest are not found as surely, and mean little.

    python bench/similar.py [--features 60000] [--run runs/smollm2]
"""

from __future__ import annotations

import argparse
import json
import time

import numpy as np

from polyseme.core.similar import nearest_features
from polyseme.views import open_run
from polyseme.views.tables import Tables

BANDS = (0.3, 0.4, 0.5)


def make_features(n: int, d: int) -> tuple[np.ndarray, np.ndarray]:
    """Half of the features are one of n / 40 behaviours, with noise; about seven to a neuron."""
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--features", type=int, default=60_000, help="at most, from a run too")
    parser.add_argument("--dimensions", type=int, default=576)
    parser.add_argument("--run", help="a run whose features are searched")
    args = parser.parse_args()

    vectors, owners = (
        read_features(args.run) if args.run else make_features(args.features, args.dimensions)
    )
    if len(vectors) > args.features:
        chosen = np.random.default_rng(0).choice(len(vectors), args.features, replace=False)
        chosen.sort()
        vectors, owners = vectors[chosen], owners[chosen]
    seconds, found = {}, {}
    for name in ("cells", "exact"):
        start = time.perf_counter()
        found[name] = nearest_features(vectors, owners, exact=name == "exact")
        seconds[name] = time.perf_counter() - start
        print(f"{name:>6}: {seconds[name]:7.1f} s for {len(vectors):,} features")
    exact, cells = found["exact"], found["cells"]
    hit = (exact.neighbours[:, :, None] == cells.neighbours[:, None, :]).any(axis=2)
    print(
        json.dumps(
            {
                "name": "similar",
                "ratio": round(seconds["exact"] / seconds["cells"], 2),
                "ratio_of": "time of comparing all pairs over that of the search in cells",
                "recall": round(float(hit.mean()), 3),
                "recall_at_least": {
                    str(band): round(float(hit[exact.similarity >= band].mean()), 3)
                    for band in BANDS
                },
                "share_at_least": {
                    str(band): round(float((exact.similarity >= band).mean()), 3) for band in BANDS
                },
                "features": len(vectors),
                "dimensions": vectors.shape[1],
                "seconds": round(seconds["cells"], 1),
            }
        )
    )


if __name__ == "__main__":
    main()
