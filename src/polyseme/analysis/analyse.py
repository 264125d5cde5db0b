"""From a model and data to a run: one pass, then trees, metrics, maps and logit effects."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from rich.progress import Progress
from torch import nn

from polyseme.analysis.describe import (
    behaviour,
    check_baseline,
    check_image_shape,
    check_kind,
    check_options,
    describe_model,
    describe_selector,
    digest,
    plain,
)
from polyseme.analysis.probing import probe
from polyseme.analysis.progress import progress_bars, read_and_save
from polyseme.analysis.records import cluster_site, site_arrays, site_info, site_tables
from polyseme.analysis.similar import SimilarFeatures, room_for_similar
from polyseme.analysis.text import analyse_text
from polyseme.attribution import activation_maps, count_classes, logit_effects
from polyseme.attribution.pixels import cells_of
from polyseme.capture import Batch, Collected, Collector, Selector, TopK
from polyseme.capture.collect import needs_head
from polyseme.core.arrays import check_linkage, check_threshold
from polyseme.data.contexts import Contexts
from polyseme.data.sources import Source, as_source
from polyseme.errors import InputError
from polyseme.sites import Feed, Site, evaluating, find_sites, prove_sites, sites_that_run
from polyseme.sites.transformer import check_whole
from polyseme.store import RunWriter
from polyseme.views import Run, open_run

Array = NDArray[Any]

CHECKPOINT_SECONDS = 60.0
# Inputs whose outputs tell one model from another.
FEW = 4


def analyse(
    model: nn.Module,
    data: Any,
    *,
    sites: str | Site | Iterable[str | Site],
    exclude: str | Iterable[str] = (),
    out: str | Path,
    select: Selector | None = None,
    threshold: float | None = None,
    linkage: str = "average",
    labels: Any = None,
    class_names: Iterable[str] | None = None,
    image_shape: tuple[int, ...] | None = None,
    panels: bool | None = None,
    panel_examples: int | None = None,
    baseline: float | Array | None = None,
    window: tuple[int, int] | None = None,
    importances: str | None = None,
    memory_budget: int | str | None = None,
    random_examples: int = 16,
    seed: int = 0,
    batch_size: int | None = None,
    overwrite: bool = False,
    resume: bool = False,
    progress: bool = True,
) -> Run:
    """Find what activates each neuron, split it into features, and write it all to a run.

    The data is read once, for all sites together, in bounded memory. The model is used in
    evaluation mode and is left as it was.

    An option that the data has no use for is refused: those from ``labels`` to ``baseline`` are
    for images and other arrays, and those from ``window`` to ``memory_budget`` for texts.

    Parameters
    ----------
    model : torch.nn.Module
        On any device; inputs follow it there.
    data : array, tensor, pair, path, Images, Contexts, data set or iterable
        See `polyseme.data.sources.as_source`; `Contexts` of tokens go to `analyse_text`. uint8
        images are scaled to [0, 1]; for another scaling give `polyseme.data.Images`.
    sites : str, Site, or a list of them
        Names of modules, or globs over them: ``"layers.0"``, ``"features.*"``. An SAE is a
        site by its own name or by its encoder's. Of layers that a glob matches, those that the
        model does not run are left out, with a warning.
    exclude : str or list of str
        Names, or globs over them, of sites to leave out.
    out : str or Path
        Folder of the run.
    select : Selector, optional
        Which examples stand for a neuron; by default ``TopK(100)``.
    threshold : float, optional
        Cosine distance in (0, 2] at which trees are cut; by default the published 0.05 for
        SAEs and 0.2 for other neurons. It can be changed later, the whole tree is kept.
    linkage : {"average", "single"}
    labels : array of int, shape (n,), optional
        Class of each input, where ``data`` is an array.
    class_names : iterable of str, optional
        Name of each class.
    image_shape : tuple of int, optional
        How to show an input, where its own shape is flat: (height, width) or (channels,
        height, width).
    panels : bool, optional
        Whether to compute activation maps and, for classifiers, logit effects, as is done by
        default: more forward passes, 5 for each pixel and 2 for each of ``panel_examples`` of
        each neuron.
    panel_examples : int, optional
        Examples a neuron, the first of its selection, that logit effects are averaged over; 32
        by default.
    baseline : float or array of the shape of one input, optional
        The input from which activation maps start, in the model's units; 0 by default.
    window, importances, memory_budget : optional
        Of texts, see `analyse_text`.
    random_examples, seed : int
        Random activating examples kept for each neuron, and the seed that they are drawn with.
    batch_size : int
        Inputs in one forward pass; 256 by default, of contexts 4,096 tokens. You may resume with
        a different batch size; only the same size reproduces the run byte for byte. If the device
        runs out of memory in the pass, batches are halved.
    overwrite, resume : bool
        Replace a run that exists; or resume an analysis that was interrupted.
    progress : bool
        Whether to show progress on the terminal.

    Returns
    -------
    Run

    Raises
    ------
    InputError
        For data that the model cannot take, NaN or infinite values, an empty data set, an
        option out of range.
    SiteError
        For a site that the model does not have.
    RunError
        If the folder is in the way, or belongs to another analysis.
    """
    given = check_kind(
        "texts" if isinstance(data, Contexts) else "images",
        labels=labels,
        class_names=class_names,
        image_shape=image_shape,
        panels=panels,
        panel_examples=panel_examples,
        baseline=baseline,
        window=window,
        importances=importances,
        memory_budget=memory_budget,
    )
    if isinstance(data, Contexts):
        return analyse_text(
            model,
            data,
            sites=sites,
            exclude=exclude,
            out=out,
            select=select,
            threshold=threshold,
            linkage=linkage,
            random_examples=random_examples,
            seed=seed,
            batch_size=batch_size,
            overwrite=overwrite,
            resume=resume,
            progress=progress,
            **given,
        )
    panels = True if panels is None else panels
    panel_examples = 32 if panel_examples is None else panel_examples
    batch_size = 256 if batch_size is None else batch_size
    select = TopK() if select is None else select
    check_options(
        model,
        select,
        batch_size=batch_size,
        random_examples=random_examples,
        panel_examples=panel_examples,
    )
    threshold = None if threshold is None else check_threshold(threshold)
    check_linkage(linkage)
    baseline = check_baseline(0.0 if baseline is None else baseline)
    image_shape = check_image_shape(image_shape)
    source = as_source(data, labels, class_names)
    check_whole(model, "images")
    found = find_sites(model, sites, exclude=exclude)
    settings: dict[str, Any] = {
        "select": describe_selector(select),
        "threshold": threshold,
        "linkage": linkage,
        "random_examples": int(random_examples),
        "seed": plain(seed),
        "batch_size": int(batch_size),
        "panels": bool(panels),
        "panel_examples": int(panel_examples),
        "baseline": baseline if isinstance(baseline, float) else digest([baseline]),
    }
    first = source.peek(FEW)
    if first is None:
        raise InputError(
            f"The data {source.name} gives nothing: it is empty, or an iterator that was used up. "
            "At least one input is needed; make an iterator anew."
        )
    few, about = first[:FEW], describe_model(model)
    found = sites_that_run(model, found, source.to_input(few))
    feed = Feed(model, head=panels or needs_head(model, found))
    fingerprint = {
        "sites": [site.name for site in found],
        "settings": {key: value for key, value in settings.items() if key != "batch_size"},
        "model": {**about, **behaviour(model, feed, source.to_input(few))},
        "data": {
            **source.identity(),
            "first": digest([few]),
            "image_shape": _json_number(image_shape),
            "class_names": _json_number(source.class_names),
        },
    }
    with RunWriter(out, fingerprint=fingerprint, overwrite=overwrite, resume=resume) as writer:
        if writer.finished:
            return open_run(out, probe=probe)
        work = _Analysis(model, source, few, found, writer, settings, progress)
        work.image_shape = image_shape
        work.baseline = baseline
        return work.run(select, about)


class _Analysis:
    """The stages of one analysis, each of which a resume may find done."""

    image_shape: tuple[int, ...] | None = None
    baseline: float | Array = 0.0
    #: Of one input; known from the first batch on.
    shape: tuple[int, ...] | None = None

    def __init__(
        self,
        model: nn.Module,
        source: Source,
        few: Array,
        sites: list[Site],
        writer: RunWriter,
        settings: dict[str, Any],
        progress: bool,
    ) -> None:
        self.model, self.source, self.sites, self.writer = model, source, sites, writer
        self.few, self.settings, self.show = few, settings, progress

    def run(self, select: Selector, about: dict[str, Any]) -> Run:
        with progress_bars(self.show) as bars, SimilarFeatures(self.writer) as similar:
            collector = self.collect(select, bars)
            collected, inputs = collector.result()
            shape = self.shape
            assert shape is not None
            # Where no neuron is ever active, no input was kept.
            inputs.setdefault("pixels", np.empty((0, *shape), np.float32))
            image_shape = self._image_shape(shape)
            tables: dict[str, list[pd.DataFrame]] = {
                name: [] for name in ("neurons", "examples", "features", "random")
            }
            maps = self.maps(collected, shape, collector, bars)
            infos = []
            for number, one in enumerate(collected):
                task = bars.add_task(f"Clustering {one.site.name}", total=None)
                threshold = self.settings["threshold"] or one.site.default_threshold("images")
                clusterings, central, layouts, directions = cluster_site(
                    one, threshold, self.settings["linkage"]
                )
                for name, frame in site_tables(one, clusterings, central).items():
                    tables[name].append(frame)
                bars.update(task, total=1, completed=1)
                arrays = {**site_arrays(one, clusterings), **layouts}
                if one.site.name in maps:
                    arrays["activation_map"] = maps[one.site.name]
                arrays.update(self.logits(number, one, inputs, bars))
                similar.add(one.site, tables["features"][-1], directions)
                arrays.update(room_for_similar(len(tables["features"][-1])))
                self.writer.write_site(number, arrays)
                infos.append(site_info(one, threshold, shape, inputs, self.source))
            similar.write(bars)
            self.writer.write_inputs(inputs)
            self.writer.write_tables(
                **{name: pd.concat(frames, ignore_index=True) for name, frames in tables.items()}
            )
            images = self.source.images
            path = self.writer.finish(
                {
                    "sites": infos,
                    "settings": self.settings,
                    "model": about,
                    "data": {
                        "name": self.source.name,
                        "n_inputs": collector.n_inputs,
                        "shape": list(shape),
                        "image_shape": list(image_shape) if image_shape else None,
                        "mean": _json_number(images.mean) if images else 0.0,
                        "std": _json_number(images.std) if images else 1.0,
                        "low": collector.low,
                        "high": collector.high,
                        "class_names": list(self.source.class_names or ()),
                    },
                }
            )
        return open_run(path, probe=probe)

    def collect(self, select: Selector, bars: Progress) -> Collector:
        """The pass over the data; saved every minute, when it is interrupted, and at its end."""
        collector = Collector(
            self.model,
            self.sites,
            select,
            n_random=self.settings["random_examples"],
            seed=self.settings["seed"],
        )
        saved = self.writer.load_state("pass")
        if saved is not None:
            collector.restore(saved[0])
        size = self.settings["batch_size"]
        task = bars.add_task("Reading the data", total=self.source.length)
        bars.update(task, completed=collector.n_inputs)
        if saved is not None and saved[1].get("done"):
            self._look_again()
            return collector
        read_and_save(
            collector,
            self._batches(size, collector.n_inputs),
            self.writer,
            lambda n: bars.update(task, completed=n),
            CHECKPOINT_SECONDS,
        )
        if self.shape is None:
            # It was interrupted after the last batch.
            self._look_again()
        self.writer.save_state("pass", collector.state(), {"done": True})
        return collector

    def _look_again(self) -> None:
        """Learn from a few inputs what a checkpoint does not hold: activations and shape."""
        self._check_shape(self.few.shape[1:])
        with evaluating(self.model):
            inputs = self.source.to_input(self.few)
            prove_sites(self.model, self.sites, Feed(self.model), inputs)

    def _batches(self, size: int, start: int) -> Iterator[Batch]:
        for stored, labels in self.source.batches(size, start):
            if self.shape is None:
                self._check_shape(stored.shape[1:])
                self._check_classes(stored[:2])
            if stored.shape[1:] != self.shape:
                raise InputError(
                    f"The data's batches hold inputs of shapes {self.shape} and "
                    f"{stored.shape[1:]}; one shape is expected: resize or crop them first."
                )
            for at in range(0, len(stored), size):
                part = stored[at : at + size]
                yield Batch(
                    self.source.to_input(part),
                    part if part.dtype == np.uint8 else part.astype(np.float32),
                    None if labels is None else labels[at : at + size],
                )

    def _check_shape(self, shape: tuple[int, ...]) -> None:
        """Refuse options that do not fit the inputs, before all of these are read."""
        self._image_shape(shape)
        if self.settings["panels"]:
            cells_of(shape)
            try:
                np.broadcast_to(self.baseline, shape)
            except ValueError as error:
                raise InputError(
                    f"baseline has shape {np.shape(self.baseline)}, but an input has shape "
                    f"{shape}; a number or an array of that shape is expected."
                ) from error
        self.shape = shape

    def _check_classes(self, stored: Array) -> None:
        """Refuse labels from 1 to n for n logits, which are numbered from 0."""
        labels = self.source.images.labels if self.source.images else None
        if labels is None:
            return
        with evaluating(self.model), torch.no_grad():
            n = count_classes(Feed(self.model)(self.source.to_input(stored)))
        if n is not None and (int(labels.min()), int(labels.max())) == (1, n):
            raise InputError(
                f"The labels reach from 1 to {n}, and the model gives {n} logits, which are "
                "numbered from 0: give labels - 1, or none if the logits are not the classes'."
            )

    def maps(
        self,
        collected: list[Collected],
        shape: tuple[int, ...],
        collector: Collector,
        bars: Progress,
    ) -> dict[str, Array]:
        """Activation maps of all sites."""
        if not self.settings["panels"]:
            return {}
        saved = self.writer.load_state("maps")
        if saved is not None:
            return {site.name: saved[0][str(n)] for n, site in enumerate(self.sites)}
        images = self.source.images
        low, high = images.value_range if images else (collector.low, collector.high)
        start = np.broadcast_to(np.asarray(self.baseline, np.float32), shape).copy()
        task = bars.add_task("Activation maps", total=1.0)
        maps: dict[str, Array] = {}
        for done, result in activation_maps(
            self.model,
            [one.site for one in collected],
            baseline=start,
            low=low,
            high=high,
            batch_size=self.settings["batch_size"],
        ):
            bars.update(task, completed=done)
            maps = dict(result) if result is not None else maps
        self.writer.save_state("maps", {str(n): maps[s.name] for n, s in enumerate(self.sites)}, {})
        return maps

    def logits(
        self, number: int, one: Collected, inputs: dict[str, Array], bars: Progress
    ) -> dict[str, Array]:
        """Logit effects of one site, where the model is a classifier."""
        if not self.settings["panels"] or not len(one.examples.neuron):
            return {}
        saved = self.writer.load_state(f"logits-{number}")
        if saved is not None:
            return saved[0]
        first = np.concatenate([[0], one.examples.counts.cumsum()])[one.examples.neuron]
        early = np.arange(len(first)) - first < self.settings["panel_examples"]
        rows = np.searchsorted(inputs["index"], one.examples.index[early])

        def load(example: NDArray[np.int64]) -> Array:
            return self.source.to_input(inputs["pixels"][example])

        with evaluating(self.model), torch.no_grad():
            n_classes = count_classes(Feed(self.model)(load(rows[:2])))
        arrays: dict[str, Array] = {}
        if n_classes is not None:
            task = bars.add_task(f"Logit effects of {one.site.name}", total=1.0)
            for done, effects in logit_effects(
                self.model,
                one.site,
                n_classes,
                load,
                one.examples.neuron[early],
                rows,
                batch_size=self.settings["batch_size"],
            ):
                bars.update(task, completed=done)
                if effects is not None:
                    arrays = {
                        "logit_gradient": effects.gradient,
                        "logit_ablation": effects.ablation,
                    }
        self.writer.save_state(f"logits-{number}", arrays, {})
        return arrays

    def _image_shape(self, shape: tuple[int, ...]) -> tuple[int, ...] | None:
        size = int(np.prod(shape))
        if self.image_shape is not None:
            given = self.image_shape
            if int(np.prod(given)) != size or len(given) not in (2, 3):
                raise InputError(
                    f"image_shape is {given}, but an input has {size} values; give (height, "
                    "width) or (channels, height, width) with that product."
                )
            return given
        return shape if len(shape) in (2, 3) else None


def _json_number(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
