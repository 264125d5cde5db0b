"""Classifying an image with a run's model: prediction, neurons' contributions and features."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from polyseme.analysis.reopen import same_weights, sites_of_run
from polyseme.attribution import count_classes
from polyseme.core.arrays import to_numpy
from polyseme.errors import InputError
from polyseme.sites import (
    Feed,
    Reading,
    Site,
    edit_site,
    evaluating,
    prove_sites,
    read_sites,
    stopping_after,
)
from polyseme.sites.hooks import Gather
from polyseme.views import Neuron, Run

Array = NDArray[Any]

METHOD = (
    "A contribution is the neuron's activation times the gradient of the logit with respect to it, "
    "through all later layers: exact if these are linear."
)
# Each costs one backward pass.
MAX_CLASSES = 32


@dataclass(frozen=True, eq=False)
class Classification:
    """A classifier's result for one input. Made by `ImageClassifier.classify`.

    Attributes
    ----------
    logits, probabilities : ndarray of float32, shape (C,)
    neurons : pandas.DataFrame
        Every active neuron of the run: ``site``, ``neuron``, ``activation`` (its maximum over
        positions), ``share`` (of its maximum in the run; NaN if nothing in the run activates it),
        ``feature`` (-1 if none is near), ``label`` (the most common class of that feature's
        examples) and ``n_examples`` of that feature.
    contributions : ndarray of float32, shape (n_rows, C)
        Contribution of each to each logit: activation times gradient. NaN for a site that does not
        reach the logits and, with more than 32 classes, for all but the 32 most likely.
    """

    logits: Array
    probabilities: Array
    neurons: pd.DataFrame
    contributions: Array

    @property
    def predicted(self) -> int:
        """The class with the largest logit."""
        return int(self.logits.argmax())

    def important(self, k: int) -> NDArray[np.int64]:
        """Rows of the k most important neurons of each class, combined.

        Returns
        -------
        ndarray of int64
            Those most important to the predicted class come first.
        """
        size = np.nan_to_num(np.abs(self.contributions))
        order = np.argsort(-size, axis=0, kind="stable")[:k]
        chosen = np.unique(order[np.take_along_axis(size, order, axis=0) > 0])
        return chosen[np.argsort(-size[chosen, self.predicted], kind="stable")]


class ImageClassifier:
    """A run of images and its model, prepared once to classify many inputs.

    Parameters
    ----------
    run : Run
    model : torch.nn.Module
        The classifier that was analysed.

    Raises
    ------
    InputError
        If the run is of texts, or the model is not the run's.
    """

    def __init__(self, run: Run, model: nn.Module) -> None:
        if "pixels" not in run.folder.inputs:
            raise InputError("The run is of texts; classifying an image needs a run of images.")
        self.run, self.model = run, model
        self.sites = sites_of_run(run, model, run.sites, {})
        self._known = False

    def stored(self, number: int) -> tuple[Array, int | None]:
        """An input in the run, as stored, and its class if known.

        Parameters
        ----------
        number : int
            Index in the analysed data.
        """
        inputs = self.run.folder.inputs
        row = int(np.searchsorted(inputs["index"], number))
        if row >= len(inputs["index"]) or int(inputs["index"][row]) != number:
            raise InputError(
                f"The run does not hold input {number}: it keeps the {len(inputs['index'])} that "
                "are examples of some neuron. Give another number, or pixels."
            )
        label = int(inputs["labels"][row]) if "labels" in inputs else None
        return np.asarray(inputs["pixels"][row]), label

    def to_input(self, stored: Array) -> NDArray[np.float32]:
        """Convert a stored input, or one in the same units, to the model's input."""
        data = self.run.metadata["data"]
        shape = tuple(data["shape"])
        if stored.shape != shape or stored.dtype.kind not in "fiu":
            raise InputError(
                f"The input has shape {stored.shape} and dtype {stored.dtype}; expected numbers of "
                f"shape {shape}, like the analysed inputs."
            )
        if stored.dtype == np.uint8:
            mean, std = (_per_channel(data[name], shape) for name in ("mean", "std"))
            stored = (stored / np.float32(255) - mean) / std
        return np.asarray(stored, np.float32)

    def classify(self, stored: Any) -> Classification:
        """Classify one input.

        Parameters
        ----------
        stored : array, shape of one input
            uint8 is scaled like the run's data; floats are in the model's units.
        """
        values = self.to_input(to_numpy(stored))
        if not np.isfinite(values).all():
            raise InputError("The input holds NaN or infinite values; expected finite values.")
        inputs = torch.from_numpy(values)[None]
        feed = Feed(self.model)
        readings: dict[str, tuple[Array, Array]] = {}

        def on_reading(site: Site, reading: Reading, gather: Gather) -> None:
            neurons = torch.arange(site.n_neurons, device=reading.positions.device)
            places = site.place(reading.positions[0], neurons)
            vectors = gather(torch.zeros_like(places), places)
            readings[site.name] = (
                reading.activations[0].float().cpu().numpy(),
                vectors.float().cpu().numpy(),
            )

        with evaluating(self.model):
            with torch.no_grad():
                output = feed(inputs)
                if count_classes(output) is None:
                    shape = tuple(output.shape) if torch.is_tensor(output) else type(output)
                    raise InputError(
                        f"The model's output for one input has shape {shape}; expected a "
                        f"classifier's logits, (1, classes)."
                    )
                if not self._known:
                    prove_sites(self.model, self.sites, feed, inputs)
                    self._known = True
                with read_sites(self.model, self.sites, on_reading), stopping_after(self.sites):
                    feed(inputs)
            logits = output[0].float()
            classes = logits.topk(min(len(logits), MAX_CLASSES)).indices.tolist()
            contributions = [
                self._contributions(site, feed, inputs, len(logits), classes) for site in self.sites
            ]
        frames, added = [], []
        for site, contribution in zip(self.sites, contributions, strict=True):
            activations, vectors = readings[site.name]
            active = np.flatnonzero(activations > 0)
            frames.append(self._features(site, active, activations[active], vectors[active]))
            added.append(contribution[active])
        return Classification(
            logits.cpu().numpy(),
            logits.softmax(dim=0).cpu().numpy(),
            pd.concat(frames, ignore_index=True),
            np.concatenate(added),
        )

    def _contributions(
        self, site: Site, feed: Feed, inputs: Tensor, n_classes: int, classes: list[int]
    ) -> Array:
        """Contribution of each neuron of a site to each logit, (n_neurons, C)."""
        added = np.full((site.n_neurons, n_classes), np.nan, np.float32)
        if not site.can_be_edited:
            # Unknown where such a site feeds back into the model.
            return added
        seen: list[Tensor] = []

        def watch(activations: Tensor) -> Tensor:
            # Detached, so that only later layers are differentiated.
            leaf = activations.detach().clone().requires_grad_()
            seen.append(leaf)
            # An in-place layer must not modify the leaf.
            return leaf.clone()

        with torch.enable_grad(), edit_site(site, watch):
            logits = feed(inputs)
        if not seen or not logits.requires_grad:
            return added
        for c in classes:
            slopes: tuple[Tensor | None, ...] = torch.autograd.grad(
                logits[0, c], seen[0], retain_graph=True, allow_unused=True
            )
            if (slope := slopes[0]) is None:
                return added
            product = slope * seen[0].detach()
            by_neuron = product.movedim(site.neuron_axis, 1)[0]
            added[:, c] = by_neuron.reshape(site.n_neurons, -1).sum(dim=1).float().cpu().numpy()
        return added

    def _features(
        self, site: Site, neurons: Array, activations: Array, vectors: Array
    ) -> pd.DataFrame:
        info = self.run.site(site.name)
        first = self.run.folder.first_neuron(info.number)
        maxima = self.run.folder.neurons["max_activation"].to_numpy(np.float32)[first + neurons]
        feature = np.full(len(neurons), -1, np.int64)
        label, size = np.full(len(neurons), "", object), np.zeros(len(neurons), np.int64)
        for row, number in enumerate(neurons):
            neuron = self.run.neuron(site.name, int(number))
            same_weights(neuron, site)
            feature[row] = neuron.assign(vectors[row : row + 1])[0]
            if feature[row] >= 0:
                label[row], size[row] = _about(neuron, int(feature[row]))
        with np.errstate(divide="ignore", invalid="ignore"):
            share = np.where(maxima > 0, activations / maxima, np.nan).astype(np.float32)
        return pd.DataFrame(
            {
                "site": pd.Series([site.name] * len(neurons), dtype=object),
                "neuron": neurons,
                "activation": activations,
                "share": share,
                "feature": feature,
                "label": label,
                "n_examples": size,
            }
        )


def _per_channel(value: Any, shape: tuple[int, ...]) -> NDArray[np.float32]:
    array = np.asarray(value, np.float32)
    return array.reshape(-1, *(1,) * (len(shape) - 1)) if array.ndim else array


def _about(neuron: Neuron, feature: int) -> tuple[str, int]:
    """The most common class of a feature's examples, and its number of examples."""
    examples = neuron.examples[neuron.clustering.labels == feature]
    if "label" not in examples:
        return "", len(examples)
    counts = examples["label"].value_counts()
    return f"{counts.index[0]} ({int(counts.iloc[0])} of {len(examples)})", len(examples)
