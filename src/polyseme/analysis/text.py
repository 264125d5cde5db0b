"""From a language model and texts to a run: one pass, then trees, labels and logit effects."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from threading import Lock
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from rich.progress import Progress
from torch import nn

from polyseme.analysis.describe import (
    behaviour,
    check_options,
    describe_model,
    describe_selector,
    few_tokens,
    made_by_hand,
    plain,
)
from polyseme.analysis.importances import estimated_seconds, mask_token, site_importances
from polyseme.analysis.passes import TextPasses
from polyseme.analysis.plan import Plan, make_plan, memory_bytes, trial
from polyseme.analysis.probing import probe
from polyseme.analysis.progress import Stages, duration, progress_bars
from polyseme.analysis.records import cluster_site, site_arrays, site_tables
from polyseme.analysis.similar import SimilarFeatures, room_for_similar
from polyseme.analysis.words import Wording, readings, token_index
from polyseme.attribution.logits import LogitLens
from polyseme.capture import Collected, Selector, TopK
from polyseme.capture.collect import needs_head
from polyseme.core.arrays import check_linkage, check_threshold
from polyseme.core.parallel import in_threads
from polyseme.data.contexts import Contexts
from polyseme.data.tokens import pieces
from polyseme.errors import InputError, one_of
from polyseme.sites import Feed, Site, find_sites, sites_that_run
from polyseme.sites.language import loaded_name
from polyseme.sites.transformer import check_whole, is_transformer
from polyseme.sites.trial import random_tokens
from polyseme.sites.unembedding import unembedding
from polyseme.store import RunWriter, vocabulary_arrays
from polyseme.views import Run, open_run

Array = NDArray[Any]

WINDOW, _WIDEST = (20, 10), 1024
TOKENS_AT_ONCE = 4096
LOGITS = 10
IMPORTANCES = ("none", "exact")


def analyse_text(
    model: nn.Module,
    contexts: Contexts,
    *,
    sites: str | Site | Iterable[str | Site],
    exclude: str | Iterable[str] = (),
    out: str | Path,
    select: Selector | None = None,
    threshold: float | None = None,
    linkage: str = "average",
    window: tuple[int, int] = WINDOW,
    importances: str = "none",
    random_examples: int = 16,
    seed: int = 0,
    batch_size: int | None = None,
    memory_budget: int | str | None = None,
    overwrite: bool = False,
    resume: bool = False,
    progress: bool = True,
) -> Run:
    """Find which text activates each neuron, split it into features, and write it all to a run.

    The text is read once, for all sites together. Each neuron has at most one example in a
    context: the place where it fires most, among the tokens that count (`Contexts`).

    Parameters
    ----------
    model : torch.nn.Module
        A language model of transformers.
    contexts : Contexts
    sites : str, Site, or a list of them
        Names or globs: ``"model.layers.*.mlp"`` for the neurons of every MLP. An SAE at a hook
        point becomes a site by `polyseme.attach_sae`.
    out : str or Path
        Folder of the run.
    select : Selector, optional
        Which examples stand for a neuron; by default ``TopK(100)``. The paper's are
        ``AboveFraction(0.75, 100)``.
    threshold : float, optional
        Cosine distance in (0, 2] at which trees are cut; 0.5 by default, 0.05 for SAEs.
    linkage : {"average", "single"}
    window : (int, int)
        Tokens before and after each example that are kept with their activations.
    importances : {"none", "exact"}
        Whether to find, by masking, how much of each example's activation rests on each token
        of its window; see `polyseme.attribution.tokens.token_importances`. For a causal model it
        costs about as much as reading ``window[0] + 1`` times the contexts that examples are
        in, so it is left out unless asked for, and can be had later, neuron by neuron, by
        `polyseme.analysis.importances.neuron_importances`.
    exclude, random_examples, seed, overwrite, resume, progress
        As for `analyse`.
    batch_size : int, optional
        Contexts in one forward pass, by default 4,096 tokens; as for `analyse`.
    memory_budget : int or str, optional
        Memory that may be used above the loaded model and the libraries at work: bytes, or such
        as "4GB". If it does not do for all sites together, the text is read several times, for
        some of them each. What is found does not depend on it. The plan is printed first, unless
        ``progress`` is off.

    Returns
    -------
    Run

    Raises
    ------
    InputError, SiteError, RunError
        As `analyse`.

    References
    ----------
    A. Foote, *Tackling Polysemanticity with Neuron Embeddings*, arXiv 2411.08166 (2024).
    """
    select = TopK() if select is None else select
    if batch_size is None:
        batch_size = max(1, TOKENS_AT_ONCE // contexts.length)
    check_options(model, select, batch_size=batch_size, random_examples=random_examples)
    threshold = None if threshold is None else check_threshold(threshold)
    check_linkage(linkage)
    before, after = _check_window(window)
    if importances not in IMPORTANCES:
        raise InputError(one_of("kind of importances", str(importances), IMPORTANCES))
    _check_length(model, contexts)
    check_whole(model, "texts")
    # What a tokenizer lacks is missed after the pass otherwise.
    pieces(contexts.tokenizer, [0])
    stages = Stages()
    with stages("preparation"):
        found = find_sites(model, sites, exclude=exclude)
        if is_transformer(model):
            found = sites_that_run(model, found, random_tokens(model))
        about, text = describe_model(model), contexts.identity()
        by_hand = made_by_hand(found)
    feed = Feed(model, head=needs_head(model, found))
    settings = {
        "select": describe_selector(select),
        "threshold": threshold,
        "linkage": linkage,
        "window": [before, after],
        "importances": importances,
        "mask_id": mask_token(contexts.tokenizer) if importances == "exact" else None,
        "random_examples": int(random_examples),
        "seed": plain(seed),
        "batch_size": int(batch_size),
    }
    fingerprint = {
        "sites": [site.name for site in found],
        "settings": {key: value for key, value in settings.items() if key != "batch_size"},
        "model": {**about, **behaviour(model, feed, few_tokens(model, contexts.length))},
        "data": text,
        **by_hand,
    }
    # Refused before anything is written, if it is too little.
    budget = memory_bytes(memory_budget)
    plan = partial(
        make_plan,
        contexts=contexts,
        select=select,
        window=(before, after),
        random_examples=random_examples,
        batch_size=batch_size,
        memory_budget=budget,
    )
    side_by_side = plan(found).side_by_side
    with RunWriter(out, fingerprint=fingerprint, overwrite=overwrite, resume=resume) as writer:
        if writer.finished:
            return open_run(out, probe=probe)
        work = _TextAnalysis(model, contexts, found, writer, settings, stages, progress)
        return work.run(select, about, text, plan, side_by_side)


def _check_length(model: nn.Module, contexts: Contexts) -> None:
    """Refuse contexts longer than the model was made for; some models take them all the same."""
    limit = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    if isinstance(limit, int) and contexts.length > limit > 0:
        raise InputError(
            f"The contexts have {contexts.length:,} tokens, and the model takes at most {limit:,}; "
            f"give Contexts(..., length={limit}) or less (--context)."
        )


def _check_window(window: Any) -> tuple[int, int]:
    try:
        before, after = (int(n) for n in window)
    except (TypeError, ValueError):
        before = after = -1
    if min(before, after) < 0 or max(before, after) > _WIDEST:
        raise InputError(
            f"window is {window!r}; the numbers of tokens before and after an example, each from "
            f"0 to {_WIDEST}, are expected: (20, 10)."
        )
    return before, after


class _OfSite(NamedTuple):
    """What a site comes to besides its arrays, which are written by then."""

    site: Site
    info: dict[str, Any]
    tables: dict[str, pd.DataFrame]
    words: Array
    directions: Array


@dataclass
class _OfSites:
    """What the sites so far come to."""

    infos: list[dict[str, Any]] = field(default_factory=list)
    words: list[Array] = field(default_factory=list)
    tables: dict[str, list[pd.DataFrame]] = field(default_factory=lambda: defaultdict(list))


class _TextAnalysis:
    """The stages of one analysis."""

    def __init__(
        self,
        model: nn.Module,
        contexts: Contexts,
        sites: list[Site],
        writer: RunWriter,
        settings: dict[str, Any],
        stages: Stages,
        progress: bool,
    ) -> None:
        self.model, self.contexts, self.sites, self.writer = model, contexts, sites, writer
        self.settings, self.stages = settings, stages
        self.show = progress

    def run(
        self,
        select: Selector,
        about: dict[str, Any],
        text: dict[str, Any],
        plan: Callable[..., Plan],
        side_by_side: int,
    ) -> Run:
        with progress_bars(self.show) as bars, SimilarFeatures(self.writer) as similar:
            with self.stages("reading"):
                passes = self.read(select, plan, bars)
            with self.stages("selection"):
                kept = passes.inputs()
            with self.stages("logits"):
                logits = self.logits(bars)
            inputs, words = self.inputs(kept, logits)
            before, after = self.settings["window"]
            self.wording = Wording(inputs, words, (before, after))
            with self.stages("importances"):
                importances = self.importances(passes, inputs, bars)
            more = [{**one, **other} for one, other in zip(logits, importances, strict=True)]
            found = self.features(passes.results(), more, similar, side_by_side, bars)
            with self.stages("similar features"):
                similar.write(bars)
            with self.stages("writing"):
                index = token_index(found.words, len(inputs["vocabulary"]))
                self.writer.write_inputs({**inputs, **index})
                self.writer.write_tables(
                    **{
                        name: pd.concat(frames, ignore_index=True)
                        for name, frames in found.tables.items()
                    }
                )
            path = self.writer.finish(
                {
                    "sites": found.infos,
                    "seconds": self.stages.rounded(),
                    "settings": self.settings,
                    "model": {**about, "name": loaded_name(self.model)},
                    "data": {"kind": "text", "n_inputs": passes.n_inputs, **text},
                }
            )
        return open_run(path, probe=probe)

    def read(self, select: Selector, plan: Callable[..., Plan], bars: Progress) -> TextPasses:
        """The passes over the text, after a word on what they will take."""
        passes = TextPasses(
            self.model,
            self.contexts,
            self.sites,
            select,
            self.writer,
            self.settings,
            self.settings["batch_size"],
        )
        planned = None
        if left := [self.sites[number] for number in passes.left]:
            seconds = None
            if self.show:
                seconds = trial(self.model, self.contexts, self.settings["batch_size"])
            planned = plan(left, seconds_a_context=seconds)
            if self.show:
                bars.console.print(str(planned), highlight=False)
        passes.run(planned, bars)
        return passes

    def inputs(
        self, kept: dict[str, Array], logits: list[dict[str, Array]]
    ) -> tuple[dict[str, Array], list[str]]:
        """The contexts that examples point at, and how every token in the run reads."""
        rows = kept.get("pixels", np.empty((0, self.contexts.length + 1), np.int32))
        tokens, lengths = rows[:, :-1], rows[:, -1]
        named = [arrays[name].ravel() for arrays in logits for name in arrays if "tokens" in name]
        used = np.unique(
            np.concatenate([tokens[np.arange(tokens.shape[1]) < lengths[:, None]], *named])
        )
        words = readings(self.contexts.tokenizer, used.tolist())
        arrays = {
            "index": kept["index"],
            "tokens": tokens,
            "lengths": lengths,
            **vocabulary_arrays(used, words),
        }
        return arrays, words

    def features(
        self,
        results: Iterator[Collected],
        more: list[dict[str, Array]],
        similar: SimilarFeatures,
        side_by_side: int,
        bars: Progress,
    ) -> _OfSites:
        """Cluster and write all sites, so many side by side; ``more`` is written with each."""
        task = bars.add_task("Features", total=len(self.sites))
        numbers, taking, adding = iter(range(len(self.sites))), Lock(), Lock()
        found, done = _OfSites(), dict[int, _OfSite]()

        def work(_: int) -> None:
            with taking:
                number = next(numbers)
                with self.stages("selection"):
                    one = next(results)
            ready = self.site(number, one, more[number])
            with adding:
                done[number] = ready
                # In the order of the sites, whichever is ready first.
                while len(found.infos) in done:
                    with self.stages("similar features"):
                        self.add(found, done.pop(len(found.infos)), similar)
                    bars.update(task, advance=1)

        with self.stages.side_by_side():
            in_threads(work, range(len(self.sites)), side_by_side)
        return found

    def add(self, found: _OfSites, one: _OfSite, similar: SimilarFeatures) -> None:
        """Take in the next site."""
        similar.add(one.site, one.tables["features"], one.directions)
        n_before = sum(map(len, found.tables["features"]))
        found.words.append(one.words + np.array([0, n_before, 0]))
        for name, table in one.tables.items():
            found.tables[name].append(table)
        found.infos.append(one.info)

    def site(self, number: int, one: Collected, more: dict[str, Array]) -> _OfSite:
        """Cluster and label what one site found.

        Its arrays are written, ``more`` with them.
        """
        threshold = self.settings["threshold"] or one.site.default_threshold("texts")
        with self.stages("clusters"):
            clusterings, central, layouts, directions = cluster_site(
                one, threshold, self.settings["linkage"]
            )
        with self.stages("tables"):
            frames = site_tables(one, clusterings, central)
        with self.stages("labels"):
            words = self.wording.site(frames["examples"], frames["features"])
            frames["features"]["label"] = pd.array(words.labels, pd.StringDtype("pyarrow"))
        with self.stages("writing"):
            room = room_for_similar(len(frames["features"]))
            self.writer.write_site(
                number, {**site_arrays(one, clusterings), **layouts, **room, **more}
            )
        info = {
            "name": one.site.name,
            "kind": one.site.kind,
            "n_neurons": one.site.n_neurons,
            "d_in": one.site.d_in,
            "activation": one.site.activation.name,
            "gate": one.neurons.gate,
            "threshold": threshold,
            **one.site.metadata(one.neurons),
        }
        return _OfSite(one.site, info, frames, words.found_by, directions)

    def importances(
        self,
        passes: TextPasses,
        inputs: dict[str, Array],
        bars: Progress,
    ) -> list[dict[str, Array]]:
        """Token importances of each site, where they are asked for; else what they would cost."""
        before, after = self.settings["window"]
        if self.settings["importances"] == "none":
            if self.show and not self.writer.resumed:
                n_tokens = passes.n_inputs * self.contexts.length
                seconds = estimated_seconds(
                    inputs["lengths"],
                    n_tokens,
                    self.stages.seconds["reading"],
                    window=(before, after),
                )
                bars.console.print(
                    "Token importances are left out; importances='exact' (--importances exact) "
                    f"finds them, in about {duration(seconds)}."
                )
            return [{} for _ in self.sites]
        task = bars.add_task("Token importances", total=len(inputs["index"]))
        found = site_importances(
            self.model,
            self.sites,
            [examples for _, examples in passes.examples()],
            inputs,
            self.writer,
            mask_id=self.settings["mask_id"],
            window=(before, after),
            show=lambda done: bars.update(task, completed=done),
        )
        return [{"importances": array} for array in found]

    def logits(self, bars: Progress) -> list[dict[str, Array]]:
        """The tokens that each site's neurons promote and suppress most, where there is a head."""
        task = bars.add_task("Logit effects", total=len(self.sites))
        lens = None if unembedding(self.model) is None else LogitLens(self.model)
        found: list[dict[str, Array]] = []
        for site in self.sites:
            found.append({} if lens is None else self.site_logits(lens, site))
            bars.update(task, advance=1)
        return found

    def site_logits(self, lens: LogitLens, site: Site) -> dict[str, Array]:
        with torch.no_grad():
            directions = site.residual_directions()
        if directions is None or not lens.takes(directions, LOGITS):
            return {}
        top = lens.top(directions, LOGITS)
        return {
            "promoted_tokens": np.asarray(top.promoted_ids, np.int32),
            "promoted_logits": np.asarray(top.promoted, np.float32),
            "suppressed_tokens": np.asarray(top.suppressed_ids, np.int32),
            "suppressed_logits": np.asarray(top.suppressed, np.float32),
        }
