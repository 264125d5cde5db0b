"""Images and other arrays as data of an analysis: activation maps and logit effects."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from polyseme.analysis.describe import digest
from polyseme.analysis.kinds import Array, Arrays, Attributed, Data, Engine, Selected, Work
from polyseme.analysis.settings import Settings
from polyseme.analysis.site_tables import site_info
from polyseme.attribution import activation_maps, count_classes, logit_effects
from polyseme.attribution.maps import cells_of
from polyseme.capture import Batch, Collected, Selection
from polyseme.data.sources import as_source
from polyseme.errors import InputError
from polyseme.sites import Feed, Site, evaluating
from polyseme.sites.hooks import in_this_thread
from polyseme.sites.transformer import check_whole

# Inputs whose outputs identify the model.
_FEW = 4


class ImageData(Data):
    """Images as data of an analysis, see `Data`; an input is stored as given."""

    kind, noun, again = "images", "input", "an array or a data set with a length"
    half = False
    #: An uninitialised lazy layer.
    places = None
    n_tried = 32

    def __init__(self, model: nn.Module, data: Any, settings: Settings) -> None:
        source = as_source(data, settings.labels, settings.class_names)
        check_whole(model, self.kind)
        first = source.peek(_FEW)
        if first is None:
            raise InputError(
                f"The data {source.name} yields no inputs: it is empty, or an exhausted iterator. "
                f"Give at least one input; create an iterator again."
            )
        self.model, self.source, self.settings = model, source, settings
        # Without a memory budget they stay in memory, which is faster; the selectors bound them.
        self.in_files = settings.memory_budget is not None
        self.repeatable, self.total = not source.is_read_once, source.length
        known = self.total is not None
        self.amount = f"data of {self.total:,} inputs" if known else "data of unknown length"
        self.shape: tuple[int, ...] = first.shape[1:]
        self.image_shape = _shown_shape(settings.image_shape, self.shape)
        self.row_bytes = int(np.prod(self.shape)) * (1 if first.dtype == np.uint8 else 4)
        self._stored = first[:_FEW]
        self.few = source.to_input(self._stored)
        if settings.panels:
            cells_of(self.shape)
            self._start()

    @staticmethod
    def default_batch_size(_data: Any) -> int:
        return 256

    def _start(self) -> Array:
        """The input that activation maps start from."""
        baseline = self.settings.baseline
        try:
            return np.broadcast_to(np.asarray(baseline, np.float32), self.shape).copy()
        except ValueError as error:
            raise InputError(
                f"baseline has shape {np.shape(baseline)}, but an input has shape {self.shape}; "
                f"expected a number or an array of that shape."
            ) from error

    @cached_property
    def _looked(self) -> tuple[int, int | None]:
        """Bytes of the model's largest tensor on the `few`, and its number of classes."""
        sizes: list[int] = [self.few.nbytes]

        def note(_module: nn.Module, _inputs: Any, output: Any) -> None:
            sizes.append(output.nbytes if torch.is_tensor(output) else 0)

        handles = [
            module.register_forward_hook(in_this_thread(note)) for module in self.model.modules()
        ]
        try:
            n_classes = self._n_classes(self.few)
        finally:
            for handle in handles:
                handle.remove()
        return max(sizes), n_classes

    def _n_classes(self, inputs: Any) -> int | None:
        with evaluating(self.model), torch.no_grad():
            return count_classes(Feed(self.model)(inputs))

    def _check_classes(self) -> None:
        """Refuse labels from 1 to n for n logits, which are numbered from 0."""
        labels = self.source.images.labels if self.source.images else None
        _, n = self._looked
        if labels is not None and n and (int(labels.min()), int(labels.max())) == (1, n):
            raise InputError(
                f"The labels range from 1 to {n}, but the model's {n} logits are numbered from 0: "
                f"give labels - 1, or no labels if the logits are not of these classes."
            )

    def identity(self) -> dict[str, Any]:
        return {
            **self.source.identity(),
            "first": digest([self._stored]),
            "image_shape": _as_list(self.settings.image_shape),
            "class_names": _as_list(self.source.class_names),
        }

    def count(self) -> int:
        if self.total is None:
            raise InputError(
                f"The data {self.source.name} has unknown length, so it cannot be split into "
                f"shards; give an array, a folder or a data set with a length."
            )
        return self.total

    def batches(self, size: int, start: int) -> Iterator[Batch]:
        self._check_classes()
        for stored, labels in self.source.batches(size, start):
            if stored.shape[1:] != self.shape:
                raise InputError(
                    f"The data's batches hold inputs of shapes {self.shape} and "
                    f"{stored.shape[1:]}; expected one shape. Resize or crop them first."
                )
            for first in range(0, len(stored), size):
                part = stored[first : first + size]
                yield Batch(
                    self.source.to_input(part),
                    part if part.dtype == np.uint8 else part.astype(np.float32),
                    None if labels is None else labels[first : first + size],
                )

    def working_bytes(self, sites: Sequence[Site]) -> int:
        # A layer's input, its output and a copy of the output exist at a time.
        return 3 * self._looked[0] * self.settings.batch_size // len(self.few)

    def added_bytes(self, site: Site) -> int:
        return 4 * site.n_neurons * int(np.prod(self.shape)) if self.settings.panels else 0

    def attribute(self, selected: Selected, work: Work, engine: Engine) -> Attributed:
        """Activation maps of all sites and, if the model is a classifier, logit effects."""
        # If no neuron is ever active, no input was kept.
        inputs = {"pixels": np.empty((0, *self.shape), np.float32)}
        inputs |= {("pixels" if name == "rows" else name): a for name, a in selected.inputs.items()}
        if not self.settings.panels:
            return Attributed(inputs, [{} for _ in selected.sites])
        with work.stages("maps"):
            maps = work.once("maps", lambda: self._maps(selected, work))
        of_sites = []
        with work.stages("logits"):
            for number, (site, chosen) in enumerate(selected.examples):
                effects = partial(self._logits, site, chosen, inputs, work)
                arrays = work.once(f"logits-{number}", effects) if len(chosen.neuron) else {}
                of_sites.append({"activation_map": maps[str(number)], **arrays})
        return Attributed(inputs, of_sites)

    def _maps(self, selected: Selected, work: Work) -> Arrays:
        images = self.source.images
        low, high = images.value_range if images else (selected.low, selected.high)
        steps = activation_maps(
            self.model,
            list(selected.sites),
            baseline=self._start(),
            low=low,
            high=high,
            batch_size=self.settings.batch_size,
        )
        maps = work.last("Activation maps", steps) or {}
        return {str(number): maps[site.name] for number, site in enumerate(selected.sites)}

    def _logits(self, site: Site, chosen: Selection, inputs: Arrays, work: Work) -> Arrays:
        first = np.concatenate([[0], chosen.counts.cumsum()])[chosen.neuron]
        early = np.arange(len(first)) - first < self.settings.panel_examples
        rows = np.searchsorted(inputs["index"], chosen.index[early])

        def load(example: NDArray[np.int64]) -> Array:
            return self.source.to_input(inputs["pixels"][example])

        n_classes = self._n_classes(load(rows[:2]))
        if n_classes is None:
            return {}
        steps = logit_effects(
            self.model,
            site,
            n_classes,
            load,
            chosen.neuron[early],
            rows,
            batch_size=self.settings.batch_size,
        )
        effects = work.last(f"Logit effects of {site.name}", steps)
        if effects is None:
            return {}
        return {"logit_gradient": effects.gradient, "logit_ablation": effects.ablation}

    def site_info(self, collected: Collected, threshold: float, inputs: Arrays) -> dict[str, Any]:
        return site_info(collected, threshold, self.shape, inputs, self.source)

    def metadata(
        self, model: dict[str, Any], identity: dict[str, Any], selected: Selected
    ) -> dict[str, Any]:
        images = self.source.images
        return {
            "model": model,
            "data": {
                "name": self.source.name,
                "n_inputs": selected.n_inputs,
                "shape": list(self.shape),
                "image_shape": _as_list(self.image_shape),
                "mean": _as_list(images.mean) if images else 0.0,
                "std": _as_list(images.std) if images else 1.0,
                "low": selected.low,
                "high": selected.high,
                "class_names": list(self.source.class_names or ()),
            },
        }


def _shown_shape(asked: tuple[int, ...] | None, shape: tuple[int, ...]) -> tuple[int, ...] | None:
    """The shape in which to show an input; None if it is not an image."""
    size = int(np.prod(shape))
    if asked is None:
        return shape if len(shape) in (2, 3) else None
    if int(np.prod(asked)) != size or len(asked) not in (2, 3):
        raise InputError(
            f"image_shape is {asked}, but an input has {size} values; give (height, width) or "
            "(channels, height, width) with that product."
        )
    return asked


def _as_list(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
