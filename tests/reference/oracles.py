"""Every method a second time, in the plainest way, from its definition.

Python loops over single numbers in double precision; nothing here shares code with the
package, and nothing here is meant to be fast.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

NAN = float("nan")
Merge = tuple[list[int], list[int], float]


# --- distances, trees, cuts ----------------------------------------------------------------


def cosine_distance(a: Sequence[float], b: Sequence[float]) -> float:
    """1 - cos of the angle; 1 where a vector has no direction."""
    dot = math.fsum(float(x) * float(y) for x, y in zip(a, b, strict=True))
    length_a = math.sqrt(math.fsum(float(x) ** 2 for x in a))
    length_b = math.sqrt(math.fsum(float(y) ** 2 for y in b))
    if length_a == 0 or length_b == 0:
        return 1.0
    return min(max(1 - dot / length_a / length_b, 0.0), 2.0)


def cosine_distances(vectors: Any) -> np.ndarray:
    n = len(vectors)
    out = np.zeros((n, n))
    for i in range(n):
        for j in range(n):
            if i != j:
                out[i, j] = cosine_distance(vectors[i], vectors[j])
    return out


def linkage(distances: np.ndarray, method: str) -> list[Merge]:
    """Merges from the bottom up: always the two clusters that are nearest now."""
    clusters = [[i] for i in range(len(distances))]
    merges: list[Merge] = []
    while len(clusters) > 1:
        best = (math.inf, -1, -1)
        for a in range(len(clusters)):
            for b in range(a + 1, len(clusters)):
                pairs = [distances[i, j] for i in clusters[a] for j in clusters[b]]
                between = min(pairs) if method == "single" else math.fsum(pairs) / len(pairs)
                if between < best[0]:
                    best = (between, a, b)
        height, a, b = best
        merges.append((clusters[a], clusters[b], height))
        joined = clusters[a] + clusters[b]
        clusters = [c for at, c in enumerate(clusters) if at not in (a, b)] + [joined]
    return merges


def cut(merges: list[Merge], n: int, threshold: float) -> list[int]:
    """Labels after all merges below the threshold: by size, then by the first example."""
    groups = [{i} for i in range(n)]
    for left, right, height in merges:
        if height < threshold:
            parts = [g for g in groups if left[0] in g or right[0] in g]
            groups = [g for g in groups if g not in parts] + [set().union(*parts)]
    groups.sort(key=lambda group: (-len(group), min(group)))
    labels = [-1] * n
    for number, group in enumerate(groups):
        for i in group:
            labels[i] = number
    return labels


def cluster(vectors: Any, threshold: float, method: str) -> list[int]:
    return cut(linkage(cosine_distances(vectors), method), len(vectors), threshold)


# --- metrics -------------------------------------------------------------------------------


def metrics(vectors: Any, labels: Sequence[int]) -> dict[str, float]:
    """The metrics, over explicit pairs i < j."""
    within, across = [], []
    for i in range(len(vectors)):
        for j in range(i + 1, len(vectors)):
            pair = cosine_distance(vectors[i], vectors[j])
            (within if labels[i] == labels[j] else across).append(pair)

    def mean(values: list[float]) -> float:
        return math.fsum(values) / len(values) if values else NAN

    return {
        "max_distance": max([*within, *across], default=NAN),
        "mean_distance": mean([*within, *across]),
        "intra_cluster_distance": mean(within),
        "inter_cluster_distance": mean(across),
        "n_examples": len(vectors),
        "n_clusters": len(set(labels)),
    }


def participation_ratio(w: Sequence[float]) -> float:
    fourth = math.fsum(float(x) ** 4 for x in w)
    return math.fsum(float(x) ** 2 for x in w) ** 2 / fourth if fourth else NAN


def background_distance(background: Any, weights: Any) -> list[float]:
    return [
        metrics(
            [[h * v for h, v in zip(row, w, strict=True)] for row in background],
            [0] * len(background),
        )["mean_distance"]
        for w in weights
    ]


def medoids(vectors: Any, labels: Sequence[int]) -> list[int]:
    """Of each cluster the member with the least mean distance to the others."""
    out = []
    for number in sorted(set(labels)):
        members = [i for i, label in enumerate(labels) if label == number]
        sums = [
            round(math.fsum(cosine_distance(vectors[i], vectors[j]) for j in members if j != i), 9)
            for i in members
        ]
        out.append(members[sums.index(min(sums))])
    return out


def principal_coordinates(vectors: Any) -> tuple[np.ndarray, np.ndarray]:
    """The two leading principal components of unit rows, and how much each of all shows."""
    rows = np.asarray(vectors, float)
    unit = np.array([row / np.linalg.norm(row) if row.any() else row for row in rows])
    left, values, _ = np.linalg.svd(unit - unit.mean(axis=0), full_matrices=False)
    padded = np.zeros(max(len(values), 3))
    padded[: len(values)] = values**2
    plane = np.zeros((len(rows), 2))
    plane[:, : min(2, len(values))] = (left * values)[:, :2]
    return plane, padded


def feature_centre(vectors: Any) -> list[float]:
    """Direction of the mean of unit vectors."""
    d = len(vectors[0])
    total = [0.0] * d
    for vector in vectors:
        length = math.sqrt(math.fsum(float(x) ** 2 for x in vector))
        for k in range(d):
            total[k] += float(vector[k]) / length if length else 0.0
    length = math.sqrt(math.fsum(x**2 for x in total))
    return [x / length if length else 0.0 for x in total]


def assign(vectors: Any, centres: Any, threshold: float) -> list[int]:
    out = []
    for vector in vectors:
        distances = [cosine_distance(vector, centre) for centre in centres]
        near = bool(distances) and min(distances) < threshold
        out.append(distances.index(min(distances)) if near else -1)
    return out


def finite_differences(
    function: Callable[[np.ndarray], float], x: np.ndarray, step: float = 1e-5
) -> np.ndarray:
    """Gradient by central differences."""
    out = np.zeros_like(x, dtype=np.float64)
    for k in range(len(x)):
        up, down = x.astype(np.float64), x.astype(np.float64)
        up[k] += step
        down[k] -= step
        out[k] = (function(up) - function(down)) / (2 * step)
    return out


# --- selectors: the activations of one neuron, all of them, at once ------------------------


def priority(index: int, seed: int) -> int:
    """Pseudo-random order of an input, in whole numbers without a size."""
    size = 1 << 64
    x = (index * 0x9E3779B97F4A7C15 + seed * 0xD1342543DE82EF95 + 1) % size
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) % size
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) % size
    return (x ^ (x >> 31)) % (1 << 63)


def _strongest(values: Sequence[float], chosen: Sequence[int]) -> list[int]:
    return sorted(chosen, key=lambda i: (-values[i], i))


def top_k(values: Sequence[float], k: int) -> list[int]:
    return _strongest(values, [i for i, v in enumerate(values) if v > 0])[:k]


def above_fraction(values: Sequence[float], fraction: float, max_examples: int) -> list[int]:
    # The threshold is rounded as an activation is: to single precision.
    least = np.float32(fraction) * np.float32(max(values, default=0))
    return [i for i in top_k(values, len(values)) if np.float32(values[i]) >= least][:max_examples]


def first_active(values: Sequence[float], n: int, minimum: float) -> list[int]:
    least = np.float32(minimum)
    return [i for i, v in enumerate(values) if v > 0 and np.float32(v) >= least][:n]


def random_active(values: Sequence[float], k: int, seed: int, neuron: int) -> list[int]:
    active = [i for i, v in enumerate(values) if v > 0]
    return sorted(sorted(active, key=lambda i: priority(i * 2**24 + neuron, seed))[:k])


def band(value: float, maximum: float, bins: int) -> int:
    """Band of equal width in (0, maximum] that holds a value."""
    return min(max(math.ceil(value / maximum * bins), 1), bins) - 1


def quotas(k: int, bins: int) -> list[int]:
    """Examples of each band: k / bins, the upper bands one more where that leaves a rest."""
    return [k // bins + (1 if number >= bins - k % bins else 0) for number in range(bins)]


def stratified(values: Sequence[float], k: int, bins: int, seed: int) -> list[int]:
    """Samples of the cells of a fine grid; of these, samples of the bands."""
    active = [i for i, v in enumerate(values) if v > 0]
    if not active:
        return []
    maximum = max(values[i] for i in active)
    upper = 1.0
    while upper <= maximum:
        upper *= 2
    while upper > 2 * maximum or upper / 2 > maximum:
        upper /= 2
    n_cells = 1
    while n_cells < 8 * bins:
        n_cells *= 2
    per_cell = math.ceil(k / bins)
    order = sorted(active, key=lambda i: priority(i, seed))
    in_cell: dict[int, int] = {}
    sampled = []
    for i in order:
        cell = math.floor(values[i] / upper * n_cells)
        in_cell[cell] = in_cell.get(cell, 0) + 1
        if in_cell[cell] <= per_cell:
            sampled.append(i)
    left = quotas(k, bins)
    chosen = []
    for i in sampled:
        number = band(values[i], maximum, bins)
        if left[number] > 0:
            left[number] -= 1
            chosen.append(i)
    return _strongest(values, chosen)


def statistics(values: Sequence[float], n_bins: int = 64) -> dict[str, Any]:
    """Density, maximum, mean and histogram of one neuron."""
    positive = [float(v) for v in values if v > 0]
    maximum = max(positive, default=0.0)
    upper = 0.0
    histogram = [0] * n_bins
    if positive:
        upper = 2.0 ** (math.floor(math.log2(maximum)) + 1)
        for v in positive:
            histogram[math.floor(v / upper * n_bins)] += 1
    return {
        "density": len(positive) / len(values),
        "max_activation": maximum,
        "mean_activation": math.fsum(positive) / len(values),
        "histogram": histogram,
        "histogram_upper": upper,
    }


# --- convolutions --------------------------------------------------------------------------


def _padded_value(image: np.ndarray, channel: int, y: int, x: int, mode: str) -> float:
    height, width = image.shape[1:]
    if 0 <= y < height and 0 <= x < width:
        return float(image[channel, y, x])
    if mode == "zeros":
        return 0.0

    def inside(at: int, n: int) -> int:
        if mode == "circular":
            return at % n
        if mode == "replicate":
            return min(max(at, 0), n - 1)
        return -at if at < 0 else (2 * (n - 1) - at if at >= n else at)

    return float(image[channel, inside(y, height), inside(x, width)])


def conv_patch(
    image: np.ndarray,
    neuron: int,
    position: int,
    *,
    out_channels: int,
    kernel: tuple[int, int],
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int] | str = (0, 0),
    dilation: tuple[int, int] = (1, 1),
    groups: int = 1,
    mode: str = "zeros",
) -> list[float]:
    """What a channel reads at a position of its map: channel, row, column."""
    extent = [gap * (size - 1) for gap, size in zip(dilation, kernel, strict=True)]
    if padding == "same":
        before = [total // 2 for total in extent]
        after = [total - total // 2 for total in extent]
    elif padding == "valid":
        before = after = [0, 0]
    else:
        before = after = [int(p) for p in padding]
    across = (image.shape[2] + before[1] + after[1] - extent[1] - 1) // stride[1] + 1
    top = position // across * stride[0] - before[0]
    left = position % across * stride[1] - before[1]
    per_group = image.shape[0] // groups
    group = neuron // (out_channels // groups)
    return [
        _padded_value(image, channel, top + y * dilation[0], left + x * dilation[1], mode)
        for channel in range(group * per_group, (group + 1) * per_group)
        for y in range(kernel[0])
        for x in range(kernel[1])
    ]


# --- attribution ---------------------------------------------------------------------------


def activation_map(
    drive: Callable[[np.ndarray], Sequence[float]],
    baseline: np.ndarray,
    cells: np.ndarray,
    low: np.ndarray,
    high: np.ndarray,
    levels: int,
) -> np.ndarray:
    """Move the pixels of one cell at a time; the largest change of each neuron's drive.

    ``drive`` gives the drives of all neurons for one input. Shape (n_neurons, *baseline).
    """
    start = [float(v) for v in drive(baseline)]
    out = np.zeros((len(start), *baseline.shape))
    for cell in range(int(cells.max()) + 1):
        best = [0.0] * len(start)
        for level in range(levels):
            moved = baseline.copy()
            for at in zip(*np.nonzero(cells == cell), strict=True):
                moved[at] = low[at] + (high[at] - low[at]) * level / (levels - 1)
            for j, value in enumerate(drive(moved)):
                change = float(value) - start[j]
                if abs(change) > abs(best[j]):
                    best[j] = change
        for j in range(len(start)):
            out[j][cells == cell] = best[j]
    return out


def mean_effects(
    effect: Callable[[int, int], Sequence[float]],
    neuron: Sequence[int],
    example: Sequence[int],
    n_neurons: int,
    n_classes: int,
) -> np.ndarray:
    """Mean over a neuron's examples of the effect of (neuron, example); NaN for none."""
    out = np.full((n_neurons, n_classes), NAN)
    for j in range(n_neurons):
        own = [effect(j, i) for k, i in zip(neuron, example, strict=True) if k == j]
        for c in range(n_classes):
            if own:
                out[j, c] = math.fsum(float(row[c]) for row in own) / len(own)
    return out
