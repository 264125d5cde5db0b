"""SAEs side by side: what the NE loss gains, what it costs, and what remains at equal L0."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from rich.box import SIMPLE_HEAD
from rich.table import Table
from torch import Tensor, nn

from polyseme.analysis import analyse
from polyseme.analysis.site_tables import cluster_site, site_tables
from polyseme.capture import Batch, Collected, Collector, FirstActive, Selector
from polyseme.data.sources import Source, as_source
from polyseme.errors import InputError, MissingDependencyError
from polyseme.evaluate.sae import (
    SAEReport,
    evaluate_reconstruction,
    evaluate_splice,
    label_purity,
)
from polyseme.remote import local_path
from polyseme.sites import Site, find_sites
from polyseme.sites.attach import AttachedSAE, WithSAE, find_site, site_activations
from polyseme.store import add_metadata
from polyseme.views import MEASURES
from polyseme.views.figure import save_figure

# The published recipe for the SAE's latents.
SELECT = FirstActive(100, minimum=0.005)
THRESHOLD = 0.05
_BATCH = 512


@dataclass(frozen=True)
class Comparison:
    """Several SAEs on the same activations.

    Attributes
    ----------
    reports : list of SAEReport
        The others are compared with the first.
    matched : list of SAEReport
        The same SAEs with weak activations removed until all have the lowest L0 among them.
    """

    reports: list[SAEReport]
    matched: list[SAEReport]

    def frame(self) -> pd.DataFrame:
        """All measures as numbers, one row per measure and one column per SAE."""
        columns = {report.name: report.as_dict() for report in self.reports}
        return pd.DataFrame(columns)

    def matched_frame(self) -> pd.DataFrame:
        """The measures at matched L0."""
        return pd.DataFrame({report.name: report.as_dict() for report in self.matched})

    def by_density(self, bands: int = 6) -> pd.DataFrame:
        """Mean distance in bands of density, and at a common mix of densities.

        How alike a latent's examples are depends on how often it fires; comparing within bands
        controls for that.

        Returns
        -------
        pandas.DataFrame
            One row per band: ``low``, ``high`` (densities); for each SAE ``<name>`` (mean distance)
            and ``<name> n`` (number of latents). The last row, with NaN ``low`` and ``high``,
            averages the bands shared by all SAEs, weighted by their latents in all SAEs together.
        """
        live = [
            r.neurons[(r.neurons["n_examples"] > 1) & (r.neurons["density"] > 0)]
            for r in self.reports
        ]
        pooled = np.concatenate([frame["density"].to_numpy() for frame in live])
        if not len(pooled):
            raise InputError("No latent of any SAE has two examples, so there are no distances.")
        edges = np.geomspace(pooled.min(), pooled.max() * (1 + 1e-9), bands + 1)
        table: dict[str, Any] = {"low": edges[:-1], "high": edges[1:]}
        means, counts = [], []
        for report, frame in zip(self.reports, live, strict=True):
            band = np.clip(np.searchsorted(edges, frame["density"], side="right") - 1, 0, bands - 1)
            distance = frame["mean_distance"].to_numpy()
            n = np.bincount(band, minlength=bands)
            total = np.bincount(band, weights=distance, minlength=bands)
            mean = np.divide(total, n, out=np.full(bands, np.nan), where=n > 0)
            table[report.name], table[f"{report.name} n"] = mean, n
            means.append(mean)
            counts.append(n)
        shared = (np.array(counts) > 0).all(axis=0)
        weights = np.array(counts).sum(axis=0) * shared
        last: dict[str, Any] = {"low": np.nan, "high": np.nan}
        for report, mean, n in zip(self.reports, means, counts, strict=True):
            last[report.name] = (
                float((np.nan_to_num(mean) * weights).sum() / weights.sum())
                if weights.any()
                else np.nan
            )
            last[f"{report.name} n"] = int(n[shared].sum())
        return pd.concat([pd.DataFrame(table), pd.DataFrame([last])], ignore_index=True)

    def rows(self) -> list[tuple[str, list[str]]]:
        """The table for printing: a name and one text per SAE; a heading has no texts."""
        frame = self.frame()
        lines: list[tuple[str, list[str]]] = []
        for group, measures in itertools.groupby(MEASURES, key=lambda measure: measure.group):
            lines.append((group, []))
            for measure in measures:
                if measure.key not in frame.index:
                    continue
                numbers = np.asarray(frame.loc[measure.key], dtype=float)
                values = [measure.write(value) for value in numbers]
                if f"{measure.key}_n" in frame.index:
                    counts = np.asarray(frame.loc[f"{measure.key}_n"], dtype=float)
                    values = [
                        f"{value} (n={int(n)})" for value, n in zip(values, counts, strict=True)
                    ]
                lines.append((measure.name.format(neuron="latent"), values))
        lines.append(("matched", []))
        names = [report.name for report in self.reports]
        common: list[float] = self.by_density()[names].iloc[-1].tolist()
        lines.append(
            ("mean distance at equal densities", [_text("{:.3f}", value) for value in common])
        )
        matched = self.matched_frame()
        for key, title, form in (
            ("l0", "L0 once weak activations are cut", "{:.1f}"),
            ("mean_distance", "mean distance at that L0", "{:.3f}"),
            ("fvu", "FVU at that L0", "{:.4f}"),
        ):
            lines.append(
                (title, [_text(form, value) for value in np.asarray(matched.loc[key], dtype=float)])
            )
        return lines

    def table(self) -> Table:
        """`rows` as a table for the terminal."""
        table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
        table.add_column("")
        for report in self.reports:
            table.add_column(report.name, justify="right")
        for name, values in self.rows():
            if values:
                table.add_row(name, *values)
            else:
                table.add_row(f"[bold]{name}[/bold]")
        return table

    def figure(self, path: str | Path | None = None) -> Any:
        """Distributions of the main measures, one colour per SAE.

        Parameters
        ----------
        path : str or Path, optional
            Where to save it.

        Returns
        -------
        matplotlib.figure.Figure
        """
        try:
            from matplotlib.figure import Figure
        except ModuleNotFoundError as error:
            raise MissingDependencyError("Drawing a figure", "matplotlib", "figures") from error
        figure = Figure(figsize=(13, 7), layout="constrained")
        axes = figure.subplots(2, 3)
        for number, report in enumerate(self.reports):
            live = report.neurons[report.neurons["n_examples"] > 0]
            colour = _COLOURS[number % len(_COLOURS)]
            values = [
                (live["mean_distance"].dropna(), np.linspace(0, 1, 41)),
                (live["n_clusters"], np.arange(0, 102, 4)),
                (live["participation_ratio"].dropna(), np.linspace(1, _most_ratio(self), 41)),
                (np.log10(live["density"]), np.linspace(-5, 0, 41)),
            ]
            for ax, (data, bins) in zip(axes.flat, values, strict=False):
                ax.hist(data, bins=bins, histtype="step", color=colour, lw=1.8, label=report.name)
            axes[1, 1].scatter(
                live["participation_ratio"], live["mean_distance"], s=7, color=colour, alpha=0.6
            )
        titles = ("mean distance", "features", "participation ratio", "log10 density")
        for ax, title in zip(axes.flat, titles, strict=False):
            ax.set_title(f"{title}, live latents", fontsize=10)
            ax.set_ylabel("latents", fontsize=8)
        axes[0, 0].legend(frameon=False, fontsize=8)
        axes[1, 1].set_title("is it the weights?", fontsize=10)
        axes[1, 1].set_xlabel("participation ratio", fontsize=8)
        axes[1, 1].set_ylabel("mean distance", fontsize=8)
        _bars(axes[1, 2], self.reports)
        for ax in axes.flat:
            ax.spines[["top", "right"]].set_visible(False)
            ax.tick_params(labelsize=8)
        if path is not None:
            save_figure(figure, path)
        return figure


def _text(form: str, value: float) -> str:
    return "–" if np.isnan(value) else form.format(value)


_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")


def _most_ratio(comparison: Comparison) -> float:
    return max(float(r.neurons["participation_ratio"].max()) for r in comparison.reports)


def _bars(axes: Any, reports: list[SAEReport]) -> None:
    """Gain and cost relative to the first SAE, in one panel."""
    keys = (("dead_share", "dead"), ("mean_distance", "distance"), ("l0", "L0"), ("fvu", "FVU"))
    first = reports[0].as_dict()
    width = 0.8 / max(len(reports), 1)
    for number, report in enumerate(reports):
        record = report.as_dict()
        heights = [record[key] / first[key] if first[key] else np.nan for key, _ in keys]
        positions = np.arange(len(keys)) + number * width
        axes.bar(positions, heights, width, color=_COLOURS[number % len(_COLOURS)])
    axes.axhline(1, color="#666666", lw=0.8)
    axes.set_xticks(np.arange(len(keys)) + 0.4 - width / 2, [name for _, name in keys])
    axes.set_title(f"relative to {reports[0].name}: lower is better", fontsize=10)


class Thresholded(AttachedSAE):
    """An SAE with weak activations removed, each latent's below a fraction of its maximum.

    Parameters
    ----------
    sae : torch.nn.Module
    levels : Tensor of float, shape (d_sae,)
        Activations up to this level are set to 0.
    """

    def __init__(self, sae: Any, levels: Tensor) -> None:
        super().__init__(sae)
        self.levels = levels

    def encode(self, activations: Tensor) -> Tensor:
        """Latents (m, d_sae)."""
        latents = super().encode(activations)
        latents = latents.to_dense() if latents.is_sparse else latents
        return torch.where(latents > self.levels, latents, 0)


def at_l0(sae: Any, activations: Tensor, l0: float) -> Any:
    """Remove an SAE's weak activations until its L0 is at most the one given.

    Parameters
    ----------
    sae : torch.nn.Module
    activations : Tensor, shape (n, d_in)
        On which L0 is measured.
    l0 : float

    Returns
    -------
    torch.nn.Module
        The SAE itself if its L0 is already that low.
    """
    with torch.no_grad():
        latents = sae.encode(activations)
        latents = latents.to_dense() if latents.is_sparse else latents
        maximum = latents.amax(dim=0).clamp(min=0)
        share = torch.where(latents > 0, latents / maximum.clamp(min=1e-30), 0)
    # One fraction for all latents, chosen so that as many activations go as the L0 requires.
    positive = share[share > 0]
    keep = int(l0 * len(activations))
    if len(positive) <= keep:
        return sae
    cut = positive.kthvalue(len(positive) - keep).values if keep else positive.max()
    return Thresholded(sae, cut * maximum)


def latents_table(
    sae: Any,
    activations: Tensor,
    *,
    select: Selector = SELECT,
    threshold: float = THRESHOLD,
) -> pd.DataFrame:
    """The latents' rows of `Run.neurons`, from activations alone, without writing a run.

    Parameters
    ----------
    sae : torch.nn.Module
    activations : Tensor, shape (n, d_in)
    select : Selector
    threshold : float
    """
    collected = collect_latents(sae, activations, select)
    clustered = cluster_site(collected, threshold, "average")
    return site_tables(collected, clustered)["neurons"]


def collect_latents(
    sae: Any, activations: Tensor, select: Selector, *, n_random: int = 1
) -> Collected:
    """Collect the latents' examples among activations (n, d_in), and random activating ones."""
    attached = AttachedSAE(sae)
    [site] = find_sites(attached, "W_enc")
    collector = Collector(attached, [site], select, n_random=n_random)

    def batches() -> Iterator[Batch]:
        for rows in torch.split(activations, _BATCH):
            # These inputs are never shown, so nothing of them is kept.
            yield Batch(rows, np.zeros((len(rows), 1), np.uint8))

    for _ in collector.run(batches()):
        pass
    [collected], _ = collector.result()
    return collected


def report_on(
    name: str,
    sae: Any,
    activations: Tensor,
    *,
    select: Selector = SELECT,
    threshold: float = THRESHOLD,
) -> SAEReport:
    """Report on an SAE from activations alone: no splicing, no labels."""
    return SAEReport(
        name,
        evaluate_reconstruction(sae, torch.split(activations, 4096)),
        None,
        None,
        latents_table(sae, activations, select=select, threshold=threshold),
    )


def compare(
    saes: Mapping[str, Any],
    model: nn.Module,
    site: str | Site,
    data: Any,
    *,
    out: str | Path,
    select: Selector = SELECT,
    threshold: float = THRESHOLD,
    panels: bool = False,
    overwrite: bool = False,
    resume: bool = False,
    progress: bool = True,
) -> Comparison:
    """Evaluate SAEs on the same data, analyse their latents, and compare them.

    Parameters
    ----------
    saes : mapping of str to torch.nn.Module
        By name; the others are compared with the first.
    model : torch.nn.Module
    site : str or Site
        Whose activations the SAEs were trained on.
    data : anything that `analyse` accepts
        Needs labels for accuracy and label purity.
    out : str or Path
        Writes a run of each SAE's latents to ``out/<name>``, with the ``evaluation`` of the SAE in
        its run.json: sparsity, reconstruction and cost to the model.
    select, threshold, panels, overwrite, resume, progress
        As for `analyse`.
    """
    folder = local_path(out, "The folder of a comparison")
    if not saes:
        raise InputError("There are no SAEs to compare; give at least one, by name.")
    source = as_source(data)
    if source.is_read_once:
        raise InputError(
            f"data is a {source.name}, which yields its inputs only once, but comparing SAEs reads "
            f"them several times: give an array, a data set or a DataLoader."
        )
    activations = torch.cat(list(site_activations(model, find_site(model, site), _inputs(source))))
    sample = next(iter(_inputs(source)))
    reports = []
    for name, sae in saes.items():
        run = analyse(
            WithSAE(model, site, sae, sample),
            data,
            sites="sae",
            out=folder / name,
            select=select,
            threshold=threshold,
            panels=panels,
            overwrite=overwrite,
            resume=resume,
            progress=progress,
        )
        labelled = "labels" in run.folder.inputs
        report = SAEReport(
            name,
            evaluate_reconstruction(sae, torch.split(activations, 4096)),
            evaluate_splice(model, site, sae, _labelled(source)) if labelled else None,
            label_purity(run, "sae") if labelled else None,
            run.neurons(),
        )
        # So that the run shows the SAE's cost beside its gain.
        evaluation = {k: v for k, v in report.evaluation().items() if np.isfinite(v)}
        add_metadata(run.path, {"evaluation": evaluation})
        reports.append(report)
    return Comparison(
        reports, match_l0(reports, saes, activations, select=select, threshold=threshold)
    )


def match_l0(
    reports: list[SAEReport],
    saes: Mapping[str, Any],
    activations: Tensor,
    *,
    select: Selector = SELECT,
    threshold: float = THRESHOLD,
) -> list[SAEReport]:
    """Reports on the SAEs, reduced to the lowest L0 among them."""
    lowest = min(report.reconstruction.l0 for report in reports)
    matched = []
    for report in reports:
        sae = saes[report.name]
        cut = at_l0(sae, activations, lowest)
        same = cut is sae
        matched.append(
            report
            if same
            else report_on(report.name, cut, activations, select=select, threshold=threshold)
        )
    return matched


def _inputs(source: Source) -> Iterator[NDArray[Any]]:
    for stored, _ in source.batches(_BATCH):
        yield source.to_input(stored)


def _labelled(source: Source) -> Iterator[tuple[NDArray[Any], Any]]:
    for stored, labels in source.batches(_BATCH):
        yield source.to_input(stored), labels
