"""The panel of an image model's neuron, as arrays."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from polyseme.core import Polysemanticity
from polyseme.core.distances import unit_rows
from polyseme.errors import InputError
from polyseme.views.features import Feature, label_counts
from polyseme.views.meanings import Meaning

Array = NDArray[Any]

_STATISTICS = ("density", "max_activation", "mean_activation", "participation_ratio")


@dataclass(frozen=True)
class Scale:
    """Converts stored pixels to model inputs, and to images to show.

    Attributes
    ----------
    shape : tuple of int
        (height, width), (channels, height, width) or (height, width, channels).
    mean, std : float or list of float
        Model input = (pixel / 255 - mean) / std for uint8; floats are inputs already.
    """

    shape: tuple[int, ...]
    mean: Any = 0.0
    std: Any = 1.0

    def to_input(self, stored: Array) -> NDArray[np.float32]:
        """Inputs in the model's units, shape (n, *shape)."""
        images = stored.reshape(len(stored), *self.shape)
        if images.dtype != np.uint8:
            return images.astype(np.float32)
        mean, std = (self._per_channel(value) for value in (self.mean, self.std))
        return np.asarray((images / np.float32(255) - mean) / std, dtype=np.float32)

    def _per_channel(self, value: Any) -> NDArray[np.float32]:
        array = np.asarray(value, dtype=np.float32)
        return array.reshape(-1, *(1,) * (len(self.shape) - 1)) if array.ndim else array

    def to_show(self, stored: Array) -> Array:
        """Images as stored, shape (n, *shape)."""
        return np.asarray(stored.reshape(len(stored), *self.shape))


@dataclass(frozen=True)
class FeaturePanel:
    """One feature cluster of a panel.

    Attributes
    ----------
    number, n_examples : int
        Number of the feature, 0 is the largest; number of its examples.
    examples : ndarray, shape (n_shown, *image)
        The medoid, then the examples nearest to it, as stored.
    activations : ndarray of float, shape (n_shown,)
    average : ndarray of float32, shape of an image
        Mean of all of the feature's inputs, in the model's units.
    feature : ndarray or None
        Average ⊙ weights for a neuron that reads pixels; for a convolution, the average patch
        ⊙ the kernel; for a deeper neuron, average ⊙ activation map.
    label_counts : dict
        Number of examples of each class.
    """

    number: int
    n_examples: int
    examples: Array
    activations: Array
    average: Array
    feature: Array | None
    label_counts: dict[Any, int]


@dataclass(frozen=True)
class MeaningPanel(FeaturePanel):
    """One meaning of a panel, with the same pictures as a feature.

    Attributes
    ----------
    label : str
        What it is about; empty if nothing is distinctive.
    features : list of FeaturePanel
        The part of each feature that is in it, largest first.
    """

    label: str
    features: list[FeaturePanel]


@dataclass(frozen=True)
class ImagePanel:
    """Everything that is shown of an image model's neuron.

    Attributes
    ----------
    site : str
    neuron : int
    activation : str
        Names of the functions between the layer's output and the activation.
    metrics : Polysemanticity
    threshold : float
        Cosine distance at which the tree is cut.
    n_inputs : int
        Number of inputs read.
    statistics : dict of str to float
        ``density``, ``max_activation``, ``mean_activation``, ``participation_ratio``.
    input_weights : ndarray or None
        As an image, or the kernel of a convolution; None for a deeper linear neuron.
    activation_map : ndarray or None, shape of an image
        See `polyseme.capture.activation_maps`.
    baseline : float or str
        The baseline input of the activation map: a constant, or the digest of an array.
    average_example : ndarray or None, shape of an image
        Mean of the examples, in the model's units.
    importance_map : ndarray or None, shape of an image
        Activation map ⊙ average example.
    logit_effects : pandas.DataFrame or None
        ``class``, ``gradient`` (first order), ``ablation`` (exact).
    histogram : ndarray of int64, shape (64,)
        Counts of positive activations in equal bins over [0, ``histogram_upper``).
    histogram_upper : float
    random_examples : ndarray, shape (n, *image)
        A random sample of the inputs that activate the neuron, as stored.
    random_activations : ndarray of float, shape (n,)
    features : list of FeaturePanel
        Largest first.
    meanings : list of MeaningPanel
        Largest first; empty if the run has no meanings.
    verdict : str
        See `polyseme.Meanings.verdict`; empty without meanings.
    """

    site: str
    neuron: int
    activation: str
    metrics: Polysemanticity
    threshold: float
    n_inputs: int
    statistics: dict[str, float]
    input_weights: Array | None
    activation_map: Array | None
    baseline: Any
    average_example: Array | None
    importance_map: Array | None
    logit_effects: pd.DataFrame | None
    histogram: Array
    histogram_upper: float
    random_examples: Array
    random_activations: Array
    features: list[FeaturePanel]
    meanings: list[MeaningPanel]
    verdict: str


def image_panel(neuron: Any, n_shown: int) -> ImagePanel:
    """The panel of a `Neuron`, see `Neuron.panel`."""
    neuron._refuse_texts()
    folder = neuron._folder
    data, extra = folder.metadata["data"], neuron.info.extra
    shape = data.get("image_shape")
    if shape is None:
        raise InputError(
            f"The run's inputs have shape {tuple(data['shape'])}, which is not an image; analyse "
            "with image_shape=(height, width) to show them as images."
        )
    scale = Scale(tuple(shape), data["mean"], data["std"])
    stored = neuron.inputs()
    average = scale.to_input(stored).mean(axis=0) if len(stored) else None
    kernel = extra.get("kernel_shape")
    weights = (
        neuron.weights.reshape(kernel if kernel else shape)
        if kernel or extra.get("reads_inputs")
        else None
    )
    drawn = None
    if neuron._has("activation_map"):
        drawn = neuron._of_site("activation_map")[0].reshape(shape)
    logits = None
    if neuron._has("logit_gradient"):
        gradient, ablation = (
            neuron._of_site(name)[0] for name in ("logit_gradient", "logit_ablation")
        )
        names = data.get("class_names") or []
        names = names if len(names) == len(gradient) else list(range(len(gradient)))
        logits = pd.DataFrame({"class": names, "gradient": gradient, "ablation": ablation})

    def pictures(group: Feature | Meaning, cosines: Array) -> dict[str, Any]:
        rows = group.examples["example"].to_numpy()
        nearest = np.lexsort((-cosines[rows], rows != group.medoid))
        shown = group.examples.iloc[nearest[:n_shown]]
        mean = scale.to_input(stored[rows]).mean(axis=0)
        if kernel:
            picture = neuron.vectors[rows].mean(axis=0).reshape(kernel) * weights
        elif weights is not None:
            picture = mean * weights
        else:
            picture = None if drawn is None else mean * drawn
        return {
            "number": group.number,
            "n_examples": group.n_examples,
            "examples": scale.to_show(stored[shown["example"]]),
            "activations": shown["activation"].to_numpy(),
            "average": mean,
            "feature": picture,
            "label_counts": label_counts(group.examples),
        }

    units = unit_rows(neuron.embeddings)

    def of_feature(feature: Feature) -> FeaturePanel:
        return FeaturePanel(**pictures(feature, units @ units[feature.medoid]))

    meanings = neuron._told_meanings
    return ImagePanel(
        site=neuron.site,
        neuron=neuron.number,
        activation=str(extra.get("activation", "")),
        metrics=neuron.metrics,
        threshold=neuron.threshold,
        n_inputs=int(data["n_inputs"]),
        statistics={name: float(neuron.row[name]) for name in _STATISTICS},
        input_weights=weights,
        activation_map=drawn,
        baseline=folder.metadata["settings"].get("baseline"),
        average_example=average,
        importance_map=None if drawn is None or average is None else drawn * average,
        logit_effects=logits,
        histogram=neuron._of_site("histogram")[0],
        histogram_upper=float(neuron._of_site("histogram_upper")[0]),
        random_examples=scale.to_show(neuron.inputs(neuron.random_examples)),
        random_activations=neuron.random_examples["activation"].to_numpy(),
        features=[of_feature(feature) for feature in neuron.features],
        meanings=[
            MeaningPanel(
                # A meaning's medoid is that of the space in which meanings are found.
                **pictures(meaning, meanings.groups.cosines[meaning.medoid]),
                label=meaning.label,
                features=[of_feature(part) for part in neuron._parts(meaning)],
            )
            for meaning in meanings or []
        ],
        verdict=meanings.verdict if meanings else "",
    )
