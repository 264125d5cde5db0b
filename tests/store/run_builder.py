"""A small valid run from seeded random arrays, written the plain way: loops and SciPy."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy.cluster.hierarchy import fcluster, linkage

from polyseme.store import RunWriter
from polyseme.store.format import TABLES

FINGERPRINT = {"settings": {"threshold": 0.2, "select": "top-k"}, "model": "m", "data": "d"}


@dataclass
class Contents:
    """All that a writer is given."""

    metadata: dict[str, Any]
    inputs: dict[str, np.ndarray]
    sites: list[dict[str, np.ndarray]]
    tables: dict[str, pd.DataFrame]


def contents(
    *,
    seed: int = 0,
    counts: tuple[tuple[int, ...], ...] = ((5, 0, 1), (4, 2)),
    d_in: int = 4,
    n_inputs: int = 8,
) -> Contents:
    """A run with `counts[site][neuron]` examples; by default a dead neuron and a lonely one."""
    rng = np.random.default_rng(seed)
    index = np.sort(rng.choice(100, n_inputs, replace=False)).astype(np.int64)
    inputs = {
        "index": index,
        "pixels": rng.integers(0, 255, (n_inputs, 2, 3), dtype=np.uint8),
        "labels": rng.integers(0, 10, n_inputs),
    }
    described, sites = [], []
    neurons, examples, features, random = [], [], [], []
    for number, sizes in enumerate(counts):
        name = f"layers.{number}"
        n_neurons = len(sizes)
        described.append(
            {"name": name, "kind": "mlp", "n_neurons": n_neurons, "d_in": d_in, "threshold": 0.2}
        )
        weights = rng.normal(size=(n_neurons, d_in))
        vectors = rng.normal(size=(n_inputs, d_in))
        trees = [np.zeros((0, 4))]
        for neuron, n in enumerate(sizes):
            rows = np.sort(rng.choice(n_inputs, n, replace=False))
            activation = np.sort(rng.random(n).astype(np.float32))[::-1]
            labels = np.zeros(n, dtype=int)
            if n > 1:
                tree = linkage(vectors[rows] * weights[neuron], "average", "cosine")
                tree[:, 2] = np.clip(tree[:, 2], 0, 2)
                trees.append(tree)
                raw = fcluster(tree, 0.4, "distance")
                sized = sorted(set(raw), key=lambda label: (-np.sum(raw == label), label))
                labels = np.array([sized.index(label) for label in raw])
            nan = np.nan
            neurons.append(
                {
                    "site": name,
                    "neuron": neuron,
                    "n_examples": n,
                    "n_clusters": len(set(labels)),
                    "max_distance": 0.5 if n > 1 else nan,
                    "mean_distance": 0.25 if n > 1 else nan,
                    "intra_cluster_distance": nan,
                    "inter_cluster_distance": nan,
                    "density": n / n_inputs,
                    "max_activation": float(activation[0]) if n else nan,
                    "mean_activation": float(activation.mean()) if n else nan,
                    "participation_ratio": 2.0,
                    "n_random": min(n, 2),
                }
            )
            for example, row in enumerate(rows):
                examples.append(
                    {
                        "site": name,
                        "neuron": neuron,
                        "example": example,
                        "input": index[row],
                        "position": example,
                        "activation": activation[example],
                        "feature": labels[example],
                        "vector": row,
                    }
                )
            for feature in range(len(set(labels))):
                members = np.flatnonzero(labels == feature)
                features.append(
                    {
                        "site": name,
                        "neuron": neuron,
                        "feature": feature,
                        "n_examples": len(members),
                        "medoid": members[0],
                        "mean_activation": float(activation[members].mean()),
                        "max_activation": float(activation[members].max()),
                    }
                )
            random += [
                {
                    "site": name,
                    "neuron": neuron,
                    "input": index[row],
                    "position": 0,
                    "activation": 0.5,
                }
                for row in rows[:2]
            ]
        site = {
            "weights": weights,
            "vectors": vectors,
            "tree": np.concatenate(trees),
            "histogram": rng.integers(0, 9, (n_neurons, 3)),
            "histogram_upper": np.ones(n_neurons),
        }
        if number == 0:
            site["activation_map"] = np.resize(rng.random((n_neurons, 4)), (n_neurons, 2, 3))
            site["logit_gradient"] = rng.normal(size=(n_neurons, 3))
            site["logit_ablation"] = -site["logit_gradient"]
        sites.append(site)
    return Contents(
        metadata={
            "sites": described,
            "settings": {"threshold": 0.2, "linkage": "average"},
            "model": {"class": "Model"},
            "data": {
                "name": "d",
                "n_inputs": 100,
                "shape": [2, 3],
                "image_shape": [2, 3],
                "mean": 0.5,
                "std": 0.25,
                "low": -2.0,
                "high": 2.0,
                "class_names": [],
            },
        },
        inputs=inputs,
        sites=sites,
        tables={
            name: _frame(rows, name)
            for name, rows in {
                "neurons": neurons,
                "examples": examples,
                "features": features,
                "random": random,
            }.items()
        },
    )


def _frame(rows: list[dict[str, Any]], table: str) -> pd.DataFrame:
    return pd.DataFrame(
        {
            column: np.array(
                [row[column] for row in rows], dtype=object if dtype == "str" else dtype
            )
            for column, dtype in TABLES[table].items()
        }
    )


def fill(writer: RunWriter, made: Contents) -> None:
    """Write all but the end."""
    writer.write_inputs(made.inputs)
    for number, site in enumerate(made.sites):
        writer.write_site(number, site)
    writer.write_tables(**made.tables)


def write(out: Path, made: Contents | None = None, **flags: bool) -> Path:
    """Write a whole run."""
    made = made or contents()
    with RunWriter(out, fingerprint=FINGERPRINT, **flags) as writer:
        fill(writer, made)
        return writer.finish(made.metadata)
