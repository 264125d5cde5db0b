"""Small models of every kind that polyseme reads."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Conv1D(nn.Module):
    """The transposed linear layer of GPT-2, as transformers writes it."""

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.nf = nf
        self.weight = nn.Parameter(torch.randn(nx, nf))
        self.bias = nn.Parameter(torch.randn(nf))

    def forward(self, x: Tensor) -> Tensor:
        size = (*x.size()[:-1], self.nf)
        return torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight).view(size)


class SAE(nn.Module):
    """An SAE of two linear layers, with the decoder's bias taken off its input."""

    def __init__(self, d: int, n: int) -> None:
        super().__init__()
        self.encoder = nn.Linear(d, n)
        self.decoder = nn.Linear(n, d)

    def forward(self, x: Tensor) -> Tensor:
        return self.decoder(F.relu(self.encoder(x - self.decoder.bias)))


class ParameterSAE(nn.Module):
    """An SAE of bare parameters with an encode method, as SAELens writes it."""

    def __init__(self, d: int, n: int) -> None:
        super().__init__()
        self.W_enc = nn.Parameter(torch.randn(d, n))
        self.W_dec = nn.Parameter(torch.randn(n, d))
        self.b_enc = nn.Parameter(torch.randn(n))
        self.b_dec = nn.Parameter(torch.randn(d))

    def encode(self, x: Tensor) -> Tensor:
        return F.relu((x - self.b_dec) @ self.W_enc + self.b_enc)

    def forward(self, x: Tensor) -> Tensor:
        return self.encode(x) @ self.W_dec + self.b_dec


class WithSAE(nn.Module):
    """A classifier with an SAE beside or amid it."""

    def __init__(self, sae: nn.Module, *, amid: bool) -> None:
        super().__init__()
        self.hidden = nn.Linear(6, 5)
        self.sae = sae
        self.out = nn.Linear(5, 3)
        self.amid = amid

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.hidden(x))
        rebuilt = self.sae(h)
        return self.out(rebuilt if self.amid else h)


class Functional(nn.Module):
    """A hidden layer whose activation is a function or a module, and a layer that reads it."""

    def __init__(self, activation: object, d: int = 7) -> None:
        super().__init__()
        self.first = nn.Linear(d, 6)
        self.activation = activation
        self.second = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.activation(self.first(x)))  # type: ignore[operator]


def convolutional(*, inplace: bool = False) -> nn.Sequential:
    """Images of 2 x 7 x 6 to 3 logits, with batch norms that have seen data."""
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(inplace=inplace),
        nn.MaxPool2d(2),
        nn.Conv2d(4, 5, (2, 3)),
        nn.ReLU(inplace=inplace),
        nn.Flatten(),
        nn.Linear(10, 6),
        nn.BatchNorm1d(6),
        nn.ReLU(inplace=inplace),
        nn.Linear(6, 3),
    )
    with torch.no_grad():
        for _ in range(3):
            model(torch.randn(40, 2, 7, 6))
        for module in model:
            if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
                nn.init.normal_(module.weight)
                nn.init.normal_(module.bias)
    return model
