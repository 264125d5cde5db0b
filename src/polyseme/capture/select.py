"""Selection of a neuron's examples, in one pass and bounded memory.

A selector takes activations, batch by batch, never a model. Its final choice is exactly what it
would choose from all activations at once, for any batching, ties included.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from polyseme.errors import InputError

_NOT_YET = torch.iinfo(torch.int64).max


def _whole(name: str, value: Any, least: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < least:
        raise InputError(f"{name} is {value!r}; a whole number of at least {least} is expected.")
    return int(value)


def _number(name: str, value: Any, least: float, most: float, *, open_below: bool) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = float("nan")
    above = number > least if open_below else number >= least
    if not (above and number <= most and np.isfinite(number)):
        low = f"greater than {least:g}" if open_below else f"at least {least:g}"
        high = f" and at most {most:g}" if np.isfinite(most) else ""
        raise InputError(f"{name} is {value!r}; a number {low}{high} is expected.")
    return number


def priorities(index: Tensor, seed: int) -> Tensor:
    """Pseudo-random order of inputs: a number in [0, 2⁶³) for each index.

    It depends only on the index and the seed, so a sample of the lowest is the same for any
    batching and on any device (the finaliser of splitmix64); int64 in the shape of ``index``.
    """
    mask = (1 << 63) - 1

    def signed(value: int) -> int:
        return value - (1 << 64) if value >= 1 << 63 else value

    x = index.long() * signed(0x9E3779B97F4A7C15) + signed(
        (seed * 0xD1342543DE82EF95 + 1) % (1 << 64)
    )
    x = (x ^ ((x >> 30) & ((1 << 34) - 1))) * signed(0xBF58476D1CE4E5B9)
    x = (x ^ ((x >> 27) & ((1 << 37) - 1))) * signed(0x94D049BB133111EB)
    return (x ^ ((x >> 31) & ((1 << 33) - 1))) & mask


@dataclass(frozen=True)
class Kept:
    """Activations that neurons keep, in order of arrival.

    Attributes
    ----------
    values : Tensor of float, shape (n_neurons, width)
        Activations; 0 in empty slots.
    index : Tensor of int, shape (n_neurons, width)
        Number of the input.
    valid : Tensor of bool, shape (n_neurons, width)
        Whether the slot is filled.
    maximum : Tensor of float, shape (n_neurons,)
        Largest activation seen so far.
    """

    values: Tensor
    index: Tensor
    valid: Tensor
    maximum: Tensor


class Selector(ABC):
    """How a neuron's examples are chosen. Only positive activations count."""

    @property
    @abstractmethod
    def capacity(self) -> int:
        """Maximum number of examples per neuron that `reduce` leaves."""

    @abstractmethod
    def reduce(self, kept: Kept) -> Tensor:
        """Which activations may still be chosen, whatever follows: bool, (n_neurons, width).

        The result must not depend on how often it is called, and it must keep everything that
        `choose` would choose.
        """

    def choose(self, kept: Kept) -> Tensor:
        """Which activations are chosen, now that all have been seen."""
        return self.reduce(kept)

    def threshold(self, kept: Kept) -> Tensor | None:
        """Activation that later ones must exceed to matter, (n_neurons,); None if there is none.

        It may be called before `reduce`.
        """
        return None

    def wanted(self, values: Tensor, index: Tensor, threshold: Tensor | None) -> Tensor:
        """Which new activations may matter: bool, shape of ``values`` (B, n_neurons)."""
        return values > 0 if threshold is None else values > threshold

    @property
    def strongest_first(self) -> bool:
        """Whether examples are ordered by activation rather than by position in the data."""
        return True


def _kth(by: Tensor, k: int) -> Tensor:
    """The k-th smallest value of each row, (n, 1)."""
    if by.device.type == "cpu":
        return torch.from_numpy(np.partition(by.numpy(), k - 1, axis=1)[:, k - 1 : k])
    return by.kthvalue(k, dim=1, keepdim=True).values


def _first(kept: Kept, by: Tensor, k: int) -> Tensor:
    """The k slots with the lowest ``by``, ties to the earlier input: bool, shape of ``by``."""
    by = by.masked_fill(~kept.valid, torch.inf if by.is_floating_point() else _NOT_YET)
    last = _kth(by, k)
    below, ties = by < last, by == last
    room = k - below.sum(dim=1, keepdim=True)
    return (below | (ties & (ties.cumsum(dim=1) <= room))) & kept.valid


def _rank(kept: Kept, by: Tensor) -> Tensor:
    """Rank of each slot by ascending ``by``, ties to the earlier input; empty slots last."""
    worst = torch.inf if by.is_floating_point() else _NOT_YET
    order = by.masked_fill(~kept.valid, worst).argsort(dim=1, stable=True)
    places = torch.arange(by.shape[1], device=by.device).expand_as(order)
    return torch.empty_like(order).scatter_(1, order, places)


@dataclass(frozen=True)
class TopK(Selector):
    """The k strongest activations; ties go to the earlier input.

    Parameters
    ----------
    k : int
        Maximum number of examples per neuron.
    """

    k: int = 100

    def __post_init__(self) -> None:
        _whole("k", self.k, 1)

    @property
    def capacity(self) -> int:
        return self.k

    def reduce(self, kept: Kept) -> Tensor:
        return _first(kept, -kept.values, self.k)

    def threshold(self, kept: Kept) -> Tensor | None:
        # A later equal activation loses the tie, so it may be skipped.
        # Empty slots hold 0.
        return _kth(kept.values, kept.values.shape[1] - self.k + 1)[:, 0].clamp(min=0)


@dataclass(frozen=True)
class AboveFraction(Selector):
    """Activations of at least a fraction of the neuron's maximum, the strongest first.

    Parameters
    ----------
    fraction : float
        In (0, 1]; the paper's recipe for language models is 0.75.
    max_examples : int
        Maximum number of examples per neuron; the strongest are kept.
    """

    fraction: float = 0.75
    max_examples: int = 100

    def __post_init__(self) -> None:
        _number("fraction", self.fraction, 0, 1, open_below=True)
        _whole("max_examples", self.max_examples, 1)

    @property
    def capacity(self) -> int:
        return self.max_examples

    def reduce(self, kept: Kept) -> Tensor:
        strong = kept.values >= self.fraction * kept.maximum[:, None]
        return _first(kept, -kept.values, self.max_examples) & strong

    def threshold(self, kept: Kept) -> Tensor | None:
        return TopK(self.max_examples).threshold(kept)


@dataclass(frozen=True)
class FirstActive(Selector):
    """The first inputs, in the order of the data, with an activation of at least a minimum.

    Parameters
    ----------
    n : int
        Maximum number of examples per neuron.
    minimum : float
        Smallest activation that counts, at least 0; the published SAE results use 0.005. With 0,
        any positive activation counts.
    """

    n: int = 100
    minimum: float = 0.0

    def __post_init__(self) -> None:
        _whole("n", self.n, 1)
        _number("minimum", self.minimum, 0, np.inf, open_below=False)

    @property
    def capacity(self) -> int:
        return self.n

    def reduce(self, kept: Kept) -> Tensor:
        # Slots are filled in the order of the data.
        return kept.valid & (kept.valid.cumsum(dim=1) <= self.n)

    def threshold(self, kept: Kept) -> Tensor | None:
        full = kept.valid.sum(dim=1) >= self.n
        return torch.zeros_like(kept.maximum).masked_fill(full, torch.inf)

    def wanted(self, values: Tensor, index: Tensor, threshold: Tensor | None) -> Tensor:
        return super().wanted(values, index, threshold) & (values >= self.minimum)

    @property
    def strongest_first(self) -> bool:
        return False


@dataclass(frozen=True)
class Stratified(Selector):
    """The same number of activations from each band, to cover behaviours below the top.

    The bands have equal widths and cover (0, maximum] of the neuron. Each yields k / bins
    examples, a seeded random sample of its inputs. A band with fewer yields all of them, and the
    remainder goes to no other band (such a band may also lose a few at its very edge, see below).
    If k is not a multiple of bins, the upper bands yield one more.

    Parameters
    ----------
    k : int
        Maximum number of examples per neuron.
    bins : int
        Number of bands, at most k.
    seed : int
        Seed of the sample.

    Notes
    -----
    The bands are known only at the end, with the maximum. Until then, samples are kept for the
    cells of a grid that is at least four times as fine and whose spacing is a power of two: as the
    maximum grows, cells merge, and nothing that a merged cell needs has been dropped. The final
    choice is made from these samples, at the exact edges of the bands. A band's edge may cross a
    cell, so a band with few examples can lose those in it to a crowded neighbour; a band with
    plenty still yields exactly its share, from the cells wholly inside it.
    """

    k: int = 100
    bins: int = 10
    seed: int = 0

    def __post_init__(self) -> None:
        _whole("k", self.k, 1)
        _whole("bins", self.bins, 1)
        _whole("seed", self.seed, 0)
        if self.bins > self.k:
            raise InputError(
                f"bins is {self.bins} and k is {self.k}; expected at most one bin per example. "
                f"Raise k or lower bins."
            )

    @property
    def _per_band(self) -> int:
        return -(-self.k // self.bins)

    @property
    def _cells(self) -> int:
        return 1 << (8 * self.bins - 1).bit_length()

    @property
    def capacity(self) -> int:
        return self._cells * self._per_band

    def _rank_in(self, kept: Kept, group: Tensor) -> Tensor:
        """Rank by priority among the slots of the same group."""
        rank = _rank(kept, priorities(kept.index, self.seed))
        width = rank.shape[1]
        key = (group * width + rank).masked_fill(~kept.valid, _NOT_YET)
        ordered, order = key.sort(dim=1)
        groups = ordered // width
        places = torch.arange(width, device=rank.device).expand_as(order)
        starts = torch.ones_like(groups, dtype=torch.bool)
        starts[:, 1:] = groups[:, 1:] != groups[:, :-1]
        first = torch.where(starts, places, 0).cummax(dim=1).values
        return torch.empty_like(order).scatter_(1, order, places - first)

    def reduce(self, kept: Kept) -> Tensor:
        unit = torch.ldexp(torch.ones_like(kept.maximum), torch.frexp(kept.maximum).exponent)
        # A power of two divides without rounding, so members never move to another cell.
        cell = (kept.values / unit[:, None] * self._cells).floor().long()
        return kept.valid & (self._rank_in(kept, cell) < self._per_band)

    def choose(self, kept: Kept) -> Tensor:
        keep = self.reduce(kept)
        remaining = Kept(kept.values, kept.index, keep, kept.maximum)
        share = kept.values.double() / kept.maximum[:, None].double()
        band = (share.nan_to_num() * self.bins).ceil().long().clamp(1, self.bins) - 1
        bands = torch.arange(self.bins, device=band.device)
        quota = self.k // self.bins + (bands >= self.bins - self.k % self.bins).long()
        return keep & (self._rank_in(remaining, band) < quota[band])


@dataclass(frozen=True)
class RandomActive(Selector):
    """A seeded random sample of the inputs that activate a neuron, including weakly.

    Parameters
    ----------
    k : int
        Maximum number of examples per neuron.
    seed : int
        Seed of the sample.
    """

    k: int = 16
    seed: int = 0

    def __post_init__(self) -> None:
        _whole("k", self.k, 1)
        _whole("seed", self.seed, 0)

    @property
    def capacity(self) -> int:
        return self.k

    def _order(self, index: Tensor, neurons: Tensor) -> Tensor:
        # The neuron's number enters the hash; otherwise all neurons would show the same few inputs.
        return priorities((index.long() << 24) + neurons, self.seed)

    def _order_kept(self, kept: Kept) -> Tensor:
        neurons = torch.arange(len(kept.index), device=kept.index.device)
        return self._order(kept.index, neurons[:, None])

    def reduce(self, kept: Kept) -> Tensor:
        return _first(kept, self._order_kept(kept), self.k)

    def threshold(self, kept: Kept) -> Tensor | None:
        # Here the threshold is a priority to stay below, not an activation to exceed.
        order = self._order_kept(kept).masked_fill(~kept.valid, _NOT_YET)
        return _kth(order, self.k)[:, 0]

    def wanted(self, values: Tensor, index: Tensor, threshold: Tensor | None) -> Tensor:
        active = values > 0
        if threshold is None:
            return active
        return active & (self._order_new(index, values.shape[1]) < threshold)

    def _order_new(self, index: Tensor, n_neurons: int) -> Tensor:
        # Cached, as all sites of a model request the same inputs in turn.
        known: tuple[Tensor, Tensor] | None = self.__dict__.get("_last")
        if known is None or known[0] is not index or known[1].shape[1] < n_neurons:
            neurons = torch.arange(n_neurons, device=index.device)
            known = (index, self._order(index[:, None], neurons))
            object.__setattr__(self, "_last", known)
        return known[1][:, :n_neurons]

    @property
    def strongest_first(self) -> bool:
        return False
