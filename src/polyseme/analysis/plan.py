"""What an analysis will take: passes, memory, disk and time, before it begins."""

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
from polyseme.sites import Feed, Site, evaluating

# What the reading costs beside the model's own work, from the first context on: less over long
# texts, see bench/capture.py.
_OVERHEAD = 1.25
# Bytes that sites which are worked on side by side may take more, where no budget is given.
_BESIDE = 10**9
# Times that the inputs which examples point at are in memory: of two passes, and of both of them.
_KEPT = 3
# Features of three examples or more, for each example: 0.08 of SmolLM2's at the default threshold.
_FEATURES = 0.1


@dataclass(frozen=True)
class Plan:
    """What an analysis will take; estimates, but for the passes.

    Attributes
    ----------
    passes : tuple of tuple of int
        The numbers of the sites that each pass over the data reads.
    sites, neurons : int
    amount : str
        How much data there is.
    memory : int
        Bytes above the loaded model, at most.
    run_bytes, spare_bytes : int
        On disk: of the finished run, and what is needed besides until it is finished.
    side_by_side : int
        How many sites are clustered at a time, after the passes.
    seconds : float, optional
        Of all passes, from a trial; None without one, or where the number of inputs is not known.
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
            f"up to {show_bytes(self.memory)} of memory above the model; disk: "
            f"{show_bytes(self.run_bytes)} for the run, {show_bytes(self.spare_bytes)} more until "
            "it is finished."
        )


def show_bytes(n: int) -> str:
    """Bytes as they are read best, such as "1.4 GB"."""
    for unit, size in (("GB", 1000**3), ("MB", 1000**2), ("kB", 1000)):
        if n >= size:
            return f"{n / size:.1f} {unit}"
    return f"{n} B"


def make_plan(sites: Sequence[Site], data: Data, seconds_an_input: float | None = None) -> Plan:
    """How the sites are shared out among passes, and what that takes.

    Under a budget, rows that examples point at are in files, so memory does not grow with the data
    beyond the buffers that each neuron fills. If those of all sites do not fit in the budget
    together, the data is read several times, for as many sites at a time as fit.

    Parameters
    ----------
    sites : sequence of Site
    data : Data
    seconds_an_input : float, optional
        From a `trial`.

    Raises
    ------
    InputError
        If the budget cannot be met with one site at a time.
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
                f"memory_budget is {show_bytes(memory_budget)}; site {sites[number].name!r} alone, "
                f"and what is held of all sites, needs {show_bytes(alone)} above the model: give "
                "at least that, fewer sites, or a selector of fewer examples."
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
            f"memory_budget is {show_bytes(memory_budget or 0)}, which takes {len(passes)} passes "
            f"over {kind} that can be read but once: give {show_bytes(everything)}, or {kind} that "
            f"can be read again, such as {data.again}."
        )
    memory = max(_needed([sizes[n] for n in numbers], tables, working) for numbers in passes)
    # Much of what is done with a site after the passes is done in one thread, so that several
    # sites take less time together.
    limit = memory + _BESIDE if memory_budget is None else memory_budget

    def later(side_by_side: int) -> int:
        return max(_later([sizes[n] for n in numbers], tables, side_by_side) for numbers in passes)

    side_by_side = min(os.cpu_count() or 1, len(sizes))
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
    """Bytes that one site takes."""

    buffers: int  # in memory during its pass
    sorting: int  # for a moment, while its buffers are sorted out
    later: int  # in memory while it is clustered and written
    tables: int  # of its rows in the run's tables, held until all are written
    inputs: int  # how many, at most: those that its rows point at
    features: int  # how many: those that are compared with one another
    run: int  # on disk, in the run
    spare: int  # on disk, beside it

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
        # Pools hold up to twice what is live, and their keys have room to grow.
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
    """Memory that a pass over these sites takes, or what comes after it, whichever is more."""
    buffers = sum(size.buffers for size in sizes)
    # A checkpoint is copied once, and once more as it is written.
    reading = 3 * buffers + max(working, *(size.sorting for size in sizes))
    return max(reading, _later(sizes, tables))


def _later(sizes: Sequence[_Size], tables: int, side_by_side: int = 1) -> int:
    """Memory that is needed after a pass over these sites, for so many of them at a time."""
    buffers = sum(size.buffers for size in sizes)
    return 2 * buffers + tables + side_by_side * max(size.later for size in sizes)


def _searching(features: int, d: int) -> int:
    """Memory that the search for similar features takes, beside the vectors, which are in files."""
    some, many = min(features, 1024), min(features, 8192)
    basis = 20 * d * d if features > MOST_EXACT else 0
    return 32 * some * many + 4 * d * (some + many) + basis + 1000 * features


def trial(model: nn.Module, data: Data) -> float | None:
    """Seconds that the bare model takes for an input, measured on the first few.

    None where the data can be read but once.
    """
    if not data.repeatable:
        return None
    batch = next(iter(data.batches(min(data.settings.batch_size, data.n_tried), 0)))
    feed = Feed(model, head=False)
    took = []
    with evaluating(model), torch.no_grad():
        # The first time, memory is asked for and kernels are chosen.
        for _ in range(2):
            start = time.perf_counter()
            try:
                feed(batch.inputs)
            except torch.OutOfMemoryError:
                return None
            if feed.device.type == "cuda":
                torch.cuda.synchronize()
            took.append(time.perf_counter() - start)
    return min(took) / len(batch.raw)
