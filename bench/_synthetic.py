"""A synthetic run of SmolLM2's size, on which the explorer is measured.

30 sites of 1,536 gated neurons, each with 100 examples in 31-token windows, trees, labelled
features, similar features, layouts, importances and a token index: everything that a run can hold,
in realistic sizes and distributions (few distinct tokens make up most of a text; most activations
of a window are 0), but meaningless.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from polyseme.core import cluster_many
from polyseme.store import RunWriter, vocabulary_arrays

N_NEURONS, N_EXAMPLES, N_RANDOM = 1536, 100, 16
D_IN, WINDOW, BINS, SIMILAR, LOGITS = 576, (20, 10), 64, 5, 10
CONTEXTS, LENGTH, VOCABULARY, VECTORS = 391, 128, 16_000, 20_000
PROTOTYPES = 96
METRICS = ("max_distance", "mean_distance", "intra_cluster_distance", "inter_cluster_distance")


def synthetic_run(out: Path, sites: int = 30, seed: int = 0) -> Path:
    """Write the run, unless it exists already.

    Parameters
    ----------
    out : Path
    sites : int
        Number of layers, of 1,536 neurons each.
    seed : int
    """
    rng = np.random.default_rng(seed)
    fingerprint = {"synthetic": [sites, seed]}
    with RunWriter(out, fingerprint=fingerprint, resume=True) as writer:
        if writer.finished:
            return writer.path
        trees = _prototypes(rng)
        tokens = _tokens(rng)
        words = [_word(rng) for _ in range(VOCABULARY)]
        frames = _tables(rng, trees, sites, words, tokens)
        features = frames["features"]
        for number in range(sites):
            writer.write_site(number, _site(rng, trees, features, number))
        token = tokens[features["input"], features["position"]]
        order = np.lexsort((-features["n_examples"], token))
        order = order[features["n_examples"].to_numpy()[order] > 1]
        writer.write_inputs(
            {
                "index": np.arange(CONTEXTS),
                "tokens": tokens,
                "lengths": np.full(CONTEXTS, LENGTH),
                **vocabulary_arrays(np.arange(VOCABULARY), words),
                "token_features": order,
                "token_features_ends": np.bincount(token[order], minlength=VOCABULARY).cumsum(),
            }
        )
        writer.write_tables(**frames)
        return writer.finish(
            {
                "sites": [
                    {
                        "name": f"model.layers.{number}.mlp",
                        "kind": "gated",
                        "n_neurons": N_NEURONS,
                        "d_in": D_IN,
                        "gate": "silu",
                        "activation": "SiLUActivation",
                        "threshold": 0.5,
                    }
                    for number in range(sites)
                ],
                "settings": {"window": list(WINDOW), "linkage": "average", "threshold": 0.5},
                "model": {"class": "Synthetic"},
                "data": {
                    "kind": "text",
                    "n_inputs": CONTEXTS,
                    "name": "synthetic",
                    "length": LENGTH,
                    "leave_out": [],
                    "tokenizer": {},
                },
            }
        )


def _prototypes(rng: np.random.Generator) -> Any:
    """Trees of neurons with a few behaviours each, plus single examples."""
    embeddings = np.empty((PROTOTYPES, N_EXAMPLES, 32), np.float32)
    for row in embeddings:
        centres = rng.normal(size=(rng.integers(2, 60), 32))
        row[:] = centres[(rng.beta(0.6, 2, N_EXAMPLES) * len(centres)).astype(int)]
        row += rng.uniform(0.2, 1.2) * rng.normal(size=row.shape)
    return cluster_many(embeddings, threshold=0.5)


def _tokens(rng: np.random.Generator) -> np.ndarray:
    ranks = rng.zipf(1.2, size=(CONTEXTS, LENGTH))
    return np.minimum(ranks, VOCABULARY - 1).astype(np.int32)


def _word(rng: np.random.Generator) -> str:
    letters = rng.choice(list("etaoinshrdlucmfwypvbgkjqxz"), size=rng.integers(1, 9))
    return " " * int(rng.random() < 0.6) + "".join(letters)


def _tables(
    rng: np.random.Generator, trees: Any, sites: int, words: list[str], tokens: np.ndarray
) -> dict[str, pd.DataFrame]:
    n = sites * N_NEURONS
    chosen = np.arange(n) % PROTOTYPES
    names = pd.Categorical.from_codes(
        np.repeat(np.arange(sites), N_NEURONS), [f"model.layers.{k}.mlp" for k in range(sites)]
    )
    number = np.tile(np.arange(N_NEURONS, dtype=np.int32), sites)
    neurons = pd.DataFrame(
        {
            "site": names.astype(str),
            "neuron": number,
            "n_examples": N_EXAMPLES,
            "n_clusters": trees.n_clusters[chosen],
            **{name: getattr(trees, name)[chosen] for name in METRICS},
            "density": rng.beta(0.5, 8, n),
            "max_activation": rng.gamma(3, 1, n),
            "mean_activation": rng.gamma(2, 0.1, n),
            "participation_ratio": rng.gamma(9, 20, n),
            "background_distance": rng.beta(8, 2, n),
            "calibrated_distance": rng.normal(0, 0.1, n),
            "n_random": N_RANDOM,
            "largest_share": (trees.labels == 0).mean(axis=1)[chosen],
        }
    )

    def owners(each: int) -> dict[str, Any]:
        return {
            "site": np.repeat(neurons["site"].to_numpy(), each),
            "neuron": np.repeat(number, each),
        }

    # Each neuron has its own contexts, without repeats: a walk with a stride that reaches them all.
    strides = np.array([k for k in range(1, CONTEXTS) if np.gcd(k, CONTEXTS) == 1])
    stride, start = rng.choice(strides, (n, 1)), rng.integers(CONTEXTS, size=(n, 1))
    contexts = (start + stride * np.arange(N_EXAMPLES)) % CONTEXTS
    shape = (n, N_EXAMPLES)
    examples = pd.DataFrame(
        {
            **owners(N_EXAMPLES),
            "example": np.tile(np.arange(N_EXAMPLES, dtype=np.int32), n),
            "input": contexts.ravel(),
            "position": rng.integers(1, LENGTH, size=shape).ravel(),
            "activation": -np.sort(-rng.gamma(3, 1, shape).astype(np.float32), axis=1).ravel(),
            "feature": trees.labels[chosen].ravel().astype(np.int32),
            "vector": rng.integers(VECTORS, size=shape).ravel(),
        }
    )
    random = pd.DataFrame(
        {
            **owners(N_RANDOM),
            "input": ((start + stride * np.arange(N_RANDOM)) % CONTEXTS).ravel(),
            "position": rng.integers(1, LENGTH, size=n * N_RANDOM),
            "activation": rng.gamma(1, 0.3, n * N_RANDOM).astype(np.float32),
        }
    )
    owner = np.repeat(np.arange(n), N_EXAMPLES)
    first = neurons["n_clusters"].cumsum().to_numpy() - neurons["n_clusters"].to_numpy()
    feature = first[owner] + examples["feature"].to_numpy()
    sizes = np.bincount(feature)
    activation = examples["activation"].to_numpy(np.float64)
    leading = np.full(len(sizes), len(examples))
    np.minimum.at(leading, feature, np.arange(len(examples)))  # each feature's first example
    strongest = tokens[examples["input"], examples["position"]][leading]
    others = rng.permutation(strongest)
    features = pd.DataFrame(
        {
            "site": examples["site"].to_numpy()[leading],
            "neuron": examples["neuron"].to_numpy()[leading],
            "feature": examples["feature"].to_numpy()[leading],
            "n_examples": sizes,
            "medoid": examples["example"].to_numpy()[leading],
            "mean_activation": np.bincount(feature, activation) / sizes,
            "max_activation": activation[leading],
            "input": examples["input"].to_numpy()[leading],
            "position": examples["position"].to_numpy()[leading],
            "label": [
                f"{words[a].strip()}, {words[b].strip()}"
                for a, b in zip(strongest, others, strict=True)
            ],
        }
    )
    return {"neurons": neurons, "examples": examples, "features": features, "random": random}


def _site(
    rng: np.random.Generator, trees: Any, features: pd.DataFrame, number: int
) -> dict[str, np.ndarray]:
    chosen = (number * N_NEURONS + np.arange(N_NEURONS)) % PROTOTYPES
    n_features = int(trees.n_clusters[chosen].sum())
    examples = N_NEURONS * N_EXAMPLES
    width = sum(WINDOW) + 1
    shares = rng.normal(0, 0.3, (examples, width)).astype(np.float16)
    shares[rng.random((examples, width)) < 0.6] = 0
    shares[:, WINDOW[0]] = 1
    importances = rng.beta(0.4, 3, (examples, width)) * 254
    return {
        "weights": rng.normal(size=(N_NEURONS, D_IN)).astype(np.float32),
        "up_weights": rng.normal(size=(N_NEURONS, D_IN)).astype(np.float32),
        "gate_bias": np.zeros(N_NEURONS, np.float32),
        "up_bias": np.zeros(N_NEURONS, np.float32),
        "vectors": rng.normal(size=(VECTORS, D_IN)).astype(np.float16),
        "tree": trees.trees[chosen].reshape(-1, 4),
        "histogram": rng.poisson(50, (N_NEURONS, BINS)),
        "histogram_upper": rng.gamma(3, 1, N_NEURONS),
        "windows": shares,
        "importances": importances.astype(np.uint8),
        "layout": rng.normal(0, 0.3, (examples, 2)).astype(np.float32),
        "layout_input": rng.normal(0, 0.3, (examples, 2)).astype(np.float32),
        "similar_features": rng.integers(len(features), size=(n_features, SIMILAR)),
        "similar_similarity": rng.beta(5, 2, (n_features, SIMILAR)).astype(np.float16),
        **{
            f"{side}_tokens": rng.integers(VOCABULARY, size=(N_NEURONS, LOGITS))
            for side in ("promoted", "suppressed")
        },
        **{
            f"{side}_logits": np.sort(rng.normal(size=(N_NEURONS, LOGITS))).astype(np.float32)
            for side in ("promoted", "suppressed")
        },
    }
