"""From a language model and texts to a run: one pass, then trees, labels and logit effects."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from rich.progress import Progress
from torch import nn

from polyseme.capture import Collected, MLPSite, Selector, Site, TopK, find_sites
from polyseme.capture.unembed import output_directions, top_logits, unembedding
from polyseme.core.arrays import check_linkage, check_threshold
from polyseme.core.labels import distinctive_tokens
from polyseme.data.contexts import Contexts
from polyseme.data.tokens import pieces
from polyseme.errors import InputError
from polyseme.pipeline.describe import check_options, describe_model, describe_selector, plain
from polyseme.pipeline.passes import TextPasses
from polyseme.pipeline.plan import Plan, make_plan, memory_bytes, trial
from polyseme.pipeline.progress import progress_bars
from polyseme.pipeline.records import cluster_site, gate_of, site_arrays, site_tables
from polyseme.store import RunWriter, vocabulary_arrays
from polyseme.views import Run, open_run

Array = NDArray[Any]

# Chosen by eye on SmolLM2; see docs/language-models.md.
TEXT_THRESHOLD = 0.5
# The published threshold for SAE neurons.
SAE_THRESHOLD = 0.05
WINDOW, _WIDEST = (20, 10), 1024
LOGITS, LABEL_WORDS = 10, 5


def analyse_text(
    model: nn.Module,
    contexts: Contexts,
    *,
    sites: str | Site | Iterable[str | Site],
    out: str | Path,
    select: Selector | None = None,
    threshold: float | None = None,
    linkage: str = "average",
    window: tuple[int, int] = WINDOW,
    random_examples: int = 16,
    seed: int = 0,
    batch_size: int = 16,
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
        Names or globs: ``"model.layers.*.mlp"`` for the neurons of every MLP.
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
    random_examples, seed, overwrite, resume, progress
        As for `analyse`.
    batch_size : int
        Contexts in one forward pass; as for `analyse`.
    memory_budget : int or str, optional
        Memory that may be used above the loaded model: bytes, or such as "4GB". If it does not
        do for all sites together, the text is read several times, for some of them each. What
        is found does not depend on it. The plan is printed first, unless ``progress`` is off.

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
    check_options(model, select, batch_size=batch_size, random_examples=random_examples)
    threshold = None if threshold is None else check_threshold(threshold)
    check_linkage(linkage)
    before, after = _check_window(window)
    found = find_sites(model, sites)
    settings = {
        "select": describe_selector(select),
        "threshold": threshold,
        "linkage": linkage,
        "window": [before, after],
        "random_examples": int(random_examples),
        "seed": plain(seed),
        "batch_size": int(batch_size),
    }
    about = describe_model(model)
    fingerprint = {
        "sites": [site.name for site in found],
        "settings": {key: value for key, value in settings.items() if key != "batch_size"},
        "model": about,
        "data": contexts.identity(),
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
    plan(found)
    with RunWriter(out, fingerprint=fingerprint, overwrite=overwrite, resume=resume) as writer:
        if writer.finished:
            return open_run(out)
        work = _TextAnalysis(model, contexts, found, writer, settings, progress)
        return work.run(select, about, plan)


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


class _TextAnalysis:
    """The stages of one analysis."""

    def __init__(
        self,
        model: nn.Module,
        contexts: Contexts,
        sites: list[Site],
        writer: RunWriter,
        settings: dict[str, Any],
        progress: bool,
    ) -> None:
        self.model, self.contexts, self.sites, self.writer = model, contexts, sites, writer
        self.settings = settings
        self.show = progress

    def run(self, select: Selector, about: dict[str, Any], plan: Callable[..., Plan]) -> Run:
        with progress_bars(self.show) as bars:
            passes = self.read(select, plan, bars)
            kept = passes.inputs()
            task = bars.add_task("Logit effects", total=len(self.sites))
            logits = []
            for site in self.sites:
                logits.append(self.logits(site))
                bars.update(task, advance=1)
            inputs = self.inputs(kept, logits)
            tables: dict[str, list[pd.DataFrame]] = {
                name: [] for name in ("neurons", "examples", "features", "random")
            }
            infos = []
            task = bars.add_task("Features", total=len(self.sites))
            for number, one in enumerate(passes.results()):
                infos.append(self.site(number, one, inputs, tables, logits[number]))
                bars.update(task, advance=1)
            self.writer.write_inputs(inputs)
            self.writer.write_tables(
                **{name: pd.concat(frames, ignore_index=True) for name, frames in tables.items()}
            )
            path = self.writer.finish(
                {
                    "sites": infos,
                    "settings": self.settings,
                    "model": about,
                    "data": {
                        "kind": "text",
                        "n_inputs": passes.n_inputs,
                        **self.contexts.identity(),
                    },
                }
            )
        return open_run(path)

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

    def inputs(self, kept: dict[str, Array], logits: list[dict[str, Array]]) -> dict[str, Array]:
        """The contexts that examples point at, and how every token in the run reads."""
        rows = kept.get("pixels", np.empty((0, self.contexts.length + 1), np.int32))
        tokens, lengths = rows[:, :-1], rows[:, -1]
        named = [arrays[name].ravel() for arrays in logits for name in arrays if "tokens" in name]
        used = np.unique(
            np.concatenate([tokens[np.arange(tokens.shape[1]) < lengths[:, None]], *named])
        )
        return {
            "index": kept["index"],
            "tokens": tokens,
            "lengths": lengths,
            **vocabulary_arrays(used, pieces(self.contexts.tokenizer, used.tolist())),
        }

    def site(
        self,
        number: int,
        one: Collected,
        inputs: dict[str, Array],
        tables: dict[str, list[pd.DataFrame]],
        logits: dict[str, Array],
    ) -> dict[str, Any]:
        """Everything of one site: tables, arrays, and what run.json says of it."""
        threshold = self.settings["threshold"] or (
            SAE_THRESHOLD if one.site.kind == "sae" else TEXT_THRESHOLD
        )
        clusterings, central = cluster_site(one, threshold, self.settings["linkage"])
        frames = site_tables(one, clusterings, central)
        frames["features"]["label"] = self.labels(frames, inputs)
        for name, frame in frames.items():
            tables[name].append(frame)
        self.writer.write_site(number, {**site_arrays(one, clusterings), **logits})
        gate = gate_of(one.site)
        return {
            "name": one.site.name,
            "kind": one.site.kind,
            "n_neurons": one.site.n_neurons,
            "d_in": one.site.d_in,
            "activation": one.site.activation.name,
            "gate": gate["activation"] if gate else None,
            "threshold": threshold,
        }

    def labels(self, frames: dict[str, pd.DataFrame], inputs: dict[str, Array]) -> list[str]:
        """The words that set each feature apart from the site's others."""
        examples, features = frames["examples"], frames["features"]
        if not len(features):
            return []
        before, after = self.settings["window"]
        rows = np.searchsorted(inputs["index"], examples["input"].to_numpy())
        at = examples["position"].to_numpy()[:, None] + np.arange(-before, after + 1)
        inside = (at >= 0) & (at < inputs["lengths"][rows][:, None])
        ids = inputs["tokens"][rows[:, None], np.clip(at, 0, inputs["tokens"].shape[1] - 1)]
        vocabulary = inputs["vocabulary"]
        # Features are ordered by neuron, then number, so one key finds an example's.
        key, wanted = (
            f["neuron"].to_numpy(np.int64) * (1 << 32) + f["feature"].to_numpy(np.int64)
            for f in (features, examples)
        )
        cluster = np.searchsorted(key, wanted)
        # The token that activates the neuron says more than those around it.
        weights = np.where(np.arange(-before, after + 1) == 0, before + after + 1.0, 1.0)
        found = distinctive_tokens(
            np.searchsorted(vocabulary, ids[inside]),
            np.broadcast_to(cluster[:, None], ids.shape)[inside],
            n_clusters=len(features),
            vocabulary=len(vocabulary),
            k=LABEL_WORDS,
            weights=np.broadcast_to(weights, ids.shape)[inside],
        )
        words = pieces(self.contexts.tokenizer, vocabulary.tolist())
        return [
            " ".join(dict.fromkeys(w for w in (words[t].strip() for t in row if t >= 0) if w))
            for row in found.tokens
        ]

    def logits(self, site: Site) -> dict[str, Array]:
        """The tokens that each neuron promotes and suppresses most, where there is a head."""
        if not isinstance(site, MLPSite) or unembedding(self.model) is None:
            return {}
        with torch.no_grad():
            top = top_logits(self.model, output_directions(site), LOGITS)
        return {
            "promoted_tokens": np.asarray(top.promoted_ids, np.int32),
            "promoted_logits": np.asarray(top.promoted, np.float32),
            "suppressed_tokens": np.asarray(top.suppressed_ids, np.int32),
            "suppressed_logits": np.asarray(top.suppressed, np.float32),
        }
