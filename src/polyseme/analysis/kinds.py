"""The interfaces of the stages of an analysis: kinds of data, engines, and what stages pass on."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol, TypeVar

import pandas as pd
from numpy.typing import NDArray
from rich.progress import Progress
from torch import nn

from polyseme.analysis.progress import Stages
from polyseme.analysis.settings import Settings
from polyseme.analysis.site_tables import SiteClusters, cluster_site
from polyseme.attribution.masking import ContextImportances, Places, context_importances
from polyseme.capture import Batch, Collected, Selection
from polyseme.sites import Site
from polyseme.store import RunWriter

Array = NDArray[Any]
Arrays = dict[str, Array]
Result = TypeVar("Result")


class Selected(NamedTuple):
    """What the passes found, except the vectors that neurons read."""

    sites: Sequence[Site]
    examples: Iterator[tuple[Site, Selection]]
    """The examples of each site, in site order."""
    inputs: Arrays
    """``index`` and ``rows`` of the inputs that examples refer to; see `Collector.inputs`."""
    n_inputs: int
    low: float
    high: float
    """The range of values over all inputs."""


class Attributed(NamedTuple):
    """The inputs as stored, the arrays to add to each site, and what labels are made from."""

    inputs: Arrays
    of_sites: list[Arrays]
    wording: Any = None


@dataclass(frozen=True)
class Work:
    """Where the stages of an analysis store, time and report their work."""

    writer: RunWriter
    bars: Progress
    stages: Stages
    shown: bool

    def say(self, text: str) -> None:
        """Print a line above the progress bars, if they are shown."""
        if self.shown:
            self.bars.console.print(text, highlight=False)

    def last(self, title: str, steps: Iterator[tuple[float, Result]]) -> Result:
        """Run all steps, each yielding the fraction completed; returns the last result."""
        task = self.bars.add_task(title, total=1.0)
        for step in steps:
            done, result = step
            self.bars.update(task, completed=done)
        return result

    def once(self, name: str, compute: Callable[[], Arrays]) -> Arrays:
        """Compute arrays once; a resumed analysis loads them."""
        saved = self.writer.load_state(name)
        if saved is not None:
            return saved[0]
        arrays = compute()
        self.writer.save_state(name, arrays, {})
        return arrays


class Data(Protocol):
    """Images or texts, created from a model, the data given to `analyse`, and its `Settings`."""

    settings: Settings
    noun: str  # what an input is called
    again: str  # examples of sources that can be read again
    kind: Literal["images", "texts"]
    half: bool  # whether vectors are kept in half precision
    in_files: bool  # whether rows that examples refer to are kept in files rather than in memory
    repeatable: bool  # whether the data can be read more than once
    total: int | None  # upper bound on the number of inputs, if known
    amount: str  # amount of data, in words
    n_tried: int  # inputs with which to time the model
    places: int | None  # upper bound on the vectors that a layer reads per input, if known
    row_bytes: int  # bytes of an input as stored
    few: Any  # a few inputs of the model, always the same

    def identity(self) -> dict[str, Any]:
        """Metadata that identify the data."""

    def count(self) -> int:
        """Number of inputs, if it is known before they are read."""

    def batches(self, size: int, start: int) -> Iterator[Batch]:
        """Batches of inputs from number ``start`` on, with their rows as the run stores them."""

    def working_bytes(self, sites: Sequence[Site]) -> int:
        """Rough estimate of the memory of a forward pass."""

    def added_bytes(self, site: Site) -> int:
        """Bytes of the arrays added to a site, which are in memory until they are written."""
        return 0

    def attribute(self, selected: Selected, work: Work, engine: Engine) -> Attributed:
        """Find what drives each neuron and what it does."""

    def label(self, tables: dict[str, pd.DataFrame], wording: Any) -> Any:
        """Label the features of a site in its tables; returns what `index` needs."""
        return None

    def index(self, inputs: Arrays, labelled: list[tuple[int, Any]]) -> Arrays:
        """Index of features by label, from each site's number of features and result of `label`."""
        return {}

    def site_info(self, collected: Collected, threshold: float, inputs: Arrays) -> dict[str, Any]:
        """Describe a site for the run's metadata."""

    def metadata(
        self, model: dict[str, Any], identity: dict[str, Any], selected: Selected
    ) -> dict[str, Any]:
        """Describe the model and the data for the run's metadata."""


class Found(Protocol):
    """Results of reading the data."""

    def selected(self) -> Selected:
        """The examples of all sites, and the inputs that they refer to."""

    def results(self) -> Iterator[Collected]:
        """The results for each site, one in memory at a time."""


class Engine(ABC):
    """Does the work: reads the data, masks its tokens and clusters what was found."""

    stage: str
    """Name under which the reading time is recorded."""
    at_a_time: int | None = None
    """Maximum sites clustered at a time, if memory allows; None for the number of cores."""

    @contextmanager
    def at_work(self) -> Iterator[None]:
        """The context in which the engine reads and clusters."""
        yield

    def check(self, prepared: Any) -> dict[str, Any]:
        """Check the analysis before anything is written; returns additional metadata."""
        return {}

    @abstractmethod
    def read(self, work: Work) -> Found:
        """Read the data, or the results of other processes that read it."""

    def cluster(self, collected: Collected, threshold: float, linkage: str) -> SiteClusters:
        """See `cluster_site`."""
        return cluster_site(collected, threshold, linkage)

    def importances(
        self,
        model: nn.Module,
        sites: Sequence[Site],
        ids: Array,
        attention: Array,
        places: Sequence[Places],
        *,
        start: int,
        **options: Any,
    ) -> Iterator[ContextImportances]:
        """See `context_importances`."""
        return context_importances(model, sites, ids, attention, places, start=start, **options)
