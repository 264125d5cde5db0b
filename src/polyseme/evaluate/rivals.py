"""Methods of grouping a neuron's examples, and how well each recovers known groups."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from collections.abc import Set as AbstractSet
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from polyseme.core import Clustering, Meanings, cluster
from polyseme.core.distances import unit_rows
from polyseme.core.meaning import group
from polyseme.core.metrics import rand_index
from polyseme.core.space import Space
from polyseme.errors import MissingDependencyError
from polyseme.evaluate.planted import LEAST, Planted, Positions, number_of
from polyseme.evaluate.text_positions import TextAround
from polyseme.views.meanings import Described, NeuronMeanings

Floats = NDArray[np.floating[Any]]
Ints = NDArray[np.int64]

OURS = "ours"
#: Of a grouping: agreement with the truth, and error of the number of meanings. Of a representation
#: alone: of its tree, for any cut, and of its pairwise cosines.
MEASURES = ("ari", "ami", "error", "purity", "best_cut", "auroc")
_MOST = 8


def judge(
    positions: Positions,
    neurons: list[Planted],
    *,
    windows: Callable[[Ints], Floats] | None = None,
    n_windows: int = 0,
    texts: TextAround | None = None,
    words: Sequence[AbstractSet[str]] = (),
    advance: Callable[[], object] = lambda: None,
) -> Iterator[dict[str, Any]]:
    """Compute every method's measures on every neuron of a site.

    Parameters
    ----------
    positions : Positions
    neurons : list of Planted
    windows : callable, optional
        Maps positions to vectors of the text around them.
    n_windows : int
        Number of neurons for which to use these, as they are slow.
    texts : TextAround, optional
        Source of our method's labels of meanings.
    words : sequence of sets of str
        Words of each meaning, as numbered by the truth.
    advance : callable
        Called after each neuron.

    Yields
    ------
    dict
        ``neuron``, ``method``, ``wanted`` and ``found`` meanings, the `MEASURES`, NaN if undefined;
        ``score``, higher the more the examples fall apart, for methods that have one. For our
        method also ``verdict``, and ``named`` out of ``recovered`` meanings: recovered meanings are
        the majority of a group that holds at least half of their examples, and named ones have one
        of their words in the group's label.
    """
    space = Space.of(positions.mean, positions.covariance)
    gradients = [neuron.gradient for neuron in neurons]
    drives = space.directions(np.array([g if g.ndim == 1 else g.mean(axis=0) for g in gradients]))
    for number, (neuron, drive) in enumerate(zip(neurons, drives, strict=True)):
        h = positions.rows(neuron.shown)
        units = {
            "h ⊙ w": unit_rows(h * neuron.gradient),
            "h": unit_rows(h),
            "whitened h": space.inputs(h),
        }
        if windows is not None and number < n_windows:
            units["text"] = unit_rows(windows(neuron.shown))
        for name, rows in units.items():
            tree = cluster(rows, 0.05)
            known = _of_representation(rows, tree, neuron.truth)
            for method, labels, score in _groupings(name, rows, tree):
                judged = _of_grouping(labels, neuron.truth)
                yield {"neuron": number, "method": method, **judged, **known, "score": score}
            if name == "whitened h":
                ours = group(np.asarray(rows @ rows.T, np.float32), rows @ drive)
                row = {"neuron": number, "method": OURS, **_of_grouping(ours.labels, neuron.truth)}
                row |= {**known, "score": ours.separation, "verdict": ours.verdict}
                if texts is not None and words:
                    row |= _of_labels(ours, neuron, texts, words)
                yield row
        advance()


def _groupings(name: str, rows: Floats, tree: Clustering) -> Iterator[tuple[str, Ints, float]]:
    """Groupings from one representation: the method's name, labels, and score or NaN."""
    cosines = np.asarray(rows @ rows.T, np.float64)
    if name in ("h ⊙ w", "h"):
        for cut in (0.05, 0.2, 0.5) if name == "h ⊙ w" else (0.5,):
            yield f"{name}, cut at {cut:g}", tree.cut(cut).labels, 1 - float(cosines.mean())
    if name != "h":
        yield f"{name}, silhouette", _silhouette(cosines, tree), np.nan
    if name in ("h ⊙ w", "whitened h"):
        yield f"{name}, HDBSCAN", _hdbscan(cosines), np.nan
    if name in ("whitened h", "text"):
        for k in (2, 5):
            labels = _k_means(rows, k)
            yield f"{name}, {k}-means", labels, _apart(rows, labels) if k == 2 else np.nan


def _k_means(rows: Floats, k: int) -> Ints:
    means = _sklearn("cluster").KMeans(min(k, len(rows)), n_init=4, random_state=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about equal examples
        return np.asarray(means.fit_predict(rows), np.int64)


def _apart(rows: Floats, labels: Ints) -> float:
    """Cosine distance between the centres of two groups: SemanticLens's score."""
    if labels.min() == labels.max():
        return 0.0
    a, b = unit_rows(np.stack([rows[labels == side].mean(axis=0) for side in (0, 1)]))
    return float(1 - a @ b)


def _hdbscan(cosines: Floats) -> Ints:
    """HDBSCAN; an example labelled as noise joins the most similar group."""
    distances = np.clip(1 - cosines, 0, 2)
    np.fill_diagonal(distances, 0)
    model = _sklearn("cluster").HDBSCAN(min_cluster_size=LEAST, metric="precomputed", copy=True)
    labels = np.asarray(model.fit_predict(distances), np.int64)
    if (labels < 0).all():
        return np.zeros(len(labels), np.int64)
    member = np.eye(labels.max() + 1)[labels] * (labels >= 0)[:, None]
    nearest = (cosines @ (member / member.sum(axis=0))).argmax(axis=1)
    return np.where(labels < 0, nearest, labels)


def _silhouette(cosines: Floats, tree: Clustering) -> Ints:
    """The cut of the tree into 2 to 8 groups with the highest mean silhouette."""
    distances = np.clip(1 - cosines, 0, 2)
    np.fill_diagonal(distances, 0)
    score = _sklearn("metrics").silhouette_score
    cuts = [labels for labels in _cuts(tree.tree) if 1 < labels.max() + 1 <= _MOST]
    cuts = [labels for labels in cuts if labels.max() + 1 < len(labels)]
    if not cuts:
        return np.zeros(len(distances), np.int64)
    return max(cuts, key=lambda labels: float(score(distances, labels, metric="precomputed")))


def _cuts(tree: NDArray[np.float64]) -> Iterator[Ints]:
    """Labels of every cut of a tree, from all examples separate to all together."""
    n = len(tree) + 1
    node = np.arange(n)
    yield node.copy()
    for merge, (a, b) in enumerate(tree[:, :2].astype(np.int64)):
        node[(node == a) | (node == b)] = n + merge
        yield np.unique(node, return_inverse=True)[1]


def _of_grouping(labels: Ints, truth: Ints) -> dict[str, float]:
    """Agreement of labels with the truth, where known, and with its number."""
    known = truth >= 0
    wanted, number = number_of(truth), number_of(labels[known])
    ami = _sklearn("metrics").adjusted_mutual_info_score(truth[known], labels[known])
    return {
        "wanted": wanted,
        "found": number,
        "ari": rand_index(truth[known], labels[known]),
        "ami": float(ami),
        "error": float(abs(number - wanted)),
    }


def _of_labels(
    ours: Meanings, neuron: Planted, texts: TextAround, words: Sequence[AbstractSet[str]]
) -> dict[str, int]:
    """Number of meanings recovered, and of these, the number named by their labels."""
    n = len(ours.labels)
    examples = pd.DataFrame({"activation": np.zeros(n), "feature": np.zeros(n, np.int64)})
    windows = texts.windows(neuron.shown)
    about = Described(examples, windows, texts.shares, ours.cosines, spaced=texts.spaced)
    described = NeuronMeanings(about, ours)
    recovered = named = 0
    for meaning in described:
        inside = neuron.truth[ours.labels == meaning.number]
        classes, counts = np.unique(inside[inside >= 0], return_counts=True)
        if not len(classes) or 2 * counts.max() <= len(inside):
            continue
        most = int(classes[counts.argmax()])
        if 2 * counts.max() >= (neuron.truth == most).sum():
            recovered += 1
            named += not words[most].isdisjoint(re.findall(r"\w+", meaning.label.lower()))
    return {"recovered": recovered, "named": named}


def _of_representation(rows: Floats, tree: Clustering, truth: Ints) -> dict[str, float]:
    """How well a representation separates meanings, whatever the grouping; NaN for one meaning."""
    known = truth >= 0
    if len(np.unique(truth[known])) < 2:
        return dict.fromkeys(MEASURES[3:], np.nan)
    i, j = np.triu_indices(int(known.sum()), 1)
    same = truth[known][i] == truth[known][j]
    cosines = (rows[known] @ rows[known].T)[i, j]
    auroc = _sklearn("metrics").roc_auc_score(same, cosines) if same.any() else np.nan
    return {
        "purity": dendrogram_purity(tree.tree, truth),
        "best_cut": max(rand_index(truth[known], cut[known]) for cut in _cuts(tree.tree)),
        "auroc": float(auroc),
    }


def dendrogram_purity(tree: NDArray[np.float64], truth: Ints) -> float:
    """Mean, over pairs within a meaning, of the meaning's share of their smallest common subtree.

    K. Heller and Z. Ghahramani, *Bayesian hierarchical clustering* (2005). Examples with unknown
    meaning (-1) do not count.
    """
    n, classes = len(truth), truth.max(initial=-1) + 1
    counts = np.zeros((2 * n - 1, classes))
    counts[np.flatnonzero(truth >= 0), truth[truth >= 0]] = 1
    pairs = purity = 0.0
    for merge, (a, b) in enumerate(tree[:, :2].astype(np.int64)):
        both = counts[n + merge] = counts[a] + counts[b]
        joined = counts[a] * counts[b]
        pairs += joined.sum()
        purity += (joined * both).sum() / max(1.0, both.sum())
    return float(purity / pairs) if pairs else np.nan


def _sklearn(name: str) -> Any:
    try:
        if name == "cluster":
            import sklearn.cluster as module
        else:
            import sklearn.metrics as module
    except ModuleNotFoundError as error:
        raise MissingDependencyError(
            "The benchmark of meanings", "scikit-learn", "benchmark"
        ) from error
    return module
