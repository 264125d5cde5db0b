"""Small models, and a second computation of what a run holds, straight from their tensors."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from sklearn.cluster import AgglomerativeClustering
from sklearn.metrics.pairwise import cosine_distances
from torch import Tensor, nn


class MLP(nn.Module):
    """12 values, two layers of ReLU neurons (one by a module, one by a function), 3 logits."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(12, 8)
        self.act = nn.ReLU()
        self.drop = nn.Dropout(0.5)
        self.second = nn.Linear(8, 6)
        self.last = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.drop(self.act(self.first(x.flatten(1))))
        return self.last(torch.relu(self.second(h)))


class ConvNet(nn.Module):
    """RGB images of 8 × 8, a convolution, one in groups, 3 logits."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.grouped = nn.Conv2d(4, 6, 3, stride=2, groups=2)
        self.last = nn.Linear(6 * 9, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.conv(x))
        return self.last(torch.relu(self.grouped(h)).flatten(1))


class SAE(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Linear(8, 16)
        self.decoder = nn.Linear(16, 8)

    def forward(self, h: Tensor) -> Tensor:
        return self.decoder(torch.relu(self.encoder(h - self.decoder.bias)))


class WithSAE(nn.Module):
    """A layer, an SAE through which all goes, 3 logits."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = nn.Linear(12, 8)
        self.sae = SAE()
        self.last = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.sae(torch.relu(self.hidden(x))))


def make(kind: type[nn.Module]) -> nn.Module:
    torch.manual_seed(5)
    return kind().eval()


def flat_inputs(n: int = 90, d: int = 12) -> np.ndarray:
    return np.random.default_rng(3).normal(size=(n, d)).astype(np.float32)


def rgb_inputs(n: int = 60) -> np.ndarray:
    return np.random.default_rng(4).integers(0, 256, size=(n, 3, 8, 8), dtype=np.uint8)


@dataclass
class Truth:
    """Activations (n, J) with their positions, weights (J, d), and patches (n, P, G, d)."""

    activations: np.ndarray
    positions: np.ndarray
    weights: np.ndarray
    reads: np.ndarray

    def h(self, neuron: int, examples: np.ndarray) -> np.ndarray:
        group = neuron * self.reads.shape[2] // len(self.weights)
        return self.reads[examples, self.positions[examples, neuron], group]


def _plain(layer: nn.Linear, h: Tensor, a: Tensor) -> Truth:
    return Truth(
        a.numpy(),
        np.zeros(a.shape, int),
        layer.weight.numpy(),
        h.numpy()[:, None, None],
    )


def _conv(layer: nn.Conv2d, h: Tensor) -> Truth:
    out = torch.relu(layer(h)).flatten(2)
    best, at = out.max(dim=2)
    patches = nn.functional.unfold(h, layer.kernel_size, 1, layer.padding, layer.stride)
    reads = patches.transpose(1, 2).unflatten(2, (layer.groups, -1))
    return Truth(best.numpy(), at.numpy(), layer.weight.flatten(1).numpy(), reads.numpy())


def truths(model: nn.Module, inputs: np.ndarray) -> dict[str, Truth]:
    """What every site of a model does, by calling its layers one after the other."""
    with torch.no_grad():
        x = torch.from_numpy(inputs)
        model.requires_grad_(False)
        try:
            if isinstance(model, MLP):
                h = torch.relu(model.first(x))
                second = torch.relu(model.second(h))
                return {
                    "first": _plain(model.first, x, h),
                    "second": _plain(model.second, h, second),
                    "last": _plain(model.last, second, model.last(second)),
                }
            if isinstance(model, ConvNet):
                return {
                    "conv": _conv(model.conv, x),
                    "grouped": _conv(model.grouped, torch.relu(model.conv(x))),
                }
            assert isinstance(model, WithSAE)
            h = torch.relu(model.hidden(x))
            a = torch.relu(model.sae.encoder(h - model.sae.decoder.bias))
            return {"hidden": _plain(model.hidden, x, h), "sae": _plain(model.sae.encoder, h, a)}
        finally:
            model.requires_grad_(True)


def strongest(values: np.ndarray, k: int) -> np.ndarray:
    order = np.argsort(-values, kind="stable")[:k]
    return order[values[order] > 0]


def first_active(values: np.ndarray, n: int, minimum: float) -> np.ndarray:
    return np.flatnonzero((values > 0) & (values >= minimum))[:n]


def cluster(embeddings: np.ndarray, threshold: float, linkage: str) -> np.ndarray:
    if len(embeddings) < 2:
        return np.zeros(len(embeddings), int)
    fit = AgglomerativeClustering(
        n_clusters=None, metric="precomputed", linkage=linkage, distance_threshold=threshold
    )
    return fit.fit_predict(cosine_distances(embeddings.astype(np.float64)))


def metrics(embeddings: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    distances = cosine_distances(embeddings.astype(np.float64)) if len(embeddings) else np.empty(0)
    i, j = np.triu_indices(len(labels), 1)
    pairs = distances[i, j] if len(i) else np.empty(0)
    same = labels[i] == labels[j]

    def mean(values: np.ndarray) -> float:
        return float(values.mean()) if len(values) else float("nan")

    return {
        "max_distance": float(pairs.max()) if len(pairs) else float("nan"),
        "mean_distance": mean(pairs),
        "intra_cluster_distance": mean(pairs[same]),
        "inter_cluster_distance": mean(pairs[~same]),
        "n_examples": len(labels),
        "n_clusters": len(set(labels.tolist())),
    }


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a run, run.json without its date, its times and its own digest."""
    found = {
        file.relative_to(folder).as_posix(): file.read_bytes()
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }
    text, dates = re.subn(
        rb'"created": "[^"]*"|"seconds": {[^}]*}|,\s+"sha256": "\w+"\s+}\s*$',
        b"",
        found["run.json"],
    )
    assert dates == 3
    return {**found, "run.json": text}
