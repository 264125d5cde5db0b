"""A classifier and an SAE of its hidden layer, small enough to follow by hand."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Classifier(nn.Module):
    """Six pixels, five hidden ReLU neurons, three classes."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = nn.Linear(6, 5)
        self.out = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.relu(self.hidden(x.flatten(1))))


class SAE(nn.Module):
    """Five activations, eight latents."""

    def __init__(self) -> None:
        super().__init__()
        self.W_enc = nn.Parameter(torch.randn(5, 8))
        self.b_enc = nn.Parameter(0.3 * torch.randn(8))
        self.W_dec = nn.Parameter(torch.randn(8, 5) / 3)
        self.b_dec = nn.Parameter(0.1 * torch.randn(5))

    def encode(self, h: Tensor) -> Tensor:
        return torch.relu((h - self.b_dec) @ self.W_enc + self.b_enc)

    def decode(self, a: Tensor) -> Tensor:
        return a @ self.W_dec + self.b_dec


def data(n: int = 400) -> tuple[Tensor, Tensor]:
    """Inputs and labels."""
    x = torch.randn(n, 6)
    return x, (x[:, 0] > 0).long() + (x[:, 1] > 0.5).long()
