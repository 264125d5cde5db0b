"""The view of a whole run."""

from __future__ import annotations

import html
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import pandas as pd

from polyseme.errors import InputError, one_of
from polyseme.store import RunFolder, SiteInfo
from polyseme.views.measures import is_dead, is_without_examples, measured
from polyseme.views.neuron import Neuron
from polyseme.views.neuron_rows import Tables
from polyseme.views.probe import Probe


class Run:
    """The results of one analysis. Created by `open_run` and `analyse`.

    Parameters
    ----------
    folder : RunFolder
    probe : callable, optional
        Called by `Run.probe` with the run and all arguments: probing needs a model, which views
        do not import.
    """

    def __init__(self, folder: RunFolder, probe: Callable[..., Probe] | None = None) -> None:
        self.folder = folder
        self._probe = probe
        self.path = folder.path
        self._tables = Tables(folder)

    @property
    def metadata(self) -> dict[str, Any]:
        """What was analysed and how: model, data, settings, versions."""
        return self.folder.metadata

    @property
    def sites(self) -> list[str]:
        """Names of the run's sites."""
        return [site.name for site in self.folder.sites]

    def neurons(self) -> pd.DataFrame:
        """All neurons, including dead ones, one row each.

        Returns
        -------
        pandas.DataFrame
            ``site``, ``neuron``, ``n_examples``, ``n_clusters``; ``n_meanings``,
            ``effective_meanings`` and ``separation``, see `polyseme.Meanings`; the metrics
            ``max_distance``, ``mean_distance``, ``intra_cluster_distance``,
            ``inter_cluster_distance`` (NaN if undefined); ``density`` (share of inputs that
            activate it; 0 for a dead neuron) and, for texts, ``token_density`` (share of
            tokens); ``max_activation``, ``mean_activation``; ``participation_ratio`` of its
            weights; ``background_distance``, the mean distance that the same weights give to
            random inputs; and ``calibrated_distance``, the mean distance minus the background
            distance.
        """
        return self.folder.neurons.copy()

    def summary(self) -> pd.DataFrame:
        """One row per site: counts of neurons, and the mean of each metric with its count.

        Returns
        -------
        pandas.DataFrame
            ``site``, and the measures of `polyseme.views.measured`.
        """
        groups = self.folder.neurons.groupby("site", sort=False)
        return pd.DataFrame([{"site": name, **measured(group)} for name, group in groups])

    def neuron(self, site: Any, neuron: Any = None) -> Neuron:
        """One neuron.

        Parameters
        ----------
        site : str
            Name of the site; may be omitted if the run has only one.
        neuron : int
            Its number, from 0.
        """
        if neuron is None and not isinstance(site, str):
            if len(self.sites) != 1:
                raise InputError(
                    f"The run has {len(self.sites)} sites; give the site's name too: "
                    f"run.neuron({self.sites[0]!r}, {site!r})."
                )
            site, neuron = self.sites[0], site
        info = self.site(str(site))
        number = -1 if neuron is None or isinstance(neuron, bool) else neuron
        if not isinstance(number, int | np.integer) or not 0 <= number < info.n_neurons:
            raise InputError(
                f"neuron is {neuron!r}; site {info.name!r} has neurons 0 to {info.n_neurons - 1}."
            )
        return Neuron(self._tables, info, int(number))

    def probe(
        self,
        text: str,
        model: Any = None,
        tokenizer: Any = None,
        *,
        sites: str | Iterable[str] | None = None,
        k: int = 10,
        by: str = "share",
        saes: Mapping[str, Any] | None = None,
        max_tokens: int | None = None,
    ) -> Probe:
        """Find which neurons each token of a text activates, and in which of their meanings.

        The text is read as the run's texts were: in contexts of the same length, with the same
        tokens left out. Each activation is assigned to the neuron's feature whose centre is
        nearest to the neuron embedding, if it is closer than the run's threshold; see
        `Neuron.assign`.

        Parameters
        ----------
        text : str
        model : torch.nn.Module, optional
            The model that was analysed. It may be omitted if that was "smollm2" or "minilm",
            which is then loaded and kept in memory. No other model is loaded just because a run
            names it.
        tokenizer : optional
            The model's tokenizer; required with ``model``.
        sites : str or list of str, optional
            Names of sites of the run, or globs; all by default.
        k : int
            Most neurons listed per token, over all sites together.
        by : {"share", "activation"}
            How to rank neurons: by "share" (of the neuron's maximum in the run) or "activation". A
            share lets other neurons come first than those with large activations; it favours
            neurons that are only ever weakly active.
        saes : mapping of str to SAE, optional
            The SAEs of the run, by name of their site.
        max_tokens : int, optional
            Read at most this many tokens of the text.

        Returns
        -------
        Probe

        Raises
        ------
        InputError
            The text is empty, the run is on images, the model or the tokenizer is missing or not
            the run's own, or an option is out of range.
        """
        if self._probe is None:
            raise InputError(
                "This run was opened with polyseme.views, which cannot load models; open it with "
                "polyseme.open_run to probe it."
            )
        return self._probe(
            self,
            text,
            model,
            tokenizer,
            sites=sites,
            k=k,
            by=by,
            saes=saes,
            max_tokens=max_tokens,
        )

    def verify(self) -> None:
        """Check that every file of the run is valid and unchanged since it was written.

        This reads the whole run, so its time grows with the size of the run. ``polyseme verify``
        does the same, even for runs that cannot be opened.

        Raises
        ------
        RunError
            Files were altered; the message names them.
        """
        self.folder.verify()

    def site(self, name: str) -> SiteInfo:
        """What the run records about a site."""
        for info in self.folder.sites:
            if info.name == name:
                return info
        raise InputError(one_of("site", name, self.sites))

    def __repr__(self) -> str:
        neurons = self.folder.neurons
        unlisted = int(is_without_examples(neurons).sum())
        return (
            f"Run({str(self.path)!r}: {len(self.sites)} site{'s' if len(self.sites) != 1 else ''}, "
            f"{len(neurons):,} neurons, {is_dead(neurons).sum():,} dead"
            f"{f', {unlisted:,} without examples' if unlisted else ''})"
        )

    def _repr_html_(self) -> str:
        model, data = self.metadata["model"], self.metadata["data"]
        table = self.summary().to_html(index=False, float_format=lambda x: f"{x:.3g}", border=0)
        return (
            f"<p><b>Run</b> {html.escape(str(self.path))}<br>"
            f"model {html.escape(str(model.get('class', '?')))}, "
            f"data {html.escape(str(data.get('name', '?')))} "
            f"({html.escape(str(data.get('n_inputs', '?')))} inputs), "
            f"{html.escape(str(self.metadata.get('created', '')))}</p>{table}"
        )
