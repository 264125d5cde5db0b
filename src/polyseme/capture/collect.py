"""One pass over the data: examples, their pre-neuron embeddings and statistics of every site."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from polyseme.capture.hooks import (
    Feed,
    Gather,
    evaluating,
    find_activations,
    first_inputs,
    read_sites,
)
from polyseme.capture.layers import Reading, Site
from polyseme.capture.pool import Pool
from polyseme.capture.select import RandomActive, Selection, Selector, Stream, priorities
from polyseme.capture.statistics import Statistics
from polyseme.errors import InputError

Array = NDArray[Any]
State = dict[str, Array]

N_BACKGROUND = 256


@dataclass(frozen=True)
class Collected:
    """What the pass found at one site.

    Attributes
    ----------
    site : Site
    examples : Selection
        The examples that stand for each neuron.
    random : Selection
        A seeded random sample of the inputs that activate it.
    statistics : dict of str to ndarray
        See `Statistics.result`.
    weights : ndarray of float32, shape (n_neurons, d_in)
    vectors : ndarray of float32, shape (n_vectors, d_in)
        Pre-neuron embeddings of the examples; neurons that meet at an input share one.
    vector : ndarray of int64, shape (n_examples,)
        Row of ``vectors`` of each example.
    background : ndarray of float32, shape (n_groups, m, d_in)
        Pre-neuron embeddings of up to 256 inputs drawn at random, for calibrated metrics.
    windows : ndarray of float16, shape (n_examples, before + 1 + after), optional
        Activations around each example, as shares of its own; NaN beyond the input's ends.
    """

    site: Site
    examples: Selection
    random: Selection
    statistics: dict[str, Array]
    weights: Array
    vectors: Array
    vector: Array
    background: Array
    windows: Array | None = None


class _SiteCollector:
    """Everything that one site accumulates."""

    def __init__(
        self,
        site: Site,
        select: Selector,
        n_random: int,
        seed: int,
        device: torch.device,
        window: tuple[int, int] | None,
    ) -> None:
        self.site = site
        self.window = window
        self.windows = Pool()
        self.examples = Stream(select, site.n_neurons, device)
        self.random = Stream(RandomActive(n_random, seed), site.n_neurons, device)
        self.statistics = Statistics(site.n_neurons, device)
        self.vectors = Pool()
        self.background = Pool()
        self._n_places = 0
        self._seed = seed

    def update(self, reading: Reading, gather: Gather, index: Tensor) -> Tensor:
        """Take in a batch; returns which inputs anything points at, bool of shape (B,)."""
        values, positions = reading.activations, reading.positions
        if not bool(torch.isfinite(values).all()):
            bad = int(index[(~torch.isfinite(values)).any(dim=1)][0])
            raise InputError(
                f"Input {bad} gives activations at site {self.site.name!r} that are NaN or "
                "infinite; finite ones are expected: check the data and the model's weights."
            )
        self.statistics.update(values)
        taken = self.examples.update(values, index, positions)
        drawn = self.random.update(values, index, positions)
        self._add_vectors(taken, positions, gather, index)
        self._add_windows(taken, reading, index)
        self._add_background(reading, gather, index)
        return taken.any(dim=1) | drawn.any(dim=1)

    def _key(self, index: Any, place: Any) -> Any:
        # Inputs have at most 2³¹ places, and there are at most 2³² inputs.
        return index * (1 << 31) + place

    def _add_vectors(self, taken: Tensor, positions: Tensor, gather: Gather, index: Tensor) -> None:
        rows, neurons = taken.nonzero(as_tuple=True)
        if not len(rows):
            return
        places = self.site.place(positions[rows, neurons], neurons)
        # Neurons meet at few places, so marking them is quicker than sorting pairs.
        met = torch.zeros((len(index), int(places.max()) + 1), dtype=torch.bool, device=rows.device)
        met[rows, places] = True
        pairs = met.nonzero(as_tuple=True)
        vectors = gather(pairs[0], pairs[1]).detach().float().cpu().numpy()
        keys = self._key(index[pairs[0]], pairs[1])
        self.vectors.add(keys.cpu().numpy(), vectors)
        if self.vectors.is_bloated:
            self.vectors.keep(self._live_vectors())

    def _add_windows(self, taken: Tensor, reading: Reading, index: Tensor) -> None:
        rows, neurons = taken.nonzero(as_tuple=True)
        if self.window is None or reading.everywhere is None or not len(rows):
            return
        before, after = self.window
        at = reading.positions[rows, neurons][:, None]
        at = at + torch.arange(-before, after + 1, device=at.device)
        n_positions = reading.everywhere.shape[1]
        values = reading.everywhere[
            rows[:, None], at.clamp(0, n_positions - 1), neurons[:, None]
        ].float()
        # Shares of the example's own activation, which is kept in full: half the memory.
        values /= reading.activations[rows, neurons].float()[:, None]
        values = values.clamp(-_LARGEST, _LARGEST)
        values[(at < 0) | (at >= n_positions)] = torch.nan
        keys = self._example_key(neurons, index[rows]).cpu().numpy()
        self.windows.add(keys, values.half().cpu().numpy())
        if self.windows.is_bloated:
            held, inputs, _ = self.examples.held()
            self.windows.keep(self._example_key(held, inputs).cpu().numpy())

    def _example_key(self, neurons: Any, index: Any) -> Any:
        return neurons * (1 << 32) + index

    def _live_vectors(self) -> Array:
        neurons, index, positions = self.examples.held()
        keys: Array = self._key(index, self.site.place(positions, neurons)).cpu().numpy()
        return np.unique(keys)

    def _add_background(self, reading: Reading, gather: Gather, index: Tensor) -> None:
        positions = reading.positions
        order = priorities(index, self._seed)
        known = self.background.state()["keys"]
        wanted = torch.ones_like(index, dtype=torch.bool)
        if reading.counted is not None:
            wanted &= reading.counted
        if len(known) >= N_BACKGROUND:
            wanted &= order < int(known.max())
        rows = wanted.nonzero()[:, 0]
        if not len(rows):
            return
        # The place is one at which some neuron fired most: anywhere else may be padding.
        neuron = order[rows] % positions.shape[1]
        at = positions[rows, neuron]
        groups = torch.arange(self.site.n_groups, device=index.device)
        places = (at[:, None] * self.site.n_groups + groups).flatten()
        found = gather(rows.repeat_interleave(len(groups)), places).detach().float().cpu().numpy()
        keys = order[rows].cpu().numpy()
        self.background.add(keys, found.reshape(len(keys), len(groups), -1))
        lowest = np.sort(self.background.state()["keys"])[:N_BACKGROUND]
        self.background.keep(lowest)

    def result(self) -> Collected:
        examples = self.examples.result()
        neuron = torch.from_numpy(examples.neuron)
        place = self.site.place(torch.from_numpy(examples.position), neuron).numpy()
        wanted = self._key(examples.index, place)
        self.vectors.keep(np.unique(wanted))
        keys, vectors = self.vectors.sorted()
        _, background = self.background.sorted()
        d_in = self.site.d_in
        windows = None
        if self.window is not None:
            width = sum(self.window) + 1
            example = self._example_key(examples.neuron, examples.index)
            self.windows.keep(example)
            known, rows = self.windows.sorted()
            windows = np.empty((0, width), np.float16)
            if rows is not None:
                windows = rows[np.searchsorted(known, example)]
        return Collected(
            windows=windows,
            site=self.site,
            examples=examples,
            random=self.random.result(),
            statistics=self.statistics.result(),
            weights=self.site.weights().float().cpu().numpy().copy(),
            vectors=np.empty((0, d_in), np.float32) if vectors is None else vectors,
            vector=np.searchsorted(keys, wanted).astype(np.int64),
            background=np.empty((self.site.n_groups, 0, d_in), np.float32)
            if background is None
            else np.ascontiguousarray(background.transpose(1, 0, 2)),
        )

    def state(self) -> State:
        parts = {name: getattr(self, name).state() for name in _PARTS}
        return {f"{part}.{name}": a for part, state in parts.items() for name, a in state.items()}

    def restore(self, state: Mapping[str, Array]) -> None:
        for part in _PARTS:
            prefix = f"{part}."
            arrays = {k.removeprefix(prefix): a for k, a in state.items() if k.startswith(prefix)}
            getattr(self, part).restore(arrays)


_PARTS = ("examples", "random", "statistics", "vectors", "background", "windows")
_LARGEST = float(torch.finfo(torch.float16).max)


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
    counted : ndarray or Tensor of bool, shape (B, positions), optional
        Positions that count, such as those that are no padding: no neuron is read at another
        one, and an input without any has activation 0. Without it, those that the attention
        mask in ``inputs`` lets through, or all where there is no such mask.
    """

    inputs: Any
    raw: Array
    labels: Array | None = None
    counted: Any = None

    def positions(self, device: torch.device) -> Tensor | None:
        """Which positions count, bool of shape (B, positions); None for all."""
        counted = self.counted
        if counted is None and isinstance(self.inputs, Mapping):
            counted = self.inputs.get("attention_mask")
            if counted is None and "input_ids" in self.inputs:
                # Says what the batch and the positions are, for models that lay them in one row.
                return torch.ones(
                    tuple(self.inputs["input_ids"].shape), dtype=torch.bool, device=device
                )
        if counted is None:
            return None
        found = torch.as_tensor(counted).to(device).bool()
        if found.ndim != 2 or len(found) != len(self.raw):
            raise InputError(
                f"counted has shape {tuple(found.shape)} for {len(self.raw)} inputs; a value for "
                f"each position, ({len(self.raw)}, positions), is expected."
            )
        return found


def needs_head(model: nn.Module, sites: list[Site]) -> bool:
    """Whether any site is outside the base of a transformers model, such as in its logits."""
    base = getattr(model, "base_model", None)
    if not isinstance(base, nn.Module):
        return True
    inside = set(base.modules())
    return any(site.output_module not in inside for site in sites)


class Collector:
    """The pass over the data, for all sites at once.

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
    ) -> None:
        self._model = model
        self._sites = sites
        self._feed = Feed(model, head=needs_head(model, sites))
        self._collectors = {
            site.name: _SiteCollector(site, select, n_random, seed, self._feed.device, window)
            for site in sites
        }
        self._inputs = Pool()
        self._labels = Pool()
        self._activations_known = False
        #: False while a batch is half taken in, so that the state must not be saved.
        self.is_whole = True
        self.n_inputs = 0
        self.low = np.inf
        self.high = -np.inf

    def run(self, batches: Iterable[Batch]) -> Iterator[int]:
        """Take in the batches; yields the number of inputs so far after each of them.

        The model is in evaluation mode and hooked only while a batch is in it, so a caller may
        stop between batches and go on later.
        """
        for batch in batches:
            self._update(batch)
            yield self.n_inputs

    def _update(self, batch: Batch) -> None:
        n = len(batch.raw)
        self._check(batch.inputs)
        self.is_whole = False
        index = torch.arange(self.n_inputs, self.n_inputs + n, device=self._feed.device)
        wanted = torch.zeros(n, dtype=torch.bool, device=self._feed.device)

        def on_reading(site: Site, reading: Reading, gather: Gather) -> None:
            if len(reading.activations) != n:
                raise InputError(
                    f"Site {site.name!r} gave {len(reading.activations)} rows for {n} inputs; "
                    "the first axis of a layer's output must be the batch."
                )
            wanted.logical_or_(self._collectors[site.name].update(reading, gather, index))

        with evaluating(self._model), torch.no_grad():
            if not self._activations_known:
                few = first_inputs(batch.inputs, 2)
                find_activations(self._model, self._sites, self._feed, few)
                self._activations_known = True
            counted = batch.positions(self._feed.device)
            with read_sites(self._model, self._sites, on_reading, counted):
                self._feed(batch.inputs)
        rows = wanted.cpu().numpy()
        keys = index.cpu().numpy()[rows]
        self._inputs.add(keys, batch.raw[rows])
        if batch.labels is not None:
            self._labels.add(keys, batch.labels[rows])
        self.n_inputs += n
        if self._inputs.is_bloated:
            live = self._live_inputs()
            self._inputs.keep(live)
            self._labels.keep(live)
        self.is_whole = True

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
            bad = (~torch.isfinite(values)).flatten(1).any(dim=1).nonzero()[0, 0].item()
            raise InputError(
                f"Input {self.n_inputs + int(bad)} of the data holds NaN or infinite values; "
                "finite numbers are expected: leave that input out or mend it."
            )
        self.low, self.high = min(self.low, low), max(self.high, high)

    def _live_inputs(self) -> Array:
        held = [
            stream.held()[1]
            for collector in self._collectors.values()
            for stream in (collector.examples, collector.random)
        ]
        live: Array = np.unique(torch.cat(held).cpu().numpy())
        return live

    def result(self) -> tuple[list[Collected], dict[str, Array]]:
        """What each site found, and the inputs that the examples point at.

        Returns
        -------
        collected : list of Collected
        inputs : dict
            ``index`` (m,), ``pixels`` (m, ...) as in `Batch.raw`, and ``labels`` (m,) if known.
        """
        found = [collector.result() for collector in self._collectors.values()]
        live = np.unique(np.concatenate([s.index for c in found for s in (c.examples, c.random)]))
        self._inputs.keep(live)
        self._labels.keep(live)
        index, pixels = self._inputs.sorted()
        inputs = {"index": index}
        if pixels is not None:
            inputs["pixels"] = pixels
        labels = self._labels.sorted()[1]
        if labels is not None:
            inputs["labels"] = labels
        return found, inputs

    def state(self) -> State:
        """Everything, to go on later from here."""
        state: State = {
            "progress": np.array([self.n_inputs]),
            "range": np.array([self.low, self.high], dtype=np.float64),
        }
        parts: dict[str, Any] = {"inputs": self._inputs, "labels": self._labels}
        parts.update({f"site{n}": c for n, c in enumerate(self._collectors.values())})
        for part, holder in parts.items():
            state.update({f"{part}/{name}": array for name, array in holder.state().items()})
        return state

    def restore(self, state: Mapping[str, Array]) -> None:
        """Go on from a `state` of a collector with the same sites and settings."""
        self.n_inputs = int(state["progress"][0])
        self.low, self.high = (float(value) for value in state["range"])
        parts: dict[str, Any] = {"inputs": self._inputs, "labels": self._labels}
        parts.update({f"site{n}": c for n, c in enumerate(self._collectors.values())})
        for part, holder in parts.items():
            prefix = f"{part}/"
            holder.restore(
                {k.removeprefix(prefix): a for k, a in state.items() if k.startswith(prefix)}
            )
