"""The HTML card of a neuron in a notebook: its meanings and features, with examples."""

from __future__ import annotations

import base64
import html
import struct
import zlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from polyseme.views.token_windows import TextWindow

_LARGEST_SIDE = 128


class HtmlRow(NamedTuple):
    """A meaning or a feature in a neuron's table.

    Attributes
    ----------
    name : str
    n_examples : int
    mean_activation : float
    about : str
    examples : list
        `TextWindow` objects, or images.
    bold : bool
    """

    name: str
    n_examples: int
    mean_activation: float
    about: str
    examples: list[Any]
    bold: bool


def neuron_html(heading: str, about: str, rows: Sequence[HtmlRow], more: str) -> str:
    """A heading, a table and a last line; all text from the run is escaped.

    Parameters
    ----------
    heading, about : str
    rows : sequence of HtmlRow
    more : str
        The last line, about what is not shown; none if empty.
    """
    heads = ("", "n", "mean activation", "about", "examples")
    lines = ["".join(f"<th>{head}</th>" for head in heads)]
    for row in rows:
        words = [row.name, str(row.n_examples), f"{row.mean_activation:.3g}", row.about]
        cells = [f"<b>{html.escape(word)}</b>" if row.bold else html.escape(word) for word in words]
        lines.append("".join(f"<td>{cell}</td>" for cell in [*cells, _examples(row.examples)]))
    table = "".join(f"<tr>{line}</tr>" for line in lines)
    return (
        f"<p><b>{html.escape(heading)}</b> {html.escape(about)}</p>"
        f"<table>{table}</table>{f'<p>{html.escape(more)}</p>' if more else ''}"
    )


def _examples(examples: Sequence[Any]) -> str:
    if all(isinstance(example, TextWindow) for example in examples):
        return "<br>".join(map(_text, examples))
    return " ".join(map(_picture, examples))


def _text(window: TextWindow) -> str:
    tokens, centre = [html.escape(token) for token in window.tokens], window.centre
    before, after = "".join(tokens[:centre]), "".join(tokens[centre + 1 :])
    return f"{before}<b>{tokens[centre]}</b>{after}".replace("\n", "⏎")


def _picture(image: NDArray[Any]) -> str:
    step = -(-max(sorted(image.shape)[-2:]) // _LARGEST_SIDE)
    if image.ndim == 3 and image.shape[0] in (1, 3) and image.shape[2] not in (1, 3):
        image = np.moveaxis(image, 0, -1)
    if image.ndim == 3 and image.shape[2] != 3:
        image = image.mean(axis=2)
    if image.dtype != np.uint8:
        low, high = float(image.min()), float(image.max())
        image = (image - low) / (high - low if high > low else 1.0) * 255
    encoded = base64.b64encode(png(np.rint(image[::step, ::step]).astype(np.uint8))).decode()
    return f'<img alt="" src="data:image/png;base64,{encoded}">'


def png(image: NDArray[np.uint8]) -> bytes:
    """An image as a PNG file.

    Parameters
    ----------
    image : ndarray of uint8, shape (height, width) or (height, width, 3)
    """
    height, width = image.shape[:2]
    # Each row begins with its filter type, 0 for none.
    rows = np.zeros((height, 1 + image[0].size), np.uint8)
    rows[:, 1:] = image.reshape(height, -1)
    colours = 2 if image.ndim == 3 else 0
    header = struct.pack(">IIBBBBB", width, height, 8, colours, 0, 0, 0)
    chunks: Sequence[tuple[bytes, bytes]] = (
        (b"IHDR", header),
        (b"IDAT", zlib.compress(rows.tobytes())),
        (b"IEND", b""),
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in chunks
    )
