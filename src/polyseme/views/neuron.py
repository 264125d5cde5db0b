"""One neuron of a run, and its features."""

from __future__ import annotations

import dataclasses
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from polyseme.core import (
    Clustering,
    Polysemanticity,
    assign,
    feature_centres,
    medoids,
    polysemanticity,
)
from polyseme.core.arrays import to_numpy
from polyseme.core.neurons import STORED
from polyseme.core.similar import MIN_EXAMPLES
from polyseme.errors import InputError
from polyseme.store import SiteInfo
from polyseme.views.features import Feature, Features, counted
from polyseme.views.figure import draw_panel, save_figure
from polyseme.views.meanings import Described, Meaning, NeuronMeanings, StoredMeanings
from polyseme.views.neighbours import compared, stored_similar
from polyseme.views.neuron_rows import Tables, neurons_of
from polyseme.views.notebook import HtmlRow, neuron_html
from polyseme.views.panel import ImagePanel, image_panel
from polyseme.views.token_windows import TextWindow, top_tokens, windows_of

Floats = NDArray[np.floating[Any]]

_IN_NOTEBOOK = 10


class Neuron:
    """One neuron of a run, at one threshold. Created by `Run.neuron`.

    Parameters
    ----------
    tables : Tables
    info : SiteInfo
    number : int
    clustering : Clustering, optional
        A cut of its tree other than the run's own.
    """

    def __init__(
        self, tables: Tables, info: SiteInfo, number: int, clustering: Clustering | None = None
    ) -> None:
        self._tables = tables
        self._folder = tables.folder
        self.info = info
        self.number = number
        self._cut = clustering

    @property
    def site(self) -> str:
        """Name of its site."""
        return self.info.name

    @cached_property
    def row(self) -> pd.Series:
        """Its row of `Run.neurons`."""
        return self._folder.neurons.iloc[self._folder.first_neuron(self.info.number) + self.number]

    @cached_property
    def _stored(self) -> pd.DataFrame:
        return self._tables.of_neuron("examples", self.info, self.number)

    @cached_property
    def examples(self) -> pd.DataFrame:
        """Its examples, in the order of the selection.

        Returns
        -------
        pandas.DataFrame
            ``example``, ``input`` (index in the data), ``position`` (in the input),
            ``activation``, ``feature`` at the current threshold, ``meaning``, and ``label`` if
            known.
        """
        frame = self._stored[["example", "input", "position", "activation"]].copy()
        frame["feature"] = self.clustering.labels
        if "meaning" in self._stored:
            frame["meaning"] = self._stored["meaning"]
        return self._with_labels(frame)

    @cached_property
    def random_examples(self) -> pd.DataFrame:
        """A seeded random sample of the inputs that activate it, weakly or strongly."""
        frame = self._tables.of_neuron("random", self.info, self.number)
        return self._with_labels(frame[["input", "position", "activation"]].copy())

    def _with_labels(self, frame: pd.DataFrame) -> pd.DataFrame:
        if "labels" in self._folder.inputs:
            labels = self._folder.inputs.take("labels", self._input_rows(frame["input"]))
            names = self._folder.metadata["data"].get("class_names") or []
            usable = len(names) > int(labels.max(initial=-1)) and int(labels.min(initial=0)) >= 0
            frame["label"] = [names[i] for i in labels] if usable else labels
        return frame

    def _input_rows(self, inputs: pd.Series) -> NDArray[np.int64]:
        index, wanted = np.asarray(self._folder.inputs["index"]), inputs.to_numpy(np.int64)
        if not (held := np.isin(wanted, index)).all():
            raise InputError(
                f"The run does not have input {wanted[np.argmin(held)]}: it stores only the "
                f"{len(index)} inputs that are examples of a neuron. Give rows of the neuron's "
                "examples."
            )
        return np.asarray(np.searchsorted(index, wanted), dtype=np.int64)

    def _chosen(self, examples: Any) -> pd.DataFrame:
        """Rows of `examples`, given as rows or as numbers; None stands for all."""
        if examples is None:
            return self.examples
        if isinstance(examples, pd.DataFrame) and "input" in examples:
            return examples
        numbers = np.asarray(examples)
        other = getattr(examples, "name", "example") != "example" or numbers.ndim != 1
        if other or (numbers.size and numbers.dtype.kind not in "iu"):
            raise InputError(
                f"examples is a {type(examples).__name__}; expected rows of the neuron's examples, "
                "such as neuron.examples[:5], or their numbers, such as [0, 1]."
            )
        n = self.metrics.n_examples
        if numbers.size and not 0 <= numbers.min() <= numbers.max() < n:
            raise InputError(
                f"examples is {examples!r}; the neuron has {n} examples, numbered from 0."
            )
        return self.examples.iloc[numbers.astype(int)]

    def texts(
        self,
        examples: Any = None,
        *,
        before: int | None = None,
        after: int | None = None,
    ) -> list[TextWindow]:
        """The text around examples, with the neuron's activation at each token.

        Parameters
        ----------
        examples : pandas.DataFrame or array of int, optional
            Rows of `examples`, or their numbers; by default all.
        before, after : int, optional
            Number of tokens on each side; by default those of the run's window. More context
            can be shown, but activations are known only within that window.

        Raises
        ------
        InputError
            The run is on images.
        """
        chosen = self._chosen(examples)
        return windows_of(self._folder, self.info, self.number, chosen, before, after)

    def tokens(self) -> dict[str, pd.DataFrame]:
        """Tokens whose logits it raises and lowers most: ``token`` and ``logit``."""
        return top_tokens(self._folder, self.info, self.number)

    def inputs(self, examples: Any = None) -> NDArray[Any]:
        """The inputs of examples, as stored: shape (n, *shape of one input).

        Parameters
        ----------
        examples : pandas.DataFrame or array of int, optional
            Rows of `examples` or of `random_examples`, or numbers of examples; by default all
            examples.
        """
        self._refuse_texts()
        rows = self._input_rows(self._chosen(examples)["input"])
        return self._folder.inputs.take("pixels", rows)

    def _refuse_texts(self) -> None:
        if "pixels" not in self._folder.inputs:
            raise InputError("The run is on texts, not images; show its examples with texts().")

    @cached_property
    def weights(self) -> Floats:
        """Its input weights, shape (d_in,)."""
        return np.asarray(self._of_site("weights")[0])

    @cached_property
    def vectors(self) -> Floats:
        """Pre-neuron embeddings of its examples, shape (n_examples, d_in)."""
        arrays = self._folder.site(self.info.number)
        return arrays.take("vectors", self._stored["vector"]).astype(np.float32)

    def _of_site(self, array: str) -> NDArray[Any]:
        """The neuron's own rows of an array of its site."""
        return self._folder.site_rows(self.info.number, array, self.number, self.number + 1)

    @property
    def embeddings(self) -> Floats:
        """Neuron embeddings of its examples, shape (n_examples, d_in)."""
        return self._embed(self.vectors)

    def _embed(self, rows: Floats) -> Floats:
        arrays = {name: self._of_site(name) for name in STORED if self._has(name)}
        return neurons_of(self.info, arrays).embed(np.asarray(rows), np.zeros(len(rows), np.int64))

    def _has(self, array: str) -> bool:
        return array in self._folder.site(self.info.number)

    @cached_property
    def clustering(self) -> Clustering:
        """Its tree and the current cut."""
        if self._cut is not None:
            return self._cut
        return Clustering(
            labels=self._stored["feature"].to_numpy(np.int64),
            tree=self._tables.tree(self.info, self.number),
            threshold=float(self.info.extra["threshold"]),
            linkage=str(self._folder.metadata["settings"]["linkage"]),
        )

    @property
    def threshold(self) -> float:
        """Cosine distance at which the tree is cut."""
        return self.clustering.threshold

    @cached_property
    def centres(self) -> Floats:
        """Centre of each feature, shape (n_features, d_in); see `Feature.centre`."""
        return feature_centres(self.embeddings, self.clustering.labels)

    @cached_property
    def features(self) -> Features:
        """Its features at the current threshold, largest first."""
        labels = self.clustering.labels
        if not len(labels):
            return Features()
        centres, central = self.centres, medoids(self.embeddings, labels)
        return Features(
            Feature(
                number=k,
                examples=self.examples[labels == k].reset_index(drop=True),
                medoid=int(central[k]),
                centre=centres[k],
            )
            for k in range(len(centres))
        )

    @cached_property
    def meanings(self) -> NeuronMeanings:
        """Its meanings: the groups that its examples fall into, largest first.

        They do not depend on the threshold of the features; see `polyseme.meanings`.

        Raises
        ------
        InputError
            The run has no meanings.
        """
        groups = self._meanings.groups
        is_text = "tokens" in self._folder.inputs
        described = Described(
            self.examples,
            self.texts() if is_text else None,
            self._tables.word_shares if is_text else {},
            groups.cosines,
            spaced=is_text and self._tables.are_spaced,
        )
        return NeuronMeanings(described, groups)

    @cached_property
    def _told_meanings(self) -> NeuronMeanings | None:
        """Its meanings, or None if unreadable: cards show what is left of a damaged run."""
        try:
            with np.errstate(all="ignore"):
                return self.meanings
        except (ArithmeticError, IndexError, KeyError, ValueError):
            return None

    def _parts(self, meaning: Meaning) -> list[Feature]:
        """The part of each feature that is in a meaning, largest first, with its own medoid."""
        parts = []
        for number in meaning.features:
            feature = self.features[number]
            inside = feature.examples["example"].isin(meaning.examples["example"])
            examples = feature.examples[inside].reset_index(drop=True)
            rows = examples["example"].to_numpy()
            medoid = int(rows[medoids(self.embeddings[rows], np.zeros(len(rows), np.int64))[0]])
            parts.append(dataclasses.replace(feature, examples=examples, medoid=medoid))
        return parts

    @cached_property
    def _meanings(self) -> StoredMeanings:
        return StoredMeanings(self._folder, self.info, self.number, self._stored, self.vectors)

    def assign_meaning(self, h: Any) -> NDArray[np.int64]:
        """Assign new pre-neuron embeddings to meanings.

        Parameters
        ----------
        h : array or tensor, shape (n, d_in)
            Pre-neuron embeddings: the input of the site, not of the model.

        Returns
        -------
        ndarray of int64, shape (n,)
            Number of the meaning whose examples are most similar to each row, by mean cosine;
            -1 if the row is less similar to them than each of them is to the others.
        """
        return self._meanings.assign(self._checked_rows(h))

    def meaning_cosines(self, h: Any) -> NDArray[np.float64]:
        """How close new pre-neuron embeddings are to each meaning.

        Parameters
        ----------
        h : array or tensor, shape (n, d_in)
            As for `assign_meaning`.

        Returns
        -------
        ndarray of float64, shape (n, n_meanings)
            Mean cosine with the meaning's examples, in the space in which meanings are found.
        """
        return self._meanings.cosines(self._checked_rows(h))

    @cached_property
    def metrics(self) -> Polysemanticity:
        """Metrics of polysemanticity at the current threshold."""
        if self._cut is not None:
            return polysemanticity(self.embeddings, self.clustering.labels)
        return Polysemanticity(
            max_distance=float(self.row["max_distance"]),
            mean_distance=float(self.row["mean_distance"]),
            intra_cluster_distance=float(self.row["intra_cluster_distance"]),
            inter_cluster_distance=float(self.row["inter_cluster_distance"]),
            n_examples=int(self.row["n_examples"]),
            n_clusters=int(self.row["n_clusters"]),
        )

    def recut(self, threshold: float) -> Neuron:
        """The neuron with its tree cut at another cosine distance in (0, 2]."""
        return Neuron(self._tables, self.info, self.number, self.clustering.cut(threshold))

    def assign(self, h: Any) -> NDArray[np.int64]:
        """Assign new pre-neuron embeddings to features.

        A row belongs to the feature whose centre is nearest to its neuron embedding, if it is
        closer than the threshold; see `polyseme.core.assign`.

        Parameters
        ----------
        h : array or tensor, shape (n, d_in)
            Pre-neuron embeddings: the input of the site, not of the model.

        Returns
        -------
        ndarray of int64, shape (n,)
            Feature numbers; -1 if no feature is close.
        """
        rows = self._checked_rows(h)
        if not len(self.clustering.labels):
            return np.full(len(rows), -1, dtype=np.int64)
        return assign(self._embed(rows), self.centres, self.threshold)

    def _checked_rows(self, h: Any) -> NDArray[Any]:
        rows = to_numpy(h)
        if rows.ndim != 2 or rows.shape[1] != self.info.d_in:
            raise InputError(
                f"h has shape {rows.shape}; expected (n, {self.info.d_in}): the input of site "
                f"{self.site!r}, one row per input."
            )
        return rows

    def similar(self, k: int = 5) -> pd.DataFrame:
        """The features of other neurons most similar to this neuron's.

        Features are compared by the cosine similarity of their medoids, with the features of all
        sites of the run that read vectors of the same length, cut at the run's own threshold.
        Features with fewer than 5 examples are left out on both sides.

        A run stores the 5 features most similar to each of its features. In a large run these
        come from a search that may miss some of the less similar ones (see
        `polyseme.core.similar`). For a larger `k` or another threshold, all features are
        compared, which takes a while in a large run.

        Parameters
        ----------
        k : int
            Most rows per feature of this neuron.

        Returns
        -------
        pandas.DataFrame
            ``feature`` (of this neuron), ``site``, ``neuron``, ``other_feature``,
            ``similarity``, most similar first.
        """
        if isinstance(k, bool) or not isinstance(k, int | np.integer) or k < 1:
            raise InputError(f"k is {k!r}; a whole number of at least 1 is expected.")
        if self._cut is None:
            stored = stored_similar(self._folder, self.info, self.number, int(k))
            if stored is not None:
                return stored
        mine = {f.number: f.medoid for f in self.features if f.n_examples >= MIN_EXAMPLES}
        vectors = self._embed(self.vectors[list(mine.values())])
        return compared(self._tables, self.info, self.number, list(mine), vectors, int(k))

    def panel(self, *, n_shown: int = 10) -> ImagePanel:
        """Everything that is shown of an image model's neuron, as arrays.

        Parameters
        ----------
        n_shown : int
            Most examples per feature: the medoid, then the nearest to it.
        """
        return image_panel(self, n_shown)

    def figure(self, path: str | Path | None = None) -> Any:
        """The image panel as a matplotlib figure.

        Parameters
        ----------
        path : str or Path, optional
            Also save the figure here; the suffix sets the format.

        Returns
        -------
        matplotlib.figure.Figure
        """
        figure = draw_panel(self.panel())
        if path is not None:
            save_figure(figure, path)
        return figure

    def __repr__(self) -> str:
        m = self.metrics
        return (
            f"Neuron({self.site!r}, {self.number}: {m.n_examples} examples, "
            f"{self._number_of_meanings}{m.n_clusters} features at {self.threshold:g}, "
            f"mean distance {m.mean_distance:.3f})"
        )

    @property
    def _number_of_meanings(self) -> str:
        n = int(self.row.get("n_meanings", 0))
        return f"{n} meaning{'s' * (n > 1)}, " if n else ""

    def _repr_html_(self) -> str:
        meanings = self._told_meanings
        heading = f"{self.site} / {self.number}"
        if not meanings:
            rows = [self._html_row(feature) for feature in self.features[:_IN_NOTEBOOK]]
            n_more = len(self.features) - len(rows)
            more = f"and {n_more} smaller features" if n_more else ""
            return neuron_html(heading, repr(self), rows, more)
        shown = meanings[:_IN_NOTEBOOK]
        rows = []
        for meaning in shown:
            parts = self._parts(meaning)[: max(1, _IN_NOTEBOOK // len(shown))]
            rows += [self._html_row(meaning), *map(self._html_row, parts)]
        about = f"{self!r}; verdict on the meanings: {meanings.verdict}"
        more = "Below each meaning are the features with the most examples in it."
        if n_more := len(meanings) - len(shown):
            more += f" {n_more} more meanings are not shown."
        return neuron_html(heading, about, rows, more)

    def _html_row(self, group: Feature | Meaning) -> HtmlRow:
        is_meaning = isinstance(group, Meaning)
        return HtmlRow(
            name=f"{'meaning' if is_meaning else 'feature'} {group.number}",
            n_examples=group.n_examples,
            mean_activation=group.mean_activation,
            about=group.label if isinstance(group, Meaning) else counted(group.label_counts()),
            examples=self._some_of(group),
            bold=is_meaning,
        )

    def _some_of(self, group: Feature | Meaning) -> list[Any]:
        """Texts or images of a feature or a meaning: the medoid, then the strongest."""
        order = group.examples.sort_values("activation", ascending=False, kind="stable")
        central = order["example"] == group.medoid
        chosen = pd.concat([order[central], order[~central]])
        if "tokens" in self._folder.inputs:
            return list(self.texts(chosen.head(2)))
        shape = self._folder.metadata["data"].get("image_shape")
        if not shape or len(shape) not in (2, 3):
            return []
        return [image.reshape(shape) for image in self.inputs(chosen.head(6))]
