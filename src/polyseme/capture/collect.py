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
from polyseme.errors import InputError, SiteError
from polyseme.sites.hooks import (
    Feed,
    Gather,
    evaluating,
    read_sites,
    some_inputs,
    stopping_after,
)
from polyseme.sites.proof import prove_sites
from polyseme.sites.reading import Reading
from polyseme.sites.site import Site

Array = NDArray[Any]
State = dict[str, Array]

# Number of initial batches on which sites are proved; then on every 512th batch.
_CHECKED = (0, 8, 32, 128, 512)


@dataclass(frozen=True)
class Batch:
    """A batch of inputs for the model.

    Attributes
    ----------
    inputs : ndarray or Tensor, shape (B, ...), or a dict of them
        Inputs of the model; a dict, such as of ``input_ids`` and ``attention_mask``, is passed as
        keyword arguments.
    raw : ndarray, shape (B, ...)
        The same as stored, to keep for the examples.
    labels : ndarray of int64, shape (B,), optional
    mask : ndarray or Tensor of bool, shape (B, positions), optional
        Positions that count, such as those that are not padding: neurons are read only there, and
        an input without any has activation 0. By default, those in the attention mask of
        ``inputs``, or all if there is none.
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
                # Gives the shape of batch and positions, for models that flatten them.
                return torch.ones(
                    tuple(self.inputs["input_ids"].shape), dtype=torch.bool, device=device
                )
        if mask is None:
            return None
        tensor = torch.as_tensor(mask).to(device).bool()
        if tensor.ndim != 2 or len(tensor) != len(self.raw):
            raise InputError(
                f"mask has shape {tuple(tensor.shape)} for {len(self.raw)} inputs; expected one "
                f"value per position, ({len(self.raw)}, positions)."
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

    Results do not depend on the batch size, except that the model's own sums may differ in their
    last digits.

    Parameters
    ----------
    model : torch.nn.Module
    sites : list of Site
    select : Selector
        Selects a neuron's examples.
    n_random : int
        Number of random activating examples to keep as well.
    seed : int
    window : (int, int), optional
        Numbers of positions before and after each example whose activations are kept.
    half : bool
        Store pre-neuron embeddings as float16; a site where one does not fit uses float32.
    files : Path, optional
        Folder in which to store rows instead of in memory: embeddings, windows and inputs.
    first : int
        Number of the first input, if this is a part of the data.

    Attributes
    ----------
    n_inputs : int
        Number of inputs processed, plus those before the first.
    is_whole : bool
        False while a batch is only partly processed, when the state must not be saved.
    low, high : float
        Range of the inputs' values, if floating point.
    on_smaller_batch : callable (int) -> None, optional
        Called with the new size when the device runs out of memory and the batch is halved.
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
        """Process the batches; yield the number of inputs so far after each.

        The model is in evaluation mode and hooked only while it runs a batch, so a caller may stop
        between batches and continue later. A batch that does not fit in the device's memory is
        halved, and so are later ones.
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
        unread = {site.name for site in self._sites}

        def on_reading(site: Site, reading: Reading, gather: Gather) -> None:
            if len(reading.activations) != n:
                raise InputError(
                    f"Site {site.name!r} returned {len(reading.activations)} rows for {n} inputs; "
                    f"the first axis of a layer's output must be the batch."
                )
            self._collectors[site.name].update(reading, gather, index, order, wanted[part])
            unread.discard(site.name)

        mask = None if mask is None else mask[part]
        with read_sites(self._model, self._sites, on_reading, mask), stopping_after(self._sites):
            self._feed(some_inputs(inputs, part))
        if unread:
            raise SiteError(
                f"The model did not run site {min(unread)!r} on inputs {index[0]} to {index[-1]}; "
                f"expected a layer that runs on all inputs. Leave it out with --exclude, or "
                f"exclude=..., or leave these inputs out."
            )

    def _halve(self, size: int, error: torch.OutOfMemoryError) -> None:
        if size == 1:
            raise InputError(
                f"The device {str(self._feed.device)!r} ran out of memory on a single input: give "
                "shorter inputs, a model with a smaller dtype, or a device with more memory."
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
            # Integers are finite, and token ids have no value range.
            return
        low, high = values.amin().item(), values.amax().item()
        if not (np.isfinite(low) and np.isfinite(high)):
            row, *place = torch.isfinite(values).logical_not().nonzero()[0].tolist()
            raise InputError(
                f"Input {self.n_inputs + row} of the data holds {values[row][tuple(place)].item()} "
                f"at {place}; expected finite float32 values. Leave that input out or repair it."
            )
        self.low, self.high = min(self.low, low), max(self.high, high)

    def _live(self, indices: Callable[[SiteCollector], Iterable[Any]]) -> Array:
        """Inputs in the pool that any site refers to, ascending."""
        known = self._inputs.keys
        if not len(known):
            return known
        # Marked rather than sorted, as there may be thousands of times more indices than inputs.
        named = np.zeros(known[-1] - known[0] + 1, bool)
        for collector in self._collectors.values():
            for index in indices(collector):
                named[np.asarray(index) - known[0]] = True
        return np.asarray(known[named[known - known[0]]])

    def results(self) -> Iterator[Collected]:
        """The results of each site in turn, so that only one must be in memory at a time."""
        for collector in self._collectors.values():
            yield collector.result()

    def examples(self) -> Iterator[tuple[Site, Selection]]:
        """Only the examples of each site, which is faster than all `results`."""
        for collector in self._collectors.values():
            yield collector.site, collector.examples.result()

    def parts(self) -> Iterator[State]:
        """The results of each site for this part of the data, see `SiteCollector.part`."""
        for collector in self._collectors.values():
            yield collector.part()

    def inputs(self, *, held: bool = False) -> dict[str, Array]:
        """The inputs that the examples refer to.

        Parameters
        ----------
        held : bool
            Include the inputs of candidate examples.

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
        """The complete state, for `restore`; rows in files are stored by reference."""
        state: State = {
            "progress": np.array([self.n_inputs]),
            "range": np.array([self.low, self.high], dtype=np.float64),
        }
        for part, holder in self._parts().items():
            state.update({f"{part}/{name}": array for name, array in holder.state().items()})
        return state

    def saved(self) -> None:
        """Remove files that only earlier states need, once the last `state` is safely stored."""
        self._inputs.forget()
        for collector in self._collectors.values():
            collector.vectors.forget()
            collector.windows.forget()

    def restore(self, state: Mapping[str, Array]) -> None:
        """Continue from a `state` of a collector with the same sites and settings."""
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
