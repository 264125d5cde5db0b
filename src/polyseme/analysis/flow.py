"""The stages from a model and data to a run: plan, pass, select, attribute, cluster, write, check.

Each stage uses the results of earlier ones. Attribution needs only the examples, so it comes before
clustering; each site is then written once, complete.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from threading import Lock
from typing import Any, NamedTuple

import pandas as pd
from numpy.typing import NDArray
from torch import nn

from polyseme.analysis.describe import behaviour, describe_model, made_by_hand
from polyseme.analysis.feature_search import SimilarFeatures, room_for_similar
from polyseme.analysis.kinds import Attributed, Data, Engine, Found, Work
from polyseme.analysis.passes import Passes
from polyseme.analysis.plan import Plan, make_plan, trial
from polyseme.analysis.probing import probe
from polyseme.analysis.progress import Stages, progress_bars
from polyseme.analysis.site_tables import site_arrays, site_tables
from polyseme.capture import Collected
from polyseme.capture.collect import needs_head
from polyseme.core.parallel import in_threads
from polyseme.core.space import ENOUGH
from polyseme.options import Job
from polyseme.sites import Feed, Site, evaluating, find_sites, prove_sites, sites_that_run
from polyseme.store import RunFolder, RunWriter
from polyseme.views import Run


@dataclass(frozen=True)
class Prepared:
    """What is known about an analysis before any data is read.

    Attributes
    ----------
    sites : list of Site
        Sites that the model runs.
    about, identity, settings : dict
        Descriptions of the model, the data and the options, as stored in a run's metadata.
    fingerprint : dict
        Identifies the analysis.
    """

    sites: list[Site]
    about: dict[str, Any]
    identity: dict[str, Any]
    settings: dict[str, Any]
    fingerprint: dict[str, Any]


def prepare(job: Job, data: Data) -> Prepared:
    """Find the sites and compute the fingerprint of the analysis."""
    model, sites = job.model, find_sites(job.model, job.sites, exclude=job.exclude)
    chosen = sites_that_run(model, sites, data.few)
    about, identity = describe_model(model), data.identity()
    settings = data.settings.described()
    feed = Feed(model, head=data.settings.panels or needs_head(model, chosen))
    fingerprint = {
        "sites": [site.name for site in chosen],
        "settings": {name: value for name, value in settings.items() if name != "batch_size"},
        "model": {**about, **behaviour(model, feed, data.few)},
        "data": identity,
        **made_by_hand(chosen),
    }
    return Prepared(chosen, about, identity, settings, fingerprint)


def run_analysis(job: Job, data: Data, engine: Engine | None = None) -> Run:
    """Run all stages and return the run; by default this process does all work."""
    engine = engine or _ThisProcess(job.model, data)
    stages, out = Stages(), job.out
    with stages("preparation"):
        prepared = prepare(job, data)
        chosen = prepared.sites
        # Raises before anything is written if the budget is too small.
        make_plan(chosen, data)
        extra = engine.check(prepared)
    fingerprint = {**prepared.fingerprint, **extra}
    with RunWriter(
        out, fingerprint=fingerprint, overwrite=job.overwrite, resume=job.resume
    ) as writer:
        if writer.finished:
            return Run(RunFolder(out), probe)
        showing = progress_bars(job.progress)
        with showing as bars, SimilarFeatures(writer) as similar, engine.at_work():
            work = Work(writer, bars, stages, job.progress)
            with stages(engine.stage):
                found = engine.read(work)
            with stages("selection"):
                selected = found.selected()
            attributed = data.attribute(selected, work, engine)
            plan = make_plan(chosen, data, at_a_time=engine.at_a_time)
            clustered = _cluster(
                data, engine, found.results(), attributed, similar, plan.side_by_side, work
            )
            _write(data, attributed, clustered, similar, work)
        # Outside the bars, as a run written to a URL shows a bar of its own.
        path = writer.finish(
            {
                "sites": clustered.infos,
                "seconds": stages.rounded(),
                "settings": prepared.settings,
                **data.metadata(prepared.about, prepared.identity, selected),
                **extra,
            }
        )
    return Run(RunFolder(path), probe)


class _ThisProcess(Engine):
    """Does all the work in this process, in as many passes as the memory budget requires."""

    stage = "reading"

    def __init__(self, model: nn.Module, data: Data) -> None:
        self._model, self._data = model, data
        self._sites: list[Site] = []

    def check(self, prepared: Prepared) -> dict[str, Any]:
        self._sites = prepared.sites
        return {}

    def read(self, work: Work) -> Found:
        if work.writer.resumed:
            prove_again(self._model, self._sites, self._data)
        passes = Passes(self._model, self._data, self._sites, work.writer, work.bars)
        remaining = [self._sites[number] for number in passes.remaining]
        passes.run(plan_of(self._model, self._data, remaining, work.say if work.shown else None))
        return passes


def prove_again(model: nn.Module, sites: list[Site], data: Data) -> None:
    """Prove sites again: neither a checkpoint nor a shard stores what that finds out."""
    with evaluating(model):
        prove_sites(model, sites, Feed(model), data.few)


def plan_of(
    model: nn.Module, data: Data, sites: list[Site], say: Callable[[str], None] | None
) -> Plan | None:
    """Plan the passes for the remaining sites and report the plan; None if no site remains."""
    if not sites:
        return None
    plan = make_plan(sites, data, trial(model, sites, data) if say else None)
    if say:
        say(str(plan))
    return plan


class _OfSite(NamedTuple):
    """Results for a site, except its arrays, which are already written."""

    site: Site
    info: dict[str, Any]
    tables: dict[str, pd.DataFrame]
    labelled: Any
    directions: NDArray[Any]


@dataclass
class _Clustered:
    """Results for the sites so far, in site order."""

    infos: list[dict[str, Any]] = field(default_factory=list)
    labelled: list[tuple[int, Any]] = field(default_factory=list)
    tables: dict[str, list[pd.DataFrame]] = field(default_factory=lambda: defaultdict(list))

    def add(self, new: _OfSite, similar: SimilarFeatures) -> None:
        """Add the next site."""
        similar.add(new.site, new.tables["features"], new.directions)
        self.infos.append(new.info)
        self.labelled.append((len(new.tables["features"]), new.labelled))
        for name, table in new.tables.items():
            self.tables[name].append(table)


def _cluster(
    data: Data,
    engine: Engine,
    results: Iterator[Collected],
    attributed: Attributed,
    similar: SimilarFeatures,
    side_by_side: int,
    work: Work,
) -> _Clustered:
    """Cluster, label and write all sites, ``side_by_side`` at a time."""
    n_sites = len(attributed.of_sites)
    task = work.bars.add_task("Features", total=n_sites)
    numbers, taking, adding = iter(range(n_sites)), Lock(), Lock()
    clustered, ready = _Clustered(), dict[int, _OfSite]()

    def next_site(_: int) -> None:
        with taking:
            number = next(numbers)
            with work.stages("selection"):
                collected = next(results)
        of_site = _cluster_site(data, engine, number, collected, attributed, work)
        with adding:
            ready[number] = of_site
            # In site order, whichever is ready first.
            while len(clustered.infos) in ready:
                with work.stages("similar features"):
                    clustered.add(ready.pop(len(clustered.infos)), similar)
                work.bars.update(task, advance=1)

    with work.stages.side_by_side():
        in_threads(next_site, range(n_sites), side_by_side)
    return clustered


def _cluster_site(
    data: Data,
    engine: Engine,
    number: int,
    collected: Collected,
    attributed: Attributed,
    work: Work,
) -> _OfSite:
    site = collected.site
    threshold = data.settings.threshold or site.default_threshold(data.kind)
    with work.stages("clusters"):
        clusters = engine.cluster(collected, threshold, data.settings.linkage)
    with work.stages("tables"):
        tables = site_tables(collected, clusters)
    with work.stages("labels"):
        labelled = data.label(tables, attributed.wording)
    with work.stages("writing"):
        room = room_for_similar(len(tables["features"]))
        arrays = {**site_arrays(collected, clusters), **room}
        work.writer.write_site(number, {**arrays, **attributed.of_sites[number]})
    info = data.site_info(collected, threshold, attributed.inputs)
    if collected.n_moments < ENOUGH * site.d_in:
        work.say(
            f"Site {site.name!r}: its statistics come from {collected.n_moments:,} vectors of "
            f"{site.d_in:,} values; the number of meanings is reliable from about "
            f"{ENOUGH * site.d_in:,} vectors. Give more {data.noun}s."
        )
    return _OfSite(site, info, tables, labelled, clusters.directions)


def _write(
    data: Data,
    attributed: Attributed,
    clustered: _Clustered,
    similar: SimilarFeatures,
    work: Work,
) -> None:
    """Write what all sites share: similar features, inputs and tables."""
    with work.stages("similar features"):
        similar.write(work.bars)
    with work.stages("writing"):
        index = data.index(attributed.inputs, clustered.labelled)
        work.writer.write_inputs({**attributed.inputs, **index})
        tables = {
            name: pd.concat(frames, ignore_index=True) for name, frames in clustered.tables.items()
        }
        work.writer.write_tables(**tables)
