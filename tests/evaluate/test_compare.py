"""Comparisons: side by side, at matched density, at matched L0; and sweeps."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats

import polyseme as ps
from polyseme.errors import InputError, RunError
from polyseme.evaluate.compare import Comparison, at_l0, compare, latents_table, report_on
from polyseme.evaluate.sae import evaluate_reconstruction
from polyseme.evaluate.sweep import (
    Point,
    at_equal_l0,
    draw_pareto,
    mean_and_interval,
    pareto,
    points,
    read_sweep,
    sweep,
)

from .models import SAE, Classifier, data


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> tuple[Comparison, Path]:
    torch.manual_seed(0)
    model = Classifier()
    x, y = data(600)
    out = tmp_path_factory.mktemp("compare")
    saes = {"one": SAE(), "two": SAE()}
    found = compare(saes, model, "hidden", (x.numpy(), y.numpy()), out=out, progress=False)
    return found, out


def test_the_table_holds_the_gain_and_the_price(compared: tuple[Comparison, Path]) -> None:
    comparison, out = compared
    frame = comparison.frame()
    assert list(frame.columns) == ["one", "two"]
    for name in ("one", "two"):
        neurons = ps.open_run(out / name).neurons()
        live = neurons[neurons["n_examples"] > 0]
        assert frame[name]["mean_distance"] == pytest.approx(live["mean_distance"].mean())
        assert frame[name]["mean_distance_n"] == live["mean_distance"].notna().sum()
        assert frame[name]["dead_share"] == pytest.approx((neurons["n_examples"] == 0).mean())
    printed = {name: values for name, values in comparison.rows()}
    for name in (
        "dead latents (no example)",
        "mean distance",
        "L0",
        "FVU",
        "accuracy with the SAE",
        "participation ratio (median)",
        "label purity, labels shuffled",
        "mean distance at equal densities",
        "mean distance at that L0",
    ):
        assert len(printed[name]) == 2
    assert printed["mean distance"][0].endswith(f"(n={int(frame['one']['mean_distance_n'])})")


def test_matched_l0_is_matched(compared: tuple[Comparison, Path]) -> None:
    comparison, _ = compared
    l0 = [report.reconstruction.l0 for report in comparison.matched]
    assert l0[0] == pytest.approx(l0[1], rel=0.01)
    assert min(l0) == pytest.approx(min(r.reconstruction.l0 for r in comparison.reports), rel=0.01)


def test_bands_of_density_are_by_hand(compared: tuple[Comparison, Path]) -> None:
    comparison, _ = compared
    table = comparison.by_density(3)
    bands, last = table.iloc[:-1], table.iloc[-1]
    for report in comparison.reports:
        live = report.neurons[report.neurons["n_examples"] > 1]
        for number, band in bands.iterrows():
            upper = np.inf if number == 2 else band["high"]
            inside = live[(live["density"] >= band["low"]) & (live["density"] < upper)]
            assert band[f"{report.name} n"] == len(inside)
            if len(inside):
                assert band[report.name] == pytest.approx(inside["mean_distance"].mean())
    shared = bands[(bands["one n"] > 0) & (bands["two n"] > 0)]
    weights = shared["one n"] + shared["two n"]
    assert last["one"] == pytest.approx((shared["one"] * weights).sum() / weights.sum())


def test_the_figure_is_drawn(compared: tuple[Comparison, Path], tmp_path: Path) -> None:
    comparison, _ = compared
    comparison.figure(tmp_path / "figures" / "compare.png")
    assert (tmp_path / "figures" / "compare.png").read_bytes().startswith(b"\x89PNG")


def test_cutting_weak_activations_reaches_the_l0_and_no_less() -> None:
    sae, h = SAE(), torch.randn(500, 5)
    before = evaluate_reconstruction(sae, [h]).l0
    cut = at_l0(sae, h, before / 2)
    assert evaluate_reconstruction(cut, [h]).l0 == pytest.approx(before / 2, rel=0.01)
    assert at_l0(sae, h, before + 1) is sae
    # What is left is what was strongest, relative to each latent's maximum.
    a, b = sae.encode(h), cut.encode(h)
    share = a / a.amax(dim=0)
    assert share[b > 0].min() >= share[(a > 0) & (b == 0)].max()
    assert torch.equal(b[b > 0], a[b > 0])


def test_the_table_of_latents_equals_a_run(tmp_path: Path) -> None:
    sae, h = SAE(), torch.relu(torch.randn(300, 5))
    table = latents_table(sae, h)
    from polyseme.capture.attach import AttachedSAE

    run = ps.analyse(
        AttachedSAE(sae),
        h,
        sites="W_enc",
        out=tmp_path / "run",
        threshold=0.05,
        select=ps.FirstActive(100, 0.005),
        panels=False,
        progress=False,
    )
    pd.testing.assert_frame_equal(
        table.drop(columns="site"),
        run.neurons().drop(columns="site"),
        check_dtype=False,
        atol=1e-6,
    )


def test_there_must_be_an_sae() -> None:
    with pytest.raises(InputError, match="There is no SAE to compare"):
        compare({}, Classifier(), "hidden", data(10), out="nowhere")


def test_every_combination_and_plain_saes_once() -> None:
    found = points([0, 1], [0.1, 0.2], [0, 1], ["weighted", "calibrated"])
    assert len(found) == len(set(found)) == 2 * 2 * 3
    assert sum(point.form == "none" for point in found) == 4
    assert [point.seed for point in found] == [0] * 6 + [1] * 6


def test_a_sweep_goes_on_where_it_stopped(tmp_path: Path) -> None:
    h = torch.relu(torch.randn(200, 5))
    todo = points([0.0, 1.0], [0.1], [0, 1])
    trained: list[str] = []

    def train(point: Point) -> SAE:
        trained.append(point.name)
        torch.manual_seed(point.seed)
        return SAE()

    settings = {"d_sae": 8}
    work = sweep(h, todo, train, out=tmp_path / "s", settings=settings)
    next(work), next(work)
    work.close()
    rest = list(
        sweep(h, todo, train, out=tmp_path / "s", settings=settings, score=lambda _: {"x": 3.0})
    )
    assert trained == [point.name for point in todo]
    assert [number for number, _ in rest] == [1, 2, 3, 4]
    records = read_sweep(tmp_path / "s")
    assert len(records) == 4
    assert records["x"].notna().sum() == 2
    torch.manual_seed(0)
    expected = report_on("x", SAE(), h).as_dict()
    row = records[(records["seed"] == 0) & (records["ne_coefficient"] == 0)].iloc[0]
    assert row["fvu"] == pytest.approx(expected["fvu"])
    assert row["mean_distance"] == pytest.approx(expected["mean_distance"])
    with pytest.raises(RunError, match="other settings: d_sae was 8, is 9"):
        next(sweep(h, todo, train, out=tmp_path / "s", settings={"d_sae": 9}))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("precious")
    with pytest.raises(RunError, match="holds other files"):
        next(sweep(h, todo, train, out=tmp_path / "mine", settings=settings))
    with pytest.raises(RunError, match="holds no records of a sweep"):
        read_sweep(tmp_path / "nothing")


def test_equal_l0_is_between_the_neighbours() -> None:
    records = pd.DataFrame(
        {
            "form": "weighted",
            "ne_coefficient": 1.0,
            "seed": [0, 0, 0, 1, 1],
            "l0": [10.0, 20.0, 40.0, 30.0, 40.0],
            "fvu": [0.4, 0.2, 0.1, 0.2, 0.1],
            "mean_distance": [0.1, 0.2, 0.3, 0.2, 0.3],
        }
    )
    found = at_equal_l0(records, 20 * np.sqrt(2))
    # Seed 1 has nothing as sparse as that, and is left out rather than guessed.
    assert found["seed"].tolist() == [0]
    assert found["fvu"].item() == pytest.approx(0.15)
    assert found["mean_distance"].item() == pytest.approx(0.25)


def test_the_interval_is_that_of_the_mean() -> None:
    values = [1.0, 2.0, 4.0, 8.0, 3.0]
    mean, half = mean_and_interval(values)
    low, high = stats.t.interval(0.95, 4, loc=np.mean(values), scale=stats.sem(values))
    assert (mean - half, mean + half) == pytest.approx((low, high))
    assert np.isnan(mean_and_interval([1.0])[1])


def test_the_pareto_table_and_figure(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    rows = [
        {
            "form": "none" if ne == 0 else "weighted",
            "ne_coefficient": ne,
            "seed": seed,
            "l0": l0,
            "fvu": 1 / l0 + ne / 100 + 0.001 * rng.random(),
            "mean_distance": 0.3 / (1 + ne),
        }
        for ne in (0.0, 1.0)
        for seed in range(5)
        for l0 in (8.0, 16.0)
    ]
    table = pareto(pd.DataFrame(rows), 10, ["fvu", "mean_distance"])
    assert table["seeds"].tolist() == [5, 5]
    assert table["mean_distance"].tolist() == pytest.approx([0.3, 0.15])
    assert (table["fvu_ci"] > 0).all()
    draw_pareto(table, 10, tmp_path / "pareto.png")
    assert (tmp_path / "pareto.png").stat().st_size > 5000
    assert json.dumps(table.to_dict())
