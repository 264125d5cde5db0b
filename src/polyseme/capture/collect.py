"""One pass over the data: examples, their pre-neuron embeddings and statistics of every site."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from polyseme.capture.accumulate import Collected, SiteCollector
from polyseme.capture.pool import Pool
from polyseme.capture.select import RandomActive, Selector, priorities
from polyseme.capture.stream import Selection
from polyseme.errors import InputError
from polyseme.sites.hooks import (
    Feed,
    Gather,
    evaluating,
    read_sites,
    some_inputs,
)
from polyseme.sites.proof import prove_sites
from polyseme.sites.reading import Reading
from polyseme.sites.site import Site

Array = NDArray[Any]
State = dict[str, Array]

# Batches whose first inputs the sites prove themselves on; each further 512th as well.
_CHECKED = (0, 8, 32, 128, 512)


@dataclass(frozen=True)
class Batch:
    """A few inputs on their way into the model.

    Attributes
    ----------
    inputs : ndarray or Tensor, shape (B, ...), or a dict of them
        What the model is called with; a dict, such as ``input_ids`` and ``attention_mask``, by
        keyword.
    raw : ndarray, shape (B, ...)
        The same as stored, to be kept for the examples.
    labels : ndarray of int64, shape (B,), optional
    mask : ndarray or Tensor of bool, shape (B, positions), optional
        Positions that count, such as those that are no padding: no neuron is read at another
        one, and an input without any has activation 0. Without it, those that the attention
        mask in ``inputs`` lets through, or all where there is no such mask.
    """

    inputs: Any
    raw: Array
    labels: Array | None = None
    mask: Any = None

    def mask_on(self, device: torch.device) -> Tensor | None:
        """Which positions count, bool of shape (B, positions); None for all."""
        mask = self.mask
        if mask is None and isinstance(self.inputs, Mapping):
            mask = self.inputs.get("attention_mask")
            if mask is None and "input_ids" in self.inputs:
                # Says what the batch and the positions are, for models that lay them in one row.
                return torch.ones(
                    tuple(self.inputs["input_ids"].shape), dtype=torch.bool, device=device
                )
        if mask is None:
            return None
        tensor = torch.as_tensor(mask).to(device).bool()
        if tensor.ndim != 2 or len(tensor) != len(self.raw):
            raise InputError(
                f"mask has shape {tuple(tensor.shape)} for {len(self.raw)} inputs; a value for "
                f"each position, ({len(self.raw)}, positions), is expected."
            )
        return tensor


def first_of(batch: Batch, n: int) -> Batch:
    """The first inputs of a batch."""
    return Batch(
        some_inputs(batch.inputs, slice(n)),
        batch.raw[:n],
        None if batch.labels is None else batch.labels[:n],
        None if batch.mask is None else batch.mask[:n],
    )


def needs_head(model: nn.Module, sites: list[Site]) -> bool:
    """Whether any site is outside the base of a transformers model, such as in its logits."""
    base = getattr(model, "base_model", None)
    if not isinstance(base, nn.Module):
        return True
    inside = set(base.modules())
    return any(site.output_module not in inside for site in sites)


class Collector:
    """The pass over the data, for all sites at once.

    What is found does not depend on how the inputs are cut into batches, but for what the
    model itself makes of it: its sums may differ in their last digits.

    Parameters
    ----------
    model : torch.nn.Module
    sites : list of Site
    select : Selector
        Chooses the examples that stand for a neuron.
    n_random : int
        Random activating examples kept beside them.
    seed : int
    window : (int, int), optional
        Positions before and after each example whose activations are kept with it.
    half : bool
        Keep pre-neuron embeddings as float16; a site where one does not fit keeps float32.
    files : Path, optional
        Folder in which rows are kept instead of in memory: embeddings, windows and inputs.
    first : int
        Number of the first input, where this is a part of the data.

    Attributes
    ----------
    n_inputs : int
        Inputs taken in, and those before the first.
    is_whole : bool
        False while a batch is half taken in, so that the state must not be saved.
    low, high : float
        Of the inputs' values, if they are floating-point numbers.
    on_smaller_batch : callable (int) -> None, optional
        Called with the new size when the device has run out of memory and the batch is halved.
    """

    def __init__(
        self,
        model: nn.Module,
        sites: list[Site],
        select: Selector,
        *,
        n_random: int = 16,
        seed: int = 0,
        window: tuple[int, int] | None = None,
        half: bool = False,
        files: Path | None = None,
        first: int = 0,
    ) -> None:
        self._model = model
        self._sites = sites
        self._seed = seed
        self._feed = Feed(model, head=needs_head(model, sites))
        draw = RandomActive(n_random, seed)
        self._collectors = {
            site.name: SiteCollector(
                site, select, draw, window, half, files and files / f"site{number}", first
            )
            for number, site in enumerate(sites)
        }
        self._inputs = Pool(files and files / "inputs")
        self._labels = Pool()
        self._batch_number = 0
        self._largest_batch: int | None = None
        self.on_smaller_batch: Callable[[int], None] | None = None
        self.is_whole = True
        self.n_inputs = first
        self.low = np.inf
        self.high = -np.inf

    def run(self, batches: Iterable[Batch]) -> Iterator[int]:
        """Take in the batches; yields the number of inputs so far after each of them.

        The model is in evaluation mode and hooked only while a batch is in it, so a caller may
        stop between batches and go on later. A batch that does not fit the device's memory is
        halved, and those after it likewise.
        """
        for batch in batches:
            self._update(batch)
            yield self.n_inputs

    def _update(self, batch: Batch) -> None:
        n = len(batch.raw)
        self._check(batch.inputs)
        self.is_whole = False
        wanted = torch.zeros(n, dtype=torch.bool)
        mask = batch.mask_on(self._feed.device)
        with evaluating(self._model), torch.no_grad():
            if self._batch_number in _CHECKED or not self._batch_number % _CHECKED[-1]:
                prove_sites(self._model, self._sites, self._feed, batch.inputs)
            self._batch_number += 1
            start = 0
            while start < n:
                part = slice(start, min(n, start + (self._largest_batch or n)))
                try:
                    self._read(batch.inputs, part, mask, wanted)
                except torch.OutOfMemoryError as error:
                    self._halve(part.stop - start, error)
                    continue
                start = part.stop
        rows = wanted.numpy()
        keys = np.flatnonzero(rows) + self.n_inputs
        self._inputs.add(keys, batch.raw[rows])
        if batch.labels is not None:
            self._labels.add(keys, batch.labels[rows])
        self.n_inputs += n
        if self._inputs.is_bloated:
            live = self._live(SiteCollector.held)
            self._inputs.keep(live)
            self._labels.keep(live)
        self.is_whole = True

    def _read(self, inputs: Any, part: slice, mask: Tensor | None, wanted: Tensor) -> None:
        """Run the model on a part of a batch."""
        n = part.stop - part.start
        index = torch.arange(part.start, part.stop) + self.n_inputs
        order = priorities(index, self._seed)

        def on_reading(site: Site, reading: Reading, gather: Gather) -> None:
            if len(reading.activations) != n:
                raise InputError(
                    f"Site {site.name!r} gave {len(reading.activations)} rows for {n} inputs; "
                    "the first axis of a layer's output must be the batch."
                )
            self._collectors[site.name].update(reading, gather, index, order, wanted[part])

        mask = None if mask is None else mask[part]
        with read_sites(self._model, self._sites, on_reading, mask):
            self._feed(some_inputs(inputs, part))

    def _halve(self, size: int, error: torch.OutOfMemoryError) -> None:
        if size == 1:
            raise InputError(
                f"The device {str(self._feed.device)!r} ran out of memory on a single input: "
                "give shorter ones, a model of a smaller dtype, or a device with more memory."
            ) from error
        self._largest_batch = size // 2
        if self._feed.device.type == "cuda":
            torch.cuda.empty_cache()
        if self.on_smaller_batch is not None:
            self.on_smaller_batch(self._largest_batch)

    def _check(self, inputs: Any) -> None:
        if isinstance(inputs, Mapping):
            for part in inputs.values():
                self._check(part)
            return
        values = inputs if torch.is_tensor(inputs) else torch.as_tensor(np.asarray(inputs))
        if not values.is_floating_point():
            # Whole numbers are finite, and those of tokens are not from a range of brightness.
            return
        low, high = values.amin().item(), values.amax().item()
        if not (np.isfinite(low) and np.isfinite(high)):
            row, *place = torch.isfinite(values).logical_not().nonzero()[0].tolist()
            raise InputError(
                f"Input {self.n_inputs + row} of the data holds {values[row][tuple(place)].item()} "
                f"at {place}; finite numbers of float32 are expected: leave that input out or mend "
                "it."
            )
        self.low, self.high = min(self.low, low), max(self.high, high)

    def _live(self, indices: Callable[[SiteCollector], Iterable[Any]]) -> Array:
        """Those inputs in the pool that any site's indices name, ascending."""
        known = self._inputs.keys
        if not len(known):
            return known
        # Marked, as there may be many thousand times more indices than inputs.
        named = np.zeros(known[-1] - known[0] + 1, bool)
        for collector in self._collectors.values():
            for index in indices(collector):
                named[np.asarray(index) - known[0]] = True
        return np.asarray(known[named[known - known[0]]])

    def results(self) -> Iterator[Collected]:
        """What each site found, one after the other, so that one need be in memory at a time."""
        for collector in self._collectors.values():
            yield collector.result()

    def examples(self) -> Iterator[tuple[Site, Selection]]:
        """The examples of each site alone, which are quicker to have than its `results`."""
        for collector in self._collectors.values():
            yield collector.site, collector.examples.result()

    def parts(self) -> Iterator[State]:
        """What each site found in this part of the data, see `SiteCollector.part`."""
        for collector in self._collectors.values():
            yield collector.part()

    def inputs(self, *, held: bool = False) -> dict[str, Array]:
        """The inputs that the examples point at.

        Parameters
        ----------
        held : bool
            Also those at which only what may still become an example points.

        Returns
        -------
        dict
            ``index`` (m,), ``rows`` (m, ...) as in `Batch.raw`, and ``labels`` (m,) if known.
        """
        live = self._live(lambda c: c.held() if held else (c.inputs(),))
        inputs = {"index": live}
        for name, pool in (("rows", self._inputs), ("labels", self._labels)):
            rows = pool.take(live)
            if rows is not None:
                inputs[name] = rows
        return inputs

    def result(self) -> tuple[list[Collected], dict[str, Array]]:
        """All `results`, and the `inputs`."""
        return list(self.results()), self.inputs()

    def _parts(self) -> dict[str, Any]:
        sites = {f"site{n}": c for n, c in enumerate(self._collectors.values())}
        return {"inputs": self._inputs, "labels": self._labels, **sites}

    def state(self) -> State:
        """Everything, to go on later from here; of rows in files, where they are."""
        state: State = {
            "progress": np.array([self.n_inputs]),
            "range": np.array([self.low, self.high], dtype=np.float64),
        }
        for part, holder in self._parts().items():
            state.update({f"{part}/{name}": array for name, array in holder.state().items()})
        return state

    def saved(self) -> None:
        """Remove files that only an earlier `state` needs: the last one is safely stored."""
        self._inputs.forget()
        for collector in self._collectors.values():
            collector.vectors.forget()
            collector.windows.forget()

    def restore(self, state: Mapping[str, Array]) -> None:
        """Go on from a `state` of a collector with the same sites and settings."""
        self.n_inputs = int(state["progress"][0])
        self.low, self.high = (float(value) for value in state["range"])
        for part, holder in self._parts().items():
            prefix = f"{part}/"
            part_state = {
                k.removeprefix(prefix): a for k, a in state.items() if k.startswith(prefix)
            }
            if isinstance(holder, Pool):
                holder.restore(part_state)
            else:
                holder.restore(part_state, self.n_inputs)
