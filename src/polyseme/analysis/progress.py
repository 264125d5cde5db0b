"""Progress on the terminal, and checkpoints of a pass over the data."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from polyseme.capture import Batch, Collector
from polyseme.interrupts import INTERRUPTS, interrupt_between_steps
from polyseme.store.writer import Writer

# Time between two checkpoints, as a multiple of the time it takes to save one.
_BETWEEN_SAVES = 20


@contextmanager
def progress_bars(show: bool) -> Iterator[Progress]:
    with Progress(
        TextColumn("{task.description:<28}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        disable=not show,
    ) as bars:
        yield bars


class Stages:
    """Time spent in each stage of an analysis.

    Attributes
    ----------
    seconds : dict of str to float
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._adding = threading.Lock()

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Add the time spent in the block to a stage."""
        start = time.monotonic()
        try:
            yield
        finally:
            took = time.monotonic() - start
            with self._adding:
                self.seconds[name] = self.seconds.get(name, 0.0) + took

    @contextmanager
    def side_by_side(self) -> Iterator[None]:
        """Divide the time of the block among the stages that threads ran in it."""
        before, start = dict(self.seconds), time.monotonic()
        try:
            yield
        finally:
            took = {name: seconds - before.get(name, 0.0) for name, seconds in self.seconds.items()}
            share = (time.monotonic() - start) / (sum(took.values()) or 1.0)
            self.seconds = {n: before.get(n, 0.0) + share * took[n] for n in self.seconds}

    def rounded(self) -> dict[str, float]:
        """Seconds to a tenth, for run.json."""
        return {name: round(seconds, 1) for name, seconds in self.seconds.items()}


def read_and_save(
    collector: Collector,
    batches: Iterable[Batch],
    writer: Writer,
    show: Callable[[int], None],
    seconds: float,
    *,
    name: str,
    about: Mapping[str, Any],
) -> None:
    """Consume all batches, saving the state from time to time and on an interrupt.

    The state is saved as ``name``, with ``about`` as its metadata. Saving takes at most a twentieth
    of the time.
    """

    def save() -> float:
        start = time.monotonic()
        writer.save_state(name, collector.state(), about)
        collector.saved()
        return time.monotonic() - start

    last = time.monotonic()
    try:
        with interrupt_between_steps() as pause:
            for n in collector.run(batches):
                show(n)
                pause()
                if time.monotonic() - last > seconds:
                    seconds = max(seconds, _BETWEEN_SAVES * save())
                    last = time.monotonic()
    except INTERRUPTS:
        if collector.is_whole:
            save()
        raise


def duration(seconds: float) -> str:
    """Format seconds for people, such as "2 min 5 s"."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{max(1, rest)} s"
