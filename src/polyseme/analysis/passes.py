"""Passes over the data: checkpointed, resumed, and read out one site at a time."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from rich.progress import Progress
from torch import nn

from polyseme.analysis.kinds import Arrays, Data, Selected
from polyseme.analysis.plan import Plan
from polyseme.analysis.progress import read_and_save
from polyseme.capture import Batch, Collected, Collector
from polyseme.capture.collect import first_of
from polyseme.sites import Site
from polyseme.store.writer import Writer

Group = list[int]

CHECKPOINT_SECONDS = 60.0
_PASSES = "passes"


class Passes:
    """One pass over the data for each group of sites, and the results.

    Parameters
    ----------
    model : torch.nn.Module
    data : Data
    sites : sequence of Site
    writer : Writer
        Writes the checkpoints.
    bars : Progress
    part : (int, int), optional
        Read only the inputs from the first number up to, but not including, the second.
    """

    def __init__(
        self,
        model: nn.Module,
        data: Data,
        sites: Sequence[Site],
        writer: Writer,
        bars: Progress,
        part: tuple[int, int] | None = None,
    ) -> None:
        self._model, self._data, self._sites = model, data, list(sites)
        self._writer, self._bars = writer, bars
        self._first = 0 if part is None else part[0]
        self._stop = None if part is None else part[1]
        saved = self._writer.load_state(_PASSES)
        #: Groups whose pass is complete, by the numbers of their sites.
        self._done: list[Group] = [] if saved is None else list(saved[1]["groups"])
        self._last: tuple[Group, Collector] | None = None

    @property
    def remaining(self) -> list[int]:
        """Numbers of the sites that no complete pass has read."""
        done = {number for group in self._done for number in group}
        return [number for number in range(len(self._sites)) if number not in done]

    def run(self, plan: Plan | None) -> None:
        """Run the passes of a plan for the `remaining` sites; the plan is None if none remain."""
        remaining = self.remaining
        groups = (
            [] if plan is None else [[remaining[place] for place in part] for part in plan.passes]
        )
        for number, group in enumerate(groups, start=1):
            title = "Reading the data" + (f", {number} of {len(groups)}" if groups[1:] else "")
            self._pass(group, title)

    def _pass(self, group: Group, title: str) -> None:
        collector, in_files = self._collector(group)
        if collector.n_inputs == self._first:
            if self._writer.load_state(_name(group)) is not None:
                # State of another group that began with the same site, under another budget:
                # remove it before the files that it needs.
                self._writer.save_state(_name(group), {}, {"sites": []})
            shutil.rmtree(self._files(group), ignore_errors=True)
        noun = self._data.noun
        collector.on_smaller_batch = lambda n: self._bars.console.print(
            f"The device ran out of memory: batches of {n} {noun}{'s' * (n > 1)} from here on."
        )
        bars, first = self._bars, self._first
        total = self._data.total if self._stop is None else self._stop - first
        task = bars.add_task(title, total=total, completed=collector.n_inputs - first)
        about = {"sites": group, "in_files": in_files}
        try:
            read_and_save(
                collector,
                self._batches(collector.n_inputs),
                self._writer,
                lambda n: bars.update(task, completed=n - first),
                CHECKPOINT_SECONDS,
                name=_name(group),
                about=about,
            )
        except Exception:
            if self._writer.load_state(_name(group)) is None:
                # There is nothing to resume, so nothing may block the next attempt.
                shutil.rmtree(self._files(group), ignore_errors=True)
            raise
        self._writer.save_state(_name(group), collector.state(), about)
        collector.saved()
        self._done.append(group)
        self._writer.save_state(_PASSES, {}, {"groups": self._done})
        self._last = (group, collector)

    def _batches(self, start: int) -> Iterator[Batch]:
        if self._stop is not None and start >= self._stop:
            return
        for batch in self._data.batches(self._data.settings.batch_size, start):
            start += len(batch.raw)
            if self._stop is not None and start > self._stop:
                yield first_of(batch, len(batch.raw) - (start - self._stop))
            else:
                yield batch
            if self._stop is not None and start >= self._stop:
                return

    def _collector(self, group: Group) -> tuple[Collector, bool]:
        """The collector of a group, resumed where it stopped, and whether its rows are in files.

        A pass that has begun keeps its rows where they are, even if the budget has changed.
        """
        settings = self._data.settings
        state, about = self._writer.load_state(_name(group)) or ({}, {})
        begun = about.get("sites") == group
        in_files = bool(about.get("in_files", True)) if begun else self._data.in_files
        collector = Collector(
            self._model,
            [self._sites[number] for number in group],
            settings.select,
            n_random=settings.random_examples,
            seed=settings.seed,
            window=settings.window,
            half=self._data.half,
            files=self._files(group) if in_files else None,
            first=self._first,
        )
        if begun:
            collector.restore(state)
        return collector, in_files

    def _files(self, group: Group) -> Path:
        return self._writer.state_folder / f"rows-{group[0]}"

    def _of(self, group: Group) -> Collector:
        """The collector of a complete pass; only one is in memory at a time."""
        if self._last is None or self._last[0] != group:
            self._last = None
            self._last = (group, self._collector(group)[0])
        return self._last[1]

    def results(self) -> Iterator[Collected]:
        """The results for each site, in site order, one in memory at a time."""
        for group in sorted(self._done):
            yield from self._of(group).results()

    def parts(self) -> Iterator[dict[str, np.ndarray]]:
        """The results for each site in this part of the data; see `SiteCollector.part`."""
        for group in sorted(self._done):
            yield from self._of(group).parts()

    def held(self) -> tuple[Arrays, float, float]:
        """The inputs that an example may refer to, and the range of values over all inputs."""
        inputs: Arrays = {}
        for group in sorted(self._done):
            collector = self._of(group)
            new = collector.inputs(held=True)
            inputs = _merged(inputs, new) if inputs else new
        return inputs, collector.low, collector.high

    def selected(self) -> Selected:
        """The examples of all sites, and the inputs that they refer to."""
        groups = sorted(self._done)
        inputs: Arrays = {}
        for group in groups:
            collector = self._of(group)
            inputs = _merged(inputs, collector.inputs()) if inputs else collector.inputs()
        examples = (pair for group in groups for pair in self._of(group).examples())
        range_of_all = collector.low, collector.high
        return Selected(self._sites, examples, inputs, collector.n_inputs, *range_of_all)


def _merged(inputs: Arrays, others: Arrays) -> Arrays:
    """Merge the inputs of two passes, without duplicates."""
    index = np.union1d(inputs["index"], others["index"])
    merged = {"index": index}
    for name in (inputs.keys() | others.keys()) - {"index"}:
        holders = [part for part in (inputs, others) if name in part]
        rows = np.empty((len(index), *holders[0][name].shape[1:]), holders[0][name].dtype)
        for part in holders:
            rows[np.searchsorted(index, part["index"])] = part[name]
        merged[name] = rows
    return merged


def _name(group: Group) -> str:
    return f"pass-{group[0]}"
