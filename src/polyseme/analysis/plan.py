"""Estimates of what an analysis needs: passes, memory, disk and time."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from polyseme.analysis.kinds import Data
from polyseme.analysis.progress import duration
from polyseme.analysis.site_tables import BLOCK_BYTES
from polyseme.capture import RandomActive, Stream
from polyseme.capture.accumulate import N_BACKGROUND
from polyseme.capture.statistics import Statistics
from polyseme.core.similar import MOST_EXACT
from polyseme.errors import InputError
from polyseme.sites import Feed, Site, evaluating, stopping_after

# Time of reading relative to the bare model, from the first context on; lower for long texts, see
# bench/capture.py.
_OVERHEAD = 1.25
# Extra bytes that clustering several sites at a time may use if no budget is given.
_BESIDE = 10**9
# Copies in memory of the inputs that examples refer to: those of two passes, and both merged.
_KEPT = 3
# Features that are compared, per example: 0.045 for SmolLM2 at the default threshold.
_FEATURES = 0.06


@dataclass(frozen=True)
class Plan:
    """What an analysis needs. All but the passes are estimates.

    Attributes
    ----------
    passes : tuple of tuple of int
        Numbers of the sites that each pass over the data reads.
    sites, neurons : int
    amount : str
        Amount of data, in words.
    memory : int
        Peak in bytes, excluding the loaded model.
    run_bytes, spare_bytes : int
        Disk space of the finished run, and the extra space needed until it is finished.
    side_by_side : int
        Number of sites clustered at a time, after the passes.
    seconds : float, optional
        Time of all passes, from a trial; None without one, or if the number of inputs is unknown.
    """

    passes: tuple[tuple[int, ...], ...]
    sites: int
    neurons: int
    amount: str
    memory: int
    run_bytes: int
    spare_bytes: int
    side_by_side: int
    seconds: float | None = None

    def __str__(self) -> str:
        n = len(self.passes)
        took = "" if self.seconds is None else f", about {duration(self.seconds)}"
        return (
            f"Plan: {self.sites} site{'s' * (self.sites > 1)}, {self.neurons:,} neurons; "
            f"{self.amount}; {n} pass{'es' * (n > 1)} over it{took}; "
            f"up to {show_bytes(self.memory)} of memory, excluding the model; disk: "
            f"{show_bytes(self.run_bytes)} for the run, {show_bytes(self.spare_bytes)} more until "
            "it is finished."
        )


def show_bytes(n: int) -> str:
    """Format a number of bytes, such as "1.4 GB"."""
    for unit, size in (("GB", 1000**3), ("MB", 1000**2), ("kB", 1000)):
        if n >= size:
            return f"{n / size:.1f} {unit}"
    return f"{n} B"


def make_plan(
    sites: Sequence[Site],
    data: Data,
    seconds_an_input: float | None = None,
    *,
    at_a_time: int | None = None,
) -> Plan:
    """Divide the sites among passes, and estimate what these need.

    Under a budget, rows that examples refer to are kept in files, so memory does not grow with the
    data beyond each neuron's buffers. If the buffers of all sites do not fit in the budget, the
    data is read several times, each time for as many sites as fit.

    Parameters
    ----------
    sites : sequence of Site
    data : Data
    seconds_an_input : float, optional
        Time of the bare model per input, from `trial`.
    at_a_time : int, optional
        Maximum sites clustered at a time, if memory allows; by default the number of cores.

    Raises
    ------
    InputError
        If the budget cannot be met even with one site at a time, or requires several passes over
        data that can be read only once.
    """
    memory_budget, total = data.settings.memory_budget, data.total
    sizes = [_Size.estimate(site, data) for site in sites]
    working = data.working_bytes(sites)
    pointed = sum(size.inputs for size in sizes)
    kept = data.row_bytes * (pointed if total is None else min(pointed, total))
    tables = sum(size.tables for size in sizes) + _KEPT * kept
    in_the_end = tables + _searching(
        sum(size.features for size in sizes), max(site.d_in for site in sites)
    )
    passes: list[list[int]] = []
    for number, size in enumerate(sizes):
        alone = max(in_the_end, _needed([size], tables, working))
        if memory_budget is not None and alone > memory_budget:
            raise InputError(
                f"memory_budget is {show_bytes(memory_budget)}; site {sites[number].name!r} alone "
                f"and the data kept for all sites need {show_bytes(alone)}, excluding the model: "
                "give at least that, fewer sites, or a selector of fewer examples."
            )
        together = [*(sizes[n] for n in passes[-1]), size] if passes else [size]
        fits = memory_budget is None or _needed(together, tables, working) <= memory_budget
        if passes and fits:
            passes[-1].append(number)
        else:
            passes.append([number])
    if len(passes) > 1 and not data.repeatable:
        everything, kind = _needed(sizes, tables, working), data.settings.kind
        raise InputError(
            f"memory_budget is {show_bytes(memory_budget or 0)}, which requires {len(passes)} "
            f"passes over {kind} that can be read only once: give {show_bytes(everything)}, or "
            f"{kind} that can be read again, such as {data.again}."
        )
    memory = max(_needed([sizes[n] for n in numbers], tables, working) for numbers in passes)
    # Much of the work on a site after the passes is single-threaded, so several sites at a time
    # take less time in total.
    limit = memory + _BESIDE if memory_budget is None else memory_budget

    def later(side_by_side: int) -> int:
        return max(_later([sizes[n] for n in numbers], tables, side_by_side) for numbers in passes)

    side_by_side = min(at_a_time or os.cpu_count() or 1, len(sizes))
    while side_by_side > 1 and later(side_by_side) > limit:
        side_by_side -= 1
    return Plan(
        passes=tuple(tuple(numbers) for numbers in passes),
        sites=len(sites),
        neurons=sum(site.n_neurons for site in sites),
        amount=data.amount,
        memory=max(memory, later(side_by_side), in_the_end),
        run_bytes=sum(size.run for size in sizes) + kept,
        spare_bytes=sum(size.spare for size in sizes) + 2 * kept,
        side_by_side=side_by_side,
        seconds=None
        if seconds_an_input is None or total is None
        else total * seconds_an_input * len(passes) * _OVERHEAD,
    )


@dataclass(frozen=True)
class _Size:
    """What one site needs, in bytes unless noted."""

    buffers: int  # in memory during its pass
    sorting: int  # in memory briefly, while its buffers are sorted
    later: int  # in memory while it is clustered and written
    tables: int  # in memory, its rows of the run's tables until all are written
    inputs: int  # upper bound on the number of inputs that its rows refer to
    features: int  # number of features that are compared with each other
    run: int  # on disk, in the run
    spare: int  # on disk, beside the run until it is finished

    @classmethod
    def estimate(cls, site: Site, data: Data) -> _Size:
        n, d = site.n_neurons, site.d_in
        select, total, places = data.settings.select, data.total, data.places
        draw = RandomActive(data.settings.random_examples)

        def most(a_neuron: int) -> int:
            return n * (a_neuron if total is None else min(a_neuron, total))

        def vectors(examples: int) -> int:
            return examples if total is None or places is None else min(examples, total * places)

        held = most(Stream.width(select))
        chosen = most(select.capacity)
        # Pools hold up to twice their live rows, and their keys have room to grow.
        keys = int(8 * 1.25 * 2 * (held + vectors(held)))
        buffers = (
            n * Stream.bytes_a_neuron(select)
            + n * Stream.bytes_a_neuron(draw)
            + n * Statistics.bytes_a_neuron()
            + 4 * N_BACKGROUND * site.n_groups * d
            + 8 * site.n_groups * d * d
        )
        windows = 2 * (sum(data.settings.window) + 1) if data.settings.window else 0
        number = 2 if data.half else 4
        added = data.added_bytes(site)
        run = number * d * vectors(chosen) + (windows + 70) * chosen + 12 * d * n
        rows = 2 * (number * d * vectors(held) + windows * held)
        return cls(
            buffers=buffers + keys + (0 if data.in_files else rows),
            sorting=64 * n * Stream.width(select),
            later=4 * 4 * d * vectors(chosen)
            + 40 * site.n_groups * d * d
            + 4 * windows * chosen
            + 4 * min(BLOCK_BYTES * (os.cpu_count() or 1), 4 * d * chosen)
            + 12 * d * n,
            tables=150 * chosen + 80 * most(draw.k) + added,
            inputs=chosen + most(draw.k),
            features=int(_FEATURES * chosen),
            run=run + 30 * most(draw.k) + 4 * site.n_groups * d * d + 50 * chosen + added,
            spare=(rows if data.in_files else 3 * rows) + 3 * buffers,
        )


def _needed(sizes: Sequence[_Size], tables: int, working: int) -> int:
    """Memory needed by a pass over these sites or by the work after it, whichever is more."""
    buffers = sum(size.buffers for size in sizes)
    # A checkpoint is a copy of the buffers, and writing it makes another.
    reading = 3 * buffers + max(working, *(size.sorting for size in sizes))
    return max(reading, _later(sizes, tables))


def _later(sizes: Sequence[_Size], tables: int, side_by_side: int = 1) -> int:
    """Memory needed after a pass over these sites, for ``side_by_side`` of them at a time."""
    buffers = sum(size.buffers for size in sizes)
    return 2 * buffers + tables + side_by_side * max(size.later for size in sizes)


def _searching(features: int, d: int) -> int:
    """Memory of the search for similar features, excluding the vectors, which are in files."""
    some, many = min(features, 1024), min(features, 8192)
    basis = 20 * d * d if features > MOST_EXACT else 0
    return 32 * some * many + 4 * d * (some + many) + basis + 1000 * features


def trial(model: nn.Module, sites: Sequence[Site], data: Data) -> float | None:
    """Measure the bare model's seconds per input up to the last site, on the first few inputs.

    Returns None if the data can be read only once, or the device runs out of memory.
    """
    if not data.repeatable:
        return None
    batch = next(iter(data.batches(min(data.settings.batch_size, data.n_tried), 0)))
    feed = Feed(model, head=False)
    took = []
    with evaluating(model), torch.no_grad():
        # The first run also allocates memory and selects kernels.
        for _ in range(2):
            start = time.perf_counter()
            try:
                with stopping_after(sites):
                    feed(batch.inputs)
            except torch.OutOfMemoryError:
                return None
            if feed.device.type == "cuda":
                torch.cuda.synchronize()
            took.append(time.perf_counter() - start)
    return min(took) / len(batch.raw)
