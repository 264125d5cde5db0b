"""Which meaning fired: run a text through a run's model and find each activation's feature."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from polyseme.analysis.reopen import same_weights, sites_of_run
from polyseme.capture.collect import needs_head
from polyseme.data import Contexts, read_text
from polyseme.data.contexts import TokenBatch
from polyseme.data.token_texts import pieces
from polyseme.errors import InputError, one_of
from polyseme.sites import (
    Feed,
    Reading,
    Site,
    evaluating,
    prove_sites,
    read_sites,
    stopping_after,
)
from polyseme.sites.hooks import Gather
from polyseme.sites.language import PACKAGED, load_language_model
from polyseme.views import Neuron, Probe, Run
from polyseme.views.probe import RANKINGS

Array = NDArray[Any]

# Per forward pass.
_CONTEXTS = 8


def probe(
    run: Run,
    text: str,
    model: nn.Module | None = None,
    tokenizer: Any = None,
    *,
    sites: str | Iterable[str] | None = None,
    k: int = 10,
    by: str = "share",
    saes: Mapping[str, Any] | None = None,
    max_tokens: int | None = None,
) -> Probe:
    """Which neurons a text activates, token by token, and in which of their meanings.

    Parameters and result are those of `polyseme.Run.probe`, which calls this.
    """
    prober = Prober(run, model, tokenizer, sites=sites, saes=saes)
    return prober.probe(text, k=k, by=by, max_tokens=max_tokens)


class Prober:
    """A run and its model, prepared once to probe many texts; see `polyseme.Run.probe`.

    Parameters
    ----------
    run : Run
    model : torch.nn.Module, optional
    tokenizer : optional
    sites : str or list of str, optional
    saes : mapping of str to SAE, optional
    """

    def __init__(
        self,
        run: Run,
        model: nn.Module | None = None,
        tokenizer: Any = None,
        *,
        sites: str | Iterable[str] | None = None,
        saes: Mapping[str, Any] | None = None,
    ) -> None:
        if run.metadata["data"].get("kind") != "text":
            raise InputError("The run is of images; probing a text needs a run of texts.")
        chosen = _named(run, sites)
        if (model is None) != (tokenizer is None):
            missing = "model" if model is None else "tokenizer"
            raise InputError(f"The {missing} is missing; give model and tokenizer together.")
        self.model, self.tokenizer = _recorded(run) if model is None else (model, tokenizer)
        self.run = run
        self.sites = sites_of_run(run, self.model, chosen, saes or {})
        self._max = run.folder.neurons["max_activation"].to_numpy(np.float32)
        self._first = np.array(
            [run.folder.first_neuron(run.site(site.name).number) for site in self.sites]
        )
        self._known = False
        self._checked_tokenizer = False

    def probe(
        self, text: str, *, k: int = 10, by: str = "share", max_tokens: int | None = None
    ) -> Probe:
        """Probe one text; parameters as for `polyseme.Run.probe`."""
        if not isinstance(text, str) or not text.strip():
            raise InputError(
                f"text is {text!r}; expected text with a character other than white space."
            )
        if isinstance(k, bool) or not isinstance(k, int | np.integer) or k < 1:
            raise InputError(f"k is {k!r}; a whole number of at least 1 is expected.")
        if by not in RANKINGS:
            raise InputError(one_of("ranking", str(by), RANKINGS))
        contexts, truncated = self._contexts(text, max_tokens)
        tokens: list[str] = []
        masks: list[NDArray[np.bool_]] = []
        frames = []
        for batch in contexts.batches(_CONTEXTS):
            read = self._read(batch, int(k), by)
            frames.append(self._rows(read, int(k), tokens, masks))
        neurons = pd.concat(frames, ignore_index=True)
        return Probe(tokens, np.concatenate(masks), neurons, by, int(k), truncated)

    def _contexts(self, text: str, max_tokens: int | None) -> tuple[Contexts, bool]:
        """The text cut like the run's texts, and whether it was truncated."""
        data = self.run.metadata["data"]
        settings = {"length": data["length"], "leave_out": data["leave_out"]}
        whole = Contexts(read_text([text]), self.tokenizer, **settings)
        if not self._checked_tokenizer:
            self._check_tokenizer(whole)
            self._checked_tokenizer = True
        if max_tokens is None:
            return whole, False
        part = Contexts(read_text([text]), self.tokenizer, max_tokens=max_tokens, **settings)
        sizes = [sum(int(b.attention.sum()) for b in c.batches(64)) for c in (part, whole)]
        return part, sizes[0] < sizes[1]

    def _check_tokenizer(self, contexts: Contexts) -> None:
        tokenizer, known = contexts.identity()["tokenizer"], self.run.metadata["data"]["tokenizer"]
        if tokenizer["vocabulary_sha256"] != known.get("vocabulary_sha256"):
            raise InputError(
                f"The tokenizer, a {tokenizer['class']}, has a different vocabulary from the "
                f"run's, a {known.get('class')}; give the tokenizer of the analysed model."
            )

    def _read(self, batch: TokenBatch, k: int, by: str) -> _Read:
        """Run the model on a few contexts and keep the top k neurons of each site at each token."""
        width = int(batch.attention.sum(axis=1).max())
        ids, attention = batch.ids[:, :width], batch.attention[:, :width]
        mask = batch.mask[:, :width]
        inputs = {"input_ids": ids, "attention_mask": attention.astype(np.int64)}
        places = tuple(torch.from_numpy(part) for part in np.nonzero(mask))
        tops: dict[str, _SiteTop] = {}

        def on_reading(site: Site, reading: Reading, gather: Gather) -> None:
            assert reading.everywhere is not None
            rows, positions = (part.to(reading.everywhere.device) for part in places)
            score, neuron, values = self._top_of(site, reading.everywhere[rows, positions], k, by)
            vectors = gather(rows, positions).float().cpu().numpy()
            tops[site.name] = _SiteTop(score, neuron, values, vectors)

        feed = Feed(self.model, head=needs_head(self.model, self.sites))
        with evaluating(self.model), torch.no_grad():
            if not self._known:
                prove_sites(self.model, self.sites, feed, inputs)
                self._known = True
            with read_sites(self.model, self.sites, on_reading), stopping_after(self.sites):
                feed(inputs)
        return _Read(ids[attention], mask[attention], [tops[s.name] for s in self.sites])

    def _top_of(self, site: Site, values: Tensor, k: int, by: str) -> tuple[Array, Array, Array]:
        """The site's top k neurons at each position: scores, numbers, activations, (n, k)."""
        first = self.run.folder.first_neuron(self.run.site(site.name).number)
        maxima = torch.from_numpy(self._max[first : first + site.n_neurons]).to(values.device)
        values = values.float()
        score = values
        if by == "share":
            # A neuron that nothing in the run activates has no share, and comes last.
            score = torch.where(maxima > 0, values / maxima, torch.full_like(values, 1e-30))
        score = torch.where(values > 0, score, torch.zeros_like(score))
        best, neuron = score.topk(min(k, site.n_neurons), dim=1)
        arrays = (best, neuron, values.gather(1, neuron))
        return tuple(array.cpu().numpy() for array in arrays)  # type: ignore[return-value]

    def _rows(
        self, read: _Read, k: int, tokens: list[str], masks: list[NDArray[np.bool_]]
    ) -> pd.DataFrame:
        """The rows of these contexts; their tokens are appended to those before."""
        start = len(tokens)
        tokens += pieces(self.tokenizer, read.ids)
        masks.append(read.mask)
        score, neuron, activation = (
            np.concatenate([getattr(top, name) for top in read.tops], axis=1)
            for name in ("score", "neuron", "activation")
        )
        site = np.repeat(np.arange(len(read.tops)), [top.score.shape[1] for top in read.tops])
        # Equal scores in the order of the run.
        order = np.argsort(-score, axis=1, kind="stable")[:, :k]
        place, rank = np.nonzero(np.take_along_axis(score, order, axis=1) > 0)
        column = order[place, rank]
        sites, neuron, activation = site[column], neuron[place, column], activation[place, column]
        meaning, near, feature, label, size = self._assigned(read.tops, sites, neuron, place)
        maxima = self._max[self._first[sites] + neuron]
        with np.errstate(divide="ignore", invalid="ignore"):
            share = np.where(maxima > 0, activation / maxima, np.nan).astype(np.float32)
        token = start + np.flatnonzero(read.mask)[place]
        names = np.array([s.name for s in self.sites], dtype=object)
        return pd.DataFrame(
            {
                "token": token,
                "text": np.array(tokens, dtype=object)[token],
                "site": names[sites],
                "neuron": neuron,
                "activation": activation,
                "share": share,
                "meaning": meaning,
                "meaning_cosine": near,
                "feature": feature,
                "label": label,
                "n_examples": size,
            }
        )

    def _assigned(
        self, tops: list[_SiteTop], site: Array, neuron: Array, place: Array
    ) -> tuple[Array, Array, Array, Array, Array]:
        """Each row's meaning and its cosine, its feature, that feature's label and examples."""
        meaning, feature = np.full((2, len(place)), -1, np.int64)
        near = np.full(len(place), np.nan)
        label = np.full(len(place), "", dtype=object)
        size = np.zeros(len(place), np.int64)
        unique, inverse = np.unique(np.stack([site, neuron], axis=1), axis=0, return_inverse=True)
        for number, (s, n) in enumerate(unique):
            here = np.flatnonzero(inverse.ravel() == number)
            known = self.run.neuron(self.sites[s].name, int(n))
            same_weights(known, self.sites[s])
            feature[here] = known.assign(tops[s].vectors[place[here]])
            if "n_meanings" in known.row:
                rows = tops[s].vectors[place[here]]
                meaning[here] = known.assign_meaning(rows)
                if known.row["n_meanings"]:
                    near[here] = known.meaning_cosines(rows).max(axis=1)
            label[here], size[here] = _described(self.run, known, feature[here])
        return meaning, near, feature, label, size


class _SiteTop(NamedTuple):
    """One site at all positions that count: its top neurons (n, k) and its inputs (n, d_in)."""

    score: Array
    neuron: Array
    activation: Array
    vectors: Array


class _Read(NamedTuple):
    """A few contexts: tokens without padding, which of them count, and all sites there."""

    ids: NDArray[np.int64]
    mask: NDArray[np.bool_]
    tops: list[_SiteTop]


def _described(run: Run, neuron: Neuron, features: Array) -> tuple[list[str], Array]:
    """Labels of some of a neuron's features, and the numbers of their examples."""
    row = run.folder.first_neuron(neuron.info.number) + neuron.number
    rows = run.folder.rows("features", row, row + 1)
    sizes = rows["n_examples"].to_numpy(np.int64)
    labels = rows["label"].tolist() if "label" in rows else [""] * len(rows)
    return (
        [labels[f] if f >= 0 else "" for f in features],
        np.array([sizes[f] if f >= 0 else 0 for f in features], np.int64),
    )


def _named(run: Run, sites: str | Iterable[str] | None) -> list[str]:
    if sites is None:
        return run.sites
    patterns = [sites] if isinstance(sites, str) else list(sites)
    chosen = [s for s in run.sites if any(fnmatch.fnmatchcase(s, str(p)) for p in patterns)]
    for pattern in patterns:
        if not any(fnmatch.fnmatchcase(name, str(pattern)) for name in run.sites):
            raise InputError(one_of("site of the run", str(pattern), run.sites))
    return chosen


def _recorded(run: Run) -> tuple[nn.Module, Any]:
    """The analysed model, according to the run, if it is part of a package."""
    name = run.metadata["model"].get("name")
    if name not in PACKAGED:
        # A run may come from anyone, so what it names is neither downloaded nor executed.
        note = f" (according to the run, {str(name)[:80]!r})" if isinstance(name, str) else ""
        raise InputError(
            f"Probing this run needs its model{note}: give model and tokenizer, as "
            "polyseme.sites.language.load_language_model loads them (--model on the command line)."
        )
    return _packaged(str(name))


@lru_cache(maxsize=1)
def _packaged(name: str) -> tuple[nn.Module, Any]:
    return load_language_model(name)
