"""The published classifier of digits (784 → 64 ReLU → 10) whose hidden layer the study uses.

Its weights are read from ``reference/standard-sae/weights.safetensors`` in the folder that the
environment variable POLYSEME_DATA names, by default ../shared/data.

    polyseme train-sae tools/published.py:classifier --site hidden --data ../shared/data/mnist ...
"""

from __future__ import annotations

import os
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn


class Published(nn.Module):
    """Digits, flattened, to logits."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = nn.Linear(784, 64)
        self.output = nn.Linear(64, 10)

    def forward(self, images: Tensor) -> Tensor:
        """Logits (n, 10) of images (n, 28, 28)."""
        logits: Tensor = self.output(torch.relu(self.hidden(images.flatten(1))))
        return logits


def classifier() -> Published:
    """The classifier with its published weights."""
    folder = Path(os.environ.get("POLYSEME_DATA", "../shared/data"))
    weights = load_file(folder / "reference" / "standard-sae" / "weights.safetensors")
    model = Published()
    model.load_state_dict(
        {name[4:]: tensor for name, tensor in weights.items() if name.startswith("mlp.")}
    )
    return model.eval()
