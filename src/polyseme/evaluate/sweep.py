"""Sweeps of SAEs over coefficients and seeds: what the NE loss gains at equal sparsity."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import stats
from torch import Tensor

from polyseme.analysis.describe import digest
from polyseme.errors import InputError, MissingDependencyError, RunError
from polyseme.evaluate.compare import report_on
from polyseme.evaluate.latents import latent_meanings
from polyseme.remote import local_path
from polyseme.store.files import (
    ASIDE,
    LOCK,
    encode_json,
    locked,
    plain_json,
    read_json,
    replace_bytes,
    writing,
)
from polyseme.store.partial import differences
from polyseme.views.figure import save_figure

RECORDS = "records"
MEASURES = (
    "l0",
    "fvu",
    "accuracy",
    *(
        f"{examples}_{measure}"
        for examples in ("strongest", "random")
        for measure in (
            "n",
            "meanings",
            "effective_meanings",
            "several",
            "verdict_several",
            "purity",
            "purity_null",
        )
    ),
    "mean_distance",
    "calibrated_distance",
    "dead_share",
    "without_examples_share",
    "median_participation_ratio",
)


@dataclass(frozen=True)
class Point:
    """One SAE of a sweep.

    Attributes
    ----------
    form : str
        Form of the NE loss.
    ne_coefficient : float
    l1_coefficient : float or None
        None for an architecture without it.
    seed : int
    """

    form: str
    ne_coefficient: float
    l1_coefficient: float | None
    seed: int

    @property
    def name(self) -> str:
        """Name of its record."""
        l1 = "" if self.l1_coefficient is None else f"-l1{self.l1_coefficient:g}"
        return f"{self.form}-ne{self.ne_coefficient:g}{l1}-seed{self.seed}"


def points(
    forms: Mapping[str, Sequence[float]],
    l1_coefficients: Sequence[float | None],
    seeds: Sequence[int],
) -> list[Point]:
    """All combinations, one seed at a time, so that an interrupted sweep has complete curves early.

    ``forms`` has the NE coefficients of each form. A coefficient of 0 gives the same SAE in every
    form, which is trained once.
    """
    combinations: dict[tuple[Any, ...], Point] = {}
    for seed, form in itertools.product(seeds, forms):
        for ne, l1 in itertools.product(forms[form], l1_coefficients):
            name = "none" if ne == 0 else form
            combinations.setdefault((name, ne, l1, seed), Point(name, ne, l1, seed))
    return list(combinations.values())


def sweep(
    activations: Tensor,
    todo: Sequence[Point],
    train: Callable[[Point], Any],
    *,
    out: str | Path,
    settings: dict[str, Any],
    labels: NDArray[Any] | None = None,
    score: Callable[[Any], dict[str, float]] | None = None,
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Train and evaluate each point without a record.

    Parameters
    ----------
    activations : Tensor, shape (n, d_in)
        Data for evaluation.
    todo : sequence of Point
    train : callable (Point) -> SAE
    out : str or Path
        Folder for one JSON record per point; existing records are kept, so an interrupted sweep can
        be resumed.
    settings : dict
        Settings shared by all points, as plain JSON, including what identifies the model and the
        data. A folder with other settings or activations is refused.
    labels : ndarray, shape (n,), optional
        Class or token of each activation, for label purity.
    score : callable (SAE) -> dict of float, optional
        Additional measures, such as accuracy.

    Yields
    ------
    number : int
        Number of points done so far.
    record : dict
        The record of this point.
    """
    folder = local_path(out, "The folder of a sweep")
    known = {**settings, "activations": digest([activations.detach().cpu().numpy()])}
    with held(folder, "sweep", known) as records:
        for number, point in enumerate(todo, start=1):
            file = records / f"{point.name}.json"
            if file.exists():
                yield number, json.loads(file.read_text(encoding="utf-8"))
                continue
            sae = train(point)
            record: dict[str, Any] = {
                **asdict(point),
                **report_on(point.name, sae, activations).as_dict(),
                **latent_meanings(sae, activations, labels, seed=point.seed),
                **(score(sae) if score else {}),
            }
            with writing(file, resumable=False):
                # A measure may be NaN, which strict JSON cannot represent.
                replace_bytes(file, json.dumps(record, indent=1).encode())
            yield number, record


@contextmanager
def held(folder: Path, kind: str, known: dict[str, Any]) -> Iterator[Path]:
    """Lock the records folder of a sweep or benchmark with these settings.

    Parameters
    ----------
    folder : Path
    kind : str
        "sweep" or "benchmark".
    known : dict
        Its settings, as plain JSON. A folder with other settings or other files is refused.
    """
    settings = plain_json(f"settings of a {kind}", known)
    file, records = folder / f"{kind}.json", folder / RECORDS
    with ExitStack() as lock, writing(folder, resumable=False):
        ours = {LOCK, file.name + ASIDE}
        before = read_json(file)
        if not before and folder.exists() and {entry.name for entry in folder.iterdir()} - ours:
            raise RunError(f"{folder} holds other files; choose a new or empty folder.")
        if before and (changed := differences(before, settings)):
            raise RunError(
                f"{folder} holds a different {kind}: {changed}. Choose another output folder, or "
                f"give the same settings, model and data to resume it."
            )
        folder.mkdir(parents=True, exist_ok=True)
        lock.enter_context(locked(folder))
        # First, as it identifies the rest.
        replace_bytes(file, encode_json(settings))
        records.mkdir(exist_ok=True)
        for unfinished in records.glob(f"*{ASIDE}"):  # from a process that was killed
            unfinished.unlink()
        kept = lock.pop_all()
    with kept:
        yield records


def read_sweep(out: str | Path) -> pd.DataFrame:
    """Read all records of a sweep, one row per point."""
    files = sorted((Path(out) / RECORDS).glob("*.json"))
    if not files:
        raise RunError(f"{out} holds no records of a sweep; make one with: polyseme sweep")
    return pd.DataFrame([json.loads(file.read_text(encoding="utf-8")) for file in files])


def at_equal_l0(
    records: pd.DataFrame, l0: float, measures: Sequence[str] = ("fvu", "mean_distance")
) -> pd.DataFrame:
    """Interpolate measures at one L0, between neighbouring L1 coefficients on either side of it.

    Parameters
    ----------
    records : pandas.DataFrame
        From `read_sweep`.
    l0 : float
    measures : sequence of str

    Returns
    -------
    pandas.DataFrame
        One row for each form, NE coefficient and seed with both a sparser and a denser SAE; linear
        in log L0 between the two. If several pairs bracket the L0, which need not fall with the L1
        coefficient, the pair with the smaller coefficients counts. Others are left out.
    """
    rows = []
    keys = ["form", "ne_coefficient", "seed"]
    for key, group in records.groupby(keys, sort=True):
        ordered = group.sort_values("l1_coefficient")
        for pair in zip(range(len(ordered) - 1), range(1, len(ordered)), strict=True):
            two = ordered.iloc[list(pair)].sort_values("l0")
            l0s = two["l0"].to_numpy(float)
            if l0s[0] <= l0 <= l0s[1]:
                row = dict(zip(keys, key, strict=True))
                for measure in measures:
                    row[measure] = float(
                        np.interp(np.log(l0), np.log(l0s), two[measure].to_numpy(float))
                    )
                rows.append(row)
                break
    return pd.DataFrame(rows, columns=[*keys, *measures])


def common_l0(records: pd.DataFrame) -> float:
    """The L0 at which most curves can be compared: the middle of where most overlap."""
    ranges = records.groupby(["form", "ne_coefficient", "seed"])["l0"].agg(["min", "max"])
    edges = np.unique(ranges.to_numpy(float))
    if len(edges) < 2:
        return float(edges[0])
    middles = np.sqrt(np.maximum(edges[:-1], 1e-9) * edges[1:])
    covered = [int(((ranges["min"] <= l0) & (l0 <= ranges["max"])).sum()) for l0 in middles]
    widths = np.log(np.maximum(edges[1:], 1e-9) / np.maximum(edges[:-1], 1e-9))
    # Of equally good ranges the widest, which additional SAEs are least likely to miss.
    best = max(range(len(middles)), key=lambda k: (covered[k], widths[k]))
    return float(middles[best])


def mean_and_interval(values: Sequence[float], confidence: float = 0.95) -> tuple[float, float]:
    """Mean, and half the width of its confidence interval (Student's t); NaN below two values."""
    array = np.asarray(values, dtype=float)
    n = len(array)
    if n < 2:
        return (float(array.mean()) if n else float("nan")), float("nan")
    error = array.std(ddof=1) / np.sqrt(n)
    return float(array.mean()), float(error * stats.t.ppf(0.5 + confidence / 2, n - 1))


def pareto(records: pd.DataFrame, l0: float | None, measures: Sequence[str]) -> pd.DataFrame:
    """Means over seeds at one L0, with 95% confidence intervals of the mean.

    Parameters
    ----------
    records : pandas.DataFrame
        From `read_sweep`.
    l0 : float or None
        See `at_equal_l0`. None uses the SAEs unchanged, as TopK SAEs already share one L0.
    measures : sequence of str

    Returns
    -------
    pandas.DataFrame
        ``form``, ``ne_coefficient``, ``seeds``; each measure and ``<measure>_ci``, half the width
        of its interval.
    """
    points_at = records if l0 is None else at_equal_l0(records, l0, measures)
    rows = []
    for (form, ne), group in points_at.groupby(["form", "ne_coefficient"], sort=True):
        row: dict[str, Any] = {"form": form, "ne_coefficient": ne, "seeds": len(group)}
        for measure in measures:
            row[measure], row[f"{measure}_ci"] = mean_and_interval(group[measure].tolist())
        rows.append(row)
    return pd.DataFrame(rows)


def draw_pareto(
    table: pd.DataFrame, l0: float, path: str | Path | None = None, x: str = "fvu"
) -> Any:
    """Distance, calibrated distance, dead latents and participation ratio against FVU.

    Parameters
    ----------
    table : pandas.DataFrame
        From `pareto`.
    l0 : float
        The L0 of the table.
    path : str or Path, optional
        Where to save the figure.
    x : str
        The measure of cost.
    """
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise MissingDependencyError("Drawing a figure", "matplotlib", "figures") from error
    shown = [
        (key, title)
        for key, title in (
            ("mean_distance", "mean distance"),
            ("calibrated_distance", "calibrated distance"),
            ("dead_share", "dead latents"),
            ("median_participation_ratio", "participation ratio (median)"),
        )
        if key in table
    ]
    if not shown:
        raise InputError("The table has none of the measures to draw.")
    figure = Figure(figsize=(4.2 * len(shown), 4), layout="constrained")
    axes = np.atleast_1d(figure.subplots(1, len(shown)))
    colours = ("#0072b2", "#d55e00", "#009e73", "#cc79a7")
    plain = table[table["form"] == "none"]
    for ax, (key, title) in zip(axes, shown, strict=True):
        forms = [form for form in table["form"].unique() if form != "none"]
        for form, colour in zip(forms, itertools.cycle(colours), strict=False):
            line = pd.concat([plain, table[table["form"] == form]]).sort_values("ne_coefficient")
            ax.errorbar(
                line[x],
                line[key],
                xerr=line[f"{x}_ci"],
                yerr=line[f"{key}_ci"],
                marker="o",
                ms=4,
                lw=1,
                capsize=2,
                color=colour,
                label=form,
            )
            for _, row in line.iterrows():
                ax.annotate(
                    f"{row['ne_coefficient']:g}",
                    (row[x], row[key]),
                    fontsize=6.5,
                    xytext=(3, 3),
                    textcoords="offset points",
                    color=colour,
                )
        ax.set_xlabel(f"{x.upper()} at L0 = {l0:g}", fontsize=9)
        ax.set_title(title, fontsize=10)
        ax.spines[["top", "right"]].set_visible(False)
        ax.tick_params(labelsize=8)
    axes[0].legend(frameon=False, fontsize=8)
    if path is not None:
        save_figure(figure, path)
    return figure
