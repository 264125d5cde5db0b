"""Runs to look at: made once, from models small enough to work out by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

import polyseme as ps
from analysis import small

CLASSES = ["cat", "dog", "$\\bad{$"]
LABELS = np.arange(70) % 3


class OnPixels(nn.Module):
    """Grey images of 5 × 4: a layer that reads the pixels, a deeper one, 3 logits."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(20, 10)
        self.second = nn.Linear(10, 20)
        self.last = nn.Linear(20, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.relu(self.second(torch.relu(self.first(x.flatten(1))))))


def pixels(n: int = 70) -> np.ndarray:
    return np.random.default_rng(8).integers(0, 256, size=(n, 5, 4), dtype=np.uint8)


def grey() -> ps.Images:
    return ps.Images(pixels(), LABELS, mean=0.4, std=0.3, name="grey", class_names=CLASSES)


def rgb() -> ps.Images:
    return ps.Images(small.rgb_inputs(), mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4), name="rgb")


def model() -> OnPixels:
    made = small.make(OnPixels)
    assert isinstance(made, OnPixels)
    with torch.no_grad():
        # One neuron that no input activates, one that a single input does.
        made.first.bias[3] = -30
        before = made.first(torch.from_numpy(grey().inputs(slice(None))).flatten(1))[:, 5]
        top = before.sort().values
        made.first.bias[5] -= (top[-1] + top[-2]) / 2
    return made


def analyse_grey(out: Path, **options: object) -> ps.Run:
    given = {
        "sites": "*",
        "select": ps.TopK(25),
        "threshold": 0.35,
        "random_examples": 5,
        "panel_examples": 6,
        "progress": False,
        **options,
    }
    return ps.analyse(model(), grey(), out=out, **given)


def analyse_rgb(out: Path) -> ps.Run:
    return ps.analyse(
        small.make(small.ConvNet),
        rgb(),
        out=out,
        sites=["conv", "grouped"],
        select=ps.TopK(12),
        threshold=0.5,
        panel_examples=3,
        progress=False,
    )
