"""What the stages of an analysis ask of a kind of data, and what they hand on."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol, TypeVar

import pandas as pd
from numpy.typing import NDArray
from rich.progress import Progress

from polyseme.analysis.progress import Stages
from polyseme.analysis.settings import Settings
from polyseme.analysis.site_tables import SiteClusters, cluster_site
from polyseme.capture import Batch, Collected, Selection
from polyseme.sites import Site
from polyseme.store import RunWriter

Array = NDArray[Any]
Arrays = dict[str, Array]
Result = TypeVar("Result")


class Selected(NamedTuple):
    """What the passes have found, but for what neurons read."""

    sites: Sequence[Site]
    examples: Iterator[tuple[Site, Selection]]
    """Those of each site, in the order of the sites."""
    inputs: Arrays
    """``index`` and ``rows`` of the inputs that examples point at, see `Collector.inputs`."""
    n_inputs: int
    low: float
    high: float
    """The range of all inputs' values."""


class Attributed(NamedTuple):
    """What is stored of the inputs, what is added to each site, and what labels go by."""

    inputs: Arrays
    of_sites: list[Arrays]
    wording: Any = None


@dataclass(frozen=True)
class Work:
    """Where the stages of an analysis keep, time and show what they do."""

    writer: RunWriter
    bars: Progress
    stages: Stages
    shown: bool

    def say(self, text: str) -> None:
        """Print a line above the progress, if that is shown."""
        if self.shown:
            self.bars.console.print(text, highlight=False)

    def last(self, title: str, steps: Iterator[tuple[float, Result]]) -> Result:
        """Take all steps, each with the share that is done; returns what the last one gives."""
        task = self.bars.add_task(title, total=1.0)
        for step in steps:
            done, result = step
            self.bars.update(task, completed=done)
        return result

    def once(self, name: str, compute: Callable[[], Arrays]) -> Arrays:
        """Arrays that are computed once: a resumed analysis finds them."""
        saved = self.writer.load_state(name)
        if saved is not None:
            return saved[0]
        arrays = compute()
        self.writer.save_state(name, arrays, {})
        return arrays


class Data(Protocol):
    """Images or texts; made of a model, what `analyse` was given, and its `Settings`."""

    settings: Settings
    noun: str  # what an input is called
    again: str  # what gives the inputs as often as one likes
    kind: Literal["images", "texts"]
    half: bool  # whether vectors are kept in half precision
    in_files: bool  # whether rows that examples point at are kept in files, and not in memory
    repeatable: bool  # whether the data can be read more than once
    total: int | None  # number of inputs at most, where it is known
    amount: str  # how much it is, for people
    n_tried: int  # inputs to try the model's speed with
    places: int | None  # vectors that a layer reads in an input at most, where it is known
    row_bytes: int  # of an input as it is stored
    few: Any  # inputs of the model, a few that are always the same

    def identity(self) -> dict[str, Any]:
        """What tells the data from other data."""

    def count(self) -> int:
        """How many inputs there are, where that can be told before they are read."""

    def batches(self, size: int, start: int) -> Iterator[Batch]:
        """Inputs from number ``start`` on, with their rows as the run is to store them."""

    def working_bytes(self, sites: Sequence[Site]) -> int:
        """Rough, of a forward pass."""

    def added_bytes(self, site: Site) -> int:
        """Of what is added to a site, which is in memory until it is written."""
        return 0

    def attribute(self, selected: Selected, work: Work) -> Attributed:
        """Find what drives the neurons, and what they do."""

    def label(self, tables: dict[str, pd.DataFrame], wording: Any) -> Any:
        """Label the features of a site, in its tables; returns what `index` needs of it."""
        return None

    def index(self, inputs: Arrays, labelled: list[tuple[int, Any]]) -> Arrays:
        """What finds features by their labels; of each site, their number and its `label`."""
        return {}

    def site_info(self, collected: Collected, threshold: float, inputs: Arrays) -> dict[str, Any]:
        """A site as the run's metadata hold it."""

    def metadata(
        self, model: dict[str, Any], identity: dict[str, Any], selected: Selected
    ) -> dict[str, Any]:
        """The model and the data as the run's metadata hold them."""


class Found(Protocol):
    """What reading the data has found."""

    def selected(self) -> Selected:
        """The examples of all sites, and the inputs that they point at."""

    def results(self) -> Iterator[Collected]:
        """What was found at each site, one in memory at a time."""


class Engine(ABC):
    """Where the work is done: reading the data, and clustering what was found."""

    stage: str
    """What the time of reading goes by."""
    side_by_side: int | None = None
    """Sites clustered at a time; None for as many as this process's memory and cores take."""

    @contextmanager
    def at_work(self) -> Iterator[None]:
        """For as long as it reads and clusters."""
        yield

    def check(self, prepared: Any) -> dict[str, Any]:
        """Refuse what does not fit, before anything is written; returns additional metadata."""
        return {}

    @abstractmethod
    def read(self, work: Work) -> Found:
        """Read the data, or what other processes found in it."""

    def cluster(self, collected: Collected, threshold: float, linkage: str) -> SiteClusters:
        """See `cluster_site`."""
        return cluster_site(collected, threshold, linkage)
