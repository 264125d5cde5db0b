"""Draws the idea: a neuron's examples, their neuron embeddings, its meanings and their features.

polyseme demo
python tools/idea.py runs/demo/hidden 22 docs/images/idea.png
"""

from __future__ import annotations

import io
import sys
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, Rectangle
from numpy.typing import NDArray
from PIL import Image

import polyseme as ps

PAPER, INK, MUTED, LINE = "#fbfaf7", "#1f2328", "#59606a", "#c9c6bf"
COLOURS = ("#0f6fbd", "#c8641b", "#12805c")
WIDTH, HEIGHT = 12.7, 4.3  # inches
TILE, GAP = 0.64, 0.1
STEP = TILE + GAP
# Left edges of the columns, and the top of their first row.
EXAMPLES, WEIGHTS, EMBEDDINGS, MEANINGS, FEATURES = 0.3, 2.79, 3.83, 6.86, 10.28
TOP = HEIGHT - 1.12
# Per meaning: examples that are drawn in every column, and features.
N_EXAMPLES, N_FEATURES = 4, 3
SIZE = 28  # side of a digit, pixels


class Canvas:
    """A figure whose coordinates are inches from its lower left corner."""

    def __init__(self) -> None:
        self.figure = Figure(figsize=(WIDTH, HEIGHT), facecolor=PAPER)
        self.page = self.figure.add_axes((0, 0, 1, 1))
        self.page.set(xlim=(0, WIDTH), ylim=(0, HEIGHT))
        self.page.axis("off")

    def text(self, x: float, y: float, text: str, size: float = 12, **style: Any) -> None:
        self.page.text(x, y, text, **{"fontsize": size, "color": INK, "va": "center", **style})

    def head(self, x: float, title: str, below: str) -> None:
        self.text(x, HEIGHT - 0.38, title, 16, weight="bold")
        self.text(x, HEIGHT - 0.74, below, 12.5, color=MUTED)

    def tile(
        self,
        x: float,
        top: float,
        picture: NDArray[Any],
        frame: str = LINE,
        *,
        signed: bool = False,
    ) -> None:
        """Draw a picture; red is positive, blue negative."""
        box = (x / WIDTH, (top - TILE) / HEIGHT, TILE / WIDTH, TILE / HEIGHT)
        axes = self.figure.add_axes(box)
        limit = float(np.abs(picture).max())
        style = {"cmap": "RdBu_r", "vmin": -limit, "vmax": limit} if signed else {"cmap": "gray_r"}
        axes.imshow(picture, interpolation="nearest", **style)
        axes.set(xticks=[], yticks=[])
        for spine in axes.spines.values():
            spine.set(color=frame, linewidth=0.8 if frame == LINE else 1.8)

    def arrow(self, x: float, y: float, length: float, colour: str = MUTED) -> None:
        self.page.add_patch(
            FancyArrowPatch(
                (x, y), (x + length, y), arrowstyle="-|>", mutation_scale=15, lw=1.6, color=colour,
                shrinkA=0, shrinkB=0,
            )
        )  # fmt: skip


def draw(neuron: ps.Neuron) -> Figure:
    """Draw a neuron that reads digits, with the largest three of its meanings."""
    canvas = Canvas()
    images = neuron.inputs()
    embeddings = neuron.embeddings.reshape(-1, SIZE, SIZE)
    activations = neuron.examples["activation"].to_numpy()
    meanings = neuron.meanings[: len(COLOURS)]
    of_each = []
    for meaning in meanings:
        rows = meaning.examples["example"].to_numpy()
        of_each.append(rows[np.argsort(-activations[rows])][:N_EXAMPLES])
    mixed = np.sort(np.concatenate(of_each))  # in the order of the data

    middle = TOP - 2 * STEP + GAP / 2
    canvas.head(EXAMPLES, "Examples", "what activates one neuron")
    canvas.head(EMBEDDINGS, "Neuron embeddings", "h ⊙ w: what it read in each")
    for place, example in enumerate(mixed):
        row, column = divmod(place, 3)
        top = TOP - row * STEP
        canvas.tile(EXAMPLES + column * STEP, top, images[example])
        canvas.tile(EMBEDDINGS + column * STEP, top, embeddings[example], signed=True)
    canvas.tile(WEIGHTS, middle + TILE + 0.25, neuron.weights.reshape(SIZE, SIZE), signed=True)
    canvas.text(WEIGHTS + TILE / 2, middle + TILE + 0.42, "weights w", 12, ha="center")
    canvas.arrow(WEIGHTS - 0.1, middle, TILE + 0.3)
    canvas.arrow(EMBEDDINGS + 3 * STEP + 0.03, middle, 0.5)

    canvas.head(MEANINGS, "Meanings", f"{len(neuron.meanings)} groups in {len(images)} examples")
    canvas.head(FEATURES, "Features", "clusters of h ⊙ w")
    label = 0.24  # inches
    pitch = label + TILE + (4 * STEP - GAP - 3 * (label + TILE)) / 2
    for meaning, members, colour in zip(meanings, of_each, COLOURS, strict=False):
        top = TOP - meaning.number * pitch - label
        canvas.page.add_patch(
            Rectangle((MEANINGS - 0.16, top - TILE), 0.06, TILE + label, color=colour, lw=0)
        )
        name, n = next(iter(meaning.counts.items()))
        about = f"{meaning.n_examples} examples: {name} ×{n}"
        canvas.text(MEANINGS - 0.02, top + 0.13, about, 12, color=colour, weight="bold")
        for column, example in enumerate(members):
            canvas.tile(MEANINGS + column * STEP, top, images[example], colour)
        canvas.arrow(MEANINGS + N_EXAMPLES * STEP + 0.02, top - TILE / 2, 0.36, colour)
        for column, number in enumerate(list(meaning.features)[:N_FEATURES]):
            rows = meaning.examples.loc[meaning.examples["feature"] == number, "example"]
            x = FEATURES + column * STEP
            canvas.tile(x, top, embeddings[rows].mean(axis=0), colour, signed=True)
            canvas.text(x + TILE / 2, top + 0.13, f"×{len(rows)}", 12, ha="center", color=colour)
    return canvas.figure


def main() -> None:
    run, number, path = sys.argv[1:]
    drawn = io.BytesIO()
    draw(ps.open_run(run).neuron(int(number))).savefig(drawn, format="png", dpi=140)
    # A palette makes the file a third of the size.
    Image.open(drawn).convert("RGB").quantize(128).save(Path(path), optimize=True)


if __name__ == "__main__":
    main()
