"""What is shown of a neuron of an image model, as arrays."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from polyseme.core import Polysemanticity

Array = NDArray[Any]


@dataclass(frozen=True)
class Scale:
    """How stored pixels become a model's input, and what is shown.

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
        0 is the largest; examples in all.
    examples : ndarray, shape (n_shown, *image)
        The medoid, then the strongest, as stored.
    activations : ndarray of float, shape (n_shown,)
    average : ndarray of float32, shape of an image
        Mean of all of the feature's inputs, in the model's units.
    feature : ndarray or None
        Average ⊙ weights for a neuron that reads pixels; for a convolution, the average patch
        ⊙ the kernel; for a deeper neuron, average ⊙ activation map.
    label_counts : dict
        How many examples each class gives.
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
    """One meaning of a panel, with the pictures that a feature has.

    Attributes
    ----------
    label : str
        What it is about; empty if nothing is distinctive.
    features : list of FeaturePanel
        What of each feature lies in it, most first.
    """

    label: str
    features: list[FeaturePanel]


@dataclass(frozen=True)
class ImagePanel:
    """Everything that is shown of a neuron of an image model.

    Attributes
    ----------
    site : str
    neuron : int
    activation : str
        Names of the functions between the layer's output and the activation.
    metrics : Polysemanticity
    threshold : float
        Where the tree is cut.
    n_inputs : int
        Inputs that were looked at.
    statistics : dict of str to float
        ``density``, ``max_activation``, ``mean_activation``, ``participation_ratio``.
    input_weights : ndarray or None
        As an image, or for a convolution as its kernel; None for a deeper linear neuron.
    activation_map : ndarray or None, shape of an image
        See `polyseme.capture.activation_maps`.
    baseline : float or str
        The input from which the activation map starts: a constant, or the digest of an array.
    average_example : ndarray or None, shape of an image
        Mean of the examples, in the model's units.
    importance_map : ndarray or None, shape of an image
        Activation map ⊙ average example.
    logit_effects : pandas.DataFrame or None
        ``class``, ``gradient`` (to first order), ``ablation`` (exactly).
    histogram : ndarray of int64, shape (64,)
        Counts of positive activations in equal bins over [0, ``histogram_upper``).
    histogram_upper : float
    random_examples : ndarray, shape (n, *image)
        A random sample of the inputs that activate the neuron, as stored.
    random_activations : ndarray of float, shape (n,)
    features : list of FeaturePanel
        The largest first.
    meanings : list of MeaningPanel
        The largest first; none if the run holds none.
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
