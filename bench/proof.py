"""Time for every site to prove itself over that of the bare forward pass of one batch.

Measured on SmolLM2-135M (30 MLPs; a batch of 32 contexts of 128 tokens, as an analysis reads by
default), and on a convolutional network of residual blocks (batches of 256 images of 3 x 64 x 64,
with every layer a site). The proof runs the model on five inputs, follows what it does with each
layer's output, and multiplies some vectors of each site by all of its weights.

    python bench/proof.py [--rounds 5]
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from _measured import model_and_batches
from polyseme.sites import Feed, find_mlp_sites, find_sites, prove_sites


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm1, self.norm2 = nn.BatchNorm2d(width), nn.BatchNorm2d(width)
        self.second = nn.Conv2d(width, width, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.norm1(self.first(x)))
        y = self.norm2(self.second(y))
        y += x
        return torch.relu_(y)


def ratios(model: nn.Module, sites: list[Any], feed: Feed, inputs: Any, rounds: int) -> list[float]:
    def timed(run: Callable[[], Any]) -> float:
        start = time.perf_counter()
        with torch.no_grad():
            run()
        return time.perf_counter() - start

    found = []
    for _ in range(rounds + 1):
        bare = timed(lambda: feed(inputs))
        found.append(timed(lambda: prove_sites(model, sites, feed, inputs)) / bare)
    return found[1:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()

    language, batches = model_and_batches("smollm2", 32, "cpu")
    text = next(batches).inputs
    mlps = find_mlp_sites(language)
    texts = ratios(language, mlps, Feed(language, head=False), text, args.rounds)

    torch.manual_seed(0)
    stem = nn.Conv2d(3, 32, 7, stride=2, padding=3)
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10)]
    images = nn.Sequential(stem, nn.ReLU(), *(Block(32) for _ in range(8)), *head).eval()
    layers = find_sites(images, "*")
    pixels = torch.randn(256, 3, 64, 64)
    convolutions = ratios(images, layers, Feed(images), pixels, args.rounds)
    print(
        json.dumps(
            {
                "name": "proof",
                "ratio": round(statistics.median(texts), 3),
                "ratio_of": "time in which all 30 MLPs of SmolLM2 prove themselves over that of "
                "the bare forward pass, without the head, of one batch of 32 contexts",
                "ratio_of_images": round(statistics.median(convolutions), 3),
                "sites_of_images": len(layers),
                "rounds": args.rounds,
            }
        )
    )


if __name__ == "__main__":
    main()
