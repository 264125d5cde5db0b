"""The NE loss in its three forms, and the running means, from their definitions.

Double precision, explicit (B, S, d) tensors and torch's own differentiation; loops over
neurons and inputs for the running means. Nothing here shares code with the package.
"""

from __future__ import annotations

import torch
from torch import Tensor


def distances(x: Tensor, y: Tensor) -> Tensor:
    """1 - cosine along the last axis; 1, with no gradient, where a vector is zero."""
    zero = (x == 0).all(-1) | (y == 0).all(-1)
    x, y = (torch.where(zero[..., None], 1.0, z) for z in torch.broadcast_tensors(x, y))
    cosines = (x * y).sum(-1) / (x.norm(dim=-1) * y.norm(dim=-1))
    return torch.where(zero, 1.0, 1 - cosines)


def loss(
    h: Tensor, W: Tensor, a: Tensor, means: Tensor, form: str, background: Tensor | None = None
) -> Tensor:
    """The loss; a scalar in double precision, differentiable in W and a."""
    h, means, W, a = h.detach().double(), means.detach().double(), W.double(), a.double()
    active = a > 0
    if not active.any():
        return 0 * W.sum() + 0 * a.sum()
    if form == "unweighted":
        weights = torch.where(active, a, 0.0)
        return (weights * distances(h[:, None], means[None])).sum() / weights.sum()
    observed = distances(h[:, None] * W, (means * W)[None].expand(len(h), -1, -1))
    if form == "weighted":
        return observed[active].mean()
    if background is None:
        stride = max(1, len(h) // 32)
        background = torch.stack([h[k * stride] for k in range(min(32, len(h)))])
    background = background.double()
    turned = torch.stack(
        [torch.sign(background @ w.detach())[:, None] * background for w in W], dim=1
    )
    noise = distances(turned * W, (turned.mean(0) * W)[None].expand(len(turned), -1, -1))
    return (observed - noise.mean(0))[active].mean()


class RunningMeans:
    """Running means, neuron by neuron and input by input."""

    def __init__(self, d_sae: int, d_in: int, momentum: float) -> None:
        self.momentum = momentum
        self.means: list[list[float] | None] = [None] * d_sae
        self.d_in = d_in

    def update(self, h: Tensor, a: Tensor) -> None:
        for j, mean in enumerate(self.means):
            rows = [h[b].tolist() for b in range(len(h)) if a[b, j] > 0]
            if not rows:
                continue
            new = [sum(row[k] for row in rows) / len(rows) for k in range(self.d_in)]
            if mean is None:
                self.means[j] = new
            else:
                self.means[j] = [
                    self.momentum * old + (1 - self.momentum) * x
                    for old, x in zip(mean, new, strict=True)
                ]

    def tensor(self) -> Tensor:
        zero = [0.0] * self.d_in
        return torch.tensor([mean or zero for mean in self.means], dtype=torch.float64)
