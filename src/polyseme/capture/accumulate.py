"""What one site accumulates during the pass over the data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from polyseme.capture.background import Background
from polyseme.capture.moments import Moments
from polyseme.capture.pool import Pool
from polyseme.capture.select import RandomActive, Selector
from polyseme.capture.statistics import Statistics
from polyseme.capture.stream import Picked, Selection, Stream
from polyseme.core import Neurons
from polyseme.errors import InputError
from polyseme.sites.hooks import Gather
from polyseme.sites.reading import Reading
from polyseme.sites.site import Site

Array = NDArray[Any]

N_BACKGROUND = 256


@dataclass(frozen=True)
class Collected:
    """What the pass found at one site.

    Attributes
    ----------
    site : Site
    examples : Selection
        The examples of each neuron.
    random : Selection
        A seeded random sample of the inputs that activate each neuron.
    statistics : dict of str to ndarray
        See `Statistics.result`.
    neurons : Neurons
        How the neurons read their input.
    vectors : ndarray of float32 or float16, shape (n_vectors, d_in)
        Pre-neuron embeddings of the examples; neurons that read the same input vector share a row.
    vector : ndarray of int64, shape (n_examples,)
        Row of ``vectors`` of each example.
    background : ndarray of float32, shape (n_groups, m, d_in)
        Pre-neuron embeddings of up to 256 inputs drawn at random, for calibrated metrics.
    mean : ndarray of float64, shape (n_groups, d_in)
    covariance : ndarray of float64, shape (n_groups, d_in, d_in)
        Mean and covariance of what each group of neurons reads, at a few positions of every input.
    n_moments : int
        Number of vectors behind them.
    windows : ndarray of float16, shape (n_examples, before + 1 + after), optional
        Activations around each example, relative to its own; NaN outside the input.
    """

    site: Site
    examples: Selection
    random: Selection
    statistics: dict[str, Array]
    neurons: Neurons
    vectors: Array
    vector: Array
    background: Array
    mean: Array
    covariance: Array
    n_moments: int
    windows: Array | None = None


class SiteCollector:
    """Everything that one site accumulates, in CPU memory.

    Parameters
    ----------
    site : Site
    select, draw : Selector
        Select a neuron's examples, and additional random ones.
    window : (int, int), optional
        Numbers of positions before and after each example whose activations are kept.
    half : bool
        Store vectors as float16, as long as they fit.
    files : Path, optional
        Folder in which to store vectors and windows instead of in memory.
    first : int
        Number of the first input, if this is a part of the data.

    Attributes
    ----------
    n_inputs : int
        Number of inputs processed, plus those before the first.
    """

    def __init__(
        self,
        site: Site,
        select: Selector,
        draw: RandomActive,
        window: tuple[int, int] | None,
        half: bool,
        files: Path | None,
        first: int = 0,
    ) -> None:
        self.site = site
        self.window = window
        self.half = half
        self.examples = Stream(select, site.n_neurons)
        self.random = Stream(draw, site.n_neurons)
        self.statistics = Statistics(site.n_neurons)
        self.background = Background(site, N_BACKGROUND)
        self.moments = Moments(site, draw.seed)
        # Vectors are shared and wide: in memory, unused ones are dropped as soon as that pays off.
        most = site.n_neurons * select.capacity if files else 0
        self.vectors = Pool(files and files / "vectors", most)
        self.windows = Pool(files and files / "windows", site.n_neurons * Stream.width(select))
        self.n_inputs = first

    def update(
        self, reading: Reading, gather: Gather, index: Tensor, order: Tensor, wanted: Tensor
    ) -> None:
        """Process a batch, or the rest of it if part was processed before.

        Parameters
        ----------
        reading, gather
            From `read_sites`.
        index : Tensor of int64, shape (B,)
            Numbers of the inputs.
        order : Tensor of int64, shape (B,)
            Their priorities as background.
        wanted : Tensor of bool, shape (B,)
            Set to True for the inputs that are referred to.
        """
        values = reading.activations.float().cpu()
        # NaN and infinity survive a sum; every value is checked only if the sum is not finite.
        if not bool(torch.isfinite(values.sum())) and not bool(torch.isfinite(values).all()):
            bad = int(index[(~torch.isfinite(values)).any(dim=1)][0])
            raise InputError(
                f"Input {bad} gives NaN or infinite activations at site {self.site.name!r}; "
                f"expected finite ones. Check the data and the model's weights."
            )
        room = min(self.examples.room, self.random.room)
        start = self.n_inputs - int(index[0])
        for first in range(start, len(values), room):
            part = slice(first, first + room)
            few = (
                (values, index)
                if len(values) <= room and not first
                else (values[part], index[part])
            )
            self._update(reading, gather, *few, order[part], first, wanted[part])
        self._let_go()

    def _update(
        self,
        reading: Reading,
        gather: Gather,
        values: Tensor,
        index: Tensor,
        order: Tensor,
        start: int,
        wanted: Tensor,
    ) -> None:
        taken = self.examples.pick(values, index)
        drawn = self.random.pick(values, index)
        # Work on the device comes first, so that running out of memory leaves nothing half done.
        device = reading.activations.device
        behind = self.background.wanted(reading, order, start)
        # All places together, as each gather has a fixed cost.
        groups = (taken, drawn, behind)
        parts = [len(group.rows) for group in groups]
        all_rows = (torch.cat([group.rows for group in groups]) + start).to(device)
        all_neurons = torch.cat([group.neurons for group in groups]).to(device)
        positions, random_positions, background_positions = torch.split(
            reading.locate(all_rows, all_neurons), parts
        )
        rows, _, background_rows = torch.split(all_rows, parts)
        neurons = all_neurons[: parts[0]]
        vectors = self._vectors(rows, positions, neurons, gather, index, start)
        windows = self._windows(rows, neurons, positions, reading, values, taken)
        read = self.background.read(gather, background_rows, background_positions)
        moments = self.moments.read(reading, gather, index, start)
        if self.window is not None:  # the inputs are texts, their positions tokens
            here = reading.active(slice(start, start + len(values)))
            self.statistics.update_positions(*here)

        self.statistics.update(values)
        self.examples.add(taken, values, index, positions.cpu())
        self.random.add(drawn, values, index, random_positions.cpu())
        self.vectors.add(*vectors)
        if windows is not None:
            self.windows.add(self._example_key(taken.neurons, index[taken.rows]).numpy(), windows)
        self.background.add(behind, read)
        self.moments.add(moments)
        wanted[taken.rows] = True
        wanted[drawn.rows] = True
        self.n_inputs += len(values)

    def _let_go(self, *, of_all: bool = False) -> None:
        """Drop unused rows: from the pools where that pays off, or from all of them."""
        vectors, windows = (of_all or pool.is_bloated for pool in (self.vectors, self.windows))
        if not (vectors or windows):
            return
        neurons, index, positions = self.examples.held()
        if vectors:
            keys: Array = self._key(index, self.site.place(positions, neurons)).numpy()
            self.vectors.keep(keys)
        if windows:
            self.windows.keep(self._example_key(neurons, index).numpy())

    def _key(self, index: Any, place: Any) -> Any:
        # Inputs have at most 2³¹ places, and there are at most 2³¹ inputs.
        return index * (1 << 31) + place

    def _example_key(self, neurons: Any, index: Any) -> Any:
        return index * self.site.n_neurons + neurons

    def _vectors(
        self,
        rows: Tensor,
        positions: Tensor,
        neurons: Tensor,
        gather: Gather,
        index: Tensor,
        start: int,
    ) -> tuple[Array, Array]:
        """Input vectors at these places: keys (m,), vectors (m, d_in)."""
        if not len(rows):
            return np.empty(0, np.int64), np.empty((0, self.site.d_in), np.float32)
        places = self.site.place(positions, neurons)
        # Neurons share few places, so marking these is faster than sorting pairs.
        shape = (start + len(index), int(places.max()) + 1)
        met = torch.zeros(shape, dtype=torch.bool, device=rows.device)
        met[rows, places] = True
        row, place = met.nonzero(as_tuple=True)
        vectors = gather(row, place).detach().float()
        if self.half:
            vectors = _halved(vectors)
        keys = self._key(index[row.cpu() - start], place.cpu())
        return keys.numpy(), vectors.cpu().numpy()

    def _windows(
        self,
        rows: Tensor,
        neurons: Tensor,
        positions: Tensor,
        reading: Reading,
        values: Tensor,
        taken: Picked,
    ) -> Array | None:
        """Activations around these places relative to that at the place, (m, width)."""
        if self.window is None or not len(rows):
            return None
        shares = reading.around(rows, neurons, positions, *self.window)
        # Relative to the example's own activation, which is stored in full: half the memory.
        shares /= values[taken.rows, taken.neurons].to(shares.device)[:, None]
        return np.asarray(shares.clamp_(-_LARGEST, _LARGEST).half().cpu().numpy())

    def result(self) -> Collected:
        examples = self.examples.result()
        neuron = torch.from_numpy(examples.neuron)
        place = self.site.place(torch.from_numpy(examples.position), neuron).numpy()
        keys, vector = np.unique(self._key(examples.index, place), return_inverse=True)
        vectors = self.vectors.take(keys)
        if vectors is None:
            vectors = np.empty((0, self.site.d_in), np.float16 if self.half else np.float32)
        elif self.half and vectors.dtype == np.float32 and _fits(vectors):
            # The vector that did not fit belongs to no final example.
            vectors = vectors.astype(np.float16)
        windows = None
        if self.window is not None:
            windows = self.windows.take(self._example_key(examples.neuron, examples.index))
            if windows is None:
                windows = np.empty((0, sum(self.window) + 1), np.float16)
        mean, covariance = self.moments.result()
        return Collected(
            windows=windows,
            site=self.site,
            examples=examples,
            random=self.random.result(),
            statistics=self.statistics.result(),
            neurons=self.site.neurons(),
            vectors=vectors,
            vector=vector.astype(np.int64),
            background=self.background.result(),
            mean=mean,
            covariance=covariance,
            n_moments=self.moments.n,
        )

    def inputs(self) -> Array:
        """Inputs that the examples refer to, with repetitions."""
        return np.concatenate([self.examples.result().index, self.random.result().index])

    def held(self) -> tuple[Tensor, Tensor]:
        """Inputs that candidate examples refer to, with repetitions."""
        return self.examples.held()[1], self.random.held()[1]

    def state(self) -> dict[str, Array]:
        parts = {name: getattr(self, name).state() for name in _PARTS}
        return {f"{part}.{name}": a for part, state in parts.items() for name, a in state.items()}

    def restore(self, state: Mapping[str, Array], n_inputs: int) -> None:
        for part in _PARTS:
            getattr(self, part).restore(below(state, part))
        self.n_inputs = n_inputs

    def part(self) -> dict[str, Array]:
        """Results for its part of the data, as arrays for `merge`."""
        state = self.state()  # reduces the candidates
        self._let_go(of_all=True)
        for name in _POOLS:
            state = {key: a for key, a in state.items() if not key.startswith(f"{name}.")}
            state |= {f"{name}.{key}": a for key, a in getattr(self, name).part().items()}
        return state

    def merge(self, part: Mapping[str, Array]) -> None:
        """Merge the `part` of another collector of the same site, over other inputs.

        Parts may come in any order and grouping.
        """
        for name in _PARTS:
            getattr(self, name).merge(below(part, name))
        self._let_go()


def below(state: Mapping[str, Array], name: str) -> dict[str, Array]:
    """The arrays under one prefix of a state, by their names without it."""
    prefix = f"{name}."
    return {k.removeprefix(prefix): a for k, a in state.items() if k.startswith(prefix)}


_POOLS = ("vectors", "windows")
_PARTS = ("examples", "random", "statistics", "vectors", "background", "moments", "windows")
_LARGEST = float(torch.finfo(torch.float16).max)


def _halved(vectors: Tensor) -> Tensor:
    """Convert to float16; if any is too large, all to float32, the others rounded to float16."""
    halves = vectors.half()
    low, high = vectors.aminmax()
    if max(-float(low), float(high)) <= _LARGEST:
        return halves
    fits = (vectors.abs() <= _LARGEST).all(dim=1, keepdim=True)
    # So that a vector does not depend on the others in its batch.
    return torch.where(fits, halves.float(), vectors)


def _fits(vectors: Array) -> bool:
    return not len(vectors) or max(-float(vectors.min()), float(vectors.max())) <= _LARGEST
