"""The passes over the text: saved now and then, resumed, and read out site after site."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.progress import Progress, TaskID
from torch import nn

from polyseme.analysis.plan import Plan
from polyseme.analysis.progress import read_and_save
from polyseme.capture import Batch, Collected, Collector, Selection, Selector
from polyseme.data.contexts import Contexts, TokenBatch
from polyseme.sites import Feed, Site, evaluating, prove_sites
from polyseme.store import RunWriter

Array = NDArray[Any]

CHECKPOINT_SECONDS = 300.0
_PASSES = "passes"


class TextPasses:
    """One pass over the text for each group of sites, and what they found.

    Parameters
    ----------
    model : torch.nn.Module
    contexts : Contexts
    sites : sequence of Site
    select : Selector
    writer : RunWriter
        Keeps the checkpoints, and files of rows beside them.
    settings : dict
        ``window``, ``random_examples`` and ``seed`` of the analysis.
    batch_size : int
        Contexts in one forward pass.

    Attributes
    ----------
    n_inputs : int
        Contexts read, once the passes are made.
    """

    def __init__(
        self,
        model: nn.Module,
        contexts: Contexts,
        sites: Sequence[Site],
        select: Selector,
        writer: RunWriter,
        settings: dict[str, Any],
        batch_size: int,
    ) -> None:
        self._model, self._contexts, self._sites = model, contexts, list(sites)
        self._select, self._writer, self._settings = select, writer, settings
        self._batch_size = batch_size
        saved = writer.load_state(_PASSES)
        #: Groups whose pass is complete, by the numbers of their sites.
        self._done: list[list[int]] = [] if saved is None else list(saved[1]["groups"])
        self._last: tuple[list[int], Collector] | None = None
        self.n_inputs = 0

    @property
    def left(self) -> list[int]:
        """Numbers of the sites that no complete pass has read."""
        done = {number for group in self._done for number in group}
        return [number for number in range(len(self._sites)) if number not in done]

    def run(self, plan: Plan | None, bars: Progress) -> None:
        """Make the passes of a plan for the sites that are `left`; None if none is."""
        left = self.left
        known = not self._done
        groups = [] if plan is None else [[left[place] for place in part] for part in plan.passes]
        for number, group in enumerate(groups, start=1):
            title = "Reading the text" + (f", {number} of {len(groups)}" if groups[1:] else "")
            task = bars.add_task(title, total=None if plan is None else plan.contexts)
            known &= self._pass(group, bars, task)
        if not known and self._contexts.texts.reiterable:
            self._look_again()
        self.n_inputs = self._of(self._done[-1]).n_inputs

    def _pass(self, group: list[int], bars: Progress, task: TaskID) -> bool:
        """Make one pass; returns whether the model was run, so that its sites are known."""
        collector = self._collector(group)
        if not self._restore(collector, group):
            if self._writer.load_state(_name(group)) is not None:
                # Of another group that began with the same site, under another budget: it goes
                # before the files that it needs.
                self._writer.save_state(_name(group), {}, {"sites": []})
            shutil.rmtree(self._files(group), ignore_errors=True)
        collector.on_smaller_batch = lambda n: bars.console.print(
            f"The device ran out of memory: batches of {n} context{'s' * (n > 1)} from here on."
        )
        start = collector.n_inputs
        bars.update(task, completed=start)
        try:
            read_and_save(
                collector,
                self._batches(start),
                self._writer,
                lambda n: bars.update(task, completed=n),
                CHECKPOINT_SECONDS,
                name=_name(group),
                about={"sites": group},
            )
        except Exception:
            if self._writer.load_state(_name(group)) is None:
                # Nothing that could be gone on with must be in the way of a better try.
                shutil.rmtree(self._files(group), ignore_errors=True)
            raise
        self._writer.save_state(_name(group), collector.state(), {"sites": group})
        collector.saved()
        self._done.append(group)
        self._writer.save_state(_PASSES, {}, {"groups": self._done})
        self._last = (group, collector)
        return collector.n_inputs > start

    def _restore(self, collector: Collector, group: list[int]) -> bool:
        saved = self._writer.load_state(_name(group))
        if saved is None or saved[1].get("sites") != group:
            return False
        collector.restore(saved[0])
        return True

    def _collector(self, group: list[int]) -> Collector:
        before, after = self._settings["window"]
        return Collector(
            self._model,
            [self._sites[number] for number in group],
            self._select,
            n_random=self._settings["random_examples"],
            seed=self._settings["seed"],
            window=(before, after),
            half=True,
            files=self._files(group),
        )

    def _files(self, group: list[int]) -> Path:
        return self._writer.state_folder / f"rows-{group[0]}"

    def _of(self, group: list[int]) -> Collector:
        """The collector of a complete pass; only one of them is in memory."""
        if self._last is None or self._last[0] != group:
            self._last = None
            collector = self._collector(group)
            self._restore(collector, group)
            self._last = (group, collector)
        return self._last[1]

    def results(self) -> Iterator[Collected]:
        """What each site found, in the order of the sites, one in memory at a time."""
        for group in sorted(self._done):
            yield from self._of(group).results()

    def examples(self) -> Iterator[tuple[Site, Selection]]:
        """The examples of each site, in the order of the sites, without what neurons read there."""
        for group in sorted(self._done):
            yield from self._of(group).examples()

    def inputs(self) -> dict[str, Array]:
        """The contexts that the examples of all sites point at, see `Collector.inputs`."""
        parts = [self._of(group).inputs() for group in sorted(self._done)]
        if len(parts) == 1:
            return parts[0]
        index = [part["index"] for part in parts]
        found, first = np.unique(np.concatenate(index), return_index=True)
        merged = {"index": found}
        rows = [part["pixels"] for part in parts if "pixels" in part]
        if rows:
            merged["pixels"] = np.concatenate(rows)[first]
        return merged

    def _look_again(self) -> None:
        """Learn from two contexts what a checkpoint does not hold: the sites' nonlinearities."""
        inputs = model_inputs(next(iter(self._contexts.batches(2))))
        with evaluating(self._model):
            prove_sites(self._model, self._sites, Feed(self._model), inputs)

    def _batches(self, start: int) -> Iterator[Batch]:
        for batch in self._contexts.batches(self._batch_size, start):
            lengths = batch.attention.sum(axis=1, keepdims=True)
            # The length goes along with the tokens: one row an input.
            row = np.concatenate([batch.ids, lengths], axis=1).astype(np.int32)
            yield Batch(model_inputs(batch), row, counted=batch.counted)


def model_inputs(batch: TokenBatch) -> dict[str, Array]:
    """What a model is called with for some contexts."""
    return {"input_ids": batch.ids, "attention_mask": batch.attention.astype(np.int64)}


def _name(group: list[int]) -> str:
    return f"pass-{group[0]}"
