"""The image panel of a neuron as a matplotlib figure."""

from __future__ import annotations

import itertools
import math
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from polyseme.errors import MissingDependencyError
from polyseme.remote import local_path
from polyseme.store.files import replace_bytes, writing
from polyseme.views.features import class_name
from polyseme.views.panel import FeaturePanel, ImagePanel, MeaningPanel

if TYPE_CHECKING:
    import pandas as pd

Array = NDArray[Any]

# Blue is negative, red is positive: distinct under common colour blindness.
_SIGNED = "RdBu_r"
_INK, _MUTED, _BAR = "#222222", "#666666", "#4c72b0"
# Names are arbitrary, so a dollar sign in one is not a formula.
_PLAIN: dict[str, Any] = {"parse_math": False}
# Inches: the width, and the space between pictures. Edges of the drawing, as shares of the width.
_WIDTH, _BETWEEN = 14.5, 0.08
_LEFT, _RIGHT = 0.02, 0.985
_CLASSES = 12
_LABEL_POINTS = 130


class _Row(NamedTuple):
    """A meaning or a feature, and the text next to its pictures."""

    group: FeaturePanel
    name: str
    of: str
    is_meaning: bool


def save_figure(figure: Any, path: str | Path) -> None:
    """Save a matplotlib figure atomically, creating folders; the suffix sets the format."""
    file, drawn = local_path(path, "A figure"), BytesIO()
    figure.savefig(drawn, format=file.suffix.removeprefix(".") or None)
    with writing(file, resumable=False):
        file.parent.mkdir(parents=True, exist_ok=True)
        replace_bytes(file, drawn.getvalue())


def draw_panel(panel: ImagePanel, *, n_features: int = 8) -> Any:
    """Draw a neuron's panel.

    Parameters
    ----------
    panel : ImagePanel
    n_features : int
        Most features to draw, largest first, divided equally among meanings.

    Returns
    -------
    matplotlib.figure.Figure
        Not shown in a window, so it can be created anywhere.
    """
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise MissingDependencyError("Drawing a figure", "matplotlib", "figures") from error

    rows = _rows(panel, n_features)
    n_random = min(len(panel.random_examples), 14)
    heights = [2.5, 1.0 if n_random else 0.01, *[1.12] * len(rows)]
    height = sum(heights) + 1.75
    figure = Figure(figsize=(_WIDTH, height), layout=None, facecolor="white")
    title = _title(panel)
    figure.text(0.02, 1 - 0.25 / height, title, fontsize=15, weight="bold", va="top", **_PLAIN)
    figure.text(0.02, 0.12 / height, _foot(panel, n_features), fontsize=9, color=_MUTED)
    figure.text(0.02, 1 - 0.62 / height, _subtitle(panel), fontsize=9.5, color=_MUTED, va="top")
    grid = figure.add_gridspec(
        len(heights),
        1,
        height_ratios=heights,
        left=_LEFT,
        right=_RIGHT,
        top=1 - 1.1 / height,
        bottom=0.4 / height,
        hspace=0.38,
    )
    _draw_summary(figure, grid[0], panel)
    if n_random:
        _draw_random(figure, grid[1], panel, n_random)
    for place, row in enumerate(rows):
        _draw_row(figure, grid[2 + place], panel, row, with_heads=place == 0)
    return figure


def _rows(panel: ImagePanel, n_features: int) -> list[_Row]:
    """Each meaning followed by its features, or only features if there are no meanings."""
    total = panel.metrics.n_examples
    if not panel.meanings:
        return [
            _Row(feature, f"feature {feature.number}", f"of {total} examples", False)
            for feature in panel.features[:n_features]
        ]
    sizes = {feature.number: feature.n_examples for feature in panel.features}
    rows = []
    for meaning in panel.meanings[:n_features]:
        rows.append(_Row(meaning, f"meaning {meaning.number}", f"of {total} examples", True))
        rows += [
            _Row(part, f"feature {part.number}", f"of {_examples(sizes[part.number])}", False)
            for part in meaning.features[: _parts_of_each(panel, n_features)]
        ]
    return rows


def _parts_of_each(panel: ImagePanel, n_features: int) -> int:
    return max(1, n_features // len(panel.meanings))


def _foot(panel: ImagePanel, n_features: int) -> str:
    """A note on the order of the examples, and on what is not drawn."""
    if not panel.features:
        return ""
    notes = ["Each row: the most central example, then those nearest to it, with activations."]
    if panel.meanings:
        notes.append("Below each meaning are the features with the most examples in it.")
        if rest := len(panel.meanings[n_features:]):
            notes.append(f"{rest} smaller meanings are not drawn.")
    elif features := panel.features[n_features:]:
        n = sum(feature.n_examples for feature in features)
        notes.append(f"{len(features)} smaller features hold the other {n} examples.")
    return " ".join(notes)


def _examples(n: int) -> str:
    return f"{n} example{'s' * (n != 1)}"


def _title(panel: ImagePanel) -> str:
    m = panel.metrics
    if not m.n_examples:
        dead = panel.statistics["density"] == 0
        why = "dead: no input activates it" if dead else "active, but without examples"
        return f"{panel.site} / {panel.neuron}: {why}"
    features = f"{m.n_clusters} feature{'s' * (m.n_clusters != 1)}"
    if n := len(panel.meanings):
        features = f"{n} meaning{'s' * (n != 1)} (verdict: {panel.verdict}), {features}"
    return f"{panel.site} / {panel.neuron}: {features} in {m.n_examples} examples"


def _subtitle(panel: ImagePanel) -> str:
    m, s = panel.metrics, panel.statistics

    def number(value: float) -> str:
        return "–" if math.isnan(value) else f"{value:.3f}"

    return (
        f"cosine distances: mean {number(m.mean_distance)}, max {number(m.max_distance)}, "
        f"within features {number(m.intra_cluster_distance)}, between "
        f"{number(m.inter_cluster_distance)} (cut at {panel.threshold:g})    "
        f"active on {s['density']:.1%} of {panel.n_inputs:,} inputs, maximum "
        f"{s['max_activation']:.3g}    participation ratio {s['participation_ratio']:.3g}    "
        f"f: {panel.activation}"
    )


def _draw_summary(figure: Any, place: Any, panel: ImagePanel) -> None:
    shown = _strongest_effects(panel)
    names = [] if shown is None else [_fitting(str(name), 100, 7.5) for name in shown["class"]]
    # In inches: room for the colour bars of the pictures, and for the names of the classes.
    gaps = [0.5, 0.5, 0.35, 0.6 + max((_points(name, 7.5) for name in names), default=0) / 72, 0.5]
    shares = np.array([1, 1, 1, 1, 1.25, 1.25])
    widths = shares / shares.sum() * ((_RIGHT - _LEFT) * _WIDTH - sum(gaps))
    columns = [*itertools.chain(*zip(widths, gaps, strict=False)), widths[-1]]
    grid = place.subgridspec(1, len(columns), width_ratios=columns, wspace=0)
    axes = [figure.add_subplot(grid[0, 2 * number]) for number in range(len(widths))]
    _signed(figure, axes[0], panel.input_weights, "input weights", "no pixels at this depth")
    from_what = (
        f"relative to an input of {panel.baseline:g}"
        if isinstance(panel.baseline, int | float)
        else "relative to a given baseline"
    )
    _signed(figure, axes[1], panel.activation_map, f"activation map\n{from_what}", "not computed")
    if panel.average_example is None:
        _empty(axes[2], "average example", "no examples")
    else:
        _image(axes[2], panel.average_example)
        axes[2].set_title("average example", fontsize=9.5)
    title = "importance map\nactivation map ⊙ average"
    _signed(figure, axes[3], panel.importance_map, title, "not computed")
    _draw_logits(axes[4], panel, shown, names)
    _draw_histogram(axes[5], panel)


def _strongest_effects(panel: ImagePanel) -> pd.DataFrame | None:
    """The classes whose logits the neuron changes most; None if unknown."""
    effects = panel.logit_effects
    if effects is None or effects["ablation"].isna().all():
        return None
    if len(effects) <= _CLASSES:
        return effects
    return effects.loc[effects["ablation"].abs().sort_values(ascending=False).index[:_CLASSES]]


def _draw_logits(
    axes: Any, panel: ImagePanel, shown: pd.DataFrame | None, names: list[str]
) -> None:
    if shown is None:
        why = "no logits" if panel.logit_effects is None else "no examples"
        _empty(axes, "logit effects", why)
        return
    positions = np.arange(len(shown))
    axes.barh(positions, shown["ablation"], color=_BAR, height=0.7, label="by ablation")
    axes.plot(shown["gradient"], positions, "|", color=_INK, ms=9, mew=1.6, label="first order")
    axes.set_yticks(positions, names, fontsize=7.5, **_PLAIN)
    axes.invert_yaxis()
    axes.axvline(0, color=_MUTED, lw=0.8)
    axes.tick_params(axis="x", labelsize=7.5)
    axes.locator_params(axis="x", nbins=4)
    axes.set_title("logit effects, mean over examples", fontsize=9.5)
    axes.legend(fontsize=6.5, frameon=False, loc="best", handlelength=1)
    _bare(axes)


def _draw_histogram(axes: Any, panel: ImagePanel) -> None:
    counts, upper = panel.histogram, panel.histogram_upper
    if not counts.sum():
        _empty(axes, "activations", "never active")
        return
    edges = np.linspace(0, upper, len(counts) + 1)
    last = int(np.flatnonzero(counts)[-1]) + 1
    axes.stairs(counts[:last], edges[: last + 1], fill=True, color=_BAR)
    axes.set_yscale("log")
    axes.set_ylim(bottom=0.7)
    axes.tick_params(labelsize=7.5)
    axes.set_title(f"activations: {int(counts.sum()):,} of {panel.n_inputs:,} > 0", fontsize=9.5)
    _bare(axes)


class _Strip:
    """A row of text and pictures in one axes: an axes for each takes many times longer.

    Parameters
    ----------
    figure
    place
        Where in the grid.
    shares : list of float
        Relative widths of the columns.
    """

    def __init__(self, figure: Any, place: Any, shares: list[float]) -> None:
        box = place.get_position(figure)
        self._width, self._height = box.width * _WIDTH, box.height * figure.get_figheight()
        self._axes = figure.add_subplot(place)
        self._axes.set(xlim=(0, self._width), ylim=(0, self._height))
        self._axes.axis("off")
        ends = np.cumsum(shares) / sum(shares) * (self._width + _BETWEEN)
        self._columns = list(itertools.pairwise([0.0, *ends]))

    def text(self, text: str, left: float = 0.0, **style: Any) -> None:
        """Write beside the pictures."""
        self._axes.text(left, self._height / 2, text, va="center", **style, **_PLAIN)

    def image(self, column: int, image: Array, title: str, *, size: float = 7) -> None:
        """Draw a picture."""
        self._draw(column, _pixels(image), title, size, cmap="gray")

    def signed(self, column: int, values: Array, title: str, *, size: float = 7) -> None:
        """Draw values that may be negative."""
        flat, style = _signed_values(values)
        self._draw(column, flat, title, size, **style)

    def _draw(self, column: int, image: Array, title: str, size: float, **style: Any) -> None:
        from matplotlib.patches import Rectangle

        start, end = self._columns[column]
        rows, columns = image.shape[:2]
        inches = min((end - start - _BETWEEN) / columns, self._height / rows)
        width, height = columns * inches, rows * inches
        left = (start + end - _BETWEEN - width) / 2
        low = (self._height - height) / 2
        extent = (left, left + width, low, low + height)
        self._axes.imshow(image, extent=extent, aspect="auto", interpolation="nearest", **style)
        frame = Rectangle(
            (left, low), width, height, fill=False, edgecolor="#bbbbbb", linewidth=0.6
        )
        self._axes.add_patch(frame)
        place = (left + width / 2, low + height + 0.03)
        self._axes.text(*place, title, ha="center", va="bottom", fontsize=size, **_PLAIN)


def _draw_random(figure: Any, place: Any, panel: ImagePanel, n: int) -> None:
    strip = _Strip(figure, place, [1.0] * 15)
    strip.text("random\nactivating\nexamples", fontsize=9.5)
    for number in range(n):
        title = f"{panel.random_activations[number]:.2f}"
        strip.image(1 + number, panel.random_examples[number], title)


def _draw_row(figure: Any, place: Any, panel: ImagePanel, row: _Row, *, with_heads: bool) -> None:
    feature = row.group
    strip = _Strip(figure, place, [1.9, 1.1, 1.1, *[1.0] * 10])
    shown = min(len(feature.examples), 10)
    suffix = "" if shown == feature.n_examples else f", {shown} shown"
    lines = [row.name, f"{feature.n_examples} {row.of}{suffix}", *_labels(feature)]
    for weight, part in (
        ("bold" if row.is_meaning else "normal", [lines[0], *[""] * len(lines[1:])]),
        ("normal", ["", *lines[1:]]),
    ):
        left = 0 if row.is_meaning or not panel.meanings else 0.13
        strip.text("\n".join(part), left, fontsize=8.5, weight=weight)
    strip.image(1, feature.average, "average" if with_heads else "", size=8)
    if feature.feature is not None:
        title = f"feature:\n{_product(panel, feature)}" if with_heads else ""
        strip.signed(2, feature.feature, title, size=8)
    for number in range(shown):
        name = "central " if number == 0 else ""
        title = f"{name}{feature.activations[number]:.2f}"
        strip.image(3 + number, feature.examples[number], title)


def _labels(group: FeaturePanel) -> list[str]:
    """What a meaning or a feature is about, in lines that fit next to the pictures."""
    if isinstance(group, MeaningPanel) and not group.label_counts:
        return [group.label] if group.label else []
    counts = list(group.label_counts.items())[:4]
    lines: list[str] = []
    for name, n in counts:
        words = f"{_fitting(class_name(name), _LABEL_POINTS - 30, 8.5)} ×{n}"
        joined = f"{lines[-1]}, {words}" if lines else words
        if lines and _points(joined, 8.5) <= _LABEL_POINTS:
            lines[-1] = joined
        else:
            lines.append(words)
    return lines


def _product(panel: ImagePanel, feature: FeaturePanel) -> str:
    if panel.input_weights is None or feature.feature is None:
        return "average ⊙ map"
    same = feature.feature.shape == feature.average.shape
    return "average ⊙ weights" if same else "patch ⊙ kernel"


def _points(text: str, size: float) -> float:
    """Width of a line of text at a font size."""
    from matplotlib.font_manager import FontProperties
    from matplotlib.textpath import text_to_path

    widths = text_to_path.get_text_width_height_descent(text, FontProperties(size=size), False)
    return float(widths[0])


def _fitting(text: str, most: float, size: float) -> str:
    """A line of text, shortened to at most `most` points in width."""
    if _points(text, size) <= most:
        return text
    kept = len(text) - 1
    while kept and _points(f"{text[:kept]}…", size) > most:
        kept -= 1
    return f"{text[:kept]}…"


def _channels_last(image: Array) -> Array:
    """(height, width) or (height, width, 3) from any layout of an image."""
    if image.ndim == 3 and image.shape[0] in (1, 3) and image.shape[2] not in (1, 3):
        image = np.moveaxis(image, 0, -1)
    if image.ndim == 3 and image.shape[-1] == 3:
        return image
    if image.ndim == 3:
        axis = -1 if image.shape[-1] == 1 else 0
        image = image.mean(axis=axis)
    return image


def _pixels(image: Array) -> Array:
    """An image as matplotlib draws it."""
    pixels = _channels_last(np.asarray(image))
    if pixels.ndim == 3 and pixels.dtype != np.uint8:
        low, high = float(pixels.min()), float(pixels.max())
        pixels = (pixels - low) / (high - low if high > low else 1)
    return pixels


def _image(axes: Any, image: Array) -> None:
    axes.imshow(_pixels(image), cmap="gray", interpolation="nearest")
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_color("#bbbbbb")
        spine.set_linewidth(0.6)


def _signed_image(axes: Any, values: Array) -> Any:
    flat, style = _signed_values(values)
    drawn = axes.imshow(flat, interpolation="nearest", **style)
    axes.set_xticks([])
    axes.set_yticks([])
    return drawn


def _signed_values(values: Array) -> tuple[Array, dict[str, Any]]:
    """Values as matplotlib draws them, and its options for colours around zero."""
    flat = np.asarray(values)
    if flat.ndim == 3:
        # Summed over channels, because each channel would need its own panel.
        flat = flat.sum(axis=0 if flat.shape[-1] not in (1, 3) or flat.shape[0] in (1, 3) else -1)
    limit = float(np.abs(flat).max()) or 1.0
    return flat, {"cmap": _SIGNED, "vmin": -limit, "vmax": limit}


def _signed(figure: Any, axes: Any, values: Array | None, title: str, absent: str) -> None:
    if values is None:
        _empty(axes, title, absent)
        return
    drawn = _signed_image(axes, values)
    bar = figure.colorbar(drawn, ax=axes, fraction=0.046, pad=0.03)
    bar.ax.tick_params(labelsize=6.5)
    bar.outline.set_linewidth(0.4)
    axes.set_title(title, fontsize=9.5)


def _empty(axes: Any, title: str, why: str) -> None:
    axes.text(0.5, 0.5, why, ha="center", va="center", color=_MUTED, fontsize=9)
    axes.set_title(title, fontsize=9.5)
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_color("#dddddd")


def _bare(axes: Any) -> None:
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
