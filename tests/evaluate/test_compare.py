"""Comparisons: side by side, at matched density, at matched L0."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

import polyseme as ps
from polyseme.errors import InputError
from polyseme.evaluate.compare import Comparison, at_l0, compare, latents_table
from polyseme.evaluate.sae import evaluate_reconstruction, evaluate_splice
from polyseme.evaluate.sweep import (
    points,
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
        run = ps.open_run(out / name)
        neurons = run.neurons()
        evaluation = run.metadata["evaluation"]
        assert {"l0", "fvu", "accuracy", "spliced_accuracy", "recovered", "purity"} <= set(
            evaluation
        )
        assert evaluation == {key: frame[name][key] for key in evaluation}
        live = neurons[neurons["n_examples"] > 0]
        assert frame[name]["mean_distance"] == pytest.approx(live["mean_distance"].mean())
        assert frame[name]["mean_distance_n"] == live["mean_distance"].notna().sum()
        dead = neurons["density"] == 0
        unlisted = (neurons["density"] > 0) & (neurons["n_examples"] == 0)
        assert frame[name]["dead_share"] == pytest.approx(dead.mean())
        assert frame[name]["without_examples_share"] == pytest.approx(unlisted.mean())
    printed = {name: values for name, values in comparison.rows()}
    for name in (
        "dead latents (no input activates them)",
        "active latents without examples",
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
    from polyseme.sites.attach import AttachedSAE

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
        # How many random examples are drawn is no property of a latent.
        table.drop(columns=["site", "n_random"]),
        run.neurons().drop(columns=["site", "n_random"]),
        check_dtype=False,
        # A run orders its columns as it stores them.
        check_like=True,
        atol=1e-6,
    )


def test_there_must_be_an_sae() -> None:
    with pytest.raises(InputError, match="There are no SAEs to compare"):
        compare({}, Classifier(), "hidden", data(10), out="nowhere")


def test_every_combination_and_plain_saes_once() -> None:
    found = points({"weighted": [0, 1], "calibrated": [0, 1]}, [0.1, 0.2], [0, 1])
    assert len(found) == len(set(found)) == 2 * 2 * 3
    assert sum(point.form == "none" for point in found) == 4
    assert [point.seed for point in found] == [0] * 6 + [1] * 6


def test_data_that_is_read_once(tmp_path: Path) -> None:
    x, y = data(20)
    with pytest.raises(
        InputError, match=r"data is a generator, .* yields its inputs only once, .* array"
    ):
        compare({"one": SAE()}, Classifier(), "hidden", (b for b in [(x, y)]), out=tmp_path)


def test_labels_that_the_model_has_no_logits_for(tmp_path: Path) -> None:
    x, y = data(20)
    given = [(x.numpy(), y.numpy() + 20)]
    with pytest.raises(InputError, match=r"highest label is 2\d, but the model returns \d+ logits"):
        evaluate_splice(Classifier(), "hidden", SAE(), given)
