"""Published weights and results, and the data that they belong to."""

from __future__ import annotations

import gzip
import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import load_file
from torch import Tensor, nn

METRICS = {
    "max_distance": "max_distance",
    "mean_distance": "mean_distance",
    "intra_cluster_distance": "intra-cluster_distance",
    "inter_cluster_distance": "inter-cluster_distance",
    "n_examples": "size",
    "n_clusters": "clusters",
}
THRESHOLDS = {"hidden": 0.2, "sae": 0.05}


@cache
def digits(shared: Path) -> np.ndarray:
    """MNIST's training images as the models take them: float32, (60000, 784)."""
    with gzip.open(shared / "mnist" / "train-images-idx3-ubyte.gz") as stream:
        pixels = np.frombuffer(stream.read(), np.uint8, offset=16).reshape(-1, 784)
    return (pixels / np.float32(255) - np.float32(0.1307)) / np.float32(0.3081)


@cache
def results(shared: Path) -> dict[str, dict[str, Any]]:
    """What was published, by site and neuron."""
    path = shared / "reference" / "standard-sae" / "reference.json"
    found: dict[str, dict[str, Any]] = json.loads(path.read_text())
    return found


@cache
def weights(shared: Path) -> dict[str, np.ndarray]:
    found: dict[str, np.ndarray] = load_file(
        shared / "reference" / "standard-sae" / "weights.safetensors"
    )
    return found


class PublishedSAE(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Linear(64, 512)
        self.decoder = nn.Linear(512, 64)

    def forward(self, h: Tensor) -> Tensor:
        return self.decoder(torch.relu(self.encoder(h - self.decoder.bias)))


class PublishedModel(nn.Module):
    """A classifier of digits with a sparse autoencoder over its hidden layer."""

    def __init__(self, shared: Path) -> None:
        super().__init__()
        self.hidden = nn.Linear(784, 64)
        self.output = nn.Linear(64, 10)
        self.sae = PublishedSAE()
        self.load_state_dict(
            {
                name.removeprefix("mlp."): torch.from_numpy(array.copy())
                for name, array in weights(shared).items()
            }
        )

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.hidden(x))
        self.sae(h)
        return self.output(h)
